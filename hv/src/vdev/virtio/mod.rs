//! Virtio devices over MMIO (virtio 1.2, 4.2.2: the transport of version 2), as pure logic.
//!
//! A driver sets registers here and rings in its own memory; a device reads those through [`Ram`], which names
//! nothing but the guest's RAM and may say that it has to wait. So a device works in small steps, and each can be
//! done again from its start: what the driver sees of a request changes only when its last step is done. Everything
//! that a driver says is taken for a lie: a ring or chain that cannot be right stops the device until the driver
//! resets it (2.1.2), and harms nobody else.
//!
//! * [`queue`] - the split rings and chains of descriptors.
//! * [`blk`] - the disk.
//! * [`balloon`] - what gives RAM back.
//! * [`rng`] - the source of entropy.

pub mod balloon;
#[cfg(test)]
mod balloon_tests;
pub mod blk;
#[cfg(test)]
mod blk_tests;
#[cfg(test)]
mod driver;
#[cfg(test)]
mod fuzz_tests;
pub mod queue;
pub mod rng;
#[cfg(test)]
mod rng_tests;

use super::low;
use queue::Queue;
use serde::{Deserialize, Serialize};

/// Why an access did not happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault<W> {
    /// Not yet: the same again when this has happened.
    Wait(W),
    /// Never: nothing is there that may be used.
    Bad,
}

/// What a step of a device that does one thing at a time came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Did<W> {
    /// Something; there may be more.
    Some,
    /// Nothing: until the driver notifies, or somebody wakes or asks the device, there is nothing to do.
    Nothing,
    /// Nothing: it has to wait for this.
    Wait(W),
}

impl<W> Did<W> {
    /// What came of a piece of work that says whether there was any; `None` when the driver broke the rules. A device that has
    /// to wait remembers that it does.
    fn of(done: Result<bool, Fault<W>>, waits: &mut bool) -> Option<Self> {
        match done {
            Ok(true) => Some(Self::Some),
            Ok(false) => Some(Self::Nothing),
            Err(Fault::Wait(what)) => {
                *waits = true;
                Some(Self::Wait(what))
            }
            Err(Fault::Bad) => None,
        }
    }
}

/// What is made zero in one step: as much as the memory manager marks as one (interrupts wait meanwhile, I6).
pub const PART: u64 = 256 << 10;

/// A guest's RAM, and nothing else of its address space.
pub trait Ram {
    /// What an access may have to wait for.
    type Wait;

    /// Reads what the driver wrote before whatever was read last.
    fn read(&mut self, at: u64, out: &mut [u8]) -> Result<(), Fault<Self::Wait>>;

    /// Writes; the driver sees writes in their order.
    fn write(&mut self, at: u64, bytes: &[u8]) -> Result<(), Fault<Self::Wait>>;
}

const MAGIC: u64 = 0x000;
const VERSION: u64 = 0x004;
const DEVICE_ID: u64 = 0x008;
const VENDOR_ID: u64 = 0x00c;
const DEVICE_FEATURES: u64 = 0x010;
const DEVICE_FEATURES_SEL: u64 = 0x014;
const DRIVER_FEATURES: u64 = 0x020;
const DRIVER_FEATURES_SEL: u64 = 0x024;
const QUEUE_SEL: u64 = 0x030;
const QUEUE_NUM_MAX: u64 = 0x034;
const QUEUE_NUM: u64 = 0x038;
const QUEUE_READY: u64 = 0x044;
const QUEUE_NOTIFY: u64 = 0x050;
const INTERRUPT_STATUS: u64 = 0x060;
/// The register by which a driver says which of an interrupt's reasons it has seen.
pub const INTERRUPT_ACK: u64 = 0x064;
const STATUS: u64 = 0x070;
const QUEUE_DESC: u64 = 0x080;
const QUEUE_DRIVER: u64 = 0x090;
const QUEUE_DEVICE: u64 = 0x0a0;
const SHM_LEN: u64 = 0x0b0;
const SHM_BASE: u64 = 0x0b8;
const CONFIG_GENERATION: u64 = 0x0fc;
const CONFIG: u64 = 0x100;

