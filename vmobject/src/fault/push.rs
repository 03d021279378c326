//! Pushing: before an object changes a page, its newest copy gets what the page was (asymmetric copy).
//!
//! What the copy has already is never replaced. Whoever saw the old page through the copy finds the pushed one
//! at the next access: its leaves are taken away before the source can change. The copy is locked, then the
//! source; then whether they are still what they were to each other is looked at again. Called by the fault and
//! by discard, with no object locked.

use super::chain::{Found, unseen};
use crate::Vm;
use crate::addr::{PageIndex, Pfn};
use crate::lock::{Held, OBJECT};
use crate::object::index::Slot;
use crate::object::{ObjectId, Pager, State};
use crate::pager::{NOBODY, Pushed, WaitFor};
use crate::stats::Event;
use crate::store::{LostPage, Machine, PhysMemory as _};

/// What an attempt came to.
enum Attempt {
    /// The copy has it, or needs it not.
    Done,
    Wait(WaitFor),
    /// The page has to be brought in first.
    PageIn(ObjectId, PageIndex),
    /// The chain below this object is long: a trail is wanted.
    Trail(ObjectId, PageIndex),
    /// The source's name for its copy is stale.
    Stale(ObjectId),
}

impl<M: Machine> Vm<M> {
    /// Pushes a page of an object to its newest copy, unless that has it. A long way to it is walked in parts.
    pub(crate) fn push<const OUTER: u8>(
        &self,
        source: ObjectId,
        page: PageIndex,
        held: &mut Held<'_, OUTER>,
    ) -> Result<Pushed, LostPage> {
        let Some(copy) = self.objects.get(source).read(held).0.copy else { return Ok(Pushed::Again) };
        Ok(match self.try_push(source, copy, page, held) {
            Attempt::Done => Pushed::Again,
            Attempt::Wait(wait) => Pushed::Wait(wait),
            Attempt::PageIn(object, index) => {
                self.page_in((object, index), NOBODY, |_| {}, held)?.map_or(Pushed::Again, Pushed::Wait)
            }
            Attempt::Trail(object, index) => match self.lay_trail(object, index, held) {
                Ok(true) => Pushed::Part,
                Ok(false) => Pushed::Again,
                Err(_) => Pushed::Wait(WaitFor::Memory),
            },
            Attempt::Stale(stale) => {
                self.forget_copy(source, stale, held);
                Pushed::Again
            }
        })
    }

    fn try_push<const OUTER: u8>(
        &self,
        source: ObjectId,
        copy: ObjectId,
        page: PageIndex,
        held: &mut Held<'_, OUTER>,
    ) -> Attempt {
        let (mut above, mut held) = self.objects.get(copy).write(held);
        if above.id() != copy || !above.receives_from(source) {
            return Attempt::Stale(copy);
        }
        let (state, mut held) = self.objects.get(source).write_below(&mut held);
        if state.id() != source || state.copy != Some(copy) {
            return Attempt::Done;
        }
        let Some(ours) = above.page_above(page).filter(|&ours| above.slots.get(ours) == Slot::Absent) else {
            return Attempt::Done;
        };
        match state.slots.get(page) {
            Slot::Resident(frame) if self.frames.page(frame).is_filling() => self.when_filled(frame),
            Slot::Resident(frame) => self.receive(&mut above, ours, Some(frame), &mut held),
            Slot::Zero => self.receive(&mut above, ours, None, &mut held),
            Slot::Swapped(_) => Attempt::PageIn(source, page),
            Slot::Absent if state.pager != Pager::None => Attempt::PageIn(source, page),
            Slot::Absent => {
                let Some((object, index)) = state.below(page) else {
                    return self.receive(&mut above, ours, None, &mut held);
                };
                let mut chain = self.objects.get(object).descend(&mut held);
                match self.look(&mut chain, index, None, unseen) {
                    Found::Page(found) => self.receive(&mut above, ours, Some(found.frame), chain.split().1),
                    Found::Nothing => self.receive(&mut above, ours, None, chain.split().1),
                    Found::Busy(frame) => self.when_filled(frame),
                    Found::Deep => Attempt::Trail(object, index),
                    Found::Changed => Attempt::Done,
                    Found::PageIn(object, index) => Attempt::PageIn(object, index),
                }
            }
        }
    }

    fn when_filled(&self, frame: Pfn) -> Attempt {
        Attempt::Wait(WaitFor::Io(self.frames.page(frame).transfer()))
    }

    /// The copy gets a page: a copy of this frame, or a mark if there are only zeros.
    fn receive(
        &self,
        copy: &mut State,
        page: PageIndex,
        from: Option<Pfn>,
        held: &mut Held<'_, OBJECT>,
    ) -> Attempt {
        let done = match from.filter(|&frame| !self.machine.memory().is_zero(frame)) {
            Some(frame) => self.copy_up(copy, page, frame, held).is_some(),
            None => self.has_room_at(copy, page) && self.objects.gain(copy, page, Slot::Zero, held).is_ok(),
        };
        if !done {
            return Attempt::Wait(WaitFor::Memory);
        }
        self.pmap_remove(copy, page.number()..page.number() + 1, held);
        if self.may_hide(copy, held) {
            self.objects.note_copied(copy.id().number(), page, held); // perhaps all that shadow it have it
        }
        self.stats.count(Event::Pushed);
        Attempt::Done
    }
}
