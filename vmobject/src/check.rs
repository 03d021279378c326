//! The audit: every numbered invariant that can be seen from outside, now.
//!
//! Tests call it after every step; the monitor calls it on a live machine. Each part looks under the lock
//! that guards it, so an answer is exact only while no guest runs. The names in a [`Violation`] are those
//! in the modules' headers and in the design's list (I1, I3).

mod rest;

use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;

use crate::Vm;
use crate::addr::{Ipa, IpaRange, PAGE_SIZE, PageIndex, Pfn};
use crate::lock::{Held, OBJECT};
use crate::map::{Entry, Map};
use crate::object::index::Slot;
use crate::object::{Life, ObjectId, Pager, State};
use crate::page::{Owner, Queue};
use crate::pmap::{Leaf, Pmap as _};
use crate::prot::Prot;
use crate::rmap::Looker;
use crate::store::Machine;

/// What was looked at, when all of it was in order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Audit {
    /// Frames.
    pub frames: u32,
    /// Live objects.
    pub objects: u32,
    /// Slots that are not absent.
    pub slots: u32,
    /// Maps.
    pub maps: u32,
    /// Map entries.
    pub entries: u32,
    /// Valid leaves.
    pub leaves: u64,
    /// Swap slots.
    pub swap_slots: u32,
    /// Pages in frames, as the objects count them.
    pub resident: u32,
    /// Pages that were promised to maps.
    pub charged: u64,
}

/// What is not as it must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Violation {
    /// The invariant's name.
    pub invariant: &'static str,
    /// What is wrong, in words.
    pub what: &'static str,
    /// Where: a frame, an object's number or an address, and the page in it.
    pub place: (u64, u64),
}

fn broken<T>(
    invariant: &'static str,
    what: &'static str,
    place: impl Into<u64>,
    page: impl Into<u64>,
) -> Result<T, Violation> {
    Err(Violation { invariant, what, place: (place.into(), page.into()) })
}

impl<M: Machine> Vm<M> {
    /// Looks at everything.
    pub fn check<const OUTER: u8>(&self, held: &mut Held<'_, OUTER>) -> Result<Audit, Violation> {
        let mut audit = Audit::default();
        let mut wanted = Vec::new();
        self.check_swap(&mut audit, held)?;
        self.check_objects(&mut audit, &mut wanted, held)?;
        for map in self.live_maps(held) {
            audit.maps += 1;
            self.check_map(&map, &mut audit, &mut wanted, held)?;
        }
        self.check_references(&wanted, held)?;
        self.check_frames(&mut audit, held)?;
        let charges = self.charges(held);
        if audit.charged + charges.kept != charges.committed {
            return broken("C1", "charges do not add up", audit.charged + charges.kept, charges.committed);
        }
        Ok(audit)
    }

    fn live_maps<const OUTER: u8>(&self, held: &mut Held<'_, OUTER>) -> Vec<Arc<Map<M>>> {
        self.maps.lock(held).0.list.iter().filter_map(Weak::upgrade).collect()
    }

    /// O2, O4, P3 from the object's side; gathers the references that shadows hold.
    fn check_objects<const OUTER: u8>(
        &self,
        audit: &mut Audit,
        wanted: &mut Vec<u32>,
        held: &mut Held<'_, OUTER>,
    ) -> Result<(), Violation> {
        let used = self.objects.used(held);
        wanted.resize(used as usize, 0);
        for number in 0..used {
            let Some(object) = self.objects.at(number) else { continue };
            let shadow = {
                let (state, mut held) = object.read(held);
                if state.life == Life::Vacant {
                    continue;
                }
                audit.objects += 1;
                self.check_slots(&state, audit, &mut held)?;
                if state.life == Life::Dying {
                    continue;
                }
                state.shadow
            };
            let known = self.links.read(held).0.parent(number);
            if known != shadow.map(|s| (s.object.number(), s.offset, s.limit)) {
                return broken("R1", "the reverse map has another parent", number, 0u32);
            }
            let Some(shadow) = shadow else { continue };
            let (below, _held) = self.objects.get(shadow.object).read(held);
            if below.id() != shadow.object || below.life != Life::Live {
                return broken("O2", "shadows an object that is gone", number, 0u32);
            }
            wanted[shadow.object.number() as usize] += 1;
        }
        Ok(())
    }

