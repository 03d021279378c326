//! The pages that a vCPU needed last, which pageout leaves alone (I15).
//!
//! One instruction can need many pages at once: its own and two of data, each with a walk of the guest's own
//! tables in guest memory. If one of them were evicted while another is brought in, the instruction might
//! never be done. So while memory is short each vCPU's last faults are remembered, more of them than one
//! instruction can take. A page is among them from the moment that somebody waits for it. Called by `fault`,
//! asked by `pageout`.

use alloc::vec::Vec;
use core::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering::Relaxed};

use super::Map;
use crate::addr::Pfn;
use crate::limits::NEED_PAGES;
use crate::lock::Held;
use crate::store::Machine;
use crate::{Vm, VmError};

/// No frame.
const NONE: u32 = u32::MAX;

/// One vCPU's last pages. Only the vCPU adds to them.
pub(crate) struct Needs {
    frames: [AtomicU32; NEED_PAGES],
    next: AtomicUsize,
    /// Where the instruction is that needs them.
    pc: AtomicU64,
}

/// Which instruction faults: of which vCPU, and where. When a vCPU faults elsewhere it has got on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Instruction {
    /// The vCPU's number.
    pub vcpu: usize,
    /// Its program counter.
    pub pc: u64,
}

impl Needs {
    const fn new() -> Self {
        let frames = [const { AtomicU32::new(NONE) }; NEED_PAGES];
        Self { frames, next: AtomicUsize::new(0), pc: AtomicU64::new(0) }
    }

    fn has(&self, frame: Pfn) -> bool {
        self.frames.iter().any(|known| known.load(Relaxed) == frame.number())
    }

    /// The one that was added last.
    fn last(&self) -> u32 {
        self.frames[self.next.load(Relaxed).wrapping_sub(1) % NEED_PAGES].load(Relaxed)
    }

    fn forget(&self) {
        self.frames.iter().for_each(|known| known.store(NONE, Relaxed));
    }

    fn add(&self, pc: u64, frame: Pfn, new: bool) {
        if self.pc.load(Relaxed) != pc {
            self.pc.store(pc, Relaxed);
            self.forget();
            self.next.store(1, Relaxed);
            self.frames[0].store(frame.number(), Relaxed);
        } else if new || (self.last() != frame.number() && !self.has(frame)) {
            let place = self.next.fetch_add(1, Relaxed) % NEED_PAGES;
            self.frames[place].store(frame.number(), Relaxed);
        }
    }
}

impl<M: Machine> Map<M> {
    /// Remembers that an instruction needs a page, which may have been remembered before unless its frame is `new`. The
    /// owner is locked.
    #[cold]
    pub(crate) fn need(&self, by: Instruction, frame: Pfn, new: bool) {
        if let Some(needs) = self.needs.get().and_then(|all| all.get(by.vcpu)) {
            needs.add(by.pc, frame, new);
        }
    }

    /// True for a page that one of the guest's vCPUs needed lately.
    pub(crate) fn is_needed(&self, frame: Pfn) -> bool {
        self.needs.get().is_some_and(|all| all.iter().any(|needs| needs.has(frame)))
    }

    /// The vCPU has got on, and will not run for a while: what it needed may go.
    pub fn forget_needs(&self, vcpu: usize) {
        if let Some(needs) = self.needs.get().and_then(|all| all.get(vcpu)) {
            needs.forget();
        }
    }
}

impl<M: Machine> Vm<M> {
    /// Says how many vCPUs will run on a map, once, before any does: pages that each needs to get on are
    /// promised. Refused if frames for that are not there.
    pub fn set_vcpus<const OUTER: u8>(
        &self,
        map: &Map<M>,
        vcpus: usize,
        held: &mut Held<'_, OUTER>,
    ) -> Result<(), VmError> {
        let mut all = Vec::new();
        all.try_reserve_exact(vcpus).map_err(|_| VmError::NoMemory)?;
        all.resize_with(vcpus, Needs::new);
        self.commit_needs((vcpus * NEED_PAGES) as u64, held)?;
        let mut unused = Some(all.into_boxed_slice());
        map.needs.call_once(|| unused.take().unwrap_or_default());
        if let Some(all) = unused {
            self.uncommit_needs((all.len() * NEED_PAGES) as u64, held);
        }
        Ok(())
    }

    /// A map's vCPUs are gone.
    pub(super) fn drop_needs<const OUTER: u8>(&self, map: &Map<M>, held: &mut Held<'_, OUTER>) {
        let vcpus = map.needs.get().map_or(0, |all| all.len());
        self.uncommit_needs((vcpus * NEED_PAGES) as u64, held);
    }
}
