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
        let mut base = Ipa::new(0);
        let mut done = true;
        for table in self.root_tables() {
            done = self.clear_table(table, level, base, &mut step);
            if !done {
                break;
            }
            base = self.geometry.next_root(base);
        }
        self.flush(step.batch);
        done
    }

    /// Empties a table that maps from `base` on; false when the budget does not reach that far. A table of the
    /// last level is always emptied, so every step gets somewhere.
    fn clear_table(&mut self, table: Pfn, level: u32, base: Ipa, step: &mut Step<'_>) -> bool {
        step.left = step.left.saturating_sub(TABLE);
        let mut at = base;
        for index in 0..ENTRIES {
            let slot = Slot::new(table, index);
            let entry = self.read(slot);
            if level < LAST && (entry.is_table() || entry.is_parked()) {
                if !self.clear_table(entry.frame(), level + 1, at, step) {
                    return false;
                }
                self.swap(slot, Descriptor::NOTHING);
                self.free_table(entry.frame());
                if step.left == 0 {
                    return false;
                }
            } else if entry.is_valid() {
                let old = self.swap(slot, Descriptor::NOTHING);
                if level == self.geometry.start() {
                    step.batch.page(at);
                }
                harvest(at, old, Descriptor::NOTHING, Spot::pages_of(level), step.sink);
                if level < LAST {
                    step.left = step.left.saturating_sub(Spot::pages_of(level));
                    if step.left == 0 {
                        return false;
                    }
                }
            }
            at = Geometry::next_entry(at, level);
        }
        true
    }
}
