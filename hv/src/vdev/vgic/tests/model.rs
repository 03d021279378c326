//! Random guests against the architecture's own state machine.
//!
//! The reference keeps each interrupt as the architecture describes it, without list registers: pending is
//! the latch or the line, acknowledging makes active, ending makes inactive. The real one runs on CPUs that
//! only see list registers. After every operation whose kicks were followed, both must offer every vCPU
//! the same interrupt and read the same in every register.

use alloc::vec::Vec;

use super::super::{INTIDS, SgiRegister, TIMER_PPI, Vgic, affinity, index_of};
use super::cpu::Cpu;
use super::{Dice, audit};
use crate::vdev::Kicks;

const COUNT: usize = INTIDS as usize;

/// One interrupt, as the architecture has it.
#[derive(Clone, Copy, Debug, Default)]
struct Interrupt {
    group: bool,
    enabled: bool,
    edge: bool,
    line: bool,
    latch: bool,
    /// Active on this vCPU.
    active: Option<usize>,
    priority: u8,
    route: u64,
}

impl Interrupt {
    fn pending(&self) -> bool {
        self.latch || self.line && !self.edge
    }
}

/// The architecture: private interrupts of each vCPU, then the shared ones.
#[derive(Clone, Debug)]
struct Reference {
    groups: u32,
    private: Vec<[Interrupt; 32]>,
    shared: Vec<Interrupt>,
    running: Vec<Vec<(u8, u32)>>,
}

impl Reference {
    fn new(vcpus: usize) -> Self {
        let mut private = [Interrupt::default(); 32];
        for sgi in &mut private[..16] {
            sgi.edge = true;
        }
        Self {
            groups: 0,
            private: alloc::vec![private; vcpus],
            shared: alloc::vec![Interrupt::default(); COUNT - 32],
            running: alloc::vec![Vec::new(); vcpus],
        }
    }

    fn at(&mut self, vcpu: usize, intid: u32) -> &mut Interrupt {
        let index = intid as usize;
        if index < 32 { &mut self.private[vcpu][index] } else { &mut self.shared[index - 32] }
    }

    fn get(&self, vcpu: usize, intid: u32) -> &Interrupt {
        let index = intid as usize;
        if index < 32 { &self.private[vcpu][index] } else { &self.shared[index - 32] }
    }

    fn highest(&self, vcpu: usize) -> Option<u32> {
        let offered = (0..INTIDS).filter(|&intid| {
            let interrupt = self.get(vcpu, intid);
            let group = if interrupt.group { 2 } else { 1 };
            let here = intid < 32 || index_of(interrupt.route) == Some(vcpu);
            here && interrupt.pending()
                && interrupt.enabled
                && interrupt.active.is_none()
                && self.groups & group != 0
        });
        let best = offered.map(|intid| (self.get(vcpu, intid).priority, intid)).min()?;
        let limit = self.running[vcpu].last().map_or(0x100, |&(priority, _)| u32::from(priority));
        (u32::from(best.0) < limit).then_some(best.1)
    }

    fn acknowledge(&mut self, vcpu: usize, intid: u32) {
        let interrupt = self.at(vcpu, intid);
        interrupt.latch = false;
        interrupt.active = Some(vcpu);
        let priority = interrupt.priority;
        self.running[vcpu].push((priority, intid));
    }

    fn line(&mut self, vcpu: usize, intid: u32, high: bool) {
        let interrupt = self.at(vcpu, intid);
        interrupt.latch |= high && !interrupt.line && interrupt.edge;
        interrupt.line = high;
    }

    /// A write of a register of one bit per interrupt; `register` as in the frames, from 0x80.
    fn write(&mut self, vcpu: usize, register: u64, first: u32, bits: u32) {
        for intid in first..first + 32 {
            let set = bits & 1 << (intid - first) != 0;
            let vcpus = self.private.len();
            let interrupt = self.at(vcpu, intid);
            let target =
                if intid < 32 { Some(vcpu) } else { index_of(interrupt.route).filter(|&to| to < vcpus) };
            match register {
                0x80 => interrupt.group = set,
                0x100 => interrupt.enabled |= set,
                0x180 => interrupt.enabled &= !set,
                0x200 => interrupt.latch |= set,
                0x280 => interrupt.latch &= !set,
                0x300 if set && interrupt.active.is_none() => {
                    interrupt.active = Some(target.unwrap_or(usize::MAX))
                }
                0x380 if set => interrupt.active = None,
                _ => {}
            }
        }
    }

