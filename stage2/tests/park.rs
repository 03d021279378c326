//! Parking: what a clone costs its source at once, what it costs later, and that nothing is forgotten meanwhile.

use stage2::testing::cpus::{CORTEX_A53, NEOVERSE_N1};
use stage2::testing::{Access, Guest, Op};
use vmobject::addr::{CHUNK_PAGES, CHUNK_SIZE, Ipa, IpaRange, PAGE_SIZE, Pfn};
use vmobject::pmap::Pmap as _;
use vmobject::prot::Prot;

const RAM: Ipa = Ipa::new(0x4000_0000);
const ONE_INVALIDATE: [Op; 4] = [Op::DsbIshst, Op::Vmalls12e1is, Op::DsbIsh, Op::Isb];

fn page(chunk: u64, page: u64) -> Ipa {
    Ipa::new(RAM.bits() + chunk * CHUNK_SIZE + page * PAGE_SIZE)
}

fn range(from: Ipa, pages: u32) -> IpaRange {
    IpaRange::from_pages(from, pages).expect("in order")
}

/// The frame that the tests map at an address.
fn frame(at: Ipa) -> Pfn {
    Pfn::new(0x10_0000).checked_add(at.pages_above(RAM).expect("in RAM").number()).expect("it fits")
}

fn enter(guest: &mut Guest, at: Ipa) {
    guest.enter(at, frame(at), Prot::ALL).expect("the model holds").expect("there are tables");
}

/// A guest that wrote a page in each of some chunks, on both CPUs, and read another.
fn guest(features: stage2::geometry::Features, chunks: u64) -> Guest {
    let mut guest = Guest::alone(features);
    for chunk in 0..chunks {
        for n in 0..2 {
            enter(&mut guest, page(chunk, n));
            guest.access(1, page(chunk, n), Access::Read).expect("the model holds");
        }
        for cpu in 0..2 {
            guest.access(cpu, page(chunk, 0), Access::Write).expect("the model holds");
        }
    }
    guest.mmu.take_trace();
    guest
}

#[test]
fn parking_tells_the_caches_once_however_much_is_mapped() {
    for chunks in [1, 30] {
        let mut guest = guest(NEOVERSE_N1, chunks);
        guest.park().expect("the model holds");
        assert_eq!(guest.mmu.take_trace(), ONE_INVALIDATE, "{chunks} chunks");
        assert_eq!(guest.mmu.cached(1), 0);
    }
}

#[test]
fn to_remove_pages_that_are_parked_tells_nobody() {
    let mut guest = guest(NEOVERSE_N1, 3);
    guest.park().expect("the model holds");
    guest.mmu.take_trace();
    guest.remove_pages(&[page(0, 0), page(2, 1)]).expect("the model holds");
    assert_eq!(guest.mmu.take_trace(), []);
    assert_eq!(
        guest.harvest.iter().map(|h| (h.at, h.dirty)).collect::<Vec<_>>(),
        [(page(0, 0), true), (page(2, 1), false)]
    );
}

#[test]
fn parking_what_is_parked_or_empty_costs_nothing() {
    let mut guest = guest(NEOVERSE_N1, 3);
    guest.park().expect("the model holds");
    guest.mmu.take_trace();
    guest.park().expect("the model holds");
    assert_eq!(guest.mmu.take_trace(), []);
    let mut empty = Guest::alone(NEOVERSE_N1);
    empty.park().expect("the model holds");
    assert_eq!(empty.mmu.take_trace(), []);
}

#[test]
fn after_parking_every_cpu_faults_and_nobody_writes_before_the_fault_is_served() {
    for features in [CORTEX_A53, NEOVERSE_N1] {
        let mut guest = guest(features, 2);
        guest.park().expect("the model holds");
        for cpu in 0..2 {
            for access in [Access::Read, Access::Write] {
                assert!(guest.mmu.access(cpu, page(1, 0), access).is_err(), "{access:?} on {cpu}");
            }
        }
        assert_eq!(guest.access(0, page(1, 0), Access::Read), Ok(Some(frame(page(1, 0)))));
        assert!(guest.mmu.access(0, page(1, 0), Access::Write).is_err(), "the other shares it still");
    }
}

