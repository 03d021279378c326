//! The end of a fault: the page is there, and serves the purpose.
//!
//! The owner's lock is held, so it stays there. What lies above the owner may not be locked any more: see
//! `finish_found`. Called by every way through a fault that finds or makes a page. Calls the pmap.

use super::{Copied, Instruction, Place, Step, WaitFor};
use crate::Vm;
use crate::addr::Pfn;
use crate::lock::{Held, OBJECT};
use crate::map::Map;
use crate::pmap::{Entered, OutOfTables, Pmap as _};
use crate::prot::Prot;
use crate::store::Machine;

/// What the page is wanted for.
pub(super) enum Purpose<'b> {
    /// To be mapped, for this instruction if for any in particular.
    Enter(Option<Instruction>),
    /// To read bytes from this offset on.
    Read(usize, &'b mut [u8]),
    /// To write bytes from this offset on.
    Write(usize, &'b [u8]),
    /// To be kept in its frame, which goes here.
    Wire(&'b mut Option<Pfn>),
}

impl Purpose<'_> {
    /// Somebody waits for a page, in a `new` frame or not: it is not to go again before he has had it, however much memory
    /// there is now.
    pub(super) fn needs<M: Machine>(&self, map: &Map<M>, frame: Pfn, new: bool) {
        if let Self::Enter(Some(by)) = *self {
            map.need(by, frame, new);
        }
    }

    /// Some of the way is done, and interrupts come first (I6): an instruction faults again.
    pub(super) const fn in_part(&self) -> Copied {
        match self {
            Self::Enter(_) => Copied::Done,
            Self::Read(..) | Self::Write(..) | Self::Wire(_) => Copied::Wait(WaitFor::Turn),
        }
    }
}

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

    /// The same with a page that was there before: pageout may have it in hand. It may lie below others that are not locked
    /// any more, `since` a version: of what has gained it meanwhile nothing is mapped, for whoever took away the leaves of
    /// that page, or looks for those of this one, has been here already.
    #[inline]
    pub(super) fn finish_found(
        &self,
        map: &Map<M>,
        place: Place<'_>,
        purpose: &mut Purpose<'_>,
        frame: Pfn,
        (prot, since): (Prot, Option<u64>),
        held: &mut Held<'_, OBJECT>,
    ) -> Step {
        let page = self.frames.page(frame);
        match *purpose {
            Purpose::Enter(by) => {
                page.map();
                self.enter(map, place, by, frame, (prot, since), held)
            }
            Purpose::Read(..) | Purpose::Write(..) | Purpose::Wire(_) => {
                page.touch();
                self.finish_unmapped(purpose, frame, held)
            }
        }
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
            map.need(by, frame, false);
        }
        let (mut pmap, _held) = map.pmap.lock(held);
        if self.has_gained(since) {
            return Step::Again;
        }
        match pmap.enter(place.page, frame, prot, &mut |harvest| self.frames.note(harvest)) {
            Ok(Entered::Leaf) => Step::Done,
            Ok(Entered::Part) => Step::Part,
            Err(OutOfTables) => Step::Wait(WaitFor::Memory),
        }
    }

    /// True if what others shadow has gained a page since a version, where that matters.
    pub(super) fn has_gained(&self, since: Option<u64>) -> bool {
        since.is_some_and(|since| since != self.objects.version())
    }
}
