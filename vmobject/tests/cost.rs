//! What things cost, in counts: slots and objects looked at, leaves visited, bytes of books.
//!
//! `cargo test -p vmobject --test cost -- --nocapture` shows the figures. Counts repeat exactly, so each is held to a
//! bound that follows from what the operation has to do and not from how large the memory around it is.

#![expect(clippy::unwrap_used, reason = "a test may fail")]

use vmobject::addr::CHUNK_PAGES;
use vmobject::fault::{Copied, WaitFor};
use vmobject::limits::{TRAIL_PART, TRAIL_STRIDE};
use vmobject::lock::Held;
use vmobject::map::{Entry, Share, Snapshot};
use vmobject::prot::Prot;
use vmobject::stats::Counts;
use vmobject::testing::{FakePmap, Rig, TestMap, at};

const DEPTHS: [u32; 4] = [1, 16, 256, 2314];

/// A guest over `depth` live generations, each kept by a snapshot and holding one page: the one that `page`
/// says. The last page of the first and second chunk is in the oldest of them all.
fn history(depth: u32, page: impl Fn(u32) -> u32) -> (Rig, TestMap, Vec<Snapshot>) {
    let rig = Rig::new(8192);
    let guest = rig.guest(4 * CHUNK_PAGES);
    rig.store(&guest, at(CHUNK_PAGES - 1, 0), 7).unwrap();
    rig.store(&guest, at(2 * CHUNK_PAGES - 1, 0), 8).unwrap();
    let mut kept = Vec::new();
    for generation in 0..depth {
        rig.store(&guest, at(page(generation), 0), u8::try_from(generation % 200).unwrap() + 1).unwrap();
        kept.push(rig.vm.snapshot(&guest, &mut Held::root()).unwrap());
    }
    rig.destroy(guest);
    // A guest that has mapped nothing yet.
    let guest = rig.vm.map_snapshot(kept.last().unwrap(), FakePmap::default(), &mut Held::root()).unwrap();
    rig.store(&guest, at(4 * CHUNK_PAGES - 1, 0), 1).unwrap();
    (rig, guest, kept)
}

#[test]
fn trails_lead_to_the_right_pages_wherever_in_a_chunk_an_object_begins() {
    const DEPTH: u32 = 200;
    for before in [1, 64, 300, 511] {
        let rig = Rig::new(8192);
        let guest = rig.map();
        let (object, pages) = (rig.anonymous(3 * CHUNK_PAGES), 3 * CHUNK_PAGES);
        rig.put(&guest, before, pages, object, 0, Prot::ALL, Share::Shared).unwrap();
        // Pages of the object at both of its ends, on both sides of borders of chunks, and in between.
        let written: Vec<u32> = (0..DEPTH)
            .map(|generation| match generation % 5 {
                0 => generation % 2,
                1 => pages - 1 - generation % 2,
                2 => CHUNK_PAGES - before - generation % 2,
                3 => 2 * CHUNK_PAGES - before - generation % 2,
                _ => (generation * 211) % pages,
            })
            .map(|page| page.min(pages - 1))
            .collect();
        let mut kept = Vec::new();
        let mut wanted = std::collections::BTreeMap::new();
        for (byte, page) in (1..).zip(&written) {
            rig.store(&guest, at(before + page, 0), byte).unwrap();
            wanted.insert(page, byte);
            kept.push(rig.vm.snapshot(&guest, &mut Held::root()).unwrap());
        }
        rig.destroy(guest);
        // A guest that has mapped nothing yet.
        let guest =
            rig.vm.map_snapshot(kept.last().unwrap(), FakePmap::default(), &mut Held::root()).unwrap();
        for page in 0..pages {
            let byte = wanted.get(&page).copied().unwrap_or(0);
            assert_eq!(rig.load(&guest, at(before + page, 0)), Ok(byte), "page {page} after {before}");
        }
        rig.check();
    }
}

fn visited(rig: &Rig, what: impl FnOnce()) -> u64 {
    let before = rig.vm.stats().chain_visited;
    what();
    rig.vm.stats().chain_visited - before
}

