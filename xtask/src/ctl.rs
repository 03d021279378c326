//! `cargo xtask ctl`: one monitor command to a running hypervisor.

use anyhow::{Context, Result, anyhow, bail, ensure};
use hv_abi::manifest::CONTROL_LIMIT;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, ErrorKind, Write};
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
    let deadline = Instant::now() + patience;
    // The monitor takes more lines when it has answered some: somebody has to read meanwhile.
    let (mut out, clock) = (stream.try_clone()?, stream.try_clone()?);
    let writer = std::thread::spawn(move || out.write_all(questions.as_bytes()));
    let mut answers = vec![None; commands.len()];
    let mut lines = BufReader::new(&mut stream);
    while answers.iter().any(Option::is_none) {
        let Some(line) = next_line(&mut lines, &clock, deadline)? else {
            bail!("the hypervisor ended before it answered");
        };
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

/// The next line of the port, by then at the latest, however many pieces of whatever come meanwhile; `None` at the end.
fn next_line(lines: &mut impl BufRead, clock: &UnixStream, deadline: Instant) -> Result<Option<String>> {
    const LATE: &str = "the hypervisor did not answer in time";
    let mut line = Vec::new();
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        ensure!(!left.is_zero(), LATE);
        clock.set_read_timeout(Some(left))?;
        let piece = match lines.fill_buf() {
            Err(why) if why.kind() == ErrorKind::Interrupted => continue,
            piece => piece.context(LATE)?,
        };
        if piece.is_empty() {
            return Ok(None);
        }
        let end = piece.iter().position(|byte| *byte == b'\n');
        let taken = end.map_or(piece.len(), |end| end + 1);
        line.extend_from_slice(&piece[..taken]);
        lines.consume(taken);
        if end.is_some() {
            return Ok(Some(String::from_utf8_lossy(&line).into_owned()));
        }
    }
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
    fn a_port_that_always_says_something_else_is_given_up_in_time() {
        let path = std::env::temp_dir().join(format!("xtask-ctl-{}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        let port = std::os::unix::net::UnixListener::bind(&path).unwrap();
        // Lines that answer nothing, then pieces of one that does not end.
        for words in [&b"{\"id\": 1}\n"[..], b"{"] {
            let asked = Instant::now();
            std::thread::scope(|scope| {
                let talker = scope.spawn(|| {
                    let (mut client, _) = port.accept().unwrap();
                    while client.write_all(words).is_ok() && asked.elapsed() < Duration::from_secs(20) {
                        std::thread::sleep(Duration::from_millis(20));
                    }
                    asked.elapsed()
                });
                let why = ask(&path, "guests", Duration::from_millis(300)).unwrap_err();
                assert!(why.to_string().contains("in time"), "{why:#}");
                assert!(talker.join().unwrap() < Duration::from_secs(10));
            });
        }
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn a_line_that_the_monitor_would_not_take_is_not_sent() {
        let ask = |bytes| ask(Path::new("/nowhere/control"), &"x".repeat(bytes), PATIENCE).unwrap_err();
        assert!(ask(CONTROL_LIMIT).to_string().contains("a line of"));
        assert!(ask(CONTROL_LIMIT / 2).to_string().contains("connecting to"));
    }
}
