//! Faults, one sentence at a time: zero fill, images, private copies, moves, refusals, waits.

#![expect(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test may fail, and its bytes wrap on purpose"
)]

use std::sync::atomic::Ordering::Relaxed;

use vmobject::addr::{Ipa, IpaRange, PAGE_SIZE};
use vmobject::fault::{FaultError, Faulted, WaitFor};
use vmobject::lock::Held;
use vmobject::map::Share;
use vmobject::pmap::Pmap as _;
use vmobject::prot::Prot;
use vmobject::store::{IoToken, LostPage, StoreError, StoreId};
use vmobject::testing::{FakeMachine, RAM, Refused, Rig, TestMap, at};
use vmobject::{Vm, VmError};

const IMAGE: StoreId = StoreId(3);

/// A store whose byte at `n` of page `p` is recognisable.
fn image_byte(page: u32, offset: u64) -> u8 {
    (page as u8).wrapping_mul(31) ^ (offset as u8) ^ 0x5c
}

fn rig_with_image(frames: u32, bytes: u64) -> Rig {
    let machine = FakeMachine::new();
    let contents = (0..bytes).map(|n| image_byte((n / PAGE_SIZE) as u32, n % PAGE_SIZE)).collect();
    machine.store.add(IMAGE, contents);
    Rig::with(machine, frames)
}

/// A guest whose RAM begins with a private copy of the image, `pages` pages long in all.
fn guest_on_image(rig: &Rig, pages: u32) -> TestMap {
    let map = rig.map();
    let image = rig.vm.image(IMAGE, &mut Held::root()).unwrap();
    rig.put(&map, 0, pages, image, 0, Prot::ALL, Share::Copy).unwrap();
    map
}

#[test]
fn untouched_memory_reads_as_zero_and_costs_one_frame_a_page() {
    let rig = Rig::new(64);
    let guest = rig.guest(100);
    let before = rig.free();
    assert_eq!(rig.load(&guest, at(7, 123)), Ok(0));
    assert_eq!(rig.free(), before - 1);
    rig.store(&guest, at(7, 123), 9).unwrap();
    assert_eq!(rig.load(&guest, at(7, 123)), Ok(9));
    assert_eq!(rig.free(), before - 1);
    assert_eq!(guest.stats().fault_zero, 1);
    rig.check();
}

#[test]
fn a_page_of_zeros_is_mapped_writable_at_once() {
    let rig = Rig::new(64);
    let guest = rig.guest(8);
    rig.load(&guest, at(0, 0)).unwrap();
    rig.store(&guest, at(0, 0), 1).unwrap();
    assert_eq!(guest.with_pmap(&mut Held::root(), |pmap| pmap.entered), 1);
}

#[test]
fn an_access_outside_every_entry_is_a_hole() {
    let rig = Rig::new(64);
    let guest = rig.guest(8);
    for outside in [at(8, 0), Ipa::new(0), Ipa::new(u64::MAX), Ipa::new(RAM.bits() - 1)] {
        assert_eq!(rig.load(&guest, outside), Err(Refused::Fault(FaultError::Hole(outside))));
    }
    assert_eq!(rig.write(&guest, at(7, 4095), &[1, 2]), Err(Refused::Fault(FaultError::Hole(at(8, 0)))));
    assert_eq!(guest.stats().fault_hole, 5);
}

#[test]
fn a_store_to_a_read_only_entry_is_denied_and_changes_nothing() {
    let rig = rig_with_image(64, 4 * PAGE_SIZE);
    let map = rig.map();
    let image = rig.vm.image(IMAGE, &mut Held::root()).unwrap();
    rig.put(&map, 0, 4, image, 0, Prot::READ_EXECUTE, Share::Shared).unwrap();
    let denied = Refused::Fault(FaultError::Denied { at: at(1, 5), wanted: Prot::WRITE });
    assert_eq!(rig.store(&map, at(1, 5), 0), Err(denied));
    assert_eq!(rig.write(&map, at(1, 5), &[0]), Err(denied));
    assert_eq!(rig.load(&map, at(1, 5)), Ok(image_byte(1, 5)));
    rig.check();
}

