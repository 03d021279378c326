//! Several guests at once: what they share, and that none of them feels the others.

use super::machine::{STAYS, boot, logs, monitored, tiny_guest};
use crate::monitored::{Monitored, number, rows, text, total};
use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use serde_json::Value;
use std::fs;
use std::time::Duration;

/// Pages in a MiB.
const PER_MIB: u64 = 256;

pub(super) fn trials() -> Vec<Trial> {
    vec![
        boot("eight_linux_guests_answer_and_share_their_kernel", eight),
        boot("a_guest_that_writes_its_kernels_text_changes_neither_neighbour_nor_partition", scribblers),
        boot("the_next_guest_of_an_image_starts_without_the_disk", warm),
        boot("neighbours_that_misbehave_harm_nobody", misbehaviour),
        boot("more_guests_than_vmids_run_one_image_on_cortex_a53", many),
        boot("a_guest_that_storms_starves_neither_its_neighbour_nor_the_monitor", storms),
        boot("a_long_log_is_shown_while_its_guest_computes_without_pause", long_log),
        boot("what_the_dead_had_comes_back_while_a_guest_computes_without_pause", busy),
        boot("what_there_is_no_memory_for_is_refused_or_parked_and_harms_nobody", little),
    ]
}

/// The disk that a test's machine has, every byte of it.
fn disk(name: &str) -> Result<Vec<u8>> {
    let file = logs(name).join("images.img");
    fs::read(&file).with_context(|| format!("reading {}", file.display()))
}

/// The row of the object that an image's pager fills; there must be one.
fn image(objects: &Value, name: &str) -> Result<Value> {
    let pager = format!("image {name}");
    let found: Vec<&Value> = rows(objects)?.iter().filter(|row| row["pager"] == pager.as_str()).collect();
    ensure!(found.len() == 1, "{} objects have the pager \"{pager}\": {objects}", found.len());
    Ok(found[0].clone())
}

/// The rows of those that shadow an object.
fn shadows(objects: &Value, of: &Value) -> Result<Vec<Value>> {
    Ok(rows(objects)?.iter().filter(|row| row["shadows"] == of["object"]).cloned().collect())
}

/// Waits for the last words of a tiny guest that lingers; they must be good ones.
pub(super) fn ends_well(machine: &mut Monitored, guest: &str, program: &str) -> Result<()> {
    let words = ["ok", "FAILED"].map(|end| format!("guest {program}: {end}"));
    let said = |log: &Value| text(log, "/log").is_ok_and(|log| words.iter().any(|end| log.contains(end)));
    let log = machine.until(&format!("log {guest}"), said)?;
    ensure!(text(&log, "/log")?.contains(&words[0]), "{guest} says: {}", text(&log, "/log")?);
    Ok(())
}

