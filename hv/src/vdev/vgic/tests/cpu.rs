//! The hardware's virtual CPU interface over four list registers, from the architecture's description.

use super::super::lists::{HCR_LRENPIE, HCR_NPIE, LR_ACTIVE, LR_EOI, LR_GROUP1, LR_HW, LR_PENDING, LR_STATE};
use super::super::{TIMER_PPI, Vgic};
use crate::vdev::Kicks;

/// One CPU, with one vCPU on it.
#[derive(Clone, Debug)]
pub(super) struct Cpu {
    pub(super) lrs: Vec<u64>,
    /// Written list registers, for tests that count.
    pub(super) writes: usize,
    /// Times that the physical timer interrupt had to be made inactive by hand.
    pub(super) releases: usize,
    hcr: u32,
    /// Interrupts ended that no list register held; the hardware only counts them.
    unlisted: Vec<u32>,
    /// The hypervisor is told which they were, as when deactivation traps.
    pub(super) exact: bool,
    /// Priorities of what runs, the most urgent last, with the number.
    pub(super) running: Vec<(u8, u32)>,
    /// Interrupts with their priority dropped, but not deactivated.
    pub(super) dropped: Vec<u32>,
    /// ICC_CTLR.EOImode.
    pub(super) split: bool,
    /// The virtual timer's output, and whether its physical interrupt is active.
    pub(super) timer: bool,
    pub(super) timer_active: bool,
}

use alloc::vec::Vec;

fn number(lr: u64) -> u32 {
    u32::try_from(lr & 0xffff_ffff).unwrap()
}

fn priority(lr: u64) -> u8 {
    u8::try_from(lr >> 48 & 0xff).unwrap()
}

impl Cpu {
    pub(super) fn new(lrs: usize) -> Self {
        Self {
            lrs: alloc::vec![0; lrs],
            writes: 0,
            releases: 0,
            hcr: 0,
            unlisted: Vec::new(),
            exact: false,
            running: Vec::new(),
            dropped: Vec::new(),
            split: false,
            timer: false,
            timer_active: false,
        }
    }

    /// The most urgent pending interrupt of those groups (bit 0: group 0).
    pub(super) fn highest(&self, groups: u32) -> Option<u32> {
        let shown = self.lrs.iter().filter(|&&lr| {
            lr & LR_STATE == LR_PENDING && groups & (if lr & LR_GROUP1 != 0 { 2 } else { 1 }) != 0
        });
        let best = shown.map(|&lr| (priority(lr), number(lr))).min()?;
        let limit = self.running.last().map_or(0x100, |&(priority, _)| u32::from(priority));
        (u32::from(best.0) < limit).then_some(best.1)
    }

    /// The guest acknowledges.
    pub(super) fn acknowledge(&mut self) -> Option<u32> {
        let intid = self.highest(3)?;
        let lr =
            self.lrs.iter_mut().find(|lr| number(**lr) == intid && **lr & LR_STATE == LR_PENDING).unwrap();
        *lr = *lr & !LR_STATE | LR_ACTIVE;
        self.running.push((priority(*lr), intid));
        Some(intid)
    }

    /// The guest writes the end-of-interrupt register with what it acknowledged last.
    pub(super) fn end(&mut self) -> Option<u32> {
        let (_, intid) = self.running.pop()?;
        if self.split {
            self.dropped.push(intid);
        } else {
            self.deactivate(intid);
        }
        Some(intid)
    }

    /// The guest writes the deactivation register.
    pub(super) fn deactivate(&mut self, intid: u32) {
        match self.lrs.iter_mut().find(|lr| number(**lr) == intid && **lr & LR_ACTIVE != 0) {
            Some(lr) => {
                *lr &= !LR_ACTIVE;
                if *lr & LR_HW != 0 {
                    assert_eq!(*lr >> 32 & 0x1fff, u64::from(TIMER_PPI));
                    self.timer_active = false;
                }
            }
            None => self.unlisted.push(intid),
        }
    }

    /// Whether ICC_DIR_EL1 traps.
    pub(super) fn traps_deactivation(&self) -> bool {
        self.hcr & 1 << 14 != 0
    }

    /// The maintenance interrupt.
    pub(super) fn maintenance(&self) -> bool {
        let ended = |lr: &u64| lr & LR_STATE == 0 && lr & LR_HW == 0 && lr & LR_EOI != 0;
        self.lrs.iter().any(ended)
            || self.hcr & HCR_NPIE != 0 && self.lrs.iter().all(|lr| lr & LR_PENDING == 0)
            || self.hcr & HCR_LRENPIE != 0 && !self.unlisted.is_empty()
    }

    /// Takes in what the guest did since the last turn.
    fn collect(&mut self, vgic: &mut Vgic, vcpu: usize) -> Kicks {
        let mut kicks = vgic.sync(vcpu, |lr| self.lrs[lr]);
        let unlisted = core::mem::take(&mut self.unlisted);
        if self.exact {
            for &intid in &unlisted {
                kicks |= vgic.deactivate(vcpu, intid);
            }
        } else if self.hcr & HCR_LRENPIE != 0 {
            kicks |= vgic.ended_unlisted(vcpu, u32::try_from(unlisted.len()).unwrap());
        }
        kicks
    }

    /// The vCPU leaves for another CPU: nothing of it stays in the list registers.
    pub(super) fn leave(&mut self, vgic: &mut Vgic, vcpu: usize) -> Kicks {
        let listed = vgic.listed(vcpu);
        let kicks = self.collect(vgic, vcpu) | vgic.unlist(vcpu);
        for (n, lr) in self.lrs.iter_mut().enumerate() {
            if listed & 1 << n != 0 {
                *lr = 0;
            }
        }
        self.hcr = 0;
        self.timer_active = vgic.timer_is_live(vcpu);
        assert!(!self.maintenance(), "the next vCPU would be asked for maintenance for ever");
        kicks
    }

    /// What the hypervisor does before an entry: read back, write what changed.
    pub(super) fn turn(&mut self, vgic: &mut Vgic, vcpu: usize) -> Kicks {
        if self.timer && !self.timer_active {
            self.timer_active = true;
            let _ = vgic.timer_fired(vcpu);
        }
        let kicks = self.collect(vgic, vcpu);
        if vgic.timer_waits(vcpu) && !self.timer {
            vgic.timer_dropped(vcpu);
        }
        let before = self.lrs.clone();
        let flushed = vgic.flush(vcpu, |lr, value| {
            assert_ne!(before[lr], value, "list register {lr} holds that already");
            self.lrs[lr] = value;
            self.writes += 1;
        });
        let shown = vgic.vcpus[vcpu].lists.shown().collect::<Vec<_>>();
        for (n, &lr) in self.lrs.iter().enumerate() {
            assert_eq!(lr & LR_STATE != 0, shown.contains(&(n, number(lr))), "list register {n}");
        }
        if flushed.release_timer {
            self.timer_active = false;
        }
        assert_eq!(
            self.timer_active,
            vgic.timer_is_live(vcpu),
            "the physical timer interrupt's active state"
        );
        self.hcr = flushed.hcr;
        assert!(!self.maintenance(), "maintenance is wanted again without the guest having run");
        kicks | flushed.kicks
    }
}
