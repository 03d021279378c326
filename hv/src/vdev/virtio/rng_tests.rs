//! The source of entropy with a driver that keeps the rules, a copy of both, and a driver that does anything at all.

use super::driver::{
    AVAILABLE, Bench, Dice, INDIRECT, NEXT, RAM, RAM_BYTES, ROOM, SIZE, TABLE, USED, WRITE, descriptor,
};
use super::rng::{Rng, Source};
use super::{Did, Fault, Ram};
use std::{vec, vec::Vec};

/// RAM, and a generator.
#[derive(Clone)]
struct Spring {
    bench: Bench,
    generator: Dice,
    /// Bytes that were drawn for the write that comes next.
    drawn: usize,
}

impl Ram for Spring {
    type Wait = u64;
    fn read(&mut self, at: u64, out: &mut [u8]) -> Result<(), Fault<u64>> {
        self.bench.read(at, out)
    }
    fn write(&mut self, at: u64, bytes: &[u8]) -> Result<(), Fault<u64>> {
        let drawn = core::mem::take(&mut self.drawn);
        if drawn > 0 {
            assert_eq!(bytes.len(), drawn, "what was drawn is what is written");
            assert!(at % 4096 + drawn as u64 <= 4096, "a piece crosses a page");
        }
        self.bench.write(at, bytes)
    }
}

impl Source for Spring {
    fn draw(&mut self, out: &mut [u8]) {
        assert!((1..=64).contains(&out.len()), "too much at once");
        self.drawn = out.len();
        out.fill_with(|| self.generator.roll().to_le_bytes()[0]);
    }
}

#[derive(Clone)]
struct Driver {
    rng: Rng,
    spring: Spring,
    next: u16,
    seen: u16,
}

impl Driver {
    fn new(slow: u64, seed: u64) -> Self {
        let bench = Bench::new(8, slow, seed);
        let spring = Spring { bench, generator: Dice(seed), drawn: 0 };
        let mut driver = Self { rng: Rng::new(), spring, next: 0, seen: 0 };
        driver.set_up();
        driver
    }

    fn set_up(&mut self) {
        (self.next, self.seen) = (0, 0);
        self.spring.bench.ram[..0x3000].fill(0);
        let mut settings = vec![(0x70, 0), (0x70, 3), (0x24, 0), (0x20, 1 << 28), (0x24, 1), (0x20, 1)];
        settings.extend([(0x70, 11), (0x30, 0), (0x38, u64::from(SIZE))]);
        for (register, place) in [(0x80, TABLE), (0x90, AVAILABLE), (0xa0, USED)] {
            settings.extend([(register, place), (register + 4, 0)]);
        }
        settings.extend([(0x44, 1), (0x70, 15)]);
        for (offset, value) in settings {
            self.rng.write(offset, 4, value);
        }
        assert_eq!((self.status(), self.rng.read(0x44, 4)), (15, 1));
    }

    fn status(&self) -> u64 {
        self.rng.read(0x70, 4)
    }

    /// Makes a chain at head 0 available and notifies.
    fn publish(&mut self) {
        self.spring.bench.put(AVAILABLE + 4 + 2 * u64::from(self.next % SIZE), &[0, 0]);
        self.next = self.next.wrapping_add(1);
        self.spring.bench.put(AVAILABLE + 2, &self.next.to_le_bytes());
        self.rng.write(0x50, 4, 0);
    }

    /// Offers buffers as one chain, each with its flags, through a table of its own at `indirect` or without.
    fn offer(&mut self, buffers: &[(u64, u32, u16)], indirect: Option<u64>) {
        let table = indirect.unwrap_or(TABLE);
        for (index, &(at, bytes, flags)) in buffers.iter().enumerate() {
            let more = if index + 1 < buffers.len() { NEXT } else { 0 };
            let index = u16::try_from(index).unwrap();
            self.spring
                .bench
                .put(table + 16 * u64::from(index), &descriptor(at, bytes, flags | more, index + 1));
        }
        if let Some(table) = indirect {
            let bytes = u32::try_from(16 * buffers.len()).unwrap();
            self.spring.bench.put(TABLE, &descriptor(table, bytes, INDIRECT, 0));
        }
        self.publish();
    }

