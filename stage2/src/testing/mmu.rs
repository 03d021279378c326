//! CPUs with translation caches that keep what they must not until they are told to drop it.
//!
//! Each CPU caches stage-2 leaves, combined entries made of them (stage 1 is the identity here), and the ways
//! to tables, apart, tagged by VMID. Nothing is evicted unless a test bounds the caches. An invalidate removes
//! only what the architecture says it must, only of the VMID that its CPU has loaded, and only when a DSB of
//! the right reach completes it; until then, and at every instruction, the *other* CPUs go on using and filling
//! their caches, out of stale entries where they have them. A leaf that does not allow an access is cached like
//! any other, and goes on refusing. A walker may see table writes at once, or as late as the next DSB, each
//! descriptor for itself. At a DSB the combined entries go first and can be made again of stage-2 entries that
//! are still on their way out: so a sequence that forgets the DSB between its halves is caught. Access and dirty
//! flags are set where VTCR_EL2 of the geometry says so, and fault or stay otherwise.
//!
//! # How to use it
//!
//! The [`Mmu`] is the `TlbOps` of the tables, their frames are [`Frames`]; a test says which CPU runs whom, and
//! lets guests access memory. A fault comes back as a value; whoever plays EL2 serves it on that CPU and asks
//! again.
//!
//! ```
//! use stage2::Stage2;
//! use stage2::geometry::{Features, Geometry};
//! use stage2::testing::{Access, Fault, Frames, Mmu};
//! use vmobject::addr::{Ipa, Pfn};
//! use vmobject::pmap::Pmap as _;
//! use vmobject::prot::Prot;
//!
//! let geometry = Geometry::new(Features::from_id_registers(5, 2)); // 48 bits, the hardware sets both flags
//! let frames = Frames::new(16);
//! let mmu = Mmu::new(&frames, geometry, 2); // two CPUs
//! let mut tables = Stage2::new(frames.clone(), mmu.clone(), geometry).unwrap();
//! tables.set_vmid(7);
//! mmu.run(1, tables.vttbr()); // CPU 1 runs the guest from now on
//! let at = Ipa::new(0x4000_0000);
//! assert_eq!(mmu.access(1, at, Access::Read), Err(Fault::Translation(1)));
//! mmu.on(1); // EL2 on CPU 1 serves it: here, `Vm::fault`
//! tables.enter(at, Pfn::new(0x1234), Prot::ALL, &mut |_| {}).unwrap();
//! assert_eq!(mmu.access(1, at, Access::Write), Ok(Pfn::new(0x1234)));
//! mmu.audit().unwrap(); // no cache of any CPU knows more than the tables allow
//! ```
//!
//! A simulator of a whole VM makes its machine's `Pmap` of `Stage2<Source, Mmu>`, where `Source` takes frames of
//! that VM ([`Frames::over`]); gives each map a VMID by `vmid::VmidAllocator` before [`Mmu::run`], as
//! `load_guest` does on the metal; after a step asks [`Mmu::audit`] (caches against tables), and the VM's own
//! check (tables against maps). With `audit` quiet and the tables right, no free frame can be reached.
//! [`Mmu::touch`] says where the other CPUs go of their own accord; [`Mmu::sabotage`] makes one
//! instruction do nothing, to see that it is found.

use super::Frames;
use super::caches::{Cached, Cpu, Pending, Reach, Way};
pub use super::walker::Access;
pub use super::walker::Fault;
use super::walker::{self, Leaf, Regime};
use crate::geometry::{Features, Geometry};
use crate::tlb::{RangeOperand, TlbOps};
use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::Ordering::Relaxed;
use spin::mutex::SpinMutex;
use vmobject::addr::{Ipa, Pfn, PhysAddr};

/// An instruction, as the trace has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// DSB ISHST.
    DsbIshst,
    /// DSB ISH.
    DsbIsh,
    /// DSB NSH.
    DsbNsh,
    /// ISB.
    Isb,
    /// TLBI IPAS2E1IS.
    Ipas2e1is,
    /// TLBI RIPAS2E1IS.
    Ripas2e1is,
    /// TLBI VMALLE1IS.
    Vmalle1is,
    /// TLBI VMALLS12E1IS.
    Vmalls12e1is,
    /// TLBI VMALLS12E1.
    Vmalls12e1,
    /// TLBI ALLE1IS.
    Alle1is,
    /// VTTBR_EL2 is loaded.
    Load,
}

