//! A guest that writes at the worst moment.
//!
//! Tables are edited while another CPU's walker sets flags in them. [`Meanwhile`] is a source of tables that lets
//! a guest write, once, when the code under test is on its way to a descriptor: between any two looks at
//! memory, a test picks which.

use super::Frames;
use super::mmu::{Access, Mmu};
use crate::table::{Table, TableSource};
use alloc::sync::Arc;
use core::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};
use vmobject::addr::{Ipa, Pfn};

/// Table frames, and a write on a CPU before the lookup that a test names. A clone is the same.
#[derive(Clone)]
pub struct Meanwhile {
    frames: Frames,
    mmu: Mmu,
    cpu: usize,
    at: Ipa,
    lookups: Arc<AtomicU32>,
    wrote: Arc<AtomicBool>,
}

impl Meanwhile {
    /// The guest that runs on `cpu` will write at `at`; not before [`Meanwhile::write_before`].
    pub fn new(frames: Frames, mmu: Mmu, cpu: usize, at: Ipa) -> Self {
        Self { frames, mmu, cpu, at, lookups: Arc::default(), wrote: Arc::default() }
    }

    /// Before the lookup that is this many away, 1 for the next; 0 for never.
    pub fn write_before(&self, lookup: u32) {
        self.lookups.store(lookup, Relaxed);
    }

    /// True when it did write, which a fault prevents.
    pub fn wrote(&self) -> bool {
        self.wrote.load(Relaxed)
    }
}

impl TableSource for Meanwhile {
    fn alloc(&self) -> Option<Pfn> {
        self.frames.alloc()
    }
    fn free(&self, frame: Pfn) {
        self.frames.free(frame);
    }
    fn table(&self, frame: Pfn) -> &Table {
        if let Some(left) = self.lookups.load(Relaxed).checked_sub(1) {
            self.lookups.store(left, Relaxed);
            if left == 0 {
                self.wrote.store(self.mmu.access(self.cpu, self.at, Access::Write).is_ok(), Relaxed);
            }
        }
        self.frames.table(frame)
    }
}
