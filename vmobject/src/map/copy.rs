//! Copying a map, or a range of it: the clone primitive, and snapshots.
//!
//! A copy is symmetric where it can be: both sides share each object and must shadow it before they write, so
//! the call costs the map's entries and not its pages (D15). An object that others write to as well, or whose
//! store must see its changes, is copied asymmetrically: the source goes on with it, and the copy gets a
//! copy-object; one of a device is not copied but shared. An entry that a map has twice, over the same pages, is two separate ones in the copy. The source's leaves lose their write permission in
//! time that does not depend on how many there are ([`crate::pmap::Pmap::park`]). The whole map is copied under its
//! lock: a fault of another vCPU comes before the copy or after it.
//! Called by whoever clones guests. Calls `insert`, `object`.

use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;

use super::{Entry, Map};
use crate::addr::{Ipa, IpaRange};
use crate::defect::Defect;
use crate::limits::MAX_ENTRIES;
use crate::lock::{Held, MAP};
use crate::object::{Life, ObjectId, Role};
use crate::pmap::Pmap as _;
use crate::prot::Prot;
use crate::rmap::{Links, MappingId};
use crate::stats::Event;
use crate::store::Machine;
use crate::{Vm, VmError};

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

    pub(super) fn entries(&self) -> &[Entry] {
        &self.list
    }
}

