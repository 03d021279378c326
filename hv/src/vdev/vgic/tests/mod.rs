//! The interrupt controller as a guest and the hardware see it.
//!
//! [`cpu`] plays the hardware's virtual CPU interface; [`registers`] asks the frames, [`delivery`] follows
//! single interrupts, [`model`] runs random guests against the architecture's own state machine.

mod cpu;
mod delivery;
mod model;
mod registers;

use super::{INTIDS, NOBODY, Vgic};

/// Pseudo-random numbers that repeat.
pub(super) struct Dice(pub(super) u64);

impl Dice {
    pub(super) fn roll(&mut self) -> u64 {
        // xorshift64*
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(super) fn below(&mut self, bound: usize) -> usize {
        usize::try_from((self.roll() >> 16) % bound as u64).unwrap()
    }

    pub(super) fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }
}

/// Two or more vCPUs with every interrupt enabled in group 1 at priority 0xa0.
pub(super) fn ready(vcpus: usize, lrs: usize) -> Vgic {
    let mut vgic = Vgic::new(vcpus, lrs);
    let _ = vgic.dist_write(0, 4, 3);
    for word in 1..INTIDS / 32 {
        let _ = vgic.dist_write(u64::from(0x80 + 4 * word), 4, 0xffff_ffff);
        let _ = vgic.dist_write(u64::from(0x100 + 4 * word), 4, 0xffff_ffff);
    }
    for intid in 32..INTIDS {
        let _ = vgic.dist_write(u64::from(0x400 + intid), 1, 0xa0);
    }
    for vcpu in 0..vcpus {
        let _ = vgic.redist_write(vcpu, 0x1_0080, 4, 0xffff_ffff);
        let _ = vgic.redist_write(vcpu, 0x1_0100, 4, 0xffff_ffff);
        for intid in 0..32 {
            let _ = vgic.redist_write(vcpu, 0x1_0400 + intid, 1, 0xa0);
        }
        let _ = vgic.flush(vcpu, |_, _| ());
    }
    vgic
}

/// Walks everything and says what is wrong.
pub(super) fn audit(vgic: &Vgic) {
    let mut held = [[0u32; 64]; 4];
    for (vcpu, local) in vgic.vcpus.iter().enumerate() {
        let mut seen = [0u32; 4];
        for (lr, intid) in local.lists.shown() {
            let (word, bit) = ((intid / 32) as usize, 1 << (intid % 32));
            assert_eq!(seen[word] & bit, 0, "{intid} is in two list registers of vCPU {vcpu}, one is {lr}");
            seen[word] |= bit;
            held[word][vcpu] |= bit;
        }
        assert_eq!(seen[0], local.bank.listed, "private interrupts of vCPU {vcpu}");
    }
    for (word, shared) in vgic.spis.iter().enumerate() {
        let all = held[word + 1].iter().fold(0, |all, &bits| {
            assert_eq!(all & bits, 0, "an SPI of word {word} is in list registers of two vCPUs");
            all | bits
        });
        assert_eq!(all, shared.bank.listed, "word {word}");
        for bit in super::Ones(shared.bank.listed) {
            assert_ne!(held[word + 1][usize::from(shared.holder[bit])] & 1 << bit, 0);
        }
        for bit in super::Ones(shared.bank.active) {
            assert!(shared.holder[bit] == NOBODY || usize::from(shared.holder[bit]) < vgic.vcpus());
        }
    }
    let banks = vgic.vcpus.iter().map(|local| &local.bank).chain(vgic.spis.iter().map(|shared| &shared.bank));
    for bank in banks {
        let queued = bank.queued_active | bank.queued_inactive | bank.queued_unpend;
        assert_eq!(queued & !bank.listed, 0, "B1");
        assert_eq!(bank.active & bank.listed, 0, "B2");
    }
}
