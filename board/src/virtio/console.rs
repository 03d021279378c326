//! A virtio console's first port as a stream of bytes: the hypervisor's control socket.
//!
//! Nothing waits: [`Console::read`] takes what has arrived, [`Console::write`] what there is room for. Each
//! direction has eight buffers of 512 bytes in one page. QEMU holds back input while no buffer is free, so a slow
//! reader loses nothing; it drops output while nobody is connected.
#![expect(unsafe_code, reason = "the device moves bytes to and from pages that it shares with us")]

use super::hal::{Identity, Pages};
use super::{DeviceError, Mmio, kick, negotiate, queue};
use core::ptr::NonNull;
use virtio_drivers::queue::VirtQueue;
use virtio_drivers::transport::{DeviceStatus, Transport};

const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
const QUEUE: usize = 8;
const BUFFER: usize = 4096 / QUEUE;

/// A buffer that has arrived and is not read to its end.
#[derive(Clone, Copy)]
struct Arrived {
    buffer: usize,
    next: usize,
    end: usize,
}

/// One console.
/// # Invariants
/// C1. `of_receive[head]` and `of_transmit[head]` name the buffer behind each chain in the queue.
/// C2. A buffer is behind one chain at most; one that is behind none is ours to read and write.
pub struct Console<T: Transport = Mmio> {
    transport: T,
    receive: VirtQueue<Identity, QUEUE>,
    transmit: VirtQueue<Identity, QUEUE>,
    input: Pages,
    output: Pages,
    of_receive: [Option<u8>; QUEUE],
    of_transmit: [Option<u8>; QUEUE],
    arrived: Option<Arrived>,
    gone: bool,
}

impl<T: Transport> Console<T> {
    /// Takes the console over, resetting it, and gives it buffers to fill.
    pub fn new(mut transport: T) -> Result<Self, DeviceError> {
        negotiate(&mut transport, 0)?;
        let receive = queue(&mut transport, RECEIVE)?;
        let transmit = queue(&mut transport, TRANSMIT)?;
        let input = Pages::take(1).ok_or(DeviceError::NoMemory)?;
        let output = Pages::take(1).ok_or(DeviceError::NoMemory)?;
        transport.finish_init();
        let mut console = Self {
            transport,
            receive,
            transmit,
            input,
            output,
            of_receive: [None; QUEUE],
            of_transmit: [None; QUEUE],
            arrived: None,
            gone: false,
        };
        for buffer in 0..QUEUE {
            console.offer(buffer);
        }
        Ok(console)
    }

    /// Acknowledges the interrupt; call before reading until nothing comes.
    pub fn acknowledge(&mut self) {
        self.transport.ack_interrupt();
    }

    /// Takes bytes that have arrived; 0 when there are none.
    pub fn read(&mut self, out: &mut [u8]) -> usize {
        let mut count = 0;
        while count < out.len() {
            let Some(mut arrived) = self.arrived.take().or_else(|| self.next_arrived()) else { break };
            let bytes = (arrived.end - arrived.next).min(out.len() - count);
            let from = self.input.at(arrived.buffer * BUFFER + arrived.next);
            let to = NonNull::from(&mut out[count..count + bytes]).cast();
            // SAFETY: C2: the buffer is ours, and `next..end` lies in it; `out` has room.
            unsafe { from.copy_to_nonoverlapping(to, bytes) };
            arrived.next += bytes;
            count += bytes;
            if arrived.next == arrived.end {
                self.offer(arrived.buffer);
            } else {
                self.arrived = Some(arrived);
            }
        }
        count
    }

    /// True when the device has taken everything that was written, or will take nothing any more.
    pub fn is_sent(&mut self) -> bool {
        self.reclaim();
        self.gone || self.of_transmit.iter().all(Option::is_none)
    }

    /// Sends as many bytes as there is room for, and says how many.
    pub fn write(&mut self, bytes: &[u8]) -> usize {
        self.reclaim();
        let mut sent = 0;
        for part in bytes.chunks(BUFFER) {
            let taken =
                |buffer: usize| self.of_transmit.iter().flatten().any(|used| usize::from(*used) == buffer);
            let Some(buffer) = (0..QUEUE).find(|buffer| !taken(*buffer)).filter(|_| !self.gone) else {
                break;
            };
            let start = self.output.at(buffer * BUFFER);
            // SAFETY: C2: the buffer is ours; a part fits in it.
            unsafe { start.copy_from_nonoverlapping(NonNull::from(part).cast(), part.len()) };
            let whole = NonNull::slice_from_raw_parts(start, part.len());
            // SAFETY: C2: nobody writes the buffer until it is reclaimed.
            let whole = unsafe { whole.as_ref() };
            // SAFETY: the page lives as long as the queue, and the buffer is not touched before it comes back.
            let Ok(head) = (unsafe { self.transmit.add(&[whole], &mut []) }) else { break };
            remember(&mut self.of_transmit, head, buffer);
            sent += part.len();
        }
        if sent > 0 {
            kick(&mut self.transport, &self.transmit, TRANSMIT);
        }
        sent
    }

