//! From words to a command; a wrong word gets the usage and the nearest right one.
//!
//! [`COMMANDS`] is the one list: help, usage and parsing all read it.

use alloc::borrow::ToOwned;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use hv_abi::manifest::{kibibytes, mebibytes};

/// One command as help shows it.
pub struct Help {
    /// The first word.
    pub name: &'static str,
    /// The words that follow.
    pub usage: &'static str,
    /// What it does, in one line.
    pub does: &'static str,
}

const fn help(name: &'static str, usage: &'static str, does: &'static str) -> Help {
    Help { name, usage, does }
}

/// Every command there is.
pub const COMMANDS: &[Help] = &[
    help("attach", "G", "connect the console to guest G; Ctrl-T comes back here"),
    help(
        "balloon",
        "G [SIZE]",
        "what guest G says of its memory, and has given back; ask it to do with SIZE of its RAM",
    ),
    help("cancel", "JOB", "give up storing a guest; what was stored before stays"),
    help("check", "", "audit every invariant of the memory manager now"),
    help("clone", "G [-n N] [--paused]", "fork the running guest G into N live children"),
    help(
        "create",
        "[name=N] [kernel=P] [initrd=P] [bios=P] [memory=256M] [vcpus=1] [append=STR] [grant-fork=N] [--from SNAPSHOT|IMAGE]",
        "create and start a guest from the images on the disk, from a snapshot, or from a stored guest",
    ),
    help("delete", "SNAPSHOT", "forget a snapshot; guests that were made from it go on"),
    help("guests", "", "the guests, their state and how much memory they hold"),
    help("help", "[CMD]", "this list, or one command of it"),
    help("images", "", "the disks for stored guests, and what is on them"),
    help("jobs", "", "guests being stored, and how far that is"),
    help("kill", "G", "end guest G and give its memory back"),
    help(
        "limit",
        "G [resident=SIZE|none]",
        "how much memory guest G may have for itself, in frames that nobody shares; more goes to swap",
    ),
    help("log", "G", "what guest G has printed lately"),
    help("map", "G", "the map of guest G: ranges, objects, protection"),
    help("memory", "", "frames by owner and queue"),
    help("swap", "", "slots of each place to swap to, and what went in and out"),
    help("objects", "[G]", "the memory objects: size, resident, shared, references, pager"),
    help("pause", "G", "stop the vCPUs of guest G"),
    help("reset", "G [SNAPSHOT]", "make guest G what it was in the snapshot, else the one that it came from"),
    help("resume", "G", "let a paused guest go on"),
    help(
        "save",
        "G IMAGE [--rate SIZE] [--wait]",
        "store guest G as it is now on a disk while it runs, SIZE a second at most; wait until that is durable",
    ),
    help("send", "G TEXT", "type TEXT and a return into guest G"),
    help("shutdown", "", "kill every guest and leave"),
    help("snapshot", "G [NAME]", "keep guest G as it is now, to make guests from"),
    help("snapshots", "", "the snapshots that are kept"),
    help("stats", "[G]", "counters of exits, faults and the scheduler"),
    help("trace", "[G]", "the last exits of guest G's vCPUs"),
    help("wait", "G STATE|\"TEXT\"", "answer when guest G is running, paused or gone, or has printed TEXT"),
];

/// What a guest can be.
pub const STATES: [&str; 4] = ["running", "paused", "ending", "gone"];

/// What a command waits for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Until {
    /// The guest is gone and its memory given back.
    Gone,
    /// The guest is in this state of [`STATES`].
    State(String),
    /// The job of this number is over.
    Job(u32),
    /// The guest prints this: after what was last waited for, and after what was last sent.
    Text(String),
}

