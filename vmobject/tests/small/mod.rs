//! One small world: guests, a kept snapshot, what an eager copier would have, and everything that can happen.

pub(crate) mod form;

use std::collections::BTreeMap;
use std::iter::successors;
use std::sync::atomic::Ordering::Relaxed;

use vmobject::addr::{IpaRange, Pfn};
use vmobject::defect::Defect;
use vmobject::fault::{FaultError, Faulted, Looked, WaitFor};
use vmobject::lock::Held;
use vmobject::map::{Discarded, NotDiscarded, Snapshot};
use vmobject::page::Owner;
use vmobject::prot::Prot;
use vmobject::store::{LostPage, PhysMemory as _, StoreError};
use vmobject::testing::{FakePmap, Rig, TestMap, at};

/// No world is larger than that.
pub(crate) const MAX_PAGES: usize = 4;
const SLOTS: u32 = 32;

/// How large a world is, and what can happen in it.
#[derive(Clone, Copy)]
pub(crate) struct Scope {
    pub(crate) guests: u8,
    pub(crate) pages: u8,
    /// Memory runs short, and transfers fail.
    pub(crate) trouble: bool,
    /// Transfers that the store takes at a time; with none each ends before anything else happens.
    pub(crate) queue: u32,
    pub(crate) frames: u32,
    /// What is done wrong in it.
    pub(crate) defect: Option<Defect>,
}

/// What happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    /// A guest's load from a page; if it has to wait, it was only the fault.
    Read(u8, u8),
    Write(u8, u8),
    /// `page_remove`, as the guest asks for it.
    Discard(u8, u8),
    Clone(u8),
    /// A symmetric snapshot.
    Keep(u8),
    /// An asymmetric one.
    Freeze(u8),
    Reset(u8),
    Kill(u8),
    /// The guest may not write its memory any more, or it may again; what was mapped stays as it is then.
    Protect(u8),
    /// A guest is made from the snapshot.
    Make,
    /// The snapshot is deleted.
    Forget,
    /// Everything that can go is on its way out.
    PageOut,
    /// The transfer that is due ends: a page is in, or out.
    Deliver,
    /// It fails.
    Fail,
    /// A step of collapse and other chores.
    Step,
    /// All frames are gone, or back.
    Frames,
    /// No guest gets a table, or each does again.
    Tables,
}

/// What somebody would have if every copy were made at once.
#[derive(Clone, Copy, Default)]
pub(crate) struct Eager {
    pub(crate) bytes: [u8; MAX_PAGES],
    /// The pages that have a frame: a bit for each.
    pub(crate) frames: u8,
    /// It may not write.
    pub(crate) sealed: bool,
}

pub(crate) struct World {
    pub(crate) scope: Scope,
    pub(crate) rig: Rig,
    pub(crate) guests: Vec<Option<(TestMap, Eager)>>,
    pub(crate) kept: Option<(Snapshot, Eager)>,
    /// Frames that somebody else has.
    hoard: Vec<Pfn>,
    pub(crate) starved: bool,
    pub(crate) tableless: bool,
    /// A copy-object may have pages that its guest never touched.
    pub(crate) asymmetric: bool,
    writes: u8,
}

impl World {
    pub(crate) fn new(scope: Scope) -> Self {
        let rig = Rig::with_swap(scope.frames, SLOTS);
        rig.vm.seed(scope.defect);
        rig.vm.machine().store.queue.store(scope.queue, Relaxed);
        let mut guests: Vec<_> = (0..scope.guests).map(|_| None).collect();
        guests[0] = Some((rig.guest(scope.pages.into()), Eager::default()));
        Self {
            scope,
            rig,
            guests,
            kept: None,
            hoard: Vec::new(),
            starved: false,
            tableless: false,
            asymmetric: false,
            writes: 0,
        }
    }

