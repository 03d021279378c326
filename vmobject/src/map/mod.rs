//! Maps: one guest's physical address space, as entries over objects (`vm_map.c`).
//!
//! Entries are sorted and do not overlap. A fault reads them, beside others of the same guest; only a
//! change of the entries locks the others out. The stage-2 tables are a cache of what is here and have
//! their own lock. Called by `fault` and by whoever builds guests. Calls `object`.
//! Locks: the map, then objects, then the tables.
//!
//! # Invariants
//! M1. Entries are sorted, not empty, and do not overlap; none allows more than it ever may.
//! M2. An entry holds one reference to its object, and lies within it.
//! M3. An entry without `needs_copy` that may come to be written has no object whose store is only read.
//! M4. An entry of a device's object is known as such, and never to be copied.

mod coalesce;
mod copy;
mod discard;
mod end;
mod insert;
mod limit;
mod need;
mod part;
mod reset;

pub use copy::Snapshot;
pub use discard::{Discarded, NotDiscarded};
pub use limit::LimitError;
pub(crate) use limit::{Limited, Next};
pub use need::Instruction;

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::ops::Range;
use core::sync::atomic::{AtomicU32, AtomicUsize, Ordering::Relaxed};

use crate::VmError;
use crate::addr::{Ipa, IpaRange, PageIndex};
use crate::charge::charge_for;
use crate::lock::{Held, MAP, PMAP, Ranked, RankedRw};
use crate::object::ObjectId;
use crate::pmap::Pmap as _;
use crate::prot::Prot;
use crate::rmap::MappingId;
use crate::stats::{Counts, Stats};
use crate::store::Machine;
use spin::Once;

/// Whether an entry sees what others write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Share {
    /// A write makes a private copy of the page: the object is never changed through this entry.
    Copy,
    /// Writes go to the object, and everybody sees them.
    Shared,
}

/// A range of a map and what is there.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// Where.
    pub range: IpaRange,
    /// What.
    pub object: ObjectId,
    /// The object's page at the start of the range.
    pub first: PageIndex,
    /// What the guest may do.
    pub prot: Prot,
    /// What it may ever come to be allowed.
    pub most: Prot,
    /// The object is to be shadowed before the first write.
    pub needs_copy: bool,
    /// The object is a device's: whoever has the entry has the same frames, and none of the VM's.
    pub device: bool,
    /// Where the reverse map has it.
    pub(crate) link: MappingId,
}

impl Entry {
    /// What is charged for it: what can be written may all have to be somewhere.
    pub(crate) fn charge(&self) -> u64 {
        if self.device { 0 } else { Self::charge_of(self.range, self.most) }
    }

    pub(crate) fn charge_of(range: IpaRange, prot: Prot) -> u64 {
        if prot.allows(Prot::WRITE) { charge_for(range.pages()) } else { 0 }
    }

    /// The object's pages that it shows.
    pub(crate) fn window(&self) -> Range<u32> {
        let first = self.first.number();
        first..u32::try_from(u64::from(first) + self.range.pages()).unwrap_or(u32::MAX)
    }

    /// The object's page at an address of the range.
    #[inline]
    pub fn page_at(&self, at: Ipa) -> Option<PageIndex> {
        self.first.checked_add(at.pages_above(self.range.start())?.number())
    }

    /// Where a page of the object is, or would be if the range went on.
    fn place_of(&self, page: PageIndex) -> Option<Ipa> {
        self.range.start().checked_add(page.checked_sub(self.first.number())?.byte_offset())
    }
}

/// The entries of a map. Guarded by its map lock.
#[derive(Default)]
pub struct Entries {
    list: Vec<Entry>,
}

impl Entries {
    /// All of them, in order.
    pub fn iter(&self) -> impl Iterator<Item = &Entry> {
        self.list.iter()
    }

    /// Where the entry of an address is; on failure, where one would have to go.
    fn place(&self, at: Ipa) -> Result<usize, usize> {
        let after = self.list.partition_point(|entry| entry.range.start() <= at);
        match after.checked_sub(1) {
            Some(place) if self.list[place].range.contains(at) => Ok(place),
            Some(_) | None => Err(after),
        }
    }

    /// Where an entry of a range would have to go; `None` if something is there.
    fn gap(&self, range: IpaRange) -> Option<usize> {
        let place = self.place(range.start()).err()?;
        let next = self.list.get(place);
        next.is_none_or(|next| next.range.start() >= range.end()).then_some(place)
    }

    /// The entry of an address; `hint` says where the last one was.
    #[inline]
    pub(crate) fn find(&self, at: Ipa, hint: &AtomicUsize) -> Option<&Entry> {
        if let Some(entry) = self.list.get(hint.load(Relaxed))
            && entry.range.contains(at)
        {
            return Some(entry);
        }
        let place = self.place(at).ok()?;
        hint.store(place, Relaxed);
        self.list.get(place)
    }

    pub(crate) fn find_mut(&mut self, at: Ipa) -> Option<&mut Entry> {
        let place = self.place(at).ok()?;
        self.list.get_mut(place)
    }
}

/// One guest's physical address space.
pub struct Map<M: Machine> {
    number: AtomicU32,
    pub(crate) entries: RankedRw<MAP, Entries>,
    pub(crate) pmap: Ranked<PMAP, M::Pmap>,
    /// What [`crate::pmap::Pmap::reach`] says.
    reach: Ipa,
    pub(crate) hint: AtomicUsize,
    needs: Once<Box<[need::Needs]>>,
    limit: limit::Limit,
    pub(crate) stats: Stats,
}

impl<M: Machine> Map<M> {
    pub(crate) fn new(number: u32, pmap: M::Pmap) -> Self {
        Self {
            number: AtomicU32::new(number),
            entries: RankedRw::new(Entries::default()),
            reach: pmap.reach(),
            pmap: Ranked::new(pmap),
            hint: AtomicUsize::new(0),
            needs: Once::new(),
            limit: limit::Limit::none(),
            stats: Stats::new(),
        }
    }

    /// Its number, for printing.
    pub fn number(&self) -> u32 {
        self.number.load(Relaxed)
    }

    /// Refuses what ends above the tables' reach.
    fn check_reach(&self, end: Ipa) -> Result<(), VmError> {
        if end > self.reach { Err(VmError::Reach { end, limit: self.reach }) } else { Ok(()) }
    }

    /// Does something with the translation tables.
    pub fn with_pmap<R, const OUTER: u8>(
        &self,
        held: &mut Held<'_, OUTER>,
        what: impl FnOnce(&mut M::Pmap) -> R,
    ) -> R {
        what(&mut self.pmap.lock(held).0)
    }

    /// What happened to this map's guest.
    pub fn stats(&self) -> Counts {
        self.stats.counts()
    }
}
