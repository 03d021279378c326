//! Objects: what a guest's memory is made of (`vm_object.c`).
//!
//! An object is pages, a pager perhaps, and perhaps an object that it shadows. References are counted: a
//! map entry and a shadow are one each, and so is whoever was handed an id by `image` or `anonymous` and
//! has not yet put it in a map. This file says what an object is; `table` keeps them all, `shadow` makes
//! and ends them, `collapse` shortens chains, `prune` frees what everybody hides, `way` says where two views of a page part, `work` does by and by what is not done at once.
//!
//! Called by `map`, `fault`, `pager`. Calls `index`, `page`, `rmap`. Locks: the object, a shadow before
//! what it shadows; then links, then the registry.
//!
//! # Invariants
//! O1. A live object's `refs` is at least its map entries and shadows together.
//! O2. What an object shadows is live, and was made before it.
//! O3. At most one live object has a given pager identity (D27).
//! O4. `paging` is the transfers in flight for it; an object with any is not freed.
//! O5. No object has a page at or behind its end.
//! O6. A page that an object's newest copy sees in it and has not received is mapped nowhere writable.

mod ahead;
mod cache;
mod collapse;
mod copy;
pub mod index;
mod pages;
mod prune;
mod shadow;
mod slots;
mod table;
mod trail;
mod way;
mod work;

pub(crate) use ahead::Ahead;
pub(crate) use cache::Put;
pub use copy::Role;
pub(crate) use pages::Kept;
pub use slots::Slots;
pub use table::{Object, Objects};
pub(crate) use trail::Hop;
use trail::Trails;

use crate::addr::{PageIndex, Pfn};
use crate::store::{Direction, StoreId};
use index::Slot;

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

    /// As one number.
    pub(crate) const fn encode(self) -> u64 {
        (self.generation as u64) << 32 | self.index as u64
    }

    /// What was encoded.
    #[expect(clippy::cast_possible_truncation, reason = "each half for itself")]
    pub(crate) const fn decode(number: u64) -> Self {
        Self { index: number as u32, generation: (number >> 32) as u32 }
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
    /// How many of our pages shadow anything; behind them there is nothing.
    pub limit: u32,
}

impl Shadow {
    /// What an object that shadows us would shadow without us, if we shadow `below`.
    pub(crate) fn through(self, below: Self) -> Option<Self> {
        let offset = below.offset.checked_add(self.offset.number())?;
        let limit = self.limit.min(below.limit.saturating_sub(self.offset.number()));
        (limit > 0).then_some(Self { object: below.object, offset, limit })
    }
}

/// Where an object's absent pages come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pager {
    /// Nowhere: they are zero, or below.
    None,
    /// A store that is only read.
    Image(StoreId),
    /// A store that sees every change, when the object is cleaned.
    Disk(StoreId),
    /// Frames from this one on that are not the VM's: a device's registers, or memory that EL2 keeps for itself. No slot
    /// ever says anything of them.
    Device(Pfn),
}

impl Pager {
    /// Its store: the identity of the object.
    pub const fn store(self) -> Option<StoreId> {
        match self {
            Self::None | Self::Device(_) => None,
            Self::Image(store) | Self::Disk(store) => Some(store),
        }
    }

    /// The frame of a page that is a device's.
    pub fn device_frame(self, page: PageIndex) -> Option<Pfn> {
        match self {
            Self::Device(first) => first.checked_add(page.number()),
            Self::None | Self::Image(_) | Self::Disk(_) => None,
        }
    }
}

/// Whether an object lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Life {
    /// It does not; its place waits for the next.
    Vacant,
    /// It does.
    Live,
    /// Nobody refers to it; its pages go when no transfer has them, some at a time.
    Dying,
}

