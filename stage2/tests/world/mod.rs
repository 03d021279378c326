//! The world that the simulator plays with: guests on CPUs that forget nothing, under a VM that forgets all the time.
//!
//! Guests read, write and discard, are cloned, kept as snapshots, made from them, reset to them, and die, on four
//! CPUs, while pages go to swap and come back: late, in any order, or not at all, and a write that fails may have
//! been done in part. Every byte that a guest reads is compared with what it wrote, or its ancestors did before they
//! were copied; after every step no cache may know more than the tables, and every so often no table more than its
//! map. What `model` says of the tables alone is said here of the two together.

use stage2::Stage2;
use stage2::geometry::Geometry;
use stage2::table::{Table, TableSource};
use stage2::testing::{Access, Frames, Mmu};
use stage2::vmid::{Vmid, VmidAllocator};
use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock, Weak};
use vmobject::addr::{CHUNK_SIZE, Ipa, IpaRange, PAGE_SIZE, PageIndex, Pfn};
use vmobject::fault::{FaultError, Faulted};
use vmobject::lock::Held;
use vmobject::map::{Discarded, Map, Share, Snapshot};
use vmobject::prot::Prot;
use vmobject::store::{Direction, IoToken, Machine, PhysMemory as _, StoreError, StoreId};
use vmobject::testing::{FakeMemory, FakeStore};
use vmobject::{Vm, VmError};

const RAM: u64 = 0x4000_0000;
/// A guest's pages, on either side of a chunk's edge.
const PAGES: u32 = 24;
const FRAMES: u32 = 120;
const CPUS: usize = 4;
const MAX_GUESTS: usize = 5;
const MAX_KEPT: usize = 3;
const SWAP: StoreId = StoreId(1);
const SWAP_PAGES: usize = 512;

/// Frames of the VM's as tables: it counts and charges them.
#[derive(Clone)]
pub(crate) struct Source {
    frames: Frames,
    vm: Arc<OnceLock<Weak<Vm<Host>>>>,
}

impl TableSource for Source {
    fn alloc(&self) -> Option<Pfn> {
        let frame = self.vm.get()?.upgrade()?.alloc_table_frame()?;
        self.frames.claim(frame);
        Some(frame)
    }
    fn free(&self, frame: Pfn) {
        self.frames.release(frame);
        if let Some(vm) = self.vm.get().and_then(Weak::upgrade) {
            vm.free_table_frame(frame);
        }
    }
    fn table(&self, frame: Pfn) -> &Table {
        self.frames.table(frame)
    }
}

#[derive(Default)]
pub(crate) struct Host {
    memory: FakeMemory,
    store: FakeStore,
}

impl Machine for Host {
    type Pmap = Stage2<Source, Mmu>;
    type Memory = FakeMemory;
    type Store = FakeStore;
    fn memory(&self) -> &FakeMemory {
        &self.memory
    }
    fn store(&self) -> &FakeStore {
        &self.store
    }
}

/// What a guest wrote, by page.
type Bytes = BTreeMap<u32, u8>;

pub(crate) struct Guest {
    map: Arc<Map<Host>>,
    vmid: Vmid,
    bytes: Bytes,
}

pub(crate) struct World {
    pub(crate) vm: Arc<Vm<Host>>,
    source: Source,
    pub(crate) mmu: Mmu,
    geometry: Geometry,
    vmids: VmidAllocator,
    guests: Vec<Guest>,
    kept: Vec<(Snapshot, Bytes)>,
    running: [Option<usize>; CPUS],
    random: u64,
    /// One transfer in so many fails; none while it is 0.
    pub(crate) failing: usize,
    /// How often what happened that the VM does not count.
    pub(crate) seen: BTreeMap<&'static str, u64>,
    /// Guests' accesses that went through.
    pub(crate) accesses: u64,
    /// The last transfer that was delivered.
    last: Option<IoToken>,
}

fn address(page: u32) -> Ipa {
    // The chunk's edge is in the middle.
    Ipa::new(RAM + CHUNK_SIZE - u64::from(PAGES / 2) * PAGE_SIZE + u64::from(page) * PAGE_SIZE)
}

/// The byte of a page that guests use.
fn offset(page: u32) -> usize {
    (page as usize * 331) % 4096
}

