//! A virtio device in memory, for tests: a transport that remembers where its queues are, and the device's side
//! of them, step by step. What it does to each request is the test's to say: late, failing, in any order, wrong.

use super::hal;
use std::alloc::Layout;
use std::sync::{Arc, Mutex, MutexGuard};
use std::vec;
use std::vec::Vec;
use virtio_drivers::transport::{DeviceStatus, DeviceType, InterruptStatus, Transport};
use virtio_drivers::{Error, Result};
use vmobject::addr::PhysAddr;
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Queues of a device: those of a console with two ports are the most.
const QUEUES: usize = 6;

/// Where a queue is.
#[derive(Clone, Copy, Debug, Default)]
struct Queue {
    size: u16,
    descriptors: u64,
    available: u64,
    used: u64,
    /// Chains that the device has taken.
    taken: u16,
}

/// What both sides see of the device.
#[derive(Debug)]
pub(super) struct State {
    offered: u64,
    pub(super) accepted: u64,
    pub(super) status: DeviceStatus,
    config: Vec<u8>,
    queues: [Queue; QUEUES],
    pub(super) kicks: usize,
    /// It does not say yet that it has been reset.
    pub(super) slow: bool,
}

/// The driver's side.
#[derive(Clone, Debug)]
pub(super) struct FakeTransport(Arc<Mutex<State>>);

/// A chain that the driver put on a queue.
#[derive(Debug)]
pub(super) struct Chain {
    pub(super) head: u16,
    /// Address, length, and whether the device writes.
    pub(super) buffers: Vec<(u64, usize, bool)>,
}

impl FakeTransport {
    /// A device that offers features (VERSION_1 is added) and has a configuration space.
    pub(super) fn new(offered: u64, config: Vec<u8>) -> Self {
        let alloc = |pages: usize| {
            let layout = Layout::from_size_align(pages * 4096, 4096).unwrap();
            // SAFETY: the layout is not empty: no driver takes no pages.
            let base = unsafe { std::alloc::alloc(layout) };
            Some(PhysAddr::new(base.expose_provenance() as u64))
        };
        // SAFETY: the pages are fresh and nobody else's. They leak: a test's device may still know them.
        unsafe { hal::register(hal::PageSource { alloc, free: |_, _| {} }) };
        Self(Arc::new(Mutex::new(State {
            offered: offered | 1 << 32,
            accepted: 0,
            status: DeviceStatus::empty(),
            config,
            queues: [Queue::default(); QUEUES],
            kicks: 0,
            slow: false,
        })))
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    /// Takes the next chain that the driver put on a queue.
    pub(super) fn take(&self, queue: usize) -> Option<Chain> {
        let queue = &mut self.state().queues[queue];
        if queue.size == 0 || load::<u16>(queue.available + 2) == queue.taken {
            return None;
        }
        let head: u16 = load(queue.available + 4 + u64::from(queue.taken % queue.size) * 2);
        queue.taken = queue.taken.wrapping_add(1);
        let mut buffers = vec![];
        let mut at = head;
        loop {
            let descriptor = queue.descriptors + u64::from(at) * 16;
            let flags: u16 = load(descriptor + 12);
            buffers.push((load(descriptor), load::<u32>(descriptor + 8) as usize, flags & 2 != 0));
            if flags & 1 == 0 {
                return Some(Chain { head, buffers });
            }
            at = load(descriptor + 14);
            assert!(buffers.len() <= usize::from(queue.size), "a chain that never ends");
        }
    }

    /// Gives a chain back, with `bytes` written.
    pub(super) fn finish(&self, queue: usize, head: u16, bytes: u32) {
        let queue = self.state().queues[queue];
        let index: u16 = load(queue.used + 2);
        let element = queue.used + 4 + u64::from(index % queue.size) * 8;
        store(element, u32::from(head));
        store(element + 4, bytes);
        store(queue.used + 2, index.wrapping_add(1));
    }
}

/// Reads the driver's memory, as a device does.
pub(super) fn load<T: Copy>(at: u64) -> T {
    let pointer = core::ptr::with_exposed_provenance::<T>(usize::try_from(at).unwrap());
    // SAFETY: the driver put this address on a queue or in a descriptor; it lies in leaked pages, or in a buffer
    // that the test keeps.
    unsafe { pointer.read_volatile() }
}

/// Writes the driver's memory, as a device does.
pub(super) fn store<T: Copy>(at: u64, value: T) {
    let pointer = core::ptr::with_exposed_provenance_mut::<T>(usize::try_from(at).unwrap());
    // SAFETY: as for `load`.
    unsafe { pointer.write_volatile(value) }
}

impl Transport for FakeTransport {
    fn device_type(&self) -> DeviceType {
        DeviceType::Block
    }
    fn read_device_features(&mut self) -> u64 {
        self.state().offered
    }
    fn write_driver_features(&mut self, features: u64) {
        self.state().accepted = features;
    }
    fn max_queue_size(&mut self, _queue: u16) -> u32 {
        1024
    }
    fn notify(&mut self, _queue: u16) {
        self.state().kicks += 1;
    }
    fn get_status(&self) -> DeviceStatus {
        let state = self.state();
        if state.slow { DeviceStatus::DEVICE_NEEDS_RESET } else { state.status }
    }
    fn set_status(&mut self, status: DeviceStatus) {
        let mut state = self.state();
        state.status = status;
        if status == DeviceStatus::empty() {
            state.queues = [Queue::default(); QUEUES];
        }
    }
    fn set_guest_page_size(&mut self, _size: u32) {}
    fn requires_legacy_layout(&self) -> bool {
        false
    }
    fn queue_set(&mut self, queue: u16, size: u32, descriptors: u64, available: u64, used: u64) {
        let size = u16::try_from(size).unwrap();
        self.state().queues[usize::from(queue)] = Queue { size, descriptors, available, used, taken: 0 };
    }
    fn queue_unset(&mut self, queue: u16) {
        self.state().queues[usize::from(queue)] = Queue::default();
    }
    fn queue_used(&mut self, queue: u16) -> bool {
        self.state().queues[usize::from(queue)].size > 0
    }
    fn ack_interrupt(&mut self) -> InterruptStatus {
        InterruptStatus::empty()
    }
    fn read_config_generation(&self) -> u32 {
        0
    }
    fn read_config_space<T: FromBytes + IntoBytes>(&self, offset: usize) -> Result<T> {
        assert!(align_of::<T>() <= 4, "the configuration space is aligned to 4");
        let state = self.state();
        let bytes = state.config.get(offset..offset + size_of::<T>()).ok_or(Error::ConfigSpaceTooSmall)?;
        T::read_from_bytes(bytes).map_err(|_| Error::ConfigSpaceTooSmall)
    }
    fn write_config_space<T: IntoBytes + Immutable>(&mut self, _offset: usize, _value: T) -> Result<()> {
        Err(Error::Unsupported)
    }
}
