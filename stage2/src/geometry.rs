//! What the CPU can do, and the shape of the tables that follows.

use vmobject::addr::Ipa;

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
}

impl Features {
    /// Reads the fields (raw: some published field enumerations are wrong).
    pub const fn from_id_registers(mmfr0: u64, mmfr1: u64) -> Self {
        let hafdbs = mmfr1 & 0xf;
        Self {
            pa_range: (mmfr0 & 0xf) as u8,
            hardware_access: hafdbs >= 1,
            hardware_dirty: hafdbs >= 2,
            vmid16: (mmfr1 >> 4) & 0xf == 2,
        }
    }
    /// Bits of a VMID.
    pub const fn vmid_bits(self) -> u32 {
        if self.vmid16 { 16 } else { 8 }
    }
    /// Bits of a physical address.
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

/// Bits of an IPA with a single level-1 root table: 512 GiB, enough for the guest's machine (DESIGN 13).
const ONE_ROOT: u32 = 39;

/// The shape of a guest's tables: 4 KiB granule, three levels from level 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    features: Features,
    ipa_bits: u32,
}

impl Geometry {
    /// The widest shape that starts in one table. An IPA is never wider than the CPU's physical addresses
    /// (else the walk itself would be UNPREDICTABLE).
    pub const fn new(features: Features) -> Self {
        let pa = features.pa_bits();
        Self { features, ipa_bits: if pa < ONE_ROOT { pa } else { ONE_ROOT } }
    }
    /// The CPU it is for.
    pub const fn features(self) -> Features {
        self.features
    }
    /// Bits of a guest's addresses.
    pub const fn ipa_bits(self) -> u32 {
        self.ipa_bits
    }
    /// True when stage 2 can translate the address at all.
    pub const fn reaches(self, at: Ipa) -> bool {
        at.bits() >> self.ipa_bits == 0
    }
    /// VTCR_EL2, whole.
    pub const fn vtcr(self) -> u64 {
        let pa_range = if self.features.pa_range > 5 { 5 } else { self.features.pa_range as u64 };
        (64 - self.ipa_bits as u64)
            | 1 << 6 // SL0: start at level 1
            | 1 << 8 // IRGN0: walks write-back
            | 1 << 10 // ORGN0
            | 3 << 12 // SH0: inner shareable
            | pa_range << 16
            | (self.features.vmid16 as u64) << 19
            | (self.features.hardware_access as u64) << 21
            | (self.features.hardware_dirty as u64) << 22
            | 1 << 31 // RES1
    }
    /// Where an address lands in the table of a level (1 to 3).
    pub const fn index(at: Ipa, level: u32) -> usize {
        // Nine bits, so it fits any usize.
        ((at.bits() >> (12 + 9 * (3 - level))) & 0x1ff) as usize
    }
}
