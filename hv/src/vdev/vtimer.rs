//! The guest's EL1 physical timer, which traps, and when the virtual one fires that nobody runs.
//!
//! Counts are the guest's own: the host's counter less the guest's offset. The line is sampled by
//! [`Vtimer::update`]; the deadline is what the caller has to sample at, and is there only while the line
//! it last saw is low, so that a timer that has fired does not ask again. Used by `guest`, `sched`.

use super::low;
use serde::{Deserialize, Serialize};

const ENABLE: u64 = 1;
const MASKED: u64 = 1 << 1;
const FIRED: u64 = 1 << 2;

/// An EL1 physical timer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
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

/// When a guest's counter is at `at`, in the host's counts. The offset is negative, in two's complement, where the
/// guest's counter is ahead: it was stored by a machine that had run for longer.
pub const fn host_time(at: u64, offset: u64) -> u64 {
    at.saturating_add_signed(offset.cast_signed())
}

/// When a virtual timer (CNTV_CTL, CNTV_CVAL, CNTVOFF) fires, in the host's counts; `None` when it will not.
/// A time in the past when it has fired already.
pub const fn virtual_deadline(control: u64, compare: u64, offset: u64) -> Option<u64> {
    if control & (ENABLE | MASKED) != ENABLE { None } else { Some(host_time(compare, offset)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_follows_the_condition_unless_off_or_masked() {
        let mut timer = Vtimer::new();
        timer.set_compare(100);
        assert!(!timer.update(200), "off");
        timer.set_control(ENABLE);
        assert!(!timer.update(99));
        assert!(timer.update(100));
        assert_eq!(timer.control(100), ENABLE | FIRED);
        timer.set_control(ENABLE | MASKED);
        assert!(!timer.update(100));
        assert_eq!(timer.control(100), ENABLE | MASKED | FIRED, "the status shows although masked");
        timer.set_control(0);
        assert_eq!(timer.control(100), 0);
        timer.set_control(u64::MAX);
        assert_eq!(timer.control(0), ENABLE | MASKED, "status is read-only");
    }

    #[test]
    fn a_timer_value_counts_down_from_now_and_below_zero() {
        let mut timer = Vtimer::new();
        timer.set_value(50, 1000);
        assert_eq!((timer.compare(), timer.value(1000), timer.value(1020)), (1050, 50, 30));
        assert_eq!(timer.value(1051), 0xffff_ffff);
        timer.set_value(0xffff_ffff, 1000);
        assert_eq!(timer.compare(), 999, "signed");
        timer.set_value(0xdead_0000_0005, 1000);
        assert_eq!(timer.compare(), 1005, "32 bits");
        timer.set_value(0x8000_0000, 0);
        assert_eq!(timer.compare(), 0u64.wrapping_sub(1 << 31));
    }

    #[test]
    fn a_timer_that_fired_asks_for_no_more_looks_until_it_is_moved() {
        let mut timer = Vtimer::new();
        timer.set_control(ENABLE);
        timer.set_compare(100);
        assert_eq!(timer.deadline(), Some(100));
        // Time passes between the sample and the question: the deadline stays, though it is past.
        assert!(!timer.update(99));
        assert_eq!(timer.deadline(), Some(100));
        assert!(timer.update(100));
        assert_eq!(timer.deadline(), None);
        timer.set_compare(300);
        assert!(!timer.update(150));
        assert_eq!(timer.deadline(), Some(300));
        timer.set_control(ENABLE | MASKED);
        assert_eq!(timer.deadline(), None);
    }

    #[test]
    fn a_virtual_timer_fires_at_its_comparator_in_the_hosts_time() {
        assert_eq!(virtual_deadline(1, 100, 1000), Some(1100));
        assert_eq!(virtual_deadline(0, 100, 1000), None);
        assert_eq!(virtual_deadline(3, 100, 1000), None);
        assert_eq!(virtual_deadline(5, 100, 1000), Some(1100), "fired already");
        assert_eq!(virtual_deadline(1, u64::MAX, 1000), Some(u64::MAX));
        // A guest that is 900 counts ahead of this host.
        assert_eq!(virtual_deadline(1, 1000, 900_u64.wrapping_neg()), Some(100));
        assert_eq!(virtual_deadline(1, 100, 900_u64.wrapping_neg()), Some(0), "before this host began");
    }
}
