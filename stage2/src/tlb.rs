//! What the tables need of the translation caches: instructions by name, and the sequences built of them.
//!
//! The trait is at the level of instructions on purpose: a fake that stays stale until the *right* one comes, in
//! the right order, with the right VMID loaded, finds a missing half that no emulator shows. The sequences
//! follow the Arm ARM, D8.17 "TLB maintenance": IPA invalidates reach stage-2 entries only, so combined entries
//! need the second half (VMALLE1IS).

use vmobject::addr::{Ipa, IpaRange, PhysAddr};

/// Above this many pages one invalidate of the whole VMID is cheaper than one a page.
pub const MAX_SINGLE: u64 = 32;

/// The instructions.
pub trait TlbOps: Send {
    /// DSB ISHST: table writes before are seen by every walker.
    fn dsb_ishst(&self);
    /// DSB ISH: invalidates before are complete on every CPU.
    fn dsb_ish(&self);
    /// DSB NSH: invalidates before are complete on this CPU.
    fn dsb_nsh(&self);
    /// ISB.
    fn isb(&self);
    /// TLBI IPAS2E1IS: stage-2 entries of one page, all levels, of the loaded VMID.
    fn ipas2e1is(&self, at: Ipa);
    /// TLBI VMALLE1IS: stage-1 and combined entries of the loaded VMID.
    fn vmalle1is(&self);
    /// TLBI VMALLS12E1IS: everything of the loaded VMID.
    fn vmalls12e1is(&self);
    /// TLBI VMALLS12E1: everything of the loaded VMID, on this CPU only.
    fn vmalls12e1(&self);
    /// TLBI ALLE1IS: everything of every VMID.
    fn alle1is(&self);
    /// Loads VTTBR_EL2 and synchronises; returns what was loaded. Invalidates act on the loaded VMID.
    fn load_vttbr(&self, vttbr: u64) -> u64;
}

/// The value of VTTBR_EL2 for a root and a VMID.
pub const fn vttbr(root: PhysAddr, vmid: u16) -> u64 {
    (vmid as u64) << 48 | root.bits()
}

/// With `vttbr` loaded, does `work`, then loads what was there before.
fn under<T: TlbOps>(tlb: &T, vttbr: u64, work: impl FnOnce()) {
    let before = tlb.load_vttbr(vttbr);
    work();
    if before != vttbr {
        tlb.load_vttbr(before);
    }
}

/// After leaves of a range were removed or pointed elsewhere: nobody can use the old ones on return.
pub fn invalidate_range<T: TlbOps>(tlb: &T, vttbr: u64, range: IpaRange) {
    under(tlb, vttbr, || {
        tlb.dsb_ishst();
        if range.pages() <= MAX_SINGLE {
            for page in range.iter_pages() {
                tlb.ipas2e1is(page);
            }
            tlb.dsb_ish();
            tlb.vmalle1is();
        } else {
            tlb.vmalls12e1is();
        }
        tlb.dsb_ish();
        tlb.isb();
    });
}

/// After bulk work: everything of the VMID, on every CPU.
pub fn invalidate_guest<T: TlbOps>(tlb: &T, vttbr: u64) {
    under(tlb, vttbr, || {
        tlb.dsb_ishst();
        tlb.vmalls12e1is();
        tlb.dsb_ish();
        tlb.isb();
    });
}

/// This CPU's entries of the VMID: for a fault that the tables do not explain.
pub fn invalidate_local<T: TlbOps>(tlb: &T, vttbr: u64) {
    under(tlb, vttbr, || {
        tlb.vmalls12e1();
        tlb.dsb_nsh();
        tlb.isb();
    });
}

/// Everything of every VMID: at a rollover of VMIDs.
pub fn invalidate_all<T: TlbOps>(tlb: &T) {
    tlb.dsb_ishst();
    tlb.alle1is();
    tlb.dsb_ish();
    tlb.isb();
}
