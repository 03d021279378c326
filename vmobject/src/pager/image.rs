//! The image pager: absent pages of an object come from a partition that is only read.
//!
//! A page that is asked for brings its absent neighbours along, in one transfer, as far as they lie in
//! the same aligned cluster. Called by `fault`; the completion comes through [`Vm::complete`].

use crate::Vm;
use crate::addr::{PageIndex, Pfn};
use crate::limits::CLUSTER_PAGES;
use crate::lock::{Held, OBJECT};
use crate::object::index::Slot;
use crate::object::{Life, ObjectId, Pager, State};
use crate::page::Queue;
use crate::pager::{Transfer, WaitFor};
use crate::stats::Event;
use crate::store::{Direction, IoToken, Machine, PageStore as _, PhysMemory as _, StoreError};

impl<M: Machine> Vm<M> {
    /// Starts to bring in a page that was absent a moment ago. `None`: it has changed since; look again.
    pub(crate) fn page_in<const OUTER: u8>(
        &self,
        id: ObjectId,
        wanted: PageIndex,
        held: &mut Held<'_, OUTER>,
    ) -> Result<Option<WaitFor>, StoreError> {
        let (mut state, mut held) = self.objects.get(id).write(held);
        let Pager::Image(store) = state.pager else { return Ok(None) };
        if state.id() != id || state.life != Life::Live || state.slots.get(wanted) != Slot::Absent {
            return Ok(None);
        }
        if let Some((page, error)) = state.failed
            && page == wanted
        {
            state.failed = None;
            return Err(error);
        }
        let Some(transfer) = self.gather(&mut state, wanted, &mut held) else {
            return Ok(Some(WaitFor::Memory));
        };
        let Ok(token) = self.transfers.begin(transfer, &mut held) else {
            self.scatter(&mut state, &transfer, &mut held);
            return Ok(Some(WaitFor::Memory));
        };
        for &frame in transfer.frames() {
            self.frames.page(frame).set_busy(token);
        }
        let first = u64::from(transfer.first.number());
        match self.machine.store().start(store, Direction::In, first, transfer.frames(), token) {
            Ok(()) => {
                state.paging += 1;
                self.stats.count(Event::PageIn);
                Ok(Some(WaitFor::Io(token)))
            }
            Err(error) => {
                self.transfers.end(token, &mut held);
                for &frame in transfer.frames() {
                    self.frames.page(frame).clear_busy();
                }
                self.scatter(&mut state, &transfer, &mut held);
                match error {
                    StoreError::Busy => Ok(Some(WaitFor::Memory)),
                    StoreError::Io | StoreError::Refused | StoreError::Gone => Err(error),
                }
            }
        }
    }

    /// Gives frames to the wanted page and to its absent neighbours; `None` if not even the wanted page
    /// gets one.
    fn gather(&self, state: &mut State, wanted: PageIndex, held: &mut Held<'_, OBJECT>) -> Option<Transfer> {
        let base = wanted.number() - wanted.number() % CLUSTER_PAGES;
        let end = base.saturating_add(CLUSTER_PAGES).min(state.pages);
        let absent = |state: &State, n: u32| state.slots.get(PageIndex::new(n)) == Slot::Absent;
        let mut first = wanted.number();
        while first > base && absent(state, first - 1) {
            first -= 1;
        }
        let mut last = wanted.number();
        while last + 1 < end && absent(state, last + 1) {
            last += 1;
        }
        let mut transfer = Transfer {
            object: state.id(),
            first: PageIndex::new(first),
            wanted,
            pages: 0,
            frames: [Pfn::default(); CLUSTER_PAGES as usize],
        };
        for number in first..=last {
            let page = PageIndex::new(number);
            let Some(frame) = self.give_frame(state, page, Queue::None, held) else { break };
            transfer.frames[transfer.pages as usize] = frame;
            transfer.pages += 1;
        }
        if first + transfer.pages > wanted.number() {
            return Some(transfer);
        }
        self.scatter(state, &transfer, held);
        None
    }

    /// Takes back what [`Self::gather`] gave.
    fn scatter(&self, state: &mut State, transfer: &Transfer, held: &mut Held<'_, OBJECT>) {
        for (page, frame) in transfer.iter() {
            let was = state.slots.set(page, Slot::Absent);
            debug_assert_eq!(was, Ok(Slot::Resident(frame)));
            self.frames.free(frame, held);
        }
    }

    /// Delivers a completion. Whoever waits for the token may try again after this. A token that is not
    /// in flight is counted and changes nothing.
    pub fn complete<const OUTER: u8>(
        &self,
        token: IoToken,
        result: Result<(), StoreError>,
        held: &mut Held<'_, OUTER>,
    ) {
        let Some(transfer) = self.transfers.end(token, held) else {
            self.stats.count(Event::StaleCompletion);
            return;
        };
        let (mut state, mut held) = self.objects.get(transfer.object).write(held);
        assert_eq!(state.id(), transfer.object, "an object with transfers is not freed (O4)");
        for (_, frame) in transfer.iter() {
            self.frames.page(frame).clear_busy();
        }
        match result {
            Ok(()) => {
                for (_, frame) in transfer.iter() {
                    self.machine.memory().publish(frame);
                    self.frames.enqueue(frame, Queue::Active, &mut held);
                }
            }
            Err(error) => {
                self.scatter(&mut state, &transfer, &mut held);
                state.failed = Some((transfer.wanted, error));
                self.stats.count(Event::PageInFailed);
            }
        }
        state.paging -= 1;
        if state.life == Life::Dying && state.paging == 0 {
            self.objects.chore(transfer.object.number(), &mut held);
        }
    }

    /// True until the completion of a transfer was delivered.
    pub fn in_flight<const OUTER: u8>(&self, token: IoToken, held: &mut Held<'_, OUTER>) -> bool {
        self.transfers.in_flight(token, held)
    }
}
