//! How devices reach a guest's memory: through the fault path, like everybody (invariant I4).
//!
//! What a driver names is RAM or it is nothing: holes, device registers, flash banks and the disks above RAM are
//! refused here. Nothing waits: an access that would have to says for what. Called by `disks`, `balloon` and `rng`.

use core::fmt;

use hv_abi::machine::RAM_BASE;
use vmobject::addr::{Ipa, IpaRange, PAGE_SIZE};
use vmobject::fault::{Copied, FaultError, WaitFor};
use vmobject::lock::Held;
use vmobject::map::{Discarded, NotDiscarded};

use super::{Complaint, Guest, rank};
use crate::mm;
use crate::vdev::virtio::{Fault, Ram};

/// What became of an access.
pub type Reached<T> = Result<T, Fault<WaitFor>>;

/// A guest's memory, for one of its devices.
pub struct Dma<'r, 'h> {
    /// Whose.
    pub guest: &'r Guest,
    /// What the caller holds.
    pub held: &'r mut Held<'h, { rank::DEVICES }>,
}

impl Dma<'_, '_> {
    /// Where in the map some bytes of RAM are: nothing else is reached this way.
    pub fn ram(&self, at: u64, bytes: u64) -> Reached<Ipa> {
        let end = at.checked_add(bytes).filter(|_| at >= RAM_BASE);
        let inside = end.is_some_and(|end| end - RAM_BASE <= self.guest.config.memory);
        if inside { Ok(Ipa::new(at)) } else { Err(Fault::Bad) }
    }

    /// Reads from the guest's map.
    pub fn load(&mut self, at: Ipa, out: &mut [u8]) -> Reached<()> {
        let copied = mm::vm().read(&self.guest.map, at, out, self.held);
        self.copied(copied)
    }

    /// Writes to the guest's map.
    pub fn store(&mut self, at: Ipa, bytes: &[u8]) -> Reached<()> {
        let copied = mm::vm().write(&self.guest.map, at, bytes, self.held);
        self.copied(copied)
    }

    /// Makes pages of the guest's map zero, from the first of a range on: how many bytes that was; or why some stay as they
    /// are, through no fault of the guest's.
    pub fn discard(&mut self, at: Ipa, bytes: u64) -> Reached<Result<u64, NotDiscarded>> {
        let end = at.checked_add(bytes).ok_or(Fault::Bad)?;
        let range = IpaRange::new(at, end).ok_or(Fault::Bad)?;
        let discarded = mm::vm().discard(&self.guest.map, range, self.held);
        match discarded {
            Ok(_) => {}
            Err(NotDiscarded::Lost(lost)) => self.complain(|| mm::told(FaultError::Lost(lost))),
            // That there is no memory is told without any.
            Err(NotDiscarded::Refused(_)) => {
                self.complain(|| "there is no room for marks of pages that are zero")
            }
            Err(NotDiscarded::Hole(_)) => self.complain(|| "nothing is mapped there"),
            Err(NotDiscarded::Denied(_)) => self.complain(|| "it may not write there"),
        }
        outcome(discarded, bytes)
    }

    fn copied(&self, copied: Result<Copied, FaultError>) -> Reached<()> {
        match copied {
            Ok(Copied::Done) => Ok(()),
            Ok(Copied::Wait(what)) => Err(Fault::Wait(what)),
            Err(error) => {
                self.complain(|| mm::told(error));
                Err(Fault::Bad)
            }
        }
    }

    /// Says once why a request fails.
    fn complain<W: fmt::Display>(&self, why: impl FnOnce() -> W) {
        if self.guest.complain_once(Complaint::Request) {
            log::warn!("guest {}: a request of a device fails: {}", self.guest.id, why());
        }
    }
}

/// What a device makes of a discard of so many bytes. Only what the guest named wrongly is its fault.
const fn outcome(
    discarded: Result<Discarded, NotDiscarded>,
    bytes: u64,
) -> Reached<Result<u64, NotDiscarded>> {
    match discarded {
        Ok(Discarded::Done(_)) => Ok(Ok(bytes)),
        Ok(Discarded::Part(pages)) => Ok(Ok(pages * PAGE_SIZE)),
        Ok(Discarded::Wait(what)) => Err(Fault::Wait(what)),
        Err(why @ (NotDiscarded::Refused(_) | NotDiscarded::Lost(_))) => Ok(Err(why)),
        Err(NotDiscarded::Hole(_) | NotDiscarded::Denied(_)) => Err(Fault::Bad),
    }
}

impl Ram for Dma<'_, '_> {
    type Wait = WaitFor;

    fn read(&mut self, at: u64, out: &mut [u8]) -> Reached<()> {
        let at = self.ram(at, out.len() as u64)?;
        self.load(at, out)
    }

    fn write(&mut self, at: u64, bytes: &[u8]) -> Reached<()> {
        let at = self.ram(at, bytes.len() as u64)?;
        self.store(at, bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmobject::VmError;
    use vmobject::store::{LostPage, StoreError, StoreId};

    #[test]
    fn only_what_a_guest_names_wrongly_breaks_the_rules_when_it_is_discarded() {
        let at = Ipa::new(RAM_BASE);
        assert_eq!(outcome(Ok(Discarded::Done(3)), 8192), Ok(Ok(8192)));
        assert_eq!(outcome(Ok(Discarded::Part(1)), 8192), Ok(Ok(4096)));
        assert_eq!(outcome(Ok(Discarded::Wait(WaitFor::Memory)), 8192), Err(Fault::Wait(WaitFor::Memory)));
        assert_eq!(outcome(Err(NotDiscarded::Hole(at)), 8192), Err(Fault::Bad));
        assert_eq!(outcome(Err(NotDiscarded::Denied(at)), 8192), Err(Fault::Bad));
        // Ours.
        let full = NotDiscarded::Refused(VmError::NoMemory);
        assert_eq!(outcome(Err(full), 8192), Ok(Err(full)));
        let lost = LostPage { store: StoreId(0), page: 1, error: StoreError::Io };
        assert_eq!(outcome(Err(NotDiscarded::Lost(lost)), 8192), Ok(Err(NotDiscarded::Lost(lost))));
    }
}
