//! How many slots of an index are of which kind. Kept by the index.

use super::Slot;

/// How many slots of each kind there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SlotCounts {
    /// In frames.
    pub resident: u32,
    /// In the swap store.
    pub swapped: u32,
    /// Marked zero.
    pub zero: u32,
}

impl SlotCounts {
    /// There are none.
    pub const NONE: Self = Self { resident: 0, swapped: 0, zero: 0 };

    #[inline]
    pub(super) fn add(&mut self, slot: Slot, by: u32) {
        match slot {
            Slot::Absent => {}
            Slot::Zero => self.zero += by,
            Slot::Resident(_) => self.resident += by,
            Slot::Swapped(_) => self.swapped += by,
        }
    }

    #[inline]
    pub(super) fn sub(&mut self, slot: Slot) {
        match slot {
            Slot::Absent => {}
            Slot::Zero => self.zero -= 1,
            Slot::Resident(_) => self.resident -= 1,
            Slot::Swapped(_) => self.swapped -= 1,
        }
    }

    /// True when all are absent.
    #[inline]
    pub const fn is_empty(&self) -> bool {
        self.resident | self.swapped | self.zero == 0
    }

    /// Slots that are not absent.
    pub const fn present(&self) -> u32 {
        self.resident + self.swapped + self.zero
    }
}