    fn check_slots(
        &self,
        state: &State,
        audit: &mut Audit,
        _held: &mut Held<'_, OBJECT>,
    ) -> Result<(), Violation> {
        let number = state.id().number();
        let mut resident = 0;
        for (page, place, slot) in state.slots.iter() {
            audit.slots += 1;
            let Some(page) = page.filter(|page| page.number() < state.pages) else {
                return broken("O5", "a page outside the object", number, place.number());
            };
            let Slot::Resident(frame) = slot else { continue };
            resident += 1;
            match self.frames.find(frame) {
                Some(p) if p.owner() == Owner::Object(state.slots.storage(), place) => {
                    if p.is_busy() && state.paging == 0 {
                        return broken("O4", "busy without a transfer", number, page.number());
                    }
                }
                Some(_) | None => return broken("P3", "a slot names another's frame", number, page.number()),
            }
        }
        if resident != state.slots.counts().resident {
            return broken("P3", "the resident count is wrong", number, resident);
        }
        audit.resident += resident;
        Ok(())
    }

    /// W1: each slot of the swap store that is in use has one owner.
    fn check_swap<const OUTER: u8>(
        &self,
        audit: &mut Audit,
        held: &mut Held<'_, OUTER>,
    ) -> Result<(), Violation> {
        let info = self.swap_info(held);
        let mut owned = Vec::new();
        let words = self.swap.numbers(held).div_ceil(u64::BITS) as usize;
        if owned.try_reserve_exact(words).is_ok() {
            owned.resize(words, 0u64);
        } // Without memory for that only the sum is looked at.
        for number in 0..self.objects.used(held) {
            let Some(object) = self.objects.at(number) else { continue };
            let (state, mut held) = object.read(held);
            for (_, place, slot) in state.slots.iter() {
                let known = match slot {
                    Slot::Swapped(slot) => Some(slot),
                    Slot::Resident(frame) => self.frames.page(frame).clean_slot(),
                    Slot::Absent | Slot::Zero => None,
                };
                let Some(slot) = known else { continue };
                let bit = 1 << (slot % u64::BITS);
                let word = owned.get_mut((slot / u64::BITS) as usize);
                let twice = word.is_some_and(|word| core::mem::replace(word, *word | bit) & bit != 0);
                if twice || !self.swap.holds(slot, &mut held) {
                    return broken("W1", "a swap slot is free or has two owners", number, place.number());
                }
                audit.swap_slots += 1;
            }
        }
        if audit.swap_slots != info.in_use {
            return broken("W1", "swap slots are lost", audit.swap_slots, info.in_use);
        }
        Ok(())
    }

    /// M1, M2, M3 and, leaf by leaf, I1 and I3.
    fn check_map<const OUTER: u8>(
        &self,
        map: &Map<M>,
        audit: &mut Audit,
        wanted: &mut [u32],
        held: &mut Held<'_, OUTER>,
    ) -> Result<(), Violation> {
        let in_hand = self.page_in_hand();
        let (entries, mut held) = map.entries.write(held);
        let mut end = Ipa::new(0);
        for entry in entries.iter() {
            audit.entries += 1;
            let start = entry.range.start();
            if entry.range.is_empty() || start < end || !entry.most.allows(entry.prot) {
                return broken("M1", "entries overlap, are empty, or allow too much", start.bits(), 0u32);
            }
            end = entry.range.end();
            let (pages, pager) = {
                let (state, _held) = self.objects.get(entry.object).read(&mut held);
                if state.id() != entry.object || state.life != Life::Live {
                    return broken("M2", "the entry's object is gone", start.bits(), 0u32);
                }
                (state.pages, state.pager)
            };
            wanted[entry.object.number() as usize] += 1;
            audit.charged += entry.charge();
            let known = {
                let (links, _held) = self.links.read(&mut held);
                let known = links.mapping(entry.link);
                known.map(|(m, object)| (object, m.at, m.first, u64::from(m.pages), m.writes))
            };
            let writes = entry.most.allows(Prot::WRITE) && !entry.needs_copy;
            if known != Some((entry.object.number(), start, entry.first, entry.range.pages(), writes)) {
                return broken("R2", "the reverse map has another entry", start.bits(), 0u32);
            }
            if u64::from(entry.first.number()) + entry.range.pages() > u64::from(pages) {
                return broken("M2", "the entry is longer than its object", start.bits(), pages);
            }
            if !entry.needs_copy && entry.most.allows(Prot::WRITE) && matches!(pager, Pager::Image(_)) {
                return broken("M3", "an image is mapped writable", start.bits(), entry.object.number());
            }
            if entry.device != matches!(pager, Pager::Device(_)) || (entry.device && entry.needs_copy) {
                return broken("M4", "a device is to be copied", start.bits(), entry.object.number());
            }
            let copy = self.newest_copy(entry.object, &mut held);
            let mut rest = Some(entry.range);
            while let Some(range) = rest {
                let next = map.pmap.lock(&mut held).0.next_leaf(range);
                let Some((at, leaf)) = next else { break };
                rest = at.checked_add(PAGE_SIZE).and_then(|after| IpaRange::new(after, range.end()));
                audit.leaves += 1;
                let sight = self.survey(entry, at, &mut held);
                // Who has a device shares it on purpose.
                let shared =
                    leaf.prot.allows(Prot::WRITE) && !entry.device && self.is_shared(entry, at, &mut held);
                Self::check_leaf(entry, at, leaf, sight.slot, shared)?;
                if entry.device {
                    if self.owner(leaf.frame) != Owner::Absent {
                        return broken(
                            "I1",
                            "a device has a frame of the VM's",
                            at.bits(),
                            leaf.frame.number(),
                        );
                    }
                    continue;
                }
                let page = self.frames.page(leaf.frame);
                if let (Some(copy), Some(index), false) = (copy, entry.page_at(at), entry.needs_copy)
                    && leaf.prot.allows(Prot::WRITE)
                    && self.sees_below(copy, index, &mut held)
                {
                    return broken("O6", "a page that a copy sees is writable", at.bits(), index.number());
                }
                if page.is_unmapped() && in_hand != Some(leaf.frame) {
                    return broken("P4", "a page marked unmapped is mapped", at.bits(), leaf.frame.number());
                }
                if matches!(pager, Pager::Disk(_)) && !page.is_dirty() && leaf.prot.allows(Prot::WRITE) {
                    return broken("P7", "a clean page is writable", at.bits(), leaf.frame.number());
                }
                if page.clean_slot().is_some() && leaf.prot.allows(Prot::WRITE) {
                    return broken("P5", "a page is writable and has a slot", at.bits(), leaf.frame.number());
                }
            }
        }
        Ok(())
    }

