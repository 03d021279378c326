//! List registers: choosing what a vCPU sees before it runs, reading back what it did.
//!
//! Sync: a list register that still holds what was written means that nothing happened; any other is
//! folded into the banks. Flush: if the vCPU is dirty, everything is folded, the most urgent interrupts
//! are chosen anew, and the registers that differ are written. Active interrupts come first, so that the
//! guest's end of interrupt finds them, but one register is kept for the most urgent pending one.
//! What does not fit is fetched by maintenance interrupts: when nothing listed is pending any more, and at
//! each end of interrupt. A level-sensitive interrupt is never listed as pending and active: the
//! maintenance interrupt at its end makes us look at its line again.

use super::super::{Kicks, low};
use super::bank::{Bank, Ones};
use super::{BITS, NOBODY, Shared, TIMER_BIT, TIMER_PPI, Vgic, Which};
use serde::{Deserialize, Serialize};

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
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Lists {
    /// The last value written or read.
    image: [u64; MAX_LRS],
    /// Those that hold a listed interrupt.
    used: u32,
    /// Those whose pending state came from the latch.
    latched: u32,
    /// Those that hold no listed interrupt, but must not stay as they are: they would show one, or ask for
    /// maintenance for ever.
    stale: u32,
    /// What ICH_HCR needs while these are loaded.
    hcr: u32,
}

impl Lists {
    pub(super) const fn new() -> Self {
        Self { image: [0; MAX_LRS], used: 0, latched: 0, stale: 0, hcr: 0 }
    }

    fn find(&self, intid: u32) -> Option<usize> {
        Ones(self.used).find(|&lr| low(self.image[lr]) == intid)
    }

    /// List registers in use, with their interrupts.
    #[cfg(test)]
    pub(super) fn shown(&self) -> impl Iterator<Item = (usize, u32)> {
        Ones(self.used).map(|lr| (lr, low(self.image[lr])))
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
    /// Bits to set in ICH_HCR_EL2, beside EN.
    pub hcr: u32,
    /// Make the physical timer interrupt inactive on this CPU: the guest's end of interrupt will not.
    pub release_timer: bool,
    /// Other vCPUs that got an interrupt which could not stay here.
    pub kicks: Kicks,
}

/// A key of [`Best`]: pending rather than active, so after all that are active.
const KEY_PENDING: u32 = 1 << 31;

/// The few interrupts to show: active ones first, each kind in order of urgency. A key is the kind, the
/// priority and the number.
///
/// Fields stay in this order: zeroed together, the keys and their neighbours would be a call of `memset`,
/// which costs more than all the rest of choosing one interrupt.
#[repr(C)]
struct Best {
    kept: usize,
    /// All that were offered.
    active: usize,
    pending: usize,
    /// The key of the most urgent pending one.
    first_pending: u32,
    room: usize,
    keys: [u32; MAX_LRS],
}

impl Best {
    #[inline]
    fn new(room: usize) -> Self {
        let room = room.min(MAX_LRS);
        Self { kept: 0, active: 0, pending: 0, room, first_pending: u32::MAX, keys: [0; MAX_LRS] }
    }

    /// Offers active interrupts of a bank, the first of which is number `first`.
    #[inline]
    fn offer_active(&mut self, bank: &Bank, bits: u32, first: u32) {
        for bit in Ones(bits) {
            self.active += 1;
            self.insert(u32::from(bank.priority[bit]) << 16 | number(first, bit));
        }
    }

    /// Offers pending interrupts of a bank.
    #[inline]
    fn offer_pending(&mut self, bank: &Bank, bits: u32, first: u32) {
        for bit in Ones(bits) {
            self.pending += 1;
            let key = KEY_PENDING | u32::from(bank.priority[bit]) << 16 | number(first, bit);
            self.first_pending = self.first_pending.min(key);
            self.insert(key);
        }
    }

    #[inline]
    fn insert(&mut self, key: u32) {
        let mut at = self.kept;
        if at < self.room {
            self.kept += 1;
        } else {
            at = at.saturating_sub(1);
            if self.keys[at] <= key {
                return;
            }
        }
        while at > 0 && self.keys[at - 1] > key {
            self.keys[at] = self.keys[at - 1];
            at -= 1;
        }
        self.keys[at] = key;
    }

    /// Gives the last place to the most urgent pending one, if active ones took them all. Whether pending
    /// ones, and active ones, were left out.
    #[inline]
    fn settle(&mut self) -> (bool, bool) {
        if self.active + self.pending <= self.room {
            return (false, false);
        }
        let mut shown = self.active.min(self.room);
        if self.pending > 0 && shown == self.room {
            shown -= 1;
            self.keys[shown] = self.first_pending;
        }
        (self.pending > self.room - shown, self.active > shown)
    }
}

impl Shared {
    /// Those of some interrupts that are routed to a vCPU.
    #[inline]
    fn routed(&self, bits: u32, vcpu: usize) -> u32 {
        Ones(bits).filter(|&bit| usize::from(self.route[bit]) == vcpu).fold(0, |bits, bit| bits | 1 << bit)
    }