    /// Everything that means something here, for these pages.
    pub(crate) fn possible(&self, pages: &[u8]) -> Vec<Op> {
        let mut all = vec![Op::PageOut];
        let room = self.guests.iter().any(Option::is_none);
        for (guest, _) in (0..).zip(&self.guests).filter(|(_, guest)| guest.is_some()) {
            for &page in pages {
                all.extend([Op::Read, Op::Write, Op::Discard].map(|op| op(guest, page)));
            }
            all.extend([Op::Kill(guest), Op::Protect(guest)]);
            all.extend(room.then_some(Op::Clone(guest)));
            match &self.kept {
                None => all.extend([Op::Keep(guest), Op::Freeze(guest)]),
                Some(_) => all.push(Op::Reset(guest)),
            }
        }
        if self.kept.is_some() {
            all.push(Op::Forget);
            all.extend(room.then_some(Op::Make));
        }
        if self.rig.vm.has_chores(&mut Held::root()) {
            all.push(Op::Step);
        }
        let due = self.rig.vm.machine().store.pending() > 0;
        all.extend(due.then_some(Op::Deliver));
        if self.scope.trouble {
            all.extend(due.then_some(Op::Fail));
            all.extend([Op::Frames, Op::Tables]);
        }
        all
    }

    fn guest(&mut self, guest: u8) -> (&Rig, &TestMap, &mut Eager) {
        match &mut self.guests[usize::from(guest)] {
            Some((map, eager)) => (&self.rig, map, eager),
            None => panic!("there is no guest {guest}"),
        }
    }

    fn settle_in(&mut self, map: TestMap, eager: Eager) {
        set_tableless(&map, self.tableless);
        let free = self.guests.iter_mut().find(|guest| guest.is_none()).expect("there is room");
        *free = Some((map, eager));
    }

    /// What an eager copy of a guest has. What was pushed to a copy-object came from below as well.
    fn copied(&self, guest: u8) -> Eager {
        let (_, eager) = self.guests[usize::from(guest)].as_ref().expect("it lives");
        Eager { frames: if self.asymmetric { u8::MAX } else { eager.frames }, ..*eager }
    }

    pub(crate) fn act(&mut self, op: Op) {
        let held = &mut Held::root();
        match op {
            Op::Read(guest, page) => self.access(guest, page, Prot::READ),
            Op::Write(guest, page) => self.access(guest, page, Prot::WRITE),
            Op::Discard(guest, page) => self.discard(guest, page),
            Op::Clone(guest) => {
                let eager = self.copied(guest);
                let (rig, map, _) = self.guest(guest);
                let clone = rig.clone(map);
                self.settle_in(clone, eager);
            }
            Op::Keep(guest) | Op::Freeze(guest) => {
                let freeze = matches!(op, Op::Freeze(_));
                self.asymmetric |= freeze;
                let eager = self.copied(guest);
                let (rig, map, _) = self.guest(guest);
                let kept = if freeze { rig.vm.freeze(map, held) } else { rig.vm.snapshot(map, held) };
                self.kept = Some((kept.unwrap(), eager));
            }
            Op::Reset(guest) => {
                let (snapshot, kept) = self.kept.as_ref().expect("there is a snapshot");
                let (map, eager) = self.guests[usize::from(guest)].as_mut().expect("it lives");
                self.rig.vm.reset_map(map, snapshot, &|_| {}, held).unwrap();
                *eager = *kept;
            }
            Op::Kill(guest) => {
                let (map, _) = self.guests[usize::from(guest)].take().expect("it lives");
                self.rig.vm.destroy_map(map, held);
            }
            Op::Protect(guest) => {
                let range = IpaRange::from_pages(at(0, 0), self.scope.pages.into()).expect("some pages");
                let (rig, map, eager) = self.guest(guest);
                eager.sealed = !eager.sealed;
                let prot = if eager.sealed { Prot::ALL.without(Prot::WRITE) } else { Prot::ALL };
                assert_eq!(rig.vm.protect(map, range, prot, held), Ok(()));
            }
            Op::Make => {
                let (snapshot, kept) = self.kept.as_ref().expect("there is a snapshot");
                let (map, eager) = (self.rig.vm.map_snapshot(snapshot, FakePmap::default(), held), *kept);
                self.settle_in(map.unwrap(), eager);
            }
            Op::Forget => {
                let (snapshot, _) = self.kept.take().expect("there is a snapshot");
                self.rig.vm.delete_snapshot(snapshot, held);
            }
            Op::PageOut => {
                self.rig.page_out();
            }
            Op::Deliver => assert!(self.rig.deliver(0, Ok(()))),
            Op::Fail => assert!(self.rig.deliver(0, Err(StoreError::Io))),
            Op::Step => {
                self.rig.vm.step(2, held);
            }
            Op::Frames => self.starve(!self.starved),
            Op::Tables => {
                self.tableless = !self.tableless;
                self.guests.iter().flatten().for_each(|(map, _)| set_tableless(map, self.tableless));
            }
        }
        if self.scope.queue == 0 {
            self.rig.deliver_all();
        }
    }

