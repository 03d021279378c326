//! Debian's packages, by apt's own client, without changing how the machine is set up.
//!
//! Everything happens in a state folder of our own under `target/`: the sources are the machine's, plus the
//! backports suite of the same archive, and for arm64 packages an empty status file and that architecture.
//! Only [`install`] touches the machine, and only as root.

use anyhow::{Context, Result, bail, ensure};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::progress::step;
use crate::toolchain::on_path;

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

/// The machine's own source for its release: where, and which key signs it.
fn release_source(codename: &str) -> Result<(String, Option<String>)> {
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    files.extend(fs::read_dir("/etc/apt/sources.list.d").into_iter().flatten().flatten().map(|f| f.path()));
    for file in files {
        let Ok(text) = fs::read_to_string(&file) else { continue };
        if file.extension().is_some_and(|e| e == "sources") {
            for stanza in text.split("\n\n") {
                let field = |name: &str| stanza.lines().find_map(|l| l.strip_prefix(name)).map(str::trim);
                let suites = field("Suites:").unwrap_or_default();
                if let (true, Some(uri)) = (suites.split_whitespace().any(|s| s == codename), field("URIs:"))
                {
                    let uri = uri.split_whitespace().next().unwrap_or(uri);
                    return Ok((uri.to_owned(), field("Signed-By:").map(str::to_owned)));
                }
            }
        } else {
            for line in text.lines().filter(|l| l.starts_with("deb ")) {
                let words: Vec<_> = line.split_whitespace().filter(|w| !w.contains('=')).collect();
                if let [_, uri, suite, ..] = words.as_slice()
                    && *suite == codename
                {
                    return Ok(((*uri).to_owned(), None));
                }
            }
        }
    }
    bail!("no apt source of this machine has the suite {codename}")
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
        let (uri, key) = release_source(&codename)?;
        let signed = key.map(|k| format!("Signed-By: {k}\n")).unwrap_or_default();
        let suites = format!("{codename} {codename}-updates {codename}-backports");
        let source = format!("Types: deb\nURIs: {uri}\nSuites: {suites}\nComponents: main\n{signed}");
        fs::write(dir.join("etc/derived.sources"), source)?;
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
