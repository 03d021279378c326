//! A balloon's driver: what it gives back reads as zero and nothing else does, in this guest alone; and one that names
//! what is not its own, which gains nothing by it.
//!
//! With `fork` (and the right to) it forks first: the child gives everything back that it shares with its parent, and
//! the parent, who waits meanwhile, finds all that it had. Options: `count=400` wrong things to do, `seed=1`.

use hv_abi::call::{status, vendor};
use hv_abi::machine::{
    FLASH0, FLASH1, GICD, INTID_VIRTUAL_TIMER, PL011, RAM_BASE, RAM_LIMIT, VIRTIO_SLOTS, VMGENID,
};

use crate::memory::{peek, poke};
use crate::power::hvc;
use crate::runtime::{Machine, Random};
use crate::timer::{self, milliseconds};
use crate::virtio::{NEEDS_RESET, Queue, STATUS, Transport, low};
use crate::{console, gic, mmu};

/// The device: in the last transport.
const BALLOON: Transport = Transport::new(VIRTIO_SLOTS as u64 - 1);
const REPORTING: u32 = 1 << 5;
const PAGE: u64 = 4096;
/// Pages of the arena: what is given back or kept.
const PAGES: u64 = 256;
/// For how long the parent waits for its child.
const ASLEEP_MS: u64 = 500;

/// Where things are.
struct Arena {
    /// The first of the pages.
    base: u64,
    /// Rings, and the list of page numbers.
    rings: u64,
}

fn pattern(page: u64, place: u64) -> u64 {
    (page * PAGE + place).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1
}

impl Arena {
    fn page(&self, number: u64) -> u64 {
        self.base + number * PAGE
    }

    fn fill(&self) {
        for number in 0..PAGES {
            for place in (0..PAGE).step_by(512) {
                poke(self.page(number) + place, pattern(number, place));
            }
        }
    }

    /// Each page is as it was filled, or zero where it was given back.
    fn check(&self, gone: impl Fn(u64) -> bool) {
        for number in 0..PAGES {
            for place in (0..PAGE).step_by(512) {
                let (found, filled) = (peek(self.page(number) + place), pattern(number, place));
                let wanted = if gone(number) { 0 } else { filled };
                assert_eq!(found, wanted, "page {number} + {place:#x}");
            }
        }
    }

    /// The queues into the balloon and of reports, after a reset.
    fn queues(&self) -> [Queue; 2] {
        BALLOON.begin(REPORTING);
        // Without statistics the third of its queues is that of reports.
        let queues =
            [(0, 0), (2, 1)].map(|(number, page)| Queue::new(BALLOON, number, self.rings + page * PAGE));
        BALLOON.go();
        queues
    }

    /// Puts pages with these numbers into the balloon; false when the device gives up.
    fn inflate(&self, queue: &mut Queue, numbers: impl Iterator<Item = u64>) -> bool {
        let list = self.rings + 4 * PAGE;
        let mut bytes = 0;
        for number in numbers {
            crate::mmio::write32(list + bytes, low(number));
            bytes += 4;
        }
        queue.offer(list, low(bytes), false);
        queue.is_served()
    }

    /// Gives back by the rules, and looks at everything.
    fn is_served(&self) {
        let [mut inflate, mut report] = self.queues();
        self.fill();
        let odd = (0..PAGES / 2).rev().filter(|number| number % 3 == 1);
        assert!(self.inflate(&mut inflate, odd.map(|number| self.page(number) / PAGE)), "a list of pages");
        let (from, to) = (PAGES / 2 + 3, PAGES - 5);
        report.offer(self.page(from), low((to - from) * PAGE), true);
        assert!(report.is_served(), "a report");
        self.check(|number| if number < PAGES / 2 { number % 3 == 1 } else { (from..to).contains(&number) });
        // They can be used again at once.
        self.fill();
        self.check(|_| false);
    }
}

/// One thing that no driver does: whether the device gave up.
fn mischief(arena: &Arena, random: &mut Random) -> bool {
    let [mut inflate, mut report] = arena.queues();
    let beyond = RAM_BASE + RAM_LIMIT;
    let place = match random.below(6) {
        0 => beyond + random.below(1 << 30),
        1 => [FLASH0, FLASH1, GICD, PL011, VMGENID][usize::from(random.draw().to_le_bytes()[3]) % 5].base,
        2 => random.draw(),
        3 => RAM_BASE - PAGE,
        4 => u64::MAX - random.below(PAGE),
        _ => beyond - PAGE,
    };
    match random.below(4) {
        0 => !arena.inflate(&mut inflate, core::iter::once(place / PAGE)),
        1 => {
            report.offer(place & !(PAGE - 1), low(random.below(64) * PAGE + PAGE), true);
            !report.is_served()
        }
        2 => {
            // A list where there is none.
            inflate.offer(place, 64, false);
            !inflate.is_served()
        }
        _ => {
            for _ in 0..16 {
                BALLOON.set(random.below(0x50) * 4, low(random.draw()));
            }
            BALLOON.get(STATUS) & NEEDS_RESET != 0
        }
    }
}

/// All of it.
pub fn run(machine: &Machine) {
    mmu::enable();
    assert_eq!((BALLOON.get(0), BALLOON.get(4), BALLOON.get(8)), (0x7472_6976, 2, 5), "there is no balloon");
    let base = (RAM_BASE + machine.memory / 2).next_multiple_of(1 << 21);
    let arena = Arena { base, rings: base + PAGES * PAGE };
    if machine.flag("fork") {
        forked(&arena);
        return;
    }
    arena.is_served();
    let mut random = Random::new(machine.option("seed", 1));
    let mut gave_up = 0;
    for _ in 0..machine.option("count", 400) {
        gave_up += u64::from(mischief(&arena, &mut random));
    }
    arena.check(|_| false);
    arena.is_served();
    assert!(gave_up > 20, "nothing that was done was wrong enough: {gave_up}");
    println!("given back and kept, {gave_up} times wrong");
}

fn forked(arena: &Arena) {
    gic::init_distributor();
    gic::init_cpu();
    gic::enable(INTID_VIRTUAL_TIMER);
    arena.fill();
    let [answer, place, ..] = hvc(vendor::FORK.into(), [1, 0, 0]);
    assert_eq!(answer.cast_signed(), status::SUCCESS, "the fork");
    if place == 1 {
        let [mut inflate, mut report] = arena.queues();
        let half = (0..PAGES / 2).map(|number| arena.page(number) / PAGE);
        assert!(arena.inflate(&mut inflate, half), "a list of pages");
        report.offer(arena.page(PAGES / 2), low(PAGES / 2 * PAGE), true);
        assert!(report.is_served(), "a report");
        arena.check(|_| true);
        println!("balloon: the child has nothing");
        console::read();
        return;
    }
    let end = timer::now() + milliseconds(ASLEEP_MS);
    timer::arm(end);
    while timer::now() < end {
        instruction!("wfi");
    }
    arena.check(|_| false);
    println!("balloon: the parent has everything");
    console::read();
}
