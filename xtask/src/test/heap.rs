//! A boot test of EL2's heap: a guest fills it, and nobody else is the worse for it.

use super::machine::{boot, logs, monitored, tiny_guest};
use crate::monitored::{Monitored, number, rows, text};
use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use serde_json::Value;
use std::fs::File;

/// Bytes of the disk that the filler clears all over: many times what the heap has leaves for.
const DISK: u64 = 96 << 30;

pub(super) fn trials() -> Vec<Trial> {
    vec![boot("a_guest_that_fills_the_heap_of_el2_harms_nobody", filled)]
}

/// True if what `memory` answers says that the heap has room.
fn has_room(memory: &Value) -> bool {
    memory["heap"]["room"] == true
}

/// A guest that needs nothing new lives, and finds what it wrote.
fn lives(machine: &mut Monitored, generation: u64) -> Result<()> {
    machine.talk(1, "w", &format!("generation {generation} lived"))?;
    machine.talk(1, "c", &format!("generations: {generation} lived, "))
}

/// The monitor shows everybody, and all is in order.
fn answers(machine: &mut Monitored) -> Result<()> {
    for guest in ["guest", "later", "again", "filler"] {
        machine.guest(guest)?;
        machine.ask(&format!("stats {guest}"))?;
        machine.ask(&format!("log {guest}"))?;
    }
    ensure!(rows(&machine.ask("objects")?)?.len() > 4, "the objects are not shown");
    for question in ["help", "map filler", "objects filler", "snapshots", "stats", "swap", "trace filler"] {
        machine.ask(question)?;
    }
    machine.check().map(|_| ())
}

/// True if a guest is in the list, and a vCPU of it waits for memory.
fn is_waiting(guests: &Value, guest: &str) -> bool {
    let row = rows(guests).ok().and_then(|rows| rows.iter().find(|row| row["name"] == guest));
    row.is_some_and(|row| text(row, "/vcpus").is_ok_and(|states| states.contains("no-memory")))
}

/// Objects that somebody has; not those of images that are kept for the next.
fn in_use(objects: &Value) -> usize {
    rows(objects).map_or(0, |rows| rows.iter().filter(|row| row["cached"] == false).count())
}

/// One guest clears its disk until the heap is full. The monitor answers, a neighbour lives on, one that needs more waits,
/// so does one that begins again, what would need more is refused; and without the first all goes on.
fn filled(name: &str) -> Result<()> {
    let [zeros, generations] = ["zeros", "generations"].map(|guest| tiny_guest(name, guest));
    let (disk, zeros) = (logs(name).join("sparse.img"), format!("zeros={}", zeros?));
    File::create(&disk)?.set_len(DISK)?;
    let disk = format!("{},private", disk.display());
    let words = ["--timeout", "60", "--host-memory", "128M", "--memory", "8M", "--disk", &disk];
    // It has printed all that its log holds: what it says now needs no memory.
    let guest = ["--kernel", &generations?, "--append", "pages=64 talk=72", "--with", &zeros];
    let mut machine = monitored(name, &[&words[..], &guest].concat())?;
    machine.wait_long("guest", "generations: ready")?;
    lives(&mut machine, 1)?;
    for other in ["later", "again"] {
        machine.ask(&format!("create name={other} append=pages=1024"))?;
        machine.ask(&format!("wait {other} \"generations: ready\""))?;
    }
    let (before, objects) = (machine.ask("memory")?, machine.ask("objects")?);
    ensure!(has_room(&before), "{before}");

    machine.ask("create name=filler kernel=zeros append=linger")?;
    let mut generation = 1;
    while has_room(&machine.ask("memory")?) {
        generation += 1;
        lives(&mut machine, generation)?;
        machine.check()?;
    }
    answers(&mut machine)?;
    for (command, words) in [
        ("clone guest", "NoMemory"),
        ("clone filler", "NoMemory"),
        ("snapshot guest full", "NoMemory"),
        ("create name=more", "the hypervisor's own memory is full"),
    ] {
        let told = machine.refused(command)?;
        ensure!(told.contains(words), "{command} is answered \"{told}\", without \"{words}\"");
    }
    machine.ask("send later w")?;
    machine.ask("send again r")?;
    for guest in ["later", "again"] {
        machine.until("guests", |guests| is_waiting(guests, guest))?;
    }
    answers(&mut machine)?;
    lives(&mut machine, generation + 1)?;
    let full = machine.ask("memory")?;
    let leaves = |memory: &Value| number(memory, "/index_bytes");
    ensure!(
        !has_room(&full) && 2 * leaves(&full)? > number(&full, "/heap/bytes")?,
        "no leaves fill it: {full}"
    );

    machine.ask("kill filler")?;
    machine.ask("wait later \"generation 1 lived\"")?;
    // It listens only now: what was typed before is lost, as on any machine.
    let twice = |log: &Value| text(log, "/log").is_ok_and(|log| log.matches("ready").count() == 2);
    machine.until("log again", twice)?;
    machine.ask("send again w")?;
    machine.ask("wait again \"generation 1 lived\"")?;
    let child = machine.fork(1, 1)?.first().copied().context("no child")?;
    machine.talk(child, "w", &format!("generation {} lived", generation + 2))?;
    machine.ask("snapshot guest kept")?;
    let other = number(&machine.ask("create --from kept")?, "/created")?;
    machine.talk(other, "w", &format!("generation {} lived", generation + 2))?;
    lives(&mut machine, generation + 2)?;
    for gone in [child, other] {
        machine.ask(&format!("kill {gone}"))?;
    }
    machine.ask("delete kept")?;
    machine.check()?;
    machine.until("objects", |now| in_use(now) == in_use(&objects))?;
    let after = machine.ask("memory")?;
    ensure!(has_room(&after) && leaves(&after)? < 1 << 20, "there were {before}, and are {after}");
    machine.shutdown()
}
