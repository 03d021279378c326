//! Loads and stores that reach a device: finding it, doing the access, finishing the instruction.
//!
//! The hardware says size, register and direction for single-register loads and stores without
//! write-back; for anything else the guest gets an external abort (DESIGN 14), as from a bus that does
//! not take such transfers. The register itself is `devices`' business. Called by `memory`.

use super::syndrome::Access;
use super::{balloon, rng};
use crate::arch::context::GuestRegs;
use crate::vdev::Kicks;
use hv_abi::machine::{
    FORK_PAGE, GICD, GICR_BASE, GICR_STRIDE, PL011, PL031, VIRTIO_BASE, VIRTIO_STRIDE, VMGENID,
};
use vmobject::addr::Ipa;

/// The lowest address of the device window; below are the flash banks.
pub const WINDOW_START: u64 = GICD.base;
/// The first address above the device window: the generation id's page, which is memory; then RAM.
pub const WINDOW_END: u64 = VMGENID.base;

/// A device, and where in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// The distributor.
    Distributor(u64),
    /// One vCPU's redistributor.
    Redistributor(usize, u64),
    /// The console.
    Uart(u64),
    /// The clock.
    Rtc(u64),
    /// A disk.
    Disk(usize, u64),
    /// The balloon.
    Balloon(u64),
    /// The source of entropy.
    Rng(u64),
    /// The fork page.
    Fork(u64),
}

impl Target {
    /// log2 of the widest access in bytes: peripherals sit on a bus of 32 bits.
    #[inline]
    pub const fn widest(self) -> u8 {
        match self {
            Self::Distributor(_) | Self::Redistributor(..) => 3,
            Self::Uart(_)
            | Self::Rtc(_)
            | Self::Disk(..)
            | Self::Balloon(_)
            | Self::Rng(_)
            | Self::Fork(_) => 2,
        }
    }
}

/// The device at an address, for a guest with so many vCPUs and disks.
#[inline]
pub fn find(at: Ipa, vcpus: usize, disks: usize) -> Option<Target> {
    let at = at.bits();
    if PL011.contains(at) {
        return Some(Target::Uart(at - PL011.base));
    }
    if GICD.contains(at) {
        return Some(Target::Distributor(at - GICD.base));
    }
    if PL031.contains(at) {
        return Some(Target::Rtc(at - PL031.base));
    }
    if FORK_PAGE.contains(at) {
        return Some(Target::Fork(at - FORK_PAGE.base));
    }
    if let Some(above) = at.checked_sub(VIRTIO_BASE) {
        return transport(above / VIRTIO_STRIDE, above % VIRTIO_STRIDE, disks);
    }
    let above = at.checked_sub(GICR_BASE)?;
    let vcpu = usize::try_from(above / GICR_STRIDE).ok().filter(|&vcpu| vcpu < vcpus)?;
    Some(Target::Redistributor(vcpu, above % GICR_STRIDE))
}

/// The device in a virtio transport.
#[cold]
fn transport(number: u64, offset: u64, disks: usize) -> Option<Target> {
    if number == u64::from(balloon::TRANSPORT) {
        return Some(Target::Balloon(offset));
    }
    if number == u64::from(rng::TRANSPORT) {
        return Some(Target::Rng(offset));
    }
    let disk = usize::try_from(number).ok().filter(|&disk| disk < disks)?;
    Some(Target::Disk(disk, offset))
}

/// What a store to a device led to.
#[derive(Clone, Copy, Debug, Default)]
pub struct Effect {
    /// vCPUs that have something to look at.
    pub kicks: u64,
    /// A byte for the console.
    pub output: Option<u8>,
    /// A virtio device has something to do.
    pub work: bool,
}

impl Effect {
    /// Kicks alone.
    pub const fn of(kicks: Kicks) -> Self {
        Self { kicks: kicks.0, output: None, work: false }
    }
}

/// The value that a load puts into its register: extended as the instruction asks.
pub const fn extended(access: Access, value: u64) -> u64 {
    let bits = 8u32 << access.size;
    if bits >= 64 {
        return value;
    }
    let value = value & ((1 << bits) - 1);
    if !access.sign {
        return value;
    }
    let spare = 64 - bits;
    #[expect(clippy::cast_sign_loss, reason = "the sign was extended over all bits on purpose")]
    let wide = (((value << spare).cast_signed()) >> spare) as u64;
    if access.wide { wide } else { wide & 0xffff_ffff }
}

/// The value that a store takes from its register: cut to its size.
pub fn stored(access: Access, regs: &GuestRegs) -> u64 {
    let value = regs.read(usize::from(access.rt));
    match access.size {
        0 => value & 0xff,
        1 => value & 0xffff,
        2 => value & 0xffff_ffff,
        _ => value,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BYTE: Access = Access { size: 0, sign: false, wide: false, rt: 1 };

    #[test]
    fn a_load_extends_as_the_instruction_says() {
        assert_eq!(extended(BYTE, 0x1ff), 0xff);
        assert_eq!(extended(Access { sign: true, ..BYTE }, 0x80), 0xffff_ff80);
        assert_eq!(extended(Access { sign: true, wide: true, ..BYTE }, 0x80), 0xffff_ffff_ffff_ff80);
        assert_eq!(extended(Access { size: 3, ..BYTE }, u64::MAX), u64::MAX);
    }

    #[test]
    fn a_store_takes_only_its_size_and_the_zero_register_is_zero() {
        let mut regs = GuestRegs::starting_at(0, 0);
        regs.write(1, 0x1234_5678_9abc_def0);
        assert_eq!(stored(BYTE, &regs), 0xf0);
        assert_eq!(stored(Access { size: 2, ..BYTE }, &regs), 0x9abc_def0);
        assert_eq!(stored(Access { rt: 31, ..BYTE }, &regs), 0);
    }

    #[test]
    fn a_redistributor_or_disk_exists_only_for_a_vcpu_or_disk_that_does() {
        assert_eq!(find(Ipa::new(0x080c_0010), 2, 0), Some(Target::Redistributor(1, 0x10)));
        assert_eq!(find(Ipa::new(0x080e_0000), 2, 0), None);
        assert_eq!(find(Ipa::new(0x0900_0018), 1, 0), Some(Target::Uart(0x18)));
        assert_eq!(find(Ipa::new(0x0b00_0010), 1, 0), Some(Target::Fork(0x10)));
        assert_eq!(find(Ipa::new(0x0b00_1000), 1, 32), None);
        assert_eq!(find(Ipa::new(0x0a00_0000), 1, 0), None);
        assert_eq!(find(Ipa::new(0x0a00_0270), 1, 2), Some(Target::Disk(1, 0x70)));
        assert_eq!(find(Ipa::new(0x0a00_0400), 1, 2), None);
        assert_eq!(find(Ipa::new(0x0a00_3e70), 1, 0), Some(Target::Balloon(0x70)));
        assert_eq!(find(Ipa::new(0x0a00_3c70), 1, 0), Some(Target::Rng(0x70)));
        assert_eq!(find(Ipa::new(0x0a00_4000), 1, 0), None);
    }
}
