//! The simulator: the real VM over the real tables, lived through from a seed.
//!
//! A short run is among the tests; `cargo xtask sim` plays a longer one, from any seed, and what it finds is found
//! again from the seed that it names. A run in which something of interest never happened says little and fails.

mod world;

use stage2::geometry::Geometry;
use stage2::testing::Op;
use stage2::testing::cpus::{CORTEX_A53, CORTEX_A710, NEOVERSE_N1};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};
use world::World;

/// What must have happened, of what the VM counts. The rest is counted by the world.
const WANTED: [&str; 20] = [
    "shadow_made",
    "map_copied",
    "copy_made",
    "pushed",
    "collapsed",
    "collapse_moved",
    "collapse_swapped",
    "collapse_freed",
    "bypassed",
    "bypass_refused",
    "pruned",
    "page_in",
    "page_in_failed",
    "page_out",
    "page_out_failed",
    "evicted",
    "reactivated",
    "discarded",
    "slot_spoiled",
    "stale_completion",
];
const WORLDS_WANT: [&str; 9] = [
    "clones",
    "deaths",
    "snapshots",
    "guests from snapshots",
    "resets",
    "snapshots deleted",
    "discards",
    "completions out of order",
    "accesses that a failed read ended",
];
/// Steps of one world: it begins young, and becomes old.
const LIFE: u64 = 2500;
/// Steps of the run that is a test: enough for everything of interest to happen.
const SHORT: u64 = 18 * LIFE;

/// A number from the surroundings, as `cargo xtask sim` gives them.
fn given(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} is no number: {text}")))
}

#[test]
fn every_guest_reads_what_it_and_its_ancestors_wrote() {
    let (seed, steps) = (given("SIM_SEED").unwrap_or(1), given("SIM_STEPS").unwrap_or(SHORT));
    let (start, mut told) = (Instant::now(), Instant::now());
    let (mut seen, mut accesses, mut played) = (BTreeMap::<&str, u64>::new(), 0, 0);
    let cpus = [CORTEX_A53, NEOVERSE_N1, CORTEX_A710];
    for seed in seed.. {
        let features = cpus[usize::try_from(seed % 3).expect("small")];
        let mut world = World::new(Geometry::new(features), seed);
        // Half of the worlds have a store that fails now and then.
        world.failing = if seed / 3 % 2 == 0 { 0 } else { 20 };
        let life = LIFE.min(steps - played);
        let lived = world.run(life).and_then(|()| world.end());
        lived.unwrap_or_else(|why| panic!("{why}\nagain with: cargo xtask sim --seed {seed} --steps {life}"));
        world.vm.stats().named().into_iter().chain(world.seen).for_each(|(what, count)| {
            *seen.entry(what).or_default() += count;
        });
        (accesses, played) = (accesses + world.accesses, played + life);
        if told.elapsed() > Duration::from_secs(2) {
            println!("{played} of {steps} steps, {accesses} accesses, seed {seed}");
            told = Instant::now();
        }
        if played >= steps {
            println!("{played} steps, {accesses} accesses in {:.0?}, seeds up to {seed}", start.elapsed());
            break;
        }
    }
    for (what, count) in seen.iter().filter(|(_, count)| **count > 0) {
        println!("{count:>10} {what}");
    }
    let never =
        WANTED.iter().chain(&WORLDS_WANT).filter(|what| seen.get(**what).is_none_or(|count| *count == 0));
    let never: Vec<_> = never.collect();
    assert!(never.is_empty() || played < SHORT, "these never happened: {never:?}");
}

#[test]
fn the_simulator_finds_an_invalidate_that_does_nothing() {
    for op in [Op::Vmalls12e1is, Op::Ipas2e1is, Op::Vmalle1is, Op::Load] {
        let found = (1..=10).any(|seed| {
            let mut world = World::new(Geometry::new(NEOVERSE_N1), seed);
            world.mmu.sabotage(Some(op));
            world.run(2000).is_err()
        });
        assert!(found, "without {op:?} everything seems well");
    }
}
