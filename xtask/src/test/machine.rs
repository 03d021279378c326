//! A machine under test: where its files lie, its bound on time, and its monitor, spoken to over the control port.

use super::trial;
use crate::build;
use crate::ctl;
use crate::run::Run;
use crate::session::Session;
use crate::toolchain::Toolchain;
use anyhow::{Context, Result, bail, ensure};
use libtest_mimic::Trial;
use serde_json::Value;
use std::fs;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::thread::sleep;
use std::time::{Duration, Instant};

/// How long is waited between two looks at something that changes by itself.
const PAUSE: Duration = Duration::from_millis(100);

/// Where the files and logs of a test's machine are.
pub(super) fn logs(name: &str) -> PathBuf {
    crate::root().join("target/test-logs").join(name.replace("::", "-"))
}

/// A boot test: its logs go when it passes.
pub(super) fn boot(name: impl Into<String>, test: impl FnOnce(&str) -> Result<()> + Send + 'static) -> Trial {
    let name = name.into();
    trial(format!("boot::{name}"), move || {
        let name = name.as_str();
        let result = test(name).with_context(|| format!("logs are in {}", logs(name).display()));
        if result.is_ok() {
            // What stays is only in the way.
            let _ = fs::remove_dir_all(logs(name));
        }
        result
    })
}

/// `run` with these words; the machine's files and logs are kept under the test's name.
pub(super) fn start(name: &str, words: &[&str]) -> Result<Session> {
    Run::from_words(words)?.session(&logs(name), false)
}

/// Builds a tiny guest and puts it beside the logs of a test; the file.
pub(super) fn tiny_guest(test: &str, guest: &str) -> Result<String> {
    let image = build::guest(&Toolchain::provide()?, guest)?;
    let file = logs(test).join(format!("{guest}.bin"));
    fs::create_dir_all(logs(test))?;
    fs::write(&file, image)?;
    Ok(file.display().to_string())
}

/// A machine whose monitor is asked over the control port.
pub(super) struct Monitored {
    /// Its console.
    pub(super) console: Session,
    socket: PathBuf,
    deadline: Instant,
}

impl Monitored {
    /// `run` with these words, which say a time limit; waits until the monitor answers.
    pub(super) fn start(name: &str, words: &[&str]) -> Result<Self> {
        let mut options = Run::from_words(words)?;
        // A socket's path has 108 bytes at most, less than the names of tests and folders may need.
        let socket = std::env::temp_dir().join(format!("hv-test-{}", std::process::id()));
        options.socket = Some(socket.clone());
        // That of the last test.
        let _ = fs::remove_file(&socket);
        let deadline = Instant::now() + Duration::from_secs(options.timeout);
        let console = options.session(&logs(name), false)?;
        let mut machine = Self { console, socket, deadline };
        while UnixStream::connect(&machine.socket).is_err() {
            machine.rest("QEMU to open the control port")?;
        }
        machine.ask("guests")?;
        Ok(machine)
    }

    /// The value that the monitor answers; a refusal is an error.
    pub(super) fn ask(&mut self, command: &str) -> Result<Value> {
        let reply = self.reply(command)?;
        ensure!(ctl::is_ok(&reply), "{command}: {}", ctl::shown(&reply));
        reply.get("reply").cloned().with_context(|| format!("{command}: no reply in {reply}"))
    }

    /// The words with which the monitor refuses; anything else is an error.
    pub(super) fn refused(&mut self, command: &str) -> Result<String> {
        let reply = self.reply(command)?;
        ensure!(!ctl::is_ok(&reply), "{command} was done: {}", ctl::shown(&reply));
        Ok(text(&reply, "/reply/error")?.to_owned())
    }

    fn reply(&mut self, command: &str) -> Result<Value> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        ensure!(!left.is_zero(), "no time left for {command}");
        ctl::ask(&self.socket, command, left)
            .with_context(|| format!("asking \"{command}\"\n{}", self.console.tail()))
    }

    /// Waits a little for something.
    fn rest(&mut self, what: &str) -> Result<()> {
        ensure!(Instant::now() < self.deadline, "waited for {what} in vain\n{}", self.console.tail());
        sleep(PAUSE);
        Ok(())
    }

    /// The row that `guests` has for one.
    pub(super) fn guest(&mut self, name: &str) -> Result<Value> {
        let guests = self.ask("guests")?;
        let row = rows(&guests)?.iter().find(|row| row["name"] == name).cloned();
        row.with_context(|| format!("guests does not list {name}: {guests}"))
    }

    /// Audits the machine.
    pub(super) fn check(&mut self) -> Result<Value> {
        let audit = self.ask("check")?;
        ensure!(audit["clean"] == true, "check: {audit}");
        Ok(audit)
    }

    /// The answer to `memory` once nothing is left of those who went: every resident page is a guest's that is in
    /// the list. Those must stand still.
    pub(super) fn settled(&mut self) -> Result<Value> {
        loop {
            let (guests, memory) = (self.ask("guests")?, self.ask("memory")?);
            let private = total(&guests, "private_pages")?;
            if number(&memory, "/owners/guests_private")? == private {
                let count = |place| number(&memory, place);
                let known =
                    count("/frames/free")? + count("/frames/tables")? + count("/owners/guests_resident")?;
                ensure!(known == count("/frames/total")?, "frames are missing: {memory}");
                return Ok(memory);
            }
            self.rest(&format!("memory to come back: guests hold {private} pages; {memory}"))?;
        }
    }

    /// Kills everybody; the machine must end well.
    pub(super) fn shutdown(mut self) -> Result<()> {
        self.ask("shutdown")?;
        self.console.finish()
    }
}

impl Drop for Monitored {
    fn drop(&mut self) {
        // QEMU may have taken it away itself.
        let _ = fs::remove_file(&self.socket);
    }
}

/// The rows of a table.
pub(super) fn rows(value: &Value) -> Result<&[Value]> {
    value.as_array().map(Vec::as_slice).with_context(|| format!("not a table: {value}"))
}

/// The number at a place such as `/frames/free`.
pub(super) fn number(value: &Value, place: &str) -> Result<u64> {
    value.pointer(place).and_then(Value::as_u64).with_context(|| format!("no number {place} in {value}"))
}

/// The text at a place.
pub(super) fn text<'v>(value: &'v Value, place: &str) -> Result<&'v str> {
    value.pointer(place).and_then(Value::as_str).with_context(|| format!("no text {place} in {value}"))
}

/// The sum of a column.
pub(super) fn total(table: &Value, column: &str) -> Result<u64> {
    rows(table)?.iter().map(|row| number(row, &format!("/{column}"))).sum()
}

/// Each of these is a key of `value`.
pub(super) fn has_keys(value: &Value, keys: &[&str]) -> Result<()> {
    let missing: Vec<&&str> = keys.iter().filter(|key| value.get(**key).is_none()).collect();
    if !missing.is_empty() {
        bail!("{missing:?} are not in {value}");
    }
    Ok(())
}
