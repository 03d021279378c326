//! The list of guests: what the monitor shows and acts on.
//!
//! Every operation takes and gives values; the monitor's commands are a thin layer over these. Ending a
//! guest only says so: the scheduler takes its vCPUs off their CPUs, then the daemon takes it out of this
//! list and frees its memory.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use super::vcpu::State;
use super::{Guest, GuestId, Life, MAX_VCPUS, rank};
use vmobject::lock::{Held, Ranked};

/// The most guests at once.
pub const MAX_GUESTS: usize = 1024;

static GUESTS: Ranked<{ rank::GUESTS }, Vec<Arc<Guest>>> = Ranked::new(Vec::new());
/// Nobody comes any more.
static CLOSED: AtomicBool = AtomicBool::new(false);
static NEXT_ID: AtomicU32 = AtomicU32::new(1);

/// A number that no guest had.
pub fn next_id() -> GuestId {
    GuestId(NEXT_ID.fetch_add(1, Ordering::Relaxed))
}

/// Nobody is put into the list any more: the machine is about to end. Guests whose turn this was first are in it.
pub fn close<const R: u8>(held: &mut Held<'_, R>) {
    const { assert!(R < rank::GUESTS) };
    let (_guests, _held) = GUESTS.lock(held);
    CLOSED.store(true, Ordering::SeqCst);
}

/// The guest with the lowest number above one: to come by all without a copy of the list.
pub fn after<const R: u8>(id: GuestId, held: &mut Held<'_, R>) -> Option<Arc<Guest>> {
    const { assert!(R < rank::GUESTS) };
    let (guests, _held) = GUESTS.lock(held);
    guests.iter().filter(|guest| guest.id.0 > id.0).min_by_key(|guest| guest.id.0).cloned()
}

/// Puts a guest into the list; hands it back when the list is full, or with it there would be more vCPUs than there is
/// room for in the queues, or the machine is about to end.
pub fn add<const R: u8>(guest: Arc<Guest>, held: &mut Held<'_, R>) -> Result<(), Arc<Guest>> {
    const { assert!(R < rank::GUESTS) };
    let (mut guests, _held) = GUESTS.lock(held);
    let vcpus: usize = guests.iter().chain([&guest]).map(|guest| guest.vcpus.len()).sum();
    let full = guests.len() >= MAX_GUESTS || vcpus > MAX_VCPUS || CLOSED.load(Ordering::SeqCst);
    if full || guests.try_reserve(1).is_err() {
        return Err(guest);
    }
    guests.push(guest);
    Ok(())
}

/// The guest with a number.
pub fn get<const R: u8>(id: GuestId, held: &mut Held<'_, R>) -> Option<Arc<Guest>> {
    const { assert!(R < rank::GUESTS) };
    GUESTS.lock(held).0.iter().find(|guest| guest.id == id).cloned()
}

/// The guest with a name or a number.
pub fn find<const R: u8>(word: &str, held: &mut Held<'_, R>) -> Option<Arc<Guest>> {
    const { assert!(R < rank::GUESTS) };
    let number = word.parse().ok().map(GuestId);
    let (guests, _held) = GUESTS.lock(held);
    let by_name = guests.iter().find(|guest| guest.config.name == word);
    by_name.or_else(|| guests.iter().find(|guest| Some(guest.id) == number)).cloned()
}

/// All guests; empty when there is no memory for the list.
pub fn all<const R: u8>(held: &mut Held<'_, R>) -> Vec<Arc<Guest>> {
    const { assert!(R < rank::GUESTS) };
    let (guests, _held) = GUESTS.lock(held);
    let mut list = Vec::new();
    if list.try_reserve_exact(guests.len()).is_ok() {
        list.extend(guests.iter().cloned());
    }
    list
}

/// One guest that has ended, that no CPU holds any more and that nobody else buries. It stays in the list, so
/// that a guest that begins again is never missing from it.
pub fn claim_ended<const R: u8>(held: &mut Held<'_, R>) -> Option<Arc<Guest>> {
    const { assert!(R < rank::GUESTS) };
    let (guests, _held) = GUESTS.lock(held);
    let ended = |guest: &&Arc<Guest>| guest.life() == Life::Ending && is_over(guest) && guest.claim();
    guests.iter().find(ended).cloned()
}

/// Puts a guest into the place of the one with its number, which begins again; hands it back when that was killed
/// meanwhile. Whoever kills the old one later is told that it has no place, and finds this one here.
pub fn replace<const R: u8>(guest: Arc<Guest>, held: &mut Held<'_, R>) -> Result<(), Arc<Guest>> {
    const { assert!(R < rank::GUESTS) };
    let (mut guests, _held) = GUESTS.lock(held);
    match guests.iter_mut().find(|other| other.id == guest.id).filter(|old| old.make_room()) {
        Some(place) => *place = guest,
        None => return Err(guest),
    }
    Ok(())
}

/// Takes a guest out of the list.
pub fn remove<const R: u8>(id: GuestId, held: &mut Held<'_, R>) {
    const { assert!(R < rank::GUESTS) };
    GUESTS.lock(held).0.retain(|guest| guest.id != id);
}

/// True when there is no guest.
pub fn is_empty<const R: u8>(held: &mut Held<'_, R>) -> bool {
    const { assert!(R < rank::GUESTS) };
    GUESTS.lock(held).0.is_empty()
}

fn is_over(guest: &Guest) -> bool {
    !guest.is_kept_still() && guest.is_quiet() && guest.vcpus.iter().all(|vcpu| vcpu.state() == State::Off)
}
