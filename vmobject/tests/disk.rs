//! Objects with a store that sees every change: cleaning, the cache, the end, power-off.

#![expect(clippy::unwrap_used, reason = "a test may fail")]

use vmobject::VmError;
use vmobject::addr::{PAGE_SIZE, PageIndex};
use vmobject::fault::{Faulted, WaitFor};
use vmobject::lock::Held;
use vmobject::map::Share;
use vmobject::object::ObjectId;
use vmobject::pager::{Cleaned, Left};
use vmobject::prot::Prot;
use vmobject::store::{StoreError, StoreId};
use vmobject::testing::{FakeMachine, Rig, TestMap, at};

const DISK: StoreId = StoreId(4);
const OTHER: StoreId = StoreId(5);

fn rig(pages: u32) -> Rig {
    let machine = FakeMachine::new();
    let bytes = usize::try_from(u64::from(pages) * PAGE_SIZE).unwrap();
    machine.store.add(DISK, vec![0x11; bytes]);
    machine.store.add(OTHER, vec![0x22; bytes]);
    Rig::with(machine, 256)
}

fn open(rig: &Rig, pages: u32) -> (TestMap, ObjectId) {
    let (map, disk) = (rig.map(), rig.vm.disk(DISK, &mut Held::root()).unwrap());
    rig.put(&map, 0, pages, disk, 0, Prot::ALL, Share::Shared).unwrap();
    (map, disk)
}

fn stored(rig: &Rig, page: u64) -> u8 {
    rig.vm.machine().store.page(DISK, page)[7]
}

fn written(rig: &Rig) -> u32 {
    rig.vm.machine().store.written.load(std::sync::atomic::Ordering::Relaxed)
}

fn resident(rig: &Rig) -> u32 {
    let mut sum = 0;
    rig.vm.for_each_object(&mut Held::root(), |object| sum += object.counts.resident);
    sum
}

#[test]
fn what_is_written_reaches_the_store_when_the_object_is_cleaned_and_not_before() {
    let rig = rig(40);
    let (guest, disk) = open(&rig, 40);
    assert_eq!(rig.load(&guest, at(3, 7)), Ok(0x11));
    rig.store(&guest, at(3, 7), 0xaa).unwrap();
    rig.write(&guest, at(20, 7), &[0xbb]).unwrap();
    assert_eq!((stored(&rig, 3), stored(&rig, 20)), (0x11, 0x11));
    assert_eq!(rig.clean(disk, 0..40), 0);
    assert_eq!((stored(&rig, 3), stored(&rig, 20), written(&rig)), (0xaa, 0xbb, 2));
    rig.check();
    assert_eq!((rig.clean(disk, 0..40), written(&rig)), (0, 2), "what is clean is not written again");
}

#[test]
fn only_what_is_being_written_is_protected_d24() {
    let rig = rig(16);
    let (guest, disk) = open(&rig, 16);
    for page in [2, 9] {
        rig.store(&guest, at(page, 7), 1).unwrap();
    }
    rig.clean(disk, 0..16);
    rig.store(&guest, at(9, 7), 2).unwrap();
    let resident = guest.stats().fault_resident;
    rig.clean(disk, 0..5);
    rig.store(&guest, at(9, 8), 2).unwrap();
    assert_eq!(guest.stats().fault_resident, resident, "outside the range nothing was protected");
    rig.store(&guest, at(2, 7), 3).unwrap();
    rig.clean(disk, 0..16);
    assert_eq!((stored(&rig, 2), stored(&rig, 9)), (3, 2));
    for page in 0..16 {
        rig.load(&guest, at(page, 7)).unwrap();
    }
    let faults = guest.stats();
    rig.store(&guest, at(9, 7), 4).unwrap();
    rig.clean(disk, 0..16);
    for page in (0..16).filter(|&page| page != 9) {
        rig.load(&guest, at(page, 7)).unwrap();
    }
    assert_eq!(guest.stats().fault_resident, faults.fault_resident + 1, "only the write faulted");
}

#[test]
fn a_clean_of_an_empty_range_writes_nothing_d23() {
    let rig = rig(16);
    let (guest, disk) = open(&rig, 16);
    rig.store(&guest, at(0, 7), 1).unwrap();
    assert_eq!((rig.clean(disk, 0..0), rig.clean(disk, 5..5), written(&rig)), (0, 0, 0));
}

