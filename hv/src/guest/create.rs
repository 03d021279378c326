//! Making and unmaking guests.
//!
//! [`create`] asks the loader for the layout, fills a new map with objects as it says, writes the device
//! tree, and switches the first vCPU on; [`destroy`] gives everything back. A reset is the two in a row.
//! Nothing runs before the scheduler is given the guest. Called by `sched`'s daemon, `monitor`, `boot`.

use alloc::boxed::Box;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::sync::atomic::{AtomicU64, Ordering};

use spin::Once;
use vmobject::VmError;
use vmobject::addr::{Ipa, PageIndex, pages_for};
use vmobject::fault::{Copied, FaultError, WaitFor};
use vmobject::lock::{Held, Ranked};
use vmobject::map::Share;

use super::console::Log;
use super::devices::Devices;
use super::disks::{self, DiskError};
use super::family::Birth;
use super::trng::Generator;
use super::vcpu::Vcpu;
use super::{Guest, GuestId, balloon, genid, rank, rng};
use crate::arch::{gich, timer};
use crate::loader::fdt::{self, Machine, TreeError};
use crate::loader::plan::{Blob, Input, Plan, PlanError, Source, plan};
use crate::loader::{Boot, GuestConfig};
use crate::mm::{self, Map};

/// How long a transfer that creation needs may take, in seconds (invariant I12).
const PATIENCE_S: u64 = 10;
/// How long creation waits for others to give memory back, in milliseconds: what is being freed comes soon. While
/// pages are on their way to the disk it waits ten times as long, for they make room.
const PATIENCE_FOR_MEMORY_MS: u64 = 200;

/// What a guest is made of besides its memory.
pub struct Parts {
    /// Its vCPUs.
    pub vcpus: Box<[Vcpu]>,
    /// Its devices.
    pub devices: Box<Devices>,
    /// Its random numbers.
    pub random: Generator,
    /// Its console output.
    pub log: Arc<Log>,
    /// The host's counter when its own was zero.
    pub offset: u64,
    /// Where it comes from.
    pub birth: Birth,
}

/// A partition that guests may be made from.
#[derive(Clone, Debug)]
pub struct Image {
    /// Its name.
    pub name: String,
    /// Its store and exact length.
    pub blob: Blob,
    /// Its first page, or all of it if it is shorter.
    pub head: Vec<u8>,
}

static IMAGES: Once<Vec<Image>> = Once::new();
/// The second, since 1970, when the host's counter was zero.
static EPOCH: AtomicU64 = AtomicU64::new(0);
static MACHINE_RANDOM: Ranked<{ rank::RANDOM }, Option<Generator>> = Ranked::new(None);

/// Says which images there are; once, at boot.
pub fn set_images(images: Vec<Image>) {
    IMAGES.call_once(|| images);
}

/// Says what time it is, in seconds since 1970: for guests' clocks.
pub fn set_time(seconds: u64) {
    let since = timer::now() / timer::freq().max(1);
    EPOCH.store(seconds.saturating_sub(since), Ordering::Relaxed);
}

/// What time it is.
pub(super) fn seconds() -> u32 {
    let now = EPOCH.load(Ordering::Relaxed).wrapping_add(timer::now() / timer::freq().max(1));
    // The clock has 32 bits, and wraps in 2106.
    u32::try_from(now & 0xffff_ffff).unwrap_or(0)
}

/// Seeds the generator that every guest's own comes from.
pub fn seed<const R: u8>(words: &[u64], held: &mut Held<'_, R>) {
    const { assert!(R < rank::RANDOM) };
    *MACHINE_RANDOM.lock(held).0 = Some(Generator::new(words, timer::now()));
}

/// A generator for one guest.
pub(super) fn random(held: &mut Held<'_, 0>) -> Generator {
    let (mut machine, _held) = MACHINE_RANDOM.lock(held);
    let machine = machine.get_or_insert_with(|| Generator::new(&[], timer::now()));
    machine.stir(timer::now());
    machine.child()
}

