//! Scripts for `run`: what a person would do at the console and at the monitor, one step a line.
//!
//! `wait "text"` waits for the guest to print it, `send "text"` types it and a newline; `\n`, `\"` and `\\` mean
//! what they mean everywhere. An empty line and one that starts with `#` are passed over. Anything else is a command
//! for the monitor, its own `wait G STATE` and `send G TEXT` included. The whole script is read before anything starts.

use crate::ctl;
use crate::session::Session;
use anyhow::{Context, Result, bail, ensure};
use std::path::Path;

/// One line.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    Wait(String),
    Send(String),
    Monitor(String),
}

/// A script that was read.
pub(crate) struct Script {
    file: String,
    /// With the line's number and its text.
    steps: Vec<(usize, String, Step)>,
}

impl Script {
    /// Reads a script; an error says which line.
    pub(crate) fn read(file: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(file).with_context(|| format!("reading {}", file.display()))?;
        let file = file.display().to_string();
        let mut steps = Vec::new();
        for (number, line) in (1..).zip(text.lines()) {
            if let Some(step) = parse(line).with_context(|| format!("{file} line {number}: {line}"))? {
                steps.push((number, line.to_owned(), step));
            }
        }
        Ok(Self { file, steps })
    }

    /// True where the last word is the script's own.
    pub(crate) fn leaves(&self) -> bool {
        self.steps.iter().any(|(_, _, step)| *step == shutdown())
    }

    /// Acts it out. The first step that fails ends it.
    pub(crate) fn play(&self, session: &mut Session, socket: &Path) -> Result<()> {
        for (number, line, step) in &self.steps {
            step.act(session, socket).with_context(|| format!("{} line {number}: {line}", self.file))?;
        }
        Ok(())
    }
}

fn shutdown() -> Step {
    Step::Monitor("shutdown".to_owned())
}

/// Ends the machine in good order.
pub(crate) fn shut_down(session: &mut Session, socket: &Path) -> Result<()> {
    shutdown().act(session, socket).context("shutdown")
}

impl Step {
    fn act(&self, session: &mut Session, socket: &Path) -> Result<()> {
        match self {
            Self::Wait(text) => session.wait(text).map(|_| ()),
            Self::Send(text) => session.send(&format!("{text}\n")),
            Self::Monitor(command) => {
                session.listens(socket)?;
                let reply = ctl::ask(socket, command, ctl::PATIENCE.min(session.left()?))?;
                session.end_line();
                println!("{}", ctl::shown(&reply));
                ensure!(ctl::is_ok(&reply), "the monitor refused");
                Ok(())
            }
        }
    }
}

/// One line; `None` if it says nothing.
fn parse(line: &str) -> Result<Option<Step>> {
    let line = line.trim();
    if line.is_empty() || line.starts_with('#') {
        return Ok(None);
    }
    let (verb, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
    Ok(Some(match (verb, rest.trim_start().strip_prefix('"')) {
        ("wait", Some(text)) => {
            let text = unquoted(text)?;
            ensure!(!text.is_empty(), "there is nothing between the quotes to wait for");
            Step::Wait(text)
        }
        ("send", Some(text)) => Step::Send(unquoted(text)?),
        _ => Step::Monitor(line.to_owned()),
    }))
}

/// A quoted text, from behind its first quote to its last, which must end the line.
fn unquoted(text: &str) -> Result<String> {
    let mut plain = String::new();
    let mut letters = text.chars();
    while let Some(letter) = letters.next() {
        match letter {
            '"' => {
                let rest = letters.as_str();
                ensure!(rest.trim().is_empty(), "after the closing quote there is more: {}", rest.trim());
                return Ok(plain);
            }
            '\\' => match letters.next() {
                Some('n') => plain.push('\n'),
                Some(same @ ('"' | '\\')) => plain.push(same),
                Some(other) => bail!("\\{other} means nothing; \\n, \\\" and \\\\ do"),
                None => break,
            },
            other => plain.push(other),
        }
    }
    bail!("the closing quote is missing")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quoted_words_are_for_the_console_and_the_rest_for_the_monitor() {
        assert_eq!(parse(r#"wait "a \"b\"\n""#).unwrap(), Some(Step::Wait("a \"b\"\n".into())));
        assert_eq!(parse(r#" send "uname -r" "#).unwrap(), Some(Step::Send("uname -r".into())));
        for line in ["guests", "wait 1 paused", r#"send 1 "text""#, r#"wait 1 "login:""#] {
            assert_eq!(parse(line).unwrap(), Some(Step::Monitor(line.into())));
        }
        assert_eq!(parse("# a comment").unwrap(), None);
        assert_eq!(parse("").unwrap(), None);
    }

    #[test]
    fn a_quote_that_does_not_close_is_refused_and_so_is_what_follows_one() {
        assert!(parse(r#"wait "login:"#).unwrap_err().to_string().contains("closing quote is missing"));
        assert!(parse(r#"send "a" b"#).unwrap_err().to_string().contains("more: b"));
        assert!(parse(r#"wait """#).unwrap_err().to_string().contains("nothing between the quotes"));
        assert_eq!(parse(r#"send """#).unwrap(), Some(Step::Send(String::new())));
        assert!(parse(r#"send "\t""#).unwrap_err().to_string().contains("means nothing"));
    }
}
