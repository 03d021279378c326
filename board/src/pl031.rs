//! The machine's clock: a PL031 that counts seconds since 1970.
//!
//! It is read once, at boot; from then on the counter tells how much later it is. Used by `hv::boot`.
#![expect(unsafe_code, reason = "the register's address comes from the device tree, as a number")]

use crate::platform::Region;
use core::ptr::NonNull;
use safe_mmio::UniqueMmioPointer;
use safe_mmio::fields::ReadPure;

/// What the clock says (RTCDR): seconds since 1970. `None` if it has no address.
///
/// # Safety
/// `clock` is a PL031 of this machine, mapped as device memory at its physical address.
pub unsafe fn seconds(clock: &Region) -> Option<u32> {
    let address = usize::try_from(clock.base.bits()).ok()?;
    let data = NonNull::new(core::ptr::with_exposed_provenance_mut::<ReadPure<u32>>(address))?;
    // SAFETY: the caller says that this is a mapped PL031, whose first register is the data register; reading it
    // changes nothing, so that it does not matter who else does.
    let data = unsafe { UniqueMmioPointer::new(data) };
    Some(data.read())
}
