//! `cargo xtask ctl`: one monitor command to a running hypervisor.

use anyhow::{Context, Result, anyhow, bail, ensure};
use hv_abi::manifest::CONTROL_LIMIT;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// How long an answer may take: a little more than the monitor waits for a guest.
pub(crate) const PATIENCE: Duration = Duration::from_secs(620);

/// Sends one command, returns the answer, which may take as long as `patience`.
pub(crate) fn ask(socket: &Path, command: &str, patience: Duration) -> Result<Value> {
    ask_all(socket, &[command], patience)?.pop().context("no answer")
}

/// Sends commands without waiting in between; their answers, in the same order. The monitor begins each after the one
/// before, and does not wait for those that wait.
pub(crate) fn ask_all(socket: &Path, commands: &[impl AsRef<str>], patience: Duration) -> Result<Vec<Value>> {
    // The port does not tell its clients apart: what an earlier one left behind, half a question or an answer,
    // is passed over. A line of our own begins afresh, and the answer repeats our mark.
    let mark = format!("{}-{:?}", std::process::id(), Instant::now());
    let mut questions = String::from("\n");
    for (number, command) in commands.iter().enumerate() {
        let command = command.as_ref();
        let question = json!({"id": [mark, number], "command": command, "text": true}).to_string();
        ensure!(
            question.len() <= CONTROL_LIMIT,
            "a line of {} bytes for the monitor; it takes {CONTROL_LIMIT}",
            question.len()
        );
        questions.push_str(&question);
        questions.push('\n');
    }
    let mut stream = UnixStream::connect(socket).with_context(|| {
        format!("connecting to {}; is `cargo xtask run` running, with this --socket?", socket.display())
    })?;
    stream.set_read_timeout(Some(patience))?;
    // The monitor takes more lines when it has answered some: somebody has to read meanwhile.
    let mut out = stream.try_clone()?;
    let writer = std::thread::spawn(move || out.write_all(questions.as_bytes()));
    let mut answers = vec![None; commands.len()];
    let mut lines = BufReader::new(&mut stream);
    while answers.iter().any(Option::is_none) {
        let mut line = String::new();
        let read = lines.read_line(&mut line).context("the hypervisor did not answer in time")?;
        ensure!(read > 0, "the hypervisor ended before it answered");
        let Ok(answer) = serde_json::from_str::<Value>(&line) else { continue };
        let ours = answer.pointer("/id/0").and_then(Value::as_str) == Some(&mark);
        let number = answer.pointer("/id/1").and_then(Value::as_u64).filter(|_| ours);
        let number = number.and_then(|number| usize::try_from(number).ok());
        if let Some(place) = number.and_then(|number| answers.get_mut(number)) {
            *place = Some(answer);
        }
    }
    writer.join().map_err(|_| anyhow!("asking failed"))?.context("asking")?;
    Ok(answers.into_iter().flatten().collect())
}

/// An answer for a person.
pub(crate) fn shown(reply: &Value) -> &str {
    reply.get("text").and_then(Value::as_str).unwrap_or_default().trim_end()
}

/// Words as the shell gave them, as one line for the monitor, which splits at spaces outside quotes.
fn joined(words: &[String]) -> String {
    let spaced = |w: &str| w.is_empty() || w.contains([' ', '\t']);
    // One that has quotes says itself how it is to be split.
    let quoted = |w: &String| if spaced(w) && !w.contains('"') { format!("\"{w}\"") } else { w.clone() };
    words.iter().map(quoted).collect::<Vec<_>>().join(" ")
}

/// The command: prints the answer; a refusal is an error.
pub(crate) fn run(socket: &Path, json: bool, words: &[String]) -> Result<()> {
    let reply = ask(socket, &joined(words), PATIENCE)?;
    // Whoever reads may have seen enough: a closed pipe is an error, no panic.
    let mut out = std::io::stdout();
    if json {
        writeln!(out, "{}", json!({"ok": reply.get("ok"), "reply": reply.get("reply")}))
    } else {
        writeln!(out, "{}", shown(&reply))
    }
    .context("writing the answer")?;
    if !is_ok(&reply) {
        bail!("the monitor refused");
    }
    Ok(())
}

/// True for an answer to a command that was done.
pub(crate) fn is_ok(reply: &Value) -> bool {
    reply.get("ok").and_then(Value::as_bool) == Some(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_reach_the_monitor_as_the_shell_split_them() {
        let line = |words: &[&str]| joined(&words.iter().map(|w| (*w).to_owned()).collect::<Vec<_>>());
        assert_eq!(line(&["send", "1", "uname -r"]), r#"send 1 "uname -r""#);
        assert_eq!(line(&["send", "1", ""]), r#"send 1 """#);
        assert_eq!(line(&["wait", "1", r#""guest ready""#]), r#"wait 1 "guest ready""#);
        assert_eq!(line(&[r#"send 1 "a b""#]), r#"send 1 "a b""#);
    }

    #[test]
    fn a_line_that_the_monitor_would_not_take_is_not_sent() {
        let ask = |bytes| ask(Path::new("/nowhere/control"), &"x".repeat(bytes), PATIENCE).unwrap_err();
        assert!(ask(CONTROL_LIMIT).to_string().contains("a line of"));
        assert!(ask(CONTROL_LIMIT / 2).to_string().contains("connecting to"));
    }
}
