//! Parts of a map: copies of a range, put anywhere in any map, and what a guest may do with a range.

#![expect(clippy::unwrap_used, reason = "a test may fail")]

use std::collections::BTreeMap;

use vmobject::VmError;
use vmobject::addr::{Ipa, IpaRange};
use vmobject::charge::Overcommit;
use vmobject::fault::FaultError;
use vmobject::lock::Held;
use vmobject::map::{Map, NotDiscarded, Share, Snapshot};
use vmobject::object::Role;
use vmobject::prot::Prot;
use vmobject::store::StoreId;
use vmobject::testing::{FakeMachine, Refused, Rig, TestMap, at, byte_of};

const READ_ONLY: Prot = Prot::READ;

fn pages(first: u32, pages: u32) -> IpaRange {
    IpaRange::from_pages(at(first, 0), pages).unwrap()
}

fn entries(rig: &Rig, map: &Map<FakeMachine>) -> usize {
    let mut count = 0;
    rig.vm.for_each_entry(map, &mut Held::root(), |_| count += 1);
    count
}

/// A map with a copy of a range of `of`, at this address; what was kept for it is given back.
fn copy(rig: &Rig, of: &TestMap, range: IpaRange, to: &TestMap, at: Ipa) {
    let kept = keep(rig, of, range);
    assert_eq!(rig.vm.copy_out(&kept, to, at, &mut Held::root()), Ok(()));
    rig.vm.delete_snapshot(kept, &mut Held::root());
    rig.check();
}

fn keep(rig: &Rig, of: &TestMap, range: IpaRange) -> Snapshot {
    rig.vm.copy_in(of, range, &mut Held::root()).unwrap_or_else(|error| panic!("{error:?}"))
}

fn protect(rig: &Rig, map: &TestMap, range: IpaRange, prot: Prot) -> Result<(), VmError> {
    let done = rig.vm.protect(map, range, prot, &mut Held::root());
    rig.check();
    done
}

const fn denied(at: Ipa) -> Result<(), Refused> {
    Err(Refused::Fault(FaultError::Denied { at, wanted: Prot::WRITE }))
}

#[test]
fn a_copy_of_a_range_has_what_was_there_and_sees_nothing_that_is_written_later() {
    let rig = Rig::new(128);
    let (guest, other) = (rig.guest(20), rig.map());
    rig.fill(&guest, 0..20);
    copy(&rig, &guest, pages(5, 6), &other, at(100, 0));
    assert_eq!((entries(&rig, &guest), entries(&rig, &other)), (3, 1));
    for page in 0..20 {
        rig.store(&guest, at(page, 77), 0xfe).unwrap();
    }
    rig.store(&other, at(103, 77), 0xfd).unwrap();
    rig.check();
    for page in 0..20 {
        assert_eq!(rig.load(&guest, at(page, 77)), Ok(0xfe));
    }
    for page in 0..6 {
        let expected = if page == 3 { 0xfd } else { byte_of(page + 5) };
        assert_eq!(rig.load(&other, at(page + 100, 77)), Ok(expected), "page {page}");
    }
    assert!(matches!(rig.load(&other, at(99, 0)), Err(Refused::Fault(FaultError::Hole(_)))));
    assert!(matches!(rig.load(&other, at(106, 0)), Err(Refused::Fault(FaultError::Hole(_)))));
}

#[test]
fn what_lies_beside_a_copied_range_is_written_in_place_and_pushed_to_nobody() {
    let rig = Rig::new(128);
    let (guest, other) = (rig.guest(20), rig.map());
    rig.fill(&guest, 0..20);
    copy(&rig, &guest, pages(5, 6), &other, at(0, 0));
    let before = (rig.free(), rig.vm.stats());
    for page in (0..5).chain(11..20) {
        rig.store(&guest, at(page, 77), 1).unwrap();
    }
    let after = rig.vm.stats();
    assert_eq!(rig.free(), before.0);
    assert_eq!((after.fault_copy, after.pushed), (before.1.fault_copy, before.1.pushed));
    // In the range each write copies one page.
    rig.store(&guest, at(7, 77), 1).unwrap();
    assert_eq!(rig.free(), before.0 - 1);
}

#[test]
fn at_rest_a_copied_range_costs_no_more_than_copies_made_at_once() {
    let rig = Rig::new(128);
    let all = rig.free();
    let (guest, other) = (rig.guest(20), rig.map());
    rig.fill(&guest, 0..20);
    copy(&rig, &guest, pages(5, 6), &other, at(0, 0));
    for page in 0..20 {
        rig.store(&guest, at(page, 77), 1).unwrap();
    }
    for page in 0..6 {
        rig.store(&other, at(page, 77), 2).unwrap();
    }
    rig.settle();
    rig.check();
    assert_eq!(all - rig.free(), 26, "both sides have written everything");
    rig.destroy(guest);
    rig.check();
    assert_eq!(all - rig.free(), 6);
    rig.destroy(other);
    assert_eq!((rig.free(), rig.objects()), (all, 0));
}

