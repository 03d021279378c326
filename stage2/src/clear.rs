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
use core::sync::atomic::{AtomicU64, Ordering};
use vmobject::addr::{Ipa, Pfn};
use vmobject::pmap::Sink;

/// What looking through a table costs, in leaves that are settled: an entry where nothing is takes an eighth of that.
const TABLE: u32 = 64;
const _: () = assert!(ENTRIES == 8 * 64, "as `TABLE` says");

/// What a step has yet to settle.
struct Step<'a> {
    /// Pages that may still be settled.
    left: u32,
    /// Leaves of the root, which parking does not hide.
    batch: Batch,
    sink: Sink<'a>,
}

impl<S: TableSource, T: TlbOps> Stage2<S, T> {
    /// Settles about `budget` leaves more, and one at least; a block counts as a table, since it speaks for as many.
    /// True when only the root is left.
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

    /// Empties a table that maps from `base` on; false when the budget does not reach that far. What was emptied stays
    /// so: the next step passes over it.
    fn clear_table(&mut self, table: Pfn, level: u32, base: Ipa, step: &mut Step<'_>) -> bool {
        let mut octet = 0;
        // Most entries of most tables are nothing, and eight are seen through at a time.
        while let Some(eight) = self.source.table(table).as_chunks::<8>().0.get(octet) {
            let Some(one) = eight.iter().position(is_used) else {
                octet += 1;
                continue;
            };
            let index = octet * 8 + one;
            let Some(at) = base.checked_add((index as u64) << Geometry::shift(level)) else { break };
            if !self.clear_entry(Slot::new(table, index), level, at, step) {
                return false;
            }
        }
        step.left = step.left.saturating_sub(TABLE);
        true
    }

    /// Empties an entry that maps from `at` on; false when there is more in it, or no budget for it. True: nothing is
    /// there any more.
    fn clear_entry(&mut self, slot: Slot, level: u32, at: Ipa, step: &mut Step<'_>) -> bool {
        if step.left == 0 {
            return false;
        }
        let entry = self.read(slot);
        if level < LAST && (entry.is_table() || entry.is_parked()) {
            if !self.clear_table(entry.frame(), level + 1, at, step) {
                return false;
            }
            self.swap(slot, Descriptor::NOTHING);
            self.free_table(entry.frame());
            return true;
        }
        let old = self.swap(slot, Descriptor::NOTHING);
        if old.is_valid() {
            if level == self.geometry.start() {
                step.batch.page(at);
            }
            self.blocks -= u32::from(level < LAST);
            harvest(at, old, Descriptor::NOTHING, Spot::pages_of(level), step.sink);
            step.left = step.left.saturating_sub(if level < LAST { TABLE } else { 1 });
        }
        true
    }
}

#[inline]
fn is_used(entry: &AtomicU64) -> bool {
    entry.load(Ordering::Relaxed) != Descriptor::NOTHING.bits()
}
