//! Pagers: where absent pages come from, and the transfers in flight.
//!
//! A transfer is a few neighbouring pages of one object, on their way in or out. Its frames are in the object's
//! index all the time, busy, so whoever comes by finds out what to wait for. The VM gives it a token; the store gives
//! the token back with the completion. A token has a generation, so a completion that comes late, twice
//! or for something long gone is noticed and dropped.
//! Some places are left to transfers out, so that want of places never stops what would free memory; and those to swap
//! and those to other stores have places of their own, so that neither takes the other's.
//! Called by `fault` and `pageout`. Calls `object`, `page` and the machine's stores. Locks: the object, then
//! transfers.

mod clean;
mod failed;
mod image;
mod shutdown;
pub mod slots;
pub mod swap;
mod transfer;

pub use clean::{Clean, Cleaned};
pub use shutdown::{Down, Left, Shutdown};

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use core::sync::atomic::{AtomicU32, AtomicU64};

use crate::VmError;
use crate::addr::{PageIndex, Pfn};
use crate::limits::{CLUSTER_PAGES, MAX_DISK_PUTS, MAX_IO, MAX_SWAP_PUTS};
use crate::lock::{Held, IO, Ranked};
use crate::object::ObjectId;
use crate::point;
use crate::store::{Direction, IoToken, StoreId};
use failed::Failures;

/// What a fault waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WaitFor {
    /// The completion of a transfer.
    Io(IoToken),
    /// Something to be freed: a frame, a table, heap, or a place in a store's queue.
    Memory,
    /// Nothing: it has got on, and interrupts come first (I6). No fault of a guest waits so: its instruction faults again.
    Turn,
}

/// What a push came to.
pub(crate) enum Pushed {
    /// Look again: it is done, or not needed any more, or something was done about it.
    Again,
    /// The same, and that took long enough: after the interrupts (I6).
    Part,
    /// Look again when this has happened.
    Wait(WaitFor),
}

/// Where a page's contents are when they are in no frame.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Home {
    store: StoreId,
    page: u32,
}

/// A transfer in flight.
#[derive(Clone, Copy, Debug)]
pub struct Transfer {
    /// For which object.
    pub object: ObjectId,
    /// In or out.
    pub way: Direction,
    /// Its first page.
    pub first: PageIndex,
    /// The page that it is about; the others come along.
    pub wanted: PageIndex,
    /// How many of `frames` take part.
    pub pages: u32,
    /// The frames, in order.
    pub frames: [Pfn; CLUSTER_PAGES as usize],
    /// To swap: the frames will be free.
    pub leaves: bool,
    /// For a fault of the map with this number, or of none in particular.
    pub by: u32,
    /// Transfers are numbered as they begin. 0: not yet.
    pub serial: u64,
}

/// No map in particular.
pub(crate) const NOBODY: u32 = u32::MAX;

impl Transfer {
    /// One out of an object, which has no pages yet.
    const fn out(object: ObjectId, first: PageIndex) -> Self {
        let frames = [Pfn::new(0); CLUSTER_PAGES as usize];
        let (way, leaves) = (Direction::Out, false);
        Self { object, way, first, wanted: first, pages: 0, frames, leaves, by: NOBODY, serial: 0 }
    }

    /// Becomes another one: without those places of `frames` that take no part, most of it where one page is in flight.
    #[inline]
    fn become_like(&mut self, other: &Self) {
        (self.object, self.way, self.leaves, self.by) = (other.object, other.way, other.leaves, other.by);
        (self.first, self.wanted, self.pages, self.serial) =
            (other.first, other.wanted, other.pages, other.serial);
        match other.frames() {
            &[only] => self.frames[0] = only, // the usual one, and a call for more
            frames => self.frames[..frames.len()].copy_from_slice(frames),
        }
    }

    /// How many of its pages leave for swap.
    const fn leaving(&self) -> u32 {
        if self.leaves { self.pages } else { 0 }
    }

