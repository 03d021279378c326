//! Fault handling: from a stage-2 abort to a mapped page (`vm_fault.c`).
//!
//! Read top-down: look the address up, look in the top object, walk the shadow chain, page in, copy if
//! the guest writes, enter the mapping. Nothing here sleeps: a fault that must wait says for what, its
//! vCPU parks, and the fault runs again from the top; surviving the second run is what makes the first
//! one correct. EL2's own accesses to guest memory take the same way and end in a copy of bytes.
//!
//! Called by whoever runs guests. Calls `map`, `object`, `pager`, the pmap. Locks: the map for reading, the top object
//! until the mapping is entered, objects below it hand over hand, then the pmap.
//!
//! # Invariants
//! F1. A leaf is entered under the lock of the object that owns the frame, and under that of the top object, or else
//!     while nothing that others shadow has gained a page since the look began: so neither eviction nor another vCPU's
//!     copy comes between the look and the leaf.
//! F2. Only a page of the top object, and only through an entry without `needs_copy`, is mapped
//!     writable (I3).

mod access;
mod around;
mod block;
mod chain;
mod cow;
mod device;
mod finish;
mod push;
mod snapshot;
mod veil;
mod wire;

use crate::addr::{Ipa, PageIndex, Pfn};
use crate::defect::Defect;
use crate::limits::{AROUND_PAGES, MAX_RESTARTS};
use crate::lock::{CALLER, Held, MAP, OBJECT};
use crate::map::{Entry, Instruction, Map};
use crate::object::index::Slot;
use crate::object::{Hop, ObjectId, Pager, State};
use crate::page::Queue;
use crate::pager::Pushed;
pub use crate::pager::WaitFor;
use crate::prot::Prot;
use crate::stats::Event;
use crate::store::{LostPage, Machine, PhysMemory as _};
use crate::{PROMPT, Vm};
use around::Around;
use chain::{Found, unseen};
use finish::Purpose;
pub use snapshot::Looked;
use veil::Veil;
pub use wire::{Wired, Wiring};

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
    /// Nothing is mapped there, or only a device and EL2 was to touch it: inject an external abort.
    Hole(Ipa),
    /// Mapped, but not for this: inject a permission fault.
    Denied {
        /// Where.
        at: Ipa,
        /// What the guest wanted to do.
        wanted: Prot,
    },
    /// The store does not give the page: inject an external abort.
    Lost(LostPage),
}

/// What came of doing what an attempt asked for.
enum Helped {
    /// Try again.
    Again,
    /// Try again when this has come.
    Wait(WaitFor),
    /// That was enough for once.
    Part,
}

/// What one attempt came to.
enum Step {
    Done,
    /// Some of it is: that is enough for once.
    Part,
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
    /// EL2 does not touch a device for a guest.
    Refused,
    /// The store does not give the page.
    Lost(LostPage),
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
        let held: &mut Held<'_, CALLER> = &mut held.deepen();
        if map.is_limited() && self.must_pay(map, held) {
            return Ok(Faulted::Wait(WaitFor::Memory));
        }
        match self.serve(map, at, access, &mut Purpose::Enter(by), held) {
            Ok(Copied::Done) => Ok(Faulted::Mapped),
            Ok(Copied::Wait(wait)) => Ok(Faulted::Wait(wait)),
            Err(error) => Err(error),
        }
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
        match self.attempt(map, at, access, purpose, held) {
            Ok(Step::Done) => Ok(Copied::Done),
            Ok(Step::Wait(wait @ WaitFor::Io(_))) => {
                map.stats.count(Event::FaultWait);
                Ok(Copied::Wait(wait))
            }
            first => self.retry(map, at, access, purpose, first, held),
        }
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
            let wait = match self.help(map, at, step, purpose, held) {
                Ok(Helped::Again) => None,
                Ok(Helped::Part) => return Ok(purpose.in_part()),
                Ok(Helped::Wait(WaitFor::Memory)) if self.step_frees(held) => None,
                Ok(Helped::Wait(wait)) => Some(wait),
                Err(error) => {
                    map.stats.count(Event::FaultLost);
                    return Err(error);
                }
            };
            if let Some(wait) = wait {
                map.stats.count(Event::FaultWait);
                return Ok(Copied::Wait(wait));
            }
            step = self.attempt(map, at, access, purpose, held)?;
            if matches!(step, Step::Done) {
                return Ok(Copied::Done);
            }
            // Of a long way one part at a time.
            if matches!(step, Step::Trail(..)) {
                return Ok(purpose.in_part());
            }
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

