//! Transfers: starting one, and what its completion does.
//!
//! A page that is asked for brings along those neighbours in its aligned cluster, or as much of that as `ahead` thinks
//! will help, that lie next to it in the store, too. The frames are in the index from the start, busy; one that does not get its contents goes
//! back. If a transfer of several pages fails, the page that was wanted is tried alone: the store may have
//! lost only its neighbour. What goes out stays in its frame, and may be read, until the store has it; if the
//! store says no, it stays for good (D13, I12).
//! Called by `fault`, `pageout` and whoever delivers completions. Locks: the object, then the rest.

use super::failed::Contents;
use super::swap::Closed;
use super::{Home, Transfer, WaitFor, image};
use crate::Vm;
use crate::addr::{PageIndex, Pfn};
use crate::defect::Defect;
use crate::limits::CLUSTER_PAGES;
use crate::lock::{Held, OBJECT};
use crate::object::index::Slot;
use crate::object::{Life, ObjectId, State};
use crate::page::Queue;
use crate::stats::Event;
use crate::store::{
    Direction, Expected, IoToken, LostPage, Machine, PageStore as _, PhysMemory as _, StoreError,
};

impl<M: Machine> Vm<M> {
    /// Starts to bring in a page that was not there a moment ago, for a map with this number if for any, and tells
    /// `started` its frame while nobody can take that away. `None`: look again, it has changed.
    pub(crate) fn page_in<const OUTER: u8>(
        &self,
        (id, wanted): (ObjectId, PageIndex),
        by: u32,
        started: impl FnOnce(Pfn),
        held: &mut Held<'_, OUTER>,
    ) -> Result<Option<WaitFor>, LostPage> {
        let (mut state, mut held) = self.objects.get(id).write(held);
        if state.id() != id || state.life != Life::Live {
            return Ok(None);
        }
        let was = state.slots.get(wanted);
        if was == Slot::Absent && self.expected(&state, wanted) == Expected::Zeros {
            let marked = self.has_room_at(&state, wanted)
                && self.objects.gain(&mut state, wanted, Slot::Zero, &mut held).is_ok();
            return Ok((!marked).then_some(WaitFor::Memory));
        }
        let Some(contents) = self.contents(&state, wanted, &mut held) else { return Ok(None) };
        self.bring(&mut state, (wanted, was, by), contents, started, &mut held).map(Some)
    }

    /// The same for a page that has a slot of swap.
    pub(crate) fn swap_in(
        &self,
        state: &mut State,
        (wanted, slot): (PageIndex, u32),
        by: u32,
        started: impl FnOnce(Pfn),
        held: &mut Held<'_, OBJECT>,
    ) -> Result<Option<WaitFor>, LostPage> {
        let Some(contents) = self.swap.place(slot, held) else { return Ok(None) };
        self.bring(state, (wanted, Slot::Swapped(slot), by), contents, started, held).map(Some)
    }

    /// The same for a page with these contents, and this in its object's index.
    fn bring(
        &self,
        state: &mut State,
        (wanted, was, by): (PageIndex, Slot, u32),
        contents: Contents,
        started: impl FnOnce(Pfn),
        held: &mut Held<'_, OBJECT>,
    ) -> Result<WaitFor, LostPage> {
        let home = contents.0;
        let lost = |error| LostPage { store: home.store, page: home.page, error };
        let alone = match self.transfers.take_failed(contents, by, held) {
            Some(Some(error)) => return Err(lost(error)),
            Some(None) => true,
            None => false,
        };
        let mut transfer = Transfer::out(state.id(), wanted);
        (transfer.way, transfer.by) = (Direction::In, by);
        if !self.gather(state, &mut transfer, was, home, alone, held) {
            return Ok(WaitFor::Memory);
        }
        let start = Home { page: home.page - (wanted.number() - transfer.first.number()), ..home };
        match self.start(state, &transfer, start, held) {
            Ok(token) => {
                self.stats.count(Event::PageIn);
                started(transfer.frame_of_wanted());
                Ok(WaitFor::Io(token))
            }
            Err(error) => {
                self.scatter(state, &transfer, held);
                // What has a copy there only is not to be dropped for it.
                if let (StoreError::Gone, Slot::Swapped(slot)) = (error, was) {
                    self.swap.account(slot, Direction::In, 0, Err(error), held);
                }
                match error {
                    StoreError::Busy => Ok(WaitFor::Memory),
                    StoreError::Io | StoreError::Refused | StoreError::Gone | StoreError::Corrupt => {
                        Err(lost(error))
                    }
                }
            }
        }
    }

    /// Where the contents of a page are that is not in a frame, if they are in a store.
    pub(super) fn home(&self, state: &State, page: PageIndex, held: &mut Held<'_, OBJECT>) -> Option<Home> {
        self.contents(state, page, held).map(|(home, _)| home)
    }

