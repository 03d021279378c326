//! Boot tests of clones: what each relative sees, what they share, and that all of it comes back.

use super::guests::ends_well;
use super::machine::{STAYS, boot, monitored, start, tiny_guest};
use super::stored::another;
use crate::monitored::{Monitored, introduction, number, rows, text};
use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

pub(super) fn trials() -> Vec<Trial> {
    let models = ["cortex-a53", "neoverse-n1", "max"];
    let each = |cpu: &'static str| {
        let name = format!("relatives_of_a_fork_see_what_they_should_on_{}", cpu.replace('-', "_"));
        boot(name, move |name| relatives(name, cpu, CHUNK))
    };
    let mut trials: Vec<Trial> = models.into_iter().map(each).collect();
    trials.extend(["cortex-a53", "max"].map(|cpu| {
        let name =
            format!("relatives_of_a_fork_see_what_they_should_page_by_page_on_{}", cpu.replace('-', "_"));
        boot(name, move |name| relatives(name, cpu, CHUNK - 1))
    }));
    trials.push(boot("a_guest_forks_itself_only_if_granted", not_granted));
    trials.push(boot("a_fork_bomb_harms_neither_neighbour_nor_monitor_and_nothing_is_left_of_it", bomb));
    trials.push(boot(
        "a_program_under_linux_6_1_forks_its_guest_and_the_children_draw_their_own_numbers",
        |name| forks_itself(name, "6.1"),
    ));
    trials.push(boot(
        "a_program_under_linux_6_12_forks_its_guest_and_the_children_draw_their_own_numbers",
        |name| forks_itself(name, "6.12"),
    ));
    trials.push(boot("clones_of_a_running_linux_go_on_alone_and_come_back", linux_clones));
    trials.push(boot("a_reset_clone_is_what_its_snapshot_was", linux_reset));
    trials.push(boot(
        "twenty_four_clones_of_a_linux_live_at_once_on_a_small_host_and_each_has_its_own_number_name_and_bytes",
        |name| all_alive(name, 24, &["--timeout", "600", "--memory", "128M", "--host-memory", "384M"]),
    ));
    trials
}

/// What takes too long for every run.
pub(super) fn matrix() -> Vec<Trial> {
    vec![boot("matrix_256_clones_of_a_linux_live_at_once_on_a_host_with_2_gib", |name| {
        all_alive(name, 256, &["--timeout", "3600", "--host-memory", "2G"])
    })]
}

/// Pages of 2 MiB: the guest has two chunks of them, and its children map each as one block until they write to it.
const CHUNK: u64 = 512;

/// Parent, two children and a grandchild: each looks at every page after all have written. Contents at both ends of the
/// CPU range, with hardware dirty state and without, with blocks and, where one page of each chunk is not there, with
/// pages. In every page is a number that only the first of the family drew, and another family draws another.
fn relatives(name: &str, cpu: &str, pages: u64) -> Result<()> {
    let file = tiny_guest(name, "fork")?;
    let append = format!("granted linger pages={pages}");
    let words = ["--timeout", "240", "--memory", "16M", "--cpu", cpu, "--grant-fork", "8", "--kernel", &file];
    let words = [&words[..], &["--append", &append]].concat();
    let first = family(&mut monitored(name, &words)?, pages)?;
    let second = family(&mut another(name, "second", &words)?, pages)?;
    ensure!(first != second, "two machines drew the same number: {first}");
    Ok(())
}

