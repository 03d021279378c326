//! Resets: which leaves go and which stay, that what stays is right, and that it is done in steps.

#![expect(clippy::unwrap_used, reason = "a test may fail")]

use std::cell::Cell;

use vmobject::limits::{MAX_WAY, UNMAP_PAGES};
use vmobject::lock::Held;
use vmobject::map::{Share, Snapshot};
use vmobject::prot::Prot;
use vmobject::stats::Counts;
use vmobject::testing::{FakePmap, Rig, TestMap, at};

const PAGES: u32 = 1000;

/// What was written before the snapshots: to page `n` its low byte, and one.
fn first(page: u32) -> u8 {
    u8::try_from(page % 200).unwrap() + 1
}

/// A guest that has written every page.
fn written(rig: &Rig) -> TestMap {
    let guest = rig.guest(PAGES);
    (0..PAGES).for_each(|page| rig.store(&guest, at(page, 0), first(page)).unwrap());
    guest
}

fn keep(rig: &Rig, guest: &TestMap) -> Snapshot {
    rig.vm.snapshot(guest, &mut Held::root()).unwrap()
}

fn make(rig: &Rig, snapshot: &Snapshot) -> TestMap {
    rig.vm.map_snapshot(snapshot, FakePmap::default(), &mut Held::root()).unwrap()
}

fn write(rig: &Rig, guest: &TestMap, pages: &[u32]) {
    pages.iter().for_each(|&page| rig.store(guest, at(page, 0), 250).unwrap());
}

fn read_all(rig: &Rig, guest: &TestMap) {
    for page in 0..PAGES {
        rig.load(guest, at(page, 0)).unwrap();
    }
}

fn leaves(guest: &TestMap) -> usize {
    guest.with_pmap(&mut Held::root(), |pmap| pmap.leaves().count())
}

/// Resets, and has every page of the guest read: what happened, and how many leaves stayed.
fn reset(rig: &Rig, guest: &TestMap, to: &Snapshot, expected: impl Fn(u32) -> u8) -> (Counts, usize) {
    rig.vm.reset_map(guest, to, &|_| rig.check(), &mut Held::root()).unwrap();
    rig.check();
    let stayed = leaves(guest);
    let counts = rig.vm.stats();
    for page in 0..PAGES {
        assert_eq!(rig.peek(guest, at(page, 0)), Some(expected(page)), "page {page}");
        assert_eq!(rig.load(guest, at(page, 0)), Ok(expected(page)), "page {page} through its leaf");
    }
    rig.settle();
    rig.check();
    (counts, stayed)
}

#[test]
fn only_what_was_written_since_loses_its_leaf_and_the_rest_costs_no_fault() {
    let rig = Rig::new(4096);
    let source = written(&rig);
    let kept = keep(&rig, &source);
    for guest in [source.clone(), make(&rig, &kept)] {
        for round in 0..3 {
            read_all(&rig, &guest);
            assert_eq!(leaves(&guest), 1000);
            write(&rig, &guest, &[0, 63, 64, 500 + round, 999]);
            let (counts, stayed) = reset(&rig, &guest, &kept, first);
            assert_eq!((stayed, counts.map_cleared), (995, 0));
            assert_eq!(rig.vm.stats().fault_zero, counts.fault_zero, "nothing was lost");
            let faults = rig.vm.stats().fault_shared - counts.fault_shared;
            assert!(faults <= 5, "{faults} faults for five pages");
        }
        // Not even a shadow has been made since.
        let (_, stayed) = reset(&rig, &guest, &kept, first);
        assert_eq!(stayed, 1000);
    }
}

#[test]
fn what_is_kept_cannot_be_written_and_others_see_nothing_of_a_reset() {
    let rig = Rig::new(8192);
    let source = written(&rig);
    let kept = keep(&rig, &source);
    let (guest, other) = (make(&rig, &kept), make(&rig, &kept));
    read_all(&rig, &guest);
    write(&rig, &guest, &[7, 8]);
    write(&rig, &other, &[8, 9]);
    reset(&rig, &guest, &kept, first);
    write(&rig, &guest, &[1, 8]);
    for (map, dirty) in [(&guest, &[1, 8][..]), (&other, &[8, 9]), (&source, &[])] {
        for page in 0..PAGES {
            let expected = if dirty.contains(&page) { 250 } else { first(page) };
            assert_eq!(rig.load(map, at(page, 0)), Ok(expected), "page {page}");
        }
    }
    rig.check();
}

