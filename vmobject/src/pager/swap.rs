//! The swap pager: pages of anonymous memory in slots of stores (`swap_pager.c`).
//!
//! Which slot a page is in stands in its object's own index and nowhere else (DESIGN 4): there is no offset to
//! go wrong when chains collapse (D2), and a slot is given back the moment its page changes (D11). A slot has
//! one owner, a page of an object; clones share it through the object. What is written is summed, keyed by
//! slot and by how often the slot was written, so that a store that returns something else is found out.
//!
//! Several stores have their slots numbered one after the other, so a slot's number says which store it is in. Slots
//! are taken of the store with the highest priority that has some, in turn where several have the same; who has as much to
//! do as he may is waited for, unless he says nothing for long. A store that
//! went away, or fails again and again, gets nothing any more; what is taken there is given back as pages change.
//! Called by `transfer`, `pageout` and whoever frees pages.

use alloc::boxed::Box;
use alloc::vec::Vec;

use super::Home;
use super::failed::Contents;
use super::slots::{Run, SwapSlots};
use crate::addr::Pfn;
use crate::limits::{MAX_FAILED_PUTS, MAX_SWAP, MAX_SWAP_STORES, PUTS_OF_ONE, PUTS_PATIENCE};
use crate::lock::{Held, Ranked, SWAP};
use crate::store::{Direction, Machine, PageStore as _, PhysMemory as _, StoreError, StoreId};
use crate::{Vm, VmError};

/// What is known of a slot's contents.
#[derive(Clone, Copy, Default)]
pub(super) struct Mark {
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

/// One store.
struct Area {
    store: StoreId,
    priority: i32,
    /// The number of its first slot.
    first: u32,
    slots: SwapSlots,
    marks: Box<[Mark]>,
    closed: Option<Closed>,
    /// Writes that failed since the last that did not.
    failures: u32,
    /// Transfers out in flight.
    puts: u32,
    /// How often it was asked for more, since one ended.
    asked: u32,
    counts: SwapCounts,
}

/// Why nothing goes to a store any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Closed {
    /// It takes no write, however often it is asked. What it has may still be read.
    Failing,
    /// It went away, with all it had.
    Gone,
}

/// What a store was asked for and did not do, in transfers; what it did, in pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SwapCounts {
    /// Pages that came from it.
    pub read: u64,
    /// Pages that went there.
    pub written: u64,
    /// Reads that failed.
    pub read_failed: u64,
    /// Writes that failed.
    pub write_failed: u64,
}

/// The stores and what is taken of them.
#[derive(Default)]
struct Areas {
    /// In the order of their slots' numbers.
    list: Vec<Area>,
    /// Their places in the list, the highest priority first.
    order: Vec<usize>,
    /// Whose turn it is among those of one priority.
    turn: usize,
}

impl Areas {
    /// The store of a slot, as its place in the list, and the slot's number there.
    fn find(&self, slot: u32) -> Option<(usize, u32)> {
        let place = self.list.iter().rposition(|area| area.first <= slot)?;
        Some((place, slot - self.list[place].first))
    }

    /// How much they have together.
    fn info(&self) -> SwapInfo {
        self.list.iter().map(Area::info).fold(SwapInfo::default(), |all, one| SwapInfo {
            slots: all.slots + one.slots,
            in_use: all.in_use + one.in_use,
            bad: all.bad + one.bad,
        })
    }

    /// The same for a slot that was taken.
    fn of(&mut self, slot: u32) -> (&mut Area, u32) {
        let Some((place, own)) = self.find(slot) else { panic!("slot {slot} is of no store") };
        (&mut self.list[place], own)
    }

    /// Neighbouring slots of the first store that has some, by priority; those of one priority take turns.
    fn take(&mut self, want: u32) -> Option<Run> {
        let mut rest = self.order.as_slice();
        while let Some(&head) = rest.first() {
            let priority = self.list[head].priority;
            let alike = rest.iter().take_while(|&&place| self.list[place].priority == priority).count();
            let (group, lower) = rest.split_at(alike);
            let mut waits = false;
            for step in 0..alike {
                let place = (self.turn + step) % alike;
                let area = &mut self.list[group[place]];
                if area.closed.is_some() {
                    continue;
                }
                if area.puts >= PUTS_OF_ONE {
                    area.asked = area.asked.saturating_add(1);
                    waits |= area.asked <= PUTS_PATIENCE && area.info().free() > 0;
                    continue;
                }
                if let Some(run) = area.slots.take(want) {
                    self.turn = (place + 1) % alike;
                    return Some(Run { first: area.first + run.first, ..run });
                }
            }
            if waits {
                break;
            }
            rest = lower;
        }
        None
    }
}

impl Area {
    fn info(&self) -> SwapInfo {
        let (in_use, bad) = (self.slots.taken(), self.slots.bad());
        let slots = if self.closed.is_some() { in_use + bad } else { self.slots.slots() };
        SwapInfo { slots, in_use, bad }
    }
}

