//! Where queue memory comes from, and what lets a device reach it.
//!
//! EL2 maps memory where it is and QEMU's devices see it there, through the same caches: an address is an
//! address. So sharing a buffer is naming it. Pages for queues come from the two functions that `hv::boot`
//! registers before the first driver starts; they are few, and taken at boot only.
#![expect(unsafe_code, reason = "the Hal trait's contract is about raw memory")]

use core::ptr::NonNull;
use spin::Once;
use virtio_drivers::{BufferDirection, Hal};
use vmobject::addr::{PAGE_SIZE, PhysAddr};

/// The functions that give and take pages.
#[derive(Clone, Copy, Debug)]
pub struct PageSource {
    /// Gives this many contiguous pages, or none.
    pub alloc: fn(pages: usize) -> Option<PhysAddr>,
    /// Takes them back.
    pub free: fn(base: PhysAddr, pages: usize),
}

static SOURCE: Once<PageSource> = Once::new();

/// Names the functions that drivers take pages from; the first call counts.
///
/// # Safety
/// What `alloc` gives is page-aligned RAM, mapped cacheable and writable at its physical address, used by
/// nobody else until `free` takes it back.
pub unsafe fn register(source: PageSource) {
    SOURCE.call_once(|| source);
}

/// The [`Hal`] of a machine whose devices see memory where we do.
#[derive(Debug)]
pub struct Identity;

/// Zeroed, contiguous pages that a driver shares with its device; they go back when dropped.
#[derive(Debug)]
pub struct Pages {
    base: PhysAddr,
    start: NonNull<u8>,
    pages: usize,
}

// SAFETY: memory is tied to no CPU.
unsafe impl Send for Pages {}
// SAFETY: a `&Pages` gives out addresses only; using one is the user's claim.
unsafe impl Sync for Pages {}

impl Pages {
    /// Takes pages from the registered source.
    pub fn take(pages: usize) -> Option<Self> {
        let bytes = usize::try_from(PAGE_SIZE).ok()?.checked_mul(pages).filter(|bytes| *bytes > 0)?;
        let base = (SOURCE.get()?.alloc)(pages)?;
        let start = pointer(base)?;
        // SAFETY: `register`'s caller promised that these pages are mapped, writable and ours.
        unsafe { start.write_bytes(0, bytes) };
        Some(Self { base, start, pages })
    }

    /// Where the device sees them.
    pub fn base(&self) -> PhysAddr {
        self.base
    }

    /// Where we see the byte at `offset`, which must lie in them.
    pub fn at(&self, offset: usize) -> NonNull<u8> {
        assert!((offset as u64) < PAGE_SIZE * self.pages as u64, "past the end of a driver's pages");
        self.start.map_addr(|address| address.saturating_add(offset))
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        give_back(self.base, self.pages);
    }
}

fn pointer(base: PhysAddr) -> Option<NonNull<u8>> {
    NonNull::new(core::ptr::with_exposed_provenance_mut(usize::try_from(base.bits()).ok()?))
}

fn give_back(base: PhysAddr, pages: usize) {
    if let Some(source) = SOURCE.get() {
        (source.free)(base, pages);
    }
}

// SAFETY: pages are valid, aligned, ours alone and zeroed, by the contract of `register`; an address handed to
// the device is the buffer's own.
unsafe impl Hal for Identity {
    fn dma_alloc(pages: usize, _direction: BufferDirection) -> (u64, NonNull<u8>) {
        match Pages::take(pages) {
            Some(taken) => {
                let taken = core::mem::ManuallyDrop::new(taken);
                (taken.base.bits(), taken.start)
            }
            // Address 0 is the crate's word for a failure.
            None => (0, NonNull::dangling()),
        }
    }

    unsafe fn dma_dealloc(base: u64, _start: NonNull<u8>, pages: usize) -> i32 {
        give_back(PhysAddr::new(base), pages);
        0
    }

    unsafe fn mmio_phys_to_virt(base: u64, _size: usize) -> NonNull<u8> {
        // For PCI's BARs only, and there is no PCI.
        pointer(PhysAddr::new(base)).unwrap_or(NonNull::dangling())
    }

    unsafe fn share(buffer: NonNull<[u8]>, _direction: BufferDirection) -> u64 {
        buffer.cast::<u8>().as_ptr().expose_provenance() as u64
    }

    unsafe fn unshare(_base: u64, _buffer: NonNull<[u8]>, _direction: BufferDirection) {}
}
