//! Every vCPU keeps EL2 busy with one kind of work for as long as it is let: who takes turns with it must
//! get as much of the CPU as beside a guest that only computes.
//!
//! Options: `ms=0` (how long; zero is for ever), and one word that says what kind: `call`, `register`,
//! `abort`, `virtual`, `physical`, `alarm`, `send`, `crowd`, `wake`, `print`, `power`; without one it only
//! counts. Says how many rounds the first vCPU made.

use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use hv_abi::machine::{HOLE, INTID_PHYSICAL_TIMER, INTID_VIRTUAL_TIMER, PL011, PL031};

use crate::mmio::{read32, write8, write32};
use crate::register::cpu;
use crate::runtime::{Machine, start_vcpu};
use crate::timer::{arm, arm_physical, milliseconds, now};
use crate::{gic, power};

/// A function that nobody has.
const UNKNOWN: u64 = 0x8600_ff42;
/// The vCPU that `power` switches on, again and again.
const SWITCHED: usize = 1;
/// SGIs 0 to 15.
const SGIS: u32 = 16;

/// One round of each kind, by its word.
const KINDS: [(&str, fn()); 11] = [
    ("call", call),
    ("register", register),
    ("abort", abort),
    ("virtual", virtual_timer),
    ("physical", physical_timer),
    ("alarm", alarm),
    ("send", send),
    ("crowd", crowd),
    ("wake", wake),
    ("print", print),
    ("power", power_on),
];

/// The kind: a place in `KINDS`, or behind them.
static KIND: AtomicUsize = AtomicUsize::new(0);
static VCPUS: AtomicUsize = AtomicUsize::new(1);
/// When it is over.
static END: AtomicU64 = AtomicU64::new(u64::MAX);

/// The storm.
pub fn run(machine: &Machine) {
    gic::init_distributor();
    VCPUS.store(machine.vcpus, Ordering::Relaxed);
    let kind = KINDS.iter().position(|(word, _)| machine.flag(word)).unwrap_or(KINDS.len());
    KIND.store(kind, Ordering::Relaxed);
    match machine.option("ms", 0) {
        0 => {}
        ms => END.store(now() + milliseconds(ms), Ordering::Relaxed),
    }
    for index in 1..machine.vcpus {
        assert_eq!(start_vcpu(index, secondary, false), 0, "starting vcpu {index}");
    }
    let rounds = rage();
    println!("storm over: {rounds} rounds");
}

fn secondary(_index: usize) {
    if is("power") && cpu() == SWITCHED {
        // Off, and on again by the first.
        return;
    }
    rage();
}

/// True when the kind is called that.
fn is(word: &str) -> bool {
    KINDS.get(KIND.load(Ordering::Relaxed)).is_some_and(|(name, _)| *name == word)
}

/// Rounds until the end; how many.
fn rage() -> u64 {
    gic::init_cpu();
    gic::enable(INTID_VIRTUAL_TIMER);
    gic::enable(INTID_PHYSICAL_TIMER);
    gic::unmask();
    let round = KINDS.get(KIND.load(Ordering::Relaxed)).map(|(_, round)| *round);
    let end = END.load(Ordering::Relaxed);
    let mut rounds = 0;
    while now() < end {
        if let Some(round) = round {
            round();
        }
        rounds += 1;
    }
    gic::mask();
    rounds
}

fn call() {
    power::hvc(UNKNOWN, [0; 3]);
}

fn register() {
    read32(hv_abi::machine::GICD.base);
}

fn abort() {
    let _ = probe!("ldr {a}, [{at}]", a = out(reg) _, at = in(reg) HOLE);
}

/// A deadline that has passed: the interrupt is there at once, and its handler masks it.
fn virtual_timer() {
    arm(0);
}

/// The same of the timer that traps: its line rises with the write.
fn physical_timer() {
    arm_physical(0);
}

/// The clock is set, and its alarm to the second that comes, which wants the host's timer; then one that
/// is now.
fn alarm() {
    const MATCH: u64 = PL031.base + 4;
    const LOAD: u64 = PL031.base + 8;
    const MASK: u64 = PL031.base + 16;
    write32(MASK, 1);
    write32(LOAD, 1);
    write32(MATCH, 2);
    write32(MATCH, 1);
}

/// One SGI to everybody.
fn send() {
    for to in 0..VCPUS.load(Ordering::Relaxed) {
        gic::send(1, to);
    }
}

/// More pending at once than there are list registers: the rest comes by maintenance interrupts.
fn crowd() {
    let next = (cpu() + 1) % VCPUS.load(Ordering::Relaxed);
    gic::mask();
    for intid in 0..SGIS {
        gic::send(intid, cpu());
        gic::send(intid, next);
    }
    gic::unmask();
}

/// Round the vCPUs, each asleep until the one before has its turn: never a whole slice.
fn wake() {
    send();
    instruction!("wfi");
}

fn print() {
    write8(PL011.base, b'#');
}

/// The first switches the second on, which goes off at once; the others ask whether it is.
fn power_on() {
    if cpu() == 0 {
        start_vcpu(SWITCHED, secondary, false);
    } else {
        power::is_off(SWITCHED);
    }
}
