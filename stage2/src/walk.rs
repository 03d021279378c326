//! Finding entries: the one that an address leads to, and all the leaves of a range.
//!
//! Nothing changes here. Both ways see through parked entries, and say so: what is below one is not
//! reachable for a guest, so editing it needs no invalidate, and it allows no write whatever its bits say.

use crate::descriptor::Descriptor;
use crate::geometry::{BLOCK, Geometry, LAST};
use crate::table::TableSource;
use crate::tlb::TlbOps;
use crate::tree::{Slot, Stage2};
use vmobject::addr::{CHUNK_PAGES, Ipa, IpaRange, Pfn};
use vmobject::prot::Prot;

/// A leaf, where it is and as it was read.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spot {
    /// Its place.
    pub(crate) slot: Slot,
    /// The first address that it maps.
    pub(crate) at: Ipa,
    /// [`LAST`] for a page, [`BLOCK`] for a block.
    pub(crate) level: u32,
    /// An entry above it is parked.
    pub(crate) parked: bool,
    /// What it was.
    pub(crate) leaf: Descriptor,
}

impl Spot {
    /// Pages that a leaf of a level maps.
    pub(crate) const fn pages_of(level: u32) -> u32 {
        if level == LAST { 1 } else { CHUNK_PAGES }
    }

    /// Pages that it maps.
    pub(crate) const fn pages(self) -> u32 {
        Self::pages_of(self.level)
    }

    /// What it allows now.
    pub(crate) fn prot(self) -> Prot {
        let prot = self.leaf.prot();
        if self.parked { prot.without(Prot::WRITE) } else { prot }
    }
}

impl<S: TableSource, T: TlbOps> Stage2<S, T> {
    /// The valid leaf that maps an address.
    pub(crate) fn find(&self, at: Ipa) -> Option<Spot> {
        if !self.geometry.reaches(at) {
            return None;
        }
        let (mut table, mut level, mut parked) = (self.root_table(at), self.geometry.start(), false);
        loop {
            let slot = Slot::new(table, Geometry::index(at, level));
            let leaf = self.read(slot);
            if level < LAST && (leaf.is_table() || leaf.is_parked()) {
                parked |= leaf.is_parked();
                (table, level) = (leaf.frame(), level + 1);
            } else {
                let at = Geometry::entry(at, level);
                return leaf.is_valid().then_some(Spot { slot, at, level, parked, leaf });
            }
        }
    }

    /// Shows every valid leaf that maps part of a range, in order; a block that sticks out too.
    pub(crate) fn visit(&self, range: IpaRange, mut show: impl FnMut(Spot)) {
        let Some(range) = self.geometry.everything().and_then(|all| all.intersection(range)) else {
            return;
        };
        // One table of the root after the other: each is like an entry of the level above.
        let level = self.geometry.start();
        let mut at = range.start();
        while at < range.end() {
            let next = self.geometry.next_root(at).min(range.end());
            self.visit_table(self.root_table(at), level, at, next, false, &mut show);
            at = next;
        }
    }

    fn visit_table(
        &self,
        table: Pfn,
        level: u32,
        mut at: Ipa,
        end: Ipa,
        parked: bool,
        show: &mut impl FnMut(Spot),
    ) {
        while at < end {
            let slot = Slot::new(table, Geometry::index(at, level));
            let leaf = self.read(slot);
            let next = Geometry::next_entry(at, level).min(end);
            if level < LAST && (leaf.is_table() || leaf.is_parked()) {
                self.visit_table(leaf.frame(), level + 1, at, next, parked || leaf.is_parked(), show);
            } else if leaf.is_valid() {
                show(Spot { slot, at: Geometry::entry(at, level), level, parked, leaf });
            }
            at = next;
        }
    }

    /// True when a block maps an address but not only addresses of the range.
    pub(crate) fn sticks_out(&self, at: Ipa, range: IpaRange) -> Option<Spot> {
        let spot = self.find(at).filter(|spot| spot.level == BLOCK)?;
        let whole = IpaRange::from_pages(spot.at, spot.pages())?;
        (whole.intersection(range) != Some(whole)).then_some(spot)
    }
}
