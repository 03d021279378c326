//! `cargo xtask bench`: what the way through EL2 costs, in instructions, against the project's baseline.
//!
//! The tiny guest `bench` does the measuring and prints `bench METRIC VALUE KEY=VALUE...`; QEMU counts instructions
//! instead of time, so the figures repeat. One host CPU for everything; two where one vCPU wakes another, since
//! then both CPUs' work is the figure. Where the instructions of a figure go is `trace`'s. Read `run` first, then
//! the two types.

pub(crate) mod aims;
mod collapse;
mod depth;
mod machine;
mod resets;
mod session;
mod swap;
mod trace;

use crate::run::Run;
use crate::symbols::Symbols;
use crate::toolchain::Toolchain;
use crate::{build, progress};
use aims::{aims, held};
use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Mutex, PoisonError};
use trace::{Counter, Follower};

/// Options of `bench`.
#[derive(Args, Clone, Debug)]
pub(crate) struct Bench {
    /// Only figures whose names start so, such as `exit` or `fault.zero`
    names: Vec<String>,
    /// Show where the instructions of these figures go, function by function
    #[arg(long)]
    profile: bool,
    /// Write the figures here, as a JSON list
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Fail where a figure is worse than the baseline, or misses an aim that is not known to be missed
    #[arg(long)]
    check: bool,
    /// Make these figures the baseline
    #[arg(long, conflicts_with_all = ["check", "names"])]
    bless: bool,
}

/// One figure.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Figure {
    /// What is measured; the `@word` is part of the name.
    pub(crate) metric: String,
    /// The median.
    pub(crate) value: u64,
    /// Of what.
    pub(crate) unit: String,
    /// Under which circumstances.
    pub(crate) params: BTreeMap<String, Value>,
    /// The least.
    pub(crate) min: u64,
    /// The most.
    pub(crate) max: u64,
    /// Of how many.
    pub(crate) n: u64,
}

impl Figure {
    /// From the guest's line, if it is one.
    fn from_line(line: &str) -> Option<Self> {
        let mut words = line.trim().strip_prefix("bench ")?.split_whitespace();
        let metric = words.next()?.to_owned();
        let value = words.next()?.parse().ok()?;
        let (mut min, mut max, mut n) = (value, value, 1);
        let mut unit = "insn".to_owned();
        let mut params = BTreeMap::new();
        for (key, text) in words.filter_map(|w| w.split_once('=')) {
            match key {
                "min" => min = text.parse().ok()?,
                "max" => max = text.parse().ok()?,
                "n" => n = text.parse().ok()?,
                "unit" => text.clone_into(&mut unit),
                _ => {
                    let number = text.parse::<u64>().map(Value::from);
                    params.insert(key.to_owned(), number.unwrap_or_else(|_| Value::from(text)));
                }
            }
        }
        Some(Self { metric, value, unit, params, min, max, n })
    }

    /// Metric and parameters: what names a figure.
    pub(crate) fn name(&self) -> String {
        let shown = |v: &Value| v.as_str().map_or_else(|| v.to_string(), str::to_owned);
        let params: Vec<String> = self.params.iter().map(|(k, v)| format!("{k}={}", shown(v))).collect();
        format!("{} {}", self.metric, params.join(" ")).trim().to_owned()
    }

    /// True where a baseline is better.
    fn is_worse_than(&self, old: &Self) -> bool {
        if self.unit == "percent" { self.value < old.bound() } else { self.value > old.bound() }
    }

