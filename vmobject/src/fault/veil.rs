//! What hides the neighbours of a page that was found below: whoever goes down to it remembers, for the pages beside it, whether
//! an object on the way has something there, or does not show what lies below.
//!
//! With that the neighbours are mapped along with the page however deep it lies, by the 64 (`around`) or the whole
//! chunk (`block`). What was passed is not locked any more when that happens: it counts only if nothing that others
//! shadow has gained a page since before the way began. Called by the fault and its `chain`, each object locked.

use crate::addr::{CHUNK_PAGES, Ipa, PageIndex};
use crate::limits::AROUND_PAGES;
use crate::object::State;

/// A bit for each page of a window.
const _: () = assert!(AROUND_PAGES == u64::BITS);

/// See the module.
pub(super) struct Veil {
    /// How far the page is into its window of 64, and into its chunk.
    into_window: u32,
    into_chunk: u32,
    /// Those of the window that are hidden.
    hidden: u64,
    /// One of the chunk may be.
    whole: bool,
}

impl Veil {
    /// Whoever maps nothing does not look what is hidden.
    pub(super) const ALL: Self = Self { into_window: 0, into_chunk: 0, hidden: u64::MAX, whole: false };

    /// Nothing hides the neighbours of a page yet.
    #[inline]
    pub(super) const fn new(page: Ipa) -> Self {
        let into_chunk = page.page_in_chunk();
        Self { into_window: into_chunk % AROUND_PAGES, into_chunk, hidden: 0, whole: true }
    }

    /// Comes by an object, of which it is this page, and which has not got it; from there on where a trail of this version
    /// leads, if there is one.
    #[inline]
    pub(super) fn pass(&mut self, state: &State, index: PageIndex, hop: Option<u64>) {
        self.pass_one(state, index);
        if let Some(version) = hop {
            self.hop(state, index, version);
        }
    }

    #[inline]
    fn pass_one(&mut self, state: &State, index: PageIndex) {
        let shows = state.shadow.map_or(0, |shadow| shadow.limit);
        let chunk = index.checked_sub(self.into_chunk);
        let shows_chunk = |first: &PageIndex| shows.saturating_sub(first.number()) >= CHUNK_PAGES;
        if chunk.filter(shows_chunk).is_some_and(|first| state.slots.is_chunk_absent(first)) {
            return;
        }
        self.whole = false;
        // It may begin in the midst of them, so many places later.
        let later = self.into_window.saturating_sub(index.number());
        let first = PageIndex::new(index.number().saturating_sub(self.into_window));
        let behind = shows.saturating_sub(first.number()).saturating_add(later);
        self.hidden |= state.slots.present_of_64(first) << later
            | !(u64::MAX << later)
            | u64::MAX.checked_shl(behind).unwrap_or(0);
    }

    /// A trail says where they all are.
    fn hop(&mut self, state: &State, index: PageIndex, version: u64) {
        match state.beside(index, version).filter(|beside| beside.into_window == self.into_window) {
            Some(beside) => {
                self.hidden |= !beside.pages;
                self.whole &= beside.all;
            }
            None => (self.hidden, self.whole) = (u64::MAX, false),
        }
    }

    /// Which of the 64 are hidden: a bit for each, that of the first lowest.
    pub(super) const fn hidden(&self) -> u64 {
        self.hidden
    }

    /// True if none of the chunk is.
    pub(super) const fn is_none(&self) -> bool {
        self.whole
    }
}