    fn word(&self, vcpu: usize, first: u32, of: impl Fn(&Interrupt) -> bool) -> u64 {
        (0..32).filter(|bit| of(self.get(vcpu, first + bit))).fold(0, |word, bit| word | 1 << bit)
    }
}

/// The real one, on CPUs.
struct Machine {
    vgic: Vgic,
    cpus: Vec<Cpu>,
}

impl Machine {
    fn new(vcpus: usize, lrs: usize) -> Self {
        Self { vgic: Vgic::new(vcpus, lrs), cpus: alloc::vec![Cpu::new(lrs); vcpus] }
    }

    /// Does what kicks and maintenance interrupts ask for, until nobody asks.
    fn settle(&mut self, kicks: Kicks) {
        let mut kicks = kicks.0;
        for round in 0.. {
            for (vcpu, cpu) in self.cpus.iter().enumerate() {
                if cpu.maintenance() || cpu.timer && !cpu.timer_active {
                    kicks |= 1 << vcpu;
                }
            }
            if kicks == 0 {
                return;
            }
            assert!(round < 100, "kicks without end");
            let mut next = Kicks::NONE;
            for vcpu in 0..self.cpus.len() {
                if kicks & 1 << vcpu != 0 {
                    next |= self.cpus[vcpu].turn(&mut self.vgic, vcpu);
                }
            }
            kicks = next.0;
        }
    }

    /// Takes in what every CPU did, as a register read does that finds its answer stale.
    fn sync(&mut self) {
        let mut kicks = Kicks::NONE;
        for (vcpu, cpu) in self.cpus.iter().enumerate() {
            kicks |= self.vgic.sync(vcpu, |lr| cpu.lrs[lr]) | Kicks::one(vcpu);
        }
        self.settle(kicks);
    }
}

fn write(machine: &mut Machine, vcpu: usize, register: u64, first: u32, bits: u32) -> Kicks {
    if first < 32 {
        machine.vgic.redist_write(vcpu, 0x1_0000 + register, 4, u64::from(bits))
    } else {
        machine.vgic.dist_write(register + u64::from(first) / 8, 4, u64::from(bits))
    }
}

fn read(machine: &mut Machine, vcpu: usize, register: u64, first: u32) -> u64 {
    if first < 32 {
        machine.vgic.redist_read(vcpu, 0x1_0000 + register, 4)
    } else {
        machine.vgic.dist_read(register + u64::from(first) / 8, 4)
    }
}

fn set_priority(machine: &mut Machine, vcpu: usize, intid: u32, priority: u8) -> Kicks {
    if intid < 32 {
        machine.vgic.redist_write(vcpu, 0x1_0400 + u64::from(intid), 1, u64::from(priority))
    } else {
        machine.vgic.dist_write(0x400 + u64::from(intid), 1, u64::from(priority))
    }
}

