//! Which CPU this is.

use std::cell::Cell;

/// The most CPUs that the hypervisor uses.
pub const MAX_CPUS: usize = 64;

std::thread_local! {
    static CPU: Cell<usize> = const { Cell::new(0) };
    static COUNT: Cell<usize> = const { Cell::new(1) };
}

/// This CPU's number, from 0.
pub fn cpu() -> usize {
    CPU.get()
}

/// CPUs that run.
pub fn count() -> usize {
    COUNT.get()
}

/// Makes this thread CPU `cpu` of `count`.
pub fn set(cpu: usize, count: usize) {
    CPU.set(cpu);
    COUNT.set(count);
}
