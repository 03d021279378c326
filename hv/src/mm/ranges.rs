//! Which memory is free at boot: RAM less what lies in it, and what is taken from that once and for good.
//!
//! Pure arithmetic on a bounded list; `boot` is the caller.

use arrayvec::ArrayVec;
use core::ops::Range;
use vmobject::addr::{PAGE_SIZE, Pfn, PhysAddr};

/// The most pieces that free memory may be in.
pub const MAX_RANGES: usize = 64;

/// Page-aligned, disjoint pieces of physical memory.
#[derive(Clone, Debug, Default)]
pub struct Ranges(ArrayVec<Range<u64>, MAX_RANGES>);

impl Ranges {
    /// Adds memory: the whole pages in it. What is one piece too many is left unused.
    pub fn add(&mut self, bytes: Range<u64>) {
        let start = bytes.start.next_multiple_of(PAGE_SIZE);
        let end = bytes.end & !(PAGE_SIZE - 1);
        if start < end {
            let _ = self.0.try_push(start..end);
        }
    }

    /// Takes out every page that a range touches.
    pub fn remove(&mut self, bytes: Range<u64>) {
        if bytes.is_empty() {
            return;
        }
        let hole = (bytes.start & !(PAGE_SIZE - 1))..bytes.end.next_multiple_of(PAGE_SIZE);
        let mut rest = Self::default();
        for piece in &self.0 {
            rest.add(piece.start..piece.end.min(hole.start));
            rest.add(piece.start.max(hole.end)..piece.end);
        }
        *self = rest;
    }

    /// Takes `bytes`, rounded up to pages, from the first piece that has them at an `align`ed address.
    pub fn take(&mut self, bytes: u64, align: u64) -> Option<PhysAddr> {
        let bytes = bytes.checked_next_multiple_of(PAGE_SIZE)?;
        let start = self.0.iter().find_map(|piece| {
            let start = piece.start.checked_next_multiple_of(align)?;
            (start.checked_add(bytes)? <= piece.end).then_some(start)
        })?;
        self.remove(start..start.checked_add(bytes)?);
        Some(PhysAddr::new(start))
    }

    /// Bytes in all pieces.
    pub fn bytes(&self) -> u64 {
        self.0.iter().map(|piece| piece.end - piece.start).sum()
    }

    /// The pieces, as frames. Frames that no [`Pfn`] can name are left out.
    pub fn frames(&self) -> ArrayVec<Range<Pfn>, MAX_RANGES> {
        let frame = |at: u64| PhysAddr::new(at).frame();
        self.0.iter().filter_map(|piece| Some(frame(piece.start)?..frame(piece.end)?)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(range: Range<u64>) -> Ranges {
        let mut ranges = Ranges::default();
        ranges.add(range);
        ranges
    }

    #[test]
    fn a_hole_in_the_middle_leaves_two_pieces_and_takes_whole_pages() {
        let mut ranges = one(0x1000..0x9000);
        ranges.remove(0x3800..0x4001);
        let pieces: std::vec::Vec<_> = ranges.0.iter().cloned().collect();
        assert_eq!(pieces, [0x1000..0x3000, 0x5000..0x9000]);
    }

    #[test]
    fn an_empty_hole_takes_nothing() {
        let mut ranges = one(0x1000..0x9000);
        ranges.remove(0x3800..0x3800);
        assert_eq!(ranges.bytes(), 0x8000);
    }

    #[test]
    fn what_is_taken_is_aligned_and_not_free_any_more() {
        let mut ranges = one(0x1000..0x40_0000);
        assert_eq!(ranges.take(0x10_0001, 0x20_0000), Some(PhysAddr::new(0x20_0000)));
        assert_eq!(ranges.bytes(), 0x3f_f000 - 0x10_1000);
        assert_eq!(ranges.take(0x40_0000, 0x1000), None);
    }
}
