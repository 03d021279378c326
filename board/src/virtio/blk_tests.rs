//! The disk driver against a disk in memory that is late, fails, reorders and lies.

use super::blk::{Blk, BlkError, Direction, MAX_SEGMENTS, Segment};
use super::fake::{Chain, FakeTransport, load, store};
use std::boxed::Box;
use std::collections::BTreeMap;
use std::vec;
use std::vec::Vec;
use virtio_drivers::transport::DeviceStatus;
use vmobject::addr::PhysAddr;

const FLUSH: u64 = 1 << 9;
const DISCARD: u64 = 1 << 13;
const READ_ONLY: u64 = 1 << 5;
const SECTORS: usize = 4096;

/// A disk: its bytes, and the device's side of its queue.
struct Disk {
    device: FakeTransport,
    bytes: Vec<u8>,
    discarded: Vec<(u64, u32)>,
    flushes: usize,
}

impl Disk {
    fn new(features: u64) -> (Box<Blk<FakeTransport>>, Self) {
        let mut config = vec![0; 60];
        config[..8].copy_from_slice(&(SECTORS as u64).to_le_bytes());
        config[36..40].copy_from_slice(&64_u32.to_le_bytes());
        let device = FakeTransport::new(features, config);
        let bytes = (0..SECTORS * 512).map(|at| pattern(at / 512)).collect();
        let blk = Box::new(Blk::new(device.clone()).unwrap());
        (blk, Self { device, bytes, discarded: vec![], flushes: 0 })
    }

    /// Does what a chain asks, and answers with a status.
    fn serve(&mut self, chain: &Chain) {
        let (header, _, _) = chain.buffers[0];
        let (kind, sector): (u32, u64) = (load(header), load(header + 8));
        let mut at = usize::try_from(sector).unwrap() * 512;
        let (&(status, _, _), data) = chain.buffers[1..].split_last().unwrap();
        for &(base, bytes, device_writes) in data {
            match kind {
                0 => assert!(device_writes),
                _ => assert!(!device_writes),
            }
            match kind {
                0 => (0..bytes).for_each(|byte| store(base + byte as u64, self.bytes[at + byte])),
                1 => (0..bytes).for_each(|byte| self.bytes[at + byte] = load(base + byte as u64)),
                _ => self.discarded.push((load(base), load(base + 8))),
            }
            at += bytes;
        }
        self.flushes += usize::from(kind == 4);
        self.answer(chain, status, 0);
    }

    fn answer(&self, chain: &Chain, status: u64, value: u8) {
        store(status, value);
        self.device.finish(0, chain.head, 1);
    }

    fn serve_all(&mut self) {
        while let Some(chain) = self.device.take(0) {
            self.serve(&chain);
        }
    }
}

fn pattern(sector: usize) -> u8 {
    u8::try_from(sector % 251).unwrap()
}

/// Memory that lives as long as the test process, so that a device may know it.
fn memory(bytes: usize) -> PhysAddr {
    PhysAddr::new(vec![0xee_u8; bytes].leak().as_mut_ptr().expose_provenance() as u64)
}

fn segment(base: PhysAddr, offset: u64, bytes: u32) -> Segment {
    Segment { base: base.checked_add(offset).unwrap(), bytes }
}

fn start(
    blk: &mut Blk<FakeTransport>,
    way: Direction,
    sector: u64,
    list: &[Segment],
    token: u64,
) -> Result<(), BlkError> {
    // SAFETY: the tests' memory is leaked, and read only after the completion.
    unsafe { blk.start(way, sector, list, token) }
}

fn completions(blk: &mut Blk<FakeTransport>) -> Vec<(u64, Result<(), BlkError>)> {
    let mut list = vec![];
    while blk.poll(7, &mut |token, result| list.push((token, result))) == 7 {}
    list
}

#[test]
fn a_read_fills_its_segments_in_their_order() {
    let (mut blk, mut disk) = Disk::new(FLUSH);
    let base = memory(8192);
    let list = [segment(base, 4096, 1024), segment(base, 0, 512)];
    start(&mut blk, Direction::Read, 10, &list, 5).unwrap();
    assert_eq!(completions(&mut blk), [], "the disk has not answered");
    disk.serve_all();
    assert_eq!(completions(&mut blk), [(5, Ok(()))]);
    let sector = |offset| load::<u8>(base.bits() + offset);
    assert_eq!([sector(4096), sector(4096 + 512), sector(0)], [10, 11, 12]);
    assert_eq!(sector(512), 0xee, "nothing else is touched");
}

#[test]
fn what_is_written_reads_back() {
    let (mut blk, mut disk) = Disk::new(0);
    let base = memory(512 * MAX_SEGMENTS);
    let list: Vec<_> = (0..MAX_SEGMENTS as u64).map(|at| segment(base, at * 512, 512)).collect();
    start(&mut blk, Direction::Write, 100, &list, 1).unwrap();
    disk.serve_all();
    assert_eq!(completions(&mut blk), [(1, Ok(()))]);
    assert!(disk.bytes[100 * 512..(100 + MAX_SEGMENTS) * 512].iter().all(|byte| *byte == 0xee));
    assert_eq!(
        [disk.bytes[99 * 512], disk.bytes[(100 + MAX_SEGMENTS) * 512]],
        [99, pattern(100 + MAX_SEGMENTS)]
    );
}