/// All swap stores.
pub struct Swap(Ranked<SWAP, Areas>);

/// How much swap there is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SwapInfo {
    /// Slots; of a store that takes nothing any more, those that are not free.
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

    /// True if slots are so few that a page that is in a frame should not keep one as well.
    const fn is_tight(&self) -> bool {
        self.free() < self.slots / 2
    }
}

/// One swap store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SwapDevice {
    /// Which.
    pub store: StoreId,
    /// Higher ones are used first, equal ones in turn.
    pub priority: i32,
    /// What is taken of it.
    pub info: SwapInfo,
    /// Why nothing goes there, if so.
    pub closed: Option<Closed>,
    /// What it did.
    pub counts: SwapCounts,
}

impl Swap {
    /// No store.
    pub fn new() -> Self {
        Self(Ranked::new(Areas::default()))
    }

    /// Adds a store of so many pages; those of them that slots have numbers for.
    fn add<const OUTER: u8>(
        &self,
        store: StoreId,
        pages: u32,
        priority: i32,
        held: &mut Held<'_, OUTER>,
    ) -> Result<u32, VmError> {
        let (mut areas, _held) = self.0.lock(held);
        let areas = &mut *areas;
        if areas.list.len() == MAX_SWAP_STORES || areas.list.iter().any(|area| area.store == store) {
            return Err(VmError::Limit("swap stores"));
        }
        let first = areas.list.last().map_or(0, |area| area.first + area.slots.slots());
        let pages = pages.min(MAX_SWAP - first);
        if pages == 0 {
            return Err(VmError::Limit("swap slots"));
        }
        let mut marks = Vec::new();
        marks.try_reserve_exact(pages as usize).map_err(|_| VmError::NoMemory)?;
        marks.resize(pages as usize, Mark::default());
        areas.list.try_reserve(1).map_err(|_| VmError::NoMemory)?;
        areas.order.try_reserve(1).map_err(|_| VmError::NoMemory)?;
        let (slots, marks) = (SwapSlots::new(pages)?, marks.into_boxed_slice());
        let counts = SwapCounts::default();
        let place = areas.list.len();
        let (closed, failures, puts, asked) = (None, 0, 0, 0);
        areas.list.push(Area { store, priority, first, slots, marks, closed, failures, puts, asked, counts });
        let before = areas.order.iter().position(|&other| areas.list[other].priority < priority);
        areas.order.insert(before.unwrap_or(place), place);
        Ok(pages)
    }

    /// Where a slot is, and how often something was written to it.
    pub(super) fn place<const OUTER: u8>(&self, slot: u32, held: &mut Held<'_, OUTER>) -> Option<Contents> {
        let (areas, _held) = self.0.lock(held);
        let (place, page) = areas.find(slot)?;
        let area = areas.list.get(place)?;
        let generation = area.marks.get(page as usize)?.generation;
        Some((Home { store: area.store, page }, generation))
    }

    /// Takes up to `want` neighbouring slots.
    pub(crate) fn take<const OUTER: u8>(&self, want: u32, held: &mut Held<'_, OUTER>) -> Option<Run> {
        self.0.lock(held).0.take(want)
    }

    /// Gives a slot back.
    pub(crate) fn give<const OUTER: u8>(&self, slot: u32, held: &mut Held<'_, OUTER>) {
        let (mut areas, _held) = self.0.lock(held);
        let (area, own) = areas.of(slot);
        area.slots.give(own);
    }

    /// The slot does not take what is written to it: it is not used again.
    pub(super) fn spoil<const OUTER: u8>(&self, slot: u32, held: &mut Held<'_, OUTER>) {
        let (mut areas, _held) = self.0.lock(held);
        let (area, own) = areas.of(slot);
        area.slots.spoil(own);
    }

    /// True if another transfer to the store of a slot may begin.
    pub(super) fn has_room<const OUTER: u8>(&self, slot: u32, held: &mut Held<'_, OUTER>) -> bool {
        self.0.lock(held).0.of(slot).0.puts < PUTS_OF_ONE
    }

    /// A transfer to a slot has begun.
    pub(super) fn begins<const OUTER: u8>(&self, slot: u32, held: &mut Held<'_, OUTER>) {
        let (mut areas, _held) = self.0.lock(held);
        areas.of(slot).0.puts += 1;
    }