#[test]
fn an_image_cannot_be_shared_writable() {
    let rig = rig_with_image(64, 4 * PAGE_SIZE);
    let map = rig.map();
    let image = rig.vm.image(IMAGE, &mut Held::root()).unwrap();
    assert_eq!(rig.put(&map, 0, 4, image, 0, Prot::ALL, Share::Shared), Err(VmError::ReadOnly));
    assert_eq!(rig.objects(), 0, "the refused insert gave the reference back");
}

#[test]
fn a_page_of_an_image_comes_from_its_store_and_brings_its_neighbours() {
    let rig = rig_with_image(64, 40 * PAGE_SIZE);
    let guest = guest_on_image(&rig, 40);
    assert_eq!(rig.load(&guest, at(17, 9)), Ok(image_byte(17, 9)));
    for page in 16..32 {
        assert_eq!(rig.load(&guest, at(page, 1)), Ok(image_byte(page, 1)));
    }
    assert_eq!(rig.vm.machine().store.started.load(Relaxed), 1);
    assert_eq!(guest.stats().around, 15, "the neighbours were mapped along");
    assert_eq!(guest.stats().fault_shared, 1);
    rig.check();
}

#[test]
fn the_last_part_of_an_images_last_page_and_everything_behind_reads_as_zero() {
    let rig = rig_with_image(64, PAGE_SIZE + 100);
    let guest = guest_on_image(&rig, 6);
    assert_eq!(rig.load(&guest, at(1, 99)), Ok(image_byte(1, 99)));
    assert_eq!(rig.load(&guest, at(1, 100)), Ok(0));
    for page in 2..6 {
        assert_eq!(rig.load(&guest, at(page, 7)), Ok(0));
        rig.store(&guest, at(page, 7), 1).unwrap();
    }
    rig.check();
}

#[test]
fn two_guests_of_one_image_share_its_pages_until_one_writes() {
    let rig = rig_with_image(64, 16 * PAGE_SIZE);
    let (a, b) = (guest_on_image(&rig, 16), guest_on_image(&rig, 16));
    rig.load(&a, at(0, 0)).unwrap();
    let after_first = rig.free();
    for page in 0..16 {
        assert_eq!(rig.load(&b, at(page, 3)), Ok(image_byte(page, 3)));
    }
    assert_eq!(rig.free(), after_first, "no frame for what is there already");
    rig.store(&a, at(5, 3), 0xee).unwrap();
    assert_eq!(rig.free(), after_first - 1);
    assert_eq!(rig.load(&a, at(5, 3)), Ok(0xee));
    assert_eq!(rig.load(&a, at(5, 4)), Ok(image_byte(5, 4)), "the rest of the page was copied");
    assert_eq!(rig.load(&b, at(5, 3)), Ok(image_byte(5, 3)));
    assert_eq!(rig.vm.machine().store.page(IMAGE, 5)[3], image_byte(5, 3));
    rig.check();
}

#[test]
fn an_image_that_is_hidden_by_and_by_is_passed_over_with_the_last_page() {
    let pages = 130;
    let rig = rig_with_image(512, u64::from(pages) * PAGE_SIZE);
    let guest = guest_on_image(&rig, pages);
    // Some from either end, so that what holds it up lies in the middle, then at one end, then at the other.
    for page in (40..70).chain(0..40).chain((71..pages).rev()) {
        rig.store(&guest, at(page, 0), 1).unwrap();
        rig.settle();
        assert_eq!(rig.objects(), 2, "page {page}");
    }
    rig.store(&guest, at(70, 0), 1).unwrap();
    rig.settle();
    assert_eq!(rig.objects(), 1, "nobody needs the image any more");
    assert_eq!(rig.vm.disk(IMAGE, &mut Held::root()).map(|_| ()), Ok(()), "and its store may be written");
    rig.check();
}