    /// Lets the device work until it has nothing to do; what it waits for happens at once.
    fn run(&mut self) {
        for _ in 0..200_000 {
            match self.rng.step(&mut self.spring) {
                Did::Some => {}
                Did::Nothing => return,
                Did::Wait(_) => self.rng.wake(),
            }
        }
        panic!("the device does not come to rest");
    }

    /// Lengths of the chains that came back since the last look.
    fn used(&mut self) -> Vec<u32> {
        let mut list = Vec::new();
        while self.seen != self.spring.bench.word(USED + 2) {
            let raw = self.spring.bench.bytes(USED + 8 + 8 * u64::from(self.seen % SIZE), 4);
            list.push(u32::from_le_bytes(raw.try_into().unwrap()));
            self.seen = self.seen.wrapping_add(1);
        }
        list
    }

    fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        self.spring.bench.bytes(at, len).to_vec()
    }
}

/// True when some bytes could be random: there are hardly two runs of three in so many.
fn looks_random(bytes: &[u8]) -> bool {
    bytes.windows(3).filter(|three| three[0] == three[1] && three[1] == three[2]).count() < 2
}

#[test]
fn it_says_that_it_is_a_source_of_entropy_with_one_queue_and_no_configuration() {
    let mut driver = Driver::new(0, 1);
    assert_eq!(driver.rng.read(8, 4), 4);
    assert_eq!([0x100, 0x104].map(|offset| driver.rng.read(offset, 4)), [0, 0]);
    driver.rng.write(0x30, 4, 1);
    assert_eq!(driver.rng.read(0x34, 4), 0, "a second queue");
}

#[test]
fn every_buffer_is_filled_to_its_end_and_nothing_beside_it() {
    for (slow, indirect) in [(0, None), (2, None), (3, Some(ROOM)), (0, Some(ROOM))] {
        let mut driver = Driver::new(slow, 7);
        driver.spring.bench.ram[0x1_0000..].fill(0xee);
        let base = RAM + 0x1_0000;
        // One that crosses pages, an empty one, one of a byte.
        let buffers = [(base + 100, 9000, WRITE), (base, 0, WRITE), (base + 0x8001, 1, WRITE)];
        driver.offer(&buffers, indirect);
        driver.run();
        assert_eq!(driver.used(), [9001], "slow {slow}");
        assert!(driver.rng.line(), "the driver is told");
        assert!(looks_random(&driver.bytes(base + 100, 9000)));
        for (at, len) in [(base, 100), (base + 9100, 0x8001 - 9100), (base + 0x8002, 100)] {
            assert!(
                driver.bytes(at, len).iter().all(|byte| *byte == 0xee),
                "{at:#x} is not the driver's wish"
            );
        }
        driver.offer(&[(base, 64, WRITE)], None);
        driver.offer(&[(base, 64, WRITE)], None);
        driver.run();
        assert_eq!(driver.used(), [64, 64]);
    }
}

#[test]
fn a_copy_in_the_middle_of_a_buffer_shares_none_of_its_bytes_with_its_twin() {
    let at = RAM + 0x1_0000;
    for (slow, steps) in (0..14).flat_map(|steps| [(0, steps), (3, steps)]) {
        let mut parent = Driver::new(slow, 5);
        parent.offer(&[(at, 256, WRITE), (at + 0x1000, 256, WRITE)], Some(ROOM));
        for _ in 0..steps {
            if let Did::Wait(_) = parent.rng.step(&mut parent.spring) {
                parent.rng.wake();
            }
        }
        let mut child = parent.clone();
        child.spring.generator = Dice(77);
        child.rng.renew();
        // In either order.
        child.run();
        parent.run();
        assert_eq!((parent.used(), child.used()), (vec![512], vec![512]), "{steps} steps");
        for place in [at, at + 0x1000] {
            let [ours, theirs] = [&parent, &child].map(|driver| driver.bytes(place, 256));
            assert!(looks_random(&ours) && looks_random(&theirs));
            let same = ours.chunks(8).zip(theirs.chunks(8)).filter(|(a, b)| a == b).count();
            assert_eq!(same, 0, "{steps} steps");
        }
    }
}

