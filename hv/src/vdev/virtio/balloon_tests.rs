//! The balloon with a driver that keeps the rules, one that is slow, and one that does anything at all.

use super::balloon::{Balloon, Reservoir};
use super::driver::{
    AVAILABLE, Bench, Dice, NEXT, RAM, RAM_BYTES, ROOM, SIZE, TABLE, USED, WRITE, descriptor,
};
use super::{Did, Fault, PART, Ram};
use std::{vec, vec::Vec};

/// RAM of which whole pages can be given back.
struct Pond {
    bench: Bench,
    /// Pages given back, by number, in order.
    given: Vec<u64>,
}

impl Ram for Pond {
    type Wait = u64;
    fn read(&mut self, at: u64, out: &mut [u8]) -> Result<(), Fault<u64>> {
        self.bench.read(at, out)
    }
    fn write(&mut self, at: u64, bytes: &[u8]) -> Result<(), Fault<u64>> {
        self.bench.write(at, bytes)
    }
}

impl Reservoir for Pond {
    fn give_back(&mut self, at: u64, bytes: u64) -> Result<u64, Fault<u64>> {
        assert!(at.is_multiple_of(4096) && bytes.is_multiple_of(4096) && bytes > 0, "parts of pages");
        assert_eq!(at / PART, (at + bytes - 1) / PART, "too much at once");
        // Seven pages at once; those that are given back already cost nothing.
        let (mut new, mut done) = (Vec::new(), 0);
        for page in (at..at + bytes).step_by(4096).map(|page| page / 4096) {
            if !self.given.contains(&page) {
                new.push(page);
            }
            if new.len() > 7 {
                new.pop();
                break;
            }
            done += 4096;
        }
        self.bench.write(at, &vec![0; usize::try_from(done).unwrap()])?;
        self.given.extend(new);
        Ok(done)
    }
}

const STATISTICS: usize = 2;
const REPORTED: usize = 3;
/// What the rings of each queue lie behind those of the one before.
const STRIDE: u64 = 0x400;

struct Driver {
    balloon: Balloon,
    pond: Pond,
    next: [u16; 4],
    seen: [u16; 4],
}

impl Driver {
    fn new(slow: u64, seed: u64) -> Self {
        let pond = Pond { bench: Bench::new(8, slow, seed), given: Vec::new() };
        let mut driver = Self { balloon: Balloon::new(), pond, next: [0; 4], seen: [0; 4] };
        driver.set_up();
        driver
    }

    fn set_up(&mut self) {
        (self.next, self.seen) = ([0; 4], [0; 4]);
        self.pond.bench.ram[..0x3000].fill(0);
        let mut settings =
            vec![(0x70, 0), (0x70, 3), (0x24, 0), (0x20, 1 << 28 | 0b10_0110), (0x24, 1), (0x20, 1)];
        settings.push((0x70, 11));
        for queue in 0..4 {
            settings.push((0x30, queue));
            settings.push((0x38, u64::from(SIZE)));
            for (register, place) in [(0x80, TABLE), (0x90, AVAILABLE), (0xa0, USED)] {
                settings.extend([(register, place + STRIDE * queue), (register + 4, 0)]);
            }
            settings.push((0x44, 1));
        }
        settings.push((0x70, 15));
        for (offset, value) in settings {
            self.balloon.write(offset, 4, value);
        }
        assert_eq!((self.balloon.read(0x70, 4), self.balloon.read(0x44, 4)), (15, 1));
    }

    /// Offers buffers as one chain in a queue.
    fn offer(&mut self, queue: usize, buffers: &[(u64, u32)], flags: u16) {
        let rings = STRIDE * queue as u64;
        for (index, &(at, bytes)) in buffers.iter().enumerate() {
            let more = if index + 1 < buffers.len() { NEXT } else { 0 };
            let index = u16::try_from(index).unwrap();
            let raw = descriptor(at, bytes, flags | more, index + 1);
            self.pond.bench.put(TABLE + rings + 16 * u64::from(index), &raw);
        }
        let next = &mut self.next[queue];
        self.pond.bench.put(AVAILABLE + rings + 4 + 2 * u64::from(*next % SIZE), &[0, 0]);
        *next = next.wrapping_add(1);
        self.pond.bench.put(AVAILABLE + rings + 2, &next.to_le_bytes());
        self.balloon.write(0x50, 4, queue as u64);
    }

