//! Walking a shadow chain down to a page.
//!
//! One object is locked for reading at a time, hand over hand, so a thousand clones look at one template
//! together. What was found stays valid as long as the descent stands where it found it. Called by the
//! fault; calls `object`.

use crate::Vm;
use crate::addr::{Ipa, PageIndex, Pfn};
use crate::limits::TRAIL_STRIDE;
use crate::lock::{Descent, Held, OBJECT};
use crate::map::Entry;
use crate::object::index::Slot;
use crate::object::{Hop, Life, ObjectId, Pager, State};
use crate::stats::Event;
use crate::store::{Machine, StoreId};

/// A page in an object of the chain.
#[derive(Clone, Copy, Debug)]
pub(super) struct Page {
    /// Its frame.
    pub(super) frame: Pfn,
    /// Which page of its owner it is.
    pub(super) index: PageIndex,
    /// Steps below the object where the look began.
    pub(super) depth: u32,
    /// Every object from the first one looked at down to the owner is anonymous and has one reference.
    pub(super) sole: bool,
    /// The owner is right below the top and all its other shadows hide the page; the version of the
    /// reverse map that this is about.
    pub(super) family: Option<u64>,
}

/// What a look down the chain came to. The descent stands at the object that decided it.
pub(super) enum Found {
    /// It is there.
    Page(Page),
    /// A transfer is bringing it into this frame.
    Busy(Pfn),
    /// This object's pager has it.
    PageIn(ObjectId, PageIndex),
    /// Nobody has anything: it is zero.
    Nothing,
    /// The way is long: a trail is wanted where the look began.
    Deep,
    /// The chain has changed: from the top.
    Changed,
}

impl<M: Machine> Vm<M> {
    /// Looks for a page from where the descent stands.
    pub(super) fn look<'h>(&'h self, chain: &mut Descent<'h, OBJECT, State>, mut index: PageIndex) -> Found {
        let (mut depth, mut sole) = (0, true);
        let mut since_hop = 0;
        loop {
            let state = chain.here();
            self.stats.count(Event::ChainVisited);
            sole &= state.is_sole_anonymous();
            match state.slots.get(index) {
                Slot::Resident(frame) => {
                    if self.frames.page(frame).is_filling() {
                        return Found::Busy(frame);
                    }
                    return Found::Page(Page { frame, index, depth, sole, family: None });
                }
                Slot::Zero => return Found::Nothing,
                Slot::Swapped(_) => return Found::PageIn(state.id(), index),
                Slot::Absent if state.pager != Pager::None => return Found::PageIn(state.id(), index),
                Slot::Absent => {}
            }
            (depth, since_hop) = (depth + 1, since_hop + 1);
            match state.trails.hop(index, self.trails_now()) {
                Some(Hop::Nothing) => return Found::Nothing,
                Some(Hop::To(object, page)) => {
                    self.objects.get(object).step_down(chain);
                    if !self.has_hopped(chain.here(), object) {
                        return Found::Changed;
                    }
                    (index, sole, since_hop) = (page, false, 0);
                    continue;
                }
                None if since_hop > TRAIL_STRIDE => return Found::Deep,
                None => {}
            }
            let Some((object, below)) = state.below(index) else { return Found::Nothing };
            index = below;
            self.objects.get(object).step_down(chain);
        }
    }

    /// True if an object is still the one that a trail led to. If not, all trails are given up.
    pub(super) fn has_hopped(&self, here: &State, object: ObjectId) -> bool {
        let same = here.id() == object && here.life == Life::Live;
        if !same {
            self.objects.changed();
        }
        same
    }

    /// What a guest sees at an address of an entry, changing nothing: for audits.
    pub(crate) fn survey<const OUTER: u8>(
        &self,
        entry: &Entry,
        at: Ipa,
        held: &mut Held<'_, OUTER>,
    ) -> Sight {
        let nothing = Sight { slot: Slot::Absent, shared: entry.needs_copy, store: None };
        let Some(mut index) = entry.page_at(at) else { return nothing };
        let mut chain = self.objects.get(entry.object).descend(held);
        let mut shared = entry.needs_copy;
        loop {
            let state = chain.here();
            let slot = state.slots.get(index);
            let store = match state.pager {
                Pager::Image(store) | Pager::Disk(store) => Some((store, index)),
                Pager::None => None,
            };
            let below = state.below(index).filter(|_| slot == Slot::Absent && store.is_none());
            let Some((object, next)) = below else { return Sight { slot, shared, store } };
            self.objects.get(object).step_down(&mut chain);
            shared |= !chain.here().is_sole_anonymous();
            index = next;
        }
    }
}

/// What a guest sees.
pub(crate) struct Sight {
    /// The slot that decides it.
    pub(crate) slot: Slot,
    /// Somebody else may see the same.
    pub(crate) shared: bool,
    /// If the slot is absent: the store and its page that have the contents. Else the page is zero.
    pub(crate) store: Option<(StoreId, PageIndex)>,
}
