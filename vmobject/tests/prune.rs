//! What nobody sees goes, and nothing else: objects that are shown in parts, that have many shadows, or that have a
//! pager.

#![expect(clippy::unwrap_used, reason = "a test may fail")]

use vmobject::addr::IpaRange;
use vmobject::limits::MAX_SIBLINGS;
use vmobject::lock::Held;
use vmobject::map::Share;
use vmobject::prot::Prot;
use vmobject::store::StoreId;
use vmobject::testing::{FakePmap, Rig, TestMap, at, byte_of};

/// A map with a copy of so many pages of another one, from `first` on, at its first page.
fn part(rig: &Rig, of: &TestMap, first: u32, pages: u32) -> TestMap {
    let (to, held) = (rig.map(), &mut Held::root());
    let kept = rig.vm.copy_in(of, IpaRange::from_pages(at(first, 0), pages).unwrap(), held).unwrap();
    rig.vm.copy_out(&kept, &to, at(0, 0), held).unwrap();
    rig.vm.delete_snapshot(kept, held);
    to
}

/// Lets all chores be done, and looks at everything.
fn rest(rig: &Rig) {
    rig.settle();
    rig.check();
    assert_eq!(rig.vm.check_at_rest(&mut Held::root()), Ok(()));
}

#[test]
fn a_page_that_shadows_of_parts_hide_is_freed_when_the_last_who_saw_it_goes() {
    let rig = Rig::new(256);
    let all = rig.free();
    let guest = rig.guest(20);
    rig.fill(&guest, 0..20);
    // Pages 0..12, 8..20 and all of them; one writes to more pages than the other.
    let (low, high, whole) = (part(&rig, &guest, 0, 12), part(&rig, &guest, 8, 12), rig.clone(&guest));
    for page in [3, 4, 9] {
        rig.store(&low, at(page, 77), 1).unwrap();
    }
    for page in [1, 7] {
        rig.store(&high, at(page, 77), 2).unwrap();
    }
    rig.destroy(guest);
    rest(&rig);
    assert_eq!(all - rig.free(), 20 + 5, "all is seen");
    rig.destroy(whole);
    rest(&rig);
    // 3 and 4 are shown by one who has them, 15 by the other, 9 by both.
    assert_eq!(all - rig.free(), 20 - 4 + 5);
    for page in 0..12 {
        let wanted = if [3, 4, 9].contains(&page) { 1 } else { byte_of(page) };
        assert_eq!(rig.load(&low, at(page, 77)), Ok(wanted), "page {page}");
        let wanted = if [1, 7].contains(&page) { 2 } else { byte_of(page + 8) };
        assert_eq!(rig.load(&high, at(page, 77)), Ok(wanted), "page {page}");
    }
    rig.destroy(low);
    rest(&rig);
    assert_eq!(all - rig.free(), 12, "what is left has its pages and no other");
    rig.destroy(high);
    assert_eq!((rig.free(), rig.objects()), (all, 0));
}

#[test]
fn what_lies_in_no_part_that_is_shown_is_freed_at_every_depth() {
    let rig = Rig::new(256);
    let all = rig.free();
    let guest = rig.guest(20);
    rig.fill(&guest, 0..20);
    // Two who keep the object from being merged, over one with pages of its own.
    let between = rig.clone(&guest);
    (0..6).for_each(|page| rig.store(&between, at(page, 77), 1).unwrap());
    let (low, high) = (part(&rig, &between, 4, 4), part(&rig, &between, 12, 4));
    rig.store(&low, at(0, 77), 2).unwrap();
    rig.store(&high, at(0, 77), 3).unwrap();
    rest(&rig);
    rig.destroy(guest);
    rig.destroy(between);
    rest(&rig);
    // Seen are 5, 6, 7 and 13, 14, 15, and each has its own first page.
    assert_eq!(all - rig.free(), 3 + 3 + 2);
    rig.destroy(low);
    rig.destroy(high);
    assert_eq!((rig.free(), rig.objects()), (all, 0));
}

