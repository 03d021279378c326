//! Gives everything that a guest can write and find again a value of its own, and looks at it all for a while: when several of
//! these run on one CPU with different seeds, each must see its own only; and whoever is cloned, reset or stored meanwhile
//! must find what its parent had.
//!
//! Each vCPU has its own values ([`registers`], [`vectors`], [`general`], its part of [`interrupts`]), the first one those of
//! the [`devices`] and of the shared interrupts, too. Most of the time all vCPUs are in [`general`], with no general register
//! free for anything else. In the end what was pending comes, what was active ends, and what was armed fires.
//!
//! Options: `ms=500`, `seed=1`, whose lowest bit also chooses between two values where there are only two; with `typed` it
//! begins once the console's FIFO is full (it says when it may be typed to, and when all vCPUs hold what they have); with
//! `fork` it forks a child in the middle, while its other vCPUs are about to start.

mod devices;
mod general;
mod interrupts;
mod registers;
mod vectors;

use core::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use hv_abi::call::{status, vendor};
use hv_abi::machine::{MAX_VCPUS, RAM_BASE, VMGENID};

use crate::memory::{peek, poke};
use crate::power::hvc;
use crate::runtime::{Machine, Random, start_vcpu};
use crate::timer::{frequency, milliseconds, now, wait_until};
use crate::{gic, mmu, power};
use devices::Devices;
use general::General;
use interrupts::Interrupts;
use vectors::Vectors;

/// Above the image: what each vCPU has found, its general registers, and what it watches.
const AREA: u64 = RAM_BASE + 0x30_0000;
const AREA_STRIDE: u64 = 0x1_0000;
/// The round in which a guest forks that is to.
const FORKED: u64 = 10;
/// Milliseconds that another vCPU may take.
const LIMIT: u64 = 60_000;

static SEED: AtomicU64 = AtomicU64::new(0);
static DONE: AtomicBool = AtomicBool::new(false);
/// How often each vCPU has begun, and in whom: what place its guest had then.
static BEGUN: [AtomicU64; MAX_VCPUS] = [const { AtomicU64::new(0) }; MAX_VCPUS];
static PLACE: [AtomicU64; MAX_VCPUS] = [const { AtomicU64::new(0) }; MAX_VCPUS];
/// Other vCPUs that have put everything in place.
static HOLDING: AtomicUsize = AtomicUsize::new(0);

/// What was found the first time, in the order in which it is looked at. Later nothing else may be found.
struct Ledger {
    at: u64,
    next: u64,
    round: u64,
}

impl Ledger {
    /// Takes down a value, or compares it.
    fn see(&mut self, name: &str, number: u64, value: u64) {
        let (place, round) = (self.at + self.next * 8, self.round);
        self.next += 1;
        if round == 0 {
            poke(place, value);
        } else {
            let had = peek(place);
            assert!(value == had, "{name} ({number}) in round {round} is {value:#x}, was {had:#x}");
        }
    }

    /// No two that have more than sixteen bits are equal, from the first to what is next.
    fn are_distinct(&self) {
        for one in 0..self.next {
            let value = peek(self.at + one * 8);
            let other = (0..one).find(|other| value > 0xffff && peek(self.at + other * 8) == value);
            assert!(other.is_none(), "values {one} and {other:?} are both {value:#x}");
        }
    }
}

/// What one vCPU has beside its vectors and stack.
struct Life {
    ledger: Ledger,
    cpacr: u64,
    vectors: Vectors,
    general: General,
    interrupts: Interrupts,
    area: u64,
    odd: bool,
}

impl Life {
    /// Puts everything of a vCPU in place.
    fn begin(index: usize) -> Self {
        let seed = SEED.load(Ordering::Relaxed);
        let (area, odd) = (AREA + AREA_STRIDE * index as u64, seed % 2 == 1);
        let mut random = Random::new(seed << 8 | index as u64);
        let cpacr = 1 << 20 | random.draw() & 2 << 20;
        write_register!("cpacr_el1", cpacr);
        let vectors = Vectors::fill(&mut random);
        let interrupts = Interrupts::begin(index == 0, odd, &mut random);
        registers::fill(&mut random, odd, area + 0x8000);
        let general = General::new(area + 0x4000, &mut random);
        let ledger = Ledger { at: area, next: 0, round: 0 };
        let mut life = Self { ledger, cpacr, vectors, general, interrupts, area, odd };
        registers::see(&mut life.ledger);
        life.ledger.are_distinct();
        life.look(None);
        life
    }

    /// Looks at everything.
    fn look(&mut self, devices: Option<&Devices>) {
        self.ledger.next = 0;
        self.vectors.check(&self.ledger);
        registers::see(&mut self.ledger);
        self.interrupts.see(&mut self.ledger);
        if let Some(devices) = devices {
            devices.see(&mut self.ledger);
        }
        if self.ledger.round % 16 == 5 {
            // The floating-point unit is given up and taken again.
            write_register!("cpacr_el1", 0);
            write_register!("cpacr_el1", self.cpacr);
        }
    }

