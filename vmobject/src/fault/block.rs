//! Mapping a whole chunk at once: 2 MiB of a guest that lie side by side in memory, all there and all to be read only.
//!
//! A clone that reads what its ancestor has takes one fault for 512 pages, and no table for them. Only what may not be
//! written is mapped so. What the hardware says of a block it says of all its pages: one write would make 512 of them
//! dirty, to be cleaned, written to an image and copied, and neither a page that keeps its swap slot until it is
//! written (P5) nor one whose store wants to know (P7) could be told from its neighbours. A write breaks the
//! block (the pmap does that), and then every page speaks for itself. While memory is short no block is entered:
//! pageout wants to know of each page whether it is used.
//!
//! Called by faults as for the page itself: F1 holds for each page of the block, however many objects lie above (`veil`). What may not be looked at without them is looked at last; usually one of the first looks says no.

use super::Place;
use super::around::Around;
use crate::Vm;
use crate::addr::{CHUNK_PAGES, IpaRange, Pfn};
use crate::defect::Defect;
use crate::lock::{Held, OBJECT};
use crate::map::Map;
use crate::pmap::{Entered, Pmap as _};
use crate::prot::Prot;
use crate::stats::Event;
use crate::store::Machine;

impl<M: Machine> Vm<M> {
    /// Maps the chunk of a page, found in this frame, as one block, or a part of the way there, if that can be; else nothing
    /// is done.
    #[inline]
    pub(super) fn enter_block(
        &self,
        map: &Map<M>,
        place: Place<'_>,
        around: &Around<'_>,
        frame: Pfn,
        held: &mut Held<'_, OBJECT>,
    ) -> bool {
        let offset = place.page.page_in_chunk();
        // What lies anywhere lies right by chance once in 512 times.
        frame.number() % CHUNK_PAGES == offset && self.try_block(map, place, around, offset, held)
    }

    fn try_block(
        &self,
        map: &Map<M>,
        place: Place<'_>,
        around: &Around<'_>,
        offset: u32,
        held: &mut Held<'_, OBJECT>,
    ) -> bool {
        let chunk = place.page.chunk();
        let inside = IpaRange::from_pages(chunk, CHUNK_PAGES)
            .is_some_and(|whole| whole.intersection(place.entry.range) == Some(whole));
        if !inside || self.frames.is_short() || map.is_limited() {
            return false;
        }
        // And all of it shows what the owner has.
        if !around.veil.is_none() && !self.has(Defect::BlockOverOwn) {
            return false;
        }
        let Some(index) = around.index.checked_sub(offset) else { return false };
        let (mut pmap, _held) = map.pmap.lock(held);
        if !pmap.is_bare(chunk) || self.has_gained(around.since) {
            return false;
        }
        let run = around.owner.slots.chunk_run(index).filter(|&run| self.frames.are_at_rest(run));
        let Some(run) = run else { return false };
        let kept = if self.has(Defect::BlockWritable) { Prot::NONE } else { Prot::WRITE };
        let prot = place.entry.prot.without(kept);
        let entered = pmap.enter_block(chunk, run, prot, &mut |harvest| self.frames.note(harvest));
        if entered == Ok(Entered::Leaf) {
            map.stats.count(Event::BlockMapped);
        }
        entered.is_ok()
    }
}
