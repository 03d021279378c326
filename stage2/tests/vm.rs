//! The real VM over real tables: guests on CPUs that forget nothing, under a VM that forgets all the time.
//!
//! Guests read and write, are cloned and die, on four CPUs, while pages go to swap and come back. Every byte that a
//! guest reads is compared with what it wrote, or its ancestors did before they were cloned; after every step no
//! cache may know more than the tables, and every so often no table more than its map. What `model` says of the
//! tables alone is said here of the two together.

use stage2::Stage2;
use stage2::geometry::Geometry;
use stage2::table::{Table, TableSource};
use stage2::testing::cpus::{CORTEX_A53, CORTEX_A710, NEOVERSE_N1};
use stage2::testing::{Access, Frames, Mmu, Op};
use stage2::vmid::{Vmid, VmidAllocator};
use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock, Weak};
use vmobject::addr::{CHUNK_SIZE, Ipa, IpaRange, PAGE_SIZE, PageIndex, Pfn};
use vmobject::fault::Faulted;
use vmobject::lock::Held;
use vmobject::map::{Map, Share};
use vmobject::prot::Prot;
use vmobject::store::{Direction, Machine, PhysMemory as _, StoreId};
use vmobject::testing::{FakeMemory, FakeStore};
use vmobject::{Vm, VmError};

const RAM: u64 = 0x4000_0000;
/// A guest's pages, on either side of a chunk's edge.
const PAGES: u32 = 24;
const FRAMES: u32 = 120;
const CPUS: usize = 4;
const MAX_GUESTS: usize = 5;
const SWAP: StoreId = StoreId(1);
const SWAP_PAGES: usize = 512;

/// Frames of the VM's as tables: it counts and charges them.
#[derive(Clone)]
struct Source {
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
struct Host {
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

struct Guest {
    map: Arc<Map<Host>>,
    vmid: Vmid,
    /// What it wrote, by page.
    bytes: BTreeMap<u32, u8>,
}

struct World {
    vm: Arc<Vm<Host>>,
    source: Source,
    mmu: Mmu,
    geometry: Geometry,
    vmids: VmidAllocator,
    guests: Vec<Guest>,
    running: [Option<usize>; CPUS],
    random: u64,
    /// Clones, deaths, and pages that went to swap: a world without them says little.
    seen: [u32; 3],
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
    fn new(geometry: Geometry, seed: u64) -> Self {
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
        let (guests, running) = (Vec::new(), [None; CPUS]);
        let mut world = Self { vm, source, mmu, geometry, vmids, guests, running, random, seen: [0; 3] };
        world.birth();
        world
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
        if let Ok(map) = self.vm.copy_map(&self.guests[of].map, tables, &mut Held::root()) {
            let bytes = self.guests[of].bytes.clone();
            self.guests.push(Guest { map, vmid: Vmid::default(), bytes });
            self.seen[0] += 1;
        }
    }

    fn death(&mut self, of: usize) {
        for cpu in 0..CPUS {
            self.running[cpu] = match self.running[cpu] {
                Some(guest) if guest == of => {
                    self.mmu.run(cpu, 0);
                    None
                }
                Some(guest) if guest == self.guests.len() - 1 => Some(of),
                other => other,
            };
        }
        let guest = self.guests.swap_remove(of);
        self.vm.destroy_map(guest.map, &mut Held::root());
        self.seen[1] += 1;
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

    /// Finishes every transfer.
    fn deliver(&self) -> bool {
        let (memory, store) = (self.vm.machine().memory(), self.vm.machine().store());
        let mut any = false;
        while let Some(request) = store.take(0) {
            for (page, &frame) in (request.first..).zip(&request.frames) {
                match request.direction {
                    Direction::In => memory.write(frame, 0, &store.page(request.store, page)),
                    Direction::Out => {
                        let mut bytes = [0; 4096];
                        memory.read(frame, 0, &mut bytes);
                        store.set_page(request.store, page, &bytes);
                    }
                }
            }
            self.vm.complete(request.token, Ok(()), &mut Held::root());
            any = true;
        }
        any
    }

    /// Frees some frames.
    fn page_out(&mut self, target: u32) -> u32 {
        self.vm.set_free_target(target, target);
        let mut freed = 0;
        for _ in 0..20 {
            let done = self.vm.pageout(32, &mut Held::root());
            freed += done.freed;
            if !self.deliver() && !done.more {
                break;
            }
        }
        self.seen[2] += freed;
        freed
    }

    /// An access of the guest that a CPU runs, with faults served until it is done. `None` when memory is out.
    fn access(&mut self, cpu: usize, at: Ipa, access: Access) -> Option<Pfn> {
        let wanted = if access == Access::Write { Prot::WRITE } else { Prot::READ };
        let guest = self.running[cpu].expect("it runs somebody");
        for _ in 0..16 {
            if let Ok(frame) = self.mmu.access(cpu, at, access) {
                return Some(frame);
            }
            self.mmu.on(cpu);
            match self.vm.fault(&self.guests[guest].map, at, wanted, &mut Held::root()).expect("it is RAM") {
                Faulted::Mapped => {}
                Faulted::Wait(_) if self.deliver() => {}
                Faulted::Wait(_) if self.page_out(8) > 0 => {}
                Faulted::Wait(_) => return None,
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
                self.vm.step(100, &mut Held::root());
            }
            13..30 => self.switch(cpu, guest),
            _ => match self.running[cpu] {
                Some(guest) => self.use_memory(cpu, guest)?,
                None => self.switch(cpu, guest),
            },
        }
        self.mmu.audit()
    }

    fn run(&mut self, steps: u32) -> Result<(), String> {
        for step in 0..steps {
            self.step().map_err(|why| format!("step {step}: {why}"))?;
            if step % 50 == 0 {
                let violation = self.vm.check(&mut Held::root()).err();
                violation.map_or(Ok(()), |violation| Err(format!("step {step}: {violation:?}")))?;
            }
        }
        Ok(())
    }
}

#[test]
fn every_guest_reads_what_it_and_its_ancestors_wrote() {
    for features in [CORTEX_A53, NEOVERSE_N1, CORTEX_A710] {
        let mut seen = [0; 3];
        for seed in 1..=6 {
            let mut world = World::new(Geometry::new(features), seed);
            world.run(2500).unwrap_or_else(|why| panic!("{features:?}, seed {seed}, {why}"));
            seen = [0, 1, 2].map(|n| seen[n] + world.seen[n]);
        }
        assert!(seen.iter().all(|&count| count > 100), "clones, deaths, evictions: {seen:?}");
    }
}

#[test]
fn when_the_last_guest_is_gone_every_frame_is_free() {
    let mut world = World::new(Geometry::new(NEOVERSE_N1), 9);
    world.run(1000).expect("the model holds");
    while !world.guests.is_empty() {
        world.death(0);
    }
    while world.vm.step(1000, &mut Held::root()) {}
    world.deliver();
    assert_eq!(world.vm.memory(&mut Held::root()).queues.free, FRAMES);
    assert_eq!(world.source.frames.in_use(), 0);
}

#[test]
fn the_vm_s_world_finds_an_invalidate_that_does_nothing() {
    for op in [Op::Vmalls12e1is, Op::Ipas2e1is, Op::Vmalle1is, Op::Load] {
        let found = (1..=10).any(|seed| {
            let mut world = World::new(Geometry::new(NEOVERSE_N1), seed);
            world.mmu.sabotage(Some(op));
            world.run(2000).is_err()
        });
        assert!(found, "without {op:?} everything seems well");
    }
}
