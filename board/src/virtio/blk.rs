//! A virtio disk for paging: many requests in flight, several segments each, nothing allocated for any.
//!
//! [`Blk::start`] puts a request on the queue and returns; [`Blk::poll`] gives back the tokens of those that are
//! done. A request takes a descriptor for its header, one for each segment and one for its status, of 256: 85
//! single pages, or two of 126 segments. Headers and statuses live in pages taken once; the segments of a request
//! are remembered in a pool as large as the queue, for the queue wants to see them again.
//!
//! A device that answers what was never asked is broken, and so is one that somebody has waited for long enough
//! ([`Blk::silence`], [`Blk::give_up`]): it is reset, and everything in flight fails once it says that it is, for then it
//! touches no memory any more. [`Blk::read_now`] waits, for partition tables at boot.
#![expect(unsafe_code, reason = "the device moves bytes to and from memory that is known by address only")]

use super::hal::{Identity, Pages};
use super::{DeviceError, Mmio, kick, negotiate, queue};
use arrayvec::ArrayVec;
use core::mem::ManuallyDrop;
use core::ptr::NonNull;
use virtio_drivers::queue::VirtQueue;
use virtio_drivers::transport::{DeviceStatus, Transport};
use vmobject::addr::PhysAddr;

/// Bytes in a sector, whatever the disk's block size.
pub const SECTOR: u64 = 512;
/// Segments that one request may have. A disk may take fewer: [`Blk::max_segments`].
pub const MAX_SEGMENTS: usize = 126;
/// Descriptors of the queue.
const QUEUE: usize = 256;
/// Requests in flight: none needs fewer than two descriptors.
const SLOTS: usize = QUEUE / 2;
/// Device-visible bytes of a request: header at 0, discard range at 16, status at 32.
const SLOT_BYTES: usize = 64;
const RANGE_AT: usize = 16;
const STATUS_AT: usize = 32;
/// Pages with the slots, and one more to bounce through.
const DMA_PAGES: usize = SLOTS * SLOT_BYTES / BOUNCE_BYTES + 1;
const BOUNCE_BYTES: usize = 4096;
/// Bytes of a disk's name.
pub const ID_BYTES: usize = 20;
/// Looks at the queue before [`Blk::read_now`] gives up: some ten seconds at least.
const PATIENCE: u32 = u32::MAX;

const FEATURE_SIZE_MAX: u64 = 1 << 1;
const FEATURE_SEG_MAX: u64 = 1 << 2;
const FEATURE_READ_ONLY: u64 = 1 << 5;
const FEATURE_BLOCK_SIZE: u64 = 1 << 6;
const FEATURE_FLUSH: u64 = 1 << 9;
const FEATURE_DISCARD: u64 = 1 << 13;

/// Some memory that a request moves bytes to or from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// First byte.
    pub base: PhysAddr,
    /// Bytes: whole sectors.
    pub bytes: u32,
}

/// Which way a transfer goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the disk to memory.
    Read,
    /// From memory to the disk.
    Write,
}

/// Why a request was not taken, or failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlkError {
    /// No room in the queue: again after a completion.
    Busy,
    /// The disk says that it failed.
    Io,
    /// Past the disk's end, against its being read-only, or a shape that it does not take.
    Refused,
    /// The device is broken or was reset.
    Gone,
}

/// A request's kind, with the numbers of the specification.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
enum Kind {
    Read = 0,
    Write = 1,
    Flush = 4,
    Id = 8,
    Discard = 11,
}

/// A request in flight.
#[derive(Clone, Copy, Debug)]
struct Request {
    kind: Kind,
    token: Option<u64>,
    /// Its segments, first to last, in the pool.
    segments: u16,
    first: u16,
}

/// An entry of the pool: a segment, and the next of its request or of the free ones.
#[derive(Clone, Copy, Debug)]
struct Entry {
    segment: Segment,
    next: u16,
}

