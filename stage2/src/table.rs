//! Tables: 512 descriptors in a frame, lent by whoever owns the memory.
//!
//! The tables are not ours: frames come from the VM, which counts and charges them, and the bytes are seen
//! through the owner's map of memory. So this crate needs no `unsafe`, and tests lend boxes.

use core::sync::atomic::AtomicU64;
use vmobject::addr::Pfn;

/// Descriptors in a table.
pub const ENTRIES: usize = 512;

/// A table as the walker sees it. The hardware writes to it too, so every access is atomic.
pub type Table = [AtomicU64; ENTRIES];

/// Where frames for tables come from, and how they are looked at.
pub trait TableSource: Send {
    /// A zeroed frame; `None` when there is none to be had.
    fn alloc(&self) -> Option<Pfn>;
    /// Takes a frame back. No walker can reach it any more.
    fn free(&self, frame: Pfn);
    /// The table in a frame that was given and not yet taken back.
    fn table(&self, frame: Pfn) -> &Table;

    /// Zeroed frames side by side for the start of a tree, aligned to their number, which is a power of two
    /// up to 16; each is taken back by [`TableSource::free`]. A source that has only single frames says so
    /// by `None`, and serves every geometry that starts in one table.
    fn alloc_root(&self, tables: u32) -> Option<Pfn> {
        if tables == 1 { self.alloc() } else { None }
    }
}
