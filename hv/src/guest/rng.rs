//! A guest's source of entropy: its device's work, with bytes of the guest's own generator.
//!
//! The generator is the one of SMCCC's service, and whoever goes on from a snapshot has another: so a clone, a guest
//! that was reset and one that was stored each get bytes that nobody else gets. Called by `work`.

use hv_abi::machine::INTID_VIRTIO;
use vmobject::lock::Held;

use super::devices::Devices;
use super::dma::Dma;
use super::work::Step;
use super::{Guest, balloon, rank};
use crate::vdev::virtio::Did;
use crate::vdev::virtio::rng::{Rng, Source};
use crate::vdev::{Kicks, Vgic};

/// Its transport: the one before the balloon's, so that disks are where they are in a machine without it.
pub const TRANSPORT: u32 = balloon::TRANSPORT - 1;
/// Its interrupt.
pub const INTID: u32 = INTID_VIRTIO + TRANSPORT;

/// Brings its line to the guest's interrupt controller: which vCPUs have something to look at.
pub fn signal(rng: &Rng, vgic: &mut Vgic) -> Kicks {
    vgic.set_spi(INTID, rng.line())
}

/// Does one piece of its work.
pub(super) fn step(guest: &Guest, devices: &mut Devices, held: &mut Held<'_, { rank::DEVICES }>) -> Step {
    let Devices { rng, vgic, .. } = devices;
    match rng.step(&mut Dma { guest, held }) {
        Did::Nothing => Step::Nothing,
        Did::Some => Step::Done(signal(rng, vgic).0),
        Did::Wait(what) => Step::Wait { device: TRANSPORT as usize, slot: 0, what },
    }
}

impl Source for Dma<'_, '_> {
    fn draw(&mut self, out: &mut [u8]) {
        self.guest.random.lock(self.held).0.fill(out);
    }
}
