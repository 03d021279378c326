//! Storing guests on a disk that loses power, fails and is busy; and opening what that leaves.

use super::*;
use crate::stored::open::{self, OpenError};
use alloc::collections::BTreeMap;
use alloc::vec;
use core::convert::Infallible;
use vmobject::store::StoreId;

const SECTOR: usize = 512;
const PAGES: u64 = 200;

/// Numbers that look random, and repeat.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % sides
    }
}

/// A guest whose pages are those of a generation: every third is zeros.
struct Guest {
    seed: u8,
    dice: Dice,
}

fn byte(seed: u8, number: u64) -> u8 {
    if number.is_multiple_of(3) { 0 } else { seed.wrapping_add(u8::try_from(number % 200).unwrap()) | 1 }
}

impl Source for Guest {
    type Wait = ();

    fn page(&mut self, number: u64, out: &mut [u8; PAGE]) -> Result<(), Lacks<()>> {
        if self.dice.roll(10) == 0 {
            out.fill(0xee);
            return Err(Lacks::Wait(()));
        }
        out.fill(byte(self.seed, number));
        Ok(())
    }
}

/// A disk that keeps apart what is durable and what is not yet: sector by sector, in the order written.
struct Disk {
    durable: Vec<u8>,
    volatile: Vec<(usize, [u8; SECTOR])>,
    started: Vec<u8>,
    dice: Dice,
    /// So many requests are taken before one fails.
    fails_after: Option<u32>,
}

impl Disk {
    fn new(pages: u64) -> Self {
        let durable = vec![0; usize::try_from(pages).unwrap() * PAGE];
        Self { durable, volatile: Vec::new(), started: Vec::new(), dice: Dice(1), fails_after: None }
    }

    fn pages(&self) -> u64 {
        (self.durable.len() / PAGE) as u64
    }

