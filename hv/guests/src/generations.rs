//! Lives through many generations: in each it writes a few pages, scattered over its memory, and then something
//! becomes of what it was.
//!
//! With `alone` it forks itself and the parent dies, `generations=2314` times, and the last looks at every page. Else
//! each generation begins when `w` is typed, so that whoever types it can keep what was there before; when `c` is
//! typed it looks at every page, and with `r` its machine begins again. Nothing but the pages says what must be in them:
//! the writes repeat from the number of the generation.
//! Options: `pages=16384`, `writes=8`, `talk=0` (KiB that it prints before, for whoever wants a long log).

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use hv_abi::call::{status, vendor};
use hv_abi::machine::{INTID_PL011, RAM_BASE};

use crate::memory::{peek, poke};
use crate::power::{self, hvc};
use crate::runtime::{Machine, Random};
use crate::{console, gic, mmu, timer};

const PAGE: u64 = 4096;
/// Where the pages are: above the image, from a chunk's beginning on.
const START: u64 = RAM_BASE + 0x20_0000;
/// The most pages.
const PAGES: usize = 16384;

/// How many generations there were.
static LIVED: AtomicU64 = AtomicU64::new(0);
/// The generation that wrote each page last; 0 is none. Filled by a look only, so that a generation writes no more than
/// it says.
static LAST: [AtomicU32; PAGES] = [const { AtomicU32::new(0) }; PAGES];

/// What one is made of.
#[derive(Clone, Copy)]
struct Shape {
    pages: u64,
    writes: u64,
}

impl Shape {
    /// The pages that a generation writes.
    fn written(self, generation: u64) -> impl Iterator<Item = u64> {
        let mut random = Random::new(generation);
        (0..self.writes).map(move |_| random.below(self.pages))
    }

    /// One generation more.
    fn live(self) -> u64 {
        let generation = LIVED.load(Ordering::Relaxed) + 1;
        for page in self.written(generation) {
            poke(START + page * PAGE, generation);
        }
        LIVED.store(generation, Ordering::Relaxed);
        generation
    }

    /// Each page has what the last generation that wrote it left there.
    fn check(self) {
        let lived = LIVED.load(Ordering::Relaxed);
        LAST.iter().for_each(|last| last.store(0, Ordering::Relaxed));
        for generation in 1..=lived {
            for page in self.written(generation) {
                let last = u32::try_from(generation).unwrap_or(u32::MAX);
                if let Some(place) = usize::try_from(page).ok().and_then(|page| LAST.get(page)) {
                    place.store(last, Ordering::Relaxed);
                }
            }
        }
        let mut written = 0;
        for (page, last) in (0..self.pages).zip(&LAST) {
            let last = u64::from(last.load(Ordering::Relaxed));
            written += u64::from(last != 0);
            assert_eq!(peek(START + page * PAGE), last, "page {page} after {lived} generations");
        }
        println!("generations: {lived} lived, {written} pages written, all well");
    }
}

/// Lives.
pub fn run(machine: &Machine) {
    mmu::enable();
    let shape = Shape { pages: machine.option("pages", PAGES as u64), writes: machine.option("writes", 8) };
    assert!(shape.pages <= PAGES as u64 && START + shape.pages * PAGE <= machine.end(), "too little RAM");
    for line in 0..machine.option("talk", 0) * 16 {
        println!("{line:62}");
    }
    gic::init_distributor();
    gic::init_cpu();
    gic::enable(INTID_PL011);
    console::listen();
    if machine.flag("alone") {
        for _ in 0..machine.option("generations", 2314) {
            shape.live();
            if !fork() {
                power::off();
            }
        }
        shape.check();
    } else {
        println!("generations: ready");
    }
    loop {
        match console::asleep_until_typed() {
            b'w' => println!("generation {} lived", shape.live()),
            b'c' => shape.check(),
            b'r' => power::reset(),
            _ => {}
        }
    }
}

/// Forks a child; true in it. A family may not do so too often, so it asks until it may.
fn fork() -> bool {
    loop {
        let [answer, place, ..] = hvc(vendor::FORK.into(), [1, 0, 0]);
        match answer.cast_signed() {
            status::SUCCESS => return place == 1,
            status::DENIED => timer::wait_until(1, || false),
            error => panic!("the fork answers {error}"),
        };
    }
}
