//! `cargo xtask run`: the hypervisor and one Linux guest, attached to this terminal or watched.

use crate::disk::{Disk, Guest};
use crate::qemu::{self, Machine};
use crate::session::Session;
use crate::symbols::Log;
use crate::toolchain::Toolchain;
use crate::{apt, build, images};
use anyhow::{Context, Result, bail, ensure};
use clap::{Args, Parser};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Options of `run`.
#[derive(Args, Clone, Debug)]
pub(crate) struct Run {
    /// Kernel: arm64 Image (plain or gzip), ELF, flat binary; or a Debian version such as 6.1
    #[arg(long)]
    pub(crate) kernel: Option<PathBuf>,
    /// Program for flash bank 0, entered at 0
    #[arg(long, conflicts_with = "kernel")]
    pub(crate) bios: Option<PathBuf>,
    /// Initial RAM disk
    #[arg(long)]
    pub(crate) initrd: Option<PathBuf>,
    /// The guest's command line, after what the console needs
    #[arg(long, default_value = "")]
    pub(crate) append: String,
    /// Guest RAM
    #[arg(long, default_value = "256M", value_parser = size_mib)]
    pub(crate) memory: u64,
    /// vCPUs of the guest
    #[arg(long, default_value_t = 1)]
    pub(crate) vcpus: u32,
    /// How many such guests
    #[arg(long, default_value_t = 1)]
    pub(crate) guests: u32,
    /// Host RAM
    #[arg(long, default_value = "1G", value_parser = size_mib)]
    pub(crate) host_memory: u64,
    /// Host CPUs
    #[arg(long, default_value_t = 2)]
    pub(crate) host_cpus: u32,
    /// CPU model
    #[arg(long, default_value = "neoverse-n1")]
    pub(crate) cpu: String,
    /// Deterministic time: count instructions
    #[arg(long)]
    pub(crate) icount: bool,
    /// No terminal: the guest's console to standard output; ends when the guest powers off
    #[arg(long)]
    pub(crate) batch: bool,
    /// Succeed when the guest prints this
    #[arg(long, value_name = "TEXT")]
    pub(crate) until: Option<String>,
    /// Fail after this many seconds (batch and until; 0 is never)
    #[arg(long, default_value_t = 600)]
    pub(crate) timeout: u64,
    /// Lines `wait "text"` and `send "text"` to act out, one a line; anything else is a monitor command
    #[arg(long)]
    pub(crate) script: Option<PathBuf>,
    /// Control socket
    #[arg(long)]
    pub(crate) socket: Option<PathBuf>,
    /// The hypervisor's own command line, for tests: `selftest=NAME`
    #[arg(long, default_value = "", hide = true)]
    pub(crate) host_append: String,
    /// Wait for gdb on this port
    #[arg(skip)]
    pub(crate) gdb: Option<u16>,
}

/// `256M`, `1G`, or a plain number of MiB.
fn size_mib(text: &str) -> Result<u64, String> {
    let wrong = || format!("'{text}' is not a size; write 256M or 1G");
    let (digits, unit) = match text.strip_suffix(['G', 'g']) {
        Some(digits) => (digits, 1024),
        None => (text.strip_suffix(['M', 'm']).unwrap_or(text), 1),
    };
    let number: u64 = digits.parse().map_err(|_| wrong())?;
    number.checked_mul(unit).filter(|mib| (1..=1 << 20).contains(mib)).ok_or_else(wrong)
}

/// Where a control socket is unless it is said otherwise.
pub(crate) fn default_socket() -> PathBuf {
    crate::root().join("target/run/control")
}

/// `Run` as a command of its own, for those who write its options as words.
#[derive(Parser)]
struct Words {
    #[command(flatten)]
    run: Run,
}

impl Run {
    /// The options that a person would have typed as these words.
    pub(crate) fn from_words(words: &[&str]) -> Result<Self> {
        Ok(Words::try_parse_from(std::iter::once("run").chain(words.iter().copied()))?.run)
    }

    /// The disk that these options describe.
    pub(crate) fn disk(&self, toolchain: &Toolchain) -> Result<Disk> {
        let mut disk = Disk::default();
        disk.stays = self.script.is_some() && !self.batch;
        let mut kernel = None;
        let mut bios = None;
        let mut initrd = None;
        let mut linux = false;
        if let Some(file) = &self.bios {
            bios = Some(disk.add("bios", read(file)?));
        } else if let Some(file) = self.kernel.as_ref().filter(|k| !is_version(k)) {
            kernel = Some(disk.add("kernel", images::plain_image(file)?));
            linux = self.initrd.is_some();
        } else if apt::can_download() {
            let version =
                self.kernel.as_ref().map_or(images::KERNELS[0].to_owned(), |k| k.display().to_string());
            kernel = Some(disk.add("kernel", std::fs::read(images::kernel(&version)?)?));
            linux = true;
        } else {
            eprintln!(
                "xtask: apt is not here, so there is no Debian kernel: running the tiny guest `hello` instead (--kernel FILE boots yours)"
            );
            kernel = Some(disk.add("kernel", build::guest(toolchain, "hello")?));
        }
        if let Some(file) = &self.initrd {
            initrd = Some(disk.add("initrd", read(file)?));
        } else if linux {
            initrd = Some(disk.add("initrd", std::fs::read(images::initramfs()?)?));
        }
        for number in 0..self.guests {
            let name = if self.guests == 1 { "guest".to_owned() } else { format!("guest{number}") };
            let append = if linux {
                format!("console=ttyAMA0 guest.name={name} {}", self.append)
            } else {
                self.append.clone()
            };
            disk.guests.push(Guest {
                name,
                kernel: kernel.clone(),
                initrd: initrd.clone(),
                bios: bios.clone(),
                append: append.trim().to_owned(),
                memory_mib: self.memory,
                vcpus: self.vcpus,
            });
        }
        Ok(disk)
    }

