//! Self-hosted debug registers: all trap, live in memory, and are loaded with the vCPU.
//!
//! Breakpoints and watchpoints work: what the guest writes is in `arch`'s `DebugContext`, whose owner loads it
//! after a change. Everything that belongs to an external debugger answers as if none were there.
//! Called by `sysreg`.

use super::syndrome::SysAccess;
use super::vcpu::Context;
use crate::arch::context::DEBUG_CONTROL_WRITABLE;

/// What an access came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Read: this value.
    Value(u64),
    /// Written, nothing to load.
    Done,
    /// Written, and the hardware must be told.
    Reload,
    /// No such register.
    Undefined,
}

/// OSLSR_EL1: the lock is there (bit 3), and not taken.
const OSLSR_PRESENT: u64 = 1 << 3;
/// OSLSR_EL1: the lock is taken.
const OSLSR_LOCKED: u64 = 1 << 1;
/// What MDSCR_EL1 may hold: single step, kernel debug, monitor debug, no trap of user access.
const MDSCR_WRITABLE: u64 = 1 | 1 << 12 | 1 << 13 | 1 << 15;

/// Accesses a debug register: op0 is 2.
pub fn access(access: SysAccess, value: u64, context: &mut Context, slots: (usize, usize)) -> Outcome {
    let debug = &mut context.debug;
    let (breakpoints, watchpoints) = slots;
    let fixed = |value: u64| if access.read { Outcome::Value(value) } else { Outcome::Done };
    let write_only = if access.read { Outcome::Undefined } else { Outcome::Done };
    let [2, op1, crn, crm, op2] = access.register.parts() else { return Outcome::Undefined };
    match (op1, crn, crm, op2) {
        (0, 0, slot, 4..=7) => {
            let slot = usize::from(slot);
            let (bank, writable, present) = match op2 {
                4 => (&mut debug.bvr, u64::MAX, breakpoints),
                5 => (&mut debug.bcr, DEBUG_CONTROL_WRITABLE, breakpoints),
                6 => (&mut debug.wvr, !0b11, watchpoints),
                _ => (&mut debug.wcr, DEBUG_CONTROL_WRITABLE, watchpoints),
            };
            match bank.get_mut(slot).filter(|_| slot < present) {
                None => Outcome::Undefined,
                Some(register) if access.read => Outcome::Value(*register),
                Some(register) => {
                    *register = value & writable;
                    Outcome::Reload
                }
            }
        }
        (0, 0, 2, 2) if access.read => Outcome::Value(debug.mdscr),
        (0, 0, 2, 2) => {
            debug.mdscr = value & MDSCR_WRITABLE;
            Outcome::Reload
        }
        (0, 0, 2, 0) if access.read => Outcome::Value(debug.mdccint),
        (0, 0, 2, 0) => {
            debug.mdccint = value & (0b11 << 29);
            Outcome::Done
        }
        // OSLAR, OSLSR, OSDLR, DBGPRCR.
        (0, 1, 0, 4) if !access.read => {
            context.os_lock = value & 1 != 0;
            Outcome::Done
        }
        (0, 1, 1, 4) if access.read => {
            Outcome::Value(OSLSR_PRESENT | if context.os_lock { OSLSR_LOCKED } else { 0 })
        }
        (0, 1, 3, 4) if access.read => Outcome::Value(context.el1.osdlr),
        (0, 1, 3, 4) => {
            context.el1.osdlr = value & 1;
            Outcome::Done
        }
        // DBGPRCR, OSDTRRX, OSDTRTX, OSECCR, MDRAR, claim tags, MDCCSR, the data transfer registers: no
        // debugger is there, so they are zero and swallow what is written.
        (0, 1, 4, 4) | (0, 0, 0 | 3 | 6, 2) | (0, 1, 0, 0) | (0, 7, 9, 6) | (3, 0, 1 | 4 | 5, 0) => fixed(0),
        // DBGCLAIMSET reads as all tags that exist.
        (0, 7, 8, 6) => fixed(0xff),
        // DBGAUTHSTATUS: non-secure debug, invasive and not, implemented and enabled.
        (0, 7, 14, 6) if access.read => Outcome::Value(0b1111),
        (0, 1, 0, 4) => write_only,
        _ => Outcome::Undefined,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::syndrome::SysReg;
    use crate::guest::vcpu::Vcpu;

    fn with(test: impl FnOnce(&mut Context)) {
        let mut vcpu = Vcpu::new(0);
        test(vcpu.context.get_mut());
    }
    fn write(context: &mut Context, parts: [u32; 4], value: u64) -> Outcome {
        let register = SysReg::new(2, parts[0], parts[1], parts[2], parts[3]);
        access(SysAccess { register, rt: 0, read: false }, value, context, (6, 4))
    }
    fn read(context: &mut Context, parts: [u32; 4]) -> Outcome {
        let register = SysReg::new(2, parts[0], parts[1], parts[2], parts[3]);
        access(SysAccess { register, rt: 0, read: true }, 0, context, (6, 4))
    }

    #[test]
    fn the_os_lock_is_taken_at_reset_and_can_be_released() {
        with(|context| {
            assert_eq!(read(context, [0, 1, 1, 4]), Outcome::Value(0b1010));
            assert_eq!(write(context, [0, 1, 0, 4], 0), Outcome::Done);
            assert_eq!(read(context, [0, 1, 1, 4]), Outcome::Value(0b1000));
            assert_eq!(read(context, [0, 1, 0, 4]), Outcome::Undefined);
        });
    }

    #[test]
    fn a_breakpoint_keeps_its_value_and_one_that_is_not_there_is_undefined() {
        with(|context| {
            assert_eq!(write(context, [0, 0, 5, 4], 0x1234), Outcome::Reload);
            assert_eq!(read(context, [0, 0, 5, 4]), Outcome::Value(0x1234));
            assert_eq!(write(context, [0, 0, 6, 4], 0x1234), Outcome::Undefined);
            assert_eq!(write(context, [0, 0, 4, 6], 0x1234), Outcome::Undefined);
        });
    }

    #[test]
    fn a_breakpoint_cannot_ask_to_match_el2() {
        with(|context| {
            let _ = write(context, [0, 0, 0, 5], u64::MAX);
            assert_eq!(read(context, [0, 0, 0, 5]), Outcome::Value(0x1fff_1fff & !0xe000));
        });
    }
}
