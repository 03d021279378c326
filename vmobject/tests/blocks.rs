//! Blocks: chunks of memory whose frames lie side by side, mapped whole where they are only read, and what becomes of a
//! block when something is done to one of its pages. All counts are exact.

use vmobject::addr::{CHUNK_PAGES, IpaRange, Pfn};
use vmobject::lock::Held;
use vmobject::map::Share;
use vmobject::page::Owner;
use vmobject::pmap::Pmap as _;
use vmobject::prot::Prot;
use vmobject::store::StoreId;
use vmobject::testing::{Rig, TestMap, at, byte_of};

const CHUNK: u32 = CHUNK_PAGES;
const IMAGE: StoreId = StoreId(5);

fn frame_of(map: &TestMap, page: u32) -> Option<Pfn> {
    Some(map.with_pmap(&mut Held::root(), |pmap| pmap.lookup(at(page, 0)))?.frame)
}

fn blocks(map: &TestMap) -> u32 {
    map.with_pmap(&mut Held::root(), |pmap| pmap.blocks())
}

fn broken(map: &TestMap) -> u32 {
    map.with_pmap(&mut Held::root(), |pmap| pmap.broken)
}

fn entered(map: &TestMap) -> u32 {
    map.with_pmap(&mut Held::root(), |pmap| pmap.entered)
}

fn reads_well(rig: &Rig, map: &TestMap, pages: core::ops::Range<u32>) {
    for page in pages {
        assert_eq!(rig.load(map, at(page, 77)), Ok(byte_of(page)), "page {page}");
    }
}

/// A guest of so many chunks that has written all of them, and a clone of it.
fn family(rig: &Rig, chunks: u32) -> [TestMap; 2] {
    let guest = rig.guest(chunks * CHUNK);
    rig.fill(&guest, 0..chunks * CHUNK);
    let clone = rig.clone(&guest);
    [guest, clone]
}

#[test]
fn a_chunk_that_is_touched_in_any_order_lies_side_by_side() {
    let rig = Rig::new(8 * CHUNK);
    let (one, other) = (rig.guest(2 * CHUNK), rig.guest(2 * CHUNK));
    for n in 0..2 * CHUNK {
        // Two guests in turns, each all over its memory.
        let page = n * 389 % (2 * CHUNK);
        for guest in [&one, &other] {
            rig.store(guest, at(page, 0), 1).unwrap();
        }
    }
    for guest in [&one, &other] {
        for page in 0..2 * CHUNK {
            let first = frame_of(guest, page / CHUNK * CHUNK).unwrap();
            assert!(first.is_chunk_aligned());
            assert_eq!(frame_of(guest, page), first.checked_add(page % CHUNK));
        }
    }
    assert_eq!(rig.vm.whole_runs(&mut Held::root()), 4);
    rig.check();
    rig.destroy(one);
    rig.destroy(other);
    assert_eq!(rig.vm.whole_runs(&mut Held::root()), 8, "what is given back is whole again");
}

/// A guest, and a line of descendants each of which writes its one page and has the next; the youngest has written nothing.
fn line(rig: &Rig, chunks: u32, own: &[u32]) -> Vec<TestMap> {
    let [guest, child] = family(rig, chunks);
    let mut line = vec![guest, child];
    for &page in own {
        assert_eq!(rig.store(&line[line.len() - 1], at(page, 77), 200), Ok(()));
        let next = rig.clone(&line[line.len() - 1]);
        line.push(next);
    }
    line
}

