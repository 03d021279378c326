//! Every EL2 control register, written whole: one comment a bit that is set, none is ever read-modify-written.
//!
//! The rule (DESIGN 15): what a guest is not given is hidden *and* trapped; what cannot be trapped is shown and
//! switched. `guest::idregs` hides what this file traps. Registers that name translation tables are elsewhere:
//! EL2's own in `stage1`, the guests' in `switch` and, for VTCR, in what `stage2`'s geometry says.

use super::percpu;
use super::sysreg::{instruction, read_sysreg, write_sysreg};
use crate::arch::context::id_field;
use core::sync::atomic::{AtomicU64, Ordering};

/// HCR_EL2 bits that never change.
const HCR_BASE: u64 = 1 << 0 // VM: stage 2 on
    | 1 << 1 // SWIO: DC ISW becomes DC CISW, so a guest cannot throw away what EL2 wrote
    | 1 << 3 // FMO: FIQs come to EL2
    | 1 << 4 // IMO: IRQs come to EL2, and the guest's CPU interface is the virtual one
    | 1 << 5 // AMO: SErrors come to EL2
    | 1 << 9 // FB: a guest's local TLB and I-cache maintenance reaches every CPU that it may have run on
    | 1 << 10 // BSU = inner shareable: likewise its barriers
    | 1 << 16 // TID1: AIDR and REVIDR
    | 1 << 18 // TID3: the ID registers proper
    | 1 << 19 // TSC: SMC
    | 1 << 20 // TIDCP: what the implementer added
    | 1 << 21 // TACR: ACTLR
    | 1 << 22 // TSW: cache maintenance by set and way
    | 1 << 31; // RW: EL1 is AArch64

/// TWI: WFI comes to EL2. Off only where the CPU has nothing else to run.
const HCR_TWI: u64 = 1 << 13;
/// VSE: a virtual SError is pending.
const HCR_VSE: u64 = 1 << 8;
/// TLOR: limited ordering regions, where the CPU has them.
const HCR_TLOR: u64 = 1 << 35;
/// TERR, TEA: error records and synchronous external aborts come to EL2, where the CPU has RAS.
const HCR_RAS: u64 = 1 << 36 | 1 << 37;
/// APK, API: pointer authentication is the guest's; its keys are switched.
const HCR_PAUTH: u64 = 1 << 40 | 1 << 41;
/// TID5: GMID_EL1. With ATA (56) zero, all of memory tagging traps.
const HCR_TID5: u64 = 1 << 58;

/// The part of HCR_EL2 that does not change once the CPU is known.
static HCR_CONST: AtomicU64 = AtomicU64::new(HCR_BASE);
/// VTCR_EL2, and what HCR_EL2 says of stage 2: the same on every CPU, since every tree may run on every CPU.
static VTCR: AtomicU64 = AtomicU64::new(1 << 31);
static HCR_STAGE2: AtomicU64 = AtomicU64::new(0);
/// The part that does, one word a CPU, only written by that CPU.
static HCR_NOW: [AtomicU64; percpu::MAX_CPUS] = [const { AtomicU64::new(HCR_TWI) }; percpu::MAX_CPUS];

/// CPTR_EL2: bits that are one in this format, or trap.
const CPTR: u64 = 0x33ff // RES1, among them TZ (8), which traps SVE, and TSM (12), which traps SME
    | 1 << 20 // TTA: trace registers
    | 1 << 30; // TAM: activity monitors
/// TFP: FP and SIMD.
const CPTR_TFP: u64 = 1 << 10;

/// CPTR_EL2 with FP trapped or not.
pub(super) const fn cptr(trap_fp: bool) -> u64 {
    if trap_fp { CPTR | CPTR_TFP } else { CPTR }
}

/// MDCR_EL2 but for HPMN. E2PB (13:12) and E2TB (25:24) are zero: profiling and trace buffers are EL2's, and
/// a guest's accesses to them trap.
const MDCR: u64 = 1 << 5 // TPMCR: PMCR
    | 1 << 6 // TPM: the other performance monitors
    | 1 << 9 // TDA: breakpoints, watchpoints, MDSCR
    | 1 << 10 // TDOSA: OS lock and double lock
    | 1 << 11 // TDRA: debug ROM addresses
    | 1 << 14 // TPMS: statistical profiling
    | 1 << 17 // HPMD: nothing is counted at EL2
    | 1 << 19 // TTRF: trace filters
    | 1 << 23 // HCCD: nor cycles
    | 1 << 27; // TDCC: the debug communication channel

