//! Forking a running guest into live children.
//!
//! The source is kept still for as long as its snapshot takes, which does not grow with its memory; the children are made
//! afterwards, from the snapshot, so that many cost one pause. All are made before any runs: a refusal leaves none
//! behind. A person forks through the monitor; a guest that was granted it, by an HVC or a store to its
//! fork page.

use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::sync::atomic::Ordering;

use crate::arch::timer;
use crate::guest::exit::{Asked, Ending};
use crate::guest::family::Room;
use crate::guest::forkpage::Outcome;
use crate::guest::psci::code;
use crate::guest::snapshot::{self, Keep, Snapshot, SnapshotError};
use crate::guest::vcpu::VcpuRef;
use crate::guest::{Guest, GuestId, Life, create, table};
use crate::mm;
use vmobject::lock::Held;

use super::load::{Cpu, ticks};
use super::still::{Restless, while_still};
use super::{Outside, launch, take_interrupts};

/// With so many maps and objects to be seen to, a fork helps first.
const BACKLOG: usize = 64;
/// For how long, in milliseconds.
const HELP_MS: u64 = 10;
/// A family forks from inside at most once in so many microseconds (invariant I16).
const INTERVAL_US: u64 = 100;

/// Why there are no children.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ForkError {
    /// The source does not stand still.
    Restless(Restless),
    /// Its state could not be kept, or a child not made of it.
    Snapshot(SnapshotError),
    /// There is room for only so many guests more.
    Room(usize),
}

impl fmt::Display for ForkError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Restless(error) => error.fmt(f),
            Self::Snapshot(error) => error.fmt(f),
            Self::Room(room) => write!(f, "there is room for {room} more guests"),
        }
    }
}

impl From<Restless> for ForkError {
    fn from(error: Restless) -> Self {
        Self::Restless(error)
    }
}

impl From<SnapshotError> for ForkError {
    fn from(error: SnapshotError) -> Self {
        Self::Snapshot(error)
    }
}

/// How children begin.
#[derive(Debug)]
pub enum Begin {
    /// They run.
    Running,
    /// They are paused.
    Paused,
    /// They run, what forked them is answered in this vCPU, and they take this room in their family.
    Returning(usize, Asked, Room),
}

/// Forks a guest into `count` children; all or none. Their numbers.
pub fn fork(
    source: &Arc<Guest>,
    count: u32,
    mut begin: Begin,
    cpu: &mut Cpu,
    outside: &dyn Outside,
    held: &mut Held<'_, 0>,
) -> Result<Vec<GuestId>, ForkError> {
    let room = table::MAX_GUESTS.saturating_sub(table::all(held).len());
    if usize::try_from(count).is_ok_and(|count| count > room) {
        return Err(ForkError::Room(room));
    }
    help(cpu, outside, held);
    let draft = snapshot::draft(source, held)?;
    take_interrupts(cpu, outside, held);
    let start = timer::now();
    let take = |_: &Cpu, held: &mut Held<'_, 0>| snapshot::take(source, draft, Keep::Shadowed, held);
    let (moment, pause) = while_still(source, cpu, outside, held, take)?;
    let moment = moment?;
    // The source goes on elsewhere already; here interrupts are all that may come in between.
    let rest = |held: &mut Held<'_, 0>| take_interrupts(cpu, outside, held);
    rest(held);
    let mut children = Vec::new();
    let mut result = Ok(());
    for place in 1..=count {
        match child(source, &moment, (place, count), &mut begin, &rest, held) {
            Ok(guest) => children.push(guest),
            Err(error) => {
                result = Err(error);
                break;
            }
        }
    }
    rest(held);
    snapshot::delete(moment, held);
    rest(held);
    if let Err(error) = result {
        for guest in children {
            create::destroy(&guest, held);
            rest(held);
        }
        return Err(error.into());
    }
    let (mut ids, wanted) = (Vec::new(), children.len());
    for guest in children {
        if !ids.is_empty() {
            rest(held);
        }
        let id = guest.id;
        if launch(guest, held) {
            ids.push(id);
        }
    }
    if ids.len() < wanted {
        // Somebody else took the room meanwhile.
        for &id in &ids {
            if let Some(guest) = table::get(id, held) {
                super::end(&guest, Ending::Killed, held);
            }
        }
        return Err(ForkError::Room(ids.len()));
    }
    let total = timer::now().wrapping_sub(start);
    log::info!("guest {}: forked into {count}, still for {pause} ticks, {total} in all", source.id);
    Ok(ids)
}

