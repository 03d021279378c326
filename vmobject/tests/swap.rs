//! Swap, one sentence at a time: what goes out comes back, slots come and go, stores fail.

use vmobject::fault::{FaultError, Faulted, WaitFor};
use vmobject::limits::PUTS_OF_ONE;
use vmobject::lock::Held;
use vmobject::map::Share;
use vmobject::pager::swap::SwapInfo;
use vmobject::prot::Prot;
use vmobject::store::{LostPage, StoreError};
use vmobject::testing::{Refused, Rig, SWAP, TestMap, at, byte_of};

fn verify(rig: &Rig, guest: &TestMap, pages: core::ops::Range<u32>) {
    for page in pages {
        assert_eq!(rig.load(guest, at(page, 77)), Ok(byte_of(page)), "page {page}");
    }
}

fn info(rig: &Rig) -> SwapInfo {
    rig.vm.swap_info(&mut Held::root())
}

fn resident_and_swapped(rig: &Rig) -> (u32, u32) {
    let mut sum = (0, 0);
    rig.vm.for_each_object(&mut Held::root(), |object| {
        sum = (sum.0 + object.counts.resident, sum.1 + object.counts.swapped);
    });
    sum
}

#[test]
fn a_page_that_was_paged_out_comes_back_as_it_was() {
    let rig = Rig::with_swap(256, 128);
    let guest = rig.guest(100);
    let before = rig.free();
    rig.fill(&guest, 0..100);
    rig.page_out_all();
    rig.check();
    assert_eq!((rig.free(), info(&rig).in_use), (before, 100));
    assert_eq!(resident_and_swapped(&rig), (0, 100));
    verify(&rig, &guest, 0..100);
    rig.check();
}

#[test]
fn neighbours_go_out_in_one_transfer_and_come_back_in_one() {
    let rig = Rig::with_swap(256, 128);
    let guest = rig.guest(64);
    rig.fill(&guest, 0..64);
    rig.page_out_all();
    assert_eq!(rig.vm.stats().page_out, 4, "64 pages in clusters of 16");
    assert_eq!(rig.load(&guest, at(20, 77)), Ok(byte_of(20)));
    assert_eq!((rig.vm.stats().page_in, resident_and_swapped(&rig)), (1, (16, 48)));
}

#[test]
fn a_page_of_zeros_is_never_written_and_reads_as_zero_again() {
    let rig = Rig::with_swap(256, 128);
    let guest = rig.guest(32);
    for page in 0..32 {
        rig.load(&guest, at(page, 0)).unwrap();
    }
    rig.store(&guest, at(9, 0), 1).unwrap();
    rig.store(&guest, at(9, 0), 0).unwrap();
    rig.page_out_all();
    rig.check();
    let written = rig.vm.machine().store.written.load(std::sync::atomic::Ordering::Relaxed);
    assert_eq!((written, info(&rig).in_use, resident_and_swapped(&rig)), (0, 0, (0, 0)));
    assert_eq!(rig.vm.stats().evicted_zero, 32);
    assert_eq!(rig.load(&guest, at(9, 0)), Ok(0));
}

#[test]
fn a_page_of_zeros_does_not_go_along_with_its_neighbours() {
    let rig = Rig::with_swap(128, 64);
    let guest = rig.guest(16);
    for page in 0..16 {
        rig.load(&guest, at(page, 0)).unwrap();
    }
    for page in [0, 1, 5] {
        rig.store(&guest, at(page, 77), 1).unwrap();
    }
    rig.page_out_all();
    let count = rig.vm.stats();
    assert_eq!((count.page_written, count.evicted_zero), (3, 13));
    assert_eq!(rig.vm.swap_info(&mut Held::root()).in_use, 3);
    assert_eq!((rig.load(&guest, at(1, 77)), rig.load(&guest, at(2, 77))), (Ok(1), Ok(0)));
    rig.check();
}

