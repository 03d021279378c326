//! Asymmetric copies: the source goes on where it is, and what it overwrites is pushed to the copy first.

#![expect(clippy::unwrap_used, reason = "a test may fail")]

use vmobject::addr::{IpaRange, PAGE_SIZE};
use vmobject::fault::Looked;
use vmobject::lock::Held;
use vmobject::map::{Discarded, Share, Snapshot};
use vmobject::object::Role;
use vmobject::prot::Prot;
use vmobject::store::StoreId;
use vmobject::testing::{FakeMachine, FakePmap, Rig, TestMap, at};

const DISK: StoreId = StoreId(6);

fn freeze(rig: &Rig, guest: &TestMap) -> Snapshot {
    rig.vm.freeze(guest, &mut Held::root()).unwrap()
}

fn drop_snapshot(rig: &Rig, snapshot: Snapshot) {
    rig.vm.delete_snapshot(snapshot, &mut Held::root());
    rig.settle();
}

fn guest_of(rig: &Rig, snapshot: &Snapshot) -> TestMap {
    rig.vm.map_snapshot(snapshot, FakePmap::default(), &mut Held::root()).unwrap()
}

/// What an image writer reads.
fn kept(rig: &Rig, snapshot: &Snapshot, page: u32) -> u8 {
    let mut byte = [0];
    loop {
        match rig.vm.read_snapshot(snapshot, at(page, 0), &mut byte, &mut Held::root()).unwrap() {
            Looked::Done => break,
            Looked::Wait(_) => assert!(rig.deliver_all() > 0),
            Looked::Again => {}
        }
    }
    byte[0]
}

fn filled(rig: &Rig, pages: u32, byte: u8) -> TestMap {
    let guest = rig.guest(pages);
    for page in 0..pages {
        rig.store(&guest, at(page, 0), byte).unwrap();
    }
    guest
}

/// Pages that are resident in objects with a role.
fn received(rig: &Rig) -> (u32, u32) {
    let (mut copies, mut heirs) = (0, 0);
    rig.vm.for_each_object(&mut Held::root(), |object| match object.role {
        Role::Copy => copies += object.counts.resident,
        Role::Heir => heirs += object.counts.resident,
        Role::Plain => {}
    });
    (copies, heirs)
}

#[test]
fn a_discard_of_what_an_image_wants_first_is_done_a_few_pages_at_a_time() {
    let rig = Rig::new(512);
    let guest = filled(&rig, 64, 1);
    let image = freeze(&rig, &guest);
    let (mut from, mut parts) = (0, 0);
    loop {
        let range = IpaRange::from_pages(at(from, 0), 64 - from).unwrap();
        let pushed = rig.vm.stats().pushed;
        let discarded = rig.vm.discard(&guest, range, &mut Held::root()).unwrap();
        assert!(rig.vm.stats().pushed - pushed <= 4, "pages that are copied without an interrupt");
        let Discarded::Part(pages) = discarded else { break };
        from += u32::try_from(pages).unwrap();
        parts += 1;
    }
    assert_eq!((from, parts), (60, 15));
    rig.check();
    assert!((0..64).all(|page| rig.load(&guest, at(page, 0)) == Ok(0) && kept(&rig, &image, page) == 1));
    drop_snapshot(&rig, image);
}

#[test]
fn a_long_way_to_an_images_page_is_walked_in_parts() {
    let rig = Rig::new(1024);
    let mut guest = rig.guest(1024);
    rig.store(&guest, at(0, 0), 1).unwrap();
    let mut generations = Vec::new();
    // Of another 2 MiB: nobody has gone this way yet.
    for page in 600..700 {
        rig.store(&guest, at(page, 0), 2).unwrap();
        generations.push(rig.vm.snapshot(&guest, &mut Held::root()).unwrap());
        let next = guest_of(&rig, generations.last().unwrap());
        rig.destroy(core::mem::replace(&mut guest, next));
        rig.settle();
    }
    let image = freeze(&rig, &guest);
    let (mut byte, mut parts) = ([0], 0);
    loop {
        let visited = rig.vm.stats().chain_visited;
        let read = rig.vm.read_snapshot(&image, at(0, 0), &mut byte, &mut Held::root()).unwrap();
        let visited = rig.vm.stats().chain_visited - visited;
        assert!(visited < 40, "{visited} objects without an interrupt");
        if read == Looked::Done {
            break;
        }
        parts += 1;
    }
    assert_eq!((byte[0], parts > 0), (1, true), "{parts} parts");
}

