//! Measures what the way through EL2 costs. Under `-icount` with a counter at 1 GHz a tick is an
//! instruction, so the figures repeat.
//!
//! Each figure is a line `bench METRIC VALUE KEY=VALUE...`: the median, less what measuring costs, with
//! its spread. Options: `zero_mib=8` (RAM touched for each of the two orders); with `fork` it measures what a fork makes
//! dearer, and nothing else, or with `fork survive` what it does when a relative is dead; with `depth` what a long
//! history does; with `swap` what comes back from there, and with `evict children=1` it makes others measure.

use core::sync::atomic::{AtomicBool, Ordering};

use hv_abi::call::{self, status};
use hv_abi::machine::{GICD, INTID_VIRTUAL_TIMER, PL011, RAM_BASE};

use crate::runtime::{Machine, start_vcpu};
use crate::timer::{self, frequency, wait_until};
use crate::{gic, mmu, trap};

const SAMPLES: usize = 200;
const COLD: usize = 8;
const SGI: u32 = 1;
static STOP: AtomicBool = AtomicBool::new(false);
static READY: AtomicBool = AtomicBool::new(false);

/// Times an instruction, with operands as `asm!` takes them, in ticks.
macro_rules! ticks {
    ($text:expr $(, $($operand:tt)*)?) => {{
        let (start, end): (u64, u64);
        // SAFETY: as the instruction; each is a read, a call, or a store to RAM that nobody uses.
        unsafe {
            core::arch::asm!("isb", "mrs {start}, cntvct_el0", $text, "isb", "mrs {end}, cntvct_el0",
                start = out(reg) start, end = out(reg) end, $($($operand)*)?)
        };
        end - start
    }};
}

mod depth;
mod forked;
mod swapped;

/// Figures of one metric.
struct Samples {
    values: [u64; SAMPLES],
    taken: usize,
}

impl Samples {
    fn take(mut sample: impl FnMut(usize) -> u64) -> Self {
        Self::unmarked(|index| {
            // The first few meet cold paths: they are not kept.
            if index < COLD {
                return sample(index);
            }
            mark!(BEGIN);
            let value = sample(index);
            mark!(END);
            value
        })
    }

    /// The same of what no figure tells: who follows the run would take it for the next one's.
    fn unmarked(mut sample: impl FnMut(usize) -> u64) -> Self {
        let mut samples = Self { values: [0; SAMPLES], taken: 0 };
        for index in 0..SAMPLES + COLD {
            let value = sample(index);
            if index >= COLD {
                samples.add(value);
            }
        }
        samples
    }

    fn add(&mut self, value: u64) {
        if let Some(slot) = self.values.get_mut(self.taken) {
            *slot = value;
            self.taken += 1;
        }
    }

    /// Median, least, most.
    fn summary(&mut self) -> [u64; 3] {
        let values = &mut self.values[..self.taken];
        values.sort_unstable();
        [values[values.len() / 2], values[0], values[values.len() - 1]]
    }

    fn report(mut self, metric: &str, parameters: &str, less: u64) {
        let [median, least, most] = self.summary().map(|ticks| instructions(ticks.saturating_sub(less)));
        mark!(REPORT);
        println!("bench {metric} {median} {parameters} min={least} max={most} n={}", self.taken);
    }
}

/// Ticks as nanoseconds, which are instructions where this is meant to run.
fn instructions(ticks: u64) -> u64 {
    ticks * 1_000_000_000 / frequency()
}

/// All figures.
pub fn run(machine: &Machine) {
    mmu::enable();
    gic::init_distributor();
    gic::init_cpu();
    gic::enable(INTID_VIRTUAL_TIMER);
    let [empty, ..] = Samples::unmarked(|_| ticks!("")).summary();
    println!("bench measuring {} unit=insn", instructions(empty));
    if machine.flag("fork") {
        return forked::run(machine, empty);
    }
    if machine.flag("depth") {
        return depth::run(machine, empty);
    }
    if machine.flag("swap") {
        return swapped::run(machine, empty);
    }
    if machine.flag("evict") {
        return swapped::shared(machine);
    }
    exits(empty);
    zero_faults(machine, empty);
    gic::unmask();
    timer_interrupts();
    own_sgi();
    if machine.vcpus > 1 {
        others_sgi();
    }
}

fn exits(empty: u64) {
    let hvc =
        |_| ticks!("hvc #0", inout("x0") u64::from(call::NULL) => _, out("x1") _, out("x2") _, out("x3") _);
    Samples::take(hvc).report("exit.hvc", "call=null", empty);
    let read = |at: u64| Samples::take(move |_| ticks!("ldr {a:w}, [{at}]", a = out(reg) _, at = in(reg) at));
    read(PL011.base + 0x18).report("exit.mmio", "device=pl011", empty);
    read(GICD.base + 0x8).report("exit.mmio", "device=gicd", empty);
    Samples::take(|_| ticks!("mrs {a}, id_aa64pfr0_el1", a = out(reg) _)).report(
        "exit.sysreg",
        "register=id_aa64pfr0_el1",
        empty,
    );
    Samples::take(|_| ticks!("mrs {a}, cntpct_el0", a = out(reg) _)).report(
        "exit.sysreg",
        "register=cntpct_el0",
        empty,
    );
}

