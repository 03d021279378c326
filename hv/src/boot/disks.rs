//! Which virtio slots hold a disk or the control port, and what partitions the disks have.
//!
//! Called once, on the first CPU. A device that cannot be used is told of and left out.

use crate::mm::store::Disks;
use alloc::alloc::{Layout, alloc, dealloc};
use board::platform::{Device, Platform};
use board::virtio::blk::Blk;
use board::virtio::console::Console;
use board::virtio::hal::{self, PageSource};
use board::virtio::{DeviceError, Kind, Mmio, probe};
use log::{info, warn};
use vmobject::addr::{PAGE_SIZE, PhysAddr};

/// Drivers' pages come from the heap, which is plain RAM on an identity map.
const SOURCE: PageSource = PageSource { alloc: take, free: give_back };

fn layout(pages: usize) -> Option<Layout> {
    let page = usize::try_from(PAGE_SIZE).ok()?;
    Layout::from_size_align(pages.checked_mul(page)?, page).ok().filter(|layout| layout.size() > 0)
}

fn take(pages: usize) -> Option<PhysAddr> {
    // SAFETY: the layout has a size.
    let start = unsafe { alloc(layout(pages)?) };
    (!start.is_null()).then(|| PhysAddr::new(start.expose_provenance() as u64))
}

fn give_back(base: PhysAddr, pages: usize) {
    if let (Some(layout), Ok(address)) = (layout(pages), usize::try_from(base.bits())) {
        // SAFETY: drivers give back what `take` gave, once, with the same count.
        unsafe { dealloc(core::ptr::with_exposed_provenance_mut(address), layout) };
    }
}

/// Finds every disk.
pub(super) fn find(platform: &Platform) -> Disks {
    // SAFETY: the heap is mapped cacheable and writable where it is, and what it gives is nobody else's.
    unsafe { hal::register(SOURCE) };
    let mut disks = Disks::new();
    for slot in &platform.virtio {
        look(slot, &mut disks);
    }
    for (_, name) in disks.partitions() {
        info!("partition \"{name}\"");
    }
    disks
}

fn look(slot: &Device, disks: &mut Disks) {
    let at = slot.region.base.bits();
    // SAFETY: the tree names the slot, the map has it as device memory, and nobody else has it.
    let transport = match unsafe { probe(slot) } {
        Ok(Some((Kind::Disk, transport))) => transport,
        Ok(Some((Kind::Console, transport))) => return listen(slot, transport),
        Ok(Some((Kind::Other, _)) | None) => return,
        Err(error) => return warn!("virtio slot {at:#x}: {error:?}"),
    };
    match Blk::new(transport) {
        Ok(blk) => {
            let mib = blk.sectors() >> 11;
            match disks.add(blk, slot.interrupt) {
                Ok(()) => info!("disk at {at:#x}, {mib} MiB"),
                Err(error) => warn!("disk at {at:#x}, {mib} MiB: no partition table: {error:?}"),
            }
        }
        Err(error) => warn!("disk at {at:#x}: {error:?}"),
    }
}

fn listen(slot: &Device, transport: Mmio) {
    let at = slot.region.base.bits();
    match Console::new(transport) {
        Ok(console) => {
            if super::control::set(console, slot.interrupt) {
                info!("control port at {at:#x}");
            } else {
                warn!("console at {at:#x}: there is a control port already");
            }
        }
        Err(DeviceError::OnePort) => warn!("console at {at:#x}: it has no port 1, so it is no control port"),
        Err(error) => warn!("console at {at:#x}: {error:?}"),
    }
}
