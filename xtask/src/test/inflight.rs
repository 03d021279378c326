//! Boot tests of forks and resets while a guest's disk owes it something: nobody waits for the disk, and each side's requests
//! are answered once.

use super::loaded;
use super::machine::{STAYS, boot, logs, monitored, tiny_guest};
use crate::monitored::{Monitored, number, text};
use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use std::fs;
use std::time::{Duration, Instant};

pub(super) fn trials() -> Vec<Trial> {
    vec![
        boot("a_fork_and_a_reset_wait_for_no_disk_and_what_was_asked_for_is_answered_once", crawling),
        boot("a_linux_under_full_load_is_reset_while_it_writes_and_finds_no_wrong_byte", under_load),
    ]
}

/// A disk that the guest `inflight` knows, among a test's logs.
fn disk(test: &str) -> Result<String> {
    let file = logs(test).join("disk.img");
    fs::create_dir_all(logs(test))?;
    fs::write(&file, (0..(1_u64 << 20)).step_by(8).flat_map(u64::to_le_bytes).collect::<Vec<_>>())?;
    Ok(format!("{},private", file.display()))
}

/// Has the guest `inflight` say how far it is.
fn is_at(machine: &mut Monitored, guest: u64, begun: u32, done: u32) -> Result<()> {
    let line = format!("inflight: {begun} begun, {done} done");
    machine.talk(guest, "?", &line).with_context(|| format!("guest {guest} does not say \"{line}\""))
}

/// How often a guest has said something.
fn said(machine: &mut Monitored, guest: u64, words: &str) -> Result<usize> {
    Ok(text(&machine.ask(&format!("log {guest}"))?, "/log")?.matches(words).count())
}

/// The disk gives 64 KiB in twelve seconds. While it owes the guest a page that is about to be written, the guest is
/// cloned, kept, made again and that one reset: at once, and each goes on while it waits.
fn crawling(name: &str) -> Result<()> {
    const TAKES: Duration = Duration::from_secs(12);
    let rate = ((64 << 10) / TAKES.as_secs()).to_string();
    let (disk, guest) = (disk(name)?, tiny_guest(name, "inflight")?);
    let words = ["--timeout", "120", "--memory", "16M", "--kernel", &guest, "--disk", &disk];
    let mut machine = monitored(name, &[&words[..], &["--disk-rate", &rate], &STAYS].concat())?;
    machine.ask("wait 1 \"inflight: ready\"")?;
    machine.talk(1, "w", "asks for write 1")?;
    machine.wait_long("1", "write 1 is there")?;
    // What comes next has to wait until that is paid for.
    machine.talk(1, "w", "asks for write 2")?;
    let asked = Instant::now();
    let child = machine.fork(1, 1)?[0];
    machine.ask("snapshot 1 mid")?;
    let late = number(&machine.ask("create --from mid")?, "/created")?;
    machine.ask(&format!("reset {late}"))?;
    for guest in [1, child, late] {
        is_at(&mut machine, guest, 2, 1)?;
    }
    ensure!(asked.elapsed() < TAKES, "all that took {:?}", asked.elapsed());
    for guest in [1, child, late] {
        machine.wait_long(&guest.to_string(), "write 2 is there")?;
    }
    // One that asks for more and is reset then: what comes after that is its old life's, and not told.
    machine.talk(late, "w", "asks for write 3")?;
    machine.ask(&format!("reset {late}"))?;
    machine.wait_long(&late.to_string(), "write 2 is there")?;
    is_at(&mut machine, late, 2, 2)?;
    machine.talk(child, "w", "asks for write 3")?;
    machine.wait_long(&child.to_string(), "write 3 is there")?;
    is_at(&mut machine, late, 2, 2)?;
    is_at(&mut machine, child, 3, 3)?;
    is_at(&mut machine, 1, 2, 2)?;
    machine.talk(late, "w", "asks for write 3")?;
    machine.wait_long(&late.to_string(), "write 3 is there")?;
    is_at(&mut machine, late, 3, 3)?;
    for guest in [1, child, late] {
        ensure!(said(&mut machine, guest, "FAILED")? == 0, "guest {guest} has failed");
    }
    ensure!(said(&mut machine, 1, "write 2 is there")? == 1, "the parent is answered twice");
    ensure!(said(&mut machine, child, "write 2 is there")? == 1, "the child is answered twice");
    machine.check()?;
    machine.shutdown()
}

/// Times that a guest is taken back to what it was.
const RESETS: usize = 4;

/// A Linux that writes to its disk and reads it back, on four vCPUs, is taken back again and again: it goes on from
/// where it was kept, and everything that it reads is what that life wrote.
fn under_load(name: &str) -> Result<()> {
    let disk = logs(name).join("disk.img");
    fs::create_dir_all(logs(name))?;
    fs::write(&disk, vec![0; 1 << 20])?;
    let disk = format!("{},private", disk.display());
    let words = ["--timeout", "600", "--vcpus", "4", "--memory", "128M", "--disk", &disk];
    let mut machine = monitored(name, &words)?;
    machine.console.wait("guest ready")?;
    loaded::begin(&mut machine)?;
    let mut asked = 0;
    while loaded::advanced(&mut machine, 1, &mut asked)?.contains(&0) {}
    machine.ask("snapshot 1 kept")?;
    let child = number(&machine.ask("create --from kept")?, "/created")?;
    for round in 100..100 + RESETS {
        loaded::goes_on(&mut machine, child, &mut asked)?;
        machine.talk(child, &format!("LATER=true; echo is-$LATER-{round}"), &format!("is-true-{round}"))?;
        machine.ask(&format!("reset {child}"))?;
        // What it has done since it was kept is undone.
        machine.talk(child, &format!("echo is-$LATER-{round}"), &format!("is--{round}"))?;
    }
    loaded::goes_on(&mut machine, child, &mut asked)?;
    loaded::goes_on(&mut machine, 1, &mut asked)?;
    machine.check()?;
    machine.shutdown()
}
