//! Fault handling: from a stage-2 abort to a mapped page (`vm_fault.c`).
//!
//! Read top-down: look the address up, look in the top object, walk the shadow chain, page in, copy if
//! the guest writes, enter the mapping. Nothing here sleeps: a fault that must wait says for what, its
//! vCPU parks, and the fault runs again from the top; surviving the second run is what makes the first
//! one correct. EL2's own accesses to guest memory take the same way and end in a copy of bytes.
//!
//! Called by whoever runs guests. Calls `map`, `object`, `pager`, the pmap. Locks: the map for reading,
//! the top object until the mapping is entered, objects below it hand over hand, then the pmap.
//!
//! # Invariants
//! F1. A leaf is entered under the lock of the object that owns the frame, and under that of the top
//!     object: so neither eviction nor another vCPU's copy comes between the look and the leaf.
//! F2. Only a page of the top object, and only through an entry without `needs_copy`, is mapped
//!     writable (I3).

mod around;
mod chain;
mod cow;
mod push;
mod snapshot;
mod wire;

use crate::addr::{Ipa, PageIndex, Pfn};
use crate::limits::MAX_RESTARTS;
use crate::lock::{CALLER, Held, MAP, OBJECT};
use crate::map::{Entry, Instruction, Map};
use crate::object::index::Slot;
use crate::object::{Hop, ObjectId, Pager, State};
use crate::page::Queue;
pub use crate::pager::WaitFor;
use crate::pmap::{OutOfTables, Pmap as _};
use crate::prot::Prot;
use crate::stats::Event;
use crate::store::{Machine, PhysMemory as _, StoreError};
use crate::{PROMPT, Vm, VmError};
pub use wire::{Wired, Wiring};

use around::Around;
use chain::Found;

/// How a fault was served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Faulted {
    /// The page is mapped: run the instruction again.
    Mapped,
    /// Not yet: park, and fault again when this has happened.
    Wait(WaitFor),
}

/// How an access of EL2 to guest memory ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Copied {
    /// All bytes were copied.
    Done,
    /// Not all of them; do the whole access again when this has happened.
    Wait(WaitFor),
}

/// Why a fault cannot be served: what the guest will feel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultError {
    /// Nothing is mapped there: inject an external abort.
    Hole(Ipa),
    /// Mapped, but not for this: inject a permission fault.
    Denied {
        /// Where.
        at: Ipa,
        /// What the guest wanted to do.
        wanted: Prot,
    },
    /// The store does not give the page: inject an external abort.
    Lost(StoreError),
}

/// What the page is wanted for.
enum Purpose<'b> {
    /// To be mapped, for this instruction if for any in particular.
    Enter(Option<Instruction>),
    /// To read bytes from this offset on.
    Read(usize, &'b mut [u8]),
    /// To write bytes from this offset on.
    Write(usize, &'b [u8]),
    /// To be kept in its frame, which goes here.
    Wire(&'b mut Option<Pfn>),
}

/// What one attempt came to.
enum Step {
    Done,
    /// Something changed: from the top.
    Again,
    Wait(WaitFor),
    /// The entry's object must be shadowed first.
    Shadow,
    /// The page must come from this object's pager.
    PageIn(ObjectId, PageIndex),
    /// The chain below this object is long: a trail is wanted for this page.
    Trail(ObjectId, PageIndex),
    /// This object's copy must have the page first.
    Push(ObjectId, PageIndex),
}

/// The page that a fault is about.
#[derive(Clone, Copy)]
struct Place<'e> {
    page: Ipa,
    access: Prot,
    entry: &'e Entry,
    index: PageIndex,
    /// The most that a leaf may allow.
    prot: Prot,
}

impl Place<'_> {
    const fn writes(&self) -> bool {
        self.access.allows(Prot::WRITE)
    }
}

impl<M: Machine> Vm<M> {
    /// Serves a guest's access of kind `access` at `at`.
    #[inline]
    pub fn fault<const OUTER: u8>(
        &self,
        map: &Map<M>,
        at: Ipa,
        access: Prot,
        held: &mut Held<'_, OUTER>,
    ) -> Result<Faulted, FaultError> {
        self.fault_for(map, None, at, access, held)
    }