    /// Does what an attempt asked for, with no lock held.
    #[cold]
    fn help(
        &self,
        map: &Map<M>,
        at: Ipa,
        step: Step,
        purpose: &Purpose<'_>,
        held: &mut Held<'_, CALLER>,
    ) -> Result<Helped, FaultError> {
        let then = |wait: Option<WaitFor>| wait.map_or(Helped::Again, Helped::Wait);
        match step {
            Step::Done | Step::Again => Ok(Helped::Again),
            Step::Part => Ok(Helped::Part),
            Step::Wait(wait) => Ok(Helped::Wait(wait)),
            Step::Refused => Err(FaultError::Hole(at)),
            Step::Lost(lost) => Err(FaultError::Lost(lost)),
            Step::Shadow => Ok(then(self.resolve_copy(map, at, held).err().map(|_| WaitFor::Memory))),
            Step::PageIn(object, index) => self
                .page_in((object, index), map.number(), |frame| purpose.needs(map, frame, true), held)
                .map(then)
                .map_err(FaultError::Lost),
            Step::Trail(object, index) => Ok(match self.lay_trail(object, index, held) {
                Ok(true) => Helped::Part,
                Ok(false) => Helped::Again,
                Err(_) => Helped::Wait(WaitFor::Memory),
            }),
            Step::Push(object, index) => match self.push(object, index, held).map_err(FaultError::Lost)? {
                Pushed::Again => Ok(Helped::Again),
                Pushed::Part => Ok(Helped::Part),
                Pushed::Wait(wait) => Ok(Helped::Wait(wait)),
            },
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
            Slot::Absent if top.pager != Pager::None => self.by_pager(map, place, purpose, &top, &mut held),
            Slot::Absent if top.shadow.is_some() => self.below_top(map, place, purpose, &mut top, &mut held),
            Slot::Zero if top.pager != Pager::None => self.zero_over_store(place, &mut top, &mut held),
            Slot::Absent | Slot::Zero => self.zero_fill(map, place, purpose, &mut top, &mut held),
            Slot::Swapped(slot) => self.swapped(map, place, purpose, (&mut top, slot), &mut held),
            Slot::Resident(frame) => self.resident(map, place, purpose, (&top, frame), &mut held),
        }
    }

