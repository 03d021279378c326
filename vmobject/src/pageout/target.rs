//! How much memory pageout tries to keep free, and what it does next about it.
//!
//! It starts when fewer frames are free than `low` and goes on until `high` are; pages on their way out count
//! as free already. The reserve below both is what tables and the last transfers live on: guests' pages leave
//! it alone. Called by `pageout`.

use core::sync::atomic::{AtomicU32, Ordering::Relaxed};

use crate::limits::CLUSTER_PAGES;
use crate::page::QueueLengths;

/// The marks.
#[derive(Debug)]
pub(super) struct Target {
    low: AtomicU32,
    high: AtomicU32,
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Nothing: there is enough.
    Rest,
    /// See which of the active pages is not used.
    Age,
    /// Take an inactive page's leaves away.
    Evict,
    /// Write pages out.
    Launder,
    /// Nothing more can be done now.
    Stuck,
}

impl Target {
    /// Half as much again as the reserve to start, twice as much to stop.
    pub(super) fn new(total: u32, reserve: u32) -> Self {
        let margin = (reserve / 2).clamp(1, (total / 16).max(1));
        Self { low: AtomicU32::new(reserve + margin), high: AtomicU32::new(reserve + 2 * margin) }
    }

    pub(super) fn set(&self, low: u32, high: u32) {
        self.low.store(low, Relaxed);
        self.high.store(high.max(low), Relaxed);
    }

    /// True if there is less than there should be; `working` if that was so before and is not mended yet.
    pub(super) fn is_short(&self, available: u32, working: bool) -> bool {
        available < if working { &self.high } else { &self.low }.load(Relaxed)
    }

    /// What to do next when memory is short. `tired` if all that is active was found in use, lately.
    pub(super) fn next(lengths: QueueLengths, can_write: bool, tired: bool) -> Next {
        let QueueLengths { active, inactive, laundry, .. } = lengths;
        // A third of the pages is inactive: long enough there to be found in use, if they are.
        let wants_inactive = active > 0 && inactive <= active / 2 && !tired;
        match () {
            () if can_write && laundry >= CLUSTER_PAGES => Next::Launder,
            () if wants_inactive => Next::Age,
            () if inactive > 0 => Next::Evict,
            () if can_write && laundry > 0 => Next::Launder,
            () if active > 0 => Next::Age,
            () => Next::Stuck,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_starts_below_the_low_mark_and_ends_at_the_high_one() {
        let target = Target::new(1600, 100);
        assert!(!target.is_short(150, false) && target.is_short(149, false));
        assert!(target.is_short(199, true) && !target.is_short(200, true));
    }

    #[test]
    fn what_cannot_be_written_is_not_waited_for() {
        let lengths = QueueLengths { laundry: 40, ..QueueLengths::default() };
        assert_eq!(Target::next(lengths, false, false), Next::Stuck);
        assert_eq!(Target::next(lengths, true, false), Next::Launder);
        let lengths = QueueLengths { active: 3, inactive: 2, ..lengths };
        assert_eq!(Target::next(lengths, false, false), Next::Evict);
    }
}
