//! A guest's disks: their objects in its map, and the work of their devices.
//!
//! A disk is one more entry of the guest's map, above everything that the guest itself can reach: so the call that
//! copies or resets the map copies or resets the disk at the same instant as RAM, and a disk's bytes are read and
//! written through the fault path like any others. What becomes of writes is the entry's doing: a private disk is
//! copied on write over an image that all share; one written through is the store's own object, whose changes
//! reach the store when they are cleaned, at the latest at a flush. A copy of such a guest gets a copy-object, and
//! is private. Nothing here waits: see `work`. Called by `create`, `snapshot` and `work`.
//!
//! Each store is written through by one guest at most: a second is refused, and so is a writer while others read the
//! store as something that does not change. Who reads a store that another writes sees it as it was when he opened it.

use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;

use hv_abi::machine::{INTID_VIRTIO, RAM_BASE, RAM_LIMIT};
use serde::{Deserialize, Serialize};
use vmobject::VmError;
use vmobject::addr::{CHUNK_SIZE, Ipa, IpaRange, PAGE_SIZE, PageIndex};
use vmobject::fault::WaitFor;
use vmobject::lock::Held;
use vmobject::map::{NotDiscarded, Share};
use vmobject::object::ObjectId;
use vmobject::pager::{Clean, Cleaned};
use vmobject::prot::Prot;

use super::create::CreateError;
use super::devices::Devices;
use super::dma::{Dma, Reached};
use super::work::Step;
use super::{Guest, GuestId, rank, table};
use crate::loader::{DiskConfig, GuestConfig, Writes};
use crate::mm::{self, Map};
use crate::vdev::virtio::blk::{Blk, Did, Medium, SECTOR, SLOTS};
use crate::vdev::virtio::{Fault, Ram};
use crate::vdev::{Kicks, Vgic};

/// Where the objects of disks begin in a guest's map: no guest has RAM or devices here, and `memory` lets none in.
pub const BASE: u64 = RAM_BASE + RAM_LIMIT;
/// Slots that a flush looks at in one step.
const CLEANED: u32 = 64;

/// A flush under way. A twin begins its own: this one's transfers are not for it.
#[derive(Debug, Default)]
struct Pass(Option<Clean>);

impl Clone for Pass {
    fn clone(&self) -> Self {
        Self(None)
    }
}

/// One disk: its device, and where its bytes are.
#[derive(Clone, Serialize, Deserialize)]
pub struct Disk {
    /// What the driver sees.
    pub blk: Blk,
    #[serde(with = "super::stored::state::range")]
    range: IpaRange,
    /// The object whose store sees what is written. One that is stored has none.
    #[serde(skip)]
    through: Option<ObjectId>,
    #[serde(skip)]
    passes: [Pass; SLOTS],
}

impl Disk {
    /// True unless no disk could be like this: for one that was stored.
    pub fn is_sound(&self) -> bool {
        self.range.start() >= Ipa::new(BASE) && self.blk.bytes() <= self.range.bytes() && self.blk.is_sound()
    }

    /// Makes it one whose writes nobody else sees: its entry has become a copy.
    pub fn detach(&mut self) {
        self.through = None;
    }
}

/// Brings the line of a guest's disk to its interrupt controller: which vCPUs have something to look at.
pub fn signal(number: usize, blk: &Blk, vgic: &mut Vgic) -> Kicks {
    vgic.set_spi(intid(number), blk.line())
}

/// The interrupt of a guest's disk.
pub fn intid(number: usize) -> u32 {
    INTID_VIRTIO + u32::try_from(number).unwrap_or(0)
}

/// What disks a copy of a guest has: private ones, for the store is the source's.
pub fn detached(disks: &[DiskConfig]) -> Vec<DiskConfig> {
    let private = |disk: &DiskConfig| match disk.writes {
        Writes::Through => DiskConfig { writes: Writes::Private, ..disk.clone() },
        Writes::Private | Writes::Refused => disk.clone(),
    };
    disks.iter().map(private).collect()
}

