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
    /// What there is `distance` pages before (false) or after (true) the page.
    fn slot(&self, place: Place<'_>, after: bool, distance: u32) -> Slot {
        let step = |index: PageIndex| {
            if after { index.checked_add(distance) } else { index.checked_sub(distance) }
        };
        let of = |state: &State, index: PageIndex| match step(index) {
            Some(index) if index.number() < state.pages => state.slots.get(index),
            Some(_) | None => Slot::Absent,
        };
        match self {
            Self::Own(state, _) | Self::Shared(state) => of(state, place.index),
            Self::Below { top, owner, index } => match of(top, place.index) {
                Slot::Absent => of(owner, *index),
                Slot::Zero | Slot::Resident(_) | Slot::Swapped(_) => Slot::Absent,
            },
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
        let mut frames: [Option<Pfn>; AROUND_PAGES as usize] = [None; AROUND_PAGES as usize];
        let mut any = false;
        for (at, out) in range.iter_pages().zip(&mut frames) {
            let slot = match (at.pages_above(place.page), place.page.pages_above(at)) {
                (Some(after), _) if after.number() > 0 => around.slot(place, true, after.number()),
                (_, Some(before)) if before.number() > 0 => around.slot(place, false, before.number()),
                (_, _) => continue,
            };
            if let Slot::Resident(frame) = slot
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
        let pages = usize::try_from(range.pages()).map_or(0, |pages| pages.min(frames.len()));
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