/// Eight Linux guests: each answers for itself, has what it touched and no more, and none has a kernel of its own.
fn eight(name: &str) -> Result<()> {
    let words = ["--batch", "--timeout", "900", "--guests", "8", "--host-memory", "2G"];
    let mut machine = monitored(name, &words)?;
    let pristine = disk(name)?;
    let names: Vec<String> = (0..8).map(|n| format!("guest{n}")).collect();
    for guest in &names {
        machine.ask(&format!("wait {guest} \"guest ready: {guest}\""))?;
    }
    for guest in &names {
        machine.ask(&format!("send {guest} echo $(hostname)-$((6*7))"))?;
        machine.ask(&format!("wait {guest} {guest}-42"))?;
    }
    machine.check()?;

    for guest in &names {
        machine.ask(&format!("pause {guest}"))?;
    }
    let memory = machine.settled()?;
    let (guests, objects) = (machine.ask("guests")?, machine.ask("objects")?);
    for guest in rows(&guests)? {
        let stats = machine.ask(&format!("stats {}", text(guest, "/name")?))?;
        let touched = number(&stats, "/memory/fault_zero")? + number(&stats, "/memory/fault_copy")?;
        let (private, id) = (number(guest, "/private_pages")?, number(guest, "/id")?);
        // It has what it touched, but for what it gave back.
        let reported = number(&machine.ask(&format!("balloon {id}"))?, "/reported_pages")?;
        ensure!(
            private <= touched && private + reported >= touched,
            "{guest} has touched {touched} pages, and reported {reported}"
        );
        ensure!(private * 4 < number(guest, "/memory_mib")? * PER_MIB, "an idle guest has much: {guest}");
    }
    let mut shared = 0;
    for image in [image(&objects, "kernel")?, image(&objects, "initrd")?] {
        ensure!(image["references"] == 8 && shadows(&objects, &image)?.len() == 8, "{image} in {objects}");
        ensure!(number(&image, "/resident")? <= number(&image, "/pages")?, "{image}");
        shared += number(&image, "/resident")?;
    }
    let owners = |key: &str| number(&memory, &format!("/owners/{key}"));
    ensure!(owners("guests_shared")? == shared, "shared is the images: {memory}, {objects}");
    ensure!(owners("guests_resident")? == total(&guests, "private_pages")? + shared, "{memory}");
    let apart = total(&guests, "private_pages")? + total(&guests, "shared_pages")?;
    ensure!(owners("if_nothing_were_shared")? == apart, "{memory}, {guests}");
    let (parts, others) = (total(&guests, "share_pages")?, owners("no_guests")?);
    ensure!(
        parts + others == owners("guests_resident")? + owners("cached")?,
        "the guests' shares are not all pages: {memory}, {guests}"
    );
    // What they freed of the images they have reported, and share no more; of the rest seven have no copy.
    let saved = apart - owners("guests_resident")?;
    ensure!(shared > 1000 && saved == 7 * shared, "sharing saves {saved} pages of {shared}: {memory}");

    // Some power off, some are killed, one stays: what is left is its own.
    for (index, guest) in names.iter().enumerate().skip(1) {
        if index % 2 == 0 {
            machine.ask(&format!("resume {guest}"))?;
            machine.ask(&format!("send {guest} poweroff -f"))?;
            machine.ask(&format!("wait {guest} gone"))?;
        } else {
            machine.ask(&format!("kill {guest}"))?;
        }
    }
    machine.settled()?;
    // One guest shares with nobody.
    machine.until("memory", |memory| memory["owners"]["guests_shared"] == 0)?;
    machine.check()?;
    machine.ask("resume guest0")?;
    machine.ask("send guest0 poweroff -f")?;
    machine.console.finish()?;
    ensure!(disk(name)? == pristine, "the disk has changed");
    Ok(())
}

/// The last guest of an image dies; what it had read of the image is there for the next one.
fn warm(name: &str) -> Result<()> {
    let words = ["--timeout", "200", "--memory", "128M", "--host-memory", "512M"];
    let mut machine = monitored(name, &[&words[..], &STAYS].concat())?;
    let read = |machine: &mut Monitored| number(&machine.ask("swap")?, "/transfers/in");
    machine.ask("wait guest \"guest ready: guest\"")?;
    let first = read(&mut machine)?;
    machine.ask("kill guest")?;
    let memory = machine.settled()?;
    let cached = number(&memory, "/owners/cached")?;
    ensure!(cached > 1000 && memory["owners"]["guests_resident"] == 0, "{memory}");
    machine.check()?;
    machine.ask("create name=next")?;
    machine.ask("wait next \"guest ready: next\"")?;
    let more = read(&mut machine)? - first;
    ensure!(more * 20 < first, "the first guest read {first} times, the next one {more} times");
    machine.shutdown()
}