/// Does chores first, where very many are left behind: generations that fork as fast as they can would else die faster
/// than the chain that they leave becomes shorter.
fn help(cpu: &Cpu, outside: &dyn Outside, held: &mut Held<'_, 0>) {
    let deadline = timer::now().saturating_add(ticks(HELP_MS));
    while mm::vm().backlog(held) > BACKLOG && timer::now() < deadline {
        super::chores(held);
        take_interrupts(cpu, outside, held);
    }
}

/// A guest that comes from another has its limit: neither a fork nor a reset leads out of one.
pub(super) fn inherit_limit(limit: Option<u32>, guest: &Guest, held: &mut Held<'_, 0>) {
    if limit.is_some()
        && let Err(error) = mm::vm().set_limit(&guest.map, limit, held)
    {
        log::error!("guest {}: it has no limit: {error:?}", guest.id);
    }
}

fn child(
    source: &Guest,
    moment: &Snapshot,
    (place, of): (u32, u32),
    begin: &mut Begin,
    rest: &dyn Fn(&mut Held<'_, 0>),
    held: &mut Held<'_, 0>,
) -> Result<Arc<Guest>, SnapshotError> {
    let id = table::next_id();
    let room = match begin {
        Begin::Running | Begin::Paused => None,
        Begin::Returning(.., room) => room.one(),
    };
    let birth = source.birth.child(place, of, room);
    let name = name_for(source.name(), id);
    let guest = snapshot::make(moment, id, name, birth, rest, held)?;
    inherit_limit(source.map.limit(), &guest, held);
    match begin {
        Begin::Running => {}
        Begin::Paused => {
            guest.move_life(Life::Running, Life::Paused);
        }
        Begin::Returning(vcpu, asked, _) => {
            answer(&guest, *vcpu, *asked, (code::SUCCESS, place, of), 0, held)
        }
    }
    Ok(guest)
}

/// A name that no guest has: the source's, with the number behind it.
fn name_for(source: &str, id: GuestId) -> String {
    let stem = source.rsplit_once('.').map_or(source, |(stem, _)| stem);
    format!("{stem}.{id}")
}

/// What the call or the page that forks answers, in a vCPU whose registers are in memory: in the life that asked, and not
/// in one that it was reset to meanwhile. A refusal leaves all registers but the first alone.
fn answer(
    guest: &Guest,
    vcpu: usize,
    asked: Asked,
    (status, place, of): (u64, u32, u32),
    resets: u32,
    held: &mut Held<'_, 0>,
) {
    // A reset counts itself first, and takes the same locks then.
    let is_same = || guest.resets.load(Ordering::SeqCst) == resets;
    match (asked, guest.vcpus.get(vcpu)) {
        (Asked::Page, _) => {
            let (mut devices, _held) = guest.devices.lock(held);
            if is_same() {
                devices.outcome = Outcome { status, place, of };
            }
        }
        (Asked::Call, Some(vcpu)) => {
            let (mut context, _held) = vcpu.context.lock(held);
            if !is_same() {
                return;
            }
            let answer = [status, place.into(), of.into(), guest.id.0.into()];
            let length = if status == code::SUCCESS { answer.len() } else { 1 };
            context.regs.x[..length].copy_from_slice(&answer[..length]);
        }
        (Asked::Call, None) => {}
    }
}

/// Carries out a guest's wish to be forked. Its vCPU is on no CPU's queue, and its registers are here.
pub(super) fn by_itself(
    cpu: &mut Cpu,
    entry: &VcpuRef,
    (count, asked): (u32, Asked),
    outside: &dyn Outside,
    held: &mut Held<'_, 0>,
) {
    let (guest, index) = (&entry.guest, entry.vcpu().index);
    let interval = timer::freq().saturating_mul(INTERVAL_US) / 1_000_000;
    let resets = guest.resets.load(Ordering::SeqCst);
    // Who copies the guest while its children are made has a vCPU that was answered.
    answer(guest, index, asked, (code::DENIED, 0, 0), resets, held);
    let forked = guest.birth.family.admit(count, interval, timer::now()).is_some_and(|room| {
        fork(guest, count, Begin::Returning(index, asked, room), cpu, outside, held).is_ok()
    });
    // A vCPU that has been forked is unloaded; one that was refused may not be.
    cpu.unload(outside, held);
    if forked {
        answer(guest, index, asked, (code::SUCCESS, 0, count), resets, held);
    }
}