#[test]
fn a_block_is_shown_through_any_number_of_generations_that_have_nothing_of_it() {
    let rig = Rig::new(16 * CHUNK);
    // Few enough to be passed one by one, and so many that a trail is laid.
    for generations in [2, 3, 12] {
        let own: Vec<u32> = (0..generations).map(|page| CHUNK + page).collect();
        let line = line(&rig, 2, &own);
        let youngest = &line[line.len() - 1];
        rig.store(youngest, at(CHUNK + 500, 77), 100).unwrap();
        reads_well(&rig, youngest, 0..CHUNK);
        let stats = youngest.stats();
        assert_eq!((stats.fault_shared, stats.block_mapped, blocks(youngest)), (1, 1, 1), "{generations}");
        reads_well(&rig, youngest, CHUNK + generations..CHUNK + 500);
        for page in own {
            assert_eq!(rig.load(youngest, at(page, 77)), Ok(200), "page {page} of {generations}");
        }
        assert_eq!(blocks(youngest), 1, "where the others have a page each there is none");
        rig.check();
        line.into_iter().for_each(|map| rig.destroy(map));
        assert_eq!(rig.free(), 16 * CHUNK);
    }
}

#[test]
fn neighbours_are_mapped_along_from_however_far_below_and_never_over_what_lies_between() {
    let rig = Rig::new(16 * CHUNK);
    for generations in [2, 3, 12] {
        let own: Vec<u32> = (0..generations).map(|nth| 5 + 3 * nth).collect();
        let line = line(&rig, 1, &own);
        let youngest = &line[line.len() - 1];
        rig.store(youngest, at(63, 77), 100).unwrap();
        reads_well(&rig, youngest, 0..1);
        assert_eq!(youngest.stats().around, u64::from(64 - 1 - 1 - generations), "of {generations}");
        assert_eq!(rig.load(youngest, at(63, 77)), Ok(100));
        for page in 0..63 {
            let byte = if own.contains(&page) { 200 } else { byte_of(page) };
            assert_eq!(rig.load(youngest, at(page, 77)), Ok(byte), "page {page} of {generations}");
        }
        reads_well(&rig, youngest, 64..CHUNK);
        // The oldest of a window are one fault, what each of those between has is one more, as the way there is laid.
        assert!(youngest.stats().fault_shared <= u64::from(8 + generations), "{generations}");
        rig.check();
        line.into_iter().for_each(|map| rig.destroy(map));
        assert_eq!(rig.free(), 16 * CHUNK);
    }
}

#[test]
fn memory_that_begins_within_a_window_brings_its_neighbours_from_below_as_well() {
    let rig = Rig::new(1024);
    let object = rig.anonymous(100);
    let mut line = vec![rig.map()];
    rig.put(&line[0], 10, 100, object, 0, Prot::ALL, Share::Shared).unwrap();
    rig.fill(&line[0], 10..110);
    for page in [100, 20, 101] {
        let next = rig.clone(&line[line.len() - 1]);
        rig.store(&next, at(page, 77), 200).unwrap();
        line.push(next);
    }
    let youngest = &line[3];
    reads_well(&rig, youngest, 10..11);
    assert_eq!(youngest.stats().around, 64 - 10 - 1 - 1, "all that is there but one");
    reads_well(&rig, youngest, 11..20);
    assert_eq!(rig.load(youngest, at(20, 77)), Ok(200));
    reads_well(&rig, youngest, 21..100);
    rig.check();
    line.into_iter().for_each(|map| rig.destroy(map));
    assert_eq!(rig.free(), 1024);
}

#[test]
fn where_no_two_mebibytes_are_free_pages_get_what_there_is() {
    let rig = Rig::new(2 * CHUNK);
    // Two guests, a page in each 2 MiB there are; then no chunk that begins finds any.
    let others = [(); 2].map(|()| {
        let other = rig.guest(CHUNK);
        rig.store(&other, at(3, 0), 1).unwrap();
        other
    });
    assert_eq!(rig.vm.whole_runs(&mut Held::root()), 0);
    let guest = rig.guest(CHUNK);
    rig.fill(&guest, 0..CHUNK);
    rig.check();
    let clone = rig.clone(&guest);
    reads_well(&rig, &clone, 0..CHUNK);
    assert_eq!(clone.stats().block_mapped, 0);
    assert_eq!(clone.stats().fault_shared, 8, "64 pages at a time, as ever");
    [guest, clone].into_iter().chain(others).for_each(|map| rig.destroy(map));
    assert_eq!(rig.free(), 2 * CHUNK);
}

