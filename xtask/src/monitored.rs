//! A machine whose monitor is asked over the control port, by tests and demonstrations.

use crate::ctl;
use crate::run::Run;
use crate::session::Session;
use anyhow::{Context, Result, bail, ensure};
use hv_abi::{forkpage, machine};
use serde_json::Value;
use std::fmt::Display;
use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// How long is waited between two looks at something that changes by itself.
const PAUSE: Duration = Duration::from_millis(100);

/// How often the monitor is asked again when it says that it is to be.
const AGAIN: usize = 5;

/// A machine whose monitor is asked over the control port.
pub(crate) struct Monitored {
    /// Its console.
    pub(crate) console: Session,
    socket: PathBuf,
    deadline: Instant,
}

impl Monitored {
    /// `run` with these options, which say a time limit, its files in `dir`; waits until the monitor answers.
    pub(crate) fn start(mut options: Run, dir: &Path) -> Result<Self> {
        // A socket's path has 108 bytes at most, less than the names of tests and folders may need.
        static MACHINES: AtomicU32 = AtomicU32::new(0);
        let number = MACHINES.fetch_add(1, Ordering::Relaxed);
        let socket = std::env::temp_dir().join(format!("hv-test-{}-{number}", std::process::id()));
        options.socket = Some(socket.clone());
        // That of the last test.
        let _ = fs::remove_file(&socket);
        let deadline = Instant::now() + Duration::from_secs(options.timeout);
        let console = options.session(dir, false)?;
        let mut machine = Self { console, socket, deadline };
        machine.console.listens(&machine.socket)?;
        machine.ask("guests")?;
        Ok(machine)
    }

    /// A client of the control port, for what [`ctl`] does not do.
    pub(crate) fn client(&self) -> Result<UnixStream> {
        UnixStream::connect(&self.socket).with_context(|| format!("connecting to {}", self.socket.display()))
    }

    /// The value that the monitor answers; a refusal is an error.
    pub(crate) fn ask(&mut self, command: &str) -> Result<Value> {
        value(&self.reply(command)?, command)
    }

    /// The values that the monitor answers to commands that do not wait for each other; a refusal is an error.
    pub(crate) fn ask_all(&mut self, commands: &[String]) -> Result<Vec<Value>> {
        let left = self.left(format_args!("{commands:?}"))?;
        let replies = ctl::ask_all(&self.socket, commands, left)
            .with_context(|| format!("asking {commands:?}\n{}", self.console.tail()))?;
        replies.iter().zip(commands).map(|(reply, command)| value(reply, command)).collect()
    }

    /// The words with which the monitor refuses; anything else is an error.
    pub(crate) fn refused(&mut self, command: &str) -> Result<String> {
        let reply = self.reply(command)?;
        ensure!(!ctl::is_ok(&reply), "{command} was done: {}", ctl::shown(&reply));
        Ok(text(&reply, "/reply/error")?.to_owned())
    }

    /// Where there is more to do than the machine has CPUs for, one of them may come too late to stand still with the
    /// others: then nothing has happened, the monitor says so, and is asked again.
    fn reply(&mut self, command: &str) -> Result<Value> {
        for _ in 0..AGAIN {
            let reply = self.reply_once(command)?;
            if !text(&reply, "/reply/error").is_ok_and(|why| why.ends_with("; try again")) {
                return Ok(reply);
            }
        }
        self.reply_once(command)
    }

    fn reply_once(&mut self, command: &str) -> Result<Value> {
        let left = self.left(command)?;
        ctl::ask(&self.socket, command, left)
            .with_context(|| format!("asking \"{command}\"\n{}", self.console.tail()))
    }

