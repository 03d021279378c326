//! The guest's EL1 physical timer, which traps, and when the virtual one fires that nobody runs.
//!
//! Counts are the guest's own: the host's counter less the guest's offset. The line is sampled by
//! [`Vtimer::update`]; the deadline is what the caller has to sample at, and is there only while the line
//! it last saw is low, so that a timer that has fired does not ask again. Used by `guest`, `sched`.

use super::low;

const ENABLE: u64 = 1;
const MASKED: u64 = 1 << 1;
const FIRED: u64 = 1 << 2;

/// An EL1 physical timer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Vtimer {
    control: u64,
    compare: u64,
    /// The line as last sampled.
    high: bool,
}

impl Vtimer {
    /// As after reset: off.
    pub const fn new() -> Self {
        Self { control: 0, compare: 0, high: false }
    }

    /// CNTP_CTL_EL0.
    pub const fn control(&self, now: u64) -> u64 {
        if self.control & ENABLE != 0 && now >= self.compare { self.control | FIRED } else { self.control }
    }

    /// Writes CNTP_CTL_EL0.
    pub const fn set_control(&mut self, value: u64) {
        self.control = value & (ENABLE | MASKED);
    }

    /// CNTP_CVAL_EL0.
    pub const fn compare(&self) -> u64 {
        self.compare
    }

    /// Writes CNTP_CVAL_EL0.
    pub const fn set_compare(&mut self, value: u64) {
        self.compare = value;
    }

    /// CNTP_TVAL_EL0.
    pub const fn value(&self, now: u64) -> u64 {
        self.compare.wrapping_sub(now) & 0xffff_ffff
    }

    /// Writes CNTP_TVAL_EL0: so many counts from now, or ago.
    pub const fn set_value(&mut self, value: u64, now: u64) {
        let ticks = low(value).cast_signed() as i64;
        self.compare = now.wrapping_add(ticks.cast_unsigned());
    }

    /// Samples the interrupt line; whether it is high.
    pub const fn update(&mut self, now: u64) -> bool {
        self.high = self.control(now) & (ENABLE | MASKED | FIRED) == ENABLE | FIRED;
        self.high
    }

    /// The count at which the line must be sampled next, if at all.
    pub const fn deadline(&self) -> Option<u64> {
        if self.high || self.control & (ENABLE | MASKED) != ENABLE { None } else { Some(self.compare) }
    }
}

/// When a virtual timer (CNTV_CTL, CNTV_CVAL, CNTVOFF) fires, in the host's counts; `None` when it will not.
/// A time in the past when it has fired already.
pub const fn virtual_deadline(control: u64, compare: u64, offset: u64) -> Option<u64> {
    if control & (ENABLE | MASKED) != ENABLE { None } else { Some(compare.saturating_add(offset)) }
}
