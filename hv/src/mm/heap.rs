//! EL2's heap: metadata only, never guest memory.
//!
//! One arena, taken at boot. Whoever allocates on behalf of a guest uses the `try_` methods of the collections
//! and turns failure into a refusal; what is left to the aborting ones is bounded by the machine, not by
//! guests (DESIGN 18).
#![expect(unsafe_code, reason = "the arena is memory by address")]

use core::ops::Range;
use talc::{ErrOnOom, Span, Talc, Talck};

#[global_allocator]
static HEAP: Talck<spin::Mutex<()>, ErrOnOom> = Talc::new(ErrOnOom).lock();

/// Gives the heap its arena.
///
/// # Safety
/// The range is mapped writable and nobody else's, for ever.
pub unsafe fn init(arena: Range<u64>) {
    let at = |address: u64| usize::try_from(address).map(core::ptr::with_exposed_provenance_mut);
    let (Ok(start), Ok(end)) = (at(arena.start), at(arena.end)) else { return };
    // SAFETY: the caller's promise. An arena too small to be used leaves a heap that refuses everything.
    let _ = unsafe { HEAP.lock().claim(Span::new(start, end)) };
}