#[test]
fn who_keeps_one_page_of_a_guest_that_ends_keeps_one_page() {
    let rig = Rig::new(128);
    let all = rig.free();
    let (guest, other) = (rig.guest(60), rig.map());
    rig.fill(&guest, 0..60);
    copy(&rig, &guest, pages(30, 1), &other, at(2, 0));
    rig.destroy(guest);
    rig.check();
    assert_eq!(all - rig.free(), 1);
    assert_eq!(rig.load(&other, at(2, 77)), Ok(byte_of(30)));
    assert_eq!(rig.store(&other, at(2, 77), 9), Ok(()));
    assert_eq!(all - rig.free(), 1, "nobody else sees it: it is written in place (D16)");
    rig.check();
}

#[test]
fn a_range_is_copied_within_a_map_and_copied_again() {
    let rig = Rig::with_swap(128, 256);
    let guest = rig.guest(16);
    rig.fill(&guest, 0..16);
    // What each page of the map has to have.
    let mut wanted: BTreeMap<u32, u8> = (0..16).map(|page| (page, byte_of(page))).collect();
    for round in 1..5 {
        for (from, count, to) in [(round, 10, round * 100), (round * 100 + 2, 3, round * 100 + 50)] {
            copy(&rig, &guest, pages(from, count), &guest, at(to, 0));
            for page in 0..count {
                wanted.insert(to + page, wanted[&(from + page)]);
            }
        }
        rig.page_out_all();
        for page in [round + 3, round * 100 + 4] {
            rig.store(&guest, at(page, 77), 0xf0).unwrap();
            wanted.insert(page, 0xf0);
        }
    }
    for (page, byte) in wanted {
        assert_eq!(rig.load(&guest, at(page, 77)), Ok(byte), "page {page}");
    }
    rig.settle();
    rig.check();
}

#[test]
fn a_range_over_several_entries_is_copied_with_all_of_them_and_one_with_a_hole_is_refused() {
    let rig = Rig::new(128);
    let (guest, other) = (rig.guest(8), rig.map());
    rig.vm.machine().store.add(StoreId(5), vec![7; 8 << 12]);
    let image = rig.vm.image(StoreId(5), &mut Held::root()).unwrap();
    rig.put(&guest, 8, 8, image, 0, Prot::READ, Share::Shared).unwrap();
    rig.fill(&guest, 0..8);
    copy(&rig, &guest, pages(6, 4), &other, at(0, 0));
    let seen: Vec<_> = (0..4).map(|page| rig.load(&other, at(page, 77)).unwrap()).collect();
    assert_eq!(seen, [byte_of(6), byte_of(7), 7, 7]);
    assert_eq!(entries(&rig, &other), 2);
    let refused = |range| rig.vm.copy_in(&guest, range, &mut Held::root()).err();
    assert_eq!(refused(pages(14, 4)), Some(VmError::Range));
    assert_eq!(refused(pages(20, 1)), Some(VmError::Range));
    assert_eq!(refused(IpaRange::new(at(3, 0), at(3, 0)).unwrap()), Some(VmError::Range));
    rig.check();
}

#[test]
fn a_copy_that_does_not_fit_is_refused_and_leaves_nothing_behind() {
    let rig = Rig::new(128);
    let (guest, other) = (rig.guest(20), rig.guest(4));
    let kept = keep(&rig, &guest, pages(5, 6));
    let put = |page| rig.vm.copy_out(&kept, &other, at(page, 0), &mut Held::root());
    assert_eq!(put(3), Err(VmError::Overlap));
    assert!(matches!(put(1 << 28), Err(VmError::Reach { .. })));
    rig.vm.set_overcommit(Overcommit::Percent(0), &mut Held::root());
    assert!(matches!(put(4), Err(VmError::Overcommit { .. })));
    let more = rig.vm.copy_in(&guest, pages(5, 2), &mut Held::root());
    assert!(matches!(more, Err(VmError::Overcommit { .. })), "to cut an entry costs a page of tables");
    rig.check();
    assert_eq!(entries(&rig, &other), 1);
    rig.vm.delete_snapshot(kept, &mut Held::root());
    rig.destroy(guest);
    rig.destroy(other);
    assert_eq!(rig.objects(), 0);
}

#[test]
fn a_range_of_a_disk_is_copied_with_what_it_has_now() {
    let rig = Rig::new(128);
    let guest = rig.map();
    rig.vm.machine().store.add(StoreId(5), vec![7; 8 << 12]);
    let disk = rig.vm.disk(StoreId(5), &mut Held::root()).unwrap();
    rig.put(&guest, 0, 8, disk, 0, Prot::ALL, Share::Shared).unwrap();
    rig.store(&guest, at(2, 0), 1).unwrap();
    copy(&rig, &guest, pages(2, 2), &guest, at(50, 0));
    rig.store(&guest, at(2, 0), 2).unwrap();
    rig.store(&guest, at(3, 0), 3).unwrap();
    assert_eq!((rig.load(&guest, at(50, 0)), rig.load(&guest, at(51, 0))), (Ok(1), Ok(7)));
    assert_eq!(rig.load(&guest, at(2, 0)), Ok(2));
    let mut copies = 0;
    rig.vm.for_each_object(&mut Held::root(), |object| copies += u32::from(object.role == Role::Copy));
    assert_eq!(copies, 1, "its store must see what changes");
    rig.check();
}

