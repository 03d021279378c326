//! Fakes for tests: a machine in memory that remembers, and that fails on cue.
//!
//! [`Rig`] is a [`Vm`] on such a machine, with the few lines that every test needs: a guest's load or
//! store goes through the fake tables and faults when they say so, as a CPU would. Frames hold garbage
//! until somebody writes them, so a page that was handed out unzeroed shows.
//! Neighbours: every test; nothing in the product.

mod fakes;

pub use fakes::{FakeMachine, FakeMemory, FakePmap, FakeStore, GARBAGE, Request};

use alloc::sync::Arc;
use core::ops::Range;

use crate::addr::{Ipa, IpaRange, PAGE_SIZE, PageIndex, Pfn};
use crate::fault::{Copied, FaultError, Faulted, WaitFor};
use crate::lock::Held;
use crate::map::{Discarded, Entry, Map, NotDiscarded, Share, Snapshot};
use crate::object::ObjectId;
use crate::object::index::Slot;
use crate::page::{Owner, VmPage};
use crate::pager::{Cleaned, Down, Left, Shutdown};
use crate::prot::Prot;
use crate::store::{Direction, PhysMemory as _, StoreError, StoreId};
use crate::{Vm, VmError};

const PAGE_SIZE_BYTES: usize = 1 << crate::addr::PAGE_SHIFT;

/// Where the tests' guests have their memory.
pub const RAM: Ipa = Ipa::new(0x4000_0000);

/// The store that [`Rig::add_swap`] makes.
pub const SWAP: StoreId = StoreId(77);

/// A [`Vm`] on a fake machine.
pub struct Rig {
    /// The memory system under test.
    pub vm: Vm<FakeMachine>,
}

/// The number of a rig's first frame.
const FIRST: u32 = 0x1000;

/// A map of the rig's.
pub type TestMap = Arc<Map<FakeMachine>>;

/// What a test gets when its guest's access is not served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// The guest would feel this.
    Fault(FaultError),
    /// It would have to wait, and nothing is under way that could end it.
    Stuck(WaitFor),
}

/// See [`Rig::mark`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mark {
    /// Absent, zero, resident, swapped.
    pub kind: u8,
    /// A transfer has it.
    pub busy: bool,
    /// That transfer brings it.
    pub filling: bool,
    /// It is in the swap store as well.
    pub has_slot: bool,
    /// It could not be brought, and nobody was told yet.
    pub failed: bool,
}

impl Rig {
    /// A machine with this many frames, a quarter of which at most is reserve.
    pub fn new(frames: u32) -> Self {
        Self::with(FakeMachine::new(), frames)
    }

    /// The same with a machine that was prepared.
    pub fn with(machine: FakeMachine, frames: u32) -> Self {
        let range = Pfn::new(FIRST)..Pfn::new(FIRST + frames);
        match Vm::new(machine, core::slice::from_ref(&range)) {
            Ok(vm) => Self { vm },
            Err(error) => panic!("the rig has no memory: {error:?}"),
        }
    }

    /// All of its frames.
    pub fn frames(&self) -> impl Iterator<Item = Pfn> + use<> {
        (FIRST..FIRST + self.vm.memory(&mut Held::root()).total).map(Pfn::new)
    }

    /// A map with nothing in it.
    pub fn map(&self) -> TestMap {
        match self.vm.create_map(FakePmap::default(), &mut Held::root()) {
            Ok(map) => map,
            Err(error) => panic!("no map: {error:?}"),
        }
    }

    /// A map with `pages` pages of anonymous memory at [`RAM`].
    pub fn guest(&self, pages: u32) -> TestMap {
        let map = self.map();
        let object = self.anonymous(pages);
        assert_eq!(self.put(&map, 0, pages, object, 0, Prot::ALL, Share::Shared), Ok(()));
        map
    }

    /// An anonymous object.
    pub fn anonymous(&self, pages: u32) -> ObjectId {
        match self.vm.anonymous(pages, &mut Held::root()) {
            Ok(object) => object,
            Err(error) => panic!("no object: {error:?}"),
        }
    }