#[test]
fn generations_that_hold_nothing_of_a_chunk_are_passed_once_and_then_cost_what_one_costs() {
    for depth in DEPTHS {
        let (rig, guest, _kept) = history(depth, |generation| 3 * CHUNK_PAGES + generation % 500);
        let first = visited(&rig, || assert_eq!(rig.load(&guest, at(CHUNK_PAGES - 1, 0)), Ok(7)));
        assert!(first >= u64::from(depth) && first <= 2 * u64::from(depth) + 2, "depth {depth}: {first}");
        let more = visited(&rig, || {
            for page in 0..100 {
                assert_eq!(rig.load(&guest, at(page, 0)), Ok(0), "nobody has it");
            }
        });
        let bound = if depth <= TRAIL_STRIDE { 100 * u64::from(depth) } else { 0 };
        assert!(more <= bound, "depth {depth}: {more} objects for 100 faults");
        println!(
            "depth {depth}: {first} objects for the first fault in a chunk, {more} for the next hundred"
        );
        rig.check();
    }
}

#[test]
fn where_each_generation_holds_another_page_of_the_chunk_what_a_fault_comes_by_does_not_grow() {
    for depth in DEPTHS {
        let (rig, guest, _kept) = history(depth, |generation| generation % (CHUNK_PAGES - 1));
        let first = visited(&rig, || assert_eq!(rig.load(&guest, at(CHUNK_PAGES - 1, 0)), Ok(7)));
        let mut worst = 0;
        for page in 0..CHUNK_PAGES - 1 {
            let newest = (0..depth).rev().find(|generation| generation % (CHUNK_PAGES - 1) == page);
            let wanted = newest.map_or(0, |generation| u8::try_from(generation % 200).unwrap() + 1);
            let cost = visited(&rig, || assert_eq!(rig.load(&guest, at(page, 0)), Ok(wanted), "page {page}"));
            worst = worst.max(cost);
        }
        let bound = depth.min(2 * TRAIL_STRIDE + 1); // to an older generation's trail, and its stretch
        assert!(worst <= u64::from(bound), "depth {depth}: {worst}");
        println!("depth {depth}: {first} objects for the first fault in a chunk, then {worst} at worst");
        rig.check();
    }
}

#[test]
fn in_a_history_of_sparse_writes_a_fault_comes_by_no_more_objects_the_longer_it_is() {
    const CHUNKS: u32 = 8;
    let rig = Rig::new(16384);
    let guest = rig.guest(CHUNKS * CHUNK_PAGES);
    let mut kept = Vec::new();
    for generations in [200, 400, 800, 1600] {
        let before = rig.vm.stats();
        while kept.len() < generations {
            for write in 0..4 {
                let step = u32::try_from(4 * kept.len() + write).unwrap().wrapping_mul(2_654_435_761);
                rig.store(&guest, at((step >> 8) % (CHUNKS * CHUNK_PAGES), 0), 1).unwrap();
            }
            kept.push(rig.vm.snapshot(&guest, &mut Held::root()).unwrap());
        }
        let after = rig.vm.stats();
        let visited = after.chain_visited - before.chain_visited;
        let faults = 4 * u64::try_from(generations).unwrap() / 2;
        costs(&format!("objects a fault of the generations up to {generations}"), visited / faults, 12);
    }
    rig.check();
}

#[test]
fn a_fault_comes_by_few_objects_before_interrupts_have_their_turn() {
    let (rig, guest, _kept) = history(2314, |generation| generation % (CHUNK_PAGES - 1));
    let page = at(2 * CHUNK_PAGES - 1, 0);
    let mut parts = 0;
    while guest.with_pmap(&mut Held::root(), |pmap| pmap.access(page, Prot::READ)).is_none() {
        let part = visited(&rig, || rig.fault(&guest, page, Prot::READ).unwrap());
        parts += 1;
        assert!(part <= u64::from(TRAIL_PART + TRAIL_STRIDE + 1), "part {parts}: {part} objects");
    }
    println!("{parts} parts");
    assert!(parts > 2314 / TRAIL_PART && parts < 2 * 2314 / TRAIL_PART);
}

#[test]
fn an_access_of_el2_comes_by_few_objects_before_interrupts_have_their_turn() {
    let (rig, guest, _kept) = history(2314, |generation| generation % (CHUNK_PAGES - 1));
    let (mut byte, mut parts, mut done) = ([0], 0, false);
    while !done {
        let part = visited(&rig, || {
            let read = rig.vm.read(&guest, at(2 * CHUNK_PAGES - 1, 0), &mut byte, &mut Held::root());
            assert!(matches!(read, Ok(Copied::Done | Copied::Wait(WaitFor::Turn))), "{read:?}");
            done = read == Ok(Copied::Done);
        });
        parts += 1;
        assert!(part <= u64::from(TRAIL_PART + TRAIL_STRIDE + 1), "part {parts}: {part} objects");
    }
    assert!(parts > 2314 / TRAIL_PART && parts < 2 * 2314 / TRAIL_PART);
}

