//! Boot tests of swap in several places, and of what else is done with guests whose memory is mostly there: cloned, kept,
//! brought back, stored.

use super::machine::{STAYS, boot, logs, monitored, tiny_guest};
use super::stored::{another, fresh};
use crate::monitored::{Monitored, number, rows, text};
use crate::stored;
use anyhow::{Context, Result, ensure};
use gpt::partition_types::{LINUX_FS, LINUX_SWAP};
use libtest_mimic::Trial;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

const MIB: u64 = 1 << 20;
/// What a partition that is not for swap is full of.
static KEPT: [u8; 1 << 20] = [0x5a; 1 << 20];
/// Pages of a MiB.
const MIB_PAGES: u64 = 256;

pub(super) fn trials() -> Vec<Trial> {
    vec![
        boot("places_to_swap_to_are_used_by_their_priorities_and_one_that_fails_is_passed_over", places),
        boot("guests_that_are_mostly_swapped_out_are_cloned_kept_brought_back_and_stored", mostly_out),
    ]
}

/// Makes a disk with a table: a partition for files, full of a pattern, and so many MiB to swap to. Where the first one is.
fn partitioned(path: &Path, mib: u64) -> Result<u64> {
    let file = File::options().read(true).write(true).create(true).truncate(true).open(path)?;
    file.set_len((mib + 8) * MIB)?;
    let sectors = u32::try_from((mib + 8) * MIB / 512 - 1)?;
    let mut file = file;
    gpt::mbr::ProtectiveMBR::with_lb_size(sectors).overwrite_lba0(&mut file)?;
    let mut table = gpt::GptConfig::new()
        .writable(true)
        .logical_block_size(gpt::disk::LogicalBlockSize::Lb512)
        .create_from_device(file, None)?;
    table.update_partitions(BTreeMap::new())?;
    let files = table.add_partition("files", MIB, LINUX_FS, 0, Some(2048))?;
    table.add_partition("elsewhere", mib * MIB, LINUX_SWAP, 0, Some(2048))?;
    let start = table.partitions().get(&files).context("no partition")?.first_lba * 512;
    table.write()?.write_all_at(&KEPT, start)?;
    Ok(start)
}

/// A place takes no write at all, the next is soon full, two share what is left, and the last is hardly needed.
fn places(name: &str) -> Result<()> {
    let thrash = tiny_guest(name, "thrash")?;
    let file = |file: &str| logs(name).join(file);
    for (name, mib) in [("small.img", 32), ("even.img", 128), ("last.img", 64)] {
        File::create(file(name))?.set_len(mib * MIB)?;
    }
    let kept = partitioned(&file("table.img"), 128)?;
    let on = |name: &str, more: &str| format!("{}{more}", file(name).display());
    let small = on("small.img", ",priority=7");
    let (even, table) = (on("even.img", ",priority=3"), on("table.img", ",priority=3"));
    let last = on("last.img", "");
    let words = ["--timeout", "300", "--host-memory", "128M", "--memory", "96M", "--guests", "3"];
    let swaps =
        ["--swap", &last, "--swap", &even, "--swap", "4M,priority=9", "--swap", &table, "--swap", &small];
    let more = ["--swap-errors", "0,0,0,1024", "--overcommit", "none"];
    let guest = ["--kernel", &thrash, "--append", "linger rounds=2"];
    let mut machine = monitored(name, &[&words[..], &swaps, &more, &guest, &STAYS].concat())?;
    for guest in ["guest0", "guest1", "guest2"] {
        machine.ask(&format!("wait {guest} \" given up\""))?;
        machine.ask(&format!("wait {guest} \"guest thrash: ok\""))?;
        let line = machine.ask(&format!("log {guest}"))?;
        ensure!(text(&line, "/log")?.contains(" 0 given up"), "{guest} lost something: {line}");
    }
    machine.check()?;
    machine.until("memory", |memory| memory["transfers"] == 0)?;
    let swap = machine.ask("swap")?;
    let [last, even, failing, table, small] = rows(&swap["devices"])? else {
        anyhow::bail!("not five places: {swap}")
    };
    let is = |row: &Value, name: &str, priority: i64, state: &str| {
        row["name"] == name && row["priority"] == priority && row["state"] == state
    };
    let named = is(last, "swap-disk-0", -2, "used")
        && is(even, "swap-disk-1", 3, "used")
        && is(failing, "swap", 9, "failing")
        && is(table, "swap-disk-2", 3, "used")
        && is(small, "swap-disk-3", 7, "used");
    ensure!(named, "{swap}");
    let of = |row: &Value, key: &str| number(row, &format!("/{key}"));
    ensure!(of(failing, "written")? == 0 && of(failing, "write_failed")? >= 64, "{swap}");
    ensure!(of(failing, "in_use")? == 0 && of(failing, "total")? == of(failing, "bad")?, "{swap}");
    ensure!(of(small, "total")? == 32 * MIB_PAGES && of(table, "total")? == 128 * MIB_PAGES, "{swap}");
    // Nearly all of it: single slots come back all the time.
    ensure!(of(small, "in_use")? > 24 * MIB_PAGES && of(small, "written")? >= 32 * MIB_PAGES, "{swap}");
    // A little goes there while the disks of the others have all that they take at once, and stand still.
    ensure!(
        of(last, "written")? * 20 < of(even, "written")?,
        "the last was used before the others were full: {swap}"
    );
    let (one, other) = (of(even, "written")?, of(table, "written")?);
    ensure!(one.min(other) > 16 * MIB_PAGES && one.abs_diff(other) * 10 < one + other, "{swap}");
    let failed = rows(&swap["devices"])?.iter().map(|row| of(row, "read_failed")).sum::<Result<u64>>()?;
    ensure!(failed == 0, "{swap}");
    let shown = machine.ask("swap")?;
    ensure!(shown["slots"]["total"] != 0, "{shown}");
    for guest in ["guest0", "guest1", "guest2"] {
        machine.ask(&format!("kill {guest}"))?;
    }
    nothing_left(&mut machine)?;
    machine.shutdown()?;
    let mut bytes = vec![0; KEPT.len()];
    File::open(file("table.img"))?.read_exact_at(&mut bytes, kept)?;
    ensure!(bytes == KEPT, "a partition that is not for swap was written to");
    Ok(())
}

