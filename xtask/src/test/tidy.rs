//! What no compiler checks, and the compilers' own checks as named tests.

use super::{cargo, modules, passes, trial, violations};
use crate::toolchain::Toolchain;
use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Rule 1 of the layout: who may import whom, between packages.
const IMPORTS: &[(&str, &[&str])] = &[
    ("vmobject", &[]),
    ("hv-abi", &[]),
    ("stage2", &["vmobject"]),
    ("board", &["vmobject"]),
    ("hv", &["board", "stage2", "vmobject", "hv-abi"]),
    ("hv-guests", &["hv-abi"]),
    ("hv-guest-programs", &["hv-abi"]),
    ("xtask", &["hv-abi"]),
];

/// Rule 2: the crate roots that list their modules in order.
const ORDERED: &[&str] =
    &["vmobject/src/lib.rs", "stage2/src/lib.rs", "board/src/lib.rs", "hv/src/lib.rs", "xtask/src/main.rs"];

/// Folders in which assembly may be written.
const ASSEMBLY: &[&str] = &["hv/src/arch/aarch64", "hv/guests"];

/// Folders and files in which `unsafe` may be written.
const UNSAFE: &[&str] =
    &["hv/src/arch", "hv/src/mm", "hv/src/boot", "hv/src/main.rs", "hv/guests", "board/src"];

/// Longest file.
const MAX_LINES: usize = 600;

pub(super) fn trials() -> Vec<Trial> {
    vec![
        trial("tidy::formatting", || passes(&mut cargo(&["fmt", "--all", "--check"]))),
        trial("tidy::clippy_on_the_host", || {
            passes(&mut cargo(&["clippy", "--quiet", "--all-targets", "--", "-D", "warnings"]))
        }),
        trial("tidy::clippy_on_the_target", || {
            let toolchain = Toolchain::provide()?;
            let mut command = toolchain.clippy();
            passes(command.args([
                "--package",
                "hv",
                "--package",
                "hv-guests",
                "--package",
                "hv-guest-programs",
                "--quiet",
                "--",
                "-D",
                "warnings",
            ]))
        }),
        trial("tidy::docs", || {
            passes(cargo(&["doc", "--quiet", "--no-deps"]).env("RUSTDOCFLAGS", "-D warnings"))
        }),
        trial("tidy::packages_import_only_what_the_layout_allows", imports),
        trial("tidy::modules_use_only_those_before_them", || {
            let sources = sources()?;
            violations(
                &ORDERED.iter().flat_map(|root| modules::against_order(&sources, root)).collect::<Vec<_>>(),
            )
        }),
        trial("tidy::every_file_belongs_to_a_crate", || violations(&modules::unreached(&sources()?))),
        trial("tidy::every_file_says_why_it_exists_and_stays_short", files),
        trial("tidy::assembly_and_unsafe_stay_where_they_belong", places),
    ]
}

fn imports() -> Result<()> {
    let output =
        cargo(&["metadata", "--format-version", "1", "--no-deps"]).current_dir(crate::root()).output()?;
    ensure!(output.status.success(), "cargo metadata failed");
    let metadata: Value = serde_json::from_slice(&output.stdout)?;
    let allowed: BTreeMap<&str, &[&str]> = IMPORTS.iter().copied().collect();
    let mut found = Vec::new();
    for package in metadata["packages"].as_array().context("no packages")? {
        let name = package["name"].as_str().unwrap_or_default();
        let Some(may) = allowed.get(name) else {
            found.push(format!("package {name} is not in the layout"));
            continue;
        };
        for dependency in package["dependencies"].as_array().into_iter().flatten() {
            let on = dependency["name"].as_str().unwrap_or_default();
            // Its own tests may ask a package for its fakes.
            if on != name && allowed.contains_key(on) && !may.contains(&on) {
                found.push(format!("{name} imports {on}, against the layout"));
            }
        }
    }
    violations(&found)
}

fn sources() -> Result<modules::Sources> {
    let mut found = modules::Sources::new();
    let mut dirs: Vec<PathBuf> =
        ["vmobject", "stage2", "board", "hv", "xtask"].iter().map(|d| crate::root().join(d)).collect();
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(&dir)?.flatten() {
            let path = entry.path();
            if path.is_dir() {
                dirs.push(path);
            } else if path.extension().is_some_and(|e| e == "rs" || e == "S") {
                let name = path.strip_prefix(crate::root()).unwrap_or(&path).display().to_string();
                found.insert(name, fs::read_to_string(&path)?);
            }
        }
    }
    Ok(found)
}

fn files() -> Result<()> {
    let mut found = Vec::new();
    for (name, text) in sources()? {
        let lines = text.lines().count();
        if lines > MAX_LINES {
            found.push(format!("{name} has {lines} lines; {MAX_LINES} is the most"));
        }
        let opens = if Path::new(&name).extension().is_some_and(|e| e == "S") { "//" } else { "//!" };
        if !text.trim_start().starts_with(opens) {
            found.push(format!("{name} does not open by saying why it exists"));
        }
    }
    violations(&found)
}

fn places() -> Result<()> {
    let mut found = Vec::new();
    for (name, text) in sources()? {
        let lies_in = |places: &[&str]| places.iter().any(|p| name.starts_with(p));
        if name.starts_with("xtask/src/test/") {
            continue;
        }
        let assembly = text.contains("asm!(") || Path::new(&name).extension().is_some_and(|e| e == "S");
        if assembly && !lies_in(ASSEMBLY) {
            found.push(format!("{name} has assembly"));
        }
        let raw = text.contains("unsafe {") || text.contains("unsafe impl") || text.contains("unsafe fn");
        if raw && !lies_in(UNSAFE) {
            found.push(format!("{name} has unsafe code"));
        }
    }
    violations(&found)
}
