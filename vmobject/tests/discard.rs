//! Discarding (`vm_object_page_remove`), one sentence at a time: balloon, free page reports, TRIM.

#![expect(clippy::unwrap_used, reason = "a test may fail")]

use vmobject::addr::{CHUNK_PAGES, PAGE_SIZE};
use vmobject::lock::Held;
use vmobject::map::{NotDiscarded, Share};
use vmobject::object::index::SlotCounts;
use vmobject::prot::Prot;
use vmobject::store::StoreId;
use vmobject::testing::{FakeMachine, FakePmap, Rig, at};

const IMAGE: StoreId = StoreId(3);

fn rig_with_image(frames: u32, pages: u32) -> Rig {
    let machine = FakeMachine::new();
    machine.store.add(IMAGE, vec![0x77; usize::try_from(u64::from(pages) * PAGE_SIZE).unwrap()]);
    Rig::with(machine, frames)
}

fn counts(rig: &Rig) -> Vec<SlotCounts> {
    let mut all = Vec::new();
    rig.vm.for_each_object(&mut Held::root(), |object| all.push(object.counts));
    all
}

fn slots(resident: u32, swapped: u32, zero: u32) -> SlotCounts {
    SlotCounts { resident, swapped, zero }
}

#[test]
fn what_is_discarded_reads_as_zero_and_its_frames_are_free_at_once() {
    let rig = Rig::new(256);
    let guest = rig.guest(100);
    let before = rig.free();
    for page in 0..100 {
        rig.store(&guest, at(page, 5), 9).unwrap();
    }
    assert_eq!(rig.discard(&guest, 10, 80), Ok(80));
    rig.check();
    assert_eq!((rig.free(), counts(&rig)), (before - 20, vec![slots(20, 0, 0)]), "nothing below: absent");
    assert_eq!((rig.load(&guest, at(9, 5)), rig.load(&guest, at(10, 5))), (Ok(9), Ok(0)));
    assert_eq!((rig.load(&guest, at(89, 5)), rig.load(&guest, at(90, 5))), (Ok(0), Ok(9)));
}

#[test]
fn an_empty_range_is_empty_d23() {
    let rig = Rig::new(64);
    let guest = rig.guest(4);
    rig.store(&guest, at(0, 0), 1).unwrap();
    assert_eq!(rig.discard(&guest, 0, 0), Ok(0));
    assert_eq!(rig.load(&guest, at(0, 0)), Ok(1));
}

#[test]
fn a_discard_of_shared_memory_shadows_first_and_the_others_see_nothing_of_it() {
    let rig = Rig::new(256);
    let guest = rig.guest(8);
    for page in 0..8 {
        rig.store(&guest, at(page, 0), 1).unwrap();
    }
    let clone = rig.clone(&guest);
    let before = rig.free();
    assert_eq!(rig.discard(&clone, 2, 3), Ok(0), "the frames are not the clone's");
    rig.check();
    assert_eq!(rig.free(), before);
    for page in 0..8 {
        assert_eq!(rig.load(&guest, at(page, 0)), Ok(1));
        assert_eq!(rig.load(&clone, at(page, 0)), Ok(u8::from(!(2..5).contains(&page))), "page {page}");
    }
    rig.destroy(guest);
    assert_eq!(rig.load(&clone, at(3, 0)), Ok(0), "what was discarded does not come back with a collapse");
    rig.check();
}

#[test]
fn a_discard_in_a_private_copy_of_an_image_hides_the_image_d12() {
    let rig = rig_with_image(256, 16);
    let guest = rig.map();
    let image = rig.vm.image(IMAGE, &mut Held::root()).unwrap();
    rig.put(&guest, 0, 16, image, 0, Prot::ALL, Share::Copy).unwrap();
    rig.store(&guest, at(1, 0), 5).unwrap();
    assert_eq!(rig.discard(&guest, 0, 16), Ok(1));
    for page in 0..16 {
        assert_eq!(rig.load(&guest, at(page, 0)), Ok(0), "page {page}");
    }
    rig.check();
}

#[test]
fn a_whole_leaf_that_is_discarded_over_something_costs_no_slots() {
    let rig = rig_with_image(256, 4 * CHUNK_PAGES);
    let guest = rig.map();
    let image = rig.vm.image(IMAGE, &mut Held::root()).unwrap();
    rig.put(&guest, 0, 4 * CHUNK_PAGES, image, 0, Prot::ALL, Share::Copy).unwrap();
    rig.store(&guest, at(700, 0), 5).unwrap();
    assert_eq!(rig.discard(&guest, CHUNK_PAGES, CHUNK_PAGES), Ok(1));
    let mut bytes = 0;
    rig.vm.for_each_object(&mut Held::root(), |object| {
        if object.shadow.is_some() {
            assert_eq!(object.counts, slots(0, 0, CHUNK_PAGES));
            bytes = object.index_bytes;
        }
    });
    assert!(bytes < 2048, "{bytes} bytes of index: a bit for each 64 pages, in one region");
    assert_eq!((rig.load(&guest, at(511, 0)), rig.load(&guest, at(512, 0))), (Ok(0x77), Ok(0)));
    assert_eq!((rig.load(&guest, at(1023, 0)), rig.load(&guest, at(1024, 0))), (Ok(0), Ok(0x77)));
    rig.check();
}

