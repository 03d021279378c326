//! The fake machine: frames, tables and stores in memory.

use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};
use spin::mutex::SpinMutex;

use crate::addr::{Ipa, IpaRange, PAGE_SIZE, Pfn};
use crate::pmap::{Entered, Harvest, Leaf, OutOfTables, Pmap, Sink};
use crate::prot::Prot;
use crate::store::{Direction, Expected, IoToken, Machine, PageStore, PhysMemory, StoreError, StoreId};

const PAGE: usize = 1 << crate::addr::PAGE_SHIFT;

/// What a frame holds that nobody has written.
pub const GARBAGE: u8 = 0xa5;

/// Frames that remember what was written to them.
#[derive(Default)]
pub struct FakeMemory {
    frames: SpinMutex<BTreeMap<Pfn, Box<[u8; PAGE]>>>,
    /// Pages zeroed.
    pub zeroed: AtomicU32,
    /// Pages copied.
    pub copied: AtomicU32,
    /// Pages made ready for guests after a transfer.
    pub published: AtomicU32,
}

impl FakeMemory {
    fn with<R>(&self, frame: Pfn, what: impl FnOnce(&mut [u8; PAGE]) -> R) -> R {
        what(self.frames.lock().entry(frame).or_insert_with(|| Box::new([GARBAGE; PAGE])))
    }
}

impl FakeMemory {
    /// Some frames hold what nobody has written: whoever gets one back that it had before must not take it for its own.
    pub fn spoil(&self, which: impl Fn(Pfn) -> bool) {
        self.frames.lock().retain(|&frame, _| !which(frame));
    }
}

impl PhysMemory for FakeMemory {
    fn zero(&self, frame: Pfn) {
        self.zeroed.fetch_add(1, Relaxed);
        self.with(frame, |page| page.fill(0));
    }
    fn copy(&self, from: Pfn, to: Pfn) {
        self.copied.fetch_add(1, Relaxed);
        let bytes = self.with(from, |page| *page);
        self.with(to, |page| *page = bytes);
    }
    fn fill(&self, frame: Pfn, bytes: &[u8]) {
        self.with(frame, |page| {
            page.fill(0);
            page[..bytes.len()].copy_from_slice(bytes);
        });
    }
    fn read(&self, frame: Pfn, offset: usize, out: &mut [u8]) {
        self.with(frame, |page| out.copy_from_slice(&page[offset..][..out.len()]));
    }
    fn write(&self, frame: Pfn, offset: usize, bytes: &[u8]) {
        self.with(frame, |page| page[offset..][..bytes.len()].copy_from_slice(bytes));
    }
    fn look(&self, frame: Pfn, each: impl FnMut(u64) -> bool) {
        let bytes = self.with(frame, |page| *page);
        let words = bytes.as_chunks::<8>().0;
        words.iter().copied().map(u64::from_le_bytes).all(each);
    }
    fn publish(&self, _frame: Pfn) {
        self.published.fetch_add(1, Relaxed);
    }
}

/// A transfer that a [`FakeStore`] was asked for.
#[derive(Clone, Debug)]
pub struct Request {
    /// Of which store.
    pub store: StoreId,
    /// Which way.
    pub direction: Direction,
    /// The store's first page.
    pub first: u64,
    /// The frames.
    pub frames: Vec<Pfn>,
    /// Whose.
    pub token: IoToken,
}

/// Stores that complete when the test says so, and fail on cue.
#[derive(Default)]
pub struct FakeStore {
    contents: SpinMutex<BTreeMap<StoreId, Vec<u8>>>,
    /// What is known of pages.
    pub expected: SpinMutex<BTreeMap<(StoreId, u64), Expected>>,
    pending: SpinMutex<Vec<Request>>,
    /// What the next `start` answers instead of taking the request.
    pub refuse_next: SpinMutex<Option<StoreError>>,
    /// So many may be pending; 0: any number.
    pub queue: AtomicU32,
    /// Transfers taken so far.
    pub started: AtomicU32,
    /// Pages that were asked to be written so far.
    pub written: AtomicU32,
}

