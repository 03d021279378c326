//! The world that the simulator plays with: guests on CPUs that forget nothing, under a VM that forgets all the time.
//!
//! Guests read, write and discard, are cloned, kept as snapshots, made from them, reset to them, and die, on four
//! CPUs, while pages go to swap and come back: late, in any order, or not at all, and a write that fails may have
//! been done in part. While one CPU executes the VM, a guest on another may write between any two looks at a table.
//! Every byte that a guest reads is compared with what it wrote, or its ancestors did before they were copied; so is
//! every page of whoever dies, and of everybody at rest. After every step no cache may know more than the tables, every so
//! often no table more than its map, and at rest no more pages may be there than copies made at once would need. Some
//! worlds are watched closely: in those everybody's pages are compared and the books are audited after every step. What
//! `model` says of the tables alone is said here of the two together.

mod access;
mod audit;
mod contents;
mod host;
mod named;
mod parts;
pub(crate) mod story;
mod watch;
mod whole;

use contents::Contents;
use host::{Host, Meanwhile, Scribble, Source};
use stage2::Stage2;
use stage2::geometry::Geometry;
use stage2::testing::cpus::{CORTEX_A53, CORTEX_A710, NEOVERSE_N1};
use stage2::testing::{Access, Frames, Mmu, Op};
use stage2::vmid::{Vmid, VmidAllocator};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use story::{Deed, Random, Step};
use vmobject::addr::{CHUNK_SIZE, Ipa, IpaRange, PAGE_SIZE, PageIndex, Pfn};
use vmobject::defect::Defect;
use vmobject::limits::MIN_RESERVE;
use vmobject::lock::Held;
use vmobject::map::{Discarded, Map, Share, Snapshot};
use vmobject::prot::Prot;
use vmobject::store::{Direction, IoToken, PhysMemory as _, StoreError, StoreId};
use vmobject::{Vm, VmError};

const RAM: u64 = 0x4000_0000;
/// A guest's pages, on either side of a chunk's edge.
const PAGES: u32 = 24;
/// Pages in another chunk where nothing is at first: copies of ranges are put there.
const ATTIC: u32 = 12;
const ALL: u32 = PAGES + ATTIC;
const FRAMES: u32 = 160;
/// Behind the last of them: the end of a chunk.
const LAST: u32 = 0x1200;
/// Frames that are free when a guest that waited for one can go on: some more than are kept from guests.
const ENOUGH: u32 = MIN_RESERVE + 8;
/// Pages that guests use at a time.
const TOGETHER: u32 = 4;
const CPUS: usize = 4;
/// Guests and snapshots there may be at a time; in every fourth world there are many, more than siblings that are asked
/// at once, and so chains are long.
const FEW: (usize, usize) = (5, 3);
const MANY: (usize, usize) = (12, 9);
/// Copies of ranges that are kept at a time.
const MAX_PARTS: usize = 2;
const SWAP: StoreId = StoreId(1);
const SWAP_PAGES: usize = 1024;

/// What is wrong with a world, to see whether it is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Nothing.
    None,
    /// The VM does something wrong.
    Vm(Defect),
    /// An instruction does nothing.
    Instruction(Op),
    /// No cache is told of what a clone does.
    DeafClone,
    /// No cache is told of what an eviction does.
    DeafEviction,
    /// No cache is told of what chores do. Only the end of a map tells any: chains become shorter with every leaf as it is.
    DeafChores,
    /// Leaves are read, and then written.
    CarelessUpdate,
    /// No cache is told of a block that is broken.
    SilentBreak,
}

pub(crate) struct Guest {
    map: Arc<Map<Host>>,
    vmid: Vmid,
    name: u32,
    contents: Contents,
    /// It was cloned while a block was mapped.
    parked: bool,
}

