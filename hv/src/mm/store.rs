//! The VM's backing stores on the metal: partitions of virtio disks.
//!
//! A store is a partition, a whole disk that says that it is for guests, for swap or for stored guests, or a half of one
//! of the latter ([`hv_abi::image`]), which has pages while it holds an image; its [`StoreId`] is its place among all of them,
//! in the order found.
//! Starting a transfer turns frames into segments, joining neighbours, and puts them on the disk's queue. The
//! scheduler calls [`Disks::poll`] when a disk interrupts, and delivers what it gives to the VM.
//!
//! Each disk has a lock of its own, below every ranked one: nothing is locked under it, and no completion is
//! delivered under it.
#![expect(unsafe_code, reason = "frames are lent to a device by their number")]

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use arrayvec::ArrayVec;
use board::gpt::{self, GptError, Partition};
use board::platform::Interrupt;
use board::virtio::blk::{self, Blk, BlkError, MAX_SEGMENTS, SECTOR, Segment};
use hv_abi::image::{Header, SLOTS};
use hv_abi::manifest::{DISK_ID, IMAGE_DISK_ID, SWAP_DISK_ID};
use spin::mutex::SpinMutex;
use vmobject::addr::{PAGE_SIZE, Pfn};
use vmobject::store::{Direction, Expected, IoToken, LostPage, PageStore, StoreError, StoreId};

use crate::arch::timer;

/// Completions that are collected under a disk's lock before they are delivered.
const BATCH: usize = 32;
/// Sectors in a page.
const PER_PAGE: u64 = PAGE_SIZE / SECTOR;
/// [`SECTOR`], as the length of a buffer.
const SECTOR_BYTES: usize = 512;

/// How long a disk may have requests and end none before it is given up, unless somebody says otherwise.
const PATIENCE_S: u64 = 120;
/// After how long a silence is told of.
const TELL_S: u64 = 10;

/// One disk.
struct Disk {
    blk: SpinMutex<Blk>,
    interrupt: Interrupt,
    /// It was told that it says nothing.
    told: AtomicBool,
}

impl Disk {
    const fn new(blk: Blk, interrupt: Interrupt) -> Self {
        Self { blk: SpinMutex::new(blk), interrupt, told: AtomicBool::new(false) }
    }
}

/// What a store is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// A partition.
    Partition,
    /// All of a disk for guests: what is on it is none of our business.
    GuestDisk,
    /// All of a disk to swap to, or what its table says is for that.
    Swap,
    /// All of a disk for stored guests; its halves follow.
    ImageDisk,
    /// A half of one.
    Half,
}

/// Where on a disk something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Extent {
    first_sector: u64,
    sectors: u64,
}

/// What a half of a disk for stored guests holds: a guest's pages.
#[derive(Debug)]
pub struct View {
    /// What people call it.
    pub name: String,
    /// Where they are.
    pub header: Header,
    /// What is known of each.
    pub sums: Vec<u32>,
}

impl View {
    fn extent(&self) -> Extent {
        let (start, pages) = (self.header.start(), self.header.pages);
        Extent { first_sector: start.saturating_mul(PER_PAGE), sectors: pages.saturating_mul(PER_PAGE) }
    }
}

/// One store.
struct Part {
    disk: usize,
    kind: Kind,
    name: String,
    extent: Extent,
    /// Of a half. Nothing is locked under it.
    view: SpinMutex<Option<View>>,
}

impl Part {
    fn new(disk: usize, kind: Kind, name: &str, extent: Extent) -> Self {
        Self { disk, kind, name: name.to_string(), extent, view: SpinMutex::new(None) }
    }

    /// Where it is now.
    fn extent(&self) -> Extent {
        match self.kind {
            Kind::Partition | Kind::GuestDisk | Kind::Swap | Kind::ImageDisk => self.extent,
            Kind::Half => self.view.lock().as_ref().map_or(self.extent, View::extent),
        }
    }
}

