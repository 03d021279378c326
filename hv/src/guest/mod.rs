//! Guests: their vCPUs, their devices, and everything that happens when one of them stops.
//!
//! Start with [`Guest`], then `vcpu`, then `exit`, which is the table of contents of the rest: one trap
//! family a file. Nothing here calls the scheduler: a handler answers with an [`exit::Exit`] and a set of
//! vCPUs to wake, and `sched` does it. Uses `arch`, `mm`, `vdev`, `loader`; used by `sched`, `monitor`, `boot`.

pub mod aarch32;
pub mod balloon;
pub mod console;
pub mod create;
pub mod debug;
pub mod devices;
pub mod disks;
pub mod dma;
pub mod exit;
pub mod family;
pub mod forkpage;
pub mod genid;
pub mod hypercall;
pub mod idregs;
pub mod inject;
pub mod memory;
pub mod mmio;
pub mod psci;
pub mod rng;
pub mod smccc;
pub mod snapshot;
pub mod stored;
pub mod syndrome;
pub mod sysreg;
pub mod table;
pub mod trng;
pub mod vcpu;
pub mod work;

use alloc::boxed::Box;
use alloc::string::String;
use alloc::sync::Arc;
use core::fmt;
use core::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering};

use crate::arch::percpu::MAX_CPUS;
use crate::arch::{self, timer};
use crate::loader::GuestConfig;
use crate::mm::Map;
use devices::Devices;
use exit::Ending;
use family::Birth;
use idregs::GuestIds;
use spin::Once;
use stage2::vmid::Vmid;
use trng::Generator;
use vcpu::{NOWHERE, State, Vcpu};
use vmobject::lock::{Held, Ranked};

/// The ranks of the guests' locks: all below the memory manager's, so that a handler may hold any of them
/// and take a fault.
pub mod rank {
    /// A vCPU's registers: held by the CPU that runs it, for as long as it runs.
    pub const VCPU: u8 = 1;
    /// The list of guests; that of snapshots.
    pub const GUESTS: u8 = 2;
    /// Whether a vCPU is switched on.
    pub const POWER: u8 = 3;
    /// One guest's devices.
    pub const DEVICES: u8 = 4;
    /// A generator of random numbers.
    pub const RANDOM: u8 = 5;
    /// One guest's console output.
    pub const CONSOLE: u8 = 6;
    /// What is typed and what waits at the monitor: never held together with a guest's console.
    pub const MONITOR: u8 = 6;
    /// vCPUs that wait for transfers.
    pub const WAITERS: u8 = 7;
    /// A run queue.
    pub const SCHED: u8 = 8;
    /// A guest's VMID; then its tables.
    pub const VMID: u8 = 9;
}

/// The most vCPUs of all guests together.
pub const MAX_VCPUS: usize = 4096;

static IDS: Once<GuestIds> = Once::new();

/// The identification registers that every guest sees. Made at the first call, on the first CPU.
pub fn ids() -> &'static GuestIds {
    IDS.call_once(|| {
        let pa_range = match arch::id::pa_bits() {
            0..36 => 0,
            36..40 => 1,
            _ => 2,
        };
        let hardware = arch::id::read();
        GuestIds::new(&hardware, &hardware.aarch32, pa_range)
    })
}

/// Names a guest for as long as the hypervisor runs; never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GuestId(pub u32);

impl fmt::Display for GuestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Whether a guest's vCPUs may run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Life {
    /// They may.
    Running,
    /// They stay where they are until it is resumed.
    Paused,
    /// They never will again; its memory goes when the last has left its CPU.
    Ending,
}

/// How a guest's life says that it ends, and why.
const fn ending_code(ending: Ending) -> u8 {
    Life::Ending as u8 + ending as u8
}

/// How it says that another guest has its place.
const REPLACED: u8 = STILL - 1;

/// Beside a guest's life: one CPU keeps its vCPUs still, to copy or to change what they are.
const STILL: u8 = 1 << 7;

/// What is logged once for each guest, however often it happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Complaint {
    /// An undefined instruction that EL2 took.
    Undefined,
    /// A system register that is not given.
    Register,
    /// An abort that was not stage 2's.
    Abort,
    /// An address with nothing there.
    Hole,
    /// A device access that cannot be done by hand.
    Device,
    /// A device's request that cannot be done.
    Request,
    /// A page that its store does not give.
    Lost,
}

