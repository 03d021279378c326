//! Small scope, breadth first: every sequence of operations on up to three guests of four pages, as far as the
//! bound allows, against an oracle that copies bytes eagerly.
//!
//! A state is reached by replaying its operations. Two states are taken for the same if guests and snapshots hold
//! the same bytes, and their objects have the same shape, roles and counts of slots by kind: pages that only
//! lie at other places are not told apart. `EXHAUSTIVE_STATES=n` sets the bound.

#![expect(clippy::unwrap_used, reason = "a test may fail")]

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt::Write as _;

use vmobject::fault::Copied;
use vmobject::lock::Held;
use vmobject::map::Snapshot;
use vmobject::testing::{Rig, TestMap, at};

const PAGES: u32 = 4;
const GUESTS: usize = 3;

type Bytes = [u8; PAGES as usize];

#[derive(Clone, Copy, Debug)]
enum Op {
    Read(usize, u32),
    Write(usize, u32),
    Discard(usize, u32),
    Clone(usize),
    Keep(usize),
    Freeze(usize),
    Reset(usize),
    Kill(usize),
    Forget,
    PageOut,
    Step,
}

fn operations() -> Vec<Op> {
    let mut all = vec![Op::Forget, Op::PageOut, Op::Step];
    for guest in 0..GUESTS {
        all.extend([Op::Clone, Op::Keep, Op::Freeze, Op::Reset, Op::Kill].map(|op| op(guest)));
        all.extend([0, 3].map(|page| Op::Write(guest, page)));
        all.extend([Op::Read(guest, 0), Op::Discard(guest, 0)]);
    }
    all
}

struct World {
    rig: Rig,
    guests: [Option<(TestMap, Bytes)>; GUESTS],
    kept: Option<(Snapshot, Bytes)>,
    writes: u8,
}

impl World {
    fn new() -> Self {
        let rig = Rig::new(128);
        rig.add_swap(64);
        let first = rig.guest(PAGES);
        Self { rig, guests: [Some((first, [0; 4])), None, None], kept: None, writes: 0 }
    }

    /// Does an operation; false if it means nothing here.
    fn act(&mut self, op: Op) -> bool {
        let held = &mut Held::root();
        match op {
            Op::Read(guest, page) => {
                let Some((map, bytes)) = &self.guests[guest] else { return false };
                assert_eq!(self.rig.load(map, at(page, 0)), Ok(bytes[page as usize]));
            }
            Op::Write(guest, page) => {
                let Some((map, bytes)) = &mut self.guests[guest] else { return false };
                self.writes += 1;
                self.rig.store(map, at(page, 0), self.writes).unwrap();
                bytes[page as usize] = self.writes;
            }
            Op::Discard(guest, page) => {
                let Some((map, bytes)) = &mut self.guests[guest] else { return false };
                self.rig.discard(map, page, 2).unwrap();
                bytes[page as usize..][..2].fill(0);
            }
            Op::Clone(guest) => {
                let Some(free) = self.guests.iter().position(Option::is_none) else { return false };
                let Some((map, bytes)) = &self.guests[guest] else { return false };
                self.guests[free] = Some((self.rig.clone(map), *bytes));
            }
            Op::Keep(guest) | Op::Freeze(guest) => {
                let Some((map, bytes)) = self.guests[guest].as_ref().filter(|_| self.kept.is_none()) else {
                    return false;
                };
                let vm = &self.rig.vm;
                let freeze = matches!(op, Op::Freeze(_));
                let snapshot = if freeze { vm.freeze(map, held) } else { vm.snapshot(map, held) };
                self.kept = Some((snapshot.unwrap(), *bytes));
            }
            Op::Reset(guest) => {
                let (Some((map, bytes)), Some((snapshot, kept))) = (&mut self.guests[guest], &self.kept)
                else {
                    return false;
                };
                self.rig.vm.reset_map(map, snapshot, held).unwrap();
                *bytes = *kept;
            }
            Op::Kill(guest) => {
                let Some((map, _)) = self.guests[guest].take() else { return false };
                self.rig.vm.destroy_map(map, held);
            }
            Op::Forget => {
                let Some((snapshot, _)) = self.kept.take() else { return false };
                self.rig.vm.delete_snapshot(snapshot, held);
            }
            Op::PageOut => self.rig.page_out_all(),
            Op::Step => {
                self.rig.vm.step(2, held);
            }
        }
        true
    }