/// Nobody lives any more: no slot is taken anywhere.
fn nothing_left(machine: &mut Monitored) -> Result<()> {
    let swap = machine.until("swap", |swap| swap["slots"]["in_use"] == 0)?;
    for row in rows(&swap["devices"])? {
        ensure!(row["in_use"] == 0, "{swap}");
    }
    machine.check()?;
    Ok(())
}

/// Has nearly all that a guest has for itself paged out; it stands still afterwards.
fn page_out(machine: &mut Monitored, guest: u64) -> Result<()> {
    machine.ask(&format!("pause {guest}"))?;
    let least = number(&machine.ask(&format!("limit {guest}"))?, "/least_pages")?;
    machine.ask(&format!("limit {guest} resident={}K", least * 4))?;
    let lives = |row: &Value| row["state"] != "ending";
    // What the dead leave to it comes to be its own meanwhile.
    machine.until("guests", |all| rows(all).is_ok_and(|all| all.iter().all(lives)))?;
    machine.until("stats", |stats| stats["chores"] == false)?;
    let small = |limit: &Value| number(limit, "/own_pages").is_ok_and(|own| own <= least);
    machine.until(&format!("limit {guest}"), small)?;
    machine.until("memory", |memory| memory["transfers"] == 0)?;
    machine.ask(&format!("limit {guest} resident=none")).map(drop)
}

/// What `guests` says of one.
fn row(machine: &mut Monitored, guest: u64) -> Result<Value> {
    let guests = machine.ask("guests")?;
    let row = rows(&guests)?.iter().find(|row| row["id"] == guest).cloned();
    row.with_context(|| format!("guest {guest} is not there: {guests}"))
}

/// More of a guest's memory is in swap than in frames, and so many MiB at least.
fn is_out(machine: &mut Monitored, guest: u64, mib: u64) -> Result<()> {
    let row = row(machine, guest)?;
    let resident = number(&row, "/private_pages")? + number(&row, "/shared_pages")?;
    let swapped = number(&row, "/swapped_pages")?;
    ensure!(swapped > mib * MIB_PAGES && swapped > resident, "it is not mostly swapped out: {row}");
    Ok(())
}

