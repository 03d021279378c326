//! Giving everything back, a piece at a time.
//!
//! A guest that ends may have gigabytes mapped, and EL2 must not be gone for as long as looking at all of it
//! takes (I6). So a step first parks everything, which tells the caches once; what is parked no walker reaches
//! and no cache holds (T4). What is left is to ask each leaf what it remembers and to free its table, in any
//! number of steps, and the tree itself says how far that got.

use crate::descriptor::Descriptor;
use crate::geometry::{Geometry, LAST};
use crate::table::{ENTRIES, TableSource};
use crate::tlb::{Batch, TlbOps};
use crate::tree::{Slot, Stage2, harvest};
use crate::walk::Spot;
use vmobject::addr::{Ipa, Pfn};
use vmobject::pmap::Sink;

/// Descriptors in a table, as a budget counts them.
const TABLE: u32 = 512;
const _: () = assert!(ENTRIES == 512, "as `TABLE` says");

/// What a step has yet to settle.
struct Step<'a> {
    /// Entries and pages that may still be looked at.
    left: u32,
    /// Leaves of the root, which parking does not hide.
    batch: Batch,
    sink: Sink<'a>,
}

impl<S: TableSource, T: TlbOps> Stage2<S, T> {
    /// Looks at about `budget` entries more, and at a whole table at least; a block counts as its pages, since
    /// it speaks for each. True when only the root is left.
    pub(crate) fn clear_step(&mut self, budget: u32, sink: Sink<'_>) -> bool {
        self.park_roots();
        let mut step = Step { left: budget, batch: Batch::new(), sink };
        let level = self.geometry.start();
        let done = self.used_root().all(|(slot, at)| self.clear_entry(slot, level, at, &mut step));
        self.flush(step.batch);
        if done {
            self.root_is_empty();
        }
        done
    }

    /// Empties a table that maps from `base` on; false when the budget does not reach that far. A table of the
    /// last level is always emptied, so every step gets somewhere.
    fn clear_table(&mut self, table: Pfn, level: u32, base: Ipa, step: &mut Step<'_>) -> bool {
        step.left = step.left.saturating_sub(TABLE);
        let mut at = base;
        for index in 0..ENTRIES {
            if !self.clear_entry(Slot::new(table, index), level, at, step) {
                return false;
            }
            at = Geometry::next_entry(at, level);
        }
        true
    }

    /// Empties an entry that maps from `at` on; false when there is more in it, or no budget for the next.
    fn clear_entry(&mut self, slot: Slot, level: u32, at: Ipa, step: &mut Step<'_>) -> bool {
        let entry = self.read(slot);
        if level < LAST && (entry.is_table() || entry.is_parked()) {
            if !self.clear_table(entry.frame(), level + 1, at, step) {
                return false;
            }
            self.swap(slot, Descriptor::NOTHING);
            self.free_table(entry.frame());
            return step.left > 0;
        }
        if !entry.is_valid() {
            return true;
        }
        let old = self.swap(slot, Descriptor::NOTHING);
        if level == self.geometry.start() {
            step.batch.page(at);
        }
        harvest(at, old, Descriptor::NOTHING, Spot::pages_of(level), step.sink);
        if level == LAST {
            return true;
        }
        step.left = step.left.saturating_sub(Spot::pages_of(level));
        step.left > 0
    }
}