/// Guests that write over what their images call constant: Linux, which patches its text when it starts and when a
/// static key is turned, and `scribble`, which knows every byte of its table.
fn scribblers(name: &str) -> Result<()> {
    let with = format!("scribble={}", tiny_guest(name, "scribble")?);
    let words = ["--batch", "--timeout", "600", "--memory", "128M", "--with", &with];
    let mut machine = monitored(name, &words)?;
    let pristine = disk(name)?;
    machine.ask("wait guest \"guest ready: guest\"")?;
    machine.ask("create name=neighbour")?;
    machine.ask("wait neighbour \"guest ready: neighbour\"")?;
    let objects = machine.ask("objects")?;
    let kernel = image(&objects, "kernel")?;
    let own = shadows(&objects, &kernel)?;
    ensure!(
        own.len() == 2 && own.iter().all(|row| number(row, "/resident").is_ok_and(|n| n > 0)),
        "{objects}"
    );
    machine.ask("send guest echo 1 >/proc/sys/kernel/sched_schedstats && echo turned-$((6*7))")?;
    machine.ask("wait guest turned-42")?;
    machine.ask("send neighbour cat /proc/sys/kernel/sched_schedstats; memtest 16 1")?;
    machine.ask("wait neighbour \"\n0\"")?;
    machine.ask("wait neighbour \"memtest: 16 MiB, 1 rounds, ok\"")?;

    // Each finds the table as it was built while the other has written over its own.
    for (mark, guest) in [(1, "one"), (2, "two")] {
        let create = "kernel=scribble memory=4M vcpus=1";
        machine.ask(&format!("create name={guest} {create} append=\"mark={mark} linger\""))?;
        machine.ask(&format!("wait {guest} \"scribbled {mark}\""))?;
    }
    let objects = machine.ask("objects")?;
    let table = image(&objects, "scribble")?;
    ensure!(table["references"] == 2, "{table}");
    for shadow in shadows(&objects, &table)? {
        // 64 KiB, wherever they begin.
        ensure!(number(&shadow, "/resident")? >= 16, "a shadow without what was written: {shadow}");
    }
    for guest in ["one", "two"] {
        machine.ask(&format!("send {guest} x"))?;
        ends_well(&mut machine, guest, "scribble")?;
    }
    machine.ask("kill one")?;
    machine.ask("create name=three kernel=scribble memory=4M vcpus=1 append=mark=3")?;
    machine.ask("wait three \"scribbled 3\"")?;
    // The same of Linux: whoever starts now has the kernel that the partition has.
    machine.ask("create name=late")?;
    machine.ask("wait late \"guest ready: late\"")?;
    machine.check()?;
    machine.shutdown()?;
    ensure!(disk(name)? == pristine, "the disk has changed");
    Ok(())
}

/// A Linux guest computes while others beside it do everything that a guest must not.
fn misbehaviour(name: &str) -> Result<()> {
    const WILD: [&str; 9] = ["wild", "gicfuzz", "mmio", "irq", "smp", "wfi", "asid", "fpstate", "touch"];
    let with: Vec<String> = WILD
        .iter()
        .map(|guest| Ok(format!("--with={guest}={}", tiny_guest(name, guest)?)))
        .collect::<Result<_>>()?;
    let mut words = vec!["--batch", "--timeout", "900", "--memory", "128M"];
    words.extend(with.iter().map(String::as_str));
    let mut machine = monitored(name, &words)?;
    machine.ask("wait guest \"guest ready: guest\"")?;
    machine.ask("send guest (while memtest 8 1; do :; done; echo memtest-over-$((6*7))) &")?;
    let mut asked = 0;
    // One after the other, then each beside the next.
    let alone = WILD.chunks(1);
    for group in alone.chain(WILD.windows(2)) {
        for guest in group {
            let append = format!("append=\"linger seed={}\"", asked + 1);
            machine.ask(&format!("create name={guest} kernel={guest} memory=64M vcpus=2 {append}"))?;
        }
        for guest in group {
            ends_well(&mut machine, guest, guest)?;
        }
        machine.check()?;
        for guest in group {
            machine.ask(&format!("send {guest} bye"))?;
            machine.ask(&format!("wait {guest} gone"))?;
        }
        machine.check()?;
        asked += 1;
        machine.ask(&format!("send guest echo answer-$(({asked}+100))"))?;
        machine.ask(&format!("wait guest answer-{}", asked + 100))?;
    }
    machine.ask("wait guest \"memtest: 8 MiB, 1 rounds, ok\"")?;
    let log = machine.ask("log guest")?;
    for bad in ["FAILED", "memtest-over-42", "Oops", "BUG:"] {
        ensure!(!text(&log, "/log")?.contains(bad), "the neighbour says \"{bad}\":\n{}", text(&log, "/log")?);
    }
    machine.shutdown()
}

