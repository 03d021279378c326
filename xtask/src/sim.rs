//! `cargo xtask sim`: the simulator of the memory manager, from any seed and for as long as one likes.
//!
//! It is a test of `stage2`, where the real VM and the real tables meet; here it only gets its seed and its steps.
//! The exhaustive search is a test of `vmobject`, which is given a bound here.

use crate::test::cargo;
use anyhow::{Context, Result, ensure};

/// The test that plays.
const PLAY: &str = "every_guest_reads_what_it_and_its_ancestors_wrote";
/// The test that switches defects on.
const DEFECTS: &str = "each_defect_is_found";

/// The test that tries everything, in the small.
const EVERYTHING: &str = "every_short_life";
/// States that a search in full visits, in each of its scopes.
const STATES: u64 = 10_000_000;

/// What is simulated.
#[derive(clap::Args)]
pub(crate) struct Sim {
    /// Of the first world; the next has the next one
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Of all worlds together
    #[arg(long, default_value_t = 1_000_000)]
    steps: u64,
    /// Instead: switch each known defect on, and show what finds it and when
    #[arg(long, conflicts_with_all = ["seed", "steps"])]
    defects: bool,
    /// Instead: try everything that can happen to a few small guests, until nothing new comes or ten million states
    #[arg(long, conflicts_with_all = ["seed", "steps", "defects"])]
    exhaustive: bool,
}

impl Sim {
    /// Plays; fails if a guest read a wrong byte, a cache knew too much or the audit found something.
    pub(crate) fn run(&self) -> Result<()> {
        let (package, test) = if self.exhaustive { ("vmobject", "exhaustive") } else { ("stage2", "sim") };
        let which: &[&str] = match () {
            () if self.exhaustive => &["--test-threads=1", EVERYTHING],
            () if self.defects => &["--exact", DEFECTS],
            () => &["--exact", PLAY],
        };
        let status = cargo(&["test", "--quiet", "--package", package, "--test", test])
            .args(["--", "--nocapture"])
            .args(which)
            .current_dir(crate::root())
            .env("SIM_SEED", self.seed.to_string())
            .env("SIM_STEPS", self.steps.to_string())
            .env("EXHAUSTIVE_STATES", STATES.to_string())
            .status()
            .context("starting cargo")?;
        ensure!(
            status.success(),
            "the simulator found something; what it says above names the seed, or the defect that nothing finds"
        );
        Ok(())
    }
}
