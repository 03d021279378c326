//! Address translation as the guest would do it, played by a function that a test gives.

use std::cell::Cell;

use vmobject::addr::Ipa;

/// Stage 1 of the guest did not translate the address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotTranslated;

std::thread_local! {
    static STAGE1: Cell<fn(u64) -> Option<u64>> = const { Cell::new(Some) };
}

/// What the guest's stage 1 makes of `va` at EL1. Identity until [`set_stage1`].
pub fn at_s1e1r(va: u64, _write: bool) -> Result<Ipa, NotTranslated> {
    STAGE1.get()(va).map(Ipa::new).ok_or(NotTranslated)
}

/// Sets what [`at_s1e1r`] answers on this thread.
pub fn set_stage1(translate: fn(u64) -> Option<u64>) {
    STAGE1.set(translate);
}