/// One thing that a guest or a device does, to both.
fn step(machine: &mut Machine, reference: &mut Reference, dice: &mut Dice, busy: usize) -> Kicks {
    let vcpus = machine.cpus.len();
    let vcpu = dice.below(vcpus);
    let intid =
        u32::try_from(dice.below(COUNT)).unwrap() % (32 + 32 * u32::try_from(1 + dice.below(3)).unwrap());
    match dice.below(21) {
        20 => machine.cpus[vcpu].leave(&mut machine.vgic, vcpu) | Kicks::one(vcpu),
        0..4 => {
            let (intid, high) = (intid.max(16), dice.chance(50));
            if intid == TIMER_PPI {
                reference.line(vcpu, intid, high);
                machine.cpus[vcpu].timer = high;
                Kicks::one(vcpu)
            } else {
                reference.line(vcpu, intid, high);
                if intid < 32 {
                    machine.vgic.set_ppi(vcpu, intid, high)
                } else {
                    machine.vgic.set_spi(intid, high)
                }
            }
        }
        4..8 => {
            let (sgi, mask) = (dice.roll() & 0xf, dice.roll() & 0xffff);
            for target in (0..vcpus).filter(|target| mask & 1 << target != 0) {
                reference.private[target][usize::try_from(sgi).unwrap()].latch = true;
            }
            machine.vgic.sgi(vcpu, SgiRegister::Sgi1R, sgi << 24 | mask)
        }
        8..10 => {
            let first = intid & !31;
            let register = [0x80, 0x100, 0x180, 0x200, 0x280, 0x300, 0x380][dice.below(busy)];
            let bits = match register {
                0x80 => u32::MAX << dice.below(32),
                // Mostly enabled, and not always all.
                0x100 => u32::MAX,
                _ => 1 << (intid % 32) | 1 << dice.below(32),
            };
            reference.write(vcpu, register, first, bits);
            write(machine, vcpu, register, first, bits)
        }
        10 => {
            // An active interrupt keeps the priority it was taken with.
            if reference.get(vcpu, intid).active.is_some() {
                return Kicks::NONE;
            }
            let priority = u8::try_from(dice.below(32)).unwrap() << 3;
            reference.at(vcpu, intid).priority = priority;
            set_priority(machine, vcpu, intid, priority)
        }
        11 => {
            if dice.chance(90) {
                return Kicks::NONE;
            }
            let groups = u32::try_from(dice.below(4)).unwrap();
            reference.groups = groups;
            machine.vgic.dist_write(0, 4, u64::from(groups))
        }
        12 => {
            let route = affinity(dice.below(vcpus + 1));
            let intid = 32 + intid % 96;
            reference.at(vcpu, intid).route = route;
            machine.vgic.dist_write(0x6000 + 8 * u64::from(intid), 8, route)
        }
        13 => {
            // The configuration of one idle interrupt: of others it is UNPREDICTABLE.
            let (intid, edge) = (32 + intid % 96, dice.chance(50));
            let interrupt = reference.at(vcpu, intid);
            if interrupt.line || interrupt.pending() || interrupt.active.is_some() {
                return Kicks::NONE;
            }
            interrupt.edge = edge;
            let at = 0xc00 + u64::from(intid / 16) * 4;
            let mut value = machine.vgic.dist_read(at, 4) & !(3 << (2 * (intid % 16)));
            if edge {
                value |= 2 << (2 * (intid % 16));
            }
            machine.vgic.dist_write(at, 4, value)
        }
        14..17 => {
            let taken = machine.cpus[vcpu].acknowledge();
            assert_eq!(taken, reference.highest(vcpu), "what vCPU {vcpu} acknowledges");
            if let Some(intid) = taken {
                reference.acknowledge(vcpu, intid);
            }
            Kicks::NONE
        }
        _ => end(machine, reference, vcpu),
    }
}

/// The guest ends the interrupt that it took last. One that is not active any more, because the guest
/// cleared it, only drops its priority.
fn end(machine: &mut Machine, reference: &mut Reference, vcpu: usize) -> Kicks {
    let Some((_, intid)) = reference.running[vcpu].pop() else { return Kicks::NONE };
    let interrupt = reference.at(vcpu, intid);
    let active = interrupt.active == Some(vcpu);
    if active {
        interrupt.active = None;
        assert_eq!(machine.cpus[vcpu].end(), Some(intid));
    } else {
        machine.cpus[vcpu].running.pop();
    }
    Kicks::NONE
}

