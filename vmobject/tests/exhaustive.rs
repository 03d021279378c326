//! Small scope, breadth first: every sequence of operations on a few guests of a few pages, until nothing new comes
//! or a bound is reached, against an oracle that copies bytes eagerly.
//!
//! A state is reached by replaying the operations that led to it; of a state that was seen only a fingerprint of its
//! normal form is kept, and the step that led to it. What is done to pages that look alike is done to one of them.
//! Three guests and a snapshot make chains of up to four objects, and a search that never came to one fails; so does
//! one in which no page was on its way in, or none failed to come. `EXHAUSTIVE_STATES=n` sets the bound of all
//! but the smallest scope; `cargo xtask sim --exhaustive` goes on to ten million states.

#![expect(clippy::unwrap_used, reason = "a test may fail")]

mod small;

use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::time::{Duration, Instant};

use small::form::fingerprint;
use small::{Op, Scope, World};
use vmobject::defect::Defect;
use vmobject::stats::Counts;
use vmobject::store::Direction;

/// A state, as the one that it was reached from and the operation.
#[derive(Clone, Copy)]
struct Reached {
    from: u32,
    op: Op,
    /// A page of each kind, a bit for each: what is to be tried here.
    kinds: u8,
}

/// What a search came to.
struct Search {
    states: usize,
    steps: u64,
    longest: usize,
    complete: bool,
    /// The longest chain of objects, and how many states there were when it was there first.
    deepest: (usize, usize),
    /// Steps after which a page was on its way in; in which one failed to come in, or to go out.
    met: Met,
}

/// What happened to transfers, in how many steps.
#[derive(Clone, Copy, Default, Debug)]
struct Met {
    comes: u64,
    failed_in: u64,
    failed_out: u64,
}

impl Met {
    /// Takes in what the last step of a world did.
    fn note(&mut self, world: &World, before: &Counts) {
        let now = world.rig.vm.stats();
        let requests = world.rig.vm.machine().store.requests();
        self.comes += u64::from(requests.iter().any(|request| request.direction == Direction::In));
        self.failed_in += u64::from(now.page_in_failed > before.page_in_failed);
        self.failed_out += u64::from(now.page_out_failed > before.page_out_failed);
    }
}

fn path_to(reached: &[Reached], mut state: u32) -> Vec<Op> {
    let mut path = Vec::new();
    while let Some(step) = state.checked_sub(1).map(|place| &reached[place as usize]) {
        path.push(step.op);
        state = step.from;
    }
    path.reverse();
    path
}

fn replay(scope: Scope, path: &[Op]) -> World {
    let mut world = World::new(scope);
    path.iter().for_each(|&op| world.act(op));
    world
}

/// Visits up to `bound` states; tells how it goes now and then.
fn search(scope: Scope, bound: usize) -> Search {
    let (begun, mut told) = (Instant::now(), Instant::now());
    let mut seen = HashSet::new();
    let mut reached: Vec<Reached> = Vec::new();
    let (first, mut kinds) = fingerprint(&World::new(scope));
    seen.insert(first);
    let (deepest, met) = ((0, 0), Met::default());
    let mut search = Search { states: 1, steps: 0, longest: 0, complete: false, deepest, met };
    // State 0 is the beginning, state n that of reached[n - 1].
    let mut state = 0;
    while search.states < bound {
        let path = path_to(&reached, state);
        let mut ready = Some(replay(scope, &path));
        let possible = ready.as_ref().map(|world| world.possible(&kinds)).unwrap_or_default();
        search.longest = path.len() + 1;
        for op in possible {
            let mut world = ready.take().unwrap_or_else(|| replay(scope, &path));
            let done = catch_unwind(AssertUnwindSafe(|| {
                let before = world.rig.vm.stats();
                world.act(op);
                search.met.note(&world, &before);
                let depth = world.depth();
                if depth > search.deepest.0 {
                    search.deepest = (depth, search.states);
                }
                world.verify();
                let (form, kinds) = fingerprint(&world);
                let new = seen.insert(form);
                if new {
                    world.end();
                }
                (new, kinds)
            }));
            let (new, kinds) = done.unwrap_or_else(|panic| {
                println!("{path:?}, then {op:?}");
                resume_unwind(panic)
            });
            search.steps += 1;
            if new {
                let kinds = kinds.iter().fold(0, |mask, page| mask | 1 << page);
                reached.push(Reached { from: state, op, kinds });
                search.states += 1;
            }
        }
        if told.elapsed() > Duration::from_secs(10) {
            let (states, steps) = (search.states, search.steps);
            println!("{states} states, {steps} steps, {:.0?}", begun.elapsed());
            told = Instant::now();
        }
        let Some(next) = reached.get(state as usize) else {
            search.complete = true;
            break;
        };
        kinds = (0..8).filter(|page| next.kinds & 1 << page != 0).collect();
        state += 1;
    }
    let Search { states, steps, longest, complete, deepest: (deepest, at), met } = search;
    let Scope { guests, pages, trouble, queue, .. } = scope;
    println!(
        "{guests} guests, {pages} pages{}{}: {states} states{}, {steps} steps, up to {longest} operations, chains of up \
        to {deepest} objects (first after {at} states), {met:?}, {:.1?}",
        if trouble { ", with trouble" } else { "" },
        if queue > 0 { ", transfers that take time" } else { "" },
        if complete { ", all there are" } else { "" },
        begun.elapsed()
    );
    search
}

