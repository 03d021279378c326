//! Figures of swap: what a page costs that comes back, and one that goes although many share it; how much of a
//! disk's rate is used; how much more memory guests can have than there is.
//!
//! Instructions are counted under `-icount` with one host CPU. While a guest waits for the disk and nobody has a
//! time to wait for, that clock stands still: the device's own time is not counted. What its driver takes is counted, and
//! told apart where the run is followed instruction by instruction. Rates are of wall time, on a disk
//! that QEMU slows down to far less than either side could do, and against what QEMU's own tool reads and writes there.

use super::Figure;
use super::machine::{figure, follow};
use super::trace::{Counter, Operations};
use crate::build;
use crate::monitored::{Monitored, number, rows};
use crate::progress::step;
use crate::qemu::{self, Trace};
use crate::run::Run;
use crate::symbols::Symbols;
use crate::toolchain::Toolchain;
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::path::Path;
use std::time::{Duration, Instant};

/// The figure whose instructions can be followed.
pub(super) const SWAP_IN: &str = "fault.swap_in";

/// What counts instructions.
const COUNTED: [&str; 8] =
    ["--icount", "--cpu", "neoverse-n1", "--host-cpus", "1", "--timeout", "900", "--append"];

fn image(toolchain: &Toolchain, dir: &Path, guest: &str) -> Result<String> {
    let image = dir.join(format!("{guest}.bin"));
    fs::write(&image, build::guest(toolchain, guest)?)?;
    Ok(image.display().to_string())
}

/// Has nearly all that guest 1 has for itself paged out, and then lets it have it back. The least that it was left with.
fn all_out(machine: &mut Monitored) -> Result<u64> {
    let least = number(&machine.ask("limit 1")?, "/least_pages")?;
    machine.ask(&format!("limit 1 resident={}K", least * 4))?;
    machine.until("limit 1", |limit| number(limit, "/own_pages").is_ok_and(|own| own <= least))?;
    machine.until("memory", |memory| memory["transfers"] == 0)?;
    machine.ask("limit 1 resident=none")?;
    Ok(least)
}

/// What a page costs that a guest reads back from swap, one by one and in order.
pub(super) fn back(toolchain: &Toolchain, dir: &Path) -> Result<Vec<Figure>> {
    let told = read_back(&image(toolchain, dir, "bench")?, "swap", None, &dir.join("swapped"))?;
    Ok(told.lines().filter_map(Figure::from_line).filter(|figure| figure.metric == SWAP_IN).collect())
}

/// The same for half as many, followed instruction by instruction; of far fewer, those that are far apart in order would
/// be near enough to each other for neighbours to come along.
pub(super) fn follow_back(toolchain: &Toolchain, hypervisor: &Path, dir: &Path) -> Result<Counter> {
    let guest = build::guest(toolchain, "bench")?;
    follow(&guest, hypervisor, &dir.join("followed-back"), |trace, dir| {
        let image = image(toolchain, dir, "bench")?;
        read_back(&image, "swap pages=512", Some(trace), dir).map(drop)
    })
}

/// What of a followed page-in is not of the disk's driver nor of the store above it, which find the disk, describe the
/// segments and collect what is done: whoever reads a page from that disk needs that.
pub(super) fn beyond_the_disk(operations: &Operations, mode: &str, symbols: &Symbols) -> Figure {
    const DRIVER: [&str; 2] = ["board/src/virtio/", "hv/src/mm/store.rs"];
    let value = operations.beyond(&DRIVER, symbols);
    let params = [("mode", mode), ("part", "beyond_disk")];
    let params = params.map(|(key, value)| (key.to_owned(), json!(value))).into();
    let (metric, unit, n) = (SWAP_IN.to_owned(), "insn".to_owned(), operations.count());
    Figure { metric, value, unit, params, min: value, max: value, n }
}

