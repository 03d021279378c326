//! Families of clones and snapshots: after every operation the bytes of every relative and the exact number of its
//! objects and pages; then the end of them all in every order, and the same again in the same machine.
//!
//! What to expect comes from two oracles: bytes that are copied eagerly, and [`family`], which says what a family
//! needs at rest.

#![expect(clippy::unwrap_used, reason = "a test may fail")]

mod family;

use std::collections::BTreeMap;

use family::{Family, PAGES};
use vmobject::lock::Held;
use vmobject::map::Snapshot;
use vmobject::object::ObjectId;
use vmobject::testing::{FakePmap, Rig, TestMap, at};

const FRAMES: u32 = 128;

/// What is done to a family; members are named by numbers.
#[derive(Clone, Copy, Debug)]
enum Deed {
    /// A guest that has what a guest has.
    Fork(usize, usize),
    Keep(usize, usize),
    /// A snapshot of which the source pushes what it changes.
    Freeze(usize, usize),
    /// A guest from a snapshot.
    Make(usize, usize),
    /// A guest has what a snapshot has, again.
    Reset(usize, usize),
    Write(usize, usize),
    Discard(usize, usize),
    Read(usize, usize),
}
use Deed::{Discard, Fork, Freeze, Keep, Make, Read, Reset, Write};

/// A story of up to five members; member 0 has written every page but the last when it begins.
type Shape = (&'static str, &'static [Deed]);

const SHAPES: [Shape; 6] = [
    (
        "chain",
        &[
            Fork(0, 1),
            Write(1, 0),
            Fork(1, 2),
            Write(2, 1),
            Discard(2, 0),
            Fork(2, 3),
            Write(3, 2),
            Write(3, 0),
            Fork(3, 4),
            Discard(4, 1),
            Write(4, 3),
        ],
    ),
    (
        "fan",
        &[
            Fork(0, 1),
            Fork(0, 2),
            Write(0, 4),
            Fork(0, 3),
            Fork(0, 4),
            Write(1, 0),
            Write(2, 1),
            Discard(3, 2),
            Write(4, 3),
            Discard(0, 3),
            Read(2, 3),
        ],
    ),
    (
        "tree",
        &[
            Fork(0, 1),
            Fork(0, 2),
            Write(1, 0),
            Write(2, 0),
            Write(0, 1),
            Fork(1, 3),
            Write(3, 5),
            Discard(3, 0),
            Fork(2, 4),
            Write(4, 2),
            Write(2, 2),
            Write(1, 2),
        ],
    ),
    (
        "snapshots in the middle",
        &[
            Keep(0, 1),
            Write(0, 0),
            Make(1, 2),
            Write(2, 1),
            Discard(2, 4),
            Keep(2, 3),
            Write(2, 1),
            Make(3, 4),
            Write(4, 4),
            Discard(4, 1),
            Reset(2, 3),
            Write(2, 5),
            Read(0, 2),
        ],
    ),
    (
        "a guest that is kept and reset",
        &[
            Keep(0, 1),
            Write(0, 0),
            Keep(0, 2),
            Discard(0, 1),
            Write(0, 2),
            Keep(0, 3),
            Reset(0, 1),
            Write(0, 3),
            Reset(0, 2),
            Make(3, 4),
            Write(4, 0),
        ],
    ),
    (
        "frozen",
        &[
            Freeze(0, 1),
            Write(0, 0),
            Discard(0, 1),
            Make(1, 2),
            Write(2, 2),
            Freeze(2, 3),
            Write(2, 0),
            Write(0, 3),
            Fork(2, 4),
            Write(4, 4),
            Read(4, 3),
        ],
    ),
];

enum Holder {
    Guest(TestMap),
    Snapshot(Snapshot),
}

struct World {
    rig: Rig,
    members: BTreeMap<usize, (Holder, [u8; PAGES])>,
    family: Family,
    /// What is pushed may be there twice: the family has no exact size then.
    pushed: bool,
    /// Everything goes to swap after every deed.
    swap: bool,
    writes: u8,
    /// Looks at everything.
    looks: u32,
}

