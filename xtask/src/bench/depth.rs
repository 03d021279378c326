//! What a copy fault costs, and reading in order, against the number of live generations between the page and its owner.
//!
//! The measuring guest lives through as many generations as the longest history has, each kept by a snapshot; guests
//! made from the snapshots then measure. For each `fill` the same: what the generations between hold of the chunk.

use super::Figure;
use super::machine::{log_that_says, write_guest};
use crate::monitored::{Monitored, number};
use crate::progress::step;
use crate::run::Run;
use crate::toolchain::Toolchain;
use anyhow::{Context, Result, ensure};
use serde_json::json;
use std::path::Path;

const DEPTHS: [u64; 4] = [1, 16, 256, 2314];
const DEEPEST: u64 = 2314;

/// First faults in a chunk, later ones, and pages that are read in order, for each depth and fill.
pub(super) fn faults(toolchain: &Toolchain, dir: &Path) -> Result<Vec<Figure>> {
    let mut figures = Vec::new();
    let mut machine = live(toolchain, &dir.join("depth-empty"), "depth")?;
    measure(&mut machine, "empty", false, &mut figures)?;
    machine.shutdown()?;
    let mut machine = live(toolchain, &dir.join("depth-one"), "depth one")?;
    measure(&mut machine, "one-write-per-chunk-per-generation", false, &mut figures)?;
    swap_half(&mut machine)?;
    measure(&mut machine, "half-swapped", true, &mut figures)?;
    machine.shutdown()?;
    Ok(figures)
}

/// A machine with a guest of that many generations, all kept.
fn live(toolchain: &Toolchain, dir: &Path, append: &str) -> Result<Monitored> {
    let image = write_guest(toolchain, "bench", dir)?;
    let hog = format!("hog={}", write_guest(toolchain, "touch", dir)?);
    let words =
        ["--cpu", "neoverse-n1", "--host-cpus", "1", "--timeout", "600", "--icount", "--memory", "64M"];
    let more = ["--host-memory", "512M", "--swap", "512M", "--append", append, "--kernel", &image];
    let rest = ["--overcommit", "none", "--with", &hog];
    let mut machine = Monitored::start(Run::from_words(&[&words[..], &more, &rest].concat())?, dir)?;
    step(&format!("living through {DEEPEST} generations ({append})"), || {
        machine.ask("wait 1 \"bench: ready\"")?;
        for generation in 1..=DEEPEST {
            machine.ask_all(&[
                format!("snapshot 1 g{generation}"),
                "send 1 w".to_owned(),
                format!("wait 1 \"bench: generation {generation} lived\""),
            ])?;
        }
        Ok::<_, anyhow::Error>(())
    })?;
    Ok(machine)
}

/// A guest for each depth measures. Where pages are in swap another has seen to it before that those which are measured
/// are not; it has found the ways, too. What came from the disk all the same was not measured: another pair tries.
fn measure(machine: &mut Monitored, fill: &str, swapped: bool, figures: &mut Vec<Figure>) -> Result<()> {
    for depth in DEPTHS {
        let mut tries = 0;
        let told = loop {
            let (told, came) = pair(machine, depth, swapped)?;
            if came == 0 {
                break told;
            }
            tries += 1;
            ensure!(
                tries < 4,
                "behind {depth} generations {came} pages came from the disk while it was measured"
            );
        };
        let found = told.lines().filter_map(Figure::from_line).filter(|f| f.metric.ends_with("@depth"));
        figures.extend(found.map(|mut figure| {
            figure.params.insert("generations".to_owned(), json!(depth));
            figure.params.insert("fill".to_owned(), json!(fill));
            figure
        }));
    }
    Ok(())
}

/// What a guest at that depth told, and how many pages came from the disk meanwhile.
fn pair(machine: &mut Monitored, depth: u64, swapped: bool) -> Result<(String, u64)> {
    let mut guests = Vec::new();
    if swapped {
        let reader = from(machine, depth)?;
        machine.talk(reader, "r", "bench: read")?;
        guests.push(reader);
    }
    let guest = from(machine, depth)?;
    guests.push(guest);
    let before = pages_in(machine)?;
    machine.ask(&format!("send {guest} m"))?;
    let told = log_that_says(machine, guest, "bench: measured")?;
    let came = pages_in(machine)? - before;
    for guest in guests {
        machine.ask(&format!("kill {guest}"))?;
    }
    Ok((told, came))
}

fn pages_in(machine: &mut Monitored) -> Result<u64> {
    number(&machine.ask("swap")?, "/transfers/in")
}

fn from(machine: &mut Monitored, depth: u64) -> Result<u64> {
    let made = machine.ask(&format!("create --from g{depth}"))?;
    made["created"].as_u64().context("no guest was made")
}

/// Another guest uses so much memory that half of what the generations have is in swap.
fn swap_half(machine: &mut Monitored) -> Result<()> {
    let memory = machine.ask("memory")?;
    let half = number(&memory, "/owners/guests_resident")? / 2;
    let wanted = number(&memory, "/frames/free")? + half;
    let created =
        machine.ask(&format!("create name=hog kernel=hog append=linger memory={}M", wanted >> 8))?;
    let hog = number(&created, "/created")?;
    step("swapping half of that out", || {
        machine.until("swap", |swap| number(swap, "/slots/in_use").is_ok_and(|used| used >= half))
    })?;
    machine.ask(&format!("kill {hog}"))?;
    // Until its memory is back, pages that come in go out again.
    machine.settled()?;
    machine.until("memory", |memory| memory["transfers"] == 0)?;
    Ok(())
}
