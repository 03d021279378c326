//! Exceptions given to a guest: what the hardware does on an entry to EL1, done by hand.
//!
//! [`take`] is the whole of it: from the interrupted state to the state at the vector. It works on the
//! saved context; whoever has the vCPU's EL1 registers loaded saves them before and loads them after,
//! which is dear and does not matter: a guest that gets an exception from us did something rare.
//! Called by `exit`, `memory`, `mmio`, `sysreg`.

use super::syndrome::{IL, class};
use crate::arch::context::{El1Context, GuestRegs};

/// `PSTATE` bits as `SPSR_ELx` holds them.
pub mod pstate {
    /// EL1 on its own stack pointer.
    pub const EL1H: u64 = 0b0101;
    /// The mode field.
    pub const MODE: u64 = 0b1111;
    /// AArch32.
    pub const AARCH32: u64 = 1 << 4;
    /// Thumb, in AArch32.
    pub const THUMB: u64 = 1 << 5;
    /// All of D, A, I and F masked.
    pub const DAIF: u64 = 0b1111 << 6;
    /// IRQ masked.
    pub const IRQ: u64 = 1 << 7;
    /// FIQ masked.
    pub const FIQ: u64 = 1 << 6;
    /// In AArch64, the kind of branch that led here.
    pub const BTYPE: u64 = 0b11 << 10;
    /// Software step: the next instruction is executed before the step exception.
    pub const SS: u64 = 1 << 21;
    /// Speculative store bypass is safe.
    pub const SSBS: u64 = 1 << 12;
    /// Privileged access never.
    pub const PAN: u64 = 1 << 22;
    /// Data-independent timing.
    pub const DIT: u64 = 1 << 24;
    /// The condition flags.
    pub const NZCV: u64 = 0b1111 << 28;
    /// How a vCPU starts: EL1h, everything masked.
    pub const RESET: u64 = EL1H | DAIF;
}

/// `SCTLR_EL1.SPAN`: an exception leaves PAN alone.
const SCTLR_SPAN: u64 = 1 << 23;
/// `SCTLR_EL1.DSSBS`: SSBS on an exception.
const SCTLR_DSSBS: u64 = 1 << 44;

/// Why the guest gets an exception.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exception {
    /// The instruction is UNDEFINED.
    Undefined,
    /// Illegal execution state.
    IllegalState,
    /// A synchronous external abort on an instruction fetch; true when on the guest's table walk.
    FetchAbort {
        /// The faulting address.
        far: u64,
        /// True when it was the guest's own walk.
        walk: bool,
    },
    /// A synchronous external abort on a load or store.
    DataAbort {
        /// The faulting address.
        far: u64,
        /// True when it was the guest's own walk.
        walk: bool,
        /// What the syndrome's write bit said.
        wnr: bool,
        /// What the syndrome's maintenance bit said.
        maintenance: bool,
    },
    /// A permission fault on a load or store: mapped, but not for this.
    Denied {
        /// The faulting address.
        far: u64,
        /// True for an instruction fetch.
        fetch: bool,
        /// What the syndrome's write bit said.
        wnr: bool,
    },
    /// An abort that is the guest's own, with the hardware's status code.
    Passed {
        /// The faulting address.
        far: u64,
        /// The syndrome as EL2 got it.
        esr: u64,
    },
}

/// External abort, not on a walk.
const FSC_EXTERNAL: u64 = 0x10;
/// External abort on a walk, level 3: the level is not told us, the last is as good as any.
const FSC_EXTERNAL_WALK: u64 = 0x17;
/// Permission fault, level 3.
const FSC_PERMISSION: u64 = 0x0f;

fn syndrome(exception: Exception, from_el0: bool) -> (u64, Option<u64>) {
    let with_class = |class: u8, iss: u64| u64::from(class) << 26 | IL | iss;
    let data = if from_el0 { class::DABT_LOWER } else { class::DABT_SAME };
    let fetch = if from_el0 { class::IABT_LOWER } else { class::IABT_SAME };
    let external = |walk: bool| if walk { FSC_EXTERNAL_WALK } else { FSC_EXTERNAL };
    match exception {
        Exception::Undefined => (with_class(class::UNKNOWN, 0), None),
        Exception::IllegalState => (with_class(class::ILLEGAL, 0), None),
        Exception::FetchAbort { far, walk } => (with_class(fetch, external(walk)), Some(far)),
        Exception::DataAbort { far, walk, wnr, maintenance } => {
            let iss = external(walk) | u64::from(wnr) << 6 | u64::from(maintenance) << 8;
            (with_class(data, iss), Some(far))
        }
        Exception::Denied { far, fetch: true, .. } => (with_class(fetch, FSC_PERMISSION), Some(far)),
        Exception::Denied { far, fetch: false, wnr } => {
            (with_class(data, FSC_PERMISSION | u64::from(wnr) << 6), Some(far))
        }
        Exception::Passed { far, esr } => {
            // The class becomes "same level" for EL1, the walk bit is stage 2's and goes.
            let fetched =
                matches!(super::syndrome::Syndrome::class(esr), class::IABT_LOWER | class::IABT_SAME);
            let iss = esr & 0x17f; // status code, write, maintenance
            (with_class(if fetched { fetch } else { data }, iss), Some(far))
        }
    }
}

