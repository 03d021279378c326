//! Cleaning: writing an object's changed pages to its store (`vm_object_page_clean`).
//!
//! One pass from the range's start to its end (D14). What is being written may be read, and a writer waits, so
//! whatever was written before the pass began is in the store when the pass is done, though guests write on. A
//! page that the store does not take stays, changed, and the pass goes on (D13): how many there were is the
//! answer. If it was not alone, its neighbours may be to blame: the pass goes round once more, and each goes alone. Only what is being written is protected (D24). Nothing here waits: a pass says for what, and goes on
//! where it was. Called by whoever flushes disks, by `shutdown`, and by objects that end.

use core::ops::Range;

use super::{Transfer, WaitFor, image};
use crate::Vm;
use crate::addr::{PageIndex, Pfn};
use crate::limits::{CLUSTER_PAGES, PUTS_OF_ONE};
use crate::lock::{Held, OBJECT};
use crate::object::index::Slot;
use crate::object::{Life, ObjectId, Pager, Put, State};
use crate::page::Queue;
use crate::stats::Event;
use crate::store::{Machine, PageStore as _, StoreError};

/// A pass that is under way. The caller keeps its reference to the object until it is done.
#[derive(Debug)]
#[must_use = "nothing is written until the pass goes on"]
pub struct Clean {
    object: ObjectId,
    first: u32,
    next: u32,
    end: u32,
    /// What the object's counts of the same names were when this round began.
    unwritten: Option<u32>,
    retries: u32,
    /// It is the second round.
    again: bool,
    phase: Phase,
}

#[derive(Clone, Copy, Debug)]
enum Phase {
    /// Pages are being sent.
    Pages,
    /// All are sent; transfers up to this one are awaited.
    Written(u64),
    /// The store makes what it has durable; transfers up to this one are awaited.
    Flushed(u64),
}

/// How far a pass is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cleaned {
    /// It is done; so many of the object's pages were not taken by the store meanwhile, and are still changed.
    Done {
        /// How many.
        failed: u32,
    },
    /// It goes on when this has happened.
    Wait(WaitFor),
    /// It could go on now.
    More,
}

impl<M: Machine> Vm<M> {
    /// Begins to write the changed pages of a range. An empty range is empty (D23).
    pub fn page_clean(&self, object: ObjectId, range: Range<PageIndex>) -> Clean {
        let (next, end) = (range.start.number(), range.end.number());
        Clean {
            object,
            first: next,
            next,
            end,
            unwritten: None,
            retries: 0,
            again: false,
            phase: Phase::Pages,
        }
    }

    /// Goes on with a pass, looking at no more than `budget` slots.
    pub fn clean_step<const OUTER: u8>(
        &self,
        clean: &mut Clean,
        budget: u32,
        held: &mut Held<'_, OUTER>,
    ) -> Cleaned {
        let (mut state, mut held) = self.objects.get(clean.object).write(held);
        assert!(state.id() == clean.object && state.life == Life::Live, "{:?} is gone", clean.object);
        if clean.unwritten.is_none() {
            clean.retries = state.retries;
        }
        let before = *clean.unwritten.get_or_insert(state.unwritten);
        let end = clean.end.min(state.pages);
        let mut left = budget;
        loop {
            clean.phase = match clean.phase {
                Phase::Pages => {
                    match self.put_dirty(&mut state, &mut clean.next, end, &mut left, &mut held) {
                        Put::All => Phase::Written(self.transfers.last_serial(&mut held)),
                        Put::Budget => return Cleaned::More,
                        Put::Memory => return Cleaned::Wait(WaitFor::Memory),
                        Put::Store => {
                            let ours = self.transfers.out_of(clean.object, u64::MAX, &mut held);
                            return Cleaned::Wait(ours.map_or(WaitFor::Memory, WaitFor::Io));
                        }
                    }
                }
                Phase::Written(serial) => {
                    if let Some(token) = self.transfers.out_of(clean.object, serial, &mut held) {
                        return Cleaned::Wait(WaitFor::Io(token));
                    }
                    if state.retries != clean.retries && !clean.again {
                        // Once: what had changed when the pass began goes alone then, or has gone.
                        (clean.again, clean.unwritten) = (true, None);
                        (clean.next, clean.phase) = (clean.first, Phase::Pages);
                        return Cleaned::More;
                    }
                    match self.flush(&mut state, &mut held) {
                        Ok(()) => Phase::Flushed(self.transfers.last_serial(&mut held)),
                        Err(StoreError::Busy) => return Cleaned::Wait(WaitFor::Memory),
                        Err(
                            StoreError::Io | StoreError::Refused | StoreError::Gone | StoreError::Corrupt,
                        ) => {
                            state.unwritten = state.unwritten.wrapping_add(1);
                            Phase::Flushed(0)
                        }
                    }
                }
                Phase::Flushed(serial) => {
                    if let Some(token) = self.transfers.out_of(clean.object, serial, &mut held) {
                        return Cleaned::Wait(WaitFor::Io(token));
                    }
                    self.stats.count(Event::Cleaned);
                    return Cleaned::Done { failed: state.unwritten.wrapping_sub(before) };
                }
            };
        }
    }