    /// Puts pages of an object at a page of [`RAM`].
    #[expect(clippy::too_many_arguments, reason = "as the call that it wraps")]
    pub fn put(
        &self,
        map: &TestMap,
        page: u32,
        pages: u32,
        object: ObjectId,
        first: u32,
        prot: Prot,
        share: Share,
    ) -> Result<(), VmError> {
        let range = IpaRange::from_pages(at(page, 0), pages).ok_or(VmError::Range)?;
        self.vm.insert(map, range, object, PageIndex::new(first), prot, share, &mut Held::root())
    }

    /// Faults until served, delivering I/O as needed.
    pub fn fault(&self, map: &TestMap, at: Ipa, access: Prot) -> Result<(), Refused> {
        loop {
            match self.vm.fault(map, at, access, &mut Held::root()).map_err(Refused::Fault)? {
                Faulted::Mapped => return Ok(()),
                Faulted::Wait(wait) => self.wait(wait)?,
            }
        }
    }

    fn wait(&self, wait: WaitFor) -> Result<(), Refused> {
        let moved = self.deliver_all();
        if moved == 0 && wait != WaitFor::Turn { Err(Refused::Stuck(wait)) } else { Ok(()) }
    }

    /// A guest's load of one byte.
    pub fn load(&self, map: &TestMap, at: Ipa) -> Result<u8, Refused> {
        let frame = self.translate(map, at, Prot::READ)?;
        let mut byte = [0];
        self.vm.machine().memory.read(frame, at.offset_in_page(), &mut byte);
        Ok(byte[0])
    }

    /// A guest's store of one byte.
    pub fn store(&self, map: &TestMap, at: Ipa, byte: u8) -> Result<(), Refused> {
        let frame = self.translate(map, at, Prot::WRITE)?;
        self.vm.machine().memory.write(frame, at.offset_in_page(), &[byte]);
        Ok(())
    }

    /// What the tables say, after as many faults as that takes.
    fn translate(&self, map: &TestMap, at: Ipa, access: Prot) -> Result<Pfn, Refused> {
        for _ in 0..500 {
            match map.with_pmap(&mut Held::root(), |pmap| pmap.access(at, access)) {
                Some(frame) => return Ok(frame),
                None => self.fault(map, at, access)?,
            }
        }
        panic!("{at:?}: a fault that was served is not");
    }

    /// What a guest would load, found out without touching anything.
    pub fn peek(&self, map: &TestMap, at: Ipa) -> Option<u8> {
        let held = &mut Held::root();
        let (entries, mut held) = map.entries.read(held);
        let entry = entries.iter().find(|entry| entry.range.contains(at))?;
        self.peek_at(entry, at, &mut held)
    }

    /// What a guest of a snapshot would load, found out likewise.
    pub fn peek_snapshot(&self, snapshot: &Snapshot, at: Ipa) -> Option<u8> {
        let entry = snapshot.iter().find(|entry| entry.range.contains(at))?;
        self.peek_at(entry, at, &mut Held::root())
    }

    fn peek_at<const OUTER: u8>(&self, entry: &Entry, at: Ipa, held: &mut Held<'_, OUTER>) -> Option<u8> {
        let sight = self.vm.survey(entry, at.page(), held);
        let machine = self.vm.machine();
        Some(match (sight.slot, sight.store) {
            (Slot::Resident(frame), home) if self.vm.frames.find(frame).is_some_and(VmPage::is_filling) => {
                let swapped = self.vm.frames.page(frame).clean_slot().map(|slot| (SWAP, slot));
                let (store, page) = swapped.or(home.map(|(store, page)| (store, page.number())))?;
                machine.store.page(store, page.into())[at.offset_in_page()]
            }
            (Slot::Swapped(slot), _) => machine.store.page(SWAP, slot.into())[at.offset_in_page()],
            (Slot::Resident(frame), _) => {
                let mut byte = [0];
                machine.memory.read(frame, at.offset_in_page(), &mut byte);
                byte[0]
            }
            (Slot::Absent, Some((store, page))) => {
                machine.store.page(store, page.number().into())[at.offset_in_page()]
            }
            (Slot::Absent | Slot::Zero, _) => 0,
        })
    }

