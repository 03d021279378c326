//! The guest's GICv3: one security state, affinity routing only, no LPIs.
//!
//! State lives in banks of thirty-two interrupts (`bank`): one for each vCPU (SGIs and PPIs) and a few
//! shared ones (SPIs). Register frames are in `dist` and `redist`; `lists` moves interrupts into list
//! registers before a vCPU runs and reads them back afterwards. Every call that can make an interrupt
//! deliverable says which vCPUs must look; a kicked vCPU is also marked dirty, so that [`Vgic::flush`] has
//! nothing to do for all others. With several vCPUs ICC_DIR_EL1 always traps, because a vCPU may
//! deactivate an SPI that another one took; only a guest with EOImode 1 writes it. What is not provided: LPIs,
//! message-based SPIs, extended ranges and 1-of-N routing (GICD_TYPER says so). Used by `guest`.

mod bank;
mod dist;
mod lists;
mod redist;
#[cfg(test)]
mod tests;

use alloc::vec::Vec;
use serde::{Deserialize, Serialize};

use super::Kicks;
use crate::bounded;
use bank::{BITS, Bank, Ones};
pub use lists::{Flushed, MAX_LRS};
use lists::{LR_ACTIVE, LR_PENDING, Lists};

/// The most vCPUs of one guest: the width of a kick mask.
pub const MAX_VCPUS: usize = 64;
/// The first interrupt number that does not exist: SPIs are 32 to 127.
pub const INTIDS: u32 = 128;
/// Words of shared interrupts.
const SPI_WORDS: usize = INTIDS as usize / BITS - 1;
/// The virtual timer's interrupt, which a list register links to the physical one of the same number.
pub const TIMER_PPI: u32 = 27;
const TIMER_BIT: u32 = 1 << TIMER_PPI;

/// vCPUs of one value of affinity 1: what an SGI's target list can name.
const CLUSTER: usize = 16;
/// Priority bits that are kept; the others read as zero.
const PRIORITY_MASK: u8 = 0xf8;
/// SGIs, always edge-triggered.
const SGIS: u32 = 0xffff;
/// No vCPU.
const NOBODY: u8 = u8::MAX;
const ENABLE_GROUPS: u32 = 3;
/// Implemented by Arm, product 'V'.
const IIDR: u32 = 0x5600_043b;

/// The affinity of vCPU `index`, as in MPIDR_EL1: sixteen to a cluster, as SGI target lists like it.
pub const fn affinity(index: usize) -> u64 {
    (index % CLUSTER) as u64 | ((index / CLUSTER) as u64) << 8
}

/// The vCPU of an affinity, in the layout of MPIDR_EL1; there may be no such vCPU.
fn index_of(affinity: u64) -> Option<usize> {
    let (aff0, aff1) = (affinity & 0xff, affinity >> 8);
    if aff0 >= CLUSTER as u64 || aff1 > 0xff {
        return None;
    }
    usize::try_from(aff1 * CLUSTER as u64 + aff0).ok()
}

/// Which register an SGI was written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SgiRegister {
    /// ICC_SGI0R_EL1: interrupts of group 0.
    Sgi0R,
    /// ICC_SGI1R_EL1: interrupts of either group, as one security state allows.
    Sgi1R,
    /// ICC_ASGI1R_EL1: with one security state, only what is in group 0.
    Asgi1R,
}

/// Which bank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Which {
    /// SGIs and PPIs of a vCPU.
    Local(usize),
    /// A word of SPIs.
    Shared(usize),
}

/// A word of SPIs.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Shared {
    /// The number of its first interrupt.
    first: u32,
    bank: Bank,
    /// GICD_IROUTER, affinity only.
    router: [u64; BITS],
    /// The vCPU that this names, or [`NOBODY`].
    route: [u8; BITS],
    /// The vCPU that has a listed or active interrupt; meaningless for others.
    holder: [u8; BITS],
}