    /// Starts to write the changed pages of an object from `next` on, as many as can be started, neighbours
    /// together. A page that the store refuses at once is counted and passed over.
    pub(crate) fn put_dirty(
        &self,
        state: &mut State,
        next: &mut u32,
        end: u32,
        left: &mut u32,
        held: &mut Held<'_, OBJECT>,
    ) -> Put {
        if !matches!(state.pager, Pager::Disk(_)) {
            return Put::All;
        }
        while let Some((page, slot)) = state.slots.next_present(PageIndex::new(*next)..PageIndex::new(end)) {
            if *left == 0 {
                return Put::Budget;
            }
            *left -= 1;
            *next = page.number();
            if slot == Slot::Zero && self.materialise_zero(state, page, held).is_none() {
                return Put::Memory;
            }
            let run = self.dirty_run(state, page, end);
            if !run.is_empty()
                && let Err(StoreError::Busy) = self.put(state, run.clone(), held)
            {
                return Put::Store;
            }
            *next = run.end.max(page.number() + 1);
        }
        *next = end;
        Put::All
    }

    /// The changed pages from this one on that go together, within its aligned cluster.
    fn dirty_run(&self, state: &State, page: PageIndex, end: u32) -> Range<u32> {
        let first = page.number();
        let end = (first - first % CLUSTER_PAGES).saturating_add(CLUSTER_PAGES).min(end);
        let goes = |&number: &u32| match state.slots.get(PageIndex::new(number)) {
            Slot::Resident(frame) => self.frames.page(frame).is_dirty() && !self.frames.page(frame).is_busy(),
            Slot::Absent | Slot::Zero | Slot::Swapped(_) => false,
        };
        let alone = self.goes_alone(state, first);
        let with =
            |number: &u32| goes(number) && (*number == first || !alone && !self.goes_alone(state, *number));
        let pages = (first..end).take_while(with).count();
        first..first + u32::try_from(pages).unwrap_or(0)
    }

    /// True for a page that the store did not take the last time, perhaps for a neighbour's sake.
    pub(crate) fn goes_alone(&self, state: &State, number: u32) -> bool {
        let slot = state.slots.get(PageIndex::new(number));
        matches!(slot, Slot::Resident(frame) if self.frames.page(frame).is_refused())
    }

    /// Starts to write neighbouring changed pages. They are clean from now on, and cannot be written to until
    /// that has ended. On failure they are as they were, and counted unless the store is only busy.
    pub(crate) fn put(
        &self,
        state: &mut State,
        run: Range<u32>,
        held: &mut Held<'_, OBJECT>,
    ) -> Result<(), StoreError> {
        let first = PageIndex::new(run.start);
        let home = image::home(state, first).ok_or(StoreError::Refused)?;
        if state.puts >= PUTS_OF_ONE {
            return Err(StoreError::Busy);
        }
        let mut transfer = Transfer::out(state.id(), first);
        self.pmap_copy(state, run.clone(), held);
        for (number, to) in run.zip(&mut transfer.frames) {
            let Slot::Resident(frame) = state.slots.get(PageIndex::new(number)) else { break };
            *to = frame;
            transfer.pages += 1;
            self.frames.enqueue(frame, Queue::None, held);
            self.frames.page(frame).set_dirty(false);
        }
        let started = self.start(state, &transfer, home, held);
        match started {
            Ok(_) => self.stats.count(Event::PageOut),
            Err(error) => {
                for &frame in transfer.frames() {
                    self.frames.page(frame).set_dirty(true);
                    self.frames.enqueue(frame, Queue::Active, held);
                }
                if error != StoreError::Busy {
                    self.count_unwritten(state, transfer.frames());
                }
            }
        }
        started.map(|_| ())
    }

    /// The store did not take them: they stay, changed. Each is to be tried alone before that is the answer.
    pub(super) fn is_not_put(&self, state: &mut State, transfer: &Transfer, held: &mut Held<'_, OBJECT>) {
        for &frame in transfer.frames() {
            self.frames.page(frame).set_dirty(true);
            self.frames.page(frame).set_refused(true);
            self.frames.enqueue(frame, Queue::Active, held);
        }
        match transfer.pages {
            0 => state.unwritten = state.unwritten.wrapping_add(1), // a flush
            1 => self.count_unwritten(state, transfer.frames()),
            _ => {
                state.retries = state.retries.wrapping_add(1);
                state.sent = state.sent.min(transfer.first.number());
            }
        }
    }

    /// Pages that stay changed; or are lost, if nobody is left who could have them written later.
    fn count_unwritten(&self, state: &mut State, frames: &[Pfn]) {
        for &frame in frames {
            state.unwritten = state.unwritten.wrapping_add(1);
            if state.life == Life::Dying {
                self.frames.page(frame).set_dirty(false);
                self.stats.count(Event::PageLost);
            }
        }
    }

    /// Asks the store to make durable what it has.
    fn flush(&self, state: &mut State, held: &mut Held<'_, OBJECT>) -> Result<(), StoreError> {
        let Pager::Disk(store) = state.pager else { return Ok(()) };
        let transfer = Transfer::out(state.id(), PageIndex::default());
        let Ok(token) = self.transfers.begin(&transfer, held) else { return Err(StoreError::Busy) };
        match self.machine.store().start_flush(store, token) {
            Ok(()) => {
                state.begins(transfer.way, transfer.leaving());
                Ok(())
            }
            Err(error) => {
                self.transfers.end(token, held, |_| ());
                Err(error)
            }
        }
    }
}
