//! Data and instruction caches: making what EL2 wrote visible to a guest that looks with its caches off.

use super::sysreg::{instruction, read_sysreg, write_sysreg};
use crate::arch::setway;

/// Bytes in a data cache line, the smallest of any level.
pub fn line() -> usize {
    4 << ((read_sysreg!("ctr_el0") >> 16) & 0xf)
}

/// True when `DC ZVA` may be used, and on how many bytes it works.
pub fn zva_bytes() -> Option<usize> {
    let dczid = read_sysreg!("dczid_el0");
    (dczid & 0x10 == 0).then_some(4 << (dczid & 0xf))
}

/// Runs `$op` on every line of a range, then waits for it.
macro_rules! each_line {
    ($op:literal, $start:ident, $bytes:ident) => {{
        let line = line() as u64;
        let start = $start.addr() as u64 & !(line - 1);
        let end = $start.addr().saturating_add($bytes) as u64;
        let mut at = start;
        while at < end {
            instruction!($op, at);
            at = at.saturating_add(line);
        }
        instruction!("dsb ish");
    }};
}

/// Cleans lines to the point of coherency.
pub fn clean(start: *const u8, bytes: usize) {
    each_line!("dc cvac", start, bytes);
}

/// Cleans and invalidates lines to the point of coherency.
pub fn clean_invalidate(start: *const u8, bytes: usize) {
    each_line!("dc civac", start, bytes);
}

/// Waits until what a guest has asked of caches and TLBs on this CPU is done, for one that goes on elsewhere: its own
/// barrier there would not wait for it.
pub fn finish() {
    instruction!("dsb ish");
}

/// Makes what was written visible to instruction fetches on every CPU. The data side must be clean to the
/// point of unification already; ours is, to the point of coherency.
pub fn sync_instructions() {
    // IVAU by address needs the address to be mapped executable-alike on some implementations and is slower
    // for a page than this, which DIC lets us skip altogether.
    if read_sysreg!("ctr_el0") & (1 << 29) == 0 {
        instruction!("ic ialluis");
        instruction!("dsb ish");
    }
}

/// Cleans and invalidates one line by set and way, as the operand of `DC CISW` names it; nothing if there is no such
/// line.
pub fn clean_invalidate_set_way(operand: u64) {
    let Some(level) = setway::level(operand, read_sysreg!("clidr_el1")) else { return };
    // Which cache CCSIDR speaks of is the guest's to choose.
    let chosen = read_sysreg!("csselr_el1");
    write_sysreg!("csselr_el1", level << 1);
    instruction!("isb");
    let ccsidr = read_sysreg!("ccsidr_el1");
    write_sysreg!("csselr_el1", chosen);
    instruction!("isb");
    // ID_AA64MMFR2_EL1.CCIDX
    let wide = read_sysreg!("s3_0_c0_c7_2") >> 20 & 0xf != 0;
    if setway::exists(operand, ccsidr, wide) {
        instruction!("dc cisw", operand);
        instruction!("dsb sy");
    }
}
