//! The disk, against a driver that keeps the rules and against one that breaks them one at a time.

use super::blk::{Blk, Did, SLOTS};
use super::driver::{
    AVAILABLE, Buffer, Dice, Driver, INDIRECT, NEXT, RAM, RAM_BYTES, ROOM, SIZE, TABLE, WRITE, descriptor,
};
use std::{vec, vec::Vec};

const READ: u32 = 0;
const STORE: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const ZEROES: u32 = 13;

const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

#[test]
fn a_disk_says_what_it_is_and_how_large() {
    let driver = Driver::new(100, false, 0, 1);
    assert_eq!([0, 4, 8, 0x34].map(|at| driver.get(at)), [0x7472_6976, 2, 2, 128]);
    assert_eq!(
        (driver.blk.read(0x100, 4), driver.blk.read(0x104, 4), driver.blk.read(0x100, 8)),
        (100, 0, 100)
    );
    assert_eq!((driver.blk.read(0x118, 1), driver.blk.read(0x10c, 4)), (3, 64));
    assert_eq!((driver.blk.read(0x13c, 4), driver.blk.read(u64::MAX, 4), driver.blk.read(2, 2)), (0, 0, 0));
    let shown = |read_only: bool| {
        let mut blk = Blk::new(8, read_only, "");
        let low = blk.read(0x10, 4);
        blk.write(0x14, 4, 1);
        low | blk.read(0x10, 4) << 32
    };
    assert_eq!(shown(false), 1 << 32 | 1 << 28 | 1 << 14 | 1 << 13 | 1 << 10 | 1 << 9 | 1 << 6 | 1 << 2);
    assert_eq!(shown(true), 1 << 32 | 1 << 28 | 1 << 10 | 1 << 9 | 1 << 6 | 1 << 5 | 1 << 2);
}

#[test]
fn nothing_is_served_before_the_driver_has_accepted_what_it_must() {
    let mut driver = Driver::new(8, false, 0, 1);
    for (features, accepted) in [(0, false), (1 << 1, false), (1 | 1 << 9, false), (1, true)] {
        driver.set(0x70, 0);
        driver.set(0x70, 3);
        driver.set(0x24, 1);
        driver.set(0x20, features);
        driver.set(0x70, 11);
        driver.set(0x70, 15);
        assert_eq!(driver.get(0x70) & 12, if accepted { 12 } else { 0 }, "{features:#x}");
        assert!(!driver.set(0x50, 0), "there is no queue");
        assert_eq!(driver.blk.step(&mut driver.bench), Did::Nothing);
    }
}

#[test]
fn what_is_read_is_what_the_disk_has_and_what_is_written_gets_there() {
    let mut driver = Driver::new(64, false, 0, 1);
    let expected = driver.bench.disk[5 * 512..17 * 512].to_vec();
    assert_eq!(driver.ask(READ, 5, &[], 12 * 512), (OK, 12 * 512 + 1));
    assert_eq!(driver.answer(12 * 512), expected);
    assert_eq!((driver.blk.line(), driver.get(0x60)), (true, 1));
    driver.set(0x64, 1);
    assert!(!driver.blk.line());
    let data: Vec<u8> = (0..9 * 512_u32).map(|n| n.to_le_bytes()[0] ^ 0x5a).collect();
    assert_eq!(driver.ask(STORE, 7, &data, 0), (OK, 1));
    assert_eq!(driver.bench.disk[7 * 512..16 * 512], data);
    assert_eq!(driver.bench.disk[5 * 512..7 * 512], expected[..1024], "its neighbours are as they were");
}