#[test]
fn a_full_queue_is_busy_until_a_completion_and_every_token_comes_back_once() {
    let (mut blk, mut disk) = Disk::new(0);
    let base = memory(4096);
    let mut token = 0;
    while start(&mut blk, Direction::Read, token % 4000, &[segment(base, 0, 4096)], token).is_ok() {
        token += 1;
    }
    assert_eq!(token, 85);
    assert_eq!(start(&mut blk, Direction::Read, 0, &[segment(base, 0, 4096)], 999), Err(BlkError::Busy));
    // The disk answers in the reverse order.
    let mut chains: Vec<_> = core::iter::from_fn(|| disk.device.take(0)).collect();
    while let Some(chain) = chains.pop() {
        disk.serve(&chain);
    }
    let tokens: Vec<_> = completions(&mut blk).iter().map(|(token, _)| *token).collect();
    assert_eq!(tokens, (0..85).rev().collect::<Vec<_>>());
    assert_eq!(blk.in_flight(), 0);
    start(&mut blk, Direction::Read, 0, &[segment(base, 0, 4096)], 999).unwrap();
}

#[test]
fn the_queue_survives_its_index_wrapping_with_requests_of_all_shapes_in_flight() {
    let (mut blk, mut disk) = Disk::new(FLUSH | DISCARD);
    let base = memory(MAX_SEGMENTS * 512);
    let mut waiting = BTreeMap::new();
    let mut chains: Vec<Chain> = vec![];
    let mut random = 1_u64;
    let mut next = move || {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(random >> 33).unwrap()
    };
    for token in 0..100_000 {
        let shape = next() % 16;
        let started = match shape {
            0 => blk.start_flush(token),
            1 => blk.discard(token % 4000, 8).map(|_| ()),
            _ => {
                let count = if shape == 2 { 1 + next() % MAX_SEGMENTS } else { 1 };
                let list: Vec<_> = (0..count as u64).map(|at| segment(base, at * 512, 512)).collect();
                start(&mut blk, Direction::Read, token % 3900, &list, token)
            }
        };
        match started {
            Ok(()) if shape == 1 => {}
            Ok(()) => assert!(waiting.insert(token, ()).is_none()),
            Err(error) => assert_eq!(error, BlkError::Busy),
        }
        chains.extend(core::iter::from_fn(|| disk.device.take(0)));
        while chains.len() > 20 || (!chains.is_empty() && next().is_multiple_of(3)) {
            let chain = chains.swap_remove(next() % chains.len());
            disk.serve(&chain);
        }
        for (token, result) in completions(&mut blk) {
            assert_eq!(result, Ok(()));
            assert!(waiting.remove(&token).is_some(), "token {token} came twice, or from nowhere");
        }
    }
    chains.into_iter().for_each(|chain| disk.serve(&chain));
    completions(&mut blk).iter().for_each(|(token, _)| assert!(waiting.remove(token).is_some()));
    assert!(waiting.is_empty());
    assert_eq!(blk.in_flight(), 0);
}

#[test]
fn a_transfer_that_the_disk_fails_fails_and_the_next_one_works() {
    let (mut blk, mut disk) = Disk::new(0);
    let list = [segment(memory(512), 0, 512)];
    start(&mut blk, Direction::Read, 0, &list, 1).unwrap();
    start(&mut blk, Direction::Read, 0, &list, 2).unwrap();
    let (first, second) = (disk.device.take(0).unwrap(), disk.device.take(0).unwrap());
    disk.answer(&first, first.buffers[2].0, 1);
    disk.answer(&second, second.buffers[2].0, 77);
    assert_eq!(completions(&mut blk), [(1, Err(BlkError::Io)), (2, Err(BlkError::Io))]);
    start(&mut blk, Direction::Read, 0, &list, 3).unwrap();
    disk.serve_all();
    assert_eq!(completions(&mut blk), [(3, Ok(()))]);
}

#[test]
fn a_disk_that_answers_what_was_not_asked_is_reset_and_all_its_requests_fail() {
    let (mut blk, disk) = Disk::new(0);
    let list = [segment(memory(512), 0, 512)];
    for token in 0..10 {
        start(&mut blk, Direction::Read, 0, &list, token).unwrap();
    }
    let first = disk.device.take(0).unwrap();
    disk.device.finish(0, first.head + 1, 0);
    let lost = completions(&mut blk);
    assert_eq!(lost.len(), 10);
    assert!(lost.iter().all(|(_, result)| *result == Err(BlkError::Gone)));
    assert_eq!(disk.device.state().status, DeviceStatus::empty());
    assert_eq!(start(&mut blk, Direction::Read, 0, &list, 11), Err(BlkError::Gone));
    assert_eq!(blk.in_flight(), 0);
}

