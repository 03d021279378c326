//! The desk between a console and a control port in memory: the one always there, the other with little room or none.

use super::*;
use serde_json::json;

#[test]
fn an_answer_repeats_the_id_of_its_question() {
    let plain = || Door::Port { id: None, text: false };
    assert_eq!(addressed("guests"), (plain(), "guests".into()));
    let (door, line) = addressed(r#"{"id": [7, "x"], "command": "kill 3", "text": true}"#);
    assert_eq!((door, line.as_str()), (Door::Port { id: Some(json!([7, "x"])), text: true }, "kill 3"));
    assert_eq!(addressed("{}"), (plain(), String::new()));
}

/// A control port with little room, and a console.
#[derive(Default)]
struct Wires {
    shown: spin::Mutex<String>,
    sent: spin::Mutex<Vec<u8>>,
    came: spin::Mutex<VecDeque<u8>>,
    full: AtomicBool,
}

impl Front for Wires {
    fn show(&self, text: &str) {
        self.shown.lock().push_str(text);
    }
    fn send(&self, bytes: &[u8]) -> usize {
        let count = if self.full.load(Ordering::SeqCst) { 0 } else { bytes.len().min(7) };
        self.sent.lock().extend_from_slice(&bytes[..count]);
        count
    }
    fn receive(&self, into: &mut [u8]) -> usize {
        let mut came = self.came.lock();
        let count = came.len().min(into.len());
        into.iter_mut().zip(came.drain(..count)).for_each(|(to, byte)| *to = byte);
        count
    }
    fn is_sent(&self) -> bool {
        true
    }
    fn leave(&self) -> ! {
        panic!("nobody asked for that")
    }
}

impl Outside for Wires {
    fn interrupt(&self, _: u32, _: &mut Held<'_, { rank::VCPU }>) {}
    fn last_guest_ended(&self) {}
    fn job_ended(&self) {}
    fn set_timer_active(&self, _: bool) {}
    fn look_around(&self, _: &mut Cpu, _: &mut Held<'_, 0>) {}
    fn poll(&self, _: &mut Held<'_, 0>) {}
}

fn arrived(bytes: &[u8], wires: &Wires) {
    wires.came.lock().extend(bytes);
    heard();
}

/// One test, because the desk is one.
#[test]
fn lines_of_both_doors_are_answered_where_they_came_from() {
    let (wires, mut held, mut echo) = (Wires::default(), Held::root(), String::new());
    let mut cpu = Cpu::new(0);
    for byte in *b"x\x14help help\r" {
        let passed = typed(byte, &mut echo, &mut held);
        assert_eq!(passed, (byte == b'x').then_some(byte));
    }
    arrived(b"{\"id\": 9, \"command\": \"help che", &wires);
    serve(&wires, &mut cpu, &mut held);
    assert!(wires.shown.lock().contains("usage: help [CMD]"), "{}", wires.shown.lock());
    assert!(wires.shown.lock().ends_with("hv> "));
    assert!(wires.sent.lock().is_empty());

    arrived(b"ck\"}\n", &wires);
    arrived(&[b'a'; 4000], &wires);
    arrived(b"\n\n{\"id\": 3, \"command\": \"\"}\n", &wires);
    serve(&wires, &mut cpu, &mut held);
    let sent = String::from_utf8(wires.sent.lock().clone()).unwrap();
    let answers: Vec<Value> = sent.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(answers.len(), 3);
    assert_eq!((&answers[0]["id"], &answers[0]["ok"]), (&json!(9), &json!(true)));
    assert_eq!(answers[1]["ok"], json!(false));
    assert_eq!((&answers[2]["id"], &answers[2]["ok"]), (&json!(3), &json!(false)));

    arrived(&b"help check\n".repeat(100), &wires);
    serve(&wires, &mut cpu, &mut held);
    assert!(!wires.came.lock().is_empty(), "lines that wait are bounded");
    for _ in 0..1000 {
        serve(&wires, &mut cpu, &mut held);
    }
    let busy = || WORK.load(Ordering::SeqCst);
    assert!(wires.came.lock().is_empty() && !busy(), "all are taken in the end");
    let lines = || wires.sent.lock().iter().filter(|byte| **byte == b'\n').count();
    assert_eq!(lines(), 103);

    wires.full.store(true, Ordering::SeqCst);
    arrived(&b"help check\n".repeat(100), &wires);
    for _ in 0..10 {
        serve(&wires, &mut cpu, &mut held);
    }
    assert!(!busy() && lines() == 103, "who does not read is waited for without looking");
    let shown = wires.shown.lock().len();
    for byte in *b"help help\r" {
        assert_eq!(typed(byte, &mut echo, &mut held), None);
    }
    serve(&wires, &mut cpu, &mut held);
    assert!(wires.shown.lock().len() > shown && !busy(), "the console does not wait for the port");
    wires.full.store(false, Ordering::SeqCst);
    heard();
    for _ in 0..1000 {
        serve(&wires, &mut cpu, &mut held);
    }
    assert!(lines() == 203 && !busy(), "once there is room, all are answered");

    assert_eq!(typed(0x14, &mut echo, &mut held), Some(0x14));
    serve(&wires, &mut cpu, &mut held);
    assert!(wires.shown.lock().ends_with("[no guest is attached]\r\n"));
}
