//! One stage-2 descriptor, VMSAv8-64 (Arm ARM D8.3), as a value.
//!
//! A descriptor is 64 bits that a walker reads; its bit 1 means something else at the last level than
//! above it, so a caller says which it asks about by the name it calls. Nothing here touches memory:
//! `edit` does. The three kinds of entry that no walker uses are told apart by their low bits too:
//! nothing (zero), parked (a table's pointer kept with the valid bit clear), and a link between dead
//! tables (an address alone).

use vmobject::addr::{Pfn, PhysAddr};
use vmobject::prot::Prot;

/// A descriptor's bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor(u64);

const VALID: u64 = 1;
const TABLE_OR_PAGE: u64 = 1 << 1;
/// MemAttr: normal memory, inner and outer write-back cacheable.
const NORMAL: u64 = 0b1111 << 2;
/// MemAttr under FEAT_S2FWB: normal write-back whatever stage 1 says.
const FORCED_NORMAL: u64 = 0b0110 << 2;
const READ: u64 = 1 << 6;
const WRITE: u64 = 1 << 7;
const INNER_SHAREABLE: u64 = 0b11 << 8;
const ACCESSED: u64 = 1 << 10;
/// Dirty bit modifier: the hardware may set `S2AP[1]` (FEAT_HAFDBS).
const DBM: u64 = 1 << 51;
/// `XN[1]`: never executable, at EL1 and EL0 alike.
const NEVER_EXECUTE: u64 = 1 << 54;
/// One of the bits left to software: the leaf was dirty when write access was taken away lazily, and
/// nobody has been told yet.
const WAS_DIRTY: u64 = 1 << 55;
/// The 44 bits of an address that a [`Pfn`] can name; the bits above them are always clear here.
const ADDRESS: u64 = 0x0000_0fff_ffff_f000;

/// How leaves look on this CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Style {
    /// What every leaf has.
    base: u64,
    /// What makes one writable.
    write: u64,
    /// Accessed from the start, for a page that nobody asked for.
    early: u64,
}

impl Style {
    /// For a CPU that marks dirty leaves itself or not, that sets the access flag itself or not, and with
    /// HCR_EL2.FWB set or not.
    pub const fn new(hardware_access: bool, hardware_dirty: bool, force_write_back: bool) -> Self {
        let memory = if force_write_back { FORCED_NORMAL } else { NORMAL };
        Self {
            base: memory | INNER_SHAREABLE | VALID,
            write: if hardware_dirty { DBM } else { WRITE },
            early: if hardware_access { 0 } else { ACCESSED },
        }
    }

    const fn leaf(self, frame: Pfn, prot: Prot) -> Descriptor {
        let mut bits = self.base | frame.base().bits();
        if prot.allows(Prot::READ) {
            bits |= READ;
        }
        if prot.allows(Prot::WRITE) {
            bits |= self.write;
        }
        if !prot.allows(Prot::EXECUTE) {
            bits |= NEVER_EXECUTE;
        }
        Descriptor(bits)
    }

    /// A page, accessed. Where the hardware marks dirty leaves a writable one starts clean: DBM set and
    /// `S2AP[1]` clear. Elsewhere writable means dirty.
    pub const fn page(self, frame: Pfn, prot: Prot) -> Descriptor {
        Descriptor(self.leaf(frame, prot).0 | TABLE_OR_PAGE | ACCESSED)
    }

    /// A page that nobody asked for: not accessed yet where the hardware will say so when it is.
    pub const fn early_page(self, frame: Pfn, prot: Prot) -> Descriptor {
        Descriptor(self.leaf(frame, prot).0 | TABLE_OR_PAGE | self.early)
    }

    /// A 2 MiB block, otherwise as [`Style::page`].
    pub const fn block(self, first: Pfn, prot: Prot) -> Descriptor {
        Descriptor(self.leaf(first, prot).0 | ACCESSED)
    }
}

impl Descriptor {
    /// Nothing here.
    pub const NOTHING: Self = Self(0);

