//! Random edits against a plain map, on CPUs that forget nothing.
//!
//! Three guests on four CPUs do everything that a VM can ask of their tables, with faults, clones, deaths and
//! changes of VMID between, on every kind of CPU. After each step nobody may reach what is not allowed
//! (`testing::Mmu`), and everything that was written is dirty or was reported. The second half takes one
//! instruction away at a time, and expects to be told.

use stage2::geometry::{Features, Geometry};
use stage2::testing::{Access, Checked, Frames, Guest, Mmu, Op};
use stage2::vmid::{Vmid, VmidAllocator};
use vmobject::addr::{CHUNK_PAGES, Ipa, IpaRange, PAGE_SIZE, Pfn};
use vmobject::prot::Prot;

const CPUS: usize = 4;
const GUESTS: usize = 3;

fn features(hardware: u64) -> Features {
    // PARange 48 bits; HAFDBS as asked; VMID16 with it.
    let mmfr1 = hardware.min(2) | if hardware > 0 { 2 << 4 } else { 0 };
    let all = Features::from_id_registers(5, mmfr1);
    if hardware > 2 { all.with_mmfr2(1 << 40 | 2 << 52).with_isar0(2 << 56) } else { all }
}

struct Random(u64);

impl Random {
    fn below(&mut self, n: u32) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        u32::try_from(self.0 >> 33).expect("31 bits") % n
    }
    fn index(&mut self, n: usize) -> usize {
        self.below(u32::try_from(n).expect("a small number")) as usize
    }
    fn of<T: Copy>(&mut self, choice: &[T]) -> T {
        choice[self.index(choice.len())]
    }
}

/// What a step does, as far as a lost instruction cares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Edit {
    Enter,
    Remove,
    Protect,
    Age,
    Park,
    Clear,
    Switch,
}

/// An instruction that does nothing, everywhere or in one kind of edit.
type Loss = (Op, Option<Edit>);

struct World {
    frames: Frames,
    mmu: Mmu,
    geometry: Geometry,
    vmids: VmidAllocator,
    guests: Vec<(Guest, Vmid)>,
    running: [Option<usize>; CPUS],
    random: Random,
    births: bool,
    loss: Option<Loss>,
    /// The most steps that clearing a guest took.
    steps: u32,
}

