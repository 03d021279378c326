//! The monitor on a live machine: every command over the control port, Ctrl-T on the console, a reset.

use super::machine::{boot, monitored};
use crate::monitored::{Monitored, has_keys, number, rows, text};
use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use serde_json::{Value, json};

/// Keys that scripts may rely on, of a row or an answer.
const GUESTS: &[&str] = &[
    "id",
    "name",
    "state",
    "vcpus",
    "memory_mib",
    "private_pages",
    "shared_pages",
    "swapped_pages",
    "share_pages",
    "console_bytes",
    "attached",
];
const OBJECTS: &[&str] = &[
    "object",
    "depth",
    "pages",
    "resident",
    "swapped",
    "zero",
    "references",
    "pager",
    "shadows",
    "guests",
    "seen_by",
    "share_pages",
    "shared",
];
const MAP: &[&str] = &["start", "end", "pages", "object", "first_page", "prot", "needs_copy"];
const EXITS: &[&str] = &["all", "calls", "mmio", "sysreg", "faults", "interrupts"];
const TRACE: &[&str] = &["id", "vcpu", "number", "class", "esr", "pc"];

pub(super) fn trials() -> Vec<Trial> {
    vec![
        boot("the_monitor_creates_pauses_kills_and_audits", commands),
        boot("control_t_opens_the_monitor_and_control_d_goes_back_to_the_guest", console),
        boot("system_reset_reboots_the_guest", reset),
    ]
}

/// Every command, and what it answers when it is asked wrongly.
fn commands(name: &str) -> Result<()> {
    let mut machine = monitored(name, &["--batch", "--timeout", "480"])?;
    machine.ask("wait guest \"guest ready: guest\"")?;
    let guests = machine.ask("guests")?;
    let [first] = rows(&guests)? else { anyhow::bail!("not one guest: {guests}") };
    has_keys(first, GUESTS)?;
    ensure!(first["id"] == 1 && first["state"] == "running" && first["attached"] == true, "{first}");
    ensure!(first["memory_mib"] == 256, "{first}");

    // Paused, it does nothing: what is typed stays with its console for as long as another takes to boot.
    machine.ask("pause guest")?;
    machine.ask("wait guest paused")?;
    ensure!(machine.refused("pause guest")?.contains("paused"), "a guest was paused twice");
    let before = machine.settled()?;
    machine.ask("send guest echo woken-$((40+1))")?;
    let silent = (machine.guest("guest")?, machine.ask("stats guest")?);
    ensure!(machine.ask("create name=second memory=128M")? == json!({"created": 2}), "not guest 2");
    machine.ask("wait second \"guest ready: second\"")?;
    let still = (machine.guest("guest")?, machine.ask("stats guest")?);
    ensure!(still.0["state"] == "paused", "{still:?}");
    ensure!(
        still.0["console_bytes"] == silent.0["console_bytes"] && still.1["exits"] == silent.1["exits"],
        "paused, it did something: {silent:?}, {still:?}"
    );
    machine.ask("send second echo $(hostname)-$((40+2))")?;
    machine.ask("wait second second-42")?;
    answers(&mut machine)?;
    refusals(&mut machine)?;

    // What the second had comes back; what stays is in the images, of which it has read more.
    ensure!(machine.ask("kill second")? == json!({"killed": 2}), "not killed");
    let guests = machine.ask("guests")?;
    ensure!(rows(&guests)?.len() == 1, "{guests}");
    let after = machine.settled()?;
    let free = |memory: &Value| number(memory, "/frames/free");
    let private = |memory: &Value| number(memory, "/owners/guests_private");
    // A guest's tables go after its pages.
    let used = |memory: &Value| Ok::<_, anyhow::Error>(private(memory)? + number(memory, "/frames/tables")?);
    ensure!(
        free(&after)? + used(&after)? == free(&before)? + used(&before)?,
        "memory did not come back: {before}, then {after}"
    );

    machine.ask("resume guest")?;
    machine.ask("wait guest woken-41")?;
    ensure!(machine.refused("resume guest")?.contains("running"), "a running guest was resumed");
    machine.check()?;
    machine.shutdown()
}

