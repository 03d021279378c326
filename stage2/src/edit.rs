//! Changing what walkers and caches may be using.
//!
//! Three ways, and no others. [`Stage2::put`] makes a leaf where nothing or something else is: it is the one
//! place that breaks before it makes. [`Stage2::change`] takes permissions or flags from a leaf that stays
//! where it is, which needs no break. [`Stage2::unmap`] takes a range away, with the tables that served only
//! it. All of them swap or compare-and-swap, and what the old value remembered goes to the sink (I14). An
//! entry that was invalid is in no cache, so making it valid costs one barrier.

use crate::descriptor::Descriptor;
use crate::geometry::{Geometry, LAST};
use crate::table::TableSource;
use crate::tlb::{Batch, TlbOps};
use crate::tree::{Slot, Stage2, harvest};
use crate::walk::Spot;
use vmobject::addr::{Ipa, IpaRange, Pfn};
use vmobject::pmap::Sink;

/// What an [`Stage2::unmap`] has yet to settle.
struct Loose {
    batch: Batch,
    /// Unlinked tables, linked through their first entries: a walker that is still in one finds it invalid.
    dead: Option<Pfn>,
    /// Blocks that were taken away.
    blocks: u32,
}

impl<S: TableSource, T: TlbOps> Stage2<S, T> {
    /// Makes `new`, a leaf of `level`, what `slot` says. Not below a parked entry.
    #[inline]
    pub(crate) fn put(&self, slot: Slot, level: u32, at: Ipa, new: Descriptor, sink: Sink<'_>) {
        if self.read(slot).is_valid() {
            self.put_over(slot, level, at, new, sink);
        } else {
            self.swap(slot, new);
            self.tlb.dsb_ishst();
        }
    }

    /// The same where a leaf is already. Another CPU may have been faster, or this one's cache was stale.
    #[cold]
    fn put_over(&self, slot: Slot, level: u32, at: Ipa, new: Descriptor, sink: Sink<'_>) {
        if self.read(slot).upgraded_to(new).is_some() {
            let [old, now] = self.update(slot, |leaf| leaf.upgraded_to(new).unwrap_or(leaf));
            if now == old.touched() && now != old {
                // Only the access flag was missing, and such a leaf is never cached. Were the fault for
                // anything else, it comes again and finds nothing to change.
                self.tlb.dsb_ishst();
            } else {
                // More is allowed, or it was all along. A cache that says otherwise, and would say so for
                // ever, is this CPU's: others fault and come here too.
                self.flush_local();
            }
            return;
        }
        // Break before make: between two different valid values there is an invalid one, and nobody holds
        // the old one any more when the new one appears.
        let old = self.swap(slot, Descriptor::NOTHING);
        let mut batch = Batch::new();
        batch.page(at);
        self.flush(batch);
        harvest(at, old, Descriptor::NOTHING, Spot::pages_of(level), sink);
        self.swap(slot, new);
        self.tlb.dsb_ishst();
    }

    /// Takes something from a leaf and leaves it where it is. `to` must not give anything.
    pub(crate) fn change(
        &self,
        spot: Spot,
        to: impl Fn(Descriptor) -> Descriptor,
        batch: &mut Batch,
        sink: Sink<'_>,
    ) {
        let [old, new] = self.update(spot.slot, to);
        if old == new {
            return;
        }
        if !spot.parked {
            batch.page(spot.at);
        }
        harvest(spot.at, old, new, spot.pages(), sink);
    }

    /// Takes away whatever is mapped in a range, and every table that lies in it whole. No block sticks out.
    pub(crate) fn unmap(&mut self, range: IpaRange, sink: Sink<'_>) {
        let Some(range) = self.geometry.everything().and_then(|all| all.intersection(range)) else {
            return;
        };
        let mut loose = Loose { batch: Batch::new(), dead: None, blocks: 0 };
        let level = self.geometry.start();
        let mut at = range.start();
        while at < range.end() {
            let next = self.geometry.next_root(at).min(range.end());
            self.unmap_in(self.root_table(at), level, at, next, false, &mut loose, &mut *sink);
            at = next;
        }
        self.flush(loose.batch);
        self.blocks -= loose.blocks;
        self.free_dead(loose.dead);
    }

    /// Takes away the leaves of single pages. A block that has one is broken, and that page is the last.
    pub(crate) fn unmap_pages(&mut self, pages: impl Iterator<Item = Ipa>, sink: Sink<'_>) {
        let mut batch = Batch::new();
        // The table that the last page was in, and whether it is parked: the next page's, most likely.
        let mut known: Option<(Ipa, Slot, bool)> = None;
        let blocks = self.blocks;
        for at in pages {
            if known.is_none_or(|(chunk, ..)| chunk != at.chunk()) {
                known = self.table_of(at, &mut *sink).map(|(first, parked)| (at.chunk(), first, parked));
            }
            if let Some((_, first, parked)) = known {
                let old = self.swap(first.beside(Geometry::index(at, LAST)), Descriptor::NOTHING);
                if old.is_valid() {
                    if !parked {
                        batch.page(at);
                    }
                    harvest(at, old, Descriptor::NOTHING, 1, &mut *sink);
                }
            }
            if self.blocks != blocks {
                break;
            }
        }
        self.flush(batch);
    }

    /// A slot of the last level's table for an address, if there is one, and whether it is parked. A block is broken.
    fn table_of(&mut self, at: Ipa, sink: Sink<'_>) -> Option<(Slot, bool)> {
        let spot = self.find(at)?;
        if spot.level == LAST {
            return Some((spot.slot, spot.parked));
        }
        self.trim(IpaRange::page_of(at)?, sink);
        self.find(at).map(|spot| (spot.slot, spot.parked))
    }

    /// The same for a part of one table.
    #[expect(clippy::too_many_arguments, reason = "a recursion of at most four levels carries its state")]
    fn unmap_in(
        &self,
        table: Pfn,
        level: u32,
        mut at: Ipa,
        end: Ipa,
        parked: bool,
        loose: &mut Loose,
        sink: Sink<'_>,
    ) {
        while at < end {
            let slot = Slot::new(table, Geometry::index(at, level));
            let next = Geometry::next_entry(at, level);
            let entry = self.read(slot);
            if level < LAST && (entry.is_table() || entry.is_parked()) {
                let below = parked || entry.is_parked();
                self.unmap_in(entry.frame(), level + 1, at, next.min(end), below, loose, &mut *sink);
                if at == Geometry::entry(at, level) && next <= end {
                    self.swap(slot, Descriptor::NOTHING);
                    if !below {
                        loose.batch.everything();
                    }
                    loose.bury(self, entry.frame());
                }
            } else if entry.is_valid() {
                let old = self.swap(slot, Descriptor::NOTHING);
                let first = Geometry::entry(at, level);
                if !parked {
                    loose.batch.page(first);
                }
                loose.blocks += u32::from(level < LAST);
                harvest(first, old, Descriptor::NOTHING, Spot::pages_of(level), &mut *sink);
            }
            at = next.min(end);
        }
    }

    /// Frees unlinked tables, of which the caches have been told (T3).
    fn free_dead(&mut self, mut dead: Option<Pfn>) {
        while let Some(table) = dead {
            dead = self.swap(Slot::new(table, 0), Descriptor::NOTHING).linked();
            self.free_table(table);
        }
    }
}

impl Loose {
    fn bury<S: TableSource, T: TlbOps>(&mut self, tables: &Stage2<S, T>, table: Pfn) {
        tables.swap(Slot::new(table, 0), Descriptor::link(self.dead));
        self.dead = Some(table);
    }
}