/// The disk that a guest writes through, if any.
pub fn written_through(config: &GuestConfig) -> Option<&DiskConfig> {
    config.disks.iter().find(|disk| disk.writes == Writes::Through)
}

/// Why a disk cannot be had.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DiskError {
    /// The machine has no such disk.
    Missing(String),
    /// Another guest writes to it.
    Written(String, GuestId),
    /// Others rely on its not changing.
    Read(String),
    /// The host's disk takes no writes.
    ReadOnly(String),
    /// It is larger than what is left of the guest's addresses.
    TooLarge(String),
}

impl core::fmt::Display for DiskError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Missing(id) => write!(f, "the machine has no disk '{id}'"),
            Self::Written(id, guest) => {
                write!(f, "guest {guest} writes to disk '{id}'; have it private or ro")
            }
            Self::Read(id) => write!(f, "others use disk '{id}' as it is; have it private or ro"),
            Self::ReadOnly(id) => write!(f, "disk '{id}' takes no writes; have it private or ro"),
            Self::TooLarge(id) => write!(f, "disk '{id}' is too large for a guest"),
        }
    }
}

/// Puts a new guest's disks into its map.
pub fn open(
    map: &Arc<Map>,
    guest: GuestId,
    disks: &[DiskConfig],
    held: &mut Held<'_, 0>,
) -> Result<Vec<Disk>, CreateError> {
    let mut list = Vec::new();
    list.try_reserve_exact(disks.len()).map_err(|_| CreateError::OutOfMemory)?;
    let mut next = Ipa::new(BASE);
    for config in disks {
        let disk = open_one(map, guest, config, next, held)?;
        // Disks do not share a 2 MiB chunk.
        let end = disk.range.end().checked_add(CHUNK_SIZE - 1);
        next = end.ok_or_else(|| DiskError::TooLarge(config.id.clone()))?.chunk();
        list.push(disk);
    }
    Ok(list)
}

fn open_one(
    map: &Arc<Map>,
    guest: GuestId,
    config: &DiskConfig,
    start: Ipa,
    held: &mut Held<'_, 0>,
) -> Result<Disk, CreateError> {
    let (vm, id) = (mm::vm(), || config.id.clone());
    let store = mm::disks().find_disk(&config.id).ok_or_else(|| DiskError::Missing(id()))?;
    let (bytes, through) = (mm::disks().bytes(store), config.writes == Writes::Through);
    if through {
        let writes = |other: &Arc<Guest>| {
            other.id != guest && written_through(&other.config).is_some_and(|disk| disk.id == config.id)
        };
        if let Some(other) = table::all(held).iter().find(|other| writes(other)) {
            return Err(DiskError::Written(id(), other.id).into());
        }
        if mm::disks().is_read_only(store) {
            return Err(DiskError::ReadOnly(id()).into());
        }
    }
    let pages = u32::try_from(bytes.div_ceil(PAGE_SIZE)).ok();
    let range = pages.and_then(|pages| IpaRange::from_pages(start, pages));
    let range = range.ok_or_else(|| DiskError::TooLarge(id()))?;
    let object = if through { vm.disk(store, held) } else { vm.image(store, held) };
    let object = object.map_err(|error| refused(error, config))?;
    let (prot, share) = match config.writes {
        Writes::Through => (Prot::READ | Prot::WRITE, Share::Shared),
        Writes::Private => (Prot::READ | Prot::WRITE, Share::Copy),
        // Not shared: another guest may write to the store.
        Writes::Refused => (Prot::READ, Share::Copy),
    };
    let inserted = vm.insert(map, range, object, PageIndex::default(), prot, share, held);
    inserted.map_err(|error| refused(error, config))?;
    Ok(Disk {
        blk: Blk::new(bytes / SECTOR, config.writes == Writes::Refused, &config.id),
        range,
        through: through.then_some(object),
        passes: Default::default(),
    })
}

