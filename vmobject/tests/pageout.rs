//! Pageout, one sentence at a time: who goes, who stays, who is asked, and what it costs.

use vmobject::check::Violation;
use vmobject::defect::Defect;
use vmobject::fault::{Faulted, WaitFor, Wiring};
use vmobject::lock::Held;
use vmobject::map::Share;
use vmobject::page::Owner;
use vmobject::pmap::Pmap as _;
use vmobject::prot::Prot;
use vmobject::store::{StoreError, StoreId};
use vmobject::testing::{FakeMachine, Rig, TestMap, at, byte_of};

fn is_mapped(guest: &TestMap, page: u32) -> bool {
    guest.with_pmap(&mut Held::root(), |pmap| pmap.lookup(at(page, 0)).is_some())
}

#[test]
fn nothing_is_paged_out_while_there_is_memory() {
    let rig = Rig::with_swap(1024, 64);
    let guest = rig.guest(64);
    rig.fill(&guest, 0..64);
    let done = rig.vm.pageout(10_000, &mut Held::root());
    assert_eq!((done.freed, done.more, rig.vm.stats().leaf_visited), (0, false, 0));
}

#[test]
fn a_guest_with_more_memory_than_the_host_has_frames_goes_on() {
    let rig = Rig::with_swap(200, 600);
    let guest = rig.guest(500);
    for page in 0..500 {
        // What the daemon does between two instructions of a guest.
        while rig.vm.pageout(64, &mut Held::root()).more {}
        rig.deliver_all();
        rig.store(&guest, at(page, 77), byte_of(page)).unwrap();
    }
    for page in (0..500).chain((0..500).rev()) {
        while rig.vm.pageout(64, &mut Held::root()).more {}
        rig.deliver_all();
        assert_eq!(rig.load(&guest, at(page, 77)), Ok(byte_of(page)));
    }
    rig.check();
    assert!(rig.vm.stats().evicted >= 1000, "{:?}", rig.vm.stats());
}

#[test]
fn a_page_that_is_used_stays_and_one_that_is_not_goes() {
    let rig = Rig::with_swap(256, 256);
    let guest = rig.guest(100);
    rig.fill(&guest, 0..100);
    let used = 0..20;
    // Enough for eighty pages in all.
    rig.vm.set_free_target(rig.free() + 60, rig.free() + 60);
    let mut before = guest.stats().fault_wait;
    for round in 0..400 {
        rig.vm.pageout(2, &mut Held::root());
        rig.deliver_all();
        for page in used.clone() {
            rig.load(&guest, at(page, 77)).unwrap();
        }
        if round == 0 {
            before = guest.stats().fault_wait;
        }
    }
    rig.check();
    assert_eq!(guest.stats().fault_wait, before, "what is used never had to come back");
    assert_eq!((20..100).filter(|&page| is_mapped(&guest, page)).count(), 20, "the others made room");
}

#[test]
fn a_page_dirtied_during_pageout_is_not_lost() {
    let rig = Rig::with_swap(256, 64);
    let guest = rig.guest(16);
    rig.fill(&guest, 0..16);
    rig.page_out_all();
    for page in 0..16 {
        rig.load(&guest, at(page, 77)).unwrap();
    }
    // Each has a slot with its contents. Between any two steps one of them is written.
    rig.vm.set_free_target(u32::MAX, u32::MAX);
    for round in 0..200_u32 {
        rig.vm.pageout(1, &mut Held::root());
        let page = round % 16;
        rig.store(&guest, at(page, 77), byte_of(round)).unwrap();
        rig.check();
        assert_eq!(rig.load(&guest, at(page, 77)), Ok(byte_of(round)));
    }
    rig.page_out_all();
    for round in 184..200 {
        assert_eq!(rig.load(&guest, at(round % 16, 77)), Ok(byte_of(round)));
    }
}

