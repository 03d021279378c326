//! The CPU interface of the interrupt controller, as EL2 uses it.
//!
//! EOImode is 1: [`eoi`] drops the priority, [`deactivate`] ends the active state, so that an interrupt can
//! be handed to a guest, whose own end of interrupt then ends the physical one. `board` sets that up.

use super::percpu;
use super::sysreg::{instruction, read_sysreg, write_sysreg};

/// What [`ack`] answers when nothing is pending.
pub const SPURIOUS: u32 = 1023;

/// Acknowledges the most urgent interrupt; [`SPURIOUS`] when there is none.
pub fn ack() -> u32 {
    let intid = read_sysreg!("s3_0_c12_c12_0"); // ICC_IAR1_EL1
    instruction!("dsb sy");
    u32::try_from(intid & 0xff_ffff).unwrap_or(SPURIOUS)
}

/// Drops the running priority; the interrupt stays active until [`deactivate`].
pub fn eoi(intid: u32) {
    write_sysreg!("s3_0_c12_c12_1", u64::from(intid)); // ICC_EOIR1_EL1
    instruction!("isb");
}

/// Ends an interrupt's active state.
pub fn deactivate(intid: u32) {
    write_sysreg!("s3_0_c12_c11_1", u64::from(intid)); // ICC_DIR_EL1
    instruction!("isb");
}

/// Makes another CPU leave its guest or its sleep and look around: SGI 0.
pub fn kick(cpu: usize) {
    let mpidr = percpu::mpidr(cpu);
    let aff = |shift: u32| (mpidr >> shift) & 0xff;
    let target = aff(0);
    let value = aff(32) << 48 | aff(16) << 32 | aff(8) << 16 | (target >> 4) << 44 | 1 << (target & 0xf);
    instruction!("dsb ish"); // what we wrote for it to find comes first
    write_sysreg!("s3_0_c12_c11_5", value); // ICC_SGI1R_EL1
    instruction!("isb");
}

/// True when an interrupt is pending for this CPU: IRQs stay masked at EL2, so nothing takes it.
pub fn is_pending() -> bool {
    read_sysreg!("isr_el1") & (1 << 7) != 0
}

/// Waits until an interrupt is pending, masked or not.
pub fn wait_for_interrupt() {
    instruction!("dsb sy");
    instruction!("wfi");
}
