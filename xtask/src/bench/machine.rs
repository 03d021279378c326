//! Figures that the hypervisor tells of itself: what its books cost, and what a clone does.
//!
//! Books are read over the control port while a guest that touched all of its RAM stands still. A fork tells in
//! the hypervisor's log for how long its source was still; under `-icount` at 1 GHz a tick is an instruction.

use super::Figure;
use super::trace::{Counter, Follower};
use crate::build;
use crate::monitored::{Monitored, number};
use crate::progress::step;
use crate::qemu;
use crate::run::Run;
use crate::toolchain::Toolchain;
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::thread;
use std::time::Duration;

/// Guest RAM in MiB, touched in full, for which a clone's pause is measured.
const SIZES: [u64; 4] = [64, 256, 1024, 4096];
const PAGE: u64 = 4096;

/// The median of what was measured, with its spread.
pub(super) fn figure(metric: &str, unit: &str, params: &[(&str, u64)], values: &mut [u64]) -> Result<Figure> {
    values.sort_unstable();
    let (Some(&min), Some(&max)) = (values.first(), values.last()) else {
        anyhow::bail!("{metric}: nothing was measured")
    };
    let params: BTreeMap<String, Value> =
        params.iter().map(|(key, value)| ((*key).to_owned(), json!(value))).collect();
    let (metric, unit) = (metric.to_owned(), unit.to_owned());
    Ok(Figure { metric, value: values[values.len() / 2], unit, params, min, max, n: values.len() as u64 })
}

/// Bytes of the hypervisor's books for each frame of memory, and for each page that a guest has mapped.
pub(super) fn books(toolchain: &Toolchain, dir: &Path) -> Result<Vec<Figure>> {
    let image = dir.join("touch.bin");
    fs::write(&image, build::guest(toolchain, "touch")?)?;
    let image = image.display().to_string();
    let words = ["--timeout", "600", "--memory", "64M", "--append", "linger", "--kernel", &image];
    let mut machine = Monitored::start(Run::from_words(&words)?, &dir.join("books"))?;
    step("measuring what the books cost", || machine.console.wait("touched "))?;
    let (memory, audit) = (machine.ask("memory")?, machine.check()?);
    machine.shutdown()?;
    let frames = number(&memory, "/frames/total")?;
    let leaves = number(&audit, "/leaves")?;
    ensure!(leaves * PAGE >= 60 << 20, "the guest has only {leaves} pages mapped");
    let tables = number(&memory, "/frames/tables")? * PAGE;
    let per_frame = number(&memory, "/frame_bytes")?.div_ceil(frames);
    let per_mapping = (number(&memory, "/index_bytes")? + tables).div_ceil(leaves);
    Ok(vec![
        figure("memory.per_frame", "bytes", &[], &mut [per_frame])?,
        figure("memory.per_mapping", "bytes", &[], &mut [per_mapping])?,
    ])
}

/// For how long a guest is still when it is cloned, and how long the call takes, against its RAM.
pub(super) fn clones(toolchain: &Toolchain, dir: &Path) -> Result<Vec<Figure>> {
    let guest = build::guest(toolchain, "fork")?;
    let mut figures = Vec::new();
    for mib in SIZES {
        let log = fork(&guest, mib, "often", &dir.join("clones"), None)?;
        let (mut pauses, mut calls): (Vec<u64>, Vec<u64>) = log.lines().filter_map(told).unzip();
        let params = [("ram_mib", mib)];
        figures.push(figure("clone.pause@ram", "insn", &params, &mut pauses)?);
        figures.push(figure("clone.call@ram", "insn", &params, &mut calls)?);
    }
    Ok([figures, linux_clones(&dir.join("clones-of-linux"))?].concat())
}

