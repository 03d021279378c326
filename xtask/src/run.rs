//! `cargo xtask run`: the hypervisor and one Linux guest, attached to this terminal or watched.

use crate::disk::{Disk, Guest};
use crate::ending::{Kept, Terminal};
use crate::errors::Places;
use crate::options::{self, SwapOn, Writes};
use crate::qemu::{self, Drive, Errors, Machine, Stall};
use crate::script::{self, Script};
use crate::session::{Prepared, Session};
use crate::symbols::Log;
use crate::toolchain::Toolchain;
use crate::{apt, build, images, stored};
use anyhow::{Context, Result, anyhow, bail, ensure};
use clap::builder::NonEmptyStringValueParser;
use clap::{Args, Parser, value_parser};
use hv_abi::machine::MAX_VCPUS;
use hv_abi::manifest::{APPEND_LIMIT, DISK_PATIENCE_LIMIT, GUESTS_LIMIT};
use std::fs::{File, TryLockError};
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Options of `run`.
#[derive(Args, Clone, Debug)]
pub(crate) struct Run {
    /// Kernel: arm64 Image (plain or gzip), ELF, flat binary; or a Debian version such as 6.1
    #[arg(long, value_parser = kernel)]
    pub(crate) kernel: Option<PathBuf>,
    /// Program for flash bank 0, entered at 0
    #[arg(long, conflicts_with_all = ["kernel", "initrd"], value_parser = options::file)]
    pub(crate) bios: Option<PathBuf>,
    /// Initial RAM disk
    #[arg(long, value_parser = options::file)]
    pub(crate) initrd: Option<PathBuf>,
    /// The guest's command line, after what the console needs
    #[arg(long, default_value = "")]
    pub(crate) append: String,
    /// Another image on the disk, for the monitor's `create kernel=NAME`; may be repeated
    #[arg(long, value_name = "NAME=FILE", value_parser = options::named_image)]
    pub(crate) with: Vec<(String, PathBuf)>,
    /// Guest RAM
    #[arg(long, default_value = "256M", value_name = "SIZE", value_parser = options::guest_memory_mib)]
    pub(crate) memory: u64,
    /// vCPUs of the guest
    #[arg(long, default_value_t = 1, value_parser = value_parser!(u32).range(1..=MAX_VCPUS as i64))]
    pub(crate) vcpus: u32,
    /// How many such guests
    #[arg(long, default_value_t = 1, value_parser = value_parser!(u32).range(1..=GUESTS_LIMIT as i64))]
    pub(crate) guests: u32,
    /// Host RAM
    #[arg(long, default_value = "1G", value_name = "SIZE", value_parser = options::size_mib)]
    pub(crate) host_memory: u64,
    /// Host CPUs
    #[arg(long, default_value_t = 2, value_parser = value_parser!(u32).range(1..=512))]
    pub(crate) host_cpus: u32,
    /// A disk of the guest, any number of them; writes go to the file, are refused (ro) or end with it (private)
    #[arg(long = "disk", value_name = "FILE[,ro|private]", value_parser = options::disk)]
    pub(crate) disks: Vec<options::DiskFile>,
    /// Room to swap guests' pages to: of the run's own disk, or a file (all of it, or the swap partitions on it), which is
    /// overwritten; may be repeated; higher priorities are used first, equal ones in turn
    #[arg(long, value_name = "SIZE|FILE[,priority=N]", value_parser = options::swap)]
    pub(crate) swap: Vec<options::SwapPlace>,
    /// At how many places of the swap room the disk fails, for tests: READ,WRITE once and READ,WRITE for ever
    #[arg(long, hide = true, requires = "swap", value_parser = Places::parse)]
    pub(crate) swap_errors: Option<Places>,
    /// What the files with swap room do once and no more, for tests
    #[arg(long, hide = true, requires = "swap", value_enum)]
    pub(crate) swap_stall: Option<Stall>,
    /// How many seconds the hypervisor waits for a disk that has requests and ends none, before it gives it up (0 is
    /// for ever; without it 120)
    #[arg(long, value_name = "SECONDS", value_parser = value_parser!(u64).range(..=DISK_PATIENCE_LIMIT))]
    pub(crate) disk_patience: Option<u64>,
    /// How many MiB a second the disk with the swap room does, for tests
    #[arg(long, hide = true, value_parser = value_parser!(u64).range(1..=1 << 20))]
    pub(crate) swap_rate: Option<u64>,
    /// How many bytes of the guests' disks are read in a second, for tests
    #[arg(long, hide = true, requires = "disks", value_parser = value_parser!(u64).range(1..=1 << 40))]
    pub(crate) disk_rate: Option<u64>,
    /// How much memory guests may be promised: what is there, so many times that, or any
    #[arg(long, value_name = "strict|RATIO|none", value_parser = options::overcommit)]
    pub(crate) overcommit: Option<options::Overcommit>,
    /// How many children the guest may fork of itself
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u32).range(..=i64::from(hv_abi::manifest::FORK_LIMIT)))]
    pub(crate) grant_fork: u32,
    /// A disk with a stored guest, which goes on; or for the monitor only (attach), or made for `save` (new); may be
    /// repeated
    #[arg(long = "image", value_name = "FILE[,ro|attach|new] or nbd:EXPORT or rbd:POOL/IMAGE", value_parser = stored::image)]
    pub(crate) images: Vec<stored::ImageDisk>,
    /// Where everything that is written to the first of them is logged, for tests
    #[arg(long, hide = true, requires = "images")]
    pub(crate) image_log: Option<PathBuf>,
    /// They take one write and no more, for tests
    #[arg(long, hide = true, requires = "images")]
    pub(crate) images_stall: bool,
    /// CPU model
    #[arg(long, default_value = "neoverse-n1", value_parser = NonEmptyStringValueParser::new())]
    pub(crate) cpu: String,
    /// Deterministic time: count instructions
    #[arg(long)]
    pub(crate) icount: bool,
    /// No terminal: the guest's console to standard output; ends when the guest powers off
    #[arg(long)]
    pub(crate) batch: bool,
    /// Succeed when the guest prints this
    #[arg(long, value_name = "TEXT", value_parser = NonEmptyStringValueParser::new())]
    pub(crate) until: Option<String>,
    /// Fail after this many seconds (batch and until; 0 is never)
    #[arg(long, default_value_t = 600, value_parser = value_parser!(u64).range(..=u64::from(u32::MAX)))]
    pub(crate) timeout: u64,
    /// Lines `wait "text"` and `send "text"` to act out, one a line; anything else is a monitor command
    #[arg(long, value_parser = options::file)]
    pub(crate) script: Option<PathBuf>,
    /// Control socket [default: target/run/control]
    #[arg(long, value_parser = options::socket)]
    pub(crate) socket: Option<PathBuf>,
    /// Where the run's files go, such as the hypervisor's log: two runs at once want two
    #[arg(long, default_value_os_t = default_dir())]
    pub(crate) dir: PathBuf,
    /// The hypervisor's own command line, for tests: `selftest=NAME`
    #[arg(long, default_value = "", hide = true)]
    pub(crate) host_append: String,
    /// Wait for gdb on this port
    #[arg(skip)]
    pub(crate) gdb: Option<u16>,
    /// Tell every instruction
    #[arg(skip)]
    pub(crate) trace: Option<qemu::Trace>,
}

