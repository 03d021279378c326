//! One stage-2 descriptor, VMSAv8-64 (Arm ARM D8.3), as a value.

use vmobject::addr::{Pfn, PhysAddr};
use vmobject::prot::Prot;

/// A descriptor's bits. The meaning of bit 1 depends on the level, so the caller says which it asks about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor(pub u64);

const VALID: u64 = 1;
const TABLE_OR_PAGE: u64 = 1 << 1;
/// Normal memory, inner and outer write-back cacheable: MemAttr 0b1111, without FEAT_S2FWB.
const NORMAL: u64 = 0b1111 << 2;
const READ: u64 = 1 << 6;
const WRITE: u64 = 1 << 7;
const INNER_SHAREABLE: u64 = 0b11 << 8;
const ACCESSED: u64 = 1 << 10;
/// Dirty bit modifier: the hardware may set S2AP[1] (FEAT_HAFDBS).
const DBM: u64 = 1 << 51;
/// XN[1]: never executable, at EL1 and EL0 alike.
const NEVER_EXECUTE: u64 = 1 << 54;
const ADDRESS: u64 = 0x0000_ffff_ffff_f000;

impl Descriptor {
    /// Nothing here.
    pub const INVALID: Self = Self(0);

    /// Points at the next table.
    pub const fn table(frame: Pfn) -> Self {
        Self(frame.base().bits() | TABLE_OR_PAGE | VALID)
    }

    /// A page, accessed. Writable means `S2AP[1]`, or with `hardware_dirty` DBM and `S2AP[1]` clear: clean until
    /// the hardware says otherwise.
    pub fn page(frame: Pfn, prot: Prot, hardware_dirty: bool) -> Self {
        Self::leaf(frame, prot, hardware_dirty, TABLE_OR_PAGE)
    }

    /// A 2 MiB block, otherwise as [`Descriptor::page`].
    pub fn block(frame: Pfn, prot: Prot, hardware_dirty: bool) -> Self {
        Self::leaf(frame, prot, hardware_dirty, 0)
    }

    fn leaf(frame: Pfn, prot: Prot, hardware_dirty: bool, kind: u64) -> Self {
        let mut bits = frame.base().bits() | NORMAL | INNER_SHAREABLE | ACCESSED | kind | VALID;
        if prot.allows(Prot::READ) {
            bits |= READ;
        }
        if prot.allows(Prot::WRITE) {
            bits |= if hardware_dirty { DBM } else { WRITE };
        }
        if !prot.allows(Prot::EXECUTE) {
            bits |= NEVER_EXECUTE;
        }
        Self(bits)
    }

    /// The walker may use it.
    pub const fn is_valid(self) -> bool {
        self.0 & VALID != 0
    }
    /// Above the last level: it points at a table.
    pub const fn is_table(self) -> bool {
        self.0 & (VALID | TABLE_OR_PAGE) == VALID | TABLE_OR_PAGE
    }
    /// Above the last level: it maps a block.
    pub const fn is_block(self) -> bool {
        self.0 & (VALID | TABLE_OR_PAGE) == VALID
    }
    /// The frame it points at.
    pub fn frame(self) -> Pfn {
        // The mask leaves 48 bits; the tables hold only frames that fit, so the default is never taken.
        PhysAddr::new(self.0 & ADDRESS).frame().unwrap_or_default()
    }
    /// What it allows.
    pub fn prot(self) -> Prot {
        let mut prot = Prot::NONE;
        if self.0 & READ != 0 {
            prot = prot | Prot::READ;
        }
        if self.0 & (WRITE | DBM) != 0 {
            prot = prot | Prot::WRITE;
        }
        if self.0 & NEVER_EXECUTE == 0 {
            prot = prot | Prot::EXECUTE;
        }
        prot
    }
    /// It was written through since it was made clean. A leaf that software made writable counts as dirty.
    pub const fn is_dirty(self) -> bool {
        self.0 & WRITE != 0
    }
    /// It was used since the flag was cleared.
    pub const fn is_accessed(self) -> bool {
        self.0 & ACCESSED != 0
    }
    /// Less everything that `keep` does not allow. Taking write away clears `S2AP[1]` *and* DBM (I14).
    pub fn restricted(self, keep: Prot) -> Self {
        let mut bits = self.0;
        if !keep.allows(Prot::READ) {
            bits &= !READ;
        }
        if !keep.allows(Prot::WRITE) {
            bits &= !(WRITE | DBM);
        }
        if !keep.allows(Prot::EXECUTE) {
            bits |= NEVER_EXECUTE;
        }
        Self(bits)
    }
    /// The same, not accessed, and clean where the hardware can tell it is written again.
    pub const fn aged(self) -> Self {
        let clean = if self.0 & DBM != 0 { WRITE } else { 0 };
        Self(self.0 & !(ACCESSED | clean))
    }
    /// The same, accessed.
    pub const fn touched(self) -> Self {
        Self(self.0 | ACCESSED)
    }
}
