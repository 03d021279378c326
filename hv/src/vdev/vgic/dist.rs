//! The distributor's registers, and those that both kinds of frame have.
//!
//! A word of thirty-two interrupts has the same registers in the distributor (SPIs) and in a
//! redistributor (SGIs and PPIs): [`Vgic::read_bits`] and its neighbours serve both. Registers are 32 bits
//! wide and taken whole; priorities by byte too, routes also as 64 bits. Anything else, and everything
//! reserved, reads as zero and ignores writes.

use super::super::{Kicks, low};
use super::bank::{BITS, Bank, Ones};
use super::lists::{LR_ACTIVE, LR_PENDING};
use super::{
    ENABLE_GROUPS, IIDR, INTIDS, NOBODY, PRIORITY_MASK, SGIS, SPI_WORDS, TIMER_BIT, Vgic, Which, index_of,
};

/// GICD_CTLR: affinity routing is on and stays on; security is off and stays off.
const CTLR_FIXED: u32 = 1 << 4 | 1 << 6;
/// GICD_TYPER: words of interrupts, ten bits of interrupt number, no 1-of-N, target lists of 16.
const TYPER: u32 = (INTIDS / 32 - 1) | 9 << 19 | 1 << 25;
/// Affinities 0 to 3 in a route; the others are reserved, or 1-of-N, which is not provided.
const ROUTE_MASK: u64 = 0xff_00ff_ffff;

/// Component identification from offset 0xffd0: PIDR4 to 7, PIDR0 to 3, CIDR0 to 3.
pub(super) const fn component_id(part: u8) -> [u8; 12] {
    [0x44, 0, 0, 0, part, 0xb4, 0x3b, 0, 0x0d, 0xf0, 0x05, 0xb1]
}

/// Reads the identification registers at `offset` of a frame.
pub(super) fn read_id(part: u8, offset: u32) -> u32 {
    let index = (offset & 0xffff).wrapping_sub(0xffd0) / 4;
    usize::try_from(index).ok().and_then(|index| component_id(part).get(index).copied()).map_or(0, u32::from)
}

/// A register of one bit per interrupt, by its place in the frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BitRegister {
    Group,
    SetEnable,
    ClearEnable,
    SetPending,
    ClearPending,
    SetActive,
    ClearActive,
}

impl BitRegister {
    /// The register whose bank of 32 words is at `offset`: 0x80 and up, 0x80 bytes each.
    #[inline]
    pub(super) const fn at(offset: u32) -> Option<Self> {
        Some(match offset >> 7 {
            1 => Self::Group,
            2 => Self::SetEnable,
            3 => Self::ClearEnable,
            4 => Self::SetPending,
            5 => Self::ClearPending,
            6 => Self::SetActive,
            7 => Self::ClearActive,
            _ => return None,
        })
    }
}

impl Vgic {
    /// Reads `bytes` bytes at `offset` of the distributor.
    pub fn dist_read(&mut self, offset: u64, bytes: usize) -> u64 {
        let Ok(offset) = u32::try_from(offset) else { return 0 };
        match bytes {
            4 if offset.is_multiple_of(4) => u64::from(self.dist_read_word(offset)),
            1 => priority_slot(offset, 0x400).map_or(0, |intid| u64::from(self.priority_of(intid))),
            8 if offset.is_multiple_of(8) => {
                Self::route_slot(offset).map_or(0, |(word, bit)| self.router(word, bit))
            }
            _ => 0,
        }
    }

    /// Writes `bytes` bytes at `offset` of the distributor.
    pub fn dist_write(&mut self, offset: u64, bytes: usize, value: u64) -> Kicks {
        let Ok(offset) = u32::try_from(offset) else { return Kicks::NONE };
        match bytes {
            4 if offset.is_multiple_of(4) => self.dist_write_word(offset, low(value)),
            1 => match priority_slot(offset, 0x400) {
                Some(intid @ 32..) => {
                    let byte = value.to_le_bytes()[0];
                    self.set_priorities(
                        Which::Shared(intid as usize / BITS - 1),
                        intid as usize % BITS,
                        &[byte],
                    )
                }
                _ => Kicks::NONE,
            },
            8 if offset.is_multiple_of(8) => match Self::route_slot(offset) {
                Some((word, bit)) => self.set_route(word, bit, value),
                None => Kicks::NONE,
            },
            _ => Kicks::NONE,
        }
    }