    /// Its pages, each with its frame.
    pub fn iter(&self) -> impl Iterator<Item = (PageIndex, Pfn)> + '_ {
        let pages = (self.first.number()..).map(PageIndex::new);
        pages.zip(self.frames.iter().copied()).take(self.pages as usize)
    }

    /// The frame of the page that it is about.
    pub fn frame_of_wanted(&self) -> Pfn {
        self.frames[(self.wanted.number() - self.first.number()) as usize]
    }

    /// Its frames.
    pub fn frames(&self) -> &[Pfn] {
        &self.frames[..self.pages as usize]
    }
}

struct Place {
    generation: u32,
    /// `transfer` is in flight.
    live: bool,
    transfer: Transfer,
}

struct Table {
    places: Vec<Place>,
    vacant: Vec<u32>,
    /// Transfers out that are not to swap.
    disk_puts: u32,
    /// Those to swap, and the pages that they carry.
    swap_puts: u32,
    leaving: u32,
    /// The number of the last one, and how many have ended.
    serial: u64,
    ended: u64,
    failures: Failures,
}

/// What there is to know of a place without its lock.
struct Flight {
    /// The token of the transfer there, or 0: no token is that.
    token: AtomicU64,
    /// Its object, [`ObjectId::encode`]d; set before the token is.
    object: AtomicU64,
}

/// The transfers in flight.
pub struct Transfers {
    table: Ranked<IO, Table>,
    flights: Box<[Flight]>,
    /// How many failures of `table` there are. One of a page is noted, and asked for, with its object locked.
    unread: AtomicU32,
}

/// The last generation of a place: a token's top bit stays clear.
const LAST_GENERATION: u32 = u32::MAX >> 1;

const fn token(place: u32, generation: u32) -> IoToken {
    IoToken((generation as u64) << 32 | place as u64)
}

fn parts(token: IoToken) -> Option<(usize, u32)> {
    let place = usize::try_from(token.0 & 0xffff_ffff).ok()?;
    Some((place, u32::try_from(token.0 >> 32).ok()?))
}

impl Transfers {
    /// None, and places for as many as there may be: what begins a transfer allocates nothing.
    pub fn new() -> Result<Self, VmError> {
        let (mut places, mut vacant, mut flights) = (Vec::new(), Vec::new(), Vec::new());
        flights.try_reserve_exact(MAX_IO as usize).map_err(|_| VmError::NoMemory)?;
        flights
            .resize_with(MAX_IO as usize, || Flight { token: AtomicU64::new(0), object: AtomicU64::new(0) });
        places.try_reserve_exact(MAX_IO as usize).map_err(|_| VmError::NoMemory)?;
        vacant.try_reserve_exact(MAX_IO as usize).map_err(|_| VmError::NoMemory)?;
        let nobodys = Transfer::out(ObjectId::decode(0), PageIndex::new(0));
        places.resize_with(MAX_IO as usize, || Place { generation: 1, live: false, transfer: nobodys });
        vacant.extend((0..MAX_IO).rev());
        let table = Ranked::new(Table {
            places,
            vacant,
            disk_puts: 0,
            swap_puts: 0,
            leaving: 0,
            serial: 0,
            ended: 0,
            failures: Failures::new()?,
        });
        Ok(Self { table, flights: flights.into_boxed_slice(), unread: AtomicU32::new(0) })
    }

    /// The place of a token that is in flight.
    fn flight(&self, token: IoToken) -> Option<&Flight> {
        point::here();
        let (place, _) = parts(token)?;
        self.flights.get(place).filter(|flight| flight.token.load(Acquire) == token.0)
    }