/// Why a guest could not be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CreateError {
    /// There is no such partition.
    NoImage(String),
    /// The images do not fit together or into the memory.
    Plan(PlanError),
    /// The device tree could not be written.
    Tree(TreeError),
    /// The memory manager refused.
    Vm(VmError),
    /// A page of an image could not be had.
    Fault(FaultError),
    /// A disk cannot be had.
    Disk(DiskError),
    /// The disk did not answer.
    Stalled,
    /// Too few frames are free.
    NoFrames,
    /// The hypervisor's heap is full.
    OutOfMemory,
}

impl fmt::Display for CreateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoImage(name) => write!(f, "there is no image '{name}'"),
            Self::Plan(error) => error.fmt(f),
            Self::Tree(error) => error.fmt(f),
            Self::Vm(VmError::NoFrames) | Self::NoFrames => f.write_str("there is not enough free memory"),
            Self::Vm(VmError::NoMemory) | Self::OutOfMemory => {
                f.write_str("the hypervisor's own memory is full")
            }
            Self::Vm(error) => write!(f, "memory: {error:?}"),
            Self::Fault(error) => write!(f, "cannot fill its memory: {}", mm::told(*error)),
            Self::Disk(error) => error.fmt(f),
            Self::Stalled => f.write_str("the disk does not answer"),
        }
    }
}

impl From<PlanError> for CreateError {
    fn from(error: PlanError) -> Self {
        Self::Plan(error)
    }
}
impl From<TreeError> for CreateError {
    fn from(error: TreeError) -> Self {
        Self::Tree(error)
    }
}
impl From<DiskError> for CreateError {
    fn from(error: DiskError) -> Self {
        Self::Disk(error)
    }
}
impl From<VmError> for CreateError {
    fn from(error: VmError) -> Self {
        Self::Vm(error)
    }
}
impl From<FaultError> for CreateError {
    fn from(error: FaultError) -> Self {
        Self::Fault(error)
    }
}

fn image(name: &str) -> Result<&'static Image, CreateError> {
    let images = IMAGES.get().map_or(&[][..], Vec::as_slice);
    images.iter().find(|image| image.name == name).ok_or_else(|| CreateError::NoImage(name.into()))
}

fn lay_out(config: &GuestConfig) -> Result<Plan, CreateError> {
    let main = image(config.boot.image())?;
    let initrd = config.boot.initrd().map(image).transpose()?;
    let firmware = matches!(config.boot, Boot::Bios { .. });
    Ok(plan(&Input {
        memory: config.memory,
        firmware,
        image: main.blob,
        head: &main.head,
        initrd: initrd.map(|image| image.blob),
    })?)
}

/// Fills a map as a plan says. On an error the caller destroys the map.
fn fill(map: &Arc<Map>, plan: &Plan, held: &mut Held<'_, 0>) -> Result<(), CreateError> {
    let vm = mm::vm();
    for region in &plan.regions {
        let (object, first, share) = match region.source {
            Source::Image { store, first } => (vm.image(store, held)?, first, Share::Copy),
            Source::Anonymous => {
                let pages = pages_for(region.range.bytes()).ok_or(CreateError::OutOfMemory)?;
                (vm.anonymous(pages, held)?, PageIndex::default(), Share::Shared)
            }
        };
        vm.insert(map, region.range, object, first, region.prot, share, held)?;
    }
    Ok(())
}

/// How long to wait for memory, in ticks.
fn patience_for_memory(held: &mut Held<'_, 0>) -> u64 {
    let patience = timer::freq() / 1000 * PATIENCE_FOR_MEMORY_MS;
    if mm::vm().memory(held).transfers == 0 { patience } else { patience * 10 }
}

