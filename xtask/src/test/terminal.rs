//! `run` at a terminal, as a person has it: a pseudo-terminal whose other end is this test.

use crate::images;
use anyhow::{Context, Result, bail, ensure};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Termios, tcgetattr};
use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, Command, ExitStatus};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

/// A way to leave.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    CtrlAX,
    Terminate,
    QemuDies,
}

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(90);
/// How long is waited between two looks.
const PAUSE: Duration = Duration::from_millis(20);

struct Person {
    run: Child,
    keyboard: File,
    slave: File,
    screen: Receiver<Vec<u8>>,
    seen: Vec<u8>,
}

/// Starts U-Boot at a terminal, once types to it and to the monitor, leaves in every way: the terminal must be raw in between and as it was
/// afterwards, and no QEMU may stay.
pub(super) fn is_as_it_was(dir: &Path) -> Result<()> {
    for way in [Way::CtrlAX, Way::Terminate, Way::QemuDies] {
        leave(way, dir).with_context(|| format!("{way:?}"))?;
    }
    Ok(())
}

fn leave(way: Way, dir: &Path) -> Result<()> {
    let mut person = Person::sit_down(dir)?;
    let before = person.modes()?;
    person.see("U-Boot 20")?;
    if way == Way::CtrlAX {
        person.see("Hit any key")?;
        person.keyboard.write_all(b"\r")?;
        person.see("=> ")?;
        person.keyboard.write_all(b"version\r")?;
        person.see("U-Boot 20")?;
        person.keyboard.write_all(b"\x14")?;
        person.see("hv> ")?;
    }
    let raw = person.modes()?;
    ensure!(!raw.local_modes.contains(LocalModes::ICANON), "the terminal waits for whole lines meanwhile");
    let qemu = qemus(dir);
    let [qemu] = qemu.as_slice() else { bail!("not one QEMU runs for {}: {qemu:?}", dir.display()) };
    match way {
        Way::CtrlAX => person.keyboard.write_all(b"\x01x")?,
        Way::Terminate => kill(person.run.id(), "TERM")?,
        Way::QemuDies => kill(*qemu, "KILL")?,
    }
    let status = person.end()?;
    ensure!(status.success() == (way == Way::CtrlAX), "`run` ended with {status}");
    ensure!(same(&person.modes()?, &before), "the terminal is not as it was");
    // Whoever was told to go has not gone yet.
    let start = Instant::now();
    while !qemus(dir).is_empty() {
        ensure!(start.elapsed() < PATIENCE, "QEMU is still there");
        std::thread::sleep(PAUSE);
    }
    Ok(())
}

impl Person {
    fn sit_down(dir: &Path) -> Result<Self> {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY)?;
        grantpt(&master)?;
        unlockpt(&master)?;
        let name = ptsname(&master, Vec::new())?;
        let slave = File::options().read(true).write(true).open(name.to_str()?)?;
        let bios = images::u_boot()?;
        let run = Command::new(std::env::current_exe()?)
            .args(["run", "--bios"])
            .arg(bios)
            .arg("--dir")
            .arg(dir)
            .stdin(slave.try_clone()?)
            .stdout(slave.try_clone()?)
            .stderr(slave.try_clone()?)
            .spawn()?;
        let keyboard = File::from(master);
        let mut reader = keyboard.try_clone()?;
        let (sender, screen) = channel();
        std::thread::spawn(move || {
            let mut buffer = [0; 1024];
            while let Ok(n @ 1..) = reader.read(&mut buffer) {
                if sender.send(buffer.get(..n).unwrap_or_default().to_vec()).is_err() {
                    return;
                }
            }
        });
        Ok(Self { run, keyboard, slave, screen, seen: Vec::new() })
    }

    fn modes(&self) -> Result<Termios> {
        tcgetattr(&self.slave).context("the terminal's settings")
    }

    /// Waits for a text on the screen, after what was waited for before.
    fn see(&mut self, text: &str) -> Result<()> {
        loop {
            if let Some(at) = self.seen.windows(text.len()).position(|w| w == text.as_bytes()) {
                self.seen.drain(..at + text.len());
                return Ok(());
            }
            let more = self.screen.recv_timeout(PATIENCE);
            let more = more.with_context(|| {
                format!("\"{text}\" does not appear:\n{}", String::from_utf8_lossy(&self.seen))
            })?;
            self.seen.extend_from_slice(&more);
        }
    }

    fn end(&mut self) -> Result<ExitStatus> {
        let start = Instant::now();
        while start.elapsed() < PATIENCE {
            if let Some(status) = self.run.try_wait()? {
                return Ok(status);
            }
            std::thread::sleep(PAUSE);
        }
        bail!("`run` does not end")
    }
}

impl Drop for Person {
    fn drop(&mut self) {
        // Of no matter where the test passed.
        let _ = self.run.kill();
        let _ = self.run.wait();
    }
}

fn same(a: &Termios, b: &Termios) -> bool {
    (a.input_modes, a.output_modes, a.control_modes, a.local_modes)
        == (b.input_modes, b.output_modes, b.control_modes, b.local_modes)
}

/// The processes that are a QEMU with its files in `dir`.
fn qemus(dir: &Path) -> Vec<u32> {
    let Ok(processes) = std::fs::read_dir("/proc") else { return Vec::new() };
    let numbers = processes.flatten().filter_map(|p| p.file_name().to_str()?.parse().ok());
    let wanted = |number: &u32| {
        let words = std::fs::read(format!("/proc/{number}/cmdline")).unwrap_or_default();
        let words = String::from_utf8_lossy(&words).into_owned();
        words.starts_with("qemu-system") && words.contains(&*dir.to_string_lossy())
    };
    numbers.filter(wanted).collect()
}

fn kill(process: u32, signal: &str) -> Result<()> {
    let status = Command::new("kill").args(["-s", signal, &process.to_string()]).status()?;
    ensure!(status.success(), "kill -s {signal} {process}: {status}");
    Ok(())
}