/// First writes to RAM that nobody has touched: in an order that no prefetching foresees, and in order.
fn zero_faults(machine: &Machine, empty: u64) {
    let bytes = machine.option("zero_mib", 8) << 20;
    let pages = bytes / 4096;
    let first = (RAM_BASE + machine.memory / 4).next_multiple_of(2 << 20);
    assert!(first + 2 * bytes <= machine.end(), "too little RAM for this");
    faults("fault.zero", Touch::Write, pages, empty, first, first + bytes);
}

/// How a page is touched.
#[derive(Clone, Copy)]
enum Touch {
    Read,
    Write,
}

/// Touches so many pages from `scattered` on in an order that no prefetching foresees, and from `ordered` on in order.
fn faults(metric: &str, touch: Touch, pages: u64, empty: u64, scattered: u64, ordered: u64) {
    assert!(pages.is_power_of_two(), "an odd step visits every page of a power of two once");
    let scattered = |index: u64| scattered + ((index * 193) & (pages - 1)) * 4096;
    let ordered = |index: u64| ordered + index * 4096;
    in_order(metric, "single", touch, pages, empty, scattered);
    in_order(metric, "sequential", touch, pages, empty, ordered);
}

fn in_order(metric: &str, mode: &str, touch: Touch, pages: u64, empty: u64, page: impl Fn(u64) -> u64) {
    let (mut least, mut most, mut total) = (u64::MAX, 0, 0);
    for index in 0..pages {
        let at = page(index);
        mark!(BEGIN);
        let ticks = match touch {
            Touch::Read => ticks!("ldr {a}, [{at}]", a = out(reg) _, at = in(reg) at),
            Touch::Write => ticks!("str xzr, [{at}]", at = in(reg) at),
        };
        mark!(END);
        let ticks = ticks.saturating_sub(empty);
        (least, most, total) = (least.min(ticks), most.max(ticks), total + ticks);
    }
    let [mean, least, most] = [total / pages, least, most].map(instructions);
    mark!(REPORT);
    println!("bench {metric} {mean} mode={mode} min={least} max={most} n={pages}");
}

/// Waits for an interrupt with as little work as there is, on this vCPU and on the one it may wait for.
fn until(vcpu: usize, intid: u32, count: u32) {
    while trap::of(vcpu).count(intid) != count {
        instruction!("yield");
    }
}

fn timer_interrupts() {
    let ahead = frequency() / 20_000;
    let mut latency = Samples { values: [0; SAMPLES], taken: 0 };
    let trip = Samples::take(|_| {
        let count = trap::seen().count(INTID_VIRTUAL_TIMER);
        let deadline = timer::now() + ahead;
        timer::arm(deadline);
        until(0, INTID_VIRTUAL_TIMER, count + 1);
        let end = timer::now();
        latency.add(trap::seen().last().saturating_sub(deadline));
        end.saturating_sub(deadline)
    });
    latency.report("irq.timer", "part=latency", 0);
    trip.report("irq.timer", "part=trip", 0);
}

fn own_sgi() {
    let mut latency = Samples { values: [0; SAMPLES], taken: 0 };
    let trip = Samples::take(|_| {
        let count = trap::seen().count(SGI);
        let start = timer::now();
        gic::send(SGI, 0);
        until(0, SGI, count + 1);
        let end = timer::now();
        latency.add(trap::seen().last() - start);
        end - start
    });
    latency.report("irq.sgi", "to=self part=latency", 0);
    trip.report("irq.sgi", "to=self part=trip", 0);
}

fn others_sgi() {
    assert_eq!(start_vcpu(1, secondary, true), status::SUCCESS, "starting the other vcpu");
    assert!(wait_until(20_000, || READY.load(Ordering::Acquire)), "the other vcpu does not come");
    let mut latency = Samples { values: [0; SAMPLES], taken: 0 };
    let trip = Samples::take(|_| {
        let count = trap::of(1).count(SGI);
        let start = timer::now();
        gic::send(SGI, 1);
        until(1, SGI, count + 1);
        let end = timer::now();
        latency.add(trap::of(1).last().saturating_sub(start));
        end - start
    });
    latency.report("irq.sgi", "to=other part=latency", 0);
    trip.report("irq.sgi", "to=other part=trip", 0);
    STOP.store(true, Ordering::Release);
}

fn secondary(_: usize) {
    gic::init_cpu();
    gic::unmask();
    READY.store(true, Ordering::Release);
    while !STOP.load(Ordering::Acquire) {
        instruction!("yield");
    }
}
