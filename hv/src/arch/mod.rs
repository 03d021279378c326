//! The CPU: every line of assembly and every EL2 register that the hypervisor touches.
//!
//! Two implementations with the same names: `aarch64` on the target, `host` (over plain memory, with
//! knobs for tests) elsewhere, so that everything above compiles and is tested on any machine.
//! [`context`] holds what both speak of: the state of a vCPU, and why it stopped. [`stage1`] builds EL2's own
//! map in memory and runs anywhere; [`setway`] knows which lines a cache has. Nothing here knows guests or devices; `guest` and `sched` call down.

pub mod context;
pub mod setway;
pub mod stage1;

#[cfg(target_os = "none")]
mod aarch64;
#[cfg(target_os = "none")]
pub use aarch64::{
    at, cache, debug, el2, entry, fpsimd, gich, id, irq, mmu, page, percpu, power, switch, timer, tlb,
};

#[cfg(not(target_os = "none"))]
mod host;
#[cfg(not(target_os = "none"))]
pub use host::{at, cache, debug, el2, fpsimd, gich, id, irq, page, percpu, power, switch, timer, tlb};
