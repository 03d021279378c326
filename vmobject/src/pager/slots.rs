//! Which slots of a swap store are taken: a bit for each, and a bit for each word that has none left.
//!
//! A run of neighbours is preferred, because one transfer writes it and another brings it back; next fit, so
//! that what is written together lies together. Taking looks at a bounded number of places and then makes do
//! with the longest run it saw. Called by `swap`, under its lock.

use alloc::boxed::Box;
use alloc::vec::Vec;

use crate::VmError;

/// Slots of a word.
const WORD: u32 = u64::BITS;
/// Words that are looked at for a run as long as was asked for.
const LOOKS: u32 = 64;

/// Neighbouring slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The first of them.
    pub first: u32,
    /// How many.
    pub count: u32,
}

/// The slots of one store.
#[derive(Default)]
pub struct SwapSlots {
    /// A bit for each slot that cannot be given.
    used: Box<[u64]>,
    /// A bit for each word of `used` that has no clear bit.
    full: Box<[u64]>,
    slots: u32,
    taken: u32,
    bad: u32,
    cursor: u32,
}

fn words(bits: u32) -> Result<Box<[u64]>, VmError> {
    let count = bits.div_ceil(WORD) as usize;
    let mut words = Vec::new();
    words.try_reserve_exact(count).map_err(|_| VmError::NoMemory)?;
    words.resize(count, 0);
    // What lies behind the end is not there to be had.
    if let (Some(last), tail @ 1..) = (words.last_mut(), bits % WORD) {
        *last = !0 << tail;
    }
    Ok(words.into_boxed_slice())
}

const fn split(bit: u32) -> (usize, u64) {
    ((bit / WORD) as usize, 1 << (bit % WORD))
}

impl SwapSlots {
    /// So many slots, none taken.
    pub fn new(slots: u32) -> Result<Self, VmError> {
        let used = words(slots)?;
        let full = words(slots.div_ceil(WORD))?;
        Ok(Self { used, full, slots, taken: 0, bad: 0, cursor: 0 })
    }

    /// How many there are.
    pub const fn slots(&self) -> u32 {
        self.slots
    }

    /// How many are in use.
    pub const fn taken(&self) -> u32 {
        self.taken
    }

    /// How many are never given again.
    pub const fn bad(&self) -> u32 {
        self.bad
    }

    /// Takes up to `want` neighbours, at most a word's worth; as many as there are if there are not so many
    /// together.
    pub fn take(&mut self, want: u32) -> Option<Run> {
        if self.taken + self.bad == self.slots {
            return None;
        }
        let want = want.clamp(1, WORD);
        let (mut best, mut from) = (None::<Run>, self.cursor);
        for _ in 0..LOOKS {
            let Some(word) = self.next_open(from) else { break };
            let run = longest(!self.used[word as usize], want);
            if best.is_none_or(|best| best.count < run.count) {
                best = Some(Run { first: word * WORD + run.first, count: run.count });
            }
            if run.count == want {
                break;
            }
            from = word + 1;
        }
        let run = best?;
        self.cursor = run.first / WORD;
        for slot in run.first..run.first + run.count {
            self.mark(slot);
        }
        self.taken += run.count;
        Some(run)
    }

    /// Gives one slot back.
    pub fn give(&mut self, slot: u32) {
        let (word, bit) = split(slot);
        assert!(self.used[word] & bit != 0, "slot {slot} is not taken");
        self.used[word] &= !bit;
        let (summary, bit) = split(slot / WORD);
        self.full[summary] &= !bit;
        self.taken -= 1;
    }

    /// A slot that was taken is never given again.
    pub fn spoil(&mut self, slot: u32) {
        debug_assert!(self.is_taken(slot));
        self.taken -= 1;
        self.bad += 1;
    }

    /// True if a slot is in use, or bad.
    pub fn is_taken(&self, slot: u32) -> bool {
        let (word, bit) = split(slot);
        self.used.get(word).is_some_and(|bits| bits & bit != 0)
    }

    fn mark(&mut self, slot: u32) {
        let (word, bit) = split(slot);
        self.used[word] |= bit;
        if self.used[word] == !0 {
            let (summary, bit) = split(slot / WORD);
            self.full[summary] |= bit;
        }
    }

    /// The first word with a slot to give, from `from` on, then from the start.
    fn next_open(&self, from: u32) -> Option<u32> {
        let (start, bit) = split(from);
        let ahead = |summary: usize, mask: u64| {
            let open = !self.full.get(summary)? & mask;
            (open != 0).then(|| u32::try_from(summary).ok().map(|s| s * WORD + open.trailing_zeros()))?
        };
        ahead(start, !(bit - 1))
            .or_else(|| (start + 1..self.full.len()).find_map(|summary| ahead(summary, !0)))
            .or_else(|| (0..=start).find_map(|summary| ahead(summary, !0)))
    }
}

/// The first run of set bits that is `want` long, or the longest.
fn longest(free: u64, want: u32) -> Run {
    let (mut starts, mut count) = (free, 1);
    while count < want {
        let longer = starts & (free >> count);
        if longer == 0 {
            break;
        }
        starts = longer;
        count += 1;
    }
    Run { first: starts.trailing_zeros(), count }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_given_together_and_each_slot_once() {
        let mut slots = SwapSlots::new(100).unwrap();
        assert_eq!(slots.take(16), Some(Run { first: 0, count: 16 }));
        assert_eq!(slots.take(16), Some(Run { first: 16, count: 16 }));
        slots.give(3);
        assert_eq!(slots.take(16), Some(Run { first: 32, count: 16 }), "a hole of one is left alone");
        let mut left = 0;
        while let Some(run) = slots.take(16) {
            left += run.count;
        }
        assert_eq!((left, slots.taken()), (100 - 48 + 1, 100));
        assert_eq!(slots.take(1), None);
    }

    #[test]
    fn a_hole_is_used_when_nothing_longer_is_left() {
        let mut slots = SwapSlots::new(64).unwrap();
        while slots.take(64).is_some() {}
        for slot in [9, 40, 41] {
            slots.give(slot);
        }
        assert_eq!(slots.take(4), Some(Run { first: 40, count: 2 }));
        assert_eq!(slots.take(4), Some(Run { first: 9, count: 1 }));
        assert_eq!(slots.take(4), None);
    }

    #[test]
    fn a_bad_slot_is_never_given_again() {
        let mut slots = SwapSlots::new(2).unwrap();
        assert_eq!(slots.take(1), Some(Run { first: 0, count: 1 }));
        slots.spoil(0);
        assert_eq!(slots.take(2), Some(Run { first: 1, count: 1 }));
        slots.give(1);
        assert_eq!(slots.take(1), Some(Run { first: 1, count: 1 }));
        assert_eq!((slots.take(1), slots.taken(), slots.bad()), (None, 1, 1));
    }

    #[test]
    fn a_store_of_any_size_gives_exactly_its_slots() {
        for size in [0, 1, 63, 64, 65, 4096, 4097, 10_000] {
            let mut slots = SwapSlots::new(size).unwrap();
            let mut seen = alloc::vec![false; size as usize];
            while let Some(run) = slots.take(7) {
                for slot in run.first..run.first + run.count {
                    assert!(!core::mem::replace(&mut seen[slot as usize], true));
                }
            }
            assert!(seen.iter().all(|&given| given));
        }
    }
}