struct State {
    frames: Frames,
    geometry: Geometry,
    here: usize,
    cpus: Vec<Cpu>,
    /// Every descriptor as the last DSB left it: the oldest that a walker can see.
    seen: Vec<u64>,
    /// Roots by VMID, as they were last loaded to run.
    names: BTreeMap<u16, u64>,
    hot: Vec<u64>,
    trace: Vec<Op>,
    sabotaged: Option<Op>,
    deaf: bool,
    capacity: usize,
    broken: Option<String>,
    random: u64,
}

/// The CPUs of a machine. A clone is the same machine.
#[derive(Clone)]
pub struct Mmu(Arc<SpinMutex<State>>);

const fn vmid_of(vttbr: u64) -> u16 {
    (vttbr >> 48) as u16
}

impl Mmu {
    /// `cpus` CPUs that walk tables in `frames`, with the registers of a geometry.
    pub fn new(frames: &Frames, geometry: Geometry, cpus: usize) -> Self {
        Self(Arc::new(SpinMutex::new(State {
            frames: frames.clone(),
            geometry,
            here: 0,
            cpus: (0..cpus).map(|_| Cpu::default()).collect(),
            seen: frames.copy(),
            names: BTreeMap::new(),
            hot: Vec::new(),
            trace: Vec::new(),
            sabotaged: None,
            deaf: false,
            capacity: usize::MAX,
            broken: None,
            random: 1,
        })))
    }

    /// From now on it is this CPU that executes what is under test.
    pub fn on(&self, cpu: usize) {
        self.0.lock().here = cpu;
    }

    /// Lets a CPU run a guest: VTTBR_EL2 as `load_stage2` would load it, barriers included.
    pub fn run(&self, cpu: usize, vttbr: u64) {
        let mut state = self.0.lock();
        state.see_all();
        state.cpus[cpu].vttbr = vttbr;
        state.name(vttbr);
    }

    /// The addresses that CPUs touch of their own accord, at every instruction of the code under test.
    pub fn touch(&self, hot: &[Ipa]) {
        self.0.lock().hot = hot.iter().map(|at| at.bits()).collect();
    }

    /// Starts the adversary's choices elsewhere.
    pub fn seed(&self, seed: u64) {
        self.0.lock().random = seed | 1;
    }

    /// From now on an instruction does nothing, or again all do what they must.
    pub fn sabotage(&self, op: Option<Op>) {
        self.0.lock().sabotaged = op;
    }

    /// From now on no invalidate does anything, or again all do what they must.
    pub fn deafen(&self, deaf: bool) {
        self.0.lock().deaf = deaf;
    }

    /// Bounds what a CPU caches: at most so many entries of each kind, and the oldest go first. Without this
    /// nothing ever goes by itself, which finds most and costs most.
    pub fn capacity(&self, entries: usize) {
        self.0.lock().capacity = entries;
    }

    /// The instructions since the last call.
    pub fn take_trace(&self) -> Vec<Op> {
        core::mem::take(&mut self.0.lock().trace)
    }

    /// A guest's access on a CPU, out of the caches where they have it: the frame that it reaches.
    pub fn access(&self, cpu: usize, at: Ipa, access: Access) -> Result<Pfn, Fault> {
        let output = self.0.lock().access(cpu, at.bits(), access)?;
        PhysAddr::new(output).frame().ok_or(Fault::AddressSize(3))
    }

    /// The leaf that the tables of a VTTBR_EL2 have for an address now, past all caches.
    pub fn leaf(&self, vttbr: u64, at: Ipa) -> Option<Leaf> {
        let state = self.0.lock();
        let read = |address| state.frames.descriptor(address).map_or(0, |(_, entry)| entry.load(Relaxed));
        walker::find(state.regime(vttbr), at.bits(), None, read).ok()
    }

    /// How many entries, of whatever kind, the CPUs have for a VMID.
    pub fn cached(&self, vmid: u16) -> usize {
        self.0.lock().cached(vmid)
    }

    /// Says what a CPU could still reach and must not, or what went wrong on the way.
    pub fn audit(&self) -> Result<(), String> {
        let mut state = self.0.lock();
        if let Some(broken) = state.broken.take() {
            return Err(broken);
        }
        for (number, cpu) in state.cpus.iter().enumerate() {
            for entry in cpu.stage2.iter().chain(&cpu.combined) {
                // A name that nobody bears any more is never loaded again before it is given again.
                if !state.names.contains_key(&entry.vmid) {
                    continue;
                }
                state.audit_leaf(entry).map_err(|why| format!("cpu {number}: {why}: {entry:x?}"))?;
            }
            for way in &cpu.ways {
                if !state.names.contains_key(&way.vmid) {
                    continue;
                }
                state.audit_way(way).map_err(|why| format!("cpu {number}: {why}: {way:x?}"))?;
            }
        }
        Ok(())
    }
}