    /// The same for one instruction of a vCPU: it gets on although memory is short (I15).
    #[inline]
    pub fn fault_for<const OUTER: u8>(
        &self,
        map: &Map<M>,
        by: Option<Instruction>,
        at: Ipa,
        access: Prot,
        held: &mut Held<'_, OUTER>,
    ) -> Result<Faulted, FaultError> {
        match self.serve(map, at, access, &mut Purpose::Enter(by), &mut held.deepen()) {
            Ok(Copied::Done) => Ok(Faulted::Mapped),
            Ok(Copied::Wait(wait)) => Ok(Faulted::Wait(wait)),
            Err(error) => Err(error),
        }
    }

    /// Reads guest memory as the guest would.
    pub fn read<const OUTER: u8>(
        &self,
        map: &Map<M>,
        at: Ipa,
        out: &mut [u8],
        held: &mut Held<'_, OUTER>,
    ) -> Result<Copied, FaultError> {
        let (mut at, mut rest) = (at, out);
        while !rest.is_empty() {
            let offset = at.offset_in_page();
            let (part, after) = rest.split_at_mut(rest.len().min(4096 - offset));
            let length = part.len() as u64;
            let purpose = &mut Purpose::Read(offset, part);
            match self.serve(map, at, Prot::READ, purpose, &mut held.deepen())? {
                Copied::Done => {}
                wait @ Copied::Wait(_) => return Ok(wait),
            }
            rest = after;
            if !rest.is_empty() {
                at = at.checked_add(length).ok_or(FaultError::Hole(at))?;
            }
        }
        Ok(Copied::Done)
    }

    /// Writes guest memory as the guest would: copying what is shared, refusing what is read-only.
    pub fn write<const OUTER: u8>(
        &self,
        map: &Map<M>,
        at: Ipa,
        bytes: &[u8],
        held: &mut Held<'_, OUTER>,
    ) -> Result<Copied, FaultError> {
        let (mut at, mut rest) = (at, bytes);
        while !rest.is_empty() {
            let offset = at.offset_in_page();
            let (part, after) = rest.split_at(rest.len().min(4096 - offset));
            let purpose = &mut Purpose::Write(offset, part);
            match self.serve(map, at, Prot::WRITE, purpose, &mut held.deepen())? {
                Copied::Done => {}
                wait @ Copied::Wait(_) => return Ok(wait),
            }
            rest = after;
            if !rest.is_empty() {
                at = at.checked_add(part.len() as u64).ok_or(FaultError::Hole(at))?;
            }
        }
        Ok(Copied::Done)
    }

    /// One access within one page, from the top until it is done or must wait.
    fn serve(
        &self,
        map: &Map<M>,
        at: Ipa,
        access: Prot,
        purpose: &mut Purpose<'_>,
        held: &mut Held<'_, CALLER>,
    ) -> Result<Copied, FaultError> {
        let first = self.attempt(map, at, access, purpose, held);
        if matches!(first, Ok(Step::Done)) {
            return Ok(Copied::Done);
        }
        self.retry(map, at, access, purpose, first, held)
    }

    /// From the top again and again, each time after what the attempt before it asked for; `first` came to
    /// something else than the end.
    #[cold]
    fn retry(
        &self,
        map: &Map<M>,
        at: Ipa,
        access: Prot,
        purpose: &mut Purpose<'_>,
        first: Result<Step, FaultError>,
        held: &mut Held<'_, CALLER>,
    ) -> Result<Copied, FaultError> {
        let mut step = first?;
        for _ in 1..MAX_RESTARTS {
            let wait = match self.help(map, at, step, held) {
                Ok(None) => None,
                Ok(Some(WaitFor::Memory)) if self.step_frees(held) => None,
                Ok(Some(wait)) => Some(wait),
                Err(error) => {
                    map.stats.count(Event::FaultLost);
                    return Err(error);
                }
            };
            if let Some(wait) = wait {
                map.stats.count(Event::FaultWait);
                return Ok(Copied::Wait(wait));
            }
            step = match self.attempt(map, at, access, purpose, held)? {
                Step::Done => return Ok(Copied::Done),
                step @ (Step::Again
                | Step::Wait(_)
                | Step::Shadow
                | Step::PageIn(..)
                | Step::Push(..)
                | Step::Trail(..)) => step,
            };
        }
        // Somebody keeps changing what we look at. The others must get on, too.
        Ok(Copied::Wait(WaitFor::Memory))
    }