/// Says, before any CPU's [`init_cpu`], how guests' tables are to be read: VTCR_EL2, and bits of HCR_EL2 (FWB).
pub fn set_stage2(vtcr: u64, hcr: u64) {
    VTCR.store(vtcr, Ordering::Relaxed);
    HCR_STAGE2.store(hcr, Ordering::Relaxed);
}

/// Brings this CPU's EL2 control registers to the state that everything else counts on.
pub fn init_cpu() {
    let pfr0 = read_sysreg!("s3_0_c0_c4_0");
    let pfr1 = read_sysreg!("s3_0_c0_c4_1");
    let dfr0 = read_sysreg!("s3_0_c0_c5_0");
    let mmfr0 = read_sysreg!("s3_0_c0_c7_0");
    let mmfr1 = read_sysreg!("s3_0_c0_c7_1");
    let mmfr3 = read_sysreg!("s3_0_c0_c7_3");
    let ras = id_field(pfr0, 28) != 0;

    let mut hcr = HCR_BASE | HCR_STAGE2.load(Ordering::Relaxed);
    if id_field(mmfr1, 16) != 0 {
        hcr |= HCR_TLOR;
    }
    if ras {
        hcr |= HCR_RAS;
    }
    if super::switch::has_keys() {
        hcr |= HCR_PAUTH;
    }
    if id_field(pfr1, 8) != 0 {
        hcr |= HCR_TID5;
    }
    HCR_CONST.store(hcr, Ordering::Relaxed);
    write_hcr();

    write_sysreg!("vtcr_el2", VTCR.load(Ordering::Relaxed));
    write_sysreg!("vttbr_el2", 0); // nothing runs before load_stage2
    write_sysreg!("cptr_el2", cptr(true));
    // HPMN: all counters to EL1, whose accesses trap anyway; a smaller number would be CONSTRAINED
    // UNPREDICTABLE at zero.
    let hpmn = match id_field(dfr0, 8) {
        0 | 0xf => 0,
        _ => (read_sysreg!("pmcr_el0") >> 11) & 0x1f,
    };
    write_sysreg!("mdcr_el2", MDCR | hpmn);
    // Of AArch32's system registers EL0 can only use those that EL1 lets it: nothing more to trap.
    write_sysreg!("hstr_el2", 0);
    // EL1PCTEN and EL1PCEN zero: the physical counter and timer trap; the virtual ones do not.
    write_sysreg!("cnthctl_el2", 0);
    write_sysreg!("cntvoff_el2", 0);
    write_sysreg!("cnthp_ctl_el2", 0);
    write_sysreg!("cntv_ctl_el0", 0);
    write_sysreg!("cntp_ctl_el0", 0);
    write_sysreg!("vpidr_el2", read_sysreg!("midr_el1"));
    write_sysreg!("vmpidr_el2", read_sysreg!("mpidr_el1"));

    // The OS lock is on out of reset and would silence the guest's debug exceptions; guests' views of both
    // locks are emulated.
    write_sysreg!("oslar_el1", 0);
    write_sysreg!("osdlr_el1", 0);
    write_sysreg!("mdscr_el1", 0);

    if ras {
        write_sysreg!("s3_4_c5_c2_3", 0); // VSESR_EL2: a virtual SError says nothing of itself
        write_sysreg!("s3_4_c12_c1_1", 0); // VDISR_EL2
    }
    init_newer(pfr0, pfr1, dfr0, mmfr0, mmfr1, mmfr3);

    // SRE (0), DFB, DIB (1, 2): system registers, no bypass; Enable (3) stays 0 where it can: EL1's own SRE traps, for a
    // guest that turned it off would leave it so to the next.
    write_sysreg!("s3_4_c12_c9_5", 7); // ICC_SRE_EL2
    instruction!("isb");
    // Where it cannot trap it cannot be turned off either; and as it is out of reset EL1's may be either.
    write_sysreg!("s3_0_c12_c12_5", 7); // ICC_SRE_EL1
    instruction!("isb");
    write_sysreg!("s3_4_c12_c11_0", 0); // ICH_HCR_EL2
    instruction!("isb");
}

