//! The sequences by which a reachable entry changes: which instructions, in which order, for whom.
//!
//! `model` finds that something is missing; here each sequence is written out as the Arm ARM has it (D8.17), so that one that
//! became longer, or another, is noticed too. Barriers that make a new leaf seen come last.

use stage2::Stage2;
use stage2::geometry::{Features, Geometry};
use stage2::testing::cpus::{CORTEX_A53, CORTEX_A710, NEOVERSE_N1};
use stage2::testing::{Access, Fault, Frames, Guest, Meanwhile, Mmu, Op};
use stage2::tlb::MAX_SINGLE;
use stage2::vmid::{Vmid, VmidAllocator};
use vmobject::addr::{Ipa, IpaRange, PAGE_SIZE, Pfn};
use vmobject::pmap::{Entered, OutOfTables, Pmap as _, Sink};
use vmobject::prot::Prot;

const RAM: Ipa = Ipa::new(0x4000_0000);
const FRAME: Pfn = Pfn::new(0x1234);
const OTHER: Pfn = Pfn::new(0x4321);
/// One page's translation is taken from every CPU: both halves.
const BOTH_HALVES: [Op; 6] = [Op::DsbIshst, Op::Ipas2e1is, Op::DsbIsh, Op::Vmalle1is, Op::DsbIsh, Op::Isb];
const WHOLE_GUEST: [Op; 4] = [Op::DsbIshst, Op::Vmalls12e1is, Op::DsbIsh, Op::Isb];
const THIS_CPU: [Op; 4] = [Op::DsbIshst, Op::Vmalls12e1, Op::DsbNsh, Op::Isb];

fn pages(first: u64, count: u32) -> IpaRange {
    IpaRange::from_pages(Ipa::new(RAM.bits() + first * PAGE_SIZE), count).expect("in order")
}

/// A guest with one page mapped and written.
fn with_a_page(features: Features) -> Guest {
    let mut guest = Guest::alone(features);
    guest.enter(RAM, FRAME, Prot::ALL).expect("the model holds").expect("there are tables");
    guest.access(0, RAM, Access::Write).expect("the model holds");
    guest.mmu.take_trace();
    guest
}

#[test]
fn a_page_where_nothing_was_costs_one_barrier_and_no_invalidate() {
    let mut guest = with_a_page(CORTEX_A53);
    let next = pages(1, 1).start();
    guest.enter(next, OTHER, Prot::ALL).expect("the model holds").expect("there are tables");
    assert_eq!(guest.mmu.take_trace(), [Op::DsbIshst]);
}

#[test]
fn a_leaf_that_is_pointed_elsewhere_is_invalid_until_every_cpu_has_been_told_by_both_halves() {
    for features in [CORTEX_A53, NEOVERSE_N1, CORTEX_A710] {
        let mut guest = with_a_page(features);
        guest.access(1, RAM, Access::Write).expect("the model holds");
        guest.enter(RAM, OTHER, Prot::ALL).expect("the model holds").expect("there are tables");
        let mut sequence = BOTH_HALVES.to_vec();
        sequence.push(Op::DsbIshst);
        assert_eq!(guest.mmu.take_trace(), sequence);
        assert_eq!(guest.harvest.len(), 1);
        assert!(guest.harvest[0].dirty && guest.harvest[0].frame == FRAME);
        assert_eq!(guest.mmu.access(1, RAM, Access::Read), Ok(OTHER));
    }
}

#[test]
fn a_leaf_that_is_removed_or_protected_is_taken_from_every_cpu_by_both_halves() {
    for features in [CORTEX_A53, NEOVERSE_N1, CORTEX_A710] {
        let mut guest = with_a_page(features);
        guest.protect(pages(0, 1), Prot::READ_EXECUTE).expect("the model holds");
        assert_eq!(guest.mmu.take_trace(), BOTH_HALVES);
        guest.remove(pages(0, 1)).expect("the model holds");
        assert_eq!(guest.mmu.take_trace(), BOTH_HALVES);
        assert!(guest.mmu.access(0, RAM, Access::Read).is_err());
    }
}