    /// Notes a transfer that is about to start.
    pub fn begin<const OUTER: u8>(
        &self,
        transfer: &Transfer,
        held: &mut Held<'_, OUTER>,
    ) -> Result<IoToken, VmError> {
        let (mut table, _held) = self.table.lock(held);
        let table = &mut *table;
        let (swap, disk) = (MAX_SWAP_PUTS - table.swap_puts, MAX_DISK_PUTS - table.disk_puts);
        let kept = match transfer.way {
            Direction::In => swap + disk,
            Direction::Out if if transfer.leaves { swap } else { disk } == 0 => {
                return Err(VmError::Limit("transfers out"));
            }
            Direction::Out => 0,
        };
        let vacant = if table.vacant.len() > kept as usize { table.vacant.pop() } else { None };
        let place = vacant.ok_or(VmError::Limit("transfers"))?;
        match transfer.way {
            Direction::In => {}
            Direction::Out if transfer.leaves => {
                table.swap_puts += 1;
                table.leaving += transfer.pages;
            }
            Direction::Out => table.disk_puts += 1,
        }
        table.serial += 1;
        let serial = table.serial;
        let slot = &mut table.places[place as usize];
        slot.transfer.become_like(transfer);
        slot.transfer.serial = serial;
        slot.live = true;
        let (token, flight) = (token(place, slot.generation), &self.flights[place as usize]);
        flight.object.store(transfer.object.encode(), Relaxed);
        flight.token.store(token.0, Release);
        Ok(token)
    }

    /// The transfer that a token names is over now, and is shown once more; `None` for a stale token.
    #[inline]
    pub(crate) fn end<T, const OUTER: u8>(
        &self,
        token: IoToken,
        held: &mut Held<'_, OUTER>,
        show: impl FnOnce(&Transfer) -> T,
    ) -> Option<T> {
        let (place, generation) = parts(token)?;
        let (mut table, _held) = self.table.lock(held);
        let table = &mut *table;
        let slot = table.places.get_mut(place).filter(|slot| slot.live && slot.generation == generation)?;
        let transfer = &slot.transfer;
        let shown = show(transfer);
        match transfer.way {
            Direction::In => {}
            Direction::Out if transfer.leaves => {
                table.swap_puts -= 1;
                table.leaving -= transfer.pages;
            }
            Direction::Out => table.disk_puts -= 1,
        }
        slot.live = false;
        table.ended += 1;
        self.flights[place].token.store(0, Release);
        // A place whose generation would repeat, or leave the VM's tokens, retires.
        if generation < LAST_GENERATION {
            slot.generation = generation + 1;
            table.vacant.push(u32::try_from(place).ok()?);
        }
        Some(shown)
    }

    /// The object of a transfer that is in flight; if that ends meanwhile, of another. [`Self::end`] knows.
    pub(crate) fn object(&self, token: IoToken) -> Option<ObjectId> {
        self.flight(token).map(|flight| ObjectId::decode(flight.object.load(Relaxed)))
    }

    /// True until the transfer's completion was delivered.
    pub fn in_flight(&self, token: IoToken) -> bool {
        self.flight(token).is_some()
    }

    /// Pages on their way to swap.
    pub(crate) fn leaving<const OUTER: u8>(&self, held: &mut Held<'_, OUTER>) -> u32 {
        self.table.lock(held).0.leaving
    }

    /// How many transfers of any kind have ended.
    pub(crate) fn ended<const OUTER: u8>(&self, held: &mut Held<'_, OUTER>) -> u64 {
        self.table.lock(held).0.ended
    }

    /// The number of the last transfer that began.
    pub(crate) fn last_serial<const OUTER: u8>(&self, held: &mut Held<'_, OUTER>) -> u64 {
        self.table.lock(held).0.serial
    }

    /// A transfer out of an object that is in flight and has a number up to this one.
    pub(crate) fn out_of<const OUTER: u8>(
        &self,
        object: ObjectId,
        serial: u64,
        held: &mut Held<'_, OUTER>,
    ) -> Option<IoToken> {
        let (table, _held) = self.table.lock(held);
        (0..).zip(&table.places).find_map(|(number, place)| {
            let transfer = Some(&place.transfer).filter(|_| place.live)?;
            let found = transfer.object == object && transfer.way == Direction::Out;
            (found && transfer.serial <= serial).then(|| token(number, place.generation))
        })
    }

    /// How many there are.
    pub fn count<const OUTER: u8>(&self, held: &mut Held<'_, OUTER>) -> usize {
        let (table, _held) = self.table.lock(held);
        table.places.iter().filter(|slot| slot.live).count()
    }
}