    /// The top object has the page in a slot of swap.
    #[inline(never)]
    fn swapped(
        &self,
        map: &Map<M>,
        place: Place<'_>,
        purpose: &Purpose<'_>,
        (top, slot): (&mut State, u32),
        held: &mut Held<'_, OBJECT>,
    ) -> Step {
        let needs = |frame| purpose.needs(map, frame, true);
        match self.swap_in(top, (place.index, slot), map.number(), needs, held) {
            Ok(Some(wait)) => Step::Wait(wait),
            Ok(None) => Step::Again,
            Err(lost) => Step::Lost(lost),
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
        let (page, mut prot) = (self.frames.page(frame), place.prot);
        let fills = page.is_filling() && !self.has(Defect::SeesWhatFills);
        if fills || (page.is_busy() && place.writes()) {
            return self.await_page(map, purpose, frame);
        }
        match page.clean_slot() {
            Some(_) if place.writes() && self.has(Defect::DirtyKeepsItsSlot) => {}
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
        let enters = matches!(purpose, Purpose::Enter(_));
        // Of what was in swap as much as came along: who reads it in no order has nothing from more.
        let window = if page.has_clean_slot() { top.ahead.came() } else { AROUND_PAGES };
        if enters && window > 1 && !prot.allows(Prot::WRITE) {
            let around = Around::own(top, place, prot);
            if self.enter_block(map, place, &around, frame, held) {
                return Step::Done;
            }
        }
        let step = self.finish_found(map, place, purpose, frame, (prot, None), held);
        if enters && window > 1 && matches!(step, Step::Done) {
            // The copy may have received this page and not its neighbours.
            let prot = if top.copy.is_some() { prot.without(Prot::WRITE) } else { prot };
            self.enter_neighbours(map, place, window, &Around::own(top, place, prot), held);
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
        let (version, since) = (self.trails_now(), self.objects.version());
        let hop = top.hop(place.index, version);
        let (object, index, by_copy) = match hop {
            None => (object, index, false),
            Some(Hop::To(object, index, by_copy)) => (object, index, by_copy),
            Some(Hop::Nothing) => return self.zero_fill(map, place, purpose, top, held),
            Some(Hop::Unlaid) => return Step::Trail(top.id(), place.index),
        };
        let below = self.objects.get(object);
        let mut chain = if hop.is_some() {
            let hopped = below.descend_while(|| self.trails_now() == version, held);
            match hopped.filter(|chain| self.has_hopped(chain.here(), object, version)) {
                Some(chain) => chain,
                None => return Step::Again,
            }
        } else {
            below.descend(held)
        };
        let past = by_copy.then_some(since);
        let mut veil = None;
        let mut found = if matches!(purpose, Purpose::Enter(_)) && !place.writes() {
            let veil = veil.insert(Veil::new(place.page));
            veil.pass(top, place.index, hop.is_some().then_some(version));
            self.look(&mut chain, index, past, |state, index, hop| veil.pass(state, index, hop))
        } else {
            self.look(&mut chain, index, past, unseen)
        };
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
                let (owner, held) = chain.split();
                let since = (page.depth > 0).then_some(since);
                let around =
                    Around { owner, index: page.index, own: None, veil: veil.unwrap_or(Veil::ALL), since };
                self.show(map, place, purpose, page.frame, &around, held)
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
        let since = self.objects.version();
        let mut chain = self.objects.get(place.entry.object).descend(held);
        let mut veil = Veil::new(place.page);
        match self.look(&mut chain, place.index, None, |state, index, hop| veil.pass(state, index, hop)) {
            Found::Deep => Step::Trail(place.entry.object, place.index),
            Found::Changed => Step::Again,
            Found::Busy(frame) => self.await_page(map, purpose, frame),
            Found::PageIn(object, index) => Step::PageIn(object, index),
            // A page of zeros in the shared object would outlive this guest's interest in it.
            Found::Nothing => Step::Shadow,
            Found::Page(page) => {
                let (owner, held) = chain.split();
                let since = (page.depth > 0).then_some(since);
                let around = Around { owner, index: page.index, own: None, veil, since };
                self.show(map, place, purpose, page.frame, &around, held)
            }
        }
    }

    /// Shows a page of an object below, to be read only, and its neighbours.
    #[inline]
    fn show(
        &self,
        map: &Map<M>,
        place: Place<'_>,
        purpose: &mut Purpose<'_>,
        frame: Pfn,
        around: &Around<'_>,
        held: &mut Held<'_, OBJECT>,
    ) -> Step {
        map.stats.count(Event::FaultShared);
        let prot = place.entry.prot.without(Prot::WRITE);
        let enters = matches!(purpose, Purpose::Enter(_));
        if enters && self.enter_block(map, place, around, frame, held) {
            return Step::Done;
        }
        let step = self.finish_found(map, place, purpose, frame, (prot, around.since), held);
        if enters && matches!(step, Step::Done) {
            self.enter_neighbours(map, place, AROUND_PAGES, around, held);
        }
        step
    }

    /// A transfer has the page.
    #[cold]
    fn await_page(&self, map: &Map<M>, purpose: &Purpose<'_>, frame: Pfn) -> Step {
        let page = self.frames.page(frame);
        page.map();
        purpose.needs(map, frame, false);
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
}
