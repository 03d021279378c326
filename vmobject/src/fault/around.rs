//! Mapping the neighbours of a page along with it.
//!
//! A guest that touches one page of a kernel image, or of memory that its ancestor filled, touches the
//! next one soon. Pages that are resident anyway are mapped in one go, with one lock and one walk; what is
//! mapped already is left alone. Nothing is allocated except what the page itself needed. Called by the
//! fault with the owner's lock held.

use super::Place;
use crate::Vm;
use crate::addr::{IpaRange, PageIndex, Pfn};
use crate::limits::AROUND_PAGES;
use crate::lock::{Held, OBJECT};
use crate::map::Map;
use crate::object::index::Slot;
use crate::object::{Pager, State};
use crate::pmap::Pmap as _;
use crate::prot::Prot;
use crate::stats::Event;
use crate::store::Machine;

/// Where the page was found, and so where its neighbours are.
pub(super) enum Around<'s> {
    /// In the top object, mapped like this: writable neighbours along with a writable page, those that have
    /// a swap slot to keep along with one that has one.
    Own(&'s State, Prot),
    /// In an object that must not change.
    Shared(&'s State),
    /// Right below the top object, at this index; a page that the top has hides its neighbour.
    Below {
        /// The top object.
        top: &'s State,
        /// The object below.
        owner: &'s State,
        /// The page's index in it.
        index: PageIndex,
    },
}

impl Around<'_> {
    /// What there is from `before` pages before the page on.
    fn look(&self, place: Place<'_>, before: u32, out: &mut [Slot; AROUND_PAGES as usize]) {
        match self {
            Self::Own(state, _) | Self::Shared(state) => {
                let Some(first) = place.index.checked_sub(before) else { return };
                state.slots.get_run(first, out);
            }
            Self::Below { top, owner, index } => {
                let (Some(ours), Some(theirs)) = (place.index.checked_sub(before), index.checked_sub(before))
                else {
                    return;
                };
                let mut hidden = [Slot::Absent; AROUND_PAGES as usize];
                top.slots.get_run(ours, &mut hidden);
                owner.slots.get_run(theirs, out);
                for (slot, hidden) in out.iter_mut().zip(hidden) {
                    if hidden != Slot::Absent {
                        *slot = Slot::Absent;
                    }
                }
            }
        }
    }
}

impl<M: Machine> Vm<M> {
    /// Maps resident neighbours within the aligned window around the page, as far as the entry reaches.
    pub(super) fn enter_neighbours(
        &self,
        map: &Map<M>,
        place: Place<'_>,
        around: &Around<'_>,
        held: &mut Held<'_, OBJECT>,
    ) {
        let window = u64::from(AROUND_PAGES) << crate::addr::PAGE_SHIFT;
        let base = crate::addr::Ipa::new(place.page.bits() & !(window - 1));
        let window = IpaRange::from_pages(base, AROUND_PAGES);
        let Some(range) = window.and_then(|w| w.intersection(place.entry.range)) else { return };
        let Some(before) = place.page.pages_above(range.start()) else { return };
        let pages = usize::try_from(range.pages()).map_or(0, |pages| pages.min(AROUND_PAGES as usize));
        let mut slots = [Slot::Absent; AROUND_PAGES as usize];
        around.look(place, before.number(), &mut slots);
        if let Some(itself) = slots.get_mut(before.number() as usize) {
            *itself = Slot::Absent;
        }
        let mut frames: [Option<Pfn>; AROUND_PAGES as usize] = [None; AROUND_PAGES as usize];
        let mut any = false;
        for (slot, out) in slots[..pages].iter().zip(&mut frames) {
            if let Slot::Resident(frame) = *slot
                && self.may_come_along(frame, place, around)
            {
                *out = Some(frame);
                any = true;
            }
        }
        if !any {
            return;
        }
        let prot = match around {
            Around::Own(_, prot) => *prot,
            Around::Shared(_) | Around::Below { .. } => place.entry.prot.without(Prot::WRITE),
        };
        let (mut pmap, _held) = map.pmap.lock(held);
        // Want of a table is no failure: the page itself is mapped.
        if let Ok(entered) = pmap.enter_around(range.start(), &frames[..pages], prot) {
            map.stats.add(Event::Around, u64::from(entered));
        }
    }

    /// Not what a transfer has, nor what pageout has in hand: this is no use of it.
    fn may_come_along(&self, frame: Pfn, place: Place<'_>, around: &Around<'_>) -> bool {
        let page = self.frames.page(frame);
        let alike = match around {
            Around::Own(_, prot) if *prot != place.entry.prot => page.clean_slot().is_some(),
            Around::Own(_, prot) if !prot.allows(Prot::WRITE) => true,
            Around::Own(top, _) => {
                page.clean_slot().is_none() && (top.pager == Pager::None || page.is_dirty())
            }
            Around::Shared(_) | Around::Below { .. } => true,
        };
        alike && !page.is_busy() && !page.is_unmapped()
    }
}
