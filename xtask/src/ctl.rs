//! `cargo xtask ctl`: one monitor command to a running hypervisor.

use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// Sends one command, returns the answer.
pub(crate) fn ask(socket: &Path, command: &str) -> Result<Value> {
    let mut stream = UnixStream::connect(socket).with_context(|| {
        format!("connecting to {}; is `cargo xtask run` running, with this --socket?", socket.display())
    })?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    writeln!(stream, "{command}")?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).context("the hypervisor did not answer within 60 s")?;
    serde_json::from_str(&line).with_context(|| format!("not an answer: {line}"))
}

/// An answer for a person.
pub(crate) fn shown(reply: &Value) -> String {
    let answer = reply.get("reply").unwrap_or(reply);
    match answer {
        Value::Array(rows) => rows.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"),
        Value::Object(_) | Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {
            serde_json::to_string_pretty(answer).unwrap_or_default()
        }
    }
}

/// The command: prints the answer; a refusal is an error.
pub(crate) fn run(socket: &Path, json: bool, words: &[String]) -> Result<()> {
    let quote = |w: &String| if w.contains(' ') { format!("\"{w}\"") } else { w.clone() };
    let reply = ask(socket, &words.iter().map(quote).collect::<Vec<_>>().join(" "))?;
    if json {
        println!("{reply}");
    } else {
        println!("{}", shown(&reply));
    }
    if reply.get("ok").and_then(Value::as_bool) != Some(true) {
        bail!("the monitor refused");
    }
    Ok(())
}