#[test]
fn a_fresh_clone_maps_a_whole_chunk_by_one_fault() {
    let rig = Rig::new(8 * CHUNK);
    let [guest, clone] = family(&rig, 2);
    reads_well(&rig, &clone, 0..2 * CHUNK);
    let stats = clone.stats();
    assert_eq!((stats.fault_shared, stats.block_mapped, stats.around), (2, 2, 0));
    assert_eq!((entered(&clone), blocks(&clone)), (2, 2));
    // A clone of the clone, which has written nothing: the same.
    let grandchild = rig.clone(&clone);
    reads_well(&rig, &grandchild, 0..2 * CHUNK);
    assert_eq!((grandchild.stats().fault_shared, blocks(&grandchild)), (2, 2));
    assert_eq!(rig.vm.whole_runs(&mut Held::root()), 6);
    rig.check();
    [guest, clone, grandchild].into_iter().for_each(|map| rig.destroy(map));
    assert_eq!(rig.free(), 8 * CHUNK);
}

#[test]
fn a_write_breaks_a_block_and_copies_one_page() {
    let rig = Rig::new(8 * CHUNK);
    let [guest, clone] = family(&rig, 2);
    reads_well(&rig, &clone, 0..2 * CHUNK);
    rig.store(&clone, at(7, 0), 200).unwrap();
    assert_eq!((blocks(&clone), broken(&clone)), (1, 1), "the other chunk stays whole");
    assert_eq!(clone.stats().fault_copy, 1);
    let faults = clone.stats().fault_shared;
    assert_eq!(rig.load(&clone, at(7, 0)), Ok(200));
    reads_well(&rig, &clone, 0..7);
    reads_well(&rig, &clone, 8..2 * CHUNK);
    reads_well(&rig, &guest, 0..2 * CHUNK);
    assert_eq!(clone.stats().fault_shared, faults, "what was mapped stays so");
    // One that had nothing mapped there has a page of its own and no block over it.
    let second = rig.clone(&guest);
    rig.store(&second, at(7, 0), 201).unwrap();
    reads_well(&rig, &second, 0..7);
    assert_eq!((second.stats().block_mapped, rig.load(&second, at(7, 0))), (0, Ok(201)));
    rig.check();
}

#[test]
fn what_hardware_knows_of_a_page_of_ones_own_is_never_a_blocks() {
    let rig = Rig::new(4 * CHUNK);
    let guest = rig.guest(CHUNK);
    rig.fill(&guest, 0..CHUNK);
    let range = IpaRange::from_pages(at(0, 0), CHUNK).unwrap();
    guest.with_pmap(&mut Held::root(), |pmap| pmap.remove(range, &mut |_| {}));
    reads_well(&rig, &guest, 0..CHUNK);
    assert_eq!((guest.stats().block_mapped, guest.stats().fault_resident), (0, 8));
    // Where it may only read it may have one; and loses it when it may write again.
    let held = &mut Held::root();
    rig.vm.protect(&guest, range, Prot::READ, held).unwrap();
    guest.with_pmap(held, |pmap| pmap.remove(range, &mut |_| {}));
    reads_well(&rig, &guest, 0..CHUNK);
    assert_eq!((guest.stats().block_mapped, guest.stats().fault_resident), (1, 9));
    rig.vm.protect(&guest, range, Prot::ALL, held).unwrap();
    rig.store(&guest, at(70, 0), 1).unwrap();
    assert_eq!((blocks(&guest), rig.load(&guest, at(71, 77))), (0, Ok(byte_of(71))));
    rig.check();
}

