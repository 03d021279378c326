//! What the VM asks of the machine's translation tables.
//!
//! A [`Pmap`] is one guest's hardware map, and a cache: any entry may be dropped at any time and is
//! faulted back. `stage2` implements it for AArch64, `testing` in memory. On return from every method
//! here the TLB is part of the promise: no CPU can use what was taken away.

use crate::addr::{Ipa, IpaRange, Pfn};
use crate::prot::Prot;

/// No frame could be had for a translation table. The fault waits for memory or ends in a refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfTables;

/// What a leaf remembered of its page when it was edited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Harvest {
    /// Where the guest saw it.
    pub at: Ipa,
    /// The frame that was mapped.
    pub frame: Pfn,
    /// How many pages this is about, from these on: a block speaks for all of its own at once.
    pub pages: u32,
    /// The page was used since the last look.
    pub accessed: bool,
    /// The page was written through this leaf since the last look.
    pub dirty: bool,
}

/// Where harvested state goes: to the frame's page, under whatever lock guards it (invariant I14).
pub type Sink<'a> = &'a mut dyn FnMut(Harvest);

/// A leaf as [`Pmap::lookup`] finds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// The frame that the address translates to (inside a block: that page's own frame).
    pub frame: Pfn,
    /// What it allows now; a leaf below a parked entry allows no write.
    pub prot: Prot,
    /// True when a 2 MiB block maps it.
    pub block: bool,
}

/// What entering a leaf came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entered {
    /// It is there.
    Leaf,
    /// A part of the way there was opened, which is enough for once (I6). What was there before is there still, and no
    /// guest reaches it: the access faults again.
    Part,
}

/// One guest's hardware map.
pub trait Pmap: Send {
    /// The first address that the tables cannot translate any more. The same for ever; what is entered
    /// anywhere lies below it.
    fn reach(&self) -> Ipa;

    /// Maps one page, replacing what was there (break before make). Where that very page is mapped already,
    /// another CPU was faster or this CPU's TLB is stale, and the latter is put right.
    fn enter(&mut self, at: Ipa, frame: Pfn, prot: Prot, sink: Sink<'_>) -> Result<Entered, OutOfTables>;

    /// Maps `frames` from `first` on, inside one chunk, where no valid leaf is or one of that very frame that allows
    /// less: neighbours of a fault, in one go. `None` leaves its place alone. Returns how many were mapped or widened.
    fn enter_around(
        &mut self,
        first: Ipa,
        frames: impl Iterator<Item = Option<Pfn>>,
        prot: Prot,
    ) -> Result<u32, OutOfTables>;

    /// True if neither a leaf nor a table is there for the chunk of an address.
    fn is_bare(&self, at: Ipa) -> bool;

    /// Maps 2 MiB of contiguous, aligned frames as one block, replacing what was there. Whatever later is to be
    /// done to a part of it breaks it into pages first.
    fn enter_block(
        &mut self,
        at: Ipa,
        first: Pfn,
        prot: Prot,
        sink: Sink<'_>,
    ) -> Result<Entered, OutOfTables>;

    /// Unmaps a range. On return no CPU can reach what was mapped there. Takes time in proportion to what is
    /// mapped in the range, so a caller bounds the range (I6); for everything there is [`Pmap::clear`].
    fn remove(&mut self, range: IpaRange, sink: Sink<'_>);

    /// Unmaps pages here and there, with one invalidate for all of them. Their number is the caller's to bound (I6); but once
    /// it has broken a block it asks for no more, since that takes as long as many pages.
    fn remove_pages(&mut self, pages: impl Iterator<Item = Ipa>, sink: Sink<'_>);

    /// Unmaps everything, in steps (I6): each looks at about `budget` entries, a whole table at least, and
    /// says whether it was the last. What a step has not come to yet stays as if parked: no guest can reach it.
    ///
    /// For a guest that ends or is reset: none of its vCPUs runs, and nothing is entered meanwhile, or it
    /// may never end. After the last step the tables are as new, and dropping them takes no time.
    fn clear(&mut self, budget: u32, sink: Sink<'_>) -> bool;

    /// Takes away everything that `keep` does not allow, in a range; never adds a permission.
    fn protect(&mut self, range: IpaRange, keep: Prot, sink: Sink<'_>);

    /// Write-protects everything in time independent of how much is mapped (DESIGN 6): top-level
    /// entries are parked, one invalidate for the whole VMID, the rest is done lazily by whoever
    /// faults there. How many entries were written.
    fn park(&mut self) -> u32;

    /// Reads and clears accessed state, and moves dirty state to the sink, without unmapping.
    fn age(&mut self, range: IpaRange, sink: Sink<'_>);

    /// The leaf for an address, parked subtrees included.
    fn lookup(&self, at: Ipa) -> Option<Leaf>;

    /// The first page in a range that a leaf maps, parked subtrees included. Skips what no table is for, so that
    /// walking with it takes time in proportion to the tables.
    fn next_leaf(&self, range: IpaRange) -> Option<(Ipa, Leaf)>;

    /// Frames used for tables now, the root included.
    fn tables(&self) -> u32;

    /// Blocks mapped now.
    fn blocks(&self) -> u32;
}