    /// Does some chores in the hope for memory: true if they freed a frame.
    #[cold]
    fn step_frees(&self, held: &mut Held<'_, CALLER>) -> bool {
        let before = self.frames.lengths(held).free;
        self.step(PROMPT, held);
        self.frames.lengths(held).free > before
    }

    /// Does what an attempt asked for, with no lock held. `None`: now try again.
    #[cold]
    fn help(
        &self,
        map: &Map<M>,
        at: Ipa,
        step: Step,
        held: &mut Held<'_, CALLER>,
    ) -> Result<Option<WaitFor>, FaultError> {
        let memory = |done: Result<(), VmError>| Ok(done.err().map(|_| WaitFor::Memory));
        match step {
            Step::Done | Step::Again => Ok(None),
            Step::Wait(wait) => Ok(Some(wait)),
            Step::Shadow => memory(self.resolve_copy(map, at, held)),
            Step::PageIn(object, index) => self.page_in(object, index, held).map_err(FaultError::Lost),
            Step::Trail(object, index) => memory(self.lay_trail(object, index, held)),
            Step::Push(object, index) => self.push(object, index, held).map_err(FaultError::Lost),
        }
    }

    /// One attempt, under the locks.
    #[inline]
    fn attempt(
        &self,
        map: &Map<M>,
        at: Ipa,
        access: Prot,
        purpose: &mut Purpose<'_>,
        held: &mut Held<'_, CALLER>,
    ) -> Result<Step, FaultError> {
        let page = at.page();
        let (entries, mut held) = map.entries.read(held);
        let Some(entry) = entries.find(page, &map.hint) else {
            map.stats.count(Event::FaultHole);
            return Err(FaultError::Hole(at));
        };
        if !entry.prot.allows(access) {
            map.stats.count(Event::FaultDenied);
            return Err(FaultError::Denied { at, wanted: access });
        }
        let Some(index) = entry.page_at(page) else { return Err(FaultError::Hole(at)) };
        let place = Place { page, access, entry, index, prot: entry.prot };
        if !entry.needs_copy {
            return Ok(self.in_top(map, place, purpose, &mut held));
        }
        if place.writes() {
            return Ok(Step::Shadow);
        }
        Ok(self.in_shared(map, place, purpose, &mut held))
    }

    /// The entry has the top object for itself, or shares it on purpose.
    #[inline]
    fn in_top(
        &self,
        map: &Map<M>,
        place: Place<'_>,
        purpose: &mut Purpose<'_>,
        held: &mut Held<'_, MAP>,
    ) -> Step {
        let (mut top, mut held) = self.objects.get(place.entry.object).write(held);
        debug_assert_eq!(top.id(), place.entry.object);
        let mut place = place;
        if top.copy.is_some() && self.is_guarded(&top, place.index, &mut held) {
            if place.writes() {
                return Step::Push(top.id(), place.index);
            }
            place.prot = place.prot.without(Prot::WRITE);
        }
        match top.slots.get(place.index) {
            Slot::Absent if top.pager != Pager::None => Step::PageIn(top.id(), place.index),
            Slot::Absent if top.shadow.is_some() => self.below_top(map, place, purpose, &mut top, &mut held),
            Slot::Zero if top.pager != Pager::None => self.zero_over_store(place, &mut top, &mut held),
            Slot::Absent | Slot::Zero => self.zero_fill(map, place, purpose, &mut top, &mut held),
            Slot::Swapped(_) => Step::PageIn(top.id(), place.index),
            Slot::Resident(frame) => self.resident(map, place, purpose, (&top, frame), &mut held),
        }
    }

