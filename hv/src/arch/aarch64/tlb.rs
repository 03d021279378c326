//! Translation caches: the instructions behind `stage2`'s promises.

use super::sysreg::instruction;

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
