//! Memory by address: one word, never through a reference; and code made at run time.

use crate::mmu::Table;

/// Reads a word.
pub fn peek(at: u64) -> u64 {
    // SAFETY: RAM that this guest has and no reference covers; a wrong address traps.
    unsafe { (at as *const u64).read_volatile() }
}

/// Writes a word.
pub fn poke(at: u64, value: u64) {
    // SAFETY: RAM that this guest has and no reference covers; a wrong address traps.
    unsafe { (at as *mut u64).write_volatile(value) }
}

/// Makes what was written in the line of `at` what is executed there.
pub fn publish_code(at: u64) {
    // SAFETY: cache maintenance changes no memory.
    unsafe { core::arch::asm!("dc cvau, {0}", "dsb ish", "ic ivau, {0}", "dsb ish", "isb", in(reg) at) };
}

/// A page for code that is made at run time, and one that instructions may do to as they like.
static CODE: Table = Table::new();
static SCRATCH: Table = Table::new();

/// The page that nobody minds.
pub fn scratch() -> u64 {
    SCRATCH.address()
}

/// Runs one instruction that has X0 as its only operand; its fault, or X0 after it.
pub fn execute(instruction: u32, x0: u64) -> Result<u64, crate::trap::Fault> {
    const RET: u64 = 0xd65f_03c0;
    CODE.set(0, RET << 32 | u64::from(instruction));
    publish_code(CODE.address());
    let mut value = x0;
    let fault = probe!("blr {at}", at = in(reg) CODE.address(), inout("x0") value, out("x30") _);
    match fault {
        Some(fault) => Err(fault),
        None => Ok(value),
    }
}

/// Calls an address; the fault that this ends in, or none if somebody there returns.
pub fn call(at: u64) -> Option<crate::trap::Fault> {
    probe!("blr {at}", at = in(reg) at, out("x0") _, out("x30") _)
}
