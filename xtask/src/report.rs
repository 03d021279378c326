//! `cargo xtask report`: the last bench and the last demonstrations as one page for a browser.
//!
//! The page stands alone: its plots are in it, it asks no network and runs no script. What it shows is what `bench` and
//! `demo` left under `target`, against the aims and KVM's figures of `xtask/bench/aims.json`. Read [`assembled`] for the
//! page from top to bottom; `plot` draws, `page` knows HTML.

mod page;
mod plot;

use crate::bench::aims::{Aim, aims};
use crate::bench::{self, Figure};
use crate::demo::found::{self, Found, Holding};
use anyhow::{Context, Result, ensure};
use page::{grouped, section, table, text, times};
use plot::{Line, Pair};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

/// KVM's `fork()` of a live virtual machine with so many MiB, touched in full: instructions.
const LIVE_FORKS: [(f64, f64); 4] = [(64.0, 14.5e6), (128.0, 24.1e6), (256.0, 48.4e6), (512.0, 95.8e6)];

/// Writes the page.
pub(crate) fn run() -> Result<()> {
    let (figures, demos) = (bench::left()?, found::left()?);
    let file = crate::root().join("target/report.html");
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    fs::write(&file, assembled(&figures, &demos, &origin(now))?)
        .with_context(|| format!("writing {}", file.display()))?;
    println!("{}", file.display());
    Ok(())
}

/// When the page was made, and of which commit if that can be told.
fn origin(now: u64) -> String {
    let described =
        Command::new("git").args(["describe", "--always", "--dirty"]).current_dir(crate::root()).output();
    let commit = match &described {
        Ok(output) if output.status.success() => String::from_utf8_lossy(&output.stdout).trim().to_owned(),
        Ok(_) | Err(_) => return page::date(now),
    };
    format!("{}, at {commit}", page::date(now))
}

/// The page.
fn assembled(figures: &[Figure], demos: &[Found], origin: &str) -> Result<String> {
    ensure!(
        !figures.is_empty() || !demos.is_empty(),
        "there is nothing to report yet: `cargo xtask bench` measures, `cargo xtask demo clone` shows"
    );
    let aims = aims()?;
    let mut body = format!(
        "<header>\n<h1>What it costs, and what is shared</h1>\n<p>A hypervisor for AArch64 whose guest memory manager is the \
         Mach VM. Figures are instructions, counted by QEMU, unless they say otherwise: they repeat. Made {}.</p>\n{}</header>\n",
        text(origin),
        tiles(&aims, figures)
    );
    if figures.is_empty() {
        let lead = "Nothing is measured yet: cargo xtask bench does that.";
        body += &section("Figures", lead, "");
    } else {
        body += &pauses(figures)?;
        body += &against(&aims, figures)?;
        body += &depths(figures)?;
        body += &wanted(&aims, figures);
    }
    if demos.is_empty() {
        let lead = "Nothing has been shown yet: cargo xtask demo clone forks one Linux guest into many, and others do more.";
        body += &section("Demonstrations", lead, "");
    }
    for demo in demos {
        body += &shown(demo)?;
    }
    body += &every(figures);
    body += "<footer>Left by the last <code>cargo xtask bench</code>, later ones of single figures, and the last run of each \
             <code>cargo xtask demo</code>. One host CPU of the model neoverse-n1 under <code>-icount</code>, two for the SGI \
             to another vCPU. KVM's figures are from the same emulated machine: QEMU 10.0.2, Debian 6.12, VHE. No caches \
             and no TLB misses are in them: they compare the length of ways, not seconds.</footer>\n";
    Ok(page::whole("What it costs, and what is shared", &body))
}

/// A number with its unit.
fn with_unit(value: u64, unit: &str) -> String {
    match unit {
        "bytes" if value >= 10 << 10 => format!("{} KiB", grouped(value >> 10)),
        "bytes" => format!("{} bytes", grouped(value)),
        "percent" => format!("{} %", grouped(value)),
        // What is counted, the words beside it say.
        _ => grouped(value),
    }
}