    /// Lets the device work until it has nothing to do; what it waits for happens at once.
    fn run(&mut self) {
        for _ in 0..100_000 {
            match self.balloon.step(&mut self.pond) {
                Did::Some => {}
                Did::Nothing => return,
                Did::Wait(_) => self.balloon.wake(),
            }
        }
        panic!("the device does not come to rest");
    }

    /// Buffers of a queue that came back since the last look.
    fn used(&mut self, queue: usize) -> u16 {
        let used = self.pond.bench.word(USED + STRIDE * queue as u64 + 2);
        let came = used.wrapping_sub(self.seen[queue]);
        self.seen[queue] = used;
        came
    }

    fn inflate(&mut self, numbers: &[u64]) {
        let raw: Vec<u8> = numbers.iter().flat_map(|n| u32::try_from(*n).unwrap().to_le_bytes()).collect();
        self.pond.bench.put(ROOM, &raw);
        self.offer(0, &[(ROOM, u32::try_from(raw.len()).unwrap())], 0);
        self.run();
    }
}

/// The first page of RAM that nothing else uses.
const FREE: u64 = (RAM + 0x1_0000) / 4096;

#[test]
fn what_is_put_into_the_balloon_is_given_back_once_in_any_order() {
    for slow in [0, 2, 5] {
        let mut driver = Driver::new(slow, 7);
        driver.pond.bench.ram[0x1_0000..].fill(0xaa);
        let numbers: Vec<u64> = (0..40).map(|n| FREE + 60 - n).chain([FREE + 100, FREE + 102]).collect();
        driver.inflate(&numbers);
        assert_eq!(driver.used(0), 1, "the buffer comes back");
        let mut given = driver.pond.given.clone();
        given.sort_unstable();
        given.dedup();
        let mut wanted = numbers.clone();
        wanted.sort_unstable();
        assert_eq!(given, wanted);
        assert_eq!(driver.balloon.given_back(), (42, 0));
        let bytes = driver.pond.bench.bytes(FREE * 4096, 4096 * 21);
        assert!(bytes.iter().all(|byte| *byte == 0xaa), "neighbours are left alone");
        driver.offer(1, &[(ROOM, 4)], 0);
        driver.run();
        assert_eq!(driver.used(1), 1, "what comes out is taken note of");
    }
}

#[test]
fn a_reported_range_is_given_back_but_for_parts_of_pages() {
    let mut driver = Driver::new(3, 5);
    let start = FREE * 4096;
    let part = u32::try_from(PART).unwrap();
    driver.offer(REPORTED, &[(start, 2 * part), (start + 3 * PART + 100, 8192), (start, 100)], WRITE);
    driver.run();
    assert_eq!(driver.used(REPORTED), 1);
    let mut given = driver.pond.given.clone();
    given.sort_unstable();
    given.dedup();
    let whole = 2 * PART / 4096;
    let wanted: Vec<u64> = (FREE..FREE + whole).chain([FREE + 3 * PART / 4096 + 1]).collect();
    assert_eq!(given, wanted);
    assert_eq!(driver.balloon.given_back(), (0, whole + 1));
}

#[test]
fn statistics_are_kept_until_newer_ones_are_asked_for() {
    let mut driver = Driver::new(0, 1);
    let statistic = |tag: u16, value: u64| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat();
    let put = |driver: &mut Driver, free: u64| {
        let raw = [statistic(4, free), statistic(900, 1), statistic(5, 77)].concat();
        driver.pond.bench.put(ROOM, &raw);
        driver.offer(STATISTICS, &[(ROOM, u32::try_from(raw.len()).unwrap())], 0);
        driver.run();
    };
    // The first comes before the driver is ready.
    driver.balloon.write(0x70, 4, 11);
    put(&mut driver, 1000);
    assert_eq!(driver.balloon.statistics().count(), 0);
    driver.balloon.write(0x70, 4, 15);
    driver.run();
    assert_eq!(driver.used(STATISTICS), 0, "giving it back would be a question");
    let said = |driver: &Driver| driver.balloon.statistics().collect::<Vec<_>>();
    assert_eq!(said(&driver), [("free_bytes", 1000), ("total_bytes", 77)]);
    driver.balloon.ask();
    driver.run();
    assert_eq!(driver.used(STATISTICS), 1);
    assert!(driver.balloon.line(), "the driver is told");
    put(&mut driver, 500);
    assert_eq!(said(&driver)[0], ("free_bytes", 500));
}

