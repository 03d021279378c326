//! A quiet moment: every other CPU waits in its main loop while one looks at everything.
//!
//! For audits, whose answer is exact only while nothing moves. Guests stand still meanwhile, so it is for what
//! a person asks for and never for what a guest does. A CPU that does not come within the bound (it makes a
//! guest, and waits for a disk) calls it off.

use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crate::arch::percpu;
use vmobject::lock::Held;

use super::{call_daemon, shake_until};

static WANTED: AtomicBool = AtomicBool::new(false);
static STANDING: AtomicUsize = AtomicUsize::new(0);

/// Waits for as long as another CPU wants quiet. No vCPU is on this CPU, and no lock is held: the caller has
/// rank 0.
#[inline]
pub(super) fn stand_by(_held: &mut Held<'_, 0>) {
    if WANTED.load(Ordering::SeqCst) {
        STANDING.fetch_add(1, Ordering::SeqCst);
        while WANTED.load(Ordering::SeqCst) {
            core::hint::spin_loop();
        }
        STANDING.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Does `work` while no other CPU does anything; `None` when that could not be had.
pub fn quietly<R>(held: &mut Held<'_, 0>, work: impl FnOnce(&mut Held<'_, 0>) -> R) -> Option<R> {
    if WANTED.swap(true, Ordering::SeqCst) {
        return None;
    }
    let others = percpu::count().saturating_sub(1);
    let came = shake_until(call_daemon, || STANDING.load(Ordering::SeqCst) >= others);
    let result = came.then(|| work(held));
    WANTED.store(false, Ordering::SeqCst);
    // Nobody may still count as standing when the next one asks.
    while STANDING.load(Ordering::SeqCst) != 0 {
        core::hint::spin_loop();
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alone_there_is_quiet_at_once_and_again() {
        let mut held = Held::root();
        for turn in 0..3 {
            assert_eq!(quietly(&mut held, |_| turn), Some(turn));
        }
        stand_by(&mut held);
    }
}