/// How a disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Health {
    Well,
    /// It was told to reset, and has not said yet that it has: it may still touch what is in flight.
    Resetting,
    Gone,
}

/// One disk.
/// # Invariants
/// B1. `slots[s]` is `Some` exactly when some `by_head[h]` is `s`, and then the chain of descriptor `h` is in the
///     queue, made of the buffers that `Buffers::fill` lists for it.
/// B2. Pool entries of different requests and of the free list are disjoint, and together they are the pool.
pub struct Blk<T: Transport = Mmio> {
    transport: T,
    queue: VirtQueue<Identity, QUEUE>,
    dma: Pages,
    slots: [Option<Request>; SLOTS],
    by_head: [Option<u8>; QUEUE],
    pool: [Entry; QUEUE],
    pool_free: u16,
    in_flight: usize,
    features: u64,
    sectors: u64,
    block_bytes: u32,
    max_segments: usize,
    max_bytes: u32,
    max_discard: u32,
    health: Health,
    /// Requests that have ended.
    ended: u64,
    /// What `ended` was when [`Blk::silence`] was last asked, and what it said; `None` since it was idle.
    heard: Option<(u64, u64)>,
}

impl<T: Transport> Blk<T> {
    /// Takes the disk over, resetting it.
    pub fn new(mut transport: T) -> Result<Self, DeviceError> {
        let wanted = FEATURE_SIZE_MAX
            | FEATURE_SEG_MAX
            | FEATURE_READ_ONLY
            | FEATURE_BLOCK_SIZE
            | FEATURE_FLUSH
            | FEATURE_DISCARD;
        let features = negotiate(&mut transport, wanted)?;
        let has = |bit: u64| features & bit != 0;
        let word = |offset| transport.read_config_space::<u32>(offset).map_err(|_| DeviceError::Refused);
        let limit = |bit, offset| if has(bit) { word(offset) } else { Ok(u32::MAX) };
        // Two halves: the configuration space promises an alignment of 4 only. A disk that shrinks while we look is not served.
        let sectors = u64::from(word(0)?) | u64::from(word(4)?) << 32;
        let max_bytes = limit(FEATURE_SIZE_MAX, 8)?;
        let max_segments = limit(FEATURE_SEG_MAX, 12)?;
        let block_bytes = if has(FEATURE_BLOCK_SIZE) { word(20)? } else { 512 };
        let max_discard = if has(FEATURE_DISCARD) { word(36)? } else { 0 };
        let queue = queue(&mut transport, 0)?;
        let dma = Pages::take(DMA_PAGES).ok_or(DeviceError::NoMemory)?;
        transport.finish_init();
        let entry = |next| Entry { segment: Segment { base: PhysAddr::new(0), bytes: 0 }, next };
        let mut pool = [entry(0); QUEUE];
        for (next, slot) in (1..).zip(&mut pool) {
            *slot = entry(next);
        }
        Ok(Self {
            transport,
            queue,
            dma,
            slots: [None; SLOTS],
            by_head: [None; QUEUE],
            pool,
            pool_free: 0,
            in_flight: 0,
            features,
            sectors,
            block_bytes,
            max_segments: usize::try_from(max_segments)
                .map_or(MAX_SEGMENTS, |max| max.clamp(1, MAX_SEGMENTS)),
            max_bytes,
            max_discard,
            health: Health::Well,
            ended: 0,
            heard: None,
        })
    }

    /// Sectors on the disk.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Bytes of a block, the unit of the disk's partition table.
    pub fn block_bytes(&self) -> u32 {
        self.block_bytes
    }

    /// True when the disk takes no writes.
    pub fn is_read_only(&self) -> bool {
        self.features & FEATURE_READ_ONLY != 0
    }

    /// True when the disk has a cache that [`Blk::start_flush`] empties.
    pub fn has_flush(&self) -> bool {
        self.features & FEATURE_FLUSH != 0
    }