fn compare(machine: &mut Machine, reference: &Reference, seed: u64, at: usize) {
    for vcpu in 0..machine.cpus.len() {
        let (found, meant) = (machine.cpus[vcpu].highest(3), reference.highest(vcpu));
        assert_eq!(found, meant, "seed {seed} step {at}: what vCPU {vcpu} is offered");
        for first in (0..INTIDS).step_by(32) {
            let pending = reference.word(vcpu, first, Interrupt::pending);
            let active = reference.word(vcpu, first, |interrupt| interrupt.active.is_some());
            // While the linked timer is active its line is not known.
            let known = if first == 0 { !(active & 1 << TIMER_PPI) } else { u64::MAX };
            let found = (read(machine, vcpu, 0x200, first) & known, read(machine, vcpu, 0x300, first));
            assert_eq!(
                found,
                (pending & known, active),
                "seed {seed} step {at}: pending, active from {first}"
            );
            let enabled = reference.word(vcpu, first, |interrupt| interrupt.enabled);
            assert_eq!(read(machine, vcpu, 0x100, first), enabled);
            assert_eq!(read(machine, vcpu, 0x80, first), reference.word(vcpu, first, |i| i.group));
        }
    }
    audit(&machine.vgic);
}

fn prepare(machine: &mut Machine, reference: &mut Reference, dice: &mut Dice) {
    for vcpu in 0..machine.cpus.len() {
        for first in (0..INTIDS).step_by(32).filter(|&first| vcpu == 0 || first == 0) {
            for register in [0x80, 0x100] {
                reference.write(vcpu, register, first, u32::MAX);
                let _ = write(machine, vcpu, register, first, u32::MAX);
            }
        }
        for intid in 0..INTIDS {
            let priority = u8::try_from(1 + dice.below(30)).unwrap() << 3;
            reference.at(vcpu, intid).priority = priority;
            let _ = set_priority(machine, vcpu, intid, priority);
        }
    }
    reference.groups = 3;
    let kicks = machine.vgic.dist_write(0, 4, 3);
    machine.settle(kicks);
}

fn run(seed: u64, vcpus: usize, lrs: usize, busy: usize) {
    let mut dice = Dice(seed);
    let (mut machine, mut reference) = (Machine::new(vcpus, lrs), Reference::new(vcpus));
    // Interrupts that the guest makes active itself end in an order that no hypervisor can guess.
    machine.cpus.iter_mut().for_each(|cpu| cpu.exact = busy > 5);
    prepare(&mut machine, &mut reference, &mut dice);
    for at in 0..3000 {
        let kicks = step(&mut machine, &mut reference, &mut dice, busy);
        machine.settle(kicks);
        if dice.chance(5) {
            machine.sync();
        }
        for vcpu in 0..vcpus {
            assert_eq!(
                machine.cpus[vcpu].highest(3),
                reference.highest(vcpu),
                "seed {seed} step {at}: what vCPU {vcpu} is offered"
            );
        }
        if at % 16 == 0 {
            machine.sync();
            compare(&mut machine, &reference, seed, at);
        }
    }
}

