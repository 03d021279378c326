//! Addresses, and the only raw arithmetic on them.
//!
//! Four nouns: an [`Ipa`] is what a guest believes, a [`PhysAddr`] is what the machine has, a [`Pfn`]
//! names one of its frames, a [`PageIndex`] names a page inside an object. Nothing converts from one to
//! another except through a function that says what the conversion means. Everything here is checked:
//! an offset that does not fit is `None`, never a wrap (invariant I13).

use core::fmt;
use core::ops::Range;

/// Bytes in a page: the 4 KiB granule, the only one we use for stage 2.
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;
/// log2 of [`PAGE_SIZE`].
pub const PAGE_SHIFT: u32 = 12;
/// Pages in a chunk: one last-level table, one block mapping, one unit of batching (DESIGN 7).
pub const CHUNK_PAGES: u32 = 512;
/// Bytes in a chunk: 2 MiB.
pub const CHUNK_SIZE: u64 = PAGE_SIZE * CHUNK_PAGES as u64;

/// An address as the guest believes it: the input of stage 2. We never dereference one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Ipa(u64);

/// An address on the host's bus: the output of stage 2.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct PhysAddr(u64);

/// A frame of host memory: a [`PhysAddr`] divided by the page size.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Pfn(u32);

/// A page of an object, counted from the object's start.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct PageIndex(u32);

impl Ipa {
    /// An address from its bits.
    pub const fn new(bits: u64) -> Self {
        Self(bits)
    }
    /// The bits.
    pub const fn bits(self) -> u64 {
        self.0
    }
    /// The start of the page that this lies in.
    pub const fn page(self) -> Self {
        Self(self.0 & !(PAGE_SIZE - 1))
    }
    /// The start of the chunk that this lies in.
    pub const fn chunk(self) -> Self {
        Self(self.0 & !(CHUNK_SIZE - 1))
    }
    /// Which page of its chunk this lies in.
    pub const fn page_in_chunk(self) -> u32 {
        // Less than CHUNK_PAGES, so it fits.
        ((self.0 & (CHUNK_SIZE - 1)) >> PAGE_SHIFT) as u32
    }
    /// Bytes from the start of the page to here.
    pub const fn offset_in_page(self) -> usize {
        // Less than PAGE_SIZE, so it fits any usize.
        (self.0 & (PAGE_SIZE - 1)) as usize
    }
    /// `bytes` further on; `None` past the end of the address space.
    pub const fn checked_add(self, bytes: u64) -> Option<Self> {
        match self.0.checked_add(bytes) {
            Some(bits) => Some(Self(bits)),
            None => None,
        }
    }
    /// Bytes from `base` to here; `None` when `base` is above us.
    pub const fn checked_sub(self, base: Self) -> Option<u64> {
        self.0.checked_sub(base.0)
    }
    /// Whole pages between `base` and here; `None` when `base` is above us or the count does not fit.
    pub fn pages_above(self, base: Self) -> Option<PageIndex> {
        let pages = self.0.checked_sub(base.0)? / PAGE_SIZE;
        u32::try_from(pages).ok().map(PageIndex)
    }
    /// True at the first byte of a page.
    pub const fn is_page_aligned(self) -> bool {
        self.0.is_multiple_of(PAGE_SIZE)
    }
    /// True at the first byte of a chunk.
    pub const fn is_chunk_aligned(self) -> bool {
        self.0.is_multiple_of(CHUNK_SIZE)
    }
}

impl PhysAddr {
    /// An address from its bits.
    pub const fn new(bits: u64) -> Self {
        Self(bits)
    }
    /// The bits.
    pub const fn bits(self) -> u64 {
        self.0
    }
    /// The frame that this lies in; `None` above the 16 TiB that a [`Pfn`] can name.
    pub fn frame(self) -> Option<Pfn> {
        u32::try_from(self.0 >> PAGE_SHIFT).ok().map(Pfn)
    }
    /// `bytes` further on; `None` past the end of the address space.
    pub const fn checked_add(self, bytes: u64) -> Option<Self> {
        match self.0.checked_add(bytes) {
            Some(bits) => Some(Self(bits)),
            None => None,
        }
    }
}

impl Pfn {
    /// A frame from its number.
    pub const fn new(number: u32) -> Self {
        Self(number)
    }
    /// The frame's number.
    pub const fn number(self) -> u32 {
        self.0
    }
    /// Where the frame's first byte is.
    pub const fn base(self) -> PhysAddr {
        PhysAddr((self.0 as u64) << PAGE_SHIFT)
    }
    /// `frames` further on; `None` when the number does not fit.
    pub const fn checked_add(self, frames: u32) -> Option<Self> {
        match self.0.checked_add(frames) {
            Some(number) => Some(Self(number)),
            None => None,
        }
    }
    /// True for the first frame of an aligned 2 MiB.
    pub const fn is_chunk_aligned(self) -> bool {
        self.0.is_multiple_of(CHUNK_PAGES)
    }
}

