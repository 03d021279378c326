//! Boot tests of stored guests: written while they run, going on in another run, from one disk in two machines, and what
//! is refused.

use super::guests::ends_well;
use super::loaded;
use super::machine::{STAYS, boot, logs, monitored, tiny_guest};
use crate::monitored::{Monitored, number, rows, text};
use crate::run::Run;
use crate::stored;
use anyhow::{Context, Result, bail, ensure};
use hv_abi::image::PAGE;
use libtest_mimic::Trial;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

pub(super) fn trials() -> Vec<Trial> {
    let mut trials: Vec<Trial> = [("6.12", "neoverse-n1"), ("6.1", "cortex-a53")]
        .into_iter()
        .map(|(kernel, cpu)| {
            let name =
                format!("linux_{kernel}_under_load_is_stored_while_it_runs_and_goes_on_in_another_run");
            boot(name.replace('.', "_"), move |name| under_load(name, kernel, cpu))
        })
        .collect();
    trials.push(boot("two_machines_go_on_from_one_export", two_machines));
    trials.push(boot("what_cannot_be_stored_or_resumed_is_refused_by_name", refusals));
    trials.push(boot("a_damaged_page_of_a_stored_guest_is_told_with_its_image_and_its_place", damaged_pages));
    trials.push(boot("a_disk_that_says_nothing_keeps_neither_a_job_nor_the_machine_waiting", stalls));
    trials
}

/// A disk for stored guests that is to be made among a test's logs.
pub(super) fn fresh(test: &str) -> Result<PathBuf> {
    fs::create_dir_all(logs(test))?;
    let file = logs(test).join("golden.img");
    let _ = fs::remove_file(&file);
    Ok(file)
}

/// The same machine as `monitored` gives, with files of its own.
pub(super) fn another(test: &str, which: &str, words: &[&str]) -> Result<Monitored> {
    Monitored::start(Run::from_words(words)?, &logs(test).join(which))
}

/// How deep each object of a guest lies above what it shadows.
fn depths(objects: &Value) -> Result<BTreeMap<u64, u64>> {
    rows(objects)?.iter().map(|row| Ok((number(row, "/object")?, number(row, "/depth")?))).collect()
}

/// Two vCPUs that write to a disk and to memory are stored while they do, gain no shadow by it, and go on with what they
/// were doing in another run, twice.
fn under_load(name: &str, kernel: &str, cpu: &str) -> Result<()> {
    let file = fresh(name)?;
    let disk = logs(name).join("disk.img");
    fs::write(&disk, vec![0; 1 << 20])?;
    let (disk, image) = (format!("{},private", disk.display()), format!("{},new", file.display()));
    let words = ["--timeout", "600", "--vcpus", "2", "--memory", "128M", "--kernel", kernel, "--cpu", cpu];
    let mut machine = monitored(name, &[&words[..], &["--disk", &disk, "--image", &image]].concat())?;
    machine.console.wait("guest ready")?;
    let mut asked = 0;
    loaded::begin(&mut machine)?;
    while loaded::advanced(&mut machine, 1, &mut asked)?.contains(&0) {}
    let (before, pushed) = (depths(&machine.ask("objects 1")?)?, pushes(&mut machine)?);
    let had = loaded::advanced(&mut machine, 1, &mut asked)?;
    let job = number(&machine.ask("save 1 golden --rate 16M")?, "/job")?;
    let mut looks = 0;
    loop {
        let now = depths(&machine.ask("objects 1")?)?;
        ensure!(
            now == before,
            "the guest has gained a shadow: object and depth were {before:?}, are {now:?}"
        );
        // Under way now, so it was when we looked.
        let jobs = machine.ask("jobs")?;
        let state = rows(&jobs)?.iter().find(|row| row["id"] == job).map(|row| &row["state"]);
        match state.and_then(Value::as_str) {
            Some("running") => looks += 1,
            Some("done") => break,
            _ => bail!("job {job} has not gone well: {jobs}"),
        }
    }
    ensure!(looks > 2, "it was over after {looks} looks");
    ensure!(pushes(&mut machine)? > pushed, "nothing was pushed, under load");
    let images = machine.ask("images")?;
    ensure!(text(&images, "/0/state")? == "stored" && number(&images, "/0/generation")? == 1, "{images}");
    loaded::goes_on(&mut machine, 1, &mut asked)?;
    machine.check()?;
    machine.shutdown()?;
    stored::whole(&file)?;

    let image = file.display().to_string();
    let words = ["--timeout", "600", "--cpu", cpu, "--image", &image];
    let mut machine = another(name, "later", &[&words[..], &STAYS].concat())?;
    let twin = machine.ask("create --from golden")?["created"].as_u64().context("no twin")?;
    for guest in [1, twin] {
        let first = loaded::advanced(&mut machine, guest, &mut asked)?;
        ensure!(first.iter().zip(&had).all(|(now, had)| now >= had), "{first:?} after {had:?}");
        loaded::outdoes(&mut machine, guest, &first, &mut asked)?;
    }
    machine.check()?;
    machine.ask("kill 1")?;
    machine.ask("save 2 golden --wait")?;
    ensure!(number(&machine.ask("images")?, "/0/generation")? == 2, "the twin was not stored");
    machine.check()?;
    machine.shutdown()?;
    ensure!(stored::whole(&file)?.header.generation == 2, "what holds is not the newest");
    Ok(())
}