/// Guests that race: kicks are followed late, vCPUs run on meanwhile. What they are offered then is a
/// matter of time, but in the end every SGI and every high line has been taken.
fn race(seed: u64, vcpus: usize, lrs: usize) {
    let mut dice = Dice(seed);
    let (mut machine, mut reference) = (Machine::new(vcpus, lrs), Reference::new(vcpus));
    machine.cpus.iter_mut().for_each(|cpu| cpu.exact = true);
    prepare(&mut machine, &mut reference, &mut dice);
    let mut late = 0;
    let mut owed = alloc::vec![[false; COUNT]; vcpus];
    for _ in 0..4000 {
        let vcpu = dice.below(vcpus);
        let intid = u32::try_from(dice.below(COUNT)).unwrap();
        let bit = 1 << (intid % 32);
        let first = intid & !31;
        late |= match dice.below(16) {
            0..3 => {
                owed[vcpu][intid as usize % 16] = true;
                machine.vgic.sgi(
                    dice.below(vcpus),
                    SgiRegister::Sgi1R,
                    u64::from(intid % 16) << 24 | 1 << vcpu,
                )
            }
            3 => machine.vgic.set_spi(intid, dice.chance(50)),
            4 if intid != TIMER_PPI => machine.vgic.set_ppi(vcpu, intid, dice.chance(50)),
            4 => {
                machine.cpus[vcpu].timer = dice.chance(50);
                Kicks::NONE
            }
            5 => write(&mut machine, vcpu, if dice.chance(50) { 0x100 } else { 0x180 }, first, bit),
            6 => write(&mut machine, vcpu, [0x300, 0x380, 0x200][dice.below(3)], first, bit & !0xffff),
            7 => {
                machine.vgic.dist_write(0x6000 + 8 * u64::from(intid.max(32)), 8, affinity(dice.below(vcpus)))
            }
            8..12 => {
                if let Some(taken) = machine.cpus[vcpu].acknowledge() {
                    owed[vcpu][taken as usize] = false;
                }
                Kicks::NONE
            }
            12 if dice.chance(10) => machine.cpus[vcpu].leave(&mut machine.vgic, vcpu) | Kicks::one(vcpu),
            12 => machine.cpus[vcpu].turn(&mut machine.vgic, vcpu),
            _ => {
                machine.cpus[vcpu].end();
                Kicks::NONE
            }
        }
        .0;
        if dice.chance(30) {
            let now = late & dice.roll();
            late &= !now;
            for vcpu in (0..vcpus).filter(|vcpu| now & 1 << vcpu != 0) {
                late |= machine.cpus[vcpu].turn(&mut machine.vgic, vcpu).0;
            }
        }
        audit(&machine.vgic);
    }
    drain(&mut machine, &mut owed, late);
    for (vcpu, owed) in owed.iter().enumerate() {
        let lost: Vec<usize> = (0..COUNT).filter(|&intid| owed[intid]).collect();
        assert!(lost.is_empty(), "seed {seed}: vCPU {vcpu} never got {lost:?}");
    }
    for vcpu in 0..vcpus {
        for first in (0..INTIDS).step_by(32) {
            assert_eq!(read(&mut machine, vcpu, 0x200, first), 0, "seed {seed}: pending for ever");
            assert_eq!(read(&mut machine, vcpu, 0x300, first), 0, "seed {seed}: active for ever");
        }
    }
}

/// Lets every vCPU take everything, with every source silent and everything enabled.
fn drain(machine: &mut Machine, owed: &mut [[bool; COUNT]], late: u64) {
    let vcpus = machine.cpus.len();
    let mut kicks = Kicks(late);
    for vcpu in 0..vcpus {
        machine.cpus[vcpu].timer = false;
        machine.cpus[vcpu].running.clear();
        for intid in 0..INTIDS {
            kicks |= machine.vgic.set_ppi(vcpu, intid, false) | machine.vgic.set_spi(intid, false);
        }
        for first in (0..INTIDS).step_by(32) {
            kicks |=
                write(machine, vcpu, 0x100, first, u32::MAX) | write(machine, vcpu, 0x380, first, u32::MAX);
        }
        kicks |= Kicks::one(vcpu);
    }
    machine.settle(kicks);
    for round in 0.. {
        assert!(round < 10_000, "interrupts without end");
        let mut idle = true;
        for (cpu, owed) in machine.cpus.iter_mut().zip(&mut *owed) {
            if let Some(taken) = cpu.acknowledge() {
                owed[taken as usize] = false;
                cpu.end();
                idle = false;
            }
        }
        machine.settle(Kicks::NONE);
        if idle {
            break;
        }
    }
    machine.sync();
}

#[test]
fn no_interrupt_is_lost_when_kicks_come_late() {
    for seed in 1..=40 {
        race(
            seed,
            1 + usize::try_from(seed % 4).unwrap(),
            [1, 2, 4, 16][usize::try_from(seed / 4 % 4).unwrap()],
        );
    }
}

#[test]
fn random_guests_are_offered_what_the_architecture_offers() {
    for seed in 1..=30 {
        run(seed, 1 + usize::try_from(seed % 4).unwrap(), 4, 7);
    }
}

#[test]
fn one_two_and_sixteen_list_registers_offer_the_same_as_four() {
    for seed in 100..=110 {
        run(seed, 2, 1, 5);
        run(seed, 2, 2, 5);
        run(seed, 2, 16, 7);
    }
}