/// One family, from its first fork to the good end of each; the number that it has in its memory.
fn family(machine: &mut Monitored, pages: u64) -> Result<String> {
    // Who found all of a chunk in its parent has mapped it as a block. The grandchild's parent had written to the one,
    // and nobody since the first of them to the other.
    let blocks = BTreeMap::from([("0 depth 0", 0), ("1 depth 0", 2), ("2 depth 0", 2), ("1 depth 1", 1)]);
    machine.console.wait("fork: place 0")?;
    let guests = loop {
        let guests = machine.ask("guests")?;
        let guests: Vec<u64> =
            guests.as_array().into_iter().flatten().filter_map(|guest| guest["id"].as_u64()).collect();
        if guests.len() == blocks.len() {
            break guests;
        }
        ensure!(guests.len() < blocks.len(), "more relatives than were forked: {guests:?}");
    };
    let (mut places, mut nonces, mut random) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    for guest in &guests {
        machine.ask(&format!("wait {guest} \"ready\""))?;
        let line = machine.last_line(*guest, "ready")?;
        let between = |from: &str, to: &str| {
            let word = line.split_once(from).and_then(|(_, rest)| rest.split_once(to));
            word.map(|(word, _)| word.to_owned()).with_context(|| format!("guest {guest} says {line}"))
        };
        let place = between("place ", " of ")?;
        let mapped = number(&machine.ask(&format!("stats {guest}"))?, "/memory/block_mapped")?;
        let expected = *blocks.get(place.as_str()).with_context(|| format!("guest {guest} says {line}"))?;
        ensure!(
            mapped == if pages == CHUNK { expected } else { 0 },
            "place {place} has mapped {mapped} blocks"
        );
        places.insert(place);
        nonces.insert(between("nonce ", " ")?);
        random.insert(between("random ", " ")?);
    }
    ensure!(places.len() == blocks.len(), "two relatives are in one place: {places:?}");
    ensure!(random.len() == blocks.len(), "two relatives drew the same number: {random:?}");
    ensure!(nonces.len() == 1, "the relatives have not one number from before the fork: {nonces:?}");
    machine.check()?;
    // All have written; each looks for the last time, and what it then says is read before it ends.
    for guest in &guests {
        machine.ask(&format!("send {guest} x"))?;
    }
    for guest in &guests {
        ends_well(machine, &guest.to_string(), "fork")?;
    }
    machine.check()?;
    for guest in guests.iter().rev() {
        machine.ask(&format!("send {guest} x"))?;
        // The last takes the machine along.
        if *guest != guests[0] {
            machine.until("guests", |now| {
                rows(now).is_ok_and(|now| now.iter().all(|row| row["id"] != *guest))
            })?;
        }
    }
    machine.console.finish()?;
    nonces.pop_first().context("no relatives")
}

fn not_granted(name: &str) -> Result<()> {
    let file = tiny_guest(name, "fork")?;
    let mut session = start(name, &["--batch", "--timeout", "120", "--kernel", &file])?;
    session.finish()?;
    ensure!(session.text().contains("guest fork: ok"), "a fork that was not granted was not refused");
    Ok(())
}

/// Children that the bomb may have at once, with theirs.
const GRANTED: usize = 24;
/// How soon the monitor must have answered beside it. It has a turn as all others have.
const PATIENCE: Duration = Duration::from_secs(10);

/// Asks something that must not wait for long.
fn promptly(machine: &mut Monitored, command: &str) -> Result<Value> {
    let begun = Instant::now();
    let answer = machine.ask(command)?;
    ensure!(begun.elapsed() < PATIENCE, "the answer to \"{command}\" took {:?}", begun.elapsed());
    Ok(answer)
}

/// The bomb and all that come from it: everybody but guest 1. Never more than it was granted.
fn bombs(machine: &mut Monitored) -> Result<Vec<Value>> {
    let guests = promptly(machine, "guests")?;
    let bombs: Vec<Value> = rows(&guests)?.iter().filter(|row| row["id"] != 1).cloned().collect();
    ensure!(bombs.len() <= 1 + GRANTED, "{} are alive, {GRANTED} were granted: {guests}", bombs.len());
    Ok(bombs)
}

/// Waits until as many are alive as were granted.
fn full(machine: &mut Monitored) -> Result<Vec<Value>> {
    let all = |guests: &Value| rows(guests).is_ok_and(|rows| rows.len() >= 2 + GRANTED);
    machine.until("guests", all)?;
    bombs(machine)
}

