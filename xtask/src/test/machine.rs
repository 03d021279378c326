//! A machine under test: where its files lie, and its bound on time.

use super::trial;
use crate::build;
use crate::monitored::Monitored;
use crate::run::Run;
use crate::session::Session;
use crate::toolchain::Toolchain;
use anyhow::{Context, Result};
use libtest_mimic::Trial;
use std::fs;
use std::path::PathBuf;

/// With a script the machine stays when its last guest has ended; this one has no line.
pub(super) const STAYS: [&str; 2] = ["--script", "/dev/null"];

/// Where the files and logs of a test's machine are.
pub(super) fn logs(name: &str) -> PathBuf {
    crate::root().join("target/test-logs").join(name.replace("::", "-"))
}

/// A boot test: its logs go when it passes.
pub(super) fn boot(name: impl Into<String>, test: impl FnOnce(&str) -> Result<()> + Send + 'static) -> Trial {
    let name = name.into();
    trial(format!("boot::{name}"), move || {
        let name = name.as_str();
        let result = test(name).with_context(|| format!("logs are in {}", logs(name).display()));
        if result.is_ok() {
            // What stays is only in the way.
            let _ = fs::remove_dir_all(logs(name));
        }
        result
    })
}

/// `run` with these words; the machine's files and logs are kept under the test's name.
pub(super) fn start(name: &str, words: &[&str]) -> Result<Session> {
    Run::from_words(words)?.session(&logs(name), false)
}

/// Builds a tiny guest and puts it beside the logs of a test; the file.
pub(super) fn tiny_guest(test: &str, guest: &str) -> Result<String> {
    let image = build::guest(&Toolchain::provide()?, guest)?;
    let file = logs(test).join(format!("{guest}.bin"));
    fs::create_dir_all(logs(test))?;
    fs::write(&file, image)?;
    Ok(file.display().to_string())
}

/// The same with the monitor at hand; the words say a time limit.
pub(super) fn monitored(name: &str, words: &[&str]) -> Result<Monitored> {
    Monitored::start(Run::from_words(words)?, &logs(name))
}
