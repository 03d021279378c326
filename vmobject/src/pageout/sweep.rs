//! Visiting every leaf of one page, in steps.
//!
//! From the page's owner through all that shadow it to the maps over them: only windows that contain the page,
//! and nothing above an object that hides it. No lock is held between two leaves. That is sound because the
//! page is marked unmapped first, and whoever enters a leaf meanwhile clears the mark; because leaves come to
//! be only so; and because the reverse map says if a mapping moved where the walk might miss it: then it
//! begins again. Called by `pageout`.

use alloc::sync::Arc;

use crate::Vm;
use crate::addr::{CHUNK_PAGES, Ipa, IpaRange, PageIndex, Pfn};
use crate::defect::Defect;
use crate::limits::MAX_SWEEPS;
use crate::lock::{CALLER, Held};
use crate::map::Map;
use crate::object::Life;
use crate::object::index::Slot;
use crate::page::Owner;
use crate::pmap::Pmap as _;
use crate::rmap::MappingId;
use crate::stats::Event;
use crate::store::Machine;

/// What is done with each leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Aim {
    /// See whether it was used.
    Age,
    /// Remove it.
    Unmap,
}

/// A walk that is under way.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sweep {
    pub(super) frame: Pfn,
    pub(super) aim: Aim,
    root: u32,
    here: u32,
    at: PageIndex,
    /// The last mapping that was visited here.
    cursor: Option<MappingId>,
    /// What is here is seen from above.
    open: bool,
    stamp: (u64, u64),
    begun: u32,
}

/// What a walk came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Swept {
    /// Every leaf was visited.
    All,
    /// Not yet, for want of budget.
    More,
    /// Not to be: the page is needed, or its maps keep changing.
    Not,
}

/// Stops that a block counts for besides its own: what it says, it says of 512 pages.
const BLOCK_STOPS: u32 = 31;

enum Stop<M: Machine> {
    Map(Option<Arc<Map<M>>>, Ipa),
    Object(u32, PageIndex),
}

impl<M: Machine> Vm<M> {
    /// Sets out for a page's leaves; `None` if it is no object's page that could be evicted.
    pub(super) fn set_out(&self, frame: Pfn, aim: Aim, held: &mut Held<'_, CALLER>) -> Option<Sweep> {
        let page = self.frames.page(frame);
        let Owner::Object(storage, place) = page.owner() else { return None };
        let object = self.objects.of_storage(storage)?;
        let (state, mut held) = object.write(held);
        let at = state.slots.page(place)?;
        let there = state.slots.storage() == storage && state.slots.get(at) == Slot::Resident(frame);
        if !there || state.life != Life::Live || page.is_busy() || page.is_wired() {
            return None;
        }
        let open = !page.is_unmapped();
        if aim == Aim::Unmap {
            page.set_unmapped(true);
        }
        let (root, stamp) = (state.id().number(), self.links.read(&mut held).0.stamp());
        Some(Sweep { frame, aim, root, here: root, at, cursor: None, open, stamp, begun: 1 })
    }

    /// Goes on, at most `left` stops.
    pub(super) fn sweep(&self, sweep: &mut Sweep, left: &mut u32, held: &mut Held<'_, CALLER>) -> Swept {
        loop {
            if *left == 0 {
                return Swept::More;
            }
            *left -= 1;
            let Some(stop) = self.next_stop(sweep, held) else {
                if !self.is_stale(sweep, held) {
                    return Swept::All;
                }
                // What was unmapped stays so; only what is new since costs anything.
                let again = if sweep.begun < MAX_SWEEPS { self.begin_again(sweep, held) } else { None };
                let Some(again) = again else { return Swept::Not };
                *sweep = again;
                continue;
            };
            match stop {
                Stop::Map(None, _) => {}
                Stop::Map(Some(map), _) if map.is_needed(sweep.frame) => return Swept::Not,
                Stop::Map(Some(map), at) => {
                    if self.visit(&map, at, sweep, held) {
                        *left = left.saturating_sub(BLOCK_STOPS);
                    }
                }
                Stop::Object(number, page) => {
                    let Some(object) = self.objects.at(number) else { return Swept::Not };
                    // A collapse may have moved the very page up here: that hides nothing.
                    let slot = object.read(held).0.slots.get(page);
                    let itself =
                        slot == Slot::Resident(sweep.frame) && !self.has(Defect::EvictionMissesMoved);
                    let open = slot == Slot::Absent || itself;
                    (sweep.here, sweep.at, sweep.cursor, sweep.open) = (number, page, None, open);
                }
            }
        }
    }

    fn is_stale(&self, sweep: &Sweep, held: &mut Held<'_, CALLER>) -> bool {
        self.links.read(held).0.stamp() != sweep.stamp
    }

    /// From the start, after something moved. The mark is not set again: whoever cleared it uses the page.
    fn begin_again(&self, sweep: &Sweep, held: &mut Held<'_, CALLER>) -> Option<Sweep> {
        let page = self.frames.page(sweep.frame);
        if sweep.aim == Aim::Unmap && !page.is_unmapped() {
            return None;
        }
        let fresh = self.set_out(sweep.frame, sweep.aim, held)?;
        Some(Sweep { open: true, begun: sweep.begun + 1, ..fresh })
    }

    /// The next map or object on the way; `None` at the end, or if something moved.
    fn next_stop(&self, sweep: &mut Sweep, held: &mut Held<'_, CALLER>) -> Option<Stop<M>> {
        let (links, _held) = self.links.read(held);
        if links.stamp() != sweep.stamp {
            return None;
        }
        let mapping = if sweep.open { links.next_mapping(sweep.here, sweep.cursor, sweep.at) } else { None };
        if let Some((id, mapping, at)) = mapping {
            sweep.cursor = Some(id);
            return Some(Stop::Map(mapping.holder.upgrade(), at));
        }
        let (object, page) = links.next_in_walk(sweep.root, sweep.here, sweep.at, sweep.open)?;
        Some(Stop::Object(object, page))
    }

    /// Ages or takes away the leaf that a map has of the page; true if that was a whole block.
    fn visit(&self, map: &Map<M>, at: Ipa, sweep: &Sweep, held: &mut Held<'_, CALLER>) -> bool {
        let Some(range) = IpaRange::page_of(at) else { return false };
        let (mut pmap, _held) = map.pmap.lock(held);
        let Some(leaf) = pmap.lookup(at).filter(|leaf| leaf.frame == sweep.frame) else { return false };
        self.stats.count(Event::LeafVisited);
        let sink = &mut |harvest| self.frames.note(harvest);
        if leaf.block {
            // It says of all its pages that they are used, when one is; and to break it takes a table, just now. What is
            // used is faulted back page by page.
            if let Some(block) = IpaRange::from_pages(at.chunk(), CHUNK_PAGES) {
                self.stats.count(Event::BlockTaken);
                pmap.remove(block, sink);
            }
            return true;
        }
        match sweep.aim {
            Aim::Age => pmap.age(range, sink),
            Aim::Unmap => pmap.remove(range, sink),
        }
        false
    }
}