impl State {
    fn regime(&self, vttbr: u64) -> Regime {
        Regime { vtcr: self.geometry.vtcr(), vttbr, hcr: self.geometry.hcr() }
    }

    fn features(&self) -> Features {
        self.geometry.features()
    }

    fn cached(&self, vmid: u16) -> usize {
        let of = |cpu: &Cpu| {
            let leaves = cpu.stage2.iter().chain(&cpu.combined).filter(|c| c.vmid == vmid).count();
            leaves + cpu.ways.iter().filter(|w| w.vmid == vmid).count()
        };
        self.cpus.iter().map(of).sum()
    }

    /// A guest runs under a name: the only one it has, and nobody else's.
    fn name(&mut self, vttbr: u64) {
        let vmid = vmid_of(vttbr);
        if vmid == 0 || self.names.get(&vmid) == Some(&vttbr) {
            return;
        }
        if self.cached(vmid) != 0 {
            self.broken = Some(format!("name {vmid} is given again, and caches remember its last bearer"));
        }
        let same = |other: u64| other & 0xffff_ffff_ffff == vttbr & 0xffff_ffff_ffff && other != vttbr;
        if self.cpus.iter().any(|cpu| same(cpu.vttbr)) {
            self.broken = Some(format!("{vttbr:#x}: a guest runs under two names"));
        }
        self.names.retain(|_, other| !same(*other));
        self.names.insert(vmid, vttbr);
    }

    fn chance(&mut self) -> bool {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random & 0x100 != 0
    }

    /// A descriptor as a walker may see it: as it is, or as it was at the last DSB.
    fn look(&mut self, address: u64) -> u64 {
        let late = self.chance();
        match self.frames.descriptor(address) {
            Some((place, _)) if late => self.seen[place],
            Some((_, entry)) => entry.load(Relaxed),
            None => {
                self.broken.get_or_insert_with(|| format!("a walk left the tables, at {address:#x}"));
                0
            }
        }
    }

    fn see_all(&mut self) {
        self.frames.copy_changed(&mut self.seen);
    }

    /// Walks for a CPU, sets flags as the hardware does, and fills the CPU's caches.
    fn walk(&mut self, cpu: usize, at: u64, access: Access) -> Result<Cached, Fault> {
        let vttbr = self.cpus[cpu].vttbr;
        let (regime, vmid) = (self.regime(vttbr), vmid_of(vttbr));
        loop {
            let ways = self.cpus[cpu].ways.iter();
            let way =
                ways.filter(|w| w.vmid == vmid && at & !(w.bytes - 1) == w.base).max_by_key(|w| w.level);
            let from = way.map(|w| (w.level, w.table));
            let leaf = walker::find(regime, at, from, |address| self.look(address))?;
            let wanted = walker::check(regime, &leaf, access);
            if leaf.accessed || wanted.is_ok() {
                self.keep_ways(cpu, vmid, &leaf);
            }
            let wanted = wanted.inspect_err(|_| {
                // What faults for its permissions is cached all the same; what was not accessed is not.
                if leaf.accessed {
                    self.keep(cpu, vmid, &leaf, leaf.descriptor.1);
                }
            })?;
            let (address, found) = leaf.descriptor;
            if wanted != found {
                let Some((place, entry)) = self.frames.descriptor(address) else {
                    continue;
                };
                if entry.compare_exchange(found, wanted, Relaxed, Relaxed).is_err() {
                    // It changed: the walk begins again, and sees at least that.
                    self.seen[place] = entry.load(Relaxed);
                    continue;
                }
                self.seen[place] = wanted;
            }
            return Ok(self.keep(cpu, vmid, &leaf, wanted));
        }
    }

    fn keep_ways(&mut self, cpu: usize, vmid: u16, leaf: &Leaf) {
        for &(level, table) in leaf.tables.iter().skip(1) {
            let bytes = 1 << ((4 - level) * 9 + 12);
            let way = Way { vmid, base: leaf.base & !(bytes - 1), bytes, level, table };
            let ways = &mut self.cpus[cpu].ways;
            let clash = ways.iter().find(|w| w.vmid == vmid && (w.base, w.level) == (way.base, level));
            match clash {
                Some(old) if *old == way => {}
                Some(old) => {
                    let why = format!("two tables for one place, no break between: {old:x?} and {way:x?}");
                    self.broken.get_or_insert(why);
                }
                None => ways.push(way),
            }
        }
    }

