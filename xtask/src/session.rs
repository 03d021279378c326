//! One QEMU run, watched: console lines in, typed text out, a bound on time, a log of everything.

use crate::ending::Kept;
use crate::symbols::Log;
use anyhow::{Context, Result, bail, ensure};
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// A machine that only has to be started.
pub(crate) struct Prepared {
    /// Starts it.
    pub(crate) command: Command,
    /// What it will say.
    pub(crate) log: Log,
    /// Keeps its files ours while it runs.
    pub(crate) lock: File,
}

/// A running machine.
pub(crate) struct Session {
    child: Kept,
    input: ChildStdin,
    output: Receiver<Vec<u8>>,
    seen: Vec<u8>,
    /// Where the next wait starts to look.
    mark: usize,
    deadline: Instant,
    limit: Duration,
    console: File,
    /// The hypervisor's own log, for the end.
    log: Log,
    echo: bool,
    /// Keeps the run's files ours.
    _lock: File,
}

impl Session {
    /// Starts QEMU. Everything the console says goes to `console`, and with `echo` to our standard output.
    pub(crate) fn start(prepared: Prepared, console: &Path, limit: Duration, echo: bool) -> Result<Self> {
        let Prepared { mut command, log, lock } = prepared;
        // A group of its own: Ctrl-C is for us, or for the debugger, and QEMU goes when we go.
        command.process_group(0).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = Kept::start(&mut command)?;
        let input = child.stdin.take().context("QEMU has no standard input")?;
        let (sender, output) = channel();
        let streams: [Option<Box<dyn Read + Send>>; 2] = [
            child.stdout.take().map(|s| Box::new(s) as Box<dyn Read + Send>),
            child.stderr.take().map(|s| Box::new(s) as Box<dyn Read + Send>),
        ];
        for mut stream in streams.into_iter().flatten() {
            let sender = sender.clone();
            std::thread::spawn(move || {
                let mut buffer = [0; 4096];
                while let Ok(n @ 1..) = stream.read(&mut buffer) {
                    if sender.send(buffer.get(..n).unwrap_or_default().to_vec()).is_err() {
                        return;
                    }
                }
            });
        }
        let console = File::create(console).with_context(|| format!("creating {}", console.display()))?;
        let deadline = Instant::now() + limit;
        Ok(Self {
            child,
            input,
            output,
            seen: Vec::new(),
            mark: 0,
            deadline,
            limit,
            console,
            log,
            echo,
            _lock: lock,
        })
    }

