//! The frame array: one [`VmPage`] for each frame of memory, and whose it is.
//!
//! The array is flat from the lowest frame to the highest; what lies between memory ranges is there and
//! never used. All fields are atomics, because they are guarded by different locks and nothing here is
//! unsafe; every access is relaxed, the locks order them.
//!
//! Called by `object`, `pager`, `fault`. Calls `queues` and `runs`. Locks: the queue lock, last of all.
//!
//! # Invariants
//! P1. A frame is on the free list exactly when nobody owns it.
//! P2. A busy page is on no queue. While it is filled only whoever made it busy touches its bytes; while it
//!     is written out nobody changes them.
//! P3. A resident page's owner has a slot for it that says so, and no other slot names it.
//! P4. A page marked unmapped has no leaf: whoever enters one clears the mark, under the owner's lock.
//! P5. A page with a clean swap slot is mapped nowhere writable.
//! P6. A wired page is on no queue. If its owner gives it up, it is free when it is unwired (D22).
//! P7. A page of an object whose store sees every change is dirty if it is mapped anywhere writable.

mod queues;
mod runs;

pub use queues::{Queue, QueueLengths};
pub use runs::{ANY, Wish};

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::ops::Range;
use core::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU32, Ordering::Relaxed};

use crate::VmError;
use crate::addr::{CHUNK_PAGES, PageIndex, Pfn};
use crate::limits::{MAX_FRAME, MAX_RESERVE, MIN_RESERVE};
use crate::lock::{Held, QUEUES, Ranked};
use crate::pmap::Harvest;
use crate::point;
use crate::store::IoToken;
use queues::Queues;
use runs::Runs;

/// Owner of a frame that nobody owns.
const NOBODY: u32 = u32::MAX;
/// Owner of a frame that holds a translation table.
const TABLE: u32 = u32::MAX - 1;
/// Owner of a frame number without memory.
const ABSENT: u32 = u32::MAX - 2;
/// Owner of a frame that its owner gave up while it was wired.
const ORPHAN: u32 = u32::MAX - 3;
/// No link.
const NIL: u32 = u32::MAX;

/// Being read in or written out.
const BUSY: u8 = 1;
/// Busy, and its bytes are not there yet.
const FILLING: u8 = 1 << 1;
/// Written since it was last read in or written out.
const DIRTY: u8 = 1 << 2;
/// Used since the last look.
const ACCESSED: u8 = 1 << 3;
/// No leaf reaches it.
const UNMAPPED: u8 = 1 << 4;
/// Its store did not take it the last time.
const REFUSED: u8 = 1 << 5;

/// Whose a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// Nobody's: it is free.
    Free,
    /// A translation table's.
    Table,
    /// There is no memory at that number.
    Absent,
    /// Nobody's any more, but wired.
    Orphan,
    /// An object's page: the number of the object's storage, and the place in its index.
    Object(u32, PageIndex),
}

/// A frame, and whose it is.
/// Guarded by: (o) the owner's object lock; (q) the queue lock; (a) nothing, set at any time.
#[derive(Debug)]
pub struct VmPage {
    owner: AtomicU32, // (o), and (q) when it becomes or ceases to be free
    index: AtomicU32, // (o)
    next: AtomicU32,  // (q); (o) while busy: the transfer's number
    prev: AtomicU32,  // (q); (o) while busy: the transfer's generation
    clean: AtomicU32, // (o) swap slot with the same contents, plus one
    queue: AtomicU8,  // (q)
    flags: AtomicU8, // busy (o) and (q), set (o) alone with filling; unmapped, refused (o); dirty and accessed (a)
    wired: AtomicU16, // (q)
}

impl VmPage {
    const fn new(owner: u32) -> Self {
        Self {
            owner: AtomicU32::new(owner),
            index: AtomicU32::new(0),
            next: AtomicU32::new(NIL),
            prev: AtomicU32::new(NIL),
            clean: AtomicU32::new(0),
            queue: AtomicU8::new(Queue::None as u8),
            flags: AtomicU8::new(0),
            wired: AtomicU16::new(0),
        }
    }

