//! Starting CPUs and ending the machine: PSCI, by the conduit that the tree names.
//!
//! At EL2 the firmware is called by SMC. A tree that says HVC means that somebody else is the hypervisor, and
//! then an HVC would come back to us: that is refused.

use crate::platform::Conduit;
use smccc::{Smc, psci};
use vmobject::addr::PhysAddr;

/// Why a CPU did not start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PsciError {
    /// The tree names no PSCI, or one that EL2 cannot call.
    NoConduit,
    /// The firmware's answer.
    Firmware(psci::error::Error),
}

/// Starts the CPU with affinity `cpu` at `entry`, MMU off, `context` in its x0.
pub fn cpu_on(conduit: Option<Conduit>, cpu: u64, entry: PhysAddr, context: u64) -> Result<(), PsciError> {
    match conduit {
        Some(Conduit::Smc) => psci::cpu_on::<Smc>(cpu, entry.bits(), context).map_err(PsciError::Firmware),
        Some(Conduit::Hvc) | None => Err(PsciError::NoConduit),
    }
}

/// Turns the machine off. Returns only if the firmware refuses.
pub fn system_off(conduit: Option<Conduit>) {
    if conduit == Some(Conduit::Smc) {
        // Whatever it answers, we are still here.
        let _ = psci::system_off::<Smc>();
    }
}

/// Resets the machine. Returns only if the firmware refuses.
pub fn system_reset(conduit: Option<Conduit>) {
    if conduit == Some(Conduit::Smc) {
        // Whatever it answers, we are still here.
        let _ = psci::system_reset::<Smc>();
    }
}