#[test]
fn an_image_of_a_running_guest_is_of_one_instant_and_the_guests_depth_stays() {
    let rig = Rig::new(256);
    let guest = filled(&rig, 16, 1);
    let image = freeze(&rig, &guest);
    rig.check();
    for page in 0..8 {
        rig.store(&guest, at(page, 0), 2).unwrap();
        rig.store(&guest, at(page, 1), 2).unwrap();
        rig.check();
    }
    for page in 0..16 {
        assert_eq!(kept(&rig, &image, page), 1, "page {page}");
        assert_eq!(rig.load(&guest, at(page, 0)), Ok(if page < 8 { 2 } else { 1 }));
    }
    let counts = rig.vm.stats();
    assert_eq!((counts.pushed, counts.shadow_made, rig.objects()), (8, 0, 2), "one push a page, no layer");
    drop_snapshot(&rig, image);
    assert_eq!((rig.objects(), rig.free()), (1, 256 - 16));
    rig.store(&guest, at(9, 0), 3).unwrap();
    assert_eq!(rig.vm.stats().pushed, 8, "nobody is there to push to");
    rig.check();
}

#[test]
fn memory_that_was_never_touched_is_pushed_as_a_mark() {
    let rig = Rig::new(64);
    let guest = rig.guest(8);
    let image = freeze(&rig, &guest);
    rig.load(&guest, at(0, 0)).unwrap();
    rig.check();
    rig.store(&guest, at(0, 0), 5).unwrap();
    rig.write(&guest, at(1, 0), &[6]).unwrap();
    assert_eq!((kept(&rig, &image, 0), kept(&rig, &image, 1), kept(&rig, &image, 2)), (0, 0, 0));
    assert_eq!(rig.free(), 62, "two frames, both the guest's");
    rig.check();
    drop_snapshot(&rig, image);
}

#[test]
fn a_page_that_came_from_below_is_pushed_from_there() {
    let rig = Rig::new(128);
    let parent = filled(&rig, 8, 1);
    let guest = rig.clone(&parent);
    rig.store(&guest, at(0, 0), 2).unwrap();
    let image = freeze(&rig, &guest);
    rig.store(&guest, at(1, 0), 3).unwrap();
    rig.store(&parent, at(1, 0), 4).unwrap();
    rig.check();
    assert_eq!((kept(&rig, &image, 0), kept(&rig, &image, 1), kept(&rig, &image, 2)), (2, 1, 1));
    assert_eq!((rig.load(&guest, at(1, 0)), rig.load(&parent, at(1, 0))), (Ok(3), Ok(4)));
    rig.destroy(parent);
    rig.destroy(guest);
    assert_eq!((kept(&rig, &image, 0), kept(&rig, &image, 1), kept(&rig, &image, 2)), (2, 1, 1));
    drop_snapshot(&rig, image);
    assert_eq!((rig.objects(), rig.free()), (0, 128));
}

#[test]
fn memory_that_two_guests_write_stays_theirs_when_one_is_cloned() {
    let rig = Rig::new(128);
    let (a, b) = (filled(&rig, 8, 1), rig.map());
    let mut object = None;
    rig.vm.for_each_entry(&a, &mut Held::root(), |entry| object = Some(entry.object));
    rig.vm.reference(object.unwrap(), &mut Held::root()).unwrap();
    rig.put(&b, 0, 8, object.unwrap(), 0, Prot::ALL, Share::Shared).unwrap();
    rig.store(&b, at(0, 0), 2).unwrap();
    let clone = rig.clone(&a);
    assert_eq!(rig.load(&clone, at(0, 0)), Ok(2));
    rig.store(&b, at(0, 0), 3).unwrap();
    rig.store(&a, at(1, 0), 4).unwrap();
    rig.store(&clone, at(2, 0), 5).unwrap();
    rig.check();
    for (guest, bytes) in [(&a, [3, 4, 1, 1]), (&b, [3, 4, 1, 1]), (&clone, [2, 1, 5, 1])] {
        for (page, byte) in (0..).zip(bytes) {
            assert_eq!(rig.load(guest, at(page, 0)), Ok(byte), "page {page}");
        }
    }
    for guest in [a, b, clone] {
        rig.destroy(guest);
    }
    assert_eq!((rig.objects(), rig.free()), (0, 128));
}

#[test]
fn what_a_clone_has_mapped_of_the_source_is_taken_away_before_the_source_changes_it() {
    let rig = Rig::new(128);
    let guest = filled(&rig, 8, 1);
    let image = freeze(&rig, &guest);
    let clone = guest_of(&rig, &image);
    for page in 0..8 {
        assert_eq!(rig.load(&clone, at(page, 0)), Ok(1));
    }
    rig.store(&guest, at(3, 0), 9).unwrap();
    rig.check();
    assert_eq!((rig.load(&clone, at(3, 0)), kept(&rig, &image, 3)), (Ok(1), 1));
    drop_snapshot(&rig, image);
    rig.destroy(clone);
    rig.destroy(guest);
}