    /// The same, and how often something was written there.
    pub(super) fn contents(
        &self,
        state: &State,
        page: PageIndex,
        held: &mut Held<'_, OBJECT>,
    ) -> Option<Contents> {
        match state.slots.get(page) {
            Slot::Absent if self.expected(state, page) == Expected::Zeros => None,
            Slot::Absent => image::home(state, page).map(|home| (home, 0)),
            Slot::Swapped(slot) => self.swap.place(slot, held),
            Slot::Zero | Slot::Resident(_) => None,
        }
    }

    /// Makes the frames busy and starts; on failure they are as they were.
    pub(super) fn start(
        &self,
        state: &mut State,
        transfer: &Transfer,
        home: Home,
        held: &mut Held<'_, OBJECT>,
    ) -> Result<IoToken, StoreError> {
        let Ok(token) = self.transfers.begin(transfer, held) else { return Err(StoreError::Busy) };
        match transfer.way {
            Direction::In => self.frames.set_filling(transfer.frames(), token),
            Direction::Out => self.frames.set_busy(transfer.frames(), token, held),
        }
        let (way, first) = (transfer.way, u64::from(home.page));
        match self.machine.store().start(home.store, way, first, transfer.frames(), token) {
            Ok(()) => {
                state.begins(transfer.way, transfer.leaving());
                Ok(token)
            }
            Err(error) => {
                self.transfers.end(token, held, |_| ());
                self.frames.clear_busy(transfer.frames(), held);
                Err(error)
            }
        }
    }

    /// Gives frames to the wanted page, and to those neighbours that lie next to it in the store while there
    /// are frames; false if not even the wanted page gets one.
    fn gather(
        &self,
        state: &mut State,
        transfer: &mut Transfer,
        was: Slot,
        home: Home,
        alone: bool,
        held: &mut Held<'_, OBJECT>,
    ) -> bool {
        let window = match (alone, was) {
            (true, _) => 1,
            (false, Slot::Swapped(_)) => state.ahead.window(transfer.wanted),
            (false, Slot::Absent | Slot::Zero | Slot::Resident(_)) => CLUSTER_PAGES,
        };
        let Some(frame) = self.give_to_fill(state, transfer.wanted, was, held) else { return false };
        (transfer.frames[0], transfer.pages) = (frame, 1);
        if window > 1 {
            self.gather_neighbours(state, transfer, home, window, held);
        }
        true
    }

    /// A frame for a page that has something else in the index now.
    fn give_to_fill(
        &self,
        state: &mut State,
        page: PageIndex,
        was: Slot,
        held: &mut Held<'_, OBJECT>,
    ) -> Option<Pfn> {
        let frame = self.give_frame(state, page, Queue::None, held)?;
        if let Slot::Swapped(slot) = was {
            self.frames.page(frame).set_clean_slot(Some(slot));
        }
        Some(frame)
    }

    /// The rest of [`Self::gather`], in the aligned window of the wanted page, which has its frame.
    #[inline(never)]
    fn gather_neighbours(
        &self,
        state: &mut State,
        transfer: &mut Transfer,
        home: Home,
        window: u32,
        held: &mut Held<'_, OBJECT>,
    ) {
        let wanted = transfer.wanted.number();
        let base = wanted - wanted % window;
        let end = base.saturating_add(window).min(state.pages);
        let frames = &mut transfer.frames;
        frames[(wanted - base) as usize] = frames[0];
        let mut give = |number: u32| {
            let page = PageIndex::new(number);
            let found = self.home(state, page, held)?;
            let near = i64::from(found.page) - i64::from(home.page) == i64::from(number) - i64::from(wanted);
            if found.store != home.store || !near {
                return None;
            }
            let was = state.slots.get(page);
            frames[(number - base) as usize] = self.give_to_fill(state, page, was, held)?;
            Some(())
        };
        let (mut first, mut last) = (wanted, wanted);
        while last + 1 < end && give(last + 1).is_some() {
            last += 1;
        }
        while first > base && give(first - 1).is_some() {
            first -= 1;
        }
        if first > base {
            frames.copy_within((first - base) as usize..=(last - base) as usize, 0);
        }
        (transfer.first, transfer.pages) = (PageIndex::new(first), last - first + 1);
    }

    /// Takes back what [`Self::gather`] gave.
    fn scatter(&self, state: &mut State, transfer: &Transfer, held: &mut Held<'_, OBJECT>) {
        for (page, frame) in transfer.iter() {
            self.send_back(state, page, frame, held);
        }
    }

    /// A page that did not get its contents is where it was before.
    fn send_back(&self, state: &mut State, page: PageIndex, frame: Pfn, held: &mut Held<'_, OBJECT>) {
        let slot = self.frames.page(frame).clean_slot();
        self.frames.page(frame).set_clean_slot(None);
        let was = state.slots.set(page, slot.map_or(Slot::Absent, Slot::Swapped));
        debug_assert_eq!(was, Ok(Slot::Resident(frame)));
        self.frames.free(frame, held);
    }

