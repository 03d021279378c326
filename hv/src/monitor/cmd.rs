//! What each command answers: one JSON value, and the same as text for a person.
//!
//! [`Host`] is what the rest of the hypervisor gives the monitor. It answers in values, so the commands
//! are tested here with a host that is a list. A command that has to wait for a guest answers
//! [`Outcome::Later`]; who runs it asks again with [`resume`] until the answer is there.

use alloc::borrow::ToOwned;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt::Write;
use serde_json::{Value, json};

use super::paced::{PIECE, Pieces};
use super::parse::{COMMANDS, Command, Help, Until, parse, usage};

/// The hypervisor as the monitor sees it. An `Err` is a sentence for the person who asked.
pub trait Host {
    /// Lets interrupts in: called between short parts of an answer (invariant I6).
    fn rest(&mut self);
    /// A list of guests: objects with at least `id`, `name`, `state`.
    fn guests(&mut self) -> Value;
    /// Finds a guest by number or name.
    fn find(&mut self, guest: &str) -> Result<u32, String>;
    /// Creates and starts a guest; its number.
    fn create(&mut self, options: &[(String, String)]) -> Result<u32, String>;
    /// Forks a guest; its children's numbers.
    fn clone(&mut self, id: u32, count: u32, paused: bool) -> Result<Vec<u32>, String>;
    /// Keeps a guest as it is now, under a name; the name.
    fn snapshot(&mut self, id: u32, name: Option<&str>) -> Result<String, String>;
    /// The snapshots that are kept.
    fn snapshots(&mut self) -> Value;
    /// Forgets one.
    fn delete(&mut self, name: &str) -> Result<(), String>;
    /// Makes a guest again what it was in a snapshot; its name.
    fn reset(&mut self, id: u32, name: Option<&str>) -> Result<String, String>;
    /// Begins to store a guest under a name, at so many mebibytes a second at most; the job's number.
    fn save(&mut self, id: u32, image: &str, rate: Option<u64>) -> Result<u32, String>;
    /// Guests being stored.
    fn jobs(&mut self) -> Value;
    /// Gives one of them up.
    fn cancel(&mut self, job: u32) -> Result<(), String>;
    /// A guest's balloon; with a size, leaves the guest so many mebibytes of its RAM.
    fn balloon(&mut self, id: u32, mib: Option<u64>) -> Result<Value, String>;
    /// The disks for stored guests.
    fn images(&mut self) -> Value;
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
    /// How much memory a guest has for itself and may have; sets that first if it is said, in KiB.
    fn limit(&mut self, id: u32, resident: Option<Option<u64>>) -> Result<Value, String>;
    /// What a guest printed lately.
    fn log(&mut self, id: u32) -> Result<String, String>;
    /// A guest's map.
    fn map(&mut self, id: u32) -> Result<Value, String>;
    /// Objects, of one guest or all.
    fn objects(&mut self, id: Option<u32>) -> Result<Value, String>;
    /// Frames by owner and queue.
    fn memory(&mut self) -> Value;
    /// Swap slots, and pageout's counters.
    fn swap(&mut self) -> Value;
    /// Counters.
    fn stats(&mut self, id: Option<u32>) -> Result<Value, String>;
    /// Recent exits.
    fn trace(&mut self, id: Option<u32>) -> Result<Value, String>;
    /// Audits everything; the error says what does not hold.
    fn check(&mut self) -> Result<Value, String>;
    /// Ends everything.
    fn shutdown(&mut self) -> Result<(), String>;
    /// Whether what is waited for is so now. `looked` is 0 at first: how far text was looked at in vain.
    fn reached(&mut self, id: u32, until: &Until, looked: &mut u64) -> Result<bool, String>;
}

/// A command whose answer comes when something has happened to a guest.
#[derive(Clone, Debug, PartialEq)]
pub struct Later {
    /// The guest.
    pub id: u32,
    /// What is waited for.
    pub until: Until,
    /// How much of what the guest printed was looked at in vain, in bytes since its first.
    pub looked: u64,
    /// The answer then.
    pub answer: Value,
}

/// What became of a line.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// Answered.
    Now(Reply),
    /// Not yet.
    Later(Later),
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
    /// The answer for a person: tables for lists, `key value` lines for the rest. What is not empty ends in a new line.
    pub fn text(&self, rest: &mut dyn FnMut()) -> Pieces {
        let mut out = Pieces::new();
        render(&self.json, 0, &mut out, rest);
        out
    }
}

