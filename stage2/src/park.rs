//! Write-protecting a whole guest at once, and paying for it later.
//!
//! A table's descriptor carries no permissions in stage 2, so a clone cannot write-protect its source by
//! editing a few entries; and editing every leaf would make the pause grow with the guest's memory. Instead
//! [`Stage2::park_roots`] makes the top-level entries invalid and keeps their pointers: what is below is
//! *parked*. Whoever then faults there comes through [`Stage2::way_to`], which lowers the parking by one
//! level at a time: the entries of the one table on the way are parked or write-protected, unseen by any
//! walker, and only then is the entry above valid again. One fault lowers one table, and comes again for the next, so
//! that interrupts wait for no more than that; what nobody touches is never looked at. `walk` sees through all this.

use crate::descriptor::Descriptor;
use crate::geometry::{Geometry, LAST};
use crate::table::TableSource;
use crate::tlb::{Batch, TlbOps};
use crate::tree::{Entry, Slot, Stage2};
use vmobject::addr::{Ipa, Pfn};
use vmobject::pmap::OutOfTables;

/// What lies in the way to a table.
pub(crate) enum Way {
    /// Nothing: this is the table.
    Clear(Pfn),
    /// A block, in this place.
    Block(Slot),
    /// A table high up, whose entries are parked now. To go on would be too much for once (I6).
    Part,
}

impl<S: TableSource, T: TlbOps> Stage2<S, T> {
    /// Parks everything. What leaves remember stays in them. How many entries were written.
    pub(crate) fn park_roots(&mut self) -> u32 {
        let mut parked = 0;
        for (slot, _) in self.used_root() {
            let entry = self.read(slot);
            if entry.is_valid() {
                if entry.is_table() {
                    self.swap(slot, Descriptor::parked(entry.frame()));
                } else {
                    // Walkers see it, and may set its flags meanwhile.
                    self.update(slot, Descriptor::write_protected);
                }
                parked += 1;
            }
        }
        if parked > 0 {
            let mut batch = Batch::new();
            batch.everything();
            self.flush(batch);
        }
        parked
    }

    /// Makes a parked entry of `level` valid again, its table's entries parked or write-protected.
    #[cold]
    fn lower(&self, slot: Slot, level: u32, table: Pfn) {
        for entries in self.octets(table) {
            if level + 1 == LAST {
                entries.iter().for_each(Entry::protect);
            } else if entries.iter().any(Entry::is_used) {
                entries.iter().for_each(Entry::park);
            }
        }
        self.tlb.dsb_ishst();
        self.swap(slot, Descriptor::table(table));
        // Seen by walkers at the latest when the leaf is put that this is for.
    }

    /// The table of `level` on the way to an address within reach, made if it is not there.
    #[inline]
    pub(crate) fn way_to(&mut self, at: Ipa, level: u32) -> Result<Way, OutOfTables> {
        let mut table = self.root_table(at);
        for above in self.geometry.start()..level {
            let slot = Slot::new(table, Geometry::index(at, above));
            let entry = self.read(slot);
            table = if entry.is_table() {
                entry.frame()
            } else if entry.is_block() {
                return Ok(Way::Block(slot));
            } else {
                let parked = entry.is_parked();
                let table = self.open(slot, above, at, entry)?;
                if parked && above + 1 < LAST {
                    return Ok(Way::Part);
                }
                table
            };
        }
        Ok(Way::Clear(table))
    }

    /// Opens the way at an invalid entry.
    #[cold]
    fn open(&mut self, slot: Slot, level: u32, at: Ipa, entry: Descriptor) -> Result<Pfn, OutOfTables> {
        if entry.is_parked() {
            self.lower(slot, level, entry.frame());
            return Ok(entry.frame());
        }
        let table = self.alloc_table()?;
        if level == self.geometry.start() {
            self.use_root(at);
        }
        self.tlb.dsb_ishst(); // its zeros first
        self.swap(slot, Descriptor::table(table));
        Ok(table)
    }
}
