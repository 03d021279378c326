//! Resetting a map: it gets the memory of a snapshot again, and what it wrote since is gone.
//!
//! The entries are replaced by fresh copies of the snapshot's. To empty the top objects instead would be wrong:
//! what lies below one need not be the snapshot any more, once a bypass has passed over that. Of the leaves only
//! those go that would be wrong: an entry and its successor see the same page unless an object above the meeting of
//! their [ways](crate::object) has it, and what is seen below a top object is mapped read-only. So a reset costs the
//! map's entries and what was written since, and the guest goes on with its memory mapped. Where the two cannot be
//! compared everything is unmapped: the entries are others than the snapshot's, more than [`MAX_WAY`] objects lie
//! between, or somebody changes what lies below one of them.
//!
//! It is done in steps with no lock held between them (I6). The copies are in the reverse map from the first of
//! them on, so whoever takes pages away meanwhile finds the map either way. Called by whoever resets guests.
//! Calls `copy`, `object`, the pmap.
//!
//! [`MAX_WAY`]: crate::limits::MAX_WAY

use alloc::sync::Arc;
use alloc::vec::Vec;

use super::copy::charge_of;
use super::{Entry, Map, Snapshot};
use crate::addr::{Ipa, PageIndex};
use crate::defect::Defect;
use crate::limits::UNMAP_PAGES;
use crate::lock::Held;
use crate::object::Shadow;
use crate::pmap::Pmap as _;
use crate::prot::Prot;
use crate::stats::Event;
use crate::store::Machine;
use crate::{Vm, VmError};

/// What pages that follow each other count for besides themselves: the first had to be looked for, and so has its leaf.
const APART: u32 = 1;

impl<M: Machine> Vm<M> {
    /// Gives a map the memory of a snapshot instead of its own: what it wrote since is gone. None of its
    /// vCPUs may run meanwhile. Takes time in proportion to what is gone; `rest` is called between steps that each
    /// take a bounded time.
    pub fn reset_map<const OUTER: u8>(
        &self,
        map: &Arc<Map<M>>,
        snapshot: &Snapshot,
        rest: &dyn Fn(&mut Held<'_, OUTER>),
        held: &mut Held<'_, OUTER>,
    ) -> Result<(), VmError> {
        let had = charge_of(&map.entries.read(held).0.list);
        let list = self.duplicate(snapshot.entries(), &Arc::downgrade(map), had, held)?;
        rest(held);
        if !self.unmap_changes(map, &list, rest, held) {
            self.stats.count(Event::MapCleared);
            while !self.clear_map(map, UNMAP_PAGES, held) {
                rest(held);
            }
        }
        let list = if self.has(Defect::ResetEmptiesTop) { self.emptied(map, list, held) } else { list };
        let surplus = had.saturating_sub(charge_of(&list));
        let old = core::mem::replace(&mut map.entries.write(held).0.list, list);
        self.uncommit(surplus, held);
        self.drop_entries(old, held);
        self.stats.count(Event::MapReset);
        Ok(())
    }

    /// Takes away every leaf of a map that would be wrong if it had these entries. False when that cannot be told of
    /// all: then some may be left.
    fn unmap_changes<const OUTER: u8>(
        &self,
        map: &Map<M>,
        list: &[Entry],
        rest: &dyn Fn(&mut Held<'_, OUTER>),
        held: &mut Held<'_, OUTER>,
    ) -> bool {
        map.entries.read(held).0.list.len() == list.len()
            && list
                .iter()
                .enumerate()
                .all(|(place, to)| self.unmap_changed(map, place, to, rest, held).is_some())
    }

    /// The same for one entry; `None` when it cannot be told.
    fn unmap_changed<const OUTER: u8>(
        &self,
        map: &Map<M>,
        place: usize,
        to: &Entry,
        rest: &dyn Fn(&mut Held<'_, OUTER>),
        held: &mut Held<'_, OUTER>,
    ) -> Option<()> {
        let pages = u32::try_from(to.range.pages()).ok()?;
        let (mut ours, writes) = {
            let (entries, mut held) = map.entries.read(held);
            let from =
                entries.list.get(place).filter(|from| (from.range, from.prot) == (to.range, to.prot))?;
            let writes = from.prot.allows(Prot::WRITE) && !from.needs_copy;
            if (from.object, from.first) == (to.object, to.first) && !writes {
                return Some(());
            }
            (self.begin_way(from.object, from.first, pages, &mut held).ok()?, writes)
        };
        let Ok(mut theirs) = self.begin_way(to.object, to.first, pages, held) else {
            self.release_way(ours, held);
            return None;
        };
        let met = self.meet(&mut ours, &mut theirs, held);
        // A page of an object that both see must not stay writable.
        let met = met.filter(|&(above, _)| above > 0 || !writes);
        if let Some((above, beside)) = met {
            let (above, beside) = if self.has(Defect::ResetSeesTop) { (1, 0) } else { (above, beside) };
            for seen in ours.above(above).chain(theirs.above(beside)) {
                self.unmap_held(map, to.range.start(), seen, rest, held);
            }
        }
        self.release_way(ours, held);
        self.release_way(theirs, held);
        met.map(|_| ())
    }

    /// Takes away the leaf of every page that an object has in a window, whose first page is at `start`.
    fn unmap_held<const OUTER: u8>(
        &self,
        map: &Map<M>,
        start: Ipa,
        seen: Shadow,
        rest: &dyn Fn(&mut Held<'_, OUTER>),
        held: &mut Held<'_, OUTER>,
    ) {
        let end = seen.offset.checked_add(seen.limit).unwrap_or(PageIndex::new(u32::MAX));
        let mut from = seen.offset;
        while from < end {
            {
                let (state, mut held) = self.objects.get(seen.object).read(held);
                let mut left = UNMAP_PAGES;
                // How many pages from there on are known to be held, one after the other.
                let mut run = 0;
                let pages = core::iter::from_fn(|| {
                    if run == 0 {
                        (from, run) = state.slots.next_run(from..end).unwrap_or((end, 0));
                        run = run.min(end.number() - from.number());
                        left = left.saturating_sub(APART);
                    }
                    run = run.checked_sub(1)?;
                    left = left.checked_sub(1)?;
                    let page = from;
                    from = page.checked_add(1)?;
                    start.checked_add(page.checked_sub(seen.offset.number())?.byte_offset())
                });
                map.pmap.lock(&mut held).0.remove_pages(pages, &mut |harvest| self.frames.note(harvest));
            }
            rest(held);
        }
    }

    /// What a map has, its top objects emptied, instead of what it is to have: a defect.
    #[cold]
    fn emptied<const OUTER: u8>(
        &self,
        map: &Map<M>,
        wanted: Vec<Entry>,
        held: &mut Held<'_, OUTER>,
    ) -> Vec<Entry> {
        let shadows = |entry: &Entry, held: &mut Held<'_, OUTER>| {
            !entry.needs_copy && self.objects.get(entry.object).read(held).0.shadow.is_some()
        };
        let own: Vec<Entry> = core::mem::take(&mut map.entries.write(held).0.list);
        if !own.iter().all(|entry| shadows(entry, held)) {
            map.entries.write(held).0.list = own;
            return wanted;
        }
        for entry in &own {
            self.lose_everything(entry.object, held);
        }
        self.drop_entries(wanted, held);
        own
    }
}
