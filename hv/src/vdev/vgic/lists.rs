//! List registers: choosing what a vCPU sees before it runs, reading back what it did.
//!
//! Sync: a list register that still holds what was written means that nothing happened; any other is
//! folded into the banks. Flush: if the vCPU is dirty, everything is folded, the most urgent interrupts
//! are chosen anew, and the caller learns which registers differ. Active interrupts come first, so that the
//! guest's end of interrupt finds them, but one register is kept for the most urgent pending one.
//! What does not fit is fetched by maintenance interrupts: when nothing listed is pending any more, and at
//! each end of interrupt. A level-sensitive interrupt is never listed as pending and active: the
//! maintenance interrupt at its end makes us look at its line again.

use super::super::{Kicks, low};
use super::bank::{Bank, Ones};
use super::{NOBODY, TIMER_BIT, TIMER_PPI, Vgic, Which};

/// The most list registers that the architecture allows.
pub const MAX_LRS: usize = 16;

/// ICH_LR: the interrupt is pending.
pub(super) const LR_PENDING: u64 = 1 << 62;
/// ICH_LR: the interrupt is active.
pub(super) const LR_ACTIVE: u64 = 1 << 63;
pub(super) const LR_STATE: u64 = LR_PENDING | LR_ACTIVE;
/// ICH_LR: ending it ends a physical interrupt too.
pub(super) const LR_HW: u64 = 1 << 61;
pub(super) const LR_GROUP1: u64 = 1 << 60;
pub(super) const LR_PRIORITY_SHIFT: u32 = 48;
/// ICH_LR, not linked to the hardware: maintenance interrupt at its end.
pub(super) const LR_EOI: u64 = 1 << 41;
const LR_PHYSICAL_SHIFT: u32 = 32;

/// ICH_HCR: maintenance interrupt when an end of interrupt finds no list register.
pub(super) const HCR_LRENPIE: u32 = 1 << 2;
/// ICH_HCR: maintenance interrupt when no list register is pending.
pub(super) const HCR_NPIE: u32 = 1 << 3;
/// ICH_HCR: ICC_DIR_EL1 traps.
pub(super) const HCR_TDIR: u32 = 1 << 14;

const VMCR_VENG: u64 = 3;
const VMCR_VPMR_SHIFT: u32 = 24;

/// A vCPU's list registers, as they are in the hardware while it is loaded.
#[derive(Clone, Debug)]
pub(super) struct Lists {
    /// The last value written or read.
    image: [u64; MAX_LRS],
    /// Those that hold a listed interrupt.
    used: u16,
    /// Those whose pending state came from the latch.
    latched: u16,
    /// Those that hold nothing, but keep asking for maintenance until they are written.
    asking: u16,
    /// What ICH_HCR needs while these are loaded.
    hcr: u32,
}

impl Lists {
    pub(super) const fn new() -> Self {
        Self { image: [0; MAX_LRS], used: 0, latched: 0, asking: 0, hcr: 0 }
    }

    fn find(&self, intid: u32) -> Option<usize> {
        Ones(u32::from(self.used)).find(|&lr| low(self.image[lr]) == intid)
    }

    /// List registers in use, with their interrupts.
    #[cfg(test)]
    pub(super) fn shown(&self) -> impl Iterator<Item = (usize, u32)> {
        Ones(u32::from(self.used)).map(|lr| (lr, low(self.image[lr])))
    }

    /// The state bits of a listed interrupt.
    pub(super) fn state_of(&self, intid: u32) -> u64 {
        self.find(intid).map_or(0, |lr| self.image[lr] & LR_STATE)
    }
}

/// What a flush asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use]
pub struct Flushed {
    /// List registers that do not hold this already. Writing all of them is right too.
    pub changed: u16,
    /// Bits to set in ICH_HCR_EL2, beside EN.
    pub hcr: u32,
    /// Make the physical timer interrupt inactive on this CPU: the guest's end of interrupt will not.
    pub release_timer: bool,
    /// Other vCPUs that got an interrupt which could not stay here.
    pub kicks: Kicks,
}

/// The most urgent few of many interrupts: `priority << 16 | number`, smallest first.
struct Best {
    keys: [u32; MAX_LRS],
    kept: usize,
    room: usize,
    total: usize,
}

impl Best {
    #[inline]
    fn new(room: usize) -> Self {
        Self { keys: [0; MAX_LRS], kept: 0, room: room.min(MAX_LRS), total: 0 }
    }

