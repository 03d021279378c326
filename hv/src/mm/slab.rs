//! Blocks of one size, for what is taken and given back most: leaves of objects' indexes.
//!
//! A slab is a piece of the heap that is cut into blocks, behind a header. A block is its user's or on the list of its slab,
//! so taking one and giving it back costs the same few instructions whatever else the heap has, and no neighbour is looked
//! at. A slab of which all is free goes back to the heap, unless no other has anything free. Called by `heap` only, under a
//! lock.
#![expect(unsafe_code, reason = "blocks are memory by address")]

use core::alloc::Layout;
use core::ptr::{NonNull, with_exposed_provenance_mut};
use vmobject::object::index::Leaf;

/// What is a block: nothing else is laid out as a leaf is.
pub(super) const BLOCK: Layout = Layout::new::<Leaf>();
/// From one slab to the next, where they follow each other: the heap keeps a word after each.
const STRIDE: usize = 4096;
/// What a slab is cut from.
pub(super) const SLAB: Layout = match Layout::from_size_align(STRIDE - size_of::<usize>(), STRIDE) {
    Ok(slab) => slab,
    Err(_) => panic!("4096 is a power of two"),
};
/// Blocks of a slab, behind its header.
const BLOCKS: usize = (SLAB.size() - BLOCK.align()) / BLOCK.size();
const _: () = assert!(size_of::<Header>() <= BLOCK.align() && align_of::<Header>() <= BLOCK.align());
const _: () = assert!(BLOCK.size().is_multiple_of(BLOCK.align()) && BLOCKS == 15);

/// A block that is free.
struct Free {
    next: Option<NonNull<Free>>,
}

/// What a slab begins with.
struct Header {
    /// The slabs with something free before and after it, if it is one of them.
    prev: Option<NonNull<Header>>,
    next: Option<NonNull<Header>>,
    free: Option<NonNull<Free>>,
    /// Blocks that somebody has.
    used: usize,
}

/// The slabs with something free.
pub(super) struct Slabs {
    first: Option<NonNull<Header>>,
}

// SAFETY: the slabs are memory, and tied to no CPU; only who has all of this touches them.
unsafe impl Send for Slabs {}

impl Slabs {
    /// None.
    pub(super) const fn new() -> Self {
        Self { first: None }
    }

    /// A block, if any is free.
    #[inline]
    pub(super) fn take(&mut self) -> Option<NonNull<u8>> {
        let mut first = self.first?;
        // SAFETY: what is on the list is a slab's header, and nobody else touches it.
        let header = unsafe { first.as_mut() };
        let block = header.free?;
        // SAFETY: `add` or `give` wrote it, and it was nobody's since.
        header.free = unsafe { block.as_ref() }.next;
        header.used += 1;
        if header.free.is_none() {
            self.unlink(header);
        }
        Some(block.cast())
    }

    /// Cuts memory into blocks.
    ///
    /// # Safety
    /// It is as [`SLAB`] says and nobody else's, until [`Self::give`] answers with it.
    pub(super) unsafe fn add(&mut self, memory: NonNull<u8>) {
        let mut free = None;
        memory.expose_provenance();
        for number in (0..BLOCKS).rev() {
            // SAFETY: within the memory, which is the caller's promise.
            let block = unsafe { memory.add(BLOCK.align() + number * BLOCK.size()) }.cast();
            // SAFETY: the same, and aligned as a block is.
            unsafe { block.write(Free { next: free }) };
            free = Some(block);
        }
        let header = memory.cast::<Header>();
        // SAFETY: the caller's promise.
        unsafe { header.write(Header { prev: None, next: None, free, used: 0 }) };
        self.link(header);
    }

    /// Takes a block back. Memory that is not needed any more.
    ///
    /// # Safety
    /// [`Self::take`] gave it, and nobody has it any more.
    #[inline]
    pub(super) unsafe fn give(&mut self, block: NonNull<u8>) -> Option<NonNull<u8>> {
        // The header is none of what whoever had the block could reach.
        let at = with_exposed_provenance_mut(block.addr().get() & !(STRIDE - 1));
        // SAFETY: a block lies in a slab, whose alignment is more than its size, and a slab is not at zero.
        let (mut slab, block) = (unsafe { NonNull::<Header>::new_unchecked(at) }, block.cast::<Free>());
        // SAFETY: the slab's header, and nobody else touches it.
        let header = unsafe { slab.as_mut() };
        // SAFETY: it is nobody's now, and was aligned.
        unsafe { block.write(Free { next: header.free }) };
        let was_full = header.free.replace(block).is_none();
        header.used -= 1;
        if was_full {
            self.link(slab);
        } else if header.used == 0 && (header.prev.is_some() || header.next.is_some()) {
            self.unlink(header);
            return Some(slab.cast());
        }
        None
    }

