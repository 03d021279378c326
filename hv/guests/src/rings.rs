//! A disk's driver that breaks every rule: rings and buffers where nothing is, chains that loop, lengths that wrap,
//! registers and descriptors changed while the device works, storms of notifications. In between, and at the end,
//! it keeps the rules and must be served: what was written is read back.
//!
//! Needs a disk of its own that takes writes. Options: `count=3000`, `seed=1`.

use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use hv_abi::machine::{
    FLASH0, FLASH1, GICD, PL011, RAM_BASE, RAM_LIMIT, Region, VIRTIO_BASE, VIRTIO_STRIDE, VMGENID,
};

use crate::memory::{peek, poke};
use crate::mmio::{read8, read16, read32, write8, write16, write32};
use crate::mmu;
use crate::runtime::{Machine, Random, start_vcpu};
use crate::virtio::{NEEDS_RESET, STATUS, describe, low};
use crate::{power, trap};

/// The end of RAM: what the device may be told to write to.
const ARENA: u64 = 1 << 20;
/// In the arena: a page each for the table, the available ring, the used ring; then requests.
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const ROOM: u64 = 0x3000;
/// Entries of the queue.
const SIZE: u16 = 64;
/// Where the hypervisor keeps disks in a guest's map: nothing of the guest's.
const BEYOND: u64 = RAM_BASE + RAM_LIMIT;
/// Whole sectors that are written and read back.
const SECTOR: u64 = 40;

const NOTIFY: u64 = 0x50;

/// Where the arena is, for the other vCPU, and when it is to stop.
static BASE: AtomicU64 = AtomicU64::new(0);
static STOP: AtomicBool = AtomicBool::new(false);

/// A driver, as far as it keeps the rules.
struct Driver {
    base: u64,
    next: u16,
}

fn set(offset: u64, value: u32) {
    write32(VIRTIO_BASE + offset, value);
}

fn get(offset: u64) -> u32 {
    read32(VIRTIO_BASE + offset)
}

impl Driver {
    /// Resets the device and gives it a queue.
    fn set_up(&mut self) {
        let base = self.base;
        for at in (base..base + ROOM).step_by(8) {
            poke(at, 0);
        }
        self.next = 0;
        for (offset, value) in [(STATUS, 0), (STATUS, 1), (STATUS, 3), (0x24, 1), (0x20, 1), (0x24, 0)] {
            set(offset, value);
        }
        // Indirect tables.
        set(0x20, 1 << 28);
        for (offset, value) in [(STATUS, 11), (0x30, 0), (0x38, SIZE.into())] {
            set(offset, value);
        }
        for (offset, place) in [(0x80, base), (0x90, base + AVAILABLE), (0xa0, base + USED)] {
            set(offset, low(place));
            set(offset + 4, low(place >> 32));
        }
        set(0x44, 1);
        set(STATUS, 15);
        assert_eq!((get(STATUS), get(0x44)), (15, 1), "the device does not take its queue");
    }

    /// One request by the rules, waited for; its status.
    fn ask(&mut self, kind: u32, sector: u64, data: u64, bytes: u32) -> u8 {
        let (header, status) = (self.base + ROOM, self.base + ROOM + 64);
        poke(header, kind.into());
        poke(header + 8, sector);
        write8(status, 0xee);
        let writes = if kind == 0 { 2 } else { 0 };
        describe(self.base, header, 16, 1, 1);
        describe(self.base + 16, data, bytes, 1 | writes, 2);
        describe(self.base + 32, status, 1, 2, 0);
        self.publish(0);
        let used = self.base + USED + 2;
        for _ in 0..1_000_000_000_u64 {
            if read16(used) == self.next {
                return read8(status);
            }
        }
        panic!("a request is not answered: status {:#x}", get(STATUS));
    }

    fn publish(&mut self, head: u16) {
        write16(self.base + AVAILABLE + 4 + 2 * u64::from(self.next % SIZE), head);
        self.next = self.next.wrapping_add(1);
        instruction!("dsb ish");
        write16(self.base + AVAILABLE + 2, self.next);
        instruction!("dsb ish");
        set(NOTIFY, 0);
    }

    /// Writes something and reads it back, by the rules, after a reset.
    fn is_served(&mut self, round: u64) {
        self.set_up();
        let data = self.base + 0x1_0000;
        let word = |at: u64| at.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ round;
        (data..data + 8192).step_by(8).for_each(|at| poke(at, word(at)));
        assert_eq!(self.ask(1, SECTOR, data, 8192), 0, "a write");
        (data..data + 8192).step_by(8).for_each(|at| poke(at, 0));
        assert_eq!(self.ask(0, SECTOR, data, 8192), 0, "a read");
        assert!(
            (data..data + 8192).step_by(8).all(|at| peek(at) == word(at)),
            "it reads back something else"
        );
        assert_eq!(self.ask(1, u64::MAX / 512, data, 512), 1, "a sector that is not there");
        assert_eq!(self.ask(1, SECTOR, BEYOND, 512), 1, "data from where disks are kept");
        assert_eq!(self.ask(0, SECTOR, BEYOND, 512), 1, "data to where disks are kept");
        assert_eq!(self.ask(0, SECTOR, GICD.base, 512), 1, "data to the interrupt controller");
    }
}

/// An address that is in the arena, at the edge of something, or nowhere at all.
fn somewhere(random: &mut Random, base: u64) -> u64 {
    const EDGES: [Region; 5] = [FLASH0, FLASH1, GICD, PL011, VMGENID];
    match random.below(12) {
        0 => EDGES[usize::from(random.draw().to_le_bytes()[3]) % EDGES.len()].base + random.below(64),
        1 => BEYOND + random.below(1 << 32),
        2 => u64::MAX - random.below(4096),
        3 => base + ARENA - random.below(64),
        4 => random.draw(),
        5 => VIRTIO_BASE + random.below(VIRTIO_STRIDE),
        _ => base + random.below(ARENA),
    }
}

