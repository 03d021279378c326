//! Finding entries: the one that an address leads to, and all the leaves of a range.
//!
//! Nothing changes here. Both ways see through parked entries, and say so: what is below one is not
//! reachable for a guest, so editing it needs no invalidate, and it allows no write whatever its bits say.

use crate::descriptor::Descriptor;
use crate::geometry::{BLOCK, Geometry, LAST};
use crate::table::TableSource;
use crate::tlb::TlbOps;
use crate::tree::{Slot, Stage2};
use core::ops::ControlFlow;
use vmobject::addr::{CHUNK_PAGES, Ipa, IpaRange, Pfn};
use vmobject::pmap::Leaf;
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

    /// What it is for one of the addresses that it maps.
    pub(crate) fn leaf_at(self, at: Ipa) -> Leaf {
        let block = self.level != LAST;
        let frame =
            if block { self.leaf.frame_in_block(Geometry::page_in_block(at)) } else { self.leaf.frame() };
        Leaf { frame, prot: self.prot(), block }
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

    /// True if the entry that a block of an address within reach would be in is nothing, or has no table above it.
    pub(crate) fn is_bare_above(&self, at: Ipa) -> bool {
        let mut table = self.root_table(at);
        for level in self.geometry.start()..LAST {
            let entry = self.read(Slot::new(table, Geometry::index(at, level)));
            if !entry.is_table() && !entry.is_parked() {
                return !entry.is_valid();
            }
            table = entry.frame();
        }
        false
    }

    /// Shows every valid leaf that maps part of a range, in order; a block that sticks out too.
    pub(crate) fn visit(&self, range: IpaRange, mut show: impl FnMut(Spot)) {
        let all: ControlFlow<()> = self.visit_until(range, |spot| {
            show(spot);
            ControlFlow::Continue(())
        });
        debug_assert!(all.is_continue(), "nothing stops it");
    }

    /// The first valid leaf that maps part of a range.
    pub(crate) fn first(&self, range: IpaRange) -> Option<Spot> {
        self.visit_until(range, ControlFlow::Break).break_value()
    }

    fn visit_until<B>(
        &self,
        range: IpaRange,
        mut show: impl FnMut(Spot) -> ControlFlow<B>,
    ) -> ControlFlow<B> {
        let Some(range) = self.geometry.everything().and_then(|all| all.intersection(range)) else {
            return ControlFlow::Continue(());
        };
        // One table of the root after the other: each is like an entry of the level above.
        let level = self.geometry.start();
        let mut at = range.start();
        while at < range.end() {
            let next = self.geometry.next_root(at).min(range.end());
            self.visit_table(self.root_table(at), level, at, next, false, &mut show)?;
            at = next;
        }
        ControlFlow::Continue(())
    }

    fn visit_table<B>(
        &self,
        table: Pfn,
        level: u32,
        mut at: Ipa,
        end: Ipa,
        parked: bool,
        show: &mut impl FnMut(Spot) -> ControlFlow<B>,
    ) -> ControlFlow<B> {
        while at < end {
            let slot = Slot::new(table, Geometry::index(at, level));
            let leaf = self.read(slot);
            let next = Geometry::next_entry(at, level).min(end);
            if level < LAST && (leaf.is_table() || leaf.is_parked()) {
                self.visit_table(leaf.frame(), level + 1, at, next, parked || leaf.is_parked(), show)?;
            } else if leaf.is_valid() {
                show(Spot { slot, at: Geometry::entry(at, level), level, parked, leaf })?;
            }
            at = next;
        }
        ControlFlow::Continue(())
    }

    /// True when a block maps an address but not only addresses of the range.
    pub(crate) fn sticks_out(&self, at: Ipa, range: IpaRange) -> Option<Spot> {
        let spot = self.find(at).filter(|spot| spot.level == BLOCK)?;
        let whole = IpaRange::from_pages(spot.at, spot.pages())?;
        (whole.intersection(range) != Some(whole)).then_some(spot)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Frames, Mmu, cpus};
    use alloc::vec::Vec;
    use vmobject::pmap::Pmap as _;

    #[test]
    fn leaves_are_found_one_after_the_other_each_page_of_a_block_and_what_is_parked_too() {
        let geometry = Geometry::new(cpus::NEOVERSE_N1);
        let frames = Frames::new(16);
        let mmu = Mmu::new(&frames, geometry, 1);
        let mut tables = Stage2::new(frames, mmu, geometry).expect("there are frames");
        let (low, block, high) = (Ipa::new(0x4000_3000), Ipa::new(0x4020_0000), Ipa::new(0x8000_1000));
        for at in [low, high] {
            tables.enter(at, Pfn::new(7), Prot::ALL, &mut |_| {}).expect("there are frames");
        }
        tables.enter_block(block, Pfn::new(512), Prot::ALL, &mut |_| {}).expect("there are frames");
        for parked in [false, true] {
            let mut found = Vec::new();
            let mut at = Ipa::new(0);
            while let Some(range) = IpaRange::new(at, Ipa::new(1 << 39)) {
                let Some((next, leaf)) = tables.next_leaf(range) else { break };
                assert_eq!(tables.lookup(next), Some(leaf));
                assert_eq!(leaf.prot.allows(Prot::WRITE), !parked);
                found.push(next);
                at = next.checked_add(4096).expect("it is low");
            }
            let pages = IpaRange::from_pages(block, CHUNK_PAGES).expect("it is low").iter_pages();
            let all: Vec<Ipa> = [low].into_iter().chain(pages).chain([high]).collect();
            assert_eq!(found, all);
            tables.park();
        }
    }
}