#[test]
fn what_comes_to_be_in_a_generation_that_was_hopped_over_is_seen() {
    let (rig, guest, mut kept) = history(100, |generation| 3 * CHUNK_PAGES + generation % 500);
    assert_eq!(rig.load(&guest, at(CHUNK_PAGES - 1, 0)), Ok(7));
    // Every other generation goes: objects merge, and pages come to lie elsewhere.
    for generation in (0..kept.len()).rev().step_by(2) {
        rig.vm.delete_snapshot(kept.remove(generation), &mut Held::root());
        rig.settle();
        assert_eq!(rig.load(&guest, at(u32::try_from(generation).unwrap(), 0)), Ok(0));
    }
    rig.check();
    assert_eq!(rig.load(&guest, at(2 * CHUNK_PAGES - 1, 0)), Ok(8));
    kept.drain(..).for_each(|snapshot| rig.vm.delete_snapshot(snapshot, &mut Held::root()));
    rig.settle();
    assert_eq!(rig.load(&guest, at(CHUNK_PAGES - 1, 0)), Ok(7));
    assert_eq!(rig.load(&guest, at(3 * CHUNK_PAGES + 99, 0)), Ok(100));
    assert_eq!(rig.objects(), 1);
    rig.check();
}

/// A figure, told and held to its bound.
fn costs(what: &str, figure: u64, bound: u64) {
    println!("{what:<76} {figure:>6}, at most {bound:>6}");
    assert!(figure <= bound, "{what}: {figure}, at most {bound}");
}

/// What was counted while something was done.
struct Counted {
    before: Counts,
    after: Counts,
}

impl Counted {
    fn of(&self, field: fn(&Counts) -> u64) -> u64 {
        field(&self.after) - field(&self.before)
    }
}

fn counted(rig: &Rig, what: impl FnOnce()) -> Counted {
    let before = rig.vm.stats();
    what();
    Counted { before, after: rig.vm.stats() }
}

/// A guest with so many entries of 512 pages each, so many of which are there.
fn guest_of(entries: u32, pages: u32) -> (Rig, TestMap) {
    let rig = Rig::new(entries * pages + 256);
    let guest = rig.map();
    for entry in 0..entries {
        let object = rig.anonymous(CHUNK_PAGES);
        let first = 2 * entry * CHUNK_PAGES; // apart, or they would be one
        rig.put(&guest, first, CHUNK_PAGES, object, 0, Prot::ALL, Share::Shared).unwrap();
        rig.fill(&guest, first..first + pages);
    }
    (rig, guest)
}

#[test]
fn a_copy_looks_at_entries_and_at_nothing_that_lies_in_them() {
    for (entries, pages) in [(1, 1), (1, 512), (20, 1), (20, 512)] {
        let (rig, guest) = guest_of(entries, pages);
        let mut clone = None;
        let count = counted(&rig, || clone = Some(rig.clone(&guest)));
        let what =
            format!("slots, leaves, objects in chains for a copy of {entries} entries of {pages} pages");
        costs(&what, count.of(|c| c.slot_visited + c.leaf_visited + c.chain_visited), 0);
        let mut copied = 0;
        rig.vm.for_each_entry(&clone.unwrap(), &mut Held::root(), |_| copied += 1);
        assert_eq!((copied, count.of(|c| c.shadow_made)), (entries, 0));
    }
}

#[test]
fn deleting_any_generation_of_2314_looks_at_what_it_and_the_next_one_hold() {
    for generation in [0, 1, 100, 1157, 2312, 2313] {
        let (rig, guest, mut kept) = history(2314, |generation| generation % (CHUNK_PAGES - 1));
        rig.settle();
        let count = counted(&rig, || {
            rig.vm.delete_snapshot(kept.remove(generation), &mut Held::root());
            rig.settle();
        });
        costs(
            &format!("slots for deleting generation {generation} of 2314, one page each"),
            count.of(|c| c.slot_visited),
            4,
        );
        assert_eq!(count.of(|c| c.collapsed), 1);
        assert_eq!(rig.load(&guest, at(CHUNK_PAGES - 1, 0)), Ok(7));
    }
}

