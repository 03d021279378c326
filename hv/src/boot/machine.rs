//! The machine's devices as the scheduler meets them: who gets an interrupt, and what ends the machine.
//!
//! One [`Machine`], made on the first CPU before any guest runs. Interrupts of the console become typed bytes of
//! the attached guest or the monitor, those of the control port lines for it, those of disks completions for
//! the memory manager, and wake-ups.

use super::{console, control, with_gic};
use crate::arch::percpu::MAX_CPUS;
use crate::arch::{percpu, timer};
use crate::guest::{self, rank, table};
use crate::mm;
use crate::monitor::desk::{self, Front};
use crate::monitor::host;
use crate::sched::load::Cpu;
use crate::sched::{self, Outside};
use ::log::warn;
use board::gic::Private;
use board::platform::{Interrupt, Platform};
use core::fmt::Write as _;
use core::sync::atomic::{AtomicBool, Ordering};
use spin::Once;
use vmobject::lock::Held;
use vmobject::pager::{Down, Shutdown};
use vmobject::store::Machine as _;

/// How many typed bytes one interrupt takes in (invariant I6).
const MAX_TYPED: usize = 64;
/// How long disks may take to be written at the end, in seconds.
const WRITING_S: u64 = 60;
/// How much is looked at between two looks for what disks have finished.
const CHORES: u32 = 256;
/// The virtual timer's physical interrupt.
const VIRTUAL_TIMER: u32 = hv_abi::machine::INTID_VIRTUAL_TIMER;

static MACHINE: Once<Machine> = Once::new();

/// What the scheduler calls.
pub(super) struct Machine {
    console: Option<Interrupt>,
    control: Option<Interrupt>,
    /// The last guest has ended, and nobody has been told yet.
    deserted: AtomicBool,
}

/// Each CPU's redistributor.
static PRIVATE: [Once<Private>; MAX_CPUS] = [const { Once::new() }; MAX_CPUS];

/// Makes the machine and turns its devices' interrupts on, at this CPU.
pub(super) fn init(platform: &Platform) -> &'static Machine {
    let machine = Machine {
        console: console::init(platform),
        control: control::interrupt(),
        deserted: AtomicBool::new(false),
    };
    let mpidr = percpu::own_mpidr();
    let doors = machine.console.into_iter().chain(machine.control);
    for interrupt in doors.chain(mm::disks().interrupts()) {
        if let Err(error) = with_gic(|gic| gic.enable_shared(interrupt, mpidr)) {
            warn!("interrupt {interrupt:?} cannot be enabled: {error:?}");
        }
    }
    guest::console::set_wire(&console::Serial);
    let machine = MACHINE.call_once(|| machine);
    // A line that rose before its interrupt was enabled does not rise again until it is acknowledged.
    control::acknowledge();
    desk::heard();
    machine
}

/// The machine; `None` before [`init`].
pub(super) fn get() -> Option<&'static Machine> {
    MACHINE.get()
}

/// Remembers this CPU's redistributor, for what needs no lock.
pub(super) fn init_cpu() {
    let found = with_gic(|gic| gic.private(percpu::own_mpidr()));
    if let (Some(place), Ok(private)) = (PRIVATE.get(percpu::cpu()), found) {
        place.call_once(|| private);
    }
}

impl Machine {
    /// Takes typed bytes in: for the monitor, or into the attached guest. The port's interrupt stays raised until it was
    /// seen empty: it is raised by a byte that comes to an empty FIFO, and one that was cleared with bytes left behind
    /// would never be raised again.
    fn typed<const R: u8>(&self, held: &mut Held<'_, R>) {
        const { assert!(R < rank::GUESTS) };
        for _ in 0..MAX_TYPED {
            let Some(byte) = console::next() else { return };
            let Some(byte) = desk::typed(byte, &mut console::Serial, held) else { continue };
            let attached = guest::console::attached().and_then(|id| table::get(id, held));
            if let Some(guest) = attached {
                let kicks = guest.type_in(&[byte], held);
                sched::wake_many(&guest, kicks, held);
            }
        }
    }
}

impl Front for Machine {
    fn show(&self, text: &str) {
        // A serial port does not fail.
        let _ = console::Serial.write_str(text);
    }

