//! Tables: 512 descriptors in a frame, lent by whoever owns the memory.

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
    /// The table in a frame that [`TableSource::alloc`] gave.
    fn table(&self, frame: Pfn) -> &Table;
}
