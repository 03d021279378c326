//! A guest's disk: virtio-blk (virtio 1.2, 5.2), as pure logic over a [`Medium`].
//!
//! A few requests are under way at a time, each in a slot: its chain is read, then its data moved at most a page at
//! a time, then its status written and its chain given back. [`Blk::step`] does one such piece. A piece that has to
//! wait changed nothing, so its slot simply does it again; others go on meanwhile, and may be done first, which
//! virtio allows. What is in the slots is all there is of a request: a copy of the device goes on with the same
//! requests on a copy of the memory, and neither side loses or doubles one. Called by `guest::disks`.

use super::queue::{Chain, MAX_CHAIN, Segment, Walk, gather, length, locate, scatter};
use super::{Asked, Fault, PART, RING_INDIRECT, Ram, Transport};
use serde::{Deserialize, Serialize};

/// Bytes in a sector, the unit of everything on the wire.
pub const SECTOR: u64 = 512;
/// Bytes of a page, the most that a step moves.
const PAGE: u64 = 4096;
const PAGE_BYTES: usize = 4096;
/// Requests under way at one time.
pub const SLOTS: usize = 4;
/// The number of what the ring itself waits for, beside those of the slots.
pub const RING: usize = SLOTS;
/// Descriptors read in one step.
const DESCRIPTORS: usize = 8;
/// Ranges of one discard or write-zeroes request, and sectors of each.
const MAX_RANGES: u32 = 16;
const MAX_RANGE: u32 = 1 << 22;
/// Bytes of a request's header, of a range, of a serial number.
const HEADER: u64 = 16;
const RANGE: u64 = 16;
const ID_BYTES: usize = 20;
/// virtio's number for disks.
const DEVICE: u32 = 2;

const SEG_MAX: u64 = 1 << 2;
const READ_ONLY: u64 = 1 << 5;
const BLK_SIZE: u64 = 1 << 6;
const FLUSH: u64 = 1 << 9;
const TOPOLOGY: u64 = 1 << 10;
const DISCARD: u64 = 1 << 13;
const WRITE_ZEROES: u64 = 1 << 14;

/// What a disk keeps its bytes in, and the RAM that they come from and go to.
pub trait Medium: Ram {
    /// Reads bytes of one page of the disk.
    fn load(&mut self, at: u64, out: &mut [u8]) -> Result<(), Fault<Self::Wait>>;
    /// Writes bytes of one page of the disk.
    fn store(&mut self, at: u64, bytes: &[u8]) -> Result<(), Fault<Self::Wait>>;
    /// Makes whole pages of the disk zero: at most [`PART`], and not across a boundary of that. How many bytes that was,
    /// from the first on.
    fn clear(&mut self, at: u64, bytes: u64) -> Result<u64, Fault<Self::Wait>>;
    /// Makes what was stored before request `slot` asked for the `first` time durable; false when it is to be
    /// asked again for more.
    fn flush(&mut self, slot: usize, first: bool) -> Result<bool, Fault<Self::Wait>>;
}

/// How a request ended, with the specification's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[repr(u8)]
enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

/// What a request wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Job {
    Read {
        at: u64,
        bytes: u64,
        done: u64,
    },
    Write {
        at: u64,
        bytes: u64,
        done: u64,
    },
    /// `begun`: asked for already.
    Flush {
        begun: bool,
    },
    Id,
    Zero(Zero),
}

/// Ranges to make zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Zero {
    /// Every byte; else it is advice.
    exactly: bool,
    ranges: u64,
    /// The range that comes next.
    next: u64,
    /// What is left of the one at hand.
    at: u64,
    bytes: u64,
}

/// How far a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Phase {
    /// There is none.
    Free,
    /// Its chain is being read.
    Chain(Walk),
    /// Its header is to be read.
    Header,
    /// Its work is being done.
    Work(Job),
    /// It is to be given back, so many bytes of its chain having been written beside the status.
    Finish(Status, u32),
}

/// A request under way.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Slot {
    phase: Phase,
    /// It said what it waits for, and nobody has woken the device since.
    waits: bool,
    head: u16,
    chain: Chain,
}

impl Slot {
    fn free() -> Self {
        Self { phase: Phase::Free, waits: false, head: 0, chain: Chain::default() }
    }
}

/// What a step came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Did<W> {
    /// Something; there may be more.
    Some,
    /// Nothing: until the driver notifies, or somebody wakes the device, there is nothing to do.
    Nothing,
    /// Nothing: this request, or the ring, has to wait for something.
    Wait(usize, W),
}

/// A disk, as its driver sees it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Blk {
    transport: Transport<1>,
    /// Bytes on it.
    bytes: u64,
    read_only: bool,
    id: [u8; ID_BYTES],
    /// The driver has notified, or there were more requests than slots.
    notified: bool,
    ring_waits: bool,
    slots: [Slot; SLOTS],
}

