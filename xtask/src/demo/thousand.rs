//! `demo thousand`: as many Linux guests as the machine takes, all alive, all answering.

use super::found::Found;
use super::{booted, last_fork, shuffled};
use crate::monitored::{Monitored, introduction, number};
use crate::progress::step;
use anyhow::{Result, ensure};
use std::collections::BTreeSet;

/// MiB of the host.
const HOST: &str = "4096M";

/// Boots one guest, forks it into `count`, and hears each.
pub(super) fn show(cpu: &str, count: usize) -> Result<()> {
    ensure!((1..=1023).contains(&count), "--children: from 1 to 1023, not {count}");
    let mut machine = booted(&["--timeout", "7200", "--host-memory", HOST, "--cpu", cpu])?;
    // It takes less once it has settled.
    machine.talk(1, "echo settled-$((40+2))", "settled-42")?;
    let before = number(&machine.ask("memory")?, "/owners/guests_resident")?;
    println!("One Linux guest runs, with 256 MiB, on a host with {HOST}; {} MiB are resident.", before >> 8);
    // Each begins when it is asked: a thousand that wake at once would keep an emulated CPU busy with that alone.
    let children = step("forking", || machine.fork_paused(1, count))?;
    println!("It is forked into {} live children in one pause: {}", children.len(), last_fork()?);
    let answers = step("each says its number, its name and random bytes", || hear(&mut machine, &children))?;
    ensure!(answers.len() == count, "{} of {count} children drew random bytes of their own", answers.len());
    // The audit comes later: it follows every relative's chain, which takes minutes for a thousand.
    let mut found = Found::new("thousand", cpu);
    found.guests(&machine.ask("guests")?)?;
    let mut private: Vec<u64> = found.guests.iter().map(|guest| guest.private_kib).collect();
    private.sort_unstable();
    let memory = machine.ask("memory")?;
    let pages = |place: &str| number(&memory, place);
    let mib = |pages: u64| pages >> 8;
    let alive = found.guests.len() as u64;
    found.fact("Linux guests alive, each of which answered", alive);
    found.fact("MiB of RAM that they see", alive * 256);
    found.fact("MiB resident", mib(pages("/owners/guests_resident")?));
    found.fact("MiB if each had a copy", mib(pages("/owners/if_nothing_were_shared")?));
    found.fact("MiB of tables", mib(pages("/frames/tables")?));
    found.fact("MiB free", mib(pages("/frames/free")?));
    for (what, place) in [("least", 0), ("median", private.len() / 2), ("most", private.len() - 1)] {
        let kib = private.get(place).copied().unwrap_or_default();
        found.fact(format!("KiB that a guest has of its own, {what}"), kib);
    }
    found.show();
    step("killing them in no order", || {
        shuffled(&children).into_iter().try_for_each(|child| machine.ask(&format!("kill {child}")).map(drop))
    })?;
    machine.check()?;
    machine.talk(1, "echo still-$((40+2))", "still-42")?;
    let after = number(&machine.settled()?, "/owners/guests_resident")?;
    println!(
        "All children are gone, the first answers; {} MiB resident before, {} MiB after.",
        mib(before),
        mib(after)
    );
    ensure!(after < before + before / 8, "memory did not come back");
    machine.shutdown()?;
    found.leave()
}

/// What each child answers. A few dozen begin at a time, and then stand still until all have answered; then all run.
fn hear(machine: &mut Monitored, children: &[u64]) -> Result<BTreeSet<String>> {
    let mut answers = BTreeSet::new();
    for some in children.chunks(32) {
        for child in some {
            machine.ask(&format!("resume {child}"))?;
            machine.ask(&format!("send {child} \"{}\"", introduction()))?;
        }
        for child in some {
            answers.insert(machine.introduced(*child)?);
            machine.ask(&format!("pause {child}"))?;
        }
    }
    children.iter().try_for_each(|child| machine.ask(&format!("resume {child}")).map(drop))?;
    Ok(answers)
}
