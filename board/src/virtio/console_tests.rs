//! The console driver against a device in memory that is slow, loses its host, and lies.

use super::DeviceError;
use super::console::{
    CONSOLE_PORT, CONTROL, CONTROL_RECEIVE, CONTROL_TRANSMIT, Console, DEVICE_READY, MULTIPORT, Message,
    PORT, PORT_ADD, PORT_OPEN, PORT_READY, PORT_REMOVE, RECEIVE, TRANSMIT,
};
use super::fake::{FakeTransport, load, store};
use std::vec;
use std::vec::Vec;
use virtio_drivers::transport::DeviceStatus;

const RESIZE: u16 = 5;
const PORT_NAME: u16 = 7;
/// Bytes that a direction holds.
const ROOM: usize = 4096;

/// The other end.
struct Host(FakeTransport);

impl Host {
    /// A console that has said that it is ready, and nothing else.
    fn new() -> (Console<FakeTransport>, Self) {
        let host = Self(FakeTransport::new(MULTIPORT, vec![]));
        (Console::new(host.0.clone()).unwrap(), host)
    }

    /// A console whose port is there, with somebody connected.
    fn connected() -> (Console<FakeTransport>, Self) {
        let (mut console, host) = Self::new();
        host.tell(PORT_ADD, 1);
        host.tell(PORT_OPEN, 1);
        assert_eq!(console.read(&mut [0; 8]), 0);
        assert_eq!(host.told().len(), 3);
        (console, host)
    }

    /// Gives a buffer of a queue back with bytes in it; false if there is none.
    fn fill(&self, queue: u16, bytes: &[u8]) -> bool {
        let Some(chain) = self.0.take(queue.into()) else { return false };
        let (base, room, device_writes) = chain.buffers[0];
        assert!(device_writes && bytes.len() <= room && chain.buffers.len() == 1);
        bytes.iter().zip(0..).for_each(|(byte, at): (_, u64)| store(base + at, *byte));
        self.0.finish(queue.into(), chain.head, u32::try_from(bytes.len()).unwrap());
        true
    }

    /// Takes what is on a queue, chain by chain.
    fn drain(&self, queue: u16) -> Vec<Vec<u8>> {
        let mut chains = vec![];
        while let Some(chain) = self.0.take(queue.into()) {
            let (base, bytes, device_writes) = chain.buffers[0];
            assert!(!device_writes && chain.buffers.len() == 1);
            chains.push((0..bytes as u64).map(|at| load::<u8>(base + at)).collect());
            self.0.finish(queue.into(), chain.head, 0);
        }
        chains
    }

    /// Something arrives.
    fn arrive(&self, text: &[u8]) -> bool {
        self.fill(RECEIVE, text)
    }

    /// Everything that was sent.
    fn sent(&self) -> Vec<u8> {
        self.drain(TRANSMIT).concat()
    }

    fn tell_of(&self, id: u32, event: u16, value: u16) -> bool {
        self.fill(CONTROL_RECEIVE, &Message { id, event, value }.to_bytes())
    }

    /// Says something of port 1.
    fn tell(&self, event: u16, value: u16) {
        assert!(self.tell_of(PORT, event, value), "no buffer for a message");
    }

    /// What the driver has said, as id, event and value.
    fn told(&self) -> Vec<(u32, u16, u16)> {
        let said = self.drain(CONTROL_TRANSMIT).into_iter().map(|bytes| bytes.try_into().unwrap());
        said.map(Message::from_bytes).map(|message| (message.id, message.event, message.value)).collect()
    }

    fn is_reset(&self) -> bool {
        self.0.state().status == DeviceStatus::empty()
    }
}

/// What a broken device is good for: nothing that anybody waits for.
fn is_given_up(console: &mut Console<FakeTransport>, host: &Host) {
    assert_eq!(console.read(&mut [0; 8]), 0);
    assert_eq!(console.write(b"xyz"), 3, "nobody waits for a device that is gone");
    assert!(console.is_sent());
    assert!(host.is_reset());
}

#[test]
fn port_1_is_made_ready_and_opened_when_the_device_adds_it() {
    let (mut console, host) = Host::new();
    assert!(host.0.state().status.contains(DeviceStatus::DRIVER_OK));
    assert_eq!(host.0.state().accepted & MULTIPORT, MULTIPORT);
    assert_eq!(host.told(), [(u32::MAX, DEVICE_READY, 1)]);
    assert_eq!(console.read(&mut [0; 8]), 0);
    assert_eq!(host.told(), [], "there is no port yet");
    host.tell(PORT_ADD, 1);
    assert_eq!(console.read(&mut [0; 8]), 0);
    assert_eq!(host.told(), [(PORT, PORT_READY, 1), (PORT, PORT_OPEN, 1)]);
    host.tell(PORT_OPEN, 1);
    assert_eq!(console.write(b"hello"), 5);
    assert_eq!(host.sent(), b"hello");
}

