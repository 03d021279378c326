//! Limits of guests, one sentence at a time: what is charged, who pays, and that each gets on.

use vmobject::fault::{Faulted, Looked, WaitFor};
use vmobject::limits::{CLUSTER_PAGES, NEED_PAGES};
use vmobject::lock::Held;
use vmobject::map::{Instruction, LimitError, Share};
use vmobject::pmap::Pmap as _;
use vmobject::prot::Prot;
use vmobject::store::StoreId;
use vmobject::testing::{FakeMachine, Rig, TestMap, at, byte_of};

fn own(rig: &Rig, guest: &TestMap) -> u32 {
    rig.vm.own_frames(guest, &mut Held::root())
}

fn limit(rig: &Rig, guest: &TestMap, frames: u32) {
    assert_eq!(rig.vm.set_limit(guest, Some(frames), &mut Held::root()), Ok(()));
}

/// What the scheduler does between two slices; how many frames became free without I/O.
fn turn(rig: &Rig) -> u32 {
    let mut freed = 0;
    loop {
        let done = rig.vm.pageout(64, &mut Held::root());
        freed += done.freed;
        if !done.more && rig.deliver_all() == 0 {
            return freed;
        }
    }
}

/// One access of one instruction, as often as it has to wait.
fn access(rig: &Rig, guest: &TestMap, by: Instruction, page: u32, wanted: Prot) {
    for _ in 0..100 {
        let faulted = rig.vm.fault_for(guest, Some(by), at(page, 77), wanted, &mut Held::root());
        match faulted {
            Ok(Faulted::Mapped) => return,
            Ok(Faulted::Wait(_)) => turn(rig),
            Err(error) => panic!("page {page}: {error:?}"),
        };
    }
    panic!("page {page} does not come");
}

fn is_mapped(guest: &TestMap, page: u32) -> bool {
    guest.with_pmap(&mut Held::root(), |pmap| pmap.lookup(at(page, 0)).is_some())
}

#[test]
fn a_guest_that_is_limited_to_less_than_it_has_pays_although_memory_is_not_short() {
    let rig = Rig::with_swap(4096, 512);
    let (guest, other) = (rig.guest(300), rig.guest(300));
    rig.fill(&guest, 0..300);
    rig.fill(&other, 0..300);
    limit(&rig, &guest, 128);
    turn(&rig);
    rig.check();
    assert!((64..=128).contains(&own(&rig, &guest)), "{} of 128", own(&rig, &guest));
    assert_eq!(own(&rig, &other), 300);
    assert!((0..300).all(|page| is_mapped(&other, page)), "nobody else's page was looked at");
    rig.vm.set_limit(&guest, None, &mut Held::root()).unwrap();
    for page in 0..300 {
        assert_eq!(rig.load(&guest, at(page, 77)), Ok(byte_of(page)));
        turn(&rig);
    }
    assert_eq!(own(&rig, &guest), 300);
}

#[test]
fn a_guest_never_has_more_than_its_limit_however_much_it_writes() {
    let rig = Rig::with_swap(4096, 1024);
    let guest = rig.guest(1000);
    let least = rig.vm.least_limit(&guest);
    limit(&rig, &guest, least);
    for page in 0..1000 {
        while let Faulted::Wait(_) =
            rig.vm.fault(&guest, at(page, 0), Prot::WRITE, &mut Held::root()).unwrap()
        {
            turn(&rig);
        }
        rig.store(&guest, at(page, 77), byte_of(page)).unwrap();
        assert!(own(&rig, &guest) <= least);
    }
    assert!(guest.stats().fault_held > 0);
    for page in (0..1000).rev().chain((0..1000).map(|n| n * 37 % 1000)) {
        while let Faulted::Wait(_) = rig.vm.fault(&guest, at(page, 0), Prot::READ, &mut Held::root()).unwrap()
        {
            turn(&rig);
        }
        assert_eq!(rig.load(&guest, at(page, 77)), Ok(byte_of(page)));
        assert!(own(&rig, &guest) <= least);
    }
    rig.check();
}

