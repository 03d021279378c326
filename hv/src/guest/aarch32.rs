//! AArch32 at EL0: conditions, instruction lengths, IT blocks, and the few coprocessor registers that trap.
//!
//! Our guests' EL1 is always AArch64, so whatever comes here comes from an application. An instruction
//! whose condition failed may still trap, and then is to be skipped, not done. Called by `exit`.

use super::inject::pstate;
use super::syndrome::{Condition, IL, SysReg, cp32};
use crate::arch::context::GuestRegs;

/// The IT state of an AArch32 processor state: bits 15:10 hold IT[7:2], bits 26:25 IT[1:0].
const fn it_state(from: u64) -> u64 {
    (from >> 8) & 0xfc | (from >> 25) & 0b11
}

const fn with_it_state(to: u64, it: u64) -> u64 {
    let cleared = to & !(0xfc << 8 | 0b11 << 25);
    cleared | (it & 0xfc) << 8 | (it & 0b11) << 25
}

/// True when a condition holds on the flags N, Z, C, V of a processor state.
const fn holds(code: u8, state: u64) -> bool {
    let (n, z) = (state >> 31 & 1 != 0, state >> 30 & 1 != 0);
    let (c, v) = (state >> 29 & 1 != 0, state >> 28 & 1 != 0);
    let base = match code >> 1 {
        0 => z,
        1 => c,
        2 => n,
        3 => v,
        4 => c && !z,
        5 => n == v,
        6 => n == v && !z,
        _ => return true,
    };
    base != (code & 1 != 0)
}

/// True when the trapped instruction was to be executed at all.
pub fn passed(condition: Condition, state: u64) -> bool {
    if state & pstate::AARCH32 == 0 {
        return true;
    }
    let code = match condition.code() {
        Some(code) => code,
        None if state & pstate::THUMB != 0 && it_state(state) != 0 => (it_state(state) >> 4 & 0xf) as u8,
        None => return true,
    };
    holds(code, state)
}

/// Goes on behind the trapped instruction, which counts as executed: a guest that steps through its program takes
/// its step exception next (DDI 0487, "Software Step exceptions": PSTATE.SS is 0 after the step).
#[inline]
pub fn advance(regs: &mut GuestRegs, esr: u64) {
    if regs.pstate & (pstate::AARCH32 | pstate::SS | pstate::BTYPE) == 0 {
        regs.pc = regs.pc.wrapping_add(4);
        return;
    }
    advance_slowly(regs, esr);
}

#[cold]
fn advance_slowly(regs: &mut GuestRegs, esr: u64) {
    regs.pstate &= !pstate::SS;
    if regs.pstate & pstate::AARCH32 == 0 {
        regs.pstate &= !pstate::BTYPE;
        regs.pc = regs.pc.wrapping_add(4);
        return;
    }
    regs.pc = regs.pc.wrapping_add(if esr & IL != 0 { 4 } else { 2 }) & 0xffff_ffff;
    let it = it_state(regs.pstate);
    if regs.pstate & pstate::THUMB != 0 && it != 0 {
        let next = if it & 0b111 == 0 { 0 } else { it & 0b1110_0000 | (it << 1) & 0b1_1111 };
        regs.pstate = with_it_state(regs.pstate, next);
    }
}

/// The system register that a 32-bit coprocessor register is a view of, where one traps for EL0.
pub fn system_register(register: u32) -> Option<SysReg> {
    const CNTP_TVAL: u32 = cp32(0, 14, 2, 0);
    const CNTP_CTL: u32 = cp32(0, 14, 2, 1);
    match register {
        CNTP_TVAL => Some(SysReg::new(3, 3, 14, 2, 0)),
        CNTP_CTL => Some(SysReg::new(3, 3, 14, 2, 1)),
        _ => None,
    }
}

/// Likewise for a 64-bit coprocessor register, by opc1 and CRm.
pub fn system_register_pair(opc1: u8, crm: u8) -> Option<SysReg> {
    match (opc1, crm) {
        (0, 14) => Some(SysReg::new(3, 3, 14, 0, 1)),
        (2, 14) => Some(SysReg::new(3, 3, 14, 2, 2)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::syndrome::Syndrome;

    const USER32: u64 = 0b1_0000;
    const Z: u64 = 1 << 30;

    fn condition(code: u64) -> Condition {
        let Syndrome::Fp(condition) = Syndrome::decode(0x07 << 26 | 1 << 24 | code << 20) else {
            panic!("not FP")
        };
        condition
    }
    fn unsaid() -> Condition {
        let Syndrome::Fp(condition) = Syndrome::decode(0x07 << 26) else { panic!("not FP") };
        condition
    }

    #[test]
    fn an_emulated_instruction_ends_a_software_step_and_a_branchs_type() {
        let mut regs = GuestRegs::starting_at(0x4008_0000, 0);
        regs.pstate |= pstate::SS | pstate::BTYPE;
        let before = regs.pstate;
        advance(&mut regs, IL);
        assert_eq!(regs.pc, 0x4008_0004);
        assert_eq!(regs.pstate, before & !(pstate::SS | pstate::BTYPE));
        // In AArch32 those two bits of the branch's type are bits of IT.
        regs.pstate = USER32 | pstate::SS | pstate::BTYPE;
        advance(&mut regs, IL);
        assert_eq!(regs.pstate, USER32 | pstate::BTYPE);
    }

    #[test]
    fn an_equal_condition_follows_the_zero_flag() {
        assert!(passed(condition(0), USER32 | Z));
        assert!(!passed(condition(0), USER32));
        assert!(!passed(condition(1), USER32 | Z));
        assert!(passed(condition(14), USER32));
        assert!(passed(condition(15), USER32));
    }

    #[test]
    fn inside_an_it_block_the_block_says_the_condition() {
        // ITT EQ: IT = 0000_0100 -> condition EQ.
        let state = with_it_state(USER32 | pstate::THUMB, 0b0000_0100);
        assert!(!passed(unsaid(), state));
        assert!(passed(unsaid(), state | Z));
    }

    #[test]
    fn a_skipped_thumb_instruction_moves_the_it_block_on() {
        let mut regs = GuestRegs::starting_at(0x8000, 0);
        regs.pstate = with_it_state(USER32 | pstate::THUMB, 0b0000_0100);
        advance(&mut regs, 0);
        assert_eq!((regs.pc, it_state(regs.pstate)), (0x8002, 0b0000_1000));
        advance(&mut regs, IL);
        assert_eq!((regs.pc, it_state(regs.pstate)), (0x8006, 0));
    }

    #[test]
    fn an_aarch64_instruction_has_no_condition() {
        assert!(passed(condition(0), 0));
        let mut regs = GuestRegs::starting_at(0x8000, 0);
        advance(&mut regs, 0);
        assert_eq!(regs.pc, 0x8004);
    }
}