impl World {
    pub(crate) fn new(geometry: Geometry, seed: u64) -> Self {
        let range = Pfn::new(0x1000)..Pfn::new(0x1000 + FRAMES);
        let frames = Frames::over(range.clone());
        let mmu = Mmu::new(&frames, geometry, CPUS);
        mmu.seed(seed);
        let host = Host::default();
        host.store.add(SWAP, vec![0; SWAP_PAGES << 12]);
        let vm = Arc::new(Vm::new(host, &[range]).expect("there are frames"));
        let source = Source { frames, vm: Arc::default() };
        source.vm.set(Arc::downgrade(&vm)).expect("once");
        vm.add_swap(SWAP, &mut Held::root()).expect("it is there");
        let vmids = VmidAllocator::new(3, CPUS);
        let random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut world = Self {
            vm,
            source,
            mmu,
            geometry,
            vmids,
            guests: Vec::new(),
            kept: Vec::new(),
            running: [None; CPUS],
            random,
            failing: 0,
            seen: BTreeMap::new(),
            accesses: 0,
            last: None,
        };
        world.birth();
        world
    }

    fn saw(&mut self, what: &'static str) {
        *self.seen.entry(what).or_default() += 1;
    }

    fn below(&mut self, n: usize) -> usize {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        usize::try_from(self.random >> 33).expect("31 bits") % n
    }

    fn page(&mut self) -> u32 {
        u32::try_from(self.below(PAGES as usize)).expect("small")
    }

    fn tables(&self) -> Result<Stage2<Source, Mmu>, VmError> {
        Stage2::new(self.source.clone(), self.mmu.clone(), self.geometry).map_err(|_| VmError::NoFrames)
    }

    /// A guest of its own, with nothing written.
    fn birth(&mut self) {
        let held = &mut Held::root();
        let map = self.vm.create_map(self.tables().expect("there are frames"), held).expect("a map");
        let object = self.vm.anonymous(PAGES, held).expect("an object");
        let range = IpaRange::from_pages(address(0), PAGES).expect("in order");
        self.vm
            .insert(&map, range, object, PageIndex::new(0), Prot::ALL, Share::Shared, held)
            .expect("there is room");
        self.guests.push(Guest { map, vmid: Vmid::default(), bytes: BTreeMap::new() });
    }

    fn clone(&mut self, of: usize) {
        let Ok(tables) = self.tables() else { return };
        // Refused where memory is promised already.
        let made = self.vm.copy_map(&self.guests[of].map, tables, &mut Held::root());
        self.born(made, self.guests[of].bytes.clone(), "clones");
    }

    fn born(&mut self, made: Result<Arc<Map<Host>>, VmError>, bytes: Bytes, what: &'static str) {
        if let Ok(map) = made {
            self.guests.push(Guest { map, vmid: Vmid::default(), bytes });
            self.saw(what);
        } else {
            self.saw("refusals");
        }
    }

    fn keep(&mut self, of: usize) {
        let pushes = self.below(3) == 0;
        let map = &self.guests[of].map;
        let held = &mut Held::root();
        let kept = if pushes { self.vm.freeze(map, held) } else { self.vm.snapshot(map, held) };
        if let Ok(snapshot) = kept {
            self.kept.push((snapshot, self.guests[of].bytes.clone()));
            self.saw("snapshots");
        }
    }

    fn revive(&mut self, of: usize) {
        let Ok(tables) = self.tables() else { return };
        let made = self.vm.map_snapshot(&self.kept[of].0, tables, &mut Held::root());
        self.born(made, self.kept[of].1.clone(), "guests from snapshots");
    }

    fn reset(&mut self, guest: usize, to: usize) {
        self.stop(guest);
        let map = self.guests[guest].map.clone();
        if self.vm.reset_map(&map, &self.kept[to].0, &mut Held::root()).is_ok() {
            self.guests[guest].bytes = self.kept[to].1.clone();
            self.saw("resets");
        }
    }

    fn forget(&mut self, of: usize) {
        let (snapshot, _) = self.kept.swap_remove(of);
        self.vm.delete_snapshot(snapshot, &mut Held::root());
        self.saw("snapshots deleted");
    }

