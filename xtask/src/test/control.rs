//! Clients of the control port that do not read at once, or never do: what they are owed is whole, and nobody else waits.

use super::machine::{boot, monitored, tiny_guest};
use crate::monitored::{Monitored, rows};
use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::thread::sleep;
use std::time::{Duration, Instant};

/// Questions that a client asks at once. The answers are longer than what the port and QEMU's socket hold together.
const QUESTIONS: usize = 100;
const HELD: usize = 512 << 10;

pub(super) fn trials() -> Vec<Trial> {
    vec![
        boot("a_client_that_reads_late_gets_every_answer_whole_and_in_order", late),
        boot("a_client_that_never_reads_or_goes_away_stops_nothing", never),
    ]
}

/// A machine with a guest that stays.
fn machine(name: &str) -> Result<Monitored> {
    let image = tiny_guest(name, "touch")?;
    monitored(
        name,
        &["--batch", "--timeout", "60", "--memory", "4M", "--kernel", &image, "--append", "linger"],
    )
}

/// Asks for the long list of commands, again and again, without reading.
fn asked(machine: &Monitored) -> Result<UnixStream> {
    let mut client = machine.client()?;
    client.set_read_timeout(Some(Duration::from_secs(10)))?;
    let questions: String = (0..QUESTIONS)
        .map(|number| format!("{}\n", json!({"id": number, "command": "help", "text": true})))
        .collect();
    client.write_all(format!("\n{questions}").as_bytes())?;
    Ok(client)
}

fn late(name: &str) -> Result<()> {
    let mut machine = machine(name)?;
    let help = machine.ask("help")?;
    let client = asked(&machine)?;
    sleep(Duration::from_secs(2));
    let mut bytes = 0;
    let mut lines = BufReader::new(client).lines();
    for number in 0..QUESTIONS {
        let line = lines.next().with_context(|| format!("no answer {number}"))?;
        let line = line.with_context(|| format!("answer {number}, after {bytes} bytes"))?;
        let answer: Value = serde_json::from_str(&line)
            .with_context(|| format!("answer {number}, after {bytes} bytes, is not whole"))?;
        ensure!(answer["id"] == number, "answer {number} has the mark {}", answer["id"]);
        ensure!(answer["reply"] == help, "answer {number} is another one");
        bytes += line.len() + 1;
    }
    ensure!(bytes > HELD, "{bytes} bytes are not more than what is held on the way");
    drop(lines);
    machine.shutdown()
}

fn never(name: &str) -> Result<()> {
    let mut machine = machine(name)?;
    let client = asked(&machine)?;
    // As long as nobody reads, the console is served all the same.
    machine.console.send("\x14stats guest\r")?;
    machine.console.wait("injected")?;
    machine.console.wait("hv> ")?;
    // Who comes after one that went away in the middle of an answer gets its own.
    drop(client);
    ensure!(rows(&machine.ask("guests")?)?.len() == 1, "not one guest");
    machine.check()?;
    // The machine does not wait for a reader for ever.
    let client = asked(&machine)?;
    sleep(Duration::from_secs(1));
    let begun = Instant::now();
    machine.console.send("shutdown\r")?;
    machine.console.finish()?;
    ensure!(begun.elapsed() < Duration::from_secs(20), "the end took {:?}", begun.elapsed());
    drop(client);
    Ok(())
}
