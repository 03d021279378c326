//! Boot tests of long histories: 2314 generations of one guest, one after the other or all at once. That many is what one
//! production fleet reports of its longest chains of snapshots.
//!
//! A tiny guest writes eight pages anywhere in 64 MiB in each, and can tell whether every page is what it should be. Depth,
//! frames and objects that faults come by are counted and held to bounds that do not grow with the number of generations,
//! or follow from what each wrote.

use super::machine::{STAYS, boot, monitored, tiny_guest};
use crate::monitored::{Monitored, number, rows};
use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use serde_json::Value;

const GENERATIONS: u64 = 2314;
/// Pages that a generation writes: those that it is to, and what the guest needs itself for that: stack, counters.
const WRITTEN: u64 = 8 + 4;
/// Pages that the guest can come to have: 64 MiB, its image, and the table in which it looks up who wrote last.
const ALL: u64 = (64 << 8) + 128;
/// What there is besides one guest's history: the object of its kernel's image, flash, the generation id.
const OTHERS: u64 = 8;
/// Objects that one generation's faults come by: each looks at a stretch of a trail, and what its program needs
/// anew is looked for, too.
const LOOKS: u64 = 200;

pub(super) fn trials() -> Vec<Trial> {
    vec![
        boot(
            "2314_generations_whose_parents_die_leave_a_short_chain_and_no_frames_behind",
            one_after_another,
        ),
        boot("2314_generations_with_swapping_leave_no_slot_behind", swapping),
        boot("2314_snapshots_that_live_are_right_and_go_in_any_order", all_at_once),
    ]
}

/// The guest, with room for its 64 MiB.
fn guest(name: &str, more: &[&str]) -> Result<Monitored> {
    let file = tiny_guest(name, "generations")?;
    let words = ["--timeout", "300", "--memory", "80M", "--kernel", &file];
    monitored(name, &[&words[..], more, &STAYS].concat())
}

/// Has a guest look at every page.
fn is_well(machine: &mut Monitored, guest: u64) -> Result<()> {
    machine.talk(guest, "c", "all well")
}

fn deepest(objects: &Value) -> Result<u64> {
    let depths: Vec<u64> = rows(objects)?.iter().map(|row| number(row, "/depth")).collect::<Result<_>>()?;
    depths.into_iter().max().context("no object is left")
}

/// Waits until all is gone but one guest, which stands still, and has what one can have.
fn one_is_left(machine: &mut Monitored) -> Result<()> {
    machine.settled()?;
    // An object without pages may go later than the last frame.
    let memory = machine.until("memory", |memory| number(memory, "/objects").is_ok_and(|n| n <= OTHERS))?;
    ensure!(number(&memory, "/owners/guests_resident")? <= ALL, "{memory}");
    Ok(())
}

/// Clone, write, kill the parent: chains become short again while that goes on, and nothing is left of the dead.
fn one_after_another(name: &str) -> Result<()> {
    let mut machine = guest(name, &["--append", "alone", "--grant-fork", "64"])?;
    live(&mut machine, ALL + 64 * WRITTEN)?;
    let stats = machine.ask("stats")?;
    ensure!(number(&stats, "/memory/chain_visited")? <= LOOKS * GENERATIONS, "{stats}");
    machine.check()?;
    machine.shutdown()
}

/// The same on a host with fewer frames than the guest comes to have, while slots come and go.
fn swapping(name: &str) -> Result<()> {
    let small = ["--host-memory", "48M", "--swap", "256M", "--overcommit", "none"];
    let alone = ["--append", "alone writes=16", "--grant-fork", "64"];
    let mut machine = guest(name, &[&small[..], &alone].concat())?;
    // There are fewer frames; a page that moves while all are counted may be counted twice.
    live(&mut machine, 2 * ALL)?;
    machine.check()?;
    machine.until("memory", |memory| memory["transfers"] == 0)?;
    let swap = machine.ask("swap")?;
    let written = number(&swap, "/pages/written")?;
    ensure!(written > ALL / 8, "so little swapped proves nothing: {swap}");
    ensure!(number(&swap, "/slots/in_use")? <= ALL, "slots of the dead are left: {swap}");
    machine.ask(&format!("kill {}", GENERATIONS + 1))?;
    machine.until("swap", |swap| swap["slots"]["in_use"] == 0)?;
    machine.check()?;
    machine.shutdown()
}