fn short(value: u64) -> u16 {
    u16::try_from(value & 0xffff).unwrap_or(0)
}

/// One thing that no driver does.
fn mischief(random: &mut Random, base: u64) {
    match random.below(9) {
        // The queue somewhere else, ready or not: addresses outside the arena are no RAM at all.
        0 => {
            let offset = [0x80, 0x90, 0xa0][usize::from(random.draw().to_le_bytes()[3]) % 3];
            let place = somewhere(random, base) & !15;
            set(0x44, low(random.below(2)));
            set(offset, low(place));
            set(offset + 4, low(place >> 32));
            set(0x38, low(random.below(300)));
            set(0x44, 1);
        }
        1 => set(random.below(64) * 4, low(random.draw())),
        2..=5 => {
            let bytes = if random.below(2) == 0 { random.below(32) * 16 } else { random.draw() };
            let (place, flags) = (somewhere(random, base), random.below(8));
            let next = if random.below(8) > 0 { random.below(SIZE.into()) } else { random.draw() };
            let at = base + 16 * random.below(SIZE.into());
            describe(at, place, low(bytes), short(flags), short(next));
        }
        6 => {
            let at = base + ROOM + 16 * random.below(256);
            poke(at, [0, 1, 4, 8, 11, 13, 77][usize::from(random.draw().to_le_bytes()[3]) % 7]);
            // Not where the honest requests go.
            poke(at + 8, 64 + random.below(64));
        }
        7 if random.below(8) == 0 => write16(base + AVAILABLE + 2, short(random.draw())),
        // A chain from wherever, made available as it should be.
        7 => {
            let next = read16(base + AVAILABLE + 2);
            let head = if random.below(8) > 0 { random.below(SIZE.into()) } else { random.draw() };
            write16(base + AVAILABLE + 4 + 2 * u64::from(next % SIZE), short(head));
            write16(base + AVAILABLE + 2, next.wrapping_add(1));
            set(NOTIFY, 0);
        }
        _ => set(NOTIFY, low(random.below(2))),
    }
}

/// What a second vCPU does: changes what the device is just looking at.
fn meddle(_: usize) {
    let mut random = Random::new(99);
    let base = BASE.load(Ordering::Relaxed);
    while !STOP.load(Ordering::Relaxed) {
        let at = base + 8 * random.below(USED / 8);
        poke(at, if random.below(4) == 0 { random.draw() } else { somewhere(&mut random, base) });
        if random.below(64) == 0 {
            set(NOTIFY, 0);
        }
    }
}

/// All of it.
pub fn run(machine: &Machine) {
    mmu::enable();
    assert_eq!((get(0), get(4), get(8)), (0x7472_6976, 2, 2), "there is no disk");
    let base = machine.end() - ARENA;
    let mut driver = Driver { base, next: 0 };
    driver.is_served(0);
    let fault = probe!("ldr {a}, [{at}]", a = out(reg) _, at = in(reg) BEYOND);
    assert!(
        fault.is_some_and(trap::Fault::is_external_abort),
        "a load from where disks are kept: {fault:x?}"
    );
    // Registers have 32 bits, whoever asks.
    for width in [1, 2] {
        for at in (VIRTIO_BASE..VIRTIO_BASE + 0x100).step_by(width) {
            let _ = if width == 1 { u32::from(read8(at)) } else { u32::from(read16(at)) };
        }
    }
    let wide = probe!("str xzr, [{at}]", at = in(reg) VIRTIO_BASE + 0x80);
    assert!(wide.is_some_and(trap::Fault::is_external_abort), "a register takes 64 bits: {wide:x?}");
    let mut random = Random::new(machine.option("seed", 1));
    let count = machine.option("count", 3000);
    let mut resets = 0;
    for half in 0..2 {
        if half == 1 && machine.vcpus > 1 {
            BASE.store(base, Ordering::Relaxed);
            assert_eq!(start_vcpu(1, meddle, true), 0, "starting the second vcpu");
        }
        for round in 0..count / 2 {
            mischief(&mut random, base);
            if get(STATUS) & (NEEDS_RESET | 15) != 15 || get(0x44) == 0 {
                resets += 1;
                driver_again(&mut driver, half == 0);
            }
            if half == 0 && round % 250 == 249 {
                driver.is_served(round);
            }
        }
    }
    if machine.vcpus > 1 {
        STOP.store(true, Ordering::Relaxed);
        while !power::is_off(1) {
            instruction!("yield");
        }
    }
    driver.set_up();
    for _ in 0..count {
        set(NOTIFY, 0);
    }
    driver.is_served(count);
    assert!(resets > 10, "nothing that was done was wrong enough: {resets}");
    println!("{count} times wrong, {resets} resets, and served");
}

/// A reset; nobody can say what the queue looks like while another vCPU writes to it.
fn driver_again(driver: &mut Driver, alone: bool) {
    if alone {
        driver.set_up();
    } else {
        for value in [0, 1, 3, 11] {
            set(STATUS, value);
            if value == 3 {
                set(0x24, 1);
                set(0x20, 1);
            }
        }
        for (offset, place) in
            [(0x80, driver.base), (0x90, driver.base + AVAILABLE), (0xa0, driver.base + USED)]
        {
            set(offset, low(place));
            set(offset + 4, low(place >> 32));
        }
        for (offset, value) in [(0x38, SIZE.into()), (0x44, 1), (STATUS, 15)] {
            set(offset, value);
        }
    }
}
