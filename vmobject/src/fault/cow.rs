//! Copy on write: a page from below becomes a page of the top object.
//!
//! Usually it is copied. If nothing else can reach the objects from below the top down to the page, the
//! frame itself moves (D17, under the condition of D16): a pager's page never does. Called by the fault,
//! which holds the top object for writing throughout.

use super::chain::Page;
use super::{Place, Purpose, Step, WaitFor};
use crate::addr::{IpaRange, PageIndex, Pfn};
use crate::lock::{Held, OBJECT};
use crate::map::Map;
use crate::object::State;
use crate::object::index::Slot;
use crate::page::Queue;
use crate::pmap::Pmap as _;
use crate::stats::Event;
use crate::store::{Machine, PhysMemory as _};
use crate::{Vm, VmError};

impl<M: Machine> Vm<M> {
    /// A copy of `from` as a page of the top object; `from`'s owner is locked. `None` for want of memory.
    pub(super) fn copy_up(
        &self,
        top: &mut State,
        index: PageIndex,
        from: Pfn,
        held: &mut Held<'_, OBJECT>,
    ) -> Option<Pfn> {
        let frame = self.give_frame(top, index, Queue::Active, held)?;
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
        let entered = matches!((&step, &purpose), (Step::Done, Purpose::Enter(_)));
        if !entered && let Some(range) = IpaRange::page_of(place.page) {
            let (mut pmap, _held) = map.pmap.lock(held);
            pmap.remove(range, &mut |harvest| self.frames.note(harvest));
        }
        step
    }

    /// Moves a frame from an object below to the top. The look that found it has let go of the owner, so
    /// the way down is gone again, the owner's parent locked while the owner is.
    pub(super) fn move_up(
        &self,
        map: &Map<M>,
        place: Place<'_>,
        purpose: &mut Purpose<'_>,
        top: &mut State,
        page: Page,
        held: &mut Held<'_, OBJECT>,
    ) -> Step {
        let Some((first, index)) = top.below(place.index) else { return Step::Again };
        let moved = if page.depth == 0 {
            let (mut owner, mut held) = self.objects.get(first).write_below(held);
            let alone = owner.is_sole_anonymous()
                || (page.family.is_some() && page.family == self.only_shadowed_at(&owner, &mut held));
            alone.then(|| self.take_up(top, place.index, &mut owner, index, page.frame, &mut held)).flatten()
        } else {
            let (mut chain, mut index) = (self.objects.get(first).descend(held), index);
            for _ in 1..page.depth {
                let Some((next, below)) = chain.here().below(index) else { return Step::Again };
                if !chain.here().is_sole_anonymous() {
                    return Step::Again;
                }
                self.objects.get(next).step_down(&mut chain);
                index = below;
            }
            let (parent, held) = chain.split();
            let Some((owner, index)) = parent.below(index).filter(|_| parent.is_sole_anonymous()) else {
                return Step::Again;
            };
            let (mut owner, mut held) = self.objects.get(owner).write_below(held);
            let alone = owner.is_sole_anonymous();
            alone.then(|| self.take_up(top, place.index, &mut owner, index, page.frame, &mut held)).flatten()
        };
        match moved {
            Some(Ok(())) => {}
            Some(Err(VmError::NoMemory)) => return Step::Wait(WaitFor::Memory),
            Some(Err(_)) | None => return Step::Again,
        }
        map.stats.count(Event::FaultMove);
        self.drop_clean_slot(page.frame, held);
        self.finish_found(map, place, purpose, page.frame, (place.entry.prot, None), held)
    }

    /// Makes `owner`'s page the top's; `None` if it is not what it was.
    fn take_up(
        &self,
        top: &mut State,
        ours: PageIndex,
        owner: &mut State,
        theirs: PageIndex,
        frame: Pfn,
        held: &mut Held<'_, OBJECT>,
    ) -> Option<Result<(), VmError>> {
        if owner.slots.get(theirs) != Slot::Resident(frame) || self.frames.page(frame).is_busy() {
            return None;
        }
        if !self.has_room_at(top, ours) {
            return Some(Err(VmError::NoMemory));
        }
        let gained = self.objects.gain(top, ours, Slot::Resident(frame), held);
        Some(gained.map(|_| {
            if owner.lose(theirs) {
                self.objects.chore(owner.id().number(), held);
            }
            self.rename(top, ours, Slot::Resident(frame));
        }))
    }
}