    #[cold]
    fn link(&mut self, mut slab: NonNull<Header>) {
        let next = self.first.replace(slab);
        // SAFETY: both are slabs' headers, and nobody else touches them.
        unsafe { slab.as_mut() }.next = next;
        if let Some(mut next) = next {
            // SAFETY: the same.
            unsafe { next.as_mut() }.prev = Some(slab);
        }
    }

    #[cold]
    fn unlink(&mut self, header: &mut Header) {
        let (prev, next) = (header.prev.take(), header.next.take());
        match prev {
            // SAFETY: a slab's header, another one, and nobody else touches it.
            Some(mut prev) => unsafe { prev.as_mut() }.next = next,
            None => self.first = next,
        }
        if let Some(mut next) = next {
            // SAFETY: the same.
            unsafe { next.as_mut() }.prev = prev;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::alloc::{alloc, dealloc};
    use std::collections::BTreeSet;
    use std::vec::Vec;

    /// Slabs of the host's memory.
    struct Pool {
        slabs: Slabs,
        of: BTreeSet<usize>,
    }

    impl Pool {
        fn take(&mut self) -> NonNull<u8> {
            if let Some(block) = self.slabs.take() {
                return block;
            }
            // SAFETY: the layout has a size.
            let memory = NonNull::new(unsafe { alloc(SLAB) }).expect("memory");
            self.of.insert(memory.addr().get());
            // SAFETY: it was just allocated.
            unsafe { self.slabs.add(memory) };
            self.slabs.take().expect("a new slab has blocks")
        }

        fn give(&mut self, block: NonNull<u8>) {
            // SAFETY: it is ours, and was written whole.
            let bytes = unsafe { block.cast::<[u8; BLOCK.size()]>().read() };
            assert_eq!(bytes, [0xa5; BLOCK.size()], "somebody else wrote it");
            // SAFETY: the tests give each once.
            if let Some(memory) = unsafe { self.slabs.give(block) } {
                assert!(self.of.remove(&memory.addr().get()), "it is none of ours");
                // SAFETY: `take` allocated it.
                unsafe { dealloc(memory.as_ptr(), SLAB) };
            }
        }
    }

    #[test]
    fn no_two_have_the_same_block_and_what_is_free_whole_goes_back_but_for_the_last() {
        const COUNT: usize = 1000;
        let mut pool = Pool { slabs: Slabs::new(), of: BTreeSet::new() };
        let mut random = 1_usize;
        let mut blocks: Vec<NonNull<u8>> = Vec::new();
        for round in 0..20_000_usize {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            // Twice as many come as go, then the other way round.
            let wanted = if round / 5_000 % 2 == 0 { random >> 40 & 3 != 0 } else { random >> 40 & 3 == 0 };
            if wanted && blocks.len() < COUNT || blocks.is_empty() {
                let block = pool.take();
                // SAFETY: it is ours, and so large.
                unsafe { block.write_bytes(0xa5, BLOCK.size()) };
                blocks.push(block);
            } else {
                let block = blocks.swap_remove((random >> 20) % blocks.len());
                pool.give(block);
            }
            let places: BTreeSet<usize> = blocks.iter().map(|block| block.addr().get()).collect();
            assert_eq!(places.len(), blocks.len());
            let inside = |place: &usize| {
                let offset = place % STRIDE;
                pool.of.contains(&(place - offset))
                    && offset > 0
                    && offset + BLOCK.size() <= SLAB.size()
                    && offset.is_multiple_of(BLOCK.align())
            };
            assert!(places.iter().all(inside));
            // Each but one has a block that somebody has.
            assert!(pool.of.len() <= blocks.len() + 1);
        }
        blocks.into_iter().for_each(|block| pool.give(block));
        assert_eq!(pool.of.len(), 1);
        let last = pool.of.pop_first().expect("one");
        let again = pool.take();
        assert_eq!(again.addr().get() & !(STRIDE - 1), last, "what is kept is used");
        // SAFETY: the only slab, and nothing uses it any more.
        unsafe { dealloc(again.as_ptr().map_addr(|_| last), SLAB) };
    }
}
