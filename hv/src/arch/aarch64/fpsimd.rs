//! FP and SIMD registers, moved by assembly because the rest of EL2 is built without them.

use super::el2;
use super::sysreg::{instruction, write_sysreg};
use crate::arch::context::FpContext;
use core::mem::offset_of;

const _: () = assert!(offset_of!(FpContext, fpcr) == 512 && offset_of!(FpContext, fpsr) == 520);

core::arch::global_asm!(include_str!("fpsimd.S"));

unsafe extern "C" {
    /// Stores q0 to q31, FPCR and FPSR at the pointer.
    fn hv_fp_save(into: *mut FpContext);
    /// Loads them from the pointer.
    fn hv_fp_load(from: *const FpContext);
}

/// Stores the FP registers. The trap must be off: see [`trap`].
pub fn save(into: &mut FpContext) {
    // SAFETY: the pointer is to a whole FpContext that we hold exclusively.
    unsafe { hv_fp_save(into) }
}

/// Loads the FP registers. The trap must be off: see [`trap`].
pub fn load(from: &FpContext) {
    // SAFETY: the pointer is to a whole FpContext; EL2 itself keeps nothing in these registers.
    unsafe { hv_fp_load(from) }
}

/// Chooses whether the guest's first FP instruction traps. It traps at EL2 too: [`save`] and [`load`] come
/// after `trap(false)`.
pub fn trap(on: bool) {
    write_sysreg!("cptr_el2", el2::cptr(on));
    instruction!("isb");
}