    fn keep(&mut self, cpu: usize, vmid: u16, leaf: &Leaf, descriptor: u64) -> Cached {
        let [read, _, execute] = leaf.allows;
        let entry = Cached {
            vmid,
            base: leaf.base,
            bytes: leaf.bytes,
            output: leaf.output,
            allows: [read, descriptor >> 7 & 1 == 1, execute],
            may_mark: leaf.may_mark,
        };
        if !leaf.cacheable {
            self.broken.get_or_insert_with(|| format!("memory is not cacheable: {leaf:x?}"));
        }
        let in_place = self.features().break_in_place;
        let clash = self.cpus[cpu].stage2.iter().find(|old| {
            let (low, high) =
                (entry.base.max(old.base), (entry.base + entry.bytes).min(old.base + old.bytes));
            let elsewhere =
                entry.output + (low - entry.base.min(low)) != old.output + (low - old.base.min(low));
            old.vmid == vmid && low < high && (elsewhere || (!in_place && old.bytes != entry.bytes))
        });
        if let Some(old) = clash {
            let why = format!("two leaves for one place, no break between: {old:x?} and {entry:x?}");
            self.broken.get_or_insert(why);
        }
        let stage2 = &mut self.cpus[cpu].stage2;
        if !stage2.contains(&entry) {
            stage2.push(entry);
        }
        entry
    }

    fn access(&mut self, cpu: usize, at: u64, access: Access) -> Result<u64, Fault> {
        let vmid = vmid_of(self.cpus[cpu].vttbr);
        let hit = |c: &&Cached| c.vmid == vmid && at & !(c.bytes - 1) == c.base;
        // The oldest first, and combined entries before what they were made of.
        let here = &self.cpus[cpu];
        let cached = here.combined.iter().find(hit).or_else(|| here.stage2.iter().find(hit)).copied();
        let entry = match cached {
            None => self.walk(cpu, at, access)?,
            Some(entry) => {
                let [read, write, execute] = entry.allows;
                match access {
                    Access::Read if read => entry,
                    Access::Execute if execute => entry,
                    Access::Write if write => entry,
                    // Marking a leaf dirty needs the leaf.
                    Access::Write if entry.may_mark => {
                        let marked = self.walk(cpu, at, access)?;
                        self.cpus[cpu].stage2.retain(|c| *c != entry);
                        self.cpus[cpu].combined.retain(|c| *c != entry);
                        marked
                    }
                    Access::Read | Access::Write | Access::Execute => {
                        return Err(Fault::Permission(3));
                    }
                }
            }
        };
        let combined = &mut self.cpus[cpu].combined;
        if !combined.contains(&entry) {
            combined.push(entry);
        }
        let capacity = self.capacity;
        self.cpus[cpu].shrink(capacity);
        Ok(entry.output + (at - entry.base))
    }

    /// The other CPUs go on meanwhile: they use what they have cached, and they look ahead.
    fn others(&mut self) {
        for cpu in 0..self.cpus.len() {
            if cpu == self.here || vmid_of(self.cpus[cpu].vttbr) == 0 {
                continue;
            }
            for place in 0..self.hot.len() {
                let at = self.hot[place];
                // Both may fault; the adversary does not mind.
                let _ = self.access(cpu, at, Access::Read);
                if self.chance() {
                    let _ = self.walk(cpu, at, Access::Read);
                }
            }
        }
    }

    fn note(&mut self, op: Op) -> bool {
        self.trace.push(op);
        self.others();
        self.sabotaged != Some(op)
    }

    fn invalidate(&mut self, op: Op, reach: Reach, everywhere: bool) {
        if self.note(op) && !self.deaf {
            let vmid = vmid_of(self.cpus[self.here].vttbr);
            self.cpus[self.here].pending.push(Pending { reach, vmid, everywhere });
        }
    }

    /// Completes invalidates, those of combined entries first: the worst order that the architecture allows.
    fn complete(&mut self, everywhere_too: bool) {
        let mut done = Vec::new();
        self.cpus[self.here].pending.retain(|p| {
            let completes = everywhere_too || !p.everywhere;
            if completes {
                done.push(*p);
            }
            !completes
        });
        done.sort_by_key(|p| p.reach != Reach::Combined);
        for Pending { reach, vmid, everywhere } in done {
            let here = self.here;
            for (_, cpu) in self.cpus.iter_mut().enumerate().filter(|(n, _)| everywhere || *n == here) {
                cpu.drop_entries(reach, vmid);
            }
            self.others();
        }
    }

