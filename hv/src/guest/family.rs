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
    /// How many of it may live at once that were forked from inside.
    pub const fn granted(&self) -> u32 {
        self.granted
    }

    /// Room for `count` more, which the caller is about to make; `None` when there is not as much, or when the
    /// last fork was less than `interval` ticks ago.
    pub fn admit(self: &Arc<Self>, count: u32, interval: u64, now: u64) -> Option<Room> {
        let before = self.forked.load(Ordering::SeqCst);
        if before != 0 && now.wrapping_sub(before) < interval {
            return None;
        }
        let more = |living: u32| living.checked_add(count).filter(|sum| *sum <= self.granted);
        self.living.fetch_update(Ordering::SeqCst, Ordering::SeqCst, more).ok()?;
        self.forked.store(now, Ordering::SeqCst);
        Some(Room { family: self.clone(), count })
    }
}

/// Room in a family, for guests that are about to be made or for one that lives. It goes back when this is dropped, so a
/// fork that fails keeps none, whichever way it fails.
#[derive(Debug)]
pub struct Room {
    family: Arc<Family>,
    count: u32,
}

impl Room {
    /// One guest's, out of it; `None` when all of it is taken.
    pub fn one(&mut self) -> Option<Self> {
        self.count = self.count.checked_sub(1)?;
        Some(Self { family: self.family.clone(), count: 1 })
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        // Never below zero: it is what was admitted.
        self.family.living.fetch_sub(self.count, Ordering::SeqCst);
    }
}

/// Where a guest comes from. A guest that begins again comes from where it came from before, and has the same room.
#[derive(Clone, Debug)]
pub struct Birth {
    /// Its place in the fork that made it, from 1 on; 0 when it was not forked.
    pub place: u32,
    /// How many children that fork made.
    pub of: u32,
    /// Its room in the family, if a guest forked it and not a person: it counts there as long as it lives.
    pub room: Option<Arc<Room>>,
    /// Its family.
    pub family: Arc<Family>,
}

impl Birth {
    /// The first of a family, of which that many may be forked.
    pub fn first(granted: u32) -> Self {
        let family = Family { granted, living: AtomicU32::new(0), forked: AtomicU64::new(0) };
        Self { place: 0, of: 0, room: None, family: Arc::new(family) }
    }

    /// A child's.
    pub fn child(&self, place: u32, of: u32, room: Option<Room>) -> Self {
        Self { place, of, room: room.map(Arc::new), family: self.family.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_family_never_has_more_living_than_granted_nor_forks_too_often() {
        let family = Birth::first(3).family;
        let two = family.admit(2, 10, 100);
        assert!(two.is_some());
        assert!(family.admit(1, 10, 109).is_none(), "too soon");
        assert!(family.admit(2, 10, 110).is_none(), "too many");
        assert!(family.admit(u32::MAX, 10, 110).is_none());
        let one = family.admit(1, 10, 110);
        assert!(one.is_some());
        assert!(family.admit(1, 10, 200).is_none());
        drop(one);
        assert!(family.admit(1, 10, 200).is_some());
        assert!(Birth::first(0).family.admit(1, 0, 1).is_none(), "not granted");
    }

    #[test]
    fn a_fork_that_fails_keeps_room_for_nobody_but_the_children_that_live() {
        let first = Birth::first(4);
        let living = || first.family.living.load(Ordering::SeqCst);
        let mut room = first.family.admit(4, 0, 1).unwrap();
        let child = first.child(1, 4, room.one());
        let half_made = first.child(2, 4, room.one());
        assert_eq!(living(), 4);
        // The second cannot be made: it goes, then what was not begun, then the first.
        drop(half_made);
        assert_eq!(living(), 3);
        drop(room);
        assert_eq!(living(), 1);
        drop(child);
        assert_eq!(living(), 0);
        // One that succeeds leaves nothing over to go back.
        let mut room = first.family.admit(2, 0, 2).unwrap();
        let children = [room.one(), room.one()].map(|room| first.child(1, 2, room));
        assert!(room.one().is_none());
        drop(room);
        assert_eq!(living(), 2);
        drop(children);
        assert_eq!(living(), 0);
    }
}
