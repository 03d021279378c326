//! Whole pages: zero, copy. There are no caches to clean here.
#![expect(unsafe_code, reason = "frames' bytes are reached by pointer, here as there")]

/// Bytes in a page.
const PAGE: usize = 4096;

/// Zeroes a page and cleans it.
///
/// # Safety
/// `page` is page-aligned, and its 4096 bytes are writable and nobody else's.
pub unsafe fn zero(page: *mut u8) {
    // SAFETY: the caller's promise.
    unsafe { page.write_bytes(0, PAGE) }
}

/// Copies a page and cleans the copy.
///
/// # Safety
/// Both are page-aligned; nobody else writes either, and `to` is nobody else's.
pub unsafe fn copy(to: *mut u8, from: *const u8) {
    // SAFETY: the caller's promise; two pages do not overlap.
    unsafe { to.copy_from_nonoverlapping(from, PAGE) }
}

/// No sum: what has no CRC instructions does without.
///
/// # Safety
/// As the real one's.
pub unsafe fn crc(_page: *const u8, _key: u64) -> Option<u32> {
    None
}

/// Cleans a page.
///
/// # Safety
/// As the real one's.
pub unsafe fn clean(_page: *const u8) {}

/// Cleans and invalidates a page.
///
/// # Safety
/// As the real one's.
pub unsafe fn clean_invalidate(_page: *const u8) {}
