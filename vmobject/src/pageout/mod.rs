//! Pageout: frames from pages that are not used, in steps (`vm_pageout.c`).
//!
//! A page goes from the active queue to the inactive one when it was not used since the last look, from there
//! to the laundry when its leaves are gone and it was still not used, and leaves its frame when a store has
//! its contents. A page that is used on the way is active again. One page is in hand at a time, by one CPU;
//! no lock is held between two of its leaves, so a page that a thousand clones map is evicted in as many steps
//! as it takes. Guests with more than their limit pay first (`collect`). Nothing here allocates. Called by whoever has time.

mod collect;
mod launder;
mod sweep;
mod target;

use crate::Vm;
use crate::addr::Pfn;
use crate::limits::{BLOCKED_STEPS, CLUSTER_PAGES};
use crate::lock::{Alone, CALLER, Held};
use crate::object::index::Slot;
use crate::object::{Life, Pager};
use crate::page::{Owner, Queue};
use crate::stats::Event;
use crate::store::Machine;
use collect::Clocks;
use launder::Laundered;
use sweep::{Aim, Sweep, Swept};
use target::{Next, Target};

/// What a transfer out costs of a step's budget: its pages are looked through twice, for zeros and for a sum.
const LAUNDERING: u32 = 8 * CLUSTER_PAGES;
/// Steps that are left out when nothing could go and nothing is on its way: looking has a price for guests.
const PAUSE: u32 = 64;

/// What the daemon remembers between two steps.
#[derive(Default)]
struct Daemon {
    /// The page in hand.
    hand: Option<Sweep>,
    /// Memory was short and is not back at the high mark.
    working: bool,
    /// Pages looked at since the last one that went anywhere.
    fruitless: u32,
    /// Steps to leave out, after everything was looked at in vain.
    pause: u32,
    /// Steps in which nothing is written, after a store took nothing.
    blocked: u32,
    /// Transfers that had ended when either of them began: when another one has, it is over.
    ended: u64,
    /// Of guests that have too much.
    clocks: Clocks,
}

/// The pageout daemon.
pub struct Pageout {
    daemon: Alone<Daemon>,
    target: Target,
}

impl Pageout {
    /// One for so many frames, of which so many are not guests'.
    pub(crate) fn new(total: u32, reserve: u32) -> Self {
        Self { daemon: Alone::new(Daemon::default()), target: Target::new(total, reserve) }
    }
}

/// What a step of pageout did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PagedOut {
    /// Frames that became free: who waits for memory may try again.
    pub freed: u32,
    /// There is more that could be done now.
    pub more: bool,
}

impl<M: Machine> Vm<M> {
    /// Frees memory if it is short, or if a guest has more than its limit, looking at no more than `budget` pages and leaves. Does nothing while
    /// another CPU does it.
    pub fn pageout<const OUTER: u8>(&self, budget: u32, held: &mut Held<'_, OUTER>) -> PagedOut {
        let mut done = PagedOut::default();
        let Some(mut daemon) = self.pageout.daemon.enter() else { return done };
        let held: &mut Held<'_, CALLER> = &mut held.deepen();
        let mut left = budget;
        daemon.blocked = daemon.blocked.saturating_sub(1);
        if self.limited.is_asked() {
            self.collect(&mut daemon, &mut left, &mut done, held);
        }
        if daemon.pause > 0 && self.transfers.ended(held) == daemon.ended {
            daemon.pause -= 1;
            return done;
        }
        daemon.pause = 0;
        while left > 0 {
            if let Some(sweep) = daemon.hand.take() {
                self.go_on(&mut daemon, sweep, &mut left, &mut done, held);
                continue;
            }
            left -= 1;
            let next = self.next_for_pageout(&mut daemon, held);
            let queue = match next {
                Next::Rest | Next::Stuck => return done,
                Next::Launder => {
                    left = left.saturating_sub(LAUNDERING);
                    let laundered = self.launder(held);
                    self.account(&mut daemon, laundered, &mut done, held);
                    continue;
                }
                Next::Age => Queue::Active,
                Next::Evict => Queue::Inactive,
            };
            let Some(frame) = self.frames.rotate(queue, held) else { return done };
            if queue == Queue::Inactive && !self.is_evictable(frame, held) {
                self.activate(frame, held);
                daemon.fruitless += 1;
                continue;
            }
            let aim = if queue == Queue::Active { Aim::Age } else { Aim::Unmap };
            match self.set_out(frame, aim, held) {
                Some(sweep) => daemon.hand = Some(sweep),
                None => daemon.fruitless += 1,
            }
        }
        done.more = true;
        done
    }

    /// True while memory is short and pageout has something to do about it.
    #[inline]
    pub fn is_short(&self) -> bool {
        self.frames.is_short()
    }

    /// True while pageout has something to do about that, or about a guest with more than its limit.
    pub fn wants_pageout(&self) -> bool {
        self.frames.is_short() || self.limited.is_asked()
    }

    /// How many frames pageout tries to keep free: it begins when fewer than `low` are, the reserve among
    /// them, and ends when `high` are.
    pub fn set_free_target(&self, low: u32, high: u32) {
        self.pageout.target.set(low, high);
        if let Some(mut daemon) = self.pageout.daemon.enter() {
            (daemon.pause, daemon.blocked) = (0, 0);
        }
    }

    /// The page that a step of pageout left half done.
    pub(crate) fn page_in_hand(&self) -> Option<Pfn> {
        Some(self.pageout.daemon.enter()?.hand?.frame)
    }