#[test]
fn a_block_is_parked_with_the_rest_and_a_page_that_is_written_then_is_its_writers() {
    let rig = Rig::new(8 * CHUNK);
    let [guest, clone] = family(&rig, 1);
    reads_well(&rig, &clone, 0..CHUNK);
    let grandchild = rig.clone(&clone);
    assert_eq!(blocks(&clone), 1);
    reads_well(&rig, &grandchild, 0..CHUNK);
    for (value, map) in [(101, &clone), (102, &grandchild), (103, &guest)] {
        rig.store(map, at(400, 0), value).unwrap();
    }
    for (value, map) in [(101, &clone), (102, &grandchild), (103, &guest)] {
        assert_eq!(rig.load(map, at(400, 0)), Ok(value));
        reads_well(&rig, map, 0..400);
        reads_well(&rig, map, 401..CHUNK);
    }
    assert_eq!((broken(&clone), broken(&grandchild)), (1, 1));
    rig.check();
    rig.destroy(guest);
    rig.destroy(clone);
    rig.settle();
    reads_well(&rig, &grandchild, 0..400);
    rig.check();
    rig.destroy(grandchild);
    assert_eq!(rig.free(), 8 * CHUNK);
}

#[test]
fn a_page_that_is_discarded_or_written_by_el2_leaves_its_block() {
    let rig = Rig::new(8 * CHUNK);
    let [_guest, clone] = family(&rig, 2);
    reads_well(&rig, &clone, 0..2 * CHUNK);
    rig.discard(&clone, 5, 1).unwrap();
    assert_eq!((rig.load(&clone, at(5, 0)), rig.load(&clone, at(6, 77))), (Ok(0), Ok(byte_of(6))));
    rig.write(&clone, at(CHUNK + 5, 0), &[99]).unwrap();
    assert_eq!(rig.load(&clone, at(CHUNK + 5, 0)), Ok(99));
    assert_eq!((blocks(&clone), broken(&clone)), (0, 2));
    reads_well(&rig, &clone, CHUNK + 6..2 * CHUNK);
    rig.check();
}

#[test]
fn pageout_takes_a_block_away_whole_and_what_is_used_comes_back_page_by_page() {
    let rig = Rig::with_swap(8 * CHUNK, 4 * CHUNK);
    let [guest, clone] = family(&rig, 1);
    let other = rig.clone(&guest);
    for map in [&clone, &other] {
        reads_well(&rig, map, 0..CHUNK);
        assert_eq!(blocks(map), 1);
    }
    // Nobody has a leaf any more when the first page has been looked at; not a table is needed for that.
    rig.vm.set_free_target(u32::MAX, u32::MAX);
    while rig.vm.stats().block_taken < 2 {
        assert!(rig.vm.pageout(1, &mut Held::root()).more);
    }
    assert_eq!((blocks(&clone), blocks(&other), broken(&clone)), (0, 0, 0));
    assert_eq!(rig.vm.stats().evicted, 0);
    // While memory is short no block is entered.
    reads_well(&rig, &clone, 0..CHUNK);
    assert_eq!((clone.stats().block_mapped, clone.stats().fault_shared), (1, 9));
    rig.page_out_all();
    assert_eq!(rig.vm.stats().evicted, u64::from(CHUNK));
    rig.ease();
    reads_well(&rig, &other, 0..CHUNK);
    rig.check();
    // All came back to where it was, and a new clone has it whole.
    let fresh = rig.clone(&guest);
    reads_well(&rig, &fresh, 0..CHUNK);
    assert_eq!((fresh.stats().fault_shared, fresh.stats().block_mapped), (1, 1));
    rig.check();
}

#[test]
fn a_page_that_a_transfer_has_or_pageout_has_in_hand_is_in_no_new_block() {
    let rig = Rig::with_swap(8 * CHUNK, 4 * CHUNK);
    let [guest, clone] = family(&rig, 1);
    rig.page_out();
    assert!(rig.vm.machine().store.requests().len() > 1, "some are on their way out");
    rig.ease();
    rig.load(&clone, at(0, 0)).unwrap();
    assert_eq!(clone.stats().block_mapped, 0);
    rig.page_out_all();
    rig.ease();
    reads_well(&rig, &guest, 0..CHUNK);
    let fresh = rig.clone(&guest);
    rig.load(&fresh, at(0, 0)).unwrap();
    assert_eq!(fresh.stats().block_mapped, 1);
    rig.check();
}

