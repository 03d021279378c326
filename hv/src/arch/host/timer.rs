//! The clock, which stands still until a test moves it.

use std::cell::Cell;

std::thread_local! {
    static NOW: Cell<u64> = const { Cell::new(0) };
    static DEADLINE: Cell<Option<u64>> = const { Cell::new(None) };
}

/// Ticks since the machine started.
pub fn now() -> u64 {
    NOW.get()
}

/// Ticks a second.
pub fn freq() -> u64 {
    62_500_000
}

/// Asks for the hypervisor's timer interrupt on this CPU at `deadline`.
pub fn arm_host(deadline: u64) {
    DEADLINE.set(Some(deadline));
}

/// Takes that back.
pub fn disarm_host() {
    DEADLINE.set(None);
}

/// Moves this thread's clock.
pub fn set(now: u64) {
    NOW.set(now);
}

/// The deadline that is armed on this thread's CPU.
pub fn armed() -> Option<u64> {
    DEADLINE.get()
}