impl World {
    fn new(geometry: Geometry, seed: u64) -> Self {
        let frames = Frames::new(96);
        let mmu = Mmu::new(&frames, geometry, CPUS);
        mmu.seed(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let random = Random(seed);
        let new = || (Guest::new(&frames, &mmu, geometry).expect("there are frames"), Vmid::default());
        let guests = (0..GUESTS).map(|_| new()).collect();
        // Fewer names than CPUs and guests would like: three bits, number 0 never given.
        let vmids = VmidAllocator::new(3, CPUS);
        Self {
            frames,
            mmu,
            geometry,
            vmids,
            guests,
            running: [None; CPUS],
            random,
            births: true,
            loss: None,
            steps: 0,
        }
    }

    /// A page of one of four chunks, two gigabytes apart, at places where an edge is near.
    fn page(&mut self) -> Ipa {
        let chunk = self.random.of(&[0x4000_0000, 0x4020_0000, 0x7fe0_0000, 0x8000_0000]);
        let page = self.random.of(&[0, 1, 2, 3, 17, 255, 256, 510, 511]);
        Ipa::new(chunk + page * PAGE_SIZE)
    }

    fn range(&mut self) -> IpaRange {
        let (a, b) = (self.page(), self.page());
        let end = match self.random.below(4) {
            0 => a.checked_add(PAGE_SIZE),
            1 => a.chunk().checked_add(PAGE_SIZE * u64::from(CHUNK_PAGES)),
            2 => a.checked_add(PAGE_SIZE * 20),
            _ => b.max(a).checked_add(PAGE_SIZE),
        };
        let start = if self.random.below(3) == 0 { a.chunk() } else { a };
        IpaRange::new(start, end.expect("far from the end")).expect("in order")
    }

    fn prot(&mut self) -> Prot {
        self.random.of(&[Prot::READ, Prot::READ_EXECUTE, Prot::READ | Prot::WRITE, Prot::ALL, Prot::ALL])
    }

    fn frame(&mut self) -> Pfn {
        Pfn::new(0x10_0000 + self.random.below(1 << 20))
    }

    fn switch(&mut self, cpu: usize, number: usize) {
        let (guest, vmid) = &mut self.guests[number];
        *vmid = self.vmids.acquire(cpu, *vmid, &self.mmu);
        guest.run(cpu, vmid.number());
        self.running[cpu] = Some(number);
    }

    fn step(&mut self) -> Checked<()> {
        let cpu = self.random.index(CPUS);
        self.mmu.on(cpu);
        let number = self.random.index(GUESTS);
        let (page, range, prot, frame) = (self.page(), self.range(), self.prot(), self.frame());
        let scattered: Vec<Ipa> = (0..self.random.below(24)).map(|_| self.page().page()).collect();
        let hot = [page, range.start(), self.page(), self.page()];
        self.mmu.touch(&hot);
        let what = self.random.below(100);
        let edit = match what {
            31..39 => Edit::Remove,
            39..46 => Edit::Protect,
            46..50 => Edit::Age,
            50..53 => Edit::Park,
            53 => Edit::Clear,
            54..62 => Edit::Switch,
            _ => Edit::Enter, // a guest's access too, when it faults
        };
        let here = |&(_, during): &Loss| during.is_none_or(|during| during == edit);
        self.mmu.sabotage(self.loss.filter(here).map(|(op, _)| op));
        let guest = &mut self.guests[number].0;
        match what {
            0..15 => {
                let _ = guest.enter(page, frame, prot)?;
            }
            15..20 => {
                // More or less for a page that is there.
                if let Some((frame, _)) = guest.allowed(page) {
                    let _ = guest.enter(page, frame, prot)?;
                }
            }
            20..25 => {
                let around: Vec<_> = (0..16).map(|n| frame.checked_add(n).filter(|_| n % 3 != 0)).collect();
                guest.enter_around(page, &around, prot.without(Prot::WRITE))?;
            }
            25..31 => {
                let first = Pfn::new(frame.number() & !(CHUNK_PAGES - 1));
                let _ = guest.enter_block(page.chunk(), first, prot)?;
            }
            31..36 => guest.remove(range)?,
            36..39 => guest.remove_pages(&scattered)?,
            39..46 => {
                guest.protect(range, [Prot::READ_EXECUTE, Prot::READ, Prot::NONE][what as usize % 3])?
            }
            46..50 => guest.age(range)?,
            50..53 => guest.park()?,
            53 if self.births => {
                // It dies, and another is born; the CPUs that ran it run nobody.
                let guest = &mut self.guests[number].0;
                let mut steps = 1;
                while !guest.clear(700)? {
                    steps += 1;
                }
                self.steps = self.steps.max(steps);
                for cpu in 0..CPUS {
                    if self.running[cpu] == Some(number) {
                        self.mmu.run(cpu, 0);
                        self.running[cpu] = None;
                    }
                }
                let old = self.guests[number].1;
                let new = Guest::new(&self.frames, &self.mmu, self.geometry);
                self.guests[number] = (new.expect("there are frames"), Vmid::default());
                if old != Vmid::default() && self.mmu.cached(old.number()) != 0 {
                    return Err(format!("somebody still knows the dead guest {old:?}"));
                }
            }
            54..62 => self.switch(cpu, number),
            _ => {
                let Some(number) = self.running[cpu] else {
                    self.switch(cpu, number);
                    return self.mmu.audit();
                };
                let access = self.random.of(&[Access::Read, Access::Write, Access::Execute]);
                self.guests[number].0.access(cpu, page, access)?;
            }
        }
        self.mmu.audit()
    }

    fn run(&mut self, steps: usize) -> Checked<()> {
        for step in 0..steps {
            self.step().map_err(|why| format!("step {step}: {why}"))?;
        }
        for (guest, _) in &mut self.guests {
            guest.check()?;
        }
        Ok(())
    }
}

fn geometries() -> Vec<Geometry> {
    let shape =
        |hardware, bits| Geometry::with_ipa_bits(features(hardware), bits).expect("it has that shape");
    vec![
        Geometry::new(features(0)),
        Geometry::new(features(1)),
        Geometry::new(features(2)),
        Geometry::new(features(3)),
        shape(0, 33),
        shape(2, 42),
        shape(3, 48),
    ]
}

#[test]
fn nobody_reaches_what_was_taken_away_and_no_write_is_forgotten() {
    for geometry in geometries() {
        for seed in 1..=4 {
            let mut world = World::new(geometry, seed);
            world.run(1500).unwrap_or_else(|why| panic!("{geometry:?}, seed {seed}, {why}"));
            assert!(world.vmids.rollovers() > 0 || seed < 4, "no rollover was tried");
            assert!(world.steps > 1, "no guest was too large for one step");
        }
    }
}

#[test]
fn running_out_of_table_frames_forgets_mappings_and_nothing_else() {
    for geometry in geometries() {
        let mut world = World::new(geometry, 77);
        world.births = false;
        for (guest, _) in &mut world.guests {
            guest.may_forget();
        }
        let roots = GUESTS * geometry.root_tables() as usize;
        for round in 0..12 {
            world.frames.limit(roots + 3 + round % 4);
            for _ in 0..100 {
                world.step().unwrap_or_else(|why| panic!("{geometry:?}, round {round}: {why}"));
            }
        }
    }
}

#[test]
fn when_all_guests_are_gone_so_are_their_tables() {
    for geometry in geometries() {
        let mut world = World::new(geometry, 5);
        world.run(400).expect("the model holds");
        world.guests.clear();
        assert_eq!(world.frames.in_use(), 0);
    }
}

/// Steps after which a loss is found, over as many worlds as it takes.
fn finds(loss: Loss, geometry: Geometry) -> Option<usize> {
    let mut steps = 0;
    for seed in 1..=20 {
        let mut world = World::new(geometry, seed);
        world.loss = Some(loss);
        for _ in 0..1500 {
            steps += 1;
            if world.step().is_err() {
                return Some(steps);
            }
        }
    }
    None
}

#[test]
fn the_fake_finds_the_loss_of_any_one_instruction_that_matters() {
    let [plain, ranges] = [2, 3].map(|hardware| Geometry::new(features(hardware)));
    for (loss, geometry) in [
        ((Op::DsbIshst, None), plain),
        ((Op::DsbIsh, None), plain),
        ((Op::DsbNsh, None), plain),
        ((Op::Ipas2e1is, None), plain),
        ((Op::Vmalle1is, None), plain),
        ((Op::Vmalls12e1is, None), plain),
        ((Op::Vmalls12e1, None), plain),
        ((Op::Alle1is, None), plain),
        ((Op::Load, None), plain),
        ((Op::Ripas2e1is, None), ranges),
        // A clone that does not tell the caches.
        ((Op::Vmalls12e1is, Some(Edit::Park)), plain),
        ((Op::Load, Some(Edit::Park)), plain),
        // A removal that does not, or stops half-way, or tells them of another guest.
        ((Op::Ipas2e1is, Some(Edit::Remove)), plain),
        ((Op::Vmalle1is, Some(Edit::Remove)), plain),
        ((Op::DsbIsh, Some(Edit::Remove)), plain),
        ((Op::Load, Some(Edit::Remove)), plain),
        ((Op::Ripas2e1is, Some(Edit::Remove)), ranges),
        // A leaf that is pointed elsewhere, protected, aged without its caches being told.
        ((Op::Ipas2e1is, Some(Edit::Enter)), plain),
        ((Op::Vmalle1is, Some(Edit::Enter)), plain),
        ((Op::Ipas2e1is, Some(Edit::Protect)), plain),
        ((Op::Vmalle1is, Some(Edit::Protect)), plain),
        ((Op::Vmalle1is, Some(Edit::Age)), plain),
        // A guest's end, a change of names.
        ((Op::Vmalls12e1is, Some(Edit::Clear)), plain),
        ((Op::Alle1is, Some(Edit::Switch)), plain),
    ] {
        match finds(loss, geometry) {
            Some(steps) => println!("{loss:?}: found after {steps} steps"),
            None => panic!("without {loss:?} everything seems well"),
        }
    }
}
