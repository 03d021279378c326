//! Leaving well: whichever way we end, the terminal is as it was and no QEMU stays behind.
//!
//! A normal end runs destructors, [`Terminal`]'s and [`Kept`]'s. A signal does not: [`watch`] starts a thread that
//! takes those that mean the end, does the same work and exits as a shell expects, with 128 and the signal.

use anyhow::{Context, Result};
use rustix::fd::OwnedFd;
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::collections::BTreeMap;
use std::io::{IsTerminal, stdin};
use std::ops::{Deref, DerefMut};
use std::process::{Child, Command};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

/// What runs on our behalf, by its number.
static RUNNING: Mutex<BTreeMap<u32, OwnedFd>> = Mutex::new(BTreeMap::new());
/// How the terminal was, while it is not so: its settings, and whether reads from it wait.
static TERMINAL: Mutex<Option<(Termios, OFlags)>> = Mutex::new(None);
/// Ctrl-C is for the program in the foreground.
static INTERRUPTS_ARE_NOT_OURS: AtomicBool = AtomicBool::new(false);

fn lock<T>(what: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    what.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Takes the signals that mean the end, from now on.
pub(crate) fn watch() -> Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).context("watching for signals")?;
    std::thread::spawn(move || {
        for signal in signals.forever() {
            if signal == SIGINT && INTERRUPTS_ARE_NOT_OURS.load(Ordering::Relaxed) {
                continue;
            }
            for process in lock(&RUNNING).values() {
                // What is gone already need not go.
                let _ = pidfd_send_signal(process, Signal::KILL);
            }
            restore();
            std::process::exit(128 + signal);
        }
    });
    Ok(())
}

/// Ctrl-C no longer ends us: a debugger in the foreground wants it.
pub(crate) fn leave_interrupts() {
    INTERRUPTS_ARE_NOT_OURS.store(true, Ordering::Relaxed);
}

/// A program that does not outlive us, nor this value.
pub(crate) struct Kept(Child);

impl Kept {
    /// Starts it.
    pub(crate) fn start(command: &mut Command) -> Result<Self> {
        let program = command.get_program().to_string_lossy().into_owned();
        let child = command.spawn().with_context(|| format!("starting {program}"))?;
        let process = pidfd_open(Pid::from_child(&child), PidfdFlags::empty());
        let kept = Self(child);
        lock(&RUNNING).insert(kept.id(), process.with_context(|| format!("watching {program}"))?);
        Ok(kept)
    }
}

impl Deref for Kept {
    type Target = Child;
    fn deref(&self) -> &Child {
        &self.0
    }
}

impl DerefMut for Kept {
    fn deref_mut(&mut self) -> &mut Child {
        &mut self.0
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        // It may have ended by itself; either way it is gone.
        let _ = self.0.kill();
        let _ = self.0.wait();
        lock(&RUNNING).remove(&self.0.id());
    }
}

/// Our terminal, lent to a program that changes it.
pub(crate) struct Terminal(());

impl Terminal {
    /// Remembers how it is; `None` where standard input is none.
    pub(crate) fn lend() -> Option<Self> {
        let stdin = stdin();
        if !stdin.is_terminal() {
            return None;
        }
        let was = (tcgetattr(&stdin).ok()?, fcntl_getfl(&stdin).ok()?);
        *lock(&TERMINAL) = Some(was);
        Some(Self(()))
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        restore();
    }
}

/// Makes the terminal as it was when it was lent.
fn restore() {
    if let Some((settings, flags)) = lock(&TERMINAL).take() {
        // A terminal that is gone needs nothing.
        let _ = tcsetattr(stdin(), OptionalActions::Now, &settings);
        let _ = fcntl_setfl(stdin(), flags);
    }
}