    /// A descriptor as it is in memory.
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }
    /// As it is in memory.
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// Points at the next table.
    pub const fn table(frame: Pfn) -> Self {
        Self(frame.base().bits() | TABLE_OR_PAGE | VALID)
    }
    /// Points at the next table for us, and nowhere for the walker.
    pub const fn parked(frame: Pfn) -> Self {
        Self(frame.base().bits() | TABLE_OR_PAGE)
    }
    /// A link between dead tables; `None` ends the list. Invalid to any walker that still looks.
    pub fn link(next: Option<Pfn>) -> Self {
        Self(next.map_or(0, |frame| frame.base().bits()))
    }
    /// The table that a link names.
    pub fn linked(self) -> Option<Pfn> {
        (self.0 != 0).then(|| self.frame())
    }

    /// A walker may use it.
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
    /// Above the last level: it keeps a table that no walker reaches.
    pub const fn is_parked(self) -> bool {
        self.0 & (VALID | TABLE_OR_PAGE) == TABLE_OR_PAGE
    }
    /// The frame it points at.
    pub fn frame(self) -> Pfn {
        // The mask leaves 44 bits, so there is always a frame, and the default is never taken.
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
    /// It was written through since it was made clean, as far as we know: a leaf that was writable without
    /// the hardware's help counts.
    pub const fn is_dirty(self) -> bool {
        self.0 & (WRITE | WAS_DIRTY) != 0
    }
    /// It was used since the flag was cleared.
    pub const fn is_accessed(self) -> bool {
        self.0 & ACCESSED != 0
    }

    /// Less everything that `keep` does not allow. Taking write access away clears `S2AP[1]` *and* DBM, and
    /// so the leaf is clean (I14).
    pub const fn restricted(self, keep: Prot) -> Self {
        let mut bits = self.0;
        if !keep.allows(Prot::READ) {
            bits &= !READ;
        }
        if !keep.allows(Prot::WRITE) {
            bits &= !(WRITE | DBM | WAS_DIRTY);
        }
        if !keep.allows(Prot::EXECUTE) {
            bits |= NEVER_EXECUTE;
        }
        Self(bits)
    }
    /// Less write access, remembering that it was dirty.
    pub const fn write_protected(self) -> Self {
        // From S2AP[1] to the software bit without a branch: 512 of these are done in one fault.
        let dirty = (self.0 & WRITE) << (WAS_DIRTY.trailing_zeros() - WRITE.trailing_zeros());
        Self(self.0 & !(WRITE | DBM) | dirty)
    }
    /// The same, not accessed, and clean where the hardware can tell it is written again.
    pub const fn aged(self) -> Self {
        let write = if self.0 & DBM != 0 { WRITE } else { 0 };
        Self(self.0 & !(ACCESSED | WAS_DIRTY | write))
    }
    /// The same frame and attributes with at least `other`'s permissions: `None` when the two differ in
    /// more than that, or `other` allows less. What this one remembers stays.
    pub fn upgraded_to(self, other: Self) -> Option<Self> {
        const WRITABLE: u64 = WRITE | DBM;
        const MEMORY: u64 = ACCESSED | WAS_DIRTY;
        let same = (self.0 ^ other.0) & !(READ | WRITABLE | NEVER_EXECUTE | MEMORY) == 0;
        let more = (self.0 & !other.0 & READ) | (other.0 & !self.0 & NEVER_EXECUTE) == 0
            && (self.0 & WRITABLE == 0 || other.0 & WRITABLE != 0);
        // Both leaves are of one style, so a WRITE that only we have is dirty state under a DBM of both.
        (same && more).then_some(Self(other.0 | self.0 & (WRITE | MEMORY)))
    }
    /// The same, accessed.
    pub const fn touched(self) -> Self {
        Self(self.0 | ACCESSED)
    }
    /// What this leaf remembers and `copy`, made of an older reading of it, does not: bits to add.
    pub const fn remembered_since(self, copy: Self) -> u64 {
        self.0 & !copy.0 & (ACCESSED | WRITE)
    }

    /// This leaf of frame 0 as one of another frame.
    #[inline]
    pub fn of(self, frame: Pfn) -> Self {
        debug_assert_eq!(self.0 & ADDRESS, 0);
        Self(self.0 | frame.base().bits())
    }
    /// The page at `offset` of this block as a leaf of the last level.
    pub fn page_of_block(self, offset: u32) -> Self {
        // The frame is that of an aligned block and the offset is below 512, so they do not overlap.
        Self(self.0 | TABLE_OR_PAGE | Pfn::new(offset).base().bits())
    }
    /// The frame of the page at `offset` in this block.
    pub fn frame_in_block(self, offset: u32) -> Pfn {
        Pfn::new(self.frame().number() | offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Style = Style::new(false, false, false);
    const MARKING: Style = Style::new(true, true, false);

    #[test]
    fn the_bits_of_a_leaf_are_those_of_the_architecture() {
        let frame = Pfn::new(0x12345);
        // AttrIndx 0xf, S2AP rw, inner shareable, AF, page.
        assert_eq!(PLAIN.page(frame, Prot::ALL).bits(), 0x1234_57ff);
        assert_eq!(PLAIN.page(frame, Prot::READ).bits(), 0x0040_0000_1234_577f);
        assert_eq!(MARKING.page(frame, Prot::ALL).bits(), 0x0008_0000_1234_577f);
        assert_eq!(MARKING.early_page(frame, Prot::READ_EXECUTE).bits(), 0x1234_537f);
        assert_eq!(Style::new(false, false, true).page(frame, Prot::ALL).bits(), 0x1234_57db);
        assert_eq!(PLAIN.block(Pfn::new(0x200), Prot::ALL).bits(), 0x0020_07fd);
        assert_eq!(Descriptor::table(frame).bits(), 0x1234_5003);
    }

    #[test]
    fn no_kind_of_entry_is_taken_for_another() {
        let frame = Pfn::new(0x1000);
        let kinds = [
            Descriptor::NOTHING,
            Descriptor::table(frame),
            PLAIN.block(frame, Prot::ALL),
            Descriptor::parked(frame),
            Descriptor::link(Some(frame)),
        ];
        let seen = kinds.map(|d| (d.is_table(), d.is_block(), d.is_parked(), d.linked() == Some(frame)));
        assert_eq!(seen[0], (false, false, false, false));
        assert_eq!(seen[1], (true, false, false, true));
        assert_eq!(seen[2], (false, true, false, true));
        assert_eq!(seen[3], (false, false, true, true));
        assert_eq!(seen[4], (false, false, false, true));
        assert_eq!(Descriptor::link(None), Descriptor::NOTHING);
    }

    #[test]
    fn write_protecting_clears_the_dirty_bit_modifier_too() {
        for style in [PLAIN, MARKING] {
            let leaf = style.page(Pfn::new(1), Prot::ALL);
            assert_eq!(leaf.restricted(Prot::READ_EXECUTE).bits() & (WRITE | DBM), 0);
            assert_eq!(leaf.write_protected().bits() & (WRITE | DBM), 0);
            assert_eq!(leaf.write_protected().prot(), Prot::READ_EXECUTE);
        }
    }

    #[test]
    fn lazy_write_protection_remembers_what_was_dirty_and_nothing_else() {
        let clean = MARKING.page(Pfn::new(1), Prot::ALL);
        let dirty = Descriptor(clean.0 | WRITE);
        assert!(!clean.write_protected().is_dirty());
        assert!(dirty.write_protected().is_dirty());
        assert!(dirty.write_protected().write_protected().is_dirty(), "twice is as good as once");
        assert!(!dirty.write_protected().aged().is_dirty());
    }

    #[test]
    fn an_upgrade_keeps_the_frame_and_what_the_leaf_remembers() {
        let read = MARKING.page(Pfn::new(1), Prot::READ_EXECUTE);
        let all = MARKING.page(Pfn::new(1), Prot::ALL);
        let dirty = Descriptor(all.0 | WRITE);
        assert_eq!(read.upgraded_to(all), Some(all));
        assert_eq!(dirty.upgraded_to(all), Some(dirty), "what was written stays dirty");
        assert_eq!(all.upgraded_to(read), None, "less is not an upgrade");
        assert_eq!(read.upgraded_to(MARKING.page(Pfn::new(2), Prot::ALL)), None);
        assert_eq!(all.aged().upgraded_to(all), Some(all), "it is accessed again");
    }
}
