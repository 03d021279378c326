//! QEMU's arguments; no other file knows them.

use crate::apt;
use crate::on_path;
use anyhow::{Context, Error, Result, bail, ensure};
use clap::ValueEnum;
use std::path::{Path, PathBuf};
use std::process::Command;

const PROGRAM: &str = "qemu-system-aarch64";
/// The oldest QEMU that the tests run on.
const OLDEST: u32 = 8;

/// The machine that the hypervisor runs on.
#[derive(Clone, Debug)]
pub(crate) struct Machine {
    /// CPU model.
    pub(crate) cpu: String,
    /// Host CPUs.
    pub(crate) cpus: u32,
    /// Host RAM in MiB.
    pub(crate) memory_mib: u64,
    /// Count instructions instead of time.
    pub(crate) icount: bool,
    /// The hypervisor's own command line.
    pub(crate) append: String,
    /// The console is a person's terminal: Ctrl-A is QEMU's, Ctrl-A x leaves.
    pub(crate) terminal: bool,
    /// Where the hypervisor's own log goes.
    pub(crate) log: PathBuf,
    /// The control socket, if any.
    pub(crate) socket: Option<PathBuf>,
    /// Disks for guests, by their numbers.
    pub(crate) disks: Vec<Drive>,
    /// Disks to swap to, by their numbers.
    pub(crate) swap: Vec<Drive>,
    /// Disks for stored guests, by their numbers.
    pub(crate) images: Vec<Drive>,
    /// Errors that the image disk is to make.
    pub(crate) errors: Option<Errors>,
    /// How many MiB a second the image disk does at most.
    pub(crate) rate: Option<u64>,
    /// Wait for gdb on this port.
    pub(crate) gdb: Option<u16>,
    /// Tell every instruction in some ranges of addresses.
    pub(crate) trace: Option<Trace>,
}

/// A file as a disk for guests.
#[derive(Clone, Debug)]
pub(crate) struct Drive {
    /// The file.
    pub(crate) file: PathBuf,
    /// Nobody writes to it.
    pub(crate) read_only: bool,
    /// Where everything that is written to it is logged.
    pub(crate) log: Option<PathBuf>,
    /// It does one such thing, and the next not for an hour.
    pub(crate) stalls: Option<Stall>,
    /// How many bytes of it are read in a second at most.
    pub(crate) rate: Option<u64>,
}

/// What a disk stops doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Stall {
    /// It takes no more writes.
    Write,
    /// It gives nothing back.
    Read,
}

/// A disk that fails where it is told to, and a log of what it answered.
#[derive(Clone, Debug)]
pub(crate) struct Errors {
    /// Where: rules for QEMU's blkdebug.
    pub(crate) rules: PathBuf,
    /// A line for each request of a disk that is done, with its status at the end.
    pub(crate) log: PathBuf,
}

/// A log of instructions.
#[derive(Clone, Debug)]
pub(crate) struct Trace {
    /// Where QEMU writes it: a pipe, for it is long.
    pub(crate) pipe: PathBuf,
    /// Of which addresses, as first address and bytes.
    pub(crate) of: Vec<(u64, u64)>,
}

/// The QEMU that is here and new enough; else how to come by one.
pub(crate) fn found() -> Result<String, String> {
    match version() {
        Some(major) if major >= OLDEST => Ok(format!("version {major}")),
        Some(major) => Err(format!(
            "{PROGRAM} is version {major}, needed is {OLDEST} (Debian: apt-get install -t bookworm-backports qemu-system-arm)"
        )),
        None => Err(format!("{PROGRAM} is not on the path (Debian: apt-get install qemu-system-arm)")),
    }
}

/// Sees that QEMU is there and new enough, or provides it.
pub(crate) fn provide() -> Result<()> {
    match found() {
        Ok(_) => Ok(()),
        Err(_) if apt::can_install() => {
            apt::install(&["qemu-system-arm"], true)?;
            found().map(|_| ()).map_err(Error::msg).context("qemu-system-arm was installed, and yet")
        }
        Err(why) => bail!(why),
    }
}

/// Sees that QEMU's tools for disks are there, or provides them.
pub(crate) fn provide_tools() -> Result<()> {
    match on_path("qemu-nbd") {
        Some(_) => Ok(()),
        None if apt::can_install() => apt::install(&["qemu-utils"], true),
        None => bail!("qemu-nbd is not on the path (Debian: apt-get install qemu-utils)"),
    }
}

