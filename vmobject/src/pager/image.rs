//! The image pagers: absent pages of an object come from a partition. One that is only read never changes; to
//! one that is written, pages go back when the object is cleaned.
//!
//! Where page `n` of the object is page `n` of the store. Called by `transfer`.

use super::Home;
use crate::addr::PageIndex;
use crate::object::State;

/// Where an absent page of an object is, if it has a pager.
pub(super) fn home(state: &State, page: PageIndex) -> Option<Home> {
    state.pager.store().map(|store| Home { store, page: page.number() })
}
