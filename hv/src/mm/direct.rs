//! The bytes of frames: `vmobject`'s only door to memory.
//!
//! On the target a frame is where its number says (identity map); on the host the frames live in an arena and
//! [`Direct::over`] says where. Guest memory is never a Rust reference (DESIGN 17): everything goes by pointer,
//! through `arch::page` for whole pages. A frame is cleaned to the point of coherency when it is filled,
//! because a guest may look with its caches off, and cleaned and invalidated before it is read for a copy,
//! because a guest may have written so (invariant I2).
#![expect(unsafe_code, reason = "frames' bytes are reached by pointer")]

use crate::arch::{cache, page};
use core::sync::atomic::{Ordering, fence};
use vmobject::addr::{PAGE_SIZE, Pfn};
use vmobject::store::PhysMemory;

/// Bytes in a page.
const PAGE: usize = 1 << vmobject::addr::PAGE_SHIFT;
/// Words that are looked at without a branch between them.
const WORDS: usize = 8;
const _: () = assert!(PAGE as u64 == PAGE_SIZE);

/// Frames at a constant distance from their physical addresses.
#[derive(Clone, Copy, Debug)]
pub struct Direct {
    /// Added, wrapping, to a physical address to get a pointer.
    offset: u64,
}

impl Direct {
    /// Frames at their physical addresses.
    pub const IDENTITY: Self = Self { offset: 0 };

    /// Frames from `first` on at `arena`, for tests on the host.
    ///
    /// # Safety
    /// Every frame that is ever named lies in the arena, which is page-aligned and lives for ever.
    pub unsafe fn over(arena: *mut u8, first: Pfn) -> Self {
        Self { offset: (arena.expose_provenance() as u64).wrapping_sub(first.base().bits()) }
    }

    /// These frames, of zeros, for tests on the host that use no others.
    #[cfg(test)]
    pub fn of_zeros(frames: &core::ops::Range<Pfn>) -> Self {
        let pages = usize::try_from(frames.end.number() - frames.start.number()).unwrap();
        let layout = std::alloc::Layout::from_size_align(pages * PAGE, PAGE).unwrap();
        // SAFETY: it has a size.
        let arena = unsafe { std::alloc::alloc_zeroed(layout) };
        // SAFETY: it is as large as the frames, and is never given back.
        unsafe { Self::over(arena, frames.start) }
    }

    /// Where a frame's bytes are.
    pub fn pointer(self, frame: Pfn) -> *mut u8 {
        let address = frame.base().bits().wrapping_add(self.offset);
        core::ptr::with_exposed_provenance_mut(usize::try_from(address).unwrap_or(0))
    }
}

/// Panics unless the range lies in a page: who calls is wrong, not the guest.
fn assert_inside(offset: usize, len: usize) {
    assert!(offset.checked_add(len).is_some_and(|end| end <= PAGE), "a range crosses its page");
}

impl PhysMemory for Direct {
    fn zero(&self, frame: Pfn) {
        // SAFETY: the VM gives frames that it owns and that nobody maps; the direct map covers them.
        unsafe { page::zero(self.pointer(frame)) }
        // Whoever had the frame may have run code there, and whoever gets it cleans no lines that it does not write.
        cache::sync_instructions();
    }

    fn copy(&self, from: Pfn, to: Pfn) {
        let (from, to) = (self.pointer(from), self.pointer(to));
        // SAFETY: as above; a guest may write `from` meanwhile, and then gets what it raced for: no Rust
        // reference is involved.
        unsafe { page::copy(to, from) };
        cache::sync_instructions();
    }

    fn fill(&self, frame: Pfn, bytes: &[u8]) {
        assert_inside(0, bytes.len());
        self.zero(frame);
        self.write(frame, 0, bytes);
    }

    fn read(&self, frame: Pfn, offset: usize, out: &mut [u8]) {
        assert_inside(offset, out.len());
        let from = self.pointer(frame).wrapping_add(offset);
        cache::clean_invalidate(from, out.len());
        // SAFETY: the range lies in the frame, which the direct map covers; `out` is ours.
        unsafe { out.as_mut_ptr().copy_from(from, out.len()) };
        fence(Ordering::Acquire);
    }