/// On one CPU, beside four vCPUs that keep EL2 busy, one that counts gets what it gets beside four that only compute
/// (invariant I17). Time is counted in instructions, so that the machine that tests it does not matter.
fn storms(name: &str) -> Result<()> {
    const KINDS: [&str; 12] = [
        "calm", "call", "register", "abort", "virtual", "physical", "alarm", "send", "crowd", "wake",
        "print", "power",
    ];
    let image = tiny_guest(name, "storm")?;
    let words = ["--batch", "--icount", "--host-cpus", "1", "--timeout", "900", "--memory", "4M"];
    let more = ["--kernel", &image, "--append", "ms=1 linger"];
    let mut machine = monitored(name, &[&words[..], &more[..]].concat())?;
    machine.console.wait("guest storm: ok")?;
    let mut fair = None;
    for kind in KINDS {
        machine.ask(&format!("create name={kind} vcpus=4 append={kind}"))?;
        // The monitor answers while they storm, about them too.
        machine.ask(&format!("log {kind}"))?;
        machine.ask("create name=neighbour vcpus=1 append=\"ms=600 linger\"")?;
        // A question to the monitor ends whoever's turn it is, so none is asked meanwhile.
        machine.ask("attach neighbour")?;
        machine.console.wait("guest storm: ok")?;
        machine.ask(&format!("stats {kind}"))?;
        machine.check()?;
        let id = number(&machine.guest("neighbour")?, "/id")?;
        let line = machine.last_line(id, "storm over: ")?;
        let rounds = line.split_whitespace().find_map(|word| word.parse::<u64>().ok());
        let rounds = rounds.with_context(|| format!("no number in {line}"))?;
        let fair = *fair.get_or_insert(rounds);
        ensure!(rounds * 4 >= fair * 3, "beside {kind} a neighbour makes {rounds} rounds of {fair}");
        for guest in [kind, "neighbour"] {
            machine.ask(&format!("kill {guest}"))?;
        }
    }
    machine.shutdown()
}

/// On one CPU, a guest that nobody takes turns with has filled its log and looks for typed bytes for ever. The log is
/// longer than what the control port takes at once.
fn long_log(name: &str) -> Result<()> {
    let image = tiny_guest(name, "storm")?;
    let words = ["--batch", "--icount", "--host-cpus", "1", "--timeout", "120", "--memory", "4M"];
    let more = ["--kernel", &image, "--append", "print ms=50 linger"];
    let mut machine = monitored(name, &[&words[..], &more[..]].concat())?;
    machine.ask("wait guest \"guest storm: ok\"")?;
    let log = machine.ask("log guest")?;
    ensure!(text(&log, "/log")?.len() > 32 << 10, "the log is short: {log}");
    machine.shutdown()
}

/// On one CPU a clone computes for ever. Its parent ends, and all that is left of that is the clone's: without
/// anybody asking, since a question makes the CPU look around.
fn busy(name: &str) -> Result<()> {
    let image = tiny_guest(name, "touch")?;
    let words = ["--batch", "--icount", "--host-cpus", "1", "--timeout", "120", "--memory", "16M"];
    let mut machine = monitored(name, &[&words[..], &["--kernel", &image, "--append", "linger"]].concat())?;
    machine.console.wait("touched ")?;
    let objects = number(&machine.check()?, "/objects")?;
    machine.ask("clone guest")?;
    machine.ask("kill guest")?;
    // Its time is counted in instructions: it may take longer here. Two questions do not do the work.
    let mut now = 0;
    for seconds in [10, 50] {
        std::thread::sleep(Duration::from_secs(seconds));
        now = number(&machine.check()?, "/objects")?;
        if now == objects {
            break;
        }
    }
    ensure!(now == objects, "there were {objects} objects for one guest, and are {now} for its clone");
    machine.shutdown()
}

