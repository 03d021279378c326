//! Boot tests of swap: disks that fail, clones, more guests than fit, no room left.

use super::machine::{STAYS, boot, logs, monitored, tiny_guest};
use crate::errors;
use crate::monitored::{Monitored, number, rows, text};
use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use serde_json::Value;

pub(super) fn trials() -> Vec<Trial> {
    vec![
        boot("a_failing_swap_disk_costs_pages_and_never_a_wrong_byte", failing),
        boot("clones_on_a_host_too_small_for_them_write_a_shared_page_once", clones),
        boot("linux_guests_on_a_third_of_their_memory_find_every_byte", |name| linux(name, "neoverse-n1")),
        boot("linux_guests_that_swap_do_without_hardware_dirty_state", |name| linux(name, "cortex-a53")),
        boot("who_finds_swap_full_waits_visibly_and_goes_on_when_there_is_room", full),
    ]
}

/// What a thrashing guest says at its end: pages that it gave up. `None` while it has not ended.
fn given_up(machine: &mut Monitored, guest: &str) -> Result<Option<u64>> {
    let log = machine.ask(&format!("log {guest}"))?;
    let log = text(&log, "/log")?;
    ensure!(!log.contains("FAILED"), "{guest} says\n{log}");
    let line = log.lines().find(|line| line.contains(" given up"));
    let words = |line: &str| line.split_whitespace().rev().nth(2)?.parse().ok();
    line.map(|line| words(line).with_context(|| format!("no number in \"{line}\""))).transpose()
}

/// The answer to `swap` once no transfer is under way.
fn at_rest(machine: &mut Monitored) -> Result<Value> {
    machine.until("memory", |memory| memory["transfers"] == 0)?;
    machine.ask("swap")
}

/// Three guests fill and compare more memory than the host has, on a disk that fails at more than a thousand places.
fn failing(name: &str) -> Result<()> {
    const WRITES: u64 = 480 + 60;
    let thrash = tiny_guest(name, "thrash")?;
    let words = ["--timeout", "200", "--host-memory", "128M", "--memory", "96M", "--guests", "3"];
    let words = [&words[..], &STAYS].concat();
    let more = ["--swap", "320M", "--overcommit", "none", "--swap-errors", "480,480,120,60"];
    let guest = ["--kernel", &thrash, "--append", "linger rounds=3"];
    let mut machine = monitored(name, &[&words[..], &more, &guest].concat())?;
    // One ends in the middle of it all.
    machine.ask("wait guest2 \"round 1 is read\"")?;
    machine.ask("kill guest2")?;
    machine.check()?;
    let mut lost = 0;
    for guest in ["guest0", "guest1"] {
        machine.ask(&format!("wait {guest} \" given up\""))?;
        let given_up = given_up(&mut machine, guest)?.context("it did not say how many")?;
        let told = number(&machine.ask(&format!("stats {guest}"))?, "/memory/fault_lost")?;
        ensure!(told == given_up, "{guest} gave {given_up} pages up, and {told} faults failed");
        lost += given_up;
        machine.ask(&format!("wait {guest} \"guest thrash: ok\""))?;
    }
    ensure!(lost > 0, "no page was lost, where the disk never gives some back");
    machine.check()?;

    // Each error that the disk made is in the monitor's count, and there is no other.
    let swap = at_rest(&mut machine)?;
    let told = number(&swap, "/transfers/in_failed")? + number(&swap, "/transfers/out_failed")?;
    let made = errors::failed(&logs(name).join("requests.log"))?;
    ensure!(told == made && made > 1000, "the disk failed {made} times: {swap}");
    ensure!(
        number(&swap, "/transfers/in_failed")? > 0 && number(&swap, "/transfers/out_failed")? > 0,
        "{swap}"
    );
    ensure!(number(&swap, "/transfers/in_corrupt")? == 0, "{swap}");
    let bad = number(&swap, "/slots/bad")?;
    // A slot that fails alone is not tried again, though it might take something later.
    ensure!((1..=WRITES).contains(&bad), "{bad} slots are bad, {WRITES} places do not take a write: {swap}");
    for guest in ["guest0", "guest1"] {
        machine.ask(&format!("kill {guest}"))?;
    }
    // A guest that begins now meets the same disk.
    machine.ask("create name=late kernel=kernel memory=96M append=\"linger rounds=1 seed=9\"")?;
    machine.ask("wait late \"guest thrash: ok\"")?;
    given_up(&mut machine, "late")?;
    machine.ask("kill late")?;
    nothing_left(&mut machine)?;
    machine.shutdown()
}

/// Nobody lives any more: no slot is taken.
fn nothing_left(machine: &mut Monitored) -> Result<()> {
    machine.until("swap", |swap| swap["slots"]["in_use"] == 0)?;
    machine.check()?;
    ensure!(rows(&machine.ask("guests")?)?.is_empty(), "somebody lives");
    Ok(())
}

