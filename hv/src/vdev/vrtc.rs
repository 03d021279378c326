//! The clock: a PL031, which counts seconds and raises its line at one of them.
//!
//! The caller passes the guest's counter in; the clock keeps the second that a counter of zero stands for. The
//! counter of a guest that goes on from a snapshot goes on from there too; its clock does not stand still
//! meanwhile: [`Vrtc::skip`].
//! Used by `guest`.

use super::{low, primecell_id};
use serde::{Deserialize, Serialize};

const DR: u64 = 0x00;
const MR: u64 = 0x04;
const LR: u64 = 0x08;
const CR: u64 = 0x0c;
const IMSC: u64 = 0x10;
const RIS: u64 = 0x14;
const MIS: u64 = 0x18;
const ICR: u64 = 0x1c;

const ID: [u8; 8] = [0x31, 0x10, 0x14, 0x00, 0x0d, 0xf0, 0x05, 0xb1];

/// A clock.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Vrtc {
    /// Counts per second; not zero.
    frequency: u64,
    /// The second at a count of zero.
    base: u32,
    /// Counts that went by while the counter stood still.
    skipped: u64,
    loaded: u32,
    /// The second of the alarm.
    alarm: u32,
    mask: bool,
    raised: bool,
    /// The alarm can still happen: it lies ahead.
    armed: bool,
}

impl Vrtc {
    /// A clock that shows `seconds` (since 1970) when the counter, of `frequency` Hz, is zero.
    pub const fn new(frequency: u64, seconds: u32) -> Self {
        let frequency = if frequency == 0 { 1 } else { frequency };
        Self {
            frequency,
            base: seconds,
            skipped: 0,
            loaded: seconds,
            alarm: 0,
            mask: false,
            raised: false,
            armed: false,
        }
    }

    /// Counts per second.
    pub const fn frequency(&self) -> u64 {
        self.frequency
    }

    /// So many counts went by that the guest's counter will not show.
    pub const fn skip(&mut self, counts: u64) {
        self.skipped = self.skipped.saturating_add(counts);
    }

    /// Whole seconds since a counter of zero.
    const fn elapsed(&self, now: u64) -> u32 {
        low(now.saturating_add(self.skipped) / self.frequency)
    }

    const fn seconds(&self, now: u64) -> u32 {
        self.base.wrapping_add(self.elapsed(now))
    }

    /// Reads the register at `offset` when the counter is at `now`.
    pub fn read(&mut self, offset: u64, now: u64) -> u64 {
        self.update(now);
        match offset {
            DR => u64::from(self.seconds(now)),
            MR => u64::from(self.alarm),
            LR => u64::from(self.loaded),
            CR => 1,
            IMSC => u64::from(self.mask),
            RIS => u64::from(self.raised),
            MIS => u64::from(self.raised && self.mask),
            0xfe0..=0xfff => primecell_id(&ID, offset),
            _ => 0,
        }
    }

    /// Writes the register at `offset` when the counter is at `now`.
    pub fn write(&mut self, offset: u64, value: u64, now: u64) {
        self.update(now);
        let value = low(value);
        match offset {
            MR => {
                self.alarm = value;
                self.arm(now);
            }
            LR => {
                self.loaded = value;
                self.base = value.wrapping_sub(self.elapsed(now));
                self.arm(now);
            }
            IMSC => self.mask = value & 1 != 0,
            ICR if value & 1 != 0 => self.raised = false,
            _ => {}
        }
    }

    fn arm(&mut self, now: u64) {
        let ahead = self.alarm.wrapping_sub(self.seconds(now));
        if ahead == 0 {
            self.raised = true;
        }
        // Half the range is ahead, half is behind: a second that has passed comes again in 136 years.
        self.armed = ahead != 0 && ahead < 1 << 31;
    }

    /// Lets time come to `now`; whether the interrupt line is high.
    pub fn update(&mut self, now: u64) -> bool {
        if self.comes().is_some_and(|at| at <= now) {
            self.armed = false;
            self.raised = true;
        }
        self.level()
    }

    /// Whether the interrupt line is high.
    pub const fn level(&self) -> bool {
        self.raised && self.mask
    }

    /// The count at which the line rises by itself, if it will.
    pub fn deadline(&self) -> Option<u64> {
        self.comes().filter(|_| self.mask)
    }