#[test]
fn no_frame_is_freed_while_a_leaf_reaches_it_d8() {
    let rig = Rig::with_swap(512, 256);
    let guest = rig.guest(32);
    rig.fill(&guest, 0..32);
    let family: Vec<TestMap> = (0..6).map(|_| rig.clone(&guest)).collect();
    for clone in &family {
        for page in 0..32 {
            rig.load(clone, at(page, 77)).unwrap();
        }
    }
    rig.vm.set_free_target(u32::MAX, u32::MAX);
    let mut round = 0;
    while rig.free() < 512 {
        round += 1;
        rig.vm.pageout(1, &mut Held::root());
        if round % 7 == 0 {
            rig.deliver(0, Ok(()));
        }
        rig.check(); // walks every leaf (I1)
        assert!(round < 10_000);
    }
    for clone in &family {
        assert!((0..32).all(|page| !is_mapped(clone, page)));
        assert_eq!(rig.load(clone, at(9, 77)), Ok(byte_of(9)));
    }
}

#[test]
fn a_page_that_a_thousand_clones_map_is_evicted_in_bounded_steps() {
    let rig = Rig::with_swap(4096, 256);
    let guest = rig.guest(2);
    rig.fill(&guest, 0..1);
    let clones: Vec<TestMap> = (0..1000).map(|_| rig.clone(&guest)).collect();
    for clone in &clones {
        rig.load(clone, at(0, 77)).unwrap();
    }
    rig.vm.set_free_target(u32::MAX, u32::MAX);
    let mut steps = 0;
    while rig.vm.stats().page_out == 0 {
        let before = rig.vm.stats().leaf_visited;
        rig.vm.pageout(10, &mut Held::root());
        assert!(rig.vm.stats().leaf_visited - before <= 10);
        steps += 1;
        assert!(steps < 1000);
    }
    // Once to see that it was used, once to see that it was not again, once to remove the leaves.
    assert_eq!(rig.vm.stats().leaf_visited, 3 * 1001);
    rig.deliver_all();
    rig.check();
}

#[test]
fn a_clone_that_has_its_own_page_is_not_visited_for_its_ancestors() {
    let rig = Rig::with_swap(512, 256);
    let guest = rig.guest(2);
    rig.fill(&guest, 0..1);
    let clones: Vec<TestMap> = (0..10).map(|_| rig.clone(&guest)).collect();
    for (number, clone) in clones.iter().enumerate() {
        rig.load(clone, at(0, 77)).unwrap();
        if number < 8 {
            rig.store(clone, at(0, 77), 3).unwrap();
        }
    }
    rig.page_out_all();
    // The shared page: three maps; the eight private ones: one each; three times as above.
    assert_eq!(rig.vm.stats().leaf_visited, 3 * (3 + 8));
    rig.check();
}

#[test]
fn a_page_that_somebody_maps_while_it_is_being_taken_away_stays() {
    let rig = Rig::with_swap(512, 256);
    let guest = rig.guest(2);
    rig.fill(&guest, 0..1);
    let clones: Vec<TestMap> = (0..20).map(|_| rig.clone(&guest)).collect();
    for clone in &clones {
        rig.load(clone, at(0, 77)).unwrap();
    }
    rig.vm.set_free_target(u32::MAX, u32::MAX);
    // Until the first leaf is gone; then its guest comes back.
    let gone = loop {
        rig.vm.pageout(1, &mut Held::root());
        if let Some(gone) = clones.iter().position(|clone| !is_mapped(clone, 0)) {
            break gone;
        }
    };
    rig.load(&clones[gone], at(0, 77)).unwrap();
    let reactivated = rig.vm.stats().reactivated;
    while rig.vm.stats().reactivated == reactivated {
        rig.vm.pageout(1, &mut Held::root());
        rig.check();
    }
    assert_eq!((rig.vm.stats().evicted, rig.vm.stats().page_out), (0, 0));
    assert!(is_mapped(&clones[gone], 0));
}

