//! A guest as it was at one instant: its memory, its registers, its devices. Clones are made from it.
//!
//! [`take`] costs what the map has entries and the guest has vCPUs, not its memory: the objects are shared, and
//! whoever writes first gets a shadow (`vmobject`'s map copy). Everything that a guest can see of itself and that no
//! trap answers anew is in a [`Context`] or a device, the same values that a switch moves; so there is no second
//! list of registers to forget one in. What must differ between twins is made anew in [`make`] and [`restore`]: the
//! name, the number, random numbers, the console's log. Named snapshots are kept on the [shelf](keep).
//! Called by `monitor`. Locks: none held by the caller.

use alloc::boxed::Box;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;
use alloc::{format, vec};
use core::fmt;
use core::sync::atomic::{AtomicU32, Ordering};

use hv_abi::machine::MAX_VCPUS;
use serde::{Deserialize, Serialize};
use vmobject::VmError;
use vmobject::lock::{Held, Ranked};

use super::create::{CreateError, Parts};
use super::devices::Devices;
use super::disks;
use super::exit::Ending;
use super::family::Birth;
use super::trng::Generator;
use super::vcpu::{Context, Power, Vcpu};
use super::{Guest, GuestId, genid, rank};
use crate::arch::timer;
use crate::bounded;
use crate::loader::GuestConfig;
use crate::mm;

/// The most snapshots that are kept by name.
pub const MAX_KEPT: usize = 4096;

/// A guest at one instant, but for its memory.
#[derive(Clone, Serialize, Deserialize)]
pub struct Moment {
    /// How it was made.
    pub config: GuestConfig,
    /// Its vCPUs' registers.
    #[serde(deserialize_with = "bounded::list::<_, _, MAX_VCPUS>")]
    pub contexts: Vec<Context>,
    /// Which of them are switched on.
    #[serde(deserialize_with = "bounded::list::<_, _, MAX_VCPUS>")]
    pub powers: Vec<Power>,
    /// Its devices: apart, so that they are not moved about while the guest stands still.
    pub devices: Box<Devices>,
    /// What its counter said.
    pub time: u64,
}

/// A guest at one instant. It never runs itself. Give it back with [`delete`].
#[must_use = "a snapshot holds memory until it is deleted"]
pub struct Snapshot {
    /// All but its memory.
    pub moment: Moment,
    memory: vmobject::map::Snapshot,
    /// What the twins' generators come from.
    random: Ranked<{ rank::RANDOM }, Generator>,
    /// What the host's counter said.
    taken: u64,
}

impl Snapshot {
    /// What a guest is that was stored, and is to go on from now.
    pub fn new(moment: Moment, memory: vmobject::map::Snapshot, random: Generator) -> Box<Self> {
        Box::new(Self { moment, memory, random: Ranked::new(random), taken: timer::now() })
    }

    /// How the guest was made.
    pub const fn config(&self) -> &GuestConfig {
        &self.moment.config
    }

    /// Its memory.
    pub const fn memory(&self) -> &vmobject::map::Snapshot {
        &self.memory
    }
}

/// Why a guest cannot be made what a snapshot is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SnapshotError {
    /// The memory manager refused.
    Vm(VmError),
    /// The guest has another number of vCPUs or disks, or another amount of RAM.
    Shape,
    /// The guest writes through to a disk, which cannot be what it was.
    Disk(String),
    /// There are [`MAX_KEPT`] already.
    TooMany,
    /// There is one of that name.
    Exists,
    /// What differs between twins could not be written.
    Twin(CreateError),
}

impl fmt::Display for SnapshotError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vm(error) => write!(f, "memory: {error:?}"),
            Self::Shape => f.write_str("it has other vCPUs, disks or RAM than the snapshot"),
            Self::Disk(id) => {
                write!(f, "it writes through to disk '{id}', which cannot be taken back; have it private")
            }
            Self::TooMany => write!(f, "there are {MAX_KEPT} snapshots already"),
            Self::Exists => f.write_str("there is a snapshot of that name"),
            Self::Twin(error) => error.fmt(f),
        }
    }
}

