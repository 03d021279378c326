//! Moving a vCPU onto the CPU and off it: guest entry, EL1 registers, stage 2.
//!
//! [`enter`] is the hot path: assembly (switch.S in, vectors.S out) saves and loads general registers only.
//! [`load_el1`] and [`save_el1`] run when another vCPU comes to the CPU (DESIGN 15).
//! Called by `sched`, next to `fpsimd`, `gich` and `debug`, which move the rest.

use super::sysreg::{instruction, read_sysreg, write_sysreg};
use crate::arch::context::{El1Context, GuestRegs, Trap};
use core::mem::{offset_of, size_of};
use vmobject::addr::PhysAddr;

// What switch.S and vectors.S know.
const _: () = assert!(offset_of!(GuestRegs, x) == 0 && offset_of!(GuestRegs, pc) == 248);
const _: () = assert!(offset_of!(GuestRegs, pstate) == 256 && size_of::<GuestRegs>() == 272);

core::arch::global_asm!(include_str!("switch.S"));

unsafe extern "C" {
    /// Runs the guest with the registers behind the pointer; returns the kind of trap.
    fn hv_enter(regs: *mut GuestRegs) -> u64;
}

/// Runs the guest until it traps.
#[inline]
pub fn enter(regs: &mut GuestRegs) -> Trap {
    // SAFETY: the pointer is to registers that we hold exclusively. The guest reaches no memory of ours:
    // its stage 2 is what the last `load_stage2` named, whose contract says so.
    match unsafe { hv_enter(regs) } {
        0 => {
            let (esr, far) = last_fault();
            Trap::Sync { esr, far, hpfar: read_sysreg!("hpfar_el2") }
        }
        1 => Trap::Irq,
        2 => Trap::Fiq,
        _ => Trap::SError { esr: read_sysreg!("esr_el2") },
    }
}

/// ESR and FAR of the synchronous exception that was taken last, of a guest: EL2 itself takes none.
#[inline]
pub fn last_fault() -> (u64, u64) {
    (read_sysreg!("esr_el2"), read_sysreg!("far_el2"))
}

/// Expands to both directions for a list of `field = "register"`.
macro_rules! el1_registers {
    ($($field:ident $name:literal,)*) => {
        fn write_plain(from: &El1Context) {
            $(write_sysreg!($name, from.$field);)*
        }
        fn read_plain(into: &mut El1Context) {
            $(into.$field = read_sysreg!($name);)*
        }
    };
}

// Those that every CPU has. Not here: ACTLR and OSDLR (trapped, in memory only), MDSCR (`debug`), TCR (below).
el1_registers! {
    sctlr "sctlr_el1",
    cpacr "cpacr_el1",
    ttbr0 "ttbr0_el1",
    ttbr1 "ttbr1_el1",
    mair "mair_el1",
    amair "amair_el1",
    vbar "vbar_el1",
    contextidr "contextidr_el1",
    esr "esr_el1",
    far "far_el1",
    afsr0 "afsr0_el1",
    afsr1 "afsr1_el1",
    par "par_el1",
    elr "elr_el1",
    spsr "spsr_el1",
    sp_el0 "sp_el0",
    sp_el1 "sp_el1",
    tpidr_el0 "tpidr_el0",
    tpidrro_el0 "tpidrro_el0",
    tpidr_el1 "tpidr_el1",
    csselr "csselr_el1",
    cntkctl "cntkctl_el1",
    cntv_cval "cntv_cval_el0",
    cntv_ctl "cntv_ctl_el0",
}

/// Expands to both directions for pointer authentication keys, which have no names in the assembler's baseline.
macro_rules! key_registers {
    ($($field:ident $name:literal,)*) => {
        fn write_keys(from: &El1Context) {
            $(write_sysreg!($name, from.$field);)*
        }
        fn read_keys(into: &mut El1Context) {
            $(into.$field = read_sysreg!($name);)*
        }
    };
}

key_registers! {
    apia_lo "s3_0_c2_c1_0",
    apia_hi "s3_0_c2_c1_1",
    apib_lo "s3_0_c2_c1_2",
    apib_hi "s3_0_c2_c1_3",
    apda_lo "s3_0_c2_c2_0",
    apda_hi "s3_0_c2_c2_1",
    apdb_lo "s3_0_c2_c2_2",
    apdb_hi "s3_0_c2_c2_3",
    apga_lo "s3_0_c2_c3_0",
    apga_hi "s3_0_c2_c3_1",
}

/// True when the CPU has pointer authentication, of any kind.
pub(super) fn has_keys() -> bool {
    // ID_AA64ISAR1: APA, API, GPA, GPI; ID_AA64ISAR2: GPA3, APA3.
    read_sysreg!("s3_0_c0_c6_1") & 0xff00_0ff0 != 0 || read_sysreg!("s3_0_c0_c6_2") & 0xff00 != 0
}

/// True when the CPU has RAS, and so a virtual DISR.
pub(super) fn has_ras() -> bool {
    (read_sysreg!("s3_0_c0_c4_0") >> 28) & 0xf != 0
}

/// Loads a vCPU's EL1 registers.
pub fn load_el1(from: &El1Context) {
    write_sysreg!("vmpidr_el2", from.vmpidr);
    if read_sysreg!("tcr_el1") != from.tcr {
        // A write may cost more than it says: an emulator drops its whole TLB, whatever the value. That hides an
        // invalidate that is missing, and is slow; two vCPUs of one guest mostly have the same.
        write_sysreg!("tcr_el1", from.tcr);
    }
    write_plain(from);
    if has_keys() {
        write_keys(from);
    }
    if has_ras() {
        write_sysreg!("s3_4_c12_c1_1", from.disr); // VDISR_EL2
    }
}

/// Stores a vCPU's EL1 registers.
pub fn save_el1(into: &mut El1Context) {
    into.vmpidr = read_sysreg!("vmpidr_el2");
    into.tcr = read_sysreg!("tcr_el1");
    read_plain(into);
    if has_keys() {
        read_keys(into);
    }
    if has_ras() {
        into.disr = read_sysreg!("s3_4_c12_c1_1");
    }
}

/// Names the tables and the VMID that the next guest run translates with.
///
/// # Safety
/// `root` heads a live tree that outlives the run and maps no memory of EL2's, and `vmid` names that tree alone.
pub unsafe fn load_stage2(root: PhysAddr, vmid: u16) {
    instruction!("dsb ishst"); // the walker must see the tables before it sees the root
    write_sysreg!("vttbr_el2", u64::from(vmid) << 48 | root.bits());
    instruction!("isb");
}

/// Sets how far the guest's virtual counter lags the physical one.
pub fn set_cntvoff(offset: u64) {
    write_sysreg!("cntvoff_el2", offset);
}

/// The guest's virtual timer as it stands: CNTV_CTL_EL0 and CNTV_CVAL_EL0.
pub fn virtual_timer() -> (u64, u64) {
    (read_sysreg!("cntv_ctl_el0"), read_sysreg!("cntv_cval_el0"))
}

/// Turns the virtual timer off, so that it cannot interrupt for a vCPU that has left.
pub fn stop_virtual_timer() {
    write_sysreg!("cntv_ctl_el0", 0);
    instruction!("isb");
}
