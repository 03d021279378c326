//! 2 MiB at a time: mapping a block, and breaking one into pages.
//!
//! A block is broken off-line (DESIGN 7): the new table is filled where no walker sees it, and made the
//! block's successor with an invalid entry in between, unless the CPU promises that it needs none
//! (FEAT_BBM level 2). Either way what counts is the block's value at the moment it was swapped out: the
//! hardware may have marked it dirty until then.

use crate::descriptor::Descriptor;
use crate::geometry::{BLOCK, Geometry, LAST};
use crate::table::{ENTRIES, TableSource};
use crate::tlb::{Batch, TlbOps};
use crate::tree::{Slot, Stage2, harvest};
use crate::walk::Spot;
use vmobject::addr::{Ipa, IpaRange, PAGE_SIZE, Pfn};
use vmobject::pmap::{OutOfTables, Sink};

impl<S: TableSource, T: TlbOps> Stage2<S, T> {
    /// Replaces the block in `slot`, which maps from `at` on, by a table of the same pages, but for one that is left out if
    /// so wanted. The table, and what the block was in the end.
    pub(crate) fn break_block(
        &mut self,
        slot: Slot,
        at: Ipa,
        parked: bool,
        but: Option<usize>,
    ) -> Result<(Pfn, Descriptor), OutOfTables> {
        let table = self.alloc_table()?;
        self.blocks -= 1;
        let mut batch = Batch::new();
        if !parked {
            batch.page(at);
        }
        let block;
        if parked || self.geometry.features().break_in_place {
            let copy = self.read(slot);
            self.fill(table, copy, but);
            self.tlb.dsb_ishst();
            block = self.swap(slot, Descriptor::table(table));
            self.flush_block(batch);
            self.remember(table, block.remembered_since(copy), but);
        } else {
            block = self.swap(slot, Descriptor::NOTHING);
            self.flush_block(batch);
            self.fill(table, block, but);
            self.tlb.dsb_ishst();
            self.swap(slot, Descriptor::table(table));
            self.tlb.dsb_ishst();
        }
        Ok((table, block))
    }

    /// Fills a table that no walker reaches with the pages of a block, but for one. One loop without anything in it: half a
    /// thousand of these are done in one fault.
    fn fill(&self, table: Pfn, block: Descriptor, but: Option<usize>) {
        for (entry, page) in self.entries_from(Slot::new(table, 0)).zip(0..) {
            entry.store(block.page_of_block(page));
        }
        if let Some(index) = but {
            self.swap(Slot::new(table, index), Descriptor::NOTHING);
        }
    }

    /// Adds flags that the hardware set on a block after it was copied to all of its pages that are there.
    fn remember(&self, table: Pfn, flags: u64, but: Option<usize>) {
        if flags == 0 {
            return;
        }
        for index in (0..ENTRIES).filter(|&index| Some(index) != but) {
            self.update(Slot::new(table, index), |leaf| Descriptor::from_bits(leaf.bits() | flags));
        }
    }

    /// Breaks the block in `slot` for a page that is about to be mapped otherwise: its place is empty, and its part of
    /// what the block remembered is told.
    #[cold]
    pub(crate) fn make_way(&mut self, slot: Slot, at: Ipa, sink: Sink<'_>) -> Result<Pfn, OutOfTables> {
        let (index, first) = (Geometry::index(at, LAST), Geometry::entry(at, BLOCK));
        let (table, block) = self.break_block(slot, first, false, Some(index))?;
        let page = block.page_of_block(Geometry::page_in_block(at));
        harvest(at.page(), page, Descriptor::NOTHING, 1, sink);
        Ok(table)
    }

    /// Breaks the blocks that stick out of a range at either end. Where no table can be had the whole block
    /// is forgotten: it is faulted back page by page.
    pub(crate) fn trim(&mut self, range: IpaRange, sink: Sink<'_>) {
        if range.is_empty() {
            return;
        }
        let last = Ipa::new(range.end().bits() - PAGE_SIZE);
        for at in [range.start(), last] {
            let Some(spot) = self.sticks_out(at, range) else {
                continue;
            };
            if self.break_block(spot.slot, spot.at, spot.parked, None).is_err() {
                self.forget(spot, &mut *sink);
            }
        }
    }

    fn forget(&mut self, spot: Spot, sink: Sink<'_>) {
        self.blocks -= 1;
        let old = self.swap(spot.slot, Descriptor::NOTHING);
        if !spot.parked {
            let mut batch = Batch::new();
            batch.page(spot.at);
            self.flush(batch);
        }
        harvest(spot.at, old, Descriptor::NOTHING, spot.pages(), sink);
    }

    /// Puts a block of contiguous frames where a table, a block or nothing is. The tables above are there.
    pub(crate) fn put_block(&mut self, slot: Slot, at: Ipa, block: Descriptor, sink: Sink<'_>) {
        if self.geometry.start() == BLOCK {
            self.use_root(at);
        }
        let old = self.read(slot);
        if (old.is_table() || old.is_parked())
            && let Some(range) = IpaRange::from_pages(at, Spot::pages_of(BLOCK))
        {
            self.unmap(range, &mut *sink);
        }
        self.blocks += u32::from(!old.is_block());
        self.put(slot, BLOCK, Geometry::entry(at, BLOCK), block, sink);
    }
}