#[test]
fn page_remove_of_a_mebibyte_looks_at_that_mebibyte_however_large_the_object() {
    const MEBIBYTE: u32 = 256;
    for (there, pages) in [(0, 1 << 24), (MEBIBYTE, 1 << 24), (MEBIBYTE, MEBIBYTE)] {
        let rig = Rig::new(2048);
        let guest = rig.guest(pages);
        (0..pages).step_by(1 << 15).for_each(|page| rig.fill(&guest, page..page + 1));
        let first = pages / 2 / MEBIBYTE * MEBIBYTE;
        rig.fill(&guest, first..first + there);
        let present = u64::from(there.max(1));
        let count =
            counted(&rig, || assert_eq!(u64::from(rig.discard(&guest, first, 256).unwrap()), present));
        costs(
            &format!("slots for page_remove of 1 MiB, {present} pages there, in {} MiB", pages / MEBIBYTE),
            count.of(|c| c.slot_visited),
            present,
        );
    }
}

#[test]
fn a_collapse_that_was_refused_is_refused_again_without_a_look_at_any_slot() {
    let rig = Rig::new(8192);
    let guest = rig.guest(4000);
    rig.fill(&guest, 0..4000);
    let _keeper = rig.clone(&guest);
    let first = counted(&rig, || {
        rig.fill(&guest, 0..2000);
        rig.settle();
    });
    costs("slots until a bypass of 4000 pages, 2000 hidden, is refused", first.of(|c| c.slot_visited), 2001);
    let again = counted(&rig, || {
        rig.fill(&guest, 2001..4000);
        rig.settle();
    });
    costs("slots for its refusal while 1999 more are hidden", again.of(|c| c.slot_visited), 0);
}

#[test]
fn books_take_bytes_by_frame_and_entry_and_none_by_leaf() {
    const CLONES: usize = 1000;
    let (rig, guest) = guest_of(1, CHUNK_PAGES);
    let books = rig.vm.memory(&mut Held::root());
    costs("bytes by frame", (books.frame_bytes as u64).div_ceil(books.total.into()), 24);
    let mut index = 0;
    rig.vm.for_each_object(&mut Held::root(), |object| index += object.index_bytes as u64);
    costs("bytes of an object's index by page, 512 side by side", index.div_ceil(CHUNK_PAGES.into()), 8);
    let before = books.link_bytes;
    let clones: Vec<_> = (0..CLONES).map(|_| rig.clone(&guest)).collect();
    let links = (rig.vm.memory(&mut Held::root()).link_bytes - before) / CLONES;
    costs("bytes by entry of a map, the reverse map's among them", (links + size_of::<Entry>()) as u64, 128);
    let before = rig.vm.memory(&mut Held::root());
    let mut leaves = 0;
    for clone in &clones {
        (0..CHUNK_PAGES).step_by(32).for_each(|page| assert!(rig.load(clone, at(page, 77)).is_ok()));
        leaves += clone.with_pmap(&mut Held::root(), |pmap| pmap.leaves().count());
    }
    let after = rig.vm.memory(&mut Held::root());
    assert_eq!(leaves, CLONES * CHUNK_PAGES as usize);
    costs(&format!("bytes for {leaves} leaves"), (after.link_bytes - before.link_bytes) as u64, 0);
    assert_eq!((after.frame_bytes, after.objects), (before.frame_bytes, before.objects));
}

#[test]
fn an_audit_looks_into_tables_once_a_leaf_and_once_an_entry_however_much_is_not_mapped() {
    for relatives in [10, 200] {
        let rig = Rig::new(4096);
        let guest = rig.guest(1 << 20);
        rig.fill(&guest, 0..64);
        let mut family: Vec<TestMap> = (0..relatives).map(|_| rig.clone(&guest)).collect();
        family.iter().for_each(|clone| rig.fill(clone, 3..5));
        family.push(guest);
        let looked = |map: &TestMap| {
            map.with_pmap(&mut Held::root(), |pmap| {
                u64::from(pmap.looked.load(std::sync::atomic::Ordering::Relaxed))
            })
        };
        let before: u64 = family.iter().map(looked).sum();
        let audit = rig.vm.check(&mut Held::root()).unwrap();
        let looks = family.iter().map(looked).sum::<u64>() - before;
        assert!(audit.leaves > 2 * relatives);
        costs(
            &format!("looks into tables by an audit of {} relatives", family.len()),
            looks,
            audit.leaves + u64::from(audit.entries),
        );
    }
}