#[test]
fn a_fault_below_a_parked_entry_opens_its_own_way_and_costs_no_invalidate() {
    let mut guest = guest(NEOVERSE_N1, 3);
    let tables = guest.tables.tables();
    guest.park().expect("the model holds");
    guest.mmu.take_trace();
    let (near, far) = (page(1, 1), page(2, 1));
    guest.enter(near, frame(near), Prot::READ_EXECUTE).expect("the model holds").expect("they are there");
    let trace = guest.mmu.take_trace();
    assert!(
        !trace.iter().any(|op| [Op::Ipas2e1is, Op::Vmalle1is, Op::Vmalls12e1is].contains(op)),
        "{trace:?}"
    );
    assert!(guest.raw(near).is_some() && guest.raw(page(1, 0)).is_some(), "its table is open");
    assert!(!guest.raw(page(1, 0)).expect("open").allows[1], "and write-protected");
    assert!(guest.raw(far).is_none(), "its neighbour is parked still");
    assert_eq!(guest.tables.lookup(far).map(|leaf| leaf.frame), Some(frame(far)), "and not forgotten");
    assert_eq!(guest.tables.tables(), tables);
}

#[test]
fn what_was_dirty_when_it_was_parked_is_told_by_whoever_edits_it_then() {
    type Edit = fn(&mut Guest, IpaRange);
    let edits: [(&str, Edit); 4] = [
        ("remove", |guest, range| guest.remove(range).expect("the model holds")),
        ("protect", |guest, range| guest.protect(range, Prot::READ).expect("the model holds")),
        ("age", |guest, range| guest.age(range).expect("the model holds")),
        ("clear", |guest, _| assert!(guest.clear(u32::MAX).expect("the model holds"))),
    ];
    for features in [CORTEX_A53, NEOVERSE_N1] {
        for (name, edit) in edits {
            for opened in [false, true] {
                let mut guest = guest(features, 2);
                guest.park().expect("the model holds");
                if opened {
                    guest.access(0, page(0, 0), Access::Read).expect("the model holds");
                }
                edit(&mut guest, range(page(0, 0), 1));
                let told = guest.harvest.iter().find(|h| h.at == page(0, 0)).expect("it was mapped");
                assert!(told.dirty && told.frame == frame(page(0, 0)), "{name}, opened: {opened}");
            }
        }
    }
}

#[test]
fn what_lies_below_a_parked_entry_is_taken_away_without_an_invalidate() {
    let mut guest = guest(NEOVERSE_N1, 2);
    guest.park().expect("the model holds");
    guest.mmu.take_trace();
    guest.remove(range(page(0, 0), 2)).expect("the model holds");
    guest.remove(range(page(1, 0), CHUNK_PAGES)).expect("the model holds");
    let trace = guest.mmu.take_trace();
    assert_eq!(trace, [], "no cache knows of it");
}

#[test]
fn a_guest_is_cleared_in_steps_that_tell_the_caches_once() {
    let mut guest = guest(NEOVERSE_N1, 40);
    let mut dirty = 0;
    let mut steps = 1;
    // Two leaves in each table, and an eighth of an entry's price for each that is empty.
    let budget = 4 * (CHUNK_PAGES / 8 + 2);
    while !guest.clear(budget).expect("the model holds") {
        dirty += guest.harvest.iter().filter(|h| h.dirty).count();
        steps += 1;
        assert!(guest.harvest.len() <= 4 * 2, "a step settles {budget}, and four tables");
    }
    dirty += guest.harvest.iter().filter(|h| h.dirty).count();
    assert!(steps >= 10, "{steps}");
    assert_eq!(dirty, 40);
    assert_eq!(guest.mmu.take_trace(), ONE_INVALIDATE);
    assert_eq!((guest.tables.tables(), guest.frames.in_use()), (1, 1), "the root stays");
    enter(&mut guest, RAM);
    assert_eq!(guest.access(0, RAM, Access::Write), Ok(Some(frame(RAM))), "and can be used again");
}

#[test]
fn a_full_table_is_cleared_in_parts_and_no_leaf_is_settled_twice() {
    let mut guest = guest(NEOVERSE_N1, 1);
    for index in 0..CHUNK_PAGES {
        enter(&mut guest, page(0, index.into()));
    }
    let (mut settled, mut steps) = (0, 1);
    while !guest.clear(100).expect("the model holds") {
        assert!(guest.harvest.len() <= 100, "{}", guest.harvest.len());
        settled += guest.harvest.len();
        steps += 1;
    }
    settled += guest.harvest.len();
    assert_eq!((settled, steps), (512, 6));
}