/// A parsed command. Guests are named by number or by name; who executes looks them up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Connect the console to a guest.
    Attach(String),
    /// A guest's balloon: how many mebibytes of its RAM it is to do with.
    Balloon(String, Option<u64>),
    /// Give up a job.
    Cancel(u32),
    /// Audit now.
    Check,
    /// Fork a guest: how many children, and whether they begin paused.
    Clone(String, u32, bool),
    /// Create a guest from `key=value` options.
    Create(Vec<(String, String)>),
    /// Forget a snapshot.
    Delete(String),
    /// List guests.
    Guests,
    /// Help on all or one.
    Help(Option<String>),
    /// The disks for stored guests.
    Images,
    /// Guests being stored.
    Jobs,
    /// End a guest.
    Kill(String),
    /// A guest's limit of memory in KiB, if it is to be set; `Some(None)` lifts it.
    Limit(String, Option<Option<u64>>),
    /// Recent console output.
    Log(String),
    /// A guest's map.
    Map(String),
    /// Frames.
    Memory,
    /// `swap`.
    Swap,
    /// Objects, of one guest or all.
    Objects(Option<String>),
    /// Stop a guest's vCPUs.
    Pause(String),
    /// Make a guest again what it was in a snapshot.
    Reset(String, Option<String>),
    /// Let them go on.
    Resume(String),
    /// Store a guest under a name: mebibytes a second at most, and whether to wait until it is durable.
    Save(String, String, Option<u64>, bool),
    /// Type into a guest.
    Send(String, String),
    /// Leave.
    Shutdown,
    /// Keep a guest as it is now.
    Snapshot(String, Option<String>),
    /// The snapshots that are kept.
    Snapshots,
    /// Counters, of one guest or the host.
    Stats(Option<String>),
    /// Recent exits.
    Trace(Option<String>),
    /// Answer when a guest is in a state, or has printed something.
    Wait(String, Until),
}

/// The usage line of a command.
pub fn usage(help: &Help) -> String {
    format!("usage: {} {}", help.name, help.usage).trim_end().to_owned()
}

/// Parses a line. The error is what the person reads: what was wrong, and what would be right.
pub fn parse(line: &str) -> Result<Command, String> {
    let words = split(line)?;
    let Some((name, rest)) = words.split_first() else {
        return Err("no command; 'help' lists them".into());
    };
    let Some(help) = COMMANDS.iter().find(|c| c.name == name) else {
        return Err(match nearest(name) {
            Some(other) => format!("unknown command '{name}'; did you mean '{other}'? ('help' lists all)"),
            None => format!("unknown command '{name}'; 'help' lists them all"),
        });
    };
    let wrong = || usage(help);
    let none = |command| if rest.is_empty() { Ok(command) } else { Err(wrong()) };
    let one = || match rest {
        [guest] => Ok(guest.clone()),
        _ => Err(wrong()),
    };
    let maybe = || match rest {
        [] => Ok(None),
        [guest] => Ok(Some(guest.clone())),
        _ => Err(wrong()),
    };
    let guest_and_name = || match rest {
        [guest] => Ok((guest.clone(), None)),
        [guest, name] => Ok((guest.clone(), Some(name.clone()))),
        _ => Err(wrong()),
    };
    match help.name {
        "attach" => one().map(Command::Attach),
        "balloon" => match rest {
            [guest] => Ok(Command::Balloon(guest.clone(), None)),
            [guest, size] => {
                mebibytes(size).map(|mib| Command::Balloon(guest.clone(), Some(mib))).ok_or_else(wrong)
            }
            _ => Err(wrong()),
        },
        "cancel" => one().and_then(|job| job.parse().map(Command::Cancel).map_err(|_| wrong())),
        "check" => none(Command::Check),
        "clone" => children(rest).ok_or_else(wrong),
        "create" => pairs(rest).map_err(|word| format!("'{word}' is not KEY=VALUE; {}", usage(help))),
        "delete" => one().map(Command::Delete),
        "guests" => none(Command::Guests),
        "help" => maybe().map(Command::Help),
        "images" => none(Command::Images),
        "jobs" => none(Command::Jobs),
        "kill" => one().map(Command::Kill),
        "limit" => limit(rest).ok_or_else(wrong),
        "log" => one().map(Command::Log),
        "map" => one().map(Command::Map),
        "memory" => none(Command::Memory),
        "swap" => none(Command::Swap),
        "objects" => maybe().map(Command::Objects),
        "pause" => one().map(Command::Pause),
        "reset" => guest_and_name().map(|(guest, name)| Command::Reset(guest, name)),
        "resume" => one().map(Command::Resume),
        "save" => save(rest).ok_or_else(wrong),
        "send" => match rest {
            [guest, text @ ..] if !text.is_empty() => Ok(Command::Send(guest.clone(), text.join(" "))),
            _ => Err(wrong()),
        },
        "shutdown" => none(Command::Shutdown),
        "snapshot" => guest_and_name().map(|(guest, name)| Command::Snapshot(guest, name)),
        "snapshots" => none(Command::Snapshots),
        "stats" => maybe().map(Command::Stats),
        "trace" => maybe().map(Command::Trace),
        "wait" => match rest {
            [guest, what] if !what.is_empty() => Ok(Command::Wait(guest.clone(), until(line, what))),
            _ => Err(wrong()),
        },
        other => Err(format!("'{other}' is listed but not parsed")),
    }
}

