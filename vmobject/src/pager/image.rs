//! The image pagers: absent pages of an object come from a partition. One that is only read never changes; to
//! one that is written, pages go back when the object is cleaned.
//!
//! Where page `n` of the object is page `n` of the store. A store that is only read may know of pages that are
//! zeros, which are never read, and of sums, which are compared with what was read. Called by `transfer`.

use super::Home;
use crate::Vm;
use crate::addr::{PageIndex, Pfn};
use crate::object::{Pager, State};
use crate::store::{Expected, Machine, PageStore as _, PhysMemory as _};

/// Where an absent page of an object is, if it has a pager.
pub(super) fn home(state: &State, page: PageIndex) -> Option<Home> {
    state.pager.store().map(|store| Home { store, page: page.number() })
}

impl<M: Machine> Vm<M> {
    /// What the store of an object says of a page.
    pub(super) fn expected(&self, state: &State, page: PageIndex) -> Expected {
        match state.pager {
            Pager::Image(store) => self.machine.store().expects(store, u64::from(page.number())),
            Pager::Disk(_) | Pager::None | Pager::Device(_) => Expected::Anything,
        }
    }

    /// True unless a page that was just read from its object's image is not what was stored there.
    pub(super) fn is_as_stored(&self, state: &State, page: PageIndex, frame: Pfn) -> bool {
        match self.expected(state, page) {
            Expected::Sum { key, sum } => self.machine.memory().sum(frame, key).max(1) == sum,
            Expected::Anything | Expected::Zeros => true,
        }
    }
}