    /// Segments that this disk takes in one request.
    pub fn max_segments(&self) -> usize {
        self.max_segments
    }

    /// Requests in flight.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Starts a transfer between the sectors from `sector` on and `segments`, in their order. Exactly one
    /// completion with `token` follows an `Ok`, none an error.
    ///
    /// # Safety
    /// The segments are RAM at their physical address, and the device's alone until the completion: nobody else
    /// touches them meanwhile, and for a write nobody changes them.
    pub unsafe fn start(
        &mut self,
        direction: Direction,
        sector: u64,
        segments: &[Segment],
        token: u64,
    ) -> Result<(), BlkError> {
        let mut bytes = 0_u64;
        for segment in segments {
            let size = u64::from(segment.bytes);
            let aligned = size > 0 && size.is_multiple_of(SECTOR) && segment.bytes <= self.max_bytes;
            if !aligned || segment.base.bits() == 0 || segment.base.checked_add(size).is_none() {
                return Err(BlkError::Refused);
            }
            bytes += size;
        }
        let end = sector.checked_add(bytes / SECTOR).filter(|end| *end <= self.sectors);
        if end.is_none() || segments.is_empty() || segments.len() > self.max_segments {
            return Err(BlkError::Refused);
        }
        let kind = match direction {
            Direction::Read => Kind::Read,
            Direction::Write if self.is_read_only() => return Err(BlkError::Refused),
            Direction::Write => Kind::Write,
        };
        self.enqueue(kind, sector, segments, Some(token))
    }

    /// Makes what was written and completed before it durable; completes like a transfer. A disk without a cache
    /// has nothing to do: it reads a sector instead, so that the completion comes the same way.
    pub fn start_flush(&mut self, token: u64) -> Result<(), BlkError> {
        if self.has_flush() {
            return self.enqueue(Kind::Flush, 0, &[], Some(token));
        }
        let sector = Segment { base: self.bounce(), bytes: 512 };
        self.enqueue(Kind::Read, 0, &[sector], Some(token))
    }

    /// Says that sectors are not needed any more, and how many of them one request could take. Advice: nobody is
    /// told whether it worked.
    pub fn discard(&mut self, sector: u64, sectors: u64) -> Result<u64, BlkError> {
        let end = sector.checked_add(sectors).filter(|end| *end <= self.sectors);
        if end.is_none() || sectors == 0 || self.max_discard == 0 || self.is_read_only() {
            return Err(BlkError::Refused);
        }
        let taken = u32::try_from(sectors).unwrap_or(u32::MAX).min(self.max_discard);
        // The range lies in the slot, so it is written there once the slot is chosen.
        self.enqueue(Kind::Discard, sector, &[Segment { base: PhysAddr::new(sector), bytes: taken }], None)?;
        Ok(u64::from(taken))
    }

    /// Acknowledges the interrupt, then gives at most `limit` completions to `done`. Returns their number: call
    /// until it is less than the limit.
    pub fn poll(&mut self, limit: usize, done: &mut dyn FnMut(u64, Result<(), BlkError>)) -> usize {
        if self.health == Health::Well {
            self.transport.ack_interrupt();
        } else if !self.has_reset() {
            return 0;
        }
        let mut count = 0;
        // Nothing is added meanwhile, so the queue holds no more than there are slots.
        for _ in 0..SLOTS {
            if count == limit {
                break;
            }
            let popped = match self.health {
                Health::Well => self.pop(),
                Health::Resetting => None,
                Health::Gone => self.fail_one(),
            };
            let Some((token, result)) = popped else { break };
            self.ended += 1;
            if let Some(token) = token {
                done(token, result);
                count += 1;
            }
        }
        count
    }