/// The few figures that a reader takes away.
fn tiles(aims: &[Aim], figures: &[Figure]) -> String {
    let mut tiles = String::new();
    for aim in aims.iter().filter(|aim| aim.head) {
        let Some(figure) = aim.found(figures) else { continue };
        let (value, unit) = match figure.unit.as_str() {
            "insn" => (grouped(figure.value), "instructions".to_owned()),
            unit => {
                let told = with_unit(figure.value, unit);
                told.rsplit_once(' ')
                    .map_or((told.clone(), String::new()), |(n, u)| (n.to_owned(), u.to_owned()))
            }
        };
        let beside = match (aim.kvm, aim.aim) {
            (Some(kvm), _) => format!("{} fewer than KVM", times(kvm, figure.value)),
            (None, Some(aim)) => format!("the aim is {}", with_unit(aim, &figure.unit)),
            (None, None) => continue,
        };
        tiles += &format!(
            "<div class=\"tile\"><span>{}</span><b>{value} <small>{unit}</small></b><em>{beside}</em></div>\n",
            text(&aim.what)
        );
    }
    format!("<div class=\"tiles\">\n{tiles}</div>\n")
}

/// How long a guest is still when it is cloned, against its RAM.
fn pauses(figures: &[Figure]) -> Result<String> {
    const RAM: [(f64, &str); 7] = [
        (64.0, "64 MiB"),
        (128.0, "128"),
        (256.0, "256"),
        (512.0, "512"),
        (1024.0, "1 GiB"),
        (2048.0, "2"),
        (4096.0, "4 GiB"),
    ];
    let number = |figure: &Figure| Some((figure.params.get("ram_mib")?.as_f64()?, figure.value as f64));
    let mut points: Vec<(f64, f64)> =
        figures.iter().filter(|figure| figure.metric == "clone.pause@ram").filter_map(number).collect();
    if points.is_empty() {
        return Ok(String::new());
    }
    points.sort_by(|one, other| one.0.total_cmp(&other.0));
    let lines = [
        Line {
            label: "KVM: fork() of a live VM".into(),
            theirs: true,
            numbered: true,
            points: LIVE_FORKS.to_vec(),
        },
        Line {
            label: "KVM: a frozen snapshot mapped".into(),
            theirs: true,
            numbered: true,
            points: vec![(64.0, 0.81e6), (4096.0, 0.81e6)],
        },
        Line { label: "here: a running guest".into(), theirs: false, numbered: true, points },
    ];
    let plot = plot::lines(
        "Instructions for which a guest is still when it is cloned, against its RAM",
        &lines,
        (&RAM, &[1e3, 1e4, 1e5, 1e6, 1e7, 1e8]),
    )?;
    let lead = "Instructions for which no vCPU of the source can run, against its RAM, which it has touched in full. Both \
                scales are logarithmic: what grows with RAM is a slope, what does not is level.";
    Ok(section("A clone's pause does not grow with RAM", lead, &format!("<figure>{plot}</figure>\n")))
}

/// Everything that KVM has a figure for, beside ours.
fn against(aims: &[Aim], figures: &[Figure]) -> Result<String> {
    let pair = |aim: &Aim| {
        let (ours, theirs) = (aim.found(figures)?.value, aim.kvm?);
        Some(Pair { label: aim.what.clone(), ours, theirs })
    };
    let pairs: Vec<Pair> = aims.iter().filter_map(pair).collect();
    if pairs.is_empty() {
        return Ok(String::new());
    }
    let plot = plot::bars("Instructions here and under KVM", &pairs, ("here", "KVM"))?;
    let lead = "Instructions for the same thing on the same emulated machine, on a logarithmic scale.";
    Ok(section("Against KVM", lead, &format!("<figure>{plot}</figure>\n")))
}

