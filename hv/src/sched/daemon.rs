//! Chores that no vCPU pays for: burying guests that ended, and starting again those that asked for it.
//!
//! Runs on whichever CPU goes round first after somebody called. A guest is buried only when no CPU has any
//! of its registers, so its tables and VMID have no user left; it stays in the list until that is done.

use crate::guest::exit::Ending;
use crate::guest::{create, table};
use vmobject::lock::Held;

use super::fork::inherit_limit;
use super::load::Cpu;
use super::{Outside, WAITERS, errands, launch_again, take_interrupts};

/// How many guests are buried in one go (invariant I6).
const MAX_BURIALS: usize = 4;

/// Does what there is to do.
pub(super) fn work(cpu: &Cpu, outside: &dyn Outside, held: &mut Held<'_, 0>) {
    for _ in 0..MAX_BURIALS {
        let Some(guest) = table::claim_ended(held) else { return };
        let (id, ending) = (guest.id, guest.ending());
        WAITERS.forget(|entry| entry.guest.id != id, held);
        errands::forget(id, held);
        log::info!("guest {} \"{}\": ended: {}", id, guest.name(), ending.name());
        let config = guest.config.clone();
        let log = guest.log.clone();
        let limit = guest.map.limit();
        take_interrupts(cpu, outside, held);
        create::destroy(guest, held);
        take_interrupts(cpu, outside, held);
        super::memory_freed(held);
        let again = (ending == Ending::Reset).then(|| {
            create::create(id, config, Some(log), &|held| take_interrupts(cpu, outside, held), held)
        });
        match again {
            Some(Ok(guest)) => {
                inherit_limit(limit, &guest, held);
                launch_again(guest, held);
            }
            Some(Err(error)) => {
                log::error!("guest {id}: cannot start again: {error}");
                table::remove(id, held);
            }
            None => table::remove(id, held),
        }
        if table::is_empty(held) {
            outside.last_guest_ended();
        }
    }
    super::CHORES.store(true, core::sync::atomic::Ordering::SeqCst);
}
