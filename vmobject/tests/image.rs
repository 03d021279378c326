//! Objects over a store that never changes and knows its pages: which are zeros, and what sums the others have.

#![expect(clippy::unwrap_used, reason = "a test may fail")]

use std::sync::atomic::Ordering::Relaxed;

use vmobject::addr::PAGE_SIZE;
use vmobject::fault::{Copied, FaultError};
use vmobject::lock::Held;
use vmobject::map::Share;
use vmobject::prot::Prot;
use vmobject::store::{Expected, LostPage, StoreError, StoreId};
use vmobject::testing::{FakeMachine, Rig, TestMap, at};

const IMAGE: StoreId = StoreId(7);
const KEY: u64 = 0x1234_5678_9abc;
const PAGES: u32 = 32;

/// The sum that a store keeps of a page whose bytes are all the same.
fn sum_of(byte: u8, key: u64) -> u32 {
    let word = u64::from_le_bytes([byte; 8]);
    let odd = 0x9e37_79b9_7f4a_7c15_u64;
    let sum = (0..512).fold(key.wrapping_mul(odd), |sum, _| (sum.rotate_left(23) ^ word).wrapping_mul(odd));
    (u32::try_from(sum >> 32).unwrap() ^ u32::try_from(sum & 0xffff_ffff).unwrap()).max(1)
}

/// An image of pages of 0x11, which says that pages from 8 to 15 are zeros, and whose page 20 is damaged.
fn rig() -> (Rig, TestMap) {
    let machine = FakeMachine::new();
    machine.store.add(IMAGE, vec![0x11; usize::try_from(u64::from(PAGES) * PAGE_SIZE).unwrap()]);
    for page in 0..u64::from(PAGES) {
        let (byte, key) = (if page == 20 { 0x12 } else { 0x11 }, KEY + page);
        let sum = Expected::Sum { key, sum: sum_of(byte, key) };
        let known = if (8..16).contains(&page) { Expected::Zeros } else { sum };
        machine.store.expected.lock().insert((IMAGE, page), known);
    }
    let rig = Rig::with(machine, 256);
    let map = guest(&rig);
    (rig, map)
}

fn guest(rig: &Rig) -> TestMap {
    let (map, image) = (rig.map(), rig.vm.image(IMAGE, &mut Held::root()).unwrap());
    rig.put(&map, 0, PAGES, image, 0, Prot::ALL, Share::Copy).unwrap();
    map
}

#[test]
fn pages_that_are_zeros_are_never_read_and_the_others_are_compared_with_their_sums() {
    let (rig, map) = rig();
    for page in 8..16 {
        assert_eq!(rig.load(&map, at(page, 3)), Ok(0));
    }
    assert_eq!(rig.vm.machine().store.started.load(Relaxed), 0, "nothing was read");
    for page in (0..8).chain(16..20).chain(21..PAGES) {
        assert_eq!(rig.load(&map, at(page, 3)), Ok(0x11), "page {page}");
    }
    rig.store(&map, at(9, 0), 5).unwrap();
    assert_eq!(
        (rig.load(&map, at(9, 0)), rig.load(&map, at(9, 1)), rig.load(&map, at(10, 0))),
        (Ok(5), Ok(0), Ok(0))
    );
    rig.check();
}

#[test]
fn a_page_that_is_not_what_was_stored_is_lost_to_whoever_wants_it_and_its_neighbours_are_not() {
    let (rig, map) = rig();
    let lost = Err(FaultError::Lost(LostPage { store: IMAGE, page: 20, error: StoreError::Corrupt }));
    for _ in 0..3 {
        let mut out = [0];
        let read = loop {
            match rig.vm.read(&map, at(20, 0), &mut out, &mut Held::root()) {
                Ok(Copied::Wait(_)) => assert!(rig.deliver(0, Ok(()))),
                other => break other,
            }
        };
        assert_eq!(read.map(|_| ()), lost);
    }
    assert_eq!((rig.load(&map, at(19, 0)), rig.load(&map, at(21, 0))), (Ok(0x11), Ok(0x11)));
    rig.check();
}

#[test]
fn a_clone_and_a_snapshot_of_a_guest_from_an_image_read_zeros_where_it_has_them() {
    let (rig, map) = rig();
    rig.store(&map, at(2, 0), 7).unwrap();
    let child = rig.clone(&map);
    assert_eq!(
        (rig.load(&child, at(12, 0)), rig.load(&child, at(2, 0)), rig.load(&child, at(2, 1))),
        (Ok(0), Ok(7), Ok(0x11))
    );
    rig.check();
}

#[test]
fn a_store_is_forgotten_only_when_nobody_refers_to_it() {
    let (rig, map) = rig();
    rig.load(&map, at(1, 0)).unwrap();
    rig.vm.set_cache_limit(64, &mut Held::root());
    assert!(!rig.vm.forget_store(IMAGE, &mut Held::root()), "a guest has it");
    rig.destroy(map);
    while rig.vm.step(64, &mut Held::root()) {}
    assert!(rig.vm.forget_store(IMAGE, &mut Held::root()), "what is only cached is forgotten at once");
    for page in 0..u64::from(PAGES) {
        rig.vm.machine().store.expected.lock().insert((IMAGE, page), Expected::Zeros);
    }
    let next = guest(&rig);
    assert_eq!(rig.load(&next, at(1, 0)), Ok(0), "what it had is not remembered");
    rig.check();
}

#[test]
fn a_page_of_zeros_of_an_image_is_no_change_of_it_and_goes_when_memory_is_short() {
    let (rig, _map) = rig();
    let reader = rig.map();
    let image = rig.vm.image(IMAGE, &mut Held::root()).unwrap();
    rig.put(&reader, 0, PAGES, image, 0, Prot::READ, Share::Shared).unwrap();
    assert_eq!(rig.load(&reader, at(9, 0)), Ok(0));
    let free = rig.free();
    rig.page_out_all();
    assert_eq!(rig.free(), free + 1, "it can be made again");
    assert_eq!(rig.load(&reader, at(9, 0)), Ok(0));
    rig.check();
}
