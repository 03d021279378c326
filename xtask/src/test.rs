//! `cargo xtask test`: every test there is, by name.
//!
//! Tidy tests look at the source, host tests run each package's own, boot tests start the machine. A failing boot
//! test leaves its console and the hypervisor's log under `target/test-logs`.

mod balloon;
mod boot;
mod clones;
mod control;
mod cuts;
mod disks;
mod filesystem;
mod generations;
mod guests;
mod heap;
mod inflight;
mod jobs;
mod loaded;
mod machine;
mod modules;
mod monitor;
mod state;
mod stored;
mod swap;
mod swap_places;
mod terminal;
mod tidy;

use crate::toolchain::Toolchain;
use anyhow::{Result, anyhow, ensure};
use clap::Args;
use libtest_mimic::{Arguments, Failed, Trial};
use std::process::{Command, ExitCode};

/// Options of `test`.
#[derive(Args, Clone, Debug)]
pub(crate) struct Test {
    /// Tidy and host tests only
    #[arg(long)]
    host: bool,
    /// Boot tests only
    #[arg(long)]
    boot: bool,
    /// What takes hours instead: Linux on every model and number of CPUs, 256 clones alive at once, a loaded guest
    /// cloned a hundred times
    #[arg(long, conflicts_with_all = ["host", "boot"])]
    matrix: bool,
    /// Name them, run nothing
    #[arg(long)]
    list: bool,
    /// Only tests whose name contains this
    filter: Option<String>,
}

fn trial(name: impl Into<String>, test: impl FnOnce() -> Result<()> + Send + 'static) -> Trial {
    Trial::test(name, move || test().map_err(|e| Failed::from(format!("{e:#}"))))
}

/// Runs a command in the project's folder; its output is the failure.
fn passes(command: &mut Command) -> Result<()> {
    let output = command.current_dir(crate::root()).output()?;
    let text = [output.stdout.as_slice(), output.stderr.as_slice()].concat();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    let tail = lines.get(lines.len().saturating_sub(80)..).unwrap_or_default().join("\n");
    ensure!(output.status.success(), "{tail}");
    Ok(())
}

/// A cargo command with the toolchain that runs us.
pub(crate) fn cargo(words: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(words);
    command
}

fn host() -> Vec<Trial> {
    let mut trials = Vec::new();
    for package in ["vmobject", "stage2", "board", "hv-abi", "hv", "xtask"] {
        trials.push(trial(format!("host::{package}"), move || {
            passes(&mut cargo(&["test", "--quiet", "--package", package]))
        }));
    }
    trials
}

/// Runs them.
pub(crate) fn run(options: &Test) -> ExitCode {
    let both = options.host == options.boot && !options.matrix;
    let mut trials = Vec::new();
    if both || options.host {
        trials.extend(tidy::trials());
        trials.extend(host());
    }
    if both || options.boot {
        trials.extend(boot::trials());
        trials.extend(clones::trials());
        trials.extend(generations::trials());
        trials.extend(loaded::trials());
        trials.extend(disks::trials());
        trials.extend(filesystem::trials());
        trials.extend(inflight::trials());
        trials.extend(monitor::trials());
        trials.extend(control::trials());
        trials.extend(state::trials());
        trials.extend(stored::trials());
        trials.extend(cuts::trials());
        trials.extend(jobs::trials());
        trials.extend(swap::trials());
        trials.extend(swap_places::trials());
        trials.extend(balloon::trials());
        trials.extend(guests::trials());
        trials.extend(heap::trials());
    }
    if options.matrix {
        trials.extend(boot::matrix());
        trials.extend(clones::matrix());
        trials.extend(loaded::matrix());
        trials.extend(swap::matrix());
    }
    let arguments = Arguments {
        list: options.list,
        filter: options.filter.clone(),
        // Cargo locks its folder, and two machines at once are slower than one after the other on two cores.
        test_threads: Some(1),
        ..Arguments::default()
    };
    if let Some(filter) = &options.filter
        && !trials.iter().any(|trial| trial.name().contains(filter.as_str()))
    {
        eprintln!("xtask: no test's name contains '{filter}'; `cargo xtask test --list` names them");
        return ExitCode::FAILURE;
    }
    if !options.list
        && !options.host
        && let Err(why) = Toolchain::provide().and_then(|_| crate::qemu::provide())
    {
        eprintln!("xtask: {why:#}");
        return ExitCode::FAILURE;
    }
    let result = libtest_mimic::run(&arguments, trials);
    if !options.list {
        println!(
            "{} passed, {} failed, {} skipped",
            result.num_passed, result.num_failed, result.num_ignored
        );
    }
    if result.num_failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// The error for a broken rule: every place at once.
fn violations(found: &[String]) -> Result<()> {
    if found.is_empty() { Ok(()) } else { Err(anyhow!("{}", found.join("\n"))) }
}