/// A vCPU's part.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Local {
    bank: Bank,
    lists: Lists,
    /// GICR_WAKER.ProcessorSleep.
    asleep: bool,
    /// The physical timer interrupt is active because of this vCPU.
    timer_linked: bool,
    /// The caller must make the physical timer interrupt inactive.
    release_timer: bool,
    /// Something changed since the list registers were written.
    dirty: bool,
}

/// An interrupt controller. A clone of it is a clone of the guest's interrupts, once every vCPU's list
/// registers are [`unlist`](Self::unlist)ed.
#[derive(Debug, Serialize, Deserialize)]
pub struct Vgic {
    /// GICD_CTLR's group enables.
    groups: u32,
    spis: [Shared; SPI_WORDS],
    #[serde(deserialize_with = "bounded::list::<_, _, MAX_VCPUS>")]
    vcpus: Vec<Local>,
    lrs: usize,
    /// vCPUs whose list registers a register read depended on.
    stale: u64,
}

impl Clone for Vgic {
    /// By hand, as `guest`'s devices are: the vCPUs' part first, and the rest is copied once.
    fn clone(&self) -> Self {
        let vcpus = self.vcpus.clone();
        Self { vcpus, ..*self }
    }
}

impl Vgic {
    /// As after reset, for `vcpus` vCPUs (at most [`MAX_VCPUS`]) on CPUs with `lrs` list registers.
    pub fn new(vcpus: usize, lrs: usize) -> Self {
        let vcpus = vcpus.clamp(1, MAX_VCPUS);
        let local = Local {
            bank: Bank::new(SGIS),
            lists: Lists::new(),
            asleep: true,
            timer_linked: false,
            release_timer: false,
            dirty: true,
        };
        let shared = |first| Shared {
            first,
            bank: Bank::new(0),
            router: [0; BITS],
            route: [0; BITS],
            holder: [NOBODY; BITS],
        };
        Self {
            groups: 0,
            spis: [32, 64, 96].map(shared),
            vcpus: alloc::vec![local; vcpus],
            lrs: lrs.clamp(1, MAX_LRS),
            stale: 0,
        }
    }

    /// Bytes that it has beside itself.
    pub fn heap_bytes(&self) -> usize {
        self.vcpus.capacity() * size_of::<Local>()
    }

    /// vCPUs that it serves.
    pub fn vcpus(&self) -> usize {
        self.vcpus.len()
    }

    /// Puts one that was stored on CPUs with `lrs` list registers; false if it is none that serves `vcpus` vCPUs and
    /// was [`unlist`](Self::unlist)ed.
    pub fn adopt(&mut self, vcpus: usize, lrs: usize) -> bool {
        self.lrs = lrs.clamp(1, MAX_LRS);
        for local in &mut self.vcpus {
            (local.lists, local.dirty) = (Lists::new(), true);
        }
        let firsts = self.spis.iter().map(|shared| shared.first).eq([32, 64, 96]);
        let banks =
            self.spis.iter().map(|shared| &shared.bank).chain(self.vcpus.iter().map(|local| &local.bank));
        self.vcpus.len() == vcpus && firsts && banks.map(|bank| bank.listed).all(|listed| listed == 0)
    }

    /// Moves the input of a shared interrupt, by its number (32 and up).
    pub fn set_spi(&mut self, intid: u32, high: bool) -> Kicks {
        if !(32..INTIDS).contains(&intid) {
            return Kicks::NONE;
        }
        self.set_line(Which::Shared(intid as usize / BITS - 1), 1 << (intid % 32), high)
    }

    /// Moves the input of a private peripheral interrupt (16 to 31) of a vCPU.
    pub fn set_ppi(&mut self, vcpu: usize, intid: u32, high: bool) -> Kicks {
        if !(16..32).contains(&intid) || vcpu >= self.vcpus.len() {
            return Kicks::NONE;
        }
        self.set_line(Which::Local(vcpu), 1 << intid, high)
    }