    #[inline]
    fn offer(&mut self, priority: u8, intid: u32) {
        let key = u32::from(priority) << 16 | intid;
        self.total += 1;
        let mut at = if self.kept < self.room {
            self.kept += 1;
            self.kept - 1
        } else if self.room > 0 && key < self.keys[self.room - 1] {
            self.room - 1
        } else {
            return;
        };
        while at > 0 && self.keys[at - 1] > key {
            self.keys[at] = self.keys[at - 1];
            at -= 1;
        }
        self.keys[at] = key;
    }
}

impl Vgic {
    /// List registers that are not quiet: only these need reading for [`Self::sync`] and clearing after
    /// [`Self::unlist`], by what was said before it.
    #[inline]
    pub fn listed(&self, vcpu: usize) -> u16 {
        self.vcpus.get(vcpu).map_or(0, |local| local.lists.used | local.lists.asking)
    }

    /// True when [`Self::flush`] has something to do.
    #[inline]
    pub fn is_dirty(&self, vcpu: usize) -> bool {
        self.vcpus.get(vcpu).is_some_and(|local| local.dirty || local.release_timer)
    }

    /// Takes in what the hardware did with a vCPU's list registers. Kicks are for others.
    pub fn sync(&mut self, vcpu: usize, lrs: &[u64]) -> Kicks {
        let Some(local) = self.vcpus.get(vcpu) else { return Kicks::NONE };
        let mut kicks = Kicks::NONE;
        for lr in Ones(u32::from(local.lists.used)) {
            if let Some(&now) = lrs.get(lr)
                && self.vcpus.get(vcpu).is_some_and(|local| local.lists.image[lr] != now)
            {
                kicks |= self.fold(vcpu, lr, now);
            }
        }
        kicks
    }

    /// Moves everything that is listed back into the banks: the vCPU has been synced and leaves its CPU,
    /// whose list registers the caller clears.
    pub fn unlist(&mut self, vcpu: usize) -> Kicks {
        let kicks = self.fold_all(vcpu);
        if let Some(local) = self.vcpus.get_mut(vcpu) {
            local.lists.image = [0; MAX_LRS];
            local.lists.asking = 0;
            local.lists.hcr = 0;
            local.dirty = true;
        }
        kicks
    }

    /// Puts the most urgent interrupts of a vCPU into `lrs`, whole, one register each. Sync first.
    pub fn flush(&mut self, vcpu: usize, lrs: &mut [u64]) -> Flushed {
        let mut flushed = Flushed::default();
        let Some(local) = self.vcpus.get_mut(vcpu) else {
            lrs.fill(0);
            return flushed;
        };
        let room = self.lrs.min(lrs.len());
        if local.dirty {
            let before = local.lists.image;
            flushed.kicks = self.fold_all(vcpu);
            self.choose(vcpu, room);
            let Some(local) = self.vcpus.get_mut(vcpu) else { return flushed };
            local.dirty = false;
            local.lists.asking = 0;
            for (lr, (&new, &old)) in local.lists.image.iter().zip(&before).enumerate().take(room) {
                // An empty one may stay as the hardware left it, unless it asks for maintenance.
                let quiet = old & LR_STATE == 0 && !is_asking(old);
                if new != old && !(new == 0 && quiet) {
                    flushed.changed |= 1 << lr;
                }
            }
        }
        let Some(local) = self.vcpus.get_mut(vcpu) else { return flushed };
        for (to, &from) in lrs.iter_mut().zip(&local.lists.image) {
            *to = from;
        }
        flushed.hcr = local.lists.hcr;
        flushed.release_timer = core::mem::take(&mut local.release_timer);
        flushed
    }

    /// True when a vCPU that waits for an interrupt has one: its interface (ICH_VMCR_EL2) has the group on
    /// and the mask lets the priority through. Sync first. Interrupts that the guest handles right now and
    /// that would hold a new one back are not considered: it is woken in vain.
    pub fn has_pending(&self, vcpu: usize, vmcr: u64) -> bool {
        self.any_pending(vcpu, low(vmcr & VMCR_VENG), low(vmcr >> VMCR_VPMR_SHIFT & 0xff))
    }

    /// True when there is an interrupt that would wake a vCPU whose interface is off: WakeRequest.
    pub fn requests_wake(&self, vcpu: usize) -> bool {
        self.any_pending(vcpu, 3, u32::MAX)
    }