#[test]
fn of_many_images_each_is_of_its_own_instant_in_whatever_order_they_go() {
    for order in [[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2], [2, 0, 3, 1]] {
        let rig = Rig::new(256);
        let guest = filled(&rig, 8, 10);
        let mut images = Vec::new();
        for round in 0..4 {
            images.push(Some(freeze(&rig, &guest)));
            for page in 0..=round {
                rig.store(&guest, at(page, 0), 11 + u8::try_from(round).unwrap()).unwrap();
            }
            rig.check();
        }
        for gone in order {
            for (round, image) in (0..).zip(&images) {
                let Some(image) = image else { continue };
                for page in 0..8 {
                    let wanted = if page < round { 10 + u8::try_from(round).unwrap() } else { 10 };
                    assert_eq!(kept(&rig, image, page), wanted, "image {round} page {page}");
                }
            }
            drop_snapshot(&rig, images[gone].take().unwrap());
            rig.check();
        }
        assert_eq!((rig.objects(), rig.free()), (1, 248), "order {order:?}");
    }
}

#[test]
fn an_older_image_that_comes_to_lie_on_a_newer_one_forgets_what_stopped_it_at_the_source() {
    for marks in 0..=4 {
        let rig = Rig::new(64);
        rig.add_swap(64);
        let guest = rig.guest(8);
        for (page, byte) in [(5, 1), (6, 1), (7, 0)] {
            rig.store(&guest, at(page, 0), byte).unwrap();
        }
        let one = freeze(&rig, &guest);
        rig.store(&guest, at(5, 0), 2).unwrap();
        // The page of zeros goes, and the image looks again how far it hides what the source has: up to page 6.
        rig.page_out_all();
        rig.settle();
        let two = freeze(&rig, &guest);
        for page in 0..marks {
            rig.store(&guest, at(page, 0), 3).unwrap();
        }
        let three = freeze(&rig, &guest);
        rig.settle();
        rig.check();
        for page in 0..8 {
            let wanted = match page {
                5 => [1, 2, 2],
                6 => [1, 1, 1],
                0..5 if page < marks => [0, 0, 3],
                _ => [0, 0, 0],
            };
            assert_eq!([&one, &two, &three].map(|image| kept(&rig, image, page)), wanted, "page {page}");
        }
        [one, two, three].into_iter().for_each(|image| drop_snapshot(&rig, image));
        rig.destroy(guest);
        assert_eq!((rig.objects(), rig.free()), (0, 64));
    }
}

#[test]
fn an_empty_copy_is_handed_out_again_and_neither_holder_sees_the_others_writes_d28() {
    let rig = Rig::new(128);
    let guest = filled(&rig, 4, 1);
    let (one, two) = (freeze(&rig, &guest), freeze(&rig, &guest));
    assert_eq!((rig.vm.stats().copy_made, rig.vm.stats().copy_shared), (1, 1));
    let (a, b) = (guest_of(&rig, &one), guest_of(&rig, &two));
    drop_snapshot(&rig, two);
    drop_snapshot(&rig, one);
    rig.store(&a, at(0, 0), 2).unwrap();
    rig.destroy(b);
    rig.store(&a, at(1, 0), 3).unwrap();
    let again = freeze(&rig, &guest);
    rig.store(&guest, at(2, 0), 4).unwrap();
    rig.store(&a, at(3, 0), 5).unwrap();
    rig.check();
    assert_eq!([0, 1, 2, 3].map(|page| kept(&rig, &again, page)), [1, 1, 1, 1]);
    assert_eq!([0, 1, 2, 3].map(|page| rig.load(&a, at(page, 0)).unwrap()), [2, 3, 1, 5]);
    assert_eq!([0, 1, 2, 3].map(|page| rig.load(&guest, at(page, 0)).unwrap()), [1, 1, 4, 1]);
    drop_snapshot(&rig, again);
}

