//! Guests stored on disks: which there are, making guests from them, and storing one.
//!
//! A disk for stored guests holds one, in one of its halves ([`hv_abi::image`]); the other half takes the next. What is
//! there is read at boot, except for the guest's pages: those come when somebody touches them, from an object whose
//! pager is the half, and all guests made from it share that object. A stored guest that is wanted becomes a
//! [`Snapshot`] first, so everything that can be done with a snapshot can be done with it.
//! Called by `boot`, `monitor` and `sched`'s jobs.

#[cfg(test)]
pub(crate) mod numbered;
pub mod state;

use alloc::boxed::Box;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;

use hv_abi::image::{Header, SLOTS};
use serde_json::json;
use vmobject::VmError;
use vmobject::addr::{PAGE_SIZE, PageIndex};
use vmobject::lock::{Held, Ranked};
use vmobject::map::Share;
use vmobject::store::StoreId;

use super::snapshot::{self, Moment, Origin, Snapshot, SnapshotError};
use super::{GuestId, create, rank};
use crate::arch::{id, timer};
use crate::mm::store::View;
use crate::mm::{self, Map};
use crate::stored::open::{OpenError, Opened, newest, open};
use crate::stored::write::{Contents, WriteError, Writer};
use state::{Region, State, StateError};

/// Why a stored guest cannot be had, or a guest not be stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoredError {
    /// There is no disk of that name.
    Unknown,
    /// Nothing is stored there yet.
    Empty,
    /// What is there is not usable.
    Open(OpenError),
    /// Its state is not.
    State(StateError),
    /// The memory manager refused.
    Vm(VmError),
    /// The disk takes no writes.
    ReadOnly,
    /// A guest is being stored there.
    Busy,
    /// The half that comes next still has guests or snapshots whose pages come from there.
    InUse,
    /// It cannot be written.
    Write(WriteError),
    /// No snapshot could be kept of it.
    Snapshot(SnapshotError),
}

impl fmt::Display for StoredError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown => f.write_str("there is no such disk for stored guests; 'images' lists them"),
            Self::Empty => f.write_str("nothing is stored there yet; 'save' does that"),
            Self::Open(error) => error.fmt(f),
            Self::State(error) => error.fmt(f),
            Self::Vm(error) => write!(f, "memory: {error:?}"),
            Self::ReadOnly => f.write_str("the disk takes no writes"),
            Self::Busy => f.write_str("a guest is being stored there; 'jobs' shows how far it is"),
            Self::InUse => f.write_str(
                "guests or snapshots still use what was stored there before the last time; end them, or 'delete' them",
            ),
            Self::Write(WriteError::Small { has, needs }) => {
                let mib = |pages: &u64| pages.div_ceil((1 << 20) / PAGE_SIZE);
                write!(f, "it needs {} MiB, and there is room for {} MiB, twice", mib(needs), mib(has))
            }
            Self::Write(error) => write!(f, "{error:?}"),
            Self::Snapshot(error) => error.fmt(f),
        }
    }
}

impl From<SnapshotError> for StoredError {
    fn from(error: SnapshotError) -> Self {
        Self::Snapshot(error)
    }
}

impl From<VmError> for StoredError {
    fn from(error: VmError) -> Self {
        Self::Vm(error)
    }
}

/// What is on a disk.
enum Content {
    Empty,
    Image {
        header: Header,
        text: String,
        state: Arc<Vec<u8>>,
    },
    /// The newest header, if there is one, names what cannot be used.
    Refused(OpenError, Option<Header>),
}

/// A disk for stored guests.
struct Disk {
    name: String,
    store: StoreId,
    halves: [StoreId; SLOTS],
    /// A guest is being stored.
    saving: bool,
    content: Content,
}

impl Disk {
    /// The header that whatever is stored next has to be newer than.
    fn newest(&self) -> Option<&Header> {
        match &self.content {
            Content::Image { header, .. } => Some(header),
            Content::Refused(_, header) => header.as_ref(),
            Content::Empty => None,
        }
    }

    /// The generation of what is stored.
    fn generation(&self) -> Option<u64> {
        matches!(self.content, Content::Image { .. }).then_some(self.newest()?.generation)
    }

    fn pages(&self) -> u64 {
        mm::disks().bytes(self.store) / PAGE_SIZE
    }

    /// The half of a header.
    const fn half(&self, slot: usize) -> StoreId {
        self.halves[slot % SLOTS]
    }

