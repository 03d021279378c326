//! What happens in a world, as a list: drawn from a seed, played, and made short when it ends badly.
//!
//! A deed names whom it is about by any number, and finds somebody as long as there is anybody: so a story stays one
//! when deeds are left out. Each brings its own randomness, so what is left happens as it did before.

use super::{Fault, World};
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};
use vmobject::prot::Prot;

/// How long a story is made shorter.
const PATIENCE: Duration = Duration::from_secs(120);

/// Something that is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Deed {
    /// A guest is cloned.
    Clone,
    /// A guest ends.
    Die,
    /// Memory is asked for, so many frames.
    PageOut(u32),
    /// Chores are done, so many slots' worth.
    Chores(u32),
    /// Memory is asked for and chores are done, in turns and in the smallest steps.
    Both,
    /// A snapshot is taken: by a copy-object if true.
    Keep(bool),
    /// A snapshot is deleted.
    Forget,
    /// A guest is made from a snapshot.
    Revive,
    /// A guest is reset to a snapshot.
    Reset,
    /// A guest gives a page up.
    Discard,
    /// A guest may do only this with so many pages from now on.
    Protect(u32, Prot),
    /// A copy of so many pages of a guest is taken.
    CopyIn(u32),
    /// One is put in a guest's attic.
    CopyOut,
    /// One is given back.
    ForgetPart,
    /// A guest may have so many frames of its own, or as many as there are.
    Limit(Option<u32>),
    /// A guest begins with nothing.
    Birth,
    /// A transfer ends.
    Deliver,
    /// The last transfer ends again.
    DeliverAgain,
    /// A CPU runs another guest.
    Switch,
    /// The guest that a CPU runs reads.
    Read,
    /// It writes.
    Write,
    /// All chores and transfers are done, and everything is looked at.
    Rest,
    /// Everything is looked at.
    Check,
}

/// A deed, and to whom.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Step {
    pub(crate) deed: Deed,
    pub(crate) cpu: usize,
    /// Any number: a guest, or a snapshot, of those that are there.
    pub(crate) who: usize,
    pub(crate) page: u32,
    /// Accesses that a read or a write is the first of.
    pub(crate) uses: u32,
    /// Where its other choices come from.
    pub(crate) salt: u64,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:?} cpu {} who {} page {} uses {} salt {:#x}",
            self.deed, self.cpu, self.who, self.page, self.uses, self.salt
        )
    }
}

/// A cheap source of choices (xorshift).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Random(u64);

impl Default for Random {
    fn default() -> Self {
        Self::new(0)
    }
}

impl Random {
    pub(crate) const fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) const fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub(crate) fn below(&mut self, n: usize) -> usize {
        usize::try_from(self.next() >> 33).expect("31 bits") % n
    }

    pub(crate) fn small(&mut self, n: u32) -> u32 {
        u32::try_from(self.below(n as usize)).expect("below a u32")
    }
}

/// The deeds of a seed, without end.
pub(crate) fn deeds(seed: u64) -> impl Iterator<Item = Step> {
    let mut random = Random::new(seed);
    (0_u64..).map(move |number| {
        let deed = match (number % 250, random.below(100)) {
            (249, _) => Deed::Rest,
            (49 | 99 | 149 | 199, _) => Deed::Check,
            (_, 0..4) => Deed::Clone,
            (_, 4..6) => Deed::Die,
            (_, 6..10) => Deed::PageOut(random.small(super::FRAMES)),
            (_, 10..13) => {
                let most = if random.below(2) == 0 { 8 } else { 100 };
                Deed::Chores(1 + random.small(most))
            }
            (_, 13..15) => Deed::Keep(random.below(3) == 0),
            (_, 15) => Deed::Forget,
            (_, 16) => Deed::Revive,
            (_, 17) => Deed::Reset,
            (_, 18) => Deed::Discard,
            (_, 19) => {
                let prot = if random.below(2) == 0 { Prot::ALL } else { Prot::ALL.without(Prot::WRITE) };
                Deed::Protect(1 + random.small(super::PAGES), prot)
            }
            (_, 20..24) => Deed::Deliver,
            (_, 24) => Deed::DeliverAgain,
            (_, 25..35) => Deed::Both,
            (_, 35..40) => Deed::Switch,
            (_, 40) => Deed::CopyIn(1 + random.small(super::ATTIC)),
            (_, 41..43) => Deed::CopyOut,
            (_, 43) => Deed::ForgetPart,
            (_, 44) => Deed::Limit((random.below(2) == 0).then(|| 60 + random.small(12))),
            (_, 45) if random.below(4) == 0 => Deed::Birth,
            (_, 45..70) => Deed::Read,
            (_, _) => Deed::Write,
        };
        let (cpu, who) = (random.below(super::CPUS), random.below(1 << 16));
        let (page, uses) = (random.small(super::ALL), 1 << random.small(10));
        Step { deed, cpu, who, page, uses, salt: random.next() }
    })
}

/// How a story went wrong.
#[derive(Clone, Debug)]
pub(crate) struct Bad {
    /// After so many deeds.
    pub(crate) step: usize,
    /// What was seen.
    pub(crate) why: String,
}

impl Bad {
    /// What was seen, whoever it was seen of.
    fn kind(&self) -> String {
        self.why.lines().next().unwrap_or_default().chars().filter(|c| !c.is_ascii_digit()).collect()
    }
}

/// Plays a story in a new world, to its end and everybody's.
pub(crate) fn play(seed: u64, fault: Fault, story: &[Step]) -> Result<World, Bad> {
    let mut world = World::new(seed, fault);
    let mut step = 0;
    let lived = catch_unwind(AssertUnwindSafe(|| {
        for deed in story {
            world.act(*deed)?;
            step += 1;
        }
        world.end()
    }));
    let why = match lived {
        Ok(Ok(())) => return Ok(world),
        Ok(Err(why)) => why,
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            format!("panic: {}", text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("?"))
        }
    };
    // Locks may still be held in there.
    core::mem::forget(world);
    Err(Bad { step, why })
}

/// Leaves out of a story what does not matter to its end, until no stretch of it can be spared; then lets those who
/// use memory use less of it.
pub(crate) fn shorten(seed: u64, fault: Fault, story: &[Step], mut bad: Bad) -> (Vec<Step>, Bad) {
    let mut story: Vec<Step> = story.iter().take(bad.step + 1).copied().collect();
    let mut stretch = story.len() / 2;
    let begun = Instant::now();
    while stretch > 0 && begun.elapsed() < PATIENCE {
        let (mut from, mut spared) = (0, false);
        while from < story.len() && begun.elapsed() < PATIENCE {
            let end = (from + stretch).min(story.len());
            let shorter = [&story[..from], &story[end..]].concat();
            match play(seed, fault, &shorter) {
                Err(worse) if worse.kind() == bad.kind() => {
                    story = shorter;
                    story.truncate(worse.step + 1);
                    (bad, spared) = (worse, true);
                }
                Ok(_) | Err(_) => from = end,
            }
        }
        if !spared || stretch > 1 {
            stretch /= 2;
        }
    }
    for place in 0..story.len() {
        while begun.elapsed() < PATIENCE && story.get(place).is_some_and(|step| step.uses > 1) {
            let mut fewer = story.clone();
            fewer[place].uses /= 2;
            match play(seed, fault, &fewer) {
                Err(worse) if worse.kind() == bad.kind() => {
                    fewer.truncate(worse.step + 1);
                    (story, bad) = (fewer, worse);
                }
                Ok(_) | Err(_) => break,
            }
        }
    }
    (story, bad)
}