/// Reads or writes a file in order, through the brake that a [`Machine::rate`] is.
pub(crate) fn run_on_slow_disk(file: &Path, mib: u64, requests: u64, bytes: u64, write: bool) -> Result<()> {
    // One after the other: to wait for several, the tool lets them pass the brake.
    let what = if write { "write" } else { "read" };
    let mut command = Command::new("qemu-io");
    command.args(["--object", &format!("throttle-group,id=brake,x-bps-total={}", mib << 20)]);
    command.args(["-t", "writeback", "--image-opts"]);
    for number in 0..requests {
        command.args(["-c", &format!("{what} -q {} {bytes}", number * bytes)]);
    }
    command.args(["-c", "aio_flush"]).arg(format!(
        "driver=throttle,throttle-group=brake,file.driver=file,file.filename={}",
        file.display()
    ));
    let output = command.output().context("running qemu-io")?;
    ensure!(output.status.success(), "qemu-io: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// QEMU's major version, if it is here.
fn version() -> Option<u32> {
    on_path(PROGRAM)?;
    let output = Command::new(PROGRAM).arg("--version").output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.split("version ").nth(1)?.split('.').next()?.parse().ok()
}

/// The command that starts the machine with the hypervisor and its image disk. The guest console is QEMU's
/// standard input and output.
pub(crate) fn command(machine: &Machine, hypervisor: &Path, disk: &Path) -> Command {
    let mut command = Command::new(PROGRAM);
    // In QEMU's options a comma ends a value, two are one.
    let name = |path: &Path| path.display().to_string().replace(',', ",,");
    let mux = if machine.terminal { ",mux=on" } else { "" };
    // One counter frequency on every model, or instructions cannot be compared.
    let cpu = if machine.icount { format!("{},cntfrq=1000000000", machine.cpu) } else { machine.cpu.clone() };
    command
        .args(["-M", "virt,virtualization=on,gic-version=3", "-cpu", &cpu])
        .args(["-smp", &machine.cpus.to_string(), "-m", &format!("{}M", machine.memory_mib)])
        .args(["-nodefaults", "-nographic", "-no-reboot", "-global", "virtio-mmio.force-legacy=false"])
        .args(["-semihosting-config", "enable=on,target=native"])
        .args(["-chardev", &format!("stdio,id=console,signal=off{mux}"), "-serial", "chardev:console"])
        .arg("-serial")
        .arg(format!("file:{}", machine.log.display()))
        .arg("-kernel")
        .arg(hypervisor);
    let images = match &machine.errors {
        None => format!("file={}", name(disk)),
        Some(errors) => {
            command.args(["-trace", "virtio_blk_req_complete", "-D"]).arg(&errors.log);
            let (rules, disk) = (name(&errors.rules), name(disk));
            format!(
                "file.driver=blkdebug,file.config={rules},file.image.driver=file,file.image.filename={disk}"
            )
        }
    };
    let rate = machine.rate.map_or_else(String::new, |mib| format!(",throttling.bps-total={}", mib << 20));
    command.args(["-drive", &format!("if=none,id=images,format=raw{rate},{images}")]);
    // Merged requests fail together; errors are counted one by one.
    let merging = if machine.errors.is_some() { "off" } else { "on" };
    command.args(["-device", &format!("virtio-blk-device,drive=images,request-merging={merging}")]);
    let numbered = |stem: &'static str, drives: &[Drive]| -> Vec<(String, Drive)> {
        drives.iter().enumerate().map(|(number, drive)| (format!("{stem}{number}"), drive.clone())).collect()
    };
    let all = [
        numbered(hv_abi::manifest::DISK_ID, &machine.disks),
        numbered(hv_abi::manifest::SWAP_DISK_ID, &machine.swap),
        numbered(hv_abi::manifest::IMAGE_DISK_ID, &machine.images),
    ];
    for (id, drive) in all.into_iter().flatten() {
        let file = name(&drive.file);
        let brake = drive.rate.map_or_else(String::new, |rate| format!(",throttling.bps-read={rate}"));
        let what = match &drive.log {
            Some(log) => format!(
                "driver=blklogwrites,file.driver=file,file.filename={file},log.driver=file,log.filename={},\
                 log-super-update-interval=1",
                name(log)
            ),
            None if drive.read_only => format!("format=raw,readonly=on{brake},file={file}"),
            None => match drive.stalls {
                Some(Stall::Write) => format!("format=raw,throttling.bps-write=1,file={file}"),
                // Its table can be read before.
                Some(Stall::Read) => {
                    format!("format=raw,throttling.bps-read=1,throttling.bps-read-max=1048576,file={file}")
                }
                None => format!("format=raw{brake},file={file}"),
            },
        };
        command
            .args(["-drive", &format!("if=none,id={id},{what}")])
            .args(["-device", &format!("virtio-blk-device,drive={id},serial={id}")]);
    }
    if !machine.append.is_empty() {
        command.args(["-append", &machine.append]);
    }
    if machine.icount {
        command.args(["-icount", "shift=0,sleep=off"]);
    }
    if let Some(socket) = &machine.socket {
        command.arg("-chardev").arg(format!("socket,id=control,server=on,wait=off,path={}", name(socket)));
        // Not a virtconsole: QEMU throws away what its socket does not take at once.
        command.args(["-device", "virtio-serial-device", "-device", "virtserialport,nr=1,chardev=control"]);
    }
    if let Some(trace) = &machine.trace {
        let of: Vec<String> =
            trace.of.iter().map(|(first, bytes)| format!("{first:#x}+{bytes:#x}")).collect();
        command.args(["-accel", "tcg,one-insn-per-tb=on", "-d", "exec,nochain", "-dfilter", &of.join(",")]);
        command.arg("-D").arg(&trace.pipe);
    }
    if let Some(port) = machine.gdb {
        command.args(["-S", "-gdb", &format!("tcp:127.0.0.1:{port}")]);
    }
    command
}