    /// The most, or of a share the least, that is not worse than this baseline: counts on one CPU repeat to a thousandth, the interleaving of
    /// two CPUs does not; and a figure of a hundred moves by a few when the compiler moves a register. What is counted
    /// one by one does not move; what a Linux does in ten seconds of idling does.
    fn bound(&self) -> u64 {
        let first = self.params.get("part").and_then(Value::as_str) == Some("first");
        match (self.metric.as_str(), self.unit.as_str()) {
            // Of a few faults some find the way laid already; which is the middle one is chance.
            ("fault.cow@depth", _) if first => self.max + self.max / 10,
            // What is asked for over the monitor, and what a Linux is at, meet whatever else there is to do just then.
            (
                "clone.pause@linux" | "clone.call@linux" | "evict@clones" | "el2.longest" | "snapshot.delete"
                | "collapse.page" | "reset.dirty",
                _,
            ) => self.value + (self.value / 10).max(8),
            (_, "invalidates" | "entries") => self.value,
            // More is better, and it is of wall time.
            (_, "percent") => self.value - self.value / 10,
            ("clone.private", _) => self.value + self.value / 4,
            _ if self.two_cpus() => self.value + (self.value / 10).max(8),
            _ => self.value + (self.value * 3 / 100).max(8),
        }
    }

    /// The most instructions in a row for which interrupts waited.
    fn longest(counter: &Counter) -> Self {
        let value = counter.longest();
        let (metric, unit) = (LONGEST.to_owned(), "insn".to_owned());
        Self { metric, value, unit, params: BTreeMap::new(), min: value, max: value, n: 1 }
    }

    fn two_cpus(&self) -> bool {
        self.metric == "irq.sgi" && self.params.get("to").and_then(Value::as_str) == Some("other")
    }
}

/// The figures that only a run followed instruction by instruction gives.
const LONGEST: &str = "el2.longest";
const TOTAL: &str = "clone.total";

/// One run of the measuring guest.
struct Setting {
    cpus: u32,
    wanted: fn(&Figure) -> bool,
}

const SETTINGS: [Setting; 2] =
    [Setting { cpus: 1, wanted: |figure| !figure.two_cpus() }, Setting { cpus: 2, wanted: Figure::two_cpus }];

/// Measures figures of its own.
type Measure = fn(&Toolchain, &Path) -> Result<Vec<Figure>>;

/// The beginnings of the names of its figures, and what measures them.
type Machine = (&'static [&'static str], Measure);

/// Figures that the hypervisor tells of itself, by the beginnings of their names: counts, which are the same beside another
/// machine. The last is of wall time, and runs alone.
const MACHINE: [Machine; 12] = [
    (&["memory"], machine::books),
    (&["clone.pause", "clone.call"], machine::clones),
    (&["clone.tlbi", "clone.stores"], machine::edits),
    (&["clone.private"], machine::private),
    (&["reset"], resets::resets),
    (&["fault"], machine::after_fork),
    (&["fault.cow@depth", "fault.shared_read@depth"], depth::faults),
    (&["snapshot.delete", "collapse.page"], collapse::deletions),
    (&["fault.swap_in"], swap::back),
    (&["evict"], swap::shared),
    (&["overcommit"], swap::overcommit),
    (&["swap"], swap::rates),
];
/// Machines that run side by side.
const WORKERS: usize = 2;

fn baseline() -> PathBuf {
    crate::root().join("xtask/bench/baseline.json")
}