    fn verify(&self, path: &[Op]) {
        let held = &mut Held::root();
        if let Err(violation) = self.rig.vm.check(held) {
            panic!("{path:?}: {violation:?}");
        }
        for (map, bytes) in self.guests.iter().flatten() {
            for (page, &byte) in (0..).zip(bytes) {
                assert_eq!(self.rig.peek(map, at(page, 0)), Some(byte), "{path:?}: page {page}");
            }
        }
    }

    /// The snapshot too, which may bring pages in; then everything ends, and nothing is left.
    fn end(mut self, path: &[Op]) {
        if let Some((snapshot, bytes)) = &self.kept {
            for (page, &wanted) in (0..).zip(bytes) {
                let (mut byte, held) = ([0xff], &mut Held::root());
                while self.rig.vm.read_snapshot(snapshot, at(page, 0), &mut byte, held).unwrap()
                    != Copied::Done
                {
                    assert!(self.rig.deliver_all() > 0);
                }
                assert_eq!(byte[0], wanted, "{path:?}: snapshot, page {page}");
            }
        }
        self.act(Op::Forget);
        for guest in 0..GUESTS {
            self.act(Op::Kill(guest));
        }
        self.rig.settle();
        let slots = self.rig.vm.swap_info(&mut Held::root()).in_use;
        assert_eq!((self.rig.free(), self.rig.objects(), slots), (128, 0, 0), "{path:?}");
    }

    fn key(&self) -> String {
        let (mut names, mut key) = (BTreeMap::new(), String::new());
        let mut bytes = BTreeMap::new();
        let mut short = |all: &Bytes| {
            all.map(|byte| {
                let next = bytes.len();
                if byte == 0 { 0 } else { *bytes.entry(byte).or_insert(next + 1) }
            })
        };
        let held = &mut Held::root();
        for (map, all) in self.guests.iter().flatten() {
            write!(key, "{:?}", short(all)).unwrap();
            self.rig.vm.for_each_entry(map, held, |entry| {
                let next = names.len();
                let name = *names.entry(entry.object).or_insert(next);
                write!(key, "o{name}{}", u8::from(entry.needs_copy)).unwrap();
            });
        }
        if let Some((_, all)) = &self.kept {
            write!(key, "k{:?}", short(all)).unwrap();
        }
        self.rig.vm.for_each_object(held, |object| {
            let below = object.shadow.map(|shadow| shadow.object.number());
            let counts = object.counts;
            write!(key, "{:?}{}{:?}{counts:?}{below:?}", object.role, object.refs, names.get(&object.id))
                .unwrap();
        });
        key
    }
}

#[test]
fn every_short_life_of_three_guests_is_as_the_oracle_says() {
    let bound = std::env::var("EXHAUSTIVE_STATES").ok().and_then(|n| n.parse().ok()).unwrap_or(10_000);
    let operations = operations();
    let (mut seen, mut queue) = (BTreeSet::new(), VecDeque::from([Vec::new()]));
    let (mut runs, mut longest) = (0u64, 0);
    while let Some(path) = queue.pop_front() {
        if seen.len() >= bound {
            break;
        }
        for &op in &operations {
            let mut world = World::new();
            path.iter().for_each(|&op| assert!(world.act(op)));
            if !world.act(op) {
                continue;
            }
            let mut next: Vec<Op> = path.clone();
            next.push(op);
            world.verify(&next);
            runs += 1;
            longest = longest.max(next.len());
            let new = seen.insert(world.key());
            world.end(&next);
            if new {
                queue.push_back(next);
            }
        }
    }
    println!("{} states, {runs} steps, up to {longest} operations long", seen.len());
    assert!(seen.len() >= bound || queue.is_empty());
}
