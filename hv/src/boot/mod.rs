//! From the first Rust instruction to guests running: what happens once, in order.
//!
//! Read [`hv_start`] top-down. The first CPU reads the host's device tree, makes EL2's own map, then turns on
//! one thing after the other: log, heap, interrupts, the other CPUs. Nothing about the board is assumed that
//! the tree says. A failure here has nobody to report to: it panics, which prints and ends the machine.
#![expect(unsafe_code, reason = "this is where memory gets its meaning")]

mod console;
mod control;
mod disks;
mod guests;
pub mod log;
mod machine;
mod memory;
mod panic;
mod selftest;

use crate::arch::{el2, entry, percpu, timer};
use crate::guest::create;
use crate::mm::direct::Direct;
use crate::mm::machine::Metal;
use crate::{mm, sched};
use ::log::{info, warn};
use board::gic::{self, Gic};
use board::platform::{Interrupt, Platform};
use board::{pl031, psci};
use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use spin::{Mutex, Once};
use vmobject::addr::PhysAddr;
use vmobject::lock::Held;

/// The machine, once its tree is read.
static PLATFORM: Once<Platform> = Once::new();
/// The interrupt controller's shared half. A leaf: nothing is locked under it.
static GIC: Mutex<Option<Gic>> = Mutex::new(None);
/// CPUs that have come up.
static ONLINE: AtomicUsize = AtomicUsize::new(1);
/// Set when every CPU may run guests.
static GO: AtomicBool = AtomicBool::new(false);

/// The Aff fields of an MPIDR.
const AFFINITY: u64 = 0xff_00ff_ffff;
/// The interrupt that [`irq::kick`] sends.
const KICK: Interrupt = Interrupt { intid: 0, edge: true };

/// The machine. Panics before the tree is read.
pub fn platform() -> &'static Platform {
    let Some(platform) = PLATFORM.get() else { panic!("the platform is not known yet") };
    platform
}

/// Runs `work` on the interrupt controller's shared half.
pub fn with_gic<R>(work: impl FnOnce(&mut Gic) -> R) -> R {
    let mut gic = GIC.lock();
    let Some(gic) = gic.as_mut() else { panic!("the interrupt controller is not set up yet") };
    work(gic)
}

/// The first CPU arrives here from start.S, on the boot stack and the early map.
#[unsafe(no_mangle)]
extern "C" fn hv_start(x0: u64) -> ! {
    memory::early_stacks();
    percpu::set_mpidr(0, percpu::own_mpidr());
    let mut machine = read_tree(x0);
    // Nobody else is to know it: what is kept of the tree has it no more.
    let entropy = core::mem::take(&mut machine.rng_seed);
    let platform = PLATFORM.call_once(|| machine);
    let layout = memory::lay_out(platform);
    log::init(platform);
    info!("hello from EL2, CPU {:#x}", percpu::own_mpidr());
    describe(platform, &layout);

    // SAFETY: the layout took the arena out of free memory and mapped it.
    unsafe { mm::heap::init(layout.heap.clone()) };
    let geometry = mm::machine::geometry();
    el2::set_stage2(geometry.vtcr(), geometry.hcr());
    el2::init_cpu();
    // SAFETY: the tree names the controller, the map has it as device memory, and nobody else has it.
    match unsafe { Gic::new(&platform.gic) } {
        Ok(gic) => *GIC.lock() = Some(gic),
        Err(error) => panic!("the interrupt controller cannot be used: {error:?}"),
    }
    init_interrupts();

    let metal = Metal::new(Direct::IDENTITY, disks::find(platform));
    if let Err(error) = mm::machine::init(metal, &layout.free.frames()) {
        panic!("the memory manager cannot start: {error:?}");
    }
    let machine = machine::init(platform);
    start_others(platform);
    guests::seed(platform, entropy, &mut Held::root());
    tell_time(platform);
    guests::start(machine, &mut Held::root());
    selftest::check(platform);
    GO.store(true, Ordering::Release);
    run()
}