#[test]
fn an_instruction_has_all_its_pages_at_once_under_the_least_limit_although_others_fault_too() {
    let rig = Rig::with_swap(4096, 1024);
    let guest = rig.guest(1000);
    rig.vm.set_vcpus(&guest, 2, &mut Held::root()).unwrap();
    rig.fill(&guest, 0..1000);
    limit(&rig, &guest, rig.vm.least_limit(&guest));
    turn(&rig);
    // Each in a cluster of its own.
    let pages: Vec<u32> = (0..18).map(|n| n * 50).collect();
    assert_eq!(pages.len(), NEED_PAGES);
    let by = Instruction { vcpu: 0, pc: 0x1000 };
    for &page in &pages {
        access(&rig, &guest, by, page, Prot::READ);
        // Another vCPU wants another page in every step, and each time with another instruction.
        let other = Instruction { vcpu: 1, pc: u64::from(page) };
        access(&rig, &guest, other, page + 25, Prot::WRITE);
    }
    assert!(pages.iter().all(|&page| is_mapped(&guest, page)));
    rig.check();
}

#[test]
fn a_page_in_use_outlasts_those_that_are_not() {
    let rig = Rig::with_swap(4096, 1024);
    let guest = rig.guest(600);
    rig.fill(&guest, 0..600);
    limit(&rig, &guest, 200);
    turn(&rig);
    let mut missing = 0;
    for round in 0..400_u32 {
        let page = 100 + round;
        for page in (0..20).chain([page]) {
            missing += u32::from(page < 20 && !is_mapped(&guest, page));
            while let Faulted::Wait(_) =
                rig.vm.fault(&guest, at(page, 0), Prot::READ, &mut Held::root()).unwrap()
            {
                turn(&rig);
            }
            rig.load(&guest, at(page, 77)).unwrap();
        }
    }
    assert!(missing <= 20, "once each, and then never again: {missing}");
}

#[test]
fn a_limit_below_what_a_guest_needs_is_refused_and_so_is_one_without_swap() {
    let rig = Rig::with_swap(4096, 64);
    let guest = rig.guest(10);
    rig.vm.set_vcpus(&guest, 4, &mut Held::root()).unwrap();
    let least = 4 * u32::try_from(NEED_PAGES).unwrap() + 3 * CLUSTER_PAGES;
    let set = |frames| rig.vm.set_limit(&guest, frames, &mut Held::root());
    assert_eq!(set(Some(least - 1)), Err(LimitError::Least(least)));
    assert_eq!((set(Some(least)), guest.limit()), (Ok(()), Some(least)));
    assert_eq!((set(None), guest.limit()), (Ok(()), None));
    let rig = Rig::new(4096);
    let guest = rig.guest(10);
    assert_eq!(rig.vm.set_limit(&guest, Some(1000), &mut Held::root()), Err(LimitError::NoSwap));
}

#[test]
fn what_a_guest_shares_is_charged_to_nobody_until_it_is_written_or_alone() {
    let machine = FakeMachine::new();
    machine.store.add(StoreId(1), vec![7; 16 * 4096]);
    let rig = Rig::with(machine, 4096);
    rig.add_swap(512);
    let guest = rig.guest(100);
    let image = rig.vm.image(StoreId(1), &mut Held::root()).unwrap();
    rig.put(&guest, 100, 16, image, 0, Prot::ALL, Share::Copy).unwrap();
    rig.fill(&guest, 0..100);
    (100..116).for_each(|page| assert_eq!(rig.load(&guest, at(page, 77)), Ok(7)));
    assert_eq!(own(&rig, &guest), 100, "not the image");
    let clone = rig.clone(&guest);
    assert_eq!((own(&rig, &guest), own(&rig, &clone)), (0, 0));
    rig.fill(&guest, 0..10);
    rig.fill(&clone, 0..20);
    assert_eq!((own(&rig, &guest), own(&rig, &clone)), (10, 20));
    rig.destroy(clone);
    rig.settle();
    assert_eq!(own(&rig, &guest), 100);
    rig.check();
}

#[test]
fn a_guest_that_stands_still_pays_for_what_becomes_its_own_when_it_is_alone_with_it() {
    let rig = Rig::with_swap(4096, 512);
    let guest = rig.guest(300);
    rig.fill(&guest, 0..300);
    let clone = rig.clone(&guest);
    rig.fill(&clone, 0..10);
    limit(&rig, &clone, 128);
    turn(&rig);
    assert_eq!(own(&rig, &clone), 10, "it has not too much yet");
    rig.destroy(guest);
    rig.settle();
    assert_eq!(own(&rig, &clone), 300);
    turn(&rig);
    assert!(own(&rig, &clone) <= 128, "{} of 128", own(&rig, &clone));
    rig.check();
}