/// `G [-n N] [--paused]`, in any order.
fn children(words: &[String]) -> Option<Command> {
    let (mut guest, mut count, mut paused) = (None, 1, false);
    let mut words = words.iter();
    while let Some(word) = words.next() {
        match word.as_str() {
            "-n" => count = words.next()?.parse().ok().filter(|count| *count > 0)?,
            "--paused" => paused = true,
            word if word.starts_with('-') || guest.is_some() => return None,
            word => guest = Some(word.to_owned()),
        }
    }
    Some(Command::Clone(guest?, count, paused))
}

/// `G [resident=SIZE|none]`.
fn limit(words: &[String]) -> Option<Command> {
    let (guest, rest) = words.split_first()?;
    let resident = match rest {
        [] => None,
        [pair] => match pair.strip_prefix("resident=")? {
            "none" => Some(None),
            size => Some(Some(kibibytes(size)?)),
        },
        _ => return None,
    };
    Some(Command::Limit(guest.clone(), resident))
}

/// `G IMAGE [--rate SIZE] [--wait]`, the options anywhere.
fn save(words: &[String]) -> Option<Command> {
    let (mut names, mut rate, mut wait) = (Vec::new(), None, false);
    let mut words = words.iter();
    while let Some(word) = words.next() {
        match word.as_str() {
            "--rate" => rate = Some(mebibytes(words.next()?).filter(|mib| *mib > 0)?),
            "--wait" => wait = true,
            word if word.starts_with('-') => return None,
            word => names.push(word.to_owned()),
        }
    }
    let [guest, image] = <[String; 2]>::try_from(names).ok()?;
    Some(Command::Save(guest, image, rate, wait))
}

/// `KEY=VALUE` or `--KEY VALUE`, any number of them; the error is the word that is neither.
fn pairs(words: &[String]) -> Result<Command, String> {
    let mut pairs = Vec::new();
    let mut words = words.iter();
    while let Some(word) = words.next() {
        let pair = match word.strip_prefix("--") {
            Some(key) if !key.contains('=') => words.next().map(|value| (key, value.as_str())),
            Some(pair) => pair.split_once('='),
            None => word.split_once('='),
        };
        let (key, value) = pair.ok_or_else(|| word.clone())?;
        pairs.push((key.to_owned(), value.to_owned()));
    }
    Ok(Command::Create(pairs))
}

/// A state is a bare word of [`STATES`]; everything else is text, and so is a state in quotes.
fn until(line: &str, what: &str) -> Until {
    let bare = !line.trim_end().ends_with('"');
    if bare && STATES.contains(&what) { Until::State(what.to_owned()) } else { Until::Text(what.to_owned()) }
}

/// Splits at spaces; double quotes hold a word together.
fn split(line: &str) -> Result<Vec<String>, String> {
    let (mut words, mut word, mut quoted, mut started) = (Vec::new(), String::new(), false, false);
    for c in line.chars() {
        match c {
            '"' => (quoted, started) = (!quoted, true),
            ' ' | '\t' if !quoted => {
                if started {
                    words.push(core::mem::take(&mut word));
                }
                started = false;
            }
            c => {
                word.push(c);
                started = true;
            }
        }
    }
    if quoted {
        return Err("a quote is not closed".to_string());
    }
    if started {
        words.push(word);
    }
    Ok(words)
}

/// Letters of a word that is compared with commands: none is as long.
const LONGEST: usize = 16;

/// The command that `word` most likely meant: at most two edits away, or the only one it begins.
fn nearest(word: &str) -> Option<&'static str> {
    let names = || COMMANDS.iter().map(|c| c.name);
    let mut begun = names().filter(|name| name.starts_with(word));
    if let (Some(name), None) = (begun.next(), begun.next()) {
        return Some(name);
    }
    if word.len() > LONGEST {
        return None;
    }
    names()
        .map(|name| (distance(word, name), name))
        .min()
        .filter(|(edits, _)| *edits <= 2)
        .map(|(_, name)| name)
}

