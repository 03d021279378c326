//! A redistributor: two frames of 64 KiB for each vCPU, LPIs absent.
//!
//! The first frame identifies the vCPU and wakes it, the second holds its SGIs and PPIs, in the same
//! registers as a word of SPIs has in the distributor.

use super::super::{Kicks, low};
use super::bank::BITS;
use super::dist::{BitRegister, priority_slot, read_id};
use super::{IIDR, Vgic, Which, affinity};

/// Where the second frame starts.
const SGI_FRAME: u32 = 0x1_0000;
/// The last of a vCPU's frames ends here.
const END: u32 = 0x2_0000;
/// GICR_WAKER: the vCPU sleeps, and so does its interface.
const WAKER_ASLEEP: u32 = 0b110;
const WAKER_SLEEP: u32 = 0b010;
/// GICR_TYPER: the last redistributor of the region.
const TYPER_LAST: u64 = 1 << 4;

impl Vgic {
    /// Reads `bytes` bytes at `offset` of a vCPU's redistributor.
    pub fn redist_read(&mut self, vcpu: usize, offset: u64, bytes: usize) -> u64 {
        let Some(local) = self.vcpus.get(vcpu) else { return 0 };
        let Ok(offset @ 0..END) = u32::try_from(offset) else { return 0 };
        match bytes {
            4 if offset.is_multiple_of(4) => u64::from(self.redist_read_word(vcpu, offset)),
            1 => match priority_slot(offset, SGI_FRAME + 0x400) {
                Some(intid @ 0..32) => u64::from(local.bank.priority[intid as usize]),
                _ => 0,
            },
            8 if offset == 0x8 => self.redist_type(vcpu),
            _ => 0,
        }
    }

    /// Writes `bytes` bytes at `offset` of a vCPU's redistributor.
    pub fn redist_write(&mut self, vcpu: usize, offset: u64, bytes: usize, value: u64) -> Kicks {
        let Ok(offset @ 0..END) = u32::try_from(offset) else { return Kicks::NONE };
        match bytes {
            4 if offset.is_multiple_of(4) => self.redist_write_word(vcpu, offset, low(value)),
            1 => match priority_slot(offset, SGI_FRAME + 0x400) {
                Some(intid @ 0..32) => {
                    self.set_priorities(Which::Local(vcpu), intid as usize, &[value.to_le_bytes()[0]])
                }
                _ => Kicks::NONE,
            },
            _ => Kicks::NONE,
        }
    }

    fn redist_type(&self, vcpu: usize) -> u64 {
        let last = if vcpu + 1 == self.vcpus.len() { TYPER_LAST } else { 0 };
        // Affinity 3 would be bits 63 to 56; no vCPU has one.
        affinity(vcpu) << 32 | (vcpu as u64) << 8 | last
    }

    fn redist_read_word(&mut self, vcpu: usize, offset: u32) -> u32 {
        let which = Which::Local(vcpu);
        match offset {
            0x4 => IIDR,
            0x8 => low(self.redist_type(vcpu)),
            0xc => low(self.redist_type(vcpu) >> 32),
            0x14 => match self.vcpus.get(vcpu) {
                Some(local) if local.asleep => WAKER_ASLEEP,
                _ => 0,
            },
            0xffd0..=0xffff | 0x1_ffd0..=0x1_ffff => read_id(0x93, offset),
            0x1_0080..=0x1_03ff if offset & 0x7f == 0 => {
                BitRegister::at(offset - SGI_FRAME).map_or(0, |register| self.read_bits(which, register))
            }
            0x1_0400..=0x1_041f => self.read_priorities(which, (offset & 0x1f) as usize % BITS),
            0x1_0c00 | 0x1_0c04 => self.read_config(which, offset & 4 != 0),
            _ => 0,
        }
    }

    fn redist_write_word(&mut self, vcpu: usize, offset: u32, value: u32) -> Kicks {
        let which = Which::Local(vcpu);
        match offset {
            0x14 => {
                if let Some(local) = self.vcpus.get_mut(vcpu) {
                    local.asleep = value & WAKER_SLEEP != 0;
                }
                Kicks::NONE
            }
            0x1_0080..=0x1_03ff if offset & 0x7f == 0 => BitRegister::at(offset - SGI_FRAME)
                .map_or(Kicks::NONE, |register| self.write_bits(which, register, value)),
            0x1_0400..=0x1_041f => self.set_priorities(which, (offset & 0x1f) as usize, &value.to_le_bytes()),
            0x1_0c00 | 0x1_0c04 => self.write_config(which, offset & 4 != 0, value),
            _ => Kicks::NONE,
        }
    }
}