    /// The count at which the alarm comes, if it is still to come: one answer for [`Self::update`] and for who asks when
    /// to call it, or a clock with odd numbers would be due for ever.
    fn comes(&self) -> Option<u64> {
        if !self.armed {
            return None;
        }
        let at = u64::from(self.alarm.wrapping_sub(self.base)).checked_mul(self.frequency)?;
        Some(at.saturating_sub(self.skipped))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HZ: u64 = 1000;

    #[test]
    fn it_goes_on_while_the_guests_counter_stands_still() {
        let mut rtc = Vrtc::new(HZ, 100);
        rtc.write(IMSC, 1, 0);
        rtc.write(MR, 130, 0);
        // A snapshot at 10.5 s, gone on from twice: after 5.5 s, then 2 s after 4 more of its own.
        rtc.skip(5 * HZ + HZ / 2);
        assert_eq!(rtc.read(DR, 10 * HZ + HZ / 2), 116);
        rtc.skip(2 * HZ);
        assert_eq!(rtc.read(DR, 14 * HZ + HZ / 2), 122);
        assert_eq!(rtc.deadline(), Some(22 * HZ + HZ / 2));
        assert!(!rtc.update(22 * HZ + HZ / 2 - 1));
        assert!(rtc.update(22 * HZ + HZ / 2));
        // What the guest sets holds from then on.
        rtc.write(LR, 7, 30 * HZ);
        assert_eq!((rtc.read(DR, 30 * HZ), rtc.read(DR, 32 * HZ)), (7, 9));
        // An alarm of the time between has come, and asks for the host's timer no more.
        rtc.write(MR, 12, 32 * HZ);
        rtc.write(ICR, 1, 32 * HZ);
        rtc.skip(100 * HZ);
        assert_eq!(rtc.deadline(), Some(0));
        assert!(rtc.update(32 * HZ));
        assert_eq!(rtc.deadline(), None);
        // Nobody waits that long, but nothing breaks.
        rtc.skip(u64::MAX);
        rtc.read(DR, u64::MAX);
    }

    #[test]
    fn it_shows_the_time_and_can_be_set() {
        let mut rtc = Vrtc::new(HZ, 1_700_000_000);
        assert_eq!(rtc.read(DR, 0), 1_700_000_000);
        assert_eq!(rtc.read(DR, 10 * HZ + 999), 1_700_000_010);
        rtc.write(LR, 5, 20 * HZ);
        assert_eq!((rtc.read(DR, 20 * HZ), rtc.read(DR, 23 * HZ), rtc.read(LR, 0)), (5, 8, 5));
        assert_eq!(rtc.read(CR, 0), 1);
    }

    #[test]
    fn an_alarm_raises_the_line_at_its_second_and_not_before() {
        let mut rtc = Vrtc::new(HZ, 100);
        rtc.write(MR, 105, 0);
        assert_eq!(rtc.deadline(), None, "masked");
        rtc.write(IMSC, 1, 0);
        assert_eq!(rtc.deadline(), Some(5 * HZ));
        assert!(!rtc.update(5 * HZ - 1));
        assert!(rtc.update(5 * HZ));
        assert_eq!(rtc.deadline(), None);
        assert_eq!(rtc.read(MIS, 6 * HZ), 1);
        rtc.write(ICR, 1, 6 * HZ);
        assert!(!rtc.update(7 * HZ), "once");
    }

    #[test]
    fn an_alarm_that_was_jumped_over_still_comes() {
        let mut rtc = Vrtc::new(HZ, u32::MAX - 1);
        rtc.write(MR, 3, 0);
        rtc.write(IMSC, 1, 0);
        assert_eq!(rtc.deadline(), Some(5 * HZ), "across the wrap");
        assert!(rtc.update(100 * HZ));
        rtc.write(ICR, 1, 100 * HZ);
        rtc.write(MR, 3, 100 * HZ);
        assert!(!rtc.update(200 * HZ), "a second that has passed does not come");
        assert_eq!(rtc.deadline(), None);
    }

    #[test]
    fn a_clock_with_any_numbers_is_looked_at_once_for_an_alarm_that_is_due() {
        // More seconds than the clock can show, as only an image could have them: the alarm lies ahead of what it shows.
        let mut rtc = Vrtc::new(HZ, 100);
        rtc.skip((7 << 32) * HZ);
        rtc.write(IMSC, 1, 0);
        rtc.write(MR, 110, 0);
        let due = rtc.deadline().unwrap();
        let _ = rtc.update(due);
        assert_eq!(rtc.deadline(), None);
    }

    #[test]
    fn an_alarm_for_this_second_is_now() {
        let mut rtc = Vrtc::new(HZ, 100);
        rtc.write(IMSC, 1, 0);
        rtc.write(MR, 100, 500);
        assert!(rtc.level());
    }

    #[test]
    fn identification_is_that_of_a_pl031() {
        let mut rtc = Vrtc::new(0, 0);
        let id = (0..8).fold(0, |id, n| id | rtc.read(0xfe0 + 4 * n, 0) << (8 * n));
        assert_eq!(id & 0x000f_ffff, 0x41031);
        assert_eq!(id >> 32, 0xb105_f00d);
        assert_eq!((rtc.read(0x100, 0), rtc.read(u64::MAX, u64::MAX)), (0, 0));
        rtc.write(u64::MAX, u64::MAX, u64::MAX);
    }

    #[test]
    fn any_order_of_writes_at_any_time_does_not_panic() {
        let mut rtc = Vrtc::new(3, 7);
        let mut seed = 1u64;
        for _ in 0..100_000 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let now = seed.rotate_left(17) >> (seed & 63);
            rtc.write(seed >> 32 & 0x1c, seed, now);
            let now = now.wrapping_add(seed >> 50);
            rtc.update(now);
            assert!(rtc.deadline().is_none_or(|at| at > now), "it is due, and it was looked at");
        }
    }
}
