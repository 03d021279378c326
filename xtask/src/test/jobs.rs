//! Boot tests of the work that goes on behind a guest's back: how fast it may be, and what is left of it when it is given up.

use super::machine::{STAYS, boot, monitored, tiny_guest};
use super::stored::{another, fresh};
use crate::monitored::{Monitored, number, rows};
use crate::stored;
use anyhow::{Context, Result, ensure};
use hv_abi::image::PAGE;
use libtest_mimic::Trial;
use serde_json::Value;

pub(super) fn trials() -> Vec<Trial> {
    vec![boot(
        "a_guest_is_stored_no_faster_than_was_said_and_one_that_is_given_up_leaves_what_was_there",
        paced_and_given_up,
    )]
}

/// Pages that a job may be ahead of its rate: the one that it is at, and those that it has under way.
const AHEAD: u64 = 64;

/// What `jobs` says of one.
fn job(machine: &mut Monitored, id: u64) -> Result<Value> {
    let jobs = machine.ask("jobs")?;
    let job = rows(&jobs)?.iter().find(|row| row["id"] == id).cloned();
    job.with_context(|| format!("no job {id}: {jobs}"))
}

/// The objects that are in use and what they shadow.
fn used(objects: &Value) -> Vec<(&Value, &Value)> {
    let rows = rows(objects).unwrap_or_default();
    let mut used: Vec<_> = rows
        .iter()
        .filter(|row| row["cached"] == false)
        .map(|row| (&row["object"], &row["shadows"]))
        .collect();
    used.sort_by_key(|(object, _)| object.as_u64());
    used
}

/// A guest of which 9 MiB are no zeros is stored, the second time within its rate; a third time it is given up in the middle, while
/// the guest writes.
fn paced_and_given_up(name: &str) -> Result<()> {
    const RATE_MIB: u64 = 2;
    let (file, guest) = (fresh(name)?, tiny_guest(name, "generations")?);
    let image = format!("{},new", file.display());
    let words =
        ["--timeout", "120", "--memory", "16M", "--kernel", &guest, "--append", "pages=3072 writes=1024"];
    let mut machine = monitored(name, &[&words[..], &["--image", &image], &STAYS].concat())?;
    machine.ask("wait 1 ready")?;
    for generation in 1..=4 {
        machine.talk(1, "w", &format!("generation {generation} lived"))?;
    }
    // Before anything is kept for a job: that is given back only after the job is seen to be done.
    let before = machine.ask("objects")?;
    machine.ask("save 1 golden --wait")?;
    let braked = number(&machine.ask(&format!("save 1 golden --rate {RATE_MIB}M"))?, "/job")?;
    let mut looks = 0;
    let (pages, ms) = loop {
        let now = job(&mut machine, braked)?;
        let (pages, ms) = (number(&now, "/stored_pages")?, number(&now, "/ms")?);
        let earned = ms * (RATE_MIB << 20) / 1000 / PAGE as u64;
        ensure!(pages <= earned + AHEAD, "{pages} pages in {ms} ms, where {earned} may be: {now}");
        match now["state"].as_str() {
            Some("running") => looks += 1,
            Some("done") => break (pages, ms),
            _ => anyhow::bail!("it has not gone well: {now}"),
        }
    };
    ensure!(looks > 3, "it was over after {looks} looks");
    ensure!(pages * PAGE as u64 > 7 << 20, "only {pages} pages in {ms} ms");

    let given_up = number(&machine.ask("save 1 golden --rate 1M")?, "/job")?;
    machine.until("jobs", |jobs| {
        let rows = rows(jobs).unwrap_or_default();
        rows.iter().any(|row| row["id"] == given_up && number(row, "/stored_pages").is_ok_and(|n| n > 100))
    })?;
    ensure!(used(&machine.ask("objects")?).len() > used(&before).len(), "nothing was kept for it");
    machine.talk(1, "w", "generation 5 lived")?;
    machine.ask(&format!("cancel {given_up}"))?;
    let over = |jobs: &Value| rows(jobs).is_ok_and(|rows| rows.iter().all(|row| row["state"] != "running"));
    machine.until("jobs", over)?;
    let now = job(&mut machine, given_up)?;
    ensure!(now["state"] == "cancelled" && number(&now, "/stored_pages")? < pages, "{now}");
    // What the guest has is as if nobody had ever asked.
    machine.until("objects", |now| used(now) == used(&before))?;
    machine.talk(1, "c", "all well")?;
    ensure!(number(&machine.ask("images")?, "/0/generation")? == 2, "another generation");
    machine.ask("pause 1")?;
    machine.settled()?;
    machine.check()?;
    machine.shutdown()?;
    ensure!(stored::whole(&file)?.header.generation == 2, "another generation holds");

    let image = file.display().to_string();
    let mut machine =
        another(name, "later", &[&["--timeout", "60", "--image", &image][..], &STAYS].concat())?;
    machine.talk(1, "c", "all well")?;
    let line = machine.last_line(1, "all well")?;
    ensure!(line.starts_with("generations: 4 lived, "), "what was there before says {line}");
    machine.check()?;
    machine.shutdown()
}
