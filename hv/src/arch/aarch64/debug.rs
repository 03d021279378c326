//! Self-hosted debug registers. Every access of a guest traps, so they are only ever loaded.

use super::sysreg::{read_sysreg, write_sysreg};
use crate::arch::context::{DebugContext, id_field};

/// Breakpoints and watchpoints that the CPU has.
pub fn slots() -> (usize, usize) {
    let dfr0 = read_sysreg!("id_aa64dfr0_el1");
    let count = |shift| id_field(dfr0, shift).min(15).wrapping_add(1);
    let (breakpoints, watchpoints) = (count(12), count(20));
    (usize::try_from(breakpoints).unwrap_or(1), usize::try_from(watchpoints).unwrap_or(1))
}

/// Writes slot `$n` of each kind where the CPU has it.
macro_rules! load_slots {
    ($context:ident, $breakpoints:ident, $watchpoints:ident, $($n:literal)*) => {$(
        if $n < $breakpoints {
            write_sysreg!(concat!("dbgbvr", $n, "_el1"), $context.bvr[$n]);
            write_sysreg!(concat!("dbgbcr", $n, "_el1"), $context.bcr[$n] & EL1_CONTROL);
        }
        if $n < $watchpoints {
            write_sysreg!(concat!("dbgwvr", $n, "_el1"), $context.wvr[$n]);
            write_sysreg!(concat!("dbgwcr", $n, "_el1"), $context.wcr[$n] & EL1_CONTROL);
        }
    )*};
}

/// Everything in a control register but HMC and SSC, with which it would match at EL2 too.
const EL1_CONTROL: u64 = !(1 << 13 | 3 << 14);

/// MDSCR_EL1 bits a guest may set: SS, KDE, MDE. The rest is for external debuggers.
const MDSCR_GUEST: u64 = 1 | 1 << 13 | 1 << 15;

/// Loads a vCPU's debug registers.
pub fn load(context: &DebugContext) {
    write_sysreg!("mdscr_el1", 0);
    let (breakpoints, watchpoints) = slots();
    load_slots!(context, breakpoints, watchpoints, 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);
    write_sysreg!("mdscr_el1", context.mdscr & MDSCR_GUEST);
}
