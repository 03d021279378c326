//! Chores that no vCPU pays for: burying guests that ended, and starting again those that asked for it.
//!
//! Runs on whichever CPU goes round first after somebody called. A guest is buried only when no CPU has any
//! of its registers, so its tables and VMID have no user left; it stays in the list until that is done.

use alloc::sync::Arc;

use crate::guest::create::Kept;
use crate::guest::exit::Ending;
use crate::guest::{Guest, create, table};
use crate::mm;
use vmobject::lock::Held;

use super::fork::inherit_limit;
use super::load::Cpu;
use super::{Outside, WAITERS, errands, launch_again, take_interrupts};

/// How many guests are buried in one go (invariant I6).
const MAX_BURIALS: usize = 4;

/// Makes a guest once more, of the same family, and lets it run in place of the one that asked for a reset; false if
/// that cannot be, or was killed meanwhile.
fn begin_again(old: &Arc<Guest>, cpu: &Cpu, outside: &dyn Outside, held: &mut Held<'_, 0>) -> bool {
    let (id, config) = (old.id, old.config.clone());
    if config.stored && !config.disks.is_empty() {
        // By their names it would get what happens to be called so here.
        log::error!(
            "guest {id}: cannot start again: it was stored, and its disks are those of the machine it came from"
        );
        return false;
    }
    let kept = Kept { log: old.log.clone(), birth: old.birth.clone() };
    let poll = |held: &mut Held<'_, 0>| take_interrupts(cpu, outside, held);
    // It needs what it has just given back; where the heap is full, its vCPUs wait for more.
    let guest = match mm::vitally(|| create::create(id, config, Some(kept), &poll, held)) {
        Ok(guest) => guest,
        Err(error) => {
            log::error!("guest {id}: cannot start again: {error}");
            return false;
        }
    };
    inherit_limit(old.map.limit(), &guest, held);
    match launch_again(guest, held) {
        Ok(()) => true,
        Err(guest) => {
            create::destroy(&guest, held);
            false
        }
    }
}

/// Does what there is to do.
pub(super) fn work(cpu: &Cpu, outside: &dyn Outside, held: &mut Held<'_, 0>) {
    for _ in 0..MAX_BURIALS {
        let Some(guest) = table::claim_ended(held) else { return };
        let id = guest.id;
        WAITERS.forget(|entry| entry.guest.id != id, held);
        errands::forget(id, held);
        log::info!("guest {} \"{}\": ended: {}", id, guest.name(), guest.ending().name());
        take_interrupts(cpu, outside, held);
        create::destroy(&guest, held);
        take_interrupts(cpu, outside, held);
        super::memory_freed(held);
        // Who is killed while it begins again does not, after all.
        if guest.ending() != Ending::Reset || !begin_again(&guest, cpu, outside, held) {
            table::remove(id, held);
        }
        if table::is_empty(held) {
            outside.last_guest_ended();
        }
    }
    super::CHORES.store(true, core::sync::atomic::Ordering::SeqCst);
}
