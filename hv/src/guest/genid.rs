//! The generation id: how a guest learns that it is not the only one to continue from where it was.
//!
//! Sixteen random bytes in a page of their own, and an interrupt when they change (Microsoft's "Virtual Machine
//! Generation ID"; the device tree's `microsoft,vmgenid`). Linux from 6.10 on mixes the bytes into its generator of random
//! numbers when the interrupt comes. Both are settled before a clone's first instruction (invariant I10). The page is
//! memory and not a device: the driver copies the bytes with whatever loads it likes.
//! Used by `create` and `snapshot`.

use alloc::sync::Arc;

use hv_abi::machine::{INTID_VMGENID, VMGENID};
use vmobject::VmError;
use vmobject::addr::{Ipa, IpaRange, PageIndex};
use vmobject::lock::Held;
use vmobject::map::Share;
use vmobject::prot::Prot;

use super::create::{self, CreateError};
use super::devices::Devices;
use super::trng::Generator;
use crate::mm::{self, Map};

/// Puts the page into a new guest's map.
pub fn install(map: &Arc<Map>, held: &mut Held<'_, 0>) -> Result<(), VmError> {
    let range = IpaRange::from_pages(Ipa::new(VMGENID.base), 1).ok_or(VmError::Range)?;
    let object = mm::vm().anonymous(1, held)?;
    mm::vm().insert(map, range, object, PageIndex::default(), Prot::READ | Prot::WRITE, Share::Shared, held)
}

/// Gives a guest that does not run an id that nobody had; `poll` lets transfers finish meanwhile.
pub fn renew(
    map: &Arc<Map>,
    random: &mut Generator,
    poll: &dyn Fn(&mut Held<'_, 0>),
    held: &mut Held<'_, 0>,
) -> Result<(), CreateError> {
    let [low, high, _] = random.words();
    let id = (u128::from(high) << 64 | u128::from(low)).to_le_bytes();
    create::write(map, Ipa::new(VMGENID.base), &id, poll, held)
}

/// Makes the interrupt pending: the id has changed.
pub fn announce(devices: &mut Devices) {
    // The guest does not run, so there is nobody to wake.
    let _ = devices.vgic.set_spi(INTID_VMGENID, true);
    let _ = devices.vgic.set_spi(INTID_VMGENID, false);
}