#[test]
fn a_guest_that_stands_still_pays_for_what_is_brought_in_of_it_for_an_image() {
    let rig = Rig::with_swap(4096, 512);
    let guest = rig.guest(300);
    rig.fill(&guest, 0..300);
    limit(&rig, &guest, 128);
    turn(&rig);
    let image = rig.vm.freeze(&guest, &mut Held::root()).unwrap();
    for page in 0..300 {
        let mut byte = [0];
        while rig.vm.read_snapshot(&image, at(page, 77), &mut byte, &mut Held::root()) != Ok(Looked::Done) {
            rig.deliver_all();
        }
        assert_eq!(byte[0], byte_of(page));
    }
    assert!(own(&rig, &guest) > 128, "{}", own(&rig, &guest));
    turn(&rig);
    assert!(own(&rig, &guest) <= 128, "{} of 128", own(&rig, &guest));
    rig.check();
    rig.vm.delete_snapshot(image, &mut Held::root());
}

#[test]
fn a_limited_guest_for_which_swap_is_full_waits_and_goes_on_when_its_limit_is_lifted() {
    let rig = Rig::with_swap(4096, 20);
    let guest = rig.guest(400);
    let least = rig.vm.least_limit(&guest);
    limit(&rig, &guest, least);
    let held = &mut Held::root();
    let (mut page, mut waits) = (0, 0);
    while waits < 10 {
        assert!(page < 400);
        match rig.vm.fault(&guest, at(page, 0), Prot::WRITE, held).unwrap() {
            Faulted::Mapped => {
                rig.store(&guest, at(page, 77), byte_of(page)).unwrap();
                (page, waits) = (page + 1, 0);
            }
            Faulted::Wait(what) => {
                assert_eq!(what, WaitFor::Memory);
                turn(&rig);
                waits += 1;
            }
        }
    }
    assert_eq!((rig.vm.swap_info(held).free(), own(&rig, &guest) <= least), (0, true));
    rig.vm.set_limit(&guest, None, held).unwrap();
    assert_eq!(rig.vm.fault(&guest, at(page, 0), Prot::WRITE, held), Ok(Faulted::Mapped));
    rig.check();
}

#[test]
fn a_guest_that_can_give_nothing_does_not_keep_another_from_giving() {
    for gives_first in [false, true] {
        let rig = Rig::with_swap(4096, 400);
        let (stuck, gives) = (rig.guest(1000), rig.guest(1000));
        // What one guest has in frames is in swap, too.
        rig.fill(&gives, 0..150);
        rig.page_out_all();
        for page in 0..150 {
            rig.load(&gives, at(page, 77)).unwrap();
        }
        // The rest of swap is somebody else's.
        let third = rig.guest(400);
        rig.fill(&third, 0..400);
        limit(&rig, &third, 100);
        for _ in 0..4000 {
            rig.vm.pageout(64, &mut Held::root());
            rig.deliver_all();
        }
        rig.vm.set_limit(&third, None, &mut Held::root()).unwrap();
        rig.fill(&stuck, 0..200);
        assert_eq!((own(&rig, &stuck), own(&rig, &gives)), (200, 150));
        assert_eq!(rig.vm.swap_info(&mut Held::root()).free(), 0);
        for guest in if gives_first { [&gives, &stuck] } else { [&stuck, &gives] } {
            limit(&rig, guest, 100);
        }
        for _ in 0..20_000 {
            // It is held up, and asks.
            rig.vm.fault(&gives, at(0, 0), Prot::READ, &mut Held::root()).unwrap();
            rig.vm.pageout(64, &mut Held::root());
            rig.deliver_all();
        }
        rig.check();
        assert!(own(&rig, &gives) <= 100, "{} of 100, first: {gives_first}", own(&rig, &gives));
        assert!(own(&rig, &stuck) > 100, "there is no room for it");
        for (guest, pages) in [(&gives, 150), (&stuck, 200)] {
            rig.vm.set_limit(guest, None, &mut Held::root()).unwrap();
            (0..pages).for_each(|page| assert_eq!(rig.load(guest, at(page, 77)), Ok(byte_of(page))));
        }
    }
}

#[test]
fn a_guest_with_a_little_too_much_keeps_its_leaves_while_the_store_is_busy_and_pageout_rests() {
    let rig = Rig::with_swap(4096, 4096);
    let guest = rig.guest(1000);
    rig.fill(&guest, 0..1000);
    limit(&rig, &guest, 902);
    let steps = (0..5000).filter(|_| rig.vm.pageout(64, &mut Held::root()).more).count();
    assert!(steps < 600, "{steps} of 5000 steps with more to do, and the store says nothing");
    let left = (0..1000).filter(|&page| is_mapped(&guest, page)).count();
    assert!(left >= 800, "{left} leaves of 1000 are left, and 98 pages are too many");
}