    /// The next completion, if there is one; a broken device's requests fail instead.
    fn pop(&mut self) -> Option<(Option<u64>, Result<(), BlkError>)> {
        let head = self.queue.peek_used()?;
        let slot = self.by_head.get_mut(usize::from(head)).and_then(Option::take).map(usize::from);
        let Some((slot, request)) = slot.and_then(|slot| Some((slot, self.slots.get(slot).copied()??)))
        else {
            return self.give_up_now();
        };
        let popped = {
            let mut buffers = ManuallyDrop::new(Buffers::new());
            let (inputs, outputs) = buffers.fill(&self.dma, slot, request, &self.pool);
            // SAFETY: B1: these are the buffers that went in with this head; the pool has not changed since.
            unsafe { self.queue.pop_used(head, inputs, outputs) }
        };
        if popped.is_err() {
            return self.give_up_now();
        }
        // SAFETY: the status byte lies in the slot, which the device has given back.
        let status = unsafe { at(&self.dma, slot, STATUS_AT).read_volatile() };
        self.give_entries(request);
        self.slots[slot] = None;
        self.in_flight -= 1;
        let result = match status {
            0 => Ok(()),
            2 => Err(BlkError::Refused),
            _ => Err(BlkError::Io),
        };
        Some((request.token, result))
    }

    /// One of the requests that a broken device had in flight.
    fn fail_one(&mut self) -> Option<(Option<u64>, Result<(), BlkError>)> {
        let request = self.slots.iter_mut().find_map(Option::take)?;
        self.in_flight -= 1;
        Some((request.token, Err(BlkError::Gone)))
    }

    /// Reads `out.len()` bytes from `sector` on, waiting. For boot: with requests in flight it is busy.
    pub fn read_now(&mut self, sector: u64, out: &mut [u8]) -> Result<(), BlkError> {
        if self.in_flight > 0 {
            return Err(BlkError::Busy);
        }
        let bounce = self.dma.at(SLOTS * SLOT_BYTES);
        let base = self.bounce();
        let mut at = sector;
        for part in out.chunks_mut(BOUNCE_BYTES) {
            let sectors = (part.len() as u64).div_ceil(SECTOR);
            let bytes = u32::try_from(sectors * SECTOR).map_err(|_| BlkError::Refused)?;
            // SAFETY: the bounce page is ours, nothing else is in flight, and we read it after the completion.
            unsafe { self.start(Direction::Read, at, &[Segment { base, bytes }], 0) }?;
            self.wait()?;
            // SAFETY: the page holds at least a part's bytes, and the device is done with it.
            unsafe { bounce.copy_to_nonoverlapping(NonNull::from(&mut *part).cast(), part.len()) };
            at += sectors;
        }
        Ok(())
    }

    /// What the disk calls itself, with zeros behind it, waiting. For boot.
    pub fn id_now(&mut self) -> Result<[u8; ID_BYTES], BlkError> {
        if self.in_flight > 0 {
            return Err(BlkError::Busy);
        }
        let (bounce, base) = (self.dma.at(SLOTS * SLOT_BYTES), self.bounce());
        // SAFETY: the bounce page is ours, and nothing is in flight.
        unsafe { bounce.cast::<[u8; ID_BYTES]>().write([0; ID_BYTES]) };
        let bytes = u32::try_from(ID_BYTES).map_err(|_| BlkError::Refused)?;
        self.enqueue(Kind::Id, 0, &[Segment { base, bytes }], Some(0))?;
        self.wait()?;
        // SAFETY: as above; the device is done with the page.
        Ok(unsafe { bounce.cast::<[u8; ID_BYTES]>().read() })
    }

    /// Waits for the one request in flight.
    fn wait(&mut self) -> Result<(), BlkError> {
        for _ in 0..PATIENCE {
            if self.queue.can_pop() {
                let mut result = Err(BlkError::Gone);
                self.poll(1, &mut |_, how| result = how);
                return result;
            }
            core::hint::spin_loop();
        }
        self.give_up();
        self.poll(1, &mut |_, _| {});
        Err(BlkError::Gone)
    }