impl Bench {
    /// Measures, shows, and does what else was asked.
    pub(crate) fn run(&self) -> Result<()> {
        let dir = crate::root().join("target/bench");
        fs::create_dir_all(&dir)?;
        let toolchain = Toolchain::provide()?;
        let guest = build::guest(&toolchain, "bench")?;
        let image = dir.join("bench.bin");
        fs::write(&image, &guest)?;
        let hypervisor = build::hypervisor(&toolchain)?;
        let mut figures = Vec::new();
        let mut longest = None;
        for setting in SETTINGS.iter().filter(|_| self.asks_for_guests_own()) {
            let dir = dir.join(format!("on-{}", setting.cpus));
            let mut options = setting.options(&image)?;
            let mut follower = None;
            if self.follows(setting) {
                fs::create_dir_all(&dir)?;
                let (started, trace) = Follower::start(&hypervisor, &guest, dir.join("instructions"))?;
                options.trace = Some(trace);
                follower = Some(started);
            }
            let found = measure(setting, &options, &dir)?;
            if let Some(follower) = follower {
                let counter = follower.finish()?;
                if self.profile {
                    self.explain(setting, &found, &counter, &Symbols::open(&hypervisor)?)?;
                }
                longest = Some(counter);
            }
            figures.extend(found.into_iter().filter(|f| (setting.wanted)(f) && self.asks_for(f)));
        }
        let forks = match longest.is_some() || self.asks_for_metric(TOTAL) {
            true => Some(machine::follow_clones(&toolchain, &hypervisor, &dir)?),
            false => None,
        };
        if let Some(forks) = &forks
            && self.asks_for_metric(TOTAL)
        {
            figures.push(machine::first_exits(forks)?);
        }
        if let (Some(counter), Some(forks)) = (longest.filter(|_| self.asks_for_metric(LONGEST)), forks) {
            let survivors = machine::follow_survivors(&toolchain, &hypervisor, &dir)?;
            let wide = machine::follow_wide_clones(&toolchain, &hypervisor, &dir)?;
            let session = session::follow_monitor(&toolchain, &hypervisor, &dir)?;
            let longer =
                |one: Counter, other: Counter| if other.longest() > one.longest() { other } else { one };
            let counter = longer(longer(longer(counter, forks), wide), longer(survivors, session));
            let figure = Figure::longest(&counter);
            if self.profile {
                let table = counter.longest_operation().table(&Symbols::open(&hypervisor)?);
                println!("{}: {}\n{table}", figure.name(), figure.value);
            }
            figures.push(figure);
        }
        if self.asks_for_metric(swap::SWAP_IN) {
            let counter = swap::follow_back(&toolchain, &hypervisor, &dir)?;
            let symbols = Symbols::open(&hypervisor)?;
            for (operations, mode) in counter.figures().iter().zip(["single", "sequential"]) {
                figures.push(swap::beyond_the_disk(operations, mode, &symbols));
                if self.profile {
                    println!("{} mode={mode}\n{}", swap::SWAP_IN, operations.table(&symbols));
                }
            }
        }
        figures.extend(self.machines(&toolchain, &dir)?.into_iter().filter(|f| self.asks_for(f)));
        ensure!(!figures.is_empty(), "no figure has a name that starts with {}", self.names.join(" or "));
        let old = match read(&baseline()) {
            Ok(old) => old,
            Err(why) if self.check => return Err(why),
            Err(_) => Vec::new(),
        };
        show(&figures, &old);
        leave(&figures, self.names.is_empty())?;
        if let Some(file) = &self.json {
            write(file, &figures)?;
        }
        if self.bless {
            write(&baseline(), &figures)?;
            eprintln!("xtask: the baseline is these {} figures now", figures.len());
        }
        if self.check {
            let due: Vec<Figure> = old.into_iter().filter(|f| self.asks_for(f)).collect();
            let worse = compare(&figures, &due);
            let held = held(&aims()?, &figures, |metric| self.asks_for_metric(metric));
            for (what, lines) in [
                ("aims that are missed, as xtask/bench/aims.json says", &held.known),
                ("aims that are met: take \"missed\" out of xtask/bench/aims.json", &held.met),
            ] {
                if !lines.is_empty() {
                    println!("\n{what}:\n  {}", lines.join("\n  "));
                }
            }
            let mut bad = Vec::new();
            if !worse.is_empty() {
                bad.push(format!("against {}:\n  {}", baseline().display(), worse.join("\n  ")));
            }
            if !held.newly.is_empty() {
                bad.push(format!("against xtask/bench/aims.json:\n  {}", held.newly.join("\n  ")));
            }
            if !bad.is_empty() {
                bail!("{}", bad.join("\n"));
            }
        }
        Ok(())
    }

