//! The state test: a guest that has a value of its own in everything that a guest can write finds it all again after a clone,
//! after a reset and in another run; and what must differ between twins does, each time.

use super::machine::{STAYS, boot, monitored, tiny_guest};
use super::stored::{another, fresh};
use crate::monitored::{Monitored, number, rows, text};
use anyhow::{Context, Result, bail, ensure};
use hv_abi::machine::VMGENID;
use libtest_mimic::Trial;
use serde_json::Value;
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

pub(super) fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for cpu in ["cortex-a53", "max"] {
        let on = cpu.replace('-', "_");
        let name = format!("a_clone_and_a_reset_guest_have_every_register_on_{on}");
        trials.push(boot(name, move |name| cloned(name, cpu)));
        let name = format!("a_guest_that_goes_on_in_another_run_has_every_register_on_{on}");
        trials.push(boot(name, move |name| stored(name, cpu)));
    }
    trials.push(boot("a_linux_6_12_hears_of_each_new_generation_and_draws_other_numbers_every_time", linux));
    trials
}

/// What is typed into the guest, and stays in its console: as its module `fpstate::devices` has it.
const TYPED: &str = "abcdefghijklmnopqrstuvwxyz";
/// The guest itself: two vCPUs on one CPU, so that the values of whoever else is there are in every register before its
/// own, and so that a vCPU which was switched on waits for its turn.
const WORDS: [&str; 8] = ["--timeout", "300", "--memory", "16M", "--host-cpus", "1", "--vcpus", "2"];
/// How a guest begins to say what it has found instead.
const FAILED: &str = "guest fpstate: FAILED";
/// Who has other values in all of it; for longer than the lives beside it take.
const STRANGER: &str = "seed=2 linger";

/// What one life says of itself in the end.
#[derive(Debug)]
struct Told {
    /// In whom it is, and how many of its vCPUs were switched on at the fork, and began after it.
    place: u64,
    pending: u64,
    /// How often the generation id has changed, each time with its interrupt.
    changes: u64,
    /// The longest time between two looks at the counter.
    gap: Duration,
    id: String,
    random: String,
}

/// Waits until a guest has come to its end, and well: what it says.
fn told(machine: &mut Monitored, guest: u64) -> Result<Told> {
    let line = machine.whole_line(&guest.to_string(), "guest fpstate: ")?;
    ensure!(line == "guest fpstate: ok", "guest {guest} says {line}");
    let line = machine.last_line(guest, " rounds, place ")?;
    let words: Vec<&str> = line.split_whitespace().collect();
    let after = |name: &str| {
        let place = words.iter().position(|word| *word == name);
        let word = place.and_then(|place| words.get(place + 1));
        word.with_context(|| format!("no {name} in what guest {guest} says: {line}"))
    };
    Ok(Told {
        place: after("place")?.parse()?,
        pending: after("pending")?.parse()?,
        changes: after("changes")?.parse()?,
        gap: Duration::from_millis(after("gap")?.parse()?),
        id: (*after("id")?).to_owned(),
        random: (*after("random")?).to_owned(),
    })
}

/// All lives that were heard of.
#[derive(Default)]
struct Lives(Vec<Told>);

impl Lives {
    /// Hears one whose generation id has changed so often. `age` is for how long what it goes on from had been kept: its
    /// counter has not gone on meanwhile; one that had would jump by all of it. Its id and its random numbers are nobody else's.
    fn hear(&mut self, machine: &mut Monitored, guest: u64, changes: u64, age: Duration) -> Result<&Told> {
        let told = told(machine, guest)?;
        ensure!(told.changes == changes, "guest {guest}, whose id was to change {changes} times: {told:?}");
        ensure!(told.gap < age || age.is_zero(), "guest {guest} after {age:?}: its counter jumps: {told:?}");
        for other in &self.0 {
            ensure!(told.id != other.id && told.random != other.random, "twins: {told:?} and {other:?}");
        }
        self.0.push(told);
        self.0.last().context("nobody was heard")
    }
}

