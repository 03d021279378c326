//! The state of a vCPU that the CPU holds while it runs, and why it stopped.
//!
//! Read [`GuestRegs`] first: it is all that an exit saves. [`El1Context`] moves only when another vCPU
//! comes to the CPU (DESIGN 15), [`FpContext`] when that one touches FP. Field order of the `repr(C)`
//! types is known to the assembly in `aarch64/`; `offset_of!` assertions there keep it honest.

use serde::{Deserialize, Serialize};

/// The general registers of a guest: saved by every exit, loaded by every entry.
#[repr(C, align(16))]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestRegs {
    /// X0 to X30.
    pub x: [u64; 31],
    /// Where it goes on: ELR_EL2.
    pub pc: u64,
    /// Its processor state: SPSR_EL2.
    pub pstate: u64,
}

/// PSTATE of a CPU out of reset: EL1 with its own stack pointer, D, A, I and F masked.
pub const PSTATE_EL1H_MASKED: u64 = 0x3c5;

impl GuestRegs {
    /// Registers of a vCPU about to start at `pc` with `x0`: EL1h, exceptions masked, the rest zero.
    pub const fn starting_at(pc: u64, x0: u64) -> Self {
        let mut x = [0; 31];
        x[0] = x0;
        Self { x, pc, pstate: PSTATE_EL1H_MASKED }
    }

    /// True when they are a guest's on a CPU with or without AArch32 at EL0: its processor state names EL0 or EL1. For
    /// those that were stored: with any other, the return to the guest would be an illegal one and its exception ours.
    pub const fn is_sound(&self, aarch32: bool) -> bool {
        let mode = match self.pstate & 0x1f {
            // EL0t, EL1t, EL1h.
            0b0_0000 | 0b0_0100 | 0b0_0101 => true,
            // AArch32's user mode.
            0b1_0000 => aarch32,
            _ => false,
        };
        mode && self.pstate >> 32 == 0
    }

    /// Register `n` as an instruction operand names it: 31 reads as zero.
    pub fn read(&self, n: usize) -> u64 {
        self.x.get(n).copied().unwrap_or(0)
    }

    /// Sets register `n` as an instruction operand names it: 31 is nowhere.
    pub fn write(&mut self, n: usize, value: u64) {
        if let Some(x) = self.x.get_mut(n) {
            *x = value;
        }
    }
}

/// Why the guest stopped. What the syndrome means is `guest::syndrome`'s business.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trap {
    /// A synchronous exception from EL1 or EL0.
    Sync {
        /// ESR_EL2.
        esr: u64,
        /// FAR_EL2; meaningful only for aborts.
        far: u64,
        /// HPFAR_EL2; meaningful only for stage-2 aborts, and not for all of those (DESIGN 14).
        hpfar: u64,
    },
    /// A physical interrupt waits to be acknowledged.
    Irq,
    /// A physical fast interrupt.
    Fiq,
    /// A physical system error.
    SError {
        /// ESR_EL2.
        esr: u64,
    },
}

impl Trap {
    /// What stands for the syndrome of an interrupt.
    pub const NO_SYNDROME: u64 = u64::MAX;

    /// ESR_EL2, or [`Self::NO_SYNDROME`].
    #[inline]
    pub const fn syndrome(&self) -> u64 {
        match *self {
            Self::Sync { esr, .. } | Self::SError { esr } => esr,
            Self::Irq | Self::Fiq => Self::NO_SYNDROME,
        }
    }
}