    /// Makes a page of a guest zero.
    fn discard(&mut self, guest: usize) {
        let page = self.page();
        let range = IpaRange::from_pages(address(page), 1).expect("in order");
        match self.vm.discard(&self.guests[guest].map, range, &mut Held::root()) {
            Ok(Discarded::Done(_)) => {
                self.guests[guest].bytes.remove(&page);
                self.saw("discards");
            }
            Ok(Discarded::Wait(_)) => self.saw("discards that had to wait"),
            Err(_) => self.saw("discards refused"),
        }
    }

    /// Takes a guest off every CPU.
    fn stop(&mut self, guest: usize) {
        for cpu in (0..CPUS).filter(|&cpu| self.running[cpu] == Some(guest)).collect::<Vec<_>>() {
            self.mmu.run(cpu, 0);
            self.running[cpu] = None;
        }
    }

    fn death(&mut self, of: usize) {
        self.stop(of);
        let last = self.guests.len() - 1;
        for running in self.running.iter_mut().filter(|running| **running == Some(last)) {
            *running = Some(of);
        }
        let guest = self.guests.swap_remove(of);
        self.vm.destroy_map(guest.map, &mut Held::root());
        self.saw("deaths");
    }

    fn switch(&mut self, cpu: usize, to: usize) {
        let guest = &mut self.guests[to];
        guest.vmid = self.vmids.acquire(cpu, guest.vmid, &self.mmu);
        let vttbr = guest.map.with_pmap(&mut Held::root(), |tables| {
            tables.set_vmid(guest.vmid.number());
            tables.vttbr()
        });
        self.mmu.run(cpu, vttbr);
        self.running[cpu] = Some(to);
    }

    /// Finishes one transfer, whichever, well or badly; false when none is under way.
    fn deliver_one(&mut self) -> bool {
        let pending = self.vm.machine().store().pending();
        let nth = if pending == 0 { 0 } else { self.below(pending) };
        let Some(request) = self.vm.machine().store().take(nth) else { return false };
        if nth > 0 {
            self.saw("completions out of order");
        }
        let fails = self.failing > 0 && self.below(self.failing) == 0;
        // What fails may have been done in part.
        let done = if fails { self.below(request.frames.len() + 1) } else { request.frames.len() };
        let (memory, store) = (self.vm.machine().memory(), self.vm.machine().store());
        for (page, &frame) in (request.first..).zip(request.frames.iter().take(done)) {
            match request.direction {
                Direction::In => memory.write(frame, 0, &store.page(request.store, page)),
                Direction::Out => {
                    let mut bytes = [0; 4096];
                    memory.read(frame, 0, &mut bytes);
                    store.set_page(request.store, page, &bytes);
                }
            }
        }
        let result = if fails { Err(StoreError::Io) } else { Ok(()) };
        self.vm.complete(request.token, result, &mut Held::root());
        self.last = Some(request.token);
        true
    }

    /// Finishes every transfer.
    pub(crate) fn deliver(&mut self) -> bool {
        let mut any = false;
        while self.deliver_one() {
            any = true;
        }
        any
    }

    /// Delivers a completion a second time.
    fn deliver_again(&mut self) {
        if let Some(token) = self.last {
            self.vm.complete(token, Ok(()), &mut Held::root());
        }
    }

    /// Frees some frames.
    fn page_out(&mut self, target: u32) -> u32 {
        self.vm.set_free_target(target, target);
        let mut freed = 0;
        for _ in 0..20 {
            let done = self.vm.pageout(32, &mut Held::root());
            freed += done.freed;
            if !self.deliver_one() && !done.more {
                break;
            }
        }
        freed
    }

    /// An access of the guest that a CPU runs, with faults served until it is done. `None` when memory is out.
    fn access(&mut self, cpu: usize, at: Ipa, access: Access) -> Option<Pfn> {
        let wanted = if access == Access::Write { Prot::WRITE } else { Prot::READ };
        let guest = self.running[cpu].expect("it runs somebody");
        for _ in 0..200 {
            if let Ok(frame) = self.mmu.access(cpu, at, access) {
                self.accesses += 1;
                return Some(frame);
            }
            self.mmu.on(cpu);
            match self.vm.fault(&self.guests[guest].map, at, wanted, &mut Held::root()) {
                Ok(Faulted::Mapped) => {}
                Ok(Faulted::Wait(_)) if self.deliver_one() => {}
                Ok(Faulted::Wait(_)) if self.page_out(8) > 0 => {}
                Ok(Faulted::Wait(_)) => {
                    self.saw("accesses that found no memory");
                    return None;
                }
                Err(FaultError::Lost(_)) if self.failing > 0 => {
                    self.saw("accesses that a failed read ended");
                    return None;
                }
                Err(error) => panic!("{access:?} at {at}: {error:?}"),
            }
        }
        panic!("{access:?} at {at} faults for ever");
    }