    /// Takes what was opened or stored.
    fn take(&mut self, opened: Opened) {
        let Opened { header, text, sums, state } = opened;
        let view = View { name: self.name.clone(), header, sums };
        mm::disks().set_view(self.half(header.slot), Some(view));
        self.content = Content::Image { header, text, state: Arc::new(state) };
    }
}

/// What is shown of a disk for stored guests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Info {
    /// Its name.
    pub name: String,
    /// Bytes on it.
    pub bytes: u64,
    /// It takes no writes.
    pub read_only: bool,
    /// What is there: its generation, its description, and pages that are not zeros.
    pub image: Result<(u64, String, u64), String>,
}

static DISKS: Ranked<{ rank::GUESTS }, Vec<Disk>> = Ranked::new(Vec::new());

/// Looks at the disk that calls itself `id`, and knows it by `name` from now on. Waits for it: for boot.
pub fn attach(name: &str, id: &str, held: &mut Held<'_, 0>) -> Result<(), StoredError> {
    let (store, halves) = mm::disks().find_image_disk(id).ok_or(StoredError::Unknown)?;
    let mut disk = Disk { name: name.to_string(), store, halves, saving: false, content: Content::Empty };
    let mut read =
        |page: u64, out: &mut [u8]| mm::disks().read_now(store, page.saturating_mul(PAGE_SIZE), out);
    let outcome = match open(&mut read, disk.pages()) {
        Ok(None) => Ok(()),
        Ok(Some(opened)) => {
            disk.take(opened);
            Ok(())
        }
        Err(error) => {
            let header = newest(&mut read, disk.pages()).ok().flatten().map(|(header, _)| header);
            disk.content = Content::Refused(error.clone(), header);
            Err(StoredError::Open(error))
        }
    };
    DISKS.lock(held).0.push(disk);
    outcome
}

/// All disks for stored guests.
pub fn all(held: &mut Held<'_, 0>) -> Vec<Info> {
    let info = |disk: &Disk| Info {
        name: disk.name.clone(),
        bytes: mm::disks().bytes(disk.store),
        read_only: mm::disks().is_read_only(disk.store),
        image: match &disk.content {
            Content::Empty => Err("empty".to_string()),
            Content::Image { header, text, .. } => Ok((header.generation, text.clone(), header.stored)),
            Content::Refused(error, _) => Err(error.to_string()),
        },
    };
    DISKS.lock(held).0.iter().map(info).collect()
}

/// The generation of what is stored under a name; `None` when there is no such disk or nothing on it.
pub fn generation(name: &str, held: &mut Held<'_, 0>) -> Option<u64> {
    let (disks, _held) = DISKS.lock(held);
    disks.iter().find(|disk| disk.name == name)?.generation()
}

/// True when there is a disk of that name.
pub fn exists(name: &str, held: &mut Held<'_, 0>) -> bool {
    DISKS.lock(held).0.iter().any(|disk| disk.name == name)
}

/// The snapshot of what is stored under a name, for a guest that is made from it; it is made when it is wanted first, and
/// again when another guest was stored.
pub fn moment(name: &str, guest: GuestId, held: &mut Held<'_, 0>) -> Result<Arc<Snapshot>, StoredError> {
    forget_stale(name, held);
    if snapshot::source(name, held).is_none() {
        let (snapshot, generation) = resume(name, held)?;
        snapshot::keep(snapshot, Origin::Stored(generation), Some(name), held)?;
    }
    snapshot::find(name, guest, held).ok_or(StoredError::Unknown)
}

/// Forgets the snapshot of what was stored under a name before the last time: nobody can ask for it any more.
pub fn forget_stale(name: &str, held: &mut Held<'_, 0>) {
    let current = generation(name, held);
    if matches!(snapshot::source(name, held), Some(Origin::Stored(old)) if Some(old) != current) {
        snapshot::forget(name, held);
    }
}

