//! The disk and the control port, over virtio-mmio, asynchronous throughout.
//!
//! The transport and the split queue are `virtio-drivers`'; the drivers on them are ours, because paging needs
//! many requests in flight, no allocation for any of them, and no call that waits. No EVENT_IDX anywhere: with
//! it that queue loses a kick at the wrap of its index. Read [`hal`] first: it says where the queues' memory comes
//! from and what lets a device reach it.
//!
//! A slot's interrupt is edge-triggered in QEMU's tree: a driver acknowledges first and looks at its queue
//! afterwards, so nothing that arrives in between is missed.
#![expect(unsafe_code, reason = "a slot's address comes from the device tree, as a number")]

pub mod blk;
#[cfg(test)]
mod blk_tests;
mod buffers;
pub mod console;
#[cfg(test)]
mod console_tests;
#[cfg(test)]
mod fake;
pub mod hal;

use crate::platform;
use core::ptr::NonNull;
use core::sync::atomic::{Ordering, fence};
use virtio_drivers::queue::VirtQueue;
use virtio_drivers::transport::mmio::{MmioError, MmioTransport, MmioVersion, VirtIOHeader};
use virtio_drivers::transport::{DeviceStatus, DeviceType, Transport};

/// A slot with a device in it.
pub type Mmio = MmioTransport<'static>;

/// What kind of device a slot holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A disk, for [`blk::Blk`].
    Disk,
    /// A console, for [`console::Console`].
    Console,
    /// Something that the hypervisor does not use.
    Other,
}

/// Why a device cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceError {
    /// The slot speaks virtio 0.9: QEMU wants `-global virtio-mmio.force-legacy=false`.
    Legacy,
    /// The slot's registers are not those of a virtio-mmio device.
    NotVirtio,
    /// The device does not accept what we need of it.
    Refused,
    /// A console that can have no port but its first: it lacks MULTIPORT.
    OnePort,
    /// A queue is smaller than ours, or in use.
    Queue,
    /// No memory for a queue.
    NoMemory,
}

/// Looks into a slot: `None` when it is empty.
///
/// # Safety
/// `slot` is a virtio-mmio slot of this machine, mapped as device memory at its physical address, and nobody
/// else drives it as long as the transport lives.
pub unsafe fn probe(slot: &platform::Device) -> Result<Option<(Kind, Mmio)>, DeviceError> {
    let address = usize::try_from(slot.region.base.bits()).map_err(|_| DeviceError::NotVirtio)?;
    let size = usize::try_from(slot.region.size).map_err(|_| DeviceError::NotVirtio)?;
    let header = NonNull::new(core::ptr::with_exposed_provenance_mut::<VirtIOHeader>(address))
        .filter(|header| header.is_aligned())
        .ok_or(DeviceError::NotVirtio)?;
    // SAFETY: the caller says that the slot is one, mapped and ours.
    let transport = match unsafe { MmioTransport::new(header, size) } {
        Ok(transport) => transport,
        // Device 0 is an empty slot; an id that the crate does not know is no device of ours either.
        Err(MmioError::InvalidDeviceID(_)) => return Ok(None),
        Err(MmioError::BadMagic(_) | MmioError::UnsupportedVersion(_) | MmioError::MmioRegionTooSmall) => {
            return Err(DeviceError::NotVirtio);
        }
    };
    if transport.version() == MmioVersion::Legacy {
        return Err(DeviceError::Legacy);
    }
    #[expect(clippy::wildcard_enum_match_arm, reason = "some twenty kinds, of which we drive two")]
    let kind = match transport.device_type() {
        DeviceType::Block => Kind::Disk,
        DeviceType::Console => Kind::Console,
        _ => Kind::Other,
    };
    Ok(Some((kind, transport)))
}

/// Negotiates `wanted`, and what virtio 1 needs; the bits that both sides have.
fn negotiate<T: Transport>(transport: &mut T, wanted: u64) -> Result<u64, DeviceError> {
    const VERSION_1: u64 = 1 << 32;
    transport.set_status(DeviceStatus::empty());
    transport.set_status(DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER);
    let common = transport.read_device_features() & (wanted | VERSION_1);
    if common & VERSION_1 == 0 {
        return Err(DeviceError::Legacy);
    }
    transport.write_driver_features(common);
    let status = DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER | DeviceStatus::FEATURES_OK;
    transport.set_status(status);
    if transport.get_status().contains(DeviceStatus::FEATURES_OK) {
        Ok(common)
    } else {
        transport.set_status(DeviceStatus::FAILED);
        Err(DeviceError::Refused)
    }
}

/// Sets a queue up: direct descriptors, no EVENT_IDX.
fn queue<T: Transport, const SIZE: usize>(
    transport: &mut T,
    index: u16,
) -> Result<VirtQueue<hal::Identity, SIZE>, DeviceError> {
    VirtQueue::new(transport, index, false, false).map_err(|error| {
        if error == virtio_drivers::Error::DmaError { DeviceError::NoMemory } else { DeviceError::Queue }
    })
}

/// Tells the device that its queue has something new, unless it says that it need not be told.
fn kick<T: Transport, const SIZE: usize>(
    transport: &mut T,
    queue: &VirtQueue<hal::Identity, SIZE>,
    index: u16,
) {
    // The index we published must be visible before the device's wish is read: without this full barrier the
    // load may pass the store, and a device that just went to sleep is never woken.
    fence(Ordering::SeqCst);
    if queue.should_notify() {
        transport.notify(index);
    }
}