#[test]
fn a_page_that_the_store_does_not_take_stays_and_the_pass_goes_on_and_ends_d13() {
    let rig = rig(64);
    let (guest, disk) = open(&rig, 64);
    for page in 0..64 {
        rig.store(&guest, at(page, 7), 9).unwrap();
    }
    let mut clean = rig.vm.page_clean(disk, PageIndex::new(0)..PageIndex::new(64));
    let failed = loop {
        match rig.vm.clean_step(&mut clean, 64, &mut Held::root()) {
            Cleaned::Done { failed } => break failed,
            Cleaned::More => {}
            Cleaned::Wait(_) => {
                // Page 21 of the store is broken, whoever goes along with it.
                let requests = rig.vm.machine().store.requests();
                let first = &requests[0];
                let broken = (first.first..first.first + first.frames.len() as u64).contains(&21);
                rig.deliver(0, if broken { Err(StoreError::Io) } else { Ok(()) });
            }
        }
    };
    assert_eq!(failed, 1);
    for page in 0..64 {
        assert_eq!(stored(&rig, page), if page == 21 { 0x11 } else { 9 }, "page {page}");
    }
    rig.check();
    assert_eq!((rig.load(&guest, at(21, 7)), rig.clean(disk, 0..64)), (Ok(9), 0), "it is tried again");
    assert_eq!(stored(&rig, 21), 9);
}

#[test]
fn a_flush_of_pages_that_failed_together_and_not_alone_is_done_although_the_queue_is_full() {
    let rig = rig(64);
    let (guest, disk) = open(&rig, 64);
    for page in 0..16 {
        rig.store(&guest, at(page, 7), 0xaa).unwrap();
    }
    let mut clean = rig.vm.page_clean(disk, PageIndex::new(0)..PageIndex::new(64));
    assert!(matches!(rig.vm.clean_step(&mut clean, 64, &mut Held::root()), Cleaned::Wait(_)));
    rig.vm.machine().store.queue.store(4, std::sync::atomic::Ordering::Relaxed);
    assert!(rig.deliver(0, Err(StoreError::Io)));
    let failed = (0..100).find_map(|_| {
        rig.deliver_all();
        match rig.vm.clean_step(&mut clean, 64, &mut Held::root()) {
            Cleaned::Done { failed } => Some(failed),
            Cleaned::More | Cleaned::Wait(_) => None,
        }
    });
    assert_eq!(failed, Some(0));
    assert!((0..16).all(|page| stored(&rig, page) == 0xaa));
    assert_eq!(written(&rig), 32, "once together, and once each alone");
    rig.check();
}

#[test]
fn a_pass_ends_although_the_guest_writes_on_and_covers_what_was_written_before_it_d14() {
    let rig = rig(64);
    let (guest, disk) = open(&rig, 64);
    for page in 0..64 {
        rig.store(&guest, at(page, 7), 1).unwrap();
    }
    let mut clean = rig.vm.page_clean(disk, PageIndex::new(0)..PageIndex::new(64));
    let mut rounds = 0;
    loop {
        match rig.vm.clean_step(&mut clean, 1, &mut Held::root()) {
            Cleaned::Done { failed } => break assert_eq!(failed, 0),
            Cleaned::More | Cleaned::Wait(_) => {
                rig.deliver(0, Ok(()));
                rig.vm.write(&guest, at(rounds % 64, 8), &[5], &mut Held::root()).unwrap();
                rounds += 1;
                assert!(rounds < 200, "the guest keeps the pass from ending");
            }
        }
    }
    assert!((0..64).all(|page| stored(&rig, page) == 1), "each write before the call is in the store");
    rig.check();
}

#[test]
fn a_writer_waits_while_its_page_is_written_and_a_reader_does_not() {
    let rig = rig(16);
    let (guest, disk) = open(&rig, 16);
    rig.store(&guest, at(1, 7), 1).unwrap();
    let mut clean = rig.vm.page_clean(disk, PageIndex::new(0)..PageIndex::new(16));
    let Cleaned::Wait(wait) = rig.vm.clean_step(&mut clean, 64, &mut Held::root()) else { panic!("done?") };
    assert_eq!(rig.vm.fault(&guest, at(1, 7), Prot::WRITE, &mut Held::root()), Ok(Faulted::Wait(wait)));
    assert!(matches!(wait, WaitFor::Io(_)));
    assert_eq!(rig.load(&guest, at(1, 7)), Ok(1));
    rig.store(&guest, at(1, 7), 2).unwrap();
    assert_eq!(stored(&rig, 1), 1);
    rig.check();
}

