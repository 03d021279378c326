//! The simulator: the real VM over the real tables, lived through from a seed.
//!
//! A short run is among the tests; `cargo xtask sim` plays a longer one, from any seed. What it finds is found again
//! from the seed that it names, and told as a short story. A run in which something of interest never happened says
//! little and fails. And so that it says something that nothing was found: each defect of a list, switched on in a
//! world, ends badly before long, and the same story without it does not; the test says which was found by what, after how
//! many deeds of how many worlds.

mod world;

use stage2::testing::Op;
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};
use vmobject::defect::Defect;
use world::Fault;
use world::story::{Bad, Step, deeds, play, shorten};

/// What must have happened, of what the VM counts. The rest is counted by the world.
const WANTED: [&str; 21] = [
    "block_taken",
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
const WORLDS_WANT: [&str; 28] = [
    "blocks mapped",
    "blocks broken by a write",
    "blocks broken by a discard",
    "blocks broken that were parked",
    "clones",
    "deaths",
    "snapshots",
    "guests from snapshots",
    "resets",
    "snapshots deleted",
    "discards",
    "ranges protected",
    "ranges copied",
    "ranges put elsewhere",
    "ranges that overlap refused",
    "accesses to nothing",
    "limits set",
    "limits refused",
    "writes denied",
    "completions out of order",
    "accesses that a failed read ended",
    "writes in the middle of an edit",
    "faults that met a collapse",
    "pushes that met a pageout",
    "discards in a shared shadow",
    "pages compared",
    "pages compared in the store",
    "guests compared at rest",
];
/// Deeds of one world: it begins young, and becomes old.
const LIFE: usize = 2500;
/// Deeds of the run that is a test: enough for everything of interest to happen.
const SHORT: usize = 48 * LIFE;

/// A number from the surroundings, as `cargo xtask sim` gives them.
fn given(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} is no number: {text}")))
}

#[test]
fn every_guest_reads_what_it_and_its_ancestors_wrote() {
    let seed = given("SIM_SEED").unwrap_or(1);
    let steps = given("SIM_STEPS").map_or(SHORT, |steps| usize::try_from(steps).expect("it fits"));
    let (start, mut told) = (Instant::now(), Instant::now());
    let (mut seen, mut accesses, mut played) = (BTreeMap::<&str, u64>::new(), 0, 0);
    for seed in seed.. {
        let life = LIFE.min(steps - played);
        let story: Vec<_> = deeds(seed).take(life).collect();
        let world = play(seed, Fault::None, &story).unwrap_or_else(|bad| {
            println!("seed {seed}, after {} deeds: {}", bad.step, bad.why);
            println!(
                "again with: cargo xtask sim --seed {seed} --steps {life}; looking for what matters of it"
            );
            let (story, bad) = shorten(seed, Fault::None, &story, bad);
            story.iter().for_each(|step| println!("{step}"));
            panic!("{} deeds are enough: {}", story.len(), bad.why);
        });
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

/// Worlds that a defect may live through unseen.
const WORLDS: u64 = 1000;
/// Accesses in a row, of a world with a defect.
const FEW: u32 = 8;
/// Threads that look for defects, each for another one.
const WORKERS: usize = 2;

fn all_faults() -> Vec<Fault> {
    let elsewhere = [Defect::RACES, Defect::MEETINGS].concat();
    let alone = Defect::ALL.iter().filter(|defect| !elsewhere.contains(defect));
    let vm = alone.map(|defect| Fault::Vm(*defect));
    let instructions = [Op::Vmalls12e1is, Op::Ipas2e1is, Op::Vmalle1is, Op::Load].map(Fault::Instruction);
    let deaf = [Fault::DeafClone, Fault::DeafEviction, Fault::DeafChores];
    let careless = [Fault::CarelessUpdate, Fault::SilentBreak];
    vm.chain(instructions).chain(deaf).chain(careless).collect()
}

/// The first world that a fault does not live through, and how it ends there. The same story without the fault comes to a
/// good end, or it was not the fault that was found.
fn first_found(fault: Fault) -> Option<(u64, Bad)> {
    (1..=WORLDS).find_map(|seed| {
        // What is looked for breaks the books: it does not take many accesses, but many worlds.
        let story = deeds(seed).take(LIFE).map(|step| Step { uses: step.uses.min(FEW), ..step });
        let story: Vec<_> = story.collect();
        let bad = play(seed, fault, &story).err()?;
        if let Err(cry) = play(seed, Fault::None, &story) {
            let (why, found) = (cry.why, bad.why);
            panic!(
                "the rig cries without the defect: seed {seed}, {} deeds: {why}; with {fault:?}: {found}",
                cry.step
            );
        }
        Some((seed, bad))
    })
}

#[test]
fn each_defect_is_found() {
    let (all, next, unseen) = (all_faults(), AtomicUsize::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| {
                while let Some(&fault) = all.get(next.fetch_add(1, Relaxed)) {
                    let begun = Instant::now();
                    let Some((seed, bad)) = first_found(fault) else {
                        println!(
                            "{:<36} not in {WORLDS} worlds, {:.0?}",
                            format!("{fault:?}"),
                            begun.elapsed()
                        );
                        unseen.lock().expect("nobody panics with it").push(fault);
                        continue;
                    };
                    let deeds = usize::try_from(seed - 1).expect("few") * LIFE + bad.step;
                    println!(
                        "{:<36} world {seed:>3}, {deeds:>6} deeds, {:.0?}: {}",
                        format!("{fault:?}"),
                        begun.elapsed(),
                        bad.why.lines().next().unwrap_or_default()
                    );
                }
            });
        }
    });
    let unseen = unseen.into_inner().expect("nobody panicked with it");
    assert!(unseen.is_empty(), "with these everything seems well: {unseen:?}");
}
