//! The end of a map, in steps, and all chores as one call.
//!
//! A map that is destroyed goes on a list with the caller's `Arc`. Its tables are cleared some entries at a
//! time, then its entries go one by one, then the rest. Until then it is a map like any other that no vCPU
//! uses. Called by whoever ends guests, and by whoever has time.

use alloc::sync::Arc;

use super::Map;
use crate::lock::{CALLER, Held};
use crate::pmap::Pmap as _;
use crate::store::Machine;
use crate::{PROMPT, Vm};

/// What a table that is freed counts for, in pages: all its entries were looked at.
const TABLE: u32 = 64;

impl<M: Machine> Vm<M> {
    /// Ends a map: at once if it is small, else by and by in [`Vm::step`]. No vCPU may use it any more; its
    /// tables go with the last `Arc`.
    pub fn destroy_map<const OUTER: u8>(&self, map: Arc<Map<M>>, held: &mut Held<'_, OUTER>) {
        self.maps.lock(held).0.ending.push_back(map);
        self.step(PROMPT, held);
    }

    /// Unmaps part of what a map has, about `budget` table entries; true when all of it is. For a guest none
    /// of whose vCPUs runs.
    pub(super) fn clear_map<const OUTER: u8>(
        &self,
        map: &Map<M>,
        budget: u32,
        held: &mut Held<'_, OUTER>,
    ) -> bool {
        map.pmap.lock(held).0.clear(budget, &mut |harvest| self.frames.note(harvest))
    }

    /// Does chores, at most about `budget` pages' worth: maps that end, objects that die or could be shorter
    /// chains. True if there is more that could be done now.
    pub fn step<const OUTER: u8>(&self, budget: u32, held: &mut Held<'_, OUTER>) -> bool {
        let held: &mut Held<'_, CALLER> = &mut held.deepen();
        let mut left = budget;
        let at_work = self.objects.begin_work();
        loop {
            let Some(map) = self.maps.lock(held).0.ending.pop_front() else { break };
            if !self.end_map(&map, &mut left, held) {
                self.maps.lock(held).0.ending.push_front(map);
                return true;
            }
        }
        drop(at_work);
        self.work(left, held)
    }

    /// True if [`Vm::step`] has something to do, though perhaps not now.
    pub fn has_chores<const OUTER: u8>(&self, held: &mut Held<'_, OUTER>) -> bool {
        let held: &mut Held<'_, CALLER> = &mut held.deepen();
        !self.maps.lock(held).0.ending.is_empty() || self.objects.chores(held) != (0, 0)
    }

    /// How many maps and objects there is something to do for.
    pub fn backlog<const OUTER: u8>(&self, held: &mut Held<'_, OUTER>) -> usize {
        let held: &mut Held<'_, CALLER> = &mut held.deepen();
        let ending = self.maps.lock(held).0.ending.len();
        ending + self.objects.chores(held).0
    }

    /// True if there are no chores, and no other CPU is in the midst of one. What comes of a map's end are objects'
    /// chores, and never the other way round.
    pub(crate) fn is_at_rest<const OUTER: u8>(&self, held: &mut Held<'_, OUTER>) -> bool {
        let held: &mut Held<'_, CALLER> = &mut held.deepen();
        let no_map_ends = {
            let (maps, _held) = self.maps.lock(held);
            maps.ending.is_empty() && !self.objects.is_at_work()
        };
        no_map_ends && self.objects.is_at_rest(held)
    }

    /// Takes a map apart; true when nothing is left.
    fn end_map(&self, map: &Arc<Map<M>>, left: &mut u32, held: &mut Held<'_, CALLER>) -> bool {
        if *left == 0 {
            return false;
        }
        let tables = map.pmap.lock(held).0.tables();
        let done = self.clear_map(map, *left, held);
        let freed = tables.saturating_sub(map.pmap.lock(held).0.tables());
        *left = left.saturating_sub(freed.saturating_mul(TABLE));
        if !done {
            return false;
        }
        loop {
            if *left == 0 {
                return false;
            }
            *left -= 1;
            let Some(entry) = map.entries.write(held).0.list.pop() else { break };
            self.uncommit(entry.charge(), held);
            self.drop_entry(entry, held);
        }
        self.drop_needs(map, held);
        self.transfers.forget_failed(map.number(), held);
        self.unlist(map, held);
        true
    }

    /// Forgets a map, whose memory its name in the list would keep.
    pub(super) fn unlist<const OUTER: u8>(&self, map: &Arc<Map<M>>, held: &mut Held<'_, OUTER>) {
        let (mut maps, _held) = self.maps.lock(held);
        let gone = Arc::as_ptr(map);
        maps.list.retain(|other| other.as_ptr() != gone && other.strong_count() > 0);
    }
}