/// Many requests at once in every framing, on a machine where accesses wait, against plain arrays.
#[test]
fn requests_in_any_framing_with_any_wait_do_what_they_say() {
    for seed in 1..=60 {
        let mut dice = Dice(seed * 0x9e37_79b9);
        let mut driver = Driver::new(256, false, [0, 3, 8][dice.small(3)], seed);
        let mut model = driver.bench.disk.clone();
        for _ in 0..40 {
            // Requests of one batch do not overlap: their order is nobody's promise.
            let mut expected = Vec::new();
            for place in 0..1 + dice.below(3) {
                let (sector, sectors) = (place * 64 + dice.below(32), 1 + dice.small(32));
                let write = dice.below(2) == 0;
                let base = ROOM + 0x1_0000 * (place + 1);
                driver.header(base, u32::from(write), sector);
                driver.bench.put(base + 0x20, &[0xee]);
                let data: Vec<u8> = (0..sectors * 512).map(|_| dice.roll().to_le_bytes()[0]).collect();
                driver.bench.put(base + 0x1000, &data);
                let buffers = frame(base, data.len(), write, &mut dice);
                let direct = buffers.len() <= 5 && dice.below(2) == 0;
                let head = driver.offer(&buffers, if direct { None } else { Some(base + 0x8000) });
                let at = usize::try_from(sector).unwrap() * 512
                    ..usize::try_from(sector).unwrap() * 512 + data.len();
                if write {
                    model[at.clone()].copy_from_slice(&data);
                }
                expected.push((head, base, write, at));
            }
            driver.run();
            let mut used = driver.used();
            used.sort_unstable();
            let mut heads: Vec<u32> = expected.iter().map(|request| u32::from(request.0)).collect();
            heads.sort_unstable();
            assert_eq!(used.iter().map(|used| used.0).collect::<Vec<_>>(), heads, "seed {seed}");
            for (_, base, write, at) in expected {
                assert_eq!(driver.bench.bytes(base + 0x20, 1), [OK], "seed {seed}");
                if !write {
                    assert_eq!(driver.bench.bytes(base + 0x1000, at.len()), &model[at], "seed {seed}");
                }
            }
            assert_eq!(driver.bench.disk, model, "seed {seed}");
        }
    }
}

/// Cuts header, data and status into buffers anywhere.
fn frame(base: u64, bytes: usize, write: bool, dice: &mut Dice) -> Vec<Buffer> {
    let mut buffers = Vec::new();
    let mut cut = |at: u64, bytes: usize, written: bool, parts: usize| {
        let mut done = 0;
        for part in 0..parts {
            let left = bytes - done;
            let here = if part + 1 == parts { left } else { dice.small(left + 1) };
            buffers.push(Buffer(at + done as u64, u32::try_from(here).unwrap(), written));
            done += here;
        }
    };
    cut(base, 16, false, 2);
    cut(base + 0x1000, bytes, !write, 1 + bytes % 5);
    cut(base + 0x20, 1, true, 1);
    buffers
}

#[test]
fn a_request_that_is_not_on_the_disk_fails_alone() {
    let mut driver = Driver::new(20, false, 0, 1);
    for (sector, bytes) in
        [(20, 512), (19, 1024), (u64::MAX, 512), (u64::MAX / 512, 512), (0, 700), (0, 11 << 10)]
    {
        assert_eq!(driver.ask(READ, sector, &[], bytes), (IO_ERROR, 1), "{sector} {bytes}");
        let data = vec![1; usize::try_from(bytes).unwrap()];
        assert_eq!(driver.ask(STORE, sector, &data, 0), (IO_ERROR, 1), "{sector} {bytes}");
    }
    driver.bench.broken = Some(1);
    assert_eq!(driver.ask(READ, 7, &[], 1024).0, IO_ERROR);
    assert_eq!(driver.ask(READ, 7, &[], 512).0, OK);
    assert_eq!((driver.get(0x70), driver.blk.under_way()), (15, 0));
}

#[test]
fn data_outside_ram_fails_its_request_and_nothing_is_touched() {
    let mut driver = Driver::new(20, false, 0, 1);
    for (at, bytes) in [(0, 512), (RAM + RAM_BYTES as u64 - 1, 512), (u64::MAX - 5, 512), (1 << 40, 512)] {
        for (kind, written) in [(READ, true), (STORE, false)] {
            let before = driver.bench.disk.clone();
            driver.header(ROOM, kind, 3);
            driver.offer(
                &[Buffer(ROOM, 16, false), Buffer(at, bytes, written), Buffer(ROOM + 0x800, 1, true)],
                None,
            );
            driver.run();
            assert_eq!(
                (driver.used().len(), driver.bench.bytes(ROOM + 0x800, 1)[0]),
                (1, IO_ERROR),
                "{at:#x}"
            );
            assert_eq!(driver.bench.disk, before);
        }
    }
    assert_eq!(driver.get(0x70), 15);
}