/// The same for a Linux with a disk, which forks itself from a shell.
fn linux_clones(dir: &Path) -> Result<Vec<Figure>> {
    const FORKS: usize = 8;
    fs::create_dir_all(dir)?;
    let disk = dir.join("disk.img");
    fs::write(&disk, vec![0; 1 << 20])?;
    let disk = format!("{},private", disk.display());
    let words = ["--icount", "--cpu", "neoverse-n1", "--host-cpus", "1", "--timeout", "900", "--disk", &disk];
    let grant = FORKS.to_string();
    let options = Run::from_words(&[&words[..], &["--host-memory", "1G", "--grant-fork", &grant]].concat())?;
    let mut machine = Monitored::start(options, dir)?;
    step("booting a Linux with a disk", || machine.console.wait("guest ready"))?;
    step("forking it", || {
        machine.talk(
            1,
            "dd if=/dev/urandom of=/dev/vda bs=4096 count=64 conv=fsync; echo has-$((1+1))",
            "has-2",
        )?;
        for fork in 1..=FORKS {
            machine.talk(
                1,
                &format!("fork-guest 1; echo forked-$(({fork}+100))"),
                &format!("forked-{}", fork + 100),
            )?;
        }
        machine.shutdown()
    })?;
    let log = fs::read_to_string(dir.join("hv.log")).context("the hypervisor's log")?;
    let (mut pauses, mut calls): (Vec<u64>, Vec<u64>) = log.lines().filter_map(told).unzip();
    ensure!(pauses.len() == FORKS, "{} forks are told of in {}", pauses.len(), dir.join("hv.log").display());
    let pause = figure("clone.pause@linux", "insn", &[("disks", 1)], &mut pauses)?;
    Ok(vec![pause, figure("clone.call@linux", "insn", &[("disks", 1)], &mut calls)?])
}

/// What one clone call, for several children, writes of tables and invalidates; the guest stands still, so that nothing
/// else does.
pub(super) fn edits(toolchain: &Toolchain, dir: &Path) -> Result<Vec<Figure>> {
    const CHILDREN: usize = 4;
    const CALLS: usize = 5;
    const SIZES: [u64; 3] = [64, 512, 4096];
    let image = write_guest(toolchain, "dirty", &dir.join("edits"))?;
    let mut figures = Vec::new();
    for mib in SIZES {
        let (host, memory) = (format!("{}M", 1024 + mib * 3 / 2), format!("{mib}M"));
        let words = ["--timeout", "600", "--host-memory", &host, "--memory", &memory, "--kernel", &image];
        let mut machine = Monitored::start(Run::from_words(&words)?, &dir.join("edits"))?;
        step(&format!("a guest touches {mib} MiB"), || machine.console.wait("all pages are written"))?;
        // 1,024 pages that are spread over all of it, from where it begins to write.
        let apart = mib / 4;
        let again = format!("k{}", char::from(b"abcdefghijk"[apart.ilog2() as usize]));
        let written = format!("{} pages are written", ((mib - 2) * 256).div_ceil(apart).min(1024));
        let (mut invalidates, mut stores) = (Vec::new(), Vec::new());
        for _ in 0..CALLS {
            machine.ask("pause 1")?;
            // Its vCPU leaves its CPU at the next exit, and nobody frees anything any more.
            machine.until("guests", |guests| guests[0]["vcpus"] != "running")?;
            machine.settled()?;
            let before = machine.ask("stats")?;
            let children = machine.fork_paused(1, CHILDREN)?;
            let after = machine.ask("stats")?;
            let more = |place| Ok::<u64, anyhow::Error>(number(&after, place)? - number(&before, place)?);
            invalidates.push(more("/invalidates")?);
            stores.push(more("/memory/entry_parked")?);
            for child in children {
                machine.ask(&format!("kill {child}"))?;
            }
            // It writes again everywhere, so that there is as much to park the next time.
            machine.ask("resume 1")?;
            machine.talk(1, &again, &written)?;
        }
        machine.shutdown()?;
        let params = [("ram_mib", mib), ("children", CHILDREN as u64)];
        figures.push(figure("clone.tlbi", "invalidates", &params, &mut invalidates)?);
        figures.push(figure("clone.stores", "entries", &params, &mut stores)?);
    }
    Ok(figures)
}