    fn set_line(&mut self, which: Which, bit: u32, high: bool) -> Kicks {
        self.change(which, |bank| {
            let changed = bank.set_line(bit, high);
            // Listed: the pending state may have to go, or a resample be asked for.
            changed & bank.listed
        })
    }

    /// The physical timer interrupt fired for a vCPU and stays active until the guest ends its own.
    pub fn timer_fired(&mut self, vcpu: usize) -> Kicks {
        self.unlist_linked(vcpu);
        let Some(local) = self.vcpus.get_mut(vcpu) else { return Kicks::NONE };
        local.timer_linked = true;
        local.release_timer = false;
        let rises = local.bank.line & TIMER_BIT == 0;
        local.bank.line |= TIMER_BIT;
        if !rises || local.bank.ready(self.groups) & TIMER_BIT == 0 {
            return Kicks::NONE;
        }
        local.dirty = true;
        Kicks::one(vcpu)
    }

    /// True when the physical timer interrupt must be active while this vCPU is loaded, so that it does not
    /// fire again before the guest is done with it.
    #[inline]
    pub fn timer_is_live(&self, vcpu: usize) -> bool {
        self.vcpus.get(vcpu).is_some_and(|local| local.timer_linked)
    }

    /// True when the guest has not taken a timer interrupt that fired: whoever flushes looks whether the
    /// timer's output is still high, and if not, calls [`Self::timer_dropped`].
    #[inline]
    pub fn timer_waits(&self, vcpu: usize) -> bool {
        self.vcpus
            .get(vcpu)
            .is_some_and(|local| local.timer_linked && self.local_state(vcpu, TIMER_PPI) & LR_ACTIVE == 0)
    }

    /// The timer's output went low before the guest took its interrupt. Between sync and flush.
    pub fn timer_dropped(&mut self, vcpu: usize) {
        let Some(local) = self.vcpus.get_mut(vcpu) else { return };
        if local.timer_linked {
            local.timer_linked = false;
            local.release_timer = true;
            local.bank.line &= !TIMER_BIT;
            local.dirty = true;
        }
    }

    /// A write of `value` to one of the registers that generate SGIs, by vCPU `from`.
    pub fn sgi(&mut self, from: usize, register: SgiRegister, value: u64) -> Kicks {
        let intid = super::low(value >> 24 & 0xf);
        let all = if self.vcpus.len() >= 64 { u64::MAX } else { (1 << self.vcpus.len()) - 1 };
        let targets = if value & 1 << 40 != 0 {
            all & !Kicks::one(from).0
        } else if value & 0x00ff_f0ff_0000_0000 != 0 {
            // Affinities 2 and 3 that no vCPU has, or a range of affinity 0 that GICD_TYPER does not offer.
            0
        } else {
            let cluster = (value >> 16 & 0xff) * CLUSTER as u64;
            if cluster < 64 { ((value & 0xffff) << cluster) & all } else { 0 }
        };
        let bit = 1u32 << intid;
        let groups = self.groups;
        let mut kicks = 0;
        let mut rest = targets;
        while rest != 0 {
            let vcpu = rest.trailing_zeros() as usize;
            rest &= rest - 1;
            let Some(local) = self.vcpus.get_mut(vcpu) else { break };
            if register != SgiRegister::Sgi1R && local.bank.group & bit != 0 {
                continue;
            }
            if local.bank.latch & bit != 0 {
                continue;
            }
            local.bank.latch |= bit;
            if local.bank.ready(groups) & bit != 0 {
                local.dirty = true;
                kicks |= 1 << vcpu;
            }
        }
        Kicks(kicks)
    }

    /// Deactivates an interrupt for a vCPU whose ICC_DIR_EL1 is trapped. Sync first.
    pub fn deactivate(&mut self, vcpu: usize, intid: u32) -> Kicks {
        let Some(which) = self.which(vcpu, intid) else { return Kicks::NONE };
        let bit = 1 << (intid % 32);
        self.make_inactive(which, bit)
    }