pub(crate) struct World {
    pub(crate) vm: Arc<Vm<Host>>,
    source: Source,
    mmu: Mmu,
    geometry: Geometry,
    vmids: VmidAllocator,
    fault: Fault,
    guests: Vec<Guest>,
    names: u32,
    kept: Vec<(Snapshot, Contents)>,
    /// Copies of ranges: the pages, and what they are.
    parts: Vec<(Snapshot, Range<u32>, Contents)>,
    /// Guests and snapshots that there may be.
    most: (usize, usize),
    /// How many of the snapshots are never forgotten: those of guests with a whole chunk, just born.
    golden: usize,
    /// The frames that there are.
    frames: Range<u32>,
    running: [Option<usize>; CPUS],
    random: Random,
    /// One transfer in so many fails; none while it is 0.
    failing: usize,
    /// One access in so many is a write, and one goes to a page that may be new.
    calm: usize,
    /// Ranges lose and get back the permission to be written, which cuts entries.
    protects: bool,
    /// How often what happened that the VM does not count.
    pub(crate) seen: BTreeMap<&'static str, u64>,
    /// Guests' accesses that went through.
    pub(crate) accesses: u64,
    /// The last transfer that was delivered.
    last: Option<IoToken>,
    /// Writes in the middle of the last deed.
    scribbled: Vec<Scribble>,
    /// After every deed everybody's memory is compared with what it ought to be, and the books are audited.
    watched: bool,
    /// Objects that have moved some of their pages to each other, and not all yet, the last time that chores were done.
    half_done: Vec<named::Pair>,
}

fn address(page: u32) -> Ipa {
    if let Some(above) = page.checked_sub(PAGES) {
        return Ipa::new(RAM + 3 * CHUNK_SIZE + u64::from(above) * PAGE_SIZE);
    }
    // The chunk's edge is in the middle.
    Ipa::new(RAM + CHUNK_SIZE - u64::from(PAGES / 2) * PAGE_SIZE + u64::from(page) * PAGE_SIZE)
}

/// The first of the two bytes of a page that guests use.
fn offset(page: u32) -> usize {
    (page as usize * 331) % 4095
}

impl World {
    /// Of the seed: which CPUs, whether the store fails now and then, whether guests have their memory in one entry or
    /// in two, how much they write, and whether parts of it are protected.
    pub(crate) fn new(seed: u64, fault: Fault) -> Self {
        let features = [CORTEX_A53, NEOVERSE_N1, CORTEX_A710];
        let geometry = Geometry::new(features[usize::try_from(seed % 3).expect("small")]);
        let whole = seed.is_multiple_of(whole::OF);
        let first = if whole { LAST - FRAMES - whole::FRAMES } else { LAST - FRAMES };
        let range = Pfn::new(first)..Pfn::new(LAST);
        let frames = Frames::over(range.clone());
        let mmu = Mmu::new(&frames, geometry, CPUS);
        let host = Host::default();
        host.store.add(SWAP, vec![0; SWAP_PAGES << 12]);
        let vm = Arc::new(Vm::new(host, &[range]).expect("there are frames"));
        let source = Source::new(frames, mmu.clone());
        source.vm.set(Arc::downgrade(&vm)).expect("once");
        vm.add_swap(SWAP, &mut Held::root()).expect("it is there");
        match fault {
            Fault::Vm(defect) => vm.seed(Some(defect)),
            Fault::Instruction(op) => mmu.sabotage(Some(op)),
            Fault::None
            | Fault::DeafClone
            | Fault::DeafEviction
            | Fault::DeafChores
            | Fault::CarelessUpdate
            | Fault::SilentBreak => {}
        }
        let mut world = Self {
            vm,
            source,
            mmu,
            geometry,
            vmids: VmidAllocator::new(3, CPUS),
            fault,
            guests: Vec::new(),
            names: 0,
            kept: Vec::new(),
            parts: Vec::new(),
            most: if seed % 4 == 3 { MANY } else { FEW },
            golden: 0,
            frames: first..LAST,
            running: [None; CPUS],
            random: Random::new(seed),
            calm: 8 << (seed / 12 % 3 * 4),
            // Cut entries keep more pages hidden than copies made at once would have, where windows are so large.
            protects: !(seed / 36).is_multiple_of(2) && !whole,
            failing: if (seed / 3).is_multiple_of(2) { 0 } else { 20 },
            seen: BTreeMap::new(),
            accesses: 0,
            last: None,
            scribbled: Vec::new(),
            watched: seed.is_multiple_of(watch::OF),
            half_done: Vec::new(),
        };
        if whole {
            world.birth_of_a_whole_chunk();
        } else {
            world.birth(if (seed / 6).is_multiple_of(2) { PAGES } else { PAGES / 2 });
        }
        world
    }