    fn admit(&mut self) -> Result<(), StoreError> {
        if self.dice.roll(5) == 0 {
            return Err(StoreError::Busy);
        }
        match &mut self.fails_after {
            Some(0) => Err(StoreError::Io),
            Some(left) => {
                *left -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// What the disk has after a power cut now: of what is not durable, any part.
    fn after_a_cut(&self, dice: &mut Dice) -> Vec<u8> {
        let mut left = self.durable.clone();
        let keep = dice.roll(4);
        for (place, bytes) in &self.volatile {
            let kept = match keep {
                0 => false,
                1 => true,
                _ => dice.roll(2) == 0,
            };
            if kept {
                left[*place..*place + SECTOR].copy_from_slice(bytes);
            }
        }
        left
    }
}

impl Sink for Disk {
    fn write(&mut self, first: u64, pages: &[Page], tag: u8) -> Result<(), StoreError> {
        self.admit()?;
        for (page, bytes) in (usize::try_from(first).unwrap()..).zip(pages) {
            for (sector, bytes) in bytes.0.as_chunks::<SECTOR>().0.iter().enumerate() {
                self.volatile.push((page * PAGE + sector * SECTOR, *bytes));
            }
        }
        self.started.push(tag);
        Ok(())
    }

    fn flush(&mut self, tag: u8) -> Result<(), StoreError> {
        self.admit()?;
        assert!(self.started.is_empty(), "a flush does not cover what is not done");
        self.started.push(tag);
        Ok(())
    }
}

fn opened(bytes: &[u8]) -> Result<Option<Opened>, OpenError> {
    let mut read = |page: u64, out: &mut [u8]| {
        let at = usize::try_from(page).unwrap() * PAGE;
        out.copy_from_slice(bytes.get(at..at + out.len()).ok_or(StoreError::Refused)?);
        Ok(())
    };
    open::open(&mut read, (bytes.len() / PAGE) as u64)
}

/// Which generation a disk has, every page of it being what it should be.
fn generation(bytes: &[u8]) -> Option<u64> {
    let image = opened(bytes).unwrap()?;
    let generation = image.header.generation;
    let seed = u8::try_from(generation).unwrap();
    assert_eq!(image.state, state(seed));
    for (number, sum) in (0..).zip(&image.sums) {
        let place = usize::try_from(image.header.start() + number).unwrap() * PAGE;
        let page: &[u8; PAGE] = bytes[place..].first_chunk().unwrap();
        match sum {
            0 => assert_eq!(byte(seed, number), 0),
            sum => {
                assert_eq!(*sum, mark(page, image.header.page_key(number)), "page {number}");
                assert!(page.iter().all(|found| *found == byte(seed, number)), "page {number}");
            }
        }
    }
    Some(generation)
}

fn state(seed: u8) -> Vec<u8> {
    vec![seed; 5000]
}

fn writer(disk: &Disk, newest: Option<&Header>, seed: u8) -> Writer {
    let key = 77 + u64::from(seed);
    let contents = Contents { pages: PAGES, state: state(seed), text: "{}".into(), key };
    Writer::new(contents, newest, disk.pages()).unwrap()
}

/// Stores a guest; `each` sees the disk after every step.
fn store(
    disk: &mut Disk,
    newest: Option<&Header>,
    seed: u8,
    each: &mut dyn FnMut(&Disk),
) -> Result<Opened, WriteError> {
    let mut writer = writer(disk, newest, seed);
    let mut guest = Guest { seed, dice: Dice(u64::from(seed)) };
    loop {
        match writer.step(&mut guest, disk) {
            Step::More | Step::Wait(()) => {}
            Step::Idle => {
                if !disk.started.is_empty() {
                    let nth = usize::try_from(disk.dice.roll(disk.started.len() as u64)).unwrap();
                    let tag = disk.started.remove(nth);
                    if tag == FLUSH {
                        for (place, bytes) in core::mem::take(&mut disk.volatile) {
                            disk.durable[place..place + SECTOR].copy_from_slice(&bytes);
                        }
                    }
                    writer.completed(tag, Ok(()));
                }
            }
            Step::Done => return Ok(writer.finish()),
            Step::Failed(error) => return Err(error),
        }
        each(disk);
    }
}

#[test]
fn what_was_stored_is_what_is_opened() {
    let mut disk = Disk::new(500);
    assert_eq!(opened(&disk.durable), Ok(None));
    let mut newest = None;
    for seed in 1..6 {
        let image = store(&mut disk, newest.as_ref(), seed, &mut |_| {}).unwrap();
        assert_eq!(generation(&disk.durable), Some(u64::from(seed)));
        let found = opened(&disk.durable).unwrap().unwrap();
        assert_eq!(found, image);
        assert_eq!(found.header.stored, (0..PAGES).filter(|number| byte(seed, *number) != 0).count() as u64);
        newest = Some(found.header);
    }
}

#[test]
fn a_power_cut_at_any_point_leaves_the_old_guest_or_the_new_one() {
    let (mut disk, mut dice, mut newest) = (Disk::new(500), Dice(99), None::<Header>);
    let mut seen = BTreeMap::<_, u32>::new();
    for seed in 1..5_u8 {
        let before = newest.map(|header| header.generation);
        let image = store(&mut disk, newest.as_ref(), seed, &mut |disk| {
            for _ in 0..3 {
                let left = disk.after_a_cut(&mut dice);
                let found = match opened(&left) {
                    // Of the first guest there may be half a header and nothing else.
                    Err(OpenError::Damaged("its header", 0)) if before.is_none() => None,
                    Err(error) => panic!("{error}"),
                    Ok(_) => generation(&left),
                };
                assert!(found == before || found == Some(u64::from(seed)), "{found:?} while storing {seed}");
                *seen.entry(found).or_default() += 1;
            }
        });
        newest = Some(image.unwrap().header);
    }
    assert_eq!(seen.len(), 5, "{seen:?}");
    assert!(seen.values().sum::<u32>() > 2000, "{seen:?}");
}

#[test]
fn a_disk_that_fails_at_any_request_keeps_the_guest_that_it_had() {
    let mut disk = Disk::new(500);
    let first = store(&mut disk, None, 1, &mut |_| {}).unwrap().header;
    let (durable, mut failures) = (disk.durable.clone(), 0);
    for limit in 0.. {
        disk = Disk { durable: durable.clone(), fails_after: Some(limit), ..Disk::new(500) };
        let stored = store(&mut disk, Some(&first), 2, &mut |_| {});
        let found = generation(&disk.durable);
        match stored {
            Ok(_) => {
                assert_eq!(found, Some(2));
                break;
            }
            Err(error) => assert_eq!(error, WriteError::Disk(StoreError::Io)),
        }
        assert_eq!(found, Some(1), "after {limit}");
        failures += 1;
    }
    assert!(failures > 10, "{failures}");
}

#[test]
fn a_page_that_is_lost_ends_it_and_a_disk_that_is_too_small_is_refused() {
    const LOST: LostPage = LostPage { store: StoreId(3), page: 51, error: StoreError::Corrupt };
    struct Holes;
    impl Source for Holes {
        type Wait = Infallible;
        fn page(&mut self, number: u64, out: &mut [u8; PAGE]) -> Result<(), Lacks<Infallible>> {
            out.fill(1);
            if number == 50 { Err(Lacks::Lost(LOST)) } else { Ok(()) }
        }
    }
    let mut disk = Disk::new(500);
    let mut writer = writer(&disk, None, 1);
    let end = loop {
        match writer.step(&mut Holes, &mut disk) {
            Step::Failed(error) => break error,
            Step::Done => panic!("stored"),
            Step::More | Step::Idle => {
                while let Some(tag) = disk.started.pop() {
                    writer.completed(tag, Ok(()));
                }
            }
        }
    };
    assert_eq!(end, WriteError::Lost(50, LOST));
    let contents = Contents { pages: PAGES, state: state(1), text: "{}".into(), key: 1 };
    let refused = Writer::new(contents, None, 400).err();
    assert_eq!(refused, Some(WriteError::Small { has: 199, needs: 203 }));
}

#[test]
fn what_is_damaged_is_refused_with_what_and_where() {
    let mut disk = Disk::new(500);
    let image = store(&mut disk, None, 3, &mut |_| {}).unwrap();
    let last = Header { generation: u64::MAX - 1, ..image.header };
    let contents = Contents { pages: PAGES, state: state(1), text: "{}".into(), key: 1 };
    assert_eq!(Writer::new(contents, Some(&last), 500).err(), Some(WriteError::LastGeneration));
    let whole = disk.durable.clone();
    let table = image.header.start() + PAGES;
    let state = table + image.header.table_pages();
    let places =
        [(0, "its header", 0), (table, "its table of sums", table), (state, "the guest's state", state)];
    for (page, what, place) in places {
        let mut bytes = whole.clone();
        bytes[usize::try_from(page).unwrap() * PAGE + 77] ^= 4;
        assert_eq!(opened(&bytes).err(), Some(OpenError::Damaged(what, place)));
    }
    let short = &whole[..usize::try_from(table).unwrap() * PAGE];
    assert!(matches!(opened(short), Err(OpenError::Short { .. })));
    let mut foreign = whole.clone();
    foreign[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
    assert_eq!(opened(&foreign), Err(OpenError::Foreign));
    let mut later = whole;
    later[8] = 9;
    assert_eq!(opened(&later), Err(OpenError::Version(9)));
}