    fn next_for_pageout(&self, daemon: &mut Daemon, held: &mut Held<'_, CALLER>) -> Next {
        let lengths = self.frames.lengths(held);
        let leaving = self.transfers.leaving(held);
        let target = &self.pageout.target;
        // What leaves is as good as free; not where there is nothing else, for it may be long on its way.
        let few = lengths.free <= self.frames.reserve().saturating_add(CLUSTER_PAGES);
        daemon.working = target.is_short(lengths.free + leaving, daemon.working)
            || few && target.is_short(lengths.free, true);
        self.frames.set_short(daemon.working);
        if !daemon.working {
            daemon.fruitless = 0;
            return Next::Rest;
        }
        let all = lengths.active + lengths.inactive + lengths.laundry;
        if daemon.fruitless > 5 * all {
            // Everything was looked at on each queue, with a second chance: nothing can go now.
            daemon.fruitless = 0;
            (daemon.pause, daemon.ended) = (PAUSE, self.transfers.ended(held));
            return Next::Stuck;
        }
        Target::next(lengths, self.can_write(daemon, held), daemon.fruitless > 3 * all)
    }

    /// False for a while after a store took nothing: what needs no store goes on.
    fn can_write(&self, daemon: &Daemon, held: &mut Held<'_, CALLER>) -> bool {
        daemon.blocked == 0 || self.transfers.ended(held) != daemon.ended
    }

    /// Goes on with the page in hand.
    fn go_on(
        &self,
        daemon: &mut Daemon,
        mut sweep: Sweep,
        left: &mut u32,
        done: &mut PagedOut,
        held: &mut Held<'_, CALLER>,
    ) {
        let swept = self.sweep(&mut sweep, left, held);
        if swept == Swept::More {
            daemon.hand = Some(sweep);
            return;
        }
        daemon.fruitless += 1;
        match sweep.aim {
            Aim::Age => self.aged(sweep.frame, held),
            Aim::Unmap => {
                let laundered = self.unmapped(sweep.frame, swept == Swept::All, held);
                self.account(daemon, laundered, done, held);
            }
        }
    }

    fn account(
        &self,
        daemon: &mut Daemon,
        laundered: Laundered,
        done: &mut PagedOut,
        held: &mut Held<'_, CALLER>,
    ) {
        match laundered {
            Laundered::Freed(frames) => {
                done.freed += frames;
                daemon.fruitless = 0;
            }
            Laundered::Leaving(_) => daemon.fruitless = 0,
            Laundered::Kept => {}
            Laundered::Blocked => {
                (daemon.blocked, daemon.ended) = (BLOCKED_STEPS, self.transfers.ended(held));
            }
        }
    }

    /// False for a page that would have to be written and for which there is no slot.
    fn is_evictable(&self, frame: Pfn, held: &mut Held<'_, CALLER>) -> bool {
        if self.frames.page(frame).clean_slot().is_some() || self.swap.info(held).free() > 0 {
            return true;
        }
        let Owner::Object(storage, _) = self.frames.page(frame).owner() else { return false };
        let Some(object) = self.objects.of_storage(storage) else { return false };
        let anonymous = object.read(held).0.pager == Pager::None;
        if anonymous {
            self.stats.count(Event::SwapFull);
        }
        !anonymous
    }

    /// Every leaf of an active page was looked at.
    fn aged(&self, frame: Pfn, held: &mut Held<'_, CALLER>) {
        self.stats.count(Event::Aged);
        let used = self.frames.page(frame).take_accessed();
        if !used {
            self.requeue(frame, Queue::Active, Queue::Inactive, held);
        }
    }

    /// Every leaf of an inactive page was removed, if `all`.
    fn unmapped(&self, frame: Pfn, all: bool, held: &mut Held<'_, CALLER>) -> Laundered {
        let resident = self.frames.page(frame);
        let Owner::Object(storage, place) = resident.owner() else { return Laundered::Kept };
        let Some(object) = self.objects.of_storage(storage) else { return Laundered::Kept };
        let (mut state, mut held) = object.write(held);
        let page = state.slots.page(place).filter(|&page| state.slots.get(page) == Slot::Resident(frame));
        let there = state.slots.storage() == storage && state.life == Life::Live;
        let Some(page) = page.filter(|_| there && !resident.is_busy() && !resident.is_wired()) else {
            resident.set_unmapped(false);
            return Laundered::Kept;
        };
        if !all || !resident.is_unmapped() || resident.take_accessed() {
            resident.set_unmapped(false);
            self.frames.enqueue(frame, Queue::Active, &mut held);
            self.stats.count(Event::Reactivated);
            return Laundered::Kept;
        }
        if self.evict_clean(&mut state, page, frame, &mut held) {
            return Laundered::Freed(1);
        }
        self.frames.enqueue(frame, Queue::Laundry, &mut held);
        Laundered::Kept
    }

    fn activate(&self, frame: Pfn, held: &mut Held<'_, CALLER>) {
        self.requeue(frame, Queue::Inactive, Queue::Active, held);
    }

    /// Moves a page that is still where it was found.
    fn requeue(&self, frame: Pfn, from: Queue, to: Queue, held: &mut Held<'_, CALLER>) {
        let page = self.frames.page(frame);
        let Owner::Object(storage, place) = page.owner() else { return };
        let Some(object) = self.objects.of_storage(storage) else { return };
        let (state, mut held) = object.write(held);
        let there = state.slots.storage() == storage && page.owner() == Owner::Object(storage, place);
        if there && page.queue() == from {
            self.frames.enqueue(frame, to, &mut held);
        }
    }
}
