//! Mapping a whole chunk at once: 2 MiB of a guest that lie side by side in memory, all there and all to be read only.
//!
//! A clone that reads what its ancestor has takes one fault for 512 pages, and no table for them. Only what may not be
//! written is mapped so. What the hardware says of a block it says of all its pages: one write would make 512 of them
//! dirty, to be cleaned, written to an image and copied, and neither a page that keeps its swap slot until it is
//! written (P5) nor one whose store wants to know (P7) could be told from its neighbours. A write breaks the
//! block (the pmap does that), and then every page speaks for itself. While memory is short no block is entered:
//! pageout wants to know of each page whether it is used.
//!
//! Called by faults with the owner's lock held, and the top object's: F1 holds for each page of the block. What may not
//! be looked at without them is looked at last; usually one of the first looks says no.

use super::Place;
use super::around::Around;
use crate::Vm;
use crate::addr::{CHUNK_PAGES, IpaRange, PageIndex, Pfn};
use crate::defect::Defect;
use crate::lock::{Held, OBJECT};
use crate::map::Map;
use crate::pmap::Pmap as _;
use crate::prot::Prot;
use crate::stats::Event;
use crate::store::Machine;

impl<M: Machine> Vm<M> {
    /// Maps the chunk of a page, found in this frame, as one block, if that can be; else nothing is done.
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
        let first = |page: PageIndex| page.checked_sub(offset);
        let (slots, index) = match *around {
            Around::Own(top, _) | Around::Shared(top) => (&top.slots, place.index),
            Around::Below { top, owner, index } => {
                // And all of it shows what lies below.
                let sees = |first: PageIndex| {
                    first.checked_add(CHUNK_PAGES - 1).is_some_and(|last| top.below(last).is_some())
                };
                let clear =
                    first(place.index).is_some_and(|first| top.slots.is_chunk_absent(first) && sees(first));
                if !clear && !self.has(Defect::BlockOverOwn) {
                    return false;
                }
                (&owner.slots, index)
            }
        };
        let Some(index) = first(index) else { return false };
        let (mut pmap, _held) = map.pmap.lock(held);
        if !pmap.is_bare(chunk) {
            return false;
        }
        let Some(run) = slots.chunk_run(index).filter(|&run| self.frames.are_at_rest(run)) else {
            return false;
        };
        let kept = if self.has(Defect::BlockWritable) { Prot::NONE } else { Prot::WRITE };
        let prot = place.entry.prot.without(kept);
        let entered = pmap.enter_block(chunk, run, prot, &mut |harvest| self.frames.note(harvest)).is_ok();
        if entered {
            map.stats.count(Event::BlockMapped);
        }
        entered
    }
}