#[test]
fn an_image_is_never_a_sole_reference_d16() {
    // One guest alone on an image must still get a layer of its own.
    let rig = rig_with_image(64, 16 * PAGE_SIZE);
    let guest = guest_on_image(&rig, 16);
    rig.store(&guest, at(2, 0), 1).unwrap();
    assert_eq!(rig.objects(), 2);
    assert_eq!(guest.stats().fault_copy, 1);
    assert_eq!(guest.stats().fault_move, 0, "a pager's page does not move (D17)");
    rig.destroy(guest);
    let again = guest_on_image(&rig, 16);
    assert_eq!(rig.load(&again, at(2, 0)), Ok(image_byte(2, 0)));
    rig.check();
}

#[test]
fn a_sole_reference_to_anonymous_memory_gets_no_layer_d16() {
    let rig = Rig::new(64);
    let map = rig.map();
    let object = rig.anonymous(8);
    rig.put(&map, 0, 8, object, 0, Prot::ALL, Share::Copy).unwrap();
    rig.store(&map, at(1, 1), 4).unwrap();
    assert_eq!(rig.objects(), 1);
    assert_eq!(rig.vm.stats().shadow_spared, 1);
    rig.check();
}

#[test]
fn a_page_read_from_a_shared_object_is_replaced_by_the_copy_when_the_guest_writes() {
    let rig = Rig::new(64);
    let object = rig.anonymous(8);
    rig.vm.reference(object, &mut Held::root()).unwrap();
    let (a, b) = (rig.map(), rig.map());
    rig.put(&a, 0, 8, object, 0, Prot::ALL, Share::Copy).unwrap();
    rig.put(&b, 0, 8, object, 0, Prot::ALL, Share::Copy).unwrap();
    assert_eq!(rig.load(&a, at(3, 0)), Ok(0));
    assert_eq!(rig.load(&b, at(3, 0)), Ok(0));
    rig.check();
    rig.store(&a, at(3, 0), 7).unwrap();
    assert_eq!((rig.load(&a, at(3, 0)), rig.load(&b, at(3, 0))), (Ok(7), Ok(0)));
    rig.check();
}

#[test]
fn the_last_reference_to_a_page_moves_instead_of_being_copied_d17() {
    let rig = Rig::new(1024);
    let object = rig.anonymous(400);
    rig.vm.reference(object, &mut Held::root()).unwrap();
    rig.vm.reference(object, &mut Held::root()).unwrap();
    let (first, a, b) = (rig.map(), rig.map(), rig.map());
    // A page of the shared object itself, written before anybody shares it.
    rig.put(&first, 0, 400, object, 0, Prot::ALL, Share::Shared).unwrap();
    rig.store(&first, at(3, 0), 9).unwrap();
    rig.vm.destroy_map(first, &mut Held::root());
    rig.put(&a, 0, 400, object, 0, Prot::ALL, Share::Copy).unwrap();
    rig.put(&b, 0, 400, object, 0, Prot::ALL, Share::Copy).unwrap();
    assert_eq!(rig.load(&a, at(3, 0)), Ok(9));
    rig.store(&a, at(0, 0), 1).unwrap(); // a has a shadow now
    for page in 0..300 {
        rig.store(&b, at(page, 0), 1).unwrap();
    }
    // The shared object is a's alone after this, and so many pages die first that no collapse comes yet.
    rig.vm.destroy_map(b, &mut Held::root());
    let copied = a.stats().fault_copy;
    rig.store(&a, at(3, 0), 5).unwrap();
    assert_eq!((a.stats().fault_move, a.stats().fault_copy), (1, copied));
    assert_eq!(rig.load(&a, at(3, 0)), Ok(5));
    rig.check();
    rig.settle();
    assert_eq!((rig.objects(), rig.free()), (1, 1024 - 2));
    rig.check();
}

#[test]
fn what_el2_writes_the_guest_sees_although_it_had_the_old_page_mapped() {
    let rig = rig_with_image(64, 16 * PAGE_SIZE);
    let guest = guest_on_image(&rig, 16);
    assert_eq!(rig.load(&guest, at(4, 0)), Ok(image_byte(4, 0)));
    rig.write(&guest, at(4, 0), b"device tree").unwrap();
    assert_eq!(rig.load(&guest, at(4, 0)), Ok(b'd'));
    let mut read = [0; 11];
    rig.read(&guest, at(4, 0), &mut read).unwrap();
    assert_eq!(&read, b"device tree");
    rig.check();
}

