//! Clones of a Linux guest under full load: whatever it computes, writes and reads back while it is forked again and again,
//! no relative ever finds a wrong byte.

use super::machine::{STAYS, boot, logs, monitored};
use crate::monitored::{Monitored, number, rows};
use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use serde_json::Value;
use std::fs;

/// Too little for all of them.
const HOST: &str = "128M";
/// Pages that the guest may come to have for itself meanwhile: its load is the same all the time.
const GROWN: u64 = 2048;
/// Clones that live beside each other at most.
const ALIVE: usize = 3;

pub(super) fn trials() -> Vec<Trial> {
    vec![boot("a_linux_under_full_load_is_cloned_while_it_runs_and_nobody_finds_a_wrong_byte", |name| {
        loaded(name, 6)
    })]
}

/// What takes too long for every run.
pub(super) fn matrix() -> Vec<Trial> {
    vec![boot("matrix_a_linux_under_full_load_is_cloned_a_hundred_times", |name| loaded(name, 100))]
}

/// Two writers of the disk, each with its own part, which read back from the disk what they wrote, and a test of
/// memory; each counts its rounds in a file, and says so in another when it finds something wrong.
const LOAD: [&str; 3] = [
    "disk() { n=0; while :; do dd if=/dev/urandom of=/x$1 bs=64k count=4 2>/dev/null; \
     dd if=/x$1 of=/dev/vda bs=64k seek=$(($1*4)) conv=notrunc,fsync 2>/dev/null; echo 3 >/proc/sys/vm/drop_caches; \
     dd if=/dev/vda bs=64k skip=$(($1*4)) count=4 2>/dev/null | cmp - /x$1 || echo disk$1 >>/wrong; \
     n=$((n+1)); echo $n >/n$1; mv /n$1 /r$1; done; }",
    "memory() { n=0; while memtest 4 1 >/dev/null; do n=$((n+1)); echo $n >/n$1; mv /n$1 /r$1; done; echo memory >>/wrong; }",
    // What a guest has done, for whoever asks; the answer differs from the question.
    "rounds() { echo rounds-$1 $(cat /r1 /r2 /r3) wrong $(cat /wrong 2>/dev/null) .; }",
];

/// A guest with four vCPUs writes, reads, computes; clones of it are made, looked at and killed in no order.
fn loaded(name: &str, clones: usize) -> Result<()> {
    let disk = logs(name).join("disk.img");
    fs::create_dir_all(logs(name))?;
    fs::write(&disk, vec![0; 1 << 20])?;
    let disk = format!("{},private", disk.display());
    let words = ["--timeout", "3000", "--vcpus", "4", "--memory", "128M", "--disk", &disk];
    let small = ["--host-memory", HOST, "--swap", "512M", "--overcommit", "none"];
    let mut machine = monitored(name, &[&words[..], &small, &STAYS].concat())?;
    machine.console.wait("guest ready")?;
    begin(&mut machine)?;
    let mut asked = 0;
    while advanced(&mut machine, 1, &mut asked)?.contains(&0) {}
    machine.ask("pause 1")?;
    let before = Holding::of(&mut machine)?;
    machine.ask("resume 1")?;
    let mut alive: Vec<(u64, Vec<u64>)> = Vec::new();
    for round in 0..clones {
        let child = machine.fork(1, 1)?[0];
        machine.check()?;
        let had = advanced(&mut machine, child, &mut asked)?;
        alive.push((child, had));
        if alive.len() > ALIVE || round + 1 == clones {
            while alive.len() > if round + 1 == clones { 0 } else { ALIVE - 1 } {
                let (child, had) = alive.remove(round * 7 % alive.len());
                // Each of the three has done something since the fork.
                outdoes(&mut machine, child, &had, &mut asked)?;
                machine.ask(&format!("kill {child}"))?;
            }
            machine.check()?;
        }
    }
    goes_on(&mut machine, 1, &mut asked)?;
    machine.ask("pause 1")?;
    let after = Holding::of(&mut machine)?;
    let swap = machine.ask("swap")?;
    after.is_as(&before)?;
    ensure!(number(&swap, "/pages/written")? > 0, "nothing was ever swapped out: {swap}");
    machine.check()?;
    machine.ask("kill 1")?;
    machine.until("swap", |swap| swap["slots"]["in_use"] == 0)?;
    let memory = machine.settled()?;
    ensure!(number(&memory, "/owners/guests_resident")? == 0, "somebody dead has frames: {memory}");
    machine.check()?;
    machine.shutdown()
}