    /// Whose it is.
    pub fn owner(&self) -> Owner {
        match self.owner.load(Relaxed) {
            NOBODY => Owner::Free,
            TABLE => Owner::Table,
            ABSENT => Owner::Absent,
            ORPHAN => Owner::Orphan,
            object => Owner::Object(object, PageIndex::new(self.index.load(Relaxed))),
        }
    }

    #[inline]
    fn has(&self, flag: u8) -> bool {
        self.flags.load(Relaxed) & flag != 0
    }

    /// True while a transfer has it.
    #[inline]
    pub fn is_busy(&self) -> bool {
        self.has(BUSY)
    }

    /// True when no transfer has it and pageout has not taken it in hand.
    #[inline]
    pub fn is_at_rest(&self) -> bool {
        !self.has(BUSY | UNMAPPED)
    }

    /// True while a transfer brings its bytes: they are not there yet.
    #[inline]
    pub fn is_filling(&self) -> bool {
        self.has(FILLING)
    }

    /// The transfer that made it busy.
    pub fn transfer(&self) -> IoToken {
        debug_assert!(self.is_busy());
        IoToken(u64::from(self.prev.load(Relaxed)) << 32 | u64::from(self.next.load(Relaxed)))
    }

    fn set_busy(&self, token: IoToken, busy: u8) {
        debug_assert_eq!(self.queue(), Queue::None);
        let (low, high) = (token.0 & 0xffff_ffff, token.0 >> 32);
        self.next.store(u32::try_from(low).unwrap_or(NIL), Relaxed);
        self.prev.store(u32::try_from(high).unwrap_or(NIL), Relaxed);
        self.flags.fetch_or(busy, Relaxed);
    }

    fn clear_busy(&self) {
        self.flags.fetch_and(!(BUSY | FILLING), Relaxed);
        self.next.store(NIL, Relaxed);
        self.prev.store(NIL, Relaxed);
    }

    /// True if it was written since it was last clean.
    pub fn is_dirty(&self) -> bool {
        self.has(DIRTY)
    }

    /// Says whether it differs from what its store has. The caller has the owner's lock; nothing may write
    /// to a page that becomes clean.
    pub(crate) fn set_dirty(&self, dirty: bool) {
        if dirty {
            self.flags.fetch_or(DIRTY, Relaxed);
        } else {
            self.flags.fetch_and(!DIRTY, Relaxed);
        }
    }

    /// True if its store did not take it the last time: it is to go alone.
    pub(crate) fn is_refused(&self) -> bool {
        self.has(REFUSED)
    }

    /// Says whether its store took it. The caller has the owner's lock.
    pub(crate) fn set_refused(&self, refused: bool) {
        if refused {
            self.flags.fetch_or(REFUSED, Relaxed);
        } else if self.is_refused() {
            self.flags.fetch_and(!REFUSED, Relaxed);
        }
    }

    /// True if no leaf reaches it.
    #[inline]
    pub fn is_unmapped(&self) -> bool {
        self.has(UNMAPPED)
    }

    /// Says that no leaf reaches it, or that one may.
    pub(crate) fn set_unmapped(&self, unmapped: bool) {
        point::here();
        if unmapped {
            self.flags.fetch_or(UNMAPPED, Relaxed);
        } else {
            self.flags.fetch_and(!UNMAPPED, Relaxed);
        }
    }

    /// A leaf is about to reach it.
    #[inline]
    pub(crate) fn map(&self) {
        point::here();
        if self.is_unmapped() {
            self.set_unmapped(false);
        }
    }

    /// It is in use.
    pub(crate) fn touch(&self) {
        self.flags.fetch_or(ACCESSED, Relaxed);
    }

