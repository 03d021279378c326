//! The fork page, by which a program under a guest's kernel forks the guest it runs in.
//!
//! It answers from three places, so it is no device like the others: what a guest is, its random numbers, and how the
//! last fork ended, which is one of its devices' values and so is the child's own. Called by `memory`, and by
//! `sched` with a fork's outcome.

use super::exit::{Asked, Exit, Run};
use super::psci::code;
use super::rank;
use hv_abi::forkpage::{FORK, GUEST, MAGIC, MAGIC_VALUE, OF, PLACE, RANDOM, STATUS, VERSION, VERSION_VALUE};
use hv_abi::manifest::FORK_LIMIT;
use serde::{Deserialize, Serialize};
use vmobject::lock::Held;

/// How the last fork that was asked for here ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// An answer as PSCI and SMCCC have them.
    pub status: u64,
    /// 0 in the parent, from 1 on in a child.
    pub place: u32,
    /// How many children there are.
    pub of: u32,
}

/// A load from a register.
pub fn read(run: &Run<'_>, offset: u64, held: &mut Held<'_, { rank::VCPU }>) -> u64 {
    let outcome = |held: &mut Held<'_, { rank::VCPU }>| run.guest.devices.lock(held).0.outcome;
    match offset {
        MAGIC => MAGIC_VALUE.into(),
        VERSION => VERSION_VALUE.into(),
        STATUS => outcome(held).status,
        PLACE => outcome(held).place.into(),
        OF => outcome(held).of.into(),
        GUEST => run.guest.id.0.into(),
        RANDOM => run.guest.random.lock(held).0.words()[0],
        _ => 0,
    }
}

/// A store to a register. The instruction is done when this is called.
pub fn write(run: &Run<'_>, offset: u64, value: u64, held: &mut Held<'_, { rank::VCPU }>) -> Exit {
    if offset != FORK {
        return Exit::Resume;
    }
    match u32::try_from(value) {
        Ok(count @ 1..=FORK_LIMIT) => Exit::Fork(count, Asked::Page),
        Ok(_) | Err(_) => {
            let outcome = Outcome { status: code::INVALID_PARAMETERS, ..Outcome::default() };
            run.guest.devices.lock(held).0.outcome = outcome;
            Exit::Resume
        }
    }
}