/// 64 guests at once, in waves, more in all than an 8-bit VMID can name.
fn many(name: &str) -> Result<()> {
    const AT_ONCE: usize = 64;
    const WAVES: usize = 5;
    const { assert!(AT_ONCE * WAVES > 1 << 8) };
    let image = tiny_guest(name, "touch")?;
    let words = ["--batch", "--timeout", "600", "--cpu", "cortex-a53", "--guests", "64", "--memory", "2M"];
    let more = ["--host-memory", "512M", "--kernel", &image, "--append", "linger"];
    let mut machine = monitored(name, &[&words[..], &more[..]].concat())?;
    let mut alive: Vec<String> = (0..AT_ONCE).map(|n| format!("guest{n}")).collect();
    for wave in 1..=WAVES {
        for guest in &alive {
            ends_well(&mut machine, guest, "touch")?;
        }
        let guests = machine.ask("guests")?;
        ensure!(rows(&guests)?.len() == AT_ONCE, "not all are alive in wave {wave}: {guests}");
        machine.check()?;
        for guest in alive.iter_mut().skip(usize::from(wave == WAVES)) {
            machine.ask(&format!("send {guest} x"))?;
            machine.ask(&format!("wait {guest} gone"))?;
            if wave < WAVES {
                *guest = format!("{guest}-{wave}");
                machine.ask(&format!("create name={guest}"))?;
            }
        }
    }
    let memory = machine.settled()?;
    ensure!(number(&memory, "/vmid_rollovers")? > 0, "the VMIDs never ran out: {memory}");
    machine.check()?;
    machine.shutdown()
}

/// A host with little memory: what does not fit is refused by name, what runs out of memory is seen to wait, and
/// when it is killed the others go on.
fn little(name: &str) -> Result<()> {
    let hello = tiny_guest(name, "hello")?;
    let touch = format!("touch={}", tiny_guest(name, "touch")?);
    let words = ["--batch", "--timeout", "300", "--host-memory", "128M", "--memory", "2M"];
    let more = ["--kernel", &hello, "--append", "linger", "--with", &touch];
    let mut machine = monitored(name, &[&words[..], &more[..]].concat())?;
    machine.ask("wait guest \"guest hello: ok\"")?;
    let before = machine.settled()?;
    for (wrong, words) in [
        ("memory=1M", "memory_mib: not a number from 2 to "),
        ("memory=256G", "memory_mib: not a number from 2 to "),
        ("vcpus=65", "vcpus"),
        ("kernel=touch initrd=nothing", "there is no image 'nothing'"),
        ("kernel=touch initrd=touch bios=touch", "bios"),
    ] {
        let told = machine.refused(&format!("create name=wrong {wrong}"))?;
        ensure!(told.contains(words), "{wrong} is answered \"{told}\", without \"{words}\"");
    }
    // Which queue a page is on is pageout's business, and so is which clean page of the neighbour it drops.
    let free = |memory: &Value| -> Result<u64> {
        let places = ["/frames/free", "/owners/guests_resident", "/owners/cached"];
        places.into_iter().map(|place| number(memory, place)).sum()
    };
    ensure!(free(&machine.settled()?)? == free(&before)?, "what was refused took memory");

    machine.ask("create name=greedy kernel=touch memory=256M append=linger")?;
    let starved = |guests: &Value| {
        let greedy = rows(guests).ok().and_then(|rows| rows.iter().find(|row| row["name"] == "greedy"));
        greedy.is_some_and(|row| text(row, "/vcpus").is_ok_and(|states| states.contains("no-memory")))
    };
    machine.until("guests", starved)?;
    machine.check()?;
    // What is kept of images makes room for one or two more.
    let (mut told, mut late) = (String::new(), 0);
    while told.is_empty() && late < 16 {
        match machine.ask(&format!("create name=late{late} kernel=touch memory=16M")) {
            Ok(_) => late += 1,
            Err(refused) => told = refused.to_string(),
        }
    }
    for number in 0..late {
        machine.ask(&format!("kill late{number}"))?;
    }
    ensure!(told.contains("not enough free memory"), "with no memory left create says: {told}");
    machine.ask("pause guest")?;
    machine.ask("resume guest")?;
    machine.ask("kill greedy")?;
    machine.check()?;
    machine.ask("create name=later kernel=touch memory=16M append=linger")?;
    ends_well(&mut machine, "later", "touch")?;
    machine.ask("kill later")?;
    let after = machine.settled()?;
    ensure!(free(&after)? == free(&before)?, "memory did not come back: {before}, then {after}");
    machine.console.send("x")?;
    machine.console.finish()
}
