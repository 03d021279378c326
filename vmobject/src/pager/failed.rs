//! Pages that a store did not give, until whoever wanted one comes back and is told.
//!
//! A fault that waits keeps nothing: it runs again from the top. So what became of its transfer is kept here, for as
//! many pages as transfers can be in flight, whoever they are for: with one place for each object, two vCPUs that take
//! turns in failing would each find the other's failure for ever (I15). A page is named by where it is in its store, and
//! by which of the writings there, not by its object: a collapse may move it meanwhile, and what is written to the
//! place later has not failed. Called by `transfer`.

use alloc::collections::VecDeque;

use super::{Home, Transfers};
use crate::addr::PageIndex;
use crate::limits::MAX_IO;
use crate::lock::{Held, OBJECT};
use crate::object::State;
use crate::store::{Machine, StoreError};
use crate::{Vm, VmError};

/// Contents of a page in a store: where, and how often something was written there.
pub(super) type Contents = (Home, u32);

/// What did not come in, the last of it; without an error it is to be tried alone first.
pub(super) struct Failures(VecDeque<(Contents, Option<StoreError>)>);

impl Failures {
    /// None, and room for as many as are kept.
    pub(super) fn new() -> Result<Self, VmError> {
        let mut list = VecDeque::new();
        list.try_reserve_exact(MAX_IO as usize).map_err(|_| VmError::NoMemory)?;
        Ok(Self(list))
    }

    fn place(&self, contents: Contents) -> Option<usize> {
        self.0.iter().position(|(known, _)| *known == contents)
    }

    fn note(&mut self, contents: Contents, error: Option<StoreError>) {
        if let Some(place) = self.place(contents) {
            self.0.remove(place);
        } else if self.0.len() == MAX_IO as usize {
            // Whoever wanted it does not come, or tries once more.
            self.0.pop_front();
        }
        self.0.push_back((contents, error));
    }

    fn take(&mut self, contents: Contents) -> Option<Option<StoreError>> {
        let place = self.place(contents)?;
        self.0.remove(place).map(|(_, error)| error)
    }
}

impl Transfers {
    /// Something did not come in.
    pub(super) fn failed(&self, contents: Contents, error: Option<StoreError>, held: &mut Held<'_, OBJECT>) {
        self.0.lock(held).0.failures.note(contents, error);
    }

    /// Whether something did not come in since the last call.
    pub(super) fn take_failed(
        &self,
        contents: Contents,
        held: &mut Held<'_, OBJECT>,
    ) -> Option<Option<StoreError>> {
        self.0.lock(held).0.failures.take(contents)
    }
}

impl<M: Machine> Vm<M> {
    /// True for a page that did not come in, of which nobody was told yet.
    pub(crate) fn has_failed(&self, state: &State, page: PageIndex, held: &mut Held<'_, OBJECT>) -> bool {
        let Some(contents) = self.contents(state, page, held) else { return false };
        self.transfers.0.lock(held).0.failures.place(contents).is_some()
    }
}
