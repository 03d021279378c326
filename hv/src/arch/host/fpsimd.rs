//! FP and SIMD registers.

use crate::arch::context::FpContext;
use std::cell::{Cell, RefCell};

std::thread_local! {
    static REGISTERS: RefCell<FpContext> = const { RefCell::new(FpContext::ZERO) };
    static TRAP: Cell<bool> = const { Cell::new(true) };
}

/// Stores the FP registers.
pub fn save(into: &mut FpContext) {
    REGISTERS.with_borrow(|registers| into.clone_from(registers));
}

/// Loads the FP registers.
pub fn load(from: &FpContext) {
    REGISTERS.with_borrow_mut(|registers| registers.clone_from(from));
}

/// Chooses whether the guest's first FP instruction traps.
pub fn trap(on: bool) {
    TRAP.set(on);
}

/// What [`trap`] chose on this thread's CPU.
pub fn traps() -> bool {
    TRAP.get()
}