/// Lives through all of it, and looks whether the last is well and the only one.
fn live(machine: &mut Monitored, most: u64) -> Result<()> {
    loop {
        let (guests, objects, memory) =
            (machine.ask("guests")?, machine.ask("objects")?, machine.ask("memory")?);
        // By the queues: who counts by owner while pages move from one to another may count them twice.
        let frames = |what| number(&memory, &format!("/frames/{what}"));
        let resident = frames("total")?.saturating_sub(frames("free")? + frames("tables")?);
        let depth = deepest(&objects)?;
        ensure!(depth < GENERATIONS / 4, "a chain of {depth} among {guests}");
        ensure!(resident < most, "{resident} pages are resident: {guests}");
        if let [last] = rows(&guests)?
            && last["id"] == GENERATIONS + 1
        {
            break;
        }
    }
    machine.ask(&format!("wait {} \"all well\"", GENERATIONS + 1))?;
    let line = machine.last_line(GENERATIONS + 1, "all well")?;
    ensure!(line.contains("2314 lived"), "{line}");
    one_is_left(machine)
}

/// A snapshot of each generation: the newest and one from the middle see what they should; then they go in random order, and
/// now and then one that is left is looked at.
fn all_at_once(name: &str) -> Result<()> {
    // One CPU: on a machine that is busy, another may come too late to stand still for one of so many snapshots.
    let mut machine = guest(name, &["--host-cpus", "1"])?;
    machine.ask("wait 1 ready")?;
    for generation in 1..=GENERATIONS {
        machine.ask_all(&[
            format!("snapshot 1 g{generation}"),
            "send 1 w".to_owned(),
            format!("wait 1 \"generation {generation} lived\""),
        ])?;
    }
    let (objects, memory, stats) = (machine.ask("objects")?, machine.ask("memory")?, machine.ask("stats")?);
    ensure!(deepest(&objects)? == GENERATIONS, "not a chain of {GENERATIONS}: {}", deepest(&objects)?);
    ensure!(number(&memory, "/objects")? <= GENERATIONS + OTHERS, "{memory}");
    ensure!(number(&memory, "/owners/guests_resident")? <= GENERATIONS * WRITTEN, "{memory}");
    let visited = number(&stats, "/memory/chain_visited")?;
    ensure!(visited <= LOOKS * GENERATIONS, "{visited} objects were come by: {stats}");
    let middle = machine.ask(&format!("create --from g{}", GENERATIONS / 2))?;
    let middle = number(&middle, "/created")?;
    is_well(&mut machine, middle)?;
    is_well(&mut machine, 1)?;
    machine.ask(&format!("kill {middle}"))?;

    // An odd step through a power of two above is an order of its own.
    let order = (0..4096).map(|step| (step * 1657 + 1) % 4096).filter(|n| (1..=GENERATIONS).contains(n));
    let order: Vec<u64> = order.collect();
    let mut left = order.as_slice();
    while let Some((part, rest)) =
        left.split_at_checked(left.len().min(256)).filter(|(part, _)| !part.is_empty())
    {
        machine
            .ask_all(&part.iter().map(|generation| format!("delete g{generation}")).collect::<Vec<_>>())?;
        let short =
            |memory: &Value| number(memory, "/objects").is_ok_and(|n| n <= rest.len() as u64 + OTHERS);
        machine.until("memory", short)?;
        // What one of those that are left sees lies in what has moved again and again.
        if let Some(&survivor) = rest.get(rest.len() / 2) {
            let made = number(&machine.ask(&format!("create --from g{survivor}"))?, "/created")?;
            is_well(&mut machine, made)?;
            let line = machine.last_line(made, "all well")?;
            ensure!(line.contains(&format!(": {} lived,", survivor - 1)), "from g{survivor}: {line}");
            machine.ask(&format!("kill {made}"))?;
        }
        left = rest;
    }
    is_well(&mut machine, 1)?;
    one_is_left(&mut machine)?;
    machine.check()?;
    machine.shutdown()
}
