//! Taking frames from guests that have more than their limit, whether or not memory is short.
//!
//! A clock for each such guest: its hand goes round its own pages. One that was not used since the hand came by last
//! loses its leaves and goes to the laundry, where it waits for a cluster; one that was used has until the next round.
//! A guest that is held up at its faults cannot use again what it lost, so two rounds find something even where
//! all is in use all the time. Nobody else's pages are looked at. Called by `pageout`.

use alloc::sync::Arc;

use super::sweep::Aim;
use super::{Daemon, LAUNDERING, PagedOut};
use crate::Vm;
use crate::limits::CLUSTER_PAGES;
use crate::lock::{CALLER, Held};
use crate::map::{Map, Next};
use crate::page::Queue;
use crate::store::Machine;

/// Transfers for which pageout makes room under a limit; at less than one the guest is held up.
const ROOM: u32 = 2;

/// Where the clocks are.
#[derive(Default)]
pub(super) struct Clocks {
    /// Whose turn it is, by the place in the list of those with limits.
    turn: usize,
    /// Pages that were looked at since something went.
    vain: u32,
    /// Guests in a row that could give nothing.
    given_up: usize,
}

impl<M: Machine> Vm<M> {
    /// Takes from guests that have too much what they have too much, as far as `left` goes.
    pub(super) fn collect(
        &self,
        daemon: &mut Daemon,
        left: &mut u32,
        done: &mut PagedOut,
        held: &mut Held<'_, CALLER>,
    ) {
        while *left > 0 {
            if let Some(sweep) = daemon.hand.take() {
                let (frame, freed) = (sweep.frame, done.freed);
                self.go_on(daemon, sweep, left, done, held);
                let page = self.frames.page(frame);
                if done.freed > freed || page.queue() == Queue::Laundry {
                    (daemon.clocks.vain, daemon.clocks.given_up) = (0, 0);
                } else if sweep.aim == Aim::Age && page.queue() == Queue::Inactive {
                    // The hand has been here before, and it was not used since.
                    daemon.hand = self.set_out(frame, Aim::Unmap, held);
                }
                continue;
            }
            let Some((map, excess)) = self.payer(daemon, held) else { return };
            let laundry = self.frames.lengths(held).laundry;
            if self.can_write(daemon, held) && (laundry >= CLUSTER_PAGES || excess <= laundry) {
                *left = left.saturating_sub(LAUNDERING);
                let laundered = self.launder(held);
                self.account(daemon, laundered, done, held);
                continue;
            }
            *left -= 1;
            let all = self.own_frames(&map, held);
            if daemon.clocks.vain > 4 * all + CLUSTER_PAGES {
                // Nothing of it can go now. It is tried again when it comes back and is held up.
                let clocks = &mut daemon.clocks;
                (clocks.vain, clocks.turn) = (0, clocks.turn.wrapping_add(1));
                clocks.given_up += 1;
                if clocks.given_up >= self.limited.at(0, held).1 {
                    clocks.given_up = 0;
                    // What only waits for a store is not given up.
                    self.limited.ask(!self.can_write(daemon, held));
                    return;
                }
                continue;
            }
            match self.next_own(&map, left, held) {
                Next::More => break,
                Next::End => {}
                Next::Frame(frame) => {
                    daemon.clocks.vain += 1;
                    let queue = self.frames.page(frame).queue();
                    if !matches!(queue, Queue::Active | Queue::Inactive)
                        || map.is_needed(frame)
                        || !self.is_evictable(frame, held)
                    {
                        continue;
                    }
                    let spared = queue == Queue::Active && daemon.clocks.vain <= 2 * all;
                    daemon.hand = self.set_out(frame, if spared { Aim::Age } else { Aim::Unmap }, held);
                }
            }
        }
        done.more = true;
    }

    /// A guest that has too much, and how much that is without what leaves already.
    fn payer(&self, daemon: &mut Daemon, held: &mut Held<'_, CALLER>) -> Option<(Arc<Map<M>>, u32)> {
        // Before the look: who asks later is not forgotten.
        self.limited.ask(false);
        let (_, count) = self.limited.at(0, held);
        for _ in 0..count {
            let (map, _) = self.limited.at(daemon.clocks.turn, held);
            if let Some(map) = map {
                let excess = self.excess(&map, ROOM, held);
                if excess > 0 {
                    self.limited.ask(true);
                    let more = excess.saturating_sub(self.own_leaving(&map, held));
                    if more > 0 {
                        return Some((map, more));
                    }
                }
            }
            daemon.clocks.turn = daemon.clocks.turn.wrapping_add(1);
            daemon.clocks.vain = 0;
        }
        None
    }
}
