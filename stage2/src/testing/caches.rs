//! What one CPU caches of its guests' tables, and how an invalidate takes it away.
//!
//! Three kinds, apart, since the architecture's instructions tell them apart: stage-2 leaves, combined entries
//! made of them, and ways to tables. All are tagged by VMID. `mmu` says what fills them.

use alloc::vec::Vec;

/// A cached leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cached {
    pub(super) vmid: u16,
    pub(super) base: u64,
    pub(super) bytes: u64,
    pub(super) output: u64,
    pub(super) allows: [bool; 3],
    pub(super) may_mark: bool,
}

/// A cached way: the table of a level that an address leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Way {
    pub(super) vmid: u16,
    pub(super) base: u64,
    pub(super) bytes: u64,
    pub(super) level: u32,
    pub(super) table: u64,
}

/// What an invalidate reaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reach {
    /// Stage-2 entries and ways that map something between two addresses. Not what combines both stages.
    Pages(u64, u64),
    /// Combined entries only.
    Combined,
    /// Everything of the VMID.
    Guest,
    /// Everything of every VMID.
    Everything,
}

/// An invalidate that was issued and is not complete.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pending {
    pub(super) reach: Reach,
    pub(super) vmid: u16,
    pub(super) everywhere: bool,
}

/// A CPU: whose tables it walks, and what it remembers of them and of others.
#[derive(Default)]
pub(super) struct Cpu {
    pub(super) vttbr: u64,
    pub(super) stage2: Vec<Cached>,
    pub(super) combined: Vec<Cached>,
    pub(super) ways: Vec<Way>,
    pub(super) pending: Vec<Pending>,
}

impl Cpu {
    /// Lets the oldest entries go until there are at most `most` of each kind, as any cache does.
    pub(super) fn shrink(&mut self, most: usize) {
        for entries in [&mut self.stage2, &mut self.combined] {
            entries.drain(..entries.len().saturating_sub(most));
        }
        self.ways.drain(..self.ways.len().saturating_sub(most));
    }

    /// Drops what an invalidate of a VMID reaches.
    pub(super) fn drop_entries(&mut self, reach: Reach, vmid: u16) {
        match reach {
            Reach::Pages(from, to) => {
                let out = |v: u16, base: u64, bytes: u64| v != vmid || base >= to || base + bytes <= from;
                self.stage2.retain(|c| out(c.vmid, c.base, c.bytes));
                self.ways.retain(|w| out(w.vmid, w.base, w.bytes));
            }
            Reach::Combined => self.combined.retain(|c| c.vmid != vmid),
            Reach::Guest => {
                self.combined.retain(|c| c.vmid != vmid);
                self.stage2.retain(|c| c.vmid != vmid);
                self.ways.retain(|w| w.vmid != vmid);
            }
            Reach::Everything => {
                self.combined.clear();
                self.stage2.clear();
                self.ways.clear();
            }
        }
    }
}
