//! Debian's packages, by apt's own client, without changing how the machine is set up.
//!
//! Everything happens in a state folder of our own under `target/`: the sources are the machine's own of its
//! release, security updates among them, plus the backports suite of the same archive, and for arm64 packages an empty status file and that architecture.
//! Only [`install`] touches the machine, and only as root.

use anyhow::{Context, Result, bail, ensure};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::on_path;
use crate::progress::step;

/// True where `apt-get install` can work: a Debian machine, and we are root.
pub(crate) fn can_install() -> bool {
    let root = Command::new("id").arg("-u").output().is_ok_and(|o| o.stdout.trim_ascii() == b"0");
    root && on_path("apt-get").is_some()
}

/// True where packages can at least be downloaded.
pub(crate) fn can_download() -> bool {
    on_path("apt-get").is_some() && on_path("dpkg-deb").is_some()
}

fn codename() -> Result<String> {
    let text = fs::read_to_string("/etc/os-release").context("reading /etc/os-release")?;
    let name = text.lines().find_map(|l| l.strip_prefix("VERSION_CODENAME="));
    Ok(name
        .context("/etc/os-release names no VERSION_CODENAME; is this Debian?")?
        .trim_matches('"')
        .to_owned())
}

/// One apt source of this machine, in the fields of a `.sources` stanza.
#[derive(Debug, PartialEq, Eq)]
struct Source {
    uri: String,
    suites: Vec<String>,
    signed_by: Option<String>,
}

impl Source {
    /// A stanza of a `.sources` file; a field's value may go on in lines that start with a blank.
    fn from_stanza(stanza: &str) -> Option<Self> {
        let field = |name: &str| {
            let mut lines = stanza.lines().skip_while(|l| !l.starts_with(name));
            let first = lines.next()?.get(name.len()..)?.trim();
            let rest = lines.take_while(|l| l.starts_with([' ', '\t']));
            Some(rest.fold(first.to_owned(), |all, l| format!("{all}\n{l}")))
        };
        let types = field("Types:")?;
        if !types.split_whitespace().any(|t| t == "deb") || field("Enabled:").as_deref() == Some("no") {
            return None;
        }
        let uri = field("URIs:")?.split_whitespace().next()?.to_owned();
        let suites = field("Suites:")?.split_whitespace().map(str::to_owned).collect();
        Some(Self { uri, suites, signed_by: field("Signed-By:") })
    }

    /// A line of a `.list` file: `deb [option=value ...] URI SUITE COMPONENT...`.
    fn from_line(line: &str) -> Option<Self> {
        let rest = line.strip_prefix("deb").filter(|r| r.starts_with([' ', '\t']))?.trim_start();
        let (options, rest) = match rest.strip_prefix('[') {
            Some(rest) => rest.split_once(']')?,
            None => ("", rest),
        };
        let mut words = rest.split_whitespace();
        let (uri, suite) = (words.next()?, words.next()?);
        let signed_by = options.split_whitespace().find_map(|o| o.strip_prefix("signed-by="));
        Some(Self {
            uri: uri.to_owned(),
            suites: vec![suite.to_owned()],
            signed_by: signed_by.map(str::to_owned),
        })
    }

    /// As apt reads it.
    fn stanza(&self) -> String {
        let signed = self.signed_by.as_ref().map(|k| format!("Signed-By: {k}\n")).unwrap_or_default();
        let suites = self.suites.join(" ");
        format!("Types: deb\nURIs: {}\nSuites: {suites}\nComponents: main\n{signed}\n", self.uri)
    }
}

/// The machine's own sources of its release and its release's updates (a vendor's are not asked for, so they
/// cannot fail), and the backports suite of where the release itself is.
fn sources(codename: &str) -> Result<String> {
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    files.extend(fs::read_dir("/etc/apt/sources.list.d").into_iter().flatten().flatten().map(|f| f.path()));
    let mut found = Vec::new();
    for file in files {
        let Ok(text) = fs::read_to_string(&file) else { continue };
        if file.extension().is_some_and(|e| e == "sources") {
            found.extend(text.split("\n\n").filter_map(Source::from_stanza));
        } else {
            found.extend(text.lines().filter_map(Source::from_line));
        }
    }
    derived(found, codename)
        .with_context(|| format!("no apt source of this machine has the suite {codename}"))
}

fn derived(found: Vec<Source>, codename: &str) -> Option<String> {
    let updates = format!("{codename}-");
    let backports = format!("{codename}-backports");
    let mut release = None;
    let mut text = String::new();
    for mut source in found {
        source.suites.retain(|s| (s == codename || s.starts_with(&updates)) && *s != backports);
        if source.suites.is_empty() {
            continue;
        }
        text += &source.stanza();
        if source.suites.iter().any(|s| s == codename) {
            release.get_or_insert(source);
        }
    }
    let release = release?;
    Some(text + &Source { suites: vec![backports], ..release }.stanza())
}

/// An apt state folder of our own, for this machine's architecture or another.
struct State {
    dir: PathBuf,
    foreign: Option<&'static str>,
    codename: String,
}

