//! Translation caches, which memory does not have here.

/// The TLB of this machine.
#[derive(Clone, Copy, Debug, Default)]
pub struct HardwareTlb;

/// Drops what this CPU caches for the VMID that is loaded, and its instruction cache.
pub fn local_flush_vmid() {}