/// "virt", little-endian.
const MAGIC_VALUE: u64 = 0x7472_6976;
/// Nobody's in particular: QEMU's, for whose machine drivers are made.
const VENDOR: u64 = 0x554d_4551;

const FEATURES_OK: u32 = 8;
const DRIVER_OK: u32 = 4;
const NEEDS_RESET: u32 = 64;

/// An interrupt's reason: a buffer was used.
const USED_BUFFER: u32 = 1;
/// An interrupt's reason: the device's configuration changed, or it needs a reset.
const CONFIG_CHANGED: u32 = 2;

/// Feature: chains may go through a table of their own.
pub const RING_INDIRECT: u64 = 1 << 28;
/// Feature: virtio 1, which is all that we speak.
pub const VERSION_1: u64 = 1 << 32;

/// What a register write asks of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// Nothing.
    Nothing,
    /// To look at this queue.
    Notify(usize),
    /// To forget what it was doing with this queue, or with all: it is gone.
    Forget(Option<usize>),
}

/// The registers of a device.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Transport<const QUEUES: usize> {
    device: u32,
    offered: u64,
    wanted: u64,
    offered_half: u32,
    wanted_half: u32,
    selected: u32,
    status: u32,
    interrupt: u32,
    /// Moves whenever the configuration does.
    generation: u32,
    #[serde(with = "crate::bounded::array")]
    queues: [Queue; QUEUES],
}

impl<const QUEUES: usize> Transport<QUEUES> {
    /// A device of this kind, with these features, out of reset.
    pub fn new(device: u32, features: u64) -> Self {
        Self {
            device,
            offered: features | VERSION_1,
            wanted: 0,
            offered_half: 0,
            wanted_half: 0,
            selected: 0,
            status: 0,
            interrupt: 0,
            generation: 0,
            queues: [Queue::default(); QUEUES],
        }
    }

    /// True when it is such a device, with nothing in it that could not be: for one that was stored.
    fn is_like(&self, other: &Self) -> bool {
        (self.device, self.offered) == (other.device, other.offered)
            && self.queues.iter().all(Queue::is_sound)
    }

    /// The interrupt line.
    pub const fn line(&self) -> bool {
        self.interrupt != 0
    }

    /// True when the driver has set the device up and nothing has gone wrong since.
    pub const fn is_running(&self) -> bool {
        self.status & (DRIVER_OK | NEEDS_RESET) == DRIVER_OK
    }

    /// True when it has set this queue up, too.
    pub fn runs(&self, queue: usize) -> bool {
        self.is_running() && self.has_ready(queue)
    }

    /// True when there is such a queue, and the driver has set it up.
    fn has_ready(&self, queue: usize) -> bool {
        self.queues.get(queue).is_some_and(Queue::is_ready)
    }

    /// True when both sides have the feature.
    pub const fn has(&self, feature: u64) -> bool {
        self.offered & self.wanted & feature != 0
    }

    /// One of the queues that the device was made with.
    pub fn queue(&mut self, number: usize) -> &mut Queue {
        &mut self.queues[number]
    }

    /// Tells the driver that a buffer was used.
    pub const fn used(&mut self) {
        self.interrupt |= USED_BUFFER;
    }

    /// Tells the driver that the configuration has changed.
    pub const fn changed(&mut self) {
        self.generation = self.generation.wrapping_add(1);
        if self.is_running() {
            self.interrupt |= CONFIG_CHANGED;
        }
    }

    /// The driver broke the rules: nothing happens any more until it resets the device, and it is told.
    pub const fn fail(&mut self) {
        self.status |= NEEDS_RESET;
        self.interrupt |= CONFIG_CHANGED;
    }

