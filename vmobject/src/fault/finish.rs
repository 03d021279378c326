//! The end of a fault: the page is there, and serves the purpose.
//!
//! The owner's lock is held, so it stays there. What lies above the owner may not be locked any more: see
//! `finish_deep`. Called by every way through a fault that finds or makes a page. Calls the pmap.

use super::{Instruction, Place, Purpose, Step, WaitFor};
use crate::Vm;
use crate::addr::Pfn;
use crate::lock::{Held, OBJECT};
use crate::map::Map;
use crate::pmap::{OutOfTables, Pmap as _};
use crate::prot::Prot;
use crate::store::Machine;

impl<M: Machine> Vm<M> {
    /// The page is there: serves the purpose with it. The owner's lock is held.
    #[inline]
    pub(super) fn finish(
        &self,
        map: &Map<M>,
        place: Place<'_>,
        purpose: &mut Purpose<'_>,
        frame: Pfn,
        prot: Prot,
        held: &mut Held<'_, OBJECT>,
    ) -> Step {
        match purpose {
            Purpose::Enter(by) => self.enter(map, place, *by, frame, (prot, None), held),
            Purpose::Read(..) | Purpose::Write(..) | Purpose::Wire(_) => {
                self.finish_unmapped(purpose, frame, held)
            }
        }
    }

    /// The same with a page that was there before: pageout may have it in hand.
    #[inline]
    pub(super) fn finish_found(
        &self,
        map: &Map<M>,
        place: Place<'_>,
        purpose: &mut Purpose<'_>,
        frame: Pfn,
        prot: Prot,
        held: &mut Held<'_, OBJECT>,
    ) -> Step {
        match purpose {
            Purpose::Enter(_) => self.frames.page(frame).map(),
            Purpose::Read(..) | Purpose::Write(..) | Purpose::Wire(_) => self.frames.page(frame).touch(),
        }
        self.finish(map, place, purpose, frame, prot, held)
    }

    /// The same with a page below others that are not locked any more. Of what has gained it meanwhile nothing is
    /// mapped: whoever took away the leaves of that page, or looks for those of this one, has been here already.
    pub(super) fn finish_deep(
        &self,
        map: &Map<M>,
        place: Place<'_>,
        purpose: &mut Purpose<'_>,
        (frame, since): (Pfn, u64),
        prot: Prot,
        held: &mut Held<'_, OBJECT>,
    ) -> Step {
        let Purpose::Enter(by) = *purpose else {
            return self.finish_found(map, place, purpose, frame, prot, held);
        };
        self.frames.page(frame).map();
        self.enter(map, place, by, frame, (prot, Some(since)), held)
    }

    /// Maps a page, if nothing that others shadow has gained any since a version.
    #[inline]
    fn enter(
        &self,
        map: &Map<M>,
        place: Place<'_>,
        by: Option<Instruction>,
        frame: Pfn,
        (prot, since): (Prot, Option<u64>),
        held: &mut Held<'_, OBJECT>,
    ) -> Step {
        if (self.frames.is_short() || map.is_limited())
            && let Some(by) = by
        {
            map.need(by, frame);
        }
        let (mut pmap, _held) = map.pmap.lock(held);
        if since.is_some_and(|since| since != self.objects.version()) {
            return Step::Again;
        }
        match pmap.enter(place.page, frame, prot, &mut |harvest| self.frames.note(harvest)) {
            Ok(()) => Step::Done,
            Err(OutOfTables) => Step::Wait(WaitFor::Memory),
        }
    }
}