    fn use_memory(&mut self, cpu: usize, guest: usize) -> Result<(), String> {
        let page = self.page();
        let write = self.below(2) == 0;
        let access = if write { Access::Write } else { Access::Read };
        let Some(frame) = self.access(cpu, address(page), access) else { return Ok(()) };
        let memory = self.vm.machine().memory();
        let known = self.guests[guest].bytes.get(&page).copied().unwrap_or(0);
        if write {
            let byte = known.wrapping_add(1).max(1);
            memory.write(frame, offset(page), &[byte]);
            self.guests[guest].bytes.insert(page, byte);
        } else {
            let mut byte = [0];
            memory.read(frame, offset(page), &mut byte);
            if byte != [known] {
                return Err(format!("page {page} of guest {guest} has {byte:?} and not {known}"));
            }
        }
        Ok(())
    }

    fn step(&mut self) -> Result<(), String> {
        let (cpu, guest) = (self.below(CPUS), self.below(self.guests.len()));
        self.mmu.on(cpu);
        let hot = [(); 3].map(|()| address(self.page()));
        self.mmu.touch(&hot);
        match self.below(100) {
            0..4 if self.guests.len() < MAX_GUESTS => self.clone(guest),
            4..6 if self.guests.len() > 1 => self.death(guest),
            6..10 => {
                let target = u32::try_from(self.below(FRAMES as usize)).expect("small");
                self.page_out(target);
            }
            10..13 => {
                let budget = u32::try_from(1 + self.below(100)).expect("small");
                self.vm.step(budget, &mut Held::root());
            }
            13..15 if self.kept.len() < MAX_KEPT => self.keep(guest),
            15 if !self.kept.is_empty() => {
                let of = self.below(self.kept.len());
                self.forget(of);
            }
            16 if !self.kept.is_empty() && self.guests.len() < MAX_GUESTS => {
                let of = self.below(self.kept.len());
                self.revive(of);
            }
            17 if !self.kept.is_empty() => {
                let to = self.below(self.kept.len());
                self.reset(guest, to);
            }
            18..20 => self.discard(guest),
            20..24 => {
                self.deliver_one();
            }
            24 => self.deliver_again(),
            25..36 => self.switch(cpu, guest),
            _ => match self.running[cpu] {
                Some(guest) => self.use_memory(cpu, guest)?,
                None => self.switch(cpu, guest),
            },
        }
        self.mmu.audit()
    }

    /// Plays on; what went wrong, and at which step.
    pub(crate) fn run(&mut self, steps: u64) -> Result<(), String> {
        for step in 0..steps {
            self.step().map_err(|why| format!("step {step}: {why}"))?;
            if step % 50 == 0 {
                let violation = self.vm.check(&mut Held::root()).err();
                violation.map_or(Ok(()), |violation| Err(format!("step {step}: {violation:?}")))?;
            }
        }
        Ok(())
    }

    /// Everybody dies, in any order: then every frame is free and every swap slot.
    pub(crate) fn end(&mut self) -> Result<(), String> {
        self.failing = 0;
        while !self.guests.is_empty() || !self.kept.is_empty() {
            if self.kept.is_empty() || (!self.guests.is_empty() && self.below(2) == 0) {
                let of = self.below(self.guests.len());
                self.death(of);
            } else {
                let of = self.below(self.kept.len());
                self.forget(of);
            }
        }
        while self.vm.step(1000, &mut Held::root()) || self.deliver() {}
        let held = &mut Held::root();
        let left = (FRAMES - self.vm.memory(held).queues.free, self.source.frames.in_use());
        if left == (0, 0) {
            Ok(())
        } else {
            Err(format!("at the end: {left:?} frames and tables are in use"))
        }
    }
}
