//! Table frames in a box, which can run out on cue.

use crate::table::{ENTRIES, Table, TableSource};
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ops::Range;
use core::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use vmobject::addr::Pfn;

/// The first frame's number: a multiple of 16, and none that a table's bits could be mistaken for.
const FIRST: u32 = 0x8_0000;
/// What a free frame is full of: a walker that gets there sees valid leaves of a frame that is nobody's.
const POISON: u64 = 0xfff_dead_d7ff;

/// A store of table frames. A clone is the same store.
///
/// Alone ([`Frames::new`]) it gives out frames itself. Over a range of a machine's frames ([`Frames::over`])
/// somebody else does, a VM that counts and charges them: its `TableSource` passes each frame that it got to
/// [`Frames::claim`], and each that it gives back to [`Frames::release`].
#[derive(Clone)]
pub struct Frames(Arc<Store>);

struct Store {
    first: u32,
    tables: Box<[Table]>,
    used: Box<[AtomicBool]>,
    /// Claimed, released or lent since [`Frames::copy_changed`].
    touched: Box<[AtomicBool]>,
    limit: AtomicUsize,
}

impl Frames {
    /// `count` frames, at an address of their own.
    pub fn new(count: usize) -> Self {
        Self::with(FIRST, count)
    }

    /// The frames of a range, none of them a table yet. Each costs 4 KiB of the test's memory.
    pub fn over(range: Range<Pfn>) -> Self {
        let count = range.end.number().saturating_sub(range.start.number());
        Self::with(range.start.number(), usize::try_from(count).unwrap_or(0))
    }

    fn with(first: u32, count: usize) -> Self {
        let table = || core::array::from_fn(|_| AtomicU64::new(POISON));
        Self(Arc::new(Store {
            first,
            tables: (0..count).map(|_| table()).collect(),
            used: (0..count).map(|_| AtomicBool::new(false)).collect(),
            touched: (0..count).map(|_| AtomicBool::new(false)).collect(),
            limit: AtomicUsize::new(count),
        }))
    }

    /// Makes a frame a table, of zeros.
    pub fn claim(&self, frame: Pfn) {
        let Some(number) = self.number(frame) else { panic!("{frame} is no table frame") };
        assert!(!self.0.used[number].swap(true, Relaxed), "{frame} is a table already");
        self.turn(number, 0);
    }

    /// Takes it back, and fills it with what no walker ought to find.
    pub fn release(&self, frame: Pfn) {
        let Some(number) = self.number(frame) else { panic!("{frame} is no table frame") };
        assert!(self.0.used[number].swap(false, Relaxed), "{frame} is freed twice");
        self.turn(number, POISON);
    }

    fn turn(&self, number: usize, into: u64) {
        for entry in &self.0.tables[number] {
            entry.store(into, Relaxed);
        }
        self.0.touched[number].store(true, Relaxed);
    }

    /// From now on there are no frames to be had once this many are in use.
    pub fn limit(&self, frames: usize) {
        self.0.limit.store(frames, Relaxed);
    }

    /// Frames in use.
    pub fn in_use(&self) -> usize {
        self.0.used.iter().filter(|used| used.load(Relaxed)).count()
    }

    /// How many frames there are.
    pub(super) fn count(&self) -> usize {
        self.0.tables.len()
    }

    fn number(&self, frame: Pfn) -> Option<usize> {
        let number = usize::try_from(frame.number().checked_sub(self.0.first)?).ok()?;
        (number < self.count()).then_some(number)
    }

    /// True while somebody has the frame as a table.
    pub fn is_in_use(&self, frame: Pfn) -> bool {
        self.number(frame).is_some_and(|number| self.0.used[number].load(Relaxed))
    }

    /// The descriptor at a physical address, and its place among all of them; `None` where no table can be.
    pub(super) fn descriptor(&self, address: u64) -> Option<(usize, &AtomicU64)> {
        let number = self.number(Pfn::new(u32::try_from(address >> 12).ok()?))?;
        let index = usize::try_from((address & 0xfff) / 8).ok()?;
        Some((number * ENTRIES + index, &self.0.tables[number][index]))
    }

    /// Brings a copy of every descriptor up to date. Who was lent a table asks again for what it writes later.
    pub(super) fn copy_changed(&self, into: &mut [u64]) {
        for (number, copy) in into.chunks_exact_mut(ENTRIES).enumerate() {
            if self.0.touched[number].swap(false, Relaxed) {
                for (entry, copy) in self.0.tables[number].iter().zip(copy) {
                    *copy = entry.load(Relaxed);
                }
            }
        }
    }

    /// A copy of every descriptor.
    pub(super) fn copy(&self) -> Vec<u64> {
        self.0.tables.iter().flatten().map(|entry| entry.load(Relaxed)).collect()
    }
}

impl TableSource for Frames {
    fn alloc(&self) -> Option<Pfn> {
        self.alloc_root(1)
    }

    fn free(&self, frame: Pfn) {
        self.release(frame);
    }

    fn table(&self, frame: Pfn) -> &Table {
        assert!(self.is_in_use(frame), "{frame} is not a table now");
        let number = self.number(frame).expect("it is in use");
        self.0.touched[number].store(true, Relaxed);
        &self.0.tables[number]
    }

    fn alloc_root(&self, tables: u32) -> Option<Pfn> {
        let tables = usize::try_from(tables).ok()?;
        if self.in_use() + tables > self.0.limit.load(Relaxed) {
            return None;
        }
        let free = |number: &usize| {
            let wanted = *number..number + tables;
            wanted.end <= self.count() && wanted.into_iter().all(|n| !self.0.used[n].load(Relaxed))
        };
        let first = (0..self.count()).step_by(tables).find(free)?;
        let first = Pfn::new(self.0.first + u32::try_from(first).ok()?);
        for table in 0..u32::try_from(tables).ok()? {
            self.claim(first.checked_add(table)?);
        }
        Some(first)
    }
}
