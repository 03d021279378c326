//! Devices that a guest sees, as pure logic: registers in, values and wants out.
//!
//! Nothing here locks, allocates after construction, touches hardware or knows the time: `guest` holds the
//! lock, passes counter values in, and acts on what comes back. So every device is a plain value that can be
//! cloned with its guest, and all of it is tested on the host. An access that a device does not define reads
//! as zero and writes nothing; none panics.
//!
//! * [`vgic`] - the interrupt controller, with the list registers of each vCPU.
//! * [`vpl011`] - the console's UART.
//! * [`vrtc`] - the clock.
//! * [`vtimer`] - the EL1 physical timer, and deadlines of the virtual one.
//! * [`virtio`] - the disks, the balloon, the source of entropy.

pub mod vgic;
pub mod virtio;
pub mod vpl011;
pub mod vrtc;
pub mod vtimer;

use core::ops::{BitOr, BitOrAssign};

pub use vgic::Vgic;
pub use vpl011::Vpl011;
pub use vrtc::Vrtc;
pub use vtimer::Vtimer;

/// vCPUs that have something to look at: wake them, or make them leave the guest and flush.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Kicks(pub u64);

impl Kicks {
    /// Nobody.
    pub const NONE: Self = Self(0);

    /// One vCPU; nobody when there cannot be such a one.
    #[inline]
    pub const fn one(vcpu: usize) -> Self {
        if vcpu < 64 { Self(1 << vcpu) } else { Self(0) }
    }

    /// True when there is nobody to wake.
    #[inline]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// True when `vcpu` is among them.
    #[inline]
    pub const fn contains(self, vcpu: usize) -> bool {
        self.0 & Self::one(vcpu).0 != 0
    }
}

impl BitOr for Kicks {
    type Output = Self;
    #[inline]
    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl BitOrAssign for Kicks {
    #[inline]
    fn bitor_assign(&mut self, other: Self) {
        self.0 |= other.0;
    }
}

/// The low word of a register value.
#[inline]
const fn low(value: u64) -> u32 {
    #[expect(clippy::cast_possible_truncation, reason = "the low half is what is asked for")]
    let word = value as u32;
    word
}

/// The identification bytes that end every PrimeCell's page, from offset 0xfe0: four of the part, four of
/// the class.
#[inline]
fn primecell_id(bytes: &[u8; 8], offset: u64) -> u64 {
    let index = usize::try_from(offset.wrapping_sub(0xfe0) / 4).unwrap_or(usize::MAX);
    bytes.get(index).map_or(0, |&byte| u64::from(byte))
}