#[test]
fn a_console_with_one_port_is_refused() {
    let device = FakeTransport::new(0, vec![]);
    assert_eq!(Console::new(device).err(), Some(DeviceError::OnePort));
}

#[test]
fn a_port_that_is_added_late_is_opened_then_and_others_are_left_alone() {
    let (mut console, host) = Host::new();
    host.told();
    for other in [0, 2, 30] {
        assert!(host.tell_of(other, PORT_ADD, 1));
        assert!(host.tell_of(other, CONSOLE_PORT, 1));
        assert!(host.tell_of(other, PORT_OPEN, 1));
        assert_eq!(console.write(b"for nobody"), 10);
    }
    assert_eq!((host.told(), host.sent()), (vec![], vec![]));
    host.tell(PORT_ADD, 1);
    host.tell(PORT_OPEN, 1);
    assert!(host.tell_of(2, PORT_OPEN, 0));
    assert_eq!(console.write(b"late"), 4);
    assert_eq!(host.told().len(), 2);
    assert_eq!(host.sent(), b"late");
}

#[test]
fn names_and_sizes_change_nothing_and_a_port_that_was_removed_is_opened_again() {
    let (mut console, host) = Host::connected();
    let mut named = Message { id: PORT, event: PORT_NAME, value: 1 }.to_bytes().to_vec();
    named.extend(b"org.example.control\0");
    assert!(host.fill(CONTROL_RECEIVE, &named));
    let resized = Message { id: PORT, event: RESIZE, value: 0 }.to_bytes();
    assert!(host.fill(CONTROL_RECEIVE, &[&resized[..], &[80, 0, 25, 0]].concat()));
    host.tell(99, 7);
    assert_eq!(console.write(b"a"), 1);
    assert_eq!((host.told(), host.sent()), (vec![], b"a".to_vec()));
    // A port for a person is to be opened, even if it is open.
    host.tell(CONSOLE_PORT, 1);
    assert_eq!(console.read(&mut [0; 8]), 0);
    assert_eq!(host.told(), [(PORT, PORT_OPEN, 1)]);

    host.tell(PORT_REMOVE, 1);
    assert_eq!(console.write(b"b"), 1);
    assert_eq!(host.sent(), b"");
    host.tell(PORT_ADD, 1);
    host.tell(PORT_OPEN, 1);
    assert_eq!(console.write(b"c"), 1);
    assert_eq!(host.told(), [(PORT, PORT_READY, 1), (PORT, PORT_OPEN, 1)]);
    assert_eq!(host.sent(), b"c");
}

#[test]
fn output_goes_nowhere_while_no_host_is_connected() {
    let (mut console, host) = Host::connected();
    let text = vec![b'x'; 3 * ROOM];
    assert_eq!(console.write(&text), ROOM);
    assert_eq!(console.write(&text), 0, "the host is slow");
    assert!(!console.is_sent());
    // It goes away in the middle; what it had not read is nobody's.
    host.tell(PORT_OPEN, 0);
    assert!(console.is_sent());
    assert_eq!(console.write(&text), text.len());
    assert_eq!(host.sent().len(), ROOM);
    host.tell(PORT_OPEN, 1);
    assert_eq!(console.write(b"next"), 4);
    assert_eq!(host.sent(), b"next");
    assert!(console.is_sent());
}

#[test]
fn who_asks_is_answered_though_the_message_of_its_coming_found_no_buffer() {
    let (mut console, host) = Host::connected();
    let mut count = 0;
    while host.tell_of(PORT, PORT_OPEN, 0) {
        count += 1;
    }
    assert_eq!(count, CONTROL, "there is a buffer for each message that the device's queue holds");
    assert!(host.arrive(b"guests\n"));
    assert_eq!(console.read(&mut [0; 64]), 7);
    assert_eq!(console.write(b"none"), 4);
    assert_eq!(host.sent(), b"none");
}