/// Types into guest `guest`, which then holds all that it has.
fn holds(machine: &mut Monitored, guest: u64) -> Result<()> {
    machine.wait_long(&guest.to_string(), "fpstate: may be typed to")?;
    machine.ask(&format!("send {guest} \"{TYPED}\""))?;
    // Or has found something else, and then it never will.
    let holds = |log: &Value| {
        text(log, "/log").is_ok_and(|log| log.contains("fpstate: holds") || log.contains(FAILED))
    };
    let log = machine.until(&format!("log {guest}"), holds)?;
    ensure!(!text(&log, "/log")?.contains(FAILED), "guest {guest}: {}", machine.last_line(guest, FAILED)?);
    Ok(())
}

/// Waits for a job to be done.
fn is_done(machine: &mut Monitored, job: u64) -> Result<()> {
    let done = |jobs: &Value| {
        rows(jobs).is_ok_and(|rows| rows.iter().any(|row| row["id"] == job && row["state"] == "done"))
    };
    machine.until("jobs", done).map(drop)
}

/// Its second vCPU is to be switched on and not to have run when it forks; where a slice ends between the two it had run, and
/// that again and again is no accident.
fn cloned(name: &str, cpu: &str) -> Result<()> {
    for _ in 0..4 {
        if forked(name, cpu)? {
            return Ok(());
        }
    }
    bail!("its second vCPU has never started after the fork")
}

/// It forks itself while its second vCPU is switched on; it is also cloned from outside, brought back to a snapshot, and made
/// again from it after it is dead. Nobody ever finds another value, beside a stranger who has others. True if the second vCPU
/// had not run at the fork.
fn forked(name: &str, cpu: &str) -> Result<bool> {
    let file = tiny_guest(name, "fpstate")?;
    let more =
        ["--cpu", cpu, "--grant-fork", "1", "--kernel", &file, "--append", "fork typed linger ms=8000"];
    let mut machine = monitored(name, &[&WORDS[..], &more, &STAYS].concat())?;
    let stranger = format!("create name=stranger append=\"{STRANGER} ms=30000\"");
    let stranger = machine.ask(&stranger)?["created"].as_u64().context("no stranger")?;
    holds(&mut machine, 1)?;
    let guests = machine.until("guests", |guests| rows(guests).is_ok_and(|rows| rows.len() == 3))?;
    let ids: Vec<u64> = rows(&guests)?.iter().map(|row| number(row, "/id")).collect::<Result<_>>()?;
    let child = *ids.iter().find(|id| ![1, stranger].contains(id)).context("no child")?;
    machine.ask("snapshot 1 middle")?;
    let taken = Instant::now();
    let mut twins = machine.fork(1, 2)?;
    twins.push(machine.ask("create --from middle")?["created"].as_u64().context("no guest")?);
    let (mut lives, soon) = (Lives::default(), Duration::ZERO);
    lives.hear(&mut machine, 1, 0, soon)?;
    let told = lives.hear(&mut machine, child, 1, soon)?;
    ensure!(told.place == 1, "it is the child: {told:?}");
    let pending = told.pending == 1;
    twins.iter().try_for_each(|&guest| lives.hear(&mut machine, guest, 1, soon).map(drop))?;
    // Back in the middle, it looks at it all again.
    let age = taken.elapsed();
    machine.ask("reset 1 middle")?;
    lives.hear(&mut machine, 1, 1, age)?;
    for guest in twins.iter().chain(&[1, child]) {
        machine.ask(&format!("kill {guest}"))?;
    }
    let age = taken.elapsed();
    let late = machine.ask("create --from middle")?["created"].as_u64().context("no guest")?;
    lives.hear(&mut machine, late, 1, age)?;
    lives.hear(&mut machine, stranger, 0, soon)?;
    machine.check()?;
    machine.shutdown()?;
    Ok(pending)
}