#[test]
fn what_was_discarded_or_went_to_swap_since_is_as_it_was() {
    let rig = Rig::with_swap(4096, 4096);
    let source = written(&rig);
    let kept = keep(&rig, &source);
    let guest = make(&rig, &kept);
    for swap in [false, true] {
        read_all(&rig, &guest);
        write(&rig, &guest, &[10, 11, 12]);
        rig.discard(&guest, 100, 300).unwrap();
        assert_eq!(rig.load(&guest, at(150, 0)), Ok(0));
        if swap {
            rig.page_out_all();
            assert_eq!(leaves(&guest), 0);
        }
        let (counts, stayed) = reset(&rig, &guest, &kept, first);
        assert_eq!((stayed, counts.map_cleared), (if swap { 0 } else { 697 }, 0));
    }
}

#[test]
fn after_a_bypass_the_snapshot_is_what_it_was_and_still_most_leaves_stay() {
    let rig = Rig::new(8192);
    let source = written(&rig);
    let clone = rig.clone(&source);
    write(&rig, &clone, &[20, 21]);
    let kept = keep(&rig, &clone);
    let before = rig.vm.stats().bypassed;
    // Both pages that the snapshot has, and more: it is passed over.
    read_all(&rig, &clone);
    for page in [20, 21, 22] {
        rig.store(&clone, at(page, 0), 99).unwrap();
    }
    rig.settle();
    assert_eq!(rig.vm.stats().bypassed, before + 1);
    let had = |page| if page == 20 || page == 21 { 250 } else { first(page) };
    let (counts, stayed) = reset(&rig, &clone, &kept, had);
    assert_eq!((stayed, counts.map_cleared), (997, 0));
    // And one that rewrote everything, which shadows nothing any more.
    (0..PAGES).for_each(|page| rig.store(&clone, at(page, 0), 98).unwrap());
    rig.settle();
    let (counts, stayed) = reset(&rig, &clone, &kept, had);
    assert_eq!((stayed, counts.map_cleared), (0, 0));
}

#[test]
fn a_reset_to_what_a_relative_was_takes_what_either_wrote() {
    let rig = Rig::new(8192);
    let source = written(&rig);
    let relative = rig.clone(&source);
    write(&rig, &relative, &[30, 31]);
    let kept = keep(&rig, &relative);
    let guest = rig.clone(&source);
    read_all(&rig, &guest);
    rig.store(&guest, at(40, 0), 9).unwrap();
    let had = |page| if page == 30 || page == 31 { 250 } else { first(page) };
    let (counts, stayed) = reset(&rig, &guest, &kept, had);
    assert_eq!((stayed, counts.map_cleared), (997, 0));
}

#[test]
fn a_reset_past_later_snapshots_takes_what_was_written_between_them() {
    for generations in 1..=MAX_WAY + 2 {
        for forget in [false, true] {
            let rig = Rig::new(8192);
            let source = written(&rig);
            let kept = keep(&rig, &source);
            let guest = make(&rig, &kept);
            let mut later = Vec::new();
            for page in (0..).take(generations) {
                write(&rig, &guest, &[page]);
                later.push(keep(&rig, &guest));
            }
            write(&rig, &guest, &[500]);
            read_all(&rig, &guest);
            if forget {
                // Their objects are to be merged, which has not begun yet, or is done between two steps.
                later.drain(..).for_each(|snapshot| rig.vm.delete_snapshot(snapshot, &mut Held::root()));
            }
            let rest = |held: &mut Held<'_, 0>| {
                rig.vm.step(1, held);
                rig.check();
            };
            rig.vm.reset_map(&guest, &kept, &rest, &mut Held::root()).unwrap();
            rig.check();
            let cleared = rig.vm.stats().map_cleared == 1;
            assert!(forget || cleared == (generations + 2 > MAX_WAY), "{generations} generations: {cleared}");
            let stayed = PAGES as usize - generations - 1;
            assert_eq!(leaves(&guest), if cleared { 0 } else { stayed }, "{generations} generations");
            (0..PAGES).for_each(|page| assert_eq!(rig.load(&guest, at(page, 0)), Ok(first(page))));
            rig.settle();
            rig.check();
        }
    }
}

