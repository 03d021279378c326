//! What each command answers: one JSON value, and the same as text for a person.
//!
//! [`Host`] is what the rest of the hypervisor gives the monitor. It answers in values, so the commands
//! are tested here with a host that is a list.

use alloc::borrow::ToOwned;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt::Write;
use serde_json::{Value, json};

use super::parse::{COMMANDS, Command, parse, usage};

/// The hypervisor as the monitor sees it. An `Err` is a sentence for the person who asked.
pub trait Host {
    /// A list of guests: objects with at least `id`, `name`, `state`.
    fn guests(&mut self) -> Value;
    /// Finds a guest by number or name.
    fn find(&mut self, guest: &str) -> Result<u32, String>;
    /// Creates and starts a guest; its number.
    fn create(&mut self, options: &[(String, String)]) -> Result<u32, String>;
    /// Stops a guest's vCPUs.
    fn pause(&mut self, id: u32) -> Result<(), String>;
    /// Lets them go on.
    fn resume(&mut self, id: u32) -> Result<(), String>;
    /// Ends a guest.
    fn kill(&mut self, id: u32) -> Result<(), String>;
    /// Connects the console.
    fn attach(&mut self, id: u32) -> Result<(), String>;
    /// Types bytes into a guest.
    fn send(&mut self, id: u32, bytes: &[u8]) -> Result<(), String>;
    /// What a guest printed lately.
    fn log(&mut self, id: u32) -> Result<String, String>;
    /// A guest's map.
    fn map(&mut self, id: u32) -> Result<Value, String>;
    /// Objects, of one guest or all.
    fn objects(&mut self, id: Option<u32>) -> Result<Value, String>;
    /// Frames by owner and queue.
    fn memory(&mut self) -> Value;
    /// Counters.
    fn stats(&mut self, id: Option<u32>) -> Result<Value, String>;
    /// Recent exits.
    fn trace(&mut self, id: Option<u32>) -> Result<Value, String>;
    /// Audits everything; the error says what does not hold.
    fn check(&mut self) -> Result<Value, String>;
    /// Ends everything.
    fn shutdown(&mut self) -> Result<(), String>;
}

/// What a command answers.
#[derive(Clone, Debug, PartialEq)]
pub struct Reply {
    /// False when the command did not do what was asked.
    pub ok: bool,
    /// The answer with stable keys.
    pub json: Value,
}

impl Reply {
    /// The answer for a person: tables for lists, `key value` lines for the rest.
    pub fn text(&self) -> String {
        let mut out = String::new();
        render(&self.json, 0, &mut out);
        if !out.is_empty() && !out.ends_with('\n') {
            out.push('\n');
        }
        out
    }

    /// The answer as one line for the control socket.
    pub fn line(&self) -> String {
        json!({"ok": self.ok, "reply": self.json}).to_string()
    }
}

/// Parses and executes a line.
pub fn run(line: &str, host: &mut dyn Host) -> Reply {
    let result = parse(line).and_then(|command| execute(&command, host));
    match result {
        Ok(json) => Reply { ok: true, json },
        Err(error) => Reply { ok: false, json: json!({"error": error}) },
    }
}

/// Executes a command.
pub fn execute(command: &Command, host: &mut dyn Host) -> Result<Value, String> {
    let done = |word: &str, id: u32| json!({word: id});
    let optional = |host: &mut dyn Host, guest: &Option<String>| match guest {
        Some(guest) => host.find(guest).map(Some),
        None => Ok(None),
    };
    match command {
        Command::Attach(guest) => {
            host.find(guest).and_then(|id| host.attach(id).map(|()| done("attached", id)))
        }
        Command::Check => host.check(),
        Command::Create(options) => host.create(options).map(|id| done("created", id)),
        Command::Guests => Ok(host.guests()),
        Command::Help(None) => Ok(Value::Array(
            COMMANDS
                .iter()
                .map(|c| json!({"command": format!("{} {}", c.name, c.usage), "does": c.does}))
                .collect(),
        )),
        Command::Help(Some(name)) => COMMANDS
            .iter()
            .find(|c| c.name == name)
            .map(|c| json!({"usage": usage(c), "does": c.does}))
            .ok_or_else(|| format!("no command '{name}'; 'help' lists them")),
        Command::Kill(guest) => host.find(guest).and_then(|id| host.kill(id).map(|()| done("killed", id))),
        Command::Log(guest) => host.find(guest).and_then(|id| host.log(id)).map(|text| json!({"log": text})),
        Command::Map(guest) => host.find(guest).and_then(|id| host.map(id)),
        Command::Memory => Ok(host.memory()),
        Command::Objects(guest) => optional(host, guest).and_then(|id| host.objects(id)),
        Command::Pause(guest) => host.find(guest).and_then(|id| host.pause(id).map(|()| done("paused", id))),
        Command::Resume(guest) => {
            host.find(guest).and_then(|id| host.resume(id).map(|()| done("resumed", id)))
        }
        Command::Send(guest, text) => {
            let mut bytes = text.as_bytes().to_vec();
            bytes.push(b'\r');
            host.find(guest).and_then(|id| host.send(id, &bytes).map(|()| done("sent", id)))
        }
        Command::Shutdown => host.shutdown().map(|()| json!({"shutdown": true})),
        Command::Stats(guest) => optional(host, guest).and_then(|id| host.stats(id)),
        Command::Trace(guest) => optional(host, guest).and_then(|id| host.trace(id)),
    }
}