#[test]
fn what_is_discarded_on_a_disk_is_zero_there_after_the_next_cleaning_d12() {
    let rig = rig(32);
    let (guest, disk) = open(&rig, 32);
    rig.store(&guest, at(4, 7), 1).unwrap();
    rig.discard(&guest, 3, 4).unwrap();
    assert_eq!((rig.load(&guest, at(3, 7)), rig.load(&guest, at(4, 7))), (Ok(0), Ok(0)));
    assert_eq!(rig.clean(disk, 0..32), 0);
    assert_eq!([stored(&rig, 2), stored(&rig, 3), stored(&rig, 6), stored(&rig, 7)], [0x11, 0, 0, 0x11]);
    rig.check();
}

#[test]
fn an_object_that_ends_is_cleaned_first_and_whoever_opens_it_meanwhile_finds_it_d26() {
    let rig = rig(16);
    let (guest, _) = open(&rig, 16);
    rig.store(&guest, at(1, 7), 0x77).unwrap();
    rig.vm.destroy_map(guest, &mut Held::root());
    assert_eq!((stored(&rig, 1), rig.objects()), (0x11, 1), "the transfer is on its way");
    let (again, _) = open(&rig, 16);
    assert_eq!(rig.objects(), 1);
    assert_eq!(rig.load(&again, at(1, 7)), Ok(0x77), "not what the store had");
    rig.destroy(again);
    rig.deliver_all();
    rig.settle();
    assert_eq!((stored(&rig, 1), rig.objects(), rig.free()), (0x77, 0, 256));
}

#[test]
fn an_object_with_more_pages_than_a_step_looks_at_ends_all_the_same() {
    let rig = {
        let machine = FakeMachine::new();
        machine.store.add(DISK, vec![0x11; usize::try_from(700 * PAGE_SIZE).unwrap()]);
        Rig::with(machine, 1024)
    };
    for cached in [0, 1000] {
        rig.vm.set_cache_limit(cached, &mut Held::root());
        let (guest, _) = open(&rig, 700);
        for page in 0..700 {
            rig.store(&guest, at(page, 7), 0x77 + u8::from(cached > 0)).unwrap();
        }
        rig.vm.destroy_map(guest, &mut Held::root());
        for _ in 0..200 {
            rig.vm.step(64, &mut Held::root());
            rig.deliver_all();
        }
        assert!(!rig.vm.step(64, &mut Held::root()), "there is no end to it");
        assert!((0..700).all(|page| stored(&rig, page) == 0x77 + u8::from(cached > 0)));
        assert_eq!(rig.objects(), u32::from(cached > 0));
    }
}

#[test]
fn an_object_whose_store_is_gone_ends_all_the_same_and_that_is_counted() {
    let rig = rig(16);
    let (guest, _) = open(&rig, 16);
    for page in 0..3 {
        rig.store(&guest, at(page, 7), 0x77).unwrap();
    }
    rig.vm.destroy_map(guest, &mut Held::root());
    while rig.vm.machine().store.pending() > 0 {
        rig.deliver(0, Err(StoreError::Gone));
        rig.settle();
    }
    assert_eq!((rig.vm.stats().page_lost, rig.objects(), rig.free()), (3, 0, 256));
}

#[test]
fn of_an_object_that_ends_only_the_bad_page_is_lost_although_the_queue_is_full() {
    let rig = rig(64);
    let (guest, _) = open(&rig, 64);
    for page in 0..16 {
        rig.store(&guest, at(page, 7), 0xaa).unwrap();
    }
    rig.destroy(guest);
    assert_eq!(rig.vm.machine().store.pending(), 1, "they go together");
    rig.vm.machine().store.queue.store(4, std::sync::atomic::Ordering::Relaxed);
    while let Some(request) = rig.vm.machine().store.requests().first() {
        let bad = (request.first..request.first + request.frames.len() as u64).contains(&5);
        rig.deliver(0, if bad { Err(StoreError::Io) } else { Ok(()) });
        rig.settle();
    }
    for page in 0..16 {
        assert_eq!(stored(&rig, page), if page == 5 { 0x11 } else { 0xaa }, "page {page}");
    }
    assert_eq!((rig.vm.stats().page_lost, rig.objects(), rig.free()), (1, 0, 256));
}