#[test]
fn a_page_of_another_frame_in_the_middle_is_seen_once_and_then_remembered() {
    let rig = Rig::with_swap(8 * CHUNK, 4 * CHUNK);
    let guest = rig.guest(CHUNK);
    rig.fill(&guest, 0..300);
    // Somebody else has the frame that the next page would have.
    let next = frame_of(&guest, 299).unwrap().checked_add(1).unwrap();
    let mut others = Vec::new();
    while rig.vm.owner(next) == Owner::Free {
        others.push(rig.vm.alloc_table_frame().unwrap());
    }
    assert_eq!(others.pop(), Some(next));
    others.into_iter().for_each(|frame| rig.vm.free_table_frame(frame));
    rig.fill(&guest, 300..CHUNK);
    rig.vm.free_table_frame(next);
    assert_ne!(frame_of(&guest, 300), Some(next));
    assert_eq!(frame_of(&guest, 301), next.checked_add(1), "its neighbours lie where they would");
    let clone = rig.clone(&guest);
    reads_well(&rig, &clone, 0..CHUNK);
    assert_eq!((clone.stats().block_mapped, clone.stats().fault_shared), (0, 8));
    // It goes to swap with the others, and comes back to its place.
    rig.destroy(clone);
    rig.page_out_all();
    rig.ease();
    reads_well(&rig, &guest, 0..CHUNK);
    let clone = rig.clone(&guest);
    reads_well(&rig, &clone, 0..CHUNK);
    assert_eq!((clone.stats().block_mapped, clone.stats().fault_shared), (1, 1));
    rig.check();
}

#[test]
fn only_what_an_entry_shows_whole_is_mapped_whole_and_only_if_it_lies_right() {
    let rig = Rig::new(8 * CHUNK);
    // An object that begins in the middle of a chunk: its second chunk is whole.
    let map = rig.map();
    let object = rig.anonymous(2 * CHUNK);
    rig.put(&map, CHUNK / 2, 2 * CHUNK, object, 0, Prot::ALL, Share::Shared).unwrap();
    rig.fill(&map, CHUNK / 2..2 * CHUNK + CHUNK / 2);
    let clone = rig.clone(&map);
    reads_well(&rig, &clone, CHUNK / 2..2 * CHUNK + CHUNK / 2);
    assert_eq!((clone.stats().block_mapped, blocks(&clone)), (1, 1));
    assert_eq!(clone.stats().fault_shared, 4 + 1 + 4);
    rig.check();
}

#[test]
fn an_image_that_is_only_read_is_mapped_whole_once_it_is_there() {
    let rig = Rig::new(4 * CHUNK);
    let bytes = (0..CHUNK).flat_map(|page| [byte_of(page); 4096]);
    rig.vm.machine().store.add(IMAGE, bytes.collect());
    let open = || {
        let map = rig.map();
        let image = rig.vm.image(IMAGE, &mut Held::root()).unwrap();
        rig.put(&map, 0, CHUNK, image, 0, Prot::READ, Share::Shared).unwrap();
        map
    };
    let (first, second) = (open(), open());
    reads_well(&rig, &first, 0..CHUNK);
    assert_eq!(first.stats().block_mapped, 0, "it came a cluster at a time");
    reads_well(&rig, &second, 0..CHUNK);
    assert_eq!((second.stats().block_mapped, entered(&second)), (1, 1));
    rig.check();
}

#[test]
fn the_first_and_the_last_page_of_a_block_are_like_the_others() {
    let rig = Rig::new(4 * CHUNK);
    let [_guest, clone] = family(&rig, 1);
    reads_well(&rig, &clone, 0..CHUNK);
    rig.store(&clone, at(0, 0), 5).unwrap();
    rig.store(&clone, at(CHUNK - 1, 0), 6).unwrap();
    assert_eq!([0, CHUNK - 1].map(|page| rig.load(&clone, at(page, 0))), [Ok(5), Ok(6)]);
    reads_well(&rig, &clone, 1..CHUNK - 1);
    assert_eq!(clone.stats().fault_shared, 1);
    rig.check();
}
