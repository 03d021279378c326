//! The image pager: absent pages of an object come from a partition that is only read.
//!
//! Where page `n` of the object is page `n` of the store. Called by `transfer`.

use super::Home;
use crate::addr::PageIndex;
use crate::object::{Pager, State};

/// Where an absent page of an object is, if it has a pager.
pub(super) fn home(state: &State, page: PageIndex) -> Option<Home> {
    match state.pager {
        Pager::None => None,
        Pager::Image(store) => Some(Home { store, page: page.number() }),
    }
}
