//! One guest's stage-2 tables as the VM sees them: [`Pmap`].
//!
//! A dispatcher: each method says in a few lines what it is made of. `enter` is the path of every fault, and
//! in the usual case it is a walk of present tables, one swap and one barrier.

use crate::geometry::{BLOCK, Geometry, LAST};
use crate::park::Way;
use crate::table::{ENTRIES, TableSource};
use crate::tlb::{Batch, TlbOps};
use crate::tree::{Slot, Stage2};
use vmobject::addr::{Ipa, IpaRange, Pfn};
use vmobject::pmap::{Leaf, OutOfTables, Pmap, Sink};
use vmobject::prot::Prot;

impl<S: TableSource, T: TlbOps> Pmap for Stage2<S, T> {
    #[inline]
    fn enter(&mut self, at: Ipa, frame: Pfn, prot: Prot, sink: Sink<'_>) -> Result<(), OutOfTables> {
        if !self.geometry.reaches(at) {
            return Err(OutOfTables);
        }
        let table = match self.way_to(at, LAST)? {
            Way::Clear(table) => table,
            Way::Block(_) if self.block_serves(at, frame, prot) => return Ok(()),
            Way::Block(_) => self.page_table(at)?,
        };
        let slot = Slot::new(table, Geometry::index(at, LAST));
        self.put(slot, LAST, at.page(), self.style.page(frame, prot), sink);
        Ok(())
    }

    fn enter_around(&mut self, first: Ipa, frames: &[Option<Pfn>], prot: Prot) -> Result<u32, OutOfTables> {
        if !self.geometry.reaches(first) {
            return Err(OutOfTables);
        }
        let Way::Clear(table) = self.way_to(first, LAST)? else {
            return Ok(0);
        };
        let mut mapped = 0;
        for (index, frame) in (Geometry::index(first, LAST)..ENTRIES).zip(frames) {
            let Some(frame) = *frame else { continue };
            let slot = Slot::new(table, index);
            if !self.read(slot).is_valid() {
                self.swap(slot, self.style.early_page(frame, prot));
                mapped += 1;
            }
        }
        self.tlb.dsb_ishst();
        Ok(mapped)
    }

    fn enter_block(&mut self, at: Ipa, first: Pfn, prot: Prot, sink: Sink<'_>) -> Result<(), OutOfTables> {
        debug_assert!(at.is_chunk_aligned() && first.is_chunk_aligned(), "a block is aligned");
        if !self.geometry.reaches(at) {
            return Err(OutOfTables);
        }
        // No block lies above this level, so the way is clear.
        let Way::Clear(table) = self.way_to(at, BLOCK)? else {
            return Err(OutOfTables);
        };
        let slot = Slot::new(table, Geometry::index(at, BLOCK));
        self.put_block(slot, at, self.style.block(first, prot), sink);
        Ok(())
    }

    fn remove(&mut self, range: IpaRange, sink: Sink<'_>) {
        self.trim(range, &mut *sink);
        self.unmap(range, sink);
    }

    fn protect(&mut self, range: IpaRange, keep: Prot, sink: Sink<'_>) {
        if keep.is_none() {
            return self.remove(range, sink);
        }
        self.trim(range, &mut *sink);
        let mut batch = Batch::new();
        self.visit(range, |spot| {
            // What is below a parked entry loses its write access with it.
            let keep = if spot.parked { keep.without(Prot::WRITE) } else { keep };
            self.change(spot, |leaf| leaf.restricted(keep), &mut batch, &mut *sink);
        });
        self.flush(batch);
    }

    fn park(&mut self) {
        self.park_roots();
    }

    fn age(&mut self, range: IpaRange, sink: Sink<'_>) {
        self.age_range(range, sink);
    }

    fn lookup(&self, at: Ipa) -> Option<Leaf> {
        let spot = self.find(at)?;
        let block = spot.level != LAST;
        let frame =
            if block { spot.leaf.frame_in_block(Geometry::page_in_block(at)) } else { spot.leaf.frame() };
        Some(Leaf { frame, prot: spot.prot(), block })
    }

    fn refresh(&mut self, at: Ipa) {
        if let Some(spot) = self.find(at).filter(|spot| !spot.parked) {
            let [old, now] =
                self.update(spot.slot, |leaf| if leaf.is_valid() { leaf.touched() } else { leaf });
            if old != now && !self.geometry.features().hardware_access {
                // The fault was for the flag, and such a leaf is never cached.
                self.tlb.dsb_ishst();
                return;
            }
        }
        self.flush_local();
    }

    fn tables(&self) -> u32 {
        self.table_count()
    }
}

impl<S: TableSource, T: TlbOps> Stage2<S, T> {
    /// True when the block that maps an address is just what is wanted: the fault was for the access
    /// flag, or for a stale cache, and the block stays whole.
    #[cold]
    fn block_serves(&mut self, at: Ipa, frame: Pfn, prot: Prot) -> bool {
        let serves = self.lookup(at).is_some_and(|leaf| leaf.frame == frame && leaf.prot == prot);
        if serves {
            self.refresh(at);
        }
        serves
    }
}

impl<S: TableSource, T: TlbOps> Drop for Stage2<S, T> {
    /// Gives everything back. The guest does not run any more, and what its leaves remembered was harvested
    /// by [`Pmap::remove`] before this.
    fn drop(&mut self) {
        if let Some(everything) = self.geometry.everything() {
            self.unmap(everything, &mut |_| {});
        }
        // Walkers may hold the way from the root.
        let mut batch = Batch::new();
        batch.everything();
        self.flush(batch);
        for table in self.root_tables() {
            self.source.free(table);
        }
    }
}