/// A Debian version that we know, or a file.
fn kernel(text: &str) -> Result<PathBuf, String> {
    if is_version(Path::new(text)) {
        return Ok(text.into());
    }
    options::file(text)
        .map_err(|why| format!("{why}, and Debian's versions are {}", images::KERNELS.join(", ")))
}

fn default_dir() -> PathBuf {
    crate::root().join("target/run")
}

/// Where a control socket is unless it is said otherwise.
pub(crate) fn default_socket() -> PathBuf {
    default_dir().join(SOCKET)
}

/// The control socket's name in the run's folder.
const SOCKET: &str = "control";

/// `Run` as a command of its own, for those who write its options as words.
#[derive(Parser)]
struct Words {
    #[command(flatten)]
    run: Run,
}

/// A time limit that a program wrote down is for a calm machine; a busy one gets so many times that.
const PATIENCE: u64 = 4;

impl Run {
    /// The options that a person would have typed as these words, for a program; its `--timeout` is stretched.
    pub(crate) fn from_words(words: &[&str]) -> Result<Self> {
        let mut run = Words::try_parse_from(std::iter::once("run").chain(words.iter().copied()))?.run;
        run.timeout = run.timeout.saturating_mul(PATIENCE).min(u64::from(u32::MAX));
        Ok(run)
    }