    /// The top object has the page in a frame.
    #[inline(never)]
    fn resident(
        &self,
        map: &Map<M>,
        place: Place<'_>,
        purpose: &mut Purpose<'_>,
        (top, frame): (&State, Pfn),
        held: &mut Held<'_, OBJECT>,
    ) -> Step {
        let page = self.frames.page(frame);
        if page.is_filling() || (page.is_busy() && place.writes()) {
            return self.await_page(map, purpose, frame);
        }
        let mut prot = place.prot;
        match page.clean_slot() {
            Some(_) if place.writes() && self.has(crate::defect::Defect::DirtyKeepsItsSlot) => {}
            Some(_) if place.writes() => self.drop_clean_slot(frame, held),
            // The first write is to be noticed (P5).
            Some(_) => prot = prot.without(Prot::WRITE),
            None => {}
        }
        if top.pager != Pager::None {
            match place.writes() {
                true => page.set_dirty(true),
                // The same for its store (P7).
                false if !page.is_dirty() => prot = prot.without(Prot::WRITE),
                false => {}
            }
        }
        map.stats.count(Event::FaultResident);
        let step = self.finish_found(map, place, purpose, frame, prot, held);
        if matches!((&step, &purpose), (Step::Done, Purpose::Enter(_))) {
            // The copy may have received this page and not its neighbours.
            let prot = if top.copy.is_some() { prot.without(Prot::WRITE) } else { prot };
            self.enter_neighbours(map, place, &Around::Own(top, prot), held);
        }
        step
    }

    /// The top object has nothing: look below it.
    #[inline(never)]
    fn below_top(
        &self,
        map: &Map<M>,
        place: Place<'_>,
        purpose: &mut Purpose<'_>,
        top: &mut State,
        held: &mut Held<'_, OBJECT>,
    ) -> Step {
        let Some((object, index)) = top.below(place.index) else {
            return self.zero_fill(map, place, purpose, top, held);
        };
        let hop = top.trails.hop(place.index, self.trails_now());
        let (object, index) = match hop {
            None => (object, index),
            Some(Hop::To(object, index)) => (object, index),
            Some(Hop::Nothing) => return self.zero_fill(map, place, purpose, top, held),
        };
        let mut chain = self.objects.get(object).descend(held);
        if hop.is_some() && !self.has_hopped(chain.here(), object) {
            return Step::Again;
        }
        let mut found = self.look(&mut chain, index);
        if let (Found::Page(page), Some(_)) = (&mut found, hop) {
            (page.depth, page.sole) = (page.depth + 1, false);
        }
        match found {
            Found::Deep => Step::Trail(top.id(), place.index),
            Found::Changed => Step::Again,
            Found::Busy(frame) => self.await_page(map, purpose, frame),
            Found::PageIn(object, index) => Step::PageIn(object, index),
            Found::Nothing => {
                drop(chain);
                self.zero_fill(map, place, purpose, top, held)
            }
            Found::Page(mut page) if place.writes() => {
                if !page.sole && page.depth == 0 {
                    let (below, held) = chain.split();
                    let version = self.only_shadowed_at(below, held);
                    page.family = version.filter(|_| self.is_last_to_see(top, below, page.index, held));
                }
                if page.sole || page.family.is_some() {
                    if self.frames.page(page.frame).is_busy() {
                        return self.await_page(map, purpose, page.frame);
                    }
                    drop(chain);
                    self.move_up(map, place, purpose, top, page, held)
                } else {
                    let copied = {
                        let (owner, held) = chain.split();
                        if owner.pager == Pager::None {
                            self.objects.note_copied(owner.id().number(), page.index, held);
                        }
                        self.copy_up(top, place.index, page.frame, held)
                    };
                    drop(chain);
                    let Some(frame) = copied else { return Step::Wait(WaitFor::Memory) };
                    map.stats.count(Event::FaultCopy);
                    self.replace(map, place, purpose, frame, held)
                }
            }
            Found::Page(page) => {
                map.stats.count(Event::FaultShared);
                let prot = place.entry.prot.without(Prot::WRITE);
                let (owner, held) = chain.split();
                let step = self.finish_found(map, place, purpose, page.frame, prot, held);
                if matches!((&step, &purpose, page.depth), (Step::Done, Purpose::Enter(_), 0)) {
                    let around = Around::Below { top, owner, index: page.index };
                    self.enter_neighbours(map, place, &around, held);
                }
                step
            }
        }
    }

