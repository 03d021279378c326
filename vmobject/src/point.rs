//! Points where another CPU may come in between.
//!
//! With the feature `points` a test says what happens at each of them: it lets a scheduler of its own choose who goes on,
//! so that interleavings are tried which the host's threads never come to. Without it a point is nothing, and whoever waits
//! for a lock spins. Points are before every lock is taken, and where an atomic is read or written that another CPU
//! decides by without a lock. Called by `lock`, `page`, `object`.

#[cfg(feature = "points")]
use spin::Once;

/// What a point is for whoever comes to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Point {
    /// He could go on.
    Free,
    /// He cannot before somebody else has gone on.
    Blocked,
}

#[cfg(feature = "points")]
static HOOK: Once<fn(Point)> = Once::new();

/// From now on this happens at each point; the first call says what, for good.
#[cfg(feature = "points")]
pub fn set_hook(hook: fn(Point)) {
    HOOK.call_once(|| hook);
}

#[cfg(feature = "points")]
fn pass(point: Point) {
    if let Some(hook) = HOOK.get() {
        hook(point);
    }
}

/// Another CPU may come in between here.
#[inline]
pub(crate) fn here() {
    #[cfg(feature = "points")]
    pass(Point::Free);
}

/// Whoever calls this cannot go on before somebody else has.
#[inline]
pub(crate) fn blocked() {
    #[cfg(feature = "points")]
    pass(Point::Blocked);
    core::hint::spin_loop();
}

/// Takes a lock: by trying, where there are points, and else by waiting.
#[cfg(feature = "points")]
pub(crate) fn take<G>(mut attempt: impl FnMut() -> Option<G>, _wait: impl FnOnce() -> G) -> G {
    here();
    loop {
        if let Some(guard) = attempt() {
            return guard;
        }
        blocked();
    }
}

/// Takes a lock: by trying, where there are points, and else by waiting.
#[cfg(not(feature = "points"))]
#[inline]
pub(crate) fn take<G>(_attempt: impl FnMut() -> Option<G>, wait: impl FnOnce() -> G) -> G {
    wait()
}
