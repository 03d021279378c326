//! The virtual counter and the EL1 timers.

/// Ticks in a second.
pub fn frequency() -> u64 {
    read_register!("cntfrq_el0")
}

/// The virtual counter, not before what precedes.
pub fn now() -> u64 {
    instruction!("isb");
    read_register!("cntvct_el0")
}

/// Ticks in that many milliseconds.
pub fn milliseconds(count: u64) -> u64 {
    frequency() / 1000 * count
}

/// Sets the virtual timer off at `deadline`.
pub fn arm(deadline: u64) {
    write_register!("cntv_cval_el0", deadline);
    write_register!("cntv_ctl_el0", 1);
}

/// Sets the physical timer off in `ticks`.
pub fn arm_physical(ticks: u64) {
    write_register!("cntp_tval_el0", ticks);
    write_register!("cntp_ctl_el0", 1);
}

/// Spins until `done` or for so many milliseconds; true if it was in time.
pub fn wait_until(limit: u64, mut done: impl FnMut() -> bool) -> bool {
    let end = now() + milliseconds(limit);
    loop {
        if done() {
            return true;
        }
        if now() > end {
            // Once more: it may have come while the host was away.
            return done();
        }
        instruction!("yield");
    }
}
