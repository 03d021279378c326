//! Thirty-two interrupts, one bit each in every word: the state that a distributor or redistributor keeps.
//!
//! An interrupt that is in a list register is *listed*. Then the hardware owns its pending and active
//! state: `latch` and `active` here are what came after, and what a guest wants to change is queued in the
//! three `queued_` words until the list register has been read back.
//! Used by every other file of this folder.

use super::lists::{LR_ACTIVE, LR_PENDING};
use serde::{Deserialize, Serialize};

/// Interrupts of one word.
pub(super) const BITS: usize = 32;

/// Thirty-two interrupts.
///
/// # Invariants
/// B1. A bit of a `queued_` word is set only when it is set in `listed`.
/// B2. For a listed interrupt, `active` is clear: the list register has it.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Bank {
    /// Group 1 rather than group 0.
    pub(super) group: u32,
    /// Enabled.
    pub(super) enabled: u32,
    /// Edge-triggered rather than level-sensitive.
    pub(super) edge: u32,
    /// The input is high.
    pub(super) line: u32,
    /// Made pending by an edge, an SGI or a write, and not yet taken.
    pub(super) latch: u32,
    /// Active, and not listed.
    pub(super) active: u32,
    /// In a list register.
    pub(super) listed: u32,
    /// Clear the pending latch when read back.
    pub(super) queued_unpend: u32,
    /// Make active when read back, whatever `queued_inactive` says.
    pub(super) queued_active: u32,
    /// Make inactive when read back.
    pub(super) queued_inactive: u32,
    /// The priority of each; smaller is more urgent.
    pub(super) priority: [u8; BITS],
}

impl Bank {
    /// As after reset: everything off, group 0, highest priority.
    pub(super) const fn new(edge: u32) -> Self {
        Self {
            group: 0,
            enabled: 0,
            edge,
            line: 0,
            latch: 0,
            active: 0,
            listed: 0,
            queued_unpend: 0,
            queued_active: 0,
            queued_inactive: 0,
            priority: [0; BITS],
        }
    }

    /// Pending, apart from what list registers hold.
    #[inline]
    pub(super) const fn pending(&self) -> u32 {
        self.latch | self.line & !self.edge
    }

    /// Members of the groups that `groups` has on: bit 0 for group 0, bit 1 for group 1.
    #[inline]
    pub(super) const fn members(&self, groups: u32) -> u32 {
        match groups & 3 {
            0 => 0,
            1 => !self.group,
            2 => self.group,
            _ => u32::MAX,
        }
    }

    /// Pending, enabled, and of a group that is on.
    #[inline]
    pub(super) const fn ready(&self, groups: u32) -> u32 {
        self.pending() & self.enabled & self.members(groups)
    }

    /// Takes back a listed interrupt, whose list register holds `now`. `from_latch` is where its pending
    /// state came from.
    #[inline]
    pub(super) fn give_back(&mut self, bit: u32, now: u64, from_latch: bool) {
        self.listed &= !bit;
        if now & LR_PENDING != 0 && from_latch && self.queued_unpend & bit == 0 {
            self.latch |= bit;
        }
        if now & LR_ACTIVE != 0 && self.queued_inactive & bit == 0 || self.queued_active & bit != 0 {
            self.active |= bit;
        }
        self.queued_unpend &= !bit;
        self.queued_active &= !bit;
        self.queued_inactive &= !bit;
    }

    /// Moves the input; an edge latches. What changed.
    pub(super) fn set_line(&mut self, bit: u32, high: bool) -> u32 {
        let changed = if high { bit & !self.line } else { bit & self.line };
        if high {
            self.latch |= changed & self.edge;
        }
        self.line ^= changed;
        changed
    }
}

/// The bits that are set, lowest first.
pub(super) struct Ones(pub(super) u32);

impl Iterator for Ones {
    type Item = usize;

    #[inline]
    fn next(&mut self) -> Option<usize> {
        if self.0 == 0 {
            return None;
        }
        let bit = self.0.trailing_zeros() as usize;
        self.0 &= self.0 - 1;
        Some(bit)
    }
}