    fn any_pending(&self, vcpu: usize, groups: u32, mask: u32) -> bool {
        let Some(local) = self.vcpus.get(vcpu) else { return false };
        let shown = Ones(u32::from(local.lists.used)).any(|lr| {
            let value = local.lists.image[lr];
            let group = if value & LR_GROUP1 == 0 { 1 } else { 2 };
            value & LR_PENDING != 0 && groups & group != 0 && low(value >> LR_PRIORITY_SHIFT & 0xff) < mask
        });
        let ready = |bank: &Bank, bits: u32| {
            let bits = bits & bank.ready(self.groups) & bank.members(groups) & !bank.listed & !bank.active;
            Ones(bits).any(|bit| u32::from(bank.priority[bit]) < mask)
        };
        shown
            || ready(&local.bank, u32::MAX)
            || self.spis.iter().any(|shared| {
                let here = Ones(shared.bank.ready(self.groups))
                    .filter(|&bit| usize::from(shared.route[bit]) == vcpu)
                    .fold(0, |bits, bit| bits | 1 << bit);
                here != 0 && ready(&shared.bank, here)
            })
    }

    /// The guest ended `count` interrupts that no list register held (ICH_HCR_EL2.EOIcount): its most urgent
    /// active ones. Sync first.
    pub fn ended_unlisted(&mut self, vcpu: usize, count: u32) -> Kicks {
        let mut kicks = Kicks::NONE;
        for _ in 0..count.min(super::INTIDS) {
            let mut best = Best::new(1);
            self.offer_active(vcpu, &mut best);
            if best.total == 0 {
                break;
            }
            kicks |= self.deactivate(vcpu, best.keys[0] & 0xffff);
        }
        kicks
    }

    fn offer_active(&self, vcpu: usize, best: &mut Best) {
        let Some(local) = self.vcpus.get(vcpu) else { return };
        for bit in Ones(local.bank.active) {
            best.offer(local.bank.priority[bit], number(0, bit));
        }
        for (word, shared) in self.spis.iter().enumerate() {
            for bit in Ones(shared.bank.active) {
                if usize::from(shared.holder[bit]) == vcpu {
                    best.offer(shared.bank.priority[bit], number(word + 1, bit));
                }
            }
        }
    }

    fn fold_all(&mut self, vcpu: usize) -> Kicks {
        let Some(local) = self.vcpus.get(vcpu) else { return Kicks::NONE };
        let (used, image) = (local.lists.used, local.lists.image);
        Ones(u32::from(used)).fold(Kicks::NONE, |kicks, lr| kicks | self.fold(vcpu, lr, image[lr]))
    }

    /// The physical timer interrupt fired, so the guest has ended the one that was linked to it.
    pub(super) fn unlist_linked(&mut self, vcpu: usize) {
        let linked = self
            .vcpus
            .get(vcpu)
            .and_then(|local| local.lists.find(TIMER_PPI).filter(|&lr| local.lists.image[lr] & LR_HW != 0));
        if let Some(lr) = linked {
            // Not an SPI: nobody else is concerned.
            let _ = self.fold(vcpu, lr, 0);
        }
    }

    /// Moves one list register, which holds `now`, back into its bank.
    pub(super) fn fold(&mut self, vcpu: usize, lr: usize, now: u64) -> Kicks {
        let Some(local) = self.vcpus.get_mut(vcpu) else { return Kicks::NONE };
        let was = core::mem::replace(&mut local.lists.image[lr], now);
        let from_latch = local.lists.latched & 1 << lr != 0;
        local.lists.used &= !(1 << lr);
        local.lists.latched &= !(1 << lr);
        if is_asking(now) {
            local.lists.asking |= 1 << lr;
        }
        local.dirty = true;
        let intid = low(was);
        let bit = 1u32 << (intid % 32);
        let Some(which) = self.which(vcpu, intid) else { return Kicks::NONE };
        let Some(bank) = self.bank_mut(which) else { return Kicks::NONE };
        bank.listed &= !bit;
        let mut active = now & LR_ACTIVE != 0;
        if now & LR_PENDING != 0 && from_latch && bank.queued_unpend & bit == 0 {
            bank.latch |= bit;
        }
        active = active && bank.queued_inactive & bit == 0 || bank.queued_active & bit != 0;
        if active {
            bank.active |= bit;
        }
        bank.queued_unpend &= !bit;
        bank.queued_active &= !bit;
        bank.queued_inactive &= !bit;
        match which {
            Which::Local(_) if was & LR_HW != 0 && now & LR_STATE == 0 => {
                if let Some(local) = self.vcpus.get_mut(vcpu) {
                    // The guest's end of interrupt was the physical one's. If it is still high, it fires.
                    local.bank.line &= !TIMER_BIT;
                    local.timer_linked = false;
                }
                Kicks::NONE
            }
            Which::Local(_) => Kicks::NONE,
            Which::Shared(word) => self.pass_on(vcpu, word, bit),
        }
    }

