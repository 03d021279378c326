//! Power cuts while a guest is stored: QEMU's log of what was written, replayed up to any point with any part of what was
//! not durable lost; and QEMU killed.
//!
//! The guest is `generations`, which can tell of each of its pages whether it is what it should be after as many
//! generations as it says, and writes while it is stored. So whoever goes on from what is left of a disk says by that which
//! image it was, and that there is nothing of another in it. On the host every page of every cut is compared with its sum.

use super::machine::{STAYS, boot, logs, monitored, tiny_guest};
use super::stored::{another, fresh};
use crate::monitored::{Monitored, number, rows};
use crate::stored;
use anyhow::{Context, Result, bail, ensure};
use hv_abi::image::PAGE;
use hv_abi::manifest::STORED_LIMIT;
use libtest_mimic::Trial;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

/// Points at which the power is cut.
const CUTS: usize = 200;
/// Times that QEMU is killed.
const KILLS: u64 = 5;
/// Of so many points one goes on in earnest.
const RESUMED: usize = 10;
const SECTOR: usize = 512;

pub(super) fn trials() -> Vec<Trial> {
    vec![
        boot("a_power_cut_while_a_guest_is_stored_leaves_the_old_one_or_the_new_one", cut),
        boot("a_machine_that_is_killed_while_it_stores_a_guest_leaves_the_old_one_or_the_new_one", killed),
    ]
}

/// What a disk was asked for.
enum Request {
    Write { sector: u64, bytes: Vec<u8> },
    Flush,
}

/// Reads the log that QEMU's `blklogwrites` wrote (the kernel's dm-log-writes format, with sectors of 512 bytes).
fn requests(path: &Path) -> Result<Vec<Request>> {
    const MAGIC: u64 = 0x006a_7366_7773_6872;
    const FLUSH: u64 = 1;
    const DISCARD: u64 = 4;
    let log = fs::read(path)?;
    let long = |at: usize| -> Result<u64> {
        let bytes = log.get(at..at + 8).context("the log is too short")?;
        Ok(u64::from_le_bytes(bytes.try_into()?))
    };
    ensure!(long(0)? == MAGIC && long(8)? == 1, "{} is no log of writes", path.display());
    let (mut all, mut at) = (Vec::new(), SECTOR);
    for _ in 0..long(16)? {
        let (sector, sectors, flags) = (long(at)?, usize::try_from(long(at + 8)?)?, long(at + 16)?);
        at += SECTOR;
        ensure!(flags & DISCARD == 0, "nobody discards");
        if sectors > 0 {
            let bytes = log.get(at..at + sectors * SECTOR).context("the log ends in the middle")?;
            all.push(Request::Write { sector, bytes: bytes.to_vec() });
            at += sectors * SECTOR;
        }
        if flags & FLUSH != 0 {
            all.push(Request::Flush);
        }
    }
    Ok(all)
}

/// A disk's sectors that were ever written.
type Sectors = BTreeMap<u64, Vec<u8>>;

fn write(to: &mut Sectors, sector: u64, bytes: &[u8]) {
    to.extend((sector..).zip(bytes.chunks(SECTOR).map(<[u8]>::to_vec)));
}

/// The generation that a disk holds, all of it whole. `None` when there is none yet, or half a first header.
fn generation(disk: &Sectors) -> Result<Option<u64>> {
    let page = |number: u64| {
        let mut bytes = [0; PAGE];
        for (sector, out) in (number * 8..).zip(bytes.chunks_mut(SECTOR)) {
            if let Some(found) = disk.get(&sector) {
                out.copy_from_slice(found);
            }
        }
        Ok(bytes)
    };
    match stored::look_with(&page) {
        Ok(found) => Ok(found.map(|stored| stored.header.generation)),
        Err(error) if error.to_string() == "header 0 is damaged" => Ok(None),
        Err(error) => Err(error),
    }
}

