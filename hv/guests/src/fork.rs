//! Forks itself, and looks at every relative's memory: each sees what was written before the fork, and nobody sees what
//! another wrote after it.
//!
//! Parent, two children and a grandchild. Each has a pattern in every page, a place in the family, random bytes and a
//! generation id of its own; in all patterns is a number that the first one drew before it forked, and that is nowhere
//! but in its memory. They look once more when a line is typed, after all have written.
//! Options: `pages=512`, and `granted`, without which a fork must be refused. With `often` it only forks, with `sparse` after a
//! page of each 2 MiB: all tables that there can be. With `bomb` it forks for ever, and so do its children, and says when
//! it was refused `refusals=1000` times in a row.

use core::sync::atomic::{AtomicU64, Ordering};

use hv_abi::call::{status, vendor};
use hv_abi::machine::{INTID_VMGENID, RAM_BASE, VMGENID};

use crate::memory::{peek, poke};
use crate::power::hvc;
use crate::runtime::Machine;
use crate::{console, gic, mmu, timer};

const PAGE: u64 = 4096;
/// Where the pages are: above the image.
const START: u64 = RAM_BASE + 0x20_0000;
/// More pages, in which nobody writes before a grandchild has read them.
const QUIET: u64 = START + 0x20_0000;
/// SMCCC's TRNG_RND, 64-bit.
const TRNG_RND: u64 = 0xc400_0053;

/// What the first of the family drew. A guest that was made again from its image would not know it.
static NONCE: AtomicU64 = AtomicU64::new(0);

/// What an answer says of a relative.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    place: u64,
    of: u64,
}

/// Writes, forks, looks.
pub fn run(machine: &Machine) {
    mmu::enable();
    let pages = machine.option("pages", 512);
    assert_eq!(identity(), (0, 0), "nobody forked this guest");
    assert_eq!(ask(0), Err(status::INVALID_PARAMETERS), "no children");
    assert_eq!(ask(1 << 40), Err(status::INVALID_PARAMETERS), "more children than a number holds");
    if machine.flag("often") {
        return often(machine);
    }
    if machine.flag("bomb") {
        bomb(machine.option("refusals", 1000));
    }
    if !machine.flag("granted") {
        assert_eq!(ask(1), Err(status::DENIED), "a fork that was not granted");
        return;
    }
    assert_eq!(ask(1000), Err(status::DENIED), "more children than were granted");
    NONCE.store(random(), Ordering::Relaxed);
    let mut busy = Chunk { start: START, pages, story: [0; 4] };
    let mut quiet = Chunk { start: QUIET, pages, story: [0; 4] };
    busy.write(0, 0);
    quiet.write(100, 0);
    gic::init_distributor();
    gic::init_cpu();
    gic::enable(INTID_VMGENID);
    let me = fork_and_tell(2);
    busy.check();
    busy.write(1 + me.place, 1);
    busy.check();
    // Pages that nobody but one relative writes: the others must not see it.
    let depth = if me.place == 1 {
        let grandchild = fork_and_tell(1);
        busy.check();
        busy.write(10 + grandchild.place, 2);
        grandchild.place
    } else {
        0
    };
    busy.check();
    quiet.check();
    quiet.write(101 + me.place * 2 + depth, 1);
    let nonce = NONCE.load(Ordering::Relaxed);
    println!(
        "fork: place {} depth {depth} of {} nonce {nonce:#x} random {:#x} ready",
        me.place,
        me.of,
        random()
    );
    while console::read() != b'\r' {}
    busy.check();
    quiet.check();
}

/// Touches all of its RAM, then forks a child that ends at once, again and again.
fn often(machine: &Machine) {
    let (_, end) = machine.image();
    let step = if machine.flag("sparse") { 2 << 20 } else { 4096 };
    for page in (end.max(START)..machine.end()).step_by(step) {
        poke(page, page);
    }
    for round in 0..16 {
        let start = timer::now();
        if fork(1, ask).place == 1 {
            return;
        }
        println!("fork: round {round} {} ticks", timer::now() - start);
    }
}

/// Forks for ever, into one child or into some, and so does each child. It has pages of its own meanwhile.
fn bomb(refusals: u64) -> ! {
    const PAGES: u64 = 64;
    let (mut refused, mut children) = (0, 0);
    let mut round: u64 = 0;
    loop {
        poke(START + round % PAGES * PAGE, round);
        match ask(1 + round % 3) {
            Ok(Place { place: 0, of }) => (refused, children) = (0, children + of),
            Ok(_) => (refused, children) = (0, 0),
            Err(status::DENIED) => {
                refused += 1;
                if refused == refusals {
                    println!("fork: {children} children, refused {refused} times");
                }
            }
            Err(error) => panic!("the fork answers {error}"),
        }
        assert_eq!(peek(START + round % PAGES * PAGE), round, "what was written before the fork");
        round += 1;
    }
}

