//! One guest's stage-2 tables as a [`Pmap`].
//!
//! Read `Stage2::replace` first: every edit of a reachable leaf is one swap there, followed by whatever
//! invalidate the change needs (break before make), and the swapped-out value's state goes to the sink (I14).
//! An invalid leaf becoming valid needs no invalidate: invalid entries are not cached.

use crate::descriptor::Descriptor;
use crate::geometry::Geometry;
use crate::table::{ENTRIES, Table, TableSource};
use crate::tlb::{self, TlbOps};
use core::sync::atomic::Ordering;
use vmobject::addr::{CHUNK_SIZE, Ipa, IpaRange, PAGE_SIZE, Pfn, PhysAddr};
use vmobject::pmap::{Harvest, Leaf, OutOfTables, Pmap, Sink};
use vmobject::prot::Prot;

/// Stage-2 tables of one guest.
pub struct Stage2<S: TableSource, T: TlbOps> {
    source: S,
    tlb: T,
    geometry: Geometry,
    root: Pfn,
    vmid: u16,
    tables: u32,
}

impl<S: TableSource, T: TlbOps> Stage2<S, T> {
    /// Empty tables. The VMID is set when the guest is first loaded.
    pub fn new(source: S, tlb: T, geometry: Geometry) -> Result<Self, OutOfTables> {
        let root = source.alloc().ok_or(OutOfTables)?;
        Ok(Self { source, tlb, geometry, root, vmid: 0, tables: 1 })
    }

    /// Where the root table is.
    pub const fn root(&self) -> PhysAddr {
        self.root.base()
    }

    /// The value to load into VTTBR_EL2.
    pub const fn vttbr(&self) -> u64 {
        tlb::vttbr(self.root.base(), self.vmid)
    }

    /// Sets the guest's name in the TLB, given by [`crate::vmid::VmidAllocator`].
    pub const fn set_vmid(&mut self, vmid: u16) {
        self.vmid = vmid;
    }

    fn table(&self, frame: Pfn) -> &Table {
        self.source.table(frame)
    }

    fn read(&self, table: Pfn, index: usize) -> Descriptor {
        self.table(table).get(index).map_or(Descriptor::INVALID, |d| Descriptor(d.load(Ordering::Relaxed)))
    }

    /// The one place where a descriptor changes. Returns what was there, dirty state and all.
    fn swap(&self, table: Pfn, index: usize, new: Descriptor) -> Descriptor {
        self.table(table)
            .get(index)
            .map_or(Descriptor::INVALID, |d| Descriptor(d.swap(new.0, Ordering::AcqRel)))
    }

    /// The next table below `index`, made if it is not there. A block in the way is broken.
    fn descend(&mut self, table: Pfn, index: usize, at: Ipa) -> Result<Pfn, OutOfTables> {
        let found = self.read(table, index);
        if found.is_table() {
            return Ok(found.frame());
        }
        let fresh = self.source.alloc().ok_or(OutOfTables)?;
        self.tables += 1;
        if found.is_block() {
            self.break_block(table, index, at, fresh);
        } else {
            self.swap(table, index, Descriptor::table(fresh));
        }
        Ok(fresh)
    }

    /// Off-line (DESIGN 7): invalid first, invalidate, fill from the *swapped* value, publish.
    fn break_block(&self, table: Pfn, index: usize, at: Ipa, fresh: Pfn) {
        let block = self.swap(table, index, Descriptor::INVALID);
        self.invalidate_chunk(at);
        for (offset, slot) in (0_u32..).zip(self.table(fresh)) {
            if let Some(frame) = block.frame().checked_add(offset) {
                slot.store(
                    block.0 & !block.frame().base().bits() | frame.base().bits() | 0b10,
                    Ordering::Relaxed,
                );
            }
        }
        self.tlb.dsb_ishst();
        self.swap(table, index, Descriptor::table(fresh));
        self.tlb.dsb_ishst();
        self.tlb.isb();
    }

    fn invalidate_chunk(&self, at: Ipa) {
        if let Some(range) = IpaRange::from_pages(at.chunk(), 1) {
            // One invalidate reaches a block through any address in it.
            tlb::invalidate_range(&self.tlb, self.vttbr(), range);
        }
    }