/// A virtual machine.
pub struct Guest {
    /// Its number.
    pub id: GuestId,
    /// How it was made, and is made again after a reset.
    pub config: GuestConfig,
    /// Its memory.
    pub map: Arc<Map>,
    /// Its vCPUs; never more or fewer.
    pub vcpus: Box<[Vcpu]>,
    /// Its devices: apart, so that they are made in their place, and a reset exchanges them.
    pub devices: Ranked<{ rank::DEVICES }, Box<Devices>>,
    /// Whether its virtio devices have something to do.
    pub work: work::Work,
    /// Its name in the TLB, as far as it is still valid.
    vmid: Ranked<{ rank::VMID }, Vmid>,
    /// Its random numbers.
    pub random: Ranked<{ rank::RANDOM }, Generator>,
    /// What it printed lately, shared with the guest that takes its place after a reset.
    pub log: Arc<console::Log>,
    /// The host's counter when this guest's counter was zero; moves only while it is kept still.
    offset: AtomicU64,
    /// Where it comes from.
    pub birth: Birth,
    /// The vCPU that each CPU ran last.
    pub last_ran: [AtomicUsize; MAX_CPUS],
    life: AtomicU8,
    /// How often it was reset to a snapshot.
    pub resets: AtomicU32,
    /// One CPU has taken it upon itself to bury it.
    claimed: AtomicBool,
    complaints: AtomicU32,
}

impl Guest {
    /// A guest whose memory is filled and whose first vCPU is switched on.
    fn new(id: GuestId, config: GuestConfig, map: Arc<Map>, parts: create::Parts) -> Self {
        let work = work::Work::default();
        // A twin's devices go on with what the source's were doing.
        work.wake();
        Self {
            work,
            id,
            config,
            map,
            vcpus: parts.vcpus,
            devices: Ranked::new(parts.devices),
            vmid: Ranked::new(Vmid::default()),
            random: Ranked::new(parts.random),
            log: parts.log,
            offset: AtomicU64::new(parts.offset),
            birth: parts.birth,
            last_ran: [const { AtomicUsize::new(usize::MAX) }; MAX_CPUS],
            life: AtomicU8::new(Life::Running as u8),
            resets: AtomicU32::new(0),
            claimed: AtomicBool::new(false),
            complaints: AtomicU32::new(0),
        }
    }

    /// Bytes of the hypervisor's heap that are this guest's, but for the indexes of its objects.
    pub fn heap_bytes(&self, held: &mut Held<'_, 0>) -> usize {
        let mut entries = 0;
        crate::mm::vm().for_each_entry(&self.map, held, |_| entries += 1);
        let devices = size_of::<Devices>() + self.devices.lock(held).0.heap_bytes();
        let map = size_of::<Map>() + entries * size_of::<vmobject::map::Entry>();
        size_of::<Self>() + self.vcpus.len() * size_of::<Vcpu>() + devices + map + self.log.heap_bytes(held)
    }

    /// Its name.
    pub fn name(&self) -> &String {
        &self.config.name
    }

    /// The host's counter when this guest's counter was zero.
    #[inline]
    pub fn offset(&self) -> u64 {
        self.offset.load(Ordering::Relaxed)
    }

    /// What its counters say now.
    pub fn time(&self) -> u64 {
        timer::now().wrapping_sub(self.offset())
    }

    /// Whether its vCPUs may run.
    pub fn life(&self) -> Life {
        match self.life.load(Ordering::SeqCst) & !STILL {
            0 => Life::Running,
            1 => Life::Paused,
            _ => Life::Ending,
        }
    }

    /// Pauses or resumes; false when it is ending or already so.
    pub fn move_life(&self, from: Life, to: Life) -> bool {
        let moved = |life: u8| (life & !STILL == from as u8).then_some(life & STILL | to as u8);
        self.life.fetch_update(Ordering::SeqCst, Ordering::SeqCst, moved).is_ok()
    }

