//! The split ring (virtio 1.2, 2.7), from the device's side.
//!
//! A chain is read once, a few descriptors at a time, into a list of segments that is ours from then on: what the
//! driver changes in its tables afterwards changes nothing. A chain has at most [`MAX_CHAIN`] descriptors, so one
//! that loops ends. No address is believed here; [`Ram`] says what can be reached. Called by the devices.

use arrayvec::ArrayVec;
use serde::{Deserialize, Serialize};

use super::{Fault, Ram};

/// Entries of a queue at most.
pub const SIZE_MAX: u16 = 128;
/// Descriptors of a chain at most, and segments.
pub const MAX_CHAIN: usize = 66;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// Bytes of a descriptor.
const DESCRIPTOR: u64 = 16;
/// The driver's wish, in the available ring's flags: no interrupts.
const NO_INTERRUPT: u16 = 1;

/// A queue: where the driver says it is, and how far we are.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Queue {
    pub(super) size: u16,
    pub(super) table: u64,
    pub(super) available: u64,
    pub(super) used: u64,
    ready: bool,
    next_available: u16,
    next_used: u16,
}

impl Queue {
    /// True when it may be used.
    pub const fn is_ready(&self) -> bool {
        self.ready
    }

    /// True unless it is in use and could not be: for one that was stored.
    pub(super) fn is_sound(&self) -> bool {
        !self.ready || self.is_usable()
    }

    fn is_usable(&self) -> bool {
        let size = u64::from(self.size);
        let ends =
            [(self.table, DESCRIPTOR * size), (self.available, 6 + 2 * size), (self.used, 6 + 8 * size)];
        let fits = ends.iter().all(|(start, bytes)| start.checked_add(*bytes).is_some());
        let aligned =
            self.table.is_multiple_of(16) && self.available.is_multiple_of(2) && self.used.is_multiple_of(4);
        self.size.is_power_of_two() && self.size <= SIZE_MAX && fits && aligned
    }

    /// Takes it into use if its size and addresses are such that it could be one.
    pub(super) fn start(&mut self) {
        if self.is_usable() {
            (self.ready, self.next_available, self.next_used) = (true, 0, 0);
        }
    }

    /// Takes the next chain's head out of the available ring; `None` when there is no other. Of a queue that is not
    /// ready nothing is believed, here and in [`Self::push`].
    pub fn pop<R: Ram>(&mut self, ram: &mut R) -> Result<Option<u16>, Fault<R::Wait>> {
        if !self.ready {
            return Err(Fault::Bad);
        }
        let index = read_u16(ram, self.available + 2)?;
        let waiting = index.wrapping_sub(self.next_available);
        if waiting == 0 {
            return Ok(None);
        }
        if waiting > self.size {
            return Err(Fault::Bad);
        }
        let place = u64::from(self.next_available % self.size);
        let head = read_u16(ram, self.available + 4 + 2 * place)?;
        if head >= self.size {
            return Err(Fault::Bad);
        }
        self.next_available = self.next_available.wrapping_add(1);
        Ok(Some(head))
    }

    /// Gives a chain back, `bytes` of which were written; true when the driver wants an interrupt, or when it cannot be
    /// known now whether it does: one too many is harmless, one too few is not.
    pub fn push<R: Ram>(&mut self, ram: &mut R, head: u16, bytes: u32) -> Result<bool, Fault<R::Wait>> {
        if !self.ready {
            return Err(Fault::Bad);
        }
        let mut element = [0; 8];
        element[..2].copy_from_slice(&head.to_le_bytes());
        element[4..].copy_from_slice(&bytes.to_le_bytes());
        let place = u64::from(self.next_used % self.size);
        ram.write(self.used + 4 + 8 * place, &element)?;
        let next = self.next_used.wrapping_add(1);
        // Only with this write is anything done; before it, all of it can be done again.
        ram.write(self.used + 2, &next.to_le_bytes())?;
        self.next_used = next;
        Ok(read_u16(ram, self.available).map_or(true, |flags| flags & NO_INTERRUPT == 0))
    }
}

fn read_u16<R: Ram>(ram: &mut R, at: u64) -> Result<u16, Fault<R::Wait>> {
    let mut bytes = [0; 2];
    ram.read(at, &mut bytes)?;
    Ok(u16::from_le_bytes(bytes))
}

/// Memory that a chain names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// First byte.
    pub at: u64,
    /// Bytes.
    pub bytes: u32,
}

/// How far a chain is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Walk {
    table: u64,
    entries: u32,
    next: u32,
    seen: usize,
    indirect: bool,
}

/// One descriptor of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    /// The memory that it names.
    pub segment: Segment,
    /// The device writes there; else it reads.
    pub writable: bool,
    /// There is no other behind it.
    pub last: bool,
}

impl Walk {
    /// Where to begin to read the chain with this head.
    pub fn begin(queue: &Queue, head: u16) -> Self {
        let (table, entries) = (queue.table, u32::from(queue.size));
        Self { table, entries, next: u32::from(head), seen: 0, indirect: false }
    }

    /// True unless none could be like this: for one that was stored.
    pub(super) const fn is_sound(&self) -> bool {
        self.seen <= MAX_CHAIN
    }

