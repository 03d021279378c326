//! What a guest's virtio devices have to do, a piece at a time.
//!
//! A driver's notification, a finished transfer and a person's wish each leave a note in [`Work`]; a vCPU of the guest
//! takes it and calls [`step`] until there is nothing. Nothing here waits: a piece that would have to says for what.
//! Called by `sched::errands`. Calls `disks`, `balloon` and `rng`.

use core::sync::atomic::{AtomicBool, Ordering};

use vmobject::fault::WaitFor;
use vmobject::lock::Held;

use super::{Guest, balloon, disks, rank, rng};

/// Whether a guest's virtio devices have something to do. Set by whoever knows of something, taken by whoever does it.
#[derive(Debug, Default)]
pub struct Work {
    wanted: AtomicBool,
    /// What was waited for may have happened.
    woken: AtomicBool,
    /// Something is waited for.
    waits: AtomicBool,
}

impl Work {
    /// There may be something.
    pub fn want(&self) {
        self.wanted.store(true, Ordering::SeqCst);
    }

    /// There may be something that waited before.
    pub fn wake(&self) {
        self.woken.store(true, Ordering::SeqCst);
        self.want();
    }

    /// Takes the wish: whoever does looks until there is nothing, or wishes again.
    pub fn take(&self) -> bool {
        self.is_wanted() && self.wanted.swap(false, Ordering::SeqCst)
    }

    /// True when there may be something to do.
    pub fn is_wanted(&self) -> bool {
        self.wanted.load(Ordering::Relaxed)
    }

    /// True while something is waited for.
    pub fn waits(&self) -> bool {
        self.waits.load(Ordering::Relaxed)
    }
}

/// What one step came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Something was done, and these vCPUs have something to look at.
    Done(u64),
    /// There is nothing to do.
    Nothing,
    /// A request of a device waits; there may be others.
    Wait {
        /// Which device, by its transport.
        device: usize,
        /// Which of its requests.
        slot: usize,
        /// For what.
        what: WaitFor,
    },
}

/// Does one piece of work of a guest's devices; see each.
pub fn step(guest: &Guest, held: &mut Held<'_, { rank::VCPU }>) -> Step {
    let (mut devices, mut held) = guest.devices.lock(held);
    if guest.work.woken.swap(false, Ordering::SeqCst) {
        guest.work.waits.store(false, Ordering::SeqCst);
        devices.disks.iter_mut().for_each(|disk| disk.blk.wake());
        devices.balloon.wake();
        devices.rng.wake();
    }
    let step = [disks::step, balloon::step, rng::step]
        .into_iter()
        .map(|step| step(guest, &mut devices, &mut held))
        .find(|step| *step != Step::Nothing)
        .unwrap_or(Step::Nothing);
    if matches!(step, Step::Wait { .. }) {
        guest.work.waits.store(true, Ordering::SeqCst);
    }
    step
}