    /// Resumes; false when it is not paused, or somebody keeps it still.
    pub fn go_on(&self) -> bool {
        let (from, to) = (Life::Paused as u8, Life::Running as u8);
        self.life.compare_exchange(from, to, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }

    /// Ends it. The first reason stays, but who is killed does not begin again. False when another has its place.
    pub fn end(&self, ending: Ending) -> bool {
        let ended = |life: u8| match life & !STILL {
            before if before < Life::Ending as u8 => Some(life & STILL | ending_code(ending)),
            before if before == ending_code(Ending::Reset) && ending == Ending::Killed => {
                Some(life & STILL | ending_code(ending))
            }
            _ => None,
        };
        let before = self.life.fetch_update(Ordering::SeqCst, Ordering::SeqCst, ended);
        before.map_or_else(|life| life & !STILL != REPLACED, |_| true)
    }

    /// Its place is another's from now on; false when it is not to begin again after all.
    pub fn make_room(&self) -> bool {
        let begins = |life: u8| life & !STILL == ending_code(Ending::Reset);
        let replaced = |life: u8| begins(life).then_some(life & STILL | REPLACED);
        self.life.fetch_update(Ordering::SeqCst, Ordering::SeqCst, replaced).is_ok()
    }

    /// True for the first caller: it alone buries the guest.
    pub fn claim(&self) -> bool {
        !self.claimed.swap(true, Ordering::SeqCst)
    }

    /// True when nobody else keeps it still; then the caller does, until [`Self::let_go`].
    pub fn keep_still(&self) -> bool {
        self.life.fetch_or(STILL, Ordering::SeqCst) & STILL == 0
    }

    /// True when somebody keeps it still.
    pub fn is_kept_still(&self) -> bool {
        self.life.load(Ordering::SeqCst) & STILL != 0
    }

    /// Ends what [`Self::keep_still`] began, and resumes a paused guest if that is wanted: true if it did.
    pub fn let_go(&self, resume: bool) -> bool {
        let resumed = |life: u8| resume && life & !STILL == Life::Paused as u8;
        let next = |life: u8| if resumed(life) { Life::Running as u8 } else { life & !STILL };
        let before = self.life.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |life| Some(next(life)));
        before.is_ok_and(resumed)
    }

    /// True when no CPU runs any of its vCPUs or has their registers.
    pub fn is_quiet(&self) -> bool {
        self.vcpus.iter().all(|vcpu| vcpu.state() != State::Running) && self.is_unloaded()
    }

    /// True when no CPU has registers of any of its vCPUs.
    pub fn is_unloaded(&self) -> bool {
        self.vcpus.iter().all(|vcpu| vcpu.loaded_on.load(Ordering::SeqCst) == NOWHERE)
    }

    /// Why it ended.
    pub fn ending(&self) -> Ending {
        let life = self.life.load(Ordering::SeqCst) & !STILL;
        let reasons = [Ending::Off, Ending::Reset, Ending::Killed, Ending::Lost];
        // A guest that lives has none yet, and one whose place is taken had this one.
        reasons.into_iter().find(|&ending| ending_code(ending) == life).unwrap_or(Ending::Reset)
    }

    /// True the first time.
    pub fn complain_once(&self, complaint: Complaint) -> bool {
        let bit = 1 << complaint as u8;
        self.complaints.fetch_or(bit, Ordering::Relaxed) & bit == 0
    }

    /// Makes CPU `cpu`, which is this one, translate with its tables. It lives until another is loaded.
    pub fn load_tables<const R: u8>(&self, cpu: usize, held: &mut Held<'_, R>) {
        const { assert!(R < rank::VMID) };
        let (mut vmid, mut held) = self.vmid.lock(held);
        crate::mm::load_guest(&self.map, &mut vmid, cpu, &mut held);
    }

    /// Prints a byte of its console.
    pub fn print<const R: u8>(&self, byte: u8, held: &mut Held<'_, R>) {
        const { assert!(R < rank::CONSOLE) };
        self.log.put(self.id, byte, held);
    }

    /// Types into its console; the vCPUs to wake.
    pub fn type_in<const R: u8>(&self, bytes: &[u8], held: &mut Held<'_, R>) -> u64 {
        const { assert!(R < rank::DEVICES) };
        self.devices.lock(held).0.type_in(bytes)
    }
}