fn scalar(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => "-".to_owned(),
        Value::Bool(_) | Value::Number(_) | Value::Array(_) | Value::Object(_) => value.to_string(),
    }
}

/// Lists of objects become tables, objects become lines, text stays text.
fn render(value: &Value, indent: usize, out: &mut String) {
    match value {
        Value::Array(rows) if rows.iter().all(Value::is_object) => table(rows, indent, out),
        Value::Array(rows) => {
            for row in rows {
                let _ = writeln!(out, "{:indent$}{}", "", scalar(row));
            }
        }
        Value::Object(fields) => {
            for (key, value) in fields {
                if value.is_object() || value.is_array() {
                    let _ = writeln!(out, "{:indent$}{key}:", "");
                    render(value, indent + 2, out);
                } else {
                    let text = scalar(value);
                    if text.contains('\n') {
                        let _ = writeln!(out, "{text}");
                    } else {
                        let _ = writeln!(out, "{:indent$}{key:<18} {text}", "");
                    }
                }
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {
            let _ = writeln!(out, "{:indent$}{}", "", scalar(value));
        }
    }
}

fn table(rows: &[Value], indent: usize, out: &mut String) {
    let mut columns: Vec<(String, usize)> = Vec::new();
    for row in rows.iter().filter_map(Value::as_object) {
        for (key, value) in row {
            let width = scalar(value).chars().count();
            match columns.iter_mut().find(|(name, _)| name == key) {
                Some((_, widest)) => *widest = width.max(*widest),
                None => columns.push((key.clone(), width.max(key.len()))),
            }
        }
    }
    let mut line = |cells: &dyn Fn(&str) -> String| {
        let mut text = String::new();
        for (name, width) in &columns {
            let width = *width;
            let _ = write!(text, "{:<width$}  ", cells(name));
        }
        let _ = writeln!(out, "{:indent$}{}", "", text.trim_end());
    };
    line(&|name| name.to_owned());
    for row in rows {
        line(&|name| row.get(name).map(scalar).unwrap_or_default());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Fake {
        said: Vec<String>,
    }

    impl Host for Fake {
        fn guests(&mut self) -> Value {
            json!([{"id": 1, "name": "one", "state": "running"}, {"id": 12, "name": "twelve", "state": "paused"}])
        }
        fn find(&mut self, guest: &str) -> Result<u32, String> {
            if guest == "one" { Ok(1) } else { Err(format!("no guest '{guest}'")) }
        }
        fn create(&mut self, options: &[(String, String)]) -> Result<u32, String> {
            self.said.push(format!("create {options:?}"));
            Ok(7)
        }
        fn pause(&mut self, id: u32) -> Result<(), String> {
            self.said.push(format!("pause {id}"));
            Ok(())
        }
        fn resume(&mut self, _: u32) -> Result<(), String> {
            Err("it is not paused".into())
        }
        fn kill(&mut self, _: u32) -> Result<(), String> {
            Ok(())
        }
        fn attach(&mut self, _: u32) -> Result<(), String> {
            Ok(())
        }
        fn send(&mut self, id: u32, bytes: &[u8]) -> Result<(), String> {
            self.said.push(format!("send {id} {bytes:?}"));
            Ok(())
        }
        fn log(&mut self, _: u32) -> Result<String, String> {
            Ok("a\nb\n".into())
        }
        fn map(&mut self, _: u32) -> Result<Value, String> {
            Ok(json!([]))
        }
        fn objects(&mut self, _: Option<u32>) -> Result<Value, String> {
            Ok(json!([]))
        }
        fn memory(&mut self) -> Value {
            json!({"frames": {"free": 3, "wired": 1}})
        }
        fn stats(&mut self, _: Option<u32>) -> Result<Value, String> {
            Ok(json!({}))
        }
        fn trace(&mut self, _: Option<u32>) -> Result<Value, String> {
            Ok(json!([]))
        }
        fn check(&mut self) -> Result<Value, String> {
            Ok(json!({"clean": true}))
        }
        fn shutdown(&mut self) -> Result<(), String> {
            Ok(())
        }
    }

    #[test]
    fn a_list_of_guests_reads_as_a_table() {
        let text = run("guests", &mut Fake::default()).text();
        assert_eq!(text, "id  name    state\n1   one     running\n12  twelve  paused\n");
    }

    #[test]
    fn a_refusal_is_not_ok_and_says_why() {
        let reply = run("resume one", &mut Fake::default());
        assert_eq!(reply.line(), r#"{"ok":false,"reply":{"error":"it is not paused"}}"#);
        assert!(!run("kill two", &mut Fake::default()).ok);
        assert!(!run("gusts", &mut Fake::default()).ok);
    }

    #[test]
    fn what_is_sent_to_a_guest_ends_in_a_return() {
        let mut fake = Fake::default();
        assert!(run("send one echo hi", &mut fake).ok);
        assert_eq!(fake.said, [format!("send 1 {:?}", b"echo hi\r")]);
    }

    #[test]
    fn nested_answers_are_indented() {
        let text = run("memory", &mut Fake::default()).text();
        assert_eq!(text, "frames:\n  free               3\n  wired              1\n");
    }
}