/// Pages that were pushed to copies so far.
fn pushes(machine: &mut Monitored) -> Result<u64> {
    number(&machine.ask("stats")?, "/memory/pushed")
}

/// Serves a file to whoever asks, read-only, until it is dropped.
struct Export {
    child: Child,
    socket: PathBuf,
}

impl Export {
    fn start(file: &Path, socket: PathBuf) -> Result<Self> {
        let _ = fs::remove_file(&socket);
        let child = Command::new("qemu-nbd")
            .args(["--read-only", "--persistent", "--shared=8", "--format=raw", "--socket"])
            .arg(&socket)
            .arg(file)
            .stdin(Stdio::null())
            .spawn()
            .context("starting qemu-nbd (Debian: apt-get install qemu-utils)")?;
        let export = Self { child, socket };
        let deadline = Instant::now() + Duration::from_secs(20);
        while UnixStream::connect(&export.socket).is_err() {
            ensure!(Instant::now() < deadline, "qemu-nbd does not listen");
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(export)
    }
}

impl Drop for Export {
    fn drop(&mut self) {
        // It ends by nothing else.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_file(&self.socket);
    }
}

/// A Linux guest is stored once; two machines at a time go on from one export of it, each alone, and draw other
/// numbers. Each has read what it needed for an answer and no more; a second guest from the image finds the first one's pages.
fn two_machines(name: &str) -> Result<()> {
    crate::qemu::provide_tools()?;
    let file = fresh(name)?;
    let image = format!("{},new", file.display());
    let mut machine = monitored(name, &["--timeout", "300", "--memory", "128M", "--image", &image])?;
    machine.console.wait("guest ready")?;
    machine.talk(
        1,
        "X=golden; head -c 3000000 /dev/urandom >/data; md5sum /data >/sum; echo go-$((1+1))",
        "go-2",
    )?;
    machine.ask("save 1 golden --wait")?;
    machine.shutdown()?;
    let stored = stored::whole(&file)?.header.stored;
    let before = fs::metadata(&file)?.modified()?;
    let socket = std::env::temp_dir().join(format!("hv-export-{}", std::process::id()));
    let export = Export::start(&file, socket)?;
    let image = format!("nbd:unix:{}", export.socket.display());
    let words = ["--timeout", "300", "--host-memory", "512M", "--image", &image];
    let mut machines = Vec::new();
    for which in ["one", "two"] {
        machines.push(another(name, which, &[&words[..], &STAYS].concat())?);
    }
    let mut drawn = Vec::new();
    for (number, machine) in machines.iter_mut().enumerate() {
        machine.talk(1, &format!("X=${{X}}{number}; echo a-$((4+5))"), "a-9")?;
        let read = pages_read(machine)?;
        ensure!(read > 0 && read * 2 < stored, "{read} pages were read for an answer, of {stored}");
        machine.talk(1, "md5sum -c /sum", "/data: OK")?;
        machine.talk(1, "echo r-$((3+4)) $(head -c 8 /dev/urandom | od -An -tx1)", "r-7")?;
        machine.talk(1, "echo e-$((3+5))", "e-8")?;
        drawn.push(machine.last_line(1, "r-7")?);
        let stored_as = machine.ask("images")?[0]["name"].as_str().unwrap_or_default().to_owned();
        let refused = machine.refused(&format!("save 1 {stored_as}"))?;
        ensure!(refused.contains("takes no writes"), "{refused}");
        let before = pages_read(machine)?;
        let twin = self::number(&machine.ask(&format!("create --from {stored_as}"))?, "/created")?;
        machine.talk(twin, "md5sum -c /sum; echo t-$((6+7))-$X", "t-13-golden")?;
        let log = machine.ask(&format!("log {twin}"))?;
        ensure!(text(&log, "/log")?.contains("/data: OK"), "the second guest reads something else: {log}");
        let more = pages_read(machine)? - before;
        ensure!(more * 4 < before, "the first guest read {before} pages, the second {more} more");
    }
    ensure!(drawn[0] != drawn[1], "both machines drew {drawn:?}");
    for (number, machine) in machines.iter_mut().enumerate() {
        machine.talk(1, "echo I-am-$X-$((5+5))", &format!("I-am-golden{number}-10"))?;
        machine.check()?;
    }
    machines.into_iter().try_for_each(Monitored::shutdown)?;
    drop(export);
    ensure!(fs::metadata(&file)?.modified()? == before, "somebody wrote to the image");
    Ok(())
}

/// Pages that came from the disks so far.
fn pages_read(machine: &mut Monitored) -> Result<u64> {
    number(&machine.ask("swap")?, "/transfers/in")
}

/// Disks that hold something else, are too small, are damaged; a guest of another CPU; one that is given up.
fn refusals(name: &str) -> Result<()> {
    let (file, guest) = (fresh(name)?, tiny_guest(name, "touch")?);
    let path = |stem: &str| logs(name).join(format!("{stem}.img"));
    fs::write(path("small"), vec![0; 1 << 20])?;
    fs::write(path("other"), [b"QFI\xfb".as_slice(), &[7; 8188]].concat())?;
    let image = format!("{},new", file.display());
    let attach = |stem: &str| format!("{},attach", path(stem).display());
    let (small, other) = (attach("small"), attach("other"));
    let words = ["--timeout", "120", "--memory", "16M", "--kernel", &guest, "--append", "linger"];
    let images = ["--image", &image, "--image", &small, "--image", &other];
    let mut machine = monitored(name, &[&words[..], &images, &STAYS].concat())?;
    ends_well(&mut machine, "1", "touch")?;
    let mut refused = |command: &str, part: &str| -> Result<()> {
        let why = machine.refused(command)?;
        ensure!(why.contains(part), "{command}: {why}");
        Ok(())
    };
    refused("save 1 nowhere", "there is no such disk")?;
    refused("save 1 small", "there is room for")?;
    refused("save 1 other", "no stored guest")?;
    refused("create --from golden", "nothing is stored there yet")?;
    refused("create --from other", "no stored guest")?;
    refused("cancel 7", "no job 7")?;
    machine.ask("save 1 golden --wait")?;
    // So slowly it takes a quarter of a minute; what was stored stays.
    let job = number(&machine.ask("save 1 golden --rate 1M")?, "/job")?;
    let busy = machine.refused("save 1 golden")?;
    ensure!(busy.contains("is being stored"), "{busy}");
    let given_up = machine.ask(&format!("cancel {job}"));
    let over = |jobs: &Value| rows(jobs).is_ok_and(|rows| rows.iter().all(|row| row["state"] != "running"));
    let jobs = machine.until("jobs", over)?;
    let states: Vec<&str> = rows(&jobs)?.iter().filter_map(|row| row["state"].as_str()).collect();
    let images = machine.ask("images")?;
    match given_up {
        Ok(_) => {
            ensure!(states == ["done", "cancelled"] && images[0]["generation"] == 1, "{jobs} {images}");
        }
        // It was faster.
        Err(_) => ensure!(states == ["done", "done"] && images[0]["generation"] == 2, "{jobs} {images}"),
    }
    machine.check()?;
    machine.shutdown()?;

    let stored = stored::whole(&file)?.header;
    let image = file.display().to_string();
    let mut elsewhere =
        Run::from_words(&["--batch", "--timeout", "60", "--cpu", "cortex-a53", "--image", &image])?
            .session(&logs(name).join("elsewhere"), false)?;
    let told = match elsewhere.finish() {
        Ok(()) => bail!("a guest went on on another CPU"),
        Err(_) => fs::read_to_string(logs(name).join("elsewhere/hv.log"))?,
    };
    ensure!(told.contains("it ran on a CPU with MIDR 0x414fd0c1"), "{told}");
    let at = (stored.start() + stored.pages + stored.table_pages()) * PAGE as u64 + 9;
    let raw = fs::OpenOptions::new().read(true).write(true).open(&file)?;
    let mut byte = [0];
    raw.read_exact_at(&mut byte, at)?;
    raw.write_all_at(&[byte[0] ^ 1], at)?;
    ensure!(stored::look(&raw).is_err(), "damage was not seen");
    let image = format!("{},attach", file.display());
    let words =
        ["--timeout", "60", "--memory", "16M", "--kernel", &guest, "--append", "linger", "--image", &image];
    let mut machine = another(name, "damaged", &[&words[..], &STAYS].concat())?;
    let why = machine.refused("create --from golden")?;
    ensure!(why.contains("the guest's state is damaged, at byte 0x"), "{why}");
    machine.ask("save 1 golden --wait")?;
    let again = machine.ask("create --from golden name=again")?["created"].as_u64().context("no guest")?;
    machine.ask(&format!("kill {again}"))?;
    machine.shutdown()
}

/// Every page of a stored guest that is not zeros is damaged, but for the one with its generation id, without which it would
/// not begin: the first that it needs is told in the log, the first that is to be stored again to whoever asked for that.
fn damaged_pages(name: &str) -> Result<()> {
    let (file, guest) = (fresh(name)?, tiny_guest(name, "hello")?);
    let image = format!("{},new", file.display());
    let words = ["--timeout", "60", "--memory", "16M", "--kernel", &guest, "--append", "linger"];
    let mut machine = monitored(name, &[&words[..], &["--image", &image], &STAYS].concat())?;
    machine.ask("save 1 golden --wait")?;
    machine.shutdown()?;
    let header = stored::whole(&file)?.header;
    let raw = fs::OpenOptions::new().read(true).write(true).open(&file)?;
    let place = |page: u64| (header.start() + page) * PAGE as u64;
    for page in 0..header.pages {
        let mut bytes = [0; PAGE];
        raw.read_exact_at(&mut bytes, place(page))?;
        if bytes[16..].iter().any(|byte| *byte != 0) {
            raw.write_all_at(&[!bytes[9]], place(page) + 9)?;
        }
    }
    let (image, second) = (file.display().to_string(), logs(name).join("second.img"));
    let _ = fs::remove_file(&second);
    let second = format!("{},new", second.display());
    let words = ["--timeout", "60", "--image", &image, "--image", &second];
    let mut machine = another(name, "later", &[&words[..], &STAYS].concat())?;
    let told = |words: &str| -> Result<()> {
        let line = words.lines().find(|line| line.contains(" of stored guest \"golden\", generation 1, "));
        let line = line.with_context(|| format!("nobody says which image it is:\n{words}"))?;
        let (_, page) = line.split_once(": page ").with_context(|| format!("no page: {line}"))?;
        let page = page.split(' ').next().unwrap_or_default().parse().with_context(|| line.to_owned())?;
        let end = format!("at byte {:#x} of its disk: what came back is not what was written", place(page));
        ensure!(line.contains(&end), "it should say \"{end}\": {line}");
        Ok(())
    };
    let why = machine.refused("save 1 second --wait")?;
    ensure!(why.contains(" of the guest cannot be read: "), "{why}");
    told(&why)?;
    told(&machine.wait_logged("guest 1: no page at ")?)?;
    machine.check()?;
    machine.shutdown()
}

/// Disks that take one write and no more: a job that waits for one fails when that has gone on for long enough, and the
/// monitor's `shutdown` waits no longer for another.
fn stalls(name: &str) -> Result<()> {
    const SILENT: &str = "a disk has said nothing for 30 seconds";
    let (file, guest) = (fresh(name)?, tiny_guest(name, "hello")?);
    let second = logs(name).join("second.img");
    let _ = fs::remove_file(&second);
    let (first, second) = (format!("{},new", file.display()), format!("{},new", second.display()));
    let words = ["--timeout", "240", "--memory", "16M", "--kernel", &guest, "--append", "linger"];
    let images = ["--image", &first, "--image", &second, "--images-stall"];
    let mut machine = monitored(name, &[&words[..], &images, &STAYS].concat())?;
    let why = machine.refused("save 1 golden --wait")?;
    ensure!(why.contains(SILENT), "{why}");
    let busy = machine.refused("save 1 golden")?;
    ensure!(busy.contains("is being stored"), "the disk still has pages of the last one: {busy}");
    // The guest lives, and nothing of it is lost.
    machine.check()?;
    machine.ask("pause 1")?;
    machine.ask("resume 1")?;
    let job = number(&machine.ask("save 1 second")?, "/job")?;
    let begun = |jobs: &Value| {
        let mut rows = jobs.as_array().into_iter().flatten();
        rows.any(|row| row["id"] == job && row["state"] == "running" && row["stored_pages"] != 0)
    };
    machine.until("jobs", begun)?;
    // Now it has pages that the disk will not take.
    std::thread::sleep(Duration::from_secs(2));
    machine.ask("shutdown")?;
    let Err(end) = machine.console.finish() else { bail!("the machine ended as if all were well") };
    ensure!(format!("{end:#}").contains("(exit status: 1)"), "{end:#}");
    let log = fs::read_to_string(logs(name).join("hv.log"))?;
    ensure!(log.matches(SILENT).count() == 2, "{log}");
    Ok(())
}
