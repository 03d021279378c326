//! Orderly power-off: clean, then release, then prove (`vm_object_shutdown`, D25).
//!
//! Every object with a store that sees changes is cleaned, whoever refers to it, and keeps its pager; then the
//! cache goes and all chores are done; what is left then is counted. Once all guests have ended that must be
//! nothing. Called by whoever turns the machine off.

use super::{Clean, Cleaned, WaitFor};
use crate::Vm;
use crate::addr::PageIndex;
use crate::defect::Defect;
use crate::lock::Held;
use crate::object::{Life, ObjectId, Pager};
use crate::store::Machine;

/// A shutdown that is under way.
#[derive(Debug, Default)]
pub struct Shutdown {
    /// Objects before this one are clean.
    next: u32,
    clean: Option<(ObjectId, Clean)>,
    unwritten: u32,
}

/// What is left after a shutdown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Left {
    /// Objects that somebody refers to still.
    pub objects: u32,
    /// Frames of objects.
    pub frames: u32,
    /// Swap slots.
    pub swap_slots: u32,
    /// Pages that their stores did not take.
    pub unwritten: u32,
}

/// How far a shutdown is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Down {
    /// It is done.
    Done(Left),
    /// It goes on when this has happened.
    Wait(WaitFor),
    /// It could go on now.
    More,
}

impl<M: Machine> Vm<M> {
    /// Goes on with a shutdown, looking at no more than `budget` slots. No guest runs any more.
    pub fn shutdown_step<const OUTER: u8>(
        &self,
        shutdown: &mut Shutdown,
        budget: u32,
        held: &mut Held<'_, OUTER>,
    ) -> Down {
        while let Some((object, mut clean)) = shutdown.clean.take().or_else(|| self.next_disk(shutdown, held))
        {
            match self.clean_step(&mut clean, budget, held) {
                Cleaned::Done { failed } => {
                    shutdown.unwritten += failed;
                    self.unreference(object, held);
                }
                Cleaned::Wait(wait) => {
                    shutdown.clean = Some((object, clean));
                    return Down::Wait(wait);
                }
                Cleaned::More => {
                    shutdown.clean = Some((object, clean));
                    return Down::More;
                }
            }
        }
        self.cache_clear(held);
        if self.step(budget, held) {
            return Down::More;
        }
        // First the transfers: what comes of one is there before it is over.
        if self.transfers.count(held) > 0 {
            return Down::Wait(WaitFor::Memory);
        }
        if !self.is_at_rest(held) && !self.has(Defect::CountsTooEarly) {
            return Down::More;
        }
        let queues = self.frames.lengths(held);
        Down::Done(Left {
            objects: self.objects.live(held),
            frames: self.frames.total() - queues.free - queues.tables,
            swap_slots: self.swap.info(held).in_use,
            unwritten: shutdown.unwritten,
        })
    }

    /// The next object whose store sees changes, with a reference, and a pass over all of it.
    fn next_disk<const OUTER: u8>(
        &self,
        shutdown: &mut Shutdown,
        held: &mut Held<'_, OUTER>,
    ) -> Option<(ObjectId, Clean)> {
        while shutdown.next < self.objects.used(held) {
            let number = shutdown.next;
            shutdown.next += 1;
            let Some(object) = self.objects.at(number) else { continue };
            let (mut state, mut held) = object.write(held);
            let (Life::Live, Pager::Disk(_), Some(refs)) =
                (state.life, state.pager, state.refs.checked_add(1))
            else {
                continue;
            };
            state.refs = refs;
            self.objects.uncache(state.id(), &mut held);
            let all = PageIndex::new(0)..PageIndex::new(state.pages);
            return Some((state.id(), self.page_clean(state.id(), all)));
        }
        None
    }
}
