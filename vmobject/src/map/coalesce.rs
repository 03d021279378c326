//! Growing an entry over memory that is put right behind it (`vm_object_coalesce`).
//!
//! Two anonymous regions side by side need one entry, one object and one place in the reverse map. It is done when
//! the second is put in: the object that is there grows, and the one that was made for the new range goes unused. Only
//! for plain memory that nobody else can reach: what shadows, is shadowed, kept or paged elsewhere has its own size
//! in somebody's books. Called by `insert`, with the map locked.

use super::Entry;
use crate::addr::{IpaRange, PageIndex};
use crate::lock::{Held, MAP};
use crate::object::{ObjectId, Role, State};
use crate::prot::Prot;
use crate::store::Machine;
use crate::{Vm, VmError};

/// True for memory of which only one reference knows, and that knows of no other.
fn is_plain(state: &State) -> bool {
    let alone = state.role == Role::Plain && state.copy.is_none() && state.shadow.is_none();
    state.is_sole_anonymous() && alone
}

impl<M: Machine> Vm<M> {
    /// Grows `entry` over `range`, for which `object`, from its beginning, was made. False, and nothing done, if
    /// they do not fit together; if they do, the reference to `object` is still the caller's.
    pub(super) fn coalesce(
        &self,
        entry: &mut Entry,
        range: IpaRange,
        object: ObjectId,
        prot: Prot,
        held: &mut Held<'_, MAP>,
    ) -> Result<bool, VmError> {
        let whole = IpaRange::new(entry.range.start(), range.end());
        let (Some(whole), Ok(more)) = (whole, u32::try_from(range.pages())) else { return Ok(false) };
        let alike = entry.range.end() == range.start()
            && (entry.prot, entry.most) == (prot, prot)
            && !entry.needs_copy;
        if !alike || entry.object == object {
            return Ok(false);
        }
        {
            let (new, _held) = self.objects.get(object).read(held);
            if !is_plain(&new) || !new.slots.counts().is_empty() || new.pages != more {
                return Ok(false);
            }
        }
        let (mut state, mut held) = self.objects.get(entry.object).write(held);
        let end = entry.page_at(range.start());
        let grown = state.pages.checked_add(more);
        let (Some(grown), true) = (grown, is_plain(&state) && end == Some(PageIndex::new(state.pages)))
        else {
            return Ok(false);
        };
        let charge = Entry::charge_of(whole, prot).saturating_sub(entry.charge());
        self.commit(charge, &mut held)?;
        state.pages = grown;
        self.links.write(&mut held).0.grow(entry.link, more);
        entry.range = whole;
        Ok(true)
    }
}
