//! EL2's own accesses to guest memory: they take the way of a fault and end in a copy of bytes.
//!
//! Done for devices, loaders and hypercalls. Nothing is mapped; the page only counts as used. Calls `fault`.

use super::{Copied, FaultError, Purpose, Step};
use crate::Vm;
use crate::addr::{Ipa, Pfn};
use crate::fault::WaitFor;
use crate::lock::{Held, OBJECT};
use crate::map::Map;
use crate::prot::Prot;
use crate::store::{Machine, PhysMemory as _};

impl<M: Machine> Vm<M> {
    /// Reads guest memory as the guest would.
    pub fn read<const OUTER: u8>(
        &self,
        map: &Map<M>,
        at: Ipa,
        out: &mut [u8],
        held: &mut Held<'_, OUTER>,
    ) -> Result<Copied, FaultError> {
        let (mut at, mut rest) = (at, out);
        while !rest.is_empty() {
            let offset = at.offset_in_page();
            let (part, after) = rest.split_at_mut(rest.len().min(4096 - offset));
            let length = part.len() as u64;
            let purpose = &mut Purpose::Read(offset, part);
            match self.serve(map, at, Prot::READ, purpose, &mut held.deepen())? {
                Copied::Done => {}
                wait @ Copied::Wait(_) => return Ok(wait),
            }
            rest = after;
            if !rest.is_empty() {
                at = at.checked_add(length).ok_or(FaultError::Hole(at))?;
            }
        }
        Ok(Copied::Done)
    }

    /// Writes guest memory as the guest would: copying what is shared, refusing what is read-only.
    pub fn write<const OUTER: u8>(
        &self,
        map: &Map<M>,
        at: Ipa,
        bytes: &[u8],
        held: &mut Held<'_, OUTER>,
    ) -> Result<Copied, FaultError> {
        let (mut at, mut rest) = (at, bytes);
        while !rest.is_empty() {
            let offset = at.offset_in_page();
            let (part, after) = rest.split_at(rest.len().min(4096 - offset));
            let purpose = &mut Purpose::Write(offset, part);
            match self.serve(map, at, Prot::WRITE, purpose, &mut held.deepen())? {
                Copied::Done => {}
                wait @ Copied::Wait(_) => return Ok(wait),
            }
            rest = after;
            if !rest.is_empty() {
                at = at.checked_add(part.len() as u64).ok_or(FaultError::Hole(at))?;
            }
        }
        Ok(Copied::Done)
    }

    /// The same where EL2 itself wanted the page.
    #[inline(never)]
    pub(super) fn finish_unmapped(
        &self,
        purpose: &mut Purpose<'_>,
        frame: Pfn,
        held: &mut Held<'_, OBJECT>,
    ) -> Step {
        match purpose {
            Purpose::Enter(_) => unreachable!("that one is mapped"),
            Purpose::Read(offset, out) => {
                self.machine.memory().read(frame, *offset, out);
                Step::Done
            }
            Purpose::Write(offset, bytes) => {
                self.machine.memory().write(frame, *offset, bytes);
                Step::Done
            }
            Purpose::Wire(wired) => {
                if !self.frames.wire(frame, held) {
                    return Step::Wait(WaitFor::Memory);
                }
                **wired = Some(frame);
                Step::Done
            }
        }
    }
}
