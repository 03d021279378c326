//! A guest's balloon: its device's work, and what people ask of it.
//!
//! What the guest gives back is discarded: frame and swap slot both go, and the page reads as zero, in this guest alone.
//! A page that cannot be given back stays, which costs memory and nothing else. Called by `work`, `monitor`.

use hv_abi::machine::{INTID_VIRTIO, VIRTIO_SLOTS};
use vmobject::lock::Held;

use super::devices::Devices;
use super::dma::{Dma, Reached};
use super::work::Step;
use super::{Guest, rank};
use crate::vdev::virtio::Did;
use crate::vdev::virtio::balloon::{Balloon, Reservoir};
use crate::vdev::{Kicks, Vgic};

/// Its transport: the last, so that disks are where they are in a machine without it.
pub const TRANSPORT: u32 = VIRTIO_SLOTS - 1;
/// Its interrupt.
pub const INTID: u32 = INTID_VIRTIO + TRANSPORT;

/// Brings its line to the guest's interrupt controller: which vCPUs have something to look at.
pub fn signal(balloon: &Balloon, vgic: &mut Vgic) -> Kicks {
    vgic.set_spi(INTID, balloon.line())
}

/// Does one piece of its work.
pub(super) fn step(guest: &Guest, devices: &mut Devices, held: &mut Held<'_, { rank::DEVICES }>) -> Step {
    let Devices { balloon, vgic, .. } = devices;
    match balloon.step(&mut Dma { guest, held }) {
        Did::Nothing => Step::Nothing,
        Did::Some => Step::Done(signal(balloon, vgic).0),
        Did::Wait(what) => Step::Wait { device: TRANSPORT as usize, slot: 0, what },
    }
}

/// Says how many pages are wanted in a guest's balloon: the vCPUs to wake.
pub fn set_target(guest: &Guest, pages: u32, held: &mut Held<'_, 0>) -> u64 {
    let (mut devices, _held) = guest.devices.lock(held);
    let Devices { balloon, vgic, .. } = &mut **devices;
    balloon.set_target(pages);
    signal(balloon, vgic).0
}

/// What is in a guest's balloon, as a copy of the device says; and asks its driver for new statistics, which come
/// when a vCPU of the guest has come round.
pub fn look(guest: &Guest, held: &mut Held<'_, 0>) -> Balloon {
    let balloon = {
        let (mut devices, _held) = guest.devices.lock(held);
        devices.balloon.ask();
        devices.balloon
    };
    guest.work.want();
    balloon
}

impl Reservoir for Dma<'_, '_> {
    fn give_back(&mut self, at: u64, bytes: u64) -> Reached<u64> {
        let at = self.ram(at, bytes)?;
        // What stays costs memory; the device works on, and the guest needs nothing of what it gave away.
        Ok(self.discard(at, bytes)?.unwrap_or(bytes))
    }
}