#[test]
fn a_page_of_zeros_over_another_still_hides_it_when_it_was_paged_out() {
    let rig = Rig::with_swap(256, 128);
    let guest = rig.guest(8);
    rig.fill(&guest, 0..8);
    let clone = rig.clone(&guest);
    rig.store(&clone, at(3, 77), 0).unwrap();
    rig.page_out_all();
    rig.check();
    assert_eq!(rig.load(&clone, at(3, 77)), Ok(0));
    verify(&rig, &guest, 0..8);
    rig.destroy(guest);
    assert_eq!(rig.load(&clone, at(3, 77)), Ok(0), "nor after the two became one");
    rig.check();
}

#[test]
fn a_page_that_was_only_read_since_is_dropped_without_being_written_again() {
    let rig = Rig::with_swap(256, 128);
    let guest = rig.guest(16);
    rig.fill(&guest, 0..16);
    rig.page_out_all();
    verify(&rig, &guest, 0..16);
    assert_eq!(info(&rig).in_use, 16, "the slots are kept along with the frames");
    rig.page_out_all();
    assert_eq!(rig.vm.stats().page_out, 1);
    verify(&rig, &guest, 0..16);
}

#[test]
fn a_slot_is_given_back_the_moment_its_page_changes_d11() {
    let rig = Rig::with_swap(256, 128);
    let guest = rig.guest(16);
    rig.fill(&guest, 0..16);
    rig.page_out_all();
    verify(&rig, &guest, 0..16);
    rig.store(&guest, at(3, 77), 200).unwrap();
    assert_eq!(info(&rig).in_use, 15);
    rig.write(&guest, at(4, 77), &[201]).unwrap();
    assert_eq!(info(&rig).in_use, 14);
    rig.check();
    rig.page_out_all();
    rig.check();
    assert_eq!(rig.load(&guest, at(3, 77)), Ok(200));
    assert_eq!(rig.load(&guest, at(4, 77)), Ok(201));
}

#[test]
fn a_write_to_a_swapped_page_leaves_no_slot_behind() {
    let rig = Rig::with_swap(256, 128);
    let guest = rig.guest(4);
    rig.fill(&guest, 0..1);
    rig.page_out_all();
    rig.store(&guest, at(0, 78), 9).unwrap();
    assert_eq!(info(&rig).in_use, 0);
    verify(&rig, &guest, 0..1);
    rig.check();
}

#[test]
fn a_guest_that_ends_gives_back_every_slot() {
    let rig = Rig::with_swap(256, 128);
    let before = rig.free();
    let guest = rig.guest(64);
    rig.fill(&guest, 0..64);
    rig.page_out_all();
    verify(&rig, &guest, 0..20);
    rig.destroy(guest);
    assert_eq!((rig.free(), rig.objects(), info(&rig).in_use), (before, 0, 0));
    rig.check();
}

#[test]
fn clones_share_a_swapped_page_and_the_slot_stays_until_the_last_of_them_is_gone() {
    let rig = Rig::with_swap(256, 128);
    let guest = rig.guest(16);
    rig.fill(&guest, 0..16);
    rig.page_out_all();
    let (a, b) = (rig.clone(&guest), rig.clone(&guest));
    verify(&rig, &a, 0..16);
    assert_eq!(rig.vm.stats().page_in, 1);
    verify(&rig, &b, 0..16);
    assert_eq!(rig.vm.stats().page_in, 1, "what one brought in the other sees");
    rig.store(&a, at(5, 77), 100).unwrap();
    assert_eq!(info(&rig).in_use, 16, "the copy is a's own");
    rig.destroy(guest);
    rig.destroy(a);
    rig.check();
    rig.page_out_all();
    verify(&rig, &b, 0..16);
    rig.destroy(b);
    assert_eq!(info(&rig).in_use, 0);
}

