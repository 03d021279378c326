//! An object's slots: an index of pages, where in it the object begins, and under which number frames
//! know it.
//!
//! Two objects can exchange their slots without touching a frame, because frames name the *storage*
//! number and not the object, and because the object's first page may lie anywhere in the index: that is
//! how a collapse moves the smaller side (D9). Called by `object` and everyone who has its lock.

use core::ops::Range;

use super::index::{Index, Run, Slot, SlotCounts};
use crate::VmError;
use crate::addr::{CHUNK_PAGES, PageIndex, Pfn};
use crate::page::Wish;

/// Where each page of an object is.
pub struct Slots {
    index: Index,
    base: u32,
    storage: u32,
}

impl Slots {
    /// Nothing, under a storage number.
    pub const fn new(storage: u32) -> Self {
        Self { index: Index::new(), base: 0, storage }
    }

    /// The number under which frames know these slots.
    #[inline]
    pub const fn storage(&self) -> u32 {
        self.storage
    }

    /// Has the object begin this far into the index, so that leaves of the index are ranges that guests name as one.
    /// Only while there is nothing.
    pub fn begin_at(&mut self, base: u32) {
        debug_assert!(self.counts().is_empty());
        self.base = base;
    }

    /// How far into the index the object begins.
    pub const fn base(&self) -> u32 {
        self.base
    }

    /// Where in the index a page of the object is. A page that has no number there cannot have a slot.
    #[inline]
    pub const fn place(&self, page: PageIndex) -> Option<PageIndex> {
        page.checked_add(self.base)
    }

    /// Which page of the object a place in the index is.
    pub const fn page(&self, place: PageIndex) -> Option<PageIndex> {
        place.checked_sub(self.base)
    }

    /// What is known of a page.
    #[inline]
    pub fn get(&self, page: PageIndex) -> Slot {
        match self.place(page) {
            Some(place) => self.index.get(place),
            None => Slot::Absent,
        }
    }

    /// Sets a slot; fails only for want of memory. See [`Index::set`].
    pub fn set(&mut self, page: PageIndex, to: Slot) -> Result<Slot, VmError> {
        let place = self.place(page).ok_or(VmError::Range)?;
        self.index.set(place, to)
    }

    /// Which frame the page at a place should get. See [`Index::wish`].
    #[inline]
    pub fn wish(&self, place: PageIndex) -> Wish {
        self.index.wish(place)
    }

    /// The first page of a chunk got this frame, and has its slot at this place.
    pub fn begin_chunk(&mut self, place: PageIndex, frame: Pfn) {
        self.index.begin_chunk(place, frame);
    }

    /// True if every page of the chunk that begins at a page is absent, and it is known without a look at them.
    #[inline]
    pub fn is_chunk_absent(&self, first: PageIndex) -> bool {
        self.place(first).is_some_and(|place| {
            place.number().is_multiple_of(CHUNK_PAGES) && self.index.is_chunk_absent(place)
        })
    }

    /// The first frame of the chunk that begins at a page, if all of it lies side by side. See [`Index::chunk_run`].
    pub fn chunk_run(&self, first: PageIndex) -> Option<Pfn> {
        self.index.chunk_run(self.place(first)?)
    }

    /// Sets a slot whose leaf is there. See [`Index::replace`].
    #[inline]
    pub fn replace(&mut self, page: PageIndex, to: Slot) -> Option<Slot> {
        self.index.replace(self.place(page)?, to)
    }

    /// True if a page can have a slot without more memory.
    pub fn has_leaf(&self, page: PageIndex) -> bool {
        self.place(page).is_some_and(|place| self.index.has_leaf(place))
    }

    /// True if the leaf that begins at a page can be made zero without more memory.
    pub fn has_region(&self, page: PageIndex) -> bool {
        self.place(page).is_some_and(|place| self.index.has_region(place))
    }