fn refused(error: VmError, config: &DiskConfig) -> CreateError {
    match error {
        VmError::ReadOnly => DiskError::Read(config.id.clone()).into(),
        VmError::Reach { .. } => DiskError::TooLarge(config.id.clone()).into(),
        VmError::NoMemory
        | VmError::NoFrames
        | VmError::Range
        | VmError::Device
        | VmError::Overlap
        | VmError::Overcommit { .. }
        | VmError::Limit(_) => error.into(),
    }
}

/// Does one piece of work of a guest's disks: at most a page is moved.
pub(super) fn step(guest: &Guest, devices: &mut Devices, held: &mut Held<'_, { rank::DEVICES }>) -> Step {
    let Devices { disks, vgic, .. } = devices;
    for (number, disk) in disks.iter_mut().enumerate() {
        let Disk { blk, range, through, passes } = disk;
        let dma = Dma { guest, held };
        let mut reach = Reach { dma, range: *range, through: *through, passes };
        match blk.step(&mut reach) {
            Did::Nothing => {}
            Did::Some => return Step::Done(signal(number, blk, vgic).0),
            Did::Wait(slot, what) => return Step::Wait { device: number, slot, what },
        }
    }
    Step::Nothing
}

/// What a disk's device reaches: the guest's RAM, and the disk's bytes.
struct Reach<'r, 'h> {
    dma: Dma<'r, 'h>,
    range: IpaRange,
    through: Option<ObjectId>,
    passes: &'r mut [Pass; SLOTS],
}

impl Reach<'_, '_> {
    /// Where in the map some bytes of the disk are.
    fn disk(&self, at: u64) -> Reached<Ipa> {
        self.range.start().checked_add(at).ok_or(Fault::Bad)
    }
}

impl Ram for Reach<'_, '_> {
    type Wait = WaitFor;

    fn read(&mut self, at: u64, out: &mut [u8]) -> Reached<()> {
        self.dma.read(at, out)
    }

    fn write(&mut self, at: u64, bytes: &[u8]) -> Reached<()> {
        self.dma.write(at, bytes)
    }
}

impl Medium for Reach<'_, '_> {
    fn load(&mut self, at: u64, out: &mut [u8]) -> Reached<()> {
        self.dma.load(self.disk(at)?, out)
    }

    fn store(&mut self, at: u64, bytes: &[u8]) -> Reached<()> {
        self.dma.store(self.disk(at)?, bytes)
    }

    fn clear(&mut self, at: u64, bytes: u64) -> Reached<u64> {
        // Zeros that the guest relies on are there, or its request waits, or fails.
        self.dma.discard(self.disk(at)?, bytes)?.map_err(|why| match why {
            NotDiscarded::Refused(VmError::NoMemory) => Fault::Wait(WaitFor::Memory),
            NotDiscarded::Refused(_)
            | NotDiscarded::Lost(_)
            | NotDiscarded::Hole(_)
            | NotDiscarded::Denied(_) => Fault::Bad,
        })
    }

    fn flush(&mut self, slot: usize, first: bool) -> Reached<bool> {
        let (Some(object), Some(pass)) = (self.through, self.passes.get_mut(slot)) else { return Ok(true) };
        if first {
            pass.0 = None;
        }
        let pages = u32::try_from(self.range.pages()).map_err(|_| Fault::Bad)?;
        let all = PageIndex::default()..PageIndex::new(pages);
        let clean = pass.0.get_or_insert_with(|| mm::vm().page_clean(object, all));
        match mm::vm().clean_step(clean, CLEANED, self.dma.held) {
            Cleaned::More => Ok(false),
            Cleaned::Wait(what) => Err(Fault::Wait(what)),
            Cleaned::Done { failed } => {
                pass.0 = None;
                if failed == 0 {
                    return Ok(true);
                }
                let id = self.dma.guest.id;
                log::error!("guest {id}: a disk did not take {failed} pages; they are kept");
                Err(Fault::Bad)
            }
        }
    }
}
