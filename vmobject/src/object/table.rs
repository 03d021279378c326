//! The table of all objects: places that never move, names, identities, and the list of chores.
//!
//! A name becomes an object by two loads, without a lock; the generation, compared under the object's
//! lock, tells a stale name. What must not fail later reserves its memory here when an object is made.
//! Called by `shadow` and `work`, and by whoever has a name.

use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::vec::Vec;
use core::ops::Range;
use core::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed};
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64};
use spin::Once;

use super::index::Slot;
use super::{ObjectId, State};
use crate::VmError;
use crate::addr::PageIndex;
use crate::limits::{MAX_COPIED, MAX_OBJECTS, MAX_TRAILS, OBJECT_BLOCK};
use crate::lock::{Descent, Held, OBJECT, REGISTRY, Ranked, RankedRw, Reading, Writing};
use crate::store::StoreId;

/// Where a look for hidden pages goes on; `None` is at the beginning.
pub(super) type Resume = Option<PageIndex>;

/// No look for hidden pages is asked for.
const IDLE: u64 = u64::MAX;
/// One is, from the beginning.
const AFRESH: u64 = u64::MAX - 1;
/// No shadow of an object is to be asked.
const NONE: u32 = u32::MAX;

/// One place for an object: its state behind its lock.
pub struct Object {
    lock: RankedRw<OBJECT, State>,
    /// It is on the list of chores.
    queued: AtomicBool,
    /// A referrer went: perhaps all that are left hide something. [`IDLE`], [`AFRESH`], or how far the look is.
    prune: AtomicU64,
    /// The shadow of it that is to be asked next, because something that held it up is gone; [`NONE`] is.
    asks: AtomicU32,
    /// The object that has the slots which frames know under this place's number. Changes only while the
    /// slots are exchanged, with both objects locked.
    home: AtomicU32,
}

impl Object {
    /// Locks for reading.
    #[inline]
    pub fn read<'h, const OUTER: u8>(
        &'h self,
        held: &'h mut Held<'_, OUTER>,
    ) -> (Reading<'h, State>, Held<'h, OBJECT>) {
        self.lock.read(held)
    }

    /// Locks for writing.
    #[inline]
    pub fn write<'h, const OUTER: u8>(
        &'h self,
        held: &'h mut Held<'_, OUTER>,
    ) -> (Writing<'h, State>, Held<'h, OBJECT>) {
        self.lock.write(held)
    }

    /// Locks what the caller's locked object shadows.
    pub(crate) fn write_below<'h>(
        &'h self,
        held: &'h mut Held<'_, OBJECT>,
    ) -> (Writing<'h, State>, Held<'h, OBJECT>) {
        self.lock.write_below(held)
    }

    /// Looks at an object beside the caller's, unless somebody has it.
    pub(crate) fn try_read_beside<'h>(
        &'h self,
        held: &'h mut Held<'_, OBJECT>,
    ) -> Option<Reading<'h, State>> {
        self.lock.try_read_beside(held)
    }

    /// Starts down a chain here.
    pub(crate) fn descend<'h, const OUTER: u8>(
        &'h self,
        held: &'h mut Held<'_, OUTER>,
    ) -> Descent<'h, OBJECT, State> {
        self.lock.descend(held)
    }

    /// The same here, if this can be had while it is `still` what it was: it may be any object by now, above the
    /// caller's.
    pub(crate) fn descend_while<'h, const OUTER: u8>(
        &'h self,
        still: impl Fn() -> bool,
        held: &'h mut Held<'_, OUTER>,
    ) -> Option<Descent<'h, OBJECT, State>> {
        self.lock.descend_while(still, held)
    }

    /// Goes on down a chain to here, if this can be had while it is `still` what it was.
    pub(crate) fn hop_down<'h>(
        &'h self,
        chain: &mut Descent<'h, OBJECT, State>,
        still: impl Fn() -> bool,
    ) -> bool {
        chain.step_while(&self.lock, still)
    }

    /// Goes on down a chain to here.
    pub(crate) fn step_down<'h>(&'h self, chain: &mut Descent<'h, OBJECT, State>) {
        chain.step(&self.lock);
    }
}

struct Registry {
    /// Places of objects that died.
    vacant: Vec<u32>,
    /// Places used so far.
    used: u32,
    live: u32,
    /// Objects with a pager identity.
    images: Vec<(StoreId, ObjectId)>,
    /// Those of them that nobody refers to and that are kept, the one that is longest unused first.
    cache: VecDeque<ObjectId>,
    /// Objects with something to do.
    chores: VecDeque<u32>,
    /// Pages that were copied from an object, and so may be hidden there now.
    copied: VecDeque<(u32, PageIndex)>,
    /// The trails that there may be, by object and chunk, the one that was laid first first.
    trails: VecDeque<(u32, u32)>,
}