/// All disks and their stores. Made at boot; later only what halves hold changes.
pub struct Disks {
    disks: Vec<Disk>,
    parts: Vec<Part>,
    /// Seconds of silence after which a disk is given up; 0 is never.
    patience: AtomicU64,
    /// When it was last looked whether one is silent.
    watched: AtomicU64,
}

impl Default for Disks {
    fn default() -> Self {
        Self::new()
    }
}

impl Disks {
    /// No disks.
    pub const fn new() -> Self {
        let (patience, watched) = (AtomicU64::new(PATIENCE_S), AtomicU64::new(0));
        Self { disks: Vec::new(), parts: Vec::new(), patience, watched }
    }

    /// Adds a disk: the partitions of its table, or all of it if it is for guests. Waits for the disk: for boot.
    pub fn add(&mut self, mut blk: Blk, interrupt: Interrupt) -> Result<(), GptError> {
        let (disk, parts) = (self.disks.len(), &mut self.parts);
        let id = blk.id_now().unwrap_or_default();
        let id = String::from_utf8_lossy(id.split(|&byte| byte == 0).next().unwrap_or_default()).into_owned();
        let whole = [(DISK_ID, Kind::GuestDisk), (IMAGE_DISK_ID, Kind::ImageDisk)];
        let whole = whole.into_iter().find(|(stem, _)| id.starts_with(stem));
        if let Some((_, kind)) = whole.filter(|_| parts.len() + SLOTS <= usize::from(u16::MAX)) {
            parts.push(Part::new(disk, kind, &id, Extent { first_sector: 0, sectors: blk.sectors() }));
            if kind == Kind::ImageDisk {
                let nothing = Extent { first_sector: 0, sectors: 0 };
                parts.extend((0..SLOTS).map(|_| Part::new(disk, Kind::Half, &id, nothing)));
            }
            self.disks.push(Disk::new(blk, interrupt));
            return Ok(());
        }
        let known = parts.len();
        let swaps = id.starts_with(SWAP_DISK_ID);
        let mut each = |partition: Partition| {
            let Partition { name, kind, first_sector, sectors, .. } = partition;
            let (is, name) = if swaps { (Kind::Swap, id.as_str()) } else { (Kind::Partition, name.as_str()) };
            // More partitions than a StoreId can name cannot be used.
            if parts.len() <= usize::from(u16::MAX) && (!swaps || kind == gpt::LINUX_SWAP) {
                parts.push(Part::new(disk, is, name, Extent { first_sector, sectors }));
            }
        };
        let read = gpt::read(&mut blk, &mut each);
        if read.is_err() {
            self.parts.truncate(known);
        }
        if swaps && read == Err(GptError::Missing) && known <= usize::from(u16::MAX) {
            self.parts.push(Part::new(
                disk,
                Kind::Swap,
                &id,
                Extent { first_sector: 0, sectors: blk.sectors() },
            ));
        } else {
            read?;
        }
        self.disks.push(Disk::new(blk, interrupt));
        Ok(())
    }

    /// The partition of this name, the first if there are several.
    pub fn find(&self, name: &str) -> Option<StoreId> {
        self.partitions().find(|(_, found)| *found == name).map(|(store, _)| store)
    }

    /// What there is to swap to on the disk that calls itself so.
    pub fn find_swap(&self, id: &str) -> impl Iterator<Item = StoreId> {
        let found = move |part: &Part| part.kind == Kind::Swap && part.name == id;
        self.stores().filter(move |(_, part)| found(part)).map(|(store, _)| store)
    }

    /// The disk for guests that calls itself so.
    pub fn find_disk(&self, id: &str) -> Option<StoreId> {
        let found = |part: &Part| part.kind == Kind::GuestDisk && part.name == id;
        self.stores().find(|(_, part)| found(part)).map(|(store, _)| store)
    }

