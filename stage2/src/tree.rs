//! One guest's tables as a value, and the smallest steps on them.
//!
//! [`Stage2`] owns a root and everything below it. A [`Slot`] names one descriptor's place; reading and
//! swapping one are the only ways to a descriptor in memory. What a swap means for the caches is not said
//! here but in `edit`, whose neighbours are the only other callers.

use crate::descriptor::{Descriptor, Style};
use crate::geometry::Geometry;
use crate::table::{ENTRIES, TableSource};
use crate::tlb::{self, Batch, TlbOps};
use core::sync::atomic::{AtomicU64, Ordering};
use vmobject::addr::{Ipa, Pfn, PhysAddr};
use vmobject::pmap::{Harvest, OutOfTables, Sink};

/// Stage-2 tables of one guest. Guarded by its pmap lock: there is one editor at a time.
///
/// # Invariants
/// T1. A table is pointed at by exactly one entry, or it is a root.
/// T2. An entry of the last level is valid or [`Descriptor::NOTHING`]; above it, it may be parked too.
/// T3. A freed table was unlinked, and then every cache was told, before it was freed.
/// T4. A walker finds nothing through a parked entry, and caches hold nothing of what is below one.
pub struct Stage2<S: TableSource, T: TlbOps> {
    pub(crate) source: S,
    pub(crate) tlb: T,
    pub(crate) geometry: Geometry,
    pub(crate) style: Style,
    root: Pfn,
    /// Entries of the root from here on, counted over all its tables, were never used.
    used: usize,
    /// Its name in the caches; zero until it is first loaded, and then nothing of it can be cached.
    vmid: u16,
    tables: u32,
    /// Blocks that are mapped, parked ones too.
    pub(crate) blocks: u32,
    /// Leaves are read and then written, and what the hardware sets in between is lost: a defect.
    #[cfg(feature = "testing")]
    careless: bool,
    /// No cache is told of a block that is broken: a defect.
    #[cfg(feature = "testing")]
    silent: bool,
}

/// The place of one descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Slot {
    table: Pfn,
    index: usize,
}

impl Slot {
    /// Entry `index` of a table, modulo its length.
    pub(crate) const fn new(table: Pfn, index: usize) -> Self {
        Self { table, index }
    }

    /// Another entry of the same table.
    pub(crate) const fn beside(self, index: usize) -> Self {
        Self::new(self.table, index)
    }
}

/// One entry of a table, which may be filled where there is nothing.
pub(crate) struct Entry<'t>(&'t AtomicU64);

impl Entry<'_> {
    /// Puts `new` where nothing valid is, or widens a leaf that differs from it in allowing less, and says whether it
    /// did either. What was written before, a page's bytes, is seen by whoever sees `new`. No cache needs to be
    /// told: one that still holds the narrower leaf faults once more, and [`Stage2::put`] settles that.
    #[inline]
    pub(crate) fn fill(&self, new: Descriptor) -> bool {
        let now = Descriptor::from_bits(self.0.load(Ordering::Relaxed));
        if !now.is_valid() {
            // Only we write here: the hardware changes valid entries alone.
            self.0.store(new.bits(), Ordering::Release);
            return true;
        }
        // One that the hardware changes meanwhile is left alone: it is only a neighbour.
        now.upgraded_to(new).filter(|wide| wide.touched() != now.touched()).is_some_and(|wide| {
            let (old, wide) = (now.bits(), wide.bits());
            self.0.compare_exchange(old, wide, Ordering::Release, Ordering::Relaxed).is_ok()
        })
    }

    /// Something is there.
    #[inline]
    pub(crate) fn is_used(&self) -> bool {
        self.0.load(Ordering::Relaxed) != Descriptor::NOTHING.bits()
    }

    /// Puts `new` there. No walker comes here yet, and no cache holds it.
    #[inline]
    pub(crate) fn store(&self, new: Descriptor) {
        self.0.store(new.bits(), Ordering::Relaxed);
    }

    /// Write-protects a leaf, or does nothing to an entry without one, below a parked entry: no walker comes here and
    /// no cache holds it (T4), so the hardware changes nothing meanwhile, and 512 of these are cheap.
    #[inline]
    pub(crate) fn protect(&self) {
        let leaf = Descriptor::from_bits(self.0.load(Ordering::Relaxed));
        self.0.store(leaf.write_protected().bits(), Ordering::Relaxed);
    }

    /// Above the last level, below a parked entry: parks a table, write-protects a block.
    #[inline]
    pub(crate) fn park(&self) {
        let now = Descriptor::from_bits(self.0.load(Ordering::Relaxed));
        if now.is_table() {
            self.0.store(Descriptor::parked(now.frame()).bits(), Ordering::Relaxed);
        } else if now.is_valid() {
            self.protect();
        }
    }
}