    /// An SPI that left a list register may have to go to another vCPU now.
    fn pass_on(&mut self, vcpu: usize, word: usize, bit: u32) -> Kicks {
        let groups = self.groups;
        let Some(shared) = self.spis.get_mut(word) else { return Kicks::NONE };
        let index = bit.trailing_zeros() as usize;
        if shared.bank.active & bit == 0 {
            shared.holder[index] = NOBODY;
        }
        let elsewhere = usize::from(shared.route[index]) != vcpu;
        if elsewhere && shared.bank.ready(groups) & !shared.bank.active & bit != 0 {
            self.kick(Which::Shared(word), bit)
        } else {
            Kicks::NONE
        }
    }

    /// Fills the list registers of a vCPU, of which none is used.
    fn choose(&mut self, vcpu: usize, room: usize) {
        let mut pending = Best::new(room);
        let mut active = Best::new(room);
        let groups = self.groups;
        if let Some(local) = self.vcpus.get(vcpu) {
            for bit in Ones(local.bank.ready(groups) & !local.bank.active) {
                pending.offer(local.bank.priority[bit], number(0, bit));
            }
        }
        for (word, shared) in self.spis.iter().enumerate() {
            // Another vCPU may have it in a list register, or active, although it is routed here now.
            for bit in Ones(shared.bank.ready(groups) & !shared.bank.active & !shared.bank.listed) {
                if usize::from(shared.route[bit]) == vcpu {
                    pending.offer(shared.bank.priority[bit], number(word + 1, bit));
                }
            }
        }
        self.offer_active(vcpu, &mut active);
        let kept = if pending.total > 0 { active.kept.min(room.saturating_sub(1)) } else { active.kept };
        let shown = pending.kept.min(room.saturating_sub(kept));
        let mut hcr = 0;
        let crowded = pending.total > shown;
        if crowded {
            hcr |= HCR_NPIE;
        }
        if active.total > kept {
            hcr |= HCR_LRENPIE | HCR_TDIR;
        }
        let Some(local) = self.vcpus.get_mut(vcpu) else { return };
        local.lists.hcr = hcr;
        local.lists.image = [0; MAX_LRS];
        let chosen = active.keys[..kept].iter().chain(&pending.keys[..shown]);
        for (lr, &key) in chosen.enumerate() {
            self.list(vcpu, lr, key & 0xffff, crowded);
        }
    }

    /// Puts one interrupt into a list register.
    fn list(&mut self, vcpu: usize, lr: usize, intid: u32, crowded: bool) {
        let groups = self.groups;
        let linked = intid == TIMER_PPI && self.timer_is_live(vcpu);
        let Some(which) = self.which(vcpu, intid) else { return };
        let Some(bank) = self.bank_mut(which) else { return };
        let (index, bit) = ((intid % 32) as usize, 1u32 << (intid % 32));
        let edge = bank.edge & bit != 0;
        let is_active = bank.active & bit != 0;
        let may_pend = !is_active || edge && !linked;
        let shows_pending = may_pend && bank.ready(groups) & bit != 0;
        let mut value = u64::from(intid) | u64::from(bank.priority[index]) << LR_PRIORITY_SHIFT;
        if bank.group & bit != 0 {
            value |= LR_GROUP1;
        }
        if is_active {
            value |= LR_ACTIVE;
        }
        if linked {
            value |= LR_HW | u64::from(TIMER_PPI) << LR_PHYSICAL_SHIFT;
        } else if crowded || !edge && bank.pending() & bit != 0 {
            value |= LR_EOI;
        }
        let mut latched = 0;
        if shows_pending {
            value |= LR_PENDING;
            if bank.latch & bit != 0 {
                bank.latch &= !bit;
                latched = 1 << lr;
            }
        }
        bank.listed |= bit;
        bank.active &= !bit;
        if let Which::Shared(word) = which
            && let Some(shared) = self.spis.get_mut(word)
        {
            shared.holder[index] = u8::try_from(vcpu).unwrap_or(NOBODY);
        }
        if let Some(local) = self.vcpus.get_mut(vcpu) {
            local.lists.image[lr] = value;
            local.lists.used |= 1 << lr;
            local.lists.latched |= latched;
        }
    }
}

/// True when an empty list register asks for maintenance.
#[inline]
const fn is_asking(value: u64) -> bool {
    value & (LR_STATE | LR_HW | LR_EOI) == LR_EOI
}

/// The number of an interrupt in a word.
#[inline]
fn number(word: usize, bit: usize) -> u32 {
    u32::try_from(word * super::BITS + bit).unwrap_or(0)
}
