//! The monitor's desk: typed bytes come in where an interrupt is handled, control lines and commands are taken and
//! carried out where a CPU goes round, and answers leave by the door that the question came through.
//!
//! Read [`typed`] and [`heard`], which only note; then [`serve`], which does. One CPU serves at a time, so
//! commands run one after the other, and one that makes a guest cannot be met by another in the middle.
//! What waits is bounded: lines, commands that wait for a guest, and answers not yet taken by the control port. Those stay
//! until it says that it has room: a client that does not read delays who comes by the port after it, and nobody else.
//! Called by `boot`, which owns the wires ([`Front`]). Calls `cmd` and `host`.

use alloc::collections::VecDeque;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt::Write;
use core::sync::atomic::{AtomicBool, Ordering};

use hv_abi::manifest::CONTROL_LIMIT;
use serde_json::Value;
use vmobject::lock::{Held, Ranked};

use super::cmd::{self, Later, Outcome, Reply};
use super::console::{Console, ESCAPE, Routed};
use super::host::Guests;
use super::paced::{self, Pieces};
use crate::arch::timer;
use crate::guest::{console, rank, table};
use crate::sched::load::Cpu;
use crate::sched::{self, Outside};

/// Lines that may wait to be carried out.
const MAX_REQUESTS: usize = 16;
/// Commands that may wait for a guest.
const MAX_WAITING: usize = 16;
/// Commands carried out before this CPU looks at its guests again (invariant I6).
const MAX_SERVED: usize = 4;
/// How long a command waits for a guest, in seconds.
const PATIENCE_S: u64 = 600;
/// How long the machine's end waits for a client that takes nothing of the last answers, in seconds.
const LAST_S: u64 = 5;
/// How much of what the guest printed meanwhile is shown when the monitor closes.
const REPLAY: usize = 4096;
/// How much is taken from the control port at once.
const CHUNK: usize = 64;
/// How often, before this CPU looks at its guests again: more than a line.
const MAX_CHUNKS: usize = 64;
/// How much the console is given at once (invariant I6).
const SHOWN: usize = 128;

/// The wires, as the desk uses them.
pub trait Front: Outside {
    /// Shows text at the console.
    fn show(&self, text: &str);
    /// Sends bytes out of the control port; how many there was room for. All, where nobody is at its other end. Once there
    /// was too little, [`heard`] is called when there is more.
    fn send(&self, bytes: &[u8]) -> usize;
    /// True when everything that was sent has left the machine.
    fn is_sent(&self) -> bool;
    /// Takes what has come in by the control port; 0 when there is no more.
    fn receive(&self, into: &mut [u8]) -> usize;
    /// Ends the machine well.
    fn leave(&self) -> !;
}

/// Where a line came from.
#[derive(Clone, Debug, PartialEq)]
enum Door {
    Console,
    /// The control port, with the asker's mark, which the answer repeats, and whether a person reads along.
    Port {
        id: Option<Value>,
        text: bool,
    },
}

/// A line that waits.
enum Request {
    /// Typed at the console; with nothing in it if the monitor was closed.
    Typed(String),
    /// Come by the control port.
    Sent(Vec<u8>),
    /// The same, and too long.
    Overlong,
}

struct Waiting {
    door: Door,
    later: Later,
    deadline: u64,
}

struct Desk {
    console: Console,
    /// What the attached guest had printed when the monitor opened.
    seen: u64,
    requests: VecDeque<Request>,
    waiting: Vec<Waiting>,
    /// A control line that is not complete, and whether it is too long already.
    input: Vec<u8>,
    overlong: bool,
    /// Answers that the control port has not taken yet, and how much of the first piece it has.
    output: Pieces,
    sent: usize,
}

static DESK: Ranked<{ rank::MONITOR }, Desk> = Ranked::new(Desk {
    console: Console::new(),
    seen: 0,
    requests: VecDeque::new(),
    waiting: Vec::new(),
    input: Vec::new(),
    overlong: false,
    output: Pieces::new(),
    sent: 0,
});
/// There is something for [`serve`]. Written under the desk's lock.
static WORK: AtomicBool = AtomicBool::new(false);
/// The control port may have something.
static HEARD: AtomicBool = AtomicBool::new(false);
/// It may have room.
static ROOM: AtomicBool = AtomicBool::new(false);
/// A CPU serves.
static SERVING: AtomicBool = AtomicBool::new(false);

impl Desk {
    fn note(&self) {
        WORK.store(!self.waiting.is_empty() || self.answerable().is_some(), Ordering::SeqCst);
        // Whoever hears after this says himself that there is work.
        let lines = HEARD.load(Ordering::SeqCst) && self.requests.len() < MAX_REQUESTS;
        let room = ROOM.load(Ordering::SeqCst) && !self.output.is_empty();
        if lines || room {
            WORK.store(true, Ordering::SeqCst);
        }
    }