impl FakeStore {
    /// Makes a store with these contents.
    pub fn add(&self, store: StoreId, contents: Vec<u8>) {
        self.contents.lock().insert(store, contents);
    }

    /// The store's bytes, all of them.
    pub fn contents(&self, store: StoreId) -> Vec<u8> {
        self.contents.lock().get(&store).cloned().unwrap_or_default()
    }

    /// One page, zero behind the store's end.
    pub fn page(&self, store: StoreId, page: u64) -> [u8; PAGE] {
        let mut out = [0; PAGE];
        let contents = self.contents.lock();
        let bytes = contents.get(&store).and_then(|all| all.chunks(PAGE).nth(place(page)));
        for (to, from) in out.iter_mut().zip(bytes.unwrap_or_default()) {
            *to = *from;
        }
        out
    }

    /// Overwrites one page.
    pub fn set_page(&self, store: StoreId, page: u64, bytes: &[u8; PAGE]) {
        let mut contents = self.contents.lock();
        if let Some(to) = contents.get_mut(&store).and_then(|all| all.chunks_mut(PAGE).nth(place(page))) {
            to.copy_from_slice(&bytes[..to.len()]);
        }
    }

    /// Takes the `nth` pending request out.
    pub fn take(&self, nth: usize) -> Option<Request> {
        let mut pending = self.pending.lock();
        (nth < pending.len()).then(|| pending.remove(nth))
    }

    /// The pending requests.
    pub fn requests(&self) -> Vec<Request> {
        self.pending.lock().clone()
    }

    /// Requests not yet completed.
    pub fn pending(&self) -> usize {
        self.pending.lock().len()
    }
}

fn place(page: u64) -> usize {
    usize::try_from(page).unwrap_or(usize::MAX)
}

impl PageStore for FakeStore {
    fn start(
        &self,
        store: StoreId,
        direction: Direction,
        first: u64,
        frames: &[Pfn],
        token: IoToken,
    ) -> Result<(), StoreError> {
        if let Some(error) = self.refuse_next.lock().take() {
            return Err(error);
        }
        let queue = place(self.queue.load(Relaxed).into());
        if queue > 0 && self.pending() >= queue {
            return Err(StoreError::Busy);
        }
        if first + frames.len() as u64 > self.pages(store) {
            return Err(StoreError::Refused);
        }
        self.started.fetch_add(1, Relaxed);
        if direction == Direction::Out {
            self.written.fetch_add(u32::try_from(frames.len()).unwrap_or(0), Relaxed);
        }
        self.pending.lock().push(Request { store, direction, first, frames: frames.to_vec(), token });
        Ok(())
    }
    fn start_flush(&self, store: StoreId, token: IoToken) -> Result<(), StoreError> {
        let request = Request { store, direction: Direction::Out, first: 0, frames: Vec::new(), token };
        self.pending.lock().push(request);
        Ok(())
    }
    fn discard(&self, _store: StoreId, _first: u64, _pages: u64) {}
    fn pages(&self, store: StoreId) -> u64 {
        let contents = self.contents.lock();
        contents.get(&store).map_or(0, |bytes| bytes.len().div_ceil(PAGE) as u64)
    }
    fn whole_pages(&self, store: StoreId) -> u64 {
        self.contents.lock().get(&store).map_or(0, |bytes| (bytes.len() / PAGE) as u64)
    }
    fn expects(&self, store: StoreId, page: u64) -> Expected {
        self.expected.lock().get(&(store, page)).copied().unwrap_or(Expected::Anything)
    }
}

/// A leaf, and what the CPU noted in it.
#[derive(Clone, Copy)]
struct FakeLeaf {
    leaf: Leaf,
    accessed: bool,
    dirty: bool,
}

impl FakeLeaf {
    const fn new(frame: Pfn, prot: Prot) -> Self {
        Self { leaf: Leaf { frame, prot, block: false }, accessed: true, dirty: false }
    }

    const fn harvest(self, at: Ipa) -> Harvest {
        Harvest { at, frame: self.leaf.frame, pages: 1, accessed: self.accessed, dirty: self.dirty }
    }
}

