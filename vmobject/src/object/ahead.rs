//! How many pages come along with one that is wanted from swap: as many as helped lately.
//!
//! Where the last few wanted pages of an object lay tells whether it is used in some order: who wants a page near one of
//! them would have been glad of a neighbour, and the next window is twice as large; who wants one far from all of them
//! has no use for any, and it is half as large. So one order, forwards or backwards, several at the same time, and none
//! are told apart. Whether a page that came along was used is not looked at: that would cost a look at its leaves.
//! An image is always read in whole clusters: each of its pages comes once. Called by `pager`.

use crate::addr::PageIndex;
use crate::limits::CLUSTER_PAGES;

/// How many wanted pages are remembered.
const RECENT: usize = 4;
/// What counts as near: as far as a window can reach, and another one.
const NEAR: u32 = 2 * CLUSTER_PAGES;
/// log2 of the largest window.
const LARGEST: u32 = CLUSTER_PAGES.trailing_zeros();
/// No page, and near none.
const NOWHERE: u32 = u32::MAX;

/// What an object remembers.
pub(crate) struct Ahead {
    recent: [u32; RECENT],
    next: u8,
    /// log2 of the window.
    shift: u32,
}

impl Ahead {
    /// Nothing wanted yet: the largest window.
    pub(crate) const fn new() -> Self {
        Self { recent: [NOWHERE; RECENT], next: 0, shift: LARGEST }
    }

    /// In how many pages the last one came.
    pub(crate) fn came(&self) -> u32 {
        1 << self.shift
    }

    /// Takes note of a wanted page; in how many pages, aligned, it is to come.
    pub(crate) fn window(&mut self, wanted: PageIndex) -> u32 {
        let near = |&recent: &u32| recent.abs_diff(wanted.number()) <= NEAR;
        if self.recent.iter().any(near) {
            self.shift = (self.shift + 1).min(LARGEST);
        } else if self.shift > 0 && self.recent[0] != NOWHERE {
            self.shift -= 1;
        }
        self.recent[usize::from(self.next) % RECENT] = wanted.number();
        self.next = self.next.wrapping_add(1);
        1 << self.shift
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn windows(pages: impl IntoIterator<Item = u32>) -> alloc::vec::Vec<u32> {
        let mut ahead = Ahead::new();
        pages.into_iter().map(|page| ahead.window(PageIndex::new(page))).collect()
    }

    #[test]
    fn pages_in_no_order_soon_come_alone() {
        let scattered = (0..20).map(|n| n * 193 % 1024);
        assert_eq!(windows(scattered)[..6], [16, 8, 4, 2, 1, 1]);
    }

    #[test]
    fn an_order_is_found_after_none_and_kept_either_way_and_with_another_beside_it() {
        let scattered = (0..20).map(|n| n * 193 % 1024);
        let forwards = (0..40).map(|n| 5000 + n);
        assert_eq!(windows(scattered.chain(forwards))[20..26], [1, 2, 4, 8, 16, 16]);
        assert!(windows((0..40).rev().map(|n| n * 16)).iter().all(|&window| window == 16));
        let two = (0..40).flat_map(|n| [n * 16, 9000 - n * 16]);
        assert_eq!(windows(two)[..5], [16, 8, 16, 16, 16]);
    }
}
