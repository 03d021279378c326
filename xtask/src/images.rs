//! What guests boot: Debian's arm64 kernels, U-Boot, and an initramfs that we build ourselves.
//!
//! Everything is cached under `target/images`; a second call finds it there and asks nobody.

use crate::apt::Arm64;
use crate::build;
use crate::progress::step;
use crate::toolchain::Toolchain;
use anyhow::{Context, Result, ensure};
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

/// The kernels that are known, the default first.
pub(crate) const KERNELS: [&str; 2] = ["6.12", "6.1"];

fn cache() -> PathBuf {
    crate::root().join("target/images")
}

/// True where the kernels and the initramfs of every test are here already.
pub(crate) fn are_cached() -> bool {
    let kernels = KERNELS.iter().flat_map(|version| [format!("Image-{version}"), drivers_name(version)]);
    kernels.chain(["busybox", "e2fsck"].map(str::to_owned)).all(|name| cache().join(name).is_file())
}

/// A Debian cloud kernel of a version, as a plain arm64 Image.
pub(crate) fn kernel(version: &str) -> Result<PathBuf> {
    let image = cache().join(format!("Image-{version}"));
    if !image.is_file() {
        let boot = unpacked(version)?.join("boot");
        let found = fs::read_dir(&boot).with_context(|| format!("reading {}", boot.display()))?;
        let found = found.flatten().map(|f| f.path());
        let vmlinuz = found
            .into_iter()
            .find(|p| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with("vmlinuz")))
            .with_context(|| format!("Debian's kernel {version} has no vmlinuz"))?;
        write_whole(&image, &plain_image(&vmlinuz)?)?;
    }
    Ok(image)
}

/// What [`drivers`] are cached as: another name whenever the list is another, for what is cached is not made again.
fn drivers_name(version: &str) -> String {
    format!("virtio-blk-balloon-rng-{version}.cpio")
}

/// The drivers of virtio devices that a Debian kernel of a version has apart from itself: an archive that goes behind an
/// initramfs, whose first program loads them in the order of their names.
pub(crate) fn drivers(version: &str) -> Result<Vec<u8>> {
    const IN_ORDER: [&str; 7] = [
        "virtio_ring.ko",
        "virtio.ko",
        "virtio_balloon.ko",
        "virtio_blk.ko",
        "rng-core.ko",
        "virtio-rng.ko",
        "virtio_mmio.ko",
    ];
    let image = cache().join(drivers_name(version));
    if !image.is_file() {
        let unpacked = unpacked(version)?.join("lib/modules");
        let release = fs::read_dir(&unpacked).with_context(|| format!("reading {}", unpacked.display()))?;
        let release = release.flatten().next().context("the kernel's package has no modules")?.path();
        let name = release.file_name().context("a folder without a name")?.to_string_lossy().into_owned();
        let mut cpio = Cpio::default();
        for dir in ["lib", "lib/modules", &format!("lib/modules/{name}")] {
            cpio.add(dir, 0o40755, &[]);
        }
        for (number, driver) in IN_ORDER.iter().enumerate() {
            // What is not there is part of the kernel itself.
            for end in ["", ".xz"] {
                let places = ["drivers/virtio", "drivers/block", "drivers/char/hw_random"]
                    .map(|folder| release.join("kernel").join(folder).join(format!("{driver}{end}")));
                if let Some(file) = places.iter().find(|file| file.is_file()) {
                    let place = format!("lib/modules/{name}/{number}-{driver}{end}");
                    cpio.add(&place, 0o100_644, &fs::read(file)?);
                }
            }
        }
        write_whole(&image, &cpio.finish())?;
    }
    fs::read(&image).with_context(|| format!("reading {}", image.display()))
}

/// The files of a Debian cloud kernel's package.
fn unpacked(version: &str) -> Result<PathBuf> {
    let archive = Arm64::open()?;
    let package = archive.resolve("linux-image-cloud-arm64", version)?;
    let into = cache().join("unpacked").join(&package);
    archive.unpack(&package, &into)?;
    Ok(into)
}