#[test]
fn pages_here_and_there_are_removed_with_one_invalidate_for_all_and_those_beside_them_stay() {
    for features in [CORTEX_A53, NEOVERSE_N1, CORTEX_A710] {
        for count in [3, 100] {
            let mut guest = with_a_page(features);
            for (page, frame) in pages(0, 2 * count).iter_pages().zip(FRAME.number()..) {
                guest.enter(page, Pfn::new(frame), Prot::ALL).expect("the model holds").expect("tables");
            }
            guest.mmu.take_trace();
            let every_other: Vec<Ipa> = pages(0, 2 * count).iter_pages().step_by(2).collect();
            guest.remove_pages(&every_other).expect("the model holds");
            let trace = guest.mmu.take_trace();
            assert_eq!(trace.iter().filter(|op| matches!(op, Op::Vmalle1is | Op::Vmalls12e1is)).count(), 1);
            assert_eq!(guest.harvest.len(), count as usize);
            for page in pages(0, 2 * count).iter_pages() {
                let gone = every_other.contains(&page);
                assert_eq!(guest.mmu.access(0, page, Access::Read).is_err(), gone, "{page}");
            }
            guest.remove_pages(&every_other).expect("the model holds");
            assert_eq!(guest.mmu.take_trace(), [], "there was nothing any more");
        }
    }
}

#[test]
fn an_edit_of_a_guest_that_is_not_loaded_loads_its_vmid_and_then_the_old_one() {
    let mut guest = with_a_page(NEOVERSE_N1);
    guest.mmu.run(0, 2 << 48);
    guest.remove(pages(0, 1)).expect("the model holds");
    let sequence: Vec<Op> = [Op::Load].into_iter().chain(BOTH_HALVES).chain([Op::Load]).collect();
    assert_eq!(guest.mmu.take_trace(), sequence);
}

#[test]
fn a_guest_that_never_ran_is_edited_without_an_invalidate() {
    let other = with_a_page(NEOVERSE_N1);
    let geometry = Geometry::new(NEOVERSE_N1);
    let mut guest = Guest::new(&other.frames, &other.mmu, geometry).expect("there are tables");
    guest.enter(RAM, FRAME, Prot::ALL).expect("the model holds").expect("there are tables");
    guest.enter(RAM, OTHER, Prot::ALL).expect("the model holds").expect("there are tables");
    guest.remove(pages(0, 1)).expect("the model holds");
    assert!(guest.mmu.take_trace().iter().all(|&op| op == Op::DsbIshst));
}

#[test]
fn a_few_pages_go_one_by_one_and_many_by_a_range_or_the_whole_guest() {
    let few = u32::try_from(MAX_SINGLE).expect("small");
    for (features, count, first) in [
        (CORTEX_A53, few, Op::Ipas2e1is),
        (CORTEX_A53, few + 1, Op::Vmalls12e1is),
        (CORTEX_A710, few, Op::Ipas2e1is),
        (CORTEX_A710, few + 1, Op::Ripas2e1is),
    ] {
        let mut guest = with_a_page(features);
        for (at, frame) in pages(0, count).iter_pages().zip(0x100..) {
            guest.enter(at, Pfn::new(frame), Prot::READ).expect("the model holds").expect("there are tables");
        }
        guest.mmu.take_trace();
        guest.remove(pages(0, count)).expect("the model holds");
        let trace = guest.mmu.take_trace();
        let told = trace.iter().filter(|&&op| op == first).count();
        assert_eq!(told, if first == Op::Ipas2e1is { MAX_SINGLE } else { 1 }, "{count}: {trace:?}");
        assert_eq!(trace.contains(&Op::Vmalle1is), first != Op::Vmalls12e1is, "the second half: {trace:?}");
    }
}

#[test]
fn a_table_that_is_taken_out_takes_the_whole_guest_s_ways_with_it() {
    let mut guest = with_a_page(NEOVERSE_N1);
    let tables = guest.tables.tables();
    guest.remove(pages(0, 512)).expect("the model holds");
    assert_eq!(guest.mmu.take_trace(), WHOLE_GUEST);
    assert_eq!(guest.tables.tables(), tables - 1);
}

#[test]
fn a_cpu_that_remembers_a_refusal_is_told_alone_and_goes_on() {
    let mut guest = with_a_page(NEOVERSE_N1);
    guest.protect(pages(0, 1), Prot::READ_EXECUTE).expect("the model holds");
    for cpu in 0..2 {
        assert_eq!(guest.mmu.access(cpu, RAM, Access::Read), Ok(FRAME));
    }
    guest.mmu.take_trace();
    guest.enter(RAM, FRAME, Prot::ALL).expect("the model holds").expect("there are tables");
    assert_eq!(guest.mmu.take_trace(), THIS_CPU, "more is allowed: no break, and nobody else is told");
    assert_eq!(guest.mmu.access(0, RAM, Access::Write), Ok(FRAME));
    assert_eq!(guest.mmu.access(1, RAM, Access::Write), Err(Fault::Permission(3)), "it has not heard");
    guest.mmu.on(1);
    guest.enter(RAM, FRAME, Prot::ALL).expect("the model holds").expect("there are tables");
    assert_eq!(guest.mmu.take_trace(), THIS_CPU, "nothing changed, and yet the fault must not come again");
    assert_eq!(guest.mmu.access(1, RAM, Access::Write), Ok(FRAME));
}