    fn saw(&mut self, what: &'static str) {
        *self.seen.entry(what).or_default() += 1;
    }

    fn tables(&self) -> Result<Stage2<Source, Mmu>, VmError> {
        let tables = Stage2::new(self.source.clone(), self.mmu.clone(), self.geometry);
        let mut tables = tables.map_err(|_| VmError::NoFrames)?;
        tables.set_careless(self.fault == Fault::CarelessUpdate);
        tables.set_silent(self.fault == Fault::SilentBreak);
        Ok(tables)
    }

    /// A guest of its own, with nothing written, its object mapped by entries of so many pages.
    fn birth(&mut self, pages: u32) {
        let Ok(tables) = self.tables() else { return };
        let held = &mut Held::root();
        let map = self.vm.create_map(tables, held).expect("a map");
        let object = self.vm.anonymous(PAGES, held).expect("an object");
        for start in (0..PAGES).step_by(pages as usize) {
            if start > 0 {
                self.vm.reference(object, held).expect("few");
            }
            let first = PageIndex::new(start);
            let range = IpaRange::from_pages(address(start), pages).expect("in order");
            let put = self.vm.insert(&map, range, object, first, Prot::ALL, Share::Shared, held);
            put.expect("there is room");
        }
        self.born(Ok(map), Contents::default(), "guests with nothing");
    }

    /// What guests on other CPUs wrote meanwhile is what they have.
    fn absorb(&mut self) {
        for scribble in self.source.take_scribbles() {
            let Some(guest) = self.guests.iter_mut().find(|guest| guest.name == scribble.who) else {
                continue;
            };
            guest.contents.bytes[scribble.page as usize][1] = scribble.byte;
            self.scribbled.push(scribble);
            self.saw("writes in the middle of an edit");
        }
    }

    /// The next deed is met by writes of guests on other CPUs, between its looks at tables.
    fn let_others_write(&mut self, step: Step) {
        let who = (0..CPUS).filter_map(|cpu| Some((cpu, self.guests[self.running[cpu]?].name))).collect();
        // Whether a discard or a write came first nobody could say.
        let but = (step.deed == Deed::Discard).then_some(step.page);
        let gap = 1 << self.random.below(10);
        self.source.let_write(Meanwhile::new(who, step.cpu, but, gap, self.random));
    }

    /// While the caches are told nothing, if that is what is wrong.
    fn with<R>(&mut self, deaf: Fault, work: impl FnOnce(&mut Self) -> R) -> R {
        self.mmu.deafen(self.fault == deaf);
        let done = work(self);
        self.mmu.deafen(false);
        done
    }

    fn born(&mut self, made: Result<Arc<Map<Host>>, VmError>, contents: Contents, what: &'static str) {
        if let Ok(map) = made {
            self.names += 1;
            self.guests.push(Guest { map, vmid: Vmid::default(), name: self.names, contents, parked: false });
            self.saw(what);
        } else {
            self.saw("refusals");
        }
    }

    fn clone(&mut self, of: usize) {
        let Ok(tables) = self.tables() else { return };
        // Refused where memory is promised already.
        let map = self.guests[of].map.clone();
        self.guests[of].parked |= self.blocks(of) > 0;
        let made = self.with(Fault::DeafClone, |world| world.vm.copy_map(&map, tables, &mut Held::root()));
        self.absorb();
        self.born(made, self.guests[of].contents.clone(), "clones");
    }