/// All objects.
pub struct Objects {
    blocks: Box<[Once<Box<[Object; OBJECT_BLOCK as usize]>>]>,
    /// See [`Self::changed`].
    version: AtomicU64,
    /// Frames that the objects in the cache may have together.
    pub(super) cache_limit: AtomicU32,
    /// CPUs that may have taken a chore off its list and not yet done it.
    at_work: AtomicU32,
    registry: Ranked<REGISTRY, Registry>,
}

/// A CPU that does chores, until it is dropped.
pub(crate) struct AtWork<'a>(&'a AtomicU32);

impl Drop for AtWork<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, AcqRel);
    }
}

impl Objects {
    /// None yet.
    pub fn new() -> Result<Self, VmError> {
        let count = (MAX_OBJECTS / OBJECT_BLOCK) as usize;
        let mut blocks = Vec::new();
        blocks.try_reserve_exact(count).map_err(|_| VmError::NoMemory)?;
        blocks.resize_with(count, Once::new);
        let (vacant, images) = (Vec::new(), Vec::new());
        let (cache, chores) = (VecDeque::new(), VecDeque::new());
        let mut copied = VecDeque::new();
        copied.try_reserve_exact(MAX_COPIED).map_err(|_| VmError::NoMemory)?;
        let mut trails = VecDeque::new();
        trails.try_reserve_exact(MAX_TRAILS).map_err(|_| VmError::NoMemory)?;
        let registry = Registry { vacant, used: 0, live: 0, images, cache, chores, copied, trails };
        Ok(Self {
            blocks: blocks.into_boxed_slice(),
            version: AtomicU64::new(0),
            cache_limit: AtomicU32::new(0),
            at_work: AtomicU32::new(0),
            registry: Ranked::new(registry),
        })
    }

    /// The object at a place that has been used. Whoever has an id has had an object there.
    #[inline]
    pub fn at(&self, number: u32) -> Option<&Object> {
        self.blocks.get((number / OBJECT_BLOCK) as usize)?.get()?.get((number % OBJECT_BLOCK) as usize)
    }

    /// The object that an id names. The caller's reference keeps it alive, or else the caller compares
    /// the id under the lock.
    #[inline]
    pub fn get(&self, id: ObjectId) -> &Object {
        match self.at(id.index) {
            Some(object) => object,
            None => unreachable!("{id:?} was never made"),
        }
    }

    /// The object whose slots frames know under a storage number.
    pub fn of_storage(&self, storage: u32) -> Option<&Object> {
        self.at(self.at(storage)?.home.load(Relaxed))
    }

    /// Sets a slot that was absent or is about to hold something else: the one way in which an object
    /// gains a page. Fails only for want of memory.
    #[inline]
    pub(crate) fn gain<const OUTER: u8>(
        &self,
        state: &mut State,
        page: PageIndex,
        slot: Slot,
        held: &mut Held<'_, OUTER>,
    ) -> Result<Slot, VmError> {
        let before = match state.slots.replace(page, slot) {
            Some(before) => before,
            None => state.slots.set(page, slot)?,
        };
        if before == Slot::Absent && state.shadowed {
            self.changed();
        }
        self.note_gain(state, page.number()..page.number().saturating_add(1), held);
        Ok(before)
    }

    /// An object has come to have pages of a range.
    pub(super) fn gained<const OUTER: u8>(
        &self,
        state: &mut State,
        range: Range<u32>,
        held: &mut Held<'_, OUTER>,
    ) {
        if state.shadowed {
            self.changed();
        }
        self.note_gain(state, range, held);
    }

    /// Something came to be, or to lie elsewhere, in an object that others shadow: no trail is valid any more.
    #[cold]
    pub(crate) fn changed(&self) {
        crate::point::here();
        self.version.fetch_add(1, AcqRel);
    }

    /// Changes when trails become invalid.
    #[inline]
    pub(crate) fn version(&self) -> u64 {
        crate::point::here();
        self.version.load(Acquire)
    }

    #[inline]
    fn note_gain<const OUTER: u8>(&self, state: &mut State, range: Range<u32>, held: &mut Held<'_, OUTER>) {
        state.gains = state.gains.wrapping_add(1);
        if range.contains(&state.blocked_at) {
            self.chore(state.id.index, held);
        }
    }

    /// Exchanges the slots of two objects, both locked for writing.
    pub(super) fn exchange(&self, state: &mut State, other: &mut State, offset: PageIndex) -> bool {
        if !state.slots.exchange(&mut other.slots, offset) {
            return false;
        }
        self.changed();
        for one in [state, other] {
            one.gains = one.gains.wrapping_add(1);
            if let Some(object) = self.at(one.slots.storage()) {
                object.home.store(one.id.index, Relaxed);
            }
        }
        true
    }

