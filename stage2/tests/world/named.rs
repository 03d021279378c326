//! Situations in which two things that the VM does meet: how the world knows that they did.
//!
//! What is counted here is what was seen, not what may have been: of a collapse that one index lost what the other
//! gained while the two were still two; of a push that its fault then waits for the very page to be out; of a discard
//! that the page was not the object's own, and that somebody else still has the same.

use super::{FRAMES, Guest, PAGES, World, address};
use stage2::testing::Access;
use std::collections::BTreeMap;
use vmobject::addr::Ipa;
use vmobject::describe::ObjectInfo;
use vmobject::fault::{FaultError, Faulted, WaitFor};
use vmobject::lock::Held;
use vmobject::map::Entry;
use vmobject::object::ObjectId;
use vmobject::store::Direction;

/// An object and what it shadows.
pub(super) type Pair = (ObjectId, ObjectId);
/// How many pages each of the two knows something of.
pub(super) type Pairs = BTreeMap<Pair, (u32, u32)>;

/// Steps of pageout that a guest writes between.
const PATIENCE: u32 = 30;

/// What a discard may have met, as it was before.
pub(super) struct BeforeDiscard {
    top: Option<ObjectInfo>,
    /// Somebody else has the same page.
    shared: bool,
}

impl World {
    /// Every object that shadows one.
    pub(super) fn pairs(&self) -> Pairs {
        let mut all = BTreeMap::new();
        self.vm.for_each_object(&mut Held::root(), |object| {
            all.insert(object.id, (object.counts.present(), object.shadow));
        });
        let shadows =
            all.iter().filter_map(|(&top, &(present, shadow))| Some((top, present, shadow?.object)));
        let pair = |(top, present, below)| Some(((top, below), (present, all.get(&below)?.0)));
        shadows.filter_map(pair).collect()
    }

    /// Does chores, so many slots' worth, and sees whether a collapse stops half done. The pairs are those of before, and
    /// nobody has written or discarded since.
    pub(super) fn do_chores(&mut self, budget: u32, before: &Pairs) {
        let moved = self.vm.stats().collapse_moved;
        self.with(super::Fault::DeafChores, |world| world.vm.step(budget, &mut Held::root()));
        if self.vm.stats().collapse_moved == moved {
            return;
        }
        let now = self.pairs();
        self.half_done.retain(|pair| now.contains_key(pair));
        // Whether pages went up between two, or down.
        let went = |pair: &Pair, &(top, below): &(u32, u32)| {
            let &(had, had_below) = before.get(pair)?;
            let (up, down) = (top > had && below < had_below, top < had && below > had_below);
            (up || down).then_some(up)
        };
        for (pair, counts) in &now {
            // What gained pages may have them from its other neighbour.
            let elsewhere = |up: bool| {
                now.iter().any(|(other, counts)| {
                    let beside = if up { other.1 == pair.0 } else { other.0 == pair.1 };
                    beside && before.get(other).is_none_or(|had| had != counts)
                })
            };
            let half = went(pair, counts).is_some_and(|up| !elsewhere(up));
            if half && !self.half_done.contains(pair) {
                self.half_done.push(*pair);
            }
        }
    }

    fn entry(&self, guest: &Guest, at: Ipa) -> Option<Entry> {
        let mut found = None;
        self.vm.for_each_entry(&guest.map, &mut Held::root(), |entry| {
            found = found.or(Some(*entry).filter(|entry| entry.range.contains(at)));
        });
        found
    }

    /// The first object of a guest's chain.
    fn top(&self, guest: &Guest, at: Ipa) -> Option<ObjectInfo> {
        let number = self.entry(guest, at)?.object.number();
        self.vm.object(number, &mut Held::root())
    }

    /// A fault has come to this; it began when so many pages had been pushed.
    pub(super) fn note_fault(
        &mut self,
        guest: usize,
        at: Ipa,
        pushed: u64,
        served: Result<Faulted, FaultError>,
    ) {
        match served {
            Ok(Faulted::Mapped) if !self.half_done.is_empty() => {
                let top = self.top(&self.guests[guest], at);
                let pair = top.and_then(|top| Some((top.id, top.shadow?.object)));
                if pair.is_some_and(|pair| self.half_done.contains(&pair)) {
                    self.saw("faults that met a collapse");
                }
            }
            // The copy has got the page, and the write waits for the same page to be out.
            Ok(Faulted::Wait(WaitFor::Io(token))) if self.vm.stats().pushed > pushed => {
                let requests = self.vm.machine().store.requests();
                let out = |request: &vmobject::testing::Request| request.direction == Direction::Out;
                if requests.iter().any(|request| request.token == token && out(request)) {
                    self.saw("pushes that met a pageout");
                }
            }
            Ok(Faulted::Mapped | Faulted::Wait(_)) | Err(_) => {}
        }
    }

    /// A guest whose writes are pushed to a copy writes pages that are on their way out. It hardly ever would by chance:
    /// what goes out is what nobody has used.
    pub(super) fn write_what_goes_out(&mut self, cpu: usize, guest: usize) -> Result<(), String> {
        let frames: Vec<_> =
            (0..PAGES).filter_map(|page| Some((self.leaf(guest, address(page))?.frame, page))).collect();
        self.switch(cpu, guest);
        self.vm.set_free_target(FRAMES, FRAMES);
        for _ in 0..PATIENCE {
            self.with(super::Fault::DeafEviction, |world| world.vm.pageout(64, &mut Held::root()));
            let requests = self.vm.machine().store.requests();
            let out = requests.iter().filter(|request| request.direction == Direction::Out);
            let out: Vec<_> = out.flat_map(|request| &request.frames).collect();
            if let Some((_, page)) = frames.iter().find(|(frame, _)| out.contains(&frame)) {
                self.use_memory(cpu, *page, Access::Write)?;
            }
        }
        Ok(())
    }

    /// A guest is about to discard a page.
    pub(super) fn before_discard(&self, guest: usize, page: u32) -> BeforeDiscard {
        let (mine, top) = (&self.guests[guest], self.top(&self.guests[guest], address(page)));
        let same = |what: &super::Contents| {
            let alike =
                (what.of(page), what.offset(page)) == (mine.contents.of(page), mine.contents.offset(page));
            alike && what.of(page) != [0; 2]
        };
        let others = self.guests.iter().filter(|other| other.name != mine.name).map(|other| &other.contents);
        let shared = others.chain(self.kept.iter().map(|(_, what)| what)).any(same);
        BeforeDiscard { top, shared }
    }

    /// It has: a mark hides what is below, of which the object itself had nothing.
    pub(super) fn note_discard(&mut self, guest: usize, page: u32, before: BeforeDiscard) {
        let Some((top, now)) = before.top.zip(self.top(&self.guests[guest], address(page))) else { return };
        // If the entry was to be copied first, its object is a new one.
        let was = if top.id == now.id { top.counts } else { Default::default() };
        let marked = now.counts.zero == was.zero + 1
            && (now.counts.resident, now.counts.swapped) == (was.resident, was.swapped);
        let below = now.shadow.and_then(|below| self.vm.object(below.object.number(), &mut Held::root()));
        if before.shared && marked && below.is_some_and(|below| below.refs > 1) {
            self.saw("discards in a shared shadow");
        }
    }
}
