//! Caches, which memory does not have here.

/// Bytes in a data cache line.
pub fn line() -> usize {
    64
}

/// True when `DC ZVA` may be used, and on how many bytes it works.
pub fn zva_bytes() -> Option<usize> {
    Some(64)
}

/// Cleans lines to the point of coherency.
pub fn clean(_start: *const u8, _bytes: usize) {}

/// Cleans and invalidates lines to the point of coherency.
pub fn clean_invalidate(_start: *const u8, _bytes: usize) {}

/// Waits for what a guest has asked of caches and TLBs.
pub fn finish() {}

/// Makes what was written visible to instruction fetches on every CPU.
pub fn sync_instructions() {}

/// Cleans and invalidates one line by set and way.
pub fn clean_invalidate_set_way(_operand: u64) {}