    fn machine(&self, dir: &Path) -> Machine {
        Machine {
            cpu: self.cpu.clone(),
            cpus: self.host_cpus,
            memory_mib: self.host_memory,
            icount: self.icount,
            append: self.host_append.clone(),
            log: dir.join("hv.log"),
            socket: self.socket.clone(),
            gdb: self.gdb,
        }
    }

    /// Builds everything; the command that starts `machine`, its files in `dir`, and what it will say.
    fn prepare(&self, machine: &Machine, dir: &Path) -> Result<(Command, Log)> {
        std::fs::create_dir_all(dir)?;
        qemu::provide()?;
        let toolchain = Toolchain::provide()?;
        let hypervisor = build::hypervisor(&toolchain)?;
        let disk = dir.join("images.img");
        self.disk(&toolchain)?.write(&disk)?;
        let command = qemu::command(machine, &hypervisor, &disk);
        Ok((command, Log { file: machine.log.clone(), elf: hypervisor }))
    }

    /// Builds everything and starts a watched machine, its files in `dir`.
    pub(crate) fn session(&self, dir: &Path, echo: bool) -> Result<Session> {
        let (command, log) = self.prepare(&self.machine(dir), dir)?;
        let limit = if self.timeout == 0 { u64::from(u32::MAX) } else { self.timeout };
        Session::start(command, log, &dir.join("console.log"), Duration::from_secs(limit), echo)
    }

    /// Does what was asked.
    pub(crate) fn run(&self) -> Result<()> {
        let dir = crate::root().join("target/run");
        if self.batch || self.until.is_some() || self.script.is_some() {
            return self.watched(&dir);
        }
        let mut machine = self.machine(&dir);
        machine.socket.get_or_insert_with(default_socket);
        let (mut command, log) = self.prepare(&machine, &dir)?;
        eprintln!(
            "xtask: starting; `poweroff -f` in the guest ends it; the hypervisor's log is target/run/hv.log"
        );
        let status = command.status().context("starting QEMU")?;
        ensure!(
            status.success(),
            "the hypervisor did not end well ({status}); its log is {}\n{}",
            log.file.display(),
            log.panic().unwrap_or_default()
        );
        Ok(())
    }

    fn watched(&self, dir: &Path) -> Result<()> {
        let mut options = self.clone();
        if self.script.is_some() {
            options.socket.get_or_insert_with(default_socket);
        }
        let mut session = options.session(dir, true)?;
        if let Some(script) = &self.script {
            let text =
                std::fs::read_to_string(script).with_context(|| format!("reading {}", script.display()))?;
            for (number, line) in text.lines().enumerate() {
                let line = line.trim();
                act(&mut session, line, options.socket.as_deref())
                    .with_context(|| format!("{} line {}: {line}", script.display(), number + 1))?;
            }
            if !self.batch && self.until.is_none() && !text.lines().any(|line| line.trim() == "shutdown") {
                act(&mut session, "shutdown", options.socket.as_deref())?;
            }
        }
        match &self.until {
            Some(text) => session.wait(text).map(|_| ()),
            None => session.finish(),
        }
    }
}

fn read(file: &Path) -> Result<Vec<u8>> {
    std::fs::read(file).with_context(|| format!("reading {}", file.display()))
}

fn is_version(kernel: &Path) -> bool {
    images::KERNELS.iter().any(|version| Path::new(version) == kernel)
}

/// Acts out one line of a script.
fn act(session: &mut Session, line: &str, socket: Option<&Path>) -> Result<()> {
    let quoted = |rest: &str| rest.trim().trim_matches('"').replace("\\n", "\n");
    if line.is_empty() || line.starts_with('#') {
        return Ok(());
    }
    // With a guest's name behind it, either is a command of the monitor.
    if let Some(rest) = line.strip_prefix("wait ").filter(|rest| rest.trim().starts_with('"')) {
        return session.wait(&quoted(rest)).map(|_| ());
    }
    if let Some(rest) = line.strip_prefix("send ").filter(|rest| rest.trim().starts_with('"')) {
        return session.send(&format!("{}\n", quoted(rest)));
    }
    let reply = crate::ctl::ask(socket.unwrap_or(&default_socket()), line)?;
    println!("{}", crate::ctl::shown(&reply));
    if reply.get("ok").and_then(serde_json::Value::as_bool) != Some(true) {
        bail!("the monitor refused");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        assert_eq!(size_mib("256M"), Ok(256));
        assert_eq!(size_mib("2G"), Ok(2048));
        assert_eq!(size_mib("64"), Ok(64));
        assert!(size_mib("0").is_err());
        assert!(size_mib("lots").is_err());
    }
}
