//! What a demonstration found, left behind for `report`.
//!
//! A demonstration prints what it leaves: [`Found::show`] is its table, and [`Found::leave`] comes when all its claims hold.

use crate::monitored::{number, rows, text};
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::fs;
use std::path::PathBuf;

/// KiB of a page.
const PAGE_KIB: u64 = 4;

/// What a demonstration found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Found {
    /// Which.
    pub(crate) demo: String,
    /// The CPU model that it ran on.
    pub(crate) cpu: String,
    /// What there was to count, in the order of the telling.
    pub(crate) facts: Vec<Fact>,
    /// The guests that were alive at its height.
    pub(crate) guests: Vec<Holding>,
}

/// Something that was counted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Fact {
    /// What, beginning with its unit if it has one.
    pub(crate) what: String,
    /// How many.
    pub(crate) value: u64,
}

/// What a guest has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Holding {
    /// Its name.
    pub(crate) name: String,
    /// KiB that are its own.
    pub(crate) private_kib: u64,
    /// KiB that others have as well.
    pub(crate) shared_kib: u64,
}

impl Found {
    /// Nothing yet; what the last run left is forgotten.
    pub(super) fn new(demo: &str, cpu: &str) -> Self {
        // It may not be there.
        let _ = fs::remove_file(file(demo));
        Self { demo: demo.to_owned(), cpu: cpu.to_owned(), facts: Vec::new(), guests: Vec::new() }
    }

    /// Something was counted.
    pub(super) fn fact(&mut self, what: impl Into<String>, value: u64) {
        self.facts.push(Fact { what: what.into(), value });
    }

    /// What every guest has, from the monitor's `guests`.
    pub(super) fn guests(&mut self, guests: &Value) -> Result<()> {
        let holding = |row: &Value| {
            Ok(Holding {
                name: text(row, "/name")?.to_owned(),
                private_kib: number(row, "/private_pages")? * PAGE_KIB,
                shared_kib: number(row, "/shared_pages")? * PAGE_KIB,
            })
        };
        self.guests = rows(guests)?.iter().map(holding).collect::<Result<_>>()?;
        Ok(())
    }

    /// KiB that are some guest's own.
    pub(super) fn private_kib(&self) -> u64 {
        self.guests.iter().map(|guest| guest.private_kib).sum()
    }

    /// Prints the table.
    pub(super) fn show(&self) {
        println!();
        for Fact { what, value } in &self.facts {
            println!("{what:<48} {value:>8}");
        }
        println!();
    }

    /// Leaves it where `report` finds it.
    pub(super) fn leave(&self) -> Result<()> {
        let file = file(&self.demo);
        let text = serde_json::to_string_pretty(self)?;
        fs::write(&file, text).with_context(|| format!("writing {}", file.display()))
    }
}

fn file(demo: &str) -> PathBuf {
    super::dir().join(format!("{demo}.json"))
}

/// What the last run of every demonstration left, by their names.
pub(crate) fn left() -> Result<Vec<Found>> {
    let Ok(files) = fs::read_dir(super::dir()) else { return Ok(Vec::new()) };
    let mut files: Vec<_> = files.flatten().map(|file| file.path()).collect();
    files.retain(|file| file.extension().is_some_and(|end| end == "json"));
    files.sort_unstable();
    files
        .iter()
        .map(|file| {
            serde_json::from_slice(&fs::read(file)?)
                .with_context(|| format!("{} is not what a demonstration leaves", file.display()))
        })
        .collect()
}
