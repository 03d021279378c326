//! Keeping one guest still: its vCPUs stop between two instructions, with all their registers in memory.
//!
//! What a clone, a snapshot and a reset begin with. The guest's CPUs are shaken and come by themselves; this CPU
//! waits for them, which takes as long as the longest thing that they do at EL2. Other guests go on.

use alloc::sync::Arc;
use core::fmt;

use crate::arch::timer;
use crate::guest::{Guest, Life};
use vmobject::lock::Held;

use super::load::Cpu;
use super::{Outside, call_daemon, interrupt_guest, shake_until};

/// Why a guest could not be kept still. It runs as before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Restless {
    /// It is ending.
    Ending,
    /// It is being copied or reset already.
    Taken,
    /// A CPU that has one of its vCPUs does not come.
    Late,
}

impl fmt::Display for Restless {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ending => "it is ending",
            Self::Taken => "it is being copied or reset already",
            Self::Late => "one of its vCPUs does not stop; try again",
        })
    }
}

/// Does `work` while none of a guest's vCPUs runs or has registers in a CPU, and says for how many ticks that was.
/// A guest that ran before runs again; one that was paused stays so.
pub fn while_still<R>(
    guest: &Arc<Guest>,
    cpu: &mut Cpu,
    outside: &dyn Outside,
    held: &mut Held<'_, 0>,
    work: impl FnOnce(&Cpu, &mut Held<'_, 0>) -> R,
) -> Result<(R, u64), Restless> {
    let start = timer::now();
    if !guest.keep_still() {
        return Err(Restless::Taken);
    }
    let ran = guest.move_life(Life::Running, Life::Paused);
    let result = settle(guest, cpu, outside, held).map(|()| work(cpu, held));
    if guest.let_go(ran) {
        interrupt_guest(guest, held);
    }
    if guest.life() == Life::Ending {
        // Perhaps in the midst of the work. Its vCPUs stand where they are, and each has to be switched off.
        interrupt_guest(guest, held);
        call_daemon();
    }
    result.map(|value| (value, timer::now().wrapping_sub(start)))
}

fn settle(
    guest: &Arc<Guest>,
    cpu: &mut Cpu,
    outside: &dyn Outside,
    held: &mut Held<'_, 0>,
) -> Result<(), Restless> {
    if cpu.loaded.as_ref().is_some_and(|loaded| Arc::ptr_eq(&loaded.guest, guest)) {
        cpu.unload(outside, held);
    }
    if !shake_until(|| interrupt_guest(guest, held), || guest.is_quiet()) {
        return Err(Restless::Late);
    }
    match guest.life() {
        Life::Paused => Ok(()),
        Life::Running | Life::Ending => Err(Restless::Ending),
    }
}