    /// The last-level table of an address, if there is one.
    fn find(&self, at: Ipa) -> Place {
        if !self.geometry.reaches(at) {
            return Place::Nothing;
        }
        let first = self.read(self.root, Geometry::index(at, 1));
        if !first.is_table() {
            return Place::Nothing;
        }
        let middle = (first.frame(), Geometry::index(at, 2));
        let second = self.read(middle.0, middle.1);
        if second.is_table() {
            Place::Pages(second.frame())
        } else if second.is_block() {
            Place::Block(middle.0, middle.1)
        } else {
            Place::Nothing
        }
    }

    fn make(&mut self, at: Ipa, level: u32) -> Result<Pfn, OutOfTables> {
        if !self.geometry.reaches(at) {
            return Err(OutOfTables);
        }
        let middle = self.descend(self.root, Geometry::index(at, 1), at)?;
        if level == 2 {
            return Ok(middle);
        }
        self.descend(middle, Geometry::index(at, 2), at)
    }

    /// Puts a leaf where another may be.
    fn replace(&self, table: Pfn, index: usize, at: Ipa, new: Descriptor, sink: Sink<'_>) {
        let old = self.read(table, index);
        if old.is_valid() {
            let old = self.swap(table, index, Descriptor::INVALID);
            if let Some(page) = IpaRange::page_of(at) {
                tlb::invalidate_range(&self.tlb, self.vttbr(), page);
            }
            harvest(at, old, sink);
        }
        self.swap(table, index, new);
        self.tlb.dsb_ishst();
        self.tlb.isb();
    }

    /// Visits the chunks of a range that have anything mapped: the part of the range in it, and where it is.
    fn chunks(&self, range: IpaRange, mut visit: impl FnMut(IpaRange, Place)) {
        let mut at = range.start();
        while at < range.end() {
            let gigabyte =
                self.geometry.reaches(at) && self.read(self.root, Geometry::index(at, 1)).is_table();
            let step = if gigabyte { CHUNK_SIZE } else { CHUNK_SIZE * ENTRIES as u64 };
            let Some(next) = Ipa::new(at.bits() & !(step - 1)).checked_add(step) else { return };
            if gigabyte {
                if let Some(part) = IpaRange::new(at, next.min(range.end())) {
                    match self.find(at) {
                        Place::Nothing => {}
                        place @ (Place::Pages(_) | Place::Block(..)) => visit(part, place),
                    }
                }
            } else if !self.geometry.reaches(at) {
                return;
            }
            at = next;
        }
    }

    /// Edits every valid leaf of a range. A block in it is edited whole: who must not have that trims it first.
    fn edit(
        &self,
        range: IpaRange,
        mut change: impl FnMut(Ipa, Descriptor) -> Option<Descriptor>,
        sink: Sink<'_>,
    ) {
        let mut touched: Option<IpaRange> = None;
        let mut bulk = false;
        self.chunks(range, |part, place| match place {
            Place::Pages(table) => {
                for at in part.iter_pages() {
                    let index = Geometry::index(at, 3);
                    let old = self.read(table, index);
                    if !old.is_valid() {
                        continue;
                    }
                    let Some(new) = change(at, old) else { continue };
                    self.exchange(table, index, at, new, old, sink);
                    let one = IpaRange::page_of(at);
                    touched = match (touched, one) {
                        (Some(sofar), Some(one)) => {
                            IpaRange::new(sofar.start().min(one.start()), sofar.end().max(one.end()))
                        }
                        (sofar, one) => sofar.or(one),
                    };
                }
            }
            Place::Block(table, index) => {
                let old = self.read(table, index);
                let at = part.start().chunk();
                if let Some(new) = change(at, old) {
                    self.exchange(table, index, at, new, old, sink);
                    bulk = true;
                }
            }
            Place::Nothing => {}
        });
        if bulk {
            tlb::invalidate_guest(&self.tlb, self.vttbr());
        } else if let Some(range) = touched {
            tlb::invalidate_range(&self.tlb, self.vttbr(), range);
        }
    }

    /// Puts `new` in place of a leaf: one swap, since the hardware may set flags after `old` was read.
    fn exchange(&self, table: Pfn, index: usize, at: Ipa, new: Descriptor, old: Descriptor, sink: Sink<'_>) {
        // Flags that `new` drops come out with the swapped value; flags set since `old` was read do too.
        let before = self.swap(table, index, new);
        let seen = Descriptor(before.0 | old.0);
        harvest(at, seen, sink);
    }
}

