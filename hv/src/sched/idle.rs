//! A CPU with nothing to run.
//!
//! It sleeps in WFI until an interrupt: its timer for the first sleeper, a kick, a device, or the virtual
//! timer of the vCPU whose registers are still here.

use core::sync::atomic::Ordering;

use crate::arch::{irq, timer};
use vmobject::lock::Held;

use super::load::Cpu;
use super::{ASLEEP, Outside, QUEUES, slice};

/// Sleeps until something happens, and handles the interrupt.
pub(super) fn sleep(cpu: &mut Cpu, outside: &dyn Outside, held: &mut Held<'_, 0>) {
    ASLEEP[cpu.id].store(true, Ordering::SeqCst);
    // Whoever makes a vCPU ready after this sees the flag; whoever did before left it in the queue.
    if QUEUES[cpu.id].is_empty(held) {
        match cpu.sleepers.next() {
            Some(deadline) => timer::arm_host(deadline),
            None => timer::disarm_host(),
        }
        irq::wait_for_interrupt();
    }
    ASLEEP[cpu.id].store(false, Ordering::SeqCst);
    slice::idle_interrupts(cpu, outside, held);
}
