//! The CPU interface of the interrupt controller, as EL2 uses it.

use std::cell::RefCell;
use std::collections::VecDeque;

/// What [`ack`] answers when nothing is pending.
pub const SPURIOUS: u32 = 1023;

#[derive(Default)]
struct Interface {
    pending: VecDeque<u32>,
    active: std::vec::Vec<u32>,
    kicks: u64,
}

std::thread_local! {
    static STATE: RefCell<Interface> = RefCell::default();
}

/// Acknowledges the most urgent interrupt; [`SPURIOUS`] when there is none.
pub fn ack() -> u32 {
    STATE.with_borrow_mut(|state| {
        let Some(intid) = state.pending.pop_front() else { return SPURIOUS };
        state.active.push(intid);
        intid
    })
}

/// Drops the running priority; the interrupt stays active until [`deactivate`].
pub fn eoi(_intid: u32) {}

/// Ends an interrupt's active state.
pub fn deactivate(intid: u32) {
    STATE.with_borrow_mut(|state| state.active.retain(|&active| active != intid));
}

/// Makes another CPU leave its guest or its sleep and look around.
pub fn kick(cpu: usize) {
    STATE.with_borrow_mut(|state| state.kicks |= 1 << cpu);
}

/// True when an interrupt is pending for this CPU.
pub fn is_pending() -> bool {
    STATE.with_borrow(|state| !state.pending.is_empty())
}

/// Waits until an interrupt is pending, masked or not: here it never sleeps.
pub fn wait_for_interrupt() {}

/// Plays a device: makes an interrupt pending on this thread's CPU.
pub fn raise(intid: u32) {
    STATE.with_borrow_mut(|state| state.pending.push_back(intid));
}

/// Interrupts acknowledged and not deactivated.
pub fn active() -> std::vec::Vec<u32> {
    STATE.with_borrow(|state| state.active.clone())
}

/// CPUs kicked since the last look.
pub fn take_kicks() -> u64 {
    STATE.with_borrow_mut(|state| core::mem::take(&mut state.kicks))
}
