//! What figures should be, and what they are elsewhere: `xtask/bench/aims.json`.
//!
//! An aim that is missed says so there, as `"missed": "why"`. [`held`] is for `bench --check`: an aim that is newly missed fails
//! it, and one that is met again asks for that note to go. `report` shows all of them.

use super::Figure;
use anyhow::{Context, Result};
use serde::Deserialize;
use serde_json::Value;
use std::collections::BTreeMap;

/// What a figure should be, and what it is elsewhere on the same emulated machine.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Aim {
    /// What is measured.
    pub(crate) metric: String,
    /// Of all figures of that name, those under these circumstances.
    #[serde(default)]
    pub(crate) params: BTreeMap<String, Value>,
    /// In words.
    pub(crate) what: String,
    /// The most that is wanted, or the least.
    pub(crate) aim: Option<u64>,
    /// The more the better.
    #[serde(default)]
    pub(crate) least: bool,
    /// It is known to be missed: why.
    missed: Option<String>,
    /// KVM's.
    pub(crate) kvm: Option<u64>,
    /// The least that any hypervisor could do.
    pub(crate) floor: Option<u64>,
    /// It is one of those that stand at the top.
    #[serde(default)]
    pub(crate) head: bool,
}

impl Aim {
    /// Each of the figures that it is of.
    pub(crate) fn all<'f>(&'f self, figures: &'f [Figure]) -> impl Iterator<Item = &'f Figure> {
        let fits =
            |figure: &Figure| self.params.iter().all(|(key, value)| figure.params.get(key) == Some(value));
        figures.iter().filter(move |figure| figure.metric == self.metric && fits(figure))
    }

    /// The worst of these.
    pub(crate) fn found<'f>(&'f self, figures: &'f [Figure]) -> Option<&'f Figure> {
        self.all(figures).max_by_key(|figure| if self.least { u64::MAX - figure.value } else { figure.value })
    }

    /// True when a figure misses what is wanted.
    pub(crate) fn missed(&self, value: u64) -> bool {
        self.aim.is_some_and(|aim| if self.least { value < aim } else { value > aim })
    }
}

/// All that there are.
pub(crate) fn aims() -> Result<Vec<Aim>> {
    serde_json::from_str(include_str!("../../bench/aims.json")).context("xtask/bench/aims.json")
}

/// What a comparison with the aims has found, a line each.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Held {
    /// Missed, and nobody said that it would be; or not measured.
    pub(crate) newly: Vec<String>,
    /// Missed as it is known to be, with the reason.
    pub(crate) known: Vec<String>,
    /// Said to be missed, and met.
    pub(crate) met: Vec<String>,
}

/// Holds figures against those of the aims that are of a metric that was asked for.
pub(crate) fn held(aims: &[Aim], figures: &[Figure], asked: impl Fn(&str) -> bool) -> Held {
    let mut held = Held::default();
    for aim in aims.iter().filter(|aim| aim.aim.is_some() && asked(&aim.metric)) {
        let Some(worst) = aim.found(figures) else {
            held.newly.push(format!("{}: not measured, and it has an aim", aim.metric));
            continue;
        };
        let side = if aim.least { "at least" } else { "at most" };
        let line =
            format!("{}: {}, and the aim is {side} {}", worst.name(), worst.value, aim.aim.unwrap_or(0));
        match (&aim.missed, aim.missed(worst.value)) {
            (None, true) => held.newly.push(line),
            (Some(why), true) => held.known.push(format!("{line}: {why}")),
            (Some(_), false) => held.met.push(line),
            (None, false) => {}
        }
    }
    held
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured() -> Vec<Figure> {
        serde_json::from_str(include_str!("../../bench/baseline.json")).unwrap()
    }

    fn with(metric: &str, value: u64) -> Figure {
        let mut figure = measured()[0].clone();
        (figure.metric, figure.value) = (metric.to_owned(), value);
        figure.params.clear();
        figure
    }

    #[test]
    fn an_aim_is_held_against_the_worst_of_what_it_is_of() {
        let figures = measured();
        let aims = aims().unwrap();
        let of = |metric: &str| aims.iter().find(|aim| aim.metric == metric).unwrap();
        let registers = of("exit.mmio");
        assert!(registers.all(&figures).count() > 1);
        assert!(
            registers.all(&figures).all(|figure| figure.value <= registers.found(&figures).unwrap().value)
        );
        let trip = of("irq.sgi").found(&figures).unwrap();
        assert_eq!(trip.params["to"], "other");
    }

    #[test]
    fn an_aim_newly_missed_is_told_apart_from_one_known_to_be_and_from_one_met_again() {
        let aims: Vec<Aim> = serde_json::from_str(
            r#"[{"metric": "a", "what": "", "aim": 10},
                {"metric": "b", "what": "", "aim": 10, "missed": "a walk"},
                {"metric": "c", "what": "", "aim": 10, "least": true},
                {"metric": "d", "what": "", "kvm": 3}]"#,
        )
        .unwrap();
        let look = |a, b, c| held(&aims, &[with("a", a), with("b", b), with("c", c)], |_| true);
        let told = look(10, 11, 10);
        assert_eq!((told.newly.len(), told.met.len()), (0, 0));
        assert_eq!(told.known, ["b: 11, and the aim is at most 10: a walk"]);
        assert_eq!(look(11, 11, 10).newly, ["a: 11, and the aim is at most 10"]);
        assert_eq!(look(10, 11, 9).newly, ["c: 9, and the aim is at least 10"]);
        let told = look(10, 10, 10);
        assert_eq!((told.newly.len(), told.known.len()), (0, 0));
        assert_eq!(told.met, ["b: 10, and the aim is at most 10"]);
        assert_eq!(held(&aims, &[], |metric| metric == "a").newly, ["a: not measured, and it has an aim"]);
        assert_eq!(held(&aims, &[], |_| false), Held::default());
    }

    #[test]
    fn every_aim_is_of_figures_that_are_measured_and_a_note_stands_only_where_there_is_an_aim() {
        let figures = measured();
        for aim in aims().unwrap() {
            assert!(aim.found(&figures).is_some(), "{} {:?}", aim.metric, aim.params);
            assert!(aim.aim.is_some() || aim.missed.is_none(), "{} {:?}", aim.metric, aim.params);
        }
    }
}