/// A guest, all its children and all of theirs fork without end, beside one that compares what it wrote. They are refused,
/// not ended; the neighbour and the monitor go on; and when the family has been killed nothing of it is left.
fn bomb(name: &str) -> Result<()> {
    let (thrash, fork) = (tiny_guest(name, "thrash")?, tiny_guest(name, "fork")?);
    let with = format!("fork={fork}");
    let words = ["--timeout", "300", "--host-memory", "512M", "--memory", "8M", "--kernel", &thrash];
    let more = ["--append", "linger words=64 typed", "--with", &with];
    let mut machine = monitored(name, &[&words[..], &more, &STAYS].concat())?;
    // By then it has all its pages.
    machine.ask("wait 1 \"thrash: round 1 is read\"")?;
    let frames = |memory: &Value| -> Result<u64> {
        let places = ["/frames/free", "/owners/guests_resident", "/owners/cached"];
        places.into_iter().map(|place| number(memory, place)).sum()
    };
    let in_use = |objects: &Value| -> Result<usize> {
        Ok(rows(objects)?.iter().filter(|row| row["cached"] == false).count())
    };
    let before = machine.settled()?;
    let (objects, snapshots) = (in_use(&machine.ask("objects")?)?, machine.ask("snapshots")?);
    let own = number(&machine.guest("guest")?, "/private_pages")?;

    let bomb = format!("create name=bomb kernel=fork memory=8M grant-fork={GRANTED} append=\"bomb linger\"");
    machine.ask(&bomb)?;
    let begun = rounds(&mut machine)?;
    // Each was refused again and again, and none of it ended by that.
    let family = full(&mut machine)?;
    loop {
        let mut born = 0;
        for row in &family {
            let id = number(row, "/id")?;
            machine.wait_long(&id.to_string(), " times")?;
            let line = machine.last_line(id, " times")?;
            let children =
                line.strip_prefix("fork: ").and_then(|rest| rest.split(' ').next()?.parse::<usize>().ok());
            born += children.with_context(|| format!("guest {id} says {line}"))?;
        }
        if born == GRANTED {
            break;
        }
        // Somebody said so between two forks, and says it again.
        ensure!(born < GRANTED, "{GRANTED} are alive, and {born} were forked");
    }
    // The place of one that is killed is taken at once, by one; but for the first, which nobody forked.
    for nth in [1, GRANTED / 2, GRANTED] {
        let victim = number(&full(&mut machine)?[nth], "/id")?;
        promptly(&mut machine, &format!("kill {victim}"))?;
    }
    full(&mut machine)?;
    for question in ["help", "objects", "stats", "memory", "snapshots", "log 1"] {
        promptly(&mut machine, question)?;
    }
    machine.check()?;
    // The neighbour gets on beside them, and has nothing else to say.
    let so_far = rounds(&mut machine)?;
    let ended = |log: &Value| text(log, "/log").is_ok_and(|log| log.contains("guest thrash:"));
    let log = machine.until("log 1", |log| ended(log) || told(log) > so_far.max(begun + 1))?;
    ensure!(!ended(&log), "the neighbour did not wait to be told: {log}");

    // Who stands still keeps its place, and forks nobody: so they are killed for good.
    for row in full(&mut machine)? {
        promptly(&mut machine, &format!("pause {}", row["id"]))?;
    }
    let family = bombs(&mut machine)?;
    ensure!(family.iter().all(|row| row["state"] == "paused"), "somebody was born meanwhile: {family:?}");
    for row in &family {
        let log = promptly(&mut machine, &format!("log {}", row["id"]))?;
        ensure!(!text(&log, "/log")?.contains("FAILED"), "{log}");
        promptly(&mut machine, &format!("kill {}", row["id"]))?;
    }
    machine.check()?;
    machine.ask("send 1 \"enough\"")?;
    ends_well(&mut machine, "1", "thrash")?;
    machine.until("memory", |now| frames(now).ok() == frames(&before).ok())?;
    let after = machine.settled()?;
    ensure!(after["owners"]["guests_resident"] == before["owners"]["guests_resident"], "{before}, {after}");
    ensure!(number(&machine.guest("guest")?, "/private_pages")? == own, "the neighbour has other pages");
    ensure!(rows(&machine.ask("guests")?)?.len() == 1, "somebody is left");
    machine.until("objects", |now| in_use(now).is_ok_and(|now| now == objects))?;
    ensure!(machine.ask("snapshots")? == snapshots, "snapshots are left");
    machine.check()?;
    machine.shutdown()
}

/// Rounds that guest 1 has compared, as its log has it.
fn told(log: &Value) -> u64 {
    let log = log["log"].as_str().unwrap_or_default();
    let round = |line: &str| line.strip_prefix("thrash: round ")?.strip_suffix(" is read")?.parse().ok();
    log.lines().rev().find_map(|line| round(line.trim_end())).unwrap_or(0)
}

