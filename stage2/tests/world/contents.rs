//! What the pages of a guest or a snapshot should have: copied whole at every clone.

use super::{ALL, PAGES, offset};

/// What somebody's memory is.
#[derive(Clone)]
pub(super) struct Contents {
    /// Of each page: what the guest wrote, and what it wrote while others were at work.
    pub(super) bytes: [[u8; 2]; ALL as usize],
    /// Pages that a copy of its own would have frames for: a bit for each.
    pub(super) touched: u64,
    /// Pages that it may not write: a bit for each.
    pub(super) sealed: u64,
    /// Pages of the attic that are there: a bit for each.
    pub(super) there: u64,
    /// Which page each was when it was used first: its bytes are where that one's are.
    pub(super) was: [u32; ALL as usize],
    /// How many pages it has besides, and which of them it has given up.
    pub(super) ballast: u32,
    pub(super) hole: Option<u32>,
}

impl Default for Contents {
    fn default() -> Self {
        let was = core::array::from_fn(|page| u32::try_from(page).expect("few"));
        let bytes = [[0; 2]; ALL as usize];
        Self { bytes, touched: 0, sealed: 0, there: 0, was, ballast: 0, hole: None }
    }
}

impl Contents {
    pub(super) const fn of(&self, page: u32) -> [u8; 2] {
        self.bytes[page as usize]
    }

    /// The first of the bytes of a page that are used.
    pub(super) fn offset(&self, page: u32) -> usize {
        offset(self.was[page as usize])
    }

    /// True if there is something at a page.
    pub(super) const fn has(&self, page: u32) -> bool {
        page < PAGES || self.there & 1 << page != 0
    }

    /// The first of the pages that were touched, from this one on.
    pub(super) fn touched_from(&self, page: u32) -> Option<u32> {
        (page..page + ALL).map(|page| page % ALL).find(|page| self.touched & 1 << page != 0)
    }
}
