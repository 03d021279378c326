//! Boot tests of guests' disks: what is written, where it ends up, and who sees it.

use super::guests::ends_well;
use super::machine::{boot, logs, monitored, tiny_guest};
use crate::monitored::Monitored;
use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use std::fs;
use std::path::PathBuf;

const MIB: usize = 1 << 20;
/// What a test's disks hold at first: sixteen bytes a line, each line its own.
const BYTES: usize = 16 * MIB;

pub(super) fn trials() -> Vec<Trial> {
    let each = |(kernel, cpu): (&'static str, &'static str)| {
        let name = format!("linux_{kernel}_writes_to_a_file_only_where_that_is_asked_for");
        boot(name.replace('.', "_"), move |name| persists(name, kernel, cpu))
    };
    let mut trials: Vec<Trial> =
        [("6.12", "neoverse-n1"), ("6.1", "cortex-a53")].into_iter().map(each).collect();
    trials.push(boot("clones_of_a_linux_that_writes_have_disks_of_their_own", relatives));
    trials.push(boot("a_driver_that_breaks_every_rule_of_the_ring_harms_nobody", hostile));
    trials
}

/// A file with something in it, among a test's logs.
fn file(test: &str, name: &str) -> Result<(PathBuf, Vec<u8>)> {
    let bytes: Vec<u8> = (0..BYTES / 16).flat_map(|line| format!("{line:015x}\n").into_bytes()).collect();
    let path = logs(test).join(name);
    fs::create_dir_all(logs(test))?;
    fs::write(&path, &bytes)?;
    Ok((path, bytes))
}

/// A guest's line that must end well, in time: what is echoed is not what was typed.
fn does(machine: &mut Monitored, guest: u64, line: &str, number: u32) -> Result<()> {
    let typed = format!("({line}) && echo done-$(({number}+1000))");
    machine.talk(guest, &typed, &format!("done-{}", number + 1000))
}

/// Both disks are flushed, which `sync` alone does not do to a disk without a filesystem, and the guest's caches are
/// dropped, so that the next look is at the disks.
const FORGET: &str = "sync; for disk in vda vdb; do dd if=/dev/null of=/dev/$disk conv=notrunc,fsync; done; \
                      echo 3 >/proc/sys/vm/drop_caches";

/// A disk that persists, one that is private, one that is read only.
fn persists(name: &str, kernel: &str, cpu: &str) -> Result<()> {
    let (kept, mut model) = file(name, "kept.img")?;
    let (own, before) = file(name, "own.img")?;
    let disks = [
        format!("{}", kept.display()),
        format!("{},private", own.display()),
        format!("{},ro", own.display()),
    ];
    let mut words = vec!["--batch", "--timeout", "150", "--kernel", kernel, "--cpu", cpu];
    words.extend(disks.iter().flat_map(|disk| ["--disk", disk]));
    let mut machine = monitored(name, &words)?;
    machine.console.wait("guest ready")?;
    does(&mut machine, 1, "cmp /dev/vda /dev/vdb && cmp /dev/vda /dev/vdc", 1)?;
    // The same to both that take it: in the middle of pages, over many, and zeros.
    let written =
        |at: usize, bytes: &[u8], model: &mut Vec<u8>| model[at..at + bytes.len()].copy_from_slice(bytes);
    // From a disk: busybox's own text comes a line a write, two switches of tables each, which is all that the test would do.
    let fill = "dd if=/dev/vdc bs=64k skip=128 count=16";
    let filling = before[8 * MIB..9 * MIB].to_vec();
    for disk in ["vda", "vdb"] {
        does(&mut machine, 1, &format!("{fill} | dd of=/dev/{disk} bs=64k seek=32 conv=notrunc"), 2)?;
        does(
            &mut machine,
            1,
            &format!("{fill} | head -c 1536 | dd of=/dev/{disk} bs=512 seek=3 conv=notrunc"),
            3,
        )?;
        does(&mut machine, 1, &format!("sync; blkdiscard -o 9437184 -l 1048576 /dev/{disk}"), 4)?;
        does(&mut machine, 1, FORGET, 5)?;
        does(&mut machine, 1, &format!("dd if=/dev/{disk} bs=64k skip=32 count=16 >/got"), 6)?;
        does(&mut machine, 1, &format!("{fill} >/put; cmp /put /got && rm /put /got"), 7)?;
    }
    written(2 * MIB, &filling, &mut model);
    written(3 * 512, &filling[..1536], &mut model);
    written(9 * MIB, &[0; MIB], &mut model);
    does(&mut machine, 1, "cmp /dev/vda /dev/vdb && ! cmp /dev/vda /dev/vdc", 8)?;
    ensure!(fs::read(&kept)? == model, "what was synced is not in the file");
    machine.talk(1, "dd if=/dev/zero of=/dev/vdc count=1 || echo refused-$((40+2))", "refused-42")?;
    machine.check()?;
    // What nobody synced is there when the machine has ended.
    let words = b"the last words".repeat(100);
    machine.talk(
        1,
        "for i in $(seq 100); do echo -n 'the last words'; done >/words; echo said-$((1+1))",
        "said-2",
    )?;
    machine.ask("send 1 \"cat /words | dd of=/dev/vda bs=512 seek=20000 conv=notrunc; poweroff -f\"")?;
    machine.console.finish()?;
    written(20000 * 512, &words, &mut model);
    ensure!(fs::read(&kept)? == model, "the file is not what the guest wrote");
    ensure!(fs::read(&own)? == before, "a private disk's file has changed");
    Ok(())
}

