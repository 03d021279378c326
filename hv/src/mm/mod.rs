//! What joins `vmobject` and `stage2` to the metal: adapters, and the heap.
//!
//! * [`ranges`] - which memory is free at boot.
//! * [`direct`] - the bytes of frames.
//! * `heap` - EL2's own allocations; on the host the standard library's.

pub mod direct;
#[cfg(target_os = "none")]
pub mod heap;
pub mod ranges;