#[test]
fn an_access_of_el2_crosses_pages_and_entries() {
    let rig = Rig::new(64);
    let map = rig.map();
    for page in [0, 1] {
        let object = rig.anonymous(1);
        rig.put(&map, page, 1, object, 0, Prot::ALL, Share::Shared).unwrap();
    }
    let bytes: Vec<u8> = (0..5000).map(|n| n as u8).collect();
    rig.write(&map, at(0, 1000), &bytes).unwrap();
    let mut back = vec![0; 5000];
    rig.read(&map, at(0, 1000), &mut back).unwrap();
    assert_eq!(back, bytes);
    rig.check();
}

#[test]
fn a_second_fault_on_a_page_that_is_coming_waits_for_the_same_transfer() {
    let rig = rig_with_image(64, 16 * PAGE_SIZE);
    let (a, b) = (guest_on_image(&rig, 16), guest_on_image(&rig, 16));
    let held = &mut Held::root();
    let Ok(Faulted::Wait(WaitFor::Io(first))) = rig.vm.fault(&a, at(1, 0), Prot::READ, held) else {
        panic!("the page cannot be there yet");
    };
    let second = rig.vm.fault(&b, at(2, 0), Prot::READ, held);
    assert_eq!(second, Ok(Faulted::Wait(WaitFor::Io(first))));
    assert!(rig.vm.in_flight(first));
    rig.check();
    assert_eq!(rig.deliver_all(), 1);
    assert!(!rig.vm.in_flight(first));
    assert_eq!(rig.vm.fault(&a, at(1, 0), Prot::READ, held), Ok(Faulted::Mapped));
    assert_eq!(rig.vm.fault(&b, at(2, 0), Prot::READ, held), Ok(Faulted::Mapped));
    rig.check();
}

#[test]
fn a_failed_page_in_is_told_once_and_tried_again_after() {
    let rig = rig_with_image(64, 16 * PAGE_SIZE);
    let guest = guest_on_image(&rig, 16);
    let before = rig.free();
    let held = &mut Held::root();
    for pages in [16, 1] {
        assert!(matches!(rig.vm.fault(&guest, at(1, 0), Prot::READ, held), Ok(Faulted::Wait(_))));
        let request = rig.vm.machine().store.requests().remove(0);
        assert_eq!(request.frames.len(), pages, "after its neighbours' failure the page is tried alone");
        assert!(rig.deliver(0, Err(StoreError::Io)));
        rig.check();
        assert_eq!(rig.free(), before, "the frames came back");
    }
    let lost = Err(FaultError::Lost(LostPage { store: IMAGE, page: 1, error: StoreError::Io }));
    assert_eq!(rig.vm.fault(&guest, at(1, 0), Prot::READ, held), lost);
    assert_eq!(rig.load(&guest, at(1, 0)), Ok(image_byte(1, 0)));
    assert_eq!(rig.vm.stats().page_in_failed, 2);
}

#[test]
fn a_failure_that_nobody_came_back_for_is_not_told_to_another_guest() {
    let rig = rig_with_image(64, 16 * PAGE_SIZE);
    let (first, second) = (guest_on_image(&rig, 16), guest_on_image(&rig, 16));
    // With its neighbours, and then alone.
    for _ in 0..2 {
        let fault = rig.vm.fault(&first, at(3, 0), Prot::READ, &mut Held::root());
        assert!(matches!(fault, Ok(Faulted::Wait(WaitFor::Io(_)))));
        assert!(rig.deliver(0, Err(StoreError::Io)));
    }
    rig.destroy(first);
    let started = rig.vm.machine().store.started.load(Relaxed);
    assert_eq!(rig.load(&second, at(3, 0)), Ok(image_byte(3, 0)));
    let tried = rig.vm.machine().store.started.load(Relaxed) - started;
    assert_eq!((tried, rig.vm.stats().page_in_failed, rig.vm.stats().fault_lost), (1, 2, 0));
    rig.check();
}