/// The bound that was asked for, or this one.
fn bound(short: usize) -> usize {
    let given = std::env::var("EXHAUSTIVE_STATES").ok();
    given.map_or(short, |text| {
        text.parse().unwrap_or_else(|_| panic!("EXHAUSTIVE_STATES is no number: {text}"))
    })
}

const ONE: Scope = Scope { guests: 1, pages: 1, trouble: true, queue: 0, frames: 16, defect: None };
/// The same with transfers that take time, and may fail.
const LATE: Scope = Scope { queue: 2, ..ONE };
const TWO: Scope = Scope { guests: 2, ..ONE };
const THREE: Scope = Scope { guests: 3, pages: 4, queue: 2, frames: 44, ..ONE };
/// States that a search visits when nobody asks for more.
const SHORT: usize = 30_000;
/// The same where a state has so many steps.
const SHORT_LATE: usize = 10_000;
/// Objects in a chain that there are to be with three guests: one of each, and the snapshot's.
const DEPTH: usize = 4;
/// States among which there is such a chain: it came to be after 12,796.
const DEEP: usize = 13_000;

#[test]
fn every_life_of_one_guest_with_one_page_is_as_the_oracle_says() {
    assert!(search(ONE, usize::MAX).complete);
}

#[test]
fn every_short_life_of_one_guest_with_one_page_and_late_transfers_is_as_the_oracle_says() {
    let bound = bound(SHORT_LATE);
    let search = search(LATE, bound);
    assert!(search.states >= bound || search.complete);
    let Met { comes, failed_in, failed_out } = search.met;
    let all = comes > 0 && failed_in > 0 && failed_out > 0;
    assert!(all || bound < SHORT_LATE, "of transfers too little happened: {:?}", search.met);
}

#[test]
fn every_short_life_of_two_guests_with_one_page_is_as_the_oracle_says() {
    let bound = bound(SHORT);
    let search = search(TWO, bound);
    assert!(search.states >= bound || search.complete);
}

#[test]
fn every_short_life_of_three_guests_with_four_pages_is_as_the_oracle_says() {
    let bound = bound(SHORT);
    let search = search(THREE, bound);
    assert!(search.states >= bound || search.complete);
    let deepest = search.deepest.0;
    assert!(deepest >= DEPTH || bound < DEEP, "the longest chain had {deepest} objects");
    let comes = search.met.comes;
    assert!(comes > 0 || bound < SHORT, "no page was ever on its way in");
}

/// That nothing is found says something only if something would be.
#[test]
fn what_is_done_wrong_is_found_in_the_smallest_world_in_which_it_can_be() {
    let in_one = [
        Defect::CollapseRefusesSwapped,
        Defect::RemoveLeavesLeaves,
        Defect::DiscardForgetsSwap,
        Defect::DiscardStoresAbsent,
        Defect::DiscardIgnoresNeedsCopy,
        Defect::CopyLeavesWritable,
        Defect::NothingIsPushed,
        Defect::SlotFreedTooEarly,
        Defect::SlotGivenTwice,
        Defect::DirtyKeepsItsSlot,
        Defect::ZeroShowsBelow,
    ];
    let in_three = [
        Defect::PutNeverFails,
        Defect::ResetEmptiesTop,
        Defect::ResetSeesTop,
        Defect::EvictedThoughUsed,
        Defect::KeepsTheHidden,
    ];
    let all = in_one.map(|defect| (ONE, defect)).into_iter();
    for (scope, defect) in all.chain(in_three.map(|defect| (THREE, defect))) {
        println!("{defect:?}:");
        let scope = Scope { defect: Some(defect), ..scope };
        assert!(catch_unwind(|| search(scope, SHORT)).is_err(), "with {defect:?} everything seems well");
    }
}