    /// The disk that these options describe.
    pub(crate) fn disk(&self, toolchain: &Toolchain) -> Result<Disk> {
        let mut disk = Disk::default();
        disk.stays = self.stays();
        disk.swap.clone_from(&self.swap);
        // Counted time passes at a blink while all wait for a disk, which takes its own.
        disk.patience = self.disk_patience.or(self.icount.then_some(0));
        disk.overcommit = self.overcommit.and_then(options::Overcommit::percent);
        disk.stored = self.images.iter().map(|image| (image.name.clone(), image.resumes())).collect();
        if self.images.iter().any(stored::ImageDisk::resumes) {
            let asked = self.kernel.is_some() || self.bios.is_some() || !self.disks.is_empty();
            ensure!(
                !asked,
                "--image resumes a stored guest, which has its kernel and disks; add ,attach to boot another beside it"
            );
            return Ok(disk);
        }
        let mut kernel = None;
        let mut bios = None;
        let mut initrd = None;
        let mut linux = false;
        let mut version = None;
        if let Some(file) = &self.bios {
            bios = Some(disk.add("bios", read(file)?));
        } else if let Some(file) = self.kernel.as_ref().filter(|k| !is_version(k)) {
            kernel = Some(disk.add("kernel", images::plain_image(file)?));
            linux = self.initrd.is_some();
        } else if apt::can_download() {
            let debian =
                self.kernel.as_ref().map_or(images::KERNELS[0].to_owned(), |k| k.display().to_string());
            kernel = Some(disk.add("kernel", std::fs::read(images::kernel(&debian)?)?));
            linux = true;
            version = Some(debian);
        } else {
            eprintln!(
                "xtask: apt is not here, so there is no Debian kernel: running the tiny guest `hello` instead (--kernel FILE boots yours)"
            );
            kernel = Some(disk.add("kernel", build::guest(toolchain, "hello")?));
        }
        if let Some(file) = &self.initrd {
            initrd = Some(disk.add("initrd", read(file)?));
        } else if linux {
            let mut root = std::fs::read(images::initramfs(toolchain)?)?;
            if let Some(version) = version {
                root.extend(images::drivers(&version)?);
            }
            initrd = Some(disk.add("initrd", root));
        }
        for (name, file) in &self.with {
            ensure!(!disk.has(name), "there is an image '{name}' already");
            disk.add(name, images::plain_image(file)?);
        }
        for number in 0..self.guests {
            let name = if self.guests == 1 { "guest".to_owned() } else { format!("guest{number}") };
            let append = if linux {
                format!("console=ttyAMA0 guest.name={name} {}", self.append)
            } else {
                self.append.clone()
            };
            ensure!(
                append.len() <= APPEND_LIMIT,
                "--append makes a command line of {} bytes; {APPEND_LIMIT} fit",
                append.len()
            );
            disk.guests.push(Guest {
                name,
                kernel: kernel.clone(),
                initrd: initrd.clone(),
                bios: bios.clone(),
                append: append.trim().to_owned(),
                memory_mib: self.memory,
                vcpus: self.vcpus,
                grant_fork: self.grant_fork,
                disks: self.disks.iter().map(|disk| disk.writes.word()).collect(),
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
            terminal: !(self.batch || self.until.is_some() || self.script.is_some())
                && std::io::stdin().is_terminal(),
            log: dir.join("hv.log"),
            socket: self.socket.clone(),
            disks: self
                .disks
                .iter()
                .map(|disk| Drive {
                    file: disk.file.clone(),
                    read_only: disk.writes != Writes::Persist,
                    log: None,
                    stalls: None,
                    rate: self.disk_rate,
                })
                .collect(),
            swap: self
                .swap
                .iter()
                .filter_map(|place| match &place.on {
                    SwapOn::File(file) => Some(Drive {
                        file: file.clone(),
                        read_only: false,
                        log: None,
                        stalls: self.swap_stall,
                        rate: None,
                    }),
                    SwapOn::Own(_) => None,
                })
                .collect(),
            images: self
                .images
                .iter()
                .enumerate()
                .map(|(number, image)| Drive {
                    file: image.file.clone(),
                    read_only: image.how == stored::Use::ResumeOnly,
                    log: self.image_log.clone().filter(|_| number == 0),
                    stalls: self.images_stall.then_some(Stall::Write),
                    rate: None,
                })
                .collect(),
            errors: self
                .swap_errors
                .is_some()
                .then(|| Errors { rules: dir.join("errors.conf"), log: dir.join("requests.log") }),
            rate: self.swap_rate,
            gdb: self.gdb,
            trace: self.trace.clone(),
        }
    }

    /// Builds everything; what starts `machine`, its files in `dir`.
    fn prepare(&self, machine: &Machine, dir: &Path) -> Result<Prepared> {
        stored::check_images(&self.images)?;
        options::check_disks(&self.disks, self.guests)?;
        let disks = self.disks.iter().map(|disk| ("--disk", disk.file.as_path()));
        let images = self.images.iter().map(|image| ("--image", image.file.as_path()));
        let kernel = self.kernel.iter().map(|file| ("--kernel", file.as_path()));
        let initrd = self.initrd.iter().map(|file| ("--initrd", file.as_path()));
        options::check_swap(&self.swap, disks.chain(images).chain(kernel).chain(initrd))?;
        let lock = reserve(dir)?;
        // A log that is there belongs to this run.
        let _ = std::fs::remove_file(&machine.log);
        qemu::provide()?;
        let toolchain = Toolchain::provide()?;
        let hypervisor = build::hypervisor(&toolchain)?;
        let disks: u64 = self
            .disks
            .iter()
            .filter_map(|disk| std::fs::metadata(&disk.file).ok())
            .map(|file| file.len())
            .sum();
        for image in &self.images {
            image.provide(self.memory + disks.div_ceil(1 << 20))?;
        }
        if let Some(log) = &self.image_log {
            File::create(log).with_context(|| format!("creating {}", log.display()))?;
        }
        let disk = dir.join("images.img");
        let swap = self.disk(&toolchain)?.write(&disk)?;
        if let (Some(places), Some(errors), Some(swap)) = (self.swap_errors, &machine.errors, swap) {
            places.write(&errors.rules, swap)?;
        }
        let command = qemu::command(machine, &hypervisor, &disk);
        Ok(Prepared { command, log: Log { file: machine.log.clone(), elf: hypervisor }, lock })
    }

    /// Builds everything and starts a watched machine, its files in `dir`.
    pub(crate) fn session(&self, dir: &Path, echo: bool) -> Result<Session> {
        let prepared = self.prepare(&self.machine(dir), dir)?;
        let limit = if self.timeout == 0 { u64::from(u32::MAX) } else { self.timeout };
        Session::start(prepared, &dir.join("console.log"), Duration::from_secs(limit), echo)
    }

    /// Does what was asked.
    pub(crate) fn run(mut self) -> Result<()> {
        if self.socket.is_none() {
            let socket = self.dir.join(SOCKET);
            let socket = options::socket(&socket.to_string_lossy())
                .map_err(|why| anyhow!("{}: {why}; give a --socket", socket.display()))?;
            self.socket = Some(socket);
        }
        if self.batch || self.until.is_some() || self.script.is_some() {
            return self.watched();
        }
        let Prepared { mut command, log, lock: _lock } = self.prepare(&self.machine(&self.dir), &self.dir)?;
        let terminal = Terminal::lend();
        if terminal.is_some() {
            eprintln!(
                "xtask: starting; Ctrl-T opens the monitor, Ctrl-A x leaves at once, `poweroff -f` in the guest in good order"
            );
        }
        let status = Kept::start(&mut command)?.wait()?;
        drop(terminal);
        ensure!(status.success(), "the hypervisor did not end well ({status})\n{}", log.told());
        eprintln!("xtask: the hypervisor's log is {}", log.file.display());
        Ok(())
    }

    fn watched(&self) -> Result<()> {
        let script = self.script.as_deref().map(Script::read).transpose()?;
        let mut session = self.session(&self.dir, true)?;
        if let Some(script) = script {
            let default = default_socket();
            let socket = self.socket.as_deref().unwrap_or(&default);
            script.play(&mut session, socket)?;
            if self.stays() && self.until.is_none() && !script.leaves() {
                script::shut_down(&mut session, socket)?;
            }
        }
        match &self.until {
            Some(text) => session.wait(text).map(|_| ()),
            None => session.finish(),
        }
    }

    /// True where the machine waits for the monitor's word when its last guest has ended.
    fn stays(&self) -> bool {
        self.script.is_some() && !self.batch
    }
}

/// Makes a run's folder, for one run at a time.
fn reserve(dir: &Path) -> Result<File> {
    std::fs::create_dir_all(dir).with_context(|| format!("creating {}", dir.display()))?;
    let path = dir.join("lock");
    let lock = File::create(&path).with_context(|| format!("creating {}", path.display()))?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(TryLockError::WouldBlock) => {
            bail!("another run has its files in {}; give this one --dir FOLDER", dir.display())
        }
        Err(TryLockError::Error(why)) => Err(why).with_context(|| format!("locking {}", path.display())),
    }
}

fn read(file: &Path) -> Result<Vec<u8>> {
    std::fs::read(file).with_context(|| format!("reading {}", file.display()))
}

fn is_version(kernel: &Path) -> bool {
    images::KERNELS.iter().any(|version| Path::new(version) == kernel)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_that_no_clock_reaches_and_a_text_that_is_none_are_refused() {
        for wrong in [["--timeout", "18446744073709551615"], ["--until", ""], ["--cpu", ""]] {
            assert!(Run::from_words(&wrong).is_err(), "{wrong:?}");
        }
        assert!(Run::from_words(&["--timeout", "4294967295", "--until", "x"]).is_ok());
    }
}
