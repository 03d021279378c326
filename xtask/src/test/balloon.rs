//! Boot tests of the balloon: what Linux gives back, asked or not, and what relatives keep.

use super::machine::{STAYS, boot, monitored, tiny_guest};
use crate::monitored::{Monitored, number};
use anyhow::{Result, ensure};
use libtest_mimic::Trial;

pub(super) fn trials() -> Vec<Trial> {
    let linux = |(kernel, cpu): (&'static str, &'static str)| {
        let name = format!("linux_{kernel}_gives_memory_back_asked_or_not");
        boot(name.replace('.', "_"), move |name| gives_back(name, kernel, cpu))
    };
    let mut trials: Vec<Trial> =
        [("6.12", "neoverse-n1"), ("6.1", "cortex-a53")].into_iter().map(linux).collect();
    trials.push(boot("what_a_child_gives_back_its_parent_keeps", relatives));
    trials
}

/// Pages of a guest that are nobody else's.
fn own(machine: &mut Monitored) -> Result<u64> {
    number(&machine.guest("guest")?, "/private_pages")
}

/// Waits until a guest has at most so many pages of its own.
fn shrinks_to(machine: &mut Monitored, pages: u64) -> Result<()> {
    let few = |row: &serde_json::Value| row["private_pages"].as_u64().is_some_and(|own| own <= pages);
    let rows = |guests: &serde_json::Value| guests.as_array().is_some_and(|rows| rows.iter().all(few));
    machine.until("guests", rows).map(|_| ())
}

fn gives_back(name: &str, kernel: &str, cpu: &str) -> Result<()> {
    /// MiB that the guest uses and frees again.
    const USED: u64 = 200;
    const PAGES: u64 = USED << 8;
    let words = ["--timeout", "200", "--memory", "512M", "--host-memory", "1G"];
    let more = ["--swap", "256M", "--kernel", kernel, "--cpu", cpu];
    let mut machine = monitored(name, &[&words[..], &more, &STAYS].concat())?;
    machine.ask("wait guest \"guest ready: guest\"")?;
    let idle = own(&mut machine)?;
    // Without being asked: what it does not use it reports.
    let fill = format!("dd if=/dev/urandom of=/tmp/a bs=1048576 count={USED}; echo full-$((1+1))");
    machine.talk(1, &fill, "full-2")?;
    let full = own(&mut machine)?;
    ensure!(full > idle + PAGES * 9 / 10, "{full} pages of its own, {idle} before");
    machine.talk(1, "rm /tmp/a; echo free-$((1+1))", "free-2")?;
    shrinks_to(&mut machine, full - PAGES * 9 / 10)?;
    let reported = number(&machine.ask("balloon 1")?, "/reported_pages")?;
    ensure!(reported >= PAGES * 9 / 10, "only {reported} pages were reported");

    // Asked: it does with less, and says how it is. What it then needs more than it takes out of the balloon itself.
    machine.ask("balloon 1 160M")?;
    let wanted = (512 - 160) << 8;
    machine.until("balloon 1", |balloon| balloon["balloon_pages"] == wanted)?;
    let told = machine.until("balloon 1", |balloon| balloon["said"]["free_bytes"].is_u64())?;
    let (free, total) = (number(&told, "/said/free_bytes")?, number(&told, "/said/total_bytes")?);
    ensure!(free < total && total < 512 << 20, "{told}");
    ensure!(own(&mut machine)? <= 160 << 8, "it has more than it was left");
    machine.talk(1, "memtest 32 1; echo less-$((1+1))", "memtest: 32 MiB, 1 rounds, ok")?;
    machine.check()?;
    let tight =
        format!("dd if=/dev/zero of=/tmp/a bs=1048576 count={USED} && rm /tmp/a; echo tight-$(($?+1000))");
    machine.ask(&format!("send 1 \"{tight}\""))?;
    let said = machine.whole_line("1", "tight-")?;
    ensure!(said.starts_with("tight-1000"), "it ran out of memory beside a full balloon: {said}");

    // And back.
    machine.ask("balloon 1 512M")?;
    machine.until("balloon 1", |balloon| balloon["balloon_pages"] == 0)?;
    machine.talk(1, "memtest 200 1; echo more-$((1+1))", "memtest: 200 MiB, 1 rounds, ok")?;
    machine.check()?;
    let refused = machine.refused("balloon 1 1G")?;
    ensure!(refused.contains("512 MiB"), "{refused}");
    machine.shutdown()
}

/// A tiny guest's child gives everything back that it shares with its parent.
fn relatives(name: &str) -> Result<()> {
    let balloon = tiny_guest(name, "balloon")?;
    let words = ["--timeout", "60", "--memory", "16M", "--grant-fork", "2", "--kernel", &balloon];
    let mut machine = monitored(name, &[&words[..], &["--append", "fork"], &STAYS].concat())?;
    machine.ask("wait 1 \"balloon: the parent has everything\"")?;
    machine.ask("wait 2 \"balloon: the child has nothing\"")?;
    machine.check()?;
    machine.shutdown()
}
