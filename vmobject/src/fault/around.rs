//! Mapping the neighbours of a page along with it.
//!
//! A guest that touches one page of a kernel image, or of memory that its ancestor filled, touches the
//! next one soon. Pages that are resident anyway are mapped in one go, with one lock and one walk; what is
//! mapped already is left alone. Nothing is allocated except what the page itself needed. Called by the
//! fault as for the page itself: F1 holds for each of them.

use super::Place;
use super::veil::Veil;
use crate::Vm;
use crate::addr::{Ipa, IpaRange, PAGE_SHIFT, PageIndex};
use crate::defect::Defect;
use crate::limits::AROUND_PAGES;
use crate::lock::{Held, OBJECT};
use crate::map::Map;
use crate::object::index::Slot;
use crate::object::{Pager, State};
use crate::page::VmPage;
use crate::pmap::Pmap as _;
use crate::prot::Prot;
use crate::stats::Event;
use crate::store::Machine;

/// Where the page was found, and so where its neighbours are.
pub(super) struct Around<'s> {
    /// The object that has it, locked.
    pub(super) owner: &'s State,
    /// As which of its pages.
    pub(super) index: PageIndex,
    /// The owner is the top object, and the page is mapped like this.
    pub(super) own: Option<Prot>,
    /// What hides them.
    pub(super) veil: Veil,
    /// Some of what was passed is not locked: it may have gained nothing since this version.
    pub(super) since: Option<u64>,
}

impl<'s> Around<'s> {
    /// A page of the top object.
    pub(super) fn own(top: &'s State, place: Place<'_>, prot: Prot) -> Self {
        let veil = Veil::new(place.page);
        Self { owner: top, index: place.index, own: Some(prot), veil, since: None }
    }
}

impl<M: Machine> Vm<M> {
    /// Maps resident neighbours within the aligned window of so many pages around the page, as far as the entry reaches.
    pub(super) fn enter_neighbours(
        &self,
        map: &Map<M>,
        place: Place<'_>,
        window: u32,
        around: &Around<'_>,
        held: &mut Held<'_, OBJECT>,
    ) {
        debug_assert!(window.is_power_of_two() && window <= AROUND_PAGES);
        if window <= 1 {
            return;
        }
        let bytes = u64::from(window) << PAGE_SHIFT;
        let base = Ipa::new(place.page.bits() & !(bytes - 1));
        let window = IpaRange::from_pages(base, window);
        let Some(range) = window.and_then(|w| w.intersection(place.entry.range)) else { return };
        let Some(above) = place.page.pages_above(range.start()) else { return };
        let slots = &around.owner.slots;
        let Some(mut index) = around.index.checked_sub(above.number()) else { return };
        let pages = self.frames.view();
        // Not what a transfer has, nor what pageout has in hand: this is no use of it.
        let at_rest = |slot| match slot {
            Slot::Resident(frame) => Some((frame, pages.page(frame).filter(|page| page.is_at_rest())?)),
            Slot::Absent | Slot::Zero | Slot::Swapped(_) => None,
        };
        let (mut pmap, _held) = map.pmap.lock(held);
        if self.has_gained(around.since) && !self.has(Defect::AroundPastAPush) {
            return;
        }
        let (mut at, mut left) = (range.start(), u32::try_from(range.pages()).unwrap_or(0));
        let mut hidden = around.veil.hidden() >> (at.page_in_chunk() % AROUND_PAGES);
        while left != 0 {
            // As far as the leaf of the index goes.
            let count = slots.left_in_leaf(index).min(left);
            let run = slots.rest_of_leaf(index);
            let seen = run.iter().take(count as usize);
            let entered = match around.own {
                Some(prot) => {
                    let alike = |page: &VmPage| alike(page, around.owner, prot, place.entry.prot);
                    let own = |slot| at_rest(slot).filter(|(_, page)| alike(page)).map(|(frame, _)| frame);
                    pmap.enter_around(at, seen.map(own), prot)
                }
                None => {
                    let shared = |(nth, slot)| match hidden >> nth & 1 {
                        0 => at_rest(slot).map(|(frame, _)| frame),
                        _ => None,
                    };
                    pmap.enter_around(
                        at,
                        (0_u32..).zip(seen).map(shared),
                        place.entry.prot.without(Prot::WRITE),
                    )
                }
            };
            // Want of a table is no failure: the page itself is mapped.
            let Ok(entered) = entered else { return };
            map.stats.add(Event::Around, u64::from(entered));
            let next = at.checked_add(u64::from(count) << PAGE_SHIFT);
            let (Some(next), Some(index_next)) = (next, index.checked_add(count)) else { return };
            (at, index, left) = (next, index_next, left - count);
            hidden = hidden.checked_shr(count).unwrap_or(0);
        }
    }
}

/// True when a neighbour in the top object may be mapped as the page is, `prot` of `whole`: writable along with a writable
/// one, and one that has a swap slot to keep along with one that has one.
fn alike(page: &VmPage, top: &State, prot: Prot, whole: Prot) -> bool {
    if prot != whole {
        return page.clean_slot().is_some();
    }
    !prot.allows(Prot::WRITE) || page.clean_slot().is_none() && (top.pager == Pager::None || page.is_dirty())
}
