//! What the CPU can do, and the shape of the tables that follows from it.
//!
//! Pure arithmetic on register values: [`Features`] from the ID registers, [`Geometry`] from the features,
//! VTCR_EL2 from the geometry. The granule is 4 KiB, an entry of level 3 maps a page, of level 2 a block of
//! 2 MiB. A tree starts at level 2, 1 or 0, in one table or in up to 16 side by side ("concatenated", Arm
//! ARM D8.2), whatever the width of a guest's addresses asks for. Used by everything after it.

use crate::descriptor::Style;
use crate::table::ENTRIES;
use vmobject::addr::{Ipa, IpaRange, PAGE_SHIFT};

/// The last level: its entries map pages.
pub const LAST: u32 = 3;
/// The level whose blocks are 2 MiB.
pub const BLOCK: u32 = 2;
/// Bits of an address that one level translates.
const BITS: u32 = 9;
const _: () = assert!(ENTRIES == 1 << BITS, "masks below have nine bits");

/// Facts of the CPU, from its ID registers (every CPU of the host must agree; take the least).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features {
    /// ID_AA64MMFR0_EL1.PARange.
    pub pa_range: u8,
    /// FEAT_HAFDBS: the hardware sets the access flag.
    pub hardware_access: bool,
    /// FEAT_HAFDBS: the hardware marks writable leaves dirty.
    pub hardware_dirty: bool,
    /// FEAT_VMID16.
    pub vmid16: bool,
    /// FEAT_S2FWB, and HCR_EL2.FWB is set ([`Geometry::hcr`]).
    pub force_write_back: bool,
    /// FEAT_BBM level 2: a block and a table may replace each other without an invalid entry between.
    pub break_in_place: bool,
    /// FEAT_TLBIRANGE: one instruction invalidates a range.
    pub range_invalidate: bool,
}

impl Features {
    /// Reads ID_AA64MMFR0_EL1 and ID_AA64MMFR1_EL1 (raw: some published enumerations of their fields are
    /// wrong). What other registers tell is taken as absent.
    pub const fn from_id_registers(mmfr0: u64, mmfr1: u64) -> Self {
        let dirty_management = mmfr1 & 0xf;
        Self {
            pa_range: (mmfr0 & 0xf) as u8,
            hardware_access: dirty_management >= 1,
            hardware_dirty: dirty_management >= 2,
            vmid16: (mmfr1 >> 4) & 0xf == 2,
            force_write_back: false,
            break_in_place: false,
            range_invalidate: false,
        }
    }
    /// The same with what ID_AA64MMFR2_EL1 tells. Whoever calls this sets [`Geometry::hcr`] in HCR_EL2.
    pub const fn with_mmfr2(mut self, mmfr2: u64) -> Self {
        self.force_write_back = (mmfr2 >> 40) & 0xf >= 1;
        self.break_in_place = (mmfr2 >> 52) & 0xf >= 2;
        self
    }
    /// The same with what ID_AA64ISAR0_EL1 tells.
    pub const fn with_isar0(mut self, isar0: u64) -> Self {
        self.range_invalidate = (isar0 >> 56) & 0xf >= 2;
        self
    }
    /// Bits of a VMID.
    pub const fn vmid_bits(self) -> u32 {
        if self.vmid16 { 16 } else { 8 }
    }
    /// Bits of a physical address, as far as a 4 KiB granule without FEAT_LPA2 reaches.
    pub const fn pa_bits(self) -> u32 {
        match self.pa_range {
            0 => 32,
            1 => 36,
            2 => 40,
            3 => 42,
            4 => 44,
            _ => 48,
        }
    }
}

/// The widest guest address that starts in a single level-1 table: 512 GiB, enough for the guest's machine
/// (DESIGN 13).
const ONE_ROOT: u32 = 39;
/// The widest that starts at level 1 at all: 16 tables side by side.
const LEVEL_1: u32 = ONE_ROOT + 4;
/// The widest that starts in a single level-2 table.
const LEVEL_2: u32 = ONE_ROOT - BITS;

/// The shape of a guest's tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    features: Features,
    ipa_bits: u32,
    start: u32,
}

impl Geometry {
    /// The widest shape that starts in one table of level 1, which is as wide as a guest needs. An IPA is
    /// never wider than the CPU's physical addresses (else the walk itself would be UNPREDICTABLE).
    pub const fn new(features: Features) -> Self {
        let pa = features.pa_bits();
        Self { features, ipa_bits: if pa < ONE_ROOT { pa } else { ONE_ROOT }, start: 1 }
    }

