//! Ranges of an object's pages: taking their leaves away, and taking the pages away
//! (`vm_object_pmap_copy`, `vm_object_pmap_remove`, `vm_object_page_remove`).
//!
//! What a range costs follows what is in it (D10): the reverse map leads to the windows that see it, and the
//! index to the slots that are there. A page that is taken away reads as zero from then on, whatever lies below
//! or in a store (D12). Called by `map` and `clean` with the object locked. Calls `rmap`, the pmap.

use core::ops::Range;

use super::index::{Index, Slot};
use super::{ObjectId, Pager, State};
use crate::addr::{IpaRange, PageIndex};
use crate::defect::Defect;
use crate::lock::{Held, OBJECT};
use crate::pmap::Pmap as _;
use crate::prot::Prot;
use crate::stats::Event;
use crate::store::{IoToken, Machine};
use crate::{Vm, VmError};

/// Why pages could not be taken away, or not all of them.
pub(crate) enum Kept {
    /// This transfer has one of them.
    Busy(IoToken),
    /// The object's copy must have this page first.
    Guarded(PageIndex),
    /// There is no memory for the marks.
    Refused(VmError),
}

impl<M: Machine> Vm<M> {
    /// Takes away every leaf through which a page of a range may be reached. It may take some more: those
    /// of pages that hide one of the range.
    pub(crate) fn pmap_remove(&self, state: &State, range: Range<u32>, held: &mut Held<'_, OBJECT>) {
        let (links, mut held) = self.links.read(held);
        links.walk_range(state.id.index, range, |mapping, at, pages| {
            let Some(range) = IpaRange::from_pages(at, pages) else { return };
            let Some(map) = mapping.holder.upgrade() else { return };
            map.pmap.lock(&mut held).0.remove(range, &mut |harvest| self.frames.note(harvest));
        });
    }

    /// Takes the permission to write from every leaf through which a page of a range may be reached.
    pub(crate) fn pmap_copy(&self, state: &State, range: Range<u32>, held: &mut Held<'_, OBJECT>) {
        let (links, mut held) = self.links.read(held);
        links.walk_range(state.id.index, range, |mapping, at, pages| {
            let Some(range) = IpaRange::from_pages(at, pages) else { return };
            let Some(map) = mapping.holder.upgrade() else { return };
            let keep = Prot::ALL.without(Prot::WRITE);
            map.pmap.lock(&mut held).0.protect(range, keep, &mut |harvest| self.frames.note(harvest));
        });
    }

    /// Makes pages of an object that may be written zero, and gives back what they held: how many frames and
    /// swap slots that were. It takes as long as there are slots in the range, and one step for each leaf of
    /// the index. Pages before one that a transfer has are done.
    pub(crate) fn page_remove(
        &self,
        state: &mut State,
        range: Range<u32>,
        held: &mut Held<'_, OBJECT>,
    ) -> Result<u32, Kept> {
        let range = range.start..range.end.min(state.pages);
        if range.is_empty() {
            return Ok(0); // an empty range is empty (D23)
        }
        if state.copy.is_some() {
            for page in range.clone().map(PageIndex::new) {
                let shown = state.slots.get(page) != Slot::Zero
                    && (state.slots.get(page) != Slot::Absent
                        || state.pager != Pager::None
                        || state.below(page).is_some());
                if shown && self.is_guarded(state, page, held) {
                    return Err(Kept::Guarded(page));
                }
            }
        }
        if !self.has(Defect::RemoveLeavesLeaves) {
            self.pmap_remove(state, range.clone(), held);
        }
        let below = match state.pager {
            Pager::None => state.shadow.map_or(0, |shadow| shadow.limit).clamp(range.start, range.end),
            Pager::Image(_) | Pager::Disk(_) | Pager::Device(_) => range.end,
        };
        let below = if self.has(Defect::DiscardStoresAbsent) { range.start } else { below };
        let mut given = 0;
        let mut page = range.start;
        while page < below {
            let first = PageIndex::new(page);
            let end = page.saturating_add(Index::LEAF_PAGES);
            let whole = state.slots.is_leaf(first) && end <= below;
            // A mark that is there already is left alone: its leaf may be one bit.
            let marked = !whole && state.slots.get(first) == Slot::Zero;
            let fits = if whole { state.slots.has_region(first) } else { state.slots.has_leaf(first) };
            if !fits && !marked && !self.machine.has_room() {
                return Err(Kept::Refused(VmError::NoMemory));
            }
            if whole {
                given += self.give_up(state, page..end, held)?;
                state.slots.zero_leaf(first).map_err(Kept::Refused)?;
                self.objects.gained(state, page..end, held);
                page = end;
            } else if marked {
                page += 1;
            } else {
                given += self.give_up(state, page..page + 1, held)?;
                self.objects.gain(state, first, Slot::Zero, held).map_err(Kept::Refused)?;
                page += 1;
            }
        }
        if let Some(shadow) = state.shadow.filter(|_| range.start < below) {
            self.objects.ask_prune(shadow.object.index, held); // perhaps nobody else saw what is hidden now
        }
        given += self.give_up(state, below..range.end, held)?;
        self.lose_all(state, below..range.end);
        Ok(given)
    }

    /// Gives up what slots of a range own; each is zero then.
    fn give_up(
        &self,
        state: &mut State,
        range: Range<u32>,
        held: &mut Held<'_, OBJECT>,
    ) -> Result<u32, Kept> {
        let mut given = 0;
        let mut from = PageIndex::new(range.start);
        while let Some((page, slot)) = state.slots.next_present(from..PageIndex::new(range.end)) {
            if let Slot::Resident(frame) = slot
                && !self.free_slot(slot, held)
            {
                return Err(Kept::Busy(self.frames.page(frame).transfer()));
            }
            match slot {
                Slot::Swapped(_) if self.has(Defect::DiscardForgetsSwap) => {
                    from = PageIndex::new(page.number() + 1);
                    continue;
                }
                Slot::Resident(_) => given += 1,
                Slot::Swapped(_) => {
                    self.free_slot(slot, held);
                    given += 1;
                }
                Slot::Zero | Slot::Absent => {}
            }
            if slot != Slot::Zero {
                let zero = state.slots.set(page, Slot::Zero);
                debug_assert_eq!(zero, Ok(slot), "a slot that is present can be set");
            }
            self.stats.count(Event::SlotVisited);
            from = PageIndex::new(page.number() + 1);
        }
        Ok(given)
    }

    /// Makes every page of an object absent that no transfer has: a defect.
    #[cold]
    pub(crate) fn lose_everything<const OUTER: u8>(&self, object: ObjectId, held: &mut Held<'_, OUTER>) {
        let (mut state, mut held) = self.objects.get(object).write(held);
        let mut from = PageIndex::new(0);
        while let Some((page, slot)) = state.slots.next_present(from..PageIndex::new(state.pages)) {
            if self.free_slot(slot, &mut held) {
                state.lose(page);
            }
            from = PageIndex::new(page.number() + 1);
        }
    }

    /// Nothing below: what is zero may as well be absent.
    fn lose_all(&self, state: &mut State, range: Range<u32>) {
        let mut from = PageIndex::new(range.start);
        while let Some((page, _)) = state.slots.next_present(from..PageIndex::new(range.end)) {
            state.lose(page);
            from = PageIndex::new(page.number() + 1);
        }
    }
}
