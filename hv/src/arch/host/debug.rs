//! Self-hosted debug registers.

use crate::arch::context::DebugContext;
use std::cell::RefCell;

std::thread_local! {
    static LOADED: RefCell<DebugContext> = RefCell::default();
}

/// Breakpoints and watchpoints that the CPU has.
pub fn slots() -> (usize, usize) {
    (6, 4)
}

/// Loads a vCPU's debug registers.
pub fn load(context: &DebugContext) {
    LOADED.replace(context.clone());
}

/// What is loaded on this thread's CPU.
pub fn loaded() -> DebugContext {
    LOADED.with_borrow(DebugContext::clone)
}
