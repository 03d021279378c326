//! Which CPU this is: TPIDR_EL2 holds its number.

use super::sysreg::read_sysreg;
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// The most CPUs that the hypervisor uses.
pub const MAX_CPUS: usize = 64;

static COUNT: AtomicUsize = AtomicUsize::new(1);
/// Each CPU's affinity. Written at boot before the CPU that reads it starts.
static MPIDR: [AtomicU64; MAX_CPUS] = [const { AtomicU64::new(0) }; MAX_CPUS];

/// This CPU's number, from 0.
pub fn cpu() -> usize {
    usize::try_from(read_sysreg!("tpidr_el2")).unwrap_or(0)
}

/// CPUs that run.
pub fn count() -> usize {
    COUNT.load(Ordering::Relaxed)
}

/// Says, at boot, that CPUs 0 to `count - 1` run.
pub fn set_count(count: usize) {
    COUNT.store(count, Ordering::Relaxed);
}

/// The affinity of a CPU, as MPIDR_EL1 has it.
pub fn mpidr(cpu: usize) -> u64 {
    MPIDR.get(cpu).map_or(0, |mpidr| mpidr.load(Ordering::Relaxed))
}

/// Notes, at boot, the affinity of a CPU.
pub fn set_mpidr(cpu: usize, mpidr: u64) {
    if let Some(slot) = MPIDR.get(cpu) {
        slot.store(mpidr, Ordering::Relaxed);
    }
}

/// This CPU's own affinity, from the CPU.
pub fn own_mpidr() -> u64 {
    read_sysreg!("mpidr_el1")
}