#[test]
fn what_is_lost_with_a_disk_is_told_when_the_disk_has_been_reset_and_not_before() {
    let (mut blk, disk) = Disk::new(0);
    let list = [segment(memory(512), 0, 512)];
    start(&mut blk, Direction::Read, 0, &list, 1).unwrap();
    disk.device.state().slow = true;
    blk.give_up();
    assert_eq!((completions(&mut blk), blk.in_flight()), (vec![], 1), "it may still write there");
    assert_eq!(start(&mut blk, Direction::Read, 0, &list, 2), Err(BlkError::Gone));
    disk.device.state().slow = false;
    assert_eq!((completions(&mut blk), blk.in_flight()), (vec![(1, Err(BlkError::Gone))], 0));
}

#[test]
fn a_disk_is_silent_while_it_has_requests_and_ends_none() {
    let (mut blk, mut disk) = Disk::new(0);
    let list = [segment(memory(512), 0, 512)];
    assert_eq!([5, 1000].map(|passed| blk.silence(passed)), [0, 0], "it has nothing to do");
    start(&mut blk, Direction::Read, 0, &list, 1).unwrap();
    assert_eq!([1000, 100].map(|passed| blk.silence(passed)), [0, 100], "since it was first asked");
    start(&mut blk, Direction::Read, 0, &list, 2).unwrap();
    assert_eq!(blk.silence(50), 150, "another request is no answer");
    let chain = disk.device.take(0).unwrap();
    disk.serve(&chain);
    assert_eq!(completions(&mut blk), [(1, Ok(()))]);
    assert_eq!([50, 10].map(|passed| blk.silence(passed)), [0, 10]);
    disk.serve_all();
    assert_eq!(completions(&mut blk), [(2, Ok(()))]);
    start(&mut blk, Direction::Read, 0, &list, 3).unwrap();
    assert_eq!([7000, 1].map(|passed| blk.silence(passed)), [0, 1], "it was idle meanwhile");
}

#[test]
fn a_chain_given_back_twice_is_noticed() {
    let (mut blk, mut disk) = Disk::new(0);
    let list = [segment(memory(512), 0, 512)];
    start(&mut blk, Direction::Read, 0, &list, 1).unwrap();
    let chain = disk.device.take(0).unwrap();
    disk.serve(&chain);
    disk.device.finish(0, chain.head, 0);
    assert_eq!(completions(&mut blk), [(1, Ok(()))]);
    assert_eq!(start(&mut blk, Direction::Read, 0, &list, 2), Err(BlkError::Gone));
}

#[test]
fn requests_of_a_wrong_shape_are_refused_before_the_disk_sees_them() {
    let (mut blk, disk) = Disk::new(READ_ONLY);
    let base = memory(4096);
    let good = segment(base, 0, 512);
    let refused = Err(BlkError::Refused);
    assert_eq!(start(&mut blk, Direction::Read, SECTORS as u64, &[good], 1), refused);
    assert_eq!(start(&mut blk, Direction::Read, u64::MAX, &[good], 1), refused);
    assert_eq!(start(&mut blk, Direction::Read, 0, &[], 1), refused);
    assert_eq!(start(&mut blk, Direction::Read, 0, &[segment(base, 0, 100)], 1), refused);
    assert_eq!(start(&mut blk, Direction::Read, 0, &[good; MAX_SEGMENTS + 1], 1), refused);
    assert_eq!(start(&mut blk, Direction::Write, 0, &[good], 1), refused, "the disk is read-only");
    assert_eq!(blk.discard(0, 1), Err(BlkError::Refused));
    assert!(disk.device.take(0).is_none());
}

#[test]
fn a_flush_of_a_disk_without_a_cache_completes_all_the_same() {
    for features in [0, FLUSH] {
        let (mut blk, mut disk) = Disk::new(features);
        blk.start_flush(9).unwrap();
        disk.serve_all();
        assert_eq!(completions(&mut blk), [(9, Ok(()))]);
        assert_eq!(disk.flushes, usize::from(features == FLUSH));
    }
}

#[test]
fn a_discard_names_its_range_takes_no_more_than_the_disk_does_and_tells_nobody() {
    let (mut blk, mut disk) = Disk::new(DISCARD);
    assert_eq!(blk.discard(40, 1000), Ok(64));
    assert_eq!(blk.discard(104, 3), Ok(3));
    disk.serve_all();
    assert_eq!(completions(&mut blk), []);
    assert_eq!(disk.discarded, [(40, 64), (104, 3)]);
    assert_eq!(blk.in_flight(), 0);
    assert_eq!(blk.discard(4095, 2), Err(BlkError::Refused));
}

#[test]
fn only_features_that_the_driver_knows_are_accepted() {
    let (_blk, disk) = Disk::new(u64::MAX);
    let accepted = disk.device.state().accepted;
    assert_eq!(accepted & (1 << 29 | 1 << 28 | 1 << 34), 0, "EVENT_IDX, INDIRECT_DESC, RING_PACKED");
    assert_ne!(accepted & 1 << 32, 0);
}
