//! `cargo xtask demo`: narrated demonstrations on real Linux guests. Each ends with a table, and fails if a claim does
//! not hold. What it found it leaves for `report`.

pub(crate) mod found;
mod snapshot;
mod swap;
mod thousand;
mod tree;

use crate::monitored::{Monitored, introduction, number};
use crate::progress::step;
use crate::run::Run;
use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
use found::Found;
use std::collections::BTreeSet;
use std::path::PathBuf;

/// MiB of the working set that the parent has and every child finds.
const SET_MIB: u64 = 32;
/// Pages in a MiB.
const PAGES: u64 = 256;

/// Options of `demo`.
#[derive(Args, Clone, Debug)]
pub(crate) struct Demo {
    /// Which
    name: Name,
    /// Children of `clone` (32) and `thousand` (1000)
    #[arg(long)]
    children: Option<usize>,
    /// CPU model
    #[arg(long, default_value = "neoverse-n1")]
    cpu: String,
}

/// What can be shown.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Name {
    /// One running Linux forked into many
    Clone,
    /// A Linux that forks itself, whose children fork themselves, and so on
    ForkTree,
    /// A guest written to a disk while it works, its machine killed, and gone on with in another
    Snapshot,
    /// Linux guests with four times the memory of their host
    Swap,
    /// A thousand Linux guests on a host with 4 GiB
    Thousand,
}

impl Demo {
    /// Shows it.
    pub(crate) fn run(&self) -> Result<()> {
        match self.name {
            Name::Clone => self.clones(self.children.unwrap_or(32)),
            Name::ForkTree => tree::show(&self.cpu),
            Name::Snapshot => snapshot::show(&self.cpu),
            Name::Swap => swap::show(&self.cpu),
            Name::Thousand => thousand::show(&self.cpu, self.children.unwrap_or(1000)),
        }
    }

    fn clones(&self, count: usize) -> Result<()> {
        let words = ["--timeout", "1800", "--host-memory", "2G", "--cpu", &self.cpu];
        let mut machine = booted(&words)?;
        println!(
            "One Linux guest runs. It gets a working set of {SET_MIB} MiB of random bytes, with a checksum."
        );
        let fill = format!(
            "head -c {} /dev/urandom > /set; md5sum /set > /sum; echo filled-$((40+2))",
            SET_MIB << 20
        );
        step("filling the working set", || machine.talk(1, &fill, "filled-42"))?;
        let before = number(&machine.ask("memory")?, "/owners/guests_resident")?;
        let children = machine.fork(1, count)?;
        println!("It is forked into {} live children in one pause: {}", children.len(), last_fork()?);
        let answers = step("each child does something of its own", || work(&mut machine, &children))?;
        ensure!(answers.len() == children.len(), "two children drew the same random bytes: {answers:?}");
        println!(
            "Every child found the parent's working set whole, and told its own number and random bytes."
        );
        machine.check()?;
        let found = self.table(&mut machine, before, count)?;
        step("killing them in no order", || -> Result<()> {
            for child in shuffled(&children) {
                machine.ask(&format!("kill {child}"))?;
            }
            Ok(())
        })?;
        machine.check()?;
        machine.talk(1, "md5sum -c /sum", "/set: OK")?;
        let memory = machine.settled()?;
        let after = number(&memory, "/owners/guests_resident")?;
        println!(
            "All children are gone; the parent's set is whole; {} MiB resident before, {} MiB after.",
            before / PAGES,
            after / PAGES
        );
        ensure!(after < before + before / 8, "memory did not come back");
        machine.shutdown()?;
        found.leave()
    }

    /// Who holds what; fails if the children hold copies of what they share.
    fn table(&self, machine: &mut Monitored, before: u64, count: usize) -> Result<Found> {
        let mut found = Found::new("clone", &self.cpu);
        found.guests(&machine.ask("guests")?)?;
        println!("\n{:<12} {:>12} {:>12}", "guest", "private KiB", "shared KiB");
        for guest in &found.guests {
            println!("{:<12} {:>12} {:>12}", guest.name, guest.private_kib, guest.shared_kib);
        }
        let memory = machine.ask("memory")?;
        let resident = number(&memory, "/owners/guests_resident")?;
        let each = (resident - before) / count as u64;
        found.fact("Linux guests alive, each of which answered", found.guests.len() as u64);
        found.fact("MiB resident", resident / PAGES);
        found.fact("MiB of these that are some guest's own", found.private_kib() / 1024);
        found.fact("MiB if each had a copy", number(&memory, "/owners/if_nothing_were_shared")? / PAGES);
        found.fact("KiB that a child cost, its own work included", each * 4);
        found.show();
        ensure!(
            each < SET_MIB * PAGES / 2,
            "a child holds {each} pages of its own: the working set is not shared"
        );
        Ok(found)
    }
}

fn dir() -> PathBuf {
    crate::root().join("target/demo")
}

/// A machine whose first guest is a Linux that is up.
fn booted(words: &[&str]) -> Result<Monitored> {
    step("booting one Linux guest", || {
        let mut machine = Monitored::start(Run::from_words(words)?, &dir())?;
        machine.console.wait("guest ready")?;
        Ok(machine)
    })
}

/// What the hypervisor's log says of the last fork.
fn last_fork() -> Result<String> {
    let log = std::fs::read_to_string(dir().join("hv.log")).context("the hypervisor's log")?;
    let told = log.lines().rfind(|line| line.contains("forked into")).context("the log has no fork")?;
    Ok(told.trim_start_matches("hv: ").to_owned())
}

/// Each child checks the working set, takes a name after its number, and draws random bytes, which come back.
fn work(machine: &mut Monitored, children: &[u64]) -> Result<BTreeSet<String>> {
    // All begin before any is waited for.
    for child in children {
        machine.ask(&format!("send {child} \"md5sum -c /sum; {}\"", introduction()))?;
    }
    children
        .iter()
        .map(|&child| {
            machine.ask(&format!("wait {child} \"/set: OK\""))?;
            machine.introduced(child)
        })
        .collect()
}

/// The same, in an order that is always the same and looks like none.
fn shuffled(children: &[u64]) -> Vec<u64> {
    let mut shuffled = children.to_vec();
    shuffled.sort_by_key(|child| child.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    shuffled
}