    /// What became of a transfer of so many pages from or to a slot; of none if it did not begin.
    pub(super) fn account<const OUTER: u8>(
        &self,
        slot: u32,
        way: Direction,
        pages: u32,
        result: Result<(), StoreError>,
        held: &mut Held<'_, OUTER>,
    ) {
        let (mut areas, _held) = self.0.lock(held);
        let (area, _) = areas.of(slot);
        if way == Direction::Out && pages > 0 {
            area.puts -= 1;
            area.asked = 0;
        }
        match (way, result) {
            (Direction::In, Ok(())) => area.counts.read += u64::from(pages),
            (Direction::In, Err(_)) => area.counts.read_failed += 1,
            (Direction::Out, Ok(())) => {
                area.counts.written += u64::from(pages);
                area.failures = 0;
            }
            (Direction::Out, Err(_)) => {
                area.counts.write_failed += 1;
                area.failures += 1;
            }
        }
        if result == Err(StoreError::Gone) {
            area.closed = Some(Closed::Gone);
        } else if area.failures == MAX_FAILED_PUTS && area.closed.is_none() {
            area.closed = Some(Closed::Failing);
        }
    }

    /// Why nothing goes to a slot's store any more, if so.
    pub(super) fn closed<const OUTER: u8>(&self, slot: u32, held: &mut Held<'_, OUTER>) -> Option<Closed> {
        self.0.lock(held).0.of(slot).0.closed
    }

    /// Pages of neighbouring slots were read: what is known of the first, and whether slots are few.
    pub(super) fn came<const OUTER: u8>(
        &self,
        first: u32,
        pages: u32,
        held: &mut Held<'_, OUTER>,
    ) -> (Mark, bool) {
        let (mut areas, _held) = self.0.lock(held);
        let (area, own) = areas.of(first);
        area.counts.read += u64::from(pages);
        (area.marks[own as usize], areas.info().is_tight())
    }

    /// How much there is.
    pub fn info<const OUTER: u8>(&self, held: &mut Held<'_, OUTER>) -> SwapInfo {
        self.0.lock(held).0.info()
    }

    /// One of the stores, in the order in which they were added.
    pub(crate) fn device<const OUTER: u8>(
        &self,
        place: usize,
        held: &mut Held<'_, OUTER>,
    ) -> Option<SwapDevice> {
        let (areas, _held) = self.0.lock(held);
        let area = areas.list.get(place)?;
        let Area { store, priority, closed, counts, .. } = *area;
        Some(SwapDevice { store, priority, info: area.info(), closed, counts })
    }

    /// Slots have numbers below this.
    pub(crate) fn numbers<const OUTER: u8>(&self, held: &mut Held<'_, OUTER>) -> u32 {
        self.0.lock(held).0.list.last().map_or(0, |area| area.first + area.slots.slots())
    }

    /// True if this slot is taken.
    pub(crate) fn holds<const OUTER: u8>(&self, slot: u32, held: &mut Held<'_, OUTER>) -> bool {
        let (areas, _held) = self.0.lock(held);
        areas.find(slot).is_some_and(|(place, own)| areas.list[place].slots.is_taken(own))
    }

    pub(super) fn mark<const OUTER: u8>(&self, slot: u32, held: &mut Held<'_, OUTER>) -> Mark {
        let (mut areas, _held) = self.0.lock(held);
        let (area, own) = areas.of(slot);
        area.marks[own as usize]
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
        self.add_swap_at(store, 0, held)
    }

    /// The same with a priority: the store with the highest is used first, those with the same one in turn, and another
    /// when those before it are full or take nothing any more.
    pub fn add_swap_at<const OUTER: u8>(
        &self,
        store: StoreId,
        priority: i32,
        held: &mut Held<'_, OUTER>,
    ) -> Result<u32, VmError> {
        let pages = self.machine.store().whole_pages(store);
        let pages = u32::try_from(pages).unwrap_or(u32::MAX).min(MAX_SWAP);
        if pages == 0 {
            return Err(VmError::Range);
        }
        self.swap.add(store, pages, priority, held)
    }

    /// One of the swap stores, in the order in which they were added.
    pub fn swap_device<const OUTER: u8>(
        &self,
        place: usize,
        held: &mut Held<'_, OUTER>,
    ) -> Option<SwapDevice> {
        self.swap.device(place, held)
    }

    /// How much swap there is.
    pub fn swap_info<const OUTER: u8>(&self, held: &mut Held<'_, OUTER>) -> SwapInfo {
        self.swap.info(held)
    }

    /// A page is about to be written to a slot: remembers its sum.
    pub(super) fn seal<const OUTER: u8>(&self, slot: u32, frame: Pfn, held: &mut Held<'_, OUTER>) {
        let mark = self.swap.mark(slot, held);
        let mut mark = Mark { generation: mark.generation.wrapping_add(1), ..mark };
        mark.sum = self.machine.memory().seal(frame, mark.key(slot));
        let (mut areas, _held) = self.swap.0.lock(held);
        let (area, own) = areas.of(slot);
        area.marks[own as usize] = mark;
    }

    /// True if a frame that was just read from a slot has what was written there last; it is ready for guests then.
    pub(super) fn has_arrived(&self, slot: u32, mark: Mark, frame: Pfn) -> bool {
        self.machine.memory().publish_sealed(frame, mark.key(slot)) == mark.sum
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