    fn dist_read_word(&mut self, offset: u32) -> u32 {
        match offset {
            0x0 => self.groups | CTLR_FIXED,
            0x4 => TYPER,
            0x8 => IIDR,
            0x80..=0x3ff => match (BitRegister::at(offset), shared_word(offset & 0x7f, 4)) {
                (Some(register), Some(which)) => self.read_bits(which, register),
                _ => 0,
            },
            0x400..=0x7ff => shared_word(offset - 0x400, 32)
                .map_or(0, |which| self.read_priorities(which, (offset & 0x1f) as usize)),
            0xc00..=0xcff => {
                shared_word(offset - 0xc00, 8).map_or(0, |which| self.read_config(which, offset & 4 != 0))
            }
            0x6000..=0x7fff => match Self::route_slot(offset & !4) {
                Some((word, bit)) => {
                    let route = self.router(word, bit);
                    if offset & 4 == 0 { low(route) } else { low(route >> 32) }
                }
                None => 0,
            },
            0xffd0..=0xffff => read_id(0x92, offset),
            _ => 0,
        }
    }

    fn dist_write_word(&mut self, offset: u32, value: u32) -> Kicks {
        match offset {
            0x0 => self.set_groups(value & ENABLE_GROUPS),
            0x80..=0x3ff => match (BitRegister::at(offset), shared_word(offset & 0x7f, 4)) {
                (Some(register), Some(which)) => self.write_bits(which, register, value),
                _ => Kicks::NONE,
            },
            0x400..=0x7ff => shared_word(offset - 0x400, 32).map_or(Kicks::NONE, |which| {
                self.set_priorities(which, (offset & 0x1f) as usize, &value.to_le_bytes())
            }),
            0xc00..=0xcff => shared_word(offset - 0xc00, 8)
                .map_or(Kicks::NONE, |which| self.write_config(which, offset & 4 != 0, value)),
            0x6000..=0x7fff => match Self::route_slot(offset & !4) {
                Some((word, bit)) => {
                    let old = self.router(word, bit);
                    let value = u64::from(value);
                    let new = if offset & 4 == 0 {
                        old & !0xffff_ffff | value
                    } else {
                        old & 0xffff_ffff | value << 32
                    };
                    self.set_route(word, bit, new)
                }
                None => Kicks::NONE,
            },
            _ => Kicks::NONE,
        }
    }

    fn set_groups(&mut self, groups: u32) -> Kicks {
        if groups == self.groups {
            return Kicks::NONE;
        }
        self.groups = groups;
        let mut kicks = Kicks::NONE;
        for vcpu in 0..self.vcpus.len() {
            kicks |= self.mark(vcpu);
        }
        kicks
    }

    fn route_slot(offset: u32) -> Option<(usize, usize)> {
        match offset.checked_sub(0x6000)? / 8 {
            intid @ 32..INTIDS => Some((intid as usize / BITS - 1, intid as usize % BITS)),
            _ => None,
        }
    }

    fn router(&self, word: usize, bit: usize) -> u64 {
        self.spis.get(word).map_or(0, |shared| shared.router[bit])
    }

    fn set_route(&mut self, word: usize, bit: usize, value: u64) -> Kicks {
        let value = value & ROUTE_MASK;
        let vcpus = self.vcpus.len();
        let Some(shared) = self.spis.get_mut(word) else { return Kicks::NONE };
        shared.router[bit] = value;
        let route = index_of(value)
            .filter(|&vcpu| vcpu < vcpus)
            .map_or(NOBODY, |vcpu| u8::try_from(vcpu).unwrap_or(NOBODY));
        let moved = core::mem::replace(&mut shared.route[bit], route) != route;
        let one = 1 << bit;
        // Listed: whoever has it gives it back, and it is passed on then.
        let concerned = shared.bank.listed | shared.bank.ready(self.groups);
        if moved && concerned & one != 0 { self.kick(Which::Shared(word), one) } else { Kicks::NONE }
    }

    /// Reads a register of one bit per interrupt.
    pub(super) fn read_bits(&mut self, which: Which, register: BitRegister) -> u32 {
        let Some(bank) = self.bank(which) else { return 0 };
        match register {
            BitRegister::Group => bank.group,
            BitRegister::SetEnable | BitRegister::ClearEnable => bank.enabled,
            BitRegister::SetPending | BitRegister::ClearPending => {
                let (mut here, listed) = (bank.pending(), bank.listed);
                if let Which::Local(vcpu) = which
                    && self.timer_is_live(vcpu)
                    && (bank.active | listed) & TIMER_BIT != 0
                {
                    // Its line is only known to have been high when it fired.
                    here &= !TIMER_BIT;
                }
                here | self.listed_bits(which, listed, LR_PENDING)
            }
            BitRegister::SetActive | BitRegister::ClearActive => {
                let (here, listed) = (bank.active, bank.listed);
                here | self.listed_bits(which, listed, LR_ACTIVE)
            }
        }
    }

    /// Those of the listed interrupts that are in `state` as far as is known.
    fn listed_bits(&mut self, which: Which, listed: u32, state: u64) -> u32 {
        let mut found = 0;
        for bit in Ones(listed) {
            let (vcpu, intid) = match which {
                Which::Local(vcpu) => (vcpu, bit),
                Which::Shared(word) => {
                    let holder = self.spis.get(word).map_or(NOBODY, |shared| shared.holder[bit]);
                    (usize::from(holder), (word + 1) * BITS + bit)
                }
            };
            let Some(local) = self.vcpus.get(vcpu) else { continue };
            self.stale |= Kicks::one(vcpu).0;
            if local.lists.state_of(u32::try_from(intid).unwrap_or(0)) & state != 0 {
                found |= 1 << bit;
            }
        }
        found
    }