    /// Starts writing neighbouring pages of an object, which nothing maps, to slots that were taken for them.
    /// On failure they have no slots any more.
    pub(crate) fn page_out(
        &self,
        state: &mut State,
        first: PageIndex,
        frames: &[Pfn],
        slot: u32,
        held: &mut Held<'_, OBJECT>,
    ) -> Result<(), StoreError> {
        let mut transfer = Transfer { leaves: true, ..Transfer::out(state.id(), first) };
        for ((to, &frame), slot) in transfer.frames.iter_mut().zip(frames).zip(slot..) {
            *to = frame;
            transfer.pages += 1;
            self.frames.enqueue(frame, Queue::None, held);
            self.frames.page(frame).set_clean_slot(Some(slot));
            self.seal(slot, frame, held);
        }
        let place = self.swap.place(slot, held).ok_or(StoreError::Gone);
        let started = place.and_then(|(home, _)| self.start(state, &transfer, home, held));
        match started {
            Ok(_) => {
                self.swap.begins(slot, held);
                self.stats.count(Event::PageOut);
            }
            Err(error) => {
                if error != StoreError::Busy {
                    self.swap.account(slot, Direction::Out, 0, Err(error), held);
                }
                for &frame in transfer.frames() {
                    self.drop_clean_slot(frame, held);
                }
            }
        }
        started.map(|_| ())
    }

    /// Delivers a completion; how many frames that freed. Whoever waits for the token may try again after
    /// this, and so may who waits for memory. A token that is not in flight is counted and changes nothing.
    pub fn complete<const OUTER: u8>(
        &self,
        token: IoToken,
        result: Result<(), StoreError>,
        held: &mut Held<'_, OUTER>,
    ) -> u32 {
        let Some(object) = self.transfers.object(token) else {
            self.stats.count(Event::StaleCompletion);
            return 0;
        };
        // It is over only when the object says so, too: who sees that a token is, and locks the object, sees what came of it.
        let mut transfer = Transfer::out(object, PageIndex::default());
        let early = self.has(Defect::EndsUnlocked)
            && self.transfers.end(token, held, |ended| transfer.become_like(ended)).is_some();
        let (mut state, mut held) = self.objects.get(object).write(held);
        // Who counts what is left sees the transfer, or this, or the chore that comes of it.
        let idle = state.life == Life::Dying || state.refs == 0;
        let _at_work = idle.then(|| self.objects.begin_work());
        if !early && self.transfers.end(token, &mut held, |ended| transfer.become_like(ended)).is_none() {
            self.stats.count(Event::StaleCompletion);
            return 0;
        }
        assert_eq!(state.id(), transfer.object, "an object with transfers is not freed (O4)");
        state.ends(transfer.way, transfer.leaving());
        if (transfer.way, result) != (Direction::In, Ok(())) {
            self.frames.clear_busy(transfer.frames(), &mut held);
            let first = transfer.frames().first();
            if let Some(slot) = first.and_then(|&frame| self.frames.page(frame).clean_slot()) {
                self.swap.account(slot, transfer.way, transfer.pages, result, &mut held);
            }
        }
        let freed = match (transfer.way, result) {
            (Direction::In, Ok(())) => self.is_in(&mut state, &transfer, &mut held),
            (Direction::In, Err(error)) => {
                self.scatter(&mut state, &transfer, &mut held);
                let error = (transfer.pages == 1).then_some(error);
                self.is_not_in(&state, &transfer, error, &mut held);
                self.stats.count(Event::PageInFailed);
                transfer.pages
            }
            (Direction::Out, Ok(())) => self.is_out(&mut state, &transfer, &mut held),
            (Direction::Out, Err(_)) if self.has(Defect::PutNeverFails) => {
                self.is_out(&mut state, &transfer, &mut held)
            }
            (Direction::Out, Err(_)) => {
                self.stats.count(Event::PageOutFailed);
                if image::home(&state, transfer.first).is_some() {
                    self.is_not_put(&mut state, &transfer, &mut held);
                } else {
                    self.is_still_here(&mut state, &transfer, &mut held);
                }
                0
            }
        };
        if idle && state.paging == 0 {
            self.objects.chore(transfer.object.number(), &mut held);
        }
        freed
    }

    /// A page that was wanted did not come: whoever wanted it is told, or first tries it alone.
    fn is_not_in(
        &self,
        state: &State,
        transfer: &Transfer,
        error: Option<StoreError>,
        held: &mut Held<'_, OBJECT>,
    ) {
        if let Some(contents) = self.contents(state, transfer.wanted, held) {
            self.transfers.failed(contents, transfer.by, error, held);
        }
    }