    fn keep(&mut self, of: usize, pushes: bool) {
        let map = self.guests[of].map.clone();
        let kept = self.with(Fault::DeafClone, |world| {
            let held = &mut Held::root();
            if pushes { world.vm.freeze(&map, held) } else { world.vm.snapshot(&map, held) }
        });
        self.absorb();
        if let Ok(snapshot) = kept {
            self.kept.push((snapshot, self.guests[of].contents.clone()));
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
        let rest = |held: &mut Held<'_, 0>| {
            self.vm.step(1, held);
        };
        if self.vm.reset_map(&map, &self.kept[to].0, &rest, &mut Held::root()).is_ok() {
            self.guests[guest].contents = self.kept[to].1.clone();
            self.saw("resets");
        }
    }

    fn forget(&mut self, of: usize) {
        let (snapshot, _) = self.kept.swap_remove(of);
        self.vm.delete_snapshot(snapshot, &mut Held::root());
        self.saw("snapshots deleted");
    }

    /// Makes a page of a guest zero.
    fn discard(&mut self, guest: usize, page: u32) {
        let range = IpaRange::from_pages(address(page), 1).expect("in order");
        let before = self.before_discard(guest, page);
        match self.vm.discard(&self.guests[guest].map, range, &mut Held::root()) {
            Ok(Discarded::Done(_)) => {
                let contents = &mut self.guests[guest].contents;
                contents.bytes[page as usize] = [0; 2];
                contents.touched &= !(1 << page);
                self.note_discard(guest, page, before);
                self.saw("discards");
            }
            Ok(Discarded::Wait(_) | Discarded::Part(_)) => self.saw("discards that had to wait"),
            Err(_) => self.saw("discards refused"),
        }
    }

    /// Takes a guest off every CPU.
    fn stop(&mut self, guest: usize) {
        self.source.let_nobody_write();
        for cpu in (0..CPUS).filter(|&cpu| self.running[cpu] == Some(guest)).collect::<Vec<_>>() {
            self.mmu.run(cpu, 0);
            self.running[cpu] = None;
        }
    }

