//! Who a guest comes from, and how many it may fork (invariant I16).
//!
//! A guest forks itself only if granted. The grant is the family's: children, and children of theirs, count against
//! one number while they live, however deep they nest, and a family forks no more often than once in an interval.

use alloc::sync::Arc;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// What all guests forked from one have in common.
#[derive(Debug)]
pub struct Family {
    granted: u32,
    living: AtomicU32,
    /// When one of them forked last, in ticks of the host's counter; 0 is never.
    forked: AtomicU64,
}

impl Family {
    /// Room for `count` more, which the caller is about to make; false when there is not as much, or when the
    /// last fork was less than `interval` ticks ago.
    pub fn admit(&self, count: u32, interval: u64, now: u64) -> bool {
        let before = self.forked.load(Ordering::SeqCst);
        if before != 0 && now.wrapping_sub(before) < interval {
            return false;
        }
        let more = |living: u32| living.checked_add(count).filter(|sum| *sum <= self.granted);
        let admitted = self.living.fetch_update(Ordering::SeqCst, Ordering::SeqCst, more).is_ok();
        if admitted {
            self.forked.store(now, Ordering::SeqCst);
        }
        admitted
    }

    /// Takes room back that [`Self::admit`] gave.
    pub fn dismiss(&self, count: u32) {
        // Never below zero: only what was admitted is dismissed, once.
        let _ =
            self.living.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |living| living.checked_sub(count));
    }
}

/// Where a guest comes from.
#[derive(Clone, Debug)]
pub struct Birth {
    /// Its place in the fork that made it, from 1 on; 0 when it was not forked.
    pub place: u32,
    /// How many children that fork made.
    pub of: u32,
    /// It was forked by a guest, not by a person, and counts in its family as long as it lives.
    pub inside: bool,
    /// Its family.
    pub family: Arc<Family>,
}

impl Birth {
    /// The first of a family, of which that many may be forked.
    pub fn first(granted: u32) -> Self {
        let family = Family { granted, living: AtomicU32::new(0), forked: AtomicU64::new(0) };
        Self { place: 0, of: 0, inside: false, family: Arc::new(family) }
    }

    /// A child's.
    pub fn child(&self, place: u32, of: u32, inside: bool) -> Self {
        Self { place, of, inside, family: self.family.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_family_never_has_more_living_than_granted_nor_forks_too_often() {
        let family = Birth::first(3).family;
        assert!(family.admit(2, 10, 100));
        assert!(!family.admit(1, 10, 109), "too soon");
        assert!(!family.admit(2, 10, 110), "too many");
        assert!(!family.admit(u32::MAX, 10, 110));
        assert!(family.admit(1, 10, 110));
        assert!(!family.admit(1, 10, 200));
        family.dismiss(1);
        assert!(family.admit(1, 10, 200));
        assert!(!Birth::first(0).family.admit(1, 0, 1), "not granted");
    }
}