    /// Reads one more descriptor; `None` when it only led to a table of the driver's own, which `indirect` allows.
    pub fn step<R: Ram>(&mut self, indirect: bool, ram: &mut R) -> Result<Option<Link>, Fault<R::Wait>> {
        if self.next >= self.entries || self.seen >= MAX_CHAIN {
            return Err(Fault::Bad);
        }
        let at = self.table.checked_add(DESCRIPTOR * u64::from(self.next)).ok_or(Fault::Bad)?;
        let mut raw = [0; 16];
        ram.read(at, &mut raw)?;
        let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = raw;
        let at = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
        let bytes = u32::from_le_bytes([i, j, k, l]);
        let (flags, next) = (u16::from_le_bytes([m, n]), u16::from_le_bytes([o, p]));
        if flags & INDIRECT != 0 {
            let entries = bytes / 16;
            if !indirect || self.indirect || flags & NEXT != 0 || bytes % 16 != 0 || entries == 0 {
                return Err(Fault::Bad);
            }
            *self = Self { table: at, entries, next: 0, seen: self.seen, indirect: true };
            return Ok(None);
        }
        self.seen += 1;
        self.next = u32::from(next);
        let (segment, writable) = (Segment { at, bytes }, flags & WRITE != 0);
        Ok(Some(Link { segment, writable, last: flags & NEXT == 0 }))
    }
}

/// What a chain names: first what the device reads, then what it writes.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Chain {
    segments: ArrayVec<Segment, MAX_CHAIN>,
    readable: usize,
}

impl Chain {
    /// What the device reads.
    pub fn readable(&self) -> &[Segment] {
        self.segments.get(..self.readable).unwrap_or_default()
    }

    /// What it writes.
    pub fn writable(&self) -> &[Segment] {
        self.segments.get(self.readable..).unwrap_or_default()
    }

    /// True unless no chain could be like this: for one that was stored.
    pub(super) fn is_sound(&self) -> bool {
        self.readable <= self.segments.len()
    }

    /// Where to begin to read the chain with this head.
    pub fn begin(&mut self, queue: &Queue, head: u16) -> Walk {
        *self = Self::default();
        Walk::begin(queue, head)
    }

    /// Reads one more descriptor; true when it was the last. `indirect` says that the driver may use tables of
    /// its own.
    pub fn extend<R: Ram>(
        &mut self,
        walk: &mut Walk,
        indirect: bool,
        ram: &mut R,
    ) -> Result<bool, Fault<R::Wait>> {
        let Some(Link { segment, writable, last }) = walk.step(indirect, ram)? else { return Ok(false) };
        if !writable && self.segments.len() > self.readable {
            return Err(Fault::Bad);
        }
        self.segments.try_push(segment).map_err(|_| Fault::Bad)?;
        self.readable += usize::from(!writable);
        Ok(last)
    }
}

/// Bytes in some segments.
pub fn length(segments: &[Segment]) -> u64 {
    segments.iter().map(|segment| u64::from(segment.bytes)).sum()
}

/// Where byte `offset` of some segments is, and how many lie behind it in its segment, itself included.
pub fn locate(segments: &[Segment], offset: u64) -> Option<(u64, u64)> {
    let mut left = offset;
    for segment in segments {
        let bytes = u64::from(segment.bytes);
        if left < bytes {
            return Some((segment.at.checked_add(left)?, bytes - left));
        }
        left -= bytes;
    }
    None
}

/// Reads from byte `offset` of some segments on.
pub fn gather<R: Ram>(
    ram: &mut R,
    segments: &[Segment],
    offset: u64,
    out: &mut [u8],
) -> Result<(), Fault<R::Wait>> {
    let (mut offset, mut rest) = (offset, out);
    while !rest.is_empty() {
        let (at, room) = locate(segments, offset).ok_or(Fault::Bad)?;
        let bytes = usize::try_from(room).unwrap_or(usize::MAX).min(rest.len());
        let (part, after) = rest.split_at_mut(bytes);
        ram.read(at, part)?;
        offset += part.len() as u64;
        rest = after;
    }
    Ok(())
}

/// Writes from byte `offset` of some segments on.
pub fn scatter<R: Ram>(
    ram: &mut R,
    segments: &[Segment],
    offset: u64,
    bytes: &[u8],
) -> Result<(), Fault<R::Wait>> {
    let (mut offset, mut rest) = (offset, bytes);
    while !rest.is_empty() {
        let (at, room) = locate(segments, offset).ok_or(Fault::Bad)?;
        let bytes = usize::try_from(room).unwrap_or(usize::MAX).min(rest.len());
        let (part, after) = rest.split_at(bytes);
        ram.write(at, part)?;
        offset += part.len() as u64;
        rest = after;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vdev::virtio::driver::{AVAILABLE, Bench, SIZE, TABLE, USED};

    #[test]
    fn nothing_is_taken_from_a_queue_that_is_not_ready_or_given_back_to_it() {
        // One that nobody set up, and one with places that overflow, as only an image could have it.
        let far = Queue { available: u64::MAX, used: u64::MAX, ..Queue::default() };
        for mut queue in [Queue::default(), far] {
            let mut ram = Bench::new(0, 0, 1);
            assert_eq!(queue.pop(&mut ram), Err(Fault::Bad));
            assert_eq!(queue.push(&mut ram, 0, 0), Err(Fault::Bad));
            assert_eq!(ram.accesses, 0);
        }
    }

    #[test]
    fn a_driver_whose_wish_cannot_be_read_now_is_told() {
        for seed in 1..200 {
            let mut ram = Bench::new(0, 3, seed);
            let mut queue =
                Queue { size: SIZE, table: TABLE, available: AVAILABLE, used: USED, ..Queue::default() };
            queue.start();
            let told = loop {
                match queue.push(&mut ram, 0, 0) {
                    Err(Fault::Wait(_)) => {}
                    told @ (Ok(_) | Err(Fault::Bad)) => break told,
                }
            };
            assert_eq!(told, Ok(true), "seed {seed}");
            assert_eq!(ram.word(USED + 2), 1);
        }
    }
}