#[test]
fn a_clone_that_has_merged_with_the_copy_receives_in_its_place_d3() {
    let rig = Rig::new(128);
    let guest = filled(&rig, 8, 1);
    let image = freeze(&rig, &guest);
    let clone = guest_of(&rig, &image);
    rig.store(&guest, at(0, 0), 2).unwrap();
    rig.store(&clone, at(1, 0), 3).unwrap();
    drop_snapshot(&rig, image);
    assert_eq!((rig.objects(), received(&rig)), (2, (0, 2)), "the clone's object is the heir");
    rig.check();
    for page in 0..8 {
        rig.store(&guest, at(page, 0), 7).unwrap();
        rig.check();
    }
    for (page, byte) in (0..).zip([1, 3, 1, 1, 1, 1, 1, 1]) {
        assert_eq!(rig.load(&clone, at(page, 0)), Ok(byte), "a push replaces nothing; page {page}");
    }
    let second = freeze(&rig, &guest);
    rig.store(&guest, at(4, 0), 8).unwrap();
    assert_eq!((kept(&rig, &second, 4), rig.load(&clone, at(4, 0))), (7, Ok(1)));
    rig.check();
    drop_snapshot(&rig, second);
    rig.destroy(guest);
    assert_eq!(rig.objects(), 1);
    rig.destroy(clone);
    assert_eq!((rig.objects(), rig.free()), (0, 128));
}

#[test]
fn a_clone_of_a_disk_is_of_one_instant_and_the_disk_still_sees_every_change() {
    let machine = FakeMachine::new();
    machine.store.add(DISK, vec![1; usize::try_from(16 * PAGE_SIZE).unwrap()]);
    let rig = Rig::with(machine, 128);
    let (guest, disk) = (rig.map(), rig.vm.disk(DISK, &mut Held::root()).unwrap());
    rig.put(&guest, 0, 16, disk, 0, Prot::ALL, Share::Shared).unwrap();
    rig.store(&guest, at(0, 0), 2).unwrap();
    let clone = rig.clone(&guest);
    let private = rig.map();
    let again = rig.vm.disk(DISK, &mut Held::root()).unwrap();
    rig.put(&private, 0, 16, again, 0, Prot::ALL, Share::Copy).unwrap();
    for page in 0..8 {
        rig.store(&guest, at(page, 0), 3).unwrap();
        rig.check();
    }
    rig.store(&clone, at(9, 0), 4).unwrap();
    assert_eq!(rig.clean(disk, 0..16), 0);
    for (page, byte) in (0..).zip([2, 1, 1, 1, 1, 1, 1, 1, 1, 4, 1, 1, 1, 1, 1, 1]) {
        let (a, b) = (rig.load(&clone, at(page, 0)), rig.load(&private, at(page, 0)));
        let wanted = if page == 9 { 1 } else { byte };
        assert_eq!((a, b), (Ok(byte), Ok(wanted)), "page {page}");
        let stored = rig.vm.machine().store.page(DISK, page.into())[0];
        assert_eq!(stored, if page < 8 { 3 } else { 1 });
    }
    for guest in [guest, clone, private] {
        rig.destroy(guest);
    }
    rig.deliver_all();
    rig.settle();
    assert_eq!((rig.objects(), rig.free()), (0, 128));
}

#[test]
fn a_discard_pushes_what_it_takes_away() {
    let rig = Rig::new(128);
    let guest = filled(&rig, 8, 1);
    let image = freeze(&rig, &guest);
    rig.discard(&guest, 2, 4).unwrap();
    rig.check();
    for page in 0..8 {
        let gone = (2..6).contains(&page);
        assert_eq!((kept(&rig, &image, page), rig.load(&guest, at(page, 0))), (1, Ok(u8::from(!gone))));
    }
    assert_eq!(rig.vm.stats().pushed, 4);
    drop_snapshot(&rig, image);
}

#[test]
fn a_page_that_is_in_swap_is_brought_in_and_pushed() {
    let rig = Rig::new(128);
    rig.add_swap(64);
    let guest = filled(&rig, 8, 1);
    rig.page_out_all();
    let image = freeze(&rig, &guest);
    rig.store(&guest, at(3, 0), 2).unwrap();
    rig.check();
    rig.page_out_all();
    assert_eq!((kept(&rig, &image, 3), rig.load(&guest, at(3, 0))), (1, Ok(2)));
    rig.check();
    drop_snapshot(&rig, image);
    rig.destroy(guest);
    assert_eq!(rig.vm.swap_info(&mut Held::root()).in_use, 0);
}

#[test]
fn want_of_a_frame_for_the_copy_stops_the_writer_and_loses_nothing() {
    let rig = Rig::new(16);
    let guest = filled(&rig, 10, 1);
    let image = freeze(&rig, &guest);
    let stuck = (0..10).find(|&page| rig.store(&guest, at(page, 0), 2).is_err()).unwrap();
    rig.check();
    assert_eq!((rig.load(&guest, at(stuck, 0)), kept(&rig, &image, stuck)), (Ok(1), 1));
    drop_snapshot(&rig, image);
    rig.store(&guest, at(stuck, 0), 2).unwrap();
    rig.check();
}
