//! The defects of the seed, each by its number: those that no other file's tests name.
//!
//! D2 and D4 `swap::a_chain_of_swapped_generations_becomes_one_without_io_d2_d4`, D3 and D28 `copy`, D10 and D12
//! `discard`, D11 `swap`, D13 `swap` and `disk`, D14, D20, D24, D25, D26 and D27 `disk`, D16 and D17 `fault`,
//! D18 and D19 the types of `vmobject::lock` and its examples that must not build, D18 also
//! `object::shadow::tests::a_reference_too_many_is_refused_and_changes_nothing_d18`, D21 `charge`,
//! D22 `pageout`, D23 `discard` and `disk`.

#![expect(clippy::unwrap_used, reason = "a test may fail")]

use vmobject::lock::Held;
use vmobject::map::Share;
use vmobject::object::Shadow;
use vmobject::prot::Prot;
use vmobject::store::StoreId;
use vmobject::testing::{FakeMachine, FakePmap, Rig, TestMap, at};

/// Live generations below a guest: each is kept by a snapshot, and holds one page of its own.
fn generations(rig: &Rig, guest: &TestMap, count: u32) -> Vec<vmobject::map::Snapshot> {
    let kept = (0..count).map(|page| {
        rig.store(guest, at(page, 0), 1).unwrap();
        rig.vm.snapshot(guest, &mut Held::root()).unwrap()
    });
    kept.collect()
}

fn drop_snapshot(rig: &Rig, snapshot: vmobject::map::Snapshot) {
    rig.vm.delete_snapshot(snapshot, &mut Held::root());
    rig.settle();
    rig.check();
}

/// How many objects a guest's first entry goes through, its own the first.
fn depth(rig: &Rig, guest: &TestMap) -> usize {
    let mut shadows = std::collections::BTreeMap::new();
    rig.vm.for_each_object(&mut Held::root(), |object| {
        shadows.insert(object.id, object.shadow);
    });
    let mut here = None;
    rig.vm.for_each_entry(guest, &mut Held::root(), |entry| here = here.or(Some(entry.object)));
    let below = |id: &vmobject::object::ObjectId| shadows[id].map(|Shadow { object, .. }| object);
    std::iter::successors(here, below).count()
}

#[test]
fn d1_a_page_just_past_the_window_does_not_block_a_bypass() {
    let rig = Rig::new(256);
    // An object of nine pages; a guest sees the first eight of them, and the ninth holds something.
    let object = rig.anonymous(9);
    rig.vm.reference(object, &mut Held::root()).unwrap();
    let (whole, guest) = (rig.map(), rig.map());
    rig.put(&whole, 0, 9, object, 0, Prot::ALL, Share::Shared).unwrap();
    rig.store(&whole, at(8, 0), 9).unwrap();
    rig.store(&whole, at(0, 0), 1).unwrap();
    let keeper = rig.clone(&whole);
    rig.destroy(whole);
    rig.put(&guest, 0, 8, object, 0, Prot::ALL, Share::Copy).unwrap();
    rig.store(&guest, at(0, 0), 2).unwrap();
    rig.settle();
    assert_eq!((depth(&rig, &guest), rig.vm.stats().bypassed), (1, 1), "page 0 is hidden, page 8 unseen");
    assert_eq!((rig.load(&guest, at(0, 0)), rig.load(&keeper, at(8, 0))), (Ok(2), Ok(9)));
    rig.check();
}

#[test]
fn chores_come_to_their_end_however_small_the_budget() {
    const PAGES: u32 = 300;
    for budget in [64, 7, 2] {
        let rig = Rig::new(8 * PAGES);
        let source = rig.guest(PAGES);
        for page in 0..PAGES {
            rig.store(&source, at(page, 0), 1).unwrap();
        }
        let (first, second) = (rig.clone(&source), rig.clone(&source));
        for page in 0..PAGES - 1 {
            rig.store(&first, at(page, 0), 2).unwrap();
            rig.store(&second, at(page, 0), 3).unwrap();
        }
        rig.vm.destroy_map(source, &mut Held::root());
        let enough = (1..100 * PAGES).find(|_| !rig.vm.step(budget, &mut Held::root()));
        assert!(enough.is_some(), "chores without end, {budget} at a time");
        rig.check();
        assert_eq!(rig.load(&first, at(PAGES - 1, 0)), Ok(1));
        assert_eq!(
            rig.vm.memory(&mut Held::root()).queues.active,
            2 * (PAGES - 1) + 1,
            "hidden pages stayed"
        );
    }
}

#[test]
fn d5_one_link_that_cannot_move_does_not_freeze_the_rest_of_the_chain() {
    let rig = Rig::new(256);
    let guest = rig.guest(16);
    let mut kept = generations(&rig, &guest, 8);
    rig.store(&guest, at(8, 0), 1).unwrap();
    assert_eq!(depth(&rig, &guest), 9);
    // A clone of generation 3 keeps that one; all snapshots go.
    let clone = rig.vm.map_snapshot(&kept[3], FakePmap::default(), &mut Held::root()).unwrap();
    rig.store(&clone, at(15, 0), 7).unwrap();
    while let Some(snapshot) = kept.pop() {
        drop_snapshot(&rig, snapshot);
    }
    assert_eq!((depth(&rig, &guest), depth(&rig, &clone)), (2, 2), "above and below generation 3 all is one");
    rig.destroy(clone);
    assert_eq!((depth(&rig, &guest), rig.objects()), (1, 1));
}