/// What a copy costs at the end of a long history.
fn depths(figures: &[Figure]) -> Result<String> {
    const DEPTHS: [(f64, &str); 5] =
        [(1.0, "1"), (16.0, "16"), (256.0, "256"), (1024.0, "1,024"), (2314.0, "2,314")];
    // By the part of a chunk's faults, then by what the generations between hold of it.
    let mut parts = BTreeMap::<&str, BTreeMap<String, Vec<(f64, f64)>>>::new();
    for figure in figures.iter().filter(|figure| figure.metric == "fault.cow@depth") {
        let word = |key: &str| figure.params.get(key).and_then(Value::as_str).unwrap_or("any");
        if let Some(depth) = figure.params.get("generations").and_then(Value::as_f64) {
            let fills = parts.entry(word("part")).or_default();
            fills.entry(word("fill").to_owned()).or_default().push((depth, figure.value as f64));
        }
    }
    if parts.is_empty() {
        return Ok(String::new());
    }
    let mut plots = String::new();
    // The later ones come first.
    for (part, fills) in parts.into_iter().rev() {
        let sorted = |(label, mut points): (String, Vec<(f64, f64)>)| {
            points.sort_by(|one, other| one.0.total_cmp(&other.0));
            Line { label, theirs: false, numbered: false, points }
        };
        let lines: Vec<Line> = fills.into_iter().map(sorted).collect();
        let highest = lines.iter().flat_map(|line| &line.points).map(|point| point.1).fold(1e4, f64::max);
        let scale: Vec<f64> = (3..=9).map(|power| 10_f64.powi(power)).collect();
        let shown = scale.iter().position(|top| *top >= highest).map_or(&scale[..], |top| &scale[..=top]);
        let caption = match part {
            "first" => "The first fault in a chunk, which finds the way.",
            "later" => "A fault in a chunk whose way is known: nearly all are.",
            other => other,
        };
        let name = format!("Instructions for a copy fault, against live generations. {caption}");
        let plot = plot::lines(&name, &lines, (&DEPTHS, shown))?;
        plots += &format!("<figure>{plot}<figcaption>{}</figcaption></figure>\n", text(caption));
    }
    let lead = "Instructions for a copy fault against the number of live generations between the page and its owner.";
    Ok(section("A long history", lead, &plots))
}

/// What is wanted.
fn most_wanted(aim: &Aim, unit: &str) -> Option<String> {
    let sign = if aim.least { '≥' } else { '≤' };
    aim.aim.map(|aim| format!("{sign} {}", with_unit(aim, unit)))
}

/// The figures that have an aim or a peer.
fn wanted(aims: &[Aim], figures: &[Figure]) -> String {
    let none = || "<span class=\"none\">–</span>".to_owned();
    let rows: Vec<Vec<String>> = aims
        .iter()
        .map(|aim| {
            let Some(figure) = aim.found(figures) else {
                let missing = "<span class=\"none\">not measured</span>".to_owned();
                let plain = |value: Option<u64>| value.map_or_else(none, grouped);
                let most = most_wanted(aim, "").unwrap_or_else(none);
                return vec![text(&aim.what), missing, most, plain(aim.floor), plain(aim.kvm), none()];
            };
            let told = |value: u64| with_unit(value, &figure.unit);
            let (value, missed) = (told(figure.value), aim.missed(figure.value));
            let here = match aim.aim {
                Some(_) if missed => format!("<span class=\"bad\">{value} ✗</span>"),
                Some(_) => format!("<span class=\"good\">{value} ✓</span>"),
                None => value,
            };
            vec![
                text(&aim.what),
                here,
                most_wanted(aim, &figure.unit).unwrap_or_else(none),
                aim.floor.map_or_else(none, told),
                aim.kvm.map_or_else(none, told),
                aim.kvm.map_or_else(none, |kvm| times(kvm, figure.value)),
            ]
        })
        .collect();
    let lead = "Medians, the worst of several where one thing is measured under several circumstances. The floor is what a \
                minimal EL2 in Rust takes that does nothing else. KVM's clone maps a frozen snapshot: its live fork is above.";
    section("Against the aims", lead, &table(&["", "here", "aim", "floor", "KVM", "KVM / here"], &rows))
}

/// What a demonstration found.
fn shown(demo: &Found) -> Result<String> {
    let rows: Vec<Vec<String>> =
        demo.facts.iter().map(|fact| vec![text(&fact.what), grouped(fact.value)]).collect();
    let mut rest = String::new();
    if demo.guests.len() > 1 {
        let mut guests = demo.guests.clone();
        guests.sort_by_key(|guest| guest.private_kib);
        let of = |number: &dyn Fn(&Holding) -> (f64, f64)| guests.iter().map(number).collect::<Vec<_>>();
        let both = of(&|guest| (guest.private_kib as f64 / 1024.0, guest.shared_kib as f64 / 1024.0));
        let own = of(&|guest| (guest.private_kib as f64, 0.0));
        let seen = plot::columns("What each guest has in memory, in MiB", &both, "MiB")?;
        let own = plot::columns("What each guest has of its own, in KiB", &own, "KiB")?;
        rest += &format!(
            "<p class=\"key\"><i class=\"ours\"></i>its own<i class=\"shared\"></i>shared with others</p>\n<div class=\"pair\">\n\
             <figure>{seen}<figcaption>What each guest has in memory.</figcaption></figure>\n\
             <figure>{own}<figcaption>Of that, its own alone.</figcaption></figure>\n</div>\n"
        );
    }
    rest += &table(&[], &rows);
    let lead = match demo.demo.as_str() {
        "clone" => {
            "One Linux guest with a working set of random bytes is forked while it runs; every child finds it whole."
        }
        "fork-tree" => "A Linux guest forks itself from a shell, its children fork themselves, and so on.",
        "snapshot" => {
            "A Linux guest is stored while it works, its machine killed; two guests go on from what was stored."
        }
        "thousand" => "One Linux guest is forked into a thousand on a host with 4 GiB; each is heard.",
        "swap" => "Linux guests with more memory than the host has, all of it verified.",
        _ => "",
    };
    let lead = format!("{lead} Shown by cargo xtask demo {}, on {}.", demo.demo, demo.cpu);
    Ok(section(&format!("Demonstration: {}", demo.demo), lead.trim(), &rest))
}