/// Registers that came after Armv8.0, each where the CPU has it.
fn init_newer(pfr0: u64, pfr1: u64, dfr0: u64, mmfr0: u64, mmfr1: u64, mmfr3: u64) {
    let dfr = |shift| id_field(dfr0, shift);
    if id_field(mmfr1, 40) != 0 {
        // HCRX_EL2: each feature it covers stays off: 64-byte stores, MOPS, TCR2, SCTLR2, 128-bit
        // descriptors, guarded control stacks, FPMR. TALLINT (6): NMI masking traps where there is NMI.
        write_sysreg!("s3_4_c1_c2_2", if id_field(pfr1, 36) != 0 { 1 << 6 } else { 0 });
    }
    let fgt = id_field(mmfr0, 56);
    if fgt != 0 {
        // Fine-grained traps: zero traps what newer architectures added (bits named nX) and nothing older.
        write_sysreg!("s3_4_c1_c1_4", 0); // HFGRTR_EL2
        write_sysreg!("s3_4_c1_c1_5", 0); // HFGWTR_EL2
        write_sysreg!("s3_4_c1_c1_6", 0); // HFGITR_EL2
        write_sysreg!("s3_4_c3_c1_4", 0); // HDFGRTR_EL2
        write_sysreg!("s3_4_c3_c1_5", 0); // HDFGWTR_EL2
        if id_field(pfr0, 44) != 0 {
            write_sysreg!("s3_4_c3_c1_6", 0); // HAFGRTR_EL2
        }
    }
    if fgt >= 2 {
        write_sysreg!("s3_4_c3_c1_2", 0); // HFGRTR2_EL2
        write_sysreg!("s3_4_c3_c1_3", 0); // HFGWTR2_EL2
        write_sysreg!("s3_4_c3_c1_7", 0); // HFGITR2_EL2
        write_sysreg!("s3_4_c3_c1_0", 0); // HDFGRTR2_EL2
        write_sysreg!("s3_4_c3_c1_1", 0); // HDFGWTR2_EL2
    }
    if id_field(mmfr3, 0) != 0 {
        write_sysreg!("s3_4_c2_c0_3", 0); // TCR2_EL2
    }
    if id_field(mmfr3, 4) != 0 {
        write_sysreg!("s3_4_c1_c0_3", 0); // SCTLR2_EL2
    }
    if dfr(32) != 0 && dfr(32) != 0xf {
        write_sysreg!("s3_4_c9_c9_0", 0); // PMSCR_EL2: no statistical profiling
    }
    if dfr(40) != 0 {
        write_sysreg!("s3_4_c1_c2_1", 0); // TRFCR_EL2: no trace
    }
    if dfr(52) != 0 && dfr(52) != 0xf {
        write_sysreg!("s2_4_c9_c0_0", 0); // BRBCR_EL2: no branch records
    }
    if id_field(pfr0, 40) != 0 || id_field(pfr1, 16) != 0 {
        // MPAM2_EL2: TRAPMPAM0EL1, TRAPMPAM1EL1.
        write_sysreg!("s3_4_c10_c5_0", 1 << 48 | 1 << 49);
        if read_sysreg!("s3_0_c10_c4_4") & (1 << 17) != 0 {
            write_sysreg!("s3_4_c10_c4_0", 1 << 31); // MPAMHCR_EL2: TRAP_MPAMIDR_EL1
        }
    }
}

/// Writes HCR_EL2 from its constant part and this CPU's.
fn write_hcr() {
    let now = HCR_NOW.get(percpu::cpu()).map_or(HCR_TWI, |now| now.load(Ordering::Relaxed));
    write_sysreg!("hcr_el2", HCR_CONST.load(Ordering::Relaxed) | now);
    instruction!("isb");
}

fn set_flag(flag: u64, on: bool) {
    if let Some(now) = HCR_NOW.get(percpu::cpu()) {
        let old = now.load(Ordering::Relaxed);
        let new = if on { old | flag } else { old & !flag };
        now.store(new, Ordering::Relaxed);
        // VSE is written whatever we remember: the CPU clears it when the guest takes the error.
        if new != old || flag == HCR_VSE {
            write_hcr();
        }
    }
}

/// Makes a virtual SError pending for the guest, or takes it back.
pub fn set_virtual_serror(pending: bool) {
    set_flag(HCR_VSE, pending);
}

/// True while a virtual SError that was made pending has not been taken.
pub fn virtual_serror() -> bool {
    read_sysreg!("hcr_el2") & HCR_VSE != 0
}

/// Chooses whether the guest's WFI traps.
pub fn set_twi(trap: bool) {
    set_flag(HCR_TWI, trap);
}
