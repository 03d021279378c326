//! One guest's stage-2 tables as the VM sees them: [`Pmap`].
//!
//! A dispatcher: each method says in a few lines what it is made of. `enter` is the path of every fault, and
//! in the usual case it is a walk of present tables, one swap and one barrier.

use crate::descriptor::Descriptor;
use crate::geometry::{BLOCK, Geometry, LAST};
use crate::park::Way;
use crate::table::TableSource;
use crate::tlb::{Batch, TlbOps};
use crate::tree::{Slot, Stage2};
use vmobject::addr::{Ipa, IpaRange, Pfn};
use vmobject::pmap::{Entered, Leaf, OutOfTables, Pmap, Sink};
use vmobject::prot::Prot;

impl<S: TableSource, T: TlbOps> Pmap for Stage2<S, T> {
    fn reach(&self) -> Ipa {
        self.geometry.reach()
    }

    #[inline]
    fn enter(&mut self, at: Ipa, frame: Pfn, prot: Prot, sink: Sink<'_>) -> Result<Entered, OutOfTables> {
        assert!(self.geometry.reaches(at), "{at} is beyond the tables' reach");
        let table = match self.way_to(at, LAST)? {
            Way::Clear(table) => table,
            Way::Part => return Ok(Entered::Part),
            Way::Block(_) if self.block_serves(at, frame, prot) => return Ok(Entered::Leaf),
            Way::Block(slot) => self.make_way(slot, at, &mut *sink)?,
        };
        let slot = Slot::new(table, Geometry::index(at, LAST));
        self.put(slot, LAST, at.page(), self.style.page(frame, prot), sink);
        Ok(Entered::Leaf)
    }

    fn enter_around(
        &mut self,
        first: Ipa,
        frames: impl Iterator<Item = Option<Pfn>>,
        prot: Prot,
    ) -> Result<u32, OutOfTables> {
        assert!(self.geometry.reaches(first), "{first} is beyond the tables' reach");
        let table = loop {
            match self.way_to(first, LAST)? {
                Way::Clear(table) => break table,
                // Not for a fault: it has entered its own page by now.
                Way::Part => {}
                Way::Block(_) => return Ok(0),
            }
        };
        let leaf = self.style.early_page(Pfn::new(0), prot);
        let mut mapped = 0;
        for (entry, frame) in self.entries_from(Slot::new(table, Geometry::index(first, LAST))).zip(frames) {
            if let Some(frame) = frame {
                mapped += u32::from(entry.fill(leaf.of(frame)));
            }
        }
        self.tlb.dsb_ishst();
        Ok(mapped)
    }

    fn is_bare(&self, at: Ipa) -> bool {
        self.geometry.reaches(at) && self.is_bare_above(at)
    }

    fn enter_block(
        &mut self,
        at: Ipa,
        first: Pfn,
        prot: Prot,
        sink: Sink<'_>,
    ) -> Result<Entered, OutOfTables> {
        debug_assert!(at.is_chunk_aligned() && first.is_chunk_aligned(), "a block is aligned");
        assert!(self.geometry.reaches(at), "{at} is beyond the tables' reach");
        let table = match self.way_to(at, BLOCK)? {
            Way::Clear(table) => table,
            Way::Part => return Ok(Entered::Part),
            // None lies above this level.
            Way::Block(_) => return Err(OutOfTables),
        };
        let slot = Slot::new(table, Geometry::index(at, BLOCK));
        self.put_block(slot, at, self.style.block(first, prot), sink);
        Ok(Entered::Leaf)
    }

    fn remove(&mut self, range: IpaRange, sink: Sink<'_>) {
        self.trim(range, &mut *sink);
        self.unmap(range, sink);
    }

    fn remove_pages(&mut self, pages: impl Iterator<Item = Ipa>, sink: Sink<'_>) {
        self.unmap_pages(pages, sink);
    }

    fn clear(&mut self, budget: u32, sink: Sink<'_>) -> bool {
        self.clear_step(budget, sink)
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

    fn park(&mut self) -> u32 {
        self.park_roots()
    }

    fn age(&mut self, range: IpaRange, sink: Sink<'_>) {
        self.age_range(range, sink);
    }

    fn lookup(&self, at: Ipa) -> Option<Leaf> {
        Some(self.find(at)?.leaf_at(at))
    }

    fn next_leaf(&self, range: IpaRange) -> Option<(Ipa, Leaf)> {
        let spot = self.first(range)?;
        let at = spot.at.max(range.start());
        Some((at, spot.leaf_at(at)))
    }

    fn tables(&self) -> u32 {
        self.table_count()
    }

    fn blocks(&self) -> u32 {
        self.block_count()
    }
}

impl<S: TableSource, T: TlbOps> Stage2<S, T> {
    /// True when the block that maps an address, in a way that is clear, is just what is wanted: the fault was
    /// for the access flag, or for a stale cache, and the block stays whole.
    #[cold]
    fn block_serves(&mut self, at: Ipa, frame: Pfn, prot: Prot) -> bool {
        let Some(spot) = self.find(at) else { return false };
        let page = spot.leaf.frame_in_block(Geometry::page_in_block(at));
        if page != frame || spot.prot() != prot {
            return false;
        }
        let [old, now] = self.update(spot.slot, Descriptor::touched);
        if old == now {
            self.flush_local();
        } else {
            // The fault was for the flag, and such a leaf is never cached.
            self.tlb.dsb_ishst();
        }
        true
    }
}

impl<S: TableSource, T: TlbOps> Drop for Stage2<S, T> {
    /// Gives everything back, at once: [`Pmap::clear`] first harvests, and leaves nothing to do here. The guest
    /// does not run any more.
    fn drop(&mut self) {
        while !self.clear_step(u32::MAX, &mut |_| {}) {}
        for table in self.root_tables() {
            self.source.free(table);
        }
    }
}