impl PageIndex {
    /// An index from its number.
    pub const fn new(number: u32) -> Self {
        Self(number)
    }
    /// The index's number.
    pub const fn number(self) -> u32 {
        self.0
    }
    /// The byte offset of this page in its object.
    pub const fn byte_offset(self) -> u64 {
        (self.0 as u64) << PAGE_SHIFT
    }
    /// `pages` further on; `None` when the number does not fit.
    pub const fn checked_add(self, pages: u32) -> Option<Self> {
        match self.0.checked_add(pages) {
            Some(number) => Some(Self(number)),
            None => None,
        }
    }
    /// `pages` back; `None` before the object's start.
    pub const fn checked_sub(self, pages: u32) -> Option<Self> {
        match self.0.checked_sub(pages) {
            Some(number) => Some(Self(number)),
            None => None,
        }
    }
}

/// Whole pages that `bytes` need; `None` when the count does not fit a page count.
pub fn pages_for(bytes: u64) -> Option<u32> {
    u32::try_from(bytes.div_ceil(PAGE_SIZE)).ok()
}

/// A half-open, page-aligned range of guest addresses. Never inverted; may be empty.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct IpaRange {
    start: Ipa,
    end: Ipa,
}

impl IpaRange {
    /// From `start` up to `end`; `None` if inverted or not page-aligned.
    pub fn new(start: Ipa, end: Ipa) -> Option<Self> {
        let ok = start <= end && start.is_page_aligned() && end.is_page_aligned();
        ok.then_some(Self { start, end })
    }
    /// `pages` pages from `start`; `None` if unaligned or past the end of the address space.
    pub fn from_pages(start: Ipa, pages: u32) -> Option<Self> {
        Self::new(start, start.checked_add(u64::from(pages) << PAGE_SHIFT)?)
    }
    /// The one page that `at` lies in; `None` for the very last page of the address space.
    pub fn page_of(at: Ipa) -> Option<Self> {
        Self::from_pages(at.page(), 1)
    }
    /// First address.
    pub const fn start(self) -> Ipa {
        self.start
    }
    /// First address after the range.
    pub const fn end(self) -> Ipa {
        self.end
    }
    /// Bytes in the range.
    pub const fn bytes(self) -> u64 {
        self.end.0 - self.start.0
    }
    /// Pages in the range.
    pub const fn pages(self) -> u64 {
        self.bytes() >> PAGE_SHIFT
    }
    /// True when there is nothing in it: an empty range is empty (D23).
    pub const fn is_empty(self) -> bool {
        self.start.0 == self.end.0
    }
    /// True when `at` lies in it.
    pub fn contains(self, at: Ipa) -> bool {
        self.start <= at && at < self.end
    }
    /// What both ranges share, if anything.
    pub fn intersection(self, other: Self) -> Option<Self> {
        let (start, end) = (self.start.max(other.start), self.end.min(other.end));
        (start < end).then_some(Self { start, end })
    }
    /// The addresses of its pages, in order.
    pub fn iter_pages(self) -> impl Iterator<Item = Ipa> {
        (self.start.0..self.end.0).step_by(1 << PAGE_SHIFT).map(Ipa)
    }
    /// The same as a range of [`Ipa`].
    pub const fn as_range(self) -> Range<Ipa> {
        self.start..self.end
    }
}

macro_rules! debug_hex {
    ($($name:ident: $label:literal),*) => {$(
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($label, ":{:#x}"), self.0)
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    )*};
}
debug_hex!(Ipa: "ipa", PhysAddr: "pa", Pfn: "pfn", PageIndex: "page");

impl fmt::Debug for IpaRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ipa:{:#x}..{:#x}", self.start.0, self.end.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_below_the_base_has_no_page_index() {
        assert_eq!(Ipa::new(0x1000).pages_above(Ipa::new(0x2000)), None);
        assert_eq!(Ipa::new(0x3fff).pages_above(Ipa::new(0x1000)), Some(PageIndex::new(2)));
    }

    #[test]
    fn an_inverted_or_unaligned_range_cannot_be_made() {
        assert!(IpaRange::new(Ipa::new(0x2000), Ipa::new(0x1000)).is_none());
        assert!(IpaRange::new(Ipa::new(0x1001), Ipa::new(0x2000)).is_none());
        assert!(IpaRange::new(Ipa::new(0x1000), Ipa::new(0x1000)).is_some_and(IpaRange::is_empty));
    }

    #[test]
    fn a_frame_above_sixteen_tebibytes_is_refused_not_wrapped() {
        assert_eq!(PhysAddr::new(1 << 44).frame(), None);
        assert_eq!(PhysAddr::new((1 << 44) - 1).frame(), Some(Pfn::new(u32::MAX)));
    }
}