/// Numbers that look random, and repeat.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.0 >> 33).unwrap_or(0) % sides
    }
}

/// What a disk has after a power cut behind so many requests, and which generation it certainly had.
fn after(requests: &[Request], cut: usize, dice: &mut Dice) -> Result<(Sectors, Option<u64>)> {
    let done = &requests[..cut];
    let flushed = done.iter().rposition(|request| matches!(request, Request::Flush)).map_or(0, |at| at + 1);
    let (durable, volatile) = done.split_at(flushed);
    let mut disk = Sectors::new();
    for request in durable {
        if let Request::Write { sector, bytes } = request {
            write(&mut disk, *sector, bytes);
        }
    }
    let had = generation(&disk)?;
    for request in volatile {
        let Request::Write { sector, bytes } = request else { continue };
        for (sector, bytes) in (*sector..).zip(bytes.chunks(SECTOR)) {
            if dice.roll(2) == 0 {
                write(&mut disk, sector, bytes);
            }
        }
    }
    Ok((disk, had))
}

/// A guest that has lived through so many generations and no more finds each of its pages as they left it.
fn has_lived(machine: &mut Monitored, guest: u64, generations: u64) -> Result<()> {
    machine.talk(guest, "c", "all well")?;
    let line = machine.last_line(guest, "all well")?;
    ensure!(line.starts_with(&format!("generations: {generations} lived, ")), "not {generations}: {line}");
    Ok(())
}

/// Has guest 1 live through one more generation.
fn live(machine: &mut Monitored, generation: u64) -> Result<()> {
    machine.talk(1, "w", &format!("generation {generation} lived"))
}

/// Waits until no job is under way; each must have gone well.
fn stored_well(machine: &mut Monitored) -> Result<()> {
    let over = |jobs: &Value| rows(jobs).is_ok_and(|rows| rows.iter().all(|row| row["state"] != "running"));
    let jobs = machine.until("jobs", over)?;
    ensure!(rows(&jobs)?.iter().all(|row| row["state"] == "done"), "{jobs}");
    Ok(())
}

/// Generations that the guest has lived through when it is stored for the so-manieth time: it lives through one before, and
/// one while it is stored.
fn lived(stored: u64) -> u64 {
    2 * stored - 1
}