#[test]
fn a_map_that_ends_or_moves_during_the_walk_does_not_hide_another_from_it() {
    for budget in 1..40 {
        let rig = Rig::with_swap(512, 256);
        let guest = rig.guest(2);
        rig.fill(&guest, 0..1);
        let mut clones: Vec<TestMap> = (0..12).map(|_| rig.clone(&guest)).collect();
        for clone in &clones {
            rig.load(clone, at(0, 77)).unwrap();
        }
        rig.vm.set_free_target(u32::MAX, u32::MAX);
        rig.vm.pageout(40 + budget, &mut Held::root());
        // One gets a shadow, one goes, one comes.
        rig.store(&clones[5], at(1, 0), 1).unwrap();
        rig.destroy(clones.remove(8));
        clones.push(rig.clone(&guest));
        while rig.vm.pageout(1, &mut Held::root()).more {
            rig.deliver_all();
            rig.check();
        }
        rig.check();
        for clone in &clones {
            assert_eq!(rig.load(clone, at(0, 77)), Ok(byte_of(0)));
        }
    }
}

#[test]
fn pages_of_an_image_are_dropped_without_io() {
    let machine = FakeMachine::new();
    machine.store.add(StoreId(1), vec![7; 16 * 4096]);
    let rig = Rig::with(machine, 256);
    let map = rig.map();
    let image = rig.vm.image(StoreId(1), &mut Held::root()).unwrap();
    rig.put(&map, 0, 16, image, 0, Prot::ALL, Share::Copy).unwrap();
    for page in 0..16 {
        assert_eq!(rig.load(&map, at(page, 3)), Ok(7));
    }
    assert_eq!(rig.page_out(), 16, "without a swap store, too");
    let store = &rig.vm.machine().store;
    assert_eq!((store.pending(), store.written.load(std::sync::atomic::Ordering::Relaxed)), (0, 0));
    assert_eq!(rig.load(&map, at(4, 3)), Ok(7));
    rig.check();
}

#[test]
fn a_wired_page_keeps_its_frame_and_is_evicted_when_it_is_not_wired_any_more_d22() {
    let rig = Rig::with_swap(256, 64);
    let guest = rig.guest(8);
    rig.fill(&guest, 0..8);
    let held = &mut Held::root();
    let Ok(Wiring::Done(wired)) = rig.vm.wire(&guest, at(3, 0), Prot::WRITE, held) else { panic!() };
    let frame = wired.frame();
    rig.page_out_all();
    rig.check();
    assert_eq!(rig.free(), 255);
    let leaf = guest.with_pmap(held, |pmap| pmap.lookup(at(3, 0))).unwrap();
    assert_eq!((leaf.frame, rig.load(&guest, at(3, 77))), (frame, Ok(byte_of(3))));
    assert!(!rig.vm.unwire(wired, held));
    rig.page_out_all();
    assert_eq!(rig.free(), 256);
    rig.check();
}

#[test]
fn a_wired_page_moves_to_another_object_with_its_frame_d22() {
    let rig = Rig::with_swap(256, 64);
    let guest = rig.guest(8);
    rig.fill(&guest, 0..8);
    let clone = rig.clone(&guest);
    let held = &mut Held::root();
    let Ok(Wiring::Done(wired)) = rig.vm.wire(&clone, at(3, 0), Prot::READ, held) else { panic!() };
    rig.store(&clone, at(5, 0), 1).unwrap();
    rig.destroy(guest);
    assert_eq!(rig.objects(), 1, "the two became one");
    assert!(matches!(rig.vm.owner(wired.frame()), Owner::Object(..)));
    rig.store(&clone, at(3, 1), 9).unwrap();
    let leaf = clone.with_pmap(held, |pmap| pmap.lookup(at(3, 0))).unwrap();
    assert_eq!(leaf.frame, wired.frame());
    rig.check();
    rig.vm.unwire(wired, held);
    rig.check();
}

#[test]
fn a_wired_page_that_a_collapse_hides_is_free_when_it_is_unwired_d22() {
    let rig = Rig::with_swap(256, 64);
    let guest = rig.guest(8);
    rig.fill(&guest, 0..8);
    let before = rig.free();
    let clone = rig.clone(&guest);
    let held = &mut Held::root();
    let Ok(Wiring::Done(wired)) = rig.vm.wire(&clone, at(3, 0), Prot::READ, held) else { panic!() };
    rig.store(&clone, at(3, 77), 1).unwrap();
    rig.destroy(guest);
    assert_eq!((rig.vm.owner(wired.frame()), rig.free()), (Owner::Orphan, before - 1));
    rig.check();
    assert!(rig.vm.unwire(wired, held));
    assert_eq!((rig.free(), rig.load(&clone, at(3, 77))), (before, Ok(1)));
    rig.check();
}