    fn left(&self, what: impl Display) -> Result<Duration> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        ensure!(!left.is_zero(), "no time left for {what}");
        Ok(left)
    }

    /// Asks until the answer is as it should be; the last one.
    pub(crate) fn until(&mut self, command: &str, good: impl Fn(&Value) -> bool) -> Result<Value> {
        let mut last = Value::Null;
        loop {
            last = self.ask(command).with_context(|| format!("the last answer was {last}"))?;
            if good(&last) {
                return Ok(last);
            }
            self.rest(&format!("a better answer to \"{command}\" than {last}"))?;
        }
    }

    /// Waits a little for something.
    fn rest(&mut self, what: &str) -> Result<()> {
        ensure!(Instant::now() < self.deadline, "waited for {what} in vain\n{}", self.console.tail());
        sleep(PAUSE);
        Ok(())
    }

    /// The row that `guests` has for one.
    pub(crate) fn guest(&mut self, name: &str) -> Result<Value> {
        let guests = self.ask("guests")?;
        let row = rows(&guests)?.iter().find(|row| row["name"] == name).cloned();
        row.with_context(|| format!("guests does not list {name}: {guests}"))
    }

    /// Waits for a text in a guest's log, for longer than the monitor has patience.
    pub(crate) fn wait_long(&mut self, guest: &str, text: &str) -> Result<()> {
        loop {
            let reply = self.reply(&format!("wait {guest} \"{text}\""))?;
            if ctl::is_ok(&reply) {
                return Ok(());
            }
            let why = self::text(&reply, "/reply/error")?;
            ensure!(why.contains("did not happen within"), "waiting for {guest} to say \"{text}\": {why}");
            self.rest(&format!("{guest} to say \"{text}\""))?;
        }
    }

    /// Waits until the hypervisor's log has a line with these words: what follows them in the last such line.
    pub(crate) fn wait_logged(&mut self, words: &str) -> Result<String> {
        loop {
            if let Some(rest) = self.console.logged(words) {
                return Ok(rest);
            }
            self.rest(&format!("\"{words}\" in the hypervisor's log"))?;
        }
    }

    /// Types a line into a guest and waits until it has answered.
    pub(crate) fn talk(&mut self, guest: u64, line: &str, answer: &str) -> Result<()> {
        self.ask(&format!("send {guest} \"{line}\""))?;
        self.ask(&format!("wait {guest} \"{answer}\"")).map(|_| ())
    }

    /// Waits for a Linux guest that was sent its [`introduction`]: the random bytes that it drew. Its number and name must be
    /// its own.
    pub(crate) fn introduced(&mut self, guest: u64) -> Result<String> {
        self.ask(&format!("wait {guest} \" that-is-me-42\""))?;
        let line = self.last_line(guest, " that-is-me-42")?;
        let bytes = line.strip_prefix(&format!("I-am {guest} clone-{guest} "));
        let bytes = bytes.and_then(|rest| rest.split_once(" that")).map(|(bytes, _)| bytes);
        let whole = bytes.filter(|bytes| bytes.len() == "00 11 22 33 44 55 66 77".len());
        Ok(whole.with_context(|| format!("guest {guest} says {line}"))?.to_owned())
    }

    /// Forks a guest; its children's numbers.
    pub(crate) fn fork(&mut self, guest: u64, count: usize) -> Result<Vec<u64>> {
        self.forked(&format!("clone {guest} -n {count}"), count)
    }

    /// The same; the children stand still.
    pub(crate) fn fork_paused(&mut self, guest: u64, count: usize) -> Result<Vec<u64>> {
        self.forked(&format!("clone {guest} -n {count} --paused"), count)
    }

    fn forked(&mut self, command: &str, count: usize) -> Result<Vec<u64>> {
        let reply = self.ask(command)?;
        let ids: Option<Vec<u64>> =
            reply["children"].as_array().map(|ids| ids.iter().filter_map(Value::as_u64).collect());
        ids.filter(|ids| ids.len() == count).with_context(|| format!("not {count} children: {reply}"))
    }

    /// The last line of a guest's log that has this in it.
    pub(crate) fn last_line(&mut self, guest: u64, text: &str) -> Result<String> {
        let log = self.ask(&format!("log {guest}"))?;
        let line = log["log"].as_str().and_then(|log| log.lines().rfind(|line| line.contains(text)));
        Ok(line.with_context(|| format!("guest {guest} did not say \"{text}\""))?.to_owned())
    }

    /// Waits until a guest's log has a line that begins so, to its end: that line.
    pub(crate) fn whole_line(&mut self, guest: &str, start: &str) -> Result<String> {
        self.wait_long(guest, start)?;
        let whole = |log: &str| {
            let lines = log.split_inclusive('\n').filter(|line| line.ends_with('\n'));
            lines.map(str::trim_end).rfind(|line| line.starts_with(start)).map(str::to_owned)
        };
        let log = self.until(&format!("log {guest}"), |log| log["log"].as_str().and_then(whole).is_some())?;
        log["log"].as_str().and_then(whole).with_context(|| format!("guest {guest} did not say \"{start}\""))
    }

    /// Audits the machine.
    pub(crate) fn check(&mut self) -> Result<Value> {
        let audit = self.ask("check")?;
        ensure!(audit["clean"] == true, "check: {audit}");
        Ok(audit)
    }

    /// The answer to `memory` once nothing is left of those who went: every resident page is a guest's that is in
    /// the list. Those guests must stand still; tables of who went may follow later.
    pub(crate) fn settled(&mut self) -> Result<Value> {
        loop {
            let (guests, memory) = (self.ask("guests")?, self.ask("memory")?);
            let private = total(&guests, "private_pages")?;
            let count = |place| number(&memory, place);
            let places = ["/frames/free", "/frames/tables", "/owners/guests_resident", "/owners/cached"];
            let known = places.into_iter().map(count).sum::<Result<u64>>()?;
            // One answer may have counted the frames before something moved, and the objects after that.
            if count("/owners/guests_private")? == private && known == count("/frames/total")? {
                return Ok(memory);
            }
            self.rest(&format!(
                "memory to come back: guests hold {private} pages, {known} frames are known; {memory}"
            ))?;
        }
    }

    /// Kills everybody; the machine must end well, and nobody have a slot of swap then.
    pub(crate) fn shutdown(mut self) -> Result<()> {
        self.ask("shutdown")?;
        self.console.finish()?;
        let left = self.console.logged("swap slots in use: ");
        ensure!(left.as_deref() == Some("0"), "slots of swap that somebody has still: {left:?}");
        Ok(())
    }
}