/// Where an address is mapped.
#[derive(Clone, Copy)]
enum Place {
    Nothing,
    /// This last-level table.
    Pages(Pfn),
    /// This entry of a level-2 table.
    Block(Pfn, usize),
}

fn harvest(at: Ipa, old: Descriptor, sink: Sink<'_>) {
    sink(Harvest { at, frame: old.frame(), accessed: old.is_accessed(), dirty: old.is_dirty() });
}

impl<S: TableSource, T: TlbOps> Stage2<S, T> {
    /// A block that sticks out of the range is broken, or, when no table can be had, forgotten whole.
    fn trim_blocks(&mut self, range: IpaRange, sink: Sink<'_>) {
        let ends = [range.start(), Ipa::new(range.end().bits().saturating_sub(PAGE_SIZE))];
        for at in ends {
            let whole = IpaRange::from_pages(at.chunk(), 512);
            let inside = whole.and_then(|w| w.intersection(range)).is_some_and(|part| Some(part) == whole);
            if inside || range.is_empty() {
                continue;
            }
            if let Place::Block(table, index) = self.find(at)
                && self.make(at, 3).is_err()
            {
                let old = self.swap(table, index, Descriptor::INVALID);
                self.invalidate_chunk(at);
                harvest(at.chunk(), old, sink);
            }
        }
    }

    /// Unmaps every leaf of a table that no walker starts at any more.
    fn empty(&self, table: Pfn, first: Ipa, sink: Sink<'_>) {
        for (index, at) in (0..ENTRIES).zip(0_u64..) {
            let at = first.bits() + at * PAGE_SIZE;
            let old = self.swap(table, index, Descriptor::INVALID);
            if old.is_valid() {
                harvest(Ipa::new(at), old, sink);
            }
        }
    }

    /// Frees last-level tables of whole chunks in a range. They are chained through their own first entry (an
    /// invalid descriptor, since frames are aligned) until no walker can hold them.
    fn unlink_tables(&mut self, range: IpaRange, sink: Sink<'_>) {
        let mut chain = Descriptor::INVALID;
        self.chunks(range, |part, place| {
            let Place::Pages(table) = place else { return };
            if part.pages() != ENTRIES as u64 {
                return;
            }
            let first = self.read(self.root, Geometry::index(part.start(), 1));
            self.swap(first.frame(), Geometry::index(part.start(), 2), Descriptor::INVALID);
            self.empty(table, part.start(), &mut *sink);
            self.swap(table, 0, chain);
            chain = Descriptor(table.base().bits());
        });
        self.free_chain(chain);
    }

    /// Frees tables that were unlinked, once no walker can hold them.
    fn free_chain(&mut self, mut chain: Descriptor) {
        if chain == Descriptor::INVALID {
            return;
        }
        tlb::invalidate_guest(&self.tlb, self.vttbr());
        while chain != Descriptor::INVALID {
            let table = chain.frame();
            chain = self.swap(table, 0, Descriptor::INVALID);
            self.source.free(table);
            self.tables -= 1;
        }
    }
}

impl<S: TableSource, T: TlbOps> Pmap for Stage2<S, T> {
    fn enter(&mut self, at: Ipa, frame: Pfn, prot: Prot, sink: Sink<'_>) -> Result<(), OutOfTables> {
        let table = self.make(at, 3)?;
        let leaf = Descriptor::page(frame, prot, self.geometry.features().hardware_dirty);
        self.replace(table, Geometry::index(at, 3), at.page(), leaf, sink);
        Ok(())
    }

    fn enter_around(&mut self, first: Ipa, frames: &[Option<Pfn>], prot: Prot) -> Result<u32, OutOfTables> {
        let table = self.make(first, 3)?;
        let start = Geometry::index(first, 3);
        let mut mapped = 0;
        for (index, frame) in (start..ENTRIES).zip(frames) {
            let Some(frame) = *frame else { continue };
            if !self.read(table, index).is_valid() {
                self.swap(
                    table,
                    index,
                    Descriptor::page(frame, prot, self.geometry.features().hardware_dirty),
                );
                mapped += 1;
            }
        }
        self.tlb.dsb_ishst();
        self.tlb.isb();
        Ok(mapped)
    }

