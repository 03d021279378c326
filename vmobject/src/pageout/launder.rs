//! Laundering: writing pages out that nothing maps any more, neighbours together.
//!
//! A page of zeros is never written: its slot says zero, or nothing where nothing is below. What the store
//! does not take stays in its frame, among the active pages. Called by `pageout`.

use core::ops::Range;

use crate::Vm;
use crate::addr::{PageIndex, Pfn};
use crate::defect::Defect;
use crate::limits::{CLUSTER_PAGES, PUTS_OF_ONE};
use crate::lock::{CALLER, Held, OBJECT};
use crate::object::index::Slot;
use crate::object::{Life, Pager, State};
use crate::page::{Owner, Queue};
use crate::stats::Event;
use crate::store::{Machine, PhysMemory as _, StoreError};

/// What became of the first page of the laundry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Laundered {
    /// It is on its way, with so many neighbours in all.
    Leaving(u32),
    /// Frames became free at once.
    Freed(u32),
    /// It stays.
    Kept,
    /// The store takes nothing now.
    Blocked,
}

impl<M: Machine> Vm<M> {
    /// Writes out the first page of the laundry, and its neighbours.
    pub(super) fn launder(&self, held: &mut Held<'_, CALLER>) -> Laundered {
        let Some(frame) = self.frames.rotate(Queue::Laundry, held) else { return Laundered::Kept };
        let Owner::Object(storage, place) = self.frames.page(frame).owner() else { return Laundered::Kept };
        let Some(object) = self.objects.of_storage(storage) else { return Laundered::Kept };
        let (mut state, mut held) = object.write(held);
        let Some(page) = state.slots.page(place) else { return Laundered::Kept };
        if state.slots.storage() != storage || state.slots.get(page) != Slot::Resident(frame) {
            return Laundered::Kept;
        }
        if !self.is_laundry(&state, page) || self.frames.page(frame).take_accessed() {
            self.frames.enqueue(frame, Queue::Active, &mut held);
            self.stats.count(Event::Reactivated);
            return Laundered::Kept;
        }
        if state.pager != Pager::None {
            if state.puts >= PUTS_OF_ONE {
                // Its store may answer much later, or never: others are not to wait for it.
                self.frames.enqueue(frame, Queue::Active, &mut held);
                return Laundered::Kept;
            }
            let run = self.run_around(&state, page);
            let pages = u32::try_from(run.len()).unwrap_or(0);
            return match self.put(&mut state, run, &mut held) {
                Ok(()) => Laundered::Leaving(pages),
                Err(StoreError::Busy) => Laundered::Blocked,
                Err(StoreError::Io | StoreError::Refused | StoreError::Gone | StoreError::Corrupt) => {
                    Laundered::Kept
                }
            };
        }
        if self.machine.memory().is_zero(frame) {
            self.evict_zero(&mut state, page, frame, &mut held);
            return Laundered::Freed(1);
        }
        let run = self.run_around(&state, page);
        self.send(&mut state, run, &mut held)
    }

    /// True for a page that nothing maps and that has to be written before its frame can go.
    fn is_laundry(&self, state: &State, page: PageIndex) -> bool {
        let Slot::Resident(frame) = state.slots.get(page) else { return false };
        let page = self.frames.page(frame);
        let changed = match state.pager {
            Pager::None => page.clean_slot().is_none(),
            Pager::Disk(_) => page.is_dirty(),
            Pager::Image(_) | Pager::Device(_) => false,
        };
        changed
            && state.life == Life::Live
            && page.queue() == Queue::Laundry
            && page.is_unmapped()
            && !page.is_busy()
    }

    /// The neighbours that go along with a page, within its aligned cluster. Swap is not given zeros.
    fn run_around(&self, state: &State, page: PageIndex) -> Range<u32> {
        let number = page.number();
        let base = number - number % CLUSTER_PAGES;
        let end = base.saturating_add(CLUSTER_PAGES);
        let zeros = |slot| matches!(slot, Slot::Resident(frame) if self.machine.memory().is_zero(frame));
        if self.goes_alone(state, number) {
            return number..number + 1;
        }
        let goes = |number: u32| {
            let page = PageIndex::new(number);
            !self.goes_alone(state, number)
                && self.is_laundry(state, page)
                && (state.pager != Pager::None || !zeros(state.slots.get(page)))
        };
        let (mut first, mut last) = (number, number);
        while first > base && goes(first - 1) {
            first -= 1;
        }
        while last + 1 < end && goes(last + 1) {
            last += 1;
        }
        first..last + 1
    }

    /// Writes a run of pages, as many as there are neighbouring slots for.
    fn send(&self, state: &mut State, run: Range<u32>, held: &mut Held<'_, OBJECT>) -> Laundered {
        let Ok(want) = u32::try_from(run.len()) else { return Laundered::Kept };
        let mut frames = [Pfn::default(); CLUSTER_PAGES as usize];
        for (number, to) in run.clone().zip(&mut frames) {
            let Slot::Resident(frame) = state.slots.get(PageIndex::new(number)) else { continue };
            *to = frame;
        }
        let Some(slots) = self.swap.take(want, held) else {
            if self.swap.info(held).free() > 0 {
                // Each store that has some has as much to do as it may.
                return Laundered::Blocked;
            }
            for &frame in &frames[..run.len()] {
                self.frames.enqueue(frame, Queue::Active, held);
            }
            self.stats.add(Event::SwapFull, u64::from(want));
            return Laundered::Kept;
        };
        if self.has(Defect::SlotGivenTwice) {
            self.swap.give(slots.first, held);
        }
        let frames = &frames[..slots.count as usize];
        let back = match self.page_out(state, PageIndex::new(run.start), frames, slots.first, held) {
            Ok(()) => return Laundered::Leaving(slots.count),
            Err(StoreError::Busy) => Queue::Laundry,
            Err(StoreError::Io | StoreError::Refused | StoreError::Gone | StoreError::Corrupt) => {
                self.stats.count(Event::PageOutFailed);
                Queue::Active
            }
        };
        for &frame in frames {
            self.frames.enqueue(frame, back, held);
        }
        if back == Queue::Laundry { Laundered::Blocked } else { Laundered::Kept }
    }

    /// A page of zeros needs neither frame nor slot.
    fn evict_zero(&self, state: &mut State, page: PageIndex, frame: Pfn, held: &mut Held<'_, OBJECT>) {
        if state.below(page).is_some() && !self.has(Defect::ZeroShowsBelow) {
            let was = state.slots.set(page, Slot::Zero);
            debug_assert_eq!(was, Ok(Slot::Resident(frame)));
        } else {
            state.lose(page);
            self.ask_shadows(state, held);
        }
        self.frames.free(frame, held);
        self.stats.count(Event::EvictedZero);
    }
}
