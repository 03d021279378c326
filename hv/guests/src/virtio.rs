//! A virtio-mmio transport and its split rings, from a driver's side, for guests that keep the rules or do not.

use hv_abi::machine::{VIRTIO_BASE, VIRTIO_STRIDE};

use crate::memory::poke;
use crate::mmio::{read16, read32, write16, write32};

const NOTIFY: u64 = 0x50;
/// The register that says how far driver and device are.
pub const STATUS: u64 = 0x70;
/// In it: the device has given up.
pub const NEEDS_RESET: u32 = 64;

/// The lower word.
pub fn low(value: u64) -> u32 {
    u32::try_from(value & 0xffff_ffff).unwrap_or(0)
}

/// Writes a descriptor, as two words.
pub fn describe(at: u64, place: u64, bytes: u32, flags: u16, next: u16) {
    poke(at, place);
    poke(at + 8, u64::from(bytes) | u64::from(flags) << 32 | u64::from(next) << 48);
}

/// One transport.
#[derive(Clone, Copy)]
pub struct Transport {
    base: u64,
}

impl Transport {
    /// The one in that slot.
    pub const fn new(slot: u64) -> Self {
        Self { base: VIRTIO_BASE + slot * VIRTIO_STRIDE }
    }

    /// Writes a register.
    pub fn set(self, offset: u64, value: u32) {
        write32(self.base + offset, value);
    }

    /// Reads a register.
    pub fn get(self, offset: u64) -> u32 {
        read32(self.base + offset)
    }

    /// Resets the device and agrees with it on these features and on virtio 1.
    pub fn begin(self, features: u32) {
        for (offset, value) in [(STATUS, 0), (STATUS, 1), (STATUS, 3), (0x24, 1), (0x20, 1), (0x24, 0)] {
            self.set(offset, value);
        }
        self.set(0x20, features);
        self.set(STATUS, 11);
    }

    /// Tells the device to go on: its queues are set up.
    pub fn go(self) {
        self.set(STATUS, 15);
        assert_eq!(self.get(STATUS), 15, "the device does not agree");
    }

    /// Tells the device that there is something in a queue.
    pub fn notify(self, queue: u32) {
        self.set(NOTIFY, queue);
    }
}

/// A queue: a page with its table, its available ring and its used ring.
pub struct Queue {
    transport: Transport,
    number: u32,
    at: u64,
    next: u16,
}

/// Entries of a queue.
const SIZE: u16 = 32;
const AVAILABLE: u64 = 0x800;
const USED: u64 = 0xc00;

impl Queue {
    /// Gives the device a queue in this page.
    pub fn new(transport: Transport, number: u32, at: u64) -> Self {
        (at..at + 0x1000).step_by(8).for_each(|word| poke(word, 0));
        transport.set(0x30, number);
        transport.set(0x38, SIZE.into());
        for (offset, place) in [(0x80, at), (0x90, at + AVAILABLE), (0xa0, at + USED)] {
            transport.set(offset, low(place));
            transport.set(offset + 4, low(place >> 32));
        }
        transport.set(0x44, 1);
        assert_eq!(transport.get(0x44), 1, "the device does not take queue {number}");
        Self { transport, number, at, next: 0 }
    }

    /// Offers a buffer, which the device writes or reads.
    pub fn offer(&mut self, place: u64, bytes: u32, written: bool) {
        describe(self.at, place, bytes, if written { 2 } else { 0 }, 0);
        self.publish();
    }

    /// Offers a request: bytes that the device reads, and behind them bytes that it writes.
    pub fn ask(&mut self, (from, length): (u64, u32), (to, room): (u64, u32)) {
        describe(self.at, from, length, 1, 1);
        describe(self.at + 16, to, room, 2, 0);
        self.publish();
    }

    /// Makes what the table's beginning describes available.
    fn publish(&mut self) {
        write16(self.at + AVAILABLE + 4 + 2 * u64::from(self.next % SIZE), 0);
        self.next = self.next.wrapping_add(1);
        instruction!("dsb ish");
        write16(self.at + AVAILABLE + 2, self.next);
        instruction!("dsb ish");
        self.transport.notify(self.number);
    }

    /// How many came back.
    pub fn answered(&self) -> u16 {
        read16(self.at + USED + 2)
    }

    /// Waits until all buffers came back, or the device has given up; false then.
    pub fn is_served(&self) -> bool {
        for _ in 0..1_000_000_000_u64 {
            if self.answered() == self.next {
                return true;
            }
            if self.transport.get(STATUS) & NEEDS_RESET != 0 {
                return false;
            }
        }
        panic!("a buffer does not come back: status {:#x}", self.transport.get(STATUS));
    }
}
