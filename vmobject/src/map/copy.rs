//! Copying a map: the clone primitive, and snapshots.
//!
//! A copy is symmetric where it can be: both sides share each object and must shadow it before they write, so
//! the call costs the map's entries and not its pages (D15). An object that others write to as well, or whose
//! store must see its changes, is copied asymmetrically: the source goes on with it, and the copy gets a
//! copy-object. An entry that a map has twice, over the same pages, is two separate ones in the copy. The source's leaves lose their write permission in
//! time that does not depend on how many there are ([`crate::pmap::Pmap::park`]). The whole map is copied under its
//! lock: a fault of another vCPU comes before the copy or after it.
//! Called by whoever clones guests. Calls `insert`, `object`.

use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;

use super::{Entry, Map};
use crate::defect::Defect;
use crate::lock::{Held, MAP};
use crate::object::ObjectId;
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

/// How entries are copied.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Symmetrically unless somebody else writes to the object.
    AsNeeded,
    /// Asymmetrically if the source writes to the object.
    Asymmetric,
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
        let list = self.copy_entries(source, &Arc::downgrade(&map), Kind::AsNeeded, held)?;
        map.entries.write(held).0.list = list;
        Ok(map)
    }

    /// Keeps what `source` has now.
    pub fn snapshot<const OUTER: u8>(
        &self,
        source: &Map<M>,
        held: &mut Held<'_, OUTER>,
    ) -> Result<Snapshot, VmError> {
        self.keep_copy(source, Kind::AsNeeded, held)
    }

    /// The same, so that `source` goes on with its objects as they are and its depth does not grow: what it
    /// overwrites is pushed to the snapshot first. For an image that is written out while the guest runs.
    pub fn freeze<const OUTER: u8>(
        &self,
        source: &Map<M>,
        held: &mut Held<'_, OUTER>,
    ) -> Result<Snapshot, VmError> {
        self.keep_copy(source, Kind::Asymmetric, held)
    }

    fn keep_copy<const OUTER: u8>(
        &self,
        source: &Map<M>,
        kind: Kind,
        held: &mut Held<'_, OUTER>,
    ) -> Result<Snapshot, VmError> {
        let list = self.copy_entries(source, &Weak::new(), kind, held)?;
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
        let list = if self.has(Defect::ResetEmptiesTop) { self.emptied(map, list, held) } else { list };
        let old = core::mem::replace(&mut map.entries.write(held).0.list, list);
        self.drop_entries(old, held);
        Ok(())
    }

    /// What a map has, its top objects emptied, instead of what it is to have: a defect.
    #[cold]
    fn emptied<const OUTER: u8>(
        &self,
        map: &Map<M>,
        wanted: Vec<Entry>,
        held: &mut Held<'_, OUTER>,
    ) -> Vec<Entry> {
        let shadows = |entry: &Entry, held: &mut Held<'_, OUTER>| {
            !entry.needs_copy && self.objects.get(entry.object).read(held).0.shadow.is_some()
        };
        let own: Vec<Entry> = core::mem::take(&mut map.entries.write(held).0.list);
        if !own.iter().all(|entry| shadows(entry, held)) {
            map.entries.write(held).0.list = own;
            return wanted;
        }
        for entry in &own {
            self.lose_everything(entry.object, held);
        }
        self.drop_entries(wanted, held);
        own
    }

    /// Gives a snapshot back.
    pub fn delete_snapshot<const OUTER: u8>(&self, snapshot: Snapshot, held: &mut Held<'_, OUTER>) {
        let charge = charge_of(&snapshot.list);
        self.keep(charge, false, held);
        self.uncommit(charge, held);
        self.drop_entries(snapshot.list, held);
    }

    /// Copies a live map's entries, and makes its next writes copy, or push.
    fn copy_entries<const OUTER: u8>(
        &self,
        source: &Map<M>,
        holder: &Weak<Map<M>>,
        kind: Kind,
        held: &mut Held<'_, OUTER>,
    ) -> Result<Vec<Entry>, VmError> {
        let (mut entries, mut held) = source.entries.write(held);
        let mut views = Vec::new();
        views.try_reserve_exact(entries.list.len()).map_err(|_| VmError::NoMemory)?;
        let mut made = Ok(());
        for entry in &entries.list {
            match self.view(entry, kind, &mut held) {
                Ok(object) => views.push(Entry { object, ..*entry }),
                Err(error) => {
                    made = Err(error);
                    break;
                }
            }
        }
        let list = made.and_then(|()| self.duplicate(&views, holder, 0, &mut held));
        // The copies have references of their own; those that came with the views go.
        for (view, entry) in views.iter().zip(&entries.list) {
            if view.object != entry.object {
                self.unreference(view.object, &mut held);
            }
        }
        let list = list?;
        let mut park = false;
        for (entry, copy) in entries.list.iter_mut().zip(&list) {
            if entry.prot.allows(Prot::WRITE) && entry.object == copy.object {
                park |= !entry.needs_copy;
                entry.needs_copy = true;
                self.links.write(&mut held).0.set_writes(entry.link, false);
            }
        }
        if park && !self.has(Defect::CopyLeavesWritable) {
            let parked = source.pmap.lock(&mut held).0.park();
            self.stats.add(Event::EntryParked, parked.into());
        }
        self.stats.count(Event::MapCopied);
        Ok(list)
    }

    /// The object that a copy of an entry is to have: the entry's own, or a copy-object with a reference.
    fn view(&self, entry: &Entry, kind: Kind, held: &mut Held<'_, MAP>) -> Result<ObjectId, VmError> {
        let wanted = kind == Kind::Asymmetric && entry.prot.allows(Prot::WRITE);
        // Nobody writes to what is to be copied before it is written.
        let pushes =
            !entry.needs_copy && (wanted || self.is_written_elsewhere(entry.object, Some(entry.link), held));
        if pushes { self.copy_object(entry.object, held) } else { Ok(entry.object) }
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
        let attached = self.links.write(held).0.attach(holder.clone(), number, at, entry.first, pages, false);
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
