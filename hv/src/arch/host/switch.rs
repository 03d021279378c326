//! Guest entry, played from a script.

#![expect(unsafe_code, reason = "the real function has a contract; callers must meet it here too")]

use crate::arch::context::{El1Context, GuestRegs, Trap};
use std::boxed::Box;
use std::cell::RefCell;
use std::collections::VecDeque;
use vmobject::addr::PhysAddr;

/// One guest run: changes the registers as the guest would and says how it ended.
type Run = Box<dyn FnOnce(&mut GuestRegs) -> Trap>;

struct State {
    script: VecDeque<Run>,
    el1: El1Context,
    stage2: Option<(PhysAddr, u16)>,
    cntvoff: u64,
    last: Trap,
}

std::thread_local! {
    static STATE: RefCell<State> = const {
        RefCell::new(State {
            script: VecDeque::new(),
            el1: El1Context::reset(0),
            stage2: None,
            cntvoff: 0,
            last: Trap::Irq,
        })
    };
}

/// Runs the guest until it traps: takes the next step of the script, or an interrupt when it is empty.
pub fn enter(regs: &mut GuestRegs) -> Trap {
    let trap = match STATE.with_borrow_mut(|state| state.script.pop_front()) {
        Some(run) => run(regs),
        None => Trap::Irq,
    };
    if let Trap::Sync { .. } = trap {
        STATE.with_borrow_mut(|state| state.last = trap);
    }
    trap
}

/// ESR and FAR of the synchronous exception that was taken last.
pub fn last_fault() -> (u64, u64) {
    STATE.with_borrow(|state| match state.last {
        Trap::Sync { esr, far, .. } => (esr, far),
        Trap::Irq | Trap::Fiq | Trap::SError { .. } => (0, 0),
    })
}

/// Adds a guest run to the script of this thread's CPU.
pub fn expect(run: impl FnOnce(&mut GuestRegs) -> Trap + 'static) {
    STATE.with_borrow_mut(|state| state.script.push_back(Box::new(run)));
}

/// Loads a vCPU's EL1 registers.
pub fn load_el1(from: &El1Context) {
    STATE.with_borrow_mut(|state| state.el1.clone_from(from));
}

/// Stores a vCPU's EL1 registers.
pub fn save_el1(into: &mut El1Context) {
    STATE.with_borrow(|state| into.clone_from(&state.el1));
}

/// Shows or changes the EL1 registers that are loaded now.
pub fn with_el1<R>(look: impl FnOnce(&mut El1Context) -> R) -> R {
    STATE.with_borrow_mut(|state| look(&mut state.el1))
}

/// Names the tables and the VMID that the next guest run translates with.
///
/// # Safety
/// None is needed here; the real one demands that `root` heads a live tree that outlives the run and that
/// `vmid` names that tree alone.
pub unsafe fn load_stage2(root: PhysAddr, vmid: u16) {
    STATE.with_borrow_mut(|state| state.stage2 = Some((root, vmid)));
}

/// What [`load_stage2`] last loaded.
pub fn loaded_stage2() -> Option<(PhysAddr, u16)> {
    STATE.with_borrow(|state| state.stage2)
}

/// Sets how far the guest's virtual counter lags the physical one.
pub fn set_cntvoff(offset: u64) {
    STATE.with_borrow_mut(|state| state.cntvoff = offset);
}

/// The guest's virtual timer as it stands: CNTV_CTL_EL0 and CNTV_CVAL_EL0.
pub fn virtual_timer() -> (u64, u64) {
    with_el1(|el1| (el1.cntv_ctl, el1.cntv_cval))
}

/// Turns the virtual timer off, so that it cannot interrupt for a vCPU that has left.
pub fn stop_virtual_timer() {
    with_el1(|el1| el1.cntv_ctl = 0);
}