    /// The first line that can be answered: those of the port wait until it has taken the last answer.
    fn answerable(&self) -> Option<usize> {
        let blocked = !self.output.is_empty();
        self.requests.iter().position(|line| !blocked || matches!(line, Request::Typed(_)))
    }

    /// Takes that.
    fn next(&mut self) -> Option<Request> {
        self.requests.remove(self.answerable()?)
    }

    fn take_byte(&mut self, byte: u8) {
        if byte == b'\n' {
            self.take_line();
        } else if self.input.len() < CONTROL_LIMIT {
            self.input.push(byte);
        } else {
            self.overlong = true;
        }
    }

    fn take_line(&mut self) {
        let input = core::mem::take(&mut self.input);
        if core::mem::take(&mut self.overlong) {
            self.requests.push_back(Request::Overlong);
        } else if !input.trim_ascii().is_empty() {
            // Who asks for nothing in so many words waits for an answer all the same.
            self.requests.push_back(Request::Sent(input));
        }
    }
}

impl Request {
    /// Where an answer is wanted, and to what.
    fn addressed(self) -> (Door, String) {
        match self {
            Self::Typed(line) => (Door::Console, line),
            Self::Sent(line) => addressed(&String::from_utf8_lossy(&line)),
            Self::Overlong => (Door::Port { id: None, text: false }, OVERLONG.to_string()),
        }
    }
}

/// Told where there is no memory for an answer.
const CUT: &str = "there is no memory for the whole answer";

/// Parses as no command; its answer says what was wrong.
const OVERLONG: &str = "a-line-that-is-too-long";

/// A control line is words, or `{"id": ANYTHING, "command": WORDS, "text": BOOL}`: then the answer repeats the
/// id, and with `text` it has the words for a person beside the value.
fn addressed(line: &str) -> (Door, String) {
    let Ok(Value::Object(mut fields)) = serde_json::from_str::<Value>(line) else {
        return (Door::Port { id: None, text: false }, line.trim().to_string());
    };
    let words = fields.get("command").and_then(Value::as_str).unwrap_or_default().to_string();
    let text = fields.get("text").and_then(Value::as_bool).unwrap_or_default();
    (Door::Port { id: fields.remove("id"), text }, words)
}

/// Takes a byte typed at the console; what comes back is for the attached guest. `out` shows the echo.
pub fn typed<const R: u8>(byte: u8, out: &mut dyn Write, held: &mut Held<'_, R>) -> Option<u8> {
    const { assert!(R < rank::GUESTS) };
    // Needed where the monitor opens.
    let attached = console::attached().filter(|_| byte == ESCAPE).and_then(|id| table::get(id, held));
    let printed = attached.map_or(0, |guest| guest.log.total(held));
    let (mut desk, _held) = DESK.lock(held);
    let was_open = desk.console.is_open();
    if was_open
        && desk.requests.iter().filter(|line| matches!(line, Request::Typed(_))).count() >= MAX_REQUESTS
    {
        // Bell: what is typed faster than it is carried out is lost, and heard to be.
        let _ = out.write_char('\x07');
        return None;
    }
    let routed = desk.console.feed(byte, out);
    if desk.console.is_open() != was_open {
        if was_open {
            // Nothing to do but to show what the guest printed meanwhile.
            desk.requests.push_back(Request::Typed(String::new()));
        } else {
            desk.seen = printed;
            console::hold_back(true);
        }
    }
    let passed = match routed {
        Routed::Taken => None,
        Routed::Guest(byte) => Some(byte),
        Routed::Command(line) => {
            desk.requests.push_back(Request::Typed(line));
            None
        }
    };
    desk.note();
    if WORK.load(Ordering::SeqCst) {
        sched::call_daemon();
    }
    passed
}

/// Opens the monitor, because there is no guest to type into.
pub fn open(out: &mut dyn Write, held: &mut Held<'_, 0>) {
    let (mut desk, _held) = DESK.lock(held);
    if !desk.console.is_open() {
        let _ = desk.console.feed(super::console::ESCAPE, out);
    }
}

/// The control port may have something, or room for more; or the last guest or job has ended, which may be the machine's end.
pub fn heard() {
    HEARD.store(true, Ordering::SeqCst);
    ROOM.store(true, Ordering::SeqCst);
    WORK.store(true, Ordering::SeqCst);
    sched::call_daemon();
}