impl<S: TableSource, T: TlbOps> Stage2<S, T> {
    /// Empty tables. The VMID is set when the guest is first loaded.
    pub fn new(source: S, tlb: T, geometry: Geometry) -> Result<Self, OutOfTables> {
        let tables = geometry.root_tables();
        let root = source.alloc_root(tables).ok_or(OutOfTables)?;
        Ok(Self {
            source,
            tlb,
            geometry,
            style: geometry.style(),
            root,
            used: 0,
            vmid: 0,
            tables,
            blocks: 0,
            #[cfg(feature = "testing")]
            careless: false,
            #[cfg(feature = "testing")]
            silent: false,
        })
    }

    /// Where the root table is.
    pub const fn root(&self) -> PhysAddr {
        self.root.base()
    }

    /// The value to load into VTTBR_EL2.
    pub const fn vttbr(&self) -> u64 {
        tlb::vttbr(self.root.base(), self.vmid)
    }

    /// Sets the guest's name in the caches, given by [`crate::vmid::VmidAllocator`], before it is loaded.
    pub const fn set_vmid(&mut self, vmid: u16) {
        self.vmid = vmid;
    }

    /// From now on leaves are changed by a read and a write, to see that this is found.
    #[cfg(feature = "testing")]
    pub const fn set_careless(&mut self, careless: bool) {
        self.careless = careless;
    }

    /// From now on no cache is told of a block that is broken, to see that this is found.
    #[cfg(feature = "testing")]
    pub const fn set_silent(&mut self, silent: bool) {
        self.silent = silent;
    }

    /// True if the leaf that maps an address says that it was written through.
    #[cfg(feature = "testing")]
    pub fn remembers_write(&self, at: Ipa) -> bool {
        self.find(at).is_some_and(|spot| spot.leaf.is_dirty())
    }

    /// The table that a walk for `at` starts in.
    #[inline]
    pub(crate) const fn root_table(&self, at: Ipa) -> Pfn {
        // Roots side by side are aligned to their number, so this is an addition.
        Pfn::new(self.root.number() | self.geometry.root_table(at))
    }

    /// An entry of the root is about to be used.
    pub(crate) fn use_root(&mut self, at: Ipa) {
        let table = usize::try_from(self.geometry.root_table(at)).unwrap_or(0);
        let entry = table * ENTRIES + Geometry::index(at, self.geometry.start());
        self.used = self.used.max(entry + 1);
    }

    /// The entries of the root that may have been used, and what each maps from on. A guest's addresses are
    /// low, so these are few.
    pub(crate) fn used_root(&self) -> impl Iterator<Item = (Slot, Ipa)> + use<S, T> {
        let (root, level) = (self.root.number(), self.geometry.start());
        let tables = (root..).flat_map(|table| (0..ENTRIES).map(move |index| (Pfn::new(table), index)));
        let starts = (0..).map(move |entry: u64| Ipa::new(entry << Geometry::shift(level)));
        tables.map(|(table, index)| Slot::new(table, index)).zip(starts).take(self.used)
    }

    /// Nothing is in the root any more.
    pub(crate) const fn root_is_empty(&mut self) {
        self.used = 0;
    }

    /// The tables that walks start in.
    pub(crate) fn root_tables(&self) -> impl Iterator<Item = Pfn> + use<S, T> {
        let root = self.root.number();
        (0..self.geometry.root_tables()).map(move |table| Pfn::new(root | table))
    }

    /// Frames in use as tables.
    pub(crate) const fn table_count(&self) -> u32 {
        self.tables
    }

    /// A fresh table, linked nowhere yet.
    pub(crate) fn alloc_table(&mut self) -> Result<Pfn, OutOfTables> {
        let table = self.source.alloc().ok_or(OutOfTables)?;
        self.tables += 1;
        Ok(table)
    }

    /// Gives back a table that T3 allows to free.
    pub(crate) fn free_table(&mut self, table: Pfn) {
        self.source.free(table);
        self.tables -= 1;
    }

    #[inline]
    fn entry(&self, slot: Slot) -> &AtomicU64 {
        &self.source.table(slot.table)[slot.index % ENTRIES]
    }