impl Blk {
    /// A disk of so many whole sectors; `id` is what it calls itself, cut to twenty bytes.
    pub fn new(sectors: u64, read_only: bool, id: &str) -> Self {
        let more = if read_only { READ_ONLY } else { DISCARD | WRITE_ZEROES };
        let mut name = [0; ID_BYTES];
        for (to, &from) in name.iter_mut().zip(id.as_bytes()) {
            *to = from;
        }
        let features = RING_INDIRECT | SEG_MAX | BLK_SIZE | FLUSH | TOPOLOGY | more;
        Self {
            transport: Transport::new(DEVICE, features),
            bytes: sectors.saturating_mul(SECTOR),
            read_only,
            id: name,
            notified: false,
            ring_waits: false,
            slots: core::array::from_fn(|_| Slot::free()),
        }
    }

    /// Bytes on it.
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// True unless no disk could be like this: for one that was stored.
    pub fn is_sound(&self) -> bool {
        let fresh = Self::new(self.bytes / SECTOR, self.read_only, "");
        self.bytes == fresh.bytes
            && self.transport.is_like(&fresh.transport)
            && self.slots.iter().all(|slot| self.could_have(slot))
    }

    fn could_have(&self, slot: &Slot) -> bool {
        let phase = match slot.phase {
            Phase::Free | Phase::Header | Phase::Finish(..) => true,
            Phase::Chain(walk) => walk.is_sound(),
            Phase::Work(Job::Read { at, bytes, done } | Job::Write { at, bytes, done }) => {
                done <= bytes && self.has(at, bytes)
            }
            Phase::Work(Job::Flush { .. }) => true,
            Phase::Work(Job::Id) => length(slot.chain.writable()) > 0,
            Phase::Work(Job::Zero(zero)) => {
                zero.next <= zero.ranges && zero.ranges <= MAX_RANGES.into() && self.has(zero.at, zero.bytes)
            }
        };
        phase && slot.chain.is_sound()
    }

    /// The interrupt line.
    pub const fn line(&self) -> bool {
        self.transport.line()
    }

    /// Requests under way.
    pub fn under_way(&self) -> usize {
        self.slots.iter().filter(|slot| slot.phase != Phase::Free).count()
    }

    /// Reads `bytes` bytes of its registers.
    pub fn read(&self, offset: u64, bytes: usize) -> u64 {
        self.transport.read(offset, bytes, &self.config())
    }

    /// Writes a register; true when there may be something to do now.
    pub fn write(&mut self, offset: u64, bytes: usize, value: u64) -> bool {
        match self.transport.write(offset, bytes, value) {
            Asked::Nothing => false,
            Asked::Notify(_) => {
                self.notified = true;
                true
            }
            Asked::Forget(_) => {
                self.slots.iter_mut().for_each(|slot| slot.phase = Phase::Free);
                (self.notified, self.ring_waits) = (false, false);
                false
            }
        }
    }

    /// What was waited for may have happened: everything is tried again.
    pub fn wake(&mut self) {
        self.ring_waits = false;
        self.slots.iter_mut().for_each(|slot| slot.waits = false);
    }

