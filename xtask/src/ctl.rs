//! `cargo xtask ctl`: one monitor command to a running hypervisor.

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// How long an answer may take: a little more than the monitor waits for a guest.
pub(crate) const PATIENCE: Duration = Duration::from_secs(620);

/// Sends one command, returns the answer, which may take as long as `patience`.
pub(crate) fn ask(socket: &Path, command: &str, patience: Duration) -> Result<Value> {
    let mut stream = UnixStream::connect(socket).with_context(|| {
        format!("connecting to {}; is `cargo xtask run` running, with this --socket?", socket.display())
    })?;
    stream.set_read_timeout(Some(patience))?;
    // The port does not tell its clients apart: what an earlier one left behind, half a question or an answer,
    // is passed over. A line of our own begins afresh, and the answer repeats our mark.
    let mark = format!("{}-{:?}", std::process::id(), Instant::now());
    writeln!(stream, "\n{}", json!({"id": mark, "command": command, "text": true}))?;
    let mut lines = BufReader::new(stream);
    loop {
        let mut line = String::new();
        let read = lines.read_line(&mut line).context("the hypervisor did not answer in time")?;
        ensure!(read > 0, "the hypervisor ended before it answered");
        match serde_json::from_str::<Value>(&line) {
            Ok(answer) if answer.get("id").and_then(Value::as_str) == Some(&mark) => return Ok(answer),
            Ok(_) | Err(_) => {}
        }
    }
}

/// An answer for a person.
pub(crate) fn shown(reply: &Value) -> &str {
    reply.get("text").and_then(Value::as_str).unwrap_or_default().trim_end()
}

/// The command: prints the answer; a refusal is an error.
pub(crate) fn run(socket: &Path, json: bool, words: &[String]) -> Result<()> {
    let quote = |w: &String| if w.contains(' ') { format!("\"{w}\"") } else { w.clone() };
    let reply = ask(socket, &words.iter().map(quote).collect::<Vec<_>>().join(" "), PATIENCE)?;
    if json {
        println!("{}", json!({"ok": reply.get("ok"), "reply": reply.get("reply")}));
    } else {
        println!("{}", shown(&reply));
    }
    if !is_ok(&reply) {
        bail!("the monitor refused");
    }
    Ok(())
}

/// True for an answer to a command that was done.
pub(crate) fn is_ok(reply: &Value) -> bool {
    reply.get("ok").and_then(Value::as_bool) == Some(true)
}
