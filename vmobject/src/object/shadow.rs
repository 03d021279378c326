//! Making objects, referring to them, and ending them.
//!
//! The last release of an object ends it, unless the cache keeps it: the reverse map lets it go at
//! once; its pages, its identity and its reference to what it shadows go by and by, in `work` (one owner of
//! each transition, D26). A release that leaves one reference, a shadow's, makes a collapse possible and puts
//! it on the list (D6). Called by `map` and by holders of ids.

use super::index::Slot;
use super::{Life, NOWHERE, ObjectId, Pager, Role, Shadow, State};
use crate::addr::{PageIndex, Pfn};
use crate::defect::Defect;
use crate::lock::{Held, OBJECT};
use crate::page::{ANY, Queue, Wish};
use crate::rmap::MappingId;
use crate::stats::Event;
use crate::store::{Machine, PhysMemory as _, StoreId};
use crate::{Vm, VmError};

impl<M: Machine> Vm<M> {
    /// Makes an object with one reference. It takes over the caller's reference to what it shadows, if
    /// it succeeds.
    pub(crate) fn make_object<const OUTER: u8>(
        &self,
        pages: u32,
        pager: Pager,
        shadow: Option<Shadow>,
        held: &mut Held<'_, OUTER>,
    ) -> Result<ObjectId, VmError> {
        self.make_object_for(None, pages, pager, shadow, held)
    }

    /// The same; a mapping of what it shadows is its own from the first moment, from its first page on.
    pub(crate) fn make_object_for<const OUTER: u8>(
        &self,
        mapping: Option<MappingId>,
        pages: u32,
        pager: Pager,
        shadow: Option<Shadow>,
        held: &mut Held<'_, OUTER>,
    ) -> Result<ObjectId, VmError> {
        if !self.machine.has_room() {
            return Err(VmError::NoMemory);
        }
        let number = self.objects.take_place(held)?;
        let room = self.links.write(held).0.make_room(number);
        let (Some(object), Ok(())) = (self.objects.at(number), room) else {
            self.objects.vacate(number, true, held);
            return Err(VmError::NoMemory);
        };
        let (mut state, mut held) = object.write(held);
        debug_assert!(state.life == Life::Vacant && state.slots.counts().is_empty());
        state.life = Life::Live;
        state.refs = 1;
        state.pages = pages;
        state.pager = pager;
        state.shadow = shadow;
        state.blocked_at = NOWHERE;
        (state.unwritten, state.deactivated) = (0, 0);
        (state.copy, state.role, state.shadowed) = (None, Role::Plain, false);
        if let Some(Shadow { object, offset, limit }) = shadow {
            self.objects.get(object).write_below(&mut held).0.shadowed = true;
            {
                let (mut links, _held) = self.links.write(&mut held);
                links.adopt(number, object.number(), offset, limit);
                if let Some(mapping) = mapping {
                    links.rehang(mapping, number, PageIndex::new(0));
                }
            }
            self.objects.chore(number, &mut held); // to find out what stops a bypass
        }
        Ok(state.id)
    }

    /// The object of a store, with one more reference; made with this pager if there is none. One that waits
    /// in the cache, or whose end is not done yet, lives on: it may have what the store does not have yet.
    pub(crate) fn image_object<const OUTER: u8>(
        &self,
        store: StoreId,
        pager: Pager,
        pages: u32,
        held: &mut Held<'_, OUTER>,
    ) -> Result<ObjectId, VmError> {
        loop {
            if let Some(id) = self.objects.find_image(store, held)? {
                let (mut state, mut held) = self.objects.get(id).write(held);
                let same = state.id == id && state.life != Life::Vacant;
                // A store that was forgotten meanwhile has other contents than this.
                let named =
                    state.life != Life::Dying || self.objects.find_image(store, &mut held)? == Some(id);
                let same = same && named;
                if !same && !self.has(Defect::FindsTheDead) {
                    continue; // its name was forgotten between the two locks
                }
                let rewritten = state.pager == Pager::Image(store) && pager == Pager::Disk(store);
                if state.refs == 0 {
                    self.objects.uncache(id, &mut held);
                    self.stats.count(Event::CacheHit);
                    state.life = Life::Live;
                    if rewritten {
                        state.pager = pager; // nobody relies on it any more, and its pages are the store's
                    }
                } else if rewritten {
                    return Err(VmError::ReadOnly);
                }
                state.refs = state.refs.checked_add(1).ok_or(VmError::Limit("references"))?;
                return Ok(id);
            }
            let id = self.make_object(pages, pager, None, held)?;
            if self.objects.register(store, id, held) {
                return Ok(id);
            }
            self.unreference(id, held); // somebody was faster: theirs it is
        }
    }

