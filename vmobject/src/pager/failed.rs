//! Pages that a store did not give, until whoever wanted one comes back and is told.
//!
//! A fault that waits keeps nothing: it runs again from the top. So what became of its transfer is kept here, for as
//! many pages as transfers can be in flight, whoever they are for: with one place for each object, two vCPUs that take
//! turns in failing would each find the other's failure for ever (I15). A page is named by where it is in its store, and
//! by which of the writings there, not by its object: a collapse may move it meanwhile, and what is written to the
//! place later has not failed. It is told to the guest that asked, and to no other: whoever comes much later may find
//! the store well again. Called by `transfer`.

use alloc::collections::VecDeque;
use core::sync::atomic::Ordering::Relaxed;

use super::{Home, Transfers};
use crate::addr::PageIndex;
use crate::limits::MAX_IO;
use crate::lock::{Held, OBJECT};
use crate::object::State;
use crate::store::{Machine, StoreError};
use crate::{Vm, VmError};

/// Contents of a page in a store: where, and how often something was written there.
pub(super) type Contents = (Home, u32);

/// What did not come in, the last of it, and for which map; without an error it is to be tried alone first.
pub(super) struct Failures(VecDeque<((Contents, u32), Option<StoreError>)>);

impl Failures {
    /// None, and room for as many as are kept.
    pub(super) fn new() -> Result<Self, VmError> {
        let mut list = VecDeque::new();
        list.try_reserve_exact(MAX_IO as usize).map_err(|_| VmError::NoMemory)?;
        Ok(Self(list))
    }

    fn count(&self) -> u32 {
        u32::try_from(self.0.len()).unwrap_or(u32::MAX)
    }

    fn place(&self, what: (Contents, u32)) -> Option<usize> {
        self.0.iter().position(|(known, _)| *known == what)
    }

    fn note(&mut self, what: (Contents, u32), error: Option<StoreError>) {
        if let Some(place) = self.place(what) {
            self.0.remove(place);
        } else if self.0.len() == MAX_IO as usize {
            // Whoever wanted it does not come, or tries once more.
            self.0.pop_front();
        }
        self.0.push_back((what, error));
    }

    fn take(&mut self, what: (Contents, u32)) -> Option<Option<StoreError>> {
        let place = self.place(what)?;
        self.0.remove(place).map(|(_, error)| error)
    }
}

impl Transfers {
    /// Something did not come in that a map's guest wanted.
    pub(super) fn failed(
        &self,
        contents: Contents,
        by: u32,
        error: Option<StoreError>,
        held: &mut Held<'_, OBJECT>,
    ) {
        let (mut table, _held) = self.table.lock(held);
        table.failures.note((contents, by), error);
        self.unread.store(table.failures.count(), Relaxed);
    }

    /// Whether something did not come in that a map's guest wanted, since the last call.
    #[inline]
    pub(super) fn take_failed(
        &self,
        contents: Contents,
        by: u32,
        held: &mut Held<'_, OBJECT>,
    ) -> Option<Option<StoreError>> {
        if self.unread.load(Relaxed) == 0 { None } else { self.take_unread(contents, by, held) }
    }

    #[cold]
    fn take_unread(
        &self,
        contents: Contents,
        by: u32,
        held: &mut Held<'_, OBJECT>,
    ) -> Option<Option<StoreError>> {
        let (mut table, _held) = self.table.lock(held);
        let taken = table.failures.take((contents, by));
        self.unread.store(table.failures.count(), Relaxed);
        taken
    }

    /// A map is gone: nobody comes for what it wanted.
    pub(crate) fn forget_failed<const OUTER: u8>(&self, by: u32, held: &mut Held<'_, OUTER>) {
        let (mut table, _held) = self.table.lock(held);
        table.failures.0.retain(|((_, asker), _)| *asker != by);
        self.unread.store(table.failures.count(), Relaxed);
    }
}

impl<M: Machine> Vm<M> {
    /// True for a page that did not come in, of which nobody was told yet.
    pub(crate) fn has_failed(&self, state: &State, page: PageIndex, held: &mut Held<'_, OBJECT>) -> bool {
        let Some(contents) = self.contents(state, page, held) else { return false };
        self.transfers.table.lock(held).0.failures.0.iter().any(|((known, _), _)| *known == contents)
    }
}