#[test]
fn a_chain_of_swapped_generations_becomes_one_without_io_d2_d4() {
    // Every generation has its own pages in swap, at offsets that differ; ends in both orders.
    for newest_first in [false, true] {
        let rig = Rig::with_swap(512, 512);
        let map = rig.map();
        let object = rig.anonymous(80);
        rig.put(&map, 0, 64, object, 16, Prot::ALL, Share::Shared).unwrap();
        rig.fill(&map, 0..64);
        let mut family = vec![map];
        for generation in 0..4_u32 {
            rig.page_out_all();
            let clone = rig.clone(family.last().unwrap());
            for page in (generation..64).step_by(5) {
                rig.store(&clone, at(page, 77), byte_of(page) ^ 0x80).unwrap();
                rig.store(&clone, at(page, 77), byte_of(page)).unwrap();
            }
            family.push(clone);
        }
        rig.page_out_all();
        rig.check();
        let started = rig.vm.machine().store.started.load(std::sync::atomic::Ordering::Relaxed);
        let survivor = if newest_first { family.remove(0) } else { family.pop().unwrap() };
        while !family.is_empty() {
            let next = if newest_first { family.pop().unwrap() } else { family.remove(0) };
            rig.destroy(next);
            rig.check();
        }
        let now = rig.vm.machine().store.started.load(std::sync::atomic::Ordering::Relaxed);
        assert_eq!((started, rig.objects()), (now, 1), "one object is left, and nothing was read or written");
        assert_eq!(resident_and_swapped(&rig), (0, 64));
        assert_eq!(info(&rig).in_use, 64, "what was hidden gave its slots back");
        verify(&rig, &survivor, 0..64);
        rig.destroy(survivor);
        assert_eq!(info(&rig).in_use, 0);
    }
}

#[test]
fn a_bypass_passes_over_an_object_whose_pages_are_all_in_swap_d4() {
    let rig = Rig::with_swap(256, 256);
    let base = rig.guest(16);
    rig.fill(&base, 0..16);
    let middle = rig.clone(&base);
    for page in 0..4 {
        rig.store(&middle, at(page, 77), 7).unwrap();
    }
    let (first, second) = (rig.clone(&middle), rig.clone(&middle));
    rig.page_out_all();
    for clone in [&first, &second] {
        for page in 0..4 {
            rig.store(clone, at(page, 77), byte_of(page)).unwrap();
        }
    }
    rig.destroy(middle);
    rig.settle();
    rig.check();
    verify(&rig, &first, 0..16);
    verify(&rig, &second, 0..16);
    rig.destroy(base);
    rig.page_out_all();
    assert_eq!(info(&rig).in_use, 16 + 4, "twelve that both share, and four of each");
    rig.check();
}

#[test]
fn a_write_that_fails_leaves_the_page_where_it_is_and_the_pass_goes_on_d13() {
    let rig = Rig::with_swap(256, 128);
    let guest = rig.guest(48);
    rig.fill(&guest, 0..48);
    let store = &rig.vm.machine().store;
    // The first cluster fails, then each of its pages alone; the others are written.
    rig.page_out();
    let clusters = store.pending();
    assert_eq!(clusters, 3);
    rig.deliver(0, Err(StoreError::Io));
    // As many at once as a store may have, the others by and by.
    assert_eq!(store.pending(), PUTS_OF_ONE as usize, "each page of it is tried alone");
    let mut failed = 0;
    while failed < 16 || store.pending() > 0 {
        if store.pending() == 0 {
            rig.page_out();
            assert!(store.pending() > 0, "{failed} pages were tried alone");
        }
        let single = store.requests()[0].frames.len() == 1;
        let fails = single && failed < 16;
        failed += u32::from(fails);
        rig.deliver(0, if fails { Err(StoreError::Io) } else { Ok(()) });
        rig.check();
    }
    assert_eq!(info(&rig).bad, 16, "those slots are not used again");
    assert_eq!((rig.vm.stats().page_out_failed, rig.vm.stats().slot_spoiled), (17, 16));
    verify(&rig, &guest, 0..48);
    rig.page_out_all();
    rig.check();
    assert_eq!(resident_and_swapped(&rig), (0, 48), "they went to other slots");
    verify(&rig, &guest, 0..48);
}

