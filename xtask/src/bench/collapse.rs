//! What it costs to shorten a chain: snapshots from the middle of a history are deleted, one after the other.
//!
//! A tiny guest writes pages anywhere in its memory in each generation, and sleeps. What is deleted merges with the next
//! generation, the side with fewer pages moving. `stats` tells how many moved and how long the memory manager's chores
//! took, the hypervisor's log how long the call did; under `-icount` at 1 GHz a tick is an instruction.

use super::Figure;
use super::machine::{figure, write_guest};
use crate::monitored::{Monitored, number};
use crate::progress::step;
use crate::run::Run;
use crate::toolchain::Toolchain;
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::fs;
use std::path::Path;

/// Generations, and pages that each writes.
const GENERATIONS: u64 = 32;
const WRITES: u64 = 256;

/// Instructions of deleting a snapshot, for each page that moves: in all, and those of the chores alone.
pub(super) fn deletions(toolchain: &Toolchain, dir: &Path) -> Result<Vec<Figure>> {
    let dir = dir.join("collapse");
    let image = write_guest(toolchain, "generations", &dir)?;
    let append = format!("writes={WRITES}");
    let words = ["--icount", "--cpu", "neoverse-n1", "--host-cpus", "1", "--timeout", "300"];
    let more = ["--memory", "80M", "--append", &append, "--kernel", &image];
    let mut machine = Monitored::start(Run::from_words(&[&words[..], &more].concat())?, &dir)?;
    machine.ask("wait 1 \"generations: ready\"")?;
    for generation in 1..=GENERATIONS {
        machine.ask_all(&[
            format!("snapshot 1 g{generation}"),
            "send 1 w".to_owned(),
            format!("wait 1 \"generation {generation} lived\""),
        ])?;
    }
    let mut chores = Vec::new();
    step("deleting snapshots", || {
        // Every other one: what is merged was not merged before.
        for generation in (2..GENERATIONS).step_by(2) {
            let before = machine.ask("stats")?;
            let left = number(&machine.ask("memory")?, "/objects")? - 1;
            machine.ask(&format!("delete g{generation}"))?;
            machine.until("memory", |memory: &Value| memory["objects"] == left)?;
            let after = machine.ask("stats")?;
            let more = |place| Ok::<u64, anyhow::Error>(number(&after, place)? - number(&before, place)?);
            let moved = more("/memory/collapse_moved")?;
            ensure!(more("/memory/collapsed")? == 1 && moved > WRITES / 2, "not one collapse: {after}");
            chores.push((more("/chore_ticks")?, moved));
        }
        Ok::<_, anyhow::Error>(())
    })?;
    machine.shutdown()?;
    let log = fs::read_to_string(dir.join("hv.log")).context("the hypervisor's log")?;
    let calls: Vec<u64> = log.lines().filter_map(told).collect();
    ensure!(
        calls.len() == chores.len(),
        "{} snapshots were deleted, {} are told of",
        chores.len(),
        calls.len()
    );
    let each = chores.iter().zip(calls);
    let (mut all, mut alone): (Vec<u64>, Vec<u64>) =
        each.map(|((ticks, moved), call)| ((ticks + call) / moved, ticks / moved)).unzip();
    let params = [("pages", WRITES)];
    Ok(vec![
        figure("snapshot.delete", "insn", &params, &mut all)?,
        figure("collapse.page", "insn", &params, &mut alone)?,
    ])
}

/// What a line of the log says of a deletion.
fn told(line: &str) -> Option<u64> {
    let (_, rest) = line.split_once(": deleted in ")?;
    rest.strip_suffix(" ticks")?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::told;

    #[test]
    fn a_deletion_is_read_from_the_log() {
        assert_eq!(told("hv: snapshot g2: deleted in 2345 ticks"), Some(2345));
        assert_eq!(told("hv: guest 1: forked into 1, still for 12256 ticks, 50913 in all"), None);
    }
}