    /// The shape for addresses of `ipa_bits` bits; `None` when the CPU has none: below 25 or above its
    /// physical addresses.
    pub const fn with_ipa_bits(features: Features, ipa_bits: u32) -> Option<Self> {
        if ipa_bits < 25 || ipa_bits > features.pa_bits() {
            return None;
        }
        let start = if ipa_bits <= LEVEL_2 {
            2
        } else if ipa_bits <= LEVEL_1 {
            1
        } else {
            0
        };
        Some(Self { features, ipa_bits, start })
    }

    /// The CPU it is for.
    pub const fn features(self) -> Features {
        self.features
    }
    /// Bits of a guest's addresses.
    pub const fn ipa_bits(self) -> u32 {
        self.ipa_bits
    }
    /// The level that a walk starts at.
    pub const fn start(self) -> u32 {
        self.start
    }
    /// Tables side by side that a walk starts in. Their frames are contiguous and aligned to their number.
    pub const fn root_tables(self) -> u32 {
        let beyond_one = self.ipa_bits.saturating_sub(Self::shift(self.start) + BITS);
        1 << beyond_one
    }
    /// How leaves look.
    pub const fn style(self) -> Style {
        let features = self.features;
        Style::new(features.hardware_access, features.hardware_dirty, features.force_write_back)
    }
    /// True when stage 2 can translate the address at all.
    pub const fn reaches(self, at: Ipa) -> bool {
        at.bits() < self.reach().bits()
    }
    /// The first address that stage 2 cannot translate.
    pub const fn reach(self) -> Ipa {
        Ipa::new(1 << self.ipa_bits)
    }
    /// Every address there is.
    pub fn everything(self) -> Option<IpaRange> {
        IpaRange::new(Ipa::new(0), self.reach())
    }

    /// VTCR_EL2, whole.
    pub const fn vtcr(self) -> u64 {
        let start = match self.start {
            0 => 2,
            1 => 1,
            _ => 0,
        };
        let pa_range = if self.features.pa_range > 5 { 5 } else { self.features.pa_range as u64 };
        (64 - self.ipa_bits as u64) // T0SZ
            | start << 6 // SL0
            | 1 << 8 // IRGN0: walks write-back
            | 1 << 10 // ORGN0
            | 3 << 12 // SH0: inner shareable
            | pa_range << 16 // PS
            | (self.features.vmid16 as u64) << 19 // VS
            | (self.features.hardware_access as u64) << 21 // HA
            | (self.features.hardware_dirty as u64) << 22 // HD
            | 1 << 31 // RES1
    }
    /// The bits of HCR_EL2 that the shape of the leaves relies on: FWB or none.
    pub const fn hcr(self) -> u64 {
        (self.features.force_write_back as u64) << 46
    }

    /// log2 of the bytes that an entry of a level covers.
    pub const fn shift(level: u32) -> u32 {
        PAGE_SHIFT + BITS * (LAST - level)
    }
    /// Where an address lands in its table of a level.
    pub const fn index(at: Ipa, level: u32) -> usize {
        // Nine bits, so it fits any usize.
        ((at.bits() >> Self::shift(level)) & 0x1ff) as usize
    }
    /// Which of the tables side by side an address starts in.
    pub const fn root_table(self, at: Ipa) -> u32 {
        // Below 16, so it fits; an address out of reach is cut down, never a table that is not there.
        ((at.bits() >> (Self::shift(self.start) + BITS)) & 0xf) as u32 & (self.root_tables() - 1)
    }
    /// The first address of the next entry of a level, for an address within reach.
    pub const fn next_entry(at: Ipa, level: u32) -> Ipa {
        // At most 2^48: the sum cannot overflow.
        let bytes = 1 << Self::shift(level);
        Ipa::new((at.bits() & !(bytes - 1)) + bytes)
    }
    /// The first address of the next table of those that a walk starts in, for an address within reach.
    pub const fn next_root(self, at: Ipa) -> Ipa {
        let bytes = 1 << (Self::shift(self.start) + BITS);
        Ipa::new((at.bits() & !(bytes - 1)) + bytes)
    }
    /// Where the entry of a level that an address lands in begins.
    pub const fn entry(at: Ipa, level: u32) -> Ipa {
        Ipa::new(at.bits() & !((1 << Self::shift(level)) - 1))
    }
    /// An address's page in its block of 2 MiB.
    pub const fn page_in_block(at: Ipa) -> u32 {
        // Nine bits, so it fits.
        ((at.bits() >> PAGE_SHIFT) & 0x1ff) as u32
    }
}