#[test]
fn a_write_that_fails_harms_nobody_else() {
    let rig = Rig::with_swap(256, 128);
    let (a, b) = (rig.guest(16), rig.guest(16));
    rig.fill(&a, 0..16);
    rig.fill(&b, 0..16);
    rig.page_out();
    rig.deliver(0, Err(StoreError::Io));
    rig.deliver(0, Ok(()));
    verify(&rig, &b, 0..16);
    verify(&rig, &a, 0..16);
    rig.check();
}

#[test]
fn a_page_that_cannot_be_read_back_is_felt_by_whoever_needs_it_and_by_nobody_else() {
    let rig = Rig::with_swap(256, 128);
    let guest = rig.guest(16);
    rig.fill(&guest, 0..16);
    rig.page_out_all();
    let held = &mut Held::root();
    // With its neighbours, then alone.
    for pages in [16, 1] {
        let waits = rig.vm.fault(&guest, at(3, 0), Prot::READ, held);
        assert!(matches!(waits, Ok(Faulted::Wait(WaitFor::Io(_)))));
        assert_eq!(rig.vm.machine().store.requests()[0].frames.len(), pages);
        rig.deliver(0, Err(StoreError::Io));
        rig.check();
    }
    let lost = rig.vm.fault(&guest, at(3, 0), Prot::READ, held);
    assert_eq!(lost, Err(FaultError::Lost(LostPage { store: SWAP, page: 3, error: StoreError::Io })));
    assert_eq!((info(&rig).in_use, resident_and_swapped(&rig)), (16, (0, 16)), "the evidence is kept");
    verify(&rig, &guest, 0..16);
}

#[test]
fn what_the_store_gives_back_wrong_is_not_shown_to_the_guest() {
    let rig = Rig::with_swap(256, 128);
    let guest = rig.guest(16);
    rig.fill(&guest, 0..16);
    rig.page_out_all();
    let store = &rig.vm.machine().store;
    let (good, other) = (store.page(SWAP, 5), store.page(SWAP, 6));
    store.set_page(SWAP, 5, &other);
    let lost =
        Err(Refused::Fault(FaultError::Lost(LostPage { store: SWAP, page: 5, error: StoreError::Corrupt })));
    assert_eq!(rig.load(&guest, at(5, 77)), lost);
    rig.check();
    verify(&rig, &guest, 0..5);
    verify(&rig, &guest, 6..16);
    store.set_page(SWAP, 5, &good);
    verify(&rig, &guest, 0..16);
}

#[test]
fn a_slot_that_still_has_what_was_written_to_it_before_is_found_out() {
    let rig = Rig::with_swap(256, 1);
    let guest = rig.guest(1);
    rig.store(&guest, at(0, 77), 1).unwrap();
    rig.page_out_all();
    let stale = rig.vm.machine().store.page(SWAP, 0);
    rig.store(&guest, at(0, 77), 2).unwrap();
    rig.store(&guest, at(0, 77), 1).unwrap();
    rig.page_out_all();
    assert_eq!(rig.vm.machine().store.page(SWAP, 0), stale, "the same bytes once more");
    assert_eq!(rig.load(&guest, at(0, 77)), Ok(1), "are as good as new");
    rig.store(&guest, at(0, 77), 2).unwrap();
    rig.page_out_all();
    rig.vm.machine().store.set_page(SWAP, 0, &stale);
    let lost =
        Err(Refused::Fault(FaultError::Lost(LostPage { store: SWAP, page: 0, error: StoreError::Corrupt })));
    assert_eq!(rig.load(&guest, at(0, 77)), lost);
    let counts = rig.vm.stats();
    assert_eq!((counts.page_in_failed, counts.page_in_corrupt), (0, 1), "the disk did not fail, it lied");
}

