//! The shape of the tables: what registers say, for real CPUs and for every width, and what lies at its edges.

use stage2::geometry::{Features, Geometry, LAST};
use stage2::testing::cpus::{CORTEX_A53, CORTEX_A710, NEOVERSE_N1};
use stage2::testing::{Access, Fault, Frames, Guest, Mmu};
use stage2::tlb::vttbr;
use vmobject::addr::{Ipa, PAGE_SIZE, Pfn, PhysAddr};
use vmobject::pmap::Pmap as _;
use vmobject::prot::Prot;

/// The widths that a CPU has.
fn widths(features: Features) -> impl Iterator<Item = Geometry> {
    (25..=features.pa_bits()).filter_map(move |bits| Geometry::with_ipa_bits(features, bits))
}

const fn field(value: u64, low: u32, bits: u32) -> u64 {
    (value >> low) & ((1 << bits) - 1)
}

#[test]
fn the_registers_of_real_cpus_are_read_as_their_manuals_have_them() {
    let facts = |f: Features| (f.pa_bits(), f.vmid_bits(), f.hardware_access, f.hardware_dirty);
    assert_eq!(facts(CORTEX_A53), (40, 8, false, false));
    assert_eq!(facts(NEOVERSE_N1), (48, 16, true, true));
    assert_eq!(facts(CORTEX_A710), (40, 16, true, true));
    let newer = |f: Features| (f.range_invalidate, f.break_in_place, f.force_write_back);
    assert_eq!(newer(CORTEX_A53), (false, false, false));
    assert_eq!(newer(NEOVERSE_N1), (false, false, false));
    assert_eq!(newer(CORTEX_A710), (true, true, true));
}

#[test]
fn vtcr_says_what_the_geometry_is() {
    for features in [CORTEX_A53, NEOVERSE_N1, CORTEX_A710] {
        let geometry = Geometry::new(features);
        let vtcr = geometry.vtcr();
        assert_eq!(64 - field(vtcr, 0, 6), u64::from(geometry.ipa_bits()), "T0SZ");
        assert_eq!(field(vtcr, 6, 2), 1, "SL0: the walk starts at level 1");
        assert_eq!(field(vtcr, 8, 6), 0b11_01_01, "walks are write-back and inner shareable");
        assert_eq!(field(vtcr, 14, 2), 0, "4 KiB");
        assert_eq!(field(vtcr, 16, 3), u64::from(features.pa_range), "PS");
        assert_eq!(field(vtcr, 19, 1) == 1, features.vmid16, "VS");
        assert_eq!(field(vtcr, 21, 1) == 1, features.hardware_access, "HA");
        assert_eq!(field(vtcr, 22, 1) == 1, features.hardware_dirty, "HD");
        assert_eq!(vtcr >> 31, 1, "RES1, and nothing above");
        assert_eq!(geometry.hcr(), u64::from(features.force_write_back) << 46, "FWB");
    }
}

#[test]
fn an_address_is_never_wider_than_the_cpu_s_memory() {
    for pa_range in 0..8 {
        let features = Features::from_id_registers(pa_range, 0);
        assert!(Geometry::new(features).ipa_bits() <= features.pa_bits());
        assert!(Geometry::with_ipa_bits(features, features.pa_bits() + 1).is_none());
        assert!(Geometry::with_ipa_bits(features, 24).is_none());
    }
}

#[test]
fn every_width_maps_its_last_page_and_nothing_beyond() {
    for features in [CORTEX_A53, NEOVERSE_N1] {
        let mut starts = [false; 3];
        for geometry in widths(features) {
            let frames = Frames::new(64);
            let mmu = Mmu::new(&frames, geometry, 1);
            let mut guest = Guest::new(&frames, &mmu, geometry).expect("there are frames");
            guest.run(0, 1);
            let end = guest.tables.reach();
            assert_eq!(end.bits(), 1 << geometry.ipa_bits());
            let last = Ipa::new(end.bits() - PAGE_SIZE);
            for (at, frame) in [(last, Pfn::new(7)), (Ipa::new(0), Pfn::new(9))] {
                guest.enter(at, frame, Prot::ALL).expect("the model holds").expect("there are tables");
                assert_eq!(guest.access(0, at, Access::Write), Ok(Some(frame)), "{geometry:?}");
            }
            assert_eq!(mmu.access(0, end, Access::Read), Err(Fault::Translation(0)), "{geometry:?}");
            assert_eq!(guest.tables.lookup(end), None);
            assert!(guest.clear(u32::MAX).expect("the model holds"));
            starts[geometry.start() as usize] = true;
        }
        assert!(starts[1] && starts[2], "levels 1 and 2 were tried");
        assert_eq!(starts[0], features.pa_bits() > 43, "level 0 where a level 1 of 16 tables is not enough");
    }
}

#[test]
#[should_panic(expected = "beyond the tables' reach")]
fn a_page_beyond_the_reach_is_a_bug_of_the_caller() {
    let mut guest = Guest::alone(CORTEX_A53);
    let end = guest.tables.reach();
    let _ = guest.enter(end, Pfn::new(1), Prot::ALL);
}

#[test]
fn roots_side_by_side_are_aligned_to_their_size_and_all_given_back() {
    for geometry in widths(NEOVERSE_N1) {
        let frames = Frames::new(64);
        let mmu = Mmu::new(&frames, geometry, 1);
        let odd = Guest::new(&frames, &mmu, Geometry::new(NEOVERSE_N1)).expect("there are frames");
        let guest = Guest::new(&frames, &mmu, geometry).expect("there are frames");
        let tables = geometry.root_tables();
        assert!((1..=16).contains(&tables), "{geometry:?}");
        assert!(guest.tables.root().bits().is_multiple_of(u64::from(tables) * PAGE_SIZE), "{geometry:?}");
        drop((odd, guest));
        assert_eq!(frames.in_use(), 0);
    }
}

#[test]
fn an_address_is_cut_into_the_indices_of_its_levels_and_nothing_is_left_over() {
    let at = Ipa::new(0x5a_b6cd_e123);
    let mut rebuilt = at.bits() & (PAGE_SIZE - 1);
    for level in 0..=LAST {
        let index = u64::try_from(Geometry::index(at, level)).expect("nine bits");
        rebuilt |= index << Geometry::shift(level);
    }
    assert_eq!(rebuilt, at.bits());
    for level in 1..=LAST {
        let next = Geometry::next_entry(at, level);
        assert_eq!(next.bits() - Geometry::entry(at, level).bits(), 1 << Geometry::shift(level));
        assert!(Geometry::entry(at, level) <= at && at < next);
    }
}

#[test]
fn vttbr_holds_the_root_and_the_name() {
    let value = vttbr(PhysAddr::new(0x4_5678_9000), 0xabcd);
    assert_eq!((value >> 48, value & 0xffff_ffff_ffff), (0xabcd, 0x4_5678_9000));
}