    /// A while with all general registers in use; then looks.
    fn hold(&mut self, devices: Option<&Devices>) {
        self.ledger.round += 1;
        self.general.hold(self.ledger.round);
        self.look(devices);
    }

    /// What only shows when it happens.
    fn end(self) {
        registers::end(self.odd, self.area + 0x8000);
        self.interrupts.end();
    }
}

/// The generation id, and how often it has changed.
struct Generation {
    id: [u64; 2],
    changes: u64,
}

impl Generation {
    fn read() -> [u64; 2] {
        [peek(VMGENID.base), peek(VMGENID.base + 8)]
    }

    /// Its interrupt is pending exactly when it is another since the last look, and then taken away.
    fn look(&mut self) {
        let (id, told) = loop {
            let (id, told) = (Self::read(), gic::is_pending(interrupts::GENERATION));
            // Unless it became another between the two.
            if id == Self::read() {
                break (id, told);
            }
        };
        let changed = id != self.id;
        assert!(
            changed == told,
            "the generation id has changed: {changed}, its interrupt is pending: {told}"
        );
        if changed {
            gic::unpend(interrupts::GENERATION);
            self.id = id;
            self.changes += 1;
        }
    }
}

/// Looks until time is up.
pub fn run(machine: &Machine) {
    mmu::enable();
    gic::init_distributor();
    SEED.store(machine.option("seed", 1), Ordering::Relaxed);
    let ours = machine.is_ours();
    let devices =
        Devices::begin(ours, machine.flag("typed"), &mut Random::new(machine.option("seed", 1) << 8 | 0xff));
    let mut life = Life::begin(0);
    // With the devices this time.
    life.look(Some(&devices));
    let fork = machine.flag("fork");
    if !fork {
        start(machine.vcpus);
    }
    let mut generation = ours.then(|| Generation { id: Generation::read(), changes: 0 });
    let (mut place, mut gap, mut last) = (0, 0, now());
    let mut end = u64::MAX;
    while last < end {
        life.hold(Some(&devices));
        if end == u64::MAX && HOLDING.load(Ordering::Acquire) + 1 == machine.vcpus {
            // What is printed changes no register of the console: the first line had raised what it raises.
            println!("fpstate: holds");
            end = now() + milliseconds(machine.option("ms", 500));
        }
        if let Some(generation) = &mut generation {
            generation.look();
        }
        if life.ledger.round == FORKED && fork {
            await_turn();
            start(machine.vcpus);
            place = life.general.fork();
        }
        let time = now();
        assert!(time >= last, "the counter goes back, from {last:#x} to {time:#x}");
        gap = gap.max(time - last);
        last = time;
    }
    DONE.store(true, Ordering::Release);
    for (index, begun) in BEGUN.iter().enumerate().take(machine.vcpus).skip(1) {
        assert!(wait_until(LIMIT, || power::is_off(index)), "vcpu {index} does not come to its end");
        assert_eq!(begun.load(Ordering::Acquire), 1, "times that vcpu {index} has begun");
    }
    // Those that a child found switched on, and that had not run: none in a parent, which cannot tell.
    let begun = |index: &usize| place != 0 && PLACE[*index].load(Ordering::Acquire) == place;
    let pending = (1..machine.vcpus).filter(begun).count();
    let round = life.ledger.round;
    life.end();
    let random = devices.end();
    let (id, changes) = generation.map_or(([0; 2], 0), |generation| (generation.id, generation.changes));
    println!(
        "fpstate: {round} rounds, place {place} pending {pending} changes {changes} gap {} ms id {:#x} random {random:#x}.",
        gap * 1000 / frequency(),
        id[0]
    );
}

/// Waits until somebody else has had a turn, for this vCPU's own has then just begun. Not for long, if nobody is there.
fn await_turn() {
    let mut last = now();
    wait_until(1000, || {
        let time = now();
        time - core::mem::replace(&mut last, time) > milliseconds(2)
    });
}

/// Starts the other vCPUs.
fn start(vcpus: usize) {
    for index in 1..vcpus {
        assert_eq!(start_vcpu(index, secondary, true), status::SUCCESS, "starting vcpu {index}");
    }
}

fn secondary(index: usize) {
    let [answer, _, place, _] = hvc(vendor::IDENTITY.into(), [0; 3]);
    PLACE[index].store(if answer == 0 { place } else { 0 }, Ordering::Release);
    BEGUN[index].fetch_add(1, Ordering::AcqRel);
    let mut life = Life::begin(index);
    HOLDING.fetch_add(1, Ordering::AcqRel);
    while !DONE.load(Ordering::Acquire) {
        life.hold(None);
    }
    life.end();
}