/// What shows memory and exits shows the two guests there are.
fn answers(machine: &mut Monitored) -> Result<()> {
    let log = machine.ask("log second")?;
    for word in ["Booting Linux on physical CPU", "guest ready: second", "second-42"] {
        ensure!(text(&log, "/log")?.contains(word), "the log does not have \"{word}\": {log}");
    }

    let map = machine.ask("map second")?;
    has_keys(&map, &["entries", "table_frames"])?;
    let entries = rows(&map["entries"])?;
    let objects = machine.ask("objects second")?;
    let known: Vec<u64> = rows(&objects)?.iter().map(|row| number(row, "/object")).collect::<Result<_>>()?;
    let (mut end, mut ram) = (0, 0);
    for entry in entries {
        has_keys(entry, MAP)?;
        let [from, to] = [hex(entry, "/start")?, hex(entry, "/end")?];
        ensure!(from >= end && to > from && to - from == number(entry, "/pages")? << 12, "{entry}");
        end = to;
        ram += if from < hv_abi::machine::RAM_BASE { 0 } else { to - from };
        ensure!(known.contains(&number(entry, "/object")?), "{entry} has none of the objects {known:?}");
    }
    ensure!(ram == 128 << 20, "{ram:#x} bytes of RAM are mapped");
    ensure!(number(&map, "/table_frames")? > 0, "{map}");

    let all = machine.ask("objects")?;
    for row in rows(&all)? {
        has_keys(row, OBJECTS)?;
        ensure!(number(row, "/resident")? <= number(row, "/pages")?, "{row}");
    }
    ensure!(rows(&objects)?.len() < rows(&all)?.len(), "one guest has all the objects there are");

    let memory = machine.ask("memory")?;
    let total = number(&memory, "/frames/total")? * number(&memory, "/page_bytes")?;
    ensure!(total < 1 << 30 && total > 3 << 28, "of 1 GiB the guests are given {total:#x} bytes");
    ensure!(number(&memory, "/owners/guests_resident")? > 0, "{memory}");

    let (own, every) = (machine.ask("stats second")?, machine.ask("stats")?);
    has_keys(&own["exits"], EXITS)?;
    has_keys(&own, &["scheduler", "injected", "memory"])?;
    for key in EXITS {
        let [own, every] = [&own, &every].map(|stats| number(stats, &format!("/exits/{key}")));
        let (own, every) = (own?, every?);
        ensure!(own > 0 && own < every, "{key}: {own} of {every} are the second guest's");
    }

    let trace = machine.ask("trace second")?;
    let mut last = None;
    for row in rows(&trace)? {
        has_keys(row, TRACE)?;
        let exit = number(row, "/number")?;
        ensure!(row["id"] == 2 && last.is_none_or(|last| exit == last + 1), "{row} after {last:?}");
        last = Some(exit);
    }
    ensure!(last.is_some(), "no exit is traced");

    let audit = machine.check()?;
    ensure!(audit["maps"] == 2 && number(&audit, "/entries")? == 2 * entries.len() as u64, "{audit}");
    ensure!(rows(&machine.ask("help")?)?.len() >= 17, "help leaves commands out");
    Ok(())
}

/// What is asked wrongly is refused in words that help, and changes nothing.
fn refusals(machine: &mut Monitored) -> Result<()> {
    for (wrong, words) in [
        ("gests", "did you mean 'guests'?"),
        ("kill", "usage: kill G"),
        ("kill nobody", "there is no guest 'nobody'"),
        ("create memroy=1G", "'memroy'"),
        ("create name=second", "there is a guest 'second' already"),
        ("create kernel=nothing", "there is no image 'nothing'"),
        ("wait nobody running", "there is no guest 'nobody'"),
    ] {
        let told = machine.refused(wrong)?;
        ensure!(told.contains(words), "\"{wrong}\" is answered \"{told}\", without \"{words}\"");
    }
    let guests = machine.ask("guests")?;
    ensure!(rows(&guests)?.len() == 2, "a refusal made or ended a guest: {guests}");
    Ok(())
}

