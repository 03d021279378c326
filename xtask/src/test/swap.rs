//! Boot tests of swap: disks that fail, clones, more guests than fit, no room left.

use super::machine::{STAYS, boot, logs, monitored, tiny_guest};
use crate::errors;
use crate::monitored::{Monitored, number, rows, text};
use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use serde_json::Value;
use std::fs::{self, File};

pub(super) fn trials() -> Vec<Trial> {
    vec![
        boot("a_failing_swap_disk_costs_pages_and_never_a_wrong_byte", failing),
        boot("a_swap_disk_that_falls_silent_is_given_up_and_whoever_waited_for_it_goes_on", silent),
        boot("clones_on_a_host_too_small_for_them_write_a_shared_page_once", |name| clones(name, 4, 2)),
        boot("linux_guests_on_a_third_of_their_memory_find_every_byte", |name| linux(name, &SMALL)),
        boot("linux_guests_that_swap_do_without_hardware_dirty_state", |name| {
            linux(name, &Tested { cpu: "cortex-a53", ..SMALL })
        }),
        boot("a_guest_with_the_least_it_may_have_gets_on_and_costs_its_neighbour_less_than_a_tenth", limited),
        boot("who_finds_swap_full_waits_visibly_and_goes_on_when_there_is_room", full),
    ]
}

/// What takes too long for every run.
pub(super) fn matrix() -> Vec<Trial> {
    let full = Tested { guests: 4, memory: 512, host: 640, swap: 3072, set: 420, rounds: 3, ..SMALL };
    let many = Tested { cpu: "cortex-a53", cpus: 4, vcpus: 4, ..full };
    vec![
        boot("matrix_64_clones_with_130_times_the_memory_of_their_host_write_a_shared_page_once", |name| {
            clones(name, 64, 1)
        }),
        boot("matrix_four_linux_guests_of_512_mib_on_a_host_of_640_find_every_byte", move |name| {
            linux(name, &full)
        }),
        boot("matrix_four_linux_guests_of_512_mib_with_4_vcpus_on_4_cpus_without_dirty_state", move |name| {
            linux(name, &many)
        }),
    ]
}

/// Linux guests on a host that is too small for them; sizes in MiB.
#[derive(Clone, Copy)]
struct Tested {
    cpu: &'static str,
    cpus: u64,
    vcpus: u64,
    guests: u64,
    memory: u64,
    host: u64,
    swap: u64,
    /// What each fills and reads: of 512 MiB, its kernel leaves 452 with one vCPU, and less with more.
    set: u64,
    rounds: u64,
}

const SMALL: Tested = Tested {
    cpu: "neoverse-n1",
    cpus: 2,
    vcpus: 1,
    guests: 2,
    memory: 256,
    host: 160,
    swap: 512,
    set: 100,
    rounds: 1,
};

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
    has_room(&mut machine)?;
    // A guest that begins now meets the same disk.
    machine.ask("create name=late kernel=kernel memory=96M append=\"linger rounds=1 seed=9\"")?;
    machine.ask("wait late \"guest thrash: ok\"")?;
    given_up(&mut machine, "late")?;
    machine.ask("kill late")?;
    nothing_left(&mut machine)?;
    machine.shutdown()
}

/// A disk with swap room stops answering. Whoever waits for it does so for a bounded time, then it is given up: guests that
/// had pages there lose those, the others wait for memory, visibly, and all that they had is there for the next.
fn silent(name: &str) -> Result<()> {
    let thrash = tiny_guest(name, "thrash")?;
    let file = logs(name).join("swap.img");
    let swap = file.display().to_string();
    let words = ["--timeout", "120", "--host-memory", "128M", "--memory", "96M", "--guests", "2"];
    let more = ["--swap", &swap, "--overcommit", "none", "--disk-patience", "5", "--kernel", &thrash];
    let words = [&words[..], &STAYS, &more].concat();
    for which in ["read", "write"] {
        fs::create_dir_all(logs(name))?;
        File::create(&file)?.set_len(256 << 20)?;
        let mut machine =
            monitored(name, &[&words[..], &["--swap-stall", which, "--append", "linger rounds=3"]].concat())?;
        machine.until("swap", |swap| swap["devices"][0]["state"] == "gone")?;
        for words in ["and none has ended for", "given up"] {
            machine.wait_logged(words).with_context(|| format!("{which}: nothing is told of the disk"))?;
        }
        machine.check()?;
        if which == "write" {
            // Who waits for memory can be seen.
            machine.until("guests", |guests| {
                let waits = |guest: &Value| guest["vcpus"].as_str() == Some("no-memory");
                guests.as_array().is_some_and(|guests| guests.iter().any(waits))
            })?;
        }
        // What they lose may be anything of theirs, their code, too. Whoever comes after them has what they had.
        machine.ask("kill guest0")?;
        machine.ask("kill guest1")?;
        has_room(&mut machine)?;
        machine.ask("create name=late kernel=kernel memory=64M append=\"linger rounds=1 seed=9\"")?;
        machine.ask("wait late \"guest thrash: ok\"")?;
        ensure!(given_up(&mut machine, "late")? == Some(0), "it has no page on that disk");
        machine.check()?;
        machine.shutdown()?;
    }
    Ok(())
}

/// Waits until what the dead had is there for a guest that begins: `create` waits only for a moment.
fn has_room(machine: &mut Monitored) -> Result<()> {
    const ENOUGH: u64 = 16 << 8;
    machine.until("memory", |memory| number(memory, "/frames/free").is_ok_and(|n| n >= ENOUGH)).map(drop)
}