#[test]
fn d6_deleting_a_snapshot_or_a_clone_shortens_the_chain_without_another_fault() {
    let rig = Rig::new(256);
    let guest = rig.guest(16);
    let mut kept = generations(&rig, &guest, 3);
    rig.store(&guest, at(9, 0), 1).unwrap();
    let faults = guest.stats();
    for left in [3, 2, 1] {
        drop_snapshot(&rig, kept.pop().unwrap());
        assert_eq!(depth(&rig, &guest), left);
    }
    let clone = rig.clone(&guest);
    rig.store(&guest, at(10, 0), 1).unwrap();
    rig.store(&clone, at(11, 0), 1).unwrap();
    assert_eq!(depth(&rig, &guest), 2);
    rig.destroy(clone);
    assert_eq!((depth(&rig, &guest), guest.stats().fault_resident), (1, faults.fault_resident));
}

#[test]
fn d7_a_collapse_that_was_refused_once_is_refused_again_by_one_look() {
    let rig = Rig::new(8192);
    let guest = rig.guest(4000);
    for page in 0..4000 {
        rig.store(&guest, at(page, 0), 1).unwrap();
    }
    let keeper = rig.clone(&guest);
    for page in 0..2000 {
        rig.store(&guest, at(page, 0), 2).unwrap();
    }
    rig.settle();
    let before = rig.vm.stats();
    for page in 2001..2500 {
        rig.store(&guest, at(page, 0), 2).unwrap();
        rig.settle();
    }
    let after = rig.vm.stats();
    assert_eq!(after.slot_visited, before.slot_visited, "page 2000 still stops it, and is not looked for");
    rig.store(&guest, at(2000, 0), 2).unwrap();
    rig.settle();
    let visited = rig.vm.stats().slot_visited - after.slot_visited;
    assert!((500..=502).contains(&visited), "{visited}: from where it stopped to what stops it now");
    rig.destroy(keeper);
}

#[test]
fn d8_no_frame_is_free_while_a_leaf_reaches_it() {
    let rig = Rig::new(64);
    let guest = rig.guest(16);
    for page in 0..16 {
        rig.store(&guest, at(page, 0), 1).unwrap();
    }
    let clone = rig.clone(&guest);
    for page in 0..16 {
        rig.load(&clone, at(page, 0)).unwrap();
    }
    rig.discard(&guest, 0, 8).unwrap();
    rig.check();
    rig.vm.destroy_map(guest, &mut Held::root());
    rig.check();
    rig.settle();
    rig.check();
    rig.discard(&clone, 0, 16).unwrap();
    rig.check();
    assert_eq!(rig.free(), 64);
}

#[test]
fn d9_the_side_with_fewer_pages_moves() {
    for (below, above, moved) in [(40, 3, 3), (3, 40, 3)] {
        let rig = Rig::new(256);
        let guest = rig.guest(100);
        for page in 0..below {
            rig.store(&guest, at(page, 0), 1).unwrap();
        }
        let keeper = rig.clone(&guest);
        for page in 50..50 + above {
            rig.store(&guest, at(page, 0), 2).unwrap();
        }
        let before = rig.vm.stats().collapse_moved;
        rig.destroy(keeper);
        assert_eq!((depth(&rig, &guest), rig.vm.stats().collapse_moved - before), (1, moved));
        for page in 0..below {
            assert_eq!(rig.load(&guest, at(page, 0)), Ok(1));
        }
        for page in 50..50 + above {
            assert_eq!(rig.load(&guest, at(page, 0)), Ok(2));
        }
        rig.check();
    }
}

#[test]
fn d15_a_copy_costs_the_maps_entries_and_not_its_pages() {
    let machine = FakeMachine::new();
    machine.store.add(StoreId(1), vec![1; 4096]);
    let rig = Rig::with(machine, 8192);
    let guest = rig.guest(6000);
    for page in 0..6000 {
        rig.store(&guest, at(page, 0), 1).unwrap();
    }
    let (before, free) = (rig.vm.stats(), rig.free());
    let clone = rig.clone(&guest);
    let image = rig.vm.freeze(&guest, &mut Held::root()).unwrap();
    let after = rig.vm.stats();
    assert_eq!((after.slot_visited, after.leaf_visited), (before.slot_visited, before.leaf_visited));
    assert_eq!((rig.free(), after.map_copied), (free, before.map_copied + 2));
    drop_snapshot(&rig, image);
    rig.destroy(clone);
}

/// A collapse brings up what the referrer that went was the last to see.
#[test]
fn a_page_that_only_a_dead_guest_saw_is_freed_although_its_object_merged_first() {
    let rig = Rig::new(128);
    let first = rig.guest(4);
    assert_eq!(rig.load(&first, at(0, 0)), Ok(0));
    let second = rig.clone(&first);
    rig.discard(&first, 1, 1).unwrap();
    let third = rig.clone(&first);
    rig.store(&first, at(0, 0), 1).unwrap();
    assert_eq!(rig.load(&second, at(1, 0)), Ok(0));
    rig.vm.destroy_map(second, &mut Held::root()); // and no more chores than that
    rig.store(&third, at(0, 0), 2).unwrap();
    rig.settle();
    assert_eq!(128 - rig.free(), 2, "the page that each of them has");
    rig.check();
}

#[test]
fn a_page_that_only_a_dead_guest_saw_far_below_is_freed_when_what_it_saw_through_merges() {
    let rig = Rig::new(128);
    let first = rig.guest(4);
    rig.fill(&first, 0..3);
    let second = rig.clone(&first);
    rig.store(&second, at(1, 0), 1).unwrap();
    let third = rig.clone(&second);
    rig.store(&first, at(0, 0), 2).unwrap();
    rig.store(&second, at(0, 0), 3).unwrap();
    rig.store(&third, at(1, 0), 4).unwrap();
    // The first page of all is the third guest's alone, two objects below its own.
    rig.destroy(third);
    assert_eq!(128 - rig.free(), 6 - 1, "of the first three pages two are seen, and the others wrote three");
    rig.check();
}