    /// One more reference to a live object.
    pub(crate) fn add_reference<const OUTER: u8>(
        &self,
        id: ObjectId,
        held: &mut Held<'_, OUTER>,
    ) -> Result<(), VmError> {
        let (mut state, _held) = self.objects.get(id).write(held);
        assert!(state.id == id && state.life == Life::Live, "{id:?} is gone");
        state.refs = state.refs.checked_add(1).ok_or(VmError::Limit("references"))?;
        Ok(())
    }

    /// One reference less.
    pub(crate) fn unreference<const OUTER: u8>(&self, id: ObjectId, held: &mut Held<'_, OUTER>) {
        let (mut state, mut held) = self.objects.get(id).write(held);
        assert_eq!(state.id, id, "gone");
        self.drop_reference(&mut state, &mut held);
    }

    /// The same for an object that is locked.
    pub(super) fn drop_reference(&self, state: &mut State, held: &mut Held<'_, OBJECT>) {
        assert!(state.life == Life::Live && state.refs > 0, "{:?} has no references", state.id);
        state.refs -= 1;
        let number = state.id.index;
        if state.refs == 0 {
            if !self.retire(state, held) {
                self.end(state, held);
            }
            return;
        }
        let child = self.links.read(held).0.only_child(number).filter(|_| state.refs == 1);
        if let Some(child) = child {
            self.objects.chore(child, held);
        } else if self.may_hide(state, held) {
            self.objects.ask_prune(number, held);
        }
    }

    /// Ends an object without references. Nothing maps its pages.
    pub(super) fn end(&self, state: &mut State, held: &mut Held<'_, OBJECT>) {
        debug_assert_eq!(state.refs, 0);
        self.links.write(held).0.orphan(state.id.index);
        (state.life, state.sent) = (Life::Dying, 0);
        self.objects.chore(state.id.index, held);
    }

    /// A frame for a page of an object, entered in its slot; a swap slot that was there is the caller's. Its
    /// bytes are garbage. `None` for want of memory.
    ///
    /// In an object that shadows nothing it lies beside those of the page's neighbours, if that can be had. What a shadow
    /// has is here and there, and 2 MiB begun for each page of it would soon leave none whole.
    #[inline]
    pub(crate) fn give_frame(
        &self,
        state: &mut State,
        page: PageIndex,
        queue: Queue,
        held: &mut Held<'_, OBJECT>,
    ) -> Option<Pfn> {
        let place = state.slots.place(page)?;
        let wanted = match state.shadow {
            Some(_) => ANY,
            None => match state.slots.wish(place) {
                Wish::Beside(wanted) => wanted,
                Wish::Begin(offset) => return self.begin_chunk(state, page, place, queue, offset, held),
            },
        };
        self.give(state, page, place, queue, wanted, held)
    }

    /// The same for the first page of a chunk.
    #[cold]
    fn begin_chunk(
        &self,
        state: &mut State,
        page: PageIndex,
        place: PageIndex,
        queue: Queue,
        offset: u32,
        held: &mut Held<'_, OBJECT>,
    ) -> Option<Pfn> {
        let wanted = self.frames.whole_at(offset, held);
        let frame = self.give(state, page, place, queue, wanted, held)?;
        state.slots.begin_chunk(place, frame);
        Some(frame)
    }

