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
    /// The first of those in a row that could give nothing, by its number.
    given_up: Option<u32>,
    /// Nobody can give anything before more transfers than these have ended.
    waits: Option<u64>,
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
                    (daemon.clocks.vain, daemon.clocks.given_up) = (0, None);
                } else if sweep.aim == Aim::Age && page.queue() == Queue::Inactive {
                    // The hand has been here before, and it was not used since.
                    daemon.hand = self.set_out(frame, Aim::Unmap, held);
                }
                continue;
            }
            let Some((map, excess)) = self.payer(daemon, held) else { return };
            let laundry = self.frames.lengths(held).laundry;
            let can_write = self.can_write(daemon, held);
            // More would only lose its leaves.
            let enough = laundry >= CLUSTER_PAGES || excess <= laundry;
            let ended = self.transfers.ended(held);
            daemon.clocks.waits = daemon.clocks.waits.filter(|&known| enough && known == ended);
            if enough && can_write {
                *left = left.saturating_sub(LAUNDERING);
                let laundered = self.launder(held);
                self.account(daemon, laundered, done, held);
                continue;
            }
            if daemon.clocks.waits.is_some() {
                return;
            }
            *left -= 1;
            let all = self.own_frames(&map, held);
            // What is clean is found in one round, what is not used in two of two.
            let rounds = if enough { 1 } else { 4 };
            if daemon.clocks.vain > rounds * all + CLUSTER_PAGES {
                // Nothing of it can go now.
                let clocks = &mut daemon.clocks;
                (clocks.vain, clocks.turn) = (0, clocks.turn.wrapping_add(1));
                let first = *clocks.given_up.get_or_insert(map.number());
                let others = self.payer(daemon, held).is_some_and(|(next, _)| next.number() != first);
                if !others {
                    daemon.clocks.given_up = None;
                    // It is tried again when the guest comes back and is held up, or when the store takes something.
                    daemon.clocks.waits = enough.then_some(ended);
                    self.limited.ask(enough);
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
                        || enough && !self.frames.page(frame).has_clean_slot()
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
