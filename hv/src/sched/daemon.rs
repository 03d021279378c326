//! Chores that no vCPU pays for: burying guests that ended, and starting again those that asked for it.
//!
//! Runs on whichever CPU goes round first after somebody called. A guest is taken out of the list only
//! when no CPU has any of its registers, so its tables and VMID have no user left.

use crate::arch::percpu;
use crate::guest::exit::Ending;
use crate::guest::{create, table};
use vmobject::lock::Held;

use super::{Outside, WAITERS, launch};

/// How many guests are buried in one go (invariant I6).
const MAX_BURIALS: usize = 4;

/// Does what there is to do.
pub(super) fn work(outside: &dyn Outside, held: &mut Held<'_, 0>) {
    for _ in 0..MAX_BURIALS {
        let Some(guest) = table::take_ended(held) else { return };
        let (id, ending) = (guest.id, guest.ending());
        WAITERS.forget(|entry| entry.guest.id != id, held);
        log::info!("guest {} \"{}\": ended: {}", id, guest.name(), ending.name());
        let config = guest.config.clone();
        let log = guest.log.clone();
        create::destroy(guest, held);
        super::memory_freed(held);
        if ending == Ending::Reset {
            match create::create(
                id,
                config,
                Some(log),
                &|held| outside.look_around(percpu::cpu(), held),
                held,
            ) {
                Ok(guest) => launch(guest, held),
                Err(error) => log::error!("guest {id}: cannot start again: {error}"),
            }
        }
        if table::is_empty(held) {
            outside.last_guest_ended();
        }
    }
    super::CHORES.store(true, core::sync::atomic::Ordering::SeqCst);
}