#[test]
fn a_discard_gives_swap_slots_back_and_nothing_returns_from_them_d11_d12() {
    let rig = Rig::new(256);
    rig.add_swap(64);
    let guest = rig.guest(32);
    for page in 0..32 {
        rig.store(&guest, at(page, 0), 3).unwrap();
    }
    rig.page_out_all();
    assert_eq!(rig.vm.swap_info(&mut Held::root()).in_use, 32);
    assert_eq!(rig.discard(&guest, 0, 20), Ok(20));
    assert_eq!(rig.vm.swap_info(&mut Held::root()).in_use, 12);
    assert_eq!((rig.load(&guest, at(19, 0)), rig.load(&guest, at(20, 0))), (Ok(0), Ok(3)));
    rig.check();
}

#[test]
fn a_page_on_its_way_out_is_waited_for_and_then_discarded() {
    let rig = Rig::new(256);
    rig.add_swap(64);
    let guest = rig.guest(4);
    rig.store(&guest, at(2, 0), 3).unwrap();
    rig.page_out();
    assert_eq!(rig.vm.machine().store.pending(), 1);
    rig.discard(&guest, 0, 4).unwrap();
    assert_eq!(rig.load(&guest, at(2, 0)), Ok(0));
    assert_eq!(rig.vm.swap_info(&mut Held::root()).in_use, 0);
    rig.check();
}

#[test]
fn a_guest_discards_only_where_it_may_write() {
    let rig = rig_with_image(64, 4);
    let guest = rig.map();
    let image = rig.vm.image(IMAGE, &mut Held::root()).unwrap();
    rig.put(&guest, 0, 4, image, 0, Prot::READ_EXECUTE, Share::Shared).unwrap();
    assert_eq!(rig.discard(&guest, 1, 2), Err(NotDiscarded::Denied(at(1, 0))));
    assert_eq!(rig.discard(&guest, 9, 1), Err(NotDiscarded::Hole(at(9, 0))));
    assert_eq!(rig.load(&guest, at(1, 0)), Ok(0x77));
}

#[test]
fn a_discard_in_a_reset_guest_is_gone_with_the_reset() {
    let rig = Rig::new(128);
    let guest = rig.guest(4);
    rig.store(&guest, at(0, 0), 6).unwrap();
    let kept = rig.vm.snapshot(&guest, &mut Held::root()).unwrap();
    rig.discard(&guest, 0, 4).unwrap();
    let clone = rig.vm.copy_map(&guest, FakePmap::default(), &mut Held::root()).unwrap();
    assert_eq!((rig.load(&guest, at(0, 0)), rig.load(&clone, at(0, 0))), (Ok(0), Ok(0)));
    rig.vm.reset_map(&guest, &kept, &|_| {}, &mut Held::root()).unwrap();
    assert_eq!((rig.load(&guest, at(0, 0)), rig.load(&clone, at(0, 0))), (Ok(6), Ok(0)));
    rig.vm.delete_snapshot(kept, &mut Held::root());
    rig.check();
}

#[test]
fn discarding_a_mebibyte_of_64_gib_visits_what_lies_in_that_mebibyte_d10() {
    let rig = Rig::new(1024);
    let guest = rig.guest(1 << 24);
    for page in (0..1 << 24).step_by(1 << 16) {
        rig.store(&guest, at(page, 0), 1).unwrap();
    }
    for page in 0..256 {
        rig.store(&guest, at((1 << 23) + page, 0), 1).unwrap();
    }
    assert_eq!(rig.discard(&guest, 1 << 23, 256), Ok(256));
    assert_eq!((rig.vm.stats().discarded, rig.vm.stats().slot_visited), (256, 256));
    assert_eq!(counts(&rig), [slots(255, 0, 0)]);
}

#[test]
fn a_range_of_64_pages_of_a_guest_is_marked_as_one_wherever_its_memory_begins() {
    let rig = Rig::new(512);
    // Nothing here starts where 64 pages do, and the second is a clone's shadow.
    let map = rig.map();
    let object = rig.anonymous(200);
    rig.put(&map, 37, 200, object, 0, Prot::ALL, Share::Shared).unwrap();
    for page in 37..237 {
        rig.store(&map, at(page, 0), 7).unwrap();
    }
    let child = rig.clone(&map);
    rig.store(&child, at(40, 0), 9).unwrap();
    let before = index_bytes(&rig);
    for first in [64, 128] {
        assert_eq!(rig.discard(&child, first, 64), Ok(0));
    }
    assert_eq!(index_bytes(&rig), before, "two marks in what the shadow has anyway, and no slots");
    for page in 64..192 {
        assert_eq!((rig.load(&child, at(page, 0)), rig.load(&map, at(page, 0))), (Ok(0), Ok(7)));
    }
    rig.check();
}

fn index_bytes(rig: &Rig) -> usize {
    let mut bytes = 0;
    rig.vm.for_each_object(&mut Held::root(), |object| bytes += object.index_bytes);
    bytes
}