#[test]
fn a_store_that_takes_nothing_now_makes_the_guest_wait_and_one_that_never_will_loses_the_page() {
    let rig = rig_with_image(64, 16 * PAGE_SIZE);
    let guest = guest_on_image(&rig, 16);
    let (before, held) = (rig.free(), &mut Held::root());
    *rig.vm.machine().store.refuse_next.lock() = Some(StoreError::Busy);
    assert_eq!(rig.vm.fault(&guest, at(0, 0), Prot::READ, held), Ok(Faulted::Wait(WaitFor::Memory)));
    *rig.vm.machine().store.refuse_next.lock() = Some(StoreError::Gone);
    let lost = Err(FaultError::Lost(LostPage { store: IMAGE, page: 0, error: StoreError::Gone }));
    assert_eq!(rig.vm.fault(&guest, at(0, 0), Prot::READ, held), lost);
    assert_eq!(rig.free(), before);
    rig.check();
    assert_eq!(rig.load(&guest, at(0, 0)), Ok(image_byte(0, 0)));
}

#[test]
fn a_completion_that_nobody_waits_for_is_counted_and_changes_nothing() {
    let rig = rig_with_image(64, 16 * PAGE_SIZE);
    let guest = guest_on_image(&rig, 16);
    rig.load(&guest, at(0, 0)).unwrap();
    let held = &mut Held::root();
    for bits in [0, 1, 1 << 32, 2 << 32, u64::MAX] {
        rig.vm.complete(IoToken(bits), Ok(()), held);
        rig.vm.complete(IoToken(bits), Err(StoreError::Io), held);
    }
    assert_eq!(rig.vm.stats().stale_completion, 10);
    rig.check();
}

#[test]
fn an_object_that_dies_during_a_page_in_is_freed_when_the_page_arrives() {
    let rig = rig_with_image(64, 16 * PAGE_SIZE);
    let before = rig.free();
    let guest = guest_on_image(&rig, 16);
    let held = &mut Held::root();
    assert!(matches!(rig.vm.fault(&guest, at(1, 0), Prot::READ, held), Ok(Faulted::Wait(_))));
    rig.destroy(guest);
    rig.check();
    assert_eq!(rig.objects(), 1, "the device still writes into its frames (D8)");
    let again = guest_on_image(&rig, 16);
    assert_eq!(rig.objects(), 1, "who opens it before it has ended finds it (D27)");
    rig.destroy(again);
    rig.deliver_all();
    rig.settle();
    assert_eq!((rig.objects(), rig.free()), (0, before));
    rig.check();
}

#[test]
fn without_frames_a_fault_waits_and_goes_on_when_some_are_freed() {
    let rig = Rig::new(64);
    let (a, b) = (rig.guest(100), rig.guest(100));
    let mut page = 0;
    while rig.store(&a, at(page, 0), 1).is_ok() {
        page += 1;
    }
    assert_eq!(rig.store(&b, at(0, 0), 1), Err(Refused::Stuck(WaitFor::Memory)));
    assert!(rig.free() > 0, "tables and pagers have their reserve");
    rig.check();
    rig.destroy(a);
    rig.store(&b, at(0, 0), 1).unwrap();
    rig.check();
}

#[test]
fn without_tables_a_fault_waits_and_loses_nothing() {
    let rig = Rig::new(64);
    let guest = rig.guest(8);
    let set = |on| {
        guest.with_pmap(&mut Held::root(), |pmap| pmap.out_of_tables.store(on, Relaxed));
    };
    set(true);
    assert_eq!(rig.store(&guest, at(0, 0), 1), Err(Refused::Stuck(WaitFor::Memory)));
    set(false);
    rig.store(&guest, at(0, 0), 1).unwrap();
    assert_eq!(guest.stats().fault_zero, 1, "the page of the first try is used");
    rig.check();
}

