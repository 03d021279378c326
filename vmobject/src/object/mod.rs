//! Objects: what a guest's memory is made of (`vm_object.c`).
//!
//! An object is pages, a pager perhaps, and perhaps an object that it shadows. Objects are named by
//! [`ObjectId`] and live in blocks that never move, so a name becomes an object by two loads; the
//! generation tells a stale name. References are counted: a map entry and a shadow are one each, and so
//! is whoever was handed an id by `image` or `anonymous` and has not yet put it in a map.
//!
//! Called by `map`, `fault`, `pager`. Calls `index`, `page`. Locks: the object, then the registry.
//!
//! # Invariants
//! O1. A live object's `refs` is at least its map entries and shadows together.
//! O2. What an object shadows is live, and was made before it.
//! O3. At most one live object has a given pager identity (D27).
//! O4. `paging` is the transfers in flight for it; an object with any is not freed.

pub mod index;

use alloc::boxed::Box;
use alloc::vec::Vec;
use spin::Once;

use crate::VmError;
use crate::addr::PageIndex;
use crate::limits::{MAX_OBJECTS, OBJECT_BLOCK};
use crate::lock::{Held, OBJECT, REGISTRY, Ranked, RankedRw};
use crate::page::Frames;
use crate::store::{StoreError, StoreId};
use index::{Index, Slot};

/// Names an object: where it is, and which of those that were there.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectId {
    index: u32,
    generation: u32,
}

impl ObjectId {
    /// Its number among the objects that live now.
    pub const fn number(self) -> u32 {
        self.index
    }
}

impl core::fmt::Debug for ObjectId {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "object:{}.{}", self.index, self.generation)
    }
}

/// What an object shadows, and from where on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shadow {
    /// The object below.
    pub object: ObjectId,
    /// Which of its pages our first page shadows.
    pub offset: PageIndex,
}

/// Where an object's absent pages come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pager {
    /// Nowhere: they are zero, or below.
    None,
    /// A store that is only read.
    Image(StoreId),
}

/// Whether an object lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Life {
    /// It does not; its place waits for the next.
    Vacant,
    /// It does.
    Live,
    /// Nobody refers to it; transfers still do.
    Dying,
}

/// An object's state. Guarded by its object lock, all of it.
pub struct State {
    id: ObjectId,
    /// Whether it lives.
    pub life: Life,
    /// How many refer to it.
    pub refs: u32,
    /// Its size.
    pub pages: u32,
    /// Where each page is.
    pub index: Index,
    /// What lies below.
    pub shadow: Option<Shadow>,
    /// Where absent pages come from.
    pub pager: Pager,
    /// Transfers in flight.
    pub paging: u32,
    /// A page whose last transfer failed, until somebody was told.
    pub failed: Option<(PageIndex, StoreError)>,
}

impl State {
    const fn vacant(index: u32) -> Self {
        Self {
            id: ObjectId { index, generation: 0 },
            life: Life::Vacant,
            refs: 0,
            pages: 0,
            index: Index::new(),
            shadow: None,
            pager: Pager::None,
            paging: 0,
            failed: None,
        }
    }

    /// Its name.
    pub const fn id(&self) -> ObjectId {
        self.id
    }

    /// True for anonymous memory that nothing but one reference can reach: only then may its pages be
    /// written in place or taken away by who holds that reference (D16, D17).
    pub fn is_sole_anonymous(&self) -> bool {
        self.refs == 1 && self.pager == Pager::None
    }

    /// Where page `index` of this object is in what it shadows, if that reaches so far as a number.
    pub fn below(&self, index: PageIndex) -> Option<(ObjectId, PageIndex)> {
        let shadow = self.shadow?;
        Some((shadow.object, shadow.offset.checked_add(index.number())?))
    }
}

/// One object: its state behind its lock.
pub type Object = RankedRw<OBJECT, State>;

struct Registry {
    /// Places of objects that died.
    vacant: Vec<u32>,
    /// Places used so far.
    used: u32,
    /// Objects with a pager identity.
    images: Vec<(StoreId, ObjectId)>,
    live: u32,
}

/// All objects.
pub struct Objects {
    blocks: Box<[Once<Box<[Object]>>]>,
    registry: Ranked<REGISTRY, Registry>,
}