/// Takes what has come in by the control port as long as there is room for lines, a few bytes at a time (invariant I6).
/// What there is no room for stays where it is, and its sender waits.
fn listen(front: &dyn Front, cpu: &Cpu, held: &mut Held<'_, 0>) {
    if !HEARD.swap(false, Ordering::SeqCst) {
        return;
    }
    for _ in 0..MAX_CHUNKS {
        {
            let (mut desk, _held) = DESK.lock(held);
            if desk.requests.len() >= MAX_REQUESTS {
                break;
            }
            let mut bytes = [0; CHUNK];
            let count = front.receive(&mut bytes).min(CHUNK);
            if count == 0 {
                return;
            }
            bytes[..count].iter().for_each(|&byte| desk.take_byte(byte));
        }
        sched::let_interrupts_in(cpu, front, held);
    }
    HEARD.store(true, Ordering::SeqCst);
}

/// Carries out what waits, a bounded part of it.
pub fn serve(front: &dyn Front, cpu: &mut Cpu, held: &mut Held<'_, 0>) {
    if !WORK.load(Ordering::Relaxed) || SERVING.swap(true, Ordering::SeqCst) {
        return;
    }
    listen(front, cpu, held);
    flush(front, cpu, held);
    for _ in 0..MAX_SERVED {
        let Some(request) = DESK.lock(held).0.next() else { break };
        let (door, line) = request.addressed();
        sched::let_interrupts_in(cpu, front, held);
        if door == Door::Console && line.is_empty() {
            replay(front, cpu, held);
            continue;
        }
        cpu.make_way(front, held);
        let outcome = cmd::run(&line, &mut Guests::new(front, cpu, held));
        settle(door, &line, outcome, front, cpu, held);
    }
    ask_again(front, cpu, held);
    flush(front, cpu, held);
    DESK.lock(held).0.note();
    if super::host::is_leaving() && table::is_empty(held) && !sched::jobs::are_running() {
        end(front, cpu, held);
    }
    SERVING.store(false, Ordering::SeqCst);
    if WORK.load(Ordering::SeqCst) {
        // So that running guests let their CPUs go round now and then: for what waits, for more lines than are carried out at
        // once, and for what came to another CPU while this one served.
        sched::call_daemon_here();
    }
}

/// Ends the machine. No other CPU serves any more.
fn end(front: &dyn Front, cpu: &mut Cpu, held: &mut Held<'_, 0>) -> ! {
    // The last guest may have ended since they were asked.
    ask_again(front, cpu, held);
    let patience = timer::freq().saturating_mul(LAST_S);
    let mut deadline = timer::now().saturating_add(patience);
    loop {
        if flush(front, cpu, held) > 0 {
            deadline = timer::now().saturating_add(patience);
        }
        if DESK.lock(held).0.output.is_empty() && front.is_sent() {
            break;
        }
        if timer::now() > deadline {
            log::warn!("nobody has read the last answers for {LAST_S} s: they are lost");
            break;
        }
        sched::let_interrupts_in(cpu, front, held);
    }
    front.leave()
}

/// Answers, or puts the command with those that wait.
fn settle(door: Door, line: &str, outcome: Outcome, front: &dyn Front, cpu: &Cpu, held: &mut Held<'_, 0>) {
    match outcome {
        Outcome::Now(reply) => {
            let attached = door == Door::Console && reply.ok && reply.json.get("attached").is_some();
            answer(door, reply, front, cpu, held);
            if attached {
                close(front, cpu, held);
            }
        }
        Outcome::Later(later) => {
            let patience = timer::freq().saturating_mul(PATIENCE_S);
            let waiting = Waiting { door, later, deadline: timer::now().saturating_add(patience) };
            let refused = {
                let (mut desk, _held) = DESK.lock(held);
                if desk.waiting.len() < MAX_WAITING {
                    desk.waiting.push(waiting);
                    None
                } else {
                    Some(waiting.door)
                }
            };
            if let Some(door) = refused {
                let error = format!("{MAX_WAITING} commands wait for guests already; not waited for: {line}");
                answer(door, cmd::refusal(&error), front, cpu, held);
            }
        }
    }
}

/// Looks whether commands that wait can be answered.
fn ask_again(front: &dyn Front, cpu: &mut Cpu, held: &mut Held<'_, 0>) {
    let waiting = core::mem::take(&mut DESK.lock(held).0.waiting);
    for waiting in waiting {
        let Waiting { door, later, deadline } = waiting;
        match cmd::resume(later, &mut Guests::new(front, cpu, held)) {
            Outcome::Now(reply) => answer(door, reply, front, cpu, held),
            Outcome::Later(_) if timer::now() > deadline => {
                let error = format!("it did not happen within {PATIENCE_S} s");
                answer(door, cmd::refusal(&error), front, cpu, held);
            }
            Outcome::Later(later) => DESK.lock(held).0.waiting.push(Waiting { door, later, deadline }),
        }
    }
}