#[test]
fn a_range_that_may_not_be_written_is_read_and_not_written_until_it_may() {
    let rig = Rig::with_swap(64, 64);
    let guest = rig.guest(8);
    rig.fill(&guest, 0..8);
    assert_eq!(protect(&rig, &guest, pages(2, 3), READ_ONLY), Ok(()));
    assert_eq!(entries(&rig, &guest), 3);
    for page in 0..8 {
        let allowed = !(2..5).contains(&page);
        let expected = if allowed { Ok(()) } else { denied(at(page, 77)) };
        assert_eq!(rig.store(&guest, at(page, 77), 0xee), expected, "page {page}");
        assert_eq!(rig.load(&guest, at(page, 77)), Ok(if allowed { 0xee } else { byte_of(page) }));
    }
    assert_eq!(rig.write(&guest, at(4, 0), &[1]), denied(at(4, 0)), "nor by EL2 for it");
    assert_eq!(rig.discard(&guest, 3, 1), Err(NotDiscarded::Denied(at(3, 0))));
    // What was written before is not forgotten.
    rig.page_out_all();
    assert_eq!(rig.load(&guest, at(3, 77)), Ok(byte_of(3)));
    assert_eq!(protect(&rig, &guest, pages(0, 8), Prot::ALL), Ok(()));
    rig.fill(&guest, 0..8);
    rig.check();
}

#[test]
fn nobody_comes_to_be_allowed_more_than_he_ever_was() {
    let rig = Rig::new(64);
    let guest = rig.guest(2);
    let object = rig.anonymous(2);
    rig.put(&guest, 2, 2, object, 0, Prot::READ, Share::Shared).unwrap();
    assert_eq!(protect(&rig, &guest, pages(1, 2), Prot::ALL), Err(VmError::ReadOnly));
    assert_eq!(protect(&rig, &guest, pages(3, 2), Prot::READ), Err(VmError::Range));
    assert_eq!(entries(&rig, &guest), 2, "a refusal cuts nothing");
    assert_eq!(protect(&rig, &guest, pages(1, 2), Prot::NONE), Ok(()));
    assert!(matches!(rig.load(&guest, at(1, 0)), Err(Refused::Fault(FaultError::Denied { .. }))));
}

#[test]
fn a_clone_of_a_guest_whose_memory_is_protected_may_be_allowed_to_write_its_own() {
    let rig = Rig::new(64);
    let guest = rig.guest(4);
    rig.fill(&guest, 0..4);
    protect(&rig, &guest, pages(0, 4), READ_ONLY).unwrap();
    let clone = rig.clone(&guest);
    assert_eq!(rig.store(&clone, at(1, 77), 1), denied(at(1, 77)));
    protect(&rig, &clone, pages(1, 1), Prot::ALL).unwrap();
    protect(&rig, &guest, pages(1, 2), Prot::ALL).unwrap();
    assert_eq!(rig.store(&clone, at(1, 77), 1), Ok(()));
    assert_eq!((rig.load(&guest, at(1, 77)), rig.load(&clone, at(1, 77))), (Ok(byte_of(1)), Ok(1)));
    assert_eq!(rig.store(&guest, at(2, 77), 2), Ok(()));
    assert_eq!(rig.load(&clone, at(2, 77)), Ok(byte_of(2)));
    rig.check();
}

#[test]
fn a_page_that_goes_down_may_be_written_though_a_dead_copy_of_another_range_holds_what_is_below() {
    let rig = Rig::new(256);
    let guest = rig.guest(64);
    rig.fill(&guest, 0..64);
    let kept = rig.vm.snapshot(&guest, &mut Held::root()).unwrap();
    for page in 50..54 {
        rig.store(&guest, at(page, 0), 1).unwrap();
    }
    rig.vm.delete_snapshot(kept, &mut Held::root());
    // Some of the four go down to the other sixty, and stay writable.
    let moved = rig.vm.stats().collapse_moved;
    rig.vm.step(3, &mut Held::root());
    assert_eq!((rig.vm.stats().collapse_moved - moved, rig.objects()), (2, 2));
    let part = rig.map();
    copy(&rig, &guest, pages(60, 4), &part, at(60, 0));
    rig.store(&part, at(60, 0), 2).unwrap();
    while rig.vm.stats().bypassed == 0 {
        assert!(rig.vm.step(3, &mut Held::root()), "the first object has nothing in the range");
    }
    rig.check();
    rig.vm.destroy_map(part, &mut Held::root());
    rig.check();
    rig.settle();
    rig.check();
}