    /// The entries of a table from a slot on.
    #[inline]
    pub(crate) fn entries_from(&self, slot: Slot) -> impl Iterator<Item = Entry<'_>> {
        self.source.table(slot.table)[slot.index % ENTRIES..].iter().map(Entry)
    }

    /// The entries of a table, eight at a time: whoever goes by all of them counts instructions.
    #[inline]
    pub(crate) fn octets(&self, table: Pfn) -> impl Iterator<Item = [Entry<'_>; 8]> {
        self.source.table(table).as_chunks::<8>().0.iter().map(|entries| entries.each_ref().map(Entry))
    }

    /// What is there.
    #[inline]
    pub(crate) fn read(&self, slot: Slot) -> Descriptor {
        Descriptor::from_bits(self.entry(slot).load(Ordering::Relaxed))
    }

    /// Puts `new` there, and says what was there at that moment, flags and all (I14). What was written
    /// before, a page's bytes or a table's entries, is seen by whoever sees `new`.
    #[inline]
    pub(crate) fn swap(&self, slot: Slot, new: Descriptor) -> Descriptor {
        Descriptor::from_bits(self.entry(slot).swap(new.bits(), Ordering::AcqRel))
    }

    /// Changes what is there, as often as the hardware sets a flag meanwhile. Says what was there and what
    /// is now; the same twice when `change` had nothing to do.
    pub(crate) fn update(&self, slot: Slot, change: impl Fn(Descriptor) -> Descriptor) -> [Descriptor; 2] {
        let entry = self.entry(slot);
        let mut old = entry.load(Ordering::Relaxed);
        #[cfg(feature = "testing")]
        if self.careless {
            let new = change(Descriptor::from_bits(old)).bits();
            self.entry(slot).store(new, Ordering::Relaxed);
            return [old, new].map(Descriptor::from_bits);
        }
        loop {
            let new = change(Descriptor::from_bits(old)).bits();
            if new == old {
                return [Descriptor::from_bits(old); 2];
            }
            match entry.compare_exchange_weak(old, new, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => return [old, new].map(Descriptor::from_bits),
                Err(now) => old = now,
            }
        }
    }

    /// Blocks that are mapped now.
    pub(crate) const fn block_count(&self) -> u32 {
        self.blocks
    }

    /// Tells the caches.
    pub(crate) fn flush(&self, batch: Batch) {
        if self.vmid != 0 {
            batch.flush(&self.tlb, self.vttbr(), self.geometry.features());
        }
    }

    /// Tells the caches of a block that is broken.
    pub(crate) fn flush_block(&self, batch: Batch) {
        #[cfg(feature = "testing")]
        if self.silent {
            return;
        }
        self.flush(batch);
    }

    /// Tells this CPU's caches.
    pub(crate) fn flush_local(&self) {
        if self.vmid != 0 {
            tlb::invalidate_local(&self.tlb, self.vttbr());
        }
    }
}

/// Tells the sink what a leaf remembered that was `old` and is `new` now, for all the pages it maps.
pub(crate) fn harvest(at: Ipa, old: Descriptor, new: Descriptor, pages: u32, sink: Sink<'_>) {
    let accessed = old.is_accessed() && !new.is_accessed();
    let dirty = old.is_dirty();
    if !new.is_valid() || accessed || dirty {
        sink(Harvest { at, frame: old.frame(), pages, accessed, dirty });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Frames, Mmu, cpus};
    use vmobject::pmap::Pmap as _;
    use vmobject::prot::Prot;

    #[test]
    fn a_flag_that_the_hardware_sets_while_an_edit_is_made_up_is_in_what_the_edit_finds() {
        const DIRTY: u64 = 1 << 7;
        let geometry = Geometry::new(cpus::NEOVERSE_N1);
        let frames = Frames::new(4);
        let mmu = Mmu::new(&frames, geometry, 1);
        let mut tables = Stage2::new(frames, mmu, geometry).expect("there are frames");
        let at = Ipa::new(0x4000_0000);
        tables.enter(at, Pfn::new(1), Prot::ALL, &mut |_| {}).expect("there are frames");
        let slot = tables.find(at).expect("it is mapped").slot;
        let [old, new] = tables.update(slot, |leaf| {
            tables.entry(slot).fetch_or(DIRTY, Ordering::Relaxed);
            leaf.aged()
        });
        assert!(old.is_dirty() && !new.is_dirty());
        assert_eq!(tables.read(slot), new);
    }
}