    /// The figures of [`MACHINE`], in its order; each measure has a folder for itself.
    fn machines(&self, toolchain: &Toolchain, dir: &Path) -> Result<Vec<Figure>> {
        let wants =
            |stem: &&str| self.names.iter().any(|n| n.starts_with(*stem) || stem.starts_with(n.as_str()));
        let wanted: Vec<_> = MACHINE
            .into_iter()
            .filter(|(stems, _)| self.names.is_empty() || stems.iter().any(wants))
            .collect();
        let one = |(stems, measure): Machine| {
            let dir = dir.join(stems[0]);
            fs::create_dir_all(&dir)?;
            measure(toolchain, &dir)
        };
        let [.., (alone, _)] = MACHINE;
        let (last, beside): (Vec<_>, Vec<_>) = wanted.into_iter().partition(|(stems, _)| *stems == alone);
        let (next, found) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
        std::thread::scope(|scope| {
            for _ in 0..WORKERS {
                scope.spawn(|| {
                    loop {
                        let nth = next.fetch_add(1, Relaxed);
                        let Some(&what) = beside.get(nth) else { return };
                        let figures = one(what);
                        found.lock().unwrap_or_else(PoisonError::into_inner).push((nth, figures));
                    }
                });
            }
        });
        let mut found = found.into_inner().unwrap_or_else(PoisonError::into_inner);
        found.sort_by_key(|(nth, _)| *nth);
        let found = found.into_iter().map(|(_, figures)| figures).chain(last.into_iter().map(one));
        Ok(found.collect::<Result<Vec<_>>>()?.concat())
    }

    fn asks_for(&self, figure: &Figure) -> bool {
        self.asks_for_metric(&figure.metric)
    }

    fn asks_for_metric(&self, metric: &str) -> bool {
        self.names.is_empty() || self.names.iter().any(|n| metric.starts_with(n.as_str()))
    }

    /// True unless all that is asked for is measured by runs of its own.
    fn asks_for_guests_own(&self) -> bool {
        let apart = |name: &String| {
            let mut stems = MACHINE.iter().flat_map(|(stems, _)| *stems).filter(|stem| **stem != "fault");
            stems.any(|stem| name.starts_with(stem))
        };
        self.names.is_empty() || !self.names.iter().all(apart)
    }

    /// Following the run changes no figure, but takes a minute or two: only where somebody wants what it gives,
    /// and on one CPU, since with two the one that spins would be followed for ever.
    fn follows(&self, setting: &Setting) -> bool {
        setting.cpus == 1 && (self.profile || self.asks_for_metric(LONGEST))
    }

    /// Tells where the instructions of the figures that are asked for go.
    fn explain(
        &self,
        setting: &Setting,
        found: &[Figure],
        counter: &Counter,
        symbols: &Symbols,
    ) -> Result<()> {
        let all = counter.figures();
        ensure!(all.len() == found.len(), "{} figures, and marks of {}", found.len(), all.len());
        for (figure, operations) in found.iter().zip(all) {
            if (setting.wanted)(figure) && self.asks_for(figure) && !operations.is_empty() {
                println!("{}: {} instructions\n{}", figure.name(), figure.value, operations.table(symbols));
            }
        }
        Ok(())
    }
}

impl Setting {
    fn options(&self, image: &Path) -> Result<Run> {
        let cpus = self.cpus.to_string();
        let image = image.display().to_string();
        Run::from_words(&[
            "--batch",
            "--icount",
            "--cpu",
            "neoverse-n1",
            "--timeout",
            "600",
            "--kernel",
            &image,
            "--vcpus",
            &cpus,
            "--host-cpus",
            &cpus,
        ])
    }
}

fn measure(setting: &Setting, options: &Run, dir: &Path) -> Result<Vec<Figure>> {
    let mut session = options.session(dir, false)?;
    progress::step(&format!("measuring on {} CPU(s)", setting.cpus), || session.finish())
        .with_context(|| format!("the measuring guest; logs are in {}", dir.display()))?;
    let text = session.text();
    ensure!(text.contains("guest bench: ok"), "the measuring guest did not come to its end:\n{text}");
    Ok(text.lines().filter_map(Figure::from_line).filter(|f| f.metric.contains('.')).collect())
}