impl From<VmError> for SnapshotError {
    fn from(error: VmError) -> Self {
        Self::Vm(error)
    }
}

impl From<CreateError> for SnapshotError {
    fn from(error: CreateError) -> Self {
        Self::Twin(error)
    }
}

/// What of a snapshot does not depend on when it is taken: had before the guest stands still, for it takes a while.
pub struct Draft {
    config: GuestConfig,
    /// Where its guests' random numbers come from.
    pub random: Generator,
    /// Room for what [`take`] finds in the vCPUs.
    contexts: Vec<Context>,
    powers: Vec<Power>,
}

/// Begins a snapshot of a guest, which goes on meanwhile.
pub fn draft(guest: &Guest, held: &mut Held<'_, 0>) -> Result<Draft, SnapshotError> {
    room()?;
    let (mut contexts, mut powers) = (Vec::new(), Vec::new());
    contexts.try_reserve_exact(guest.vcpus.len()).map_err(|_| VmError::NoMemory)?;
    powers.try_reserve_exact(guest.vcpus.len()).map_err(|_| VmError::NoMemory)?;
    let config = GuestConfig { disks: disks::detached(&guest.config.disks), ..guest.config.clone() };
    Ok(Draft { config, random: guest.random.lock(held).0.child(), contexts, powers })
}

/// How a guest's memory is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// What it writes from now on goes to shadows: for one that lasts.
    Shadowed,
    /// Before it writes, what was there is pushed to a copy: for one that is read through once and goes.
    Pushed,
}

/// Refuses what would have the books grow where they may not.
fn room() -> Result<(), VmError> {
    if mm::has_room() { Ok(()) } else { Err(VmError::NoMemory) }
}

/// Keeps what a guest is now, in its [`draft`]. None of its vCPUs runs or has registers in a CPU.
pub fn take(
    guest: &Guest,
    draft: Draft,
    keep: Keep,
    held: &mut Held<'_, 0>,
) -> Result<Box<Snapshot>, SnapshotError> {
    debug_assert!(guest.is_unloaded());
    room()?;
    let Draft { config, random, mut contexts, mut powers } = draft;
    for vcpu in &guest.vcpus {
        // Straight into its place: it is a kilobyte.
        contexts.extend_from_slice(core::slice::from_ref(&*vcpu.context.lock(held).0));
        powers.push(*vcpu.power.lock(held).0);
    }
    let mut devices = guest.devices.lock(held).0.clone();
    devices.disks.iter_mut().for_each(disks::Disk::detach);
    let memory = match keep {
        Keep::Shadowed => mm::vm().snapshot(&guest.map, held)?,
        Keep::Pushed => mm::vm().freeze(&guest.map, held)?,
    };
    let taken = timer::now();
    // Straight into its place, too.
    Ok(Box::new(Snapshot {
        moment: Moment { config, contexts, powers, devices, time: taken.wrapping_sub(guest.offset()) },
        memory,
        random: Ranked::new(random),
        taken,
    }))
}

