//! The clock, and the hypervisor's own timer (CNTHP, PPI 26).

use super::sysreg::{instruction, read_sysreg, write_sysreg};

/// Ticks since the machine started.
pub fn now() -> u64 {
    instruction!("isb"); // not speculated before what it shall time
    read_sysreg!("cntpct_el0")
}

/// Ticks a second.
pub fn freq() -> u64 {
    read_sysreg!("cntfrq_el0")
}

/// Asks for the hypervisor's timer interrupt on this CPU at `deadline`.
pub fn arm_host(deadline: u64) {
    write_sysreg!("cnthp_cval_el2", deadline);
    write_sysreg!("cnthp_ctl_el2", 1);
    instruction!("isb");
}

/// Takes that back.
pub fn disarm_host() {
    write_sysreg!("cnthp_ctl_el2", 0);
    instruction!("isb");
}
