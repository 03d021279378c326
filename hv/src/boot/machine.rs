//! The machine's devices as the scheduler meets them: who gets an interrupt, and what ends the machine.
//!
//! One [`Machine`], made on the first CPU before any guest runs. Interrupts of the console become typed
//! bytes of the attached guest; those of disks become completions for the memory manager, and wake-ups.

use super::{console, with_gic};
use crate::arch::percpu;
use crate::arch::percpu::MAX_CPUS;
use crate::guest::{self, rank, table};
use crate::mm;
use crate::sched::{self, Outside};
use ::log::warn;
use board::gic::Private;
use board::platform::{Interrupt, Platform};
use core::sync::atomic::{AtomicBool, Ordering};
use spin::Once;
use vmobject::lock::Held;

/// How many typed bytes one interrupt takes in (invariant I6).
const MAX_TYPED: usize = 64;
/// The virtual timer's physical interrupt.
const VIRTUAL_TIMER: u32 = hv_abi::machine::INTID_VIRTUAL_TIMER;

static MACHINE: Once<Machine> = Once::new();

/// What the scheduler calls.
pub(super) struct Machine {
    console: Option<Interrupt>,
    /// Leave when the last guest has ended.
    batch: AtomicBool,
}

/// Each CPU's redistributor.
static PRIVATE: [Once<Private>; MAX_CPUS] = [const { Once::new() }; MAX_CPUS];

/// Makes the machine and turns its devices' interrupts on, at this CPU.
pub(super) fn init(platform: &Platform) -> &'static Machine {
    let machine = Machine { console: console::init(platform), batch: AtomicBool::new(false) };
    let mpidr = percpu::own_mpidr();
    for interrupt in machine.console.into_iter().chain(mm::disks().interrupts()) {
        if let Err(error) = with_gic(|gic| gic.enable_shared(interrupt, mpidr)) {
            warn!("interrupt {interrupt:?} cannot be enabled: {error:?}");
        }
    }
    guest::console::set_wire(&console::Serial);
    MACHINE.call_once(|| machine)
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
    /// Says whether the machine ends with the last guest.
    pub(super) fn set_batch(&self, batch: bool) {
        self.batch.store(batch, Ordering::Relaxed);
    }

    /// Types what arrived into the attached guest.
    fn typed<const R: u8>(&self, held: &mut Held<'_, R>) {
        const { assert!(R < rank::GUESTS) };
        console::acknowledge();
        for _ in 0..MAX_TYPED {
            let Some(byte) = console::read() else { return };
            let attached = guest::console::attached().and_then(|id| table::get(id, held));
            if let Some(guest) = attached {
                let kicks = guest.type_in(&[byte], held);
                sched::wake_many(&guest, kicks, held);
            }
        }
    }
}

/// Delivers what disks have finished.
fn complete<const R: u8>(held: &mut Held<'_, R>) {
    const { assert!(R < rank::WAITERS) };
    mm::disks().poll(&mut |token, result| {
        mm::vm().complete(token, result, held);
        sched::io_done(token, held);
    });
}

impl Outside for Machine {
    fn interrupt(&self, intid: u32, held: &mut Held<'_, { rank::VCPU }>) {
        if self.console.is_some_and(|console| console.intid == intid) {
            self.typed(held);
        } else {
            complete(held);
        }
    }

    fn last_guest_ended(&self) {
        if self.batch.load(Ordering::Relaxed) {
            ::log::info!("the last guest has ended");
            crate::arch::power::exit(0);
        }
    }

    fn set_timer_active(&self, active: bool) {
        if let Some(private) = PRIVATE.get(percpu::cpu()).and_then(Once::get) {
            // The number is that of a PPI, so it is not refused.
            let _ = private.set_active(VIRTUAL_TIMER, active);
        }
    }

    fn look_around(&self, _cpu: usize, held: &mut Held<'_, 0>) {
        complete(held);
    }
}
