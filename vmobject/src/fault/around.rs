//! Mapping the neighbours of a page along with it.
//!
//! A guest that touches one page of a kernel image, or of memory that its ancestor filled, touches the
//! next one soon. Pages that are resident anyway are mapped in one go, with one lock and one walk; what is
//! mapped already is left alone. Nothing is allocated except what the page itself needed. Called by the
//! fault with the owner's lock held.

use super::Place;
use crate::Vm;
use crate::addr::{Ipa, IpaRange, PAGE_SHIFT, PageIndex};
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
pub(super) enum Around<'s> {
    /// In the top object, mapped like this.
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
        let (hides, slots, index) = match *around {
            Around::Own(state, _) | Around::Shared(state) => (None, &state.slots, place.index),
            Around::Below { top, owner, index } => (Some(&top.slots), &owner.slots, index),
        };
        let before = above.number();
        let back = |page: PageIndex| page.checked_sub(before);
        let (Some(mut ours), Some(mut theirs)) = (back(place.index), back(index)) else { return };
        let pages = self.frames.view();
        // Not what a transfer has, nor what pageout has in hand: this is no use of it.
        let at_rest = |slot| match slot {
            Slot::Resident(frame) => Some((frame, pages.page(frame).filter(|page| page.is_at_rest())?)),
            Slot::Absent | Slot::Zero | Slot::Swapped(_) => None,
        };
        let shared = |slot| at_rest(slot).map(|(frame, _)| frame);
        let read_only = place.entry.prot.without(Prot::WRITE);
        let (mut pmap, _held) = map.pmap.lock(held);
        let (mut at, mut left) = (range.start(), u32::try_from(range.pages()).unwrap_or(0));
        while left != 0 {
            // As far as the leaves of both indexes go.
            let rest = slots.left_in_leaf(theirs).min(left);
            let count = hides.map_or(rest, |hides| rest.min(hides.left_in_leaf(ours)));
            let run = slots.rest_of_leaf(theirs);
            let seen = run.iter().take(count as usize);
            let entered = match *around {
                Around::Own(top, prot) => {
                    let alike = |page: &VmPage| alike(page, top, prot, place.entry.prot);
                    let own = |slot| at_rest(slot).filter(|(_, page)| alike(page)).map(|(frame, _)| frame);
                    pmap.enter_around(at, seen.map(own), prot)
                }
                Around::Shared(_) => pmap.enter_around(at, seen.map(shared), read_only),
                Around::Below { top, .. } => {
                    let hidden = top.slots.rest_of_leaf(ours);
                    let seen = seen.zip(hidden.iter());
                    let frames =
                        seen.map(|(slot, above)| if above == Slot::Absent { shared(slot) } else { None });
                    pmap.enter_around(at, frames, read_only)
                }
            };
            // Want of a table is no failure: the page itself is mapped.
            let Ok(entered) = entered else { return };
            map.stats.add(Event::Around, u64::from(entered));
            let next = at.checked_add(u64::from(count) << PAGE_SHIFT);
            let (Some(next), Some(our_next), Some(their_next)) =
                (next, ours.checked_add(count), theirs.checked_add(count))
            else {
                return;
            };
            (at, ours, theirs, left) = (next, our_next, their_next, left - count);
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
