//! A guest's limit of frames: what is charged to it, and how few it can be given.
//!
//! Charged is every frame with a page of an anonymous object that the map writes in place: what the guest has for
//! itself. What it shares is charged to nobody: pages of images and disks, and what a clone, a parent or a snapshot sees as
//! well; a page that was shared is charged from the moment that the guest has written to its region since, or is alone
//! with it. Neither are tables.
//!
//! A guest that has no room for one more transfer under its limit is held up at its next fault until pageout has made
//! some, whether or not memory is short. What EL2 does for it, such as its disks' work, is not held up, for the end of that
//! may be what makes room; it is paid at the next fault, as is a transfer of each other vCPU that faulted at the same
//! time. Room for what all its vCPUs need at once is left always, so each gets on (I15).
//! Called by whoever sets limits, by `fault` and `pageout`. Locks: the map, then its objects, one at a time.

use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};

use super::{Entry, Map};
use crate::Vm;
use crate::addr::{Ipa, PageIndex, Pfn};
use crate::limits::{CLUSTER_PAGES, NEED_PAGES};
use crate::lock::{CALLER, Held, MAP, REGISTRY, Ranked};
use crate::object::index::Slot;
use crate::object::{Pager, State};
use crate::stats::Event;
use crate::store::Machine;

/// No limit.
const NONE: u32 = u32::MAX;
/// Transfers for which there is room above what a guest needs: it begins one with this many less, pageout goes on to
/// twice as many, and then there is one page at least that can go.
const TRANSFERS: u32 = 3;

/// One map's limit.
pub(crate) struct Limit {
    frames: AtomicU32,
    /// Where pageout looks next for something of the guest's own.
    hand: AtomicU64,
}

impl Limit {
    pub(super) const fn none() -> Self {
        Self { frames: AtomicU32::new(NONE), hand: AtomicU64::new(0) }
    }
}

/// Why a limit was not set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LimitError {
    /// With fewer frames than this it could not get on.
    Least(u32),
    /// There is nothing that pages could go to.
    NoSwap,
    /// The heap has no room for the books.
    NoMemory,
}

/// Which maps have limits.
pub(crate) struct Limited<M: Machine> {
    maps: Ranked<REGISTRY, Vec<Weak<Map<M>>>>,
    /// There are some.
    any: AtomicBool,
    /// One of them may have too much.
    asked: AtomicBool,
}

impl<M: Machine> Limited<M> {
    pub(crate) const fn new() -> Self {
        Self { maps: Ranked::new(Vec::new()), any: AtomicBool::new(false), asked: AtomicBool::new(false) }
    }

    /// True if pageout is to look.
    #[inline]
    pub(crate) fn is_asked(&self) -> bool {
        self.asked.load(Relaxed)
    }

    /// Says whether it is.
    pub(crate) fn ask(&self, asked: bool) {
        self.asked.store(asked, Relaxed);
    }

    /// Pages have become the own ones of a guest that did not ask for them, and may stand still: pageout is to look.
    pub(crate) fn has_grown(&self) {
        if self.any.load(Relaxed) {
            self.ask(true);
        }
    }

    /// The map at a place of the list, modulo its length, and that length.
    pub(crate) fn at(&self, place: usize, held: &mut Held<'_, CALLER>) -> (Option<Arc<Map<M>>>, usize) {
        let (maps, _held) = self.maps.lock(held);
        let count = maps.len();
        (if count == 0 { None } else { maps[place % count].upgrade() }, count)
    }
}

/// What a look for a page of the guest's own came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// This one; the next look begins behind it.
    Frame(Pfn),
    /// None yet, for want of budget.
    More,
    /// The end of the map; the next look begins at its start.
    End,
}

/// True for a region that the guest writes in place, if its object is anonymous.
fn is_own(entry: &Entry, state: &State) -> bool {
    !entry.needs_copy && state.pager == Pager::None
}

impl<M: Machine> Map<M> {
    /// How many frames the guest may have of its own, if that is limited.
    pub fn limit(&self) -> Option<u32> {
        Some(self.limit.frames.load(Relaxed)).filter(|&frames| frames != NONE)
    }

    /// True if it is.
    #[inline]
    pub(crate) fn is_limited(&self) -> bool {
        self.limit.frames.load(Relaxed) != NONE
    }
}

impl<M: Machine> Vm<M> {
    /// The fewest frames that a map's guest can be limited to: each of its vCPUs can have what it needs, and there is
    /// room for transfers.
    pub fn least_limit(&self, map: &Map<M>) -> u32 {
        let vcpus = map.needs.get().map_or(0, |all| all.len()).max(1);
        u32::try_from(vcpus * NEED_PAGES).unwrap_or(NONE - 1).saturating_add(TRANSFERS * CLUSTER_PAGES)
    }