/// Every other CPU arrives here from start.S, on its own stack and the final map.
#[unsafe(no_mangle)]
extern "C" fn hv_secondary(cpu: u64) -> ! {
    el2::init_cpu();
    init_interrupts();
    info!("hello from EL2, CPU {:#x}, number {cpu}", percpu::own_mpidr());
    ONLINE.fetch_add(1, Ordering::Release);
    while !GO.load(Ordering::Acquire) {
        core::hint::spin_loop();
    }
    run()
}

/// What every CPU does from now on.
fn run() -> ! {
    machine::init_cpu();
    selftest::run(platform());
    let Some(machine) = machine::get() else { panic!("no machine to run on") };
    sched::main_loop(machine)
}

/// Reads the host's device tree: where x0 points, if that is one, else where RAM starts.
fn read_tree(x0: u64) -> Platform {
    for at in [x0, memory::default_tree()] {
        let Some(blob) = memory::tree_at(at) else { continue };
        match Platform::parse(blob) {
            Ok(platform) => return platform,
            Err(error) => panic!("the device tree at {at:#x} cannot be used: {error:?}"),
        }
    }
    panic!("there is no device tree")
}

/// Sets up this CPU's interrupts: its redistributor, its interface, the ones that EL2 uses on every CPU.
fn init_interrupts() {
    let mpidr = percpu::own_mpidr();
    let platform = platform();
    let wanted =
        [Some(KICK), Some(platform.timer.hypervisor), Some(platform.timer.virt), platform.gic.maintenance];
    with_gic(|gic| {
        if let Err(error) = gic.init_private(mpidr) {
            panic!("CPU {mpidr:#x} has no redistributor: {error:?}");
        }
        for interrupt in wanted.into_iter().flatten() {
            if let Err(error) = gic.enable_private(mpidr, interrupt) {
                panic!("interrupt {interrupt:?} cannot be enabled: {error:?}");
            }
        }
    });
    gic::init_cpu_interface();
}

/// Starts the other CPUs, one after the other, and gives each a second to arrive.
fn start_others(platform: &Platform) {
    let own = percpu::own_mpidr() & AFFINITY;
    let entry = PhysAddr::new(entry::secondary_entry());
    let mut number = 1;
    for &mpidr in platform.cpus.iter().filter(|mpidr| **mpidr & AFFINITY != own) {
        if number >= percpu::MAX_CPUS {
            warn!("more than {} CPUs: the rest stay off", percpu::MAX_CPUS);
            break;
        }
        percpu::set_mpidr(number, mpidr);
        if let Err(error) = psci::cpu_on(platform.psci, mpidr, entry, number as u64) {
            warn!("CPU {mpidr:#x} does not start: {error:?}");
            continue;
        }
        let deadline = timer::now().saturating_add(timer::freq());
        while ONLINE.load(Ordering::Acquire) <= number {
            if timer::now() > deadline {
                panic!("CPU {mpidr:#x} was started and did not arrive");
            }
            core::hint::spin_loop();
        }
        number += 1;
    }
    percpu::set_count(number);
    info!("{number} CPUs");
}

/// Asks the machine's clock what time it is, for guests' clocks.
fn tell_time(platform: &Platform) {
    // SAFETY: the tree names the clock, and the map has it as device memory.
    match platform.clock.as_ref().and_then(|clock| unsafe { pl031::seconds(clock) }) {
        Some(seconds) => create::set_time(seconds.into()),
        None => warn!("there is no clock: for guests it is 1970"),
    }
}

/// Says what the machine is.
fn describe(platform: &Platform, layout: &memory::Layout) {
    let mib = |bytes: u64| bytes >> 20;
    for region in &platform.memory {
        info!("RAM {} MiB at {:#x}", mib(region.size), region.base.bits());
    }
    let ids = crate::arch::id::read();
    info!(
        "MIDR {:#x}, {} bits of physical address, counter {} Hz",
        ids.midr,
        crate::arch::id::pa_bits(),
        timer::freq()
    );
    info!("heap {} MiB, free {} MiB", mib(layout.heap.end - layout.heap.start), mib(layout.free.bytes()));
    if platform.truncated {
        warn!("the machine has more than we use of it: see board::platform's bounds");
    }
}