fn rounds(machine: &mut Monitored) -> Result<u64> {
    Ok(told(&machine.ask("log 1")?))
}

/// `fork-guest` in a shell: refused beyond what was granted; else every relative's shell goes on with its own line, and its
/// kernel's generator is its own at once.
fn forks_itself(name: &str, kernel: &str) -> Result<()> {
    let words = ["--timeout", "600", "--vcpus", "2", "--kernel", kernel, "--grant-fork", "4"];
    let mut machine = monitored(name, &words)?;
    machine.console.wait("guest ready")?;
    machine.talk(1, "fork-guest 5; echo too-$((1+1))", "too-2")?;
    machine.last_line(1, "fork-guest: refused: not granted")?;
    machine.talk(1, "fork-guest 0; fork-guest x; fork-guest; echo bad-$((1+1))", "bad-2")?;
    machine.last_line(1, "no such number of children: 0")?;
    machine.last_line(1, "usage: fork-guest CHILDREN")?;
    // It is refused, too, where one of its vCPUs comes too late to stand still.
    machine.talk(
        1,
        "for i in 1 2 3 4 5 6; do fork-guest 3 && break; done; \
         echo r-$((3+4)) $(head -c 8 /dev/urandom | od -An -tx1) $(head -c 4 /proc/sys/kernel/random/uuid)",
        "r-7",
    )?;
    let guests = machine.ask("guests")?;
    ensure!(rows(&guests)?.len() == 4, "three children were asked for: {guests}");
    let mut seen = BTreeSet::new();
    for guest in rows(&guests)? {
        let id = number(guest, "/id")?;
        if id != 1 {
            machine.ask(&format!("wait {id} \"r-7\""))?;
        }
        let told = machine.last_line(id, "fork-guest: place")?;
        let place = if id == 1 { 0 } else { id - 1 };
        ensure!(told.trim_end() == format!("fork-guest: place {place} of 3, guest {id}"), "{told}");
        seen.insert(machine.last_line(id, "r-7")?);
    }
    ensure!(seen.len() == 4, "relatives drew the same random bytes: {seen:?}");
    machine.check()?;
    machine.shutdown()
}

fn resident(machine: &mut Monitored) -> Result<u64> {
    number(&machine.ask("memory")?, "/owners/guests_resident")
}

/// Forks a Linux guest that has something in memory into four, changes each, kills them in another order, and looks
/// for what is left.
fn linux_clones(name: &str) -> Result<()> {
    let words = ["--timeout", "600", "--vcpus", "2", "--host-memory", "1G"];
    let mut machine = monitored(name, &words)?;
    machine.console.wait("guest ready")?;
    machine.talk(
        1,
        "X=parent; head -c 4000000 /dev/urandom > /data; md5sum /data > /sum; echo go-$((1+1))",
        "go-2",
    )?;
    machine.talk(1, "echo $(cat /sys/class/misc/hw_random/rng_current)-$((1+1))", "virtio_rng.0-2")?;
    let before = resident(&mut machine)?;
    let children = machine.fork(1, 4)?;
    machine.ask("check")?;
    let mut random = BTreeSet::new();
    for child in &children {
        machine.talk(*child, "echo $X-$((20+1)); md5sum -c /sum", "/data: OK")?;
        machine.talk(
            *child,
            &format!("X=child{child}; echo $X > /mine; dd if=/dev/zero of=/data bs=1k count=99 conv=notrunc"),
            "99+0 records out",
        )?;
        machine.talk(*child, "echo r-$((3+4)) $(head -c 8 /dev/urandom | od -An -tx1)", "r-7")?;
        machine.talk(*child, "echo e-$((3+5))", "e-8")?;
        random.insert(machine.last_line(*child, "r-7")?);
    }
    ensure!(random.len() == children.len(), "clones drew the same random bytes: {random:?}");
    let mut devices = BTreeSet::new();
    for &guest in children.iter().chain(&[1]) {
        // What the driver and what serves its readers had fetched before the fork, 64 bytes each, all of them have.
        machine.talk(guest, "echo h-$((3+6)) $(head -c 256 /dev/hwrng | tail -c 16 | od -An -tx1)", "h-9")?;
        machine.talk(guest, "echo e-$((4+6))", "e-10")?;
        let line = machine.last_line(guest, "h-9")?;
        ensure!(line.split_whitespace().count() == 17, "guest {guest} read less than it wanted: {line}");
        devices.insert(line);
    }
    ensure!(
        devices.len() == children.len() + 1,
        "the entropy devices of relatives say the same: {devices:?}"
    );
    machine.talk(1, "echo $X-$((20+2)); md5sum -c /sum", "/data: OK")?;
    for child in &children {
        machine.talk(*child, "echo I-am-$(cat /mine)-$((5+5))", &format!("I-am-child{child}-10"))?;
    }
    machine.ask("check")?;
    for place in [2, 0, 3, 1] {
        machine.ask(&format!("kill {}", children[place]))?;
        machine.ask("check")?;
        machine.talk(1, "md5sum -c /sum", "/data: OK")?;
    }
    machine.ask("pause 1")?;
    let after = number(&machine.settled()?, "/owners/guests_resident")?;
    // The parent went on meanwhile; four children with 256 MiB each did not stay.
    ensure!(after < before + 2048, "{before} pages before, {after} after all clones are dead");
    machine.shutdown()
}

