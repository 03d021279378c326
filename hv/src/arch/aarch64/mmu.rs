//! EL2's own MMU: from the map of early boot to the real one, on the first CPU; the others start with that.

use super::cache;
use super::sysreg::{instruction, read_sysreg};
use crate::arch::context::id_field;
use crate::arch::stage1;
use core::sync::atomic::{AtomicU64, Ordering};

/// SCTLR_EL2: bits that are one; M, C, I: MMU and caches; SA: the stack pointer is aligned.
const SCTLR: u64 = 0x30c5_0830 | 1 | 1 << 2 | 1 << 3 | 1 << 12;
/// WXN: what is writable is not executable, whatever the tables say.
const SCTLR_WXN: u64 = 1 << 19;
/// SCTLR_EL2 for early boot, when the one block there is must be both.
pub(super) const SCTLR_EARLY: u64 = SCTLR;

/// What a CPU arriving from PSCI loads with its MMU off, in start.S's order: TTBR0, TCR, MAIR, SCTLR.
#[repr(C, align(64))]
pub(super) struct Registers([AtomicU64; 4]);

pub(super) static FINAL: Registers = Registers([const { AtomicU64::new(0) }; 4]);

/// Turns this CPU to the map whose root is at `root`, and notes it for the CPUs to come.
///
/// # Safety
/// The tables map, each at its own address, everything that EL2 uses from now on, this code and this stack
/// included, and are never changed or freed.
pub unsafe fn switch_to(root: u64) {
    let ps = id_field(read_sysreg!("s3_0_c0_c7_0"), 0).min(5);
    let values = [root, stage1::TCR | ps << 16, stage1::MAIR, SCTLR | SCTLR_WXN];
    for (slot, value) in FINAL.0.iter().zip(values) {
        slot.store(value, Ordering::Relaxed);
    }
    let [root, tcr, mair, sctlr] = values;
    // SAFETY: the caller's promise: what we execute and where we stand are mapped the same before and after,
    // with the same attributes, so no barrier between the writes is missing; stale entries of the early map
    // go before the new permissions count.
    unsafe {
        core::arch::asm!(
            "dsb ish",
            "msr mair_el2, {mair}",
            "msr tcr_el2, {tcr}",
            "msr ttbr0_el2, {root}",
            "isb",
            "tlbi alle2",
            "dsb ish",
            "isb",
            "msr sctlr_el2, {sctlr}",
            "isb",
            mair = in(reg) mair,
            tcr = in(reg) tcr,
            root = in(reg) root,
            sctlr = in(reg) sctlr,
            options(nostack, preserves_flags),
        );
    }
    cache::clean((&raw const FINAL).cast(), size_of::<Registers>());
    instruction!("dsb sy");
}