    /// A frame, the one that is wanted if that is free, for a page that has this place in its object's index.
    #[inline]
    fn give(
        &self,
        state: &mut State,
        page: PageIndex,
        place: PageIndex,
        queue: Queue,
        wanted: Pfn,
        held: &mut Held<'_, OBJECT>,
    ) -> Option<Pfn> {
        if !self.has_room_at(state, page) {
            return None;
        }
        let frame = self.frames.allocate(state.slots.storage(), place, queue, wanted, held)?;
        match self.objects.gain(state, page, Slot::Resident(frame), held) {
            Ok(before) => {
                debug_assert!(!matches!(before, Slot::Resident(_)));
                Some(frame)
            }
            Err(_) => {
                self.frames.free(frame, held);
                None
            }
        }
    }

    /// True if a guest may have a page of an object be something else than absent. What a collapse moves is not asked
    /// for: it gives back more than it takes.
    #[inline]
    pub(crate) fn has_room_at(&self, state: &State, page: PageIndex) -> bool {
        self.machine.has_room() || state.slots.has_leaf(page)
    }

    /// A frame of zeros for a page that is marked zero in an object with a store. One that is written to has something
    /// else there; one that is only read can tell again that these are zeros. `None` for want of memory.
    pub(crate) fn materialise_zero(
        &self,
        state: &mut State,
        page: PageIndex,
        held: &mut Held<'_, OBJECT>,
    ) -> Option<Pfn> {
        let frame = self.give_frame(state, page, Queue::Active, held)?;
        self.machine.memory().zero(frame);
        self.frames.page(frame).set_dirty(!matches!(state.pager, Pager::Image(_)));
        Some(frame)
    }

    /// A frame learns that it is another object's now.
    pub(crate) fn rename(&self, state: &State, page: PageIndex, slot: Slot) {
        if let (Slot::Resident(frame), Some(place)) = (slot, state.slots.place(page)) {
            self.frames.page(frame).set_owner(state.slots.storage(), place);
        }
    }

    /// Frees what a slot of a dying or hidden page owns, frame and swap slot (D11). False if a transfer has it.
    pub(super) fn free_slot(&self, slot: Slot, held: &mut Held<'_, OBJECT>) -> bool {
        match slot {
            Slot::Resident(frame) if self.frames.page(frame).is_busy() => return false,
            Slot::Resident(frame) => {
                self.drop_clean_slot(frame, held);
                self.frames.free(frame, held);
            }
            Slot::Absent | Slot::Zero => {}
            Slot::Swapped(slot) => self.swap.give(slot, held),
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use crate::VmError;
    use crate::lock::Held;
    use crate::prot::Prot;
    use crate::testing::{FakePmap, Rig, at};

    #[test]
    fn a_reference_too_many_is_refused_and_changes_nothing_d18() {
        let rig = Rig::new(64);
        let held = &mut Held::root();
        let guest = rig.guest(4);
        assert_eq!(rig.store(&guest, at(0, 0), 1), Ok(()));
        let mut object = None;
        rig.vm.for_each_entry(&guest, held, |entry| object = Some(entry.object));
        let object = object.expect("an entry has one");
        let count = |refs: u32| rig.vm.objects.get(object).write(&mut Held::root()).0.refs = refs;
        count(u32::MAX);
        assert_eq!(rig.vm.reference(object, held), Err(VmError::Limit("references")));
        let clone = rig.vm.copy_map(&guest, FakePmap::default(), held);
        assert_eq!(clone.err(), Some(VmError::Limit("references")));
        assert!(rig.vm.snapshot(&guest, held).is_err());
        assert_eq!(rig.vm.objects.get(object).read(held).0.refs, u32::MAX);
        count(1);
        rig.check();
        assert_eq!(rig.fault(&guest, at(0, 0), Prot::WRITE), Ok(()));
        rig.destroy(guest);
        assert_eq!(rig.objects(), 0);
    }
}
