//! EL2's heap: metadata only, never guest memory.
//!
//! One arena, taken at boot. Whoever allocates on behalf of a guest uses the `try_` methods of the collections
//! and turns failure into a refusal; what is left to the aborting ones is bounded by the machine, not by
//! guests (DESIGN 18). So that these find memory when guests have used all they can get, a part of the arena is set
//! aside, in pieces. An allocation that finds nothing opens one after the other; from then on [`has_room`] says no to
//! whatever guests would have grow, until all of them can be set aside once more. Leaves of objects' indexes lie in blocks
//! that are cut from the arena a `slab` at a time.
#![expect(unsafe_code, reason = "the arena is memory by address")]

use core::alloc::{GlobalAlloc, Layout};
use core::ops::Range;
use core::ptr::{NonNull, null_mut};
use core::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use talc::{OomHandler, Span, Talc, Talck};

use super::slab::{BLOCK, SLAB, Slabs};
use crate::arch::percpu;

#[global_allocator]
static HEAP: Heap = Heap {
    arena: Talc::new(Reserve { first: None, pieces: 0, wanted: 0 }).lock(),
    slabs: spin::Mutex::new(Slabs::new()),
};

/// The arena, and what is cut into blocks of it. Each has its lock, and nobody both.
struct Heap {
    arena: Talck<spin::Mutex<()>, Reserve>,
    slabs: spin::Mutex<Slabs>,
}

/// Some of what is set aside is open. Set and cleared under the arena's lock; who reads it without that is late by one
/// allocation at most.
static OPEN: AtomicBool = AtomicBool::new(false);

/// Bytes of the arena. What of it is free nobody counts: that would be in the way of each allocation.
static ARENA: AtomicUsize = AtomicUsize::new(0);

/// CPUs that do what must not fail, a bit each: for them there is room.
static VITAL: AtomicU64 = AtomicU64::new(0);
const _: () = assert!(percpu::MAX_CPUS <= 64, "a bit each");

/// The part of the arena that is set aside, within bounds.
const RESERVE_SHARE: usize = 16;
const RESERVE_MIN: usize = 1 << 20;
const RESERVE_MAX: usize = 8 << 20;
/// It is set aside in pieces: what many guests leave between them when they end has no room for more in a row. What must
/// not fail asks for less than this at a time.
const PIECE_BYTES: usize = 16 << 10;
const PIECE: Layout = match Layout::from_size_align(PIECE_BYTES, 16) {
    Ok(piece) => piece,
    Err(_) => panic!("16 is a power of two"),
};
/// Pieces that are set aside at one go, once guests run (invariant I6).
const FEW: usize = 8;

// SAFETY: each part answers for its own, and the layout says whose something is.
unsafe impl GlobalAlloc for Heap {
    #[inline]
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if is_block(layout) {
            let block = self.slabs.lock().take();
            return block.map_or_else(|| self.first_block(), NonNull::as_ptr);
        }
        // SAFETY: the caller's promise.
        unsafe { self.arena.alloc(layout) }
    }

    #[inline]
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        if is_block(layout) {
            // SAFETY: the caller's promise: it was allocated, and so it is somewhere.
            let block = unsafe { NonNull::new_unchecked(at) };
            // SAFETY: the caller's promise, and blocks are of slabs.
            let memory = unsafe { self.slabs.lock().give(block) };
            if let Some(memory) = memory {
                // SAFETY: `first_block` allocated it with this layout.
                unsafe { self.give_back(memory.as_ptr(), SLAB) };
            }
            return;
        }
        // SAFETY: the caller's promise.
        unsafe { self.give_back(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller's promise.
        let wanted = unsafe { Layout::from_size_align_unchecked(size, layout.align()) };
        if !is_block(layout) && !is_block(wanted) {
            // SAFETY: the caller's promise.
            return unsafe { self.arena.realloc(at, layout, size) };
        }
        // SAFETY: the caller's promise: the layout has a size.
        let to = unsafe { self.alloc(wanted) };
        if !to.is_null() {
            // SAFETY: both are as large at least, and one was just allocated.
            unsafe { to.copy_from_nonoverlapping(at, layout.size().min(size)) };
            // SAFETY: the caller's promise.
            unsafe { self.dealloc(at, layout) };
        }
        to
    }
}