/// U-Boot for QEMU's arm64 machine.
pub(crate) fn u_boot() -> Result<PathBuf> {
    let image = cache().join("u-boot.bin");
    if !image.is_file() {
        let into = cache().join("unpacked/u-boot-qemu");
        Arm64::open()?.unpack("u-boot-qemu", &into)?;
        write_whole(&image, &fs::read(into.join("usr/lib/u-boot/qemu_arm64/u-boot.bin"))?)?;
    }
    Ok(image)
}

/// A program that checks ext4 file systems: an archive that goes behind an initramfs.
pub(crate) fn e2fsck() -> Result<Vec<u8>> {
    let program = cache().join("e2fsck");
    if !program.is_file() {
        let into = cache().join("unpacked/e2fsck-static");
        Arm64::open()?.unpack("e2fsck-static", &into)?;
        write_whole(&program, &fs::read(into.join("sbin/e2fsck.static"))?)?;
    }
    let mut cpio = Cpio::default();
    cpio.add("bin/e2fsck", 0o100_755, &fs::read(&program)?);
    Ok(cpio.finish())
}

/// The initramfs: busybox, what we have for a guest, and a script that says when its shell is up.
pub(crate) fn initramfs(toolchain: &Toolchain) -> Result<PathBuf> {
    let image = cache().join("initramfs.cpio");
    let busybox = cache().join("busybox");
    if !busybox.is_file() {
        let into = cache().join("unpacked/busybox-static");
        Arm64::open()?.unpack("busybox-static", &into)?;
        write_whole(&busybox, &fs::read(into.join("bin/busybox"))?)?;
    }
    let busybox = fs::read(&busybox)?;
    let mut cpio = Cpio::default();
    for dir in ["bin", "dev", "proc", "sys", "tmp"] {
        cpio.add(dir, 0o40755, &[]);
    }
    cpio.add("bin/busybox", 0o100_755, &busybox);
    cpio.add("bin/sh", 0o120_777, b"busybox");
    cpio.add("init", 0o100_755, include_bytes!("initramfs/init"));
    for program in ["fork-guest", "memtest"] {
        cpio.add(&format!("bin/{program}"), 0o100_755, &build::linux_program(toolchain, program)?);
    }
    write_whole(&image, &cpio.finish())?;
    Ok(image)
}

/// A kernel as it is executed: gzip is undone, everything else is taken as it is.
pub(crate) fn plain_image(file: &Path) -> Result<Vec<u8>> {
    let bytes = fs::read(file).with_context(|| format!("reading {}", file.display()))?;
    if !bytes.starts_with(&[0x1f, 0x8b]) {
        return Ok(bytes);
    }
    step(&format!("unpacking {}", file.display()), || {
        let mut plain = Vec::new();
        let read = flate2::read::GzDecoder::new(bytes.as_slice()).read_to_end(&mut plain);
        read.with_context(|| format!("{} starts as a gzip file and does not go on as one", file.display()))?;
        ensure!(!plain.is_empty(), "{} is an empty gzip file", file.display());
        Ok(plain)
    })
}

/// Writes a file so that it is whole or not there.
fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir)?;
    }
    let half = path.with_extension("half");
    fs::write(&half, bytes).with_context(|| format!("writing {}", half.display()))?;
    fs::rename(&half, path).with_context(|| format!("writing {}", path.display()))
}

/// A cpio archive in the "newc" form that the kernel unpacks (Documentation: initramfs buffer format).
#[derive(Default)]
struct Cpio {
    bytes: Vec<u8>,
    inode: u32,
}

impl Cpio {
    fn add(&mut self, name: &str, mode: u32, data: &[u8]) {
        self.inode += 1;
        let size = u32::try_from(data.len()).unwrap_or(u32::MAX);
        let name_size = u32::try_from(name.len() + 1).unwrap_or(u32::MAX);
        let fields = [self.inode, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(data);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.add("TRAILER!!!", 0, &[]);
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cpio_header_and_body_is_aligned_and_the_trailer_is_last() {
        let mut cpio = Cpio::default();
        cpio.add("a", 0o100_644, b"12345");
        let bytes = cpio.finish();
        assert_eq!(bytes.len() % 4, 0);
        assert_eq!(&bytes[..6], b"070701");
        assert_eq!(&bytes[112..117], b"12345");
        assert_eq!(&bytes[120..126], b"070701");
        assert!(bytes.windows(10).any(|w| w == b"TRAILER!!!"));
    }
}