    /// True if a page of what a copy shadows is seen through it by anybody: not if the copy has received it, nor
    /// if all that shadow the copy hide it.
    fn sees_below<const OUTER: u8>(
        &self,
        copy: ObjectId,
        below: PageIndex,
        held: &mut Held<'_, OUTER>,
    ) -> bool {
        let ours = {
            let (state, _held) = self.objects.get(copy).read(held);
            state.page_above(below).filter(|&ours| state.slots.get(ours) == Slot::Absent)
        };
        ours.is_some_and(|ours| self.is_seen(copy.number(), ours, held))
    }

    /// True if anybody sees a page of an object, be it absent: not if all that shadow it hide it.
    fn is_seen<const OUTER: u8>(&self, number: u32, ours: PageIndex, held: &mut Held<'_, OUTER>) -> bool {
        if self.is_used(number, ours, held) {
            return true;
        }
        // Half of a collapse may be done: what has left the copy may have gone up by more than one object.
        let (mut here, mut page, mut open) = (number, ours, true);
        loop {
            let next = self.links.read(held).0.next_in_walk(number, here, page, open);
            let Some((child, theirs)) = next else { return false };
            let Some(object) = self.objects.at(child) else { return false };
            open = object.read(held).0.slots.get(theirs) == Slot::Absent;
            if open && self.is_used(child, theirs, held) {
                return true;
            }
            (here, page) = (child, theirs);
        }
    }

    /// True if anybody else may see the page that an entry shows at an address.
    fn is_shared<const OUTER: u8>(&self, entry: &Entry, at: Ipa, held: &mut Held<'_, OUTER>) -> bool {
        let (mut object, mut page) = (entry.object, entry.page_at(at));
        let mut shared = entry.needs_copy;
        while let (Some(index), false) = (page, shared) {
            let below = {
                let (state, _held) = self.objects.get(object).read(held);
                let absent = state.slots.get(index) == Slot::Absent && state.pager == Pager::None;
                state.below(index).filter(|_| absent)
            };
            let Some((next, index)) = below else { break };
            (object, page) = (next, Some(index));
            let (alone, anonymous) = {
                let (state, _held) = self.objects.get(object).read(held);
                (state.is_sole_anonymous(), state.pager == Pager::None)
            };
            shared = !(alone || anonymous && self.is_seen_once(object.number(), index, held));
        }
        shared
    }

    /// True if one shadow of an object shows a page of it, and nobody else does: others show other parts of it, as after a
    /// copy of a range.
    fn is_seen_once<const OUTER: u8>(
        &self,
        number: u32,
        page: PageIndex,
        held: &mut Held<'_, OUTER>,
    ) -> bool {
        let once = {
            let (links, _held) = self.links.read(held);
            let looker = links.looker(number, page);
            matches!(looker, Looker::Shadow(one) if links.next_looker(one, page).is_none())
        };
        once && self.other_references(number, held) == Some(0)
    }