impl State {
    fn open(foreign: Option<&'static str>) -> Result<Self> {
        let dir = crate::root().join("target/apt").join(foreign.unwrap_or("host"));
        for sub in ["lists/partial", "archives/partial", "etc", "state"] {
            fs::create_dir_all(dir.join(sub))?;
        }
        let codename = codename()?;
        fs::write(dir.join("etc/derived.sources"), sources(&codename)?)?;
        let state = Self { dir, foreign, codename };
        if foreign.is_some() {
            fs::write(state.dir.join("state/status"), "")?;
        }
        Ok(state)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        let dir = self.dir.display();
        let mut option = |text: String| {
            command.arg("-o").arg(text);
        };
        option(format!("Dir::State::Lists={dir}/lists"));
        option(format!("Dir::Etc::SourceParts={dir}/etc"));
        option("Dir::Etc::SourceList=/dev/null".into());
        option(format!("Dir::Cache={dir}"));
        option("APT::Sandbox::User=root".into());
        if let Some(foreign) = self.foreign {
            option(format!("Dir::State={dir}/state"));
            option(format!("Dir::State::status={dir}/state/status"));
            option(format!("APT::Architecture={foreign}"));
            option(format!("APT::Architectures={foreign}"));
        }
        command.env("DEBIAN_FRONTEND", "noninteractive").env("LC_ALL", "C");
        command
    }

    fn update(&self) -> Result<()> {
        run(self.command("apt-get").arg("update"), "apt-get update")
    }
}

fn run(command: &mut Command, what: &str) -> Result<()> {
    let output = command.output().with_context(|| format!("starting {what}"))?;
    ensure!(output.status.success(), "{what} failed:\n{}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}

/// Installs packages on this machine, from the backports suite if asked.
pub(crate) fn install(packages: &[&str], backports: bool) -> Result<()> {
    step(&format!("installing {}", packages.join(" ")), || {
        let state = State::open(None)?;
        state.update()?;
        let mut command = state.command("apt-get");
        command.args(["install", "-y", "--no-install-recommends"]);
        if backports {
            command.args(["-t", &format!("{}-backports", state.codename)]);
        }
        run(command.args(packages), "apt-get install")
    })
}

/// The packages of the arm64 architecture.
pub(crate) struct Arm64(State);

impl Arm64 {
    /// Opens the archive; asks it for its lists.
    pub(crate) fn open() -> Result<Self> {
        ensure!(can_download(), "apt-get and dpkg-deb are not here: give --kernel and --initrd yourself");
        let state = State::open(Some("arm64"))?;
        step("reading the arm64 package lists", || state.update())?;
        Ok(Self(state))
    }

    /// The package that the newest `meta` package of a version (`6.12`) depends on.
    pub(crate) fn resolve(&self, meta: &str, version: &str) -> Result<String> {
        let output = self.0.command("apt-cache").args(["show", meta]).output()?;
        let text = String::from_utf8_lossy(&output.stdout);
        for record in text.split("\n\n") {
            let field = |name: &str| record.lines().find_map(|l| l.strip_prefix(name)).map(str::trim);
            if field("Version:").is_some_and(|v| v.starts_with(&format!("{version}.")))
                && let Some(depends) = field("Depends:")
                && let Some(package) = depends.split([' ', ',']).next()
            {
                return Ok(package.to_owned());
            }
        }
        bail!("the archive has no {meta} of version {version}")
    }

    /// Downloads a package and unpacks it into `into`.
    pub(crate) fn unpack(&self, package: &str, into: &Path) -> Result<()> {
        step(&format!("fetching {package}"), || {
            let dir = self.0.dir.join("debs").join(package);
            fs::create_dir_all(&dir)?;
            run(self.0.command("apt-get").args(["download", package]).current_dir(&dir), "apt-get download")?;
            let deb = fs::read_dir(&dir)?
                .flatten()
                .map(|f| f.path())
                .find(|p| p.extension().is_some_and(|e| e == "deb"));
            let deb = deb.with_context(|| format!("apt-get download left no .deb in {}", dir.display()))?;
            fs::create_dir_all(into)?;
            run(Command::new("dpkg-deb").arg("-x").arg(&deb).arg(into), "dpkg-deb -x")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backports_are_derived_and_other_vendors_left_out() {
        let stanza = "# a comment\nTypes: deb\nURIs: http://a.test/debian\nSuites: bookworm bookworm-updates\nComponents: main\nSigned-By: /k.gpg";
        let lines = [
            "deb [arch=amd64 signed-by=/v.gpg] http://v.test/apt tools-bookworm main",
            "deb http://s.test/sec bookworm-security main",
            "# deb http://x.test bookworm main",
        ];
        let mut found: Vec<Source> = Source::from_stanza(stanza).into_iter().collect();
        found.extend(lines.into_iter().filter_map(Source::from_line));
        let text = derived(found, "bookworm").expect("the release is there");
        assert_eq!(text.matches("URIs: ").count(), 3);
        assert!(text.contains("Suites: bookworm-security\n"));
        assert!(text.contains(
            "URIs: http://a.test/debian\nSuites: bookworm-backports\nComponents: main\nSigned-By: /k.gpg\n"
        ));
        assert!(!text.contains("v.test"));
    }

    #[test]
    fn a_key_written_into_the_stanza_is_kept_whole() {
        let stanza = "Types: deb\nURIs: http://a.test\nSuites: bookworm\nSigned-By:\n -----BEGIN\n .\n -----END\nEnabled: yes";
        let source = Source::from_stanza(stanza).expect("a source");
        assert_eq!(source.signed_by.as_deref(), Some("\n -----BEGIN\n .\n -----END"));
        assert!(Source::from_stanza(&stanza.replace("yes", "no")).is_none());
    }

    #[test]
    fn a_list_line_keeps_its_key() {
        let source =
            Source::from_line("deb [signed-by=/k.gpg arch=arm64] http://a.test bookworm main contrib");
        let want = Source {
            uri: "http://a.test".into(),
            suites: vec!["bookworm".into()],
            signed_by: Some("/k.gpg".into()),
        };
        assert_eq!(source, Some(want));
    }
}