    /// The bytes are there, and the frames busy until that is seen. Those that are not what was written go back, and fail
    /// whoever wanted them.
    fn is_in(&self, state: &mut State, transfer: &Transfer, held: &mut Held<'_, OBJECT>) -> u32 {
        let (mut freed, mut tight) = (0, false);
        for (page, frame) in transfer.iter() {
            let resident = self.frames.page(frame);
            let slot = resident.clean_slot();
            let genuine = match slot {
                Some(slot) if page == transfer.first => {
                    let (mark, few) = self.swap.came(slot, transfer.pages, held);
                    tight = few;
                    self.has_arrived(slot, mark, frame)
                }
                Some(slot) => self.has_arrived(slot, self.swap.mark(slot, held), frame),
                None => self.is_as_stored(state, page, frame),
            };
            if !genuine {
                self.frames.clear_busy(&[frame], held);
                self.send_back(state, page, frame, held);
                self.stats.count(Event::PageInCorrupt);
                if let Some(slot) = slot {
                    self.swap.account(slot, Direction::In, 0, Err(StoreError::Corrupt), held);
                }
                freed += 1;
                if page == transfer.wanted {
                    self.is_not_in(state, transfer, Some(StoreError::Corrupt), held);
                }
                continue;
            }
            match slot {
                Some(_) if tight => self.drop_clean_slot(frame, held),
                Some(_) => {}
                None => self.machine.memory().publish(frame),
            }
            self.stats.count(Event::PageRead);
            if page == transfer.wanted {
                resident.touch();
            }
            self.frames.arrive(frame, Queue::Active, held);
        }
        freed
    }

    /// The store has the pages: those that nobody came to use meanwhile leave their frames.
    fn is_out(&self, state: &mut State, transfer: &Transfer, held: &mut Held<'_, OBJECT>) -> u32 {
        let mut freed = 0;
        self.stats.add(Event::PageWritten, u64::from(transfer.pages));
        for (page, frame) in transfer.iter() {
            self.frames.page(frame).set_refused(false);
            if self.evict_clean(state, page, frame, held) {
                freed += 1;
            } else {
                self.frames.enqueue(frame, Queue::Active, held);
            }
        }
        freed
    }

    /// Frees the frame of a page that nothing maps and whose contents are in a store as well; false if it is
    /// not such a page.
    pub(crate) fn evict_clean(
        &self,
        state: &mut State,
        page: PageIndex,
        frame: Pfn,
        held: &mut Held<'_, OBJECT>,
    ) -> bool {
        let resident = self.frames.page(frame);
        let used = !resident.is_unmapped() && !self.has(Defect::EvictedThoughUsed);
        if used || resident.is_wired() || resident.is_busy() {
            return false;
        }
        match resident.clean_slot() {
            Some(slot) if self.swap.closed(slot, held) == Some(Closed::Gone) => {
                // It is in its frame and nowhere else.
                self.drop_clean_slot(frame, held);
                return false;
            }
            Some(_) => {}
            None if image::home(state, page).is_some() && !resident.is_dirty() => {}
            None => return false,
        }
        self.send_back(state, page, frame, held);
        if let (true, Slot::Swapped(slot)) = (self.has(Defect::SlotFreedTooEarly), state.slots.get(page)) {
            self.swap.give(slot, held);
        }
        self.stats.count(Event::Evicted);
        true
    }

    /// The store did not take them: they stay. A slot is bad only if it failed alone; otherwise each page is
    /// tried alone, in the same slot while the store has room, else some time in another, unless it takes nothing any more.
    fn is_still_here(&self, state: &mut State, transfer: &Transfer, held: &mut Held<'_, OBJECT>) {
        for (page, frame) in transfer.iter() {
            let Some(slot) = self.frames.page(frame).clean_slot() else { continue };
            if self.swap.closed(slot, held).is_some() {
                self.drop_clean_slot(frame, held);
                self.frames.enqueue(frame, Queue::Active, held);
            } else if transfer.pages == 1 {
                self.frames.page(frame).set_clean_slot(None);
                self.swap.spoil(slot, held);
                self.stats.count(Event::SlotSpoiled);
                self.frames.enqueue(frame, Queue::Active, held);
            } else if self.frames.page(frame).is_unmapped()
                && self.swap.has_room(slot, held)
                && self.page_out(state, page, &[frame], slot, held).is_ok()
            {
                continue;
            } else {
                self.drop_clean_slot(frame, held);
                self.frames.page(frame).set_refused(true);
                self.frames.enqueue(frame, Queue::Active, held);
            }
        }
    }

    /// True until the completion of a transfer was delivered.
    pub fn in_flight(&self, token: IoToken) -> bool {
        self.transfers.in_flight(token)
    }
}