    /// A place for a new object, and memory for all that must not fail later.
    pub(super) fn take_place<const OUTER: u8>(&self, held: &mut Held<'_, OUTER>) -> Result<u32, VmError> {
        let (mut registry, _held) = self.registry.lock(held);
        if let Some(number) = registry.vacant.pop() {
            registry.live += 1;
            return Ok(number);
        }
        let number = registry.used;
        let block = self.blocks.get((number / OBJECT_BLOCK) as usize).ok_or(VmError::Limit("objects"))?;
        // One entry for each place in use: to die, and to have something to do, must not need memory.
        let places = number as usize + 1;
        let room = places.saturating_sub(registry.vacant.len());
        registry.vacant.try_reserve(room).map_err(|_| VmError::NoMemory)?;
        let room = places.saturating_sub(registry.chores.len());
        registry.chores.try_reserve(room).map_err(|_| VmError::NoMemory)?;
        block.try_call_once(|| {
            let mut objects = Vec::new();
            objects.try_reserve_exact(OBJECT_BLOCK as usize).map_err(|_| VmError::NoMemory)?;
            objects.extend((number..number + OBJECT_BLOCK).map(|n| Object {
                lock: RankedRw::new(State::vacant(n)),
                queued: AtomicBool::new(false),
                prune: AtomicU64::new(IDLE),
                asks: AtomicU32::new(NONE),
                home: AtomicU32::new(n),
            }));
            objects.into_boxed_slice().try_into().map_err(|_| VmError::NoMemory)
        })?;
        registry.used = number + 1;
        registry.live += 1;
        Ok(number)
    }

    /// Gives a place back.
    pub(super) fn vacate<const OUTER: u8>(&self, number: u32, reuse: bool, held: &mut Held<'_, OUTER>) {
        let (mut registry, _held) = self.registry.lock(held);
        registry.live -= 1;
        if reuse {
            registry.vacant.push(number);
        }
    }

    /// Puts an object on the list of chores, once.
    pub(crate) fn chore<const OUTER: u8>(&self, number: u32, held: &mut Held<'_, OUTER>) {
        let Some(object) = self.at(number) else { return };
        // Before it is asked what there is to do, what there is was noted: see `next_chore`.
        if !object.queued.swap(true, AcqRel) {
            self.registry.lock(held).0.chores.push_back(number);
        }
    }

    /// Takes the next one off the list.
    pub(super) fn next_chore<const OUTER: u8>(&self, held: &mut Held<'_, OUTER>) -> Option<u32> {
        let number = self.registry.lock(held).0.chores.pop_front()?;
        if let Some(object) = self.at(number) {
            object.queued.swap(false, AcqRel);
        }
        Some(number)
    }

    /// How many are on the list, and how many copied pages are to be looked at.
    pub(crate) fn chores<const OUTER: u8>(&self, held: &mut Held<'_, OUTER>) -> (usize, usize) {
        let (registry, _held) = self.registry.lock(held);
        (registry.chores.len(), registry.copied.len())
    }