/// Tables in memory, without a TLB: what they say is what a CPU does.
#[derive(Default)]
pub struct FakePmap {
    leaves: BTreeMap<Ipa, FakeLeaf>,
    /// No table can be had.
    pub out_of_tables: AtomicBool,
    /// Leaves entered by faults, neighbours not counted.
    pub entered: u32,
    /// Times that somebody looked for a leaf.
    pub looked: AtomicU32,
    /// Blocks that were broken into pages.
    pub broken: u32,
}

impl FakePmap {
    fn room(&self) -> Result<(), OutOfTables> {
        if self.out_of_tables.load(Relaxed) { Err(OutOfTables) } else { Ok(()) }
    }

    /// A part of each chunk of a range that is not there whole is about to change: a block there is broken.
    fn trim(&mut self, range: IpaRange) {
        let last = Ipa::new(range.end().bits().saturating_sub(PAGE_SIZE));
        for at in [range.start(), last] {
            let Some(chunk) = IpaRange::from_pages(at.chunk(), crate::addr::CHUNK_PAGES) else { continue };
            if chunk.intersection(range) != Some(chunk) && self.is_block(at) {
                self.broken += 1;
                self.leaves.range_mut(chunk.as_range()).for_each(|(_, leaf)| leaf.leaf.block = false);
            }
        }
    }

    fn is_block(&self, at: Ipa) -> bool {
        self.leaves.get(&at.page()).is_some_and(|leaf| leaf.leaf.block)
    }

    /// Every leaf.
    pub fn leaves(&self) -> impl Iterator<Item = (Ipa, Leaf)> + '_ {
        self.leaves.iter().map(|(&at, leaf)| (at, leaf.leaf))
    }

    /// A CPU uses a page: the frame, if its leaf allows that.
    pub fn access(&mut self, at: Ipa, access: Prot) -> Option<Pfn> {
        let leaf = self.leaves.get_mut(&at.page()).filter(|leaf| leaf.leaf.prot.allows(access))?;
        leaf.accessed = true;
        leaf.dirty |= access.allows(Prot::WRITE);
        Some(leaf.leaf.frame)
    }
}

