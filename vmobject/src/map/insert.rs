//! Building and unbuilding maps.
//!
//! `insert` takes over the caller's reference to the object, whatever comes of it: a call that fails has
//! released it. Called by whoever builds guests; calls `object`.

use alloc::sync::Arc;
use alloc::vec::Vec;

use super::{Entry, Map, Share};
use crate::addr::{CHUNK_PAGES, Ipa, IpaRange, PageIndex};
use crate::defect::Defect;
use crate::limits::MAX_ENTRIES;
use crate::lock::{Held, MAP};
use crate::object::{ObjectId, Pager, Role, Shadow};
use crate::prot::Prot;
use crate::stats::Event;
use crate::store::Machine;
use crate::{PROMPT, Vm, VmError};

impl<M: Machine> Vm<M> {
    /// A map with nothing in it, over empty tables.
    pub fn create_map<const OUTER: u8>(
        &self,
        pmap: M::Pmap,
        held: &mut Held<'_, OUTER>,
    ) -> Result<Arc<Map<M>>, VmError> {
        let (mut maps, _held) = self.maps.lock(held);
        maps.list.try_reserve(1).map_err(|_| VmError::NoMemory)?;
        // To end must not need memory.
        let room = (maps.list.len() + 1).saturating_sub(maps.ending.len());
        maps.ending.try_reserve(room).map_err(|_| VmError::NoMemory)?;
        let map = Arc::new(Map::new(maps.next, pmap));
        maps.next += 1;
        maps.list.push(Arc::downgrade(&map));
        Ok(map)
    }

    /// Puts pages of an object, from `first` on, at a range of a map, and takes over a reference to it. New memory
    /// right behind memory of the same kind becomes part of that one's entry and object.
    ///
    /// With [`Share::Shared`] and [`Prot::WRITE`] the caller sees to it that nobody has a copy that was made
    /// when nobody wrote to the object. With [`Share::Copy`] the range may go on behind the object's end; what is there reads as zero. An
    /// object with a read-only pager can be shared only without [`Prot::WRITE`].
    #[expect(clippy::too_many_arguments, reason = "each is a different noun, and all callers name them")]
    pub fn insert<const OUTER: u8>(
        &self,
        map: &Arc<Map<M>>,
        range: IpaRange,
        object: ObjectId,
        first: PageIndex,
        prot: Prot,
        share: Share,
        held: &mut Held<'_, OUTER>,
    ) -> Result<(), VmError> {
        let done = self.try_insert(map, range, object, first, prot, share, held);
        if let Err((_, object)) = done {
            self.release(object, held);
        }
        done.map_err(|(error, _)| error)
    }

    #[expect(clippy::too_many_arguments, reason = "as above")]
    fn try_insert<const OUTER: u8>(
        &self,
        map: &Arc<Map<M>>,
        range: IpaRange,
        mut object: ObjectId,
        mut first: PageIndex,
        prot: Prot,
        share: Share,
        held: &mut Held<'_, OUTER>,
    ) -> Result<(), (VmError, ObjectId)> {
        let fail = |error, object| Err((error, object));
        let Ok(pages) = u32::try_from(range.pages()) else { return fail(VmError::Range, object) };
        if pages == 0 {
            return fail(VmError::Range, object);
        }
        if let Err(error) = map.check_reach(range.end()) {
            return fail(error, object);
        }
        let (size, pager) = {
            let (state, _held) = self.objects.get(object).read(held);
            assert_eq!(state.id(), object, "{object:?} is gone");
            (state.pages, state.pager)
        };
        let device = matches!(pager, Pager::Device(_));
        if device && share == Share::Copy {
            return fail(VmError::Device, object);
        }
        let window = first.number()..first.number().saturating_add(pages);
        if share == Share::Copy && self.is_written_elsewhere(object, None, window, held) {
            let copy = self.copy_object(object, held).map_err(|error| (error, object))?;
            self.unreference(object, held);
            object = copy;
        }
        let fits = first.checked_add(pages).is_some_and(|end| end.number() <= size);
        let mut needs_copy = match share {
            Share::Copy => true,
            Share::Shared if !fits => return fail(VmError::Range, object),
            Share::Shared if matches!(pager, Pager::Image(_)) && prot.allows(Prot::WRITE) => {
                return fail(VmError::ReadOnly, object);
            }
            Share::Shared => false,
        };
        if !fits {
            // The part behind the end needs somewhere to be: the private object is made at once.
            let limit = size.saturating_sub(first.number()).min(pages);
            let shadow = (limit > 0).then_some(Shadow { object, offset: first, limit });
            let private = match self.make_object(pages, Pager::None, shadow, held) {
                Ok(private) => private,
                Err(error) => return fail(error, object),
            };
            if shadow.is_none() {
                self.unreference(object, held);
            }
            (object, first, needs_copy) = (private, PageIndex::new(0), false);
            self.stats.count(Event::ShadowMade);
        }
        let (mut entries, mut held) = map.entries.write(held);
        let Some(place) = entries.gap(range) else { return fail(VmError::Overlap, object) };
        let before = place.checked_sub(1).and_then(|before| entries.list.get_mut(before));
        if let Some(before) = before.filter(|_| !needs_copy && first == PageIndex::new(0)) {
            match self.coalesce(before, range, object, prot, &mut held) {
                Ok(true) => {
                    self.unreference(object, &mut held);
                    return Ok(());
                }
                Ok(false) => {}
                Err(error) => return fail(error, object),
            }
        }
        if entries.list.len() >= MAX_ENTRIES {
            return fail(VmError::Limit("map entries"), object);
        }
        if entries.list.try_reserve(1).is_err() {
            return fail(VmError::NoMemory, object);
        }
        let start = range.start();
        let charge = if device { 0 } else { Entry::charge_of(range, prot) };
        if let Err(error) = self.commit(charge, &mut held) {
            return fail(error, object);
        }
        if !needs_copy {
            self.align(object, first, start, &mut held);
        }
        let attached = {
            let (mut state, mut held) = self.objects.get(object).write(&mut held);
            // What is pushed to it from now on, a look through this mapping must not miss.
            state.shadowed |= state.role != Role::Plain;
            let (mut links, _held) = self.links.write(&mut held);
            let writes = prot.allows(Prot::WRITE) && !needs_copy;
            links.attach(Arc::downgrade(map), object.number(), start, first, pages, writes)
        };
        let link = match attached {
            Ok(link) => link,
            Err(error) => {
                self.uncommit(charge, &mut held);
                return fail(error, object);
            }
        };
        entries
            .list
            .insert(place, Entry { range, object, first, prot, most: prot, needs_copy, device, link });
        Ok(())
    }