    /// Whether it was used since the last call.
    pub(crate) fn take_accessed(&self) -> bool {
        point::here();
        self.flags.fetch_and(!ACCESSED, Relaxed) & ACCESSED != 0
    }

    /// True if its frame may not change and it may not be evicted.
    pub fn is_wired(&self) -> bool {
        self.wired.load(Relaxed) != 0
    }

    /// True if a swap slot holds the same contents.
    #[inline]
    pub fn has_clean_slot(&self) -> bool {
        self.clean.load(Relaxed) != 0
    }

    /// The swap slot that holds the same contents, if one does.
    pub fn clean_slot(&self) -> Option<u32> {
        self.clean.load(Relaxed).checked_sub(1)
    }

    /// Says which swap slot holds the same contents.
    pub fn set_clean_slot(&self, slot: Option<u32>) {
        self.clean.store(slot.map_or(0, |slot| slot + 1), Relaxed);
    }

    /// Which queue it is on.
    pub fn queue(&self) -> Queue {
        Queue::from_bits(self.queue.load(Relaxed))
    }

    fn set_queue(&self, queue: Queue) {
        self.queue.store(queue as u8, Relaxed);
    }

    /// The page of another owner, or at another place of the same.
    pub(crate) fn set_owner(&self, object: u32, index: PageIndex) {
        self.owner.store(object, Relaxed);
        self.index.store(index.number(), Relaxed);
    }
}

/// Every frame of the machine that the VM may use.
pub struct Frames {
    base: u32,
    pages: Box<[VmPage]>,
    queues: Ranked<QUEUES, Queues>,
    total: u32,
    reserve: u32,
    /// Pageout is at work.
    short: AtomicBool,
}

/// The pages of all frames.
#[derive(Clone, Copy)]
pub struct View<'f> {
    base: u32,
    pages: &'f [VmPage],
}

impl<'f> View<'f> {
    /// A frame's page, if it is one of ours.
    #[inline]
    pub fn page(self, frame: Pfn) -> Option<&'f VmPage> {
        self.pages.get(frame.number().wrapping_sub(self.base) as usize)
    }
}

impl Frames {
    /// Takes over these ranges of frames; they must not overlap. Frames that cannot be numbered are left
    /// alone.
    pub fn new(ranges: &[Range<Pfn>]) -> Result<Self, VmError> {
        let usable = || {
            let numbers = ranges.iter().map(|r| r.start.number()..r.end.number().min(MAX_FRAME));
            numbers.filter(|range| !range.is_empty())
        };
        let first = usable().map(|range| range.start).min().ok_or(VmError::NoFrames)?;
        let base = first / CHUNK_PAGES * CHUNK_PAGES; // so that a place tells which 2 MiB it is of
        let end = usable().map(|range| range.end).max().ok_or(VmError::NoFrames)?;
        let span = usize::try_from(end - base).map_err(|_| VmError::NoMemory)?;
        let mut pages = Vec::new();
        pages.try_reserve_exact(span).map_err(|_| VmError::NoMemory)?;
        pages.resize_with(span, || VmPage::new(ABSENT));
        let mut queues = Queues::new(Runs::new(span)?);
        let mut total = 0;
        for number in usable().flatten() {
            let place = number - base;
            if let Some(page) = pages.get_mut(place as usize)
                && *page.owner.get_mut() == ABSENT
            {
                page.owner = AtomicU32::new(NOBODY);
                total += 1;
            }
        }
        for place in (0..end - base).rev() {
            if pages.get(place as usize).is_some_and(|page| page.owner() == Owner::Free) {
                queues.give(&pages, place);
            }
        }
        let reserve = (total / 256).clamp(MIN_RESERVE, MAX_RESERVE).min(total / 4);
        Ok(Self {
            base,
            pages: pages.into_boxed_slice(),
            queues: Ranked::new(queues),
            total,
            reserve,
            short: AtomicBool::new(false),
        })
    }