impl World {
    fn new(swap: bool) -> Self {
        let rig = Rig::with_swap(FRAMES, FRAMES);
        let (members, family) = (BTreeMap::new(), Family::default());
        Self { rig, members, family, pushed: false, swap, writes: 0, looks: 0 }
    }

    fn found(&mut self) {
        self.writes = 0;
        let pages = u32::try_from(PAGES).unwrap();
        self.members.insert(0, (Holder::Guest(self.rig.guest(pages)), [0; PAGES]));
        self.family.found(0);
        (0..PAGES - 1).for_each(|page| self.act(Write(0, page)));
    }

    fn guest(&self, member: usize) -> &TestMap {
        match &self.members[&member].0 {
            Holder::Guest(map) => map,
            Holder::Snapshot(_) => panic!("member {member} is a snapshot"),
        }
    }

    fn snapshot(&self, member: usize) -> &Snapshot {
        match &self.members[&member].0 {
            Holder::Guest(_) => panic!("member {member} is a guest"),
            Holder::Snapshot(snapshot) => snapshot,
        }
    }

    fn act(&mut self, deed: Deed) {
        let (vm, held) = (&self.rig.vm, &mut Held::root());
        match deed {
            Fork(from, to) => self.join(from, to, Holder::Guest(self.rig.clone(self.guest(from)))),
            Keep(from, to) => {
                let kept = vm.snapshot(self.guest(from), held).unwrap();
                self.join(from, to, Holder::Snapshot(kept));
            }
            Freeze(from, to) => {
                let kept = vm.freeze(self.guest(from), held).unwrap();
                self.pushed = true;
                self.join(from, to, Holder::Snapshot(kept));
            }
            Make(from, to) => {
                let map = vm.map_snapshot(self.snapshot(from), FakePmap::default(), held).unwrap();
                self.join(from, to, Holder::Guest(map));
            }
            Reset(member, to) => {
                vm.reset_map(self.guest(member), self.snapshot(to), &|_| {}, held).unwrap();
                let bytes = self.members[&to].1;
                self.members.get_mut(&member).unwrap().1 = bytes;
                self.family.end(member);
                self.family.copy(to, member);
            }
            Write(member, page) => {
                self.writes += 1;
                let stored = self.rig.store(self.guest(member), address(page), self.writes);
                assert_eq!(stored, Ok(()));
                self.members.get_mut(&member).unwrap().1[page] = self.writes;
                self.family.change(member, page, false);
            }
            Discard(member, page) => {
                self.rig.discard(self.guest(member), u32::try_from(page).unwrap(), 1).unwrap();
                self.members.get_mut(&member).unwrap().1[page] = 0;
                self.family.change(member, page, true);
            }
            Read(member, page) => {
                let seen = self.rig.load(self.guest(member), address(page));
                assert_eq!(seen, Ok(self.members[&member].1[page]));
                assert_ne!(seen, Ok(0), "to read nothing is to have a page of zeros");
            }
        }
        self.verify();
    }

    fn join(&mut self, from: usize, to: usize, holder: Holder) {
        let bytes = self.members[&from].1;
        self.members.insert(to, (holder, bytes));
        self.family.copy(from, to);
    }

    fn end(&mut self, member: usize) {
        match self.members.remove(&member).unwrap().0 {
            Holder::Guest(map) => self.rig.vm.destroy_map(map, &mut Held::root()),
            Holder::Snapshot(snapshot) => self.rig.vm.delete_snapshot(snapshot, &mut Held::root()),
        }
        self.family.end(member);
        self.verify();
    }