    /// Takes back the buffers that the device has sent.
    fn reclaim(&mut self) {
        while let Some(head) = self.transmit.peek_used().filter(|_| !self.gone) {
            let Some(buffer) = forget(&mut self.of_transmit, head) else { return self.give_up() };
            let whole = NonNull::slice_from_raw_parts(self.output.at(buffer * BUFFER), BUFFER);
            // SAFETY: the buffer lies in the page; only its address and count matter to the queue.
            let whole = unsafe { whole.as_ref() };
            // SAFETY: C1: this is the buffer that went in with the head.
            if unsafe { self.transmit.pop_used(head, &[whole], &mut []) }.is_err() {
                return self.give_up();
            }
        }
    }

    fn next_arrived(&mut self) -> Option<Arrived> {
        let head = self.receive.peek_used().filter(|_| !self.gone)?;
        let Some(buffer) = forget(&mut self.of_receive, head) else {
            self.give_up();
            return None;
        };
        let mut whole = NonNull::slice_from_raw_parts(self.input.at(buffer * BUFFER), BUFFER);
        // SAFETY: the buffer lies in the page, and is ours once popped.
        let whole = unsafe { whole.as_mut() };
        // SAFETY: C1: this is the buffer that went in with the head.
        let Ok(bytes) = (unsafe { self.receive.pop_used(head, &[], &mut [whole]) }) else {
            self.give_up();
            return None;
        };
        let end = usize::try_from(bytes).unwrap_or(BUFFER).min(BUFFER);
        Some(Arrived { buffer, next: 0, end })
    }

    /// Gives a buffer to the device to fill.
    fn offer(&mut self, buffer: usize) {
        let mut whole = NonNull::slice_from_raw_parts(self.input.at(buffer * BUFFER), BUFFER);
        // SAFETY: C2: the buffer is ours until the next call.
        let whole = unsafe { whole.as_mut() };
        // SAFETY: the page lives as long as the queue, and the buffer is not touched before it comes back.
        if let Ok(head) = unsafe { self.receive.add(&[], &mut [whole]) } {
            remember(&mut self.of_receive, head, buffer);
            kick(&mut self.transport, &self.receive, RECEIVE);
        }
    }

    /// Resets a device that answers what was not asked.
    fn give_up(&mut self) {
        log::error!("control port: broken");
        self.transport.set_status(DeviceStatus::empty());
        self.gone = true;
    }
}

/// The device must not touch the queues' memory once it goes back.
impl<T: Transport> Drop for Console<T> {
    fn drop(&mut self) {
        self.transport.set_status(DeviceStatus::empty());
    }
}

fn remember(list: &mut [Option<u8>; QUEUE], head: u16, buffer: usize) {
    if let Some(entry) = list.get_mut(usize::from(head)) {
        debug_assert!(entry.is_none(), "C1");
        *entry = u8::try_from(buffer).ok();
    }
}

fn forget(list: &mut [Option<u8>; QUEUE], head: u16) -> Option<usize> {
    list.get_mut(usize::from(head))?.take().map(usize::from)
}

#[cfg(test)]
mod tests {
    use super::super::fake::{FakeTransport, load, store};
    use super::*;
    use std::vec;
    use std::vec::Vec;

    const IN: usize = RECEIVE as usize;
    const OUT: usize = TRANSMIT as usize;

    fn console() -> (Console<FakeTransport>, FakeTransport) {
        let device = FakeTransport::new(0, vec![]);
        (Console::new(device.clone()).unwrap(), device)
    }

    /// Plays the other end: text arrives, in one buffer.
    fn arrive(device: &FakeTransport, text: &[u8]) -> bool {
        let Some(chain) = device.take(IN) else { return false };
        let (base, room, device_writes) = chain.buffers[0];
        assert!(device_writes && text.len() <= room);
        text.iter().zip(0..).for_each(|(byte, at): (_, u64)| store(base + at, *byte));
        device.finish(IN, chain.head, u32::try_from(text.len()).unwrap());
        true
    }

    /// Plays the other end: takes everything that was sent.
    fn sent(device: &FakeTransport) -> Vec<u8> {
        let mut text = vec![];
        while let Some(chain) = device.take(OUT) {
            let (base, bytes, _) = chain.buffers[0];
            text.extend((0..bytes as u64).map(|at| load::<u8>(base + at)));
            device.finish(OUT, chain.head, 0);
        }
        text
    }

    #[test]
    fn what_arrives_is_read_in_order_in_pieces_of_any_size() {
        let (mut console, device) = console();
        let mut expected = vec![];
        let mut got: Vec<u8> = vec![];
        for round in 0..10_000_usize {
            let text: Vec<u8> =
                (0..round % 500 + 1).map(|at| u8::try_from((at + round) % 256).unwrap()).collect();
            if arrive(&device, &text) {
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
        let (mut console, device) = console();
        let text: Vec<u8> = (0..100_000_u32).map(|at| at.to_le_bytes()[0]).collect();
        let (mut taken, mut seen) = (0, vec![]);
        while taken < text.len() {
            let count = console.write(&text[taken..]);
            assert!(count <= 4096);
            assert_eq!(console.write(&text[taken + count..]), 0, "there is no room left, or nothing to send");
            taken += count;
            seen.extend(sent(&device));
        }
        assert_eq!(seen, text);
    }

    #[test]
    fn a_device_that_returns_a_buffer_it_does_not_have_is_reset() {
        let (mut console, device) = console();
        device.finish(OUT, 3, 0);
        assert_eq!(console.write(b"x"), 0);
        assert_eq!(device.state().status, DeviceStatus::empty());
        assert_eq!(console.read(&mut [0; 8]), 0);
    }
}
