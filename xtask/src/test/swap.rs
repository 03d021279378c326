//! Boot tests of swap: disks that fail, clones, more guests than fit, no room left.

use super::machine::{boot, logs, monitored, tiny_guest};
use crate::errors;
use crate::monitored::{Monitored, number, rows, text};
use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use serde_json::Value;

pub(super) fn trials() -> Vec<Trial> {
    vec![boot("a_failing_swap_disk_costs_pages_and_never_a_wrong_byte", failing)]
}

/// What a thrashing guest says at its end: pages that it gave up. `None` while it has not ended.
fn given_up(machine: &mut Monitored, guest: &str) -> Result<Option<u64>> {
    let log = machine.ask(&format!("log {guest}"))?;
    let log = text(&log, "/log")?;
    ensure!(!log.contains("FAILED"), "{guest} says\n{log}");
    let line = log.lines().find(|line| line.contains(" given up"));
    let words = |line: &str| line.split_whitespace().rev().nth(2)?.parse().ok();
    line.map(|line| words(line).with_context(|| format!("no number in \"{line}\""))).transpose()
}

/// The answer to `swap` once no transfer is under way.
fn at_rest(machine: &mut Monitored) -> Result<Value> {
    machine.until("memory", |memory| memory["transfers"] == 0)?;
    machine.ask("swap")
}

/// With a script the machine stays when its last guest has ended; it has no line.
const STAYS: [&str; 2] = ["--script", "/dev/null"];

/// Three guests fill and compare more memory than the host has, on a disk that fails at more than a thousand places.
fn failing(name: &str) -> Result<()> {
    const WRITES: u64 = 480 + 60;
    let thrash = tiny_guest(name, "thrash")?;
    let words = ["--timeout", "200", "--host-memory", "128M", "--memory", "96M", "--guests", "3"];
    let words = [&words[..], &STAYS].concat();
    let more = ["--swap", "320M", "--overcommit", "none", "--swap-errors", "480,480,120,60"];
    let guest = ["--kernel", &thrash, "--append", "linger rounds=3"];
    let mut machine = monitored(name, &[&words[..], &more, &guest].concat())?;
    // One ends in the middle of it all.
    machine.ask("wait guest2 \"round 1 is read\"")?;
    machine.ask("kill guest2")?;
    machine.check()?;
    let mut lost = 0;
    for guest in ["guest0", "guest1"] {
        machine.ask(&format!("wait {guest} \" given up\""))?;
        let given_up = given_up(&mut machine, guest)?.context("it did not say how many")?;
        let told = number(&machine.ask(&format!("stats {guest}"))?, "/memory/fault_lost")?;
        ensure!(told == given_up, "{guest} gave {given_up} pages up, and {told} faults failed");
        lost += given_up;
        machine.ask(&format!("wait {guest} \"guest thrash: ok\""))?;
    }
    ensure!(lost > 0, "no page was lost, where the disk never gives some back");
    machine.check()?;

    // Each error that the disk made is in the monitor's count, and there is no other.
    let swap = at_rest(&mut machine)?;
    let told = number(&swap, "/transfers/in_failed")? + number(&swap, "/transfers/out_failed")?;
    let made = errors::failed(&logs(name).join("requests.log"))?;
    ensure!(told == made && made > 1000, "the disk failed {made} times: {swap}");
    ensure!(
        number(&swap, "/transfers/in_failed")? > 0 && number(&swap, "/transfers/out_failed")? > 0,
        "{swap}"
    );
    ensure!(number(&swap, "/transfers/in_corrupt")? == 0, "{swap}");
    let bad = number(&swap, "/slots/bad")?;
    // A slot that fails alone is not tried again, though it might take something later.
    ensure!((1..=WRITES).contains(&bad), "{bad} slots are bad, {WRITES} places do not take a write: {swap}");
    for guest in ["guest0", "guest1"] {
        machine.ask(&format!("kill {guest}"))?;
    }
    // A guest that begins now meets the same disk.
    machine.ask("create name=late kernel=kernel memory=96M append=\"linger rounds=1 seed=9\"")?;
    machine.ask("wait late \"guest thrash: ok\"")?;
    given_up(&mut machine, "late")?;
    machine.ask("kill late")?;
    nothing_left(&mut machine)?;
    machine.shutdown()
}

/// Nobody lives any more: no slot is taken.
fn nothing_left(machine: &mut Monitored) -> Result<()> {
    machine.until("swap", |swap| swap["slots"]["in_use"] == 0)?;
    machine.check()?;
    ensure!(rows(&machine.ask("guests")?)?.is_empty(), "somebody lives");
    Ok(())
}