/// What there is of a machine's only guest, who stands still.
#[derive(Debug)]
struct Holding {
    /// Objects in use.
    objects: usize,
    /// Pages of its own: in frames or in swap.
    pages: u64,
    /// Slots that are taken.
    slots: u64,
    /// Pages of it that are in slots only.
    swapped: u64,
}

impl Holding {
    fn of(machine: &mut Monitored) -> Result<Self> {
        machine.until("stats", |stats| stats["chores"] == false)?;
        machine.until("memory", |memory| memory["transfers"] == 0)?;
        // Every frame is free, a table, or something that this guest has.
        machine.settled()?;
        // Nothing is shared, and nothing nobody's, when the chore that another CPU may be at is done, too.
        machine.until("memory", |memory| {
            memory["owners"]["guests_shared"] == 0 && memory["owners"]["no_guests"] == 0
        })?;
        let all = machine.ask("objects")?;
        let used: Vec<&Value> = rows(&all)?.iter().filter(|row| row["cached"] == false).collect();
        let sum = |key: &str| used.iter().map(|row| number(row, &format!("/{key}"))).sum::<Result<u64>>();
        let swapped = sum("swapped")?;
        Ok(Self {
            objects: used.len(),
            pages: sum("resident")? + swapped,
            slots: number(&machine.ask("swap")?, "/slots/in_use")?,
            swapped,
        })
    }

    /// The clones have left nothing: as many objects; no more pages than the guest itself can have come by since, which
    /// went on writing; and no slot but its own.
    fn is_as(&self, before: &Self) -> Result<()> {
        ensure!(self.objects == before.objects, "objects: {before:?}, then {self:?}");
        ensure!(self.pages <= before.pages + GROWN, "pages: {before:?}, then {self:?}");
        ensure!(self.slots >= self.swapped && self.slots <= self.pages, "slots: {before:?}, then {self:?}");
        Ok(())
    }
}

/// Puts guest 1 under load.
pub(super) fn begin(machine: &mut Monitored) -> Result<()> {
    for (number, line) in LOAD.into_iter().enumerate() {
        machine.talk(
            1,
            &format!("{line}; echo said-$(({number}+100))"),
            &format!("said-{}", number + 100),
        )?;
    }
    machine.talk(1, "dmesg -n 1; disk 1 & disk 2 & memory 3 & echo load-$((40+2))", "load-42")
}

/// Waits until each of a guest's loads has done more rounds than these.
pub(super) fn outdoes(machine: &mut Monitored, guest: u64, had: &[u64], asked: &mut u64) -> Result<()> {
    while !advanced(machine, guest, asked)?.iter().zip(had).all(|(now, had)| now > had) {}
    Ok(())
}

/// Waits until each has done more than it has now.
pub(super) fn goes_on(machine: &mut Monitored, guest: u64, asked: &mut u64) -> Result<()> {
    let had = advanced(machine, guest, asked)?;
    outdoes(machine, guest, &had, asked)
}

/// How many rounds each of a guest's loads has done; an error if one of them found a wrong byte.
pub(super) fn advanced(machine: &mut Monitored, guest: u64, asked: &mut u64) -> Result<Vec<u64>> {
    *asked += 1;
    machine.talk(
        guest,
        &format!("rounds $(({asked}+7000)); echo told-$(({asked}+7000))"),
        &format!("told-{}", *asked + 7000),
    )?;
    let line = machine.last_line(guest, &format!("rounds-{} ", *asked + 7000))?;
    let (rounds, wrong) = line.split_once(" wrong ").with_context(|| format!("guest {guest} says {line}"))?;
    // The kernel may say something behind it.
    ensure!(wrong.starts_with('.'), "guest {guest} found a wrong byte: {line}");
    let rounds = rounds.split(' ').skip(1).map(|word| word.parse::<u64>().unwrap_or(0));
    let rounds: Vec<u64> = rounds.collect();
    // A load that has not ended its first round has no file yet.
    Ok(if rounds.len() == 3 { rounds } else { vec![0; 3] })
}
