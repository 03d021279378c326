//! Charges: what was promised, against what there is (DESIGN 12).
//!
//! A guest's writable memory is committed whole when it is made, by the call that makes it, and so is a
//! clone's and a snapshot's: each may come to have every page for itself. The limit is a ratio of frames and
//! swap slots, less the reserve. So a refusal is an error at that call, not a hang later (D21). Beside that, the
//! few pages that each vCPU needs to get on at all must fit in frames, whatever the policy (I15).
//!
//! What is in use is not counted here a second time: every frame and slot stands in one object's index, whose
//! counts move with it when chains collapse. Called by `map`. Calls `page` and `pager` for what there is.

use crate::addr::CHUNK_PAGES;
use crate::lock::{CHARGE, Held, Ranked};
use crate::store::Machine;
use crate::{Vm, VmError};

/// How much more may be promised than there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Overcommit {
    /// So many hundredths of what there is; 100 is strict.
    Percent(u32),
    /// No limit: who comes too late waits for memory.
    None,
}

struct Ledger {
    policy: Overcommit,
    committed: u64,
    /// To snapshots, of that.
    kept: u64,
    needed: u64,
}

/// What was promised.
pub(crate) struct Charges(Ranked<CHARGE, Ledger>);

/// What was promised and may be, in pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChargeInfo {
    /// The policy.
    pub policy: Overcommit,
    /// Promised to maps and snapshots.
    pub committed: u64,
    /// To snapshots, of that.
    pub kept: u64,
    /// How much may be; `None` without a limit.
    pub limit: Option<u64>,
    /// Pages that vCPUs need to get on.
    pub needed: u64,
}

impl Charges {
    /// Nothing promised, and no limit.
    pub(crate) const fn new() -> Self {
        Self(Ranked::new(Ledger { policy: Overcommit::None, committed: 0, kept: 0, needed: 0 }))
    }
}

/// What is charged for so many pages of writable memory: they, and as many frames for tables and for the
/// object's index as they can need.
pub(crate) fn charge_for(pages: u64) -> u64 {
    pages + 2 * pages.div_ceil(u64::from(CHUNK_PAGES))
}

impl<M: Machine> Vm<M> {
    /// How much may be promised from now on. What was promised before stays so.
    pub fn set_overcommit<const OUTER: u8>(&self, policy: Overcommit, held: &mut Held<'_, OUTER>) {
        self.charges.0.lock(held).0.policy = policy;
    }

    /// What was promised and may be.
    pub fn charges<const OUTER: u8>(&self, held: &mut Held<'_, OUTER>) -> ChargeInfo {
        let swap = self.swap_info(held);
        let (ledger, _held) = self.charges.0.lock(held);
        let Ledger { policy, committed, kept, needed } = *ledger;
        let guests = u64::from(self.frames.total() - self.frames.reserve());
        let all = guests + u64::from(swap.slots - swap.bad);
        let limit = match policy {
            Overcommit::Percent(percent) => Some(all * u64::from(percent) / 100),
            Overcommit::None => None,
        };
        ChargeInfo { policy, committed, kept, limit, needed }
    }

    /// Promises pages, or refuses and changes nothing.
    pub(crate) fn commit<const OUTER: u8>(
        &self,
        pages: u64,
        held: &mut Held<'_, OUTER>,
    ) -> Result<(), VmError> {
        let limit = self.charges(held).limit.unwrap_or(u64::MAX);
        let (mut ledger, _held) = self.charges.0.lock(held);
        let left = limit.saturating_sub(ledger.committed);
        if pages > left {
            return Err(VmError::Overcommit { wanted: pages, left });
        }
        ledger.committed += pages;
        Ok(())
    }

    /// Takes a promise back.
    pub(crate) fn uncommit<const OUTER: u8>(&self, pages: u64, held: &mut Held<'_, OUTER>) {
        let (mut ledger, _held) = self.charges.0.lock(held);
        assert!(ledger.committed >= pages, "more is given back than was charged");
        ledger.committed -= pages;
    }

    /// What a map had been promised, a snapshot has now, or the other way round.
    pub(crate) fn keep<const OUTER: u8>(&self, pages: u64, kept: bool, held: &mut Held<'_, OUTER>) {
        let (mut ledger, _held) = self.charges.0.lock(held);
        ledger.kept = if kept { ledger.kept + pages } else { ledger.kept - pages };
    }

    /// Promises frames without which vCPUs cannot get on.
    pub(crate) fn commit_needs<const OUTER: u8>(
        &self,
        pages: u64,
        held: &mut Held<'_, OUTER>,
    ) -> Result<(), VmError> {
        let guests = u64::from(self.frames.total() - self.frames.reserve());
        let (mut ledger, _held) = self.charges.0.lock(held);
        let left = guests.saturating_sub(ledger.needed);
        if pages > left {
            return Err(VmError::Overcommit { wanted: pages, left });
        }
        ledger.needed += pages;
        Ok(())
    }

    /// Takes that back.
    pub(crate) fn uncommit_needs<const OUTER: u8>(&self, pages: u64, held: &mut Held<'_, OUTER>) {
        let (mut ledger, _held) = self.charges.0.lock(held);
        assert!(ledger.needed >= pages, "more is given back than was charged");
        ledger.needed -= pages;
    }
}
