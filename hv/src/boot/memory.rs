//! Memory at boot: the tree's bytes, EL2's own map, stacks, the heap's arena, and what is left for guests.

use crate::arch::stage1::{Map, OutOfTables, Table, Use};
use crate::arch::{entry, mmu, percpu};
use crate::mm::ranges::Ranges;
use board::platform::{Platform, tree_size};
use core::cell::UnsafeCell;
use core::ops::Range;

/// Tables for EL2's own map: a few for the image, stacks and devices; RAM itself is blocks.
const TABLES: usize = 96;
/// Bytes of a CPU's stack, and of the one for telling of a disaster; below each a guard page.
const STACK: u64 = 128 << 10;
const EMERGENCY_BYTES: usize = 12 << 10;
const EMERGENCY: u64 = EMERGENCY_BYTES as u64;
const GUARD: u64 = 4 << 10;
/// Where the tree could be, past this it is not believed.
const MAX_TREE: usize = 2 << 20;
/// The heap is this part of RAM, within bounds.
const HEAP_SHARE: u64 = 12;
const HEAP_MIN: u64 = 16 << 20;
const HEAP_MAX: u64 = 1 << 30;

/// The tables' memory.
#[repr(C, align(4096))]
struct Arena(UnsafeCell<[Table; TABLES]>);
// SAFETY: only `lay_out` touches it, once, on the first CPU.
unsafe impl Sync for Arena {}
static ARENA: Arena = Arena(UnsafeCell::new([[0; 512]; TABLES]));

/// A stack for telling of a disaster before there are real ones.
#[repr(C, align(16))]
struct EarlyEmergency(UnsafeCell<[u8; EMERGENCY_BYTES]>);
// SAFETY: only the first CPU's stack pointer ever points here.
unsafe impl Sync for EarlyEmergency {}
static EARLY_EMERGENCY: EarlyEmergency = EarlyEmergency(UnsafeCell::new([0; EMERGENCY_BYTES]));

unsafe extern "C" {
    // The linker script's; only their addresses mean anything.
    static __image_start: u8;
    static __text_end: u8;
    static __rodata_end: u8;
    static __boot_stack_guard: u8;
    static __boot_stack_top: u8;
    static __image_end: u8;
    static __dtb_default: u8;
}

/// The address of one of the linker script's symbols.
macro_rules! symbol {
    ($name:ident) => {
        (&raw const $name) as u64
    };
}

/// What memory is used for.
pub(super) struct Layout {
    /// The heap's arena.
    pub(super) heap: Range<u64>,
    /// What is left: for guests.
    pub(super) free: Ranges,
}

/// Where QEMU puts the tree of an ELF.
pub(super) fn default_tree() -> u64 {
    symbol!(__dtb_default)
}

/// The tree at an address, if there is one that can be read now: on the early map that is the image's own
/// gigabyte.
pub(super) fn tree_at(at: u64) -> Option<&'static [u8]> {
    let gigabyte = |address: u64| address >> 30;
    if !at.is_multiple_of(8) || gigabyte(at) != gigabyte(symbol!(__image_start)) {
        return None;
    }
    let start: *const u8 = core::ptr::with_exposed_provenance(usize::try_from(at).ok()?);
    // SAFETY: the early map has the whole gigabyte, and nobody writes where the tree is before `lay_out`.
    let head = unsafe { core::slice::from_raw_parts(start, 8) };
    let size = tree_size(head).filter(|size| *size <= MAX_TREE)?;
    // SAFETY: as above.
    Some(unsafe { core::slice::from_raw_parts(start, size) })
}

/// Gives the first CPU an emergency stack: the first thing that happens.
pub(super) fn early_stacks() {
    let emergency = EARLY_EMERGENCY.0.get() as u64 + EMERGENCY;
    entry::set_stacks(0, symbol!(__boot_stack_top), emergency);
}

/// Decides what every part of memory is for, and turns this CPU to the map that says so.
pub(super) fn lay_out(platform: &Platform) -> Layout {
    let mut free = Ranges::default();
    for region in &platform.memory {
        free.add(region.base.bits()..region.end().bits());
    }
    let total = free.bytes();
    free.remove(symbol!(__image_start)..symbol!(__image_end));
    for region in platform.reserved.iter().chain(&platform.initrd) {
        free.remove(region.base.bits()..region.end().bits());
    }

    let slot = GUARD + EMERGENCY + GUARD + STACK;
    let cpus = platform.cpus.len().clamp(1, percpu::MAX_CPUS) as u64;
    let Some(stacks) = free.take(slot * cpus, GUARD) else { panic!("no memory for stacks") };
    let heap_bytes = (total / HEAP_SHARE).clamp(HEAP_MIN, HEAP_MAX);
    let Some(heap) = free.take(heap_bytes, 2 << 20) else { panic!("no memory for the heap") };
    let heap = heap.bits()..heap.bits() + heap_bytes;

    // SAFETY: called once, by one CPU; nothing else names the arena.
    let tables = unsafe { &mut *ARENA.0.get() };
    let base = tables.as_ptr() as u64;
    let Some(mut map) = Map::new(tables, base) else { panic!("no tables") };
    let stacks = (0..cpus).map(|cpu| stacks.bits() + cpu * slot);
    if build(&mut map, platform, stacks.clone()).is_err() {
        panic!("EL2's own map needs more than {TABLES} tables");
    }
    // SAFETY: the map has the image with its permissions, the boot stack, all RAM and every device that the
    // tree names, at their own addresses; the arena is static and not written again.
    unsafe { mmu::switch_to(map.root()) };

    for (cpu, base) in stacks.enumerate() {
        let emergency = base + GUARD + EMERGENCY;
        // The first CPU stays where it is.
        let top = if cpu == 0 { symbol!(__boot_stack_top) } else { emergency + GUARD + STACK };
        entry::set_stacks(cpu, top, emergency);
    }
    Layout { heap, free }
}

fn build(
    map: &mut Map<'_>,
    platform: &Platform,
    stacks: impl Iterator<Item = u64>,
) -> Result<(), OutOfTables> {
    for region in &platform.memory {
        map.set(region.base.bits(), region.end().bits(), Use::Data)?;
    }
    let gic = core::iter::once(&platform.gic.distributor).chain(&platform.gic.redistributors);
    let uarts = platform.uarts.iter().map(|uart| &uart.device.region);
    let virtio = platform.virtio.iter().map(|slot| &slot.region);
    for region in gic.chain(uarts).chain(virtio).chain(&platform.clock) {
        map.set(region.base.bits(), region.end().bits(), Use::Device)?;
    }
    map.set(symbol!(__image_start), symbol!(__text_end), Use::Text)?;
    map.set(symbol!(__text_end), symbol!(__rodata_end), Use::ReadOnly)?;
    let guard = symbol!(__boot_stack_guard);
    map.set(guard, guard + GUARD, Use::Nothing)?;
    for base in stacks {
        map.set(base, base + GUARD, Use::Nothing)?;
        let second = base + GUARD + EMERGENCY;
        map.set(second, second + GUARD, Use::Nothing)?;
    }
    Ok(())
}