/// Has a guest's pages paged out, and the guest read them: what it told.
fn read_back(image: &str, append: &str, trace: Option<Trace>, dir: &Path) -> Result<String> {
    let words = [&COUNTED[..], &[append, "--memory", "64M", "--swap", "256M", "--kernel", image]].concat();
    let mut options = Run::from_words(&words)?;
    options.trace = trace;
    let mut machine = Monitored::start(options, dir)?;
    step("writing pages", || machine.console.wait("pages are written"))?;
    // Where it waits it would compute all the time.
    machine.ask("pause 1")?;
    step("paging them out", || all_out(&mut machine))?;
    machine.ask("resume 1")?;
    machine.console.send("\n")?;
    step("reading them back", || machine.console.wait("bench: they are read"))?;
    let told = machine.console.text();
    machine.console.stop();
    Ok(told)
}

/// What it takes to evict a page that so many clones map beside their parent: instructions of pageout for each page that
/// left, its looks at those that stayed among them; leaves that it visited, and invalidates.
pub(super) fn shared(toolchain: &Toolchain, dir: &Path) -> Result<Vec<Figure>> {
    let image = image(toolchain, dir, "bench")?;
    let mut figures = Vec::new();
    for (clones, pages, host, memory) in
        [(1, 8192, "96M", "256M"), (32, 8192, "96M", "256M"), (1000, 4096, "512M", "1G")]
    {
        let append = format!("evict pages={pages} children={clones}");
        let grant = clones.to_string();
        let words = [
            &COUNTED[..],
            &[&append, "--memory", memory, "--host-memory", host, "--swap", "1G", "--overcommit", "none"],
            &["--grant-fork", &grant, "--kernel", &image],
        ]
        .concat();
        let mut machine = Monitored::start(Run::from_words(&words)?, &dir.join("shared"))?;
        step(&format!("{clones} clones read what they share"), || {
            machine.console.wait("bench: everybody reads")?;
            machine.until("guests", |guests| {
                let sleeps = |row: &Value| row["id"] == 1 || row["vcpus"] == "waiting";
                rows(guests).is_ok_and(|rows| rows.len() == clones + 1 && rows.iter().all(sleeps))
            })
        })?;
        let (swap, stats) = (machine.ask("swap")?, machine.ask("stats")?);
        // Those who share them read them first of all, so they are the oldest.
        let gone = step("memory becomes short", || {
            loop {
                machine.console.send("\n")?;
                machine.console.wait("bench: more is written")?;
                machine.until("memory", |memory| memory["transfers"] == 0)?;
                let now = machine.ask("swap")?;
                if number(&now, "/pages/evicted")? >= number(&swap, "/pages/evicted")? + pages / 2 {
                    return Ok::<_, anyhow::Error>(now);
                }
            }
        })?;
        let after = machine.ask("stats")?;
        let evicted = number(&gone, "/pages/evicted")? - number(&swap, "/pages/evicted")?;
        let each = |more: u64| more.div_ceil(evicted);
        let more = |now: &Value, then: &Value, place| {
            Ok::<u64, anyhow::Error>(number(now, place)? - number(then, place)?)
        };
        let all = [
            ("insn", more(&gone, &swap, "/pageout_ticks")?),
            ("leaves", more(&after, &stats, "/memory/leaf_visited")?),
            ("invalidates", more(&after, &stats, "/invalidates")?),
        ];
        machine.console.stop();
        for (unit, count) in all {
            let mut figure = figure("evict@clones", unit, &[("clones", clones as u64)], &mut [each(count)])?;
            figure.params.insert("what".to_owned(), json!(unit));
            figure.n = evicted;
            figures.push(figure);
        }
    }
    Ok(figures)
}

/// How much of a disk's own rate goes to pages that go in order, and to pages that come back in order.
pub(super) fn rates(toolchain: &Toolchain, dir: &Path) -> Result<Vec<Figure>> {
    /// MiB a second.
    const RATE: u64 = 8;
    const PAGES: u64 = 4096;
    qemu::provide_tools()?;
    let image = image(toolchain, dir, "bench")?;
    let (append, rate) = (format!("swap pages={PAGES}"), RATE.to_string());
    let words = ["--timeout", "600", "--memory", "96M", "--swap", "256M", "--swap-rate", &rate];
    let words = [&words[..], &["--append", &append, "--kernel", &image]].concat();
    let mut machine = Monitored::start(Run::from_words(&words)?, &dir.join("rates"))?;
    step("writing pages", || machine.console.wait("pages are written"))?;
    let out = step("paging them out", || rate_out(&mut machine, 2 * PAGES))?;
    machine.console.send("\n")?;
    step("reading them back in no order", || machine.console.wait("mode=single"))?;
    let begun = Instant::now();
    step("reading them back in order", || machine.console.wait("mode=sequential"))?;
    let back = per_second(PAGES, begun.elapsed());
    machine.shutdown()?;
    let scratch = dir.join("raw.img");
    let raw = |write| step("the disk alone", || raw_rate(&scratch, RATE, write));
    [("swap.out", out, raw(true)?), ("swap.in", back, raw(false)?)]
        .into_iter()
        .map(|(metric, rate, raw)| {
            eprintln!("xtask: {metric}: {rate} pages a second, {raw} of the disk alone");
            let params = [("disk_mib_per_s", RATE)];
            figure(metric, "percent", &params, &mut [100 * rate / raw])
        })
        .collect()
}