#[test]
fn a_guest_that_waits_for_memory_goes_on_when_pageout_has_freed_some() {
    let rig = Rig::with_swap(64, 64);
    let guest = rig.guest(100);
    let mut page = 0;
    let held = &mut Held::root();
    while rig.vm.fault(&guest, at(page, 0), Prot::WRITE, held) == Ok(Faulted::Mapped) {
        rig.store(&guest, at(page, 77), byte_of(page)).unwrap();
        page += 1;
    }
    let waits = rig.vm.fault(&guest, at(page, 0), Prot::WRITE, held);
    assert_eq!(waits, Ok(Faulted::Wait(WaitFor::Memory)));
    // The daemon needs no frame to make one free.
    while rig.vm.pageout(100, held).more {}
    let mut freed = 0;
    while rig.vm.machine().store.pending() > 0 {
        let request = rig.vm.machine().store.requests().remove(0);
        freed += u32::try_from(request.frames.len()).unwrap();
        rig.deliver(0, Ok(()));
    }
    assert!(freed > 0);
    assert_eq!(rig.vm.fault(&guest, at(page, 0), Prot::WRITE, held), Ok(Faulted::Mapped));
    rig.check();
}

#[test]
fn a_store_whose_queue_is_full_is_asked_again_later() {
    let rig = Rig::with_swap(256, 64);
    let guest = rig.guest(16);
    rig.fill(&guest, 0..16);
    *rig.vm.machine().store.refuse_next.lock() = Some(StoreError::Busy);
    rig.page_out();
    rig.check();
    let info = rig.vm.swap_info(&mut Held::root());
    assert_eq!((info.in_use, info.bad, rig.vm.machine().store.pending()), (0, 0, 0));
    rig.page_out_all();
    assert_eq!(rig.free(), 256);
}

#[test]
fn without_swap_a_guests_pages_are_left_alone() {
    let rig = Rig::new(256);
    let guest = rig.guest(16);
    rig.fill(&guest, 0..16);
    rig.page_out();
    assert!((0..16).all(|page| is_mapped(&guest, page)), "nothing is unmapped for nothing");
    rig.check();
}

/// A collapse goes through the pages that an eviction goes through, and is the faster one; what an audit says of it.
fn collapse_meets_eviction(defect: Option<Defect>) -> Result<(), Violation> {
    for apart in 1..=6 {
        let rig = Rig::with_swap(1536, 1536);
        rig.vm.seed(defect);
        let guest = rig.guest(1200);
        rig.fill(&guest, 0..600);
        let clone = rig.clone(&guest);
        // As many of its own, so that what is below moves up to it; and leaves to what it shares.
        rig.fill(&guest, 600..1200);
        (0..600).for_each(|page| assert_eq!(rig.load(&guest, at(page, 77)), Ok(byte_of(page))));
        rig.vm.set_free_target(u32::MAX, u32::MAX);
        while is_mapped(&guest, 300) {
            rig.vm.pageout(1, &mut Held::root());
            rig.deliver_all();
        }
        rig.vm.destroy_map(clone, &mut Held::root());
        while rig.vm.step(3 + apart, &mut Held::root()) {
            rig.vm.pageout(1, &mut Held::root());
            rig.vm.check(&mut Held::root())?;
            rig.deliver_all();
        }
        assert!(rig.vm.stats().collapse_moved >= 600, "{:?}", rig.vm.stats());
    }
    Ok(())
}

#[test]
fn a_page_that_a_collapse_moves_while_its_leaves_are_looked_for_is_found_where_it_is_now() {
    assert_eq!(collapse_meets_eviction(None), Ok(()));
}

#[test]
fn an_eviction_that_misses_a_page_which_a_collapse_moved_is_seen() {
    let found = collapse_meets_eviction(Some(Defect::EvictionMissesMoved));
    assert_eq!(found.map_err(|violation| violation.invariant), Err("P4"));
}