/// Makes a guest that goes on from a snapshot, ready to be given to the scheduler. Its counter continues where
/// the snapshot's stood; `poll` lets interrupts in and transfers finish between the parts of it.
pub fn make(
    snapshot: &Snapshot,
    id: GuestId,
    name: String,
    birth: Birth,
    poll: &dyn Fn(&mut Held<'_, 0>),
    held: &mut Held<'_, 0>,
) -> Result<Arc<Guest>, SnapshotError> {
    room()?;
    let mut vcpus = Vec::new();
    vcpus.try_reserve_exact(snapshot.moment.contexts.len()).map_err(|_| VmError::NoMemory)?;
    let states = snapshot.moment.contexts.iter().zip(&snapshot.moment.powers);
    vcpus.extend(
        states.enumerate().map(|(index, (context, power))| Vcpu::with(index, context.clone(), *power)),
    );
    let mut random = snapshot.twin(held);
    poll(held);
    let map = mm::map_of(&snapshot.memory, held)?;
    poll(held);
    let promised = mm::vm().set_vcpus(&map, vcpus.len(), held).map_err(CreateError::from);
    if let Err(error) = promised.and_then(|()| genid::renew(&map, &mut random, poll, held)) {
        mm::vm().destroy_map(map, held);
        return Err(error.into());
    }
    poll(held);
    let devices = snapshot.devices_now();
    // What it is granted it has again after a reset, too.
    let grant_fork = birth.family.granted();
    let parts = Parts {
        vcpus: vcpus.into_boxed_slice(),
        devices,
        random,
        log: Arc::default(),
        offset: timer::now().wrapping_sub(snapshot.moment.time),
        birth,
    };
    let config = GuestConfig { name, grant_fork, ..snapshot.moment.config.clone() };
    Ok(Arc::new(Guest::new(id, config, map, parts)))
}

/// Makes a guest again what the snapshot is: all that it did since is gone. None of its vCPUs runs or has
/// registers in a CPU; `poll` is as for [`make`]. When the generation id cannot be written the guest must not go on.
pub fn restore(
    guest: &Guest,
    snapshot: &Snapshot,
    poll: &dyn Fn(&mut Held<'_, 0>),
    held: &mut Held<'_, 0>,
) -> Result<(), SnapshotError> {
    debug_assert!(guest.is_unloaded());
    let config = &snapshot.moment.config;
    let shape = |config: &GuestConfig| (config.vcpus, config.memory, config.disks.len());
    if shape(&guest.config) != shape(config) {
        return Err(SnapshotError::Shape);
    }
    if let Some(disk) = disks::written_through(&guest.config) {
        return Err(SnapshotError::Disk(disk.id.clone()));
    }
    // Its generation id needs some, when it is too late to refuse.
    room()?;
    let mut random = snapshot.twin(held);
    let devices = snapshot.devices_now();
    poll(held);
    mm::vm().reset_map(&guest.map, &snapshot.memory, poll, held)?;
    poll(held);
    guest.resets.fetch_add(1, Ordering::SeqCst);
    let states = snapshot.moment.contexts.iter().zip(&snapshot.moment.powers);
    for (vcpu, (context, power)) in guest.vcpus.iter().zip(states) {
        *vcpu.context.lock(held).0 = context.clone();
        *vcpu.power.lock(held).0 = *power;
    }
    *guest.devices.lock(held).0 = devices;
    // What each CPU knows of the old life's own tables goes when it loads one of the vCPUs, as if another had run there.
    guest.last_ran.iter().for_each(|last| last.store(usize::MAX, Ordering::Relaxed));
    guest.work.wake();
    guest.offset.store(timer::now().wrapping_sub(snapshot.moment.time), Ordering::SeqCst);
    poll(held);
    let renewed = genid::renew(&guest.map, &mut random, poll, held);
    *guest.random.lock(held).0 = random;
    if let Err(error) = renewed {
        guest.end(Ending::Lost);
        return Err(error.into());
    }
    Ok(())
}

/// Gives a snapshot's memory back, as far as nobody shares it.
pub fn delete(snapshot: Box<Snapshot>, held: &mut Held<'_, 0>) {
    mm::vm().delete_snapshot(snapshot.memory, held);
}

impl Snapshot {
    /// The devices of whoever goes on from here now: the generation id has changed, the clock has gone on,
    /// and a buffer that was being filled with random bytes is filled anew.
    fn devices_now(&self) -> Box<Devices> {
        let mut devices = self.moment.devices.clone();
        genid::announce(&mut devices);
        devices.rng.renew();
        devices.rtc.skip(timer::now().saturating_sub(self.taken));
        devices
    }

    /// A generator for one more guest: nobody else gets its numbers.
    fn twin(&self, held: &mut Held<'_, 0>) -> Generator {
        let (mut random, _held) = self.random.lock(held);
        random.stir(timer::now());
        random.child()
    }
}

/// A snapshot with a name.
struct Kept {
    name: String,
    source: Origin,
    /// Guests that began from it, and the one that it was taken of.
    members: Vec<GuestId>,
    snapshot: Arc<Snapshot>,
}

/// What a kept snapshot is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// This guest.
    Guest(GuestId),
    /// The guest stored on the disk of the same name, in this generation.
    Stored(u64),
}

/// What is shown of a kept snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeptInfo {
    /// Its name.
    pub name: String,
    /// What it is of.
    pub source: Origin,
    /// vCPUs.
    pub vcpus: usize,
    /// Bytes of RAM.
    pub memory: u64,
    /// Guests that began from it.
    pub guests: usize,
}