    fn send(&self, bytes: &[u8]) -> usize {
        control::write(bytes)
    }

    fn is_sent(&self) -> bool {
        control::is_sent()
    }

    fn receive(&self, into: &mut [u8]) -> usize {
        control::read(into)
    }

    fn leave(&self) -> ! {
        let mut held = Held::root();
        while let Some(kept) = guest::snapshot::nth(0, &mut held) {
            guest::snapshot::forget(&kept.name, &mut held);
        }
        // What a disk still has of a job that was given up may be written at any time, or never.
        let written = write_disks(&mut held) && !sched::jobs::are_stuck();
        ::log::info!("the last guest has ended");
        crate::arch::power::exit(if written { 0 } else { 1 })
    }
}

/// Brings what guests wrote to their disks there, and tells how many slots of swap somebody has still: none, unless one was
/// lost. False when not all got there. No guest runs any more, and nothing is kept of any.
fn write_disks(held: &mut Held<'_, 0>) -> bool {
    let mut shutdown = Shutdown::default();
    let deadline = timer::now().saturating_add(timer::freq().saturating_mul(WRITING_S));
    while timer::now() < deadline {
        match mm::vm().shutdown_step(&mut shutdown, CHORES, held) {
            Down::Done(left) => {
                ::log::info!("swap slots in use: {}", left.swap_slots);
                if left.unwritten > 0 {
                    ::log::error!("{} pages of disks could not be written", left.unwritten);
                }
                let lost = mm::vm().stats().page_lost;
                if lost > 0 {
                    ::log::error!(
                        "{lost} pages of disks whose guests had ended could not be written, and are lost"
                    );
                }
                return left.unwritten == 0 && lost == 0;
            }
            Down::More | Down::Wait(_) => complete(held),
        }
    }
    ::log::error!("the disks do not take what was written in {WRITING_S} s");
    false
}

/// Delivers what disks have finished.
fn complete<const R: u8>(held: &mut Held<'_, R>) {
    const { assert!(R < rank::WAITERS) };
    let vm = mm::vm();
    let count = vm.machine().store().poll(&mut |token, result| {
        if !sched::jobs::arrived(token, result) {
            vm.complete(token, result, held);
            sched::io_done(token, held);
        }
    });
    if count > 0 {
        // Frames, or places in a queue.
        sched::memory_freed(held);
    }
}

impl Outside for Machine {
    fn interrupt(&self, intid: u32, held: &mut Held<'_, { rank::VCPU }>) {
        let is = |door: Option<Interrupt>| door.is_some_and(|door| door.intid == intid);
        if is(self.console) {
            self.typed(held);
        } else if is(self.control) {
            control::acknowledge();
            desk::heard();
        } else {
            complete(held);
        }
    }

    fn last_guest_ended(&self) {
        if host::is_leaving() {
            // Somebody may wait for an answer still.
            desk::heard();
        } else {
            self.deserted.store(true, Ordering::SeqCst);
        }
    }

    fn job_ended(&self) {
        if host::is_leaving() {
            desk::heard();
        }
    }

    fn set_timer_active(&self, active: bool) {
        if let Some(private) = PRIVATE.get(percpu::cpu()).and_then(Once::get) {
            // The number is that of a PPI, so it is not refused.
            let _ = private.set_active(VIRTUAL_TIMER, active);
        }
    }

    fn look_around(&self, cpu: &mut Cpu, held: &mut Held<'_, 0>) {
        // An interrupt announces what is done; this is for the one that got lost.
        if mm::disks().is_busy() {
            complete(held);
            let now = timer::now();
            if mm::disks().is_watch_due(now) {
                mm::disks().watch(now);
                complete(held);
            }
        }
        desk::serve(self, cpu, held);
        if self.deserted.load(Ordering::Relaxed) && self.deserted.swap(false, Ordering::SeqCst) {
            self.show("\r\nthe last guest has ended; 'create' makes another, 'shutdown' leaves\r\n");
            desk::open(&mut console::Serial, held);
        }
    }

    fn poll(&self, held: &mut Held<'_, 0>) {
        complete(held);
    }
}