/// So many clones of one Linux, made by one call, all run; each says its own number, which it asks its machine for, its own
/// name, and random bytes that nobody else says. Afterwards all still run, and what they had comes back.
fn all_alive(name: &str, clones: usize, words: &[&str]) -> Result<()> {
    let mut machine = monitored(name, words)?;
    machine.console.wait("guest ready")?;
    machine.talk(1, "echo up-$((40+2))", "up-42")?;
    let before = resident(&mut machine)?;
    let mut family = machine.fork(1, clones)?;
    family.push(1);
    for guest in &family {
        machine.ask(&format!("send {guest} \"{}\"", introduction()))?;
    }
    let bytes: BTreeSet<String> =
        family.iter().map(|&guest| machine.introduced(guest)).collect::<Result<_>>()?;
    ensure!(
        bytes.len() == family.len(),
        "{} of {} drew random bytes of their own",
        bytes.len(),
        family.len()
    );
    let guests = machine.ask("guests")?;
    let running = rows(&guests)?.iter().filter(|row| row["state"] == "running").count();
    ensure!(running == family.len(), "{running} of {} run: {guests}", family.len());
    machine.check()?;
    for child in family.iter().rev().skip(1) {
        machine.ask(&format!("kill {child}"))?;
    }
    machine.talk(1, "echo still-$((40+2))", "still-42")?;
    machine.ask("pause 1")?;
    let after = number(&machine.settled()?, "/owners/guests_resident")?;
    // The first went on meanwhile.
    ensure!(after < before + 2048, "{before} pages before, {after} after all clones are dead");
    machine.check()?;
    machine.shutdown()
}

/// A clone made from a snapshot is changed and reset; the snapshot outlives its source.
fn linux_reset(name: &str) -> Result<()> {
    let mut machine = monitored(name, &["--timeout", "600", "--cpu", "cortex-a53"])?;
    machine.console.wait("guest ready")?;
    machine.talk(1, "X=golden; echo go-$((1+1))", "go-2")?;
    machine.ask("snapshot 1 golden")?;
    let child = machine.ask("create --from golden")?["created"].as_u64().context("no child")?;
    machine.ask("kill 1")?;
    for round in 0..3 {
        machine.talk(child, &format!("echo $X-$((30+{round}))"), &format!("golden-{}", 30 + round))?;
        machine.talk(
            child,
            "X=spoilt; dd if=/dev/urandom of=/junk bs=1k count=500; echo $X-$((40+1))",
            "spoilt-41",
        )?;
        machine.ask(&format!("reset {child}"))?;
        machine.talk(child, "ls /junk; echo $X-$((50+1))", "golden-51")?;
        let log = machine.ask(&format!("log {child}"))?;
        let last =
            log["log"].as_str().unwrap_or_default().rsplit("ls /junk").next().unwrap_or_default().to_owned();
        ensure!(last.contains("No such file"), "a file outlived the reset: {last}");
        machine.ask("check")?;
    }
    machine.refused(&format!("reset {child} iron"))?;
    machine.ask("delete golden")?;
    machine.talk(child, "echo $X-$((60+1))", "golden-61")?;
    machine.ask("check")?;
    machine.shutdown()
}
