//! A session with the monitor, followed instruction by instruction: answers are long, and interrupts wait for none of them.

use super::machine::follow;
use super::trace::Counter;
use crate::build;
use crate::monitored::Monitored;
use crate::progress::step;
use crate::run::Run;
use crate::toolchain::Toolchain;
use anyhow::Result;
use std::fs;
use std::path::Path;

/// Generations of the guest, each kept: objects for the answers.
const GENERATIONS: u64 = 8;

/// Asks for all that is long, of a guest that has said much and has a history.
pub(super) fn follow_monitor(toolchain: &Toolchain, hypervisor: &Path, dir: &Path) -> Result<Counter> {
    let guest = build::guest(toolchain, "generations")?;
    follow(&guest, hypervisor, &dir.join("followed-monitor"), |trace, dir| {
        let image = dir.join("generations.bin");
        fs::write(&image, &guest)?;
        let image = image.display().to_string();
        let words = ["--icount", "--cpu", "neoverse-n1", "--host-cpus", "1", "--timeout", "600"];
        let more = ["--memory", "80M", "--append", "talk=4", "--kernel", &image];
        let mut options = Run::from_words(&[&words[..], &more].concat())?;
        options.trace = Some(trace);
        let mut machine = Monitored::start(options, dir)?;
        step("following a session with the monitor", || {
            machine.ask("wait 1 \"generations: ready\"")?;
            for generation in 1..=GENERATIONS {
                machine.ask("snapshot 1")?;
                machine.talk(1, "w", &format!("generation {generation} lived"))?;
            }
            for command in
                ["guests", "log 1", "objects", "stats", "memory", "map 1", "trace 1", "snapshots", "help"]
            {
                machine.ask(command)?;
            }
            Ok::<_, anyhow::Error>(())
        })?;
        machine.console.stop();
        Ok(())
    })
}
