//! A CPU with nothing to run.
//!
//! It does the memory manager's chores; when there are none it sleeps in WFI until an interrupt: its timer for the first sleeper, a kick, a device, or the virtual
//! timer of the vCPU whose registers are still here.

use core::sync::atomic::Ordering;

use crate::arch::{irq, timer};
use vmobject::lock::Held;

use super::load::{Cpu, ticks};
use super::{ASLEEP, Outside, slice};

/// How much of the memory manager's chores is done between two looks around (invariant I6).
pub(super) const CHORES: u32 = 12;

/// How long a CPU sleeps at most while there are chores for the daemon or the monitor.
const ROUND_MS: u64 = 5;
/// The same while a disk has requests: one that has gone silent tells nobody.
pub(super) const WATCH_MS: u64 = 1000;

/// Sleeps until something happens, and handles the interrupt. Not while there is `more` to do for the memory
/// manager.
pub(super) fn sleep(cpu: &mut Cpu, more: bool, outside: &dyn Outside, held: &mut Held<'_, 0>) {
    if super::chores(held) || more {
        slice::idle_interrupts(cpu, outside, held);
        return;
    }
    ASLEEP[cpu.id].store(true, Ordering::SeqCst);
    // Whoever makes a vCPU ready after this sees the flag; whoever did before left it in the queue.
    if !super::has_next(cpu.id, held) {
        // A chore that is not done yet waits for something that need not come as an interrupt here.
        let round = match super::CHORES.load(Ordering::SeqCst) {
            true => Some(ROUND_MS),
            false => {
                let disks = crate::mm::disks();
                (disks.is_watched() && disks.is_busy()).then_some(WATCH_MS)
            }
        };
        let round = round.map(|most| timer::now().saturating_add(ticks(most)));
        match cpu.sleepers.next().into_iter().chain(round).min() {
            Some(deadline) => timer::arm_host(deadline),
            None => timer::disarm_host(),
        }
        irq::wait_for_interrupt();
    }
    ASLEEP[cpu.id].store(false, Ordering::SeqCst);
    slice::idle_interrupts(cpu, outside, held);
}