#[test]
fn what_merges_in_the_middle_of_a_reset_leaves_no_leaf_behind() {
    let rig = Rig::new(16_384);
    let source = written(&rig);
    let kept = keep(&rig, &source);
    for merge_at in 0..12 {
        let guest = make(&rig, &kept);
        (0..400).for_each(|page| write(&rig, &guest, &[page]));
        let later = Cell::new(Some(keep(&rig, &guest)));
        (300..700).for_each(|page| write(&rig, &guest, &[page]));
        read_all(&rig, &guest);
        let rests = Cell::new(0);
        let rest = |held: &mut Held<'_, 0>| {
            if rests.get() == merge_at
                && let Some(later) = later.take()
            {
                rig.vm.delete_snapshot(later, held);
            }
            rests.set(rests.get() + 1);
            rig.vm.step(100, held);
            rig.check();
        };
        rig.vm.reset_map(&guest, &kept, &rest, &mut Held::root()).unwrap();
        let steps = 2 * 400_u32.div_ceil(UNMAP_PAGES);
        assert!(rests.get() > steps, "{} steps, at least {steps}", rests.get());
        assert_eq!(leaves(&guest), 300);
        (0..PAGES).for_each(|page| assert_eq!(rig.load(&guest, at(page, 0)), Ok(first(page))));
        if let Some(later) = later.take() {
            rig.vm.delete_snapshot(later, &mut Held::root());
        }
        rig.destroy(guest);
        rig.settle();
        rig.check();
    }
    assert_eq!((rig.vm.stats().map_cleared, rig.objects()), (0, 1));
}

#[test]
fn a_step_takes_away_a_bounded_number_of_leaves() {
    let rig = Rig::new(4096);
    let source = written(&rig);
    let kept = keep(&rig, &source);
    (0..PAGES).step_by(2).for_each(|page| write(&rig, &source, &[page]));
    read_all(&rig, &source);
    let (last, steps) = (Cell::new(leaves(&source)), Cell::new(0));
    let rest = |_: &mut Held<'_, 0>| {
        let now = leaves(&source);
        assert!(last.get() - now <= UNMAP_PAGES as usize);
        last.set(now);
        steps.set(steps.get() + 1);
    };
    rig.vm.reset_map(&source, &kept, &rest, &mut Held::root()).unwrap();
    assert_eq!((last.get(), leaves(&source)), (500, 500));
    assert!(steps.get() <= 500 * 2 / UNMAP_PAGES + 4, "{} steps", steps.get());
}

#[test]
fn what_cannot_be_compared_is_unmapped_whole() {
    // An entry that is not in the snapshot.
    let rig = Rig::new(8192);
    let guest = written(&rig);
    let kept = keep(&rig, &guest);
    let more = rig.anonymous(4);
    rig.put(&guest, 2000, 4, more, 0, Prot::ALL, Share::Shared).unwrap();
    rig.store(&guest, at(2001, 0), 5).unwrap();
    let (counts, stayed) = reset(&rig, &guest, &kept, first);
    assert_eq!((stayed, counts.map_cleared), (0, 1));
    assert!(rig.load(&guest, at(2001, 0)).is_err(), "it is gone");
    // Who reads through a copy-object, below which another guest writes.
    let guest = written(&rig);
    let frozen = rig.vm.freeze(&guest, &mut Held::root()).unwrap();
    write(&rig, &guest, &[3, 4]);
    let reader = make(&rig, &frozen);
    read_all(&rig, &reader);
    let (counts, stayed) = reset(&rig, &reader, &kept, first);
    assert_eq!((stayed, counts.map_cleared), (0, 2));
    // That other guest: all that it has mapped is its own.
    let (counts, stayed) = reset(&rig, &guest, &frozen, first);
    assert_eq!((stayed, counts.map_cleared), (0, 2));
    // And a stranger.
    let stranger = rig.guest(PAGES);
    (0..PAGES).for_each(|page| rig.store(&stranger, at(page, 0), 77).unwrap());
    let (counts, stayed) = reset(&rig, &stranger, &kept, first);
    assert_eq!((stayed, counts.map_cleared), (0, 2));
}