    /// What an object knows of a page: without frames and places in the store, which differ between worlds that are
    /// otherwise alike.
    pub fn mark(&self, object: ObjectId, page: u32) -> Mark {
        let held = &mut Held::root();
        let (state, mut held) = self.vm.objects.get(object).read(held);
        let slot = state.slots.get(PageIndex::new(page));
        let resident = match slot {
            Slot::Resident(frame) => Some(self.vm.frames.page(frame)),
            Slot::Absent | Slot::Zero | Slot::Swapped(_) => None,
        };
        Mark {
            kind: match slot {
                Slot::Absent => 0,
                Slot::Zero => 1,
                Slot::Resident(_) => 2,
                Slot::Swapped(_) => 3,
            },
            busy: resident.is_some_and(VmPage::is_busy),
            filling: resident.is_some_and(VmPage::is_filling),
            has_slot: resident.is_some_and(|page| page.clean_slot().is_some()),
            failed: self.vm.has_failed(&state, PageIndex::new(page), &mut held),
        }
    }

    /// EL2's read of guest memory.
    pub fn read(&self, map: &TestMap, at: Ipa, out: &mut [u8]) -> Result<(), Refused> {
        loop {
            match self.vm.read(map, at, out, &mut Held::root()).map_err(Refused::Fault)? {
                Copied::Done => return Ok(()),
                Copied::Wait(wait) => self.wait(wait)?,
            }
        }
    }

    /// EL2's write to guest memory.
    pub fn write(&self, map: &TestMap, at: Ipa, bytes: &[u8]) -> Result<(), Refused> {
        loop {
            match self.vm.write(map, at, bytes, &mut Held::root()).map_err(Refused::Fault)? {
                Copied::Done => return Ok(()),
                Copied::Wait(wait) => self.wait(wait)?,
            }
        }
    }

    /// Discards pages of a guest's; how many frames and swap slots came back.
    pub fn discard(&self, map: &TestMap, page: u32, pages: u32) -> Result<u32, NotDiscarded> {
        let Some(range) = IpaRange::from_pages(at(page, 0), pages) else { panic!("no such pages") };
        loop {
            match self.vm.discard(map, range, &mut Held::root())? {
                Discarded::Done(given) => return Ok(given),
                Discarded::Wait(_) => assert!(self.deliver_all() > 0, "a page is busy without a transfer"),
                Discarded::Part(_) => {}
            }
        }
    }

    /// Cleans pages of an object, delivering what that starts; how many stayed changed.
    pub fn clean(&self, object: ObjectId, pages: Range<u32>) -> u32 {
        let range = PageIndex::new(pages.start)..PageIndex::new(pages.end);
        let mut clean = self.vm.page_clean(object, range);
        loop {
            match self.vm.clean_step(&mut clean, 64, &mut Held::root()) {
                Cleaned::Done { failed } => return failed,
                Cleaned::Wait(_) => assert!(self.deliver_all() > 0, "nothing to wait for"),
                Cleaned::More => {}
            }
        }
    }

    /// Turns the machine off; what is left.
    pub fn shut_down(&self) -> Left {
        let mut shutdown = Shutdown::default();
        loop {
            match self.vm.shutdown_step(&mut shutdown, 64, &mut Held::root()) {
                Down::Done(left) => return left,
                Down::Wait(_) => assert!(self.deliver_all() > 0, "nothing to wait for"),
                Down::More => {}
            }
        }
    }