fn cut(name: &str) -> Result<()> {
    let (file, guest) = (fresh(name)?, tiny_guest(name, "generations")?);
    let log = logs(name).join("writes.log");
    let (image, log_name) = (format!("{},new", file.display()), log.display().to_string());
    let words =
        ["--timeout", "120", "--memory", "16M", "--kernel", &guest, "--append", "pages=512 writes=48"];
    let more = ["--image", &image, "--image-log", &log_name];
    let mut machine = monitored(name, &[&words[..], &more, &STAYS].concat())?;
    machine.ask("wait 1 ready")?;
    for generation in 1..=4 {
        live(&mut machine, lived(generation))?;
        machine.ask("save 1 golden --rate 4M")?;
        live(&mut machine, lived(generation) + 1)?;
        stored_well(&mut machine)?;
        ensure!(number(&machine.ask("images")?, "/0/generation")? == generation, "another generation");
    }
    machine.shutdown()?;
    let requests = requests(&log)?;
    let flushes = requests.iter().filter(|request| matches!(request, Request::Flush)).count();
    ensure!(flushes >= 16, "{flushes} flushes, where four guests were stored");
    let mut dice = Dice(7);
    let (mut seen, mut lives) = (BTreeMap::<_, usize>::new(), Vec::new());
    for turn in 0..CUTS {
        let place = dice.roll(requests.len() + 1);
        let (disk, had) = after(&requests, place, &mut dice)?;
        let found = generation(&disk).with_context(|| format!("cut behind request {place}"))?;
        let next = Some(had.unwrap_or(0) + 1);
        ensure!(found == had || found == next, "{found:?} after a cut behind request {place}, had {had:?}");
        *seen.entry(found).or_default() += 1;
        if let (0, Some(found)) = (turn % RESUMED, found) {
            lives.push((place, disk, found));
        }
    }
    ensure!(seen.len() >= 4, "too few generations were seen: {seen:?}");
    ensure!(lives.len() * RESUMED * 2 > CUTS, "too few go on: {}", lives.len());
    let hello = tiny_guest(name, "hello")?;
    let bytes = fs::metadata(&file)?.len();
    for some in lives.chunks(STORED_LIMIT) {
        let mut words = vec!["--timeout", "120", "--memory", "4M", "--kernel", &hello, "--append", "linger"];
        let mut images = Vec::new();
        for (number, (_, disk, _)) in some.iter().enumerate() {
            let path = logs(name).join(format!("cut{number}.img"));
            let out = File::create(&path)?;
            out.set_len(bytes)?;
            disk.iter().try_for_each(|(sector, bytes)| out.write_all_at(bytes, sector * SECTOR as u64))?;
            images.push(format!("{},attach", path.display()));
        }
        words.extend(images.iter().flat_map(|image| ["--image", image]));
        let mut machine = another(name, "later", &[&words[..], &STAYS].concat())?;
        let told = machine.ask("images")?;
        for (nth, (place, _, generation)) in some.iter().enumerate() {
            let why = || format!("cut behind request {place}, generation {generation}");
            ensure!(told[nth]["generation"] == *generation, "{}: {told}", why());
            let made = machine.ask(&format!("create --from cut{nth} name=cut{nth}")).with_context(why)?;
            has_lived(&mut machine, number(&made, "/created")?, lived(*generation)).with_context(why)?;
        }
        machine.check()?;
        machine.shutdown()?;
    }
    Ok(())
}

/// What is stored again and again at a slow rate, by machines that are killed in the middle.
fn killed(name: &str) -> Result<()> {
    let (file, guest) = (fresh(name)?, tiny_guest(name, "generations")?);
    let image = format!("{},new", file.display());
    let words =
        ["--timeout", "120", "--memory", "16M", "--kernel", &guest, "--append", "pages=2048 writes=512"];
    let mut machine = monitored(name, &[&words[..], &["--image", &image], &STAYS].concat())?;
    machine.ask("wait 1 ready")?;
    // So many that storing it takes longer than it is given.
    let mut stored_when = 4;
    for generation in 1..=stored_when {
        live(&mut machine, generation)?;
    }
    machine.ask("save 1 golden --wait")?;
    machine.shutdown()?;
    let image = file.display().to_string();
    let words = [&["--timeout", "60", "--image", &image][..], &STAYS].concat();
    let mut cut_short = 0;
    for turn in 0..KILLS {
        let before = stored::whole(&file)?.header;
        let mut machine: Monitored = another(name, "later", &words)?;
        ensure!(number(&machine.ask("images")?, "/0/generation")? == before.generation, "turn {turn}");
        has_lived(&mut machine, 1, stored_when).with_context(|| format!("turn {turn}"))?;
        live(&mut machine, stored_when + 1)?;
        // Slow enough to be in the middle, wherever that is.
        machine.ask("save 1 golden --rate 2M")?;
        std::thread::sleep(Duration::from_millis(100 + 150 * turn));
        // QEMU goes with it, at once.
        drop(machine);
        let after = stored::whole(&file).with_context(|| format!("turn {turn}"))?.header;
        match after.generation - before.generation {
            0 => cut_short += 1,
            1 => stored_when += 1,
            more => bail!("{more} generations in turn {turn}"),
        }
    }
    ensure!(cut_short > 0, "nothing was cut short: the guest is stored too fast for this test");
    let mut machine = another(name, "later", &words)?;
    has_lived(&mut machine, 1, stored_when)?;
    machine.check()?;
    machine.shutdown()
}
