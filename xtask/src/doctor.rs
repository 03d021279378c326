//! `cargo xtask doctor`: what this machine has and lacks, for each command.

use crate::on_path;
use crate::toolchain::Toolchain;
use crate::{apt, qemu};

/// Prints it.
pub(crate) fn run() {
    let line = |ok: bool, what: &str, detail: &str| {
        println!("{} {what:<28} {detail}", if ok { "yes" } else { "NO " });
    };
    match Toolchain::find() {
        Ok(found) => line(true, "AArch64 toolchain", &found.version),
        Err(why) => line(false, "AArch64 toolchain (all)", &why),
    }
    match qemu::version() {
        Some(major) => line(true, "qemu-system-aarch64", &format!("version {major}")),
        None => line(false, "qemu-system-aarch64 (run, test)", "apt-get install qemu-system-arm"),
    }
    line(apt::can_download(), "apt for guest images", "without it: run --kernel FILE --initrd FILE");
    line(apt::can_install(), "root, to install what lacks", "without it: install the above yourself");
    line(on_path("gdb-multiarch").is_some(), "gdb-multiarch (debug)", "apt-get install gdb-multiarch");
}
