//! Table frames in a box, which can run out on cue.

use crate::table::{ENTRIES, Table, TableSource};
use alloc::boxed::Box;
use alloc::sync::Arc;
use core::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use vmobject::addr::Pfn;

/// The first frame's number: a multiple of 16, and none that a table's bits could be mistaken for.
const FIRST: u32 = 0x8_0000;
/// What a free frame is full of: a walker that gets there sees valid leaves of a frame that is nobody's.
const POISON: u64 = 0xfff_dead_d7ff;

/// A store of table frames. A clone is the same store.
#[derive(Clone)]
pub struct Frames(Arc<Store>);

struct Store {
    tables: Box<[Table]>,
    used: Box<[AtomicBool]>,
    limit: AtomicUsize,
}

impl Frames {
    /// `count` frames.
    pub fn new(count: usize) -> Self {
        let table = || core::array::from_fn(|_| AtomicU64::new(POISON));
        Self(Arc::new(Store {
            tables: (0..count).map(|_| table()).collect(),
            used: (0..count).map(|_| AtomicBool::new(false)).collect(),
            limit: AtomicUsize::new(count),
        }))
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
        let number = usize::try_from(frame.number().checked_sub(FIRST)?).ok()?;
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

    /// Every descriptor there is, in order.
    pub(super) fn all(&self) -> impl Iterator<Item = u64> {
        self.0.tables.iter().flatten().map(|entry| entry.load(Relaxed))
    }

    fn take(&self, number: usize) -> Pfn {
        self.0.used[number].store(true, Relaxed);
        for entry in &self.0.tables[number] {
            entry.store(0, Relaxed);
        }
        Pfn::new(FIRST + u32::try_from(number).unwrap_or(0))
    }
}

impl TableSource for Frames {
    fn alloc(&self) -> Option<Pfn> {
        self.alloc_root(1)
    }

    fn free(&self, frame: Pfn) {
        let Some(number) = self.number(frame) else { panic!("{frame} is no table frame") };
        assert!(self.0.used[number].swap(false, Relaxed), "{frame} is freed twice");
        for entry in &self.0.tables[number] {
            entry.store(POISON, Relaxed);
        }
    }

    fn table(&self, frame: Pfn) -> &Table {
        assert!(self.is_in_use(frame), "{frame} is not a table now");
        self.number(frame).map(|number| &self.0.tables[number]).expect("it is in use")
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
        (first..first + tables).map(|number| self.take(number)).min()
    }
}