/// Edits (insert, delete, replace) from one word to another.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = i;
        let mut left = i + 1;
        for (cell, cb) in row.iter_mut().skip(1).zip(&b) {
            let replace = diagonal + usize::from(ca != *cb);
            diagonal = *cell;
            left = replace.min(left + 1).min(*cell + 1);
            *cell = left;
        }
        if let Some(first) = row.first_mut() {
            *first = i + 1;
        }
    }
    row.last().copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_listed_command_parses_with_what_its_usage_asks() {
        for command in COMMANDS {
            let (mut needed, mut optional) = (String::new(), false);
            for word in command.usage.split(' ').filter(|word| !word.is_empty()) {
                optional |= word.starts_with('[');
                if !optional {
                    needed = format!("{needed} {word}");
                }
                optional &= !word.ends_with(']');
            }
            let needed = needed.replace("JOB", "1");
            let line = format!("{}{}", command.name, needed);
            assert!(parse(&line).is_ok(), "{line}: {:?}", parse(&line));
        }
    }

    #[test]
    fn a_wrong_word_names_the_nearest_right_one() {
        for (wrong, right) in [("gests", "guests"), ("obj", "objects"), ("stast", "stats"), ("kil", "kill")] {
            let error = parse(wrong).unwrap_err();
            assert!(error.contains(&format!("'{right}'")), "{error}");
        }
        assert!(parse("xyzzyplugh").unwrap_err().contains("'help'"));
    }

    #[test]
    fn a_missing_word_gets_the_usage() {
        assert_eq!(parse("kill").unwrap_err(), "usage: kill G");
        assert_eq!(parse("send 1").unwrap_err(), "usage: send G TEXT");
        assert_eq!(parse("memory now").unwrap_err(), "usage: memory");
    }

    #[test]
    fn quotes_hold_a_word_together() {
        assert_eq!(
            parse("create append=\"a b\" name=x"),
            Ok(Command::Create(alloc::vec![("append".into(), "a b".into()), ("name".into(), "x".into())]))
        );
        assert!(parse("send 1 \"x").is_err());
    }

    #[test]
    fn a_state_in_quotes_is_text() {
        let until = |line: &str| match parse(line) {
            Ok(Command::Wait(_, until)) => until,
            other => panic!("{other:?}"),
        };
        assert_eq!(until("wait 1 paused"), Until::State("paused".into()));
        assert_eq!(until("wait 1 \"paused\""), Until::Text("paused".into()));
        assert_eq!(until("wait 1 ready"), Until::Text("ready".into()));
        assert!(parse("wait 1").is_err());
    }

    #[test]
    fn a_clone_takes_its_options_in_any_order() {
        let clone = |n, paused| Ok(Command::Clone("g".into(), n, paused));
        assert_eq!(parse("clone g"), clone(1, false));
        assert_eq!(parse("clone --paused -n 32 g"), clone(32, true));
        for wrong in
            ["clone", "clone g h", "clone g -n", "clone g -n 0", "clone g -n many", "clone g --pause"]
        {
            assert_eq!(parse(wrong).unwrap_err(), "usage: clone G [-n N] [--paused]", "{wrong}");
        }
    }

    #[test]
    fn a_save_takes_a_rate_and_may_wait() {
        let save = |rate, wait| Ok(Command::Save("g".into(), "golden".into(), rate, wait));
        assert_eq!(parse("save g golden"), save(None, false));
        assert_eq!(parse("save --rate 8M g --wait golden"), save(Some(8), true));
        for wrong in [
            "save g",
            "save g golden other",
            "save g golden --rate",
            "save g golden --rate 0",
            "save g golden --soon",
        ] {
            assert_eq!(parse(wrong).unwrap_err(), "usage: save G IMAGE [--rate SIZE] [--wait]", "{wrong}");
        }
        assert!(parse("cancel soon").is_err());
    }

    #[test]
    fn create_takes_options_as_words_and_as_pairs() {
        let pair = |key: &str, value: &str| (key.to_owned(), value.to_owned());
        let options = alloc::vec![pair("from", "s"), pair("name", "x"), pair("memory", "1G")];
        assert_eq!(parse("create --from s name=x --memory=1G"), Ok(Command::Create(options)));
        assert!(parse("create --from").unwrap_err().contains("'--from'"));
    }

    #[test]
    fn distance_counts_single_edits() {
        assert_eq!(distance("kitten", "sitting"), 3);
        assert_eq!(distance("", "abc"), 3);
        assert_eq!(distance("same", "same"), 0);
    }
}