impl Pmap for FakePmap {
    fn reach(&self) -> Ipa {
        Ipa::new(1 << 39)
    }
    fn is_bare(&self, at: Ipa) -> bool {
        let chunk = IpaRange::from_pages(at.chunk(), crate::addr::CHUNK_PAGES);
        chunk.is_some_and(|chunk| self.leaves.range(chunk.as_range()).next().is_none())
    }
    fn enter(&mut self, at: Ipa, frame: Pfn, prot: Prot, sink: Sink<'_>) -> Result<Entered, OutOfTables> {
        self.room()?;
        self.entered += 1;
        if self.leaves.get(&at.page()).is_some_and(|old| old.leaf == Leaf { frame, prot, block: true }) {
            return Ok(Entered::Leaf);
        }
        IpaRange::page_of(at).into_iter().for_each(|page| self.trim(page));
        if let Some(old) = self.leaves.insert(at.page(), FakeLeaf::new(frame, prot)) {
            sink(old.harvest(at.page()));
        }
        Ok(Entered::Leaf)
    }
    fn enter_around(
        &mut self,
        first: Ipa,
        frames: impl Iterator<Item = Option<Pfn>>,
        prot: Prot,
    ) -> Result<u32, OutOfTables> {
        self.room()?;
        if self.is_block(first) {
            return Ok(0);
        }
        let mut count = 0;
        for (page, frame) in (0..).zip(frames) {
            let (Some(frame), Some(at)) = (frame, first.checked_add(page * PAGE_SIZE)) else { continue };
            assert_eq!(at.chunk(), first.chunk(), "neighbours lie in one chunk");
            let old = self.leaves.get_mut(&at);
            match old {
                None => drop(self.leaves.insert(at, FakeLeaf::new(frame, prot))),
                Some(FakeLeaf { leaf, .. })
                    if leaf.frame == frame && leaf.prot != prot && prot.allows(leaf.prot) =>
                {
                    leaf.prot = prot;
                }
                Some(_) => continue,
            }
            count += 1;
        }
        Ok(count)
    }
    fn enter_block(
        &mut self,
        at: Ipa,
        first: Pfn,
        prot: Prot,
        sink: Sink<'_>,
    ) -> Result<Entered, OutOfTables> {
        self.room()?;
        assert!(at.is_chunk_aligned() && first.is_chunk_aligned(), "a block is aligned");
        let range = IpaRange::from_pages(at, crate::addr::CHUNK_PAGES).ok_or(OutOfTables)?;
        self.remove(range, sink);
        self.entered += 1;
        for (page, number) in range.iter_pages().zip(first.number()..) {
            let mut leaf = FakeLeaf::new(Pfn::new(number), prot);
            leaf.leaf.block = true;
            self.leaves.insert(page, leaf);
        }
        Ok(Entered::Leaf)
    }
    fn remove(&mut self, range: IpaRange, sink: Sink<'_>) {
        self.trim(range);
        self.leaves.retain(|&at, &mut leaf| {
            let keep = !range.contains(at);
            if !keep {
                sink(leaf.harvest(at));
            }
            keep
        });
    }
    fn remove_pages(&mut self, pages: impl Iterator<Item = Ipa>, sink: Sink<'_>) {
        for at in pages {
            let block = self.leaves.get(&at).is_some_and(|known| known.leaf.block);
            IpaRange::page_of(at).into_iter().for_each(|page| self.trim(page));
            if let Some(leaf) = self.leaves.remove(&at) {
                sink(leaf.harvest(at));
            }
            if block {
                break;
            }
        }
    }
    fn clear(&mut self, budget: u32, sink: Sink<'_>) -> bool {
        for _ in 0..budget.max(1) {
            let Some((at, leaf)) = self.leaves.pop_first() else { break };
            sink(leaf.harvest(at));
        }
        self.leaves.is_empty()
    }
    fn protect(&mut self, range: IpaRange, keep: Prot, sink: Sink<'_>) {
        self.trim(range);
        for (&at, leaf) in self.leaves.range_mut(range.as_range()) {
            sink(leaf.harvest(at));
            (leaf.accessed, leaf.dirty) = (false, false);
            leaf.leaf.prot = leaf.leaf.prot & keep;
        }
    }
    fn park(&mut self) -> u32 {
        for leaf in self.leaves.values_mut() {
            leaf.leaf.prot = leaf.leaf.prot.without(Prot::WRITE);
        }
        u32::try_from(self.leaves.len()).unwrap_or(u32::MAX)
    }
    fn age(&mut self, range: IpaRange, sink: Sink<'_>) {
        for (&at, leaf) in self.leaves.range_mut(range.as_range()) {
            sink(leaf.harvest(at));
            (leaf.accessed, leaf.dirty) = (false, false);
        }
    }
    fn lookup(&self, at: Ipa) -> Option<Leaf> {
        self.looked.fetch_add(1, Relaxed);
        self.leaves.get(&at.page()).map(|leaf| leaf.leaf)
    }
    fn next_leaf(&self, range: IpaRange) -> Option<(Ipa, Leaf)> {
        self.looked.fetch_add(1, Relaxed);
        self.leaves.range(range.as_range()).next().map(|(&at, leaf)| (at, leaf.leaf))
    }
    fn tables(&self) -> u32 {
        1
    }
    fn blocks(&self) -> u32 {
        let first = |at: &&Ipa| at.is_chunk_aligned() && self.is_block(**at);
        u32::try_from(self.leaves.keys().filter(first).count()).unwrap_or(u32::MAX)
    }
}

/// The fake machine.
#[derive(Default)]
pub struct FakeMachine {
    /// Its frames' bytes.
    pub memory: FakeMemory,
    /// Its stores.
    pub store: FakeStore,
    /// The books are not to grow.
    pub full: AtomicBool,
}

impl FakeMachine {
    /// One without stores.
    pub fn new() -> Self {
        Self::default()
    }
}

impl Machine for FakeMachine {
    type Pmap = FakePmap;
    type Memory = FakeMemory;
    type Store = FakeStore;
    fn memory(&self) -> &FakeMemory {
        &self.memory
    }
    fn store(&self) -> &FakeStore {
        &self.store
    }
    fn has_room(&self) -> bool {
        !self.full.load(Relaxed)
    }
}