#[test]
fn a_fault_for_the_access_flag_alone_costs_one_barrier() {
    let mut guest = with_a_page(CORTEX_A53);
    guest.age(pages(0, 1)).expect("the model holds");
    assert_eq!(guest.mmu.access(0, RAM, Access::Read), Err(Fault::AccessFlag(3)));
    guest.mmu.take_trace();
    guest.enter(RAM, FRAME, Prot::ALL).expect("the model holds").expect("there are tables");
    assert_eq!(guest.mmu.take_trace(), [Op::DsbIshst]);
    assert_eq!(guest.mmu.access(0, RAM, Access::Read), Ok(FRAME));
}

#[test]
fn write_protection_clears_what_lets_a_guest_write_and_what_lets_the_hardware_allow_it() {
    for features in [CORTEX_A53, NEOVERSE_N1] {
        let mut guest = with_a_page(features);
        let may_write = 1 << 7 | 1 << 51; // S2AP[1] and DBM
        assert_ne!(guest.raw(RAM).expect("it is mapped").descriptor.1 & may_write, 0);
        guest.protect(pages(0, 1), Prot::READ_EXECUTE).expect("the model holds");
        assert_eq!(guest.raw(RAM).expect("it is mapped").descriptor.1 & may_write, 0);
        assert!(guest.harvest.iter().any(|h| h.dirty), "the write before is not forgotten");
    }
}

#[test]
fn when_the_names_run_out_everything_is_told_once_and_running_guests_keep_theirs() {
    let mut guest = with_a_page(NEOVERSE_N1);
    let mmu: Mmu = guest.mmu.clone();
    let mut names = VmidAllocator::new(3, 2);
    let kept = names.acquire(1, Vmid::default(), &mmu);
    let mut others = Vec::new();
    while names.rollovers() == 0 {
        others.push(names.acquire(0, Vmid::default(), &mmu).number());
    }
    assert_eq!(mmu.take_trace(), [Op::DsbIshst, Op::Alle1is, Op::DsbIsh, Op::Isb]);
    for _ in 0..6 {
        others.push(names.acquire(0, Vmid::default(), &mmu).number());
    }
    assert!(others.iter().all(|&number| number != kept.number() && number != 0), "{others:?}");
    assert_eq!(names.acquire(1, kept, &mmu).number(), kept.number());
    guest.check().expect("nobody knows what is not so");
}

#[test]
fn a_page_that_is_written_while_its_leaf_changes_is_told_of_or_stays_dirty() -> Result<(), OutOfTables> {
    type Edit = fn(&mut Stage2<Meanwhile, Mmu>, Sink<'_>);
    let edits: [(&str, Edit); 5] = [
        ("remove", |tables, sink| tables.remove(pages(0, 1), sink)),
        ("protect", |tables, sink| tables.protect(pages(0, 1), Prot::READ, sink)),
        ("age", |tables, sink| tables.age(pages(0, 1), sink)),
        ("point elsewhere", |tables, sink| {
            let entered = tables.enter(RAM, OTHER, Prot::ALL, sink);
            assert_eq!(entered, Ok(Entered::Leaf));
        }),
        ("park and clear", |tables, sink| {
            tables.park();
            assert!(tables.clear(u32::MAX, sink));
        }),
    ];
    let geometry = Geometry::new(NEOVERSE_N1);
    for (name, edit) in edits {
        let mut written = 0;
        for moment in 1..40 {
            let frames = Frames::new(4);
            let mmu = Mmu::new(&frames, geometry, 2);
            let source = Meanwhile::new(frames, mmu.clone(), 1, RAM);
            let mut tables = Stage2::new(source.clone(), mmu.clone(), geometry)?;
            tables.set_vmid(1);
            mmu.run(1, tables.vttbr());
            tables.enter(RAM, FRAME, Prot::ALL, &mut |_| {})?;
            source.write_before(moment);
            let mut told = false;
            edit(&mut tables, &mut |h| told |= h.dirty && h.frame == FRAME);
            source.write_before(0);
            tables.remove(pages(0, 1), &mut |h| told |= h.dirty && h.frame == FRAME);
            assert!(told || !source.wrote(), "{name}, {moment}: the write is forgotten");
            mmu.audit().expect("no cache knows more than the tables");
            written += u32::from(source.wrote());
        }
        assert!(written > 0, "{name}: it was never written in time");
    }
    Ok(())
}