/// Clones of a Linux guest, whose memory is ten times the host's, look in turn at what they share, and
/// at something of their own.
fn clones(name: &str) -> Result<()> {
    const CLONES: usize = 4;
    /// Pages of the file that all share.
    const SHARED: u64 = 80 << 8;
    let words =
        ["--timeout", "300", "--host-memory", "128M", "--memory", "256M", "--swap", "1G", "--host-cpus", "1"];
    let mut machine = monitored(name, &[&words[..], &["--overcommit", "none"], &STAYS].concat())?;
    machine.ask("wait guest \"guest ready: guest\"")?;
    let fill =
        "dd if=/dev/urandom of=/tmp/data bs=1048576 count=80 && md5sum /tmp/data >/sum; echo go-$((1+1))";
    machine.talk(1, fill, "go-2")?;
    let children = machine.fork(1, CLONES)?;
    let mut first = None;
    for (turn, child) in children.iter().chain(&children).enumerate() {
        machine.talk(
            *child,
            &format!("md5sum -c /sum; echo turn-$(({turn}+100))"),
            &format!("turn-{}", turn + 100),
        )?;
        ensure!(
            machine.last_line(*child, "/tmp/data:")?.contains("/tmp/data: OK"),
            "clone {child} reads something else"
        );
        let own = format!(
            "dd if=/dev/urandom of=/own bs=1048576 count=4; cp /own /twin; cmp /own /twin && echo same-$(({turn}+100))"
        );
        machine.talk(*child, &own, &format!("same-{}", turn + 100))?;
        first.get_or_insert(number(&machine.ask("swap")?, "/pages/written")?);
    }
    machine.check()?;
    let swap = at_rest(&mut machine)?;
    let later = number(&swap, "/pages/written")? - first.context("nobody did anything")?;
    let turns = 2 * CLONES as u64 - 1;
    // What the clones wrote of their own may go out; what they share is there.
    ensure!(later < turns * SHARED / 4, "{later} pages were written in {turns} turns over {SHARED}: {swap}");
    let (evicted, written) = (number(&swap, "/pages/evicted")?, number(&swap, "/pages/written")?);
    ensure!(evicted > written + SHARED / 8, "what came back did not go again without a write: {swap}");
    machine.ask("kill guest")?;
    for child in children.iter().rev() {
        machine.ask(&format!("kill {child}"))?;
    }
    nothing_left(&mut machine)?;
    machine.shutdown()
}

/// Linux guests whose memory is over three times the host's, each of which fills and compares what it can.
fn linux(name: &str, cpu: &str) -> Result<()> {
    let words = ["--timeout", "300", "--host-memory", "160M", "--memory", "256M", "--guests", "2"];
    let more = ["--swap", "512M", "--cpu", cpu, "--host-cpus", "2"];
    let mut machine = monitored(name, &[&words[..], &more, &STAYS].concat())?;
    let guests = ["guest0", "guest1"];
    for guest in guests {
        machine.ask(&format!("wait {guest} \"guest ready: {guest}\""))?;
    }
    for guest in guests {
        machine.ask(&format!("send {guest} memtest 100 1"))?;
    }
    for guest in guests {
        machine.ask(&format!("wait {guest} \"memtest: 100 MiB, 1 rounds, ok\""))?;
    }
    machine.check()?;
    let swap = at_rest(&mut machine)?;
    ensure!(number(&swap, "/pages/written")? > 64 << 8, "so little swapped proves nothing: {swap}");
    for guest in guests {
        machine.ask(&format!("kill {guest}"))?;
    }
    nothing_left(&mut machine)?;
    machine.shutdown()
}

/// Three guests that need more than there are frames and slots.
fn full(name: &str) -> Result<()> {
    let thrash = tiny_guest(name, "thrash")?;
    let words = ["--timeout", "120", "--host-memory", "128M", "--memory", "96M", "--guests", "3"];
    let more = ["--swap", "64M", "--overcommit", "none", "--kernel", &thrash];
    let mut machine = monitored(name, &[&words[..], &more, &["--append", "linger"], &STAYS].concat())?;
    let parked = |guests: &Value| {
        let waits = |row: &Value| row["vcpus"].as_str().is_some_and(|word| word.contains("no-memory"));
        rows(guests).is_ok_and(|rows| rows.iter().all(waits))
    };
    // They wait for a moment often; when there is no slot left, for good.
    machine.until("swap", |swap| swap["slots"]["free"] == 0)?;
    machine.until("guests", parked)?;
    let swap = at_rest(&mut machine)?;
    ensure!(number(&swap, "/pages/without_a_slot")? > 0, "{swap}");
    machine.check()?;
    // Each that goes makes room; the last finds all it wrote.
    machine.ask("kill guest1")?;
    machine.ask("kill guest2")?;
    machine.ask("wait guest0 \"guest thrash: ok\"")?;
    ensure!(given_up(&mut machine, "guest0")? == Some(0), "it lost pages on a disk that is well");
    machine.check()?;
    machine.ask("kill guest0")?;
    nothing_left(&mut machine)?;
    machine.shutdown()
}