/// It is stored, and goes on twice in another run, where a stranger was first.
fn stored(name: &str, cpu: &str) -> Result<()> {
    let (file, guest) = (fresh(name)?, tiny_guest(name, "fpstate")?);
    let image = format!("{},new", file.display());
    let more = ["--cpu", cpu, "--kernel", &guest, "--image", &image, "--append", "typed linger ms=8000"];
    let mut machine = monitored(name, &[&WORDS[..], &more, &STAYS].concat())?;
    holds(&mut machine, 1)?;
    let job = number(&machine.ask("save 1 golden")?, "/job")?;
    // Its state is kept by now.
    let taken = Instant::now();
    let log = machine.ask("log 1")?;
    ensure!(!text(&log, "/log")?.contains("guest fpstate: "), "it had ended before it was stored");
    is_done(&mut machine, job)?;
    let mut lives = Lives::default();
    lives.hear(&mut machine, 1, 0, Duration::ZERO)?;
    machine.shutdown()?;
    let image = format!("{},attach", file.display());
    let stranger = format!("{STRANGER} ms=20000");
    let more = ["--cpu", cpu, "--kernel", &guest, "--image", &image, "--append", &stranger];
    let mut machine = another(name, "later", &[&WORDS[..], &more, &STAYS].concat())?;
    let age = taken.elapsed();
    let mut guests = Vec::new();
    for _ in 0..2 {
        guests.push(machine.ask("create --from golden")?["created"].as_u64().context("no guest")?);
    }
    guests.iter().try_for_each(|&guest| lives.hear(&mut machine, guest, 1, age).map(drop))?;
    lives.hear(&mut machine, 1, 0, Duration::ZERO)?;
    machine.check()?;
    machine.shutdown()
}

/// What a Linux says: interrupts of its driver for the generation id, reseedings of its generator by them, what that driver
/// is bound to; and the bytes that it then reads from its source of entropy and from its generator.
fn ask_linux(machine: &mut Monitored, guest: u64, times: u64) -> Result<Vec<String>> {
    let line = "set -- $(grep vmgenid /proc/interrupts); \
         echo irqs $2 reseeded $(dmesg | grep -c machine.fork) bound $(ls /sys/bus/platform/drivers/vmgenid | grep rng) \
         numbers $(head -c 256 /dev/hwrng | tail -c 16 | od -An -tx8) $(head -c 8 /dev/urandom | od -An -tx8) end-$((3+4))";
    machine.talk(guest, line, "end-7")?;
    let said = machine.last_line(guest, "end-7")?;
    let (driver, numbers) = said.split_once(" numbers ").with_context(|| format!("it says {said}"))?;
    let wanted = format!("irqs {times} reseeded {times} bound {:x}.rng", VMGENID.base);
    ensure!(driver.ends_with(&wanted), "guest {guest} says \"{driver}\", not \"{wanted}\"");
    let numbers = numbers.split_whitespace().filter(|word| *word != "end-7");
    let numbers: Vec<String> = numbers.map(str::to_owned).collect();
    ensure!(numbers.len() == 3, "guest {guest} draws {numbers:?}");
    Ok(numbers)
}

/// A Linux with a driver for the generation id: each life of it hears of it once, reseeds, and draws numbers of its own, after
/// a clone, after each of two resets to one snapshot, and in another run.
fn linux(name: &str) -> Result<()> {
    let file = fresh(name)?;
    let image = format!("{},new", file.display());
    let words = ["--timeout", "500", "--memory", "128M", "--image", &image];
    let mut machine = monitored(name, &[&words[..], &STAYS].concat())?;
    machine.wait_long("1", "guest ready")?;
    let mut drawn = ask_linux(&mut machine, 1, 0)?;
    machine.ask("snapshot 1 middle")?;
    let job = number(&machine.ask("save 1 golden")?, "/job")?;
    let child = machine.fork(1, 1)?[0];
    drawn.extend(ask_linux(&mut machine, child, 1)?);
    for _ in 0..2 {
        machine.ask("reset 1 middle")?;
        drawn.extend(ask_linux(&mut machine, 1, 1)?);
    }
    let made = machine.ask("create --from middle")?["created"].as_u64().context("no guest")?;
    drawn.extend(ask_linux(&mut machine, made, 1)?);
    is_done(&mut machine, job)?;
    machine.check()?;
    machine.shutdown()?;
    let image = file.display().to_string();
    let words = ["--timeout", "300", "--image", &image];
    let mut machine = another(name, "later", &[&words[..], &STAYS].concat())?;
    let made = machine.ask("create --from golden")?["created"].as_u64().context("no guest")?;
    for guest in [1, made] {
        drawn.extend(ask_linux(&mut machine, guest, 1)?);
    }
    machine.check()?;
    machine.shutdown()?;
    let all: BTreeSet<&String> = drawn.iter().collect();
    ensure!(all.len() == drawn.len(), "two lives drew the same: {drawn:?}");
    Ok(())
}
