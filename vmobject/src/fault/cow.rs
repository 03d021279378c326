//! Copy on write: a page from below becomes a page of the top object.
//!
//! Usually it is copied. If nothing else can reach the objects from below the top down to the page, the
//! frame itself moves (D17, under the condition of D16): a pager's page never does. Called by the fault,
//! which holds the top object for writing throughout.

use super::chain::Page;
use super::{Place, Purpose, Step, WaitFor};
use crate::Vm;
use crate::addr::{IpaRange, PageIndex, Pfn};
use crate::lock::{Held, OBJECT};
use crate::map::Map;
use crate::object::index::Slot;
use crate::object::{ObjectId, State};
use crate::page::Queue;
use crate::pmap::Pmap as _;
use crate::stats::Event;
use crate::store::{Machine, PhysMemory as _};

impl<M: Machine> Vm<M> {
    /// A copy of `from` as a page of the top object; `from`'s owner is locked. `None` for want of memory.
    pub(super) fn copy_up(
        &self,
        top: &mut State,
        index: PageIndex,
        from: Pfn,
        held: &mut Held<'_, OBJECT>,
    ) -> Option<Pfn> {
        let frame = self.frames.allocate(top.id().number(), index, Queue::Active, held)?;
        if top.index.set(index, Slot::Resident(frame)).is_err() {
            self.frames.free(frame, held);
            return None;
        }
        self.machine.memory().copy(from, frame);
        Some(frame)
    }

    /// Serves the purpose with a page that has just replaced another one. The guest may still have the
    /// old one mapped: an access of EL2 takes that away, so that the guest sees what EL2 writes.
    pub(super) fn replace(
        &self,
        map: &Map<M>,
        place: Place<'_>,
        purpose: &mut Purpose<'_>,
        frame: Pfn,
        held: &mut Held<'_, OBJECT>,
    ) -> Step {
        let step = self.finish(map, place, purpose, frame, place.entry.prot, held);
        let entered = matches!((&step, &purpose), (Step::Done, Purpose::Enter));
        if !entered && let Some(range) = IpaRange::page_of(place.page) {
            let (mut pmap, _held) = map.pmap.lock(held);
            pmap.remove(range, &mut |harvest| self.frames.note(harvest));
        }
        step
    }

    /// Moves a frame from the object below to the top. The look that found it has let go of the owner,
    /// so the owner is asked again.
    #[expect(clippy::too_many_arguments, reason = "the fault's own state, and what its look found")]
    pub(super) fn move_up(
        &self,
        map: &Map<M>,
        place: Place<'_>,
        purpose: &mut Purpose<'_>,
        top: &mut State,
        owner: ObjectId,
        page: Page,
        held: &mut Held<'_, OBJECT>,
    ) -> Step {
        {
            let (mut below, _held) = self.objects.get(owner).write_below(held);
            let same = below.id() == owner && below.index.get(page.index) == Slot::Resident(page.frame);
            let free = below.is_sole_anonymous() && !self.frames.page(page.frame).is_busy();
            if !same || !free {
                return Step::Again;
            }
            if top.index.set(place.index, Slot::Resident(page.frame)).is_err() {
                return Step::Wait(WaitFor::Memory);
            }
            let was = below.index.set(page.index, Slot::Absent);
            debug_assert_eq!(was, Ok(Slot::Resident(page.frame)));
            self.frames.page(page.frame).set_owner(top.id().number(), place.index);
        }
        map.stats.count(Event::FaultMove);
        self.finish(map, place, purpose, page.frame, place.entry.prot, held)
    }
}