/// Pages, and what was written there in each round.
struct Chunk {
    start: u64,
    pages: u64,
    story: [u64; 4],
}

impl Chunk {
    /// Fills all pages in round 0, later every third, beginning at `round`, and remembers what with.
    fn write(&mut self, value: u64, round: usize) {
        self.story[round] = value + 1;
        let step = if round == 0 { 1 } else { 3 };
        for page in (round as u64..self.pages).step_by(step) {
            poke(self.start + page * PAGE, pattern(page, value, round));
            poke(self.start + page * PAGE + PAGE - 8, !pattern(page, value, round));
        }
    }

    /// Every page must hold what the last round that wrote it left there.
    fn check(&self) {
        for page in 0..self.pages {
            let wrote = |round: usize| {
                self.story[round] != 0
                    && (round == 0 || (page >= round as u64 && (page - round as u64).is_multiple_of(3)))
            };
            let round = (0..self.story.len()).rev().find(|&round| wrote(round)).unwrap_or(0);
            let expected = pattern(page, self.story[round] - 1, round);
            let at = self.start + page * PAGE;
            assert_eq!(peek(at), expected, "the start of page {page} at {at:#x}");
            assert_eq!(peek(at + PAGE - 8), !expected, "the end of page {page} at {at:#x}");
            assert_eq!(peek(at + PAGE / 2), 0, "the middle of page {page} at {at:#x}");
        }
    }
}

fn pattern(page: u64, value: u64, round: usize) -> u64 {
    (page + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ value << 8 ^ round as u64 ^ NONCE.load(Ordering::Relaxed)
}

fn ask(count: u64) -> Result<Place, i64> {
    mark!(BEGIN);
    let [answer, place, of, _] = hvc(vendor::FORK.into(), [count, 0, 0]);
    mark!(END);
    said(answer, place, of)
}

fn said(answer: u64, place: u64, of: u64) -> Result<Place, i64> {
    match answer.cast_signed() {
        status::SUCCESS => Ok(Place { place, of }),
        error => Err(error),
    }
}

/// The same, and whether an interrupt waits before the first instruction that follows. They are masked.
fn ask_and_look(count: u64) -> (Result<Place, i64>, bool) {
    const IRQ: u64 = 1 << 7;
    let (mut x0, mut x1): (u64, u64) = (vendor::FORK.into(), count);
    let (of, waits): (u64, u64);
    // SAFETY: SMCCC lets a call change X0 to X17, and memory.
    unsafe {
        core::arch::asm!("hvc #0", "mrs x3, isr_el1", inout("x0") x0, inout("x1") x1, inout("x2") 0_u64 => of,
            inout("x3") 0_u64 => waits, clobber_abi("C"), options(nostack));
    };
    (said(x0, x1, of), waits & IRQ != 0)
}

/// Forks; a family may not do so too often, so it asks until it may.
fn fork(count: u64, mut ask: impl FnMut(u64) -> Result<Place, i64>) -> Place {
    loop {
        match ask(count) {
            Ok(place) => {
                assert_eq!(place.of, count, "as many as were asked for");
                assert!(
                    place.place == 0 || identity() == (place.place, place.of),
                    "the call and the guest differ"
                );
                return place;
            }
            Err(status::DENIED) => {
                timer::wait_until(1, || false);
            }
            Err(error) => panic!("the fork answers {error}"),
        }
    }
}

/// The same: a child is told that it is another before it does anything, and its parent is not.
fn fork_and_tell(count: u64) -> Place {
    let (id, mut told) = (generation(), false);
    let place = fork(count, |count| {
        let (answer, waits) = ask_and_look(count);
        told = waits;
        answer
    });
    let (child, pending) = (place.place != 0, gic::is_pending(INTID_VMGENID));
    assert!(told == child && pending == child, "{place:?}: an interrupt waited: {told}, and does: {pending}");
    assert!((id != generation()) == child, "{place:?} has the wrong generation id");
    gic::unpend(INTID_VMGENID);
    place
}

fn identity() -> (u64, u64) {
    let [answer, id, place, of] = hvc(vendor::IDENTITY.into(), [0; 3]);
    assert_eq!((answer.cast_signed(), id == 0), (status::SUCCESS, false));
    (place, of)
}

fn generation() -> [u64; 2] {
    [peek(VMGENID.base), peek(VMGENID.base + 8)]
}

fn random() -> u64 {
    let [answer, _, _, word] = hvc(TRNG_RND, [64, 0, 0]);
    assert_eq!(answer, 0, "TRNG_RND");
    word
}