    fn starve(&mut self, starve: bool) {
        self.starved = starve;
        if starve {
            self.hoard.extend(std::iter::from_fn(|| self.rig.vm.alloc_table_frame()));
        } else {
            self.hoard.drain(..).for_each(|frame| self.rig.vm.free_table_frame(frame));
        }
    }

    /// An access that may have to wait; then it is not made, as by a vCPU that is parked.
    fn access(&mut self, guest: u8, page: u8, access: Prot) {
        let tableless = self.tableless;
        let (writes, number) = (self.writes.checked_add(1).expect("a short story"), usize::from(page));
        let (rig, map, eager) = self.guest(guest);
        let (address, held) = (at(page.into(), 0), &mut Held::root());
        let mapped = map.with_pmap(held, |pmap| pmap.access(address, access)).is_some();
        let faulted = if mapped { Ok(Faulted::Mapped) } else { rig.vm.fault(map, address, access, held) };
        match faulted {
            Ok(Faulted::Mapped) => {}
            Ok(Faulted::Wait(WaitFor::Io(_)))
            | Err(FaultError::Lost(LostPage { error: StoreError::Io, .. })) => return,
            Ok(Faulted::Wait(WaitFor::Memory)) => {
                // The page may be there, and only its table is not.
                eager.frames |= u8::from(tableless) << page;
                return;
            }
            Err(FaultError::Denied { wanted: Prot::WRITE, .. }) if eager.sealed => return,
            other @ (Err(_) | Ok(Faulted::Wait(WaitFor::Turn))) => panic!("{address:?}: {other:?}"),
        }
        eager.frames |= 1 << page;
        if access.allows(Prot::WRITE) {
            assert!(!eager.sealed, "a guest writes what it may not");
            assert_eq!(rig.store(map, address, writes), Ok(()));
            eager.bytes[number] = writes;
            self.writes = writes;
        } else {
            assert_eq!(rig.load(map, address), Ok(eager.bytes[number]), "a guest reads something else");
        }
    }

    fn discard(&mut self, guest: u8, page: u8) {
        let (rig, map, eager) = self.guest(guest);
        let range = IpaRange::from_pages(at(page.into(), 0), 1).expect("a page");
        match rig.vm.discard(map, range, &mut Held::root()) {
            Ok(Discarded::Done(_)) => {
                eager.bytes[usize::from(page)] = 0;
                eager.frames &= !(1 << page);
            }
            Ok(Discarded::Wait(_) | Discarded::Part(_))
            | Err(NotDiscarded::Lost(LostPage { error: StoreError::Io, .. })) => {}
            Err(NotDiscarded::Denied(_)) if eager.sealed => {}
            Err(other) => panic!("page {page}: {other:?}"),
        }
    }

    /// How many objects the longest chain has.
    pub(crate) fn depth(&self) -> usize {
        let mut below = BTreeMap::new();
        self.rig.vm.for_each_object(&mut Held::root(), |object| {
            below.insert(object.id, object.shadow.map(|shadow| shadow.object));
        });
        let chain = |from| successors(Some(from), |object| below.get(object).copied().flatten()).count();
        below.keys().map(|&object| chain(object)).max().unwrap_or(0)
    }