    /// Writes a register of one bit per interrupt.
    pub(super) fn write_bits(&mut self, which: Which, register: BitRegister, bits: u32) -> Kicks {
        match register {
            BitRegister::Group => self.change(which, |bank| {
                let changed = bank.group ^ bits;
                bank.group = bits;
                changed & (bank.listed | bank.pending() & bank.enabled)
            }),
            BitRegister::SetEnable => self.change(which, |bank| {
                let changed = bits & !bank.enabled;
                bank.enabled |= bits;
                changed & bank.listed
            }),
            BitRegister::ClearEnable => self.change(which, |bank| {
                let changed = bits & bank.enabled;
                bank.enabled &= !bits;
                changed & bank.listed
            }),
            BitRegister::SetPending => self.change(which, |bank| {
                let changed = bits & !bank.latch;
                bank.latch |= bits;
                changed & bank.listed
            }),
            BitRegister::ClearPending => self.change(which, |bank| {
                bank.latch &= !bits;
                bank.queued_unpend |= bits & bank.listed;
                bits & bank.listed
            }),
            BitRegister::SetActive => self.make_active(which, bits),
            BitRegister::ClearActive => self.make_inactive(which, bits),
        }
    }

    /// Makes interrupts active on the vCPU that they are routed to.
    fn make_active(&mut self, which: Which, bits: u32) -> Kicks {
        if let Which::Shared(word) = which
            && let Some(shared) = self.spis.get_mut(word)
        {
            for bit in Ones(bits & !shared.bank.listed & !shared.bank.active) {
                shared.holder[bit] = shared.route[bit];
            }
        }
        self.change(which, |bank| {
            let unlisted = bits & !bank.listed & !bank.active;
            bank.active |= unlisted;
            bank.queued_active |= bits & bank.listed;
            unlisted | bits & bank.listed
        })
    }

    fn priority_of(&self, intid: u32) -> u8 {
        if intid < 32 {
            return 0;
        }
        let bank = self.bank(Which::Shared(intid as usize / BITS - 1));
        bank.map_or(0, |bank| bank.priority[intid as usize % BITS])
    }

    /// Reads four priorities.
    pub(super) fn read_priorities(&self, which: Which, first: usize) -> u32 {
        let bytes = self.bank(which).and_then(|bank| bank.priority.get(first..first + 4));
        bytes.and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_le_bytes)
    }

    /// Writes priorities.
    pub(super) fn set_priorities(&mut self, which: Which, first: usize, values: &[u8]) -> Kicks {
        self.change(which, |bank| {
            let mut changed = 0;
            for (index, &value) in values.iter().enumerate() {
                let Some(priority) = bank.priority.get_mut(first + index) else { break };
                if core::mem::replace(priority, value & PRIORITY_MASK) != value & PRIORITY_MASK {
                    changed |= 1 << (first + index);
                }
            }
            changed & (bank.listed | bank.pending() & bank.enabled)
        })
    }

    /// Reads the configuration of half a word.
    pub(super) fn read_config(&self, which: Which, upper: bool) -> u32 {
        let edge = self.bank(which).map_or(0, |bank| bank.edge);
        let half = if upper { edge >> 16 } else { edge & 0xffff };
        Ones(half).fold(0, |register, bit| register | 2 << (2 * bit))
    }

    /// Writes the configuration of half a word. SGIs and the linked timer stay as they are.
    pub(super) fn write_config(&mut self, which: Which, upper: bool, value: u32) -> Kicks {
        let shift = if upper { 16 } else { 0 };
        let new = (0..16)
            .filter(|bit| value & 2 << (2 * bit) != 0)
            .fold(0, |edge, bit| edge | 1u32 << (bit + shift));
        let fixed = match which {
            Which::Local(_) => SGIS | TIMER_BIT,
            Which::Shared(_) => 0,
        };
        self.change(which, |bank: &mut Bank| {
            let writable = 0xffff << shift & !fixed;
            let changed = (bank.edge ^ new) & writable;
            bank.edge ^= changed;
            changed & (bank.listed | bank.line)
        })
    }
}

/// The SPI bank of a place in a register array in which thirty-two interrupts take `stride` bytes.
#[inline]
const fn shared_word(place: u32, stride: u32) -> Option<Which> {
    let word = (place / stride) as usize;
    if word >= 1 && word <= SPI_WORDS { Some(Which::Shared(word - 1)) } else { None }
}

/// The interrupt whose priority is the byte at `offset`.
pub(super) fn priority_slot(offset: u32, base: u32) -> Option<u32> {
    offset.checked_sub(base).filter(|&intid| intid < INTIDS)
}
