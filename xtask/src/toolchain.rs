//! Which toolchain can build for bare AArch64, and with what flags. The one place that knows.
//!
//! An ordinary user has the target from rustup and needs nothing here. A Debian machine has `rustc-web`,
//! `cargo-web` and `rust-web-src`: its `core` is built from source. First the toolchain that runs us is looked
//! at, then Debian's, then (as root) Debian's is installed.

use crate::{apt, on_path};
use anyhow::{Context, Result, bail};
use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What the hypervisor and the tiny guests are built for.
pub(crate) const TARGET: &str = "aarch64-unknown-none-softfloat";

const REMEDIES: &str = "Either: rustup target add aarch64-unknown-none-softfloat\n    or: apt-get install rustc-web cargo-web rust-web-src rust-web-clippy lld-22";

/// A toolchain that can build for [`TARGET`].
#[derive(Clone, Debug)]
pub(crate) struct Toolchain {
    cargo: PathBuf,
    rustc: PathBuf,
    /// `core` must be built from source.
    build_std: bool,
    /// A linker, when rustc has none of its own.
    linker: Option<PathBuf>,
    /// How it introduces itself.
    pub(crate) version: String,
}

impl Toolchain {
    /// Finds one.
    pub(crate) fn find() -> Result<Self, String> {
        let own = PathBuf::from(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        let mut places = vec![(own.clone(), own.with_file_name("rustc"))];
        if let Some(path) = env::var_os("PATH") {
            places.extend(env::split_paths(&path).map(|dir| (dir.join("cargo"), dir.join("rustc"))));
        }
        let mut tried = Vec::new();
        for (cargo, rustc) in places {
            if !rustc.is_file() || !cargo.is_file() {
                continue;
            }
            match Self::examine(cargo, rustc.clone()) {
                Ok(found) => return Ok(found),
                Err(why) => tried.push(format!("  {}: {why}", rustc.display())),
            }
        }
        Err(format!("no Rust toolchain here can build for {TARGET}\n{}\n{REMEDIES}", tried.join("\n")))
    }

    /// Finds one, or installs Debian's.
    pub(crate) fn provide() -> Result<Self> {
        match Self::find() {
            Ok(found) => Ok(found),
            Err(why) if apt::can_install() => {
                let packages = ["rustc-web", "cargo-web", "rust-web-src", "rust-web-clippy", "lld-22"];
                apt::install(&packages, false).with_context(|| why)?;
                Self::find().map_err(anyhow::Error::msg)
            }
            Err(why) => bail!(why),
        }
    }

    fn examine(cargo: PathBuf, rustc: PathBuf) -> Result<Self, String> {
        let ask = |words: &[&str]| output(clean(&mut Command::new(&rustc)).args(words));
        let sysroot = PathBuf::from(ask(&["--print=sysroot"]).ok_or("does not run")?);
        let verbose = ask(&["-vV"]).ok_or("does not say its version")?;
        let host = verbose.lines().find_map(|l| l.strip_prefix("host: ")).ok_or("does not name its host")?;
        let prebuilt = sysroot.join("lib/rustlib").join(TARGET).join("lib").is_dir();
        let source = sysroot.join("lib/rustlib/src/rust/library/core/Cargo.toml").is_file();
        if !prebuilt && !source {
            return Err(format!("has neither the {TARGET} target nor rust-src"));
        }
        let own_linker = sysroot.join("lib/rustlib").join(host).join("bin/rust-lld").is_file();
        let linker = if own_linker { None } else { Some(find_lld().ok_or("has no lld")?) };
        let version = verbose.lines().next().unwrap_or_default().to_owned();
        Ok(Self { cargo, rustc, build_std: !prebuilt, linker, version })
    }

    /// `cargo VERB` for the target, ready for `--package` and the like.
    pub(crate) fn cargo(&self, verb: &str) -> Command {
        self.command(&self.cargo, verb)
    }

    /// `cargo clippy` for the target: this toolchain's own, not the first that the path has.
    pub(crate) fn clippy(&self) -> Command {
        let mut command = self.command(&self.cargo.with_file_name("cargo-clippy"), "clippy");
        command.env("CARGO", &self.cargo);
        command
    }

    fn command(&self, program: &Path, verb: &str) -> Command {
        let mut command = Command::new(program);
        clean(&mut command).env("RUSTC", &self.rustc).args([verb, "--release", "--target", TARGET]);
        if self.build_std {
            command.env("RUSTC_BOOTSTRAP", "1").args([
                "-Zbuild-std=core,alloc,compiler_builtins",
                "-Zbuild-std-features=compiler-builtins-mem",
            ]);
        }
        if let Some(linker) = &self.linker {
            command.env("CARGO_TARGET_AARCH64_UNKNOWN_NONE_SOFTFLOAT_LINKER", linker);
        }
        // A backtrace follows frame pointers.
        command.env("CARGO_TARGET_AARCH64_UNKNOWN_NONE_SOFTFLOAT_RUSTFLAGS", "-Cforce-frame-pointers=yes");
        command.arg("--target-dir").arg(crate::root().join("target/el2"));
        command
    }
}

/// Takes away what `cargo run` and rustup's proxy put into our environment, so a second toolchain starts clean.
fn clean(command: &mut Command) -> &mut Command {
    for (key, _) in env::vars_os() {
        let name = key.to_string_lossy();
        let keep = ["CARGO_HOME", "CARGO_NET_OFFLINE", "CARGO_TERM_COLOR"].contains(&&*name);
        let drop = name == "RUSTUP_TOOLCHAIN" || name == "LD_LIBRARY_PATH" || name == "RUSTC";
        if drop || (name.starts_with("CARGO") && !keep) {
            command.env_remove(&key);
        }
    }
    command
}

fn output(command: &mut Command) -> Option<String> {
    let output = command.output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Any lld links AArch64: a distribution's, newest first, else one that a rustup toolchain brought.
fn find_lld() -> Option<PathBuf> {
    let named = (14..=30).rev().map(|v| format!("ld.lld-{v}")).chain(["ld.lld".to_owned()]);
    named.into_iter().find_map(|name| on_path(&name)).or_else(|| {
        let home = env::var_os("RUSTUP_HOME").map(PathBuf::from);
        let home = home.or_else(|| Some(Path::new(&env::var_os("HOME")?).join(".rustup")))?;
        let toolchains = std::fs::read_dir(home.join("toolchains")).ok()?;
        toolchains.flatten().find_map(|t| {
            let hosts = std::fs::read_dir(t.path().join("lib/rustlib")).ok()?;
            hosts.flatten().map(|h| h.path().join("bin/rust-lld")).find(|p| p.is_file())
        })
    })
}
