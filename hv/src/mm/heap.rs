//! EL2's heap: metadata only, never guest memory.
//!
//! One arena, taken at boot. Whoever allocates on behalf of a guest uses the `try_` methods of the collections
//! and turns failure into a refusal; what is left to the aborting ones is bounded by the machine, not by
//! guests (DESIGN 18). So that these find memory when guests have used all they can get, a part of the arena is set
//! aside. The first allocation that finds nothing opens it; from then on [`has_room`] says no to whatever guests
//! would have grow, until so much is free again that the part can be set aside once more.
#![expect(unsafe_code, reason = "the arena is memory by address")]

use core::alloc::Layout;
use core::ops::Range;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use talc::{OomHandler, Span, Talc, Talck};

use crate::arch::percpu;

#[global_allocator]
static HEAP: Talck<spin::Mutex<()>, Reserve> =
    Talc::new(Reserve { block: None, layout: Layout::new::<()>() }).lock();

/// The part that is set aside is open. Set and cleared under the heap's lock; who reads it without that is late by one
/// allocation at most.
static OPEN: AtomicBool = AtomicBool::new(false);

/// CPUs that do what must not fail, a bit each: for them there is room.
static VITAL: AtomicU64 = AtomicU64::new(0);
const _: () = assert!(percpu::MAX_CPUS <= 64, "a bit each");

/// The part of the arena that is set aside, within bounds.
const RESERVE_SHARE: usize = 16;
const RESERVE_MIN: usize = 1 << 20;
const RESERVE_MAX: usize = 8 << 20;
/// So much of the arena free is room as well, though in pieces too small for the part that is set aside.
const ROOM_SHARE: usize = 4;

/// What is set aside.
struct Reserve {
    /// `None` while it is open.
    block: Option<NonNull<u8>>,
    layout: Layout,
}

// SAFETY: the block is memory, and tied to no CPU; only who has the heap's lock touches it.
unsafe impl Send for Reserve {}

impl OomHandler for Reserve {
    fn handle_oom(talc: &mut Talc<Self>, wanted: Layout) -> Result<(), ()> {
        let layout = talc.oom_handler.layout;
        if wanted.size() >= layout.size() {
            return Err(()); // it would not help
        }
        let block = talc.oom_handler.block.take().ok_or(())?;
        OPEN.store(true, Relaxed);
        // SAFETY: `set_aside` allocated it with this layout, and it was nobody's since.
        unsafe { talc.free(block, layout) };
        Ok(())
    }
}

/// Sets a part of the heap aside; false if so much is not free in one piece.
fn set_aside(talc: &mut Talc<Reserve>) -> bool {
    // SAFETY: the layout has a size; while no block is there the handler gives nothing.
    let block = unsafe { talc.malloc(talc.oom_handler.layout) };
    talc.oom_handler.block = block.ok();
    let done = talc.oom_handler.block.is_some();
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
    let mut talc = HEAP.lock();
    // SAFETY: the caller's promise. An arena too small to be used leaves a heap that refuses everything.
    let _ = unsafe { talc.claim(Span::new(start, end)) };
    let bytes = talc.get_counters().claimed_bytes / RESERVE_SHARE;
    if let Ok(layout) = Layout::from_size_align(bytes.clamp(RESERVE_MIN, RESERVE_MAX), 16) {
        talc.oom_handler.layout = layout;
        set_aside(&mut talc);
    }
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

/// Bytes of the arena, and how many of them are free; what is set aside is not.
pub fn heap_bytes() -> (usize, usize) {
    let talc = HEAP.lock();
    let counters = talc.get_counters();
    (counters.claimed_bytes, counters.available_bytes)
}

#[cold]
fn is_eased() -> bool {
    if VITAL.load(Relaxed) & 1 << percpu::cpu() != 0 {
        return true;
    }
    let mut talc = HEAP.lock();
    let counters = talc.get_counters();
    let plenty = counters.available_bytes >= counters.claimed_bytes / ROOM_SHARE;
    talc.oom_handler.block.is_some() || set_aside(&mut talc) || plenty
}