    /// How many references to an object are neither a shadow's, be it dead, nor a mapping's; less than none if some of
    /// these have none. `None` where there is no object.
    fn other_references<const OUTER: u8>(&self, number: u32, held: &mut Held<'_, OUTER>) -> Option<i64> {
        let (children, mappings) = self.links.read(held).0.counts(number);
        let refs = self.objects.at(number)?.read(held).0.refs;
        Some(i64::from(refs) - i64::from(children + mappings + self.dead_shadows(number, held)))
    }

    /// How many objects shadow another that are dead, and show nothing of it any more, but have their reference still.
    fn dead_shadows<const OUTER: u8>(&self, number: u32, held: &mut Held<'_, OUTER>) -> u32 {
        let others = (0..self.objects.used(held)).filter_map(|other| self.objects.at(other));
        let dead = others.filter(|other| {
            let (state, _held) = other.read(held);
            state.life == Life::Dying && state.shadow.is_some_and(|below| below.object.number() == number)
        });
        dead.fold(0, |count, _| count + 1)
    }

    /// True if something else sees a page of an object than what shadows it, be it dead already.
    fn is_used<const OUTER: u8>(&self, number: u32, page: PageIndex, held: &mut Held<'_, OUTER>) -> bool {
        let Some(others) = self.other_references(number, held) else { return false };
        others > 0 || self.links.read(held).0.next_mapping(number, None, page).is_some()
    }

    /// The object that receives what changes in another one.
    fn newest_copy<const OUTER: u8>(&self, source: ObjectId, held: &mut Held<'_, OUTER>) -> Option<ObjectId> {
        let copy = self.objects.get(source).read(held).0.copy?;
        let (state, _held) = self.objects.get(copy).read(held);
        (state.id() == copy && state.receives_from(source)).then_some(copy)
    }

    fn check_leaf(entry: &Entry, at: Ipa, leaf: Leaf, slot: Slot, shared: bool) -> Result<(), Violation> {
        if slot != Slot::Resident(leaf.frame) {
            return broken(
                "I1",
                "a leaf reaches a frame that is not its page",
                at.bits(),
                leaf.frame.number(),
            );
        }
        // A page that a collapse is moving down is writable below the top, in an object nobody else has.
        if shared && leaf.prot.allows(Prot::WRITE) {
            return broken("I3", "a shared page is mapped writable", at.bits(), leaf.frame.number());
        }
        if !entry.prot.allows(leaf.prot) {
            return broken("I3", "a leaf allows more than its entry", at.bits(), leaf.frame.number());
        }
        Ok(())
    }

    /// O1.
    fn check_references<const OUTER: u8>(
        &self,
        wanted: &[u32],
        held: &mut Held<'_, OUTER>,
    ) -> Result<(), Violation> {
        for (number, &wanted) in (0..).zip(wanted) {
            let Some(object) = self.objects.at(number) else { continue };
            let (state, _held) = object.read(held);
            if state.refs < wanted {
                return broken("O1", "fewer references than referrers", number, wanted);
            }
        }
        Ok(())
    }

    /// P1, P2, and P3 from the frame's side.
    fn check_frames<const OUTER: u8>(
        &self,
        audit: &mut Audit,
        held: &mut Held<'_, OUTER>,
    ) -> Result<(), Violation> {
        if let Err(frame) = self.frames.check_queues(held) {
            return broken("P1", "a queue is not what its pages say", frame.number(), 0u32);
        }
        let (mut tables, mut resident) = (0, 0);
        for (frame, page) in self.frames.iter() {
            audit.frames += 1;
            tables += u32::from(page.owner() == Owner::Table);
            resident += u32::from(matches!(page.owner(), Owner::Object(..)));
            let fits = match page.owner() {
                Owner::Free => page.queue() == Queue::Free,
                Owner::Table => page.queue() == Queue::None,
                Owner::Object(storage, place) => self.owns(storage, place, frame, held),
                Owner::Orphan => page.is_wired() && page.queue() == Queue::None,
                Owner::Absent => false,
            };
            if !fits {
                return broken("P3", "a frame's owner does not know it", frame.number(), 0u32);
            }
        }
        if audit.frames != self.frames.total() {
            return broken("P1", "frames are lost", audit.frames, self.frames.total());
        }
        if resident != audit.resident || tables != self.frames.lengths(held).tables {
            return broken("C2", "frames in use do not add up", resident, audit.resident);
        }
        Ok(())
    }

    fn owns<const OUTER: u8>(
        &self,
        storage: u32,
        place: PageIndex,
        frame: Pfn,
        held: &mut Held<'_, OUTER>,
    ) -> bool {
        let Some(object) = self.objects.of_storage(storage) else { return false };
        let (state, _held) = object.read(held);
        let known = state.slots.page(place).map(|page| state.slots.get(page));
        state.life != Life::Vacant && state.slots.storage() == storage && known == Some(Slot::Resident(frame))
    }
}