/// Nobody lives any more: no slot is taken.
fn nothing_left(machine: &mut Monitored) -> Result<()> {
    machine.until("swap", |swap| swap["slots"]["in_use"] == 0)?;
    machine.check()?;
    ensure!(rows(&machine.ask("guests")?)?.is_empty(), "somebody lives");
    Ok(())
}

/// So many clones of a Linux guest, which with it have at least ten times the host's memory, look in turn at what they share,
/// and at something of their own, so often.
fn clones(name: &str, count: usize, times: usize) -> Result<()> {
    /// Pages of the file that all share.
    const SHARED: u64 = 80 << 8;
    let words =
        ["--timeout", "300", "--host-memory", "128M", "--memory", "256M", "--swap", "2G", "--host-cpus", "1"];
    let mut machine = monitored(name, &[&words[..], &["--overcommit", "none"], &STAYS].concat())?;
    machine.ask("wait guest \"guest ready: guest\"")?;
    let fill =
        "dd if=/dev/urandom of=/tmp/data bs=1048576 count=80 && md5sum /tmp/data >/sum; echo go-$((1+1))";
    machine.talk(1, fill, "go-2")?;
    let children = machine.fork(1, count)?;
    let mut first = None;
    let turns = count * times;
    for (turn, child) in children.iter().cycle().take(turns).enumerate() {
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
    let turns = turns as u64 - 1;
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
fn linux(name: &str, of: &Tested) -> Result<()> {
    let &Tested { cpu, cpus, vcpus, guests, memory, host, swap, set, rounds } = of;
    let timeout = 300 + 20 * guests * set * rounds;
    let words = format!(
        "--timeout {timeout} --host-memory {host}M --memory {memory}M --guests {guests} --swap {swap}M --cpu {cpu} \
         --host-cpus {cpus} --vcpus {vcpus}"
    );
    let mut machine = monitored(name, &[&words.split(' ').collect::<Vec<_>>()[..], &STAYS].concat())?;
    let guests: Vec<String> = (0..guests).map(|number| format!("guest{number}")).collect();
    for guest in &guests {
        machine.ask(&format!("wait {guest} \"guest ready: {guest}\""))?;
    }
    // All begin at once, or the first is done before the last begins.
    let begin = |guest: &String| format!("send {guest} memtest {set} {rounds}");
    machine.ask_all(&guests.iter().map(begin).collect::<Vec<_>>())?;
    for guest in &guests {
        let end = format!("memtest: {set} MiB, {rounds} rounds, ");
        let line = machine.whole_line(guest, &end)?;
        ensure!(line == format!("{end}ok"), "{guest} says {line}");
    }
    machine.check()?;
    let swap = at_rest(&mut machine)?;
    ensure!(number(&swap, "/pages/written")? > 64 << 8, "so little swapped proves nothing: {swap}");
    for guest in &guests {
        machine.ask(&format!("kill {guest}"))?;
    }
    nothing_left(&mut machine)?;
    machine.shutdown()
}

/// A guest that needs another page with every instruction has as little as it may; another one, whose memory fits, does
/// the same work alone and then beside it.
fn limited(name: &str) -> Result<()> {
    let thrash = tiny_guest(name, "thrash")?;
    let words =
        ["--icount", "--timeout", "300", "--host-cpus", "1", "--host-memory", "256M", "--swap", "256M"];
    let fits = ["--memory", "16M", "--kernel", &thrash, "--append", "linger rounds=4"];
    let mut machine = monitored(name, &[&words[..], &fits, &STAYS].concat())?;
    machine.ask("wait guest \"guest thrash: ok\"")?;
    let alone = number(&machine.ask("stats guest")?, "/scheduler/ticks")?;
    machine.ask("kill guest")?;

    let thrashes = "memory=32M append=\"linger rounds=1000000 words=1 stride=97\"";
    // It has touched everything in a tenth of a second, and would need nothing new. Both are done before its first slice.
    machine
        .ask_all(&[format!("create name=thrasher kernel=kernel {thrashes}"), "pause thrasher".to_owned()])?;
    let limit = machine.ask("limit thrasher")?;
    ensure!(limit["limit_pages"].is_null(), "it was not limited: {limit}");
    let least = number(&limit, "/least_pages")?;
    let told = machine.refused(&format!("limit thrasher resident={}K", (least - 1) * 4))?;
    ensure!(told.contains(&format!("resident={}K", least * 4)), "the least is {least} pages: {told}");
    machine.ask(&format!("limit thrasher resident={}K", least * 4))?;
    machine.ask("resume thrasher")?;
    machine.wait_long("thrasher", "round 1 is read")?;

    let before = machine.ask("stats thrasher")?;
    machine.ask("create name=again kernel=kernel memory=16M append=\"linger rounds=4\"")?;
    machine.ask("wait again \"guest thrash: ok\"")?;
    let beside = number(&machine.ask("stats again")?, "/scheduler/ticks")?;
    let after = machine.ask("stats thrasher")?;
    ensure!(beside * 10 < alone * 11, "{alone} instructions alone, {beside} beside one that thrashes");
    let waits = |stats: &Value| number(stats, "/memory/fault_wait");
    // Each costs it a slice of the neighbour's.
    ensure!(waits(&after)? > waits(&before)? + 20, "it did not thrash meanwhile: {before}, {after}");
    let own = number(&machine.guest("thrasher")?, "/own_pages")?;
    ensure!(own <= least, "it has {own} pages and may have {least}");
    ensure!(number(&machine.guest("again")?, "/swapped_pages")? == 0, "the neighbour pays as well");
    machine.ask("kill again")?;
    machine.wait_long("thrasher", "round 2 is read")?;
    machine.check()?;
    machine.ask("limit thrasher resident=none")?;
    machine.ask("kill thrasher")?;
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
