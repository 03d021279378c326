//! An identity map, for guests that want caches: the first GiB device, everything above normal memory.

use core::sync::atomic::{AtomicU64, Ordering};

/// One translation table.
#[repr(C, align(4096))]
pub struct Table(pub [AtomicU64; 512]);

impl Table {
    /// With nothing in it.
    pub const fn new() -> Self {
        Self([const { AtomicU64::new(0) }; 512])
    }
    /// Where it lies: with an identity map, also physically.
    pub fn address(&self) -> u64 {
        &raw const *self as u64
    }
    /// Writes an entry.
    pub fn set(&self, index: usize, entry: u64) {
        self.0[index].store(entry, Ordering::Relaxed);
    }
}

impl Default for Table {
    fn default() -> Self {
        Self::new()
    }
}

/// A descriptor of a table.
pub const TABLE: u64 = 0b11;
/// A descriptor of a page.
pub const PAGE: u64 = 0b11;
/// A descriptor of a block.
pub const BLOCK: u64 = 0b01;
/// Attributes: accessed, inner shareable, memory type 0 (normal) or 1 (device).
pub const NORMAL: u64 = 1 << 10 | 3 << 8;
/// The same for devices.
pub const DEVICE: u64 = NORMAL | 1 << 2;
/// Not global: the entry belongs to its ASID.
pub const NOT_GLOBAL: u64 = 1 << 11;

static ROOT: Table = Table::new();

/// Fills a level 1 table with the identity map.
pub fn fill(root: &Table) {
    root.set(0, DEVICE | BLOCK);
    for gib in 1..512 {
        root.set(gib, (gib as u64) << 30 | NORMAL | BLOCK);
    }
}

/// Switches this vCPU's MMU and caches on, over the identity map.
pub fn enable() {
    fill(&ROOT);
    enable_with(ROOT.address(), 0);
}

/// The same over a level 1 table of the caller's, which must map this code, for an ASID.
pub fn enable_with(root: u64, asid: u64) {
    // 39 bits of address, 4 KiB pages, write-back inner shareable walks; 40 bits out; no upper half.
    const TCR: u64 = 25 | 1 << 8 | 1 << 10 | 3 << 12 | 1 << 23 | 2 << 32;
    // Normal write-back; Device-nGnRnE.
    const MAIR: u64 = 0x00ff;
    // RES1 bits, MMU, data and instruction caches.
    const SCTLR: u64 = 0x30d0_0800 | 1 | 1 << 2 | 1 << 12;
    write_register!("mair_el1", MAIR);
    write_register!("tcr_el1", TCR);
    write_register!("ttbr0_el1", root | asid << 48);
    instruction!("dsb ish\ntlbi vmalle1\ndsb ish\nisb");
    write_register!("sctlr_el1", SCTLR);
}