/// What is worse than the baseline, or no longer measured.
fn compare(figures: &[Figure], baseline: &[Figure]) -> Vec<String> {
    let mut worse = Vec::new();
    for old in baseline {
        let name = old.name();
        match figures.iter().find(|f| f.name() == name) {
            None => worse.push(format!("{name}: not measured any more")),
            Some(new) if new.is_worse_than(old) => {
                worse.push(format!("{name}: {}, was {} (bound {})", new.value, old.value, old.bound()));
            }
            Some(_) => {}
        }
    }
    worse
}

fn show(figures: &[Figure], old: &[Figure]) {
    println!("{:<42} {:>8} {:>8} {:>8} {:>6} {:>9}", "figure", "median", "min", "max", "n", "baseline");
    for figure in figures {
        let name = figure.name();
        let was =
            old.iter().find(|f| f.name() == name).map_or_else(|| "-".to_owned(), |f| f.value.to_string());
        let Figure { value, min, max, n, unit, .. } = figure;
        println!("{name:<42} {value:>8} {min:>8} {max:>8} {n:>6} {was:>9} {unit}");
    }
}

/// Where the last figures are, for `report`.
fn last() -> PathBuf {
    crate::root().join("target/bench/figures.json")
}

/// What the last full run found, and later ones of single figures.
pub(crate) fn left() -> Result<Vec<Figure>> {
    if last().is_file() { read(&last()) } else { Ok(Vec::new()) }
}

/// Leaves figures for `report`: all there are, or some in the place of older ones.
fn leave(figures: &[Figure], all: bool) -> Result<()> {
    let mut kept = if all { Vec::new() } else { left()? };
    for figure in figures {
        match kept.iter_mut().find(|old| old.name() == figure.name()) {
            Some(old) => old.clone_from(figure),
            None => kept.push(figure.clone()),
        }
    }
    write(&last(), &kept)
}

fn read(file: &Path) -> Result<Vec<Figure>> {
    let text = fs::read_to_string(file)
        .with_context(|| format!("reading {}; `cargo xtask bench --bless` makes it", file.display()))?;
    serde_json::from_str(&text).with_context(|| format!("{} is not a list of figures", file.display()))
}

fn write(file: &Path, figures: &[Figure]) -> Result<()> {
    if let Some(dir) = file.parent() {
        fs::create_dir_all(dir)?;
    }
    // One figure a line, so that a change of one is one line of a diff.
    let lines: Vec<String> = figures.iter().map(serde_json::to_string).collect::<Result<_, _>>()?;
    fs::write(file, format!("[\n{}\n]\n", lines.join(",\n")))
        .with_context(|| format!("writing {}", file.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: &str = "bench fault.zero 700 mode=single pages=64 min=690 max=1200 n=2048";

    #[test]
    fn a_line_of_the_guest_becomes_a_figure() {
        let figure = Figure::from_line(LINE).expect("a figure");
        assert_eq!((figure.value, figure.min, figure.max, figure.n), (700, 690, 1200, 2048));
        assert_eq!(figure.name(), "fault.zero mode=single pages=64");
        assert_eq!(figure.params["pages"], Value::from(64));
        assert_eq!(Figure::from_line("guest bench: ok"), None);
    }

    #[test]
    fn a_worse_or_missing_figure_is_told_and_a_better_one_is_not() {
        let old = Figure::from_line(LINE).expect("a figure");
        let with = |value| Figure { value, ..old.clone() };
        let old = std::slice::from_ref(&old);
        assert!(compare(&[with(600)], old).is_empty());
        assert!(compare(&[with(721)], old).is_empty());
        assert_eq!(compare(&[with(722)], old).len(), 1);
        assert_eq!(compare(&[], old).len(), 1);
        let share = Figure { unit: "percent".to_owned(), ..with(90) };
        let shares = std::slice::from_ref(&share);
        assert!(compare(&[Figure { value: 99, ..share.clone() }], shares).is_empty());
        assert_eq!(compare(&[Figure { value: 80, ..share.clone() }], shares).len(), 1);
    }
}