    fn enqueue(
        &mut self,
        kind: Kind,
        sector: u64,
        segments: &[Segment],
        token: Option<u64>,
    ) -> Result<(), BlkError> {
        if self.health != Health::Well {
            return Err(BlkError::Gone);
        }
        let needed = segments.len() + 2;
        let free =
            self.slots.iter().position(Option::is_none).filter(|_| needed <= self.queue.available_desc());
        let Some(slot) = free else { return Err(BlkError::Busy) };
        let (header_sector, range) = match kind {
            Kind::Discard => (0, segments.first().copied()),
            Kind::Read | Kind::Write | Kind::Flush | Kind::Id => (sector, None),
        };
        write_header(&self.dma, slot, kind, header_sector);
        let in_pool = if let Some(range) = range {
            write_range(&self.dma, slot, sector, range.bytes);
            &[]
        } else {
            segments
        };
        let request = Request {
            kind,
            token,
            segments: u16::try_from(in_pool.len()).map_err(|_| BlkError::Refused)?,
            first: self.take_entries(in_pool),
        };
        let added = {
            let mut buffers = ManuallyDrop::new(Buffers::new());
            let (inputs, outputs) = buffers.fill(&self.dma, slot, request, &self.pool);
            // SAFETY: the segments are the device's by `start`'s contract until the completion, and the rest lies
            // in a slot that stays taken until then.
            unsafe { self.queue.add(inputs, outputs) }
        };
        let Some(entry) = added.ok().and_then(|head| self.by_head.get_mut(usize::from(head))) else {
            self.give_entries(request);
            return Err(BlkError::Busy);
        };
        debug_assert!(entry.is_none(), "B1");
        *entry = u8::try_from(slot).ok();
        self.slots[slot] = Some(request);
        if self.in_flight == 0 {
            self.heard = None;
        }
        self.in_flight += 1;
        kick(&mut self.transport, &self.queue, 0);
        Ok(())
    }

    /// Takes a pool entry for each segment; the caller saw as many free descriptors, so there are as many (B2).
    fn take_entries(&mut self, segments: &[Segment]) -> u16 {
        let first = self.pool_free;
        for segment in segments {
            let entry = &mut self.pool[usize::from(self.pool_free)];
            entry.segment = *segment;
            self.pool_free = entry.next;
        }
        first
    }

    fn give_entries(&mut self, request: Request) {
        let mut last = None;
        let mut at = request.first;
        for _ in 0..request.segments {
            last = Some(usize::from(at));
            at = self.pool[usize::from(at)].next;
        }
        if let Some(last) = last {
            self.pool[last].next = self.pool_free;
            self.pool_free = request.first;
        }
    }

    /// How long there have been requests in flight of which none ended, as far as it is known, when so much time has `passed`
    /// since this was last asked.
    pub fn silence(&mut self, passed: u64) -> u64 {
        let known = self.heard.filter(|&(ended, _)| ended == self.ended && self.in_flight > 0);
        let silence = known.map_or(0, |(_, silence)| silence.saturating_add(passed));
        self.heard = Some((self.ended, silence));
        silence
    }

    /// Resets a device for good. Nothing new is taken; once the device says that it has reset, and so touches no memory any
    /// more (virtio 1.2, 2.1.2), [`Blk::poll`] fails what was in flight.
    /// False if that has been done before.
    pub fn give_up(&mut self) -> bool {
        let well = self.health == Health::Well;
        if well {
            log::error!("disk: given up, {} requests lost", self.in_flight);
            self.transport.set_status(DeviceStatus::empty());
            self.health = Health::Resetting;
        }
        well
    }

    /// True when a device that was given up has said that it has reset.
    fn has_reset(&mut self) -> bool {
        if self.health == Health::Resetting && self.transport.get_status() == DeviceStatus::empty() {
            self.health = Health::Gone;
        }
        self.health == Health::Gone
    }

    /// The same for one that is broken; the first of what it loses, if it has reset at once.
    fn give_up_now(&mut self) -> Option<(Option<u64>, Result<(), BlkError>)> {
        self.give_up();
        if self.has_reset() { self.fail_one() } else { None }
    }

