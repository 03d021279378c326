//! Whole pages: zero, copy, clean. Assembly where the CPU's cache geometry is the usual one, else line by line.

use super::cache;
use super::sysreg::read_sysreg;

core::arch::global_asm!(include_str!("page.S"));
// What moves anything else: stronger than the versions that come with the compiler.
core::arch::global_asm!(include_str!("copy.S"));

/// Bytes in a page.
const PAGE: usize = 4096;

unsafe extern "C" {
    fn hv_page_zero(page: *mut u8);
    fn hv_page_copy(to: *mut u8, from: *const u8);
    fn hv_page_clean(page: *const u8);
    fn hv_page_clean_invalidate(page: *const u8);
    fn hv_page_crc(page: *const u8, key: u64) -> u32;
}

/// The assembly takes 64-byte lines; longer ones are only cleaned more than once.
fn usual_lines() -> bool {
    (read_sysreg!("ctr_el0") >> 16) & 0xf >= 4
}

/// DZP clear and 64-byte blocks.
fn usual_zva() -> bool {
    read_sysreg!("dczid_el0") & 0x1f == 4
}

/// Zeroes a page and cleans it to the point of coherency.
///
/// # Safety
/// `page` is page-aligned, and its 4096 bytes are mapped writable and nobody else's.
pub unsafe fn zero(page: *mut u8) {
    if usual_zva() && usual_lines() {
        // SAFETY: the caller's promise.
        unsafe { hv_page_zero(page) }
    } else {
        // SAFETY: the caller's promise.
        unsafe { page.write_bytes(0, PAGE) };
        cache::clean(page, PAGE);
    }
}

/// Copies a page as a guest has it that may look with its caches off: cleans and invalidates it first, and cleans the
/// copy to the point of coherency.
///
/// # Safety
/// Both are page-aligned and mapped; nobody else writes either, and `to` is nobody else's.
pub unsafe fn copy(to: *mut u8, from: *const u8) {
    if usual_lines() {
        // SAFETY: the caller's promise.
        unsafe { hv_page_copy(to, from) }
    } else {
        cache::clean_invalidate(from.cast_mut(), PAGE);
        // SAFETY: the caller's promise; two pages do not overlap.
        unsafe { to.copy_from_nonoverlapping(from, PAGE) };
        cache::clean(to, PAGE);
    }
}

/// Cleans and invalidates a page, and sums it behind a key with the CPU's own CRC-32C: a third of the instructions of
/// anything else. `None` where the CPU has none, or lines of another size.
///
/// # Safety
/// `page` is page-aligned and mapped.
pub unsafe fn crc(page: *const u8, key: u64) -> Option<u32> {
    if read_sysreg!("s3_0_c0_c6_0") >> 16 & 0xf == 0 || !usual_lines() {
        return None;
    }
    // SAFETY: the caller's promise, and the CPU has these instructions.
    Some(unsafe { hv_page_crc(page, key) })
}

/// Cleans a page to the point of coherency.
///
/// # Safety
/// `page` is page-aligned and mapped.
pub unsafe fn clean(page: *const u8) {
    if usual_lines() {
        // SAFETY: the caller's promise.
        unsafe { hv_page_clean(page) }
    } else {
        cache::clean(page, PAGE);
    }
}

/// Cleans and invalidates a page: what a guest wrote with its caches off is what is read next.
///
/// # Safety
/// `page` is page-aligned and mapped.
pub unsafe fn clean_invalidate(page: *const u8) {
    if usual_lines() {
        // SAFETY: the caller's promise.
        unsafe { hv_page_clean_invalidate(page) }
    } else {
        cache::clean_invalidate(page, PAGE);
    }
}