#[test]
fn what_arrives_is_read_in_order_in_pieces_of_any_size() {
    let (mut console, host) = Host::connected();
    let mut expected = vec![];
    let mut got: Vec<u8> = vec![];
    for round in 0..10_000_usize {
        let text: Vec<u8> =
            (0..round % 500 + 1).map(|at| u8::try_from((at + round) % 256).unwrap()).collect();
        if host.arrive(&text) {
            expected.extend(text);
        }
        let mut out = [0; 97];
        let count = console.read(&mut out[..round % 97 + 1]);
        got.extend(&out[..count]);
    }
    let mut out = [0; 97];
    while let count @ 1.. = console.read(&mut out) {
        got.extend(&out[..count]);
    }
    assert_eq!(got, expected);
}

#[test]
fn output_beyond_the_buffers_waits_for_the_reader_and_is_never_lost() {
    let (mut console, host) = Host::connected();
    let text: Vec<u8> = (0..100_000_u32).map(|at| at.to_le_bytes()[0]).collect();
    let (mut taken, mut seen) = (0, vec![]);
    while taken < text.len() {
        let count = console.write(&text[taken..]);
        assert!(count <= ROOM);
        assert_eq!(console.write(&text[taken + count..]), 0, "there is no room left, or nothing to send");
        assert!(!console.is_sent());
        taken += count;
        seen.extend(host.sent());
    }
    assert!(console.is_sent());
    assert_eq!(seen, text);
}

#[test]
fn a_device_that_returns_a_buffer_it_does_not_have_is_reset() {
    // Of those to fill it has all there are.
    let all = [(RECEIVE, 8), (CONTROL_RECEIVE, CONTROL), (TRANSMIT, 0), (CONTROL_TRANSMIT, 0)];
    for (queue, first) in all {
        for head in [first, first + 1, 999] {
            let (mut console, host) = Host::connected();
            host.0.finish(queue.into(), u16::try_from(head).unwrap(), 8);
            // It is found out when the driver next has to do with that queue.
            host.tell(CONSOLE_PORT, 1);
            console.read(&mut [0; 8]);
            console.write(b"x");
            is_given_up(&mut console, &host);
        }
    }
}

#[test]
fn a_device_that_says_less_than_a_message_is_reset() {
    for bytes in 0..Message::BYTES {
        let (mut console, host) = Host::connected();
        assert!(host.fill(CONTROL_RECEIVE, &vec![0; bytes]));
        assert_eq!(console.read(&mut [0; 8]), 0);
        is_given_up(&mut console, &host);
    }
}

#[test]
fn a_device_that_wants_answers_and_takes_none_is_reset() {
    let (mut console, host) = Host::connected();
    for said in 0..1000 {
        if host.is_reset() {
            assert!(said > CONTROL / 2, "it takes its time, no more");
            return is_given_up(&mut console, &host);
        }
        host.tell(PORT_ADD, 1);
        assert_eq!(console.read(&mut [0; 8]), 0);
    }
    panic!("the driver's answers have no bound");
}

#[test]
fn a_device_that_says_anything_at_all_is_heard_without_harm() {
    let (mut console, mut host) = Host::connected();
    let mut seed = 1_u64;
    let mut random = || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        seed >> 33
    };
    let mut resets = 0;
    for _ in 0..50_000 {
        let noise: Vec<u8> = (0..8 + random() % 9).map(|_| random().to_le_bytes()[0] % 10).collect();
        match random() % 6 {
            0 => host.fill(CONTROL_RECEIVE, &noise),
            1 => host.tell_of(PORT, u16::from(noise[0]), u16::from(noise[1] % 2)),
            2 => host.arrive(&noise[..usize::from(noise[0] % 9)]),
            3 => host.told().len() + host.sent().len() > 0,
            4 => console.write(&noise) > 0,
            _ => console.read(&mut [0; 8]) > 0,
        };
        if random() % 100 > 0 {
            continue;
        }
        // A buffer that it may have or not, with as many bytes in it as it likes.
        let (queue, head) = (2 + random() % 4, random() % 40);
        host.0.finish(usize::try_from(queue).unwrap(), u16::try_from(head).unwrap(), u32::MAX);
        host.0.finish(CONTROL_RECEIVE.into(), u16::try_from(random() % 40).unwrap(), 8);
        console.write(&noise);
        // More than it may have filled.
        assert!((0..3).map(|_| console.read(&mut [0; ROOM])).sum::<usize>() < 3 * ROOM);
        console.write(&noise);
        if host.is_reset() {
            is_given_up(&mut console, &host);
            resets += 1;
        }
        (console, host) = Host::connected();
    }
    assert!(resets > 10, "only {resets} were found out");
}
