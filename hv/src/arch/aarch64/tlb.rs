//! Translation caches: the instructions behind `stage2`'s promises.

use core::sync::atomic::{AtomicU64, Ordering};

use super::sysreg::{instruction, read_sysreg, write_sysreg};
use stage2::tlb::{RangeOperand, TlbOps};
use vmobject::addr::{Ipa, PAGE_SHIFT};

/// Invalidates of every kind, by all CPUs.
static INVALIDATES: AtomicU64 = AtomicU64::new(0);

/// Invalidates issued so far, by all CPUs, but for those of a CPU that takes another vCPU of the same guest.
pub fn invalidates() -> u64 {
    INVALIDATES.load(Ordering::Relaxed)
}

#[inline]
fn count() {
    INVALIDATES.fetch_add(1, Ordering::Relaxed);
}

/// The TLB of this machine.
#[derive(Clone, Copy, Debug, Default)]
pub struct HardwareTlb;

/// Drops what this CPU caches for the VMID that is loaded, and its instruction cache: another vCPU of the same
/// guest ran here last, and its ASIDs mean something else (DESIGN 16).
pub fn local_flush_vmid() {
    instruction!("tlbi vmalle1");
    instruction!("ic iallu");
    instruction!("dsb nsh");
    instruction!("isb");
}

/// Drops everything that this CPU caches for the VMID that is loaded, of both stages.
pub fn local_flush_guest() {
    HardwareTlb.vmalls12e1();
    HardwareTlb.dsb_nsh();
    HardwareTlb.isb();
}

impl TlbOps for HardwareTlb {
    fn dsb_ishst(&self) {
        instruction!("dsb ishst");
    }
    fn dsb_ish(&self) {
        instruction!("dsb ish");
    }
    fn dsb_nsh(&self) {
        instruction!("dsb nsh");
    }
    fn isb(&self) {
        instruction!("isb");
    }
    fn ipas2e1is(&self, at: Ipa) {
        count();
        instruction!("tlbi ipas2e1is", at.bits() >> PAGE_SHIFT);
    }
    fn ripas2e1is(&self, range: RangeOperand) {
        // TLBI RIPAS2E1IS, newer than the assembler's baseline.
        count();
        instruction!("sys #4, c8, c0, #2", range.bits());
    }
    fn vmalle1is(&self) {
        count();
        instruction!("tlbi vmalle1is");
    }
    fn vmalls12e1is(&self) {
        count();
        instruction!("tlbi vmalls12e1is");
    }
    fn vmalls12e1(&self) {
        count();
        instruction!("tlbi vmalls12e1");
    }
    fn alle1is(&self) {
        count();
        instruction!("tlbi alle1is");
    }
    fn load_vttbr(&self, vttbr: u64) -> u64 {
        let before = read_sysreg!("vttbr_el2");
        if before != vttbr {
            write_sysreg!("vttbr_el2", vttbr);
            instruction!("isb");
        }
        before
    }
}