    /// True if a leaf of the index begins at a page.
    pub fn is_leaf(&self, page: PageIndex) -> bool {
        self.place(page).is_some_and(|place| place.number().is_multiple_of(Index::LEAF_PAGES))
    }

    /// Makes the pages of the leaf that begins at a page zero. See [`Index::zero_leaf`].
    pub fn zero_leaf(&mut self, first: PageIndex) -> Result<(), VmError> {
        self.index.zero_leaf(self.place(first).ok_or(VmError::Range)?)
    }

    /// How many slots of each kind there are.
    pub const fn counts(&self) -> SlotCounts {
        self.index.counts()
    }

    /// The first page in a range that is not absent, and what it is.
    pub fn next_present(&self, range: Range<PageIndex>) -> Option<(PageIndex, Slot)> {
        let start = self.place(range.start)?;
        let end = self.place(range.end).unwrap_or(PageIndex::new(u32::MAX));
        let (place, slot) = self.index.next_present(start..end)?;
        Some((self.page(place)?, slot))
    }

    /// The first page in a range that is not absent, and how many from it on are not, as far as its leaf goes. See
    /// [`Index::next_run`].
    #[inline]
    pub fn next_run(&self, range: Range<PageIndex>) -> Option<(PageIndex, u32)> {
        let start = self.place(range.start)?;
        let end = self.place(range.end).unwrap_or(PageIndex::new(u32::MAX));
        let (place, pages) = self.index.next_run(start..end)?;
        Some((self.page(place)?, pages))
    }

    /// What is known of the pages from `first` to the end of its leaf.
    #[inline]
    pub fn rest_of_leaf(&self, first: PageIndex) -> Run<'_> {
        self.place(first).map_or(Run::EMPTY, |place| self.index.rest_of_leaf(place))
    }

    /// How many pages from one on are not absent, one after the other, as far as its leaf goes.
    #[inline]
    pub fn held_from(&self, page: PageIndex) -> u32 {
        self.place(page).map_or(0, |place| self.index.held_from(place))
    }

    /// How many pages there are from a page to the end of its leaf; never none.
    #[inline]
    pub fn left_in_leaf(&self, page: PageIndex) -> u32 {
        Index::LEAF_PAGES - self.place(page).map_or(0, |place| place.number() % Index::LEAF_PAGES)
    }

    /// Which of the 64 pages from `first` on are not absent: a bit for each, that of `first` lowest.
    pub fn present_of_64(&self, first: PageIndex) -> u64 {
        self.place(first).map_or(0, |place| self.index.present_of_64(place))
    }

    /// The same for 64 pages a word.
    pub fn present_from(&self, first: PageIndex, words: &mut [u64]) {
        if let Some(place) = self.place(first) {
            self.index.present_from(place, words);
        }
    }

    /// Empties the index, what is no page of the object's as well. See [`Index::drain`].
    pub fn drain(&mut self, give_up: impl FnMut(Slot) -> bool) -> bool {
        self.index.drain(give_up)
    }

    /// Every place of the index that is not absent, with the page that it is.
    pub fn iter(&self) -> impl Iterator<Item = (Option<PageIndex>, PageIndex, Slot)> + '_ {
        self.index.iter().map(|(place, slot)| (self.page(place), place, slot))
    }

    /// Exchanges everything with another object's slots; our first page is then `offset` pages into
    /// what was the other's. False, and nothing done, if that has no number.
    pub fn exchange(&mut self, other: &mut Self, offset: PageIndex) -> bool {
        let Some(base) = other.base.checked_add(offset.number()) else { return false };
        core::mem::swap(self, other);
        self.base = base;
        true
    }

    /// Where the object begins in the index goes back to the start. Only while there is nothing.
    pub fn rewind(&mut self) {
        debug_assert!(self.counts().is_empty());
        self.index = Index::new();
        self.base = 0;
    }

    /// Bytes that the index takes.
    pub fn bytes(&self) -> usize {
        self.index.bytes()
    }
}