    /// Takes what has arrived; false when QEMU has closed its output.
    fn pump(&mut self) -> Result<bool> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            self.stop();
            bail!("timed out after {} s\n{}", self.limit.as_secs(), self.tail());
        }
        match self.output.recv_timeout(left) {
            Ok(bytes) => {
                self.console.write_all(&bytes)?;
                if self.echo {
                    std::io::stdout().write_all(&bytes)?;
                    std::io::stdout().flush()?;
                }
                self.seen.extend_from_slice(&bytes);
                Ok(true)
            }
            Err(RecvTimeoutError::Timeout) => Ok(true),
            Err(RecvTimeoutError::Disconnected) => Ok(false),
        }
    }

    /// Waits until the console says `text` after what the last wait found; the line it stands in.
    pub(crate) fn wait(&mut self, text: &str) -> Result<String> {
        loop {
            let ahead = self.seen.get(self.mark..).unwrap_or_default();
            if let Some(at) = ahead.windows(text.len()).position(|w| w == text.as_bytes()) {
                let start = self.mark + at;
                let line_start = self.seen.iter().take(start).rposition(|&b| b == b'\n').map_or(0, |n| n + 1);
                let after = self.seen.get(start + text.len()..).unwrap_or_default();
                let end = after.iter().position(|&b| b == b'\n').unwrap_or(after.len());
                self.mark = start + text.len();
                let line = self.seen.get(line_start..self.mark + end).unwrap_or_default();
                return Ok(String::from_utf8_lossy(line).trim().to_owned());
            }
            let waited = self.pump().with_context(|| format!("waiting for \"{text}\""))?;
            if !waited {
                let status = self.child.wait()?;
                bail!("QEMU ended ({status}) before the guest printed \"{text}\"\n{}", self.tail());
            }
        }
    }

    /// Ends the console's unfinished line on our standard output, before something else is printed there.
    pub(crate) fn end_line(&self) {
        if self.echo && self.seen.last().is_some_and(|byte| *byte != b'\n') {
            println!();
        }
    }

    /// Types into the attached guest.
    pub(crate) fn send(&mut self, text: &str) -> Result<()> {
        self.input.write_all(text.as_bytes())?;
        self.input.flush().context("typing into the guest")
    }

    /// Time until the limit; none is an error.
    pub(crate) fn left(&self) -> Result<Duration> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        ensure!(!left.is_zero(), "timed out after {} s\n{}", self.limit.as_secs(), self.tail());
        Ok(left)
    }

    /// Waits until somebody listens at a socket that QEMU makes after it has started.
    pub(crate) fn listens(&mut self, socket: &Path) -> Result<()> {
        const PAUSE: Duration = Duration::from_millis(10);
        while UnixStream::connect(socket).is_err() {
            self.left().with_context(|| format!("waiting for QEMU to open {}", socket.display()))?;
            if let Some(status) = self.child.try_wait()? {
                bail!("QEMU ended ({status}) before it opened {}\n{}", socket.display(), self.tail());
            }
            std::thread::sleep(PAUSE);
        }
        Ok(())
    }

    /// Waits until QEMU ends by itself; an exit status other than 0 is an error.
    pub(crate) fn finish(&mut self) -> Result<()> {
        while self.pump().context("waiting for the machine to end")? {}
        let status = self.child.wait()?;
        if !status.success() {
            bail!("the hypervisor did not end well ({status})\n{}", self.tail());
        }
        Ok(())
    }

    /// Everything the console said.
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.seen).into_owned()
    }

    /// The console's last lines if nobody saw them, and what the hypervisor says of it.
    pub(crate) fn tail(&self) -> String {
        const LAST: usize = 15;
        if self.echo {
            return self.log.told();
        }
        let text = self.text();
        let lines: Vec<&str> = text.lines().collect();
        let last = lines.get(lines.len().saturating_sub(LAST)..).unwrap_or_default().join("\n");
        format!("{last}\n{}", self.log.told())
    }

    /// Ends QEMU now.
    pub(crate) fn stop(&mut self) {
        // It may have ended by itself meanwhile; either way it is gone.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// What follows these words in the last line of the hypervisor's log that has them.
    pub(crate) fn logged(&self, words: &str) -> Option<String> {
        self.log.last(words)
    }

    /// What the hypervisor's log says of a panic.
    pub(crate) fn panic(&self) -> Option<String> {
        self.log.panic()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    /// A machine that is a shell command, its files in a folder of its own.
    fn machine(name: &str, words: &str, limit: Duration) -> (Session, std::path::PathBuf) {
        let dir = std::env::temp_dir().join(format!("xtask-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let mut command = Command::new("sh");
        command.arg("-c").arg(words);
        let log = Log { file: dir.join("hv.log"), elf: dir.join("hv") };
        let lock = File::create(dir.join("lock")).unwrap();
        let prepared = Prepared { command, log, lock };
        (Session::start(prepared, &dir.join("console.log"), limit, false).unwrap(), dir)
    }

    #[test]
    fn a_socket_is_waited_for_until_it_is_there_or_the_machine_is_not() {
        let (mut session, dir) = machine("late-socket", "sleep 60", Duration::from_secs(60));
        let socket = dir.join("control");
        let later = socket.clone();
        let server = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(200));
            UnixListener::bind(later).unwrap()
        });
        session.listens(&socket).unwrap();
        drop(server.join().unwrap());
        std::fs::remove_dir_all(dir).unwrap();

        let (mut session, dir) = machine("no-socket", "exit 3", Duration::from_secs(60));
        let why = session.listens(&dir.join("control")).unwrap_err().to_string();
        assert!(why.contains("QEMU ended (exit status: 3)"), "{why}");
        let (mut session, _) = machine("no-socket", "sleep 60", Duration::from_millis(100));
        assert!(session.listens(&dir.join("control")).is_err());
        std::fs::remove_dir_all(dir).unwrap();
    }
}
