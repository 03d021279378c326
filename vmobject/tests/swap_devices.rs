//! Several swap stores: whose turn it is, and what becomes of pages when one of them fails or goes away.

use vmobject::VmError;
use vmobject::addr::PAGE_SIZE;
use vmobject::fault::FaultError;
use vmobject::limits::{MAX_FAILED_PUTS, MAX_SWAP_STORES};
use vmobject::lock::Held;
use vmobject::pager::swap::{Closed, SwapDevice, SwapInfo};
use vmobject::store::{Direction, LostPage, StoreError, StoreId};
use vmobject::testing::{Refused, Rig, TestMap, at, byte_of};

/// Stores of so many pages with these priorities, the first of them number 0.
fn rig(frames: u32, stores: &[(u32, i32)]) -> Rig {
    let rig = Rig::new(frames);
    for (number, &(pages, priority)) in (0..).zip(stores) {
        assert_eq!(add(&rig, number, pages, priority), Ok(pages));
    }
    rig
}

fn add(rig: &Rig, number: u16, pages: u32, priority: i32) -> Result<u32, VmError> {
    let Ok(bytes) = usize::try_from(u64::from(pages) * PAGE_SIZE) else { panic!("too large") };
    rig.vm.machine().store.add(StoreId(number), vec![0xee; bytes]);
    rig.vm.add_swap_at(StoreId(number), priority, &mut Held::root())
}

fn device(rig: &Rig, place: usize) -> SwapDevice {
    let Some(device) = rig.vm.swap_device(place, &mut Held::root()) else { panic!("no store {place}") };
    device
}

fn in_use(rig: &Rig) -> Vec<u32> {
    (0..).map_while(|place| rig.vm.swap_device(place, &mut Held::root())).map(|one| one.info.in_use).collect()
}

fn verify(rig: &Rig, guest: &TestMap, pages: core::ops::Range<u32>) {
    for page in pages {
        assert_eq!(rig.load(guest, at(page, 77)), Ok(byte_of(page)), "page {page}");
    }
}

/// Has everything paged out, and answers writes to this store so.
fn page_out_failing(rig: &Rig, store: StoreId, error: StoreError) {
    loop {
        let freed = rig.page_out();
        let mut answered = 0;
        while let Some(request) = rig.vm.machine().store.requests().first() {
            let fails = request.store == store && request.direction == Direction::Out;
            rig.deliver(0, if fails { Err(error) } else { Ok(()) });
            answered += 1;
        }
        if freed == 0 && answered == 0 {
            return;
        }
    }
}

#[test]
fn the_store_with_the_highest_priority_is_used_first_and_the_next_when_it_is_full() {
    let rig = rig(512, &[(64, -2), (32, 5), (48, 1)]);
    let guest = rig.guest(100);
    rig.fill(&guest, 0..16);
    rig.page_out_all();
    assert_eq!(in_use(&rig), [0, 16, 0]);
    rig.fill(&guest, 0..100);
    rig.page_out_all();
    rig.check();
    assert_eq!(in_use(&rig), [20, 32, 48]);
    verify(&rig, &guest, 0..100);
    rig.check();
    rig.destroy(guest);
    assert_eq!(in_use(&rig), [0, 0, 0]);
}

#[test]
fn a_part_of_a_page_at_the_end_of_a_store_has_no_slot() {
    let rig = Rig::new(256);
    let bytes = |pages: usize| vec![0; pages * 4096 + 512];
    rig.vm.machine().store.add(StoreId(1), bytes(8));
    rig.vm.machine().store.add(StoreId(2), bytes(0));
    assert_eq!(rig.vm.add_swap(StoreId(1), &mut Held::root()), Ok(8));
    assert!(rig.vm.add_swap(StoreId(2), &mut Held::root()).is_err());
}

#[test]
fn stores_of_one_priority_take_turns_cluster_by_cluster() {
    let rig = rig(512, &[(128, 3), (128, 3), (128, 3), (128, 2)]);
    let guest = rig.guest(144);
    rig.fill(&guest, 0..144);
    rig.page_out_all();
    rig.check();
    assert_eq!(in_use(&rig), [48, 48, 48, 0]);
    assert_eq!(rig.vm.stats().page_out, 9, "a cluster stays together");
    verify(&rig, &guest, 0..144);
    assert_eq!(rig.vm.stats().page_in, 9, "and comes back so");
    let counts = device(&rig, 1).counts;
    assert_eq!((counts.written, counts.read, counts.read_failed, counts.write_failed), (48, 48, 0, 0));
}