#[test]
fn one_store_has_one_object_d27() {
    let rig = rig(16);
    let held = &mut Held::root();
    let disk = rig.vm.disk(DISK, held).unwrap();
    assert_eq!(rig.vm.disk(DISK, held), Ok(disk));
    assert_eq!(rig.vm.image(DISK, held), Ok(disk), "who only reads sees what is written");
    let image = rig.vm.image(OTHER, held).unwrap();
    assert_eq!(rig.vm.disk(OTHER, held), Err(VmError::ReadOnly), "others rely on its not changing");
    for object in [disk, disk, disk, image] {
        rig.vm.release(object, held);
    }
    assert_eq!(rig.objects(), 0);
}

#[test]
fn memory_that_runs_short_takes_the_pages_of_a_disk_and_writes_what_changed() {
    let rig = rig(100);
    let (guest, _) = open(&rig, 100);
    for page in 0..100 {
        rig.store(&guest, at(page, 7), 3).unwrap();
    }
    rig.page_out_all();
    assert_eq!((rig.free(), resident(&rig)), (256, 0));
    assert!((0..100).all(|page| stored(&rig, page) == 3));
    for page in 0..100 {
        assert_eq!(rig.load(&guest, at(page, 7)), Ok(3));
    }
    rig.check();
}

#[test]
fn the_next_guest_of_an_image_needs_no_disk_while_the_cache_keeps_it() {
    let rig = rig(32);
    rig.vm.set_cache_limit(100, &mut Held::root());
    for round in 0..3 {
        let (guest, image) = (rig.map(), rig.vm.image(DISK, &mut Held::root()).unwrap());
        rig.put(&guest, 0, 32, image, 0, Prot::ALL, Share::Copy).unwrap();
        for page in 0..32 {
            assert_eq!(rig.load(&guest, at(page, 7)), Ok(0x11));
        }
        rig.destroy(guest);
        let started = rig.vm.machine().store.started.load(std::sync::atomic::Ordering::Relaxed);
        assert_eq!((started, rig.vm.stats().cache_hit), (2, round));
        assert_eq!((rig.objects(), resident(&rig)), (1, 32));
        let queues = rig.vm.memory(&mut Held::root()).queues;
        assert_eq!((queues.active, queues.inactive), (0, 32), "memory that runs short takes these first");
        rig.check();
    }
    rig.vm.cache_clear(&mut Held::root());
    rig.settle();
    assert_eq!((rig.objects(), rig.free()), (0, 256));
}

#[test]
fn an_image_that_nobody_uses_any_more_can_be_written_and_keeps_its_pages() {
    let rig = rig(32);
    rig.vm.set_cache_limit(100, &mut Held::root());
    let (reader, image) = (rig.map(), rig.vm.image(DISK, &mut Held::root()).unwrap());
    rig.put(&reader, 0, 32, image, 0, Prot::READ, Share::Copy).unwrap();
    assert_eq!(rig.load(&reader, at(3, 7)), Ok(0x11));
    assert_eq!(rig.vm.disk(DISK, &mut Held::root()), Err(VmError::ReadOnly), "somebody relies on it");
    rig.destroy(reader);
    let before = rig.vm.machine().store.started.load(std::sync::atomic::Ordering::Relaxed);
    let (writer, _) = open(&rig, 32);
    assert_eq!(rig.load(&writer, at(3, 7)), Ok(0x11));
    assert_eq!(rig.vm.machine().store.started.load(std::sync::atomic::Ordering::Relaxed), before);
    rig.store(&writer, at(3, 7), 0x55).unwrap();
    rig.destroy(writer);
    rig.deliver_all();
    assert_eq!(stored(&rig, 3), 0x55);
    rig.check();
}

#[test]
fn the_cache_is_bounded_in_frames_and_the_longest_unused_goes_first_d20() {
    let rig = rig(32);
    rig.vm.set_cache_limit(40, &mut Held::root());
    for store in [DISK, OTHER] {
        let (guest, image) = (rig.map(), rig.vm.image(store, &mut Held::root()).unwrap());
        rig.put(&guest, 0, 32, image, 0, Prot::READ, Share::Shared).unwrap();
        for page in 0..32 {
            rig.load(&guest, at(page, 7)).unwrap();
        }
        rig.destroy(guest);
    }
    assert_eq!((rig.objects(), resident(&rig)), (1, 32), "64 frames are too many, 32 are not");
    rig.vm.for_each_object(&mut Held::root(), |object| {
        assert_eq!(object.pager.store(), Some(OTHER), "the other one was used later");
    });
    rig.vm.set_cache_limit(31, &mut Held::root());
    rig.settle();
    assert_eq!((rig.objects(), rig.free()), (0, 256));
}

