//! Progress of anything longer than a moment: a spinner on a terminal, one line elsewhere.

use indicatif::{ProgressBar, ProgressStyle};
use std::io::IsTerminal;
use std::time::{Duration, Instant};

/// Does `work` while telling what it is.
pub(crate) fn step<T, E>(what: &str, work: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
    let start = Instant::now();
    let bar = std::io::stderr().is_terminal().then(|| {
        let bar = ProgressBar::new_spinner();
        if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} [{elapsed}]") {
            bar.set_style(style);
        }
        bar.set_message(what.to_owned());
        bar.enable_steady_tick(Duration::from_millis(120));
        bar
    });
    let result = work();
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
    if start.elapsed() > Duration::from_secs(2) {
        let end = if result.is_ok() { "" } else { " (failed)" };
        eprintln!("xtask: {what}: {:.0?}{end}", start.elapsed());
    }
    result
}
