//! Building what runs on the machine: the hypervisor, and the tiny guests as flat binaries.

use crate::progress::step;
use crate::toolchain::{TARGET, Toolchain};
use anyhow::{Context, Result, ensure};
use object::{Object, ObjectSegment};
use std::fs;
use std::path::PathBuf;

/// Builds the hypervisor; its ELF file.
pub(crate) fn hypervisor(toolchain: &Toolchain) -> Result<PathBuf> {
    cargo(toolchain, &["--package", "hv", "--bin", "hv"], "building the hypervisor")?;
    Ok(crate::root().join("target/el2").join(TARGET).join("release/hv"))
}

/// Builds one tiny guest; its bytes, as loaded from RAM base + 0x80000 on.
pub(crate) fn guest(toolchain: &Toolchain, name: &str) -> Result<Vec<u8>> {
    cargo(toolchain, &["--package", "hv-guests", "--bin", name], "building the tiny guests")?;
    let elf = crate::root().join("target/el2").join(TARGET).join("release").join(name);
    flatten(&fs::read(&elf).with_context(|| format!("reading {}", elf.display()))?)
}

/// Builds a program for a guest's Linux; its ELF file.
pub(crate) fn linux_program(toolchain: &Toolchain, name: &str) -> Result<Vec<u8>> {
    cargo(
        toolchain,
        &["--package", "hv-guest-programs", "--bin", name],
        "building what runs under a guest's Linux",
    )?;
    let elf = crate::root().join("target/el2").join(TARGET).join("release").join(name);
    fs::read(&elf).with_context(|| format!("reading {}", elf.display()))
}

fn cargo(toolchain: &Toolchain, what: &[&str], label: &str) -> Result<()> {
    step(label, || {
        let output = toolchain.cargo("build").args(what).current_dir(crate::root()).output()?;
        ensure!(output.status.success(), "{label} failed:\n{}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    })
}

/// The loadable bytes of an ELF file, from its lowest address on; holes and .bss are not stored at the end.
fn flatten(elf: &[u8]) -> Result<Vec<u8>> {
    let file = object::File::parse(elf).context("a tiny guest is not an ELF file")?;
    let base = file.segments().map(|s| s.address()).min().context("an ELF file without segments")?;
    let mut flat = Vec::new();
    for segment in file.segments() {
        let data = segment.data()?;
        if data.is_empty() {
            continue;
        }
        let start = usize::try_from(segment.address() - base)?;
        if flat.len() < start + data.len() {
            flat.resize(start + data.len(), 0);
        }
        if let Some(place) = flat.get_mut(start..start + data.len()) {
            place.copy_from_slice(data);
        }
    }
    Ok(flat)
}
