//! Where the pages of a chunk lie in memory: in frames side by side, if that could be had, so that one block maps them.
//!
//! The first page of a chunk gets a frame in 2 MiB that are free whole, and from then on each page of it the one at its
//! own place there, if that is still free. Nothing is set aside for it, and nothing goes wrong if somebody else
//! has it. That all pages of a chunk are there and do not lie side by side is remembered until one gets another frame,
//! since finding it out takes a look at each. Called by who gives frames to an object, and by faults.

use alloc::boxed::Box;
use core::sync::atomic::{AtomicU32, Ordering::Relaxed};

use super::{Index, LEAF, Leaf, RESIDENT, Region, split};
use crate::addr::{CHUNK_PAGES, PageIndex, Pfn};
use crate::limits::MAX_FRAME;
use crate::page::{ANY, Wish};

/// Leaves of a chunk.
const PER_CHUNK: usize = CHUNK_PAGES as usize / LEAF;
/// A bit for each of them.
const ALL: u64 = (1 << PER_CHUNK) - 1;

/// Where a chunk lies: the number of its first frame, if it had its own place. Changes under the object's lock; readers
/// only add that it is [`SCATTERED`].
pub(super) struct Home(AtomicU32);

/// Frames are numbered below this, and it is not the first of any 2 MiB.
const NOWHERE: u32 = MAX_FRAME - 1;
/// All pages are there, and not side by side.
const SCATTERED: u32 = MAX_FRAME;
const _: () = assert!(SCATTERED.is_power_of_two());

impl Home {
    pub(super) const fn unknown() -> Self {
        Self(AtomicU32::new(NOWHERE))
    }
}

/// Of a word with a bit for each leaf of a region, those of a leaf's chunk, which is so far into its region.
#[inline]
const fn of_chunk(bits: u64, chunk: usize) -> u64 {
    bits >> (chunk * PER_CHUNK) & ALL
}

/// How far into its chunk a page is.
#[inline]
const fn offset(page: PageIndex) -> u32 {
    page.number() % CHUNK_PAGES
}

impl Index {
    /// Which frame a page should get.
    #[inline]
    pub fn wish(&self, page: PageIndex) -> Wish {
        let (region, leaf, _) = split(page);
        let chunk = leaf / PER_CHUNK;
        let Some(region) = self.region(region) else { return Wish::Begin(offset(page)) };
        if of_chunk(region.held & !region.zero, chunk) == 0 {
            return Wish::Begin(offset(page));
        }
        let home = &region.homes[chunk].0;
        let first = home.load(Relaxed);
        if first & SCATTERED != 0 {
            home.store(first & !SCATTERED, Relaxed);
        }
        match first & !SCATTERED {
            NOWHERE => Wish::Beside(ANY),
            first => Wish::Beside(Pfn::new(first | offset(page))),
        }
    }

    /// A page got this frame and has its slot; it is the first of its chunk.
    #[cold]
    pub fn begin_chunk(&mut self, page: PageIndex, frame: Pfn) {
        let (region, leaf, _) = split(page);
        let first =
            frame.number().checked_sub(offset(page)).filter(|&first| Pfn::new(first).is_chunk_aligned());
        if let Some(region) = self.region(region) {
            region.homes[leaf / PER_CHUNK].0.store(first.unwrap_or(NOWHERE), Relaxed);
        }
    }

    /// True if every page of the chunk that begins at `first` is absent. Takes no look at them.
    #[inline]
    pub fn is_chunk_absent(&self, first: PageIndex) -> bool {
        let (region, leaf, _) = split(first);
        self.region(region).is_none_or(|region| of_chunk(region.held, leaf / PER_CHUNK) == 0)
    }

    /// The first frame of the chunk that begins at `first`, if all of its pages are there and lie side by side in aligned
    /// 2 MiB. Looks at each only where they may.
    pub fn chunk_run(&self, first: PageIndex) -> Option<Pfn> {
        let (region, leaf, slot) = split(first);
        let (region, chunk) = (self.region(region)?, leaf / PER_CHUNK);
        // A leaf of zeros is full, too, and lies nowhere.
        let full = |region: &Region| {
            of_chunk(region.held & !region.zero, chunk) == ALL
                && region.present.as_chunks::<PER_CHUNK>().0[chunk] == [u64::MAX; PER_CHUNK]
        };
        if slot != 0 || leaf % PER_CHUNK != 0 || !full(region) {
            return None;
        }
        let home = &region.homes[chunk].0;
        if home.load(Relaxed) & SCATTERED != 0 {
            return None;
        }
        let leaves = region.leaves.get(leaf..leaf + PER_CHUNK)?;
        let start = *leaves.first()?.as_ref()?[0].0.first()?;
        // Consecutive frames are consecutive numbers of slots.
        let in_order = |(leaf, from): (&Option<Box<[Leaf; 1]>>, u32)| {
            let same = |[Leaf(slots)]: &[Leaf; 1]| {
                slots.iter().zip(from..).fold(0, |all, (&bits, n)| all | (bits ^ n)) == 0
            };
            leaf.as_deref().is_some_and(same)
        };
        let run = Pfn::new(start & !RESIDENT);
        let right = start & RESIDENT != 0 && run.is_chunk_aligned();
        if right && leaves.iter().zip((start..).step_by(LEAF)).all(in_order) {
            return Some(run);
        }
        home.fetch_or(SCATTERED, Relaxed);
        None
    }
}