#[test]
fn a_disk_that_takes_no_writes_takes_none() {
    let mut driver = Driver::new(64, true, 0, 1);
    let before = driver.bench.disk.clone();
    assert_eq!(driver.ask(STORE, 0, &[1; 512], 0).0, IO_ERROR);
    for kind in [DISCARD, ZEROES] {
        assert_eq!(driver.ask(kind, 0, &range(0, 8, 0), 0).0, IO_ERROR);
    }
    assert_eq!((driver.ask(READ, 0, &[], 512).0, driver.ask(FLUSH, 0, &[], 0).0), (OK, OK));
    assert_eq!(driver.bench.disk, before);
}

#[test]
fn a_flush_makes_durable_what_was_written_before_it_and_asks_for_that_once() {
    let mut driver = Driver::new(16, false, 0, 1);
    assert_eq!(driver.ask(STORE, 3, &[7; 512], 0).0, OK);
    assert_ne!(driver.bench.durable, driver.bench.disk);
    assert_eq!(driver.ask(FLUSH, 0, &[], 0), (OK, 1));
    assert_eq!(driver.bench.durable, driver.bench.disk);
}

#[test]
fn zeros_are_exact_where_they_are_asked_for_and_whole_pages_where_they_are_advised() {
    let sectors = 16384;
    for (kind, exact) in [(ZEROES, true), (DISCARD, false)] {
        let mut driver = Driver::new(sectors, false, 4, 5);
        let mut model = driver.bench.disk.clone();
        let mut list = Vec::new();
        // Within a page, over pages, over 2 MiB, nothing, the last sector.
        for (first, count) in [(3, 2), (13, 40), (4000, 9000), (70, 0), (sectors - 1, 1)] {
            list.extend(range(first as u64, u32::try_from(count).unwrap(), 0));
            let (mut from, mut to) = (first * 512, (first + count) * 512);
            if !exact {
                (from, to) = (from.next_multiple_of(4096), to & !4095);
            }
            model[from.min(to)..to].fill(0);
        }
        assert_eq!(driver.ask(kind, 0, &list, 0), (OK, 1));
        assert!(driver.bench.disk == model, "{kind}");
        for (wrong, status) in [
            (range(0, 8, 2), UNSUPPORTED),
            (range(0, 8, u32::from(!exact)), if exact { OK } else { UNSUPPORTED }),
            (range(sectors as u64, 1, 0), IO_ERROR),
            (range(u64::MAX, 8, 0), IO_ERROR),
            (range(0, u32::MAX, 0), IO_ERROR),
            (vec![0; 15], IO_ERROR),
            (range(0, 1, 0).repeat(17), IO_ERROR),
        ] {
            assert_eq!(driver.ask(kind, 0, &wrong, 0).0, status, "{kind} {wrong:x?}");
        }
    }
}

