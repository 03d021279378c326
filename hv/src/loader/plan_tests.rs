//! What a plan promises, for each kind of image, and that no size is believed.

use super::super::image::Segment;
use super::super::image::tests::{elf_head, kernel_head};
use super::*;

const MIB: u64 = 1 << 20;
const KERNEL: Blob = Blob { store: StoreId(3), bytes: 20 * MIB + 5 };
const INITRD: Blob = Blob { store: StoreId(4), bytes: 3 * MIB + 17 };

fn input(head: &[u8]) -> Input<'_> {
    Input { memory: 256 * MIB, firmware: false, image: KERNEL, head, initrd: None }
}

/// Every page of RAM and flash lies in exactly one region, and the tree where RAM is anonymous.
fn check(plan: &Plan, memory: u64) {
    let mut next = FLASH0.base;
    for region in &plan.regions {
        if region.range.start().bits() != next {
            assert_eq!((next, region.range.start().bits()), (FLASH1.end(), RAM_BASE));
        }
        assert_eq!(region.role == Role::Ram, region.range.start().bits() >= RAM_BASE);
        next = region.range.end().bits();
    }
    assert_eq!(next, RAM_BASE + memory);
    let tree = IpaRange::new(plan.tree, plan.tree.checked_add(fdt::LIMIT).unwrap()).unwrap();
    for region in plan.regions.iter().filter(|region| region.range.intersection(tree).is_some()) {
        assert_eq!(region.source, Source::Anonymous, "{region:?}");
    }
}

fn image_regions(plan: &Plan) -> Vec<(u64, u64, u16, u32)> {
    let image = |region: &Region| match region.source {
        Source::Image { store, first } => {
            Some((region.range.start().bits(), region.range.end().bits(), store.0, first.number()))
        }
        Source::Anonymous => None,
    };
    plan.regions.iter().filter_map(image).collect()
}

#[test]
fn a_kernel_is_followed_by_its_bss_its_initrd_and_its_tree() {
    let head = kernel_head(0, 31 * MIB, 0xa);
    let plan = plan(&Input { initrd: Some(INITRD), ..input(&head) }).unwrap();
    check(&plan, 256 * MIB);
    let initrd = RAM_BASE + 31 * MIB;
    let kernel = (RAM_BASE, RAM_BASE + 20 * MIB + 0x1000, 3, 0);
    assert_eq!(image_regions(&plan), [kernel, (initrd, initrd + 3 * MIB + 0x1000, 4, 0)]);
    assert_eq!(plan.entry.bits(), RAM_BASE);
    assert_eq!(plan.initrd, Some((Ipa::new(initrd), Ipa::new(initrd + INITRD.bytes))));
    assert_eq!(plan.x0, plan.tree.bits());
    assert!(plan.tree.bits() >= initrd + INITRD.bytes);
}

#[test]
fn the_tree_of_a_kernel_never_straddles_a_two_mebibyte_boundary() {
    for pages in 0..1024 {
        let head = kernel_head(0, 30 * MIB + pages * PAGE_SIZE, 0xa);
        let plan = plan(&input(&head)).unwrap();
        check(&plan, 256 * MIB);
        let last = plan.tree.checked_add(fdt::LIMIT - 1).unwrap();
        assert_eq!(plan.tree.chunk(), last.chunk());
    }
}

#[test]
fn an_old_kernel_gets_its_text_offset() {
    let head = kernel_head(0x8_0000, 25 * MIB, 0);
    let plan = plan(&input(&head)).unwrap();
    check(&plan, 256 * MIB);
    assert_eq!(plan.entry.bits(), RAM_BASE + 0x8_0000);
}

#[test]
fn a_kernel_that_does_not_fit_is_refused_and_the_error_says_so() {
    let head = kernel_head(0, 31 * MIB, 0xa);
    let small = Input { memory: 16 * MIB, ..input(&head) };
    let error = plan(&small).unwrap_err();
    assert_eq!(error, PlanError::TooLarge { what: "kernel", end: RAM_BASE + 31 * MIB, limit: 0x4100_0000 });
    let narrow = Input { memory: 32 * MIB, initrd: Some(INITRD), ..input(&head) };
    assert!(matches!(plan(&narrow), Err(PlanError::TooLarge { what: "initrd", .. })));
    let tight = Input { memory: 31 * MIB, ..input(&head) };
    assert!(matches!(plan(&tight), Err(PlanError::TooLarge { what: "device tree", .. })));
}

