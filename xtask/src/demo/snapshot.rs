//! `demo snapshot`: a guest is written to a disk while it works, its machine is killed, and it goes on in another.
//!
//! What is written is the guest at one instant, however long the writing takes: it counts on meanwhile, and goes on later
//! from where it was at that instant, with its pages read when they are touched.

use super::found::Found;
use super::{booted, dir};
use crate::monitored::{Monitored, number, text};
use crate::progress::step;
use crate::run::Run;
use crate::stored;
use anyhow::{Context, Result, ensure};
use std::fs;
use std::time::Duration;

/// MiB of the working set.
const SET_MIB: u64 = 32;
/// What the guest does all the time: it counts, and changes a MiB of memory at every count.
const LOAD: &str = "n=0; while :; do n=$((n+1)); head -c 1000000 /dev/urandom >/scratch; echo $n >/new; mv /new /count; done &";

/// Shows it.
pub(super) fn show(cpu: &str) -> Result<()> {
    let file = dir().join("golden.img");
    fs::create_dir_all(dir())?;
    let _ = fs::remove_file(&file);
    let image = format!("{},new", file.display());
    let mut machine = booted(&["--timeout", "900", "--vcpus", "2", "--cpu", cpu, "--image", &image])?;
    let fill =
        format!("head -c {} /dev/urandom > /set; md5sum /set > /sum; echo filled-$((40+2))", SET_MIB << 20);
    step("filling the working set", || machine.talk(1, &fill, "filled-42"))?;
    machine.talk(1, &format!("dmesg -n 1; {LOAD} echo counts-$((40+2))"), "counts-42")?;
    while counted(&mut machine, 1)? < 3 {}
    println!(
        "A Linux guest counts, and changes a MiB at every count. It is stored while it does: save 1 golden --rate 8M"
    );
    let before = counted(&mut machine, 1)?;
    let pushed = pushes(&mut machine)?;
    let job = number(&machine.ask("save 1 golden --rate 8M")?, "/job")?;
    println!("\n{:>8} {:>8} {:>12} {:>12} {:>8}", "ms", "looked", "stored KiB", "pushed KiB", "count");
    let after = loop {
        let jobs = machine.ask("jobs")?;
        let row =
            jobs.as_array().and_then(|jobs| jobs.iter().find(|row| row["id"] == job)).context("no job")?;
        let count = counted(&mut machine, 1)?;
        println!(
            "{:>8} {:>7}% {:>12} {:>12} {count:>8}",
            number(row, "/ms")?,
            number(row, "/percent")?,
            number(row, "/stored_pages")? * 4,
            (pushes(&mut machine)? - pushed) * 4
        );
        match text(row, "/state")? {
            "running" => std::thread::sleep(Duration::from_millis(700)),
            "done" => break count,
            other => anyhow::bail!("it was not stored: {other}"),
        }
    };
    ensure!(after > before, "the guest did not go on while it was stored");
    machine.check()?;
    // No farewell: QEMU is killed.
    drop(machine);
    println!("\nIts machine is killed. What is on the disk:");
    let found = stored::whole(&file)?;
    println!("  generation {}, {}", found.header.generation, found.text);
    println!(
        "  {} of {} pages are not zeros; every one is as it was stored.",
        found.header.stored, found.header.pages
    );

    let image = file.display().to_string();
    let words = ["--timeout", "900", "--cpu", cpu, "--image", &image, "--script", "/dev/null"];
    let mut machine = step("another machine starts with it", || {
        Monitored::start(Run::from_words(&words)?, &dir().join("later"))
    })?;
    let first = counted(&mut machine, 1)?;
    let resident = number(&machine.ask("memory")?, "/owners/guests_resident")?;
    println!(
        "\nIt counted {before} when it was stored and {after} when that was done; here it says {first}. \
         {resident} of its pages have been needed so far."
    );
    ensure!(first >= before && first < after.max(before + 3), "it did not go on where it was: {first}");
    let twin = machine.ask("create --from golden name=twin")?["created"].as_u64().context("no twin")?;
    for guest in [1, twin] {
        machine.talk(guest, "md5sum -c /sum", "/set: OK")?;
    }
    let (one, two) = (counted(&mut machine, 1)?, counted(&mut machine, twin)?);
    machine.check()?;
    let memory = machine.ask("memory")?;
    let (resident, copies) =
        (number(&memory, "/owners/guests_resident")?, number(&memory, "/owners/if_nothing_were_shared")?);
    println!("A second guest is made from it. Both have the working set whole; they count {one} and {two}.");
    let mut told = Found::new("snapshot", cpu);
    told.guests(&machine.ask("guests")?)?;
    told.fact("KiB stored while the guest ran", found.header.stored * 4);
    told.fact("KiB resident, of two guests made from it", resident * 4);
    told.fact("KiB if each had a copy", copies * 4);
    told.show();
    machine.shutdown()?;
    told.leave()
}

/// How far a guest has counted.
fn counted(machine: &mut Monitored, guest: u64) -> Result<u64> {
    machine.talk(guest, "echo at-$(cat /count) is-$((40+2))", " is-42")?;
    let line = machine.last_line(guest, " is-42")?;
    let count = line.split("at-").nth(1).and_then(|rest| rest.split(' ').next()?.parse().ok());
    Ok(count.unwrap_or(0))
}

fn pushes(machine: &mut Monitored) -> Result<u64> {
    number(&machine.ask("stats")?, "/memory/pushed")
}