/// Writes into a guest's memory before it runs; `poll` lets transfers finish meanwhile.
pub(super) fn write(
    map: &Arc<Map>,
    at: Ipa,
    bytes: &[u8],
    poll: &dyn Fn(&mut Held<'_, 0>),
    held: &mut Held<'_, 0>,
) -> Result<(), CreateError> {
    let start = timer::now();
    loop {
        let waited = timer::now().saturating_sub(start);
        match mm::vm().write(map, at, bytes, held)? {
            Copied::Done => return Ok(()),
            Copied::Wait(WaitFor::Memory) if waited > patience_for_memory(held) => {
                return Err(CreateError::NoFrames);
            }
            Copied::Wait(WaitFor::Io(_)) if waited > timer::freq().saturating_mul(PATIENCE_S) => {
                return Err(CreateError::Stalled);
            }
            Copied::Wait(_) => poll(held),
        }
    }
}

fn tree(config: &GuestConfig, plan: &Plan, random: &mut Generator) -> Result<Vec<u8>, CreateError> {
    let mut rng_seed = [0; 64];
    for chunk in rng_seed.chunks_exact_mut(8) {
        chunk.copy_from_slice(&random.words()[0].to_le_bytes());
    }
    Ok(fdt::build(&Machine {
        memory: config.memory,
        vcpus: config.vcpus,
        append: &config.append,
        initrd: plan.initrd.map(|(start, end)| (start.bits(), end.bits())),
        virtio: transports(config.disks.len()),
        rng_seed,
        kaslr_seed: random.words()[0],
    })?)
}

/// The transports that have a device, a bit each: so many disks, the source of entropy, and the balloon.
fn transports(disks: usize) -> u32 {
    let disks = u32::try_from(disks).unwrap_or(u32::MAX).min(rng::TRANSPORT);
    1 << balloon::TRANSPORT | 1 << rng::TRANSPORT | ((1 << disks) - 1)
}

fn prepare(
    map: &Arc<Map>,
    id: GuestId,
    config: &GuestConfig,
    kept: Option<Kept>,
    poll: &dyn Fn(&mut Held<'_, 0>),
    held: &mut Held<'_, 0>,
) -> Result<Parts, CreateError> {
    let plan = lay_out(config)?;
    fill(map, &plan, held)?;
    let disks = disks::open(map, id, &config.disks, held)?;
    for &(at, bytes) in &plan.zero {
        // Less than a page: the rest of a segment's last one.
        let zeros = [0; 4096];
        let length = usize::try_from(bytes).unwrap_or(zeros.len()).min(zeros.len());
        write(map, at, &zeros[..length], poll, held)?;
    }
    let mut random = random(held);
    write(map, plan.tree, &tree(config, &plan, &mut random)?, poll, held)?;
    genid::install(map, held)?;
    genid::renew(map, &mut random, poll, held)?;
    let mut vcpus = Vec::new();
    vcpus.try_reserve_exact(config.vcpus).map_err(|_| CreateError::OutOfMemory)?;
    vcpus.extend((0..config.vcpus).map(Vcpu::new));
    if let Some(first) = vcpus.first() {
        // It was made just now, so it is off.
        let _ = first.power_on(plan.entry.bits(), plan.x0, held);
    }
    let mut devices = Box::new(Devices::new(config.vcpus, gich::nr_lrs(), timer::freq(), seconds()));
    devices.disks = disks;
    let Kept { log, birth } =
        kept.unwrap_or_else(|| Kept { log: Arc::default(), birth: Birth::first(config.grant_fork) });
    let (vcpus, offset) = (vcpus.into_boxed_slice(), timer::now());
    Ok(Parts { devices, vcpus, random, log, offset, birth })
}

/// What a guest that begins again keeps: a reset neither hides what it said nor lets it fork more than was granted.
pub struct Kept {
    /// What it wrote on its console.
    pub log: Arc<Log>,
    /// Where it comes from.
    pub birth: Birth,
}

/// Makes a guest that is ready to be given to the scheduler. `kept` is of the guest whose place it
/// takes; `poll` lets transfers finish.
pub fn create(
    id: GuestId,
    config: GuestConfig,
    kept: Option<Kept>,
    poll: &dyn Fn(&mut Held<'_, 0>),
    held: &mut Held<'_, 0>,
) -> Result<Arc<Guest>, CreateError> {
    // One that begins again needs what it has just given back.
    if kept.is_none() && !mm::has_room() {
        return Err(CreateError::OutOfMemory);
    }
    let map = mm::new_map(held)?;
    let promised = mm::vm().set_vcpus(&map, config.vcpus, held).map_err(CreateError::from);
    match promised.and_then(|()| prepare(&map, id, &config, kept, poll, held)) {
        Ok(parts) => Ok(Arc::new(Guest::new(id, config, map, parts))),
        Err(error) => {
            mm::vm().destroy_map(map, held);
            Err(error)
        }
    }
}

/// Gives back everything of a guest that no CPU uses any more.
pub fn destroy(guest: &Guest, held: &mut Held<'_, 0>) {
    mm::vm().destroy_map(guest.map.clone(), held);
}