/// What is charged for a list of entries.
pub(super) fn charge_of(list: &[Entry]) -> u64 {
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
        let copied = self.copy_entries(source, None, &Arc::downgrade(&map), Kind::AsNeeded, held);
        self.begun(map, copied, held)
    }

    /// Keeps what `source` has now.
    pub fn snapshot<const OUTER: u8>(
        &self,
        source: &Map<M>,
        held: &mut Held<'_, OUTER>,
    ) -> Result<Snapshot, VmError> {
        self.keep_copy(source, None, Kind::AsNeeded, held)
    }

    /// Keeps what `source` has now in a range, all of which must be mapped. It costs what the range has of entries and
    /// leaves, and the rest of the map does not notice.
    pub fn copy_in<const OUTER: u8>(
        &self,
        source: &Map<M>,
        range: IpaRange,
        held: &mut Held<'_, OUTER>,
    ) -> Result<Snapshot, VmError> {
        self.keep_copy(source, Some(range), Kind::AsNeeded, held)
    }

    /// Puts what was kept into a map, from an address on, where nothing may be yet. The snapshot stays the caller's.
    pub fn copy_out<const OUTER: u8>(
        &self,
        snapshot: &Snapshot,
        map: &Arc<Map<M>>,
        at: Ipa,
        held: &mut Held<'_, OUTER>,
    ) -> Result<(), VmError> {
        let Some(from) = snapshot.list.first().map(|entry| entry.range.start()) else { return Ok(()) };
        let moved = |old: Ipa| at.checked_add(old.checked_sub(from)?);
        let mut list = Vec::new();
        list.try_reserve_exact(snapshot.list.len()).map_err(|_| VmError::NoMemory)?;
        for entry in &snapshot.list {
            let range = moved(entry.range.start()).zip(moved(entry.range.end()));
            let range = range.and_then(|(start, end)| IpaRange::new(start, end)).ok_or(VmError::Range)?;
            list.push(Entry { range, ..*entry });
        }
        let (mut entries, mut held) = map.entries.write(held);
        if entries.list.len() + list.len() > MAX_ENTRIES {
            return Err(VmError::Limit("map entries"));
        }
        if list.iter().any(|entry| entries.gap(entry.range).is_none()) {
            return Err(VmError::Overlap);
        }
        entries.list.try_reserve(list.len()).map_err(|_| VmError::NoMemory)?;
        for copy in self.duplicate(&list, &Arc::downgrade(map), 0, &mut held)? {
            let place = entries.list.partition_point(|entry| entry.range.start() < copy.range.start());
            entries.list.insert(place, copy);
        }
        Ok(())
    }

    /// The same, so that `source` goes on with its objects as they are and its depth does not grow: what it
    /// overwrites is pushed to the snapshot first. For an image that is written out while the guest runs.
    pub fn freeze<const OUTER: u8>(
        &self,
        source: &Map<M>,
        held: &mut Held<'_, OUTER>,
    ) -> Result<Snapshot, VmError> {
        self.keep_copy(source, None, Kind::Asymmetric, held)
    }

    fn keep_copy<const OUTER: u8>(
        &self,
        source: &Map<M>,
        range: Option<IpaRange>,
        kind: Kind,
        held: &mut Held<'_, OUTER>,
    ) -> Result<Snapshot, VmError> {
        let list = self.copy_entries(source, range, &Weak::new(), kind, held)?;
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
        let copied = self.duplicate(&snapshot.list, &Arc::downgrade(&map), 0, held);
        self.begun(map, copied, held)
    }

    /// A new map with its entries, if there are any to be had; else nothing of it stays.
    fn begun<const OUTER: u8>(
        &self,
        map: Arc<Map<M>>,
        copied: Result<Vec<Entry>, VmError>,
        held: &mut Held<'_, OUTER>,
    ) -> Result<Arc<Map<M>>, VmError> {
        match copied {
            Ok(list) => {
                map.entries.write(held).0.list = list;
                Ok(map)
            }
            Err(error) => {
                self.unlist(&map, held);
                Err(error)
            }
        }
    }

    /// Gives a snapshot back.
    pub fn delete_snapshot<const OUTER: u8>(&self, snapshot: Snapshot, held: &mut Held<'_, OUTER>) {
        let charge = charge_of(&snapshot.list);
        self.keep(charge, false, held);
        self.uncommit(charge, held);
        self.drop_entries(snapshot.list, held);
    }

    /// Copies a live map's entries, of a range if not all, and makes its next writes there copy, or push.
    fn copy_entries<const OUTER: u8>(
        &self,
        source: &Map<M>,
        range: Option<IpaRange>,
        holder: &Weak<Map<M>>,
        kind: Kind,
        outer: &mut Held<'_, OUTER>,
    ) -> Result<Vec<Entry>, VmError> {
        let (mut entries, mut held) = source.entries.write(outer);
        let part = match range {
            None => 0..entries.list.len(),
            Some(range) => self.clip(&mut entries, range, &mut held)?,
        };
        let originals = &mut entries.list[part];
        let mut views = Vec::new();
        views.try_reserve_exact(originals.len()).map_err(|_| VmError::NoMemory)?;
        let mut made = Ok(());
        for entry in &*originals {
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
        for (view, entry) in views.iter().zip(&*originals) {
            if view.object != entry.object {
                self.unreference(view.object, &mut held);
            }
        }
        let list = list?;
        let mut park = false;
        for (entry, copy) in originals.iter_mut().zip(&list) {
            if entry.most.allows(Prot::WRITE) && entry.object == copy.object && !entry.device {
                park |= !entry.needs_copy;
                entry.needs_copy = true;
                self.links.write(&mut held).0.set_writes(entry.link, false);
            }
        }
        if park && self.has(Defect::ParksUnlocked) {
            drop(entries);
            self.park_leaves(source, range, outer);
        } else if park && !self.has(Defect::CopyLeavesWritable) {
            self.park_leaves(source, range, &mut held);
        }
        self.stats.count(Event::MapCopied);
        Ok(list)
    }

    /// Takes the permission to write from a map's leaves, those in a range if not all.
    fn park_leaves<const OUTER: u8>(
        &self,
        map: &Map<M>,
        range: Option<IpaRange>,
        held: &mut Held<'_, OUTER>,
    ) {
        let (mut pmap, _held) = map.pmap.lock(held);
        match range {
            None => self.stats.add(Event::EntryParked, pmap.park().into()),
            Some(range) => {
                let keep = Prot::ALL.without(Prot::WRITE);
                pmap.protect(range, keep, &mut |harvest| self.frames.note(harvest));
            }
        }
    }

    /// The object that a copy of an entry is to have: the entry's own, or a copy-object with a reference.
    fn view(&self, entry: &Entry, kind: Kind, held: &mut Held<'_, MAP>) -> Result<ObjectId, VmError> {
        if entry.device {
            return Ok(entry.object);
        }
        let wanted = kind == Kind::Asymmetric && entry.most.allows(Prot::WRITE);
        // Nobody writes to what is to be copied before it is written.
        let pushes = !entry.needs_copy
            && (wanted || self.is_written_elsewhere(entry.object, Some(entry.link), entry.window(), held));
        if pushes { self.copy_object(entry.object, held) } else { Ok(entry.object) }
    }

    /// The same entries for another holder, each with a reference, and charged except for what the holder
    /// has been charged; all or none.
    pub(super) fn duplicate<const OUTER: u8>(
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

    /// One more reference to a live object, and the mapping that has it, in one: who counts both finds them equal. The
    /// mapping is made by `hang`, from the object's number.
    pub(crate) fn refer_by<const OUTER: u8>(
        &self,
        id: ObjectId,
        held: &mut Held<'_, OUTER>,
        hang: impl FnOnce(&mut Links<Weak<Map<M>>>, u32) -> Result<MappingId, VmError>,
    ) -> Result<MappingId, VmError> {
        let (mut state, mut held) = self.objects.get(id).write(held);
        assert!(state.id() == id && state.life == Life::Live, "{id:?} is gone");
        let refs = state.refs.checked_add(1).ok_or(VmError::Limit("references"))?;
        let link = hang(&mut self.links.write(&mut held).0, id.number())?;
        state.refs = refs;
        // What is pushed to it from now on, a look through this mapping must not miss.
        state.shadowed |= state.role != Role::Plain && !self.has(Defect::PushesUnseen);
        Ok(link)
    }

    fn duplicate_one<const OUTER: u8>(
        &self,
        entry: &Entry,
        holder: &Weak<Map<M>>,
        held: &mut Held<'_, OUTER>,
    ) -> Result<Entry, VmError> {
        let pages = u32::try_from(entry.range.pages()).map_err(|_| VmError::Range)?;
        let writes = entry.device && entry.most.allows(Prot::WRITE);
        let link = self.refer_by(entry.object, held, |links, number| {
            links.attach(holder.clone(), number, entry.range.start(), entry.first, pages, writes)
        })?;
        let needs_copy = !entry.device && (entry.needs_copy || entry.most.allows(Prot::WRITE));
        Ok(Entry { link, needs_copy, ..*entry })
    }
}

#[cfg(test)]
mod tests {
    use crate::VmError;
    use crate::charge::Overcommit;
    use crate::lock::Held;
    use crate::testing::{FakePmap, Rig};

    #[test]
    fn nothing_stays_of_a_map_that_is_refused() {
        let rig = Rig::new(256);
        let guest = rig.guest(100);
        rig.fill(&guest, 0..100);
        let held = &mut Held::root();
        let kept = rig.vm.snapshot(&guest, held).unwrap();
        rig.vm.set_overcommit(Overcommit::Percent(100), held);
        for _ in 0..10 {
            let refused = rig.vm.map_snapshot(&kept, FakePmap::default(), held);
            assert!(matches!(refused, Err(VmError::Overcommit { .. })));
            assert!(rig.vm.copy_map(&guest, FakePmap::default(), held).is_err());
        }
        assert_eq!(rig.vm.maps.lock(held).0.list.len(), 1);
        rig.vm.delete_snapshot(kept, held);
        rig.check();
    }
}