/// Parses and executes a line.
pub fn run(line: &str, host: &mut dyn Host) -> Outcome {
    match parse(line).and_then(|command| execute(&command, host)) {
        Ok(Answer::Now(json)) => Outcome::Now(Reply { ok: true, json }),
        Ok(Answer::Later(later)) => resume(later, host),
        Err(error) => Outcome::Now(refusal(&error)),
    }
}

/// Looks whether a command that waits can be answered.
pub fn resume(mut later: Later, host: &mut dyn Host) -> Outcome {
    match host.reached(later.id, &later.until, &mut later.looked) {
        Ok(true) => Outcome::Now(Reply { ok: true, json: later.answer }),
        Ok(false) => Outcome::Later(later),
        Err(error) => Outcome::Now(refusal(&error)),
    }
}

/// The answer of a command that did not do what was asked.
pub fn refusal(error: &str) -> Reply {
    Reply { ok: false, json: json!({"error": error}) }
}

enum Answer {
    Now(Value),
    Later(Later),
}

/// Executes a command.
fn execute(command: &Command, host: &mut dyn Host) -> Result<Answer, String> {
    let done = |word: &str, id: u32| json!({word: id});
    let optional = |host: &mut dyn Host, guest: &Option<String>| match guest {
        Some(guest) => host.find(guest).map(Some),
        None => Ok(None),
    };
    let value = match command {
        Command::Attach(guest) => {
            host.find(guest).and_then(|id| host.attach(id).map(|()| done("attached", id)))
        }
        Command::Balloon(guest, mib) => host.find(guest).and_then(|id| host.balloon(id, *mib)),
        Command::Cancel(job) => host.cancel(*job).map(|()| done("cancelled", *job)),
        Command::Check => host.check(),
        Command::Clone(guest, count, paused) => {
            let id = host.find(guest)?;
            host.clone(id, *count, *paused).map(|children| json!({"cloned": id, "children": children}))
        }
        Command::Create(options) => host.create(options).map(|id| done("created", id)),
        Command::Delete(name) => host.delete(name).map(|()| json!({"deleted": name})),
        Command::Guests => Ok(host.guests()),
        Command::Help(None) => {
            let row =
                |c: &Help| json!({"command": format!("{} {}", c.name, c.usage).trim_end(), "does": c.does});
            Ok(Value::Array(COMMANDS.iter().inspect(|_| host.rest()).map(row).collect()))
        }
        Command::Help(Some(name)) => COMMANDS
            .iter()
            .find(|c| c.name == name)
            .map(|c| json!({"usage": usage(c), "does": c.does}))
            .ok_or_else(|| format!("no command '{name}'; 'help' lists them")),
        Command::Images => Ok(host.images()),
        Command::Jobs => Ok(host.jobs()),
        Command::Kill(guest) => {
            let id = host.find(guest)?;
            host.kill(id)?;
            return Ok(Answer::Later(Later {
                id,
                until: Until::Gone,
                looked: 0,
                answer: done("killed", id),
            }));
        }
        Command::Limit(guest, resident) => host.find(guest).and_then(|id| host.limit(id, *resident)),
        Command::Log(guest) => {
            let mut answer = json!({});
            let id = host.find(guest)?;
            answer["log"] = Value::String(host.log(id)?);
            Ok(answer)
        }
        Command::Map(guest) => host.find(guest).and_then(|id| host.map(id)),
        Command::Memory => Ok(host.memory()),
        Command::Swap => Ok(host.swap()),
        Command::Objects(guest) => optional(host, guest).and_then(|id| host.objects(id)),
        Command::Pause(guest) => host.find(guest).and_then(|id| host.pause(id).map(|()| done("paused", id))),
        Command::Reset(guest, name) => {
            let id = host.find(guest)?;
            host.reset(id, name.as_deref()).map(|name| json!({"reset": id, "snapshot": name}))
        }
        Command::Resume(guest) => {
            host.find(guest).and_then(|id| host.resume(id).map(|()| done("resumed", id)))
        }
        Command::Save(guest, image, rate, wait) => {
            let id = host.find(guest)?;
            let job = host.save(id, image, *rate)?;
            let answer = json!({"saving": id, "image": image, "job": job});
            if *wait {
                let until = Until::Job(job);
                return Ok(Answer::Later(Later { id, until, looked: 0, answer }));
            }
            Ok(answer)
        }
        Command::Send(guest, text) => {
            let mut bytes = text.as_bytes().to_vec();
            bytes.push(b'\r');
            host.find(guest).and_then(|id| host.send(id, &bytes).map(|()| done("sent", id)))
        }
        Command::Shutdown => host.shutdown().map(|()| json!({"shutdown": true})),
        Command::Snapshot(guest, name) => {
            let id = host.find(guest)?;
            host.snapshot(id, name.as_deref()).map(|name| json!({"snapshot": name, "of": id}))
        }
        Command::Snapshots => Ok(host.snapshots()),
        Command::Stats(guest) => optional(host, guest).and_then(|id| host.stats(id)),
        Command::Trace(guest) => optional(host, guest).and_then(|id| host.trace(id)),
        Command::Wait(guest, until) => {
            let id = match host.find(guest) {
                Ok(id) => id,
                // It may have gone while the question was on its way: who is not there is gone.
                Err(_) if *until == Until::State("gone".to_owned()) => {
                    return Ok(Answer::Now(json!({"waited": guest})));
                }
                Err(error) => return Err(error),
            };
            return Ok(Answer::Later(Later {
                id,
                until: until.clone(),
                looked: 0,
                answer: done("waited", id),
            }));
        }
    };
    value.map(Answer::Now)
}