    fn enter_block(&mut self, at: Ipa, first: Pfn, prot: Prot, sink: Sink<'_>) -> Result<(), OutOfTables> {
        if let Some(range) = IpaRange::from_pages(at.chunk(), 512) {
            self.remove(range, sink);
        }
        let table = self.make(at, 2)?;
        let leaf = Descriptor::block(first, prot, self.geometry.features().hardware_dirty);
        self.replace(table, Geometry::index(at, 2), at.chunk(), leaf, sink);
        Ok(())
    }

    fn remove(&mut self, range: IpaRange, sink: Sink<'_>) {
        self.trim_blocks(range, &mut *sink);
        self.unlink_tables(range, &mut *sink);
        self.edit(range, |_, _| Some(Descriptor::INVALID), sink);
    }

    fn protect(&mut self, range: IpaRange, keep: Prot, sink: Sink<'_>) {
        self.trim_blocks(range, &mut *sink);
        self.edit(
            range,
            |_, old| {
                let new = old.restricted(keep);
                (new != old).then_some(new)
            },
            sink,
        );
    }

    fn park(&mut self) {
        let everything = IpaRange::new(Ipa::new(0), Ipa::new(1 << self.geometry.ipa_bits()));
        if let Some(range) = everything {
            // Dirty state stays with the frame: a page that was written is in the object either way.
            self.protect(range, Prot::READ_EXECUTE, &mut |_| {});
        }
    }

    fn age(&mut self, range: IpaRange, sink: Sink<'_>) {
        self.edit(
            range,
            |_, old| {
                let new = old.aged();
                (new != old).then_some(new)
            },
            sink,
        );
    }

    fn lookup(&self, at: Ipa) -> Option<Leaf> {
        let (leaf, frame, block) = match self.find(at) {
            Place::Nothing => return None,
            Place::Pages(table) => {
                let leaf = self.read(table, Geometry::index(at, 3));
                (leaf, leaf.frame(), false)
            }
            Place::Block(table, index) => {
                let leaf = self.read(table, index);
                let inside = u32::try_from(Geometry::index(at, 3)).ok()?;
                (leaf, leaf.frame().checked_add(inside)?, true)
            }
        };
        leaf.is_valid().then(|| Leaf { frame, prot: leaf.prot(), block })
    }

    fn refresh(&mut self, at: Ipa) {
        // Without hardware access flags the fault may be for the flag alone.
        match self.find(at) {
            Place::Nothing => {}
            Place::Pages(table) => self.touch(table, Geometry::index(at, 3)),
            Place::Block(table, index) => self.touch(table, index),
        }
        tlb::invalidate_local(&self.tlb, self.vttbr());
    }

    fn tables(&self) -> u32 {
        self.tables
    }
}

impl<S: TableSource, T: TlbOps> Stage2<S, T> {
    fn touch(&self, table: Pfn, index: usize) {
        let Some(slot) = self.table(table).get(index) else { return };
        // Nothing to do when it went away meanwhile: the access faults again.
        let _ = slot.fetch_update(Ordering::AcqRel, Ordering::Relaxed, |bits| {
            let leaf = Descriptor(bits);
            leaf.is_valid().then(|| leaf.touched().0)
        });
    }

    /// Gives every table back. The guest must not run again.
    fn dismantle(&mut self) {
        if let Some(range) = IpaRange::new(Ipa::new(0), Ipa::new(1 << self.geometry.ipa_bits())) {
            self.remove(range, &mut |_| {});
        }
        let mut chain = Descriptor::INVALID;
        for index in 0..ENTRIES {
            let entry = self.swap(self.root, index, Descriptor::INVALID);
            if entry.is_table() {
                self.swap(entry.frame(), 0, chain);
                chain = Descriptor(entry.frame().base().bits());
            }
        }
        self.free_chain(chain);
        tlb::invalidate_guest(&self.tlb, self.vttbr());
        self.source.free(self.root);
    }
}

impl<S: TableSource, T: TlbOps> Drop for Stage2<S, T> {
    fn drop(&mut self) {
        // Nothing is mapped any more and nobody runs: one invalidate, then the frames go.
        self.dismantle();
    }
}