/// No page: nothing stops a bypass that was looked for.
const NOWHERE: u32 = u32::MAX;

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
    pub slots: Slots,
    /// What lies below.
    pub shadow: Option<Shadow>,
    /// Where absent pages come from.
    pub pager: Pager,
    /// Transfers in flight.
    pub paging: u32,
    /// Those of them that write, and the pages that leave for swap.
    pub(crate) puts: u32,
    pub(crate) leaving: u32,
    /// The page that we would have to have for the object below to be bypassed; all before it are hidden
    /// or absent there.
    blocked_at: u32,
    /// What `gains` of the object below was when that was found out.
    blocked_since: u32,
    /// It was found out of one that holds all: every page before it is here.
    blocked_all: bool,
    /// Something has shadowed it; or somebody may look at it through a map while it receives pages.
    pub(crate) shadowed: bool,
    /// How far it is read ahead in swap.
    pub(crate) ahead: Ahead,
    /// Shortcuts down the chain.
    pub(crate) trails: Trails,
    /// Counts the pages that this object came to have.
    gains: u32,
    /// The newest asymmetric copy of this object, perhaps a stale name.
    pub copy: Option<ObjectId>,
    /// Whether this object receives what changes in the one that it shadows.
    pub role: Role,
    /// Pages that its store did not take: they stayed.
    pub(crate) unwritten: u32,
    /// Transfers of several pages that it did not take: each is to go alone.
    pub(crate) retries: u32,
    /// In the cache: pages before this one were moved to the inactive queue.
    deactivated: u32,
    /// Without references: what changed before this page is on its way to the store, or was.
    pub(crate) sent: u32,
}

impl State {
    const fn vacant(index: u32) -> Self {
        Self {
            id: ObjectId { index, generation: 0 },
            life: Life::Vacant,
            refs: 0,
            pages: 0,
            slots: Slots::new(index),
            shadow: None,
            pager: Pager::None,
            paging: 0,
            puts: 0,
            leaving: 0,
            blocked_at: NOWHERE,
            blocked_since: 0,
            blocked_all: false,
            shadowed: false,
            ahead: Ahead::new(),
            trails: Trails::new(),
            gains: 0,
            copy: None,
            role: Role::Plain,
            unwritten: 0,
            retries: 0,
            deactivated: 0,
            sent: 0,
        }
    }

    /// Its name.
    pub const fn id(&self) -> ObjectId {
        self.id
    }

    /// A transfer has begun, with which so many pages leave for swap.
    pub(crate) fn begins(&mut self, way: Direction, leaving: u32) {
        self.paging += 1;
        self.puts += u32::from(way == Direction::Out);
        self.leaving += leaving;
    }

    /// It is over.
    pub(crate) fn ends(&mut self, way: Direction, leaving: u32) {
        self.paging -= 1;
        self.puts -= u32::from(way == Direction::Out);
        self.leaving -= leaving;
    }

    /// True for anonymous memory that nothing but one reference can reach: only then may its pages be
    /// written in place or taken away by who holds that reference (D16, D17).
    pub fn is_sole_anonymous(&self) -> bool {
        self.refs == 1 && self.pager == Pager::None && self.life == Life::Live
    }

    /// Where page `index` of this object is in what it shadows, if it shadows anything there.
    #[inline]
    pub fn below(&self, index: PageIndex) -> Option<(ObjectId, PageIndex)> {
        let shadow = self.shadow.filter(|shadow| index.number() < shadow.limit)?;
        Some((shadow.object, shadow.offset.checked_add(index.number())?))
    }

    /// A slot that was present becomes absent; what it owned is elsewhere or freed. True if what holds up a bypass may
    /// be another page now.
    pub(crate) fn lose(&mut self, page: PageIndex) -> bool {
        let lost = self.slots.set(page, Slot::Absent);
        debug_assert!(lost.is_ok(), "a slot that is present can be set");
        // The search for what stops a bypass has to begin again where something is missing now.
        let earlier = self.blocked_at != NOWHERE && page.number() < self.blocked_at;
        if earlier {
            self.blocked_at = page.number();
        }
        earlier
    }
}