#[test]
fn a_kept_buffer_goes_with_its_queue_even_if_the_feature_went_first() {
    let mut driver = Driver::new(0, 1);
    driver.offer(STATISTICS, &[(ROOM, 20)], 0);
    driver.run();
    assert_eq!(driver.used(STATISTICS), 0, "it is kept");
    let [status, features, queue, ready] = [0x70, 0x20, 0x30, 0x44];
    // Without a reset: the driver takes "features ok" back and wants no statistics, then the queue goes; and then it
    // wants statistics again, from no queue.
    let settings = [
        (status, 3),
        (0x24, 0),
        (features, 1 << 28 | 0b10_0100),
        (queue, STATISTICS as u64),
        (ready, 0),
        (features, 1 << 28 | 0b10_0110),
        (status, 11),
        (status, 15),
    ];
    for (offset, value) in settings {
        driver.balloon.write(offset, 4, value);
    }
    assert_eq!(driver.balloon.read(status, 4), 15);
    assert!(driver.balloon.is_sound());
    driver.balloon.ask();
    driver.run();
    assert_eq!(driver.balloon.read(status, 4), 15, "there is nothing to give back, and nothing wrong");
    driver.set_up();
    driver.inflate(&[FREE]);
    assert_eq!(driver.used(0), 1);
}

#[test]
fn a_new_target_is_told_and_the_driver_says_how_far_it_is() {
    let mut driver = Driver::new(0, 1);
    let before = driver.balloon.read(0xfc, 4);
    driver.balloon.set_target(300);
    assert!(driver.balloon.line() && driver.balloon.read(0xfc, 4) != before);
    assert_eq!(driver.balloon.read(0x60, 4), 2);
    assert_eq!(driver.balloon.read(0x100, 4), 300);
    driver.balloon.write(0x104, 4, 200);
    assert_eq!(driver.balloon.pages(), (300, 200));
    driver.balloon.write(0x100, 4, 9);
    assert_eq!(driver.balloon.pages(), (300, 200), "the wish is not the driver's to write");
    driver.balloon.write(0x70, 4, 0);
    assert_eq!(driver.balloon.pages(), (300, 0), "a driver that begins anew has nothing in it");
}

#[test]
fn whatever_a_driver_does_the_balloon_comes_to_rest_and_works_again_after_a_reset() {
    let mut given = 0;
    for seed in 1..=200 {
        let mut dice = Dice(seed * 0x9876_5433);
        let mut driver = Driver::new([0, 2, 6][dice.small(3)], seed);
        for _ in 0..300 {
            let odd = match dice.below(4) {
                0 => dice.roll() << 16 | dice.roll(),
                1 => RAM + (RAM_BYTES as u64) - dice.below(64),
                _ => RAM + 0x1_0000 + dice.below(0x8_0000),
            };
            let bytes = u32::try_from(dice.below(0x2_0000)).unwrap();
            match dice.below(8) {
                0 => {
                    driver.balloon.write(dice.below(0x140), 1 << dice.below(4), odd);
                }
                1 => driver.pond.bench.put(TABLE + 8 * dice.below(0x180), &odd.to_le_bytes()),
                2 => driver.pond.bench.put(ROOM, &odd.to_le_bytes()),
                3 => driver.balloon.ask(),
                4 if driver.balloon.read(0x70, 4) != 15 => driver.set_up(),
                _ => {
                    let queue = dice.small(4);
                    let written = if dice.below(8) > 0 { queue == REPORTED } else { queue != REPORTED };
                    let at = if queue == REPORTED { odd } else { ROOM };
                    let bytes = if queue == REPORTED { bytes } else { bytes / 0x100 };
                    driver.offer(queue, &[(at, bytes)], if written { WRITE } else { 0 });
                }
            }
            for _ in 0..dice.below(8) {
                if let Did::Wait(_) = driver.balloon.step(&mut driver.pond) {
                    driver.balloon.wake();
                }
            }
        }
        driver.run();
        given += driver.pond.given.len();
        assert!(driver.balloon.is_sound());
        driver.set_up();
        driver.inflate(&[FREE]);
        assert_eq!(driver.used(0), 1, "seed {seed}");
    }
    assert!(given > 3000, "the mischief never gave anything back: {given}");
}
