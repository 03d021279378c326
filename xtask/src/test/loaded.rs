//! Clones of a Linux guest under full load: whatever it computes, writes and reads back while it is forked again and again,
//! no relative ever finds a wrong byte.

use super::machine::{boot, logs, monitored};
use crate::monitored::{Monitored, number};
use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use std::fs;

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
    let words =
        ["--timeout", "3000", "--vcpus", "4", "--host-memory", "1G", "--memory", "128M", "--disk", &disk];
    let mut machine = monitored(name, &words)?;
    machine.console.wait("guest ready")?;
    begin(&mut machine)?;
    let mut asked = 0;
    while advanced(&mut machine, 1, &mut asked)?.contains(&0) {}
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
                while !moved(&had, &advanced(&mut machine, child, &mut asked)?) {}
                machine.ask(&format!("kill {child}"))?;
            }
            machine.check()?;
        }
    }
    let had = advanced(&mut machine, 1, &mut asked)?;
    while !moved(&had, &advanced(&mut machine, 1, &mut asked)?) {}
    machine.ask("pause 1")?;
    let memory = machine.settled()?;
    ensure!(number(&memory, "/owners/guests_shared")? == 0, "something is still shared: {memory}");
    machine.check()?;
    machine.shutdown()
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

/// Each has done more.
pub(super) fn moved(had: &[u64], now: &[u64]) -> bool {
    now.iter().zip(had).all(|(now, had)| now > had)
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