    /// The page of a frame. A frame that was never given to the VM is a bug of the caller.
    #[inline]
    pub fn page(&self, frame: Pfn) -> &VmPage {
        &self.pages[self.place(frame)]
    }

    /// All of them, for a loop over many.
    #[inline]
    pub fn view(&self) -> View<'_> {
        View { base: self.base, pages: &self.pages }
    }

    #[inline]
    fn place(&self, frame: Pfn) -> usize {
        frame.number().wrapping_sub(self.base) as usize
    }

    #[expect(clippy::cast_possible_truncation, reason = "a place is below MAX_FRAME")]
    fn place32(&self, frame: Pfn) -> u32 {
        self.place(frame) as u32
    }

    /// True if a frame of a range is one that the VM was given.
    pub fn has_any(&self, range: &Range<Pfn>) -> bool {
        let place = |frame: Pfn| (frame.number().saturating_sub(self.base) as usize).min(self.pages.len());
        let pages = self.pages.get(place(range.start)..place(range.end));
        pages.is_some_and(|pages| pages.iter().any(|page| page.owner() != Owner::Absent))
    }

    /// The page of a frame, if the VM has such a frame.
    pub fn find(&self, frame: Pfn) -> Option<&VmPage> {
        self.pages.get(self.place(frame))
    }

    /// A frame for a guest's page, put on a queue: the one that is wanted if that is free. `None` when only the reserve
    /// is left.
    #[inline]
    pub fn allocate<const OUTER: u8>(
        &self,
        object: u32,
        index: PageIndex,
        queue: Queue,
        wanted: Pfn,
        held: &mut Held<'_, OUTER>,
    ) -> Option<Pfn> {
        let (mut queues, _held) = self.queues.lock(held);
        if queues.length(Queue::Free) <= self.reserve {
            return None;
        }
        let (place, page) = queues.take(&self.pages, wanted.number().wrapping_sub(self.base))?;
        page.set_owner(object, index);
        queues.append(&self.pages, queue, place, page);
        Some(Pfn::new(self.base + place))
    }

    /// A frame for a translation table, from the reserve if it must be. Its bytes are not touched.
    pub fn allocate_table<const OUTER: u8>(&self, held: &mut Held<'_, OUTER>) -> Option<Pfn> {
        let (mut queues, _held) = self.queues.lock(held);
        let (place, page) = queues.take(&self.pages, NIL)?;
        page.set_queue(Queue::None);
        page.owner.store(TABLE, Relaxed);
        queues.tables += 1;
        Some(Pfn::new(self.base + place))
    }

    /// Gives a table's frame back.
    pub fn free_table<const OUTER: u8>(&self, frame: Pfn, held: &mut Held<'_, OUTER>) {
        let (mut queues, _held) = self.queues.lock(held);
        let page = self.page(frame);
        assert_eq!(page.owner(), Owner::Table, "{frame:?} is no table");
        page.owner.store(NOBODY, Relaxed);
        queues.tables -= 1;
        queues.give(&self.pages, self.place32(frame));
    }

    /// Gives an object's frame back. No mapping may reach it any more (D8).
    pub fn free<const OUTER: u8>(&self, frame: Pfn, held: &mut Held<'_, OUTER>) {
        self.free_all(&[frame], held);
    }

    /// The same for several, under one lock.
    pub fn free_all<const OUTER: u8>(&self, frames: &[Pfn], held: &mut Held<'_, OUTER>) {
        let (mut queues, _held) = self.queues.lock(held);
        let (base, pages) = (self.base, &*self.pages);
        for &frame in frames {
            let place = frame.number().wrapping_sub(base);
            let page = &pages[place as usize];
            assert!(page.owner.load(Relaxed) < ORPHAN, "{frame:?} is no object's");
            assert!(!page.is_busy(), "{frame:?} is busy");
            assert!(!page.has_clean_slot(), "{frame:?} has a swap slot");
            page.flags.store(0, Relaxed);
            if page.is_wired() {
                page.owner.store(ORPHAN, Relaxed);
            } else {
                page.owner.store(NOBODY, Relaxed);
                queues.take_back(pages, place, page);
            }
        }
    }

    /// Moves a page to the end of a queue; a wired one stays on none.
    pub fn enqueue<const OUTER: u8>(&self, frame: Pfn, queue: Queue, held: &mut Held<'_, OUTER>) {
        debug_assert!(queue != Queue::Free);
        let (mut queues, _held) = self.queues.lock(held);
        queues.unlink(&self.pages, self.place32(frame));
        if !self.page(frame).is_wired() {
            queues.push_back(&self.pages, queue, self.place32(frame));
        }
    }

    /// Moves the first page of a queue to its end, and says which that is.
    pub(crate) fn rotate<const OUTER: u8>(&self, queue: Queue, held: &mut Held<'_, OUTER>) -> Option<Pfn> {
        debug_assert!(queue != Queue::Free && queue != Queue::None);
        let (mut queues, _held) = self.queues.lock(held);
        let place = queues.pop_front(&self.pages, queue)?;
        queues.push_back(&self.pages, queue, place);
        Some(Pfn::new(self.base + place))
    }

    /// Keeps a page where it is, once more. The caller has the owner's lock. False if it is wired too often.
    pub(crate) fn wire<const OUTER: u8>(&self, frame: Pfn, held: &mut Held<'_, OUTER>) -> bool {
        let (mut queues, _held) = self.queues.lock(held);
        let page = self.page(frame);
        let Some(more) = page.wired.load(Relaxed).checked_add(1) else { return false };
        queues.unlink(&self.pages, self.place32(frame));
        page.wired.store(more, Relaxed);
        true
    }

    /// Makes pages busy with a transfer that writes them out, and takes them off their queues; the caller has the owner's
    /// lock. Under that of the queues, too: whoever unwires one puts it on a queue unless it is busy.
    pub(crate) fn set_busy<const OUTER: u8>(
        &self,
        frames: &[Pfn],
        token: IoToken,
        held: &mut Held<'_, OUTER>,
    ) {
        let (mut queues, _held) = self.queues.lock(held);
        for &frame in frames {
            queues.unlink(&self.pages, self.place32(frame));
            self.page(frame).set_busy(token, BUSY);
        }
    }

    /// Makes pages busy with a transfer that fills them. They have just been allocated, for no queue, and the caller has
    /// the owner's lock: nobody else knows them.
    pub(crate) fn set_filling(&self, frames: &[Pfn], token: IoToken) {
        frames.iter().for_each(|&frame| self.page(frame).set_busy(token, BUSY | FILLING));
    }

    /// A page is filled: it is not busy any more, and on a queue.
    pub(crate) fn arrive<const OUTER: u8>(&self, frame: Pfn, queue: Queue, held: &mut Held<'_, OUTER>) {
        let (mut queues, _held) = self.queues.lock(held);
        let place = self.place32(frame);
        let page = &self.pages[place as usize];
        page.clear_busy();
        queues.append(&self.pages, if page.is_wired() { Queue::None } else { queue }, place, page);
    }

    /// Ends what [`Self::set_busy`] or [`Self::set_filling`] began.
    pub(crate) fn clear_busy<const OUTER: u8>(&self, frames: &[Pfn], held: &mut Held<'_, OUTER>) {
        let (_queues, _held) = self.queues.lock(held);
        frames.iter().for_each(|&frame| self.page(frame).clear_busy());
    }

    /// Ends one [`Self::wire`]; a page that nobody owns any more is free after the last. True if it is.
    pub(crate) fn unwire<const OUTER: u8>(&self, frame: Pfn, held: &mut Held<'_, OUTER>) -> bool {
        let (mut queues, _held) = self.queues.lock(held);
        let page = self.page(frame);
        let Some(less) = page.wired.load(Relaxed).checked_sub(1) else { panic!("{frame:?} is not wired") };
        page.wired.store(less, Relaxed);
        if less > 0 {
            return false;
        }
        let free = page.owner() == Owner::Orphan;
        if free {
            page.flags.store(0, Relaxed); // what was noted since its object let it go is about nobody's page
            page.owner.store(NOBODY, Relaxed);
            queues.give(&self.pages, self.place32(frame));
        } else if !page.is_busy() {
            queues.push_back(&self.pages, Queue::Active, self.place32(frame));
        }
        free
    }

    /// Keeps what a leaf remembered (I14), of each of its pages.
    pub fn note(&self, harvest: Harvest) {
        let bits = (u8::from(harvest.accessed) * ACCESSED) | (u8::from(harvest.dirty) * DIRTY);
        if bits == 0 {
            return;
        }
        let pages = self.pages.get(self.place(harvest.frame)..).unwrap_or_default();
        let pages = match harvest.pages {
            1 => pages.first().map_or(&[][..], core::slice::from_ref),
            more => pages.get(..more as usize).unwrap_or_default(),
        };
        for page in pages {
            // A block says of many what is known of most.
            if page.flags.load(Relaxed) & bits != bits {
                page.flags.fetch_or(bits, Relaxed);
            }
        }
    }

    /// True if no transfer has a page of the 2 MiB from a frame on, and pageout has taken none in hand.
    pub(crate) fn are_at_rest(&self, first: Pfn) -> bool {
        let pages = self.pages.get(self.place(first)..).unwrap_or_default();
        let pages = pages.get(..CHUNK_PAGES as usize);
        let flags = |pages: &[VmPage]| pages.iter().fold(0, |all, page| all | page.flags.load(Relaxed));
        pages.is_some_and(|pages| flags(pages) & (BUSY | UNMAPPED) == 0)
    }

    /// The frame so far into aligned 2 MiB that are free whole, if there are any; else [`ANY`].
    #[cold]
    pub(crate) fn whole_at<const OUTER: u8>(&self, offset: u32, held: &mut Held<'_, OUTER>) -> Pfn {
        let (queues, _held) = self.queues.lock(held);
        match queues.whole_at(offset) {
            NIL => ANY,
            place => Pfn::new(self.base + place),
        }
    }

    /// How many aligned 2 MiB of frames are free whole. It walks their list: for audits.
    pub fn whole_runs<const OUTER: u8>(&self, held: &mut Held<'_, OUTER>) -> u32 {
        self.queues.lock(held).0.whole()
    }

    /// True while pageout takes frames from pages.
    #[inline]
    pub(crate) fn is_short(&self) -> bool {
        self.short.load(Relaxed)
    }

    pub(crate) fn set_short(&self, short: bool) {
        self.short.store(short, Relaxed);
    }

    /// Bytes of the array.
    pub fn bytes(&self) -> usize {
        size_of_val(&*self.pages)
    }

    /// How many frames there are.
    pub const fn total(&self) -> u32 {
        self.total
    }

    /// How many free frames guests' pages leave alone.
    pub const fn reserve(&self) -> u32 {
        self.reserve
    }

    /// How long each queue is.
    pub fn lengths<const OUTER: u8>(&self, held: &mut Held<'_, OUTER>) -> QueueLengths {
        self.queues.lock(held).0.lengths()
    }

    /// Every frame that exists, with its page.
    pub fn iter(&self) -> impl Iterator<Item = (Pfn, &VmPage)> {
        let numbered = (self.base..).zip(self.pages.iter()).map(|(n, page)| (Pfn::new(n), page));
        numbered.filter(|(_, page)| page.owner() != Owner::Absent)
    }

    /// Walks the queues and compares them with the pages; the free list's length on success.
    pub(crate) fn check_queues<const OUTER: u8>(&self, held: &mut Held<'_, OUTER>) -> Result<(), Pfn> {
        let (queues, _held) = self.queues.lock(held);
        queues.check(&self.pages).map_err(|place| Pfn::new(self.base + place))
    }
}