/// A guest finds what it wrote before it was forked, kept or stored.
fn is_well(machine: &mut Monitored, guest: u64, turn: u64) -> Result<()> {
    machine.talk(
        guest,
        &format!("md5sum -c /sum; echo turn-$(({turn}+100))"),
        &format!("turn-{}", turn + 100),
    )?;
    let log = machine.ask(&format!("log {guest}"))?;
    let line = machine.last_line(guest, "/tmp/data:").with_context(|| format!("its log is {log}"))?;
    ensure!(line.contains("/tmp/data: OK"), "guest {guest} reads something else: {line}");
    Ok(())
}

/// A Linux guest with 40 MiB that can be told apart.
fn mostly_out(name: &str) -> Result<()> {
    const DATA: u64 = 40;
    const OWN: u64 = 16;
    let file = fresh(name)?;
    let image = format!("{},new", file.display());
    let words = ["--timeout", "600", "--memory", "192M", "--host-memory", "512M", "--swap", "512M"];
    let mut machine = monitored(name, &[&words[..], &["--image", &image], &STAYS].concat())?;
    machine.ask("wait guest \"guest ready: guest\"")?;
    let fill = format!(
        "dd if=/dev/urandom of=/tmp/data bs=1048576 count={DATA} && md5sum /tmp/data >/sum; echo go-$((1+1))"
    );
    machine.talk(1, &fill, "go-2")?;
    is_well(&mut machine, 1, 20)?;

    // Kept and cloned while hardly anything of it is in a frame.
    page_out(&mut machine, 1)?;
    is_out(&mut machine, 1, DATA)?;
    machine.ask("snapshot 1 kept")?;
    let child = machine.fork_paused(1, 1)?.first().copied().context("no child")?;
    let late = number(&machine.ask("create --from kept")?, "/created")?;
    is_out(&mut machine, child, DATA)?;
    machine.check()?;
    let before = number(&machine.ask("swap")?, "/pages/written")?;
    machine.ask("resume 1")?;
    machine.ask(&format!("resume {child}"))?;
    for (turn, guest) in (0..).zip([1, child, late]) {
        is_well(&mut machine, guest, turn)?;
    }
    let after = number(&machine.ask("swap")?, "/pages/written")?;
    ensure!(after < before + DATA * MIB_PAGES / 4, "{before} pages were written, and then {after}");

    // Each changes what it has; one is brought back when that is in swap, and its slots come back.
    for guest in [1, child] {
        let spoil = format!(
            "dd if=/dev/urandom of=/tmp/data bs=1048576 count={OWN} conv=notrunc; md5sum -c /sum; echo spoilt-$((5+5))"
        );
        machine.talk(guest, &spoil, "spoilt-10")?;
        let line = machine.last_line(guest, "/tmp/data:")?;
        ensure!(line.contains("FAILED"), "guest {guest} did not change its file: {line}");
    }
    page_out(&mut machine, child)?;
    let full = number(&machine.ask("swap")?, "/slots/in_use")?;
    machine.ask(&format!("reset {child} kept"))?;
    machine.ask(&format!("resume {child}")).or_else(|_| row(&mut machine, child))?;
    let back = |swap: &Value| number(swap, "/slots/in_use").is_ok_and(|now| now + OWN * MIB_PAGES <= full);
    machine.until("swap", back)?;
    is_well(&mut machine, child, 10)?;
    machine.check()?;

    // The others go, and what is left is stored from swap.
    for gone in [1, late] {
        machine.ask(&format!("kill {gone}"))?;
    }
    machine.ask("delete kept")?;
    page_out(&mut machine, child)?;
    is_out(&mut machine, child, DATA / 2)?;
    machine.ask(&format!("save {child} golden --wait"))?;
    machine.check()?;
    machine.ask(&format!("resume {child}"))?;
    is_well(&mut machine, child, 11)?;
    machine.ask(&format!("kill {child}"))?;
    nothing_left(&mut machine)?;
    machine.shutdown()?;
    stored::whole(&file)?;

    let image = file.display().to_string();
    let words = ["--timeout", "300", "--host-memory", "512M", "--swap", "512M", "--image", &image];
    let mut machine = another(name, "later", &[&words[..], &STAYS].concat())?;
    machine.ask("resume 1").or_else(|_| row(&mut machine, 1))?;
    is_well(&mut machine, 1, 12)?;
    machine.ask("kill 1")?;
    nothing_left(&mut machine)?;
    machine.shutdown()?;
    let _ = fs::remove_file(&file);
    Ok(())
}