fn answer(door: Door, reply: Reply, front: &dyn Front, cpu: &Cpu, held: &mut Held<'_, 0>) {
    let mut rest = || sched::let_interrupts_in(cpu, front, held);
    match door {
        Door::Console => {
            let mut text = reply.text(&mut rest);
            while let Some(piece) = text.pop() {
                show(&piece.replace('\n', "\r\n"), front, &mut rest);
            }
            if text.is_cut() {
                front.show(&format!("\r\n[{CUT}]\r\n"));
            }
            paced::discard(reply.json, &mut rest);
            let mut prompt = String::new();
            DESK.lock(held).0.console.prompt(&mut prompt);
            front.show(&prompt);
        }
        Door::Port { id, text } => {
            let mut line = sent(id.as_ref(), &reply, text, &mut rest);
            if line.is_cut() {
                // A part of it would be no JSON.
                line = sent(id.as_ref(), &cmd::refusal(CUT), text, &mut rest);
            }
            paced::discard(reply.json, &mut rest);
            while let Some(piece) = line.pop() {
                DESK.lock(held).0.output.push(piece);
                sched::let_interrupts_in(cpu, front, held);
            }
            flush(front, cpu, held);
        }
    }
}

/// An answer as a line for the control port.
fn sent(id: Option<&Value>, reply: &Reply, text: bool, rest: &mut dyn FnMut()) -> Pieces {
    let mut line = Pieces::new();
    line.add("{", rest);
    if let Some(id) = id {
        line.add("\"id\":", rest);
        paced::write_json(id, &mut line, rest);
        line.add(",", rest);
    }
    line.add(if reply.ok { "\"ok\":true,\"reply\":" } else { "\"ok\":false,\"reply\":" }, rest);
    paced::write_json(&reply.json, &mut line, rest);
    if text {
        line.add(",\"text\":\"", rest);
        let mut text = reply.text(rest);
        while let Some(piece) = text.pop() {
            paced::write_part(&piece, &mut line, rest);
            rest();
        }
        line.add("\"", rest);
    }
    line.add("}\n", rest);
    line
}

/// Shows text at the console, a few characters at a time.
fn show(text: &str, front: &dyn Front, rest: &mut dyn FnMut()) {
    for part in paced::parts(text, SHOWN) {
        front.show(part);
        rest();
    }
}

/// Gives the control port what it has room for, a piece at a time; how many bytes that was.
fn flush(front: &dyn Front, cpu: &Cpu, held: &mut Held<'_, 0>) -> usize {
    // Before the port is asked: it may have more room the moment after.
    ROOM.store(false, Ordering::SeqCst);
    let mut taken = 0;
    loop {
        {
            let (mut desk, _held) = DESK.lock(held);
            let desk = &mut *desk;
            let Some(piece) = desk.output.first() else { return taken };
            let sent = front.send(&piece.as_bytes()[desk.sent..]);
            if sent == 0 {
                return taken;
            }
            taken += sent;
            desk.sent += sent;
            if desk.sent == piece.len() {
                desk.output.pop();
                desk.sent = 0;
            }
        }
        sched::let_interrupts_in(cpu, front, held);
    }
}

/// Goes back to the guest.
fn close(front: &dyn Front, cpu: &Cpu, held: &mut Held<'_, 0>) {
    let mut text = String::new();
    {
        let (mut desk, _held) = DESK.lock(held);
        desk.console.close(&mut text);
        desk.seen = u64::MAX;
    }
    front.show(&text);
    replay(front, cpu, held);
}

/// Shows who is attached, and the end of what it printed while the monitor was open; all of its end, if it is
/// attached just now.
fn replay(front: &dyn Front, cpu: &Cpu, held: &mut Held<'_, 0>) {
    let Some(guest) = console::attached().and_then(|id| table::get(id, held)) else {
        front.show("[no guest is attached]\r\n");
        return console::hold_back(false);
    };
    let total = guest.log.total(held);
    let seen = core::mem::replace(&mut DESK.lock(held).0.seen, total);
    let seen = if seen == u64::MAX { 0 } else { seen };
    front.show(&format!("[guest {} \"{}\"]\r\n", guest.id, guest.name()));
    let mut at = seen.max(total.saturating_sub(REPLAY as u64));
    while at < total
        && let Some((start, bytes)) = guest.log.next(at, SHOWN, held)
    {
        at = start + bytes.len() as u64;
        front.show(&String::from_utf8_lossy(&bytes));
        sched::let_interrupts_in(cpu, front, held);
    }
    console::hold_back(DESK.lock(held).0.console.is_open());
}

#[cfg(test)]
#[path = "desk_tests.rs"]
mod tests;
