//! The machine that the VM runs on, and the one VM there is.
//!
//! [`Metal`] names the three parts: frames by the direct map, `stage2` tables with the hardware's TLB, disks.
//! [`load_guest`] is how a guest's tables get onto a CPU, under a VMID. Called by `boot` once, then by `guest`
//! and `sched`.
#![expect(unsafe_code, reason = "loading a stage-2 root is a claim about its tables")]

use super::direct::Direct;
use super::store::Disks;
use super::tables::Tables;
use crate::arch::tlb::HardwareTlb;
use crate::arch::{id, percpu, switch};
use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use core::ops::Range;
use spin::{Mutex, Once};
use stage2::Stage2;
use stage2::geometry::{Features, Geometry};
use stage2::vmid::{Vmid, VmidAllocator};
use vmobject::addr::Pfn;
use vmobject::fault::FaultError;
use vmobject::lock::Held;
use vmobject::map::Snapshot;
use vmobject::pmap::OutOfTables;
use vmobject::store::Machine;
use vmobject::{Vm, VmError};

/// One guest's memory map on this machine.
pub type Map = vmobject::map::Map<Metal>;

/// The machine.
pub struct Metal {
    memory: Direct,
    store: Disks,
}

impl Metal {
    /// A machine with these frames' bytes and these disks.
    pub const fn new(memory: Direct, store: Disks) -> Self {
        Self { memory, store }
    }
}

impl Machine for Metal {
    type Pmap = Stage2<Tables, HardwareTlb>;
    type Memory = Direct;
    type Store = Disks;

    fn memory(&self) -> &Direct {
        &self.memory
    }

    fn store(&self) -> &Disks {
        &self.store
    }

    #[inline]
    fn has_room(&self) -> bool {
        super::has_room()
    }
}

static VM: Once<Vm<Metal>> = Once::new();
static GEOMETRY: Once<Geometry> = Once::new();
/// A leaf below the tables' lock. A VMID is loaded before it is let go: whoever starts a new generation next
/// then sees that this CPU runs with it.
static VMIDS: Once<Mutex<VmidAllocator>> = Once::new();

/// The shape of every guest's tables, from this CPU's identification registers.
pub fn geometry() -> Geometry {
    *GEOMETRY.call_once(|| {
        let ids = id::read();
        let features = Features::from_id_registers(ids.mmfr0, ids.mmfr1);
        Geometry::new(features.with_mmfr2(ids.mmfr2).with_isar0(ids.isar0))
    })
}

/// Gives the VM its frames. Once; a second call changes nothing.
pub fn init(machine: Metal, frames: &[Range<Pfn>]) -> Result<(), VmError> {
    let vm = Vm::new(machine, frames)?;
    VM.call_once(|| vm);
    VMIDS.call_once(|| Mutex::new(VmidAllocator::new(geometry().features().vmid_bits(), percpu::MAX_CPUS)));
    Ok(())
}

/// The VM. Panics before [`init`].
#[inline]
pub fn vm() -> &'static Vm<Metal> {
    let Some(vm) = VM.get() else { panic!("the VM is not set up yet") };
    vm
}

/// The disks.
pub fn disks() -> &'static Disks {
    vm().machine().store()
}

/// Why an access to a guest's memory failed, in words.
pub fn told(error: FaultError) -> String {
    match error {
        FaultError::Hole(at) => format!("nothing is at {at}"),
        FaultError::Denied { at, wanted } => format!("{wanted:?} is not allowed at {at}"),
        FaultError::Lost(lost) => disks().told(lost),
    }
}

/// Tables that map nothing.
fn empty() -> Result<Stage2<Tables, HardwareTlb>, VmError> {
    Stage2::new(Tables::of_machine(), HardwareTlb, geometry()).map_err(|OutOfTables| VmError::NoFrames)
}

/// A new, empty map with tables of its own.
pub fn new_map<const OUTER: u8>(held: &mut Held<'_, OUTER>) -> Result<Arc<Map>, VmError> {
    vm().create_map(empty()?, held)
}

/// A map with tables of its own, and the memory of a snapshot.
pub fn map_of<const OUTER: u8>(snapshot: &Snapshot, held: &mut Held<'_, OUTER>) -> Result<Arc<Map>, VmError> {
    vm().map_snapshot(snapshot, empty()?, held)
}

/// Makes CPU `cpu`, which is this one, translate with a map's tables from the next guest run on, under a VMID
/// that is the map's alone. `vmid` is what this gave the map before, or the default.
///
/// The caller keeps the map until this CPU has loaded another.
pub fn load_guest<const OUTER: u8>(map: &Map, vmid: &mut Vmid, cpu: usize, held: &mut Held<'_, OUTER>) {
    map.with_pmap(held, |tables| {
        let Some(vmids) = VMIDS.get() else { panic!("the VM is not set up yet") };
        let mut vmids = vmids.lock();
        *vmid = vmids.acquire(cpu, *vmid, &HardwareTlb);
        tables.set_vmid(vmid.number());
        // SAFETY: the root is the map's, which the caller keeps; the allocator gave the number to this map
        // alone, and knows that this CPU runs with it.
        unsafe { switch::load_stage2(tables.root(), vmid.number()) };
    });
}

/// How often the VMIDs ran out.
pub fn vmid_rollovers() -> u64 {
    VMIDS.get().map_or(0, |vmids| vmids.lock().rollovers())
}
