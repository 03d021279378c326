//! `demo swap`: Linux guests with four times the memory that the host has, each of which fills and reads its working
//! set, while a view shows where all pages are.
//!
//! One of them is then held to a tenth of what it has, and works on; the others do not notice.

use super::found::Found;
use super::{PAGES, dir};
use crate::monitored::{Monitored, number, rows};
use crate::progress::step;
use crate::run::Run;
use anyhow::{Result, ensure};
use serde_json::Value;
use std::time::{Duration, Instant};

/// MiB of the host, of each guest, and of each working set.
const HOST_MIB: u64 = 256;
const GUEST_MIB: u64 = 256;
const SET_MIB: u64 = 192;
const GUESTS: u64 = 4;
/// MiB that one of them may have in the end, and MiB that it then works on.
const LIMIT_MIB: u64 = 10;
const LIMITED_SET_MIB: u64 = 32;

/// Shows it.
pub(super) fn show(cpu: &str) -> Result<()> {
    let (host, memory, guests) = (format!("{HOST_MIB}M"), format!("{GUEST_MIB}M"), GUESTS.to_string());
    let words = ["--timeout", "3600", "--cpu", cpu, "--script", "/dev/null", "--swap", "2G"];
    let sizes = ["--host-memory", &host, "--memory", &memory, "--guests", &guests];
    let mut machine = step("booting four Linux guests", || {
        let mut machine = Monitored::start(Run::from_words(&[&words[..], &sizes].concat())?, &dir())?;
        names()
            .try_for_each(|name| machine.ask(&format!("wait {name} \"guest ready: {name}\"")).map(drop))?;
        Ok::<_, anyhow::Error>(machine)
    })?;
    let frames = number(&machine.ask("memory")?, "/frames/total")?;
    println!(
        "{GUESTS} Linux guests run, with {} MiB in all, on a host that has {HOST_MIB} MiB, {} for guests. \
         Each now fills {SET_MIB} MiB and reads them again: memtest {SET_MIB} 1",
        GUESTS * GUEST_MIB,
        frames / PAGES
    );
    for name in names() {
        machine.ask(&format!("send {name} memtest {SET_MIB} 1"))?;
    }
    println!("\nWhere the guests' pages are, in MiB: in frames + swapped");
    print!("{:>6}", "s");
    names().for_each(|name| print!("{name:>14}"));
    println!("{:>8}{:>12}{:>12}", "free", "written", "MiB read");
    let begun = Instant::now();
    let done = format!("memtest: {SET_MIB} MiB, 1 rounds, ok");
    let mut most = 0;
    loop {
        most = most.max(look(&mut machine, begun)?);
        let mut over = true;
        for name in names() {
            let log = machine.ask(&format!("log {name}"))?;
            let log = log["log"].as_str().unwrap_or_default();
            ensure!(!log.contains("FAILED") && !log.contains("Oops"), "{name} says\n{log}");
            over &= log.contains(&done);
        }
        if over {
            break;
        }
        std::thread::sleep(Duration::from_secs(2));
    }
    machine.check()?;
    let swap = machine.ask("swap")?;
    println!(
        "\nEvery guest found every byte. Then guest0 is held to a tenth: limit guest0 resident={LIMIT_MIB}M"
    );
    machine.ask(&format!("limit guest0 resident={LIMIT_MIB}M"))?;
    machine.ask(&format!("send guest0 memtest {LIMITED_SET_MIB} 1"))?;
    machine.ask(&format!("wait guest0 \"memtest: {LIMITED_SET_MIB} MiB, 1 rounds, ok\""))?;
    let own = number(&machine.guest("guest0")?, "/own_pages")?;
    ensure!(own <= LIMIT_MIB * PAGES, "guest0 has {own} pages");
    look(&mut machine, begun)?;
    machine.check()?;
    let found = table(&mut machine, cpu, most, frames, &swap)?;
    names().try_for_each(|name| machine.ask(&format!("kill {name}")).map(drop))?;
    machine.until("swap", |swap| swap["slots"]["in_use"] == 0)?;
    println!("All guests are gone; no slot of the swap partition is in use.");
    machine.shutdown()?;
    found.leave()
}

fn names() -> impl Iterator<Item = String> {
    (0..GUESTS).map(|number| format!("guest{number}"))
}

/// One line of where the pages are; how many the guests have in all.
fn look(machine: &mut Monitored, begun: Instant) -> Result<u64> {
    let guests = machine.ask("guests")?;
    print!("{:>6}", begun.elapsed().as_secs());
    let mut all = 0;
    for row in rows(&guests)? {
        let (own, swapped) = (number(row, "/own_pages")?, number(row, "/swapped_pages")?);
        print!("{:>14}", format!("{}+{}", own / PAGES, swapped / PAGES));
        all += own + swapped;
    }
    let (memory, stats, swap) = (machine.ask("memory")?, machine.ask("stats")?, machine.ask("swap")?);
    let read = number(&stats, "/memory/page_read")?;
    println!(
        "{:>8}{:>12}{:>12}",
        number(&memory, "/frames/free")? / PAGES,
        number(&swap, "/pages/written")? / PAGES,
        read / PAGES
    );
    Ok(all)
}

fn table(machine: &mut Monitored, cpu: &str, most: u64, frames: u64, swap: &Value) -> Result<Found> {
    let stats = machine.ask("stats")?;
    let count = |value: &Value, place: &str| number(value, place);
    let lines = [
        ("MiB of RAM that the guests see", GUESTS * GUEST_MIB),
        ("MiB of frames that there are", frames / PAGES),
        ("MiB that guests had in use at one time, at most", most / PAGES),
        ("MiB filled and read by each", SET_MIB),
        ("wrong bytes", 0),
        ("MiB written to swap", count(swap, "/pages/written")? / PAGES),
        (
            "MiB that left without being written",
            (count(swap, "/pages/evicted")? + count(swap, "/pages/evicted_zero")?)
                .saturating_sub(count(swap, "/pages/written")?)
                / PAGES,
        ),
        ("errors of the disk", count(swap, "/transfers/in_failed")? + count(swap, "/transfers/out_failed")?),
        ("faults that guest0's limit held up", count(&stats, "/memory/fault_held")?),
    ];
    let mut found = Found::new("swap", cpu);
    lines.iter().for_each(|(what, value)| found.fact(*what, *value));
    found.show();
    ensure!(lines[7].1 == 0, "the disk failed: {swap}");
    let ratio = GUESTS * GUEST_MIB * PAGES;
    ensure!(ratio >= 4 * frames, "the guests' memory is not four times the host's");
    ensure!(most > frames, "the guests had no more in use than there are frames, which shows nothing");
    ensure!(count(&stats, "/memory/fault_held")? > 0, "guest0 was never held up");
    Ok(found)
}