    fn write(&self, frame: Pfn, offset: usize, bytes: &[u8]) {
        assert_inside(offset, bytes.len());
        let to = self.pointer(frame).wrapping_add(offset);
        // What a guest with its caches off wrote beside it is not to be overwritten with what the line had before.
        cache::clean_invalidate(to, bytes.len());
        // SAFETY: the range lies in the frame, which the direct map covers.
        unsafe { to.copy_from(bytes.as_ptr(), bytes.len()) };
        cache::clean(to, bytes.len());
    }

    fn look(&self, frame: Pfn, mut each: impl FnMut(u64) -> bool) {
        let from = self.pointer(frame);
        // SAFETY: the frame is the VM's and the direct map covers it; cleaning changes nothing in it.
        unsafe { page::clean_invalidate(from) };
        // Several in a row: what is shown is summed, and that is most of what a page costs that comes from a disk.
        for line in (0..PAGE / size_of::<u64>()).step_by(WORDS) {
            for word in line..line + WORDS {
                let at = from.cast::<u64>().wrapping_add(word);
                // SAFETY: the word lies in the frame, aligned as the page is; no Rust reference is involved, and a
                // guest that writes it meanwhile races with itself.
                let value = unsafe { at.read_volatile() };
                if !each(value) {
                    return;
                }
            }
        }
    }

    fn seal(&self, frame: Pfn, key: u64) -> u32 {
        // SAFETY: the frame is the VM's and the direct map covers it.
        let sum = unsafe { page::crc(self.pointer(frame), key) };
        sum.unwrap_or_else(|| self.sum(frame, key))
    }

    fn publish_sealed(&self, frame: Pfn, key: u64) -> u32 {
        // Either way of summing cleans the page before it looks, and writes nothing.
        let sum = self.seal(frame, key);
        cache::sync_instructions();
        sum
    }

    fn publish(&self, frame: Pfn) {
        let at = self.pointer(frame);
        // SAFETY: the frame is the VM's and the direct map covers it.
        unsafe { page::clean(at) };
        cache::sync_instructions();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::boxed::Box;

    #[repr(align(4096))]
    struct Arena([u8; 4 * PAGE]);

    fn direct() -> Direct {
        let arena = Box::leak(Box::new(Arena([0xaa; 4 * PAGE])));
        // SAFETY: the tests name frames 100 to 103 only, and the arena is leaked.
        unsafe { Direct::over(arena.0.as_mut_ptr(), Pfn::new(100)) }
    }

    #[test]
    fn a_fill_shorter_than_the_page_is_followed_by_zeros() {
        let memory = direct();
        memory.fill(Pfn::new(101), b"abc");
        let mut out = [1; 5];
        memory.read(Pfn::new(101), 0, &mut out);
        assert_eq!(&out, b"abc\0\0");
        memory.read(Pfn::new(101), PAGE - 5, &mut out);
        assert_eq!(out, [0; 5]);
        memory.read(Pfn::new(102), 0, &mut out);
        assert_eq!(out, [0xaa; 5], "the neighbour is untouched");
    }

    #[test]
    fn a_copy_has_the_bytes_of_its_source() {
        let memory = direct();
        memory.write(Pfn::new(100), 4090, b"sixsix");
        memory.copy(Pfn::new(100), Pfn::new(103));
        let mut out = [0; 6];
        memory.read(Pfn::new(103), 4090, &mut out);
        assert_eq!(&out, b"sixsix");
    }

    #[test]
    fn a_frame_has_the_sum_that_the_format_of_stored_guests_gives_its_bytes() {
        let memory = direct();
        let bytes: [u8; PAGE] = core::array::from_fn(|place| (place * 31 % 251).to_le_bytes()[0]);
        memory.write(Pfn::new(100), 0, &bytes);
        for key in [0, 7, u64::MAX] {
            assert_eq!(memory.sum(Pfn::new(100), key), hv_abi::image::sum(&bytes, key));
        }
    }

    #[test]
    #[should_panic(expected = "crosses")]
    fn a_range_past_the_page_is_our_own_bug() {
        direct().write(Pfn::new(100), 4090, b"sevenxx");
    }
}
