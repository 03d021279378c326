//! A page that comes from the top object's pager, or is a device's.
//!
//! A device's frames are none of the VM's: a guest gets them mapped as they are, and nothing here knows of them before or
//! after. EL2 does not touch them for a guest, who could have it write to registers, or into EL2's own memory (I4); it
//! is as if nothing were there. They are mapped as memory is: who gives a guest registers needs a memory type for
//! them in [`crate::prot::Prot`] first. Called by the fault with the top object's lock held.

use super::{Place, Purpose, Step};
use crate::Vm;
use crate::lock::{Held, OBJECT};
use crate::map::Map;
use crate::object::State;
use crate::stats::Event;
use crate::store::Machine;

impl<M: Machine> Vm<M> {
    /// The top object's pager has the page, or is it.
    #[cold]
    pub(super) fn by_pager(
        &self,
        map: &Map<M>,
        place: Place<'_>,
        purpose: &mut Purpose<'_>,
        top: &State,
        held: &mut Held<'_, OBJECT>,
    ) -> Step {
        match (top.pager.device_frame(place.index), &purpose) {
            (None, _) => Step::PageIn(top.id(), place.index),
            (Some(frame), Purpose::Enter(_)) => {
                map.stats.count(Event::FaultDevice);
                self.finish(map, place, purpose, frame, place.prot, held)
            }
            (Some(_), Purpose::Read(..) | Purpose::Write(..) | Purpose::Wire(_)) => Step::Refused,
        }
    }
}