    /// Reads `bytes` bytes at `offset`; `config` is the device's own part.
    pub fn read(&self, offset: u64, bytes: usize, config: &[u8]) -> u64 {
        if let Some(at) = offset.checked_sub(CONFIG) {
            let at = usize::try_from(at).unwrap_or(usize::MAX);
            let part = at.checked_add(bytes).and_then(|end| config.get(at..end)).unwrap_or_default();
            return part.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte));
        }
        if bytes != 4 {
            return 0;
        }
        let queue = usize::try_from(self.selected).ok().and_then(|number| self.queues.get(number));
        match offset {
            MAGIC => MAGIC_VALUE,
            VERSION => 2,
            DEVICE_ID => u64::from(self.device),
            VENDOR_ID => VENDOR,
            DEVICE_FEATURES => u64::from(half(self.offered, self.offered_half)),
            QUEUE_NUM_MAX if queue.is_some() => u64::from(queue::SIZE_MAX),
            QUEUE_READY => u64::from(queue.is_some_and(Queue::is_ready)),
            INTERRUPT_STATUS => u64::from(self.interrupt),
            STATUS => u64::from(self.status),
            // There is no shared memory: its length and base are all ones.
            SHM_LEN | 0x0b4 | SHM_BASE | 0x0bc => 0xffff_ffff,
            CONFIG_GENERATION => u64::from(self.generation),
            _ => 0,
        }
    }

    /// Writes a register of four bytes; the configuration space takes no writes.
    pub fn write(&mut self, offset: u64, bytes: usize, value: u64) -> Asked {
        if bytes != 4 {
            return Asked::Nothing;
        }
        let word = low(value);
        let selected = usize::try_from(self.selected).unwrap_or(usize::MAX);
        match offset {
            DEVICE_FEATURES_SEL => self.offered_half = word,
            DRIVER_FEATURES_SEL => self.wanted_half = word,
            // They stand once the driver has said so.
            DRIVER_FEATURES if self.status & FEATURES_OK == 0 => {
                set_half(&mut self.wanted, self.wanted_half, word);
            }
            QUEUE_SEL => self.selected = word,
            QUEUE_NOTIFY => {
                let number = usize::try_from(word).unwrap_or(usize::MAX);
                if self.runs(number) {
                    return Asked::Notify(number);
                }
            }
            INTERRUPT_ACK => self.interrupt &= !word,
            STATUS => return self.set_status(word),
            QUEUE_NUM..=QUEUE_DEVICE_HIGH => {
                let Some(queue) = self.queues.get_mut(selected) else { return Asked::Nothing };
                match offset {
                    QUEUE_READY if word & 1 == 0 => {
                        *queue = Queue::default();
                        return Asked::Forget(Some(selected));
                    }
                    QUEUE_READY => queue.start(),
                    _ if queue.is_ready() => {}
                    _ => set_queue(queue, offset, word),
                }
            }
            _ => {}
        }
        Asked::Nothing
    }

    fn set_status(&mut self, word: u32) -> Asked {
        if word == 0 {
            let fresh = Self::new(self.device, self.offered);
            *self = Self { generation: self.generation, ..fresh };
            return Asked::Forget(None);
        }
        let mut status = word & 0xff | self.status & NEEDS_RESET;
        let acceptable = self.wanted & !self.offered == 0 && self.wanted & VERSION_1 != 0;
        if self.status & FEATURES_OK == 0 && !acceptable {
            status &= !FEATURES_OK;
        }
        if status & FEATURES_OK == 0 {
            status &= !DRIVER_OK;
        }
        self.status = status;
        Asked::Nothing
    }
}

const QUEUE_DEVICE_HIGH: u64 = QUEUE_DEVICE + 4;

/// Where a queue is that is not in use yet.
fn set_queue(queue: &mut Queue, offset: u64, word: u32) {
    let which = u32::from(offset & 4 != 0);
    match offset & !4 {
        QUEUE_NUM => queue.size = u16::try_from(word).unwrap_or(0),
        QUEUE_DESC => set_half(&mut queue.table, which, word),
        QUEUE_DRIVER => set_half(&mut queue.available, which, word),
        QUEUE_DEVICE => set_half(&mut queue.used, which, word),
        _ => {}
    }
}

/// The lower or upper word; there are no others.
fn half(value: u64, which: u32) -> u32 {
    match which {
        0 => low(value),
        1 => low(value >> 32),
        _ => 0,
    }
}

fn set_half(value: &mut u64, which: u32, word: u32) {
    let word = u64::from(word);
    match which {
        0 => *value = *value & !0xffff_ffff | word,
        1 => *value = *value & 0xffff_ffff | word << 32,
        _ => {}
    }
}