    /// A read through an entry whose object must not change: the whole chain is only looked at.
    #[inline(never)]
    fn in_shared(
        &self,
        map: &Map<M>,
        place: Place<'_>,
        purpose: &mut Purpose<'_>,
        held: &mut Held<'_, MAP>,
    ) -> Step {
        let mut chain = self.objects.get(place.entry.object).descend(held);
        match self.look(&mut chain, place.index) {
            Found::Deep => Step::Trail(place.entry.object, place.index),
            Found::Changed => Step::Again,
            Found::Busy(frame) => self.await_page(map, purpose, frame),
            Found::PageIn(object, index) => Step::PageIn(object, index),
            // A page of zeros in the shared object would outlive this guest's interest in it.
            Found::Nothing => Step::Shadow,
            Found::Page(page) => {
                map.stats.count(Event::FaultShared);
                let prot = place.entry.prot.without(Prot::WRITE);
                let (owner, held) = chain.split();
                let step = self.finish_found(map, place, purpose, page.frame, prot, held);
                if matches!((&step, &purpose, page.depth), (Step::Done, Purpose::Enter(_), 0)) {
                    self.enter_neighbours(map, place, &Around::Shared(owner), held);
                }
                step
            }
        }
    }

    /// A transfer has the page. It is not to go again before whoever waits has had it.
    #[cold]
    fn await_page(&self, map: &Map<M>, purpose: &Purpose<'_>, frame: Pfn) -> Step {
        let page = self.frames.page(frame);
        page.map();
        if let Purpose::Enter(Some(by)) = *purpose {
            map.need(by, frame);
        }
        Step::Wait(WaitFor::Io(page.transfer()))
    }

    /// A page of zeros in the top object.
    #[inline]
    fn zero_fill(
        &self,
        map: &Map<M>,
        place: Place<'_>,
        purpose: &mut Purpose<'_>,
        top: &mut State,
        held: &mut Held<'_, OBJECT>,
    ) -> Step {
        let Some(frame) = self.give_frame(top, place.index, Queue::Active, held) else {
            return Step::Wait(WaitFor::Memory);
        };
        self.machine.memory().zero(frame);
        map.stats.count(Event::FaultZero);
        self.finish(map, place, purpose, frame, place.prot, held)
    }

    /// A page of zeros in an object whose store has something else there.
    #[cold]
    fn zero_over_store(&self, place: Place<'_>, top: &mut State, held: &mut Held<'_, OBJECT>) -> Step {
        match self.materialise_zero(top, place.index, held) {
            Some(_) => Step::Again,
            None => Step::Wait(WaitFor::Memory),
        }
    }

    /// The same with a page that was there before: pageout may have it in hand.
    #[inline]
    fn finish_found(
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

    /// The page is there: serves the purpose with it. The owner's lock is held.
    #[inline]
    fn finish(
        &self,
        map: &Map<M>,
        place: Place<'_>,
        purpose: &mut Purpose<'_>,
        frame: Pfn,
        prot: Prot,
        held: &mut Held<'_, OBJECT>,
    ) -> Step {
        match purpose {
            Purpose::Enter(by) => {
                if self.frames.is_short()
                    && let Some(by) = *by
                {
                    map.need(by, frame);
                }
                let (mut pmap, _held) = map.pmap.lock(held);
                match pmap.enter(place.page, frame, prot, &mut |harvest| self.frames.note(harvest)) {
                    Ok(()) => Step::Done,
                    Err(OutOfTables) => Step::Wait(WaitFor::Memory),
                }
            }
            Purpose::Read(..) | Purpose::Write(..) | Purpose::Wire(_) => {
                self.finish_unmapped(purpose, frame, held)
            }
        }
    }

    /// The same where EL2 itself wanted the page.
    #[inline(never)]
    fn finish_unmapped(&self, purpose: &mut Purpose<'_>, frame: Pfn, held: &mut Held<'_, OBJECT>) -> Step {
        match purpose {
            Purpose::Enter(_) => unreachable!("that one is mapped"),
            Purpose::Read(offset, out) => {
                self.machine.memory().read(frame, *offset, out);
                Step::Done
            }
            Purpose::Write(offset, bytes) => {
                self.machine.memory().write(frame, *offset, bytes);
                Step::Done
            }
            Purpose::Wire(wired) => {
                if !self.frames.wire(frame, held) {
                    return Step::Wait(WaitFor::Memory);
                }
                **wired = Some(frame);
                Step::Done
            }
        }
    }
}