    /// Interrupts that are active on a vCPU.
    #[inline]
    fn held_active(&self, vcpu: usize) -> u32 {
        let mine = |&bit: &usize| usize::from(self.holder[bit]) == vcpu;
        Ones(self.bank.active).filter(mine).fold(0, |bits, bit| bits | 1 << bit)
    }
}

impl Vgic {
    /// List registers that are not quiet: those that [`Self::sync`] would read, and those to clear after
    /// [`Self::unlist`], by what was said before it.
    #[inline]
    pub fn listed(&self, vcpu: usize) -> u32 {
        self.vcpus.get(vcpu).map_or(0, |local| local.lists.used | local.lists.stale)
    }

    /// True when [`Self::flush`] has something to do.
    #[inline]
    pub fn is_dirty(&self, vcpu: usize) -> bool {
        self.vcpus.get(vcpu).is_some_and(|local| local.dirty || local.release_timer)
    }

    /// Takes in what the hardware did with a vCPU's list registers, which `read` reads. Kicks are for others.
    #[inline]
    pub fn sync(&mut self, vcpu: usize, mut read: impl FnMut(usize) -> u64) -> Kicks {
        let Some(local) = self.vcpus.get(vcpu) else { return Kicks::NONE };
        let mut kicks = Kicks::NONE;
        for lr in Ones(local.lists.used) {
            let now = read(lr);
            if self.vcpus.get(vcpu).is_some_and(|local| local.lists.image[lr] != now) {
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
            local.lists.stale = 0;
            local.lists.hcr = 0;
            local.dirty = true;
        }
        kicks
    }

    /// Chooses the most urgent interrupts of a vCPU; `write` writes the list registers that differ. Sync
    /// first.
    #[inline]
    pub fn flush(&mut self, vcpu: usize, write: impl FnMut(usize, u64)) -> Flushed {
        let mut kicks = Kicks::NONE;
        if self.vcpus.get(vcpu).is_some_and(|local| local.dirty) {
            kicks = self.fold_all(vcpu);
            self.choose(vcpu, write);
        }
        let Some(local) = self.vcpus.get_mut(vcpu) else { return Flushed::default() };
        Flushed { hcr: local.lists.hcr, release_timer: core::mem::take(&mut local.release_timer), kicks }
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
        let shown = Ones(local.lists.used).any(|lr| {
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
            || self
                .spis
                .iter()
                .filter(|shared| shared.bank.line | shared.bank.latch != 0)
                .any(|shared| ready(&shared.bank, shared.routed(shared.bank.ready(self.groups), vcpu)))
    }

    /// The guest ended `count` interrupts that no list register held (ICH_HCR_EL2.EOIcount): its most urgent
    /// active ones. Sync first.
    pub fn ended_unlisted(&mut self, vcpu: usize, count: u32) -> Kicks {
        let mut kicks = Kicks::NONE;
        for _ in 0..count.min(super::INTIDS) {
            let mut best = Best::new(1);
            self.offer_active(vcpu, &mut best);
            if best.active == 0 {
                break;
            }
            kicks |= self.deactivate(vcpu, best.keys[0] & 0xffff);
        }
        kicks
    }

    fn offer_active(&self, vcpu: usize, best: &mut Best) {
        let Some(local) = self.vcpus.get(vcpu) else { return };
        best.offer_active(&local.bank, local.bank.active, 0);
        for shared in &self.spis {
            best.offer_active(&shared.bank, shared.held_active(vcpu), shared.first);
        }
    }

    fn fold_all(&mut self, vcpu: usize) -> Kicks {
        let mut kicks = Kicks::NONE;
        let Some(local) = self.vcpus.get(vcpu) else { return kicks };
        for lr in Ones(local.lists.used) {
            let now = self.vcpus.get(vcpu).map_or(0, |local| local.lists.image[lr]);
            kicks |= self.fold(vcpu, lr, now);
        }
        kicks
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
        let lists = &mut local.lists;
        let was = core::mem::replace(&mut lists.image[lr], now);
        let from_latch = lists.latched & 1 << lr != 0;
        lists.used &= !(1 << lr);
        lists.latched &= !(1 << lr);
        if now & LR_STATE != 0 || is_asking(now) {
            lists.stale |= 1 << lr;
        }
        local.dirty = true;
        let (intid, bit) = (low(was), 1u32 << (was % 32));
        if intid < 32 {
            local.bank.give_back(bit, now, from_latch);
            if was & LR_HW != 0 && now & LR_STATE == 0 {
                // The guest's end of interrupt was the physical one's. If it is still high, it fires.
                local.bank.line &= !TIMER_BIT;
                local.timer_linked = false;
            }
            return Kicks::NONE;
        }
        let word = intid as usize / BITS - 1;
        if let Some(shared) = self.spis.get_mut(word) {
            shared.bank.give_back(bit, now, from_latch);
        }
        self.pass_on(vcpu, word, bit)
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
    #[inline]
    fn choose(&mut self, vcpu: usize, mut write: impl FnMut(usize, u64)) {
        let groups = self.groups;
        // What another vCPU took may be deactivated here, which this CPU's list registers cannot do.
        let always = if self.vcpus.len() > 1 { HCR_TDIR } else { 0 };
        let mut best = Best::new(self.lrs);
        let Some(local) = self.vcpus.get_mut(vcpu) else { return };
        local.dirty = false;
        let stale = core::mem::take(&mut local.lists.stale);
        best.offer_active(&local.bank, local.bank.active, 0);
        best.offer_pending(&local.bank, local.bank.ready(groups) & !local.bank.active, 0);
        for shared in &self.spis {
            let (bank, first) = (&shared.bank, shared.first);
            if bank.active | bank.line | bank.latch == 0 {
                continue;
            }
            best.offer_active(bank, shared.held_active(vcpu), first);
            // Another vCPU may have it in a list register, or active, although it is routed here now.
            let ready = bank.ready(groups) & !bank.active & !bank.listed;
            best.offer_pending(bank, shared.routed(ready, vcpu), first);
        }
        let (crowded, hidden) = best.settle();
        local.lists.hcr =
            always | if crowded { HCR_NPIE } else { 0 } | if hidden { HCR_LRENPIE | HCR_TDIR } else { 0 };
        let mut used = 0;
        for (lr, &key) in best.keys.iter().enumerate().take(best.kept) {
            let (old, new) = self.list(vcpu, lr, key & 0xffff, crowded);
            used |= 1 << lr;
            if old != new {
                write(lr, new);
            }
        }
        if stale & !used == 0 {
            return;
        }
        let Some(local) = self.vcpus.get_mut(vcpu) else { return };
        for lr in Ones(stale & !used) {
            local.lists.image[lr] = 0;
            write(lr, 0);
        }
    }

    /// Puts one interrupt into a list register; what that held and what it holds now.
    fn list(&mut self, vcpu: usize, lr: usize, intid: u32, crowded: bool) -> (u64, u64) {
        let groups = self.groups;
        let Some(local) = self.vcpus.get_mut(vcpu) else { return (0, 0) };
        let linked = intid == TIMER_PPI && local.timer_linked;
        let bank = match (intid as usize / BITS).checked_sub(1) {
            None => &mut local.bank,
            Some(word) => {
                let Some(shared) = self.spis.get_mut(word) else { return (0, 0) };
                shared.holder[intid as usize % BITS] = u8::try_from(vcpu).unwrap_or(NOBODY);
                &mut shared.bank
            }
        };
        let (index, bit) = ((intid % 32) as usize, 1u32 << (intid % 32));
        let edge = bank.edge & bit != 0;
        let mut value = u64::from(intid) | u64::from(bank.priority[index]) << LR_PRIORITY_SHIFT;
        if bank.group & bit != 0 {
            value |= LR_GROUP1;
        }
        if linked {
            value |= LR_HW | u64::from(TIMER_PPI) << LR_PHYSICAL_SHIFT;
        } else if crowded || !edge && bank.pending() & bit != 0 {
            value |= LR_EOI;
        }
        let mut may_pend = true;
        if bank.active & bit != 0 {
            value |= LR_ACTIVE;
            bank.active &= !bit;
            may_pend = edge && !linked;
        }
        if may_pend && bank.ready(groups) & bit != 0 {
            value |= LR_PENDING;
            if bank.latch & bit != 0 {
                bank.latch &= !bit;
                local.lists.latched |= 1 << lr;
            }
        }
        bank.listed |= bit;
        local.lists.used |= 1 << lr;
        (core::mem::replace(&mut local.lists.image[lr], value), value)
    }
}

/// True when an empty list register asks for maintenance.
#[inline]
const fn is_asking(value: u64) -> bool {
    value & (LR_STATE | LR_HW | LR_EOI) == LR_EOI
}

/// The number of an interrupt in a word.
#[inline]
fn number(first: u32, bit: usize) -> u32 {
    first + u32::try_from(bit).unwrap_or(0)
}
