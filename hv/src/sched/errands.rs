//! The work of guests' virtio devices, done by their own vCPUs: so it is charged to their slices (invariant I17).
//!
//! A vCPU that is about to enter its guest does what there is to do first, a page at a time. What has to wait is
//! noted here, and the completion has a vCPU come back to it; the guest runs meanwhile. As with vCPUs, every entry
//! is only a hint: a stale one brings a vCPU to look once for nothing. Called by `slice` and by completions.

use alloc::sync::Arc;

use super::load::Cpu;
use super::wait::Waiters;
use super::{wake, wake_many};
use crate::guest::exit::Waiting;
use crate::guest::vcpu::{State, VcpuRef};
use crate::guest::work::{Step, step};
use crate::guest::{Guest, GuestId, rank};
use vmobject::fault::WaitFor;
use vmobject::lock::Held;
use vmobject::store::IoToken;

/// A request of a device that waits.
#[derive(Clone)]
struct Errand {
    guest: Arc<Guest>,
    device: usize,
    slot: usize,
}

impl PartialEq for Errand {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.guest, &other.guest) && (self.device, self.slot) == (other.device, other.slot)
    }
}

static ERRANDS: Waiters<Errand> = Waiters::new();

/// Does one piece of work of a guest's devices on behalf of its vCPU; false when there is none now.
pub(super) fn run(cpu: &mut Cpu, entry: &VcpuRef, held: &mut Held<'_, { rank::VCPU }>) -> bool {
    let guest = &entry.guest;
    match step(guest, held) {
        Step::Nothing => false,
        Step::Done(kicks) => {
            let mine = 1 << entry.vcpu().index;
            cpu.flush |= kicks & mine != 0;
            wake_many(guest, kicks & !mine, held);
            true
        }
        Step::Wait { device, slot, what } => {
            let waiting = match what {
                WaitFor::Io(token) => Waiting::Io(token),
                WaitFor::Memory => Waiting::Memory,
                WaitFor::Turn => {
                    guest.work.wake();
                    return true;
                }
            };
            ERRANDS.add(waiting, &Errand { guest: guest.clone(), device, slot }, held);
            // Look once more now that a completion would find us: it may have come before.
            if matches!(what, WaitFor::Io(token) if !crate::mm::vm().in_flight(token)) {
                guest.work.wake();
            }
            true
        }
    }
}

/// A transfer is finished.
pub(super) fn io_done<const R: u8>(token: IoToken, held: &mut Held<'_, R>) {
    const { assert!(R < rank::WAITERS) };
    while let Some(errand) = ERRANDS.take_io(token, held) {
        resume(&errand.guest, held);
    }
}

/// Frames became free.
pub(super) fn memory_freed<const R: u8>(held: &mut Held<'_, R>) {
    const { assert!(R < rank::WAITERS) };
    while let Some(errand) = ERRANDS.take_memory(held) {
        resume(&errand.guest, held);
    }
}

/// Has one of a guest's vCPUs come to do its devices' work.
pub(super) fn resume<const R: u8>(guest: &Arc<Guest>, held: &mut Held<'_, R>) {
    const { assert!(R < rank::SCHED) };
    guest.work.wake();
    if let Some(index) = guest.vcpus.iter().position(|vcpu| vcpu.state() != State::Off)
        && let Some(entry) = VcpuRef::new(guest, index)
    {
        wake(&entry, held);
    }
}

/// Forgets the requests of a guest.
pub(super) fn forget<const R: u8>(guest: GuestId, held: &mut Held<'_, R>) {
    const { assert!(R < rank::WAITERS) };
    ERRANDS.forget(|errand| errand.guest.id != guest, held);
}