#[test]
fn one_that_was_stored_goes_on_where_it_was() {
    let at = RAM + 0x1_0000;
    for steps in 0..10 {
        let mut driver = Driver::new(0, 9);
        driver.offer(&[(at, 300, WRITE)], None);
        for _ in 0..steps {
            let _ = driver.rng.step(&mut driver.spring);
        }
        let stored = postcard::to_allocvec(&driver.rng).unwrap();
        driver.rng = postcard::from_bytes(&stored).unwrap();
        assert!(driver.rng.is_sound());
        driver.rng.renew();
        driver.run();
        let came = driver.used();
        assert_eq!(came, [300], "{steps} steps");
        assert!(looks_random(&driver.bytes(at, 300)));
    }
}

#[test]
fn what_a_driver_may_not_offer_stops_the_device_until_it_is_reset() {
    let at = RAM + 0x1_0000;
    let wrong: [&[(u64, u32, u16)]; 6] = [
        // To be read: alone, before and behind what is to be written.
        &[(at, 64, 0)],
        &[(at, 64, 0), (at, 64, WRITE)],
        &[(at, 64, WRITE), (at, 64, 0)],
        // Not RAM.
        &[(RAM - 64, 65, WRITE)],
        &[(u64::MAX - 10, 64, WRITE)],
        // More than a length says.
        &[(at, 64, WRITE), (at, u32::MAX - 63, WRITE)],
    ];
    for (number, buffers) in wrong.iter().enumerate() {
        let mut driver = Driver::new(3, 3);
        driver.offer(buffers, None);
        driver.run();
        assert_eq!((driver.status(), driver.used()), (15 | 64, Vec::<u32>::new()), "{number}");
        assert!(driver.rng.line(), "it is told");
        assert!(driver.rng.is_sound());
        driver.publish();
        driver.run();
        assert!(driver.used().is_empty(), "{number}: nothing happens any more");
        driver.set_up();
        driver.offer(&[(at, 64, WRITE)], None);
        driver.run();
        assert_eq!(driver.used(), [64], "{number}");
    }
}

#[test]
fn a_chain_that_loops_ends() {
    let mut driver = Driver::new(0, 3);
    driver.spring.bench.put(TABLE, &descriptor(RAM + 0x1_0000, 8, WRITE | NEXT, 0));
    driver.publish();
    driver.run();
    assert_eq!((driver.status(), driver.used()), (15 | 64, Vec::<u32>::new()));
}

#[test]
fn whatever_a_driver_does_the_source_comes_to_rest_and_works_again_after_a_reset() {
    let mut filled = 0;
    for seed in 1..=200 {
        let mut dice = Dice(seed * 0x9876_5433);
        let mut driver = Driver::new([0, 2, 6][dice.small(3)], seed);
        for _ in 0..300 {
            let odd = match dice.below(4) {
                0 => dice.roll() << 16 | dice.roll(),
                1 => RAM + (RAM_BYTES as u64) - dice.below(64),
                _ => RAM + 0x1_0000 + dice.below(0x8_0000),
            };
            let bytes = u32::try_from(dice.below(0x400)).unwrap();
            match dice.below(8) {
                0 => {
                    driver.rng.write(dice.below(0x140), 1 << dice.below(4), odd);
                }
                1 => driver.spring.bench.put(TABLE + 8 * dice.below(0x180), &odd.to_le_bytes()),
                2 => driver.rng.renew(),
                3 if driver.status() != 15 => driver.set_up(),
                _ => {
                    let flags = if dice.below(8) > 0 { WRITE } else { 0 };
                    let table = if dice.below(2) == 0 { Some(ROOM) } else { None };
                    driver.offer(&[(odd, bytes, WRITE), (ROOM + 0x1000, 40, flags)], table);
                }
            }
            for _ in 0..dice.below(40) {
                if let Did::Wait(_) = driver.rng.step(&mut driver.spring) {
                    driver.rng.wake();
                }
            }
            assert!(driver.rng.is_sound());
            filled += driver.used().len();
        }
        // What it was given by then has an end.
        driver.run();
        driver.set_up();
        driver.offer(&[(ROOM, 64, WRITE)], None);
        driver.run();
        assert_eq!(driver.used(), [64], "seed {seed}");
    }
    assert!(filled > 3000, "the mischief was hardly ever filled: {filled}");
}
