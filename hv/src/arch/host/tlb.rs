//! Translation caches, which memory does not have here; invalidates are counted.

use std::cell::Cell;

use stage2::tlb::TlbOps;
use vmobject::addr::Ipa;

std::thread_local! {
    static VTTBR: Cell<u64> = const { Cell::new(0) };
    static INVALIDATES: Cell<u64> = const { Cell::new(0) };
}

/// The TLB of this machine.
#[derive(Clone, Copy, Debug, Default)]
pub struct HardwareTlb;

/// Drops what this CPU caches for the VMID that is loaded, and its instruction cache.
pub fn local_flush_vmid() {
    count();
}

/// Drops everything that this CPU caches for the VMID that is loaded, of both stages.
pub fn local_flush_guest() {
    count();
}

/// Invalidates issued so far, by this thread.
pub fn invalidates() -> u64 {
    INVALIDATES.get()
}

fn count() {
    INVALIDATES.set(INVALIDATES.get().saturating_add(1));
}

impl TlbOps for HardwareTlb {
    fn dsb_ishst(&self) {}
    fn dsb_ish(&self) {}
    fn dsb_nsh(&self) {}
    fn isb(&self) {}
    fn ipas2e1is(&self, _at: Ipa) {
        count();
    }
    fn vmalle1is(&self) {
        count();
    }
    fn vmalls12e1is(&self) {
        count();
    }
    fn vmalls12e1(&self) {
        count();
    }
    fn alle1is(&self) {
        count();
    }
    fn load_vttbr(&self, vttbr: u64) -> u64 {
        VTTBR.replace(vttbr)
    }
}
