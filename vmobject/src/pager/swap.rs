//! The swap pager: pages of anonymous memory in slots of a store (`swap_pager.c`).
//!
//! Which slot a page is in stands in its object's own index and nowhere else (DESIGN 4): there is no offset to
//! go wrong when chains collapse (D2), and a slot is given back the moment its page changes (D11). A slot has
//! one owner, a page of an object; clones share it through the object. What is written is summed, keyed by
//! slot and by how often the slot was written, so that a store that returns something else is found out.
//! Called by `transfer`, `pageout` and whoever frees pages.

use alloc::boxed::Box;
use alloc::vec::Vec;

use super::slots::{Run, SwapSlots};
use crate::addr::Pfn;
use crate::limits::MAX_SWAP;
use crate::lock::{Held, Ranked, SWAP};
use crate::store::{Machine, PageStore as _, PhysMemory as _, StoreId};
use crate::{Vm, VmError};

/// What is known of a slot's contents.
#[derive(Clone, Copy, Default)]
struct Mark {
    /// How often it was written.
    generation: u32,
    /// Sum of what was written last.
    sum: u32,
}

impl Mark {
    /// What the sum depends on besides the bytes.
    const fn key(self, slot: u32) -> u64 {
        (slot as u64) << 32 | self.generation as u64
    }
}

#[derive(Default)]
struct Area {
    store: Option<StoreId>,
    slots: SwapSlots,
    marks: Box<[Mark]>,
}

/// The swap store and what is taken of it.
pub struct Swap(Ranked<SWAP, Area>);

/// How much swap there is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SwapInfo {
    /// Slots.
    pub slots: u32,
    /// Slots that hold a page's contents.
    pub in_use: u32,
    /// Slots that failed and are not used any more.
    pub bad: u32,
}

impl SwapInfo {
    /// Slots that can be had.
    pub const fn free(&self) -> u32 {
        self.slots - self.in_use - self.bad
    }
}

impl Swap {
    /// No store.
    pub fn new() -> Self {
        Self(Ranked::new(Area::default()))
    }

    /// Gives it its store, of so many pages. There can be one.
    fn add<const OUTER: u8>(
        &self,
        store: StoreId,
        pages: u32,
        held: &mut Held<'_, OUTER>,
    ) -> Result<(), VmError> {
        let (mut area, _held) = self.0.lock(held);
        if area.store.is_some() {
            return Err(VmError::Limit("swap stores"));
        }
        let mut marks = Vec::new();
        marks.try_reserve_exact(pages as usize).map_err(|_| VmError::NoMemory)?;
        marks.resize(pages as usize, Mark::default());
        *area = Area { store: Some(store), slots: SwapSlots::new(pages)?, marks: marks.into_boxed_slice() };
        Ok(())
    }

    /// The store, if there is one.
    pub(super) fn store<const OUTER: u8>(&self, held: &mut Held<'_, OUTER>) -> Option<StoreId> {
        self.0.lock(held).0.store
    }

    /// Takes up to `want` neighbouring slots.
    pub(crate) fn take<const OUTER: u8>(&self, want: u32, held: &mut Held<'_, OUTER>) -> Option<Run> {
        self.0.lock(held).0.slots.take(want)
    }

    /// Gives a slot back.
    pub(crate) fn give<const OUTER: u8>(&self, slot: u32, held: &mut Held<'_, OUTER>) {
        self.0.lock(held).0.slots.give(slot);
    }

    /// The slot does not take what is written to it: it is not used again.
    pub(super) fn spoil<const OUTER: u8>(&self, slot: u32, held: &mut Held<'_, OUTER>) {
        self.0.lock(held).0.slots.spoil(slot);
    }

    /// How much there is.
    pub fn info<const OUTER: u8>(&self, held: &mut Held<'_, OUTER>) -> SwapInfo {
        let (area, _held) = self.0.lock(held);
        SwapInfo { slots: area.slots.slots(), in_use: area.slots.taken(), bad: area.slots.bad() }
    }

    /// True if slots are so few that a page that is in a frame should not keep one as well.
    pub(crate) fn is_tight<const OUTER: u8>(&self, held: &mut Held<'_, OUTER>) -> bool {
        let info = self.info(held);
        info.free() < info.slots / 2
    }

    /// True if this slot is taken.
    pub(crate) fn holds<const OUTER: u8>(&self, slot: u32, held: &mut Held<'_, OUTER>) -> bool {
        self.0.lock(held).0.slots.is_taken(slot)
    }

    fn mark<const OUTER: u8>(&self, slot: u32, held: &mut Held<'_, OUTER>) -> Mark {
        self.0.lock(held).0.marks[slot as usize]
    }
}

impl Default for Swap {
    fn default() -> Self {
        Self::new()
    }
}

impl<M: Machine> Vm<M> {
    /// Lets anonymous pages go to a store when memory is short; how many have room there. What the store
    /// holds is overwritten.
    pub fn add_swap<const OUTER: u8>(
        &self,
        store: StoreId,
        held: &mut Held<'_, OUTER>,
    ) -> Result<u32, VmError> {
        let pages = self.machine.store().pages(store);
        let pages = u32::try_from(pages).unwrap_or(u32::MAX).min(MAX_SWAP);
        if pages == 0 {
            return Err(VmError::Range);
        }
        self.swap.add(store, pages, held)?;
        Ok(pages)
    }

    /// How much swap there is.
    pub fn swap_info<const OUTER: u8>(&self, held: &mut Held<'_, OUTER>) -> SwapInfo {
        self.swap.info(held)
    }

    /// A page is about to be written to a slot: remembers its sum.
    pub(super) fn seal<const OUTER: u8>(&self, slot: u32, frame: Pfn, held: &mut Held<'_, OUTER>) {
        let mark = self.swap.mark(slot, held);
        let mut mark = Mark { generation: mark.generation.wrapping_add(1), ..mark };
        mark.sum = self.machine.memory().sum(frame, mark.key(slot));
        self.swap.0.lock(held).0.marks[slot as usize] = mark;
    }

    /// True if a frame has what was written to a slot last.
    pub(super) fn is_genuine<const OUTER: u8>(
        &self,
        slot: u32,
        frame: Pfn,
        held: &mut Held<'_, OUTER>,
    ) -> bool {
        let mark = self.swap.mark(slot, held);
        self.machine.memory().sum(frame, mark.key(slot)) == mark.sum
    }

    /// Gives back the swap slot that a resident page keeps. The owner is locked.
    pub(crate) fn drop_clean_slot<const OUTER: u8>(&self, frame: Pfn, held: &mut Held<'_, OUTER>) {
        let page = self.frames.page(frame);
        if let Some(slot) = page.clean_slot() {
            page.set_clean_slot(None);
            self.swap.give(slot, held);
        }
    }
}