#[test]
fn sizes_from_a_hostile_header_do_not_wrap() {
    for wild in [u64::MAX, u64::MAX - 0xfff, 1 << 63, 1 << 45, u64::MAX - RAM_BASE] {
        for head in [kernel_head(wild, MIB, 0xa), kernel_head(0, wild, 0xa), kernel_head(wild, wild, 0xa)] {
            assert!(plan(&input(&head)).is_err());
            let image = Blob { bytes: wild, ..KERNEL };
            assert!(plan(&Input { image, ..input(&head) }).is_err());
        }
        let image = Blob { bytes: wild, ..KERNEL };
        assert!(plan(&Input { image, ..input(&[0; 64]) }).is_err());
        assert!(plan(&Input { image, firmware: true, ..input(&[0; 64]) }).is_err());
        assert!(plan(&Input { initrd: Some(image), ..input(&[0; 64]) }).is_err());
        assert_eq!(plan(&Input { memory: wild, ..input(&[0; 64]) }), Err(PlanError::Memory(wild)));
    }
}

#[test]
fn a_flat_program_is_entered_half_a_mebibyte_into_ram_with_the_tree_at_its_start() {
    let image = Blob { store: StoreId(9), bytes: 77 };
    let plan = plan(&Input { memory: 2 * MIB, image, ..input(&[0; 77]) }).unwrap();
    check(&plan, 2 * MIB);
    assert_eq!((plan.entry.bits(), plan.x0, plan.tree.bits()), (0x4008_0000, RAM_BASE, RAM_BASE));
    assert_eq!(image_regions(&plan), [(0x4008_0000, 0x4008_1000, 9, 0)]);
}

#[test]
fn firmware_lies_read_only_in_the_first_bank_and_the_second_is_writable() {
    let plan = plan(&Input { firmware: true, ..input(&[0x14; 64]) }).unwrap();
    check(&plan, 256 * MIB);
    assert_eq!((plan.entry.bits(), plan.x0, plan.tree.bits()), (0, RAM_BASE, RAM_BASE));
    assert_eq!(image_regions(&plan), [(0, 20 * MIB + 0x1000, 3, 0)]);
    for region in plan.regions.iter().filter(|region| region.role == Role::Flash) {
        assert_eq!(region.prot.allows(Prot::WRITE), region.range.start().bits() >= FLASH1.base);
    }
}

#[test]
fn an_elf_lies_where_it_says_and_the_rest_of_its_last_page_is_zeroed() {
    let text = Segment { at: 0x4010_0000, file_offset: 0x1000, file_bytes: 0x1800, memory_bytes: 0x1800 };
    let data = Segment { at: 0x4010_2010, file_offset: 0x3010, file_bytes: 0x20, memory_bytes: 0x5000 };
    let bss = Segment { at: 0x4020_0000, file_offset: 0, file_bytes: 0, memory_bytes: 0x8000 };
    let head = elf_head(0x4010_0004, &[text, data, bss]);
    let plan = plan(&Input { initrd: Some(INITRD), ..input(&head) }).unwrap();
    check(&plan, 256 * MIB);
    let images = image_regions(&plan);
    assert_eq!(images[..2], [(0x4010_0000, 0x4010_2000, 3, 1), (0x4010_2000, 0x4010_3000, 3, 3)]);
    assert_eq!(images[2].0, 0x4020_8000);
    assert_eq!(plan.zero, [(Ipa::new(0x4010_2030), 0x1000 - 0x30)]);
    assert_eq!((plan.entry.bits(), plan.x0), (0x4010_0004, RAM_BASE));
}

#[test]
fn an_elf_over_the_start_of_ram_gets_its_tree_behind_it() {
    let text = Segment { at: RAM_BASE, file_offset: 0x1000, file_bytes: 0x1000, memory_bytes: 0x1000 };
    let head = elf_head(RAM_BASE, &[text]);
    let plan = plan(&input(&head)).unwrap();
    check(&plan, 256 * MIB);
    assert_eq!(plan.tree.bits(), RAM_BASE + 0x1000);
}

#[test]
fn an_elf_that_overlaps_itself_or_leaves_ram_or_starts_nowhere_is_refused() {
    let text = Segment { at: 0x4010_0000, file_offset: 0x1000, file_bytes: 0x1800, memory_bytes: 0x1800 };
    let shares_page = Segment { at: 0x4010_1800, file_offset: 0x2800, ..text };
    let low = Segment { at: 0x3fff_f000, ..text };
    let high = Segment { at: RAM_BASE + 256 * MIB - 0x1000, ..text };
    let skewed = Segment { at: 0x4030_0008, ..text };
    let beyond = Segment { file_offset: 20 * MIB, ..text };
    for segment in [shares_page, low, high, skewed, beyond] {
        let head = elf_head(0x4010_0000, &[text, Segment { at: segment.at, ..segment }]);
        assert!(plan(&input(&head)).is_err(), "{segment:x?}");
    }
    for entry in [0, 0x4010_1800, 0x4010_0002] {
        assert_eq!(plan(&input(&elf_head(entry, &[text]))), Err(PlanError::Entry(entry)));
    }
}
