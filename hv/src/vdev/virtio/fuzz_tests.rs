//! A driver that does anything at all: the device ends, touches nothing but RAM, and serves again after a reset.

use super::blk::Did;
use super::driver::{AVAILABLE, Buffer, Dice, Driver, RAM, ROOM, TABLE, descriptor};

/// A number that is often near something.
fn odd(dice: &mut Dice) -> u64 {
    match dice.below(8) {
        0 => dice.roll() << 16 | dice.roll(),
        1 => 0,
        2 => u64::MAX - dice.below(64),
        3 => RAM + (1 << 20) - dice.below(64),
        4 => dice.below(64),
        _ => RAM + dice.below(1 << 20),
    }
}

fn word(value: u64) -> u32 {
    u32::try_from(value & 0xffff_ffff).unwrap()
}

fn short(value: u64) -> u16 {
    u16::try_from(value & 0xffff).unwrap()
}

/// Something that a broken or wicked driver might do.
fn mischief(driver: &mut Driver, dice: &mut Dice) {
    match dice.below(12) {
        0 => {
            let (offset, value) = (dice.below(0x140), odd(dice));
            driver.blk.write(offset, 1 << dice.below(4), value);
        }
        1 => {
            // The registers that matter.
            let offset = [0x38, 0x44, 0x50, 0x64, 0x70, 0x80, 0x90, 0xa0][dice.small(8)];
            let value = odd(dice);
            driver.set(offset, value);
        }
        2..=5 => {
            let table = if dice.below(2) == 0 { TABLE } else { ROOM };
            let at = table + 16 * dice.below(16);
            let bytes = if dice.below(2) == 0 { 16 * dice.below(8) } else { odd(dice) };
            let next = if dice.below(4) > 0 { dice.below(16) } else { dice.roll() };
            let (place, flags) = (odd(dice), dice.below(8));
            driver.bench.put(at, &descriptor(place, word(bytes), short(flags), short(next)));
        }
        6 => {
            let (kind, sector) = ([0, 1, 4, 8, 11, 13, 99][dice.small(7)], dice.below(40));
            let at = ROOM + 16 * dice.below(256);
            driver.header(at, kind, sector);
        }
        7 => {
            let head = if dice.below(8) > 0 { dice.below(16) } else { dice.roll() };
            driver.publish(short(head));
        }
        8 => {
            let index = dice.roll();
            driver.bench.put(AVAILABLE + 2, &short(index).to_le_bytes());
        }
        9 => driver.blk.wake(),
        10 if driver.get(0x70) & 15 != 15 || driver.get(0x70) & 64 != 0 => driver.set_up(),
        _ => {
            // In between something sensible, so that the rest is met in the middle of it.
            let (base, kind) = (ROOM + 0x1_0000 + 0x4000 * dice.below(8), [0, 1, 4, 13][dice.small(4)]);
            driver.header(base, kind, dice.below(32));
            let data = Buffer(base + 0x1000, 512 * word(1 + dice.below(16)), kind == 0);
            let all = [Buffer(base, 16, false), data, Buffer(base + 0x800, 1, true)];
            driver.offer(&all, (dice.below(2) == 0).then_some(base + 0x100));
        }
    }
}

#[test]
fn whatever_a_driver_does_the_device_comes_to_rest_and_serves_again_after_a_reset() {
    let mut served = 0;
    for seed in 1..=300 {
        let mut dice = Dice(seed * 0x1234_5677);
        let mut driver = Driver::new(64, seed % 7 == 0, [0, 2, 6][dice.small(3)], seed);
        for _ in 0..400 {
            mischief(&mut driver, &mut dice);
            // It may act while the device is in the middle of something.
            for _ in 0..dice.below(12) {
                let _ = driver.blk.step(&mut driver.bench);
            }
            let _ = driver.blk.read(dice.below(0x200), 1 << dice.below(4));
            served += driver.used().len();
        }
        // Left alone it comes to rest: no chain is so long that this would not do.
        let mut left = 20_000;
        loop {
            match driver.blk.step(&mut driver.bench) {
                Did::Nothing if driver.blk.under_way() == 0 => break,
                Did::Some | Did::Nothing | Did::Wait(..) => driver.blk.wake(),
            }
            left -= 1;
            assert!(left > 0, "seed {seed}: still at work");
        }
        driver.set_up();
        assert_eq!(driver.ask(0, 1, &[], 1024), (0, 1025), "seed {seed}");
    }
    assert!(served > 3000, "the mischief was never a request: {served}");
}