    fn death(&mut self, of: usize) -> Result<(), String> {
        self.stop(of);
        self.absorb();
        // Of a copy more can be seen, but whoever was copied dies as one who was copied.
        self.compare(of)?;
        self.compare_ballast(of, 1)?;
        if self.guests[of].name.is_multiple_of(2) {
            self.compare_copy(of)?;
        }
        let last = self.guests.len() - 1;
        for running in self.running.iter_mut().filter(|running| **running == Some(last)) {
            *running = Some(of);
        }
        let guest = self.guests.swap_remove(of);
        self.with(Fault::DeafChores, |world| world.vm.destroy_map(guest.map, &mut Held::root()));
        self.saw("deaths");
        Ok(())
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
        let pending = self.vm.machine().store.pending();
        let nth = if pending == 0 { 0 } else { self.random.below(pending) };
        let Some(request) = self.vm.machine().store.take(nth) else { return false };
        if nth > 0 {
            self.saw("completions out of order");
        }
        let fails = self.failing > 0 && self.random.below(self.failing) == 0;
        // What fails may have been done in part.
        let done = if fails { self.random.below(request.frames.len() + 1) } else { request.frames.len() };
        let (memory, store) = (&self.vm.machine().memory, &self.vm.machine().store);
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

    /// Frees some frames: so many more are free now.
    fn page_out(&mut self, target: u32) -> u32 {
        let free = |world: &Self| world.vm.memory(&mut Held::root()).queues.free;
        let before = free(self);
        self.vm.set_free_target(target, target);
        for _ in 0..20 {
            let done = self.with(Fault::DeafEviction, |world| world.vm.pageout(32, &mut Held::root()));
            if !self.deliver_one() && !done.more {
                break;
            }
        }
        free(self).saturating_sub(before)
    }

    /// The pageout daemon and chores in turns, each of them stopped wherever it is.
    fn take_turns(&mut self) {
        let target = self.random.small(FRAMES);
        self.vm.set_free_target(target, target);
        let before = self.pairs();
        for _ in 0..self.random.below(100) {
            if self.random.below(2) == 0 {
                self.with(Fault::DeafEviction, |world| world.vm.pageout(1, &mut Held::root()));
            } else {
                self.do_chores(2, &before);
            }
        }
    }

    /// Does a deed, if there is anybody to do it to. After it no cache knows more than the tables.
    pub(crate) fn act(&mut self, step: Step) -> Result<(), String> {
        let (guests, kept) = (self.guests.len(), self.kept.len());
        let (guest, cpu) = (step.who % guests, step.cpu);
        self.random = Random::new(step.salt);
        self.mmu.seed(step.salt);
        self.mmu.on(cpu);
        let hot = [(); 3].map(|()| address(self.random.small(PAGES)));
        self.mmu.touch(&hot);
        self.let_others_write(step);
        match step.deed {
            Deed::Clone if guests < self.most.0 => self.clone(guest),
            Deed::Die if guests > 1 => self.death(guest)?,
            Deed::PageOut(target) => {
                self.page_out(target);
            }
            Deed::Chores(budget) => {
                let before = self.pairs();
                self.do_chores(budget, &before);
            }
            Deed::Both => self.take_turns(),
            Deed::Keep(pushes) if kept < self.most.1 => {
                self.keep(guest, pushes);
                if pushes && step.salt.is_multiple_of(2) {
                    self.write_what_goes_out(cpu, guest)?;
                }
            }
            Deed::Forget if kept > self.golden => self.forget(self.golden + step.who % (kept - self.golden)),
            Deed::Revive if self.golden > 0 && step.who.is_multiple_of(2) && guests < self.most.0 => {
                self.revive(0)
            }
            Deed::Revive if kept > 0 && guests < self.most.0 => self.revive(step.who % kept),
            Deed::Reset if kept > 0 => self.reset(guest, step.page as usize % kept),
            Deed::Discard if step.salt.is_multiple_of(2) => self.write_ballast(cpu, step.page, true)?,
            Deed::Discard => self.discard(guest, step.page),
            Deed::Protect(pages, prot) if self.protects => {
                let end = if step.page < PAGES { PAGES } else { ALL };
                self.protect(guest, step.page, pages.min(end - step.page), prot);
            }
            Deed::CopyIn(pages) if self.parts.len() < MAX_PARTS => self.copy_in(guest, step.page, pages)?,
            Deed::CopyOut if !self.parts.is_empty() => self.copy_out(guest, step)?,
            Deed::ForgetPart if !self.parts.is_empty() => self.forget_part(step.who % self.parts.len()),
            Deed::Limit(frames) => self.limit(guest, frames)?,
            Deed::Birth if guests < self.most.0 => {
                self.birth(if step.page < PAGES { PAGES } else { PAGES / 2 })
            }
            Deed::Deliver => {
                self.deliver_one();
            }
            Deed::DeliverAgain => {
                if let Some(token) = self.last {
                    self.vm.complete(token, Ok(()), &mut Held::root());
                }
            }
            Deed::Switch => self.switch(cpu, guest),
            Deed::Read | Deed::Write if self.running[cpu].is_none() => self.switch(cpu, guest),
            Deed::Read if step.salt.is_multiple_of(4) => self.read_ballast(cpu)?,
            Deed::Read => self.use_memories(step, Access::Read)?,
            Deed::Write if step.salt.is_multiple_of(64) => self.write_ballast(cpu, step.page, false)?,
            Deed::Write => self.use_memories(step, Access::Write)?,
            Deed::Rest => self.rest()?,
            Deed::Check => self.check()?,
            Deed::Clone
            | Deed::Die
            | Deed::Keep(_)
            | Deed::Forget
            | Deed::Revive
            | Deed::Reset
            | Deed::CopyIn(_)
            | Deed::CopyOut
            | Deed::ForgetPart
            | Deed::Birth
            | Deed::Protect(..) => {}
        }
        self.source.let_nobody_write();
        self.absorb();
        self.audit_scribbles()?;
        self.mmu.audit()?;
        if self.watched { self.watch() } else { Ok(()) }
    }
}
