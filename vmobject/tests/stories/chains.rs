//! Stories of chains: a copy that receives, one that is forgotten, what nobody sees, and a hop too late.

use vmobject::addr::CHUNK_PAGES;
use vmobject::defect::Defect;
use vmobject::lock::Held;
use vmobject::testing::{FakePmap, Rig, at, byte_of};

use super::{beside, look, page_range};
use crate::{ROUNDS, access, at_rest, family, hold, nothing_is_left, rig, tell, tell_to, unmap};

/// A guest of whose memory a copy is kept writes a page that its children have of their own. Nobody looks through the
/// copy but a guest that was made of it.
fn a_guest_reads_through_a_copy_while_its_source_writes(defect: Option<Defect>) {
    let rig = rig(defect);
    let (guest, children) = family(&rig);
    let kept = rig.vm.freeze(&guest, &mut Held::root()).unwrap();
    let reader = rig.vm.map_snapshot(&kept, FakePmap::default(), &mut Held::root()).unwrap();
    let writes = {
        let guest = guest.clone();
        beside(&rig, move |rig| {
            access(rig, &guest, 0, Some(100));
            while rig.vm.step(8, &mut Held::root()) {}
        })
    };
    assert_eq!(access(&rig, &reader, 0, None), byte_of(0), "while it is written");
    writes.join().unwrap();
    for (map, bytes) in [
        (&guest, [100, 60, 60]),
        (&reader, [byte_of(0), 60, 60]),
        (&children[0], [50, byte_of(1), byte_of(2)]),
        (&children[1], [50, 60, byte_of(2)]),
    ] {
        assert_eq!([0, 1, 2].map(|page| access(&rig, map, page, None)), bytes);
    }
    assert_eq!([0, 1, 2].map(|page| look(&rig, &kept, page)), [byte_of(0), 60, 60]);
    at_rest(&rig);
    rig.vm.delete_snapshot(kept, &mut Held::root());
    children.into_iter().chain([reader, guest]).for_each(|map| rig.destroy(map));
    nothing_is_left(&rig);
}

/// A guest has a copy that received. While it writes, a newer one is made and deleted: what is found stale then is the
/// newer one, or the older one that has come to receive again.
fn a_copy_receives_again_when_the_newer_one_is_gone(defect: Option<Defect>) {
    let rig = rig(defect);
    let guest = rig.guest(2);
    rig.fill(&guest, 0..2);
    let older = rig.vm.freeze(&guest, &mut Held::root()).unwrap();
    rig.store(&guest, at(0, 77), 99).unwrap(); // so that it is not handed out again
    let writes = {
        let guest = guest.clone();
        beside(&rig, move |rig| access(rig, &guest, 1, Some(100)))
    };
    let newer = rig.vm.freeze(&guest, &mut Held::root()).unwrap();
    rig.vm.delete_snapshot(newer, &mut Held::root());
    while rig.vm.step(8, &mut Held::root()) {}
    writes.join().unwrap();
    assert_eq!([0, 1].map(|page| look(&rig, &older, page)), [byte_of(0), byte_of(1)]);
    assert_eq!([0, 1].map(|page| access(&rig, &guest, page, None)), [99, 100]);
    at_rest(&rig);
    rig.vm.delete_snapshot(older, &mut Held::root());
    rig.destroy(guest);
    nothing_is_left(&rig);
}

/// A guest ends of which two pages are kept, while another one is made of those: the other ten pages are nobody's.
fn a_guest_is_made_of_a_part_while_the_whole_ends(defect: Option<Defect>) {
    let rig = rig(defect);
    let guest = rig.guest(12);
    rig.fill(&guest, 0..12);
    let part = rig.vm.copy_in(&guest, page_range(0, 2), &mut Held::root()).unwrap();
    let ends = beside(&rig, move |rig| {
        rig.vm.destroy_map(guest, &mut Held::root());
        while rig.vm.step(3, &mut Held::root()) {}
    });
    let made = rig.vm.map_snapshot(&part, FakePmap::default(), &mut Held::root()).unwrap();
    ends.join().unwrap();
    at_rest(&rig);
    assert_eq!(rig.free(), 62, "what nobody sees is there");
    for page in 0..2 {
        assert_eq!(
            (access(&rig, &made, page, None), look(&rig, &part, page)),
            (byte_of(page), byte_of(page))
        );
    }
    rig.vm.delete_snapshot(part, &mut Held::root());
    rig.destroy(made);
    nothing_is_left(&rig);
}

/// A trail leads to an object that ends; where it was there may be one above by the time that somebody has hopped there,
/// and he holds what is below that.
fn a_hop_leads_to_what_is_another_object_by_now(defect: Option<Defect>) {
    let rig = rig(defect);
    let first = rig.guest(2 * CHUNK_PAGES);
    rig.fill(&first, 0..2);
    let mut between = Vec::new();
    let mut youngest = Rig::clone(&rig, &first);
    for generation in 0..5 {
        rig.store(&youngest, at(CHUNK_PAGES + generation, 77), 1).unwrap();
        let next = Rig::clone(&rig, &youngest);
        between.push(std::mem::replace(&mut youngest, next));
    }
    rig.settle();
    assert_eq!(access(&rig, &youngest, 1, None), byte_of(1));
    assert!(rig.vm.stats().trail_laid > 0, "the way is too short");
    unmap(&youngest, 2);
    let parent = between[4].clone();
    let ends = beside(&rig, move |rig| {
        rig.vm.destroy_map(first, &mut Held::root());
        while rig.vm.step(30, &mut Held::root()) {}
        access(rig, &parent, 0, Some(9));
    });
    assert_eq!(access(&rig, &youngest, 1, None), byte_of(1));
    ends.join().unwrap();
    at_rest(&rig);
    for (generation, map) in (0..).zip(between.iter().chain([&youngest])) {
        let written = if generation == 4 { 9 } else { byte_of(0) };
        assert_eq!([0, 1].map(|page| access(&rig, map, page, None)), [written, byte_of(1)]);
        for page in 0..5 {
            let byte = access(&rig, map, CHUNK_PAGES + page, None);
            assert_eq!(byte, u8::from(page <= generation), "page {page} of generation {generation}");
        }
    }
    between.into_iter().chain([youngest]).for_each(|map| rig.destroy(map));
    nothing_is_left(&rig);
}

#[test]
fn a_guest_made_of_a_copy_never_sees_what_the_source_writes() {
    tell(a_guest_reads_through_a_copy_while_its_source_writes, Defect::PushesUnseen);
}

#[test]
fn a_copy_that_has_come_to_receive_again_is_not_forgotten_for_a_newer_one() {
    tell_to(5, a_copy_receives_again_when_the_newer_one_is_gone, Defect::ForgetsALiveCopy);
}

#[test]
fn what_a_part_does_not_show_is_freed_although_a_guest_is_made_of_it_meanwhile() {
    hold(a_guest_is_made_of_a_part_while_the_whole_ends, ROUNDS);
}

#[test]
fn a_hop_to_what_is_another_object_by_now_waits_for_nobody() {
    hold(a_hop_leads_to_what_is_another_object_by_now, ROUNDS);
}