    /// Delivers one pending transfer, the `nth`, with this result; false if there is none.
    pub fn deliver(&self, nth: usize, result: Result<(), StoreError>) -> bool {
        let machine = self.vm.machine();
        let Some(request) = machine.store.take(nth) else { return false };
        for (page, &frame) in (request.first..).zip(&request.frames) {
            match (request.direction, result) {
                (Direction::In, Ok(())) => {
                    let bytes = machine.store.page(request.store, page);
                    machine.memory.write(frame, 0, &bytes);
                }
                (Direction::Out, Ok(())) => {
                    let mut bytes = [0; 1 << crate::addr::PAGE_SHIFT];
                    machine.memory.read(frame, 0, &mut bytes);
                    machine.store.set_page(request.store, page, &bytes);
                }
                (Direction::In | Direction::Out, Err(_)) => {}
            }
        }
        self.vm.complete(request.token, result, &mut Held::root());
        true
    }

    /// Delivers everything that is pending, successfully; how many that were.
    pub fn deliver_all(&self) -> usize {
        let mut count = 0;
        while self.deliver(0, Ok(())) {
            count += 1;
        }
        count
    }

    /// Ends a guest.
    pub fn destroy(&self, map: TestMap) {
        self.vm.destroy_map(map, &mut Held::root());
        self.settle();
    }

    /// Gives the machine a swap store of this many pages.
    pub fn add_swap(&self, pages: u32) {
        self.vm.machine().store.add(SWAP, alloc::vec![GARBAGE; pages as usize * PAGE_SIZE_BYTES]);
        assert_eq!(self.vm.add_swap(SWAP, &mut Held::root()), Ok(pages));
    }

    /// One round of pageout that would free everything, without delivering what it starts; how many frames
    /// became free.
    pub fn page_out(&self) -> u32 {
        self.vm.set_free_target(u32::MAX, u32::MAX);
        let mut freed = 0;
        loop {
            let done = self.vm.pageout(1000, &mut Held::root());
            freed += done.freed;
            if !done.more {
                self.vm.set_free_target(0, 0);
                self.vm.machine().memory.spoil(|frame| self.vm.owner(frame) == Owner::Free);
                return freed;
            }
        }
    }

    /// Memory is short no more.
    pub fn ease(&self) {
        self.vm.set_free_target(0, 0);
        self.vm.pageout(1, &mut Held::root());
    }

    /// Pages out everything that can go, delivering what that starts.
    pub fn page_out_all(&self) {
        while self.page_out() > 0 || self.deliver_all() > 0 {}
    }

    /// A rig with a swap store.
    pub fn with_swap(frames: u32, swap: u32) -> Self {
        let rig = Self::new(frames);
        rig.add_swap(swap);
        rig
    }

    /// Writes [`byte_of`] each page into it, so that it can be told from the others.
    pub fn fill(&self, guest: &TestMap, pages: Range<u32>) {
        for page in pages {
            let stored = self.store(guest, at(page, 77), byte_of(page));
            assert_eq!(stored, Ok(()), "page {page}");
        }
    }

    /// Does all chores that can be done.
    pub fn settle(&self) {
        while self.vm.step(1000, &mut Held::root()) {}
    }

    /// A clone of a guest.
    pub fn clone(&self, map: &TestMap) -> TestMap {
        match self.vm.copy_map(map, FakePmap::default(), &mut Held::root()) {
            Ok(clone) => clone,
            Err(error) => panic!("no clone: {error:?}"),
        }
    }

    /// Frames that are free.
    pub fn free(&self) -> u32 {
        self.vm.memory(&mut Held::root()).queues.free
    }

    /// Objects that live.
    pub fn objects(&self) -> u32 {
        self.vm.memory(&mut Held::root()).objects
    }

    /// Audits everything.
    pub fn check(&self) {
        if let Err(violation) = self.vm.check(&mut Held::root()) {
            panic!("{violation:?}");
        }
    }
}

/// The address of a byte of a page of [`RAM`].
pub fn at(page: u32, offset: u64) -> Ipa {
    match RAM.checked_add(u64::from(page) * PAGE_SIZE + offset) {
        Some(at) => at,
        None => panic!("no such page"),
    }
}

/// What [`Rig::fill`] writes into a page: never zero.
pub fn byte_of(page: u32) -> u8 {
    let [byte, ..] = (page % 250 + 1).to_le_bytes();
    byte
}