#[test]
fn two_vcpus_that_fail_in_turn_are_both_told() {
    let rig = Rig::with_swap(256, 128);
    let guest = rig.guest(64);
    rig.fill(&guest, 0..64);
    rig.page_out_all();
    let held = &mut Held::root();
    let pages = [5, 25, 45];
    for size in [16, 1] {
        for page in pages {
            let waits = rig.vm.fault(&guest, at(page, 77), Prot::READ, held);
            assert!(matches!(waits, Ok(Faulted::Wait(WaitFor::Io(_)))), "{waits:?}");
        }
        for _ in pages {
            assert_eq!(rig.vm.machine().store.requests()[0].frames.len(), size);
            rig.deliver(0, Err(StoreError::Io));
        }
    }
    for page in pages {
        let told = rig.vm.fault(&guest, at(page, 77), Prot::READ, held);
        assert!(
            matches!(told, Err(FaultError::Lost(LostPage { store: SWAP, error: StoreError::Io, .. }))),
            "page {page}: {told:?}"
        );
    }
    rig.check();
    verify(&rig, &guest, 0..64);
}

#[test]
fn a_failure_that_nobody_was_told_of_is_not_that_of_what_is_there_later() {
    let rig = Rig::with_swap(256, 1);
    let guest = rig.guest(1);
    let held = &mut Held::root();
    rig.fill(&guest, 0..1);
    rig.page_out_all();
    assert!(matches!(rig.vm.fault(&guest, at(0, 77), Prot::READ, held), Ok(Faulted::Wait(_))));
    rig.deliver(0, Err(StoreError::Io));
    // Who wanted it is gone; another guest's page takes the slot.
    rig.destroy(guest);
    let other = rig.guest(1);
    rig.fill(&other, 0..1);
    rig.page_out_all();
    assert_eq!(rig.load(&other, at(0, 77)), Ok(byte_of(0)));
}

#[test]
fn a_page_on_its_way_out_can_be_read_and_a_writer_waits_or_copies() {
    let rig = Rig::with_swap(256, 128);
    let guest = rig.guest(16);
    rig.fill(&guest, 0..16);
    let clone = rig.clone(&guest);
    let free = rig.free();
    rig.page_out();
    assert_eq!(rig.vm.machine().store.pending(), 1);
    let held = &mut Held::root();
    verify(&rig, &clone, 0..4);
    assert_eq!(rig.vm.machine().store.pending(), 1, "nobody had to wait");
    // The page is shared: a writer copies it.
    rig.store(&clone, at(0, 77), 99).unwrap();
    assert_eq!((rig.vm.machine().store.pending(), rig.free()), (1, free - 1));
    rig.check();
    rig.deliver_all();
    rig.check();
    assert_eq!(resident_and_swapped(&rig), (4 + 1, 12), "those that were read stay");
    rig.destroy(clone);
    // Now the guest's alone: a writer waits until the store has it.
    rig.page_out_all();
    verify(&rig, &guest, 0..16);
    rig.store(&guest, at(1, 77), byte_of(1)).unwrap();
    rig.page_out();
    let writes = rig.vm.fault(&guest, at(1, 77), Prot::WRITE, held);
    assert!(matches!(writes, Ok(Faulted::Wait(WaitFor::Io(_)))), "{writes:?}");
    rig.deliver_all();
    rig.store(&guest, at(1, 77), 5).unwrap();
    rig.check();
}

#[test]
fn when_swap_is_full_pages_stay_and_guests_go_on() {
    let rig = Rig::with_swap(256, 20);
    let guest = rig.guest(100);
    rig.fill(&guest, 0..100);
    rig.page_out_all();
    rig.check();
    assert_eq!((info(&rig).free(), resident_and_swapped(&rig)), (0, (80, 20)));
    verify(&rig, &guest, 0..100);
    assert!(info(&rig).in_use < 20, "a page that is back gives its slot to one that needs it more");
    rig.check();
}

#[test]
fn an_object_that_dies_while_its_pages_are_written_is_freed_when_they_are() {
    let rig = Rig::with_swap(256, 128);
    let before = rig.free();
    let guest = rig.guest(16);
    rig.fill(&guest, 0..16);
    rig.page_out();
    rig.destroy(guest);
    rig.check();
    assert_eq!(rig.objects(), 1);
    rig.deliver(0, Err(StoreError::Io));
    rig.settle();
    rig.check();
    rig.deliver_all();
    rig.settle();
    assert_eq!((rig.objects(), rig.free(), info(&rig).in_use), (0, before, 0));
}
