//! Wiring: a page that a device is about to use stays in its frame.
//!
//! It may change its owner, when a chain collapses, but never its frame, and it is not evicted. If nobody owns
//! it any more, because its map is gone or something hides it, the frame is free when it is unwired (D22). A
//! guest that shares the page with a clone since writes to another one: before a device writes, the page is
//! wired anew (I4). Called by whoever lends guest memory to devices.

use super::{Copied, FaultError, Purpose, WaitFor};
use crate::Vm;
use crate::addr::{Ipa, Pfn};
use crate::lock::Held;
use crate::map::Map;
use crate::prot::Prot;
use crate::store::Machine;

/// A page that stays where it is until it is given to [`Vm::unwire`].
#[derive(Debug)]
#[must_use = "a wired page stays for ever unless it is unwired"]
pub struct Wired {
    frame: Pfn,
    writes: bool,
}

impl Wired {
    /// The frame.
    pub const fn frame(&self) -> Pfn {
        self.frame
    }
}

/// How an attempt to wire a page ended.
#[derive(Debug)]
pub enum Wiring {
    /// It is wired.
    Done(Wired),
    /// Not yet: try again when this has happened.
    Wait(WaitFor),
}

impl<M: Machine> Vm<M> {
    /// Wires the page at an address for accesses of a kind, as the guest would see it.
    pub fn wire<const OUTER: u8>(
        &self,
        map: &Map<M>,
        at: Ipa,
        access: Prot,
        held: &mut Held<'_, OUTER>,
    ) -> Result<Wiring, FaultError> {
        let mut frame = None;
        let copied = self.serve(map, at, access, &mut Purpose::Wire(&mut frame), &mut held.deepen())?;
        Ok(match (copied, frame) {
            (Copied::Done, Some(frame)) => Wiring::Done(Wired { frame, writes: access.allows(Prot::WRITE) }),
            (Copied::Done, None) => Wiring::Wait(WaitFor::Memory),
            (Copied::Wait(wait), _) => Wiring::Wait(wait),
        })
    }

    /// Lets a page go; true if that freed its frame.
    pub fn unwire<const OUTER: u8>(&self, wired: Wired, held: &mut Held<'_, OUTER>) -> bool {
        if wired.writes {
            self.frames.page(wired.frame).set_dirty(true); // since it was written out last, perhaps
        }
        self.frames.unwire(wired.frame, held)
    }
}

#[cfg(test)]
mod tests {
    use super::Wiring;
    use crate::lock::Held;
    use crate::prot::Prot;
    use crate::testing::{Rig, at};

    #[test]
    fn a_frame_that_was_wired_for_writing_longer_than_its_guest_lived_is_clean_for_whoever_gets_it() {
        let (rig, held) = (Rig::new(64), &mut Held::root());
        let guest = rig.guest(1);
        assert_eq!(rig.store(&guest, at(0, 0), 9), Ok(()));
        let Ok(Wiring::Done(wired)) = rig.vm.wire(&guest, at(0, 0), Prot::WRITE, held) else {
            panic!("it is there")
        };
        rig.destroy(guest);
        rig.settle();
        assert!(rig.vm.unwire(wired, held), "its frame is free now");
        assert!(rig.frames().all(|frame| !rig.vm.frames.page(frame).is_dirty()));
    }
}
