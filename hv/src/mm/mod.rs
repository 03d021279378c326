//! What joins `vmobject` and `stage2` to the metal: adapters, and the heap.
//!
//! * [`ranges`] - which memory is free at boot.
//! * [`direct`] - the bytes of frames.
//! * [`store`] - partitions of disks.
//! * [`machine`] - all of it as one, and the VM on it; [`tables`] its source of table frames.
//! * `heap` - EL2's own allocations; on the host the standard library's. `slab`: those of one size.

pub mod ranges;

pub mod direct;

#[cfg(target_os = "none")]
pub mod heap;

#[cfg(any(target_os = "none", test))]
mod slab;

pub mod store;

pub mod tables;

pub mod machine;

#[cfg(target_os = "none")]
pub use heap::{has_room, heap_bytes, vitally};
/// False while guests may not have the books grow; the host has room.
#[cfg(not(target_os = "none"))]
pub const fn has_room() -> bool {
    true
}

/// Bytes of the heap; the host's are its own business.
#[cfg(not(target_os = "none"))]
pub const fn heap_bytes() -> usize {
    0
}

/// Does what must not fail; the host has room.
#[cfg(not(target_os = "none"))]
pub fn vitally<T>(work: impl FnOnce() -> T) -> T {
    work()
}

pub use machine::{Map, disks, load_guest, map_of, new_map, told, vm};
