//! Blocks of 2 MiB: mapped, broken, and what the hardware does to one meanwhile.

use stage2::Stage2;
use stage2::geometry::{Features, Geometry};
use stage2::testing::cpus::{CORTEX_A53, CORTEX_A710, NEOVERSE_N1};
use stage2::testing::{Access, Frames, Guest, Meanwhile, Mmu, Op};
use vmobject::addr::{CHUNK_PAGES, CHUNK_SIZE, Ipa, IpaRange, PAGE_SIZE, Pfn};
use vmobject::pmap::{OutOfTables, Pmap as _};
use vmobject::prot::Prot;

const RAM: Ipa = Ipa::new(0x4000_0000);
const FIRST: Pfn = Pfn::new(0x10_0000);

fn page(n: u64) -> Ipa {
    Ipa::new(RAM.bits() + n * PAGE_SIZE)
}

fn range(first: u64, pages: u32) -> IpaRange {
    IpaRange::from_pages(page(first), pages).expect("in order")
}

/// A guest with one block, not written.
fn guest(features: Features) -> Guest {
    let mut guest = Guest::alone(features);
    guest.enter_block(RAM, FIRST, Prot::ALL).expect("the model holds").expect("there are tables");
    guest.mmu.take_trace();
    guest
}

#[test]
fn a_block_maps_all_of_its_pages_in_order_with_one_entry() {
    let mut guest = guest(NEOVERSE_N1);
    assert_eq!(guest.tables.tables(), 2, "a root and the table that the block is in");
    for n in [0, 1, 255, 511] {
        let frame = FIRST.checked_add(n);
        assert_eq!(guest.access(0, page(n.into()), Access::Write), Ok(frame));
    }
    assert!(guest.tables.lookup(RAM).is_some_and(|leaf| leaf.block));
}

#[test]
fn a_block_is_broken_with_an_invalid_entry_between_unless_the_cpu_needs_none() {
    for (features, barriers_after) in [(CORTEX_A53, 2), (NEOVERSE_N1, 2), (CORTEX_A710, 0)] {
        let mut guest = guest(features);
        guest.access(1, page(7), Access::Read).expect("the model holds");
        guest.mmu.take_trace();
        guest.remove(range(3, 1)).expect("the model holds");
        let both_halves = [Op::DsbIshst, Op::Ipas2e1is, Op::DsbIsh, Op::Vmalle1is, Op::DsbIsh, Op::Isb];
        let mut sequence: Vec<Op> = Vec::new();
        if features.break_in_place {
            sequence.push(Op::DsbIshst); // the table's entries, before anybody can find it
        }
        sequence.extend(both_halves); // the block
        sequence.extend([Op::DsbIshst; 2].iter().take(barriers_after));
        sequence.extend(both_halves); // the page
        assert_eq!(guest.mmu.take_trace(), sequence);
        assert!(guest.mmu.access(0, page(3), Access::Read).is_err());
        assert_eq!(guest.access(0, page(4), Access::Write), Ok(FIRST.checked_add(4)));
    }
}

#[test]
fn every_page_of_a_written_block_is_dirty_after_it_was_broken() {
    for features in [CORTEX_A53, NEOVERSE_N1, CORTEX_A710] {
        let mut guest = guest(features);
        guest.access(0, page(9), Access::Write).expect("the model holds");
        guest.remove(range(0, 1)).expect("the model holds");
        guest.remove(range(1, CHUNK_PAGES - 1)).expect("the model holds");
        assert_eq!(
            guest.harvest.iter().filter(|h| h.dirty).count(),
            511,
            "any of them may have been written"
        );
    }
}

#[test]
fn protecting_a_part_of_a_block_leaves_the_rest_as_it_was() {
    let mut guest = guest(NEOVERSE_N1);
    guest.protect(range(100, 20), Prot::READ).expect("the model holds");
    for (n, prot) in [(99, Prot::ALL), (100, Prot::READ), (119, Prot::READ), (120, Prot::ALL)] {
        assert_eq!(guest.tables.lookup(page(n)).map(|leaf| leaf.prot), Some(prot), "page {n}");
    }
}

#[test]
fn a_whole_block_is_removed_without_a_table() {
    let mut guest = guest(NEOVERSE_N1);
    guest.frames.limit(guest.frames.in_use());
    guest.remove(range(0, CHUNK_PAGES)).expect("the model holds");
    assert_eq!(guest.harvest.len(), 512);
}

#[test]
fn where_no_table_can_be_had_a_block_is_forgotten_whole_and_told_whole() {
    let mut guest = guest(NEOVERSE_N1);
    guest.may_forget();
    guest.access(0, page(9), Access::Write).expect("the model holds");
    guest.frames.limit(guest.frames.in_use());
    guest.remove(range(3, 1)).expect("the model holds");
    assert_eq!(guest.harvest.iter().filter(|h| h.dirty).count(), 512);
    assert_eq!(guest.tables.lookup(page(4)), None, "it will be faulted back");
}

#[test]
fn a_block_over_pages_gives_their_table_back_and_tells_what_they_remember() {
    let mut guest = Guest::alone(NEOVERSE_N1);
    for n in 0..3 {
        let frame = Pfn::new(0x77).checked_add(n).expect("it fits");
        guest.enter(page(n.into()), frame, Prot::ALL).expect("the model holds").expect("there are tables");
    }
    guest.access(0, page(1), Access::Write).expect("the model holds");
    assert_eq!(guest.tables.tables(), 3);
    guest.enter_block(RAM, FIRST, Prot::ALL).expect("the model holds").expect("there are tables");
    assert_eq!(guest.tables.tables(), 2);
    let dirty: Vec<Ipa> = guest.harvest.iter().filter(|h| h.dirty).map(|h| h.at).collect();
    assert_eq!(dirty, [page(1)]);
}