    /// The configuration space (5.2.4).
    fn config(&self) -> [u8; 60] {
        let mut space = [0; 60];
        let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &(self.bytes / SECTOR).to_le_bytes());
        // All of a chain but a header and a status.
        put(12, &(u32::try_from(MAX_CHAIN - 2).unwrap_or(1)).to_le_bytes());
        put(20, &512u32.to_le_bytes());
        // A physical block is 2^3 sectors, a page.
        put(24, &[3]);
        put(34, &1u16.to_le_bytes());
        if !self.read_only {
            for at in [36, 48] {
                put(at, &MAX_RANGE.to_le_bytes());
                put(at + 4, &MAX_RANGES.to_le_bytes());
            }
            put(44, &8u32.to_le_bytes());
            put(56, &[1]);
        }
        space
    }

    /// Does one piece of work.
    pub fn step<M: Medium>(&mut self, medium: &mut M) -> Did<M::Wait> {
        if !self.transport.runs(0) {
            return Did::Nothing;
        }
        let runs = |slot: &Slot| slot.phase != Phase::Free && !slot.waits;
        if let Some(number) = self.slots.iter().position(runs) {
            return match self.advance(number, medium) {
                Ok(()) => Did::Some,
                Err(Fault::Wait(what)) => {
                    self.slots[number].waits = true;
                    Did::Wait(number, what)
                }
                Err(Fault::Bad) => self.fail(),
            };
        }
        let free = self.slots.iter().position(|slot| slot.phase == Phase::Free);
        let Some(number) = free.filter(|_| self.notified && !self.ring_waits) else { return Did::Nothing };
        match self.transport.queue(0).pop(medium) {
            Ok(Some(head)) => {
                let slot = &mut self.slots[number];
                let walk = slot.chain.begin(self.transport.queue(0), head);
                (slot.phase, slot.waits, slot.head) = (Phase::Chain(walk), false, head);
                Did::Some
            }
            Ok(None) => {
                self.notified = false;
                Did::Nothing
            }
            Err(Fault::Wait(what)) => {
                self.ring_waits = true;
                Did::Wait(RING, what)
            }
            Err(Fault::Bad) => self.fail(),
        }
    }

    /// The driver broke the rules.
    fn fail<W>(&mut self) -> Did<W> {
        self.transport.fail();
        self.slots.iter_mut().for_each(|slot| slot.phase = Phase::Free);
        Did::Some
    }

    /// Does one piece of a request. [`Fault::Bad`] is a broken ring or chain; anything less is the request's status.
    fn advance<M: Medium>(&mut self, number: usize, medium: &mut M) -> Result<(), Fault<M::Wait>> {
        let indirect = self.transport.has(RING_INDIRECT);
        let phase = self.slots[number].phase;
        let next = match phase {
            Phase::Free => Phase::Free,
            Phase::Chain(mut walk) => {
                let chain = &mut self.slots[number].chain;
                let mut last = false;
                for _ in 0..DESCRIPTORS {
                    last = chain.extend(&mut walk, indirect, medium)?;
                    // A wait further on goes on from here.
                    self.slots[number].phase = Phase::Chain(walk);
                    if last {
                        break;
                    }
                }
                if last { Phase::Header } else { Phase::Chain(walk) }
            }
            Phase::Header => self.header(number, medium)?,
            Phase::Work(job) => match self.work(number, job, medium) {
                Ok(phase) => phase,
                Err(Fault::Bad) => Phase::Finish(Status::IoError, 0),
                Err(wait @ Fault::Wait(_)) => {
                    if matches!(job, Job::Flush { .. }) {
                        self.slots[number].phase = Phase::Work(Job::Flush { begun: true });
                    }
                    return Err(wait);
                }
            },
            Phase::Finish(status, bytes) => {
                self.finish(number, status, bytes, medium)?;
                Phase::Free
            }
        };
        self.slots[number].phase = next;
        Ok(())
    }

    /// Reads a request's header, and says what is to be done.
    fn header<M: Medium>(&self, number: usize, medium: &mut M) -> Result<Phase, Fault<M::Wait>> {
        let chain = &self.slots[number].chain;
        let (from, to) = (length(chain.readable()), length(chain.writable()));
        let (Some(from), Some(to)) = (from.checked_sub(HEADER), to.checked_sub(1)) else {
            // Not even a place for a status.
            return Err(Fault::Bad);
        };
        let mut raw = [0; 16];
        gather(medium, chain.readable(), 0, &mut raw)?;
        let [a, b, c, d, _, _, _, _, sector @ ..] = raw;
        let kind = u32::from_le_bytes([a, b, c, d]);
        let at = u64::from_le_bytes(sector).checked_mul(SECTOR);
        // Whole sectors that are on the disk.
        let place = |bytes: u64| at.filter(|&at| bytes.is_multiple_of(SECTOR) && self.has(at, bytes));
        let refused = Phase::Finish(Status::IoError, 0);
        let ranges = from / RANGE;
        let list = from % RANGE == 0 && (1..=u64::from(MAX_RANGES)).contains(&ranges) && !self.read_only;
        let zero = |exactly| Phase::Work(Job::Zero(Zero { exactly, ranges, next: 0, at: 0, bytes: 0 }));
        Ok(match kind {
            0 => place(to).map_or(refused, |at| Phase::Work(Job::Read { at, bytes: to, done: 0 })),
            1 if !self.read_only => {
                place(from).map_or(refused, |at| Phase::Work(Job::Write { at, bytes: from, done: 0 }))
            }
            4 => Phase::Work(Job::Flush { begun: false }),
            8 => Phase::Work(Job::Id),
            11 if list => zero(false),
            13 if list => zero(true),
            1 | 11 | 13 => refused,
            _ => Phase::Finish(Status::Unsupported, 0),
        })
    }

    /// True when so many bytes from there on are on the disk.
    fn has(&self, at: u64, bytes: u64) -> bool {
        at.checked_add(bytes).is_some_and(|end| end <= self.bytes)
    }

    /// Does a piece of a request's work; what comes next.
    fn work<M: Medium>(&self, number: usize, job: Job, medium: &mut M) -> Result<Phase, Fault<M::Wait>> {
        let chain = &self.slots[number].chain;
        let mut page = [0; PAGE_BYTES];
        Ok(match job {
            Job::Read { at, bytes, done } => {
                let Some((to, part)) = piece(chain.writable(), done, at + done, bytes - done, &mut page)
                else {
                    return Ok(Phase::Finish(Status::Ok, u32::try_from(done).unwrap_or(u32::MAX)));
                };
                medium.load(at + done, part)?;
                medium.write(to, part)?;
                Phase::Work(Job::Read { at, bytes, done: done + part.len() as u64 })
            }
            Job::Write { at, bytes, done } => {
                let offset = HEADER + done;
                let Some((from, part)) = piece(chain.readable(), offset, at + done, bytes - done, &mut page)
                else {
                    return Ok(Phase::Finish(Status::Ok, 0));
                };
                medium.read(from, part)?;
                medium.store(at + done, part)?;
                Phase::Work(Job::Write { at, bytes, done: done + part.len() as u64 })
            }
            Job::Flush { begun } => match medium.flush(number, !begun)? {
                true => Phase::Finish(Status::Ok, 0),
                false => Phase::Work(Job::Flush { begun: true }),
            },
            Job::Id => {
                let room = usize::try_from(length(chain.writable()) - 1).unwrap_or(ID_BYTES).min(ID_BYTES);
                scatter(medium, chain.writable(), 0, &self.id[..room])?;
                Phase::Finish(Status::Ok, u32::try_from(room).unwrap_or(0))
            }
            Job::Zero(zero) if zero.bytes > 0 => {
                let done = clear(medium, zero, &page)?;
                Phase::Work(Job::Zero(Zero { at: zero.at + done, bytes: zero.bytes - done, ..zero }))
            }
            Job::Zero(zero) if zero.next < zero.ranges => {
                let mut raw = [0; 16];
                gather(medium, chain.readable(), HEADER + RANGE * zero.next, &mut raw)?;
                self.range(raw, zero)
            }
            Job::Zero(_) => Phase::Finish(Status::Ok, 0),
        })
    }

    /// Begins with a range of a discard or write-zeroes request.
    fn range(&self, raw: [u8; 16], zero: Zero) -> Phase {
        let [a, b, c, d, e, f, g, h, i, j, k, l, flags @ ..] = raw;
        let at = u64::from_le_bytes([a, b, c, d, e, f, g, h]).checked_mul(SECTOR);
        let sectors = u32::from_le_bytes([i, j, k, l]);
        let bytes = u64::from(sectors) * SECTOR;
        // Only "unmap" has a meaning, and only where zeros are asked for.
        if u32::from_le_bytes(flags) & !u32::from(zero.exactly) != 0 {
            return Phase::Finish(Status::Unsupported, 0);
        }
        match at.filter(|&at| sectors <= MAX_RANGE && self.has(at, bytes)) {
            Some(at) => Phase::Work(Job::Zero(Zero { next: zero.next + 1, at, bytes, ..zero })),
            None => Phase::Finish(Status::IoError, 0),
        }
    }

    /// Writes the status and gives the chain back.
    fn finish<M: Medium>(
        &mut self,
        number: usize,
        status: Status,
        bytes: u32,
        medium: &mut M,
    ) -> Result<(), Fault<M::Wait>> {
        let Slot { head, chain, .. } = &self.slots[number];
        let last = length(chain.writable()).checked_sub(1).ok_or(Fault::Bad)?;
        let (at, _) = locate(chain.writable(), last).ok_or(Fault::Bad)?;
        let head = *head;
        medium.write(at, &[status as u8])?;
        if self.transport.queue(0).push(medium, head, bytes.saturating_add(1))? {
            self.transport.used();
        }
        Ok(())
    }
}