/// Has pages paged out; how many a second while it was well under way.
fn rate_out(machine: &mut Monitored, pages: u64) -> Result<u64> {
    let least = number(&machine.ask("limit 1")?, "/least_pages")?;
    machine.ask(&format!("limit 1 resident={}K", least * 4))?;
    let mut samples: Vec<(Instant, u64)> = Vec::new();
    loop {
        let written = number(&machine.ask("swap")?, "/pages/written")?;
        if written * 10 > pages && written * 10 < pages * 9 {
            samples.push((Instant::now(), written));
        }
        if written * 10 >= pages * 9 {
            break;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    machine.until("limit 1", |limit| number(limit, "/own_pages").is_ok_and(|own| own <= least))?;
    machine.ask("limit 1 resident=none")?;
    let (Some((start, first)), Some((end, last))) = (samples.first(), samples.last()) else {
        anyhow::bail!("it was too fast to be looked at")
    };
    Ok(per_second(last - first, *end - *start))
}

/// Pages a second that QEMU's own tool reads or writes in order on such a disk.
fn raw_rate(scratch: &Path, rate: u64, write: bool) -> Result<u64> {
    const REQUESTS: u64 = 256;
    const PAGES_EACH: u64 = 16;
    File::create(scratch)?.set_len(REQUESTS * PAGES_EACH * 4096)?;
    let begun = Instant::now();
    qemu::run_on_slow_disk(scratch, rate, REQUESTS, PAGES_EACH * 4096, write)?;
    let time = begun.elapsed();
    fs::remove_file(scratch).context("the scratch file")?;
    Ok(per_second(REQUESTS * PAGES_EACH, time))
}

fn per_second(pages: u64, time: Duration) -> u64 {
    pages.saturating_mul(1000) / u64::try_from(time.as_millis()).unwrap_or(u64::MAX).max(1)
}

/// How much RAM guests have in use, every word of it verified, for what frames there are.
pub(super) fn overcommit(toolchain: &Toolchain, dir: &Path) -> Result<Vec<Figure>> {
    const GUESTS: u64 = 6;
    let image = image(toolchain, dir, "thrash")?;
    let guests = GUESTS.to_string();
    let words = ["--timeout", "900", "--host-memory", "128M", "--memory", "96M", "--guests", &guests];
    let more = ["--swap", "640M", "--append", "linger rounds=1", "--kernel", &image];
    let mut machine = Monitored::start(Run::from_words(&[&words[..], &more].concat())?, &dir.join("ratio"))?;
    step("guests verify more memory than there is", || {
        (0..GUESTS).try_for_each(|guest| {
            machine.ask(&format!("wait guest{guest} \" given up\""))?;
            machine.ask(&format!("wait guest{guest} \"guest thrash: ok\"")).map(drop)
        })
    })?;
    let (guests, memory) = (machine.ask("guests")?, machine.ask("memory")?);
    machine.check()?;
    let swap = machine.ask("swap")?;
    ensure!(number(&swap, "/transfers/in_failed")? == 0, "the disk failed: {swap}");
    machine.shutdown()?;
    let mut used = 0;
    for row in rows(&guests)? {
        used += number(row, "/private_pages")? + number(row, "/swapped_pages")?;
    }
    let percent = used * 100 / number(&memory, "/frames/total")?;
    Ok(vec![figure("overcommit.ratio", "percent", &[("guests", GUESTS)], &mut [percent])?])
}