#[test]
fn however_many_shadow_an_object_each_is_asked_when_what_held_it_up_is_gone() {
    let rig = Rig::new(512);
    let held = &mut Held::root();
    let guest = rig.guest(4);
    rig.fill(&guest, 0..4);
    let kept = rig.vm.freeze(&guest, held).unwrap();
    rig.store(&guest, at(0, 77), 1).unwrap();
    // Each but the first hides what was pushed; nobody passes over what may receive more.
    let many: Vec<_> = (0..4 * MAX_SIBLINGS)
        .map(|number| {
            let map = rig.vm.map_snapshot(&kept, FakePmap::default(), held).unwrap();
            rig.store(&map, at(u32::from(number == 0), 77), 2).unwrap();
            map
        })
        .collect();
    rig.vm.delete_snapshot(kept, held);
    rest(&rig);
    let before = rig.vm.stats();
    // A newer copy receives from now on.
    let newer = rig.vm.freeze(&guest, held).unwrap();
    rest(&rig);
    let after = rig.vm.stats();
    assert_eq!(after.bypassed - before.bypassed, u64::from(4 * MAX_SIBLINGS - 1));
    assert_eq!(after.collapsed - before.collapsed, 1, "the one that is left is merged");
    rig.vm.delete_snapshot(newer, held);
    many.into_iter().for_each(|map| rig.destroy(map));
    rig.destroy(guest);
    assert_eq!(rig.objects(), 0);
}

#[test]
fn a_page_of_a_disk_that_is_not_written_yet_stays_though_every_copy_has_its_own() {
    const DISK: StoreId = StoreId(4);
    let rig = Rig::new(256);
    let held = &mut Held::root();
    rig.vm.machine().store.add(DISK, vec![0x11; 8 << 12]);
    let open = |map: &TestMap| {
        let disk = rig.vm.disk(DISK, &mut Held::root()).unwrap();
        rig.put(map, 0, 8, disk, 0, Prot::ALL, Share::Shared).unwrap();
    };
    let guest = rig.map();
    open(&guest);
    let kept = rig.vm.snapshot(&guest, held).unwrap();
    rig.store(&guest, at(3, 7), 0xaa).unwrap();
    let copies: Vec<_> = (0..3)
        .map(|page| {
            let map = rig.vm.map_snapshot(&kept, FakePmap::default(), held).unwrap();
            rig.store(&map, at(page, 7), 1).unwrap();
            map
        })
        .collect();
    rig.vm.delete_snapshot(kept, held);
    rig.destroy(guest);
    rest(&rig);
    let mut copies = copies.into_iter();
    rig.destroy(copies.next().unwrap());
    rest(&rig);
    let again = rig.map();
    open(&again);
    assert_eq!(rig.load(&again, at(3, 7)), Ok(0xaa));
    assert_eq!(rig.load(copies.as_slice().first().unwrap(), at(3, 7)), Ok(0x11));
    rest(&rig);
}

#[test]
fn what_a_part_does_not_show_is_freed_whether_a_guest_is_made_of_it_before_or_after_the_whole_ends() {
    for before in [true, false] {
        let rig = Rig::new(64);
        let guest = rig.guest(12);
        rig.fill(&guest, 0..12);
        let range = IpaRange::from_pages(at(0, 0), 2).unwrap();
        let part = rig.vm.copy_in(&guest, range, &mut Held::root()).unwrap();
        let make = || rig.vm.map_snapshot(&part, FakePmap::default(), &mut Held::root()).unwrap();
        let made = if before {
            let made = make();
            rig.destroy(guest);
            made
        } else {
            rig.destroy(guest);
            make()
        };
        rest(&rig);
        assert_eq!(rig.free(), 62);
        assert_eq!([0, 1].map(|page| rig.load(&made, at(page, 77))), [Ok(byte_of(0)), Ok(byte_of(1))]);
        rig.vm.delete_snapshot(part, &mut Held::root());
        rig.destroy(made);
        assert_eq!((rig.objects(), rig.free()), (0, 64));
    }
}
