//! Which aligned 2 MiB of frames are free whole: where the pages of a chunk can lie side by side, and be mapped as one.
//!
//! Nothing is set aside. A free frame is on the free list, and whoever wants one may have it; here is only counted how
//! many of each 2 MiB are free, and those that are free whole are on a list, so that a chunk that begins finds one at
//! once. Called by `queues` only, under the queue lock.

use alloc::boxed::Box;
use alloc::vec::Vec;

use super::NIL;
use crate::VmError;
use crate::addr::{CHUNK_PAGES, Pfn};

const SHIFT: u32 = CHUNK_PAGES.trailing_zeros();
#[expect(clippy::cast_possible_truncation, reason = "512 fits")]
const WHOLE: u16 = CHUNK_PAGES as u16;

/// No frame in particular is wanted.
pub const ANY: Pfn = Pfn::new(u32::MAX);

/// Which frame would be the best for a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// This one, or [`ANY`]: its neighbours have the page's neighbours.
    Beside(Pfn),
    /// So far into 2 MiB that are free whole: the page is the first of its chunk.
    Begin(u32),
}

#[derive(Clone, Copy)]
struct Run {
    /// Frames of it that are free.
    free: u16,
    /// Of those that are free whole: the ones before and after it.
    next: u32,
    prev: u32,
}

/// The 2 MiB that there are, by their numbers.
pub(super) struct Runs {
    runs: Box<[Run]>,
    /// Of those that are free whole: the next to be offered, and the last. What was given back lately is last, since that is
    /// where single frames are taken from.
    first: u32,
    last: u32,
}

impl Runs {
    /// For so many places, of which the first begins 2 MiB.
    pub(super) fn new(places: usize) -> Result<Self, VmError> {
        let count = places.div_ceil(CHUNK_PAGES as usize);
        let mut runs = Vec::new();
        runs.try_reserve_exact(count).map_err(|_| VmError::NoMemory)?;
        runs.resize(count, Run { free: 0, next: NIL, prev: NIL });
        Ok(Self { runs: runs.into_boxed_slice(), first: NIL, last: NIL })
    }

    /// The place so far into 2 MiB that are free whole, if there are any.
    #[inline]
    pub(super) fn whole_at(&self, offset: u32) -> Option<u32> {
        (self.first != NIL).then(|| (self.first << SHIFT) + offset)
    }

    /// The frame of a place is not free any more.
    #[inline]
    pub(super) fn took(&mut self, place: u32) {
        let number = place >> SHIFT;
        let Some(run) = self.runs.get_mut(number as usize) else { return };
        let free = run.free;
        run.free = free.wrapping_sub(1); // it was counted, as `check` says
        if free == WHOLE {
            self.break_up(number);
        }
    }

    /// The frame of a place is free.
    #[inline]
    pub(super) fn gave(&mut self, place: u32) {
        let number = place >> SHIFT;
        let run = &mut self.runs[number as usize];
        debug_assert!(run.free < WHOLE);
        run.free = run.free.wrapping_add(1);
        if run.free == WHOLE {
            self.make_whole(number);
        }
    }

    #[cold]
    fn break_up(&mut self, number: u32) {
        let Run { next, prev, .. } = self.runs[number as usize];
        match self.runs.get_mut(prev as usize) {
            Some(before) => before.next = next,
            None => self.first = next,
        }
        match self.runs.get_mut(next as usize) {
            Some(after) => after.prev = prev,
            None => self.last = prev,
        }
    }

    #[cold]
    fn make_whole(&mut self, number: u32) {
        let last = core::mem::replace(&mut self.last, number);
        match self.runs.get_mut(last as usize) {
            Some(before) => before.next = number,
            None => self.first = number,
        }
        let run = &mut self.runs[number as usize];
        (run.next, run.prev) = (NIL, last);
    }

    /// How many are free whole.
    pub(super) fn whole(&self) -> u32 {
        let next = |number: u32| Some(self.runs.get(number as usize)?.next);
        let all = core::iter::successors(Some(self.first), |&number| next(number));
        u32::try_from(all.take_while(|&number| number != NIL).count()).unwrap_or(NIL)
    }

    /// Compares the counts with what says whether the frame of a place is free: a place that is wrong on failure.
    pub(super) fn check(&self, places: u32, is_free: impl Fn(u32) -> bool) -> Result<(), u32> {
        let mut whole = 0;
        for (number, run) in (0_u32..).zip(&self.runs) {
            let start = number << SHIFT;
            let end = ((number + 1) << SHIFT).min(places);
            let free = (start..end).filter(|&place| is_free(place)).count();
            if free != usize::from(run.free) {
                return Err(start);
            }
            whole += u32::from(run.free == WHOLE);
        }
        if whole == self.whole() { Ok(()) } else { Err(0) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_mebibytes_are_offered_while_all_of_their_frames_are_free_and_those_longest_so_first() {
        // Memory begins and ends in the middle of 2 MiB.
        let (start, places) = (0x34, 4 * CHUNK_PAGES + 7);
        let mut runs = Runs::new(places as usize).unwrap();
        (start..places).rev().for_each(|place| runs.gave(place));
        // Three lie in the range whole.
        assert_eq!(runs.whole(), 3);
        let at = |runs: &Runs| runs.whole_at(7);
        let highest = 3 * CHUNK_PAGES;
        assert_eq!(at(&runs), Some(highest + 7));
        runs.took(highest + 9);
        assert_eq!(at(&runs), Some(highest - CHUNK_PAGES + 7));
        runs.took(highest + 10);
        runs.gave(highest + 9);
        assert_eq!(runs.whole(), 2);
        runs.gave(highest + 10);
        assert_eq!((runs.whole(), at(&runs)), (3, Some(highest - CHUNK_PAGES + 7)));
        (0..2).for_each(|run| runs.took(highest - (2 - run) * CHUNK_PAGES));
        assert_eq!(at(&runs), Some(highest + 7));
        (0..2).for_each(|run| runs.gave(highest - (2 - run) * CHUNK_PAGES));
        runs.check(places, |place| place >= start).unwrap();
    }
}