    /// vCPUs whose list registers the registers read since the last call depended on: sync one's own and
    /// read again; kick the others, so that a guest that polls sees them move.
    #[inline]
    pub fn take_stale(&mut self) -> Kicks {
        Kicks(core::mem::take(&mut self.stale))
    }

    fn which(&self, vcpu: usize, intid: u32) -> Option<Which> {
        match intid {
            0..32 if vcpu < self.vcpus.len() => Some(Which::Local(vcpu)),
            32..INTIDS => Some(Which::Shared(intid as usize / BITS - 1)),
            _ => None,
        }
    }

    #[inline]
    fn bank(&self, which: Which) -> Option<&Bank> {
        match which {
            Which::Local(vcpu) => self.vcpus.get(vcpu).map(|local| &local.bank),
            Which::Shared(word) => self.spis.get(word).map(|shared| &shared.bank),
        }
    }

    #[inline]
    fn bank_mut(&mut self, which: Which) -> Option<&mut Bank> {
        match which {
            Which::Local(vcpu) => self.vcpus.get_mut(vcpu).map(|local| &mut local.bank),
            Which::Shared(word) => self.spis.get_mut(word).map(|shared| &mut shared.bank),
        }
    }

    /// Edits a bank. The vCPUs of interrupts that became ready, and of those that `edit` names, must look.
    fn change(&mut self, which: Which, edit: impl FnOnce(&mut Bank) -> u32) -> Kicks {
        let groups = self.groups;
        let Some(bank) = self.bank_mut(which) else { return Kicks::NONE };
        let before = bank.ready(groups);
        let named = edit(bank);
        let bits = named | bank.ready(groups) & !before;
        if bits == 0 { Kicks::NONE } else { self.kick(which, bits) }
    }

    /// Marks the vCPUs that have these interrupts, or would get them.
    fn kick(&mut self, which: Which, bits: u32) -> Kicks {
        match which {
            Which::Local(vcpu) => self.mark(vcpu),
            Which::Shared(word) => Ones(bits).fold(Kicks::NONE, |kicks, bit| {
                let target = self.spis.get(word).map_or(NOBODY, |shared| {
                    let held = (shared.bank.listed | shared.bank.active) & 1 << bit != 0;
                    if held { shared.holder[bit] } else { shared.route[bit] }
                });
                kicks | self.mark(usize::from(target))
            }),
        }
    }

    fn mark(&mut self, vcpu: usize) -> Kicks {
        let Some(local) = self.vcpus.get_mut(vcpu) else { return Kicks::NONE };
        local.dirty = true;
        Kicks::one(vcpu)
    }

    /// Makes these interrupts inactive, now or when their list registers are read back.
    fn make_inactive(&mut self, which: Which, bits: u32) -> Kicks {
        let mut kicks = self.change(which, |bank| {
            bank.queued_inactive |= bits & bank.listed;
            bank.queued_active &= !bits;
            bits & (bank.active | bank.listed)
        });
        let Some(bank) = self.bank_mut(which) else { return kicks };
        let ended = bank.active & bits;
        bank.active &= !bits;
        // Pending ones may now go elsewhere.
        let ready = ended & self.bank(which).map_or(0, |bank| bank.ready(self.groups));
        if ready != 0 {
            kicks |= self.kick(which, ready);
        }
        kicks
    }

    /// State bits of a vCPU's list register for a listed private interrupt, else what the bank says.
    fn local_state(&self, vcpu: usize, intid: u32) -> u64 {
        let Some(local) = self.vcpus.get(vcpu) else { return 0 };
        let bit = 1u32 << (intid % 32);
        if local.bank.listed & bit != 0 {
            return local.lists.state_of(intid);
        }
        let mut state = 0;
        if local.bank.active & bit != 0 {
            state |= LR_ACTIVE;
        }
        if local.bank.pending() & bit != 0 {
            state |= LR_PENDING;
        }
        state
    }
}