    /// The disk for stored guests that calls itself so, and its halves.
    pub fn find_image_disk(&self, id: &str) -> Option<(StoreId, [StoreId; SLOTS])> {
        let found = |part: &Part| part.kind == Kind::ImageDisk && part.name == id;
        let (disk, _) = self.stores().find(|(_, part)| found(part))?;
        Some((disk, [StoreId(disk.0 + 1), StoreId(disk.0 + 2)]))
    }

    /// Says what a half of a disk for stored guests holds from now on; nobody uses what it held.
    pub fn set_view(&self, half: StoreId, view: Option<View>) {
        if let Some(part) = self.part(half) {
            let old = core::mem::replace(&mut *part.view.lock(), view);
            drop(old);
        }
    }

    /// The partitions, in the order of their numbers.
    pub fn partitions(&self) -> impl Iterator<Item = (StoreId, &str)> {
        let named = |part: &&Part| part.kind == Kind::Partition;
        self.stores().filter(move |(_, part)| named(part)).map(|(store, part)| (store, part.name.as_str()))
    }

    /// What a store is called.
    pub fn name(&self, store: StoreId) -> Option<&str> {
        self.part(store).map(|part| part.name.as_str())
    }

    /// A lost page in words: of which image, where that is, and why.
    pub fn told(&self, LostPage { store, page, error }: LostPage) -> String {
        let Some(part) = self.part(store) else { return format!("page {page} of nothing: {error}") };
        let whose = match part.kind {
            Kind::Partition => format!("partition \"{}\"", part.name),
            Kind::GuestDisk | Kind::Swap | Kind::ImageDisk => format!("disk \"{}\"", part.name),
            Kind::Half => part.view.lock().as_ref().map_or_else(String::new, |view| {
                format!("stored guest \"{}\", generation {}", view.name, view.header.generation)
            }),
        };
        let byte = part.extent().first_sector * SECTOR + u64::from(page) * PAGE_SIZE;
        format!("page {page} of {whose}, at byte {byte:#x} of its disk: {error}")
    }

    /// True when a store takes no writes.
    pub fn is_read_only(&self, store: StoreId) -> bool {
        self.disk_of(store).is_ok_and(|(_, disk)| disk.blk.lock().is_read_only())
    }

    fn stores(&self) -> impl Iterator<Item = (StoreId, &Part)> {
        (0..=u16::MAX).map(StoreId).zip(&self.parts)
    }

    /// Bytes in a store.
    pub fn bytes(&self, store: StoreId) -> u64 {
        self.part(store).map_or(0, |part| part.extent().sectors * SECTOR)
    }

    /// The disks' interrupts: on any of them, [`Disks::poll`].
    pub fn interrupts(&self) -> impl Iterator<Item = Interrupt> {
        self.disks.iter().map(|disk| disk.interrupt)
    }

    /// Gives every completion there is to `deliver`, with no lock held. Returns their number.
    pub fn poll(&self, deliver: &mut dyn FnMut(IoToken, Result<(), StoreError>)) -> usize {
        let mut count = 0;
        for disk in &self.disks {
            loop {
                let mut batch = ArrayVec::<_, BATCH>::new();
                disk.blk.lock().poll(BATCH, &mut |token, result| {
                    batch.push((IoToken(token), result.map_err(store_error)));
                });
                let more = batch.is_full();
                // By reference: room for a batch is most of a KiB, and most have one.
                for &(token, result) in &batch {
                    deliver(token, result);
                    count += 1;
                }
                if !more {
                    break;
                }
            }
        }
        count
    }

    /// How many seconds a disk may have requests and end none before it is given up; 0 is for ever.
    pub fn set_patience(&self, seconds: u64) {
        self.patience.store(seconds, Relaxed);
    }

    /// True when it is time for [`Self::watch`]: about once a second while a disk has requests, unless there is patience for
    /// ever.
    pub fn is_watch_due(&self, now: u64) -> bool {
        now >= self.watched.load(Relaxed).saturating_add(timer::freq()) && self.is_watched() && self.is_busy()
    }