    /// Gives up what entries hold; nothing maps them any more.
    pub(super) fn drop_entries<const OUTER: u8>(&self, list: Vec<Entry>, held: &mut Held<'_, OUTER>) {
        for entry in list {
            self.drop_entry(entry, held);
        }
        self.work(PROMPT, held);
    }

    pub(super) fn drop_entry<const OUTER: u8>(&self, entry: Entry, held: &mut Held<'_, OUTER>) {
        self.links.write(held).0.detach(entry.link);
        self.unreference(entry.object, held);
    }

    /// Resolves an entry's `needs_copy` before the first write: a shadow, unless nobody else can reach
    /// the memory (D16).
    pub(crate) fn resolve_copy<const OUTER: u8>(
        &self,
        map: &Map<M>,
        at: Ipa,
        held: &mut Held<'_, OUTER>,
    ) -> Result<(), VmError> {
        let (mut entries, mut held) = map.entries.write(held);
        let Some(entry) = entries.find_mut(at).filter(|entry| entry.needs_copy) else { return Ok(()) };
        self.shadow_entry(entry, &mut held)
    }

    /// Has an object whose page `first` a map has at an address keep its pages as the map has them, 2 MiB for 2 MiB: what
    /// a guest discards as one is one then. Nothing is done to an object that has pages already.
    fn align<const OUTER: u8>(
        &self,
        object: ObjectId,
        first: PageIndex,
        at: Ipa,
        held: &mut Held<'_, OUTER>,
    ) {
        let place = at.pages_above(at.chunk()).unwrap_or_default().number();
        let (mut state, _held) = self.objects.get(object).write(held);
        if state.pager == Pager::None && state.slots.counts().is_empty() {
            state.slots.begin_at(place.wrapping_sub(first.number()) % CHUNK_PAGES);
            state.trails.clear(); // they go by places
        }
    }

    pub(super) fn shadow_entry(&self, entry: &mut Entry, held: &mut Held<'_, MAP>) -> Result<(), VmError> {
        let sole = {
            let (state, _held) = self.objects.get(entry.object).read(held);
            // Nobody writes to a copy-object (D28).
            let own = state.is_sole_anonymous() && state.role != Role::Copy;
            own && !self.has(Defect::ShadowOverSole)
        };
        if sole {
            self.stats.count(Event::ShadowSpared);
        } else {
            let pages = u32::try_from(entry.range.pages()).map_err(|_| VmError::Range)?;
            let shadow = Shadow { object: entry.object, offset: entry.first, limit: pages };
            let object = self.make_object_for(Some(entry.link), pages, Pager::None, Some(shadow), held)?;
            let first = PageIndex::new(0);
            self.align(object, first, entry.range.start(), held);
            (entry.object, entry.first) = (object, first);
            self.stats.count(Event::ShadowMade);
        }
        self.links.write(held).0.set_writes(entry.link, entry.most.allows(Prot::WRITE));
        entry.needs_copy = false;
        Ok(())
    }
}