fn scalar(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => "-".to_owned(),
        Value::Bool(_) | Value::Number(_) | Value::Array(_) | Value::Object(_) => value.to_string(),
    }
}

/// Lists of objects become tables, objects become lines, text stays text.
fn render(value: &Value, indent: usize, out: &mut Pieces, rest: &mut dyn FnMut()) {
    match value {
        // What a list has is of one kind.
        Value::Array(rows) if rows.first().is_none_or(Value::is_object) => table(rows, indent, out, rest),
        Value::Array(rows) => {
            for row in rows {
                let _ = writeln!(out, "{:indent$}{}", "", scalar(row));
                rest();
            }
        }
        Value::Object(fields) => {
            for (key, value) in fields {
                match value {
                    Value::Object(_) | Value::Array(_) => {
                        let _ = writeln!(out, "{:indent$}{key}:", "");
                        render(value, indent + 2, out, rest);
                    }
                    Value::String(text) if text.len() > PIECE || text.contains('\n') => {
                        out.add(text, rest);
                        out.add("\n", rest);
                    }
                    Value::String(_) | Value::Null | Value::Bool(_) | Value::Number(_) => {
                        let _ = writeln!(out, "{:indent$}{key:<18} {}", "", scalar(value));
                        rest();
                    }
                }
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {
            let _ = writeln!(out, "{:indent$}{}", "", scalar(value));
        }
    }
}

/// Columns that come first in a table, in this order; the others follow by name.
const FIRST: [&str; 10] =
    ["id", "name", "state", "tree", "object", "start", "end", "command", "vcpu", "number"];

fn table(rows: &[Value], indent: usize, out: &mut Pieces, rest: &mut dyn FnMut()) {
    let mut columns: Vec<(String, usize)> = Vec::new();
    for row in rows.iter().filter_map(Value::as_object) {
        for (key, value) in row {
            let width = scalar(value).chars().count();
            match columns.iter_mut().find(|(name, _)| name == key) {
                Some((_, widest)) => *widest = width.max(*widest),
                None => columns.push((key.clone(), width.max(key.len()))),
            }
            rest();
        }
    }
    columns
        .sort_by_cached_key(|(name, _)| FIRST.iter().position(|first| first == name).unwrap_or(FIRST.len()));
    rest();
    let mut line = |cells: &dyn Fn(&str) -> String| {
        let mut text = String::new();
        for (name, width) in &columns {
            let width = *width;
            let _ = write!(text, "{:<width$}  ", cells(name));
            rest();
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
        fn rest(&mut self) {}
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
        fn clone(&mut self, id: u32, count: u32, paused: bool) -> Result<Vec<u32>, String> {
            self.said.push(format!("clone {id} {count} {paused}"));
            Ok((2..2 + count).collect())
        }
        fn snapshot(&mut self, _: u32, name: Option<&str>) -> Result<String, String> {
            Ok(name.unwrap_or("snap1").into())
        }
        fn snapshots(&mut self) -> Value {
            json!([])
        }
        fn delete(&mut self, name: &str) -> Result<(), String> {
            Err(format!("no snapshot '{name}'"))
        }
        fn reset(&mut self, _: u32, name: Option<&str>) -> Result<String, String> {
            name.map(String::from).ok_or_else(|| "it came from none".into())
        }
        fn save(&mut self, _: u32, _: &str, _: Option<u64>) -> Result<u32, String> {
            Ok(4)
        }
        fn jobs(&mut self) -> Value {
            json!([])
        }
        fn cancel(&mut self, job: u32) -> Result<(), String> {
            Err(format!("no job {job}"))
        }
        fn balloon(&mut self, id: u32, mib: Option<u64>) -> Result<Value, String> {
            Ok(json!({"guest": id, "wanted": mib}))
        }
        fn images(&mut self) -> Value {
            json!([])
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
        fn limit(&mut self, id: u32, resident: Option<Option<u64>>) -> Result<Value, String> {
            self.said.push(format!("limit {id} {resident:?}"));
            Ok(json!({}))
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
        fn swap(&mut self) -> Value {
            json!({"slots": {"free": 9}})
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
        fn reached(&mut self, _: u32, until: &Until, _: &mut u64) -> Result<bool, String> {
            match until {
                Until::Job(_) => Ok(true),
                Until::Gone => Ok(self.said.iter().any(|said| said == "buried")),
                Until::State(_) => Err("it is gone".into()),
                Until::Text(text) => Ok(text == "hello"),
            }
        }
    }

    fn run(line: &str, host: &mut Fake) -> Reply {
        match super::run(line, host) {
            Outcome::Now(reply) => reply,
            Outcome::Later(later) => panic!("{later:?}"),
        }
    }

    fn text(reply: &Reply) -> String {
        let mut pieces = reply.text(&mut || {});
        core::iter::from_fn(|| pieces.pop()).collect()
    }

    #[test]
    fn a_list_of_guests_reads_as_a_table() {
        let text = text(&run("guests", &mut Fake::default()));
        assert_eq!(text, "id  name    state\n1   one     running\n12  twelve  paused\n");
    }

    #[test]
    fn a_refusal_is_not_ok_and_says_why() {
        let reply = run("resume one", &mut Fake::default());
        assert_eq!(reply, refusal("it is not paused"));
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
    fn a_limit_is_shown_set_and_lifted_and_nothing_else() {
        let mut fake = Fake::default();
        for line in
            ["limit one", "limit one resident=64M", "limit one resident=264K", "limit one resident=none"]
        {
            assert!(run(line, &mut fake).ok, "{line}");
        }
        let said =
            ["limit 1 None", "limit 1 Some(Some(65536))", "limit 1 Some(Some(264))", "limit 1 Some(None)"];
        assert_eq!(fake.said, said);
        for line in ["limit", "limit one 64M", "limit one swap=1M", "limit one resident=lots", "limit two"] {
            assert!(!run(line, &mut fake).ok, "{line}");
        }
    }

    #[test]
    fn a_clone_names_its_children() {
        let reply = run("clone one -n 3", &mut Fake::default());
        assert_eq!(reply.json, json!({"cloned": 1, "children": [2, 3, 4]}));
    }

    #[test]
    fn a_balloons_size_is_what_the_guest_is_left() {
        let json = |line| run(line, &mut Fake::default()).json;
        assert_eq!(json("balloon one 64M"), json!({"guest": 1, "wanted": 64}));
        assert_eq!(json("balloon one"), json!({"guest": 1, "wanted": null}));
        assert!(!run("balloon one much", &mut Fake::default()).ok);
    }

    #[test]
    fn a_kill_is_answered_when_the_guest_is_gone() {
        let mut fake = Fake::default();
        let Outcome::Later(later) = super::run("kill one", &mut fake) else { panic!("too early") };
        let Outcome::Later(later) = resume(later, &mut fake) else { panic!("too early") };
        fake.said.push("buried".into());
        let Outcome::Now(reply) = resume(later, &mut fake) else { panic!("too late") };
        assert_eq!(reply, Reply { ok: true, json: json!({"killed": 1}) });
    }

    #[test]
    fn a_wait_answers_at_once_when_there_is_nothing_to_wait_for() {
        assert!(run("wait one \"hello\"", &mut Fake::default()).ok);
        assert!(!run("wait one paused", &mut Fake::default()).ok);
    }

    #[test]
    fn a_guest_that_is_not_there_is_gone_and_nothing_else() {
        assert!(run("wait nobody gone", &mut Fake::default()).ok);
        assert!(!run("wait nobody running", &mut Fake::default()).ok);
        assert!(!run("wait nobody \"gone\"", &mut Fake::default()).ok);
    }

    #[test]
    fn nested_answers_are_indented() {
        let text = text(&run("memory", &mut Fake::default()));
        assert_eq!(text, "frames:\n  free               3\n  wired              1\n");
    }
}