    /// True unless a silent disk is waited for for ever.
    pub fn is_watched(&self) -> bool {
        self.patience.load(Relaxed) > 0
    }

    /// Tells of disks that have requests and end none, and gives up those that do so for too long (invariant I12):
    /// [`Self::poll`], which has been called just before, then fails what they had. Time in which nobody looked, for the
    /// machine stood still, is nobody's silence.
    pub fn watch(&self, now: u64) {
        let last = self.watched.swap(now, Relaxed);
        let second = timer::freq().max(1);
        let passed = now.saturating_sub(last).min(2 * second);
        let patience = self.patience.load(Relaxed);
        for (number, disk) in self.disks.iter().enumerate() {
            let (silence, in_flight, lost) = {
                let mut blk = disk.blk.lock();
                let silence = blk.silence(passed) / second;
                (silence, blk.in_flight(), silence >= patience && blk.give_up())
            };
            let silent = silence >= TELL_S;
            let told = disk.told.swap(silent, Relaxed);
            if !lost && (told || !silent) {
                continue;
            }
            let what = if lost { "given up" } else { "still waited for" };
            log::warn!(
                "{}: {in_flight} requests, and none has ended for {silence} s: {what}",
                self.told_disk(number)
            );
        }
    }

    /// A disk in words: by the first store on it.
    fn told_disk(&self, number: usize) -> String {
        let name = self.parts.iter().find(|part| part.disk == number).map_or("?", |part| part.name.as_str());
        format!("disk {number} (\"{name}\")")
    }

    /// True while a transfer is in flight on any disk.
    pub fn is_busy(&self) -> bool {
        self.disks.iter().any(|disk| disk.blk.lock().in_flight() > 0)
    }

    /// Transfers in flight on all disks.
    pub fn in_flight(&self) -> usize {
        self.disks.iter().map(|disk| disk.blk.lock().in_flight()).sum()
    }

    /// Reads `out.len()` bytes at `offset` of a store, waiting. For boot: busy while anything is in flight.
    pub fn read_now(&self, store: StoreId, offset: u64, out: &mut [u8]) -> Result<(), StoreError> {
        let (part, disk) = self.disk_of(store)?;
        let (end, extent) = (offset.checked_add(out.len() as u64), part.extent());
        if end.is_none_or(|end| end > extent.sectors * SECTOR) {
            return Err(StoreError::Refused);
        }
        let mut blk = disk.blk.lock();
        let mut sector = extent.first_sector + offset / SECTOR;
        // The part of a first sector that `offset` skips, then whole sectors.
        let skip = usize::try_from(offset % SECTOR).map_err(|_| StoreError::Refused)?;
        let head = if skip == 0 { 0 } else { out.len().min(SECTOR_BYTES - skip) };
        let (first, rest) = out.split_at_mut(head);
        if !first.is_empty() {
            let mut whole = [0; SECTOR_BYTES];
            blk.read_now(sector, &mut whole).map_err(store_error)?;
            first.copy_from_slice(&whole[skip..skip + head]);
            sector += 1;
        }
        blk.read_now(sector, rest).map_err(store_error)
    }

    fn part(&self, store: StoreId) -> Option<&Part> {
        self.parts.get(usize::from(store.0))
    }

    fn disk_of(&self, store: StoreId) -> Result<(&Part, &Disk), StoreError> {
        let part = self.part(store).ok_or(StoreError::Gone)?;
        Ok((part, self.disks.get(part.disk).ok_or(StoreError::Gone)?))
    }
}

