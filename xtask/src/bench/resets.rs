//! What a reset costs: the whole of one with nothing to drop against the guest's RAM, and what each dirty page adds.
//!
//! The tiny guest `dirty` touches all of its RAM, is kept, and then writes as many pages as it is told. The hypervisor
//! tells in its log how long a reset took; the frames go back afterwards, by and by, and what that took is in `stats`.
//! Under `-icount` at 1 GHz a tick is an instruction.

use super::Figure;
use super::machine::figure;
use crate::build;
use crate::monitored::{Monitored, number};
use crate::progress::step;
use crate::run::Run;
use crate::toolchain::Toolchain;
use anyhow::{Context, Result, ensure};
use std::fs;
use std::path::Path;

/// Guest RAM in MiB, touched in full.
const SIZES: [u64; 4] = [64, 256, 1024, 4096];
/// How many dirty pages, and how far one is from the next, as powers of two.
const DIRTY: [(u8, u8); 5] = [(6, 0), (10, 0), (14, 0), (16, 0), (10, 6)];
/// What the guest is that the dirty pages are counted in.
const DIRTY_MIB: u64 = 512;
const ROUNDS: usize = 5;

/// A machine whose one guest has touched all of its RAM and is kept as `touched`.
struct Kept {
    machine: Monitored,
    /// Its log.
    log: std::path::PathBuf,
    /// Resets so far.
    resets: usize,
}

/// Instructions of a reset: while the guest was still, and in all.
struct Reset {
    still: u64,
    total: u64,
}

/// The figures of `reset.call@ram` and `reset.still@ram`, and of `reset.dirty`.
pub(super) fn resets(toolchain: &Toolchain, dir: &Path) -> Result<Vec<Figure>> {
    let guest = build::guest(toolchain, "dirty")?;
    let dir = dir.join("resets");
    let mut figures = Vec::new();
    for mib in SIZES {
        let mut kept = Kept::start(&guest, mib, &dir)?;
        let (mut stills, mut totals) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            let reset = kept.reset()?;
            stills.push(reset.still);
            totals.push(reset.total);
        }
        kept.machine.shutdown()?;
        let params = [("ram_mib", mib)];
        figures.push(figure("reset.still@ram", "insn", &params, &mut stills)?);
        figures.push(figure("reset.call@ram", "insn", &params, &mut totals)?);
    }
    let mut kept = Kept::start(&guest, DIRTY_MIB, &dir)?;
    let clean = kept.reset()?;
    for (pages, apart) in DIRTY {
        let (mut calls, mut all) = (Vec::new(), Vec::new());
        let count = 1_u64 << pages;
        for _ in 0..ROUNDS {
            kept.dirty(pages, apart)?;
            let before = kept.chores()?;
            let reset = kept.reset()?;
            let chores = kept.chores()? - before;
            let call = reset.total.saturating_sub(clean.total);
            calls.push(call / count);
            all.push((call + chores) / count);
        }
        for (part, values) in [("call", &mut calls), ("all", &mut all)] {
            let mut figure =
                figure("reset.dirty", "insn", &[("dirty", count), ("apart", 1 << apart)], values)?;
            figure.params.insert("part".to_owned(), part.into());
            figures.push(figure);
        }
    }
    kept.machine.shutdown()?;
    Ok(figures)
}

impl Kept {
    fn start(guest: &[u8], mib: u64, dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir)?;
        let image = dir.join("dirty.bin");
        fs::write(&image, guest)?;
        let (image, memory) = (image.display().to_string(), format!("{mib}M"));
        let host = format!("{}M", 1024 + mib * 3 / 2);
        let mut words = vec!["--icount", "--cpu", "neoverse-n1", "--host-cpus", "1", "--timeout", "900"];
        words.extend(["--host-memory", &host, "--memory", &memory, "--kernel", &image]);
        let mut machine = Monitored::start(Run::from_words(&words)?, dir)?;
        step(&format!("a guest touches {mib} MiB"), || machine.console.wait("all pages are written"))?;
        machine.ask("pause 1")?;
        machine.ask("snapshot 1 touched")?;
        let mut kept = Self { machine, log: dir.join("hv.log"), resets: 0 };
        // The first makes what the others find.
        kept.dirty(0, 0)?;
        kept.reset()?;
        Ok(kept)
    }

    /// Has the guest write, and stand still again.
    fn dirty(&mut self, pages: u8, apart: u8) -> Result<()> {
        let letter = |power: u8| char::from(b'a' + power);
        self.machine.ask("resume 1")?;
        let answer = format!("{} pages are written", 1_u64 << pages);
        self.machine.talk(1, &format!("{}{}", letter(pages), letter(apart)), &answer)?;
        self.machine.ask("pause 1")?;
        self.machine.until("guests", |guests| guests[0]["vcpus"] != "running")?;
        Ok(())
    }

    /// Resets the guest, and waits until what it had is gone.
    fn reset(&mut self) -> Result<Reset> {
        self.machine.ask("reset 1 touched")?;
        self.resets += 1;
        self.machine.until("stats", |stats| stats["chores"] == false)?;
        let log = fs::read_to_string(&self.log).context("the hypervisor's log")?;
        let told: Vec<Reset> = log.lines().filter_map(Reset::told).collect();
        ensure!(told.len() == self.resets, "{} resets, and the log has {}", self.resets, told.len());
        told.into_iter().last().context("a reset")
    }

    /// Instructions that were given to chores so far.
    fn chores(&mut self) -> Result<u64> {
        number(&self.machine.ask("stats")?, "/chore_ticks")
    }
}

impl Reset {
    /// From a line of the log, if it tells of one.
    fn told(line: &str) -> Option<Self> {
        let (_, rest) = line.split_once(": reset, still for ")?;
        let (still, rest) = rest.split_once(" ticks, ")?;
        let (total, _) = rest.split_once(" in all")?;
        Some(Self { still: still.parse().ok()?, total: total.parse().ok()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reset_is_read_from_the_log_and_a_fork_is_none() {
        let reset = Reset::told("hv: guest 1: reset, still for 17000 ticks, 21000 in all").expect("a reset");
        assert_eq!((reset.still, reset.total), (17_000, 21_000));
        assert!(Reset::told("hv: guest 1: forked into 1, still for 12256 ticks, 50913 in all").is_none());
    }
}