/// The value in an answer.
fn value(reply: &Value, command: &str) -> Result<Value> {
    ensure!(ctl::is_ok(reply), "{command}: {}", ctl::shown(reply));
    reply.get("reply").cloned().with_context(|| format!("{command}: no reply in {reply}"))
}

impl Drop for Monitored {
    fn drop(&mut self) {
        // QEMU may have taken it away itself.
        let _ = fs::remove_file(&self.socket);
    }
}

/// A line for the shell of a Linux guest: it asks its machine for its own number, takes a name after that, and says both,
/// with random bytes.
pub(crate) fn introduction() -> String {
    let number = machine::FORK_PAGE.base + forkpage::GUEST;
    format!(
        "N=$(($(devmem {number:#x} 32))); hostname clone-$N; \
         echo I-am $N $(hostname) $(head -c 8 /dev/urandom | od -An -tx1) that-is-me-$((6*7))"
    )
}

/// The rows of a table.
pub(crate) fn rows(value: &Value) -> Result<&[Value]> {
    value.as_array().map(Vec::as_slice).with_context(|| format!("not a table: {value}"))
}

/// The number at a place such as `/frames/free`.
pub(crate) fn number(value: &Value, place: &str) -> Result<u64> {
    value.pointer(place).and_then(Value::as_u64).with_context(|| format!("no number {place} in {value}"))
}

/// The text at a place.
pub(crate) fn text<'v>(value: &'v Value, place: &str) -> Result<&'v str> {
    value.pointer(place).and_then(Value::as_str).with_context(|| format!("no text {place} in {value}"))
}

/// The sum of a column.
pub(crate) fn total(table: &Value, column: &str) -> Result<u64> {
    rows(table)?.iter().map(|row| number(row, &format!("/{column}"))).sum()
}

/// Each of these is a key of `value`.
pub(crate) fn has_keys(value: &Value, keys: &[&str]) -> Result<()> {
    let missing: Vec<&&str> = keys.iter().filter(|key| value.get(**key).is_none()).collect();
    if !missing.is_empty() {
        bail!("{missing:?} are not in {value}");
    }
    Ok(())
}