#[test]
fn a_disk_tells_its_name_and_does_not_know_every_request() {
    let mut driver = Driver::new(16, false, 0, 1);
    assert_eq!(driver.ask(GET_ID, 0, &[], 20), (OK, 21));
    assert_eq!(driver.answer(20), b"disk0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    assert_eq!(driver.ask(GET_ID, 0, &[], 3), (OK, 4));
    for kind in [2, 5, 14, u32::MAX] {
        assert_eq!(driver.ask(kind, 0, &[], 0).0, UNSUPPORTED, "{kind}");
    }
}

/// Each of these breaks a rule of the ring: the device stops, tells the driver, and works again after a reset.
#[test]
fn a_chain_or_ring_that_cannot_be_right_stops_the_device_until_it_is_reset() {
    type Wrong = fn(&mut Driver);
    fn chain(driver: &mut Driver, list: &[[u8; 16]]) {
        for (at, raw) in (0..).map(|n| TABLE + 16 * n).zip(list) {
            driver.bench.put(at, raw);
        }
        driver.publish(0);
    }
    let wrong: [(&str, Wrong); 13] = [
        ("a loop", |d| chain(d, &[descriptor(ROOM, 16, NEXT, 1), descriptor(ROOM, 1, NEXT, 0)])),
        ("a head that is no descriptor", |d| d.publish(SIZE)),
        ("a next that is none", |d| chain(d, &[descriptor(ROOM, 16, NEXT, SIZE)])),
        ("more available than there are", |d| {
            d.bench.put(AVAILABLE + 2, &(SIZE + 1).to_le_bytes());
            d.set(0x50, 0);
        }),
        ("what is read behind what is written", |d| {
            chain(d, &[descriptor(ROOM, 16, NEXT | WRITE, 1), descriptor(ROOM, 16, 0, 0)]);
        }),
        ("no header", |d| chain(d, &[descriptor(ROOM, 15, NEXT, 1), descriptor(ROOM, 16, WRITE, 0)])),
        ("no room for a status", |d| chain(d, &[descriptor(ROOM, 16, 0, 0)])),
        ("a header outside RAM", |d| {
            chain(d, &[descriptor(0, 16, NEXT, 1), descriptor(ROOM, 16, WRITE, 0)]);
        }),
        ("a status outside RAM", |d| {
            chain(d, &[descriptor(ROOM, 16, NEXT, 1), descriptor(0, 1, WRITE, 0)]);
        }),
        ("a table with a next", |d| chain(d, &[descriptor(ROOM, 32, INDIRECT | NEXT, 1)])),
        ("a table of no descriptors", |d| chain(d, &[descriptor(ROOM, 8, INDIRECT, 0)])),
        ("a table outside RAM", |d| chain(d, &[descriptor(u64::MAX - 7, 32, INDIRECT, 0)])),
        ("a table in a table", |d| {
            d.bench.put(ROOM, &descriptor(ROOM + 64, 32, INDIRECT, 0));
            chain(d, &[descriptor(ROOM, 32, INDIRECT, 0)]);
        }),
    ];
    for (name, wrong) in wrong {
        let mut driver = Driver::new(16, false, 0, 1);
        wrong(&mut driver);
        driver.run();
        assert_eq!((driver.get(0x70), driver.get(0x60) & 2), (15 | 64, 2), "{name}");
        assert!(driver.used().is_empty() && driver.blk.line(), "{name}");
        driver.publish(0);
        assert_eq!(driver.blk.step(&mut driver.bench), Did::Nothing, "{name}");
        driver.set(0x70, 15);
        assert_eq!(driver.get(0x70), 15 | 64, "only a reset helps: {name}");
        driver.set_up();
        assert_eq!((driver.ask(READ, 0, &[], 512).0, driver.get(0x70)), (OK, 15), "{name}");
    }
}

#[test]
fn rings_that_are_nowhere_or_crooked_are_not_taken_into_use() {
    for (offset, value) in
        [(0x38, 0), (0x38, 12), (0x38, 256), (0x38, 0x1_0010), (0x80, TABLE + 8), (0xa0, 2), (0x90, 1)]
    {
        let mut driver = Driver::new(16, false, 0, 1);
        driver.set(0x44, 0);
        for (offset, value) in [(0x38, 16), (0x80, TABLE), (0x90, AVAILABLE), (0xa0, AVAILABLE + 0x1000)] {
            driver.set(offset, value);
        }
        driver.set(offset, value);
        driver.set(0x44, 1);
        assert_eq!(driver.get(0x44), 0, "{offset:#x} {value:#x}");
    }
    // Addresses that nothing is at are found out when they are used.
    let mut driver = Driver::new(16, false, 0, 1);
    driver.set(0x44, 0);
    for (offset, value) in [(0x38, 16), (0x80, 0), (0x90, 0xffff_fff0), (0x94, 0xffff_ffff), (0xa0, 0)] {
        driver.set(offset, value);
    }
    driver.set(0x44, 1);
    assert_eq!(driver.get(0x44), 0, "a ring past the end of all addresses");
    driver.set(0x94, 0);
    driver.set(0x44, 1);
    driver.set(0x50, 0);
    driver.run();
    assert_eq!(driver.get(0x70), 15 | 64);
}

#[test]
fn a_queue_in_use_stays_where_it_is_and_a_reset_forgets_what_was_under_way() {
    let mut driver = Driver::new(64, false, 2, 9);
    for (offset, value) in [(0x38, 8), (0x80, 0), (0x90, 0), (0xa0, 0)] {
        driver.set(offset, value);
    }
    assert_eq!(driver.ask(READ, 3, &[], 4096).0, OK);
    for forget in [(0x44, 0), (0x70, 0)] {
        driver.header(ROOM, READ, 0);
        driver.offer(
            &[Buffer(ROOM, 16, false), Buffer(ROOM + 0x1000, 8192, true), Buffer(ROOM + 0x800, 1, true)],
            None,
        );
        while driver.blk.under_way() == 0 {
            let _ = driver.blk.step(&mut driver.bench);
            driver.blk.wake();
        }
        driver.set(forget.0, forget.1);
        assert_eq!(driver.blk.under_way(), 0);
        assert_eq!(driver.blk.step(&mut driver.bench), Did::Nothing);
        driver.set_up();
        assert_eq!(driver.ask(READ, 3, &[], 4096).0, OK);
    }
}

#[test]
fn what_the_driver_changes_in_its_tables_after_they_were_read_changes_nothing() {
    let mut driver = Driver::new(64, false, 0, 1);
    driver.header(ROOM, READ, 8);
    driver.offer(
        &[Buffer(ROOM, 16, false), Buffer(ROOM + 0x1000, 8192, true), Buffer(ROOM + 0x800, 1, true)],
        None,
    );
    let expected = driver.bench.disk[8 * 512..24 * 512].to_vec();
    // One step takes the head, one the chain, one the header, one moves a page.
    for _ in 0..4 {
        assert_eq!(driver.blk.step(&mut driver.bench), Did::Some);
    }
    driver.bench.ram[..0x1000].fill(0xff);
    driver.header(ROOM, STORE, u64::MAX);
    driver.run();
    assert_eq!((driver.used(), driver.bench.bytes(ROOM + 0x800, 1)[0]), (vec![(0, 8193)], OK));
    assert_eq!(driver.answer(8192), expected);
}

/// The device is copied with the memory after every number of steps: both sides end with the same bytes, each
/// request done once.
#[test]
fn a_copy_made_at_any_moment_goes_on_with_the_same_requests() {
    let start = {
        let mut driver = Driver::new(64, false, 3, 77);
        for (place, kind) in [(1, READ), (2, STORE), (3, FLUSH)] {
            let base = ROOM + 0x8000 * place;
            driver.header(base, kind, 16 * (place - 1));
            driver.bench.put(base + 0x1000, &[u8::try_from(place).unwrap(); 8192]);
            let data = Buffer(base + 0x1000, 8192, kind == READ);
            let all = [Buffer(base, 16, false), data, Buffer(base + 0x800, 1, true)];
            driver.offer(&all, None);
        }
        driver
    };
    let finish = |mut driver: Driver| {
        driver.blk.wake();
        driver.run();
        let mut used = driver.used();
        used.sort_unstable();
        let durable = driver.bench.durable.clone();
        (used, driver.bench.ram[0x3000..].to_vec(), driver.bench.disk.clone(), durable.len())
    };
    let expected = finish(start.clone());
    assert_eq!(expected.0.len(), 3);
    let mut source = start;
    let mut moments = 0;
    while source.blk.step(&mut source.bench) != Did::Nothing || source.blk.under_way() > 0 {
        source.blk.wake();
        moments += 1;
        assert!(finish(source.clone()) == expected, "after {moments} steps");
    }
    assert!(moments > 15 && finish(source) == expected);
}

#[test]
fn one_request_that_waits_does_not_keep_others_from_being_done() {
    let mut driver = Driver::new(64, false, 0, 1);
    for place in 1..=2 {
        let (base, kind) = (ROOM + 0x8000 * place, if place == 1 { FLUSH } else { READ });
        driver.header(base, kind, 0);
        driver.bench.put(base + 0x800, &[0xee]);
        let data = Buffer(base + 0x1000, 512, true);
        driver.offer(&[Buffer(base, 16, false), data, Buffer(base + 0x800, 1, true)], None);
    }
    let mut waits = 0;
    loop {
        match driver.blk.step(&mut driver.bench) {
            Did::Some => {}
            Did::Wait(slot, _) => {
                assert!(slot < SLOTS);
                waits += 1;
            }
            Did::Nothing => break,
        }
    }
    assert_eq!((waits, driver.used().len(), driver.blk.under_way()), (1, 1, 1));
    assert_eq!(driver.bench.bytes(ROOM + 0x1_0800, 1), [OK]);
}