impl Objects {
    /// None yet.
    pub fn new() -> Result<Self, VmError> {
        let count = (MAX_OBJECTS / OBJECT_BLOCK) as usize;
        let mut blocks = Vec::new();
        blocks.try_reserve_exact(count).map_err(|_| VmError::NoMemory)?;
        blocks.resize_with(count, Once::new);
        let registry = Registry { vacant: Vec::new(), used: 0, images: Vec::new(), live: 0 };
        Ok(Self { blocks: blocks.into_boxed_slice(), registry: Ranked::new(registry) })
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

    /// Makes an object with one reference.
    pub fn create<const OUTER: u8>(
        &self,
        pages: u32,
        pager: Pager,
        shadow: Option<Shadow>,
        held: &mut Held<'_, OUTER>,
    ) -> Result<ObjectId, VmError> {
        let number = self.take_place(held)?;
        let Some(object) = self.at(number) else { return Err(VmError::NoMemory) };
        let (mut state, _held) = object.write(held);
        debug_assert!(state.life == Life::Vacant && state.index.counts().present() == 0);
        state.life = Life::Live;
        state.refs = 1;
        state.pages = pages;
        state.pager = pager;
        state.shadow = shadow;
        Ok(state.id)
    }

    fn take_place<const OUTER: u8>(&self, held: &mut Held<'_, OUTER>) -> Result<u32, VmError> {
        let (mut registry, _held) = self.registry.lock(held);
        if let Some(number) = registry.vacant.pop() {
            registry.live += 1;
            return Ok(number);
        }
        let number = registry.used;
        let block = self.blocks.get((number / OBJECT_BLOCK) as usize).ok_or(VmError::Limit("objects"))?;
        // One place in `vacant` for each place in use: giving one back must not need memory.
        let room = (number as usize + 1).saturating_sub(registry.vacant.len());
        registry.vacant.try_reserve(room).map_err(|_| VmError::NoMemory)?;
        block.try_call_once(|| {
            let mut objects = Vec::new();
            objects.try_reserve_exact(OBJECT_BLOCK as usize).map_err(|_| VmError::NoMemory)?;
            objects.extend((number..number + OBJECT_BLOCK).map(|n| Object::new(State::vacant(n))));
            Ok::<_, VmError>(objects.into_boxed_slice())
        })?;
        registry.used = number + 1;
        registry.live += 1;
        Ok(number)
    }

    /// The object of a store, with one more reference; made if there is none.
    pub fn image<const OUTER: u8>(
        &self,
        store: StoreId,
        pages: u32,
        frames: &Frames,
        held: &mut Held<'_, OUTER>,
    ) -> Result<ObjectId, VmError> {
        loop {
            if let Some(id) = self.find_image(store, held)? {
                let (mut state, _held) = self.get(id).write(held);
                if state.id == id && state.life == Life::Live {
                    state.refs = state.refs.checked_add(1).ok_or(VmError::Limit("references"))?;
                    return Ok(id);
                }
                // It died between the two locks, and whoever ended it is about to forget its name.
                continue;
            }
            let id = self.create(pages, Pager::Image(store), None, held)?;
            if self.register(store, id, held) {
                return Ok(id);
            }
            self.release(id, frames, held); // somebody was faster: theirs it is
        }
    }

    fn find_image<const OUTER: u8>(
        &self,
        store: StoreId,
        held: &mut Held<'_, OUTER>,
    ) -> Result<Option<ObjectId>, VmError> {
        let (mut registry, _held) = self.registry.lock(held);
        registry.images.try_reserve(1).map_err(|_| VmError::NoMemory)?;
        Ok(registry.images.iter().find(|(known, _)| *known == store).map(|&(_, id)| id))
    }

    /// Enters an identity; false if the store has an object already (D27).
    fn register<const OUTER: u8>(&self, store: StoreId, id: ObjectId, held: &mut Held<'_, OUTER>) -> bool {
        let (mut registry, _held) = self.registry.lock(held);
        let new = !registry.images.iter().any(|(known, _)| *known == store);
        if new {
            registry.images.push((store, id));
        }
        new
    }

    /// One more reference to a live object.
    pub fn reference<const OUTER: u8>(
        &self,
        id: ObjectId,
        held: &mut Held<'_, OUTER>,
    ) -> Result<(), VmError> {
        let (mut state, _held) = self.get(id).write(held);
        assert!(state.id == id && state.life == Life::Live, "{id:?} is gone");
        state.refs = state.refs.checked_add(1).ok_or(VmError::Limit("references"))?;
        Ok(())
    }

    /// One reference less. The last one ends the object, and gives up its reference to what it shadows,
    /// and so on down. Nothing maps the pages of an object without references.
    pub fn release<const OUTER: u8>(&self, id: ObjectId, frames: &Frames, held: &mut Held<'_, OUTER>) {
        let mut next = Some(id);
        while let Some(id) = next.take() {
            let (mut state, mut held) = self.get(id).write(held);
            assert!(state.id == id && state.life == Life::Live, "{id:?} is gone");
            state.refs -= 1;
            if state.refs == 0 {
                next = self.terminate(&mut state, frames, &mut held);
            }
        }
    }

    /// Ends an object without references: at once, or when its last transfer completes. The object whose
    /// reference it gives up is left to the caller.
    pub(crate) fn terminate(
        &self,
        state: &mut State,
        frames: &Frames,
        held: &mut Held<'_, OBJECT>,
    ) -> Option<ObjectId> {
        debug_assert_eq!(state.refs, 0);
        if let Pager::Image(store) = state.pager {
            let (mut registry, _held) = self.registry.lock(held);
            let id = state.id;
            registry.images.retain(|&(known, of)| (known, of) != (store, id));
        }
        if state.paging > 0 {
            state.life = Life::Dying;
            return None;
        }
        for (_, slot) in core::mem::take(&mut state.index).iter() {
            match slot {
                Slot::Resident(frame) => frames.free(frame, held),
                Slot::Absent | Slot::Zero => {}
                Slot::Swapped(_) => unreachable!("nothing writes to a swap store yet"),
            }
        }
        let below = state.shadow.take().map(|shadow| shadow.object);
        state.life = Life::Vacant;
        state.pager = Pager::None;
        state.failed = None;
        let index = state.id.index;
        let (mut registry, _held) = self.registry.lock(held);
        registry.live -= 1;
        // A name whose generation would repeat is never given again.
        if let Some(generation) = state.id.generation.checked_add(1) {
            state.id.generation = generation;
            registry.vacant.push(index);
        }
        below
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