    /// At rest: the bytes and the size of every relative, and of the family.
    fn verify(&mut self) {
        self.rig.settle();
        if self.swap {
            self.rig.page_out_all();
            self.rig.settle();
        }
        self.family.rest();
        self.looks += 1;
        self.rig.check();
        assert_eq!(self.rig.vm.check_at_rest(&mut Held::root()), Ok(()));
        for (&number, (holder, bytes)) in &self.members {
            for (page, &byte) in bytes.iter().enumerate() {
                let seen = match holder {
                    Holder::Guest(map) => self.rig.peek(map, address(page)),
                    Holder::Snapshot(snapshot) => self.rig.peek_snapshot(snapshot, address(page)),
                };
                assert_eq!(seen, Some(byte), "member {number}, page {page}");
            }
            if !self.pushed {
                assert_eq!(self.of(holder), self.family.of(number), "depth and own pages of member {number}");
            }
        }
        let (mut objects, mut resident, mut swapped) = (0, 0, 0);
        self.rig.vm.for_each_object(&mut Held::root(), |object| {
            objects += 1;
            resident += object.counts.resident;
            swapped += object.counts.swapped;
        });
        let slots = self.rig.vm.swap_info(&mut Held::root()).in_use;
        assert_eq!(FRAMES - self.rig.free(), resident, "every frame in use is a page's");
        if self.swap {
            assert_eq!((resident, slots), (0, swapped), "everything is in swap, once");
        }
        let have = (objects, usize::try_from(resident + swapped).unwrap());
        let eager = PAGES * self.members.len();
        assert!(have.1 <= eager, "{have:?}, eager copies {eager}");
        assert!(self.pushed || have == self.family.size(), "{have:?}, needed {:?}", self.family.size());
    }

    /// How many objects a member looks through, and pages in its own.
    fn of(&self, holder: &Holder) -> (usize, usize) {
        let held = &mut Held::root();
        let mut own = None;
        match holder {
            Holder::Guest(map) => self.rig.vm.for_each_entry(map, held, |entry| own = Some(entry.object)),
            Holder::Snapshot(snapshot) => own = snapshot.iter().next().map(|entry| entry.object),
        }
        let mut known: BTreeMap<ObjectId, (Option<ObjectId>, u32)> = BTreeMap::new();
        self.rig.vm.for_each_object(held, |object| {
            let below = object.shadow.map(|shadow| shadow.object);
            known.insert(object.id, (below, object.counts.resident + object.counts.swapped));
        });
        let depth = std::iter::successors(own, |object| known[object].0).count();
        (depth, usize::try_from(known[&own.unwrap()].1).unwrap())
    }
}

fn address(page: usize) -> vmobject::addr::Ipa {
    at(u32::try_from(page).unwrap(), 7)
}

/// Every order of what there is.
fn orders(of: &[usize]) -> Vec<Vec<usize>> {
    if of.is_empty() {
        return vec![Vec::new()];
    }
    let each = of.iter().flat_map(|&first| {
        let rest: Vec<_> = of.iter().copied().filter(|&other| other != first).collect();
        orders(&rest).into_iter().map(move |order| [vec![first], order].concat())
    });
    each.collect()
}

/// Lives through a shape and lets its members end in every order, twice in each machine. If `lively`, those who are
/// left write on.
fn live(swap: bool, lively: bool) {
    for (name, deeds) in SHAPES {
        let (mut lives, mut looks) = (0, 0);
        for order in orders(&[0, 1, 2, 3, 4]) {
            let mut world = World::new(swap);
            for _ in 0..2 {
                world.found();
                deeds.iter().for_each(|&deed| world.act(deed));
                for (ended, &member) in order.iter().enumerate() {
                    world.end(member);
                    let left =
                        world.members.iter().find(|(_, (holder, _))| matches!(holder, Holder::Guest(_)));
                    if let Some((&left, _)) = left.filter(|_| lively) {
                        world.act(Write(left, ended % PAGES));
                    }
                }
                let slots = world.rig.vm.swap_info(&mut Held::root()).in_use;
                let left = (world.rig.free(), world.rig.objects(), slots);
                assert_eq!(left, (FRAMES, 0, 0), "{name}, {order:?}: something is left");
                lives += 1;
            }
            looks += world.looks;
        }
        println!("{name}: {lives} lives, looked at {looks} times");
    }
}

#[test]
fn a_family_has_what_it_needs_and_nothing_is_left_in_whatever_order_it_ends() {
    live(false, false);
}

#[test]
fn a_family_in_swap_has_what_it_needs_and_nothing_is_left_in_whatever_order_it_ends() {
    live(true, false);
}

#[test]
fn those_who_are_left_of_a_family_write_on_and_have_what_they_need() {
    live(false, true);
    live(true, true);
}