    /// The page to bounce through, behind the slots.
    fn bounce(&self) -> PhysAddr {
        PhysAddr::new(self.dma.base().bits() + (SLOTS * SLOT_BYTES) as u64)
    }
}

/// The device must not touch the queue's memory once it goes back.
impl<T: Transport> Drop for Blk<T> {
    fn drop(&mut self) {
        self.transport.set_status(DeviceStatus::empty());
    }
}

/// The buffers of one request, as the queue wants to see them when they go in and when they come back. Filled where
/// it stands: room for the longest request is 4 KiB, and most have one segment. Lists of references have nothing to
/// drop, and the queue borrows them for as long as what they refer to: hence `ManuallyDrop` wherever there is one.
struct Buffers<'a> {
    inputs: ArrayVec<&'a [u8], { MAX_SEGMENTS + 2 }>,
    outputs: ArrayVec<&'a mut [u8], { MAX_SEGMENTS + 2 }>,
}

impl<'a> Buffers<'a> {
    fn new() -> Self {
        Self { inputs: ArrayVec::new(), outputs: ArrayVec::new() }
    }

    /// Lists a request's.
    fn fill(
        &'a mut self,
        dma: &'a Pages,
        slot: usize,
        request: Request,
        pool: &[Entry; QUEUE],
    ) -> (&'a [&'a [u8]], &'a mut [&'a mut [u8]]) {
        self.push(at(dma, slot, 0), 16, false);
        if request.kind == Kind::Discard {
            self.push(at(dma, slot, RANGE_AT), 16, false);
        }
        let mut entry = request.first;
        for _ in 0..request.segments {
            let Entry { segment, next } = pool[usize::from(entry)];
            // `start` refused addresses that are 0; the queue itself takes buffers of at most 32 bits of length.
            let address = usize::try_from(segment.base.bits()).unwrap_or(0);
            let start = NonNull::new(core::ptr::with_exposed_provenance_mut(address));
            if let (Some(start), Ok(bytes)) = (start, usize::try_from(segment.bytes)) {
                self.push(start, bytes, matches!(request.kind, Kind::Read | Kind::Id));
            }
            entry = next;
        }
        self.push(at(dma, slot, STATUS_AT), 1, true);
        (&self.inputs, &mut self.outputs)
    }

    fn push(&mut self, start: NonNull<u8>, bytes: usize, device_writes: bool) {
        let mut whole = NonNull::slice_from_raw_parts(start, bytes);
        if device_writes {
            // SAFETY: RAM that is the request's alone, by `start`'s contract or as part of its slot. The queue
            // takes the address and the length, and touches no byte.
            self.outputs.push(unsafe { whole.as_mut() });
        } else {
            // SAFETY: as above.
            self.inputs.push(unsafe { whole.as_ref() });
        }
    }
}

fn at(dma: &Pages, slot: usize, offset: usize) -> NonNull<u8> {
    dma.at(slot * SLOT_BYTES + offset)
}

fn write_header(dma: &Pages, slot: usize, kind: Kind, sector: u64) {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&(kind as u32).to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    // SAFETY: the slot is free, so its bytes are ours; it is 64 bytes long and aligned to that.
    unsafe { at(dma, slot, 0).cast::<[u8; 16]>().write(header) };
    // SAFETY: as above. No status of the specification is 0xff.
    unsafe { at(dma, slot, STATUS_AT).write(0xff) };
}

fn write_range(dma: &Pages, slot: usize, sector: u64, sectors: u32) {
    let mut range = [0; 16];
    range[..8].copy_from_slice(&sector.to_le_bytes());
    range[8..12].copy_from_slice(&sectors.to_le_bytes());
    // SAFETY: as for the header.
    unsafe { at(dma, slot, RANGE_AT).cast::<[u8; 16]>().write(range) };
}
