//! Walking a shadow chain down to a page.
//!
//! One object is locked for reading at a time, hand over hand, so a thousand clones look at one template
//! together. What was found stays valid as long as the descent stands where it found it. What it came by does not change
//! meanwhile, with one exception: below a copy-object is its source, which a guest may be writing. If that gains the page
//! behind us, the one that we are about to see may be nobody's any more, and be gone. Called by the fault; calls
//! `object`.

use crate::Vm;
use crate::addr::{Ipa, PageIndex, Pfn};
use crate::defect::Defect;
use crate::limits::TRAIL_STRIDE;
use crate::lock::{Descent, Held, OBJECT};
use crate::map::Entry;
use crate::object::index::Slot;
use crate::object::{Hop, ObjectId, Pager, Role, State};
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

/// For who wants to know nothing of the way.
pub(super) const fn unseen(_: &State, _: PageIndex, _: Option<u64>) {}

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
    /// Looks for a page from where the descent stands; whoever comes there past a copy-object says what the version was
    /// before. `passes` is shown each object on the way that has not got the page, which of its own that is, and the version of
    /// the trail that is taken from there, if one is.
    pub(super) fn look<'h>(
        &'h self,
        chain: &mut Descent<'h, OBJECT, State>,
        mut index: PageIndex,
        mut since: Option<u64>,
        mut passes: impl FnMut(&State, PageIndex, Option<u64>),
    ) -> Found {
        let (mut depth, mut sole) = (0, true);
        let mut since_hop = 0;
        let found = loop {
            let state = chain.here();
            self.stats.count(Event::ChainVisited);
            sole &= state.is_sole_anonymous();
            match state.slots.get(index) {
                Slot::Resident(frame) => {
                    if self.frames.page(frame).is_filling() && !self.has(Defect::SeesWhatFills) {
                        break Found::Busy(frame);
                    }
                    break Found::Page(Page { frame, index, depth, sole, family: None });
                }
                Slot::Zero => break Found::Nothing,
                Slot::Swapped(_) => break Found::PageIn(state.id(), index),
                Slot::Absent if state.pager != Pager::None => break Found::PageIn(state.id(), index),
                Slot::Absent => {}
            }
            if state.role != Role::Plain && since.is_none() {
                since = Some(self.objects.version());
            }
            (depth, since_hop) = (depth + 1, since_hop + 1);
            let version = self.trails_now();
            match state.hop(index, version) {
                Some(Hop::Nothing) => break Found::Nothing,
                Some(Hop::To(object, page, by_copy)) => {
                    since = since.or_else(|| by_copy.then(|| self.objects.version()));
                    passes(state, index, Some(version));
                    let hopped = self.objects.get(object).hop_down(chain, || self.trails_now() == version);
                    if !hopped || !self.has_hopped(chain.here(), object, version) {
                        break Found::Changed;
                    }
                    (index, sole, since_hop) = (page, false, 0);
                    continue;
                }
                Some(Hop::Unlaid) if depth == 1 => break Found::Deep,
                Some(Hop::Unlaid) | None if since_hop > TRAIL_STRIDE => break Found::Deep,
                Some(Hop::Unlaid) | None => {}
            }
            let Some((object, below)) = state.below(index) else { break Found::Nothing };
            if !self.has(Defect::SeesThroughShadows) {
                passes(state, index, None);
            }
            index = below;
            self.objects.get(object).step_down(chain);
        };
        let decided = matches!(found, Found::Page(_) | Found::Nothing);
        let is_past = since.is_some_and(|since| decided && since != self.objects.version());
        if is_past && !self.has(Defect::ReadsPastAPush) { Found::Changed } else { found }
    }

    /// What a guest sees at an address of an entry, changing nothing: for audits.
    pub(crate) fn survey<const OUTER: u8>(
        &self,
        entry: &Entry,
        at: Ipa,
        held: &mut Held<'_, OUTER>,
    ) -> Sight {
        let nothing = Sight { slot: Slot::Absent, store: None };
        let Some(mut index) = entry.page_at(at) else { return nothing };
        let mut chain = self.objects.get(entry.object).descend(held);
        loop {
            let state = chain.here();
            let slot = state.slots.get(index);
            let store = match state.pager {
                Pager::Image(store) | Pager::Disk(store) => Some((store, index)),
                Pager::None | Pager::Device(_) => None,
            };
            let slot = state.pager.device_frame(index).map_or(slot, Slot::Resident);
            let below = state.below(index).filter(|_| slot == Slot::Absent && store.is_none());
            let Some((object, next)) = below else { return Sight { slot, store } };
            self.objects.get(object).step_down(&mut chain);
            index = next;
        }
    }
}

/// What a guest sees.
pub(crate) struct Sight {
    /// The slot that decides it.
    pub(crate) slot: Slot,
    /// If the slot is absent: the store and its page that have the contents. Else the page is zero.
    pub(crate) store: Option<(StoreId, PageIndex)>,
}
