//! `demo fork-tree`: a guest that forks itself from within, whose children do the same.
//!
//! Nobody outside does anything: a loop in a shell calls `fork-guest 2` three times, so each relative comes out of it with a
//! path of three places, and one guest has become twenty-seven.

use super::found::Found;
use super::{booted, shuffled};
use crate::monitored::{Monitored, number, rows};
use crate::progress::step;
use anyhow::{Context, Result, ensure};
use std::collections::BTreeMap;

/// Children of each fork, and forks on the way from the first guest to the last.
const CHILDREN: u64 = 2;
const DEPTH: u32 = 3;
/// MiB that all share.
const SET_MIB: u64 = 16;

/// Has it grow, looks at every leaf, cuts branches.
pub(super) fn show(cpu: &str) -> Result<()> {
    let relatives = (CHILDREN + 1).pow(DEPTH);
    let grant = relatives.to_string();
    let mut machine =
        booted(&["--timeout", "1800", "--host-memory", "1G", "--cpu", cpu, "--grant-fork", &grant])?;
    let fill =
        format!("head -c {} /dev/urandom > /set; md5sum /set > /sum; echo filled-$((40+2))", SET_MIB << 20);
    step("filling the working set", || machine.talk(1, &fill, "filled-42"))?;
    let before = number(&machine.ask("memory")?, "/owners/guests_resident")?;
    println!(
        "One Linux guest runs, with a working set of {SET_MIB} MiB. Its shell is told once, and nobody else is:"
    );
    let grow = format!(
        "path=; for level in $(seq {DEPTH}); do until line=$(fork-guest {CHILDREN} 2>/dev/null); do sleep 0.1; done; \
         set -- $line; path=$path.$3; done; md5sum -c /sum && echo $path > /path && echo leaf $(cat /path) is-$((40+2))"
    );
    println!("  {grow}");
    machine.ask(&format!("send 1 \"{grow}\""))?;
    let leaves = step("the tree grows", || leaves(&mut machine, relatives))?;
    machine.check()?;
    let guests = machine.ask("guests")?;
    println!("\n{:<24} {:>6} {:>12} {:>12}", "path", "guest", "private KiB", "shared KiB");
    for (path, guest) in &leaves {
        let row = rows(&guests)?.iter().find(|row| row["id"] == *guest).context("a guest is gone")?;
        let kib = |column: &str| number(row, column).map(|pages| pages * 4);
        // The first of its branch stands furthest left.
        let places: Vec<&str> = path.split('.').skip(1).collect();
        let indent = places.iter().rposition(|place| *place != "0").map_or(0, |last| last + 1);
        println!(
            "{:<24} {guest:>6} {:>12} {:>12}",
            format!("{}{}", "   ".repeat(indent), places.join(".")),
            kib("/private_pages")?,
            kib("/shared_pages")?
        );
    }
    let memory = machine.ask("memory")?;
    let (resident, copies) =
        (number(&memory, "/owners/guests_resident")?, number(&memory, "/owners/if_nothing_were_shared")?);
    let mut found = Found::new("fork-tree", cpu);
    found.guests(&guests)?;
    found.fact("Linux guests, none of them told from outside", relatives);
    found.fact("MiB resident", resident >> 8);
    found.fact("MiB if each had a copy", copies >> 8);
    found.show();
    ensure!(copies > resident * 4, "so little is shared: {memory}");
    cut(&mut machine, &leaves)?;
    let after = number(&machine.settled()?, "/owners/guests_resident")?;
    println!("The first is alone again; {} MiB resident before, {} MiB after.", before >> 8, after >> 8);
    ensure!(after < before + before / 8, "memory did not come back");
    machine.shutdown()?;
    found.leave()
}

/// Every relative's path, with its number.
fn leaves(machine: &mut Monitored, relatives: u64) -> Result<BTreeMap<String, u64>> {
    let all = |guests: &serde_json::Value| rows(guests).is_ok_and(|rows| rows.len() as u64 == relatives);
    let guests = machine.until("guests", all)?;
    let mut leaves = BTreeMap::new();
    for row in rows(&guests)? {
        let guest = number(row, "/id")?;
        machine.ask(&format!("wait {guest} \" is-42\""))?;
        let line = machine.last_line(guest, " is-42")?;
        let path = line.split_whitespace().nth(1).unwrap_or_default().to_owned();
        ensure!(leaves.insert(path.clone(), guest).is_none(), "two relatives are both {path}");
    }
    let complete = leaves.keys().all(|path| path.split('.').count() == DEPTH as usize + 1);
    ensure!(complete && leaves.len() as u64 == relatives, "paths are missing: {leaves:?}");
    Ok(leaves)
}

/// Kills all but the first, parents before and after their children; who is left still has what it had.
fn cut(machine: &mut Monitored, leaves: &BTreeMap<String, u64>) -> Result<()> {
    let others: Vec<u64> = leaves.values().copied().filter(|guest| *guest != 1).collect();
    let mut order = shuffled(&others);
    let last = order.pop().context("nobody was forked")?;
    step("cutting branches in no order", || {
        order.iter().try_for_each(|guest| machine.ask(&format!("kill {guest}")).map(drop))
    })?;
    for guest in [1, last] {
        let path = leaves.iter().find(|(_, other)| **other == guest).context("no such leaf")?.0;
        machine.talk(
            guest,
            "md5sum -c /sum && echo mine-$((40+2)) $(cat /path)",
            &format!("mine-42 {path}"),
        )?;
    }
    println!("All branches but one are cut; guests 1 and {last} still have the set, and their own paths.");
    machine.ask(&format!("kill {last}"))?;
    machine.check().map(drop)
}