#[test]
fn pages_of_a_store_that_goes_away_while_they_are_written_go_to_another() {
    let rig = rig(512, &[(128, 9), (128, 0)]);
    let guest = rig.guest(64);
    rig.fill(&guest, 0..64);
    page_out_failing(&rig, StoreId(0), StoreError::Gone);
    rig.check();
    assert_eq!((in_use(&rig), device(&rig, 0).closed), (vec![0, 64], Some(Closed::Gone)));
    assert_eq!(device(&rig, 0).info, SwapInfo::default(), "nothing can be had there");
    let before = device(&rig, 0).counts;
    verify(&rig, &guest, 0..64);
    rig.page_out_all();
    assert_eq!(device(&rig, 0).counts, before, "it is not asked again");
    verify(&rig, &guest, 0..64);
    rig.check();
}

#[test]
fn a_page_that_is_in_its_frame_stays_there_when_its_slot_went_away() {
    let rig = rig(512, &[(128, 9), (128, 0)]);
    let guest = rig.guest(32);
    rig.fill(&guest, 0..32);
    rig.page_out_all();
    // The first half comes back and keeps its slots.
    verify(&rig, &guest, 0..16);
    assert_eq!(in_use(&rig), [32, 0]);
    *rig.vm.machine().store.refuse_next.lock() = Some(StoreError::Gone);
    let lost = |page| {
        Err(Refused::Fault(FaultError::Lost(LostPage { store: StoreId(0), page, error: StoreError::Gone })))
    };
    assert_eq!(rig.load(&guest, at(20, 77)), lost(20));
    // A store that is gone would be gone again; this one answers its next write so.
    let other = rig.guest(16);
    rig.fill(&other, 0..16);
    page_out_failing(&rig, StoreId(0), StoreError::Gone);
    page_out_failing(&rig, StoreId(0), StoreError::Gone);
    rig.check();
    assert_eq!(device(&rig, 0).closed, Some(Closed::Gone));
    verify(&rig, &guest, 0..16);
    verify(&rig, &other, 0..16);
    rig.check();
    rig.destroy(guest);
    rig.destroy(other);
    assert_eq!(in_use(&rig), [0, 0]);
}

#[test]
fn a_store_that_takes_no_write_gets_no_more_of_them_and_one_that_takes_some_does() {
    let rig = rig(1024, &[(512, 9), (512, 0)]);
    let guest = rig.guest(256);
    rig.fill(&guest, 0..256);
    page_out_failing(&rig, StoreId(0), StoreError::Io);
    rig.check();
    let first = device(&rig, 0);
    assert_eq!((first.closed, first.counts.written), (Some(Closed::Failing), 0));
    assert!(
        (u64::from(MAX_FAILED_PUTS)..2 * u64::from(MAX_FAILED_PUTS)).contains(&first.counts.write_failed)
    );
    assert_eq!(first.info.free(), 0);
    assert_eq!(in_use(&rig), [0, 256]);
    verify(&rig, &guest, 0..256);

    // As many failures with a success in between close nothing.
    let rig = self::rig(1024, &[(512, 9), (512, 0)]);
    let guest = rig.guest(128);
    for turn in 0..3 {
        rig.fill(&guest, 0..128);
        rig.page_out();
        for _ in 0..MAX_FAILED_PUTS / 2 {
            rig.deliver(0, Err(StoreError::Io));
        }
        rig.page_out_all();
        rig.check();
        assert_eq!(device(&rig, 0).closed, None, "turn {turn}");
        verify(&rig, &guest, 0..128);
    }
}

#[test]
fn a_store_is_added_once_and_there_is_a_most() {
    let rig = rig(256, &[(8, 0)]);
    assert_eq!(add(&rig, 0, 8, 1), Err(VmError::Limit("swap stores")));
    for number in 1..u16::try_from(MAX_SWAP_STORES).unwrap() {
        assert_eq!(add(&rig, number, 8, 0), Ok(8));
    }
    assert_eq!(add(&rig, 99, 8, 0), Err(VmError::Limit("swap stores")));
    assert_eq!(rig.vm.swap_info(&mut Held::root()).slots, 64);
}