#[test]
fn entries_that_overlap_or_lie_outside_their_object_are_refused_and_leave_nothing_behind() {
    let rig = Rig::new(64);
    let map = rig.guest(8);
    for (page, pages, first, error) in
        [(7, 1, 0, VmError::Overlap), (8, 9, 0, VmError::Range), (8, 1, u32::MAX, VmError::Range)]
    {
        let object = rig.anonymous(8);
        assert_eq!(rig.put(&map, page, pages, object, first, Prot::ALL, Share::Shared), Err(error));
    }
    let object = rig.anonymous(8);
    let empty = IpaRange::from_pages(at(20, 0), 0).unwrap();
    let first = vmobject::addr::PageIndex::new(0);
    let held = &mut Held::root();
    let refused = rig.vm.insert(&map, empty, object, first, Prot::ALL, Share::Shared, held);
    assert_eq!(refused, Err(VmError::Range), "an empty range is empty (D23)");
    let object = rig.anonymous(8);
    let limit = map.with_pmap(held, |pmap| pmap.reach());
    let end = limit.checked_add(PAGE_SIZE).unwrap();
    let beyond = IpaRange::new(Ipa::new(limit.bits() - 7 * PAGE_SIZE), end).unwrap();
    let refused = rig.vm.insert(&map, beyond, object, first, Prot::ALL, Share::Shared, held);
    assert_eq!(refused, Err(VmError::Reach { end, limit }), "no fault there could ever be served");
    assert_eq!(rig.objects(), 1);
    rig.check();
}

#[test]
fn a_destroyed_guest_leaves_no_frame_no_object_and_no_leaf() {
    let rig = rig_with_image(64, 16 * PAGE_SIZE);
    let before = rig.free();
    let guest = guest_on_image(&rig, 20);
    for page in 0..20 {
        rig.store(&guest, at(page, 0), 1).unwrap();
    }
    let kept = guest.clone();
    rig.destroy(guest);
    assert_eq!(kept.with_pmap(&mut Held::root(), |pmap| pmap.leaves().count()), 0);
    assert_eq!((rig.free(), rig.objects()), (before, 0));
    let hole = Refused::Fault(FaultError::Hole(at(0, 0)));
    assert_eq!(rig.load(&kept, at(0, 0)), Err(hole));
    rig.check();
}

#[test]
fn a_name_of_an_object_that_died_does_not_name_the_next_one() {
    let rig = Rig::new(64);
    let first = rig.anonymous(1);
    rig.vm.release(first, &mut Held::root());
    let second = rig.anonymous(1);
    assert_eq!(first.number(), second.number());
    assert_ne!(first, second);
}

#[test]
fn table_frames_are_zeroed_counted_and_may_use_the_reserve() {
    let rig = Rig::new(64);
    let mut tables = Vec::new();
    while let Some(frame) = rig.vm.alloc_table_frame() {
        tables.push(frame);
    }
    assert_eq!(tables.len(), 64);
    rig.check();
    for frame in tables {
        rig.vm.free_table_frame(frame);
    }
    assert_eq!(rig.free(), 64);
    rig.check();
}

#[test]
fn memory_in_two_ranges_is_used_and_what_lies_between_is_not() {
    let pfn = vmobject::addr::Pfn::new;
    let ranges = [pfn(100)..pfn(110), pfn(200)..pfn(210)];
    let vm = Vm::new(FakeMachine::new(), &ranges).unwrap();
    let mut seen = Vec::new();
    while let Some(frame) = vm.alloc_table_frame() {
        seen.push(frame.number());
    }
    assert_eq!(seen, (100..110).chain(200..210).collect::<Vec<_>>());
}

#[test]
fn the_books_can_be_printed() {
    let rig = rig_with_image(64, 16 * PAGE_SIZE);
    let guest = guest_on_image(&rig, 16);
    rig.store(&guest, at(0, 0), 1).unwrap();
    let (mut text, held) = (String::new(), &mut Held::root());
    rig.vm.describe_objects([(1, guest.clone())], &mut text, held).unwrap();
    rig.vm.describe_map(&guest, &mut text, held).unwrap();
    rig.vm.describe_memory(&mut text, held).unwrap();
    assert!(text.contains("image 3") && text.contains("rwx"), "{text}");
    let _ = guest.with_pmap(held, |pmap| pmap.tables());
}