    /// Limits how many frames a guest may have of its own, or not any more. Pageout sees to it from now on; who waits
    /// for memory may try again.
    pub fn set_limit<const OUTER: u8>(
        &self,
        map: &Arc<Map<M>>,
        frames: Option<u32>,
        held: &mut Held<'_, OUTER>,
    ) -> Result<(), LimitError> {
        let least = self.least_limit(map);
        if frames.is_some_and(|frames| frames < least) {
            return Err(LimitError::Least(least));
        }
        if frames.is_some() && self.swap.info(held).slots == 0 {
            return Err(LimitError::NoSwap);
        }
        let (mut maps, _held) = self.limited.maps.lock(held);
        maps.retain(|other| other.as_ptr() != Arc::as_ptr(map) && other.strong_count() > 0);
        if frames.is_some() {
            maps.try_reserve(1).map_err(|_| LimitError::NoMemory)?;
            maps.push(Arc::downgrade(map));
        }
        map.limit.frames.store(frames.unwrap_or(NONE), Relaxed);
        self.limited.any.store(!maps.is_empty(), Relaxed);
        self.limited.ask(!maps.is_empty());
        Ok(())
    }

    /// How many frames a guest has of its own.
    pub fn own_frames<const OUTER: u8>(&self, map: &Map<M>, held: &mut Held<'_, OUTER>) -> u32 {
        let held: &mut Held<'_, CALLER> = &mut held.deepen();
        let (entries, mut held) = map.entries.read(held);
        entries.iter().map(|entry| self.own_of(entry, &mut held)).sum()
    }

    /// Pages of its own that are on their way to swap.
    pub(crate) fn own_leaving(&self, map: &Map<M>, held: &mut Held<'_, CALLER>) -> u32 {
        let (entries, mut held) = map.entries.read(held);
        let leaving = |entry: &Entry| {
            let (state, _held) = self.objects.get(entry.object).read(&mut held);
            if is_own(entry, &state) { state.leaving } else { 0 }
        };
        entries.iter().map(leaving).sum()
    }

    fn own_of(&self, entry: &Entry, held: &mut Held<'_, MAP>) -> u32 {
        let (state, _held) = self.objects.get(entry.object).read(held);
        if is_own(entry, &state) { state.slots.counts().resident } else { 0 }
    }

    /// By how much a guest has more than its limit with room for so many transfers beneath it.
    pub(crate) fn excess(&self, map: &Map<M>, transfers: u32, held: &mut Held<'_, CALLER>) -> u32 {
        let most = map.limit.frames.load(Relaxed).saturating_sub(transfers * CLUSTER_PAGES);
        self.own_frames(map, held).saturating_sub(most)
    }

    /// True if a limited guest has to wait with its fault, until pageout has taken something from it.
    #[cold]
    pub(crate) fn must_pay(&self, map: &Map<M>, held: &mut Held<'_, CALLER>) -> bool {
        let pays = self.excess(map, 1, held) > 0;
        if pays {
            map.stats.count(Event::FaultHeld);
            self.limited.ask(true);
        }
        pays
    }

    /// The guest's own page behind the last one that this told, looking at no more than `left` leaves of indexes.
    pub(crate) fn next_own(&self, map: &Map<M>, left: &mut u32, held: &mut Held<'_, CALLER>) -> Next {
        let from = Ipa::new(map.limit.hand.load(Relaxed));
        let go_on = |at: Option<Ipa>| map.limit.hand.store(at.map_or(0, Ipa::bits), Relaxed);
        let (entries, mut held) = map.entries.read(held);
        for entry in entries.iter().filter(|entry| from < entry.range.end()) {
            let (state, _held) = self.objects.get(entry.object).read(&mut held);
            let start = from.max(entry.range.start());
            let (Some(mut page), Some(end)) = (entry.page_at(start), end_of(entry)) else { continue };
            if !is_own(entry, &state) {
                continue;
            }
            while let Some((present, _)) = state.slots.next_present(page..end) {
                if *left == 0 {
                    go_on(entry.place_of(present));
                    return Next::More;
                }
                *left -= 1;
                let rest = state.slots.rest_of_leaf(present);
                let here = (present.number()..end.number()).map(PageIndex::new);
                let found = here.zip(rest.iter()).find_map(|(page, slot)| match slot {
                    Slot::Resident(frame) => Some((page, frame)),
                    Slot::Absent | Slot::Zero | Slot::Swapped(_) => None,
                });
                if let Some((page, frame)) = found {
                    go_on(page.checked_add(1).and_then(|next| entry.place_of(next)));
                    return Next::Frame(frame);
                }
                let Some(next) = present.checked_add(state.slots.left_in_leaf(present)) else { break };
                page = next;
            }
        }
        go_on(None);
        Next::End
    }
}

/// The object's page behind an entry's last.
fn end_of(entry: &Entry) -> Option<PageIndex> {
    entry.first.checked_add(u32::try_from(entry.range.pages()).ok()?)
}