impl PageStore for Disks {
    fn start(
        &self,
        store: StoreId,
        direction: Direction,
        first: u64,
        frames: &[Pfn],
        token: IoToken,
    ) -> Result<(), StoreError> {
        let (part, disk) = self.disk_of(store)?;
        let mut transfer = Transfer::default();
        transfer.describe(part.extent(), first, frames)?;
        let way = match direction {
            Direction::In => blk::Direction::Read,
            Direction::Out => blk::Direction::Write,
        };
        let mut blk = disk.blk.lock();
        if let (Direction::In, Some((at, bytes))) = (direction, transfer.tail) {
            // SAFETY: the frame is the transfer's alone by `PageStore::start`'s contract, RAM is mapped where it
            // is, and the tail ends with the page.
            unsafe { core::ptr::with_exposed_provenance_mut::<u8>(at).write_bytes(0, bytes) };
        }
        // SAFETY: the frames are RAM and the device's until the completion, by `PageStore::start`'s contract: the
        // VM keeps them busy (P2).
        unsafe { blk.start(way, transfer.sector, &transfer.segments, token.0) }.map_err(store_error)
    }

    fn start_flush(&self, store: StoreId, token: IoToken) -> Result<(), StoreError> {
        self.disk_of(store)?.1.blk.lock().start_flush(token.0).map_err(store_error)
    }

    fn discard(&self, store: StoreId, first: u64, pages: u64) {
        let Ok((part, disk)) = self.disk_of(store) else { return };
        let Extent { first_sector, sectors } = part.extent();
        let start = first.saturating_mul(PER_PAGE).min(sectors);
        let mut left = pages.saturating_mul(PER_PAGE).min(sectors - start);
        let mut sector = first_sector + start;
        let mut blk = disk.blk.lock();
        // Bounded by the queue: when it is full the rest is forgotten, which advice may be.
        while left > 0 {
            let Ok(taken) = blk.discard(sector, left) else { return };
            sector += taken;
            left -= taken;
        }
    }

    fn pages(&self, store: StoreId) -> u64 {
        self.part(store).map_or(0, |part| part.extent().sectors.div_ceil(PER_PAGE))
    }

    fn whole_pages(&self, store: StoreId) -> u64 {
        self.part(store).map_or(0, |part| part.extent().sectors / PER_PAGE)
    }

    fn expects(&self, store: StoreId, page: u64) -> Expected {
        let Some(part) = self.part(store).filter(|part| part.kind == Kind::Half) else {
            return Expected::Anything;
        };
        let view = part.view.lock();
        let Some(view) = view.as_ref() else { return Expected::Anything };
        match usize::try_from(page).ok().and_then(|page| view.sums.get(page)) {
            None | Some(0) => Expected::Zeros,
            Some(&sum) => Expected::Sum { key: view.header.page_key(page), sum },
        }
    }
}

/// A transfer, as a disk takes it.
#[derive(Debug, Default, PartialEq, Eq)]
struct Transfer {
    sector: u64,
    segments: ArrayVec<Segment, MAX_SEGMENTS>,
    /// Address and length of what lies in the last frame behind the store's end, and reads as zero.
    tail: Option<(usize, usize)>,
}

impl Transfer {
    /// Fills in an empty one where it stands: there is room for 2 KiB of segments.
    fn describe(&mut self, part: Extent, first: u64, frames: &[Pfn]) -> Result<(), StoreError> {
        let start = first.checked_mul(PER_PAGE).filter(|start| *start < part.sectors);
        let start = start.ok_or(StoreError::Refused)?;
        let mut left = (part.sectors - start) * SECTOR;
        self.sector = part.first_sector + start;
        for frame in frames {
            let bytes = left.min(PAGE_SIZE);
            let base = frame.base();
            let size = u32::try_from(bytes).map_err(|_| StoreError::Refused)?;
            if size == 0 {
                return Err(StoreError::Refused);
            }
            left -= bytes;
            if bytes < PAGE_SIZE {
                let number = |value: u64| usize::try_from(value).map_err(|_| StoreError::Refused);
                self.tail = Some((number(base.bits() + bytes)?, number(PAGE_SIZE - bytes)?));
            }
            // A neighbour of the last frame lengthens its segment.
            if let Some(last) = self.segments.last_mut()
                && last.base.checked_add(u64::from(last.bytes)) == Some(base)
                && let Some(joined) = last.bytes.checked_add(size)
            {
                last.bytes = joined;
                continue;
            }
            let segment = Segment { base, bytes: size };
            self.segments.try_push(segment).map_err(|_| StoreError::Refused)?;
        }
        Ok(())
    }
}