/// Everything that was measured.
fn every(figures: &[Figure]) -> String {
    let rows: Vec<Vec<String>> = figures
        .iter()
        .map(|figure| {
            let Figure { value, min, max, n, unit, .. } = figure;
            let numbers = [value, min, max, n].map(|number| grouped(*number));
            std::iter::once(text(&figure.name())).chain(numbers).chain([text(unit)]).collect()
        })
        .collect();
    if rows.is_empty() {
        return String::new();
    }
    let all = table(&["figure", "median", "least", "most", "of", "unit"], &rows);
    format!(
        "<section>\n<details>\n<summary>All {} figures</summary>\n{all}</details>\n</section>\n",
        rows.len()
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::found::Fact;

    fn measured() -> Vec<Figure> {
        serde_json::from_str(include_str!("../bench/baseline.json")).unwrap()
    }

    fn demo(guests: usize) -> Found {
        let fact = |what: &str, value| Fact { what: what.to_owned(), value };
        let guest = |number: usize| Holding {
            name: format!("guest.{number}"),
            private_kib: 900 + number as u64 % 7 * 300,
            shared_kib: 106_000,
        };
        Found {
            demo: "clone".into(),
            cpu: "<neoverse> & \"n1\"".into(),
            facts: vec![fact("MiB resident", 180), fact("KiB < MiB & more", 3_400)],
            guests: (0..guests).map(guest).collect(),
        }
    }

    /// The page as a tree; what is not well-formed is not one.
    fn parsed(page: &str) -> roxmltree::Document<'_> {
        let options = roxmltree::ParsingOptions { allow_dtd: true, ..Default::default() };
        roxmltree::Document::parse_with_options(page, options).unwrap()
    }

    #[test]
    fn a_report_is_well_formed_stands_alone_and_has_its_plots() {
        let page = assembled(&measured(), &[demo(33), demo(1001)], "<today>").unwrap();
        let tree = parsed(&page);
        let count = |name: &str| tree.descendants().filter(|node| node.has_tag_name(name)).count();
        let svg = tree.descendants().filter(|node| node.tag_name().name() == "svg").count();
        // Pauses, KVM, the first and the later faults at depth, two for each demonstration.
        assert_eq!((svg, count("script"), count("link"), count("img")), (8, 0, 0, 0));
        for node in tree.descendants().filter(roxmltree::Node::is_element) {
            assert!(node.attribute("href").is_none() && node.attribute("src").is_none(), "{node:?}");
        }
        assert!(!page.contains("url(") && !page.contains("@import"));
        let words: String = tree.descendants().filter_map(|node| node.text()).collect();
        for wanted in
            ["<today>", "KiB < MiB & more", "A clone's pause does not grow with RAM", "null HVC", "1,298"]
        {
            assert!(words.contains(wanted), "{wanted}");
        }
        assert!(
            page.contains('✗') && page.contains('✓'),
            "an aim that is missed and one that is met look the same"
        );
    }

    #[test]
    fn a_report_without_data_or_half_of_it_says_what_to_run() {
        let why = assembled(&[], &[], "").unwrap_err().to_string();
        assert!(why.contains("`cargo xtask bench`") && why.contains("`cargo xtask demo clone`"), "{why}");
        let page = assembled(&[], &[demo(2)], "").unwrap();
        parsed(&page);
        assert!(page.contains("cargo xtask bench does that"));
        let page = assembled(&measured(), &[], "").unwrap();
        parsed(&page);
        assert!(page.contains("cargo xtask demo clone forks"));
    }
}