    /// The leaf that the tables have now for an address, in memory and not as anybody sees it.
    fn truth(&self, vmid: u16, at: u64) -> Result<Leaf, &'static str> {
        let vttbr = *self.names.get(&vmid).ok_or("nobody runs under that name")?;
        let root = PhysAddr::new(vttbr & 0xffff_ffff_f000).frame();
        if !root.is_some_and(|root| self.frames.is_in_use(root)) {
            return Err("the guest is gone");
        }
        let read = |address| self.frames.descriptor(address).map_or(0, |(_, entry)| entry.load(Relaxed));
        walker::find(self.regime(vttbr), at, None, read).map_err(|_| "nothing is mapped there any more")
    }

    fn audit_leaf(&self, entry: &Cached) -> Result<(), &'static str> {
        let mut at = entry.base;
        while at < entry.base + entry.bytes {
            let leaf = self.truth(entry.vmid, at)?;
            if leaf.output + (at - leaf.base) != entry.output + (at - entry.base) {
                return Err("something else is mapped there now");
            }
            let [read, write, execute] = leaf.allows;
            let allowed = [read, write || leaf.may_mark, execute];
            if entry.allows.iter().zip(allowed).any(|(&cached, now)| cached && !now) {
                return Err("it does not allow that any more");
            }
            if entry.allows[1] && !write {
                return Err("a write would not mark the leaf dirty");
            }
            if entry.may_mark && !leaf.may_mark {
                return Err("the hardware would mark a leaf that is write-protected");
            }
            at = leaf.base + leaf.bytes;
        }
        Ok(())
    }

    fn audit_way(&self, way: &Way) -> Result<(), &'static str> {
        let vttbr = *self.names.get(&way.vmid).ok_or("nobody runs under that name")?;
        let mut table = None;
        let _ = walker::find(self.regime(vttbr), way.base, None, |address| {
            if address & !0xfff == way.table {
                table = Some(address);
            }
            self.frames.descriptor(address).map_or(0, |(_, entry)| entry.load(Relaxed))
        });
        let live = PhysAddr::new(way.table).frame().is_some_and(|frame| self.frames.is_in_use(frame));
        if !live {
            return Err("the way leads to a table that was freed");
        }
        table.map(|_| ()).ok_or("the way is not there any more")
    }
}

impl TlbOps for Mmu {
    fn dsb_ishst(&self) {
        let mut state = self.0.lock();
        if state.note(Op::DsbIshst) {
            state.see_all();
        }
    }
    fn dsb_ish(&self) {
        let mut state = self.0.lock();
        if state.note(Op::DsbIsh) {
            state.see_all();
            state.complete(true);
        }
    }
    fn dsb_nsh(&self) {
        let mut state = self.0.lock();
        if state.note(Op::DsbNsh) {
            state.complete(false);
        }
    }
    fn isb(&self) {
        self.0.lock().note(Op::Isb);
    }
    fn ipas2e1is(&self, at: Ipa) {
        self.0.lock().invalidate(Op::Ipas2e1is, Reach::Pages(at.bits(), at.bits() + 1), true);
    }
    fn ripas2e1is(&self, range: RangeOperand) {
        let mut state = self.0.lock();
        if !state.features().range_invalidate {
            state.broken.get_or_insert_with(|| String::from("this CPU has no range invalidates"));
        }
        let (mut from, mut to) = (u64::MAX, 0);
        for page in range.pages() {
            (from, to) = (from.min(page.bits()), to.max(page.bits() + 1));
        }
        state.invalidate(Op::Ripas2e1is, Reach::Pages(from, to), true);
    }
    fn vmalle1is(&self) {
        self.0.lock().invalidate(Op::Vmalle1is, Reach::Combined, true);
    }
    fn vmalls12e1is(&self) {
        self.0.lock().invalidate(Op::Vmalls12e1is, Reach::Guest, true);
    }
    fn vmalls12e1(&self) {
        self.0.lock().invalidate(Op::Vmalls12e1, Reach::Guest, false);
    }
    fn alle1is(&self) {
        self.0.lock().invalidate(Op::Alle1is, Reach::Everything, true);
    }
    fn load_vttbr(&self, vttbr: u64) -> u64 {
        let mut state = self.0.lock();
        let here = state.here;
        let before = state.cpus[here].vttbr;
        if before != vttbr && state.note(Op::Load) {
            state.cpus[here].vttbr = vttbr;
        }
        before
    }
}
