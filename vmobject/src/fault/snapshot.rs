//! Reading a snapshot: what a guest would see there, without a guest.
//!
//! For whoever writes an image out: it walks the snapshot's whole range, and reads through to what lies below a
//! copy-object wherever nothing was pushed. A page is locked while it is read, so what is read is what was there
//! when the snapshot was made. Called by the image writer.

use super::chain::{Found, unseen};
use super::{FaultError, Step, WaitFor};
use crate::Vm;
use crate::addr::Ipa;
use crate::limits::MAX_RESTARTS;
use crate::lock::Held;
use crate::map::Snapshot;
use crate::pager::NOBODY;
use crate::prot::Prot;
use crate::store::{Machine, PhysMemory as _};

/// How a look at a snapshot ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Looked {
    /// All bytes were read.
    Done,
    /// None; look again when this has happened.
    Wait(WaitFor),
    /// None: the way is long, or changes all the time. Look again after the interrupts (I6).
    Again,
}

impl<M: Machine> Vm<M> {
    /// Reads bytes of one page of a snapshot; `at` and all of `out` lie in it.
    pub fn read_snapshot<const OUTER: u8>(
        &self,
        snapshot: &Snapshot,
        at: Ipa,
        out: &mut [u8],
        held: &mut Held<'_, OUTER>,
    ) -> Result<Looked, FaultError> {
        if at.offset_in_page() + out.len() > 1 << crate::addr::PAGE_SHIFT {
            return Err(FaultError::Denied { at, wanted: Prot::READ });
        }
        let entry = snapshot.iter().find(|entry| entry.range.contains(at)).ok_or(FaultError::Hole(at))?;
        let index = entry.page_at(at.page()).ok_or(FaultError::Hole(at))?;
        if entry.device {
            return Err(FaultError::Hole(at)); // what it has is no part of what was kept
        }
        for _ in 0..MAX_RESTARTS {
            let step = {
                let mut chain = self.objects.get(entry.object).descend(held);
                match self.look(&mut chain, index, None, unseen) {
                    Found::Page(page) => {
                        self.machine.memory().read(page.frame, at.offset_in_page(), out);
                        return Ok(Looked::Done);
                    }
                    Found::Nothing => {
                        out.fill(0);
                        return Ok(Looked::Done);
                    }
                    Found::Busy(frame) => Step::Wait(WaitFor::Io(self.frames.page(frame).transfer())),
                    Found::PageIn(object, index) => Step::PageIn(object, index),
                    Found::Deep => Step::Trail(entry.object, index),
                    Found::Changed => Step::Again,
                }
            };
            match step {
                Step::Wait(wait) => return Ok(Looked::Wait(wait)),
                Step::PageIn(object, index) => {
                    // A frozen guest's own page comes in here, though it may stand still.
                    self.limited.has_grown();
                    if let Some(wait) =
                        self.page_in((object, index), NOBODY, |_| {}, held).map_err(FaultError::Lost)?
                    {
                        return Ok(Looked::Wait(wait));
                    }
                }
                Step::Trail(object, index) => {
                    match self.lay_trail(object, index, held) {
                        Ok(true) => return Ok(Looked::Again),
                        // All of it: somebody keeps changing the chain, and would have done so again.
                        Ok(false) => {}
                        Err(_) => return Ok(Looked::Wait(WaitFor::Memory)),
                    }
                }
                Step::Done
                | Step::Part
                | Step::Again
                | Step::Shadow
                | Step::Push(..)
                | Step::Refused
                | Step::Lost(_) => {}
            }
        }
        // A guest keeps changing what lies on the way.
        Ok(Looked::Again)
    }
}