/// What an idle Linux clone owns after ten seconds, in bytes: frames, tables, and the hypervisor's own books of it.
pub(super) fn private(_: &Toolchain, dir: &Path) -> Result<Vec<Figure>> {
    const CHILDREN: usize = 16;
    let words = ["--timeout", "600", "--host-memory", "1G"];
    let mut machine = Monitored::start(Run::from_words(&words)?, &dir.join("private"))?;
    step("booting Linux", || machine.console.wait("guest ready"))?;
    // It is idle once its shell has asked for a line and its drivers have settled.
    step("it comes to rest", || {
        machine.console.wait("/ # ")?;
        std::thread::sleep(Duration::from_secs(10));
        Ok::<_, anyhow::Error>(())
    })?;
    machine.ask("pause 1")?;
    let before = machine.ask("memory")?;
    let children = machine.fork(1, CHILDREN)?;
    step("its clones are idle for ten seconds", || {
        std::thread::sleep(Duration::from_secs(10));
        Ok::<_, anyhow::Error>(())
    })?;
    for child in &children {
        machine.ask(&format!("pause {child}"))?;
    }
    let after = machine.settled()?;
    machine.shutdown()?;
    let each = |place: &str, size: u64| -> Result<u64> {
        Ok((number(&after, place)? - number(&before, place)?) * size / CHILDREN as u64)
    };
    let parts = [
        ("frames", each("/owners/guests_resident", PAGE)?),
        ("tables", each("/frames/tables", PAGE)?),
        ("fixed", each("/guest_bytes", 1)? + each("/index_bytes", 1)?),
    ];
    let total: u64 = parts.iter().map(|(_, bytes)| bytes).sum();
    let all = parts.into_iter().chain([("total", total)]);
    all.map(|(part, bytes)| {
        let mut figure = figure("clone.private", "bytes", &[], &mut [bytes])?;
        figure.params.insert("part".to_owned(), json!(part));
        Ok(figure)
    })
    .collect()
}

/// What a fork makes dearer later: the child's first reads and writes of its parent's pages, and what the first writes
/// cost whoever outlives the other.
pub(super) fn after_fork(toolchain: &Toolchain, dir: &Path) -> Result<Vec<Figure>> {
    let image = dir.join("bench.bin");
    fs::write(&image, build::guest(toolchain, "bench")?)?;
    let image = image.display().to_string();

    let mut machine = Monitored::start(forking(&image, "fork")?, &dir.join("after-fork"))?;
    step("measuring a child's faults", || machine.console.wait("bench: place 0 waits"))?;
    let child = log_that_says(&mut machine, 2, "bench: place 1 waits")?;
    machine.shutdown()?;

    let survivors = surviving(forking(&image, "fork survive")?, &dir.join("surviving"))?;
    let figures = [child, survivors];
    let figures = figures.iter().flat_map(|told| told.lines()).filter_map(Figure::from_line);
    Ok(figures.filter(|figure| figure.metric.starts_with("fault.")).collect())
}

/// The measuring guest, which may fork.
fn forking(image: &str, append: &str) -> Result<Run> {
    let mut words = vec!["--icount", "--cpu", "neoverse-n1", "--host-cpus", "1", "--timeout", "300"];
    words.extend(["--memory", "64M", "--grant-fork", "8", "--append", append, "--kernel", image]);
    Run::from_words(&words)
}

/// Lets it measure what is left for those that outlive their relatives: what they told.
fn surviving(options: Run, dir: &Path) -> Result<String> {
    let mut machine = Monitored::start(options, dir)?;
    step("measuring a survivor's faults", || machine.console.wait("bench: the parent goes"))?;
    let console = machine.console.text();
    let (parent, _) = console.split_once("bench: the parent goes").context("the parent's console")?;
    // What is asked while it measures is measured as well: by now it has begun, and it needs a fraction of this.
    thread::sleep(Duration::from_secs(2));
    // Guest 2 was the child that died at once.
    let orphan = log_that_says(&mut machine, 3, "bench: place 1 waits")?;
    machine.shutdown()?;
    Ok(format!("{parent}\n{orphan}"))
}

/// Builds a tiny guest and puts it there; the file.
pub(super) fn write_guest(toolchain: &Toolchain, name: &str, dir: &Path) -> Result<String> {
    fs::create_dir_all(dir)?;
    let image = dir.join(format!("{name}.bin"));
    fs::write(&image, build::guest(toolchain, name)?)?;
    Ok(image.display().to_string())
}

/// What a guest told on a console that is not attached, once it has said `last`.
pub(super) fn log_that_says(machine: &mut Monitored, guest: u64, last: &str) -> Result<String> {
    let says = |log: &Value| log["log"].as_str().is_some_and(|told| told.contains(last));
    let log = machine.until(&format!("log {guest}"), says)?;
    Ok(log["log"].as_str().unwrap_or_default().to_owned())
}

/// Instructions from a guest's call that forks it to the first exit that its child causes: with one CPU the child runs
/// next.
pub(super) fn first_exits(forks: &Counter) -> Result<Figure> {
    figure("clone.total", "insn", &[("ram_mib", SIZES[0])], &mut forks.until_next_exit().to_vec())
}