fn store_error(error: BlkError) -> StoreError {
    match error {
        BlkError::Busy => StoreError::Busy,
        BlkError::Io => StoreError::Io,
        BlkError::Refused => StoreError::Refused,
        BlkError::Gone => StoreError::Gone,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmobject::addr::PhysAddr;

    fn part() -> Extent {
        Extent { first_sector: 100, sectors: 20 }
    }

    fn transfer(part: Extent, first: u64, frames: &[Pfn]) -> Result<Transfer, StoreError> {
        let mut transfer = Transfer::default();
        transfer.describe(part, first, frames).map(|()| transfer)
    }

    fn segment(base: u64, bytes: u32) -> Segment {
        Segment { base: PhysAddr::new(base), bytes }
    }

    #[test]
    fn neighbouring_frames_are_one_segment() {
        let frames = [Pfn::new(5), Pfn::new(6), Pfn::new(8)];
        let part = Extent { sectors: 1000, ..part() };
        let transfer = transfer(part, 2, &frames).unwrap();
        assert_eq!(transfer.sector, 116);
        assert_eq!(transfer.segments.as_slice(), [segment(0x5000, 0x2000), segment(0x8000, 0x1000)]);
        assert_eq!(transfer.tail, None);
    }

    #[test]
    fn the_last_part_of_a_page_is_transferred_and_the_rest_of_its_frame_is_zeroed() {
        let transfer = transfer(part(), 2, &[Pfn::new(5)]).unwrap();
        assert_eq!(transfer.segments.as_slice(), [segment(0x5000, 4 * 512)]);
        assert_eq!(transfer.tail, Some((0x5800, 0x800)));
    }

    #[test]
    fn pages_past_the_end_are_refused() {
        assert_eq!(transfer(part(), 3, &[Pfn::new(5)]), Err(StoreError::Refused));
        assert_eq!(transfer(part(), 2, &[Pfn::new(5), Pfn::new(6)]), Err(StoreError::Refused));
        assert_eq!(transfer(part(), u64::MAX, &[Pfn::new(5)]), Err(StoreError::Refused));
    }

    #[test]
    fn a_lost_page_is_told_with_its_image_its_place_and_the_reason() {
        let header = Header {
            slot: 1,
            generation: 3,
            half: 1000,
            pages: 500,
            stored: 500,
            state: 0,
            key: 1,
            table_sum: 0,
            state_sum: 0,
        };
        let at = (header.start() + 17) * PAGE_SIZE;
        let half = Part::new(0, Kind::Half, "hv-image-0", Extent { first_sector: 0, sectors: 0 });
        *half.view.lock() = Some(View { name: "golden".into(), header, sums: Vec::new() });
        let disks =
            Disks { parts: [Part::new(0, Kind::Partition, "swap", part()), half].into(), ..Disks::new() };
        let lost = |store, page, error| disks.told(LostPage { store: StoreId(store), page, error });
        assert_eq!(
            lost(0, 2, StoreError::Io),
            "page 2 of partition \"swap\", at byte 0xe800 of its disk: the device says that it failed"
        );
        let told = format!(
            "page 17 of stored guest \"golden\", generation 3, at byte {at:#x} of its disk: what came back is not what was written"
        );
        assert_eq!(lost(1, 17, StoreError::Corrupt), told);
        assert_eq!(lost(2, 0, StoreError::Gone), "page 0 of nothing: the device is gone");
    }

    #[test]
    fn a_store_that_does_not_exist_has_no_pages_and_takes_nothing() {
        let disks = Disks::new();
        assert_eq!(disks.pages(StoreId(0)), 0);
        let started = disks.start(StoreId(0), Direction::In, 0, &[], IoToken(1));
        assert_eq!(started, Err(StoreError::Gone));
    }
}