    /// To be held by whoever takes something off a list of chores, until it is done or on a list again.
    pub(crate) fn begin_work(&self) -> AtWork<'_> {
        self.at_work.fetch_add(1, AcqRel);
        AtWork(&self.at_work)
    }

    /// True if somebody has begun. To be asked under the lock of a list: of what is not on it then, all is done unless
    /// somebody is at work.
    pub(crate) fn is_at_work(&self) -> bool {
        self.at_work.load(Acquire) > 0
    }

    /// True if there are no chores, and nobody has one in hand.
    pub(crate) fn is_at_rest<const OUTER: u8>(&self, held: &mut Held<'_, OUTER>) -> bool {
        let (registry, _held) = self.registry.lock(held);
        registry.chores.is_empty() && registry.copied.is_empty() && !self.is_at_work()
    }

    /// Has an object looked at for pages that nobody sees any more.
    pub(crate) fn ask_prune<const OUTER: u8>(&self, number: u32, held: &mut Held<'_, OUTER>) {
        if let Some(object) = self.at(number) {
            object.prune.store(AFRESH, Relaxed);
            self.chore(number, held);
        }
    }

    /// Has that look go on at a page. It begins afresh if it was asked for meanwhile.
    pub(super) fn ask_prune_from<const OUTER: u8>(
        &self,
        number: u32,
        page: PageIndex,
        held: &mut Held<'_, OUTER>,
    ) {
        if let Some(object) = self.at(number) {
            // On failure it is asked for afresh already.
            let _ = object.prune.compare_exchange(IDLE, page.number().into(), Relaxed, Relaxed);
            self.chore(number, held);
        }
    }

    /// Whether a look was asked for since the last call, and where it goes on.
    pub(super) fn take_prune(&self, number: u32) -> Option<Resume> {
        match self.at(number)?.prune.swap(IDLE, Relaxed) {
            IDLE => None,
            place => Some(u32::try_from(place).ok().map(PageIndex::new)),
        }
    }

    /// Has the shadows of an object asked, from this one on.
    pub(super) fn ask_from<const OUTER: u8>(&self, number: u32, child: u32, held: &mut Held<'_, OUTER>) {
        if let Some(object) = self.at(number) {
            object.asks.store(child, Relaxed);
            self.chore(number, held);
        }
    }

    /// Which of the shadows of an object is to be asked next, if any is.
    pub(super) fn take_asks(&self, number: u32) -> Option<u32> {
        let child = self.at(number)?.asks.swap(NONE, Relaxed);
        (child != NONE).then_some(child)
    }

    /// Remembers that a page was copied away from an object; if there are too many to remember, the whole
    /// object is looked at.
    pub(crate) fn note_copied<const OUTER: u8>(
        &self,
        number: u32,
        page: PageIndex,
        held: &mut Held<'_, OUTER>,
    ) {
        {
            let (mut registry, _held) = self.registry.lock(held);
            if registry.copied.len() < MAX_COPIED {
                return registry.copied.push_back((number, page));
            }
        }
        self.ask_prune(number, held);
    }

    /// Remembers that a trail was begun; the one that has to go for it.
    pub(super) fn note_trail<const OUTER: u8>(
        &self,
        number: u32,
        chunk: u32,
        held: &mut Held<'_, OUTER>,
    ) -> Option<(u32, u32)> {
        let (mut registry, _held) = self.registry.lock(held);
        if registry.trails.back() == Some(&(number, chunk)) {
            return None;
        }
        let full = registry.trails.len() >= MAX_TRAILS;
        let oldest = if full { registry.trails.pop_front() } else { None };
        registry.trails.push_back((number, chunk));
        oldest
    }

    /// The next such page.
    pub(super) fn next_copied<const OUTER: u8>(
        &self,
        held: &mut Held<'_, OUTER>,
    ) -> Option<(u32, PageIndex)> {
        self.registry.lock(held).0.copied.pop_front()
    }

    /// The object of a store, if there is one; makes room for another identity.
    pub(super) fn find_image<const OUTER: u8>(
        &self,
        store: StoreId,
        held: &mut Held<'_, OUTER>,
    ) -> Result<Option<ObjectId>, VmError> {
        let (mut registry, _held) = self.registry.lock(held);
        registry.images.try_reserve(1).map_err(|_| VmError::NoMemory)?;
        let room = (registry.images.len() + 1).saturating_sub(registry.cache.len());
        registry.cache.try_reserve(room).map_err(|_| VmError::NoMemory)?;
        Ok(registry.images.iter().find(|(known, _)| *known == store).map(|&(_, id)| id))
    }

    /// Enters an identity; false if the store has an object already (D27).
    pub(super) fn register<const OUTER: u8>(
        &self,
        store: StoreId,
        id: ObjectId,
        held: &mut Held<'_, OUTER>,
    ) -> bool {
        let (mut registry, _held) = self.registry.lock(held);
        let new = !registry.images.iter().any(|(known, _)| *known == store);
        if new {
            registry.images.push((store, id));
        }
        new
    }

    /// Puts an object in the cache, if its identity is known.
    pub(super) fn cache<const OUTER: u8>(&self, id: ObjectId, held: &mut Held<'_, OUTER>) -> bool {
        let (mut registry, _held) = self.registry.lock(held);
        let known = registry.images.iter().any(|&(_, known)| known == id);
        if known {
            registry.cache.push_back(id);
        }
        known
    }

    /// Takes an object out of the cache.
    pub(crate) fn uncache<const OUTER: u8>(&self, id: ObjectId, held: &mut Held<'_, OUTER>) {
        self.registry.lock(held).0.cache.retain(|&cached| cached != id);
    }

    /// The `nth` object of the cache.
    pub(super) fn cached<const OUTER: u8>(&self, nth: usize, held: &mut Held<'_, OUTER>) -> Option<ObjectId> {
        self.registry.lock(held).0.cache.get(nth).copied()
    }

    /// Forgets an identity.
    pub(super) fn unregister<const OUTER: u8>(
        &self,
        store: StoreId,
        id: ObjectId,
        held: &mut Held<'_, OUTER>,
    ) {
        let (mut registry, _held) = self.registry.lock(held);
        registry.images.retain(|&(known, of)| (known, of) != (store, id));
    }

    /// Places used so far: every object that lives has a number below.
    pub fn used<const OUTER: u8>(&self, held: &mut Held<'_, OUTER>) -> u32 {
        self.registry.lock(held).0.used
    }

    /// Objects that live, the dying among them.
    pub fn live<const OUTER: u8>(&self, held: &mut Held<'_, OUTER>) -> u32 {
        self.registry.lock(held).0.live
    }
}