impl Heap {
    /// A block of a new slab.
    #[cold]
    fn first_block(&self) -> *mut u8 {
        // SAFETY: the layout has a size.
        let memory = NonNull::new(unsafe { self.arena.alloc(SLAB) });
        let mut slabs = self.slabs.lock();
        if let Some(memory) = memory {
            // SAFETY: it was just allocated with this layout.
            unsafe { slabs.add(memory) };
        }
        // Without one somebody may have given a block back meanwhile.
        slabs.take().map_or(null_mut(), NonNull::as_ptr)
    }

    /// Out of the way of a block's return.
    ///
    /// # Safety
    /// As for [`GlobalAlloc::dealloc`], and it is no block.
    #[inline(never)]
    unsafe fn give_back(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { self.arena.dealloc(at, layout) }
    }
}

/// True for what is a block of a slab.
const fn is_block(layout: Layout) -> bool {
    layout.size() == BLOCK.size() && layout.align() == BLOCK.align()
}

/// Where a piece is; it begins with where the next one is.
type Next = Option<NonNull<u8>>;

/// What is set aside.
struct Reserve {
    first: Next,
    pieces: usize,
    wanted: usize,
}

// SAFETY: the pieces are memory, and tied to no CPU; only who has the arena's lock touches them.
unsafe impl Send for Reserve {}

impl OomHandler for Reserve {
    // Out of the way of every allocation that finds something.
    #[cold]
    #[inline(never)]
    fn handle_oom(talc: &mut Talc<Self>, wanted: Layout) -> Result<(), ()> {
        if wanted.size() >= PIECE_BYTES {
            return Err(()); // it can be refused
        }
        let piece = talc.oom_handler.first.ok_or(())?;
        // SAFETY: `set_aside` wrote it, and it was nobody's since.
        talc.oom_handler.first = unsafe { piece.cast::<Next>().read() };
        talc.oom_handler.pieces -= 1;
        OPEN.store(true, Relaxed);
        // SAFETY: `set_aside` allocated it with this layout.
        unsafe { talc.free(piece, PIECE) };
        Ok(())
    }
}

/// Sets pieces of the heap aside, so many at most; false if not all are there that are wanted.
fn set_aside(talc: &mut Talc<Reserve>, most: usize) -> bool {
    for _ in 0..most.min(talc.oom_handler.wanted - talc.oom_handler.pieces) {
        // SAFETY: the layout has a size. The handler gives nothing for a piece.
        let Ok(piece) = (unsafe { talc.malloc(PIECE) }) else { break };
        // SAFETY: it was just allocated, and a piece is larger and aligned.
        unsafe { piece.cast::<Next>().write(talc.oom_handler.first) };
        talc.oom_handler.first = Some(piece);
        talc.oom_handler.pieces += 1;
    }
    let done = talc.oom_handler.pieces == talc.oom_handler.wanted;
    OPEN.store(!done, Relaxed);
    done
}

/// Gives the heap its arena.
///
/// # Safety
/// The range is mapped writable and nobody else's, for ever.
pub unsafe fn init(arena: Range<u64>) {
    let at = |address: u64| usize::try_from(address).map(core::ptr::with_exposed_provenance_mut);
    let (Ok(start), Ok(end)) = (at(arena.start), at(arena.end)) else { return };
    let mut talc = HEAP.arena.lock();
    // SAFETY: the caller's promise. An arena too small to be used leaves a heap that refuses everything.
    let _ = unsafe { talc.claim(Span::new(start, end)) };
    ARENA.store(end.addr() - start.addr(), Relaxed);
    talc.oom_handler.wanted = (heap_bytes() / RESERVE_SHARE).clamp(RESERVE_MIN, RESERVE_MAX) / PIECE_BYTES;
    set_aside(&mut talc, usize::MAX);
}

/// False while guests may not have the books grow: what is free is for what must not fail.
#[inline]
pub fn has_room() -> bool {
    !OPEN.load(Relaxed) || is_eased()
}

/// Does what must not fail, and takes no more than was given back for it: meanwhile there is room on this CPU.
pub fn vitally<T>(work: impl FnOnce() -> T) -> T {
    let own = 1 << percpu::cpu();
    VITAL.fetch_or(own, Relaxed);
    let done = work();
    VITAL.fetch_and(!own, Relaxed);
    done
}

/// Bytes of the arena.
pub fn heap_bytes() -> usize {
    ARENA.load(Relaxed)
}

#[cold]
fn is_eased() -> bool {
    if VITAL.load(Relaxed) & 1 << percpu::cpu() != 0 {
        return true;
    }
    set_aside(&mut HEAP.arena.lock(), FEW)
}