    /// After every step: each guest's memory is the eager copy's, and the audit is clean.
    pub(crate) fn verify(&self) {
        if let Err(violation) = self.rig.vm.check(&mut Held::root()) {
            panic!("{violation:?}");
        }
        for (number, (map, eager)) in self.guests.iter().flatten().enumerate() {
            for page in 0..self.scope.pages {
                let seen = self.rig.peek(map, at(page.into(), 0));
                assert_eq!(seen, Some(eager.bytes[usize::from(page)]), "guest {number}, page {page}");
            }
        }
    }

    /// At rest there is no more than eager copies would have, and the snapshot has what it had; then everything
    /// ends, and nothing is left.
    pub(crate) fn end(mut self) {
        self.starve(false);
        self.rest();
        let holders = self.guests.iter().flatten().map(|(_, eager)| eager);
        let all = (1 << self.scope.pages) - 1;
        let eager: u32 = holders
            .chain(self.kept.iter().map(|(_, eager)| eager))
            .map(|eager| (eager.frames & all).count_ones())
            .sum();
        let mut swapped = 0;
        self.rig.vm.for_each_object(&mut Held::root(), |object| swapped += object.counts.swapped);
        // However they were copied, there are no more pages with something in them than holders see, each for itself.
        let see: usize = self
            .guests
            .iter()
            .flatten()
            .map(|(_, eager)| eager)
            .chain(self.kept.iter().map(|(_, eager)| eager))
            .map(|eager| eager.bytes.iter().filter(|byte| **byte != 0).count())
            .sum();
        let (vm, memory) = (&self.rig.vm, &self.rig.vm.machine().memory);
        let frames = self.rig.frames().filter(|&frame| matches!(vm.owner(frame), Owner::Object(..)));
        let written = frames.filter(|&frame| !memory.is_zero(frame)).count() + swapped as usize;
        assert!(written <= see, "{written} pages are not zero, holders see {see}");
        let used = self.scope.frames - self.rig.free();
        assert!(used + swapped <= eager, "{used} frames, {swapped} slots, eager copies {eager}");
        if let Some((snapshot, eager)) = &self.kept {
            for page in 0..self.scope.pages {
                let byte = self.look(snapshot, page);
                assert_eq!(byte, eager.bytes[usize::from(page)], "snapshot, page {page}");
            }
        }
        if self.kept.is_some() {
            self.act(Op::Forget);
        }
        for guest in 0..self.scope.guests {
            if self.guests[usize::from(guest)].is_some() {
                self.act(Op::Kill(guest));
            }
        }
        self.rest();
        let slots = self.rig.vm.swap_info(&mut Held::root()).in_use;
        assert_eq!(
            (self.rig.free(), self.rig.objects(), slots),
            (self.scope.frames, 0, 0),
            "something is left"
        );
    }

    fn rest(&self) {
        while self.rig.deliver_all() > 0 {}
        self.rig.settle();
        self.verify();
        if let Err(violation) = self.rig.vm.check_at_rest(&mut Held::root()) {
            panic!("at rest: {violation:?}");
        }
    }

    /// A byte of the snapshot, brought in if need be. What could not be brought before is told once.
    fn look(&self, snapshot: &Snapshot, page: u8) -> u8 {
        let mut byte = [0xff];
        for _ in 0..4 {
            let read = self.rig.vm.read_snapshot(snapshot, at(page.into(), 0), &mut byte, &mut Held::root());
            match read {
                Ok(Looked::Done) => return byte[0],
                Ok(Looked::Wait(_)) => assert!(self.rig.deliver_all() > 0),
                Ok(Looked::Again) | Err(FaultError::Lost(LostPage { error: StoreError::Io, .. })) => {}
                Err(other) => panic!("snapshot, page {page}: {other:?}"),
            }
        }
        panic!("snapshot, page {page}: it does not come")
    }
}

fn set_tableless(map: &TestMap, tableless: bool) {
    map.with_pmap(&mut Held::root(), |pmap| *pmap.out_of_tables.get_mut() = tableless);
}