/// A guest with a private disk and one that persists is forked while it writes to both: each relative has what was
/// there, and then what it wrote itself.
fn relatives(name: &str) -> Result<()> {
    let ((kept, before), (own, _)) = (file(name, "kept.img")?, file(name, "own.img")?);
    let disks = [format!("{},private", own.display()), format!("{}", kept.display())];
    let mut words = vec!["--timeout", "1200", "--vcpus", "2", "--memory", "128M"];
    words.extend(disks.iter().flat_map(|disk| ["--disk", disk]));
    let mut machine = monitored(name, &words)?;
    machine.console.wait("guest ready")?;
    let busy = "(while :; do dd if=/data of=/dev/vda bs=64k seek=64 oflag=direct; \
                dd if=/dev/vda of=/back bs=64k skip=64 count=32 iflag=direct; \
                cmp /data /back || echo torn-$((6*7)); done) >/tmp/busy 2>&1 & echo busy-$((1+1))";
    machine.talk(1, "dd if=/dev/urandom of=/data bs=64k count=32; echo data-$((1+1))", "data-2")?;
    machine.talk(1, busy, "busy-2")?;
    let mut family = vec![1];
    for round in 0..3 {
        family.extend(machine.fork(1, 2)?);
        machine.check()?;
        machine.talk(1, &format!("echo on-$(({round}+50))"), &format!("on-{}", round + 50))?;
    }
    let told = machine.refused("snapshot 99")?;
    ensure!(told.contains("no guest"), "{told}");
    for &guest in &family {
        does(&mut machine, guest, "kill $!; wait; ! grep torn- /tmp/busy", 1)?;
        // The middle of both is its own now.
        let mine = format!("dd if=/dev/vdb of=/mine bs=64k skip={} count=16", 8 * guest);
        let mine = format!("{mine}; dd if=/mine of=/dev/vda bs=64k seek=128");
        does(&mut machine, guest, &format!("{mine}; dd if=/mine of=/dev/vdb bs=64k seek=128"), 2)?;
        does(&mut machine, guest, FORGET, 3)?;
    }
    for &guest in &family {
        for disk in ["vda", "vdb"] {
            let look = format!("dd if=/dev/{disk} bs=64k skip=128 count=16 | cmp - /mine");
            does(&mut machine, guest, &look, 4)?;
        }
        does(&mut machine, guest, "dd if=/dev/vda bs=64k skip=64 count=32 | cmp - /data", 5)?;
    }
    machine.check()?;
    // The parent's disk cannot be taken back, its children's can.
    machine.ask("snapshot 1 golden")?;
    let told = machine.refused("reset 1 golden")?;
    ensure!(told.contains("guest-disk-1"), "{told}");
    let child = machine.ask("create --from golden")?["created"].as_u64().context("no child")?;
    for round in 0..2 {
        does(&mut machine, child, "dd if=/dev/vdb bs=64k skip=128 count=16 | cmp - /mine", 10 + round)?;
        let spoil =
            "dd if=/dev/zero of=/dev/vdb bs=64k count=256; dd if=/dev/zero of=/dev/vda bs=64k count=256";
        does(&mut machine, child, &format!("{spoil}; {FORGET}"), 20 + round)?;
        machine.ask(&format!("reset {child}"))?;
        does(&mut machine, child, "dd if=/dev/vda bs=64k skip=128 count=16 | cmp - /mine", 30 + round)?;
    }
    let told = machine.refused("create name=second")?;
    ensure!(told.contains("guest 1 writes to disk 'guest-disk-1'"), "{told}");
    for guest in family.iter().rev().copied().filter(|&guest| guest != 1).chain([child]) {
        machine.ask(&format!("kill {guest}"))?;
    }
    machine.ask("delete golden")?;
    machine.check()?;
    machine.shutdown()?;
    let mut model = before;
    model.copy_within(MIB / 2..3 * MIB / 2, 8 * MIB);
    ensure!(fs::read(&kept)? == model, "the file is not what the parent wrote");
    Ok(())
}

/// A guest whose driver does everything wrong, with several seeds, beside a Linux that uses the same file.
fn hostile(name: &str) -> Result<()> {
    let (file, before) = file(name, "shared.img")?;
    let disk = format!("{},private", file.display());
    let with = format!("rings={}", tiny_guest(name, "rings")?);
    let words = ["--batch", "--timeout", "400", "--disk", &disk, "--with", &with];
    let mut machine = monitored(name, &words)?;
    machine.ask("wait guest \"guest ready: guest\"")?;
    let busy = "dmesg -n 1; cp /dev/vda /was; (while :; do echo 3 >/proc/sys/vm/drop_caches; cmp /was /dev/vda || echo torn-$((6*7)); \
                dd if=/was of=/dev/vda bs=64k conv=notrunc,fsync; done) >/tmp/busy 2>&1 & echo busy-$((1+1))";
    machine.talk(1, busy, "busy-2")?;
    does(&mut machine, 1, "cmp /was /dev/vda", 0)?;
    for seed in 1..=4 {
        let create = format!("create name=rings{seed} kernel=rings memory=8M vcpus={}", 1 + seed % 2);
        machine.ask(&format!("{create} append=\"linger seed={seed}\""))?;
        ends_well(&mut machine, &format!("rings{seed}"), "rings")?;
        machine.check()?;
        machine.ask(&format!("send rings{seed} x"))?;
        machine.ask(&format!("wait rings{seed} gone"))?;
    }
    does(&mut machine, 1, "kill $!; wait; ! grep torn- /tmp/busy", 1)?;
    does(&mut machine, 1, "cmp /was /dev/vda", 2)?;
    machine.check()?;
    machine.shutdown()?;
    ensure!(fs::read(&file)? == before, "the file has changed");
    Ok(())
}
