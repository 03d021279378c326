//! Long histories: what a fault costs through live generations, in objects that it comes by.

#![expect(clippy::unwrap_used, reason = "a test may fail")]

use vmobject::addr::CHUNK_PAGES;
use vmobject::limits::TRAIL_STRIDE;
use vmobject::lock::Held;
use vmobject::map::Snapshot;
use vmobject::testing::{FakePmap, Rig, TestMap, at};

const DEPTHS: [u32; 4] = [1, 16, 256, 2314];

/// A guest over `depth` live generations, each kept by a snapshot and holding one page: the one that `page`
/// says. The last page of the first and second chunk is in the oldest of them all.
fn history(depth: u32, page: impl Fn(u32) -> u32) -> (Rig, TestMap, Vec<Snapshot>) {
    let rig = Rig::new(8192);
    let guest = rig.guest(4 * CHUNK_PAGES);
    rig.store(&guest, at(CHUNK_PAGES - 1, 0), 7).unwrap();
    rig.store(&guest, at(2 * CHUNK_PAGES - 1, 0), 8).unwrap();
    let mut kept = Vec::new();
    for generation in 0..depth {
        rig.store(&guest, at(page(generation), 0), u8::try_from(generation % 200).unwrap() + 1).unwrap();
        kept.push(rig.vm.snapshot(&guest, &mut Held::root()).unwrap());
    }
    rig.destroy(guest);
    // A guest that has mapped nothing yet.
    let guest = rig.vm.map_snapshot(kept.last().unwrap(), FakePmap::default(), &mut Held::root()).unwrap();
    rig.store(&guest, at(4 * CHUNK_PAGES - 1, 0), 1).unwrap();
    (rig, guest, kept)
}

fn visited(rig: &Rig, what: impl FnOnce()) -> u64 {
    let before = rig.vm.stats().chain_visited;
    what();
    rig.vm.stats().chain_visited - before
}

#[test]
fn generations_that_hold_nothing_of_a_chunk_are_passed_once_and_then_cost_what_one_costs() {
    for depth in DEPTHS {
        let (rig, guest, _kept) = history(depth, |generation| 3 * CHUNK_PAGES + generation % 500);
        let first = visited(&rig, || assert_eq!(rig.load(&guest, at(CHUNK_PAGES - 1, 0)), Ok(7)));
        assert!(first >= u64::from(depth) && first <= 2 * u64::from(depth) + 2, "depth {depth}: {first}");
        let more = visited(&rig, || {
            for page in 0..100 {
                assert_eq!(rig.load(&guest, at(page, 0)), Ok(0), "nobody has it");
            }
        });
        let bound = if depth <= TRAIL_STRIDE { 100 * u64::from(depth) } else { 0 };
        assert!(more <= bound, "depth {depth}: {more} objects for 100 faults");
        println!(
            "depth {depth}: {first} objects for the first fault in a chunk, {more} for the next hundred"
        );
        rig.check();
    }
}

#[test]
fn where_each_generation_holds_another_page_of_the_chunk_what_a_fault_comes_by_does_not_grow() {
    for depth in DEPTHS {
        let (rig, guest, _kept) = history(depth, |generation| generation % (CHUNK_PAGES - 1));
        let first = visited(&rig, || assert_eq!(rig.load(&guest, at(CHUNK_PAGES - 1, 0)), Ok(7)));
        let mut worst = 0;
        for page in 0..CHUNK_PAGES - 1 {
            let newest = (0..depth).rev().find(|generation| generation % (CHUNK_PAGES - 1) == page);
            let wanted = newest.map_or(0, |generation| u8::try_from(generation % 200).unwrap() + 1);
            let cost = visited(&rig, || assert_eq!(rig.load(&guest, at(page, 0)), Ok(wanted), "page {page}"));
            worst = worst.max(cost);
        }
        let bound = depth.min(2 * TRAIL_STRIDE + 1); // to an older generation's trail, and its stretch
        assert!(worst <= u64::from(bound), "depth {depth}: {worst}");
        println!("depth {depth}: {first} objects for the first fault in a chunk, then {worst} at worst");
        rig.check();
    }
}

#[test]
fn what_comes_to_be_in_a_generation_that_was_hopped_over_is_seen() {
    let (rig, guest, mut kept) = history(100, |generation| 3 * CHUNK_PAGES + generation % 500);
    assert_eq!(rig.load(&guest, at(CHUNK_PAGES - 1, 0)), Ok(7));
    // Every other generation goes: objects merge, and pages come to lie elsewhere.
    for generation in (0..kept.len()).rev().step_by(2) {
        rig.vm.delete_snapshot(kept.remove(generation), &mut Held::root());
        rig.settle();
        assert_eq!(rig.load(&guest, at(u32::try_from(generation).unwrap(), 0)), Ok(0));
    }
    rig.check();
    assert_eq!(rig.load(&guest, at(2 * CHUNK_PAGES - 1, 0)), Ok(8));
    kept.drain(..).for_each(|snapshot| rig.vm.delete_snapshot(snapshot, &mut Held::root()));
    rig.settle();
    assert_eq!(rig.load(&guest, at(CHUNK_PAGES - 1, 0)), Ok(7));
    assert_eq!(rig.load(&guest, at(3 * CHUNK_PAGES + 99, 0)), Ok(100));
    assert_eq!(rig.objects(), 1);
    rig.check();
}

#[test]
fn deleting_one_generation_of_2314_costs_what_it_holds() {
    let (rig, guest, mut kept) = history(2314, |generation| generation % (CHUNK_PAGES - 1));
    rig.settle();
    for generation in [2000, 1000, 3] {
        let before = rig.vm.stats().slot_visited;
        rig.vm.delete_snapshot(kept.remove(generation), &mut Held::root());
        rig.settle();
        let visited = rig.vm.stats().slot_visited - before;
        assert!(visited <= 16, "generation {generation}: {visited} slots");
    }
    assert_eq!(rig.load(&guest, at(CHUNK_PAGES - 1, 0)), Ok(7));
    rig.check();
}