/// The next piece of a transfer: where in RAM it is, and room for its bytes. It lies in one segment and in one page
/// of the disk, from `at` on; `None` when nothing is left.
fn piece<'p>(
    segments: &[Segment],
    offset: u64,
    at: u64,
    left: u64,
    page: &'p mut [u8; PAGE_BYTES],
) -> Option<(u64, &'p mut [u8])> {
    let (ram, room) = locate(segments, offset).filter(|_| left > 0)?;
    let bytes = usize::try_from(left.min(room).min(PAGE - at % PAGE)).ok()?;
    Some((ram, page.get_mut(..bytes)?))
}

/// Clears the beginning of what is left of a range; how many bytes of it are done.
fn clear<M: Medium>(medium: &mut M, zero: Zero, zeros: &[u8; PAGE_BYTES]) -> Result<u64, Fault<M::Wait>> {
    let Zero { exactly, at, bytes, .. } = zero;
    if at % PAGE == 0 && bytes >= PAGE {
        let whole = (bytes & !(PAGE - 1)).min(PART - at % PART);
        return medium.clear(at, whole);
    }
    // Part of a page: what is only advised is left alone.
    let part = bytes.min(PAGE - at % PAGE);
    if exactly {
        let length = usize::try_from(part).unwrap_or(PAGE_BYTES);
        medium.store(at, &zeros[..length])?;
    }
    Ok(part)
}