/// Declares [`El1Context`] and keeps its fields, their resets and their documentation in one list.
macro_rules! el1_context {
    ($($(#[$doc:meta])* $field:ident = $reset:expr;)*) => {
        /// Every EL1 and EL0 register that one vCPU leaves on the CPU for the next.
        ///
        /// # Invariants
        /// A1. A register that a guest can write without a trap is in this list, in [`FpContext`], in
        /// [`DebugContext`] or among the list registers of the vGIC: otherwise it leaks (I18).
        #[repr(C)]
        #[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
        pub struct El1Context {
            $($(#[$doc])* pub $field: u64,)*
        }

        impl El1Context {
            /// The state of a vCPU out of reset whose affinity is `mpidr`: MMU and caches off.
            pub const fn reset(mpidr: u64) -> Self {
                let mut context = Self { $($field: $reset,)* };
                context.vmpidr = mpidr | MPIDR_RES1;
                context
            }
        }
    };
}

/// Bit 31 of MPIDR_EL1 is one.
const MPIDR_RES1: u64 = 1 << 31;
/// SCTLR_EL1 with everything off that can be off: its bits that are one where nothing else is implemented,
/// little-endian, MMU, caches and alignment checks off.
pub const SCTLR_EL1_RESET: u64 = 0x30d0_0800;

el1_context! {
    /// SCTLR_EL1.
    sctlr = SCTLR_EL1_RESET;
    /// ACTLR_EL1: trapped for writes, never switched by hardware; here for the trap handler.
    actlr = 0;
    /// CPACR_EL1: FP, SVE and SME access.
    cpacr = 0;
    /// TTBR0_EL1.
    ttbr0 = 0;
    /// TTBR1_EL1.
    ttbr1 = 0;
    /// TCR_EL1.
    tcr = 0;
    /// MAIR_EL1.
    mair = 0;
    /// AMAIR_EL1.
    amair = 0;
    /// VBAR_EL1.
    vbar = 0;
    /// CONTEXTIDR_EL1.
    contextidr = 0;
    /// ESR_EL1.
    esr = 0;
    /// FAR_EL1.
    far = 0;
    /// AFSR0_EL1.
    afsr0 = 0;
    /// AFSR1_EL1.
    afsr1 = 0;
    /// PAR_EL1.
    par = 0;
    /// ELR_EL1.
    elr = 0;
    /// SPSR_EL1.
    spsr = 0;
    /// SP_EL0.
    sp_el0 = 0;
    /// SP_EL1.
    sp_el1 = 0;
    /// TPIDR_EL0.
    tpidr_el0 = 0;
    /// TPIDRRO_EL0.
    tpidrro_el0 = 0;
    /// TPIDR_EL1.
    tpidr_el1 = 0;
    /// CSSELR_EL1.
    csselr = 0;
    /// CNTKCTL_EL1.
    cntkctl = 0;
    /// CNTV_CTL_EL0: the guest's virtual timer.
    cntv_ctl = 0;
    /// CNTV_CVAL_EL0.
    cntv_cval = 0;
    /// OSDLR_EL1: trapped; here for the trap handler.
    osdlr = 0;
    /// DISR_EL1, where the CPU has RAS; the guest's view is VDISR_EL2.
    disr = 0;
    /// APIAKeyLo_EL1, where the CPU has pointer authentication; likewise those below.
    apia_lo = 0;
    /// APIAKeyHi_EL1.
    apia_hi = 0;
    /// APIBKeyLo_EL1.
    apib_lo = 0;
    /// APIBKeyHi_EL1.
    apib_hi = 0;
    /// APDAKeyLo_EL1.
    apda_lo = 0;
    /// APDAKeyHi_EL1.
    apda_hi = 0;
    /// APDBKeyLo_EL1.
    apdb_lo = 0;
    /// APDBKeyHi_EL1.
    apdb_hi = 0;
    /// APGAKeyLo_EL1.
    apga_lo = 0;
    /// APGAKeyHi_EL1.
    apga_hi = 0;
    /// VMPIDR_EL2: what the guest reads as MPIDR_EL1.
    vmpidr = 0;
}

/// The FP and SIMD registers.
#[repr(C, align(16))]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FpContext {
    /// Q0 to Q31.
    pub q: [u128; 32],
    /// FPCR.
    pub fpcr: u64,
    /// FPSR.
    pub fpsr: u64,
}

impl FpContext {
    /// All zero: what a vCPU that has not touched FP has.
    pub const ZERO: Self = Self { q: [0; 32], fpcr: 0, fpsr: 0 };
}

impl Default for FpContext {
    fn default() -> Self {
        Self::ZERO
    }
}

/// The most breakpoints, and the most watchpoints, that the architecture allows.
pub const MAX_DEBUG_SLOTS: usize = 16;

/// What a guest may set of DBGBCRn_EL1 and DBGWCRn_EL1: not HMC and SSC, with which a match at EL2 could be asked for.
pub const DEBUG_CONTROL_WRITABLE: u64 = 0x1fff_1fff & !(0b111 << 13);

/// Self-hosted debug registers. All accesses trap (MDCR_EL2.TDA), so memory is always current and a
/// switch only loads; a vCPU that never debugged costs nothing.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct DebugContext {
    /// DBGBVRn_EL1.
    pub bvr: [u64; MAX_DEBUG_SLOTS],
    /// DBGBCRn_EL1.
    pub bcr: [u64; MAX_DEBUG_SLOTS],
    /// DBGWVRn_EL1.
    pub wvr: [u64; MAX_DEBUG_SLOTS],
    /// DBGWCRn_EL1.
    pub wcr: [u64; MAX_DEBUG_SLOTS],
    /// MDSCR_EL1.
    pub mdscr: u64,
    /// MDCCINT_EL1: read back as written, does nothing.
    pub mdccint: u64,
}

impl DebugContext {
    /// True unless it asks for what a guest may not have: a match at EL2. For one that was stored.
    pub fn is_sound(&self) -> bool {
        let controls = self.bcr.iter().chain(&self.wcr);
        controls.fold(0, |all, control| all | control) & !DEBUG_CONTROL_WRITABLE == 0
    }

    /// True when loading it would arm nothing: the hardware may as well hold zeros.
    pub fn is_idle(&self) -> bool {
        let unarmed = |controls: &[u64]| controls.iter().all(|control| control & 1 == 0);
        self.mdscr == 0 && unarmed(&self.bcr) && unarmed(&self.wcr)
    }
}

/// Identification registers as the CPU has them; what a guest sees of them is `guest::sysreg`'s choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct IdRegisters {
    /// MIDR_EL1.
    pub midr: u64,
    /// REVIDR_EL1.
    pub revidr: u64,
    /// AIDR_EL1.
    pub aidr: u64,
    /// CTR_EL0.
    pub ctr: u64,
    /// DCZID_EL0.
    pub dczid: u64,
    /// CLIDR_EL1.
    pub clidr: u64,
    /// ID_AA64PFR0_EL1.
    pub pfr0: u64,
    /// ID_AA64PFR1_EL1.
    pub pfr1: u64,
    /// ID_AA64PFR2_EL1.
    pub pfr2: u64,
    /// ID_AA64ZFR0_EL1.
    pub zfr0: u64,
    /// ID_AA64SMFR0_EL1.
    pub smfr0: u64,
    /// ID_AA64DFR0_EL1.
    pub dfr0: u64,
    /// ID_AA64DFR1_EL1.
    pub dfr1: u64,
    /// ID_AA64ISAR0_EL1.
    pub isar0: u64,
    /// ID_AA64ISAR1_EL1.
    pub isar1: u64,
    /// ID_AA64ISAR2_EL1.
    pub isar2: u64,
    /// ID_AA64ISAR3_EL1.
    pub isar3: u64,
    /// ID_AA64MMFR0_EL1.
    pub mmfr0: u64,
    /// ID_AA64MMFR1_EL1.
    pub mmfr1: u64,
    /// ID_AA64MMFR2_EL1.
    pub mmfr2: u64,
    /// ID_AA64MMFR3_EL1.
    pub mmfr3: u64,
    /// ID_AA64MMFR4_EL1.
    pub mmfr4: u64,
    /// The AArch32 ones, S3_0_C0_C1_0 to S3_0_C0_C3_7: `aarch32[crm - 1][op2]`.
    pub aarch32: [[u64; 8]; 3],
}

/// The four-bit field of an identification register whose lowest bit is `shift`.
pub const fn id_field(register: u64, shift: u32) -> u64 {
    (register >> shift) & 0xf
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn register_31_reads_as_zero_and_swallows_writes() {
        let mut regs = GuestRegs::starting_at(0x4008_0000, 7);
        regs.write(31, 9);
        assert_eq!((regs.read(31), regs.read(0)), (0, 7));
    }

    #[test]
    fn a_reset_vcpu_has_its_own_affinity_and_the_mmu_off() {
        let context = El1Context::reset(3);
        assert_eq!(context.vmpidr, (1 << 31) | 3);
        assert_eq!(context.sctlr & 1, 0);
    }
}
