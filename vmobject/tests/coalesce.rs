//! Regions that are laid side by side (`vm_object_coalesce`), and copies of part of an object.

use vmobject::addr::PageIndex;
use vmobject::charge::Overcommit;
use vmobject::lock::Held;
use vmobject::map::Share;
use vmobject::prot::Prot;
use vmobject::store::StoreId;
use vmobject::testing::{FakeMachine, Rig, TestMap, at, byte_of};

fn add(rig: &Rig, map: &TestMap, page: u32, pages: u32, prot: Prot) {
    let object = rig.anonymous(pages);
    assert_eq!(rig.put(map, page, pages, object, 0, prot, Share::Shared), Ok(()));
    rig.settle();
    rig.check();
}

/// Entries of a map, as first page of the object and pages.
fn entries(rig: &Rig, map: &TestMap) -> Vec<(u32, u64)> {
    let mut all = Vec::new();
    rig.vm.for_each_entry(map, &mut Held::root(), |entry| {
        all.push((entry.first.number(), entry.range.pages()))
    });
    all
}

#[test]
fn memory_that_is_put_behind_memory_becomes_part_of_it_and_is_used_like_it() {
    let rig = Rig::with_swap(128, 128);
    let guest = rig.guest(10);
    rig.fill(&guest, 0..10);
    add(&rig, &guest, 10, 600, Prot::ALL);
    add(&rig, &guest, 610, 2, Prot::ALL);
    assert_eq!((entries(&rig, &guest), rig.objects()), (vec![(0, 612)], 1));
    assert_eq!(rig.load(&guest, at(611, 0)), Ok(0));
    rig.fill(&guest, 595..612);
    rig.page_out_all();
    let clone = rig.clone(&guest);
    rig.store(&guest, at(611, 77), 1).unwrap();
    assert_eq!(
        (rig.load(&clone, at(611, 77)), rig.load(&clone, at(9, 77))),
        (Ok(byte_of(611)), Ok(byte_of(9)))
    );
    rig.check();
    // Page 612 was never anybody's.
    assert!(rig.load(&guest, at(612, 0)).is_err());
    rig.destroy(guest);
    rig.destroy(clone);
    assert_eq!((rig.free(), rig.objects(), rig.vm.charges(&mut Held::root()).committed), (128, 0, 0));
}

#[test]
fn memory_that_others_know_or_that_differs_keeps_its_size() {
    let rig = Rig::new(256);
    let guest = rig.guest(4);
    add(&rig, &guest, 4, 4, Prot::READ);
    assert_eq!(rig.objects(), 2, "another protection");
    add(&rig, &guest, 9, 4, Prot::READ);
    assert_eq!(rig.objects(), 3, "a page lies between");
    add(&rig, &guest, 13, 3, Prot::READ);
    assert_eq!((rig.objects(), entries(&rig, &guest)), (3, vec![(0, 4), (0, 4), (0, 7)]));
    let other = rig.guest(4);
    let kept = rig.vm.snapshot(&other, &mut Held::root()).unwrap();
    add(&rig, &other, 4, 4, Prot::ALL);
    assert_eq!(entries(&rig, &other), [(0, 4), (0, 4)], "a snapshot has the first");
    rig.vm.delete_snapshot(kept, &mut Held::root());
    // Memory that has something in it is not thrown away.
    let third = rig.guest(4);
    let full = rig.anonymous(4);
    rig.vm.reference(full, &mut Held::root()).unwrap();
    let fourth = rig.map();
    rig.put(&fourth, 0, 4, full, 0, Prot::ALL, Share::Shared).unwrap();
    rig.store(&fourth, at(2, 0), 9).unwrap();
    rig.destroy(fourth);
    rig.put(&third, 4, 4, full, 0, Prot::ALL, Share::Shared).unwrap();
    assert_eq!((rig.load(&third, at(6, 0)), entries(&rig, &third).len()), (Ok(9), 2));
    rig.check();
}

#[test]
fn a_refused_promise_for_more_memory_leaves_the_memory_that_is_there() {
    let rig = Rig::new(256);
    rig.vm.set_overcommit(Overcommit::Percent(100), &mut Held::root());
    let guest = rig.guest(4);
    let object = rig.anonymous(1 << 20);
    let refused = rig.put(&guest, 4, 1 << 20, object, 0, Prot::ALL, Share::Shared);
    assert!(refused.is_err());
    rig.settle();
    assert_eq!((entries(&rig, &guest), rig.objects()), (vec![(0, 4)], 1));
    rig.check();
}

#[test]
fn a_part_of_an_image_is_copied_with_its_offset_and_shows_nothing_around_it() {
    let machine = FakeMachine::new();
    let image: Vec<u8> = (0..8u8).flat_map(|page| [page + 1; 4096]).collect();
    machine.store.add(StoreId(1), image);
    let rig = Rig::with(machine, 64);
    let (guest, held) = (rig.map(), &mut Held::root());
    for (place, first) in [(0, 5), (3, 1)] {
        let image = rig.vm.image(StoreId(1), held).unwrap();
        rig.put(&guest, place, 3, image, first, Prot::ALL, Share::Copy).unwrap();
    }
    let clone = rig.clone(&guest);
    rig.store(&guest, at(4, 0), 99).unwrap();
    let seen = |map: &TestMap| (0..6).map(|page| rig.load(map, at(page, 0)).unwrap()).collect::<Vec<_>>();
    assert_eq!(seen(&guest), [6, 7, 8, 2, 99, 4]);
    assert_eq!(seen(&clone), [6, 7, 8, 2, 3, 4]);
    let mut firsts = Vec::new();
    rig.vm.for_each_entry(&clone, held, |entry| firsts.push(entry.first));
    assert_eq!(firsts, [PageIndex::new(5), PageIndex::new(1)]);
    rig.check();
}
