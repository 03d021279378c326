//! Several guests at once: what they share, and that none of them feels the others.

use super::machine::{boot, logs, monitored};
use crate::monitored::{number, rows, text, total};
use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use serde_json::Value;
use std::fs;

/// Pages in a MiB.
const PER_MIB: u64 = 256;

pub(super) fn trials() -> Vec<Trial> {
    vec![boot("eight_linux_guests_answer_and_share_their_kernel", eight)]
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
        let private = number(guest, "/private_pages")?;
        ensure!(private == touched, "{guest} has touched {touched} pages");
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
    ensure!(owners("guests_resident")? * 4 < apart * 3, "sharing saves less than a quarter: {memory}");

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
    let memory = machine.settled()?;
    ensure!(memory["owners"]["guests_shared"] == 0, "one guest shares with nobody: {memory}");
    machine.check()?;
    machine.ask("resume guest0")?;
    machine.ask("send guest0 poweroff -f")?;
    machine.console.finish()?;
    ensure!(disk(name)? == pristine, "the disk has changed");
    Ok(())
}
