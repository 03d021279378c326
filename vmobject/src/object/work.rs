//! Chores: what is not done at once, done in bounded steps (DESIGN 8).
//!
//! Freeing the pages of an object that died, merging one into its only shadow, passing over one that is
//! hidden: each can be long, none is urgent, and every intermediate state is a correct one. An object with
//! something to do is on a list; a step takes it off, does a part, and puts it back if there is more.
//! Called by whoever has time, and by a fault that finds no memory. Calls `collapse` and `prune`.

use super::table::Resume;
use super::{Ahead, Life, ObjectId, Pager, Put, Slot, State};
use crate::Vm;
use crate::lock::{CALLER, Held, OBJECT};
use crate::page::ANY;
use crate::store::Machine;

/// What an object counts for besides its slots, whatever becomes of it.
const EACH: u32 = 7;

/// Frames of a dying object that are given back under one lock of the queues.
const TOGETHER: usize = 16;

/// How much of a chore is done.
pub(super) enum Progress {
    /// All of it.
    Done,
    /// Not all, for want of budget.
    More,
    /// A transfer is in the way, or memory is short.
    Blocked,
}

/// What is done once the object is let go.
enum Then {
    Prune(Resume),
    Trim(Progress),
    LetGo(Option<ObjectId>, Progress),
}

impl<M: Machine> Vm<M> {
    /// Does objects' chores, at most `budget` slots' worth. True if there is more that could be done now.
    pub(crate) fn work<const OUTER: u8>(&self, budget: u32, held: &mut Held<'_, OUTER>) -> bool {
        let held: &mut Held<'_, CALLER> = &mut held.deepen();
        let _at_work = self.objects.begin_work();
        let mut left = budget;
        let mut blocked = 0;
        while left > 0 {
            if let Some((number, page)) = self.objects.next_copied(held) {
                left -= 1;
                match self.prune_page(number, page, &mut left, held) {
                    Progress::Done => {}
                    Progress::More | Progress::Blocked => self.objects.ask_prune(number, held),
                }
                continue;
            }
            if self.objects.chores(held).0 <= blocked {
                return false;
            }
            let Some(number) = self.objects.next_chore(held) else { return false };
            left -= 1; // looking costs, too
            match self.work_on(number, &mut left, held) {
                Progress::Done => {}
                Progress::More => self.objects.chore(number, held),
                Progress::Blocked => {
                    blocked += 1;
                    self.objects.chore(number, held);
                }
            }
            left = left.saturating_sub(EACH);
        }
        let (chores, copied) = self.objects.chores(held);
        chores > blocked || copied > 0
    }

    fn work_on(&self, number: u32, left: &mut u32, held: &mut Held<'_, CALLER>) -> Progress {
        let Some(object) = self.objects.at(number) else { return Progress::Done };
        let then = {
            let (mut state, mut held) = object.write(held);
            match state.life {
                Life::Vacant => return Progress::Done,
                Life::Live if state.refs == 0 => Then::Trim(self.cool(&mut state, left, &mut held)),
                Life::Live => {
                    if let Some(child) = self.objects.take_asks(number)
                        && let again @ (Progress::More | Progress::Blocked) =
                            self.go_on_asking(&state, child, left, &mut held)
                    {
                        return again;
                    }
                    let progress = self.collapse(&mut state, left, &mut held);
                    if !matches!(progress, Progress::Done) {
                        return progress;
                    }
                    let Some(resume) = self.objects.take_prune(number) else { return progress };
                    Then::Prune(resume)
                }
                // First of all what is below is let go, so that others may have it for themselves.
                Life::Dying => {
                    let below = state.shadow.take().map(|shadow| shadow.object);
                    Then::LetGo(below, self.empty(&mut state, left, &mut held))
                }
            }
        };
        match then {
            Then::Prune(resume) => self.prune(number, resume, left, held),
            Then::Trim(progress) => {
                self.cache_trim(held);
                progress
            }
            Then::LetGo(below, progress) => {
                if let Some(below) = below {
                    self.unreference(below, held);
                }
                progress
            }
        }
    }

    /// Frees the pages of a dying object, and its place when all are gone.
    fn empty(&self, state: &mut State, left: &mut u32, held: &mut Held<'_, OBJECT>) -> Progress {
        if state.paging > 0 {
            return Progress::Done; // the completion puts it back
        }
        if let Pager::Disk(_) = state.pager {
            match self.send_last(state, left, held) {
                Put::All if state.paging == 0 => {}
                Put::All => return Progress::Done,
                Put::Budget => return Progress::More,
                Put::Memory | Put::Store => return Progress::Blocked,
            }
        }
        let mut stopped = Progress::More;
        let (mut frames, mut count) = ([ANY; TOGETHER], 0);
        let done = state.slots.drain(|slot| {
            if *left == 0 {
                return false;
            }
            *left -= 1;
            let Slot::Resident(frame) = slot else { return self.free_slot(slot, held) };
            let page = self.frames.page(frame);
            if page.is_busy() {
                stopped = Progress::Blocked;
                return false;
            }
            if page.has_clean_slot() {
                self.drop_clean_slot(frame, held);
            }
            frames[count] = frame;
            count += 1;
            if count == TOGETHER {
                self.frames.free_all(&frames, held);
                count = 0;
            }
            true
        });
        self.frames.free_all(&frames[..count], held);
        if !done {
            return stopped;
        }
        self.vacate(state, held);
        Progress::Done
    }

    /// Gives an empty object's place back, under a new generation. A name whose generation would repeat
    /// is never given again.
    pub(super) fn vacate(&self, state: &mut State, held: &mut Held<'_, OBJECT>) {
        debug_assert!(state.refs == 0 && state.paging == 0 && state.shadow.is_none());
        if let Some(store) = state.pager.store() {
            self.objects.unregister(store, state.id, held);
        }
        state.slots.rewind();
        state.trails.clear();
        state.ahead = Ahead::new();
        state.life = Life::Vacant;
        state.pager = Pager::None;
        let reuse = match state.id.generation.checked_add(1) {
            Some(generation) => {
                state.id.generation = generation;
                true
            }
            None => false,
        };
        self.objects.vacate(state.id.index, reuse, held);
    }
}
