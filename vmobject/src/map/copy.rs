//! Copying a map: the clone primitive, and snapshots.
//!
//! A copy is symmetric: both sides share each object and must shadow it before they write, so the call
//! costs the map's entries and not its pages (D15). The source's leaves lose their write permission in
//! time that does not depend on how many there are ([`crate::pmap::Pmap::park`]). The whole map is copied under its
//! lock: a fault of another vCPU comes before the copy or after it.
//! Called by whoever clones guests. Calls `insert`, `object`.

use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;

use super::{Entry, Map};
use crate::lock::Held;
use crate::pmap::Pmap as _;
use crate::prot::Prot;
use crate::stats::Event;
use crate::store::Machine;
use crate::{PROMPT, Vm, VmError};

/// A map as it was at one instant. Nothing runs on it and nothing changes it; guests are made from it.
/// Give it back with [`Vm::delete_snapshot`].
#[must_use = "a snapshot holds memory until it is deleted"]
pub struct Snapshot {
    list: Vec<Entry>,
}

impl Snapshot {
    /// Its entries, in order.
    pub fn iter(&self) -> impl Iterator<Item = &Entry> {
        self.list.iter()
    }
}

/// What is charged for a list of entries.
fn charge_of(list: &[Entry]) -> u64 {
    list.iter().map(Entry::charge).sum()
}

impl<M: Machine> Vm<M> {
    /// A new map, over empty tables, with the memory that `source` has now; neither sees what the other
    /// writes from now on. The caller sees to it that the guest's devices stand still.
    pub fn copy_map<const OUTER: u8>(
        &self,
        source: &Map<M>,
        pmap: M::Pmap,
        held: &mut Held<'_, OUTER>,
    ) -> Result<Arc<Map<M>>, VmError> {
        let map = self.create_map(pmap, held)?;
        let list = self.copy_entries(source, &Arc::downgrade(&map), held)?;
        map.entries.write(held).0.list = list;
        Ok(map)
    }

    /// Keeps what `source` has now.
    pub fn snapshot<const OUTER: u8>(
        &self,
        source: &Map<M>,
        held: &mut Held<'_, OUTER>,
    ) -> Result<Snapshot, VmError> {
        let list = self.copy_entries(source, &Weak::new(), held)?;
        self.keep(charge_of(&list), true, held);
        Ok(Snapshot { list })
    }

    /// A new map, over empty tables, with the memory of a snapshot.
    pub fn map_snapshot<const OUTER: u8>(
        &self,
        snapshot: &Snapshot,
        pmap: M::Pmap,
        held: &mut Held<'_, OUTER>,
    ) -> Result<Arc<Map<M>>, VmError> {
        let map = self.create_map(pmap, held)?;
        let list = self.duplicate(&snapshot.list, &Arc::downgrade(&map), 0, held)?;
        map.entries.write(held).0.list = list;
        Ok(map)
    }

    /// Gives a map the memory of a snapshot instead of its own: what it wrote since is gone. None of its
    /// vCPUs may run meanwhile. Takes time in proportion to what is mapped, unless [`Vm::clear_map`] was done.
    pub fn reset_map<const OUTER: u8>(
        &self,
        map: &Arc<Map<M>>,
        snapshot: &Snapshot,
        held: &mut Held<'_, OUTER>,
    ) -> Result<(), VmError> {
        let had = charge_of(&map.entries.read(held).0.list);
        let list = self.duplicate(&snapshot.list, &Arc::downgrade(map), had, held)?;
        self.uncommit(had.saturating_sub(charge_of(&list)), held);
        while !self.clear_map(map, PROMPT, held) {}
        let old = core::mem::replace(&mut map.entries.write(held).0.list, list);
        self.drop_entries(old, held);
        Ok(())
    }

    /// Gives a snapshot back.
    pub fn delete_snapshot<const OUTER: u8>(&self, snapshot: Snapshot, held: &mut Held<'_, OUTER>) {
        let charge = charge_of(&snapshot.list);
        self.keep(charge, false, held);
        self.uncommit(charge, held);
        self.drop_entries(snapshot.list, held);
    }

    /// Copies a live map's entries, and makes its next writes copy.
    fn copy_entries<const OUTER: u8>(
        &self,
        source: &Map<M>,
        holder: &Weak<Map<M>>,
        held: &mut Held<'_, OUTER>,
    ) -> Result<Vec<Entry>, VmError> {
        let (mut entries, mut held) = source.entries.write(held);
        let list = self.duplicate(&entries.list, holder, 0, &mut held)?;
        let mut park = false;
        for entry in entries.list.iter_mut().filter(|entry| entry.prot.allows(Prot::WRITE)) {
            park |= !entry.needs_copy;
            entry.needs_copy = true;
        }
        if park {
            source.pmap.lock(&mut held).0.park();
        }
        self.stats.count(Event::MapCopied);
        Ok(list)
    }

    /// The same entries for another holder, each with a reference, and charged except for what the holder
    /// has been charged; all or none.
    fn duplicate<const OUTER: u8>(
        &self,
        list: &[Entry],
        holder: &Weak<Map<M>>,
        charged: u64,
        held: &mut Held<'_, OUTER>,
    ) -> Result<Vec<Entry>, VmError> {
        if let (Some(map), Some(last)) = (holder.upgrade(), list.last()) {
            map.check_reach(last.range.end())?;
        }
        let more = charge_of(list).saturating_sub(charged);
        self.commit(more, held)?;
        let copies = self.refer(list, holder, held);
        if copies.is_err() {
            self.uncommit(more, held);
        }
        copies
    }

    fn refer<const OUTER: u8>(
        &self,
        list: &[Entry],
        holder: &Weak<Map<M>>,
        held: &mut Held<'_, OUTER>,
    ) -> Result<Vec<Entry>, VmError> {
        let mut copies = Vec::new();
        copies.try_reserve_exact(list.len()).map_err(|_| VmError::NoMemory)?;
        for entry in list {
            match self.duplicate_one(entry, holder, held) {
                Ok(copy) => copies.push(copy),
                Err(error) => {
                    for copy in copies {
                        self.drop_entry(copy, held);
                    }
                    return Err(error);
                }
            }
        }
        Ok(copies)
    }

    fn duplicate_one<const OUTER: u8>(
        &self,
        entry: &Entry,
        holder: &Weak<Map<M>>,
        held: &mut Held<'_, OUTER>,
    ) -> Result<Entry, VmError> {
        let pages = u32::try_from(entry.range.pages()).map_err(|_| VmError::Range)?;
        self.add_reference(entry.object, held)?;
        let (number, at) = (entry.object.number(), entry.range.start());
        let attached = self.links.write(held).0.attach(holder.clone(), number, at, entry.first, pages);
        match attached {
            Ok(link) => {
                let needs_copy = entry.needs_copy || entry.prot.allows(Prot::WRITE);
                Ok(Entry { link, needs_copy, ..*entry })
            }
            Err(error) => {
                self.unreference(entry.object, held);
                Err(error)
            }
        }
    }
}