/// The guest stored under a name, as a snapshot; its generation.
fn resume(name: &str, held: &mut Held<'_, 0>) -> Result<(Box<Snapshot>, u64), StoredError> {
    let (half, header, bytes) = {
        let (disks, _held) = DISKS.lock(held);
        let disk = disks.iter().find(|disk| disk.name == name).ok_or(StoredError::Unknown)?;
        match &disk.content {
            Content::Empty => return Err(StoredError::Empty),
            Content::Refused(error, _) => return Err(StoredError::Open(error.clone())),
            Content::Image { header, state, .. } => (disk.half(header.slot), *header, state.clone()),
        }
    };
    let State { seconds, regions, mut moment, .. } = State::decode(&bytes).map_err(StoredError::State)?;
    if state::pages(&regions) != header.pages {
        return Err(StoredError::State(StateError::Unsound("regions")));
    }
    let slept = create::seconds().saturating_sub(seconds);
    moment.devices.rtc.skip(timer::freq().saturating_mul(slept.into()));
    let map = mm::new_map(held)?;
    let memory = fill(&map, half, &regions, held).and_then(|()| mm::vm().snapshot(&map, held));
    mm::vm().destroy_map(map, held);
    let random = create::random(held);
    Ok((Snapshot::new(moment, memory?, random), header.generation))
}

/// Puts a stored guest's regions into a map.
fn fill(map: &Arc<Map>, half: StoreId, regions: &[Region], held: &mut Held<'_, 0>) -> Result<(), VmError> {
    let mut first = PageIndex::default();
    for region in regions {
        let (range, prot) = region.parts();
        let object = mm::vm().image(half, held)?;
        mm::vm().insert(map, range, object, first, prot, Share::Copy, held)?;
        let pages = u32::try_from(range.pages()).map_err(|_| VmError::Range)?;
        first = first.checked_add(pages).ok_or(VmError::Range)?;
    }
    Ok(())
}

/// A guest about to be stored: what writes it, to which disk, and where its pages are.
pub struct Begun {
    /// Writes it.
    pub writer: Writer,
    /// The disk.
    pub store: StoreId,
    /// Where its pages are.
    pub regions: Vec<Region>,
}

/// True when something can be stored under a name now.
pub fn is_free(name: &str, held: &mut Held<'_, 0>) -> Result<(), StoredError> {
    let (disks, _held) = DISKS.lock(held);
    let disk = disks.iter().find(|disk| disk.name == name).ok_or(StoredError::Unknown)?;
    match &disk.content {
        // What is damaged can be replaced; what is not ours is left alone.
        Content::Empty | Content::Image { .. } | Content::Refused(OpenError::Damaged(..), _) => {}
        Content::Refused(error, _) => return Err(StoredError::Open(error.clone())),
    }
    if mm::disks().is_read_only(disk.store) {
        return Err(StoredError::ReadOnly);
    }
    if disk.saving { Err(StoredError::Busy) } else { Ok(()) }
}

/// Begins to store a guest under a name. [`end`] it.
pub fn begin(
    name: &str,
    snapshot: &Snapshot,
    key: u64,
    held: &mut Held<'_, 0>,
) -> Result<Begun, StoredError> {
    is_free(name, held)?;
    let regions = state::regions(snapshot.memory())?;
    let (moment, seconds) = (&snapshot.moment, create::seconds());
    let text = describe(moment, seconds);
    let state = State::new(moment, regions, seconds);
    let bytes = state.encode().ok_or(VmError::NoMemory)?;
    let contents = Contents { pages: state::pages(&state.regions), state: bytes, text, key };
    let (mut disks, mut held) = DISKS.lock(held);
    let disk = disks.iter_mut().find(|disk| disk.name == name).ok_or(StoredError::Unknown)?;
    let writer = Writer::new(contents, disk.newest(), disk.pages()).map_err(StoredError::Write)?;
    let half = disk.half(writer.slot());
    if !mm::vm().forget_store(half, &mut held) {
        return Err(StoredError::InUse);
    }
    mm::disks().set_view(half, None);
    disk.saving = true;
    Ok(Begun { writer, store: disk.store, regions: state.regions })
}

/// Storing is over, with this image or without.
pub fn end(name: &str, stored: Option<Opened>, held: &mut Held<'_, 0>) {
    let (mut disks, _held) = DISKS.lock(held);
    if let Some(disk) = disks.iter_mut().find(|disk| disk.name == name) {
        disk.saving = false;
        if let Some(stored) = stored {
            disk.take(stored);
        }
    }
}

/// What a header says of a guest for people.
fn describe(moment: &Moment, seconds: u32) -> String {
    let config = &moment.config;
    json!({
        "guest": config.name,
        "memory_mib": config.memory >> 20,
        "vcpus": config.vcpus,
        "disks": config.disks.len(),
        "midr": alloc::format!("{:#x}", id::read().midr),
        "saved": seconds,
    })
    .to_string()
}