#[test]
fn a_page_that_is_taken_out_of_a_block_leaves_the_others_mapped() {
    for parked in [false, true] {
        let mut guest = guest(NEOVERSE_N1);
        if parked {
            guest.park().expect("the model holds");
        }
        guest.remove_pages(&[page(3), page(5)]).expect("the model holds");
        for n in 0..CHUNK_PAGES {
            let leaf = guest.tables.lookup(page(n.into()));
            assert_eq!(leaf.is_none(), n == 3 || n == 5, "page {n}");
        }
    }
}

#[test]
fn pages_here_and_there_are_taken_out_of_one_block_at_a_time() {
    let mut guest = guest(NEOVERSE_N1);
    let (next, first) = (page(CHUNK_PAGES.into()), FIRST.checked_add(CHUNK_PAGES).expect("a frame"));
    guest.enter_block(next, first, Prot::ALL).expect("the model holds").expect("there are tables");
    let mut pages = [3, 5, 512 + 3, 512 + 5].map(page).into_iter();
    for left in [3, 1, 0] {
        guest.tables.remove_pages(&mut pages, &mut |_| {});
        assert_eq!(pages.len(), left);
    }
    assert!([3, 5, 512 + 3, 512 + 5].iter().all(|&n| guest.tables.lookup(page(n)).is_none()));
}

#[test]
fn a_fault_that_a_block_serves_leaves_it_whole() {
    let mut guest = guest(CORTEX_A53);
    guest.age(range(0, CHUNK_PAGES)).expect("the model holds");
    assert_eq!(guest.access(0, page(17), Access::Write), Ok(FIRST.checked_add(17)));
    assert!(guest.tables.lookup(page(17)).is_some_and(|leaf| leaf.block));
}

#[test]
fn a_parked_block_is_write_protected_when_its_table_is_opened() {
    let mut guest = guest(NEOVERSE_N1);
    guest.access(0, page(5), Access::Write).expect("the model holds");
    guest.park().expect("the model holds");
    let next = Ipa::new(RAM.bits() + CHUNK_SIZE);
    guest.enter(next, Pfn::new(0x55), Prot::ALL).expect("the model holds").expect("there are tables");
    assert!(!guest.raw(page(5)).expect("it is open").allows[1]);
    guest.remove(range(0, CHUNK_PAGES)).expect("the model holds");
    assert!(guest.harvest.iter().all(|h| h.dirty), "it was written before");
}

#[test]
fn a_page_that_is_written_while_its_block_is_broken_stays_dirty() -> Result<(), OutOfTables> {
    // Every lookup of a break, and of the removal of a page that follows.
    let moments = 1..2 * CHUNK_PAGES;
    for features in [NEOVERSE_N1, CORTEX_A710] {
        let geometry = Geometry::new(features);
        let mut written = 0;
        for moment in moments.clone() {
            let frames = Frames::new(4);
            let mmu = Mmu::new(&frames, geometry, 2);
            let source = Meanwhile::new(frames, mmu.clone(), 1, page(200));
            let mut tables = Stage2::new(source.clone(), mmu.clone(), geometry)?;
            tables.set_vmid(1);
            mmu.run(1, tables.vttbr());
            tables.enter_block(RAM, FIRST, Prot::ALL, &mut |_| {})?;
            source.write_before(moment);
            tables.remove(range(0, 1), &mut |_| {});
            source.write_before(0);
            let mut told = false;
            tables.remove(range(1, CHUNK_PAGES - 1), &mut |h| told |= h.at == page(200) && h.dirty);
            mmu.audit().expect("no cache knows more than the tables");
            let wrote = source.wrote();
            assert!(told || !wrote, "{moment}: the write is forgotten");
            written += u32::from(wrote);
        }
        assert!(written > 0, "it was never written in time");
    }
    Ok(())
}

#[test]
fn a_page_that_takes_the_place_of_a_blocks_costs_one_invalidate_and_is_told_alone() {
    for (features, barriers) in [(CORTEX_A53, [0, 3]), (NEOVERSE_N1, [0, 3]), (CORTEX_A710, [1, 1])] {
        let mut guest = guest(features);
        guest.access(1, page(7), Access::Write).expect("the model holds");
        guest.mmu.take_trace();
        let other = Pfn::new(0x77);
        guest.enter(page(7), other, Prot::ALL).expect("the model holds").expect("there are tables");
        let mut sequence = vec![Op::DsbIshst; barriers[0]];
        sequence.extend([Op::DsbIshst, Op::Ipas2e1is, Op::DsbIsh, Op::Vmalle1is, Op::DsbIsh, Op::Isb]);
        sequence.extend([Op::DsbIshst].repeat(barriers[1]));
        assert_eq!(guest.mmu.take_trace(), sequence);
        assert_eq!(guest.harvest.iter().map(|h| (h.at, h.dirty)).collect::<Vec<_>>(), [(page(7), true)]);
        assert_eq!(guest.access(0, page(7), Access::Write), Ok(Some(other)));
        assert_eq!(guest.access(0, page(8), Access::Write), Ok(FIRST.checked_add(8)));
        assert_eq!(guest.tables.blocks(), 0);
    }
}