/// The same for the smallest, followed instruction by instruction.
pub(super) fn follow_clones(toolchain: &Toolchain, hypervisor: &Path, dir: &Path) -> Result<Counter> {
    follow_forks(toolchain, hypervisor, &dir.join("followed"), SIZES[0], "often")
}

/// The same of one that has all the tables that fit below one top-level entry, and a page in each.
pub(super) fn follow_wide_clones(toolchain: &Toolchain, hypervisor: &Path, dir: &Path) -> Result<Counter> {
    follow_forks(toolchain, hypervisor, &dir.join("followed-wide"), 1024, "often sparse")
}

fn follow_forks(
    toolchain: &Toolchain,
    hypervisor: &Path,
    dir: &Path,
    mib: u64,
    append: &str,
) -> Result<Counter> {
    let guest = build::guest(toolchain, "fork")?;
    follow(&guest, hypervisor, dir, |trace, dir| fork(&guest, mib, append, dir, Some(trace)).map(drop))
}

/// What a parent pays that outlives its child, followed instruction by instruction.
pub(super) fn follow_survivors(toolchain: &Toolchain, hypervisor: &Path, dir: &Path) -> Result<Counter> {
    let guest = build::guest(toolchain, "bench")?;
    follow(&guest, hypervisor, &dir.join("followed-on"), |trace, dir| {
        let image = dir.join("bench.bin");
        fs::write(&image, &guest)?;
        let mut options = forking(&image.display().to_string(), "fork survive")?;
        options.trace = Some(trace);
        let mut machine = Monitored::start(options, dir)?;
        // The parent's half: a command to the monitor would be followed as well.
        step("following a survivor's faults", || machine.console.wait("bench: the parent goes"))?;
        machine.console.stop();
        Ok(())
    })
}

/// Follows a run of a guest that `run` starts with what QEMU is to log, its files in `dir`.
pub(super) fn follow(
    guest: &[u8],
    hypervisor: &Path,
    dir: &Path,
    run: impl FnOnce(qemu::Trace, &Path) -> Result<()>,
) -> Result<Counter> {
    fs::create_dir_all(dir)?;
    let (follower, trace) = Follower::start(hypervisor, guest, dir.join("instructions"))?;
    run(trace, dir)?;
    follower.finish()
}

/// Runs a guest that forks again and again, with so much RAM: the hypervisor's log.
fn fork(guest: &[u8], mib: u64, append: &str, dir: &Path, trace: Option<qemu::Trace>) -> Result<String> {
    fs::create_dir_all(dir)?;
    let image = dir.join("fork.bin");
    fs::write(&image, guest)?;
    let (image, memory) = (image.display().to_string(), format!("{mib}M"));
    let host = format!("{}M", 2048.max(1024 + mib * 3 / 2));
    let mut words =
        vec!["--batch", "--icount", "--cpu", "neoverse-n1", "--host-cpus", "1", "--timeout", "900"];
    words.extend(["--host-memory", &host, "--grant-fork", "64", "--append", append]);
    words.extend(["--memory", &memory, "--kernel", &image]);
    let mut options = Run::from_words(&words)?;
    options.trace = trace;
    let mut session = options.session(dir, false)?;
    step(&format!("forking a guest with {mib} MiB ({append})"), || session.finish())?;
    fs::read_to_string(dir.join("hv.log")).context("the hypervisor's log")
}

/// What a line of the log says of a fork: ticks still, ticks in all.
fn told(line: &str) -> Option<(u64, u64)> {
    let (_, rest) = line.split_once("still for ")?;
    let (pause, rest) = rest.split_once(" ticks, ")?;
    let (call, _) = rest.split_once(" in all")?;
    Some((pause.parse().ok()?, call.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fork_is_read_from_the_log() {
        let line = "hv: guest 1: forked into 1, still for 12256 ticks, 50913 in all";
        assert_eq!(told(line), Some((12256, 50913)));
        assert_eq!(told("hv: 2 CPUs"), None);
    }

    #[test]
    fn a_figure_without_values_is_an_error() {
        assert!(figure("x.y", "insn", &[], &mut []).is_err());
        assert_eq!(figure("x.y", "insn", &[], &mut [3, 1, 2]).expect("a figure").value, 2);
    }
}