#[test]
fn a_cached_disk_is_written_back_and_its_frames_can_go() {
    let rig = rig(32);
    rig.vm.set_cache_limit(100, &mut Held::root());
    let (guest, _) = open(&rig, 32);
    rig.store(&guest, at(1, 7), 0x44).unwrap();
    rig.destroy(guest);
    rig.deliver_all();
    assert_eq!((stored(&rig, 1), rig.objects()), (0x44, 1));
    rig.check();
    rig.page_out_all();
    assert_eq!((rig.free(), rig.objects()), (256, 1));
}

#[test]
fn a_shutdown_cleans_what_is_in_use_releases_and_proves_that_nothing_is_left_d25() {
    let rig = rig(32);
    rig.add_swap(64);
    rig.vm.set_cache_limit(100, &mut Held::root());
    let (guest, disk) = open(&rig, 32);
    rig.vm.reference(disk, &mut Held::root()).unwrap();
    let ram = rig.guest(20);
    for page in 0..20 {
        rig.store(&ram, at(page, 0), 1).unwrap();
        rig.store(&guest, at(page, 7), 2).unwrap();
    }
    rig.page_out_all();
    rig.store(&guest, at(0, 7), 3).unwrap();
    rig.destroy(guest);
    rig.destroy(ram);
    let left = rig.shut_down();
    assert_eq!((left.objects, left.unwritten, left.swap_slots), (1, 0, 0), "somebody still refers to it");
    assert_eq!((stored(&rig, 0), stored(&rig, 1)), (3, 2), "it is clean all the same");
    assert_eq!(rig.vm.disk(DISK, &mut Held::root()), Ok(disk), "and has its pager");
    rig.vm.release(disk, &mut Held::root());
    rig.vm.release(disk, &mut Held::root());
    assert_eq!(rig.shut_down(), Left::default());
    assert_eq!(rig.free(), 256);
}

/// A store that takes single pages and not several at once, and a guest that writes all the time.
#[test]
fn a_pass_over_what_a_guest_writes_on_ends_although_its_store_refuses_clusters() {
    let rig = rig(64);
    let (guest, disk) = open(&rig, 64);
    for page in 0..16 {
        rig.store(&guest, at(page, 7), 1).unwrap();
    }
    let mut clean = rig.vm.page_clean(disk, PageIndex::new(0)..PageIndex::new(64));
    for _ in 0..1000 {
        match rig.vm.clean_step(&mut clean, 64, &mut Held::root()) {
            Cleaned::Done { failed } => {
                assert!(failed <= 64, "{failed} failed");
                assert!(
                    (0..16).all(|page| stored(&rig, page) == 1),
                    "what was written before the pass is not there"
                );
                return;
            }
            Cleaned::More => {}
            Cleaned::Wait(_) => {
                let several = rig.vm.machine().store.requests()[0].frames.len() > 1;
                rig.deliver(0, if several { Err(StoreError::Io) } else { Ok(()) });
                for page in 0..64 {
                    let _ = rig.vm.write(&guest, at(page, 8), &[5], &mut Held::root()).unwrap();
                }
            }
        }
    }
    panic!("the pass does not end");
}

#[test]
fn a_page_that_fails_in_both_rounds_of_a_pass_is_counted_once() {
    let rig = rig(64);
    let (guest, disk) = open(&rig, 64);
    for page in [0, 20, 21] {
        rig.store(&guest, at(page, 7), 1).unwrap();
    }
    let mut clean = rig.vm.page_clean(disk, PageIndex::new(0)..PageIndex::new(64));
    let failed = loop {
        match rig.vm.clean_step(&mut clean, 64, &mut Held::root()) {
            Cleaned::Done { failed } => break failed,
            Cleaned::More => {}
            Cleaned::Wait(_) => {
                rig.deliver(0, Err(StoreError::Io));
            }
        }
    };
    assert_eq!(failed, 4, "three pages and the flush");
}