fn hex(value: &Value, place: &str) -> Result<u64> {
    let text = text(value, place)?;
    let digits = text.strip_prefix("0x").with_context(|| format!("{text} is not in hexadecimal"))?;
    Ok(u64::from_str_radix(digits, 16)?)
}

/// The monitor on the console, over a guest that goes on printing; and another guest attached.
fn console(name: &str) -> Result<()> {
    let words = ["--batch", "--timeout", "480", "--guests", "2", "--memory", "128M"];
    let mut machine = monitored(name, &words)?;
    for guest in ["guest0", "guest1"] {
        machine.ask(&format!("wait {guest} \"guest ready: {guest}\""))?;
    }
    machine.console.wait("guest ready: guest0")?;
    machine.console.send("\x14")?;
    machine.console.wait("hv> ")?;
    machine.ask("send guest0 echo meanwhile-$((40+1))")?;
    machine.ask("wait guest0 meanwhile-41")?;
    machine.console.send("gusets\r")?;
    machine.console.wait("did you mean 'guests'?")?;
    // What is typed before the prompt is there is shown before it.
    machine.console.wait("hv> ")?;
    machine.console.send("guests\r")?;
    let heading = machine.console.wait("private_pages")?;
    ensure!(heading.starts_with("id  name"), "not a table: {heading}");
    machine.console.wait("guest1")?;
    let row = machine.console.wait("running")?;
    ensure!(row.starts_with("2   guest1  running"), "not guest1's row: {row}");
    machine.console.wait("hv> ")?;
    let text = machine.console.text();
    ensure!(!text.contains("meanwhile-41"), "a guest printed over the monitor");
    ensure!(!text.contains("guest ready: guest1"), "a guest that is not attached printed");

    machine.console.send("\x04")?;
    machine.console.wait("[guest 1 \"guest0\"]")?;
    machine.console.wait("meanwhile-41")?;
    machine.console.send("echo $(hostname)-$((40+2))\n")?;
    machine.console.wait("guest0-42")?;
    // Pasted: more at once than one interrupt takes in.
    machine.console.send(&format!(": {}; echo pasted-$((40+2))\n", "x".repeat(600)))?;
    machine.console.wait("pasted-42")?;

    machine.console.send("\x14attach guest1\r")?;
    machine.console.wait("[guest 2 \"guest1\"]")?;
    // Attached anew, it shows what it printed before.
    machine.console.wait("guest ready: guest1")?;
    machine.console.send("echo $(hostname)-$((40+3)); poweroff -f\n")?;
    machine.console.wait("guest1-43")?;
    machine.ask("wait guest1 gone")?;
    machine.ask("attach guest0")?;
    machine.console.send("echo $(hostname)-$((40+4)); poweroff -f\n")?;
    machine.console.wait("guest0-44")?;
    machine.console.finish()
}

/// Linux reboots, under its number, and powers off.
fn reset(name: &str) -> Result<()> {
    let mut machine = monitored(name, &["--batch", "--timeout", "360", "--memory", "128M"])?;
    machine.ask("wait guest \"guest ready: guest\"")?;
    let before = machine.guest("guest")?;
    machine.ask("send guest reboot -f")?;
    // It is never missing while its memory is taken from it and filled again.
    let mut looks = 0;
    let after = loop {
        let row = machine.guest("guest")?;
        ensure!(row["id"] == 1, "{row}");
        looks += 1;
        let log = machine.ask("log guest")?;
        if text(&log, "/log")?.matches("guest ready: guest").count() == 2 {
            break row;
        }
    };
    ensure!(looks > 1, "nobody looked while it rebooted");
    ensure!(after["attached"] == true && after["memory_mib"] == before["memory_mib"], "{before}, {after}");
    machine.check()?;
    machine.console.send("echo back-$((40+2)); poweroff -f\n")?;
    machine.console.wait("back-42")?;
    machine.console.finish()
}