/// Where in the vector table an exception from `from` enters; `kind` is 0 for synchronous.
const fn vector(from: u64) -> u64 {
    if from & pstate::AARCH32 != 0 {
        0x600
    } else {
        match from & pstate::MODE {
            0b0000 => 0x400,
            0b0100 => 0x000,
            _ => 0x200,
        }
    }
}

/// `PSTATE` at the vector: DDI 0487, "Process state, PSTATE, on an exception".
const fn entered(from: u64, sctlr: u64) -> u64 {
    let mut to = pstate::EL1H | pstate::DAIF | from & (pstate::NZCV | pstate::DIT | pstate::PAN);
    if sctlr & SCTLR_SPAN == 0 {
        to |= pstate::PAN;
    }
    if sctlr & SCTLR_DSSBS != 0 {
        to |= pstate::SSBS;
    }
    to
}

/// What this CPU has, as far as it changes an entry: bits that do not exist stay zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features {
    /// FEAT_PAN.
    pub pan: bool,
    /// FEAT_SSBS.
    pub ssbs: bool,
    /// FEAT_DIT.
    pub dit: bool,
}

impl Features {
    const fn mask(self) -> u64 {
        let mut gone = 0;
        if !self.pan {
            gone |= pstate::PAN;
        }
        if !self.ssbs {
            gone |= pstate::SSBS;
        }
        if !self.dit {
            gone |= pstate::DIT;
        }
        !gone
    }
}

/// Gives the guest an exception: it goes on at its vector.
pub fn take(regs: &mut GuestRegs, el1: &mut El1Context, exception: Exception, features: Features) {
    let from = regs.pstate;
    let from_el0 = from & pstate::AARCH32 != 0 || from & pstate::MODE == 0;
    let (esr, far) = syndrome(exception, from_el0);
    el1.esr = esr;
    if let Some(far) = far {
        el1.far = far;
    }
    el1.elr = regs.pc;
    el1.spsr = from;
    regs.pc = el1.vbar.wrapping_add(vector(from));
    regs.pstate = entered(from, el1.sctlr) & features.mask();
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Features = Features { pan: true, ssbs: true, dit: true };

    fn guest(from: u64) -> (GuestRegs, El1Context) {
        let mut regs = GuestRegs::starting_at(0, 0);
        let mut el1 = El1Context::reset(0);
        regs.pc = 0x4008_0000;
        regs.pstate = from;
        el1.vbar = 0xffff_0000_0000_0800;
        (regs, el1)
    }

    #[test]
    fn an_undefined_instruction_at_el1_enters_the_current_level_vector() {
        let (mut regs, mut el1) = guest(0x6000_0005);
        take(&mut regs, &mut el1, Exception::Undefined, ALL);
        assert_eq!(regs.pc, 0xffff_0000_0000_0a00);
        assert_eq!(el1.elr, 0x4008_0000);
        assert_eq!(el1.spsr, 0x6000_0005);
        assert_eq!(el1.esr, 1 << 25);
        assert_eq!(regs.pstate & 0x3cf, 0x3c5);
        assert_eq!(regs.pstate >> 28, 6);
    }

    #[test]
    fn each_origin_has_its_own_vector() {
        assert_eq!(vector(0b0000), 0x400);
        assert_eq!(vector(0b0100), 0x000);
        assert_eq!(vector(0b0101), 0x200);
        assert_eq!(vector(0b1_0000), 0x600);
    }

    #[test]
    fn pan_is_set_unless_span_says_to_leave_it() {
        assert_ne!(entered(0, 0) & pstate::PAN, 0);
        assert_eq!(entered(0, SCTLR_SPAN) & pstate::PAN, 0);
        assert_ne!(entered(pstate::PAN, SCTLR_SPAN) & pstate::PAN, 0);
        assert_ne!(entered(0, SCTLR_DSSBS) & pstate::SSBS, 0);
        assert_eq!(entered(pstate::SSBS, 0) & pstate::SSBS, 0);
    }

    #[test]
    fn bits_that_the_cpu_does_not_have_stay_zero() {
        let (mut regs, mut el1) = guest(0);
        el1.sctlr = SCTLR_DSSBS;
        take(&mut regs, &mut el1, Exception::Undefined, Features::default());
        assert_eq!(regs.pstate, pstate::RESET);
    }

    #[test]
    fn an_external_abort_tells_its_address_and_where_it_came_from() {
        let (mut regs, mut el1) = guest(0);
        let abort = Exception::DataAbort { far: 0x1234, walk: false, wnr: true, maintenance: false };
        take(&mut regs, &mut el1, abort, ALL);
        assert_eq!(el1.far, 0x1234);
        assert_eq!(el1.esr, 0x24 << 26 | IL | 1 << 6 | 0x10);
        let (mut regs, mut el1) = guest(5);
        take(&mut regs, &mut el1, Exception::FetchAbort { far: 8, walk: true }, ALL);
        assert_eq!(el1.esr, 0x21 << 26 | IL | 0x17);
    }
}