static SHELF: Ranked<{ rank::GUESTS }, Vec<Kept>> = Ranked::new(Vec::new());

static NEXT_NAME: AtomicU32 = AtomicU32::new(1);

/// Keeps a snapshot under a name; without one it gets one.
pub fn keep(
    snapshot: Box<Snapshot>,
    source: Origin,
    name: Option<&str>,
    held: &mut Held<'_, 0>,
) -> Result<String, SnapshotError> {
    let (snapshot, error) = {
        let (mut shelf, _held) = SHELF.lock(held);
        let free = |name: &str| shelf.iter().all(|kept| kept.name != name);
        let name = match name {
            Some(name) => name.to_string(),
            // Each number is tried once, ever: there may be thousands of them.
            None => {
                let number = || NEXT_NAME.fetch_add(1, Ordering::Relaxed);
                core::iter::repeat_with(|| format!("snap{}", number()))
                    .find(|name| free(name))
                    .unwrap_or_default()
            }
        };
        if !free(&name) {
            (snapshot, SnapshotError::Exists)
        } else if shelf.len() >= MAX_KEPT || shelf.try_reserve(1).is_err() {
            (snapshot, SnapshotError::TooMany)
        } else {
            let snapshot = Arc::from(snapshot);
            let members = match source {
                Origin::Guest(guest) => vec![guest],
                Origin::Stored(_) => Vec::new(),
            };
            shelf.push(Kept { name: name.clone(), source, members, snapshot });
            return Ok(name);
        }
    };
    delete(snapshot, held);
    Err(error)
}

/// The snapshot of that name, for a guest that is made from it or reset to it.
pub fn find(name: &str, guest: GuestId, held: &mut Held<'_, 0>) -> Option<Arc<Snapshot>> {
    let (mut shelf, _held) = SHELF.lock(held);
    let kept = shelf.iter_mut().find(|kept| kept.name == name)?;
    if !kept.members.contains(&guest) && kept.members.try_reserve(1).is_ok() {
        kept.members.push(guest);
    }
    Some(kept.snapshot.clone())
}

/// What the snapshot of that name is of.
pub fn source(name: &str, held: &mut Held<'_, 0>) -> Option<Origin> {
    let (shelf, _held) = SHELF.lock(held);
    shelf.iter().find(|kept| kept.name == name).map(|kept| kept.source)
}

/// The name of the snapshot that a guest last began from, or that was last taken of it.
pub fn origin(guest: GuestId, held: &mut Held<'_, 0>) -> Option<String> {
    let (shelf, _held) = SHELF.lock(held);
    shelf.iter().rev().find(|kept| kept.members.contains(&guest)).map(|kept| kept.name.clone())
}

/// Deletes the snapshot of that name; false when there is none, or a guest is just being made from it. Guests
/// that were made from it go on.
pub fn forget(name: &str, held: &mut Held<'_, 0>) -> bool {
    let snapshot = {
        let (mut shelf, _held) = SHELF.lock(held);
        let unused = |kept: &Kept| kept.name == name && Arc::strong_count(&kept.snapshot) == 1;
        shelf
            .iter()
            .position(unused)
            .and_then(|place| Arc::into_inner(shelf.remove(place).snapshot).map(Box::new))
    };
    let found = snapshot.is_some();
    if let Some(snapshot) = snapshot {
        delete(snapshot, held);
    }
    found
}

/// The `nth` that is kept.
pub fn nth(nth: usize, held: &mut Held<'_, 0>) -> Option<KeptInfo> {
    let (shelf, _held) = SHELF.lock(held);
    shelf.get(nth).map(|kept| KeptInfo {
        name: kept.name.clone(),
        source: kept.source,
        vcpus: kept.snapshot.moment.powers.len(),
        memory: kept.snapshot.moment.config.memory,
        guests: kept.members.len() - usize::from(matches!(kept.source, Origin::Guest(_))),
    })
}
