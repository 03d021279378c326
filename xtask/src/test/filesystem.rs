//! File systems on guests' disks: a Linux that writes to two of them is forked in the middle of that, and every relative's are
//! whole, as is what a guest leaves that is killed while it writes.

use super::machine::{boot, logs, monitored};
use crate::monitored::Monitored;
use crate::toolchain::Toolchain;
use crate::{apt, images, on_path};
use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// MiB of a file system.
const SIZE_MIB: u64 = 24;

pub(super) fn trials() -> Vec<Trial> {
    vec![boot("fsck_is_clean_on_the_disks_of_a_clone_forked_in_mid_write_and_on_its_parents", mid_write)]
}

/// What the guest does to a file system all the time: files are written, renamed over others, linked, made durable now and then,
/// folders come and go. It counts in `/count-NAME`, and ends when there is a file `/stop`. The other words look at what is
/// there: each file has its sum beside it, and fsck finds nothing to do.
const WORDS: [&str; 4] = [
    "work() { n=0; while [ ! -e /stop ]; do n=$((n+1)); f=/$1/f$((n%16)); head -c $((n%9*7000+99)) /dev/urandom >$f.new; \
     md5sum <$f.new >$f.sum.new; mv $f.new $f; mv $f.sum.new $f.sum; ln -f $f /$1/l$((n%5)); mkdir -p /$1/d$((n%7))/e; \
     rm -rf /$1/d$(((n+3)%7)); [ $((n%4)) = 0 ] && sync; echo $n >/count.new-$1; mv /count.new-$1 /count-$1; done; }",
    "begin() { rm -f /stop; mount -t ext4 -o commit=1 /dev/vda /own && mount -t ext4 -o commit=1 /dev/vdb /kept && \
     { work own & work kept & }; }",
    "end() { touch /stop; wait; sync; umount /own && umount /kept && e2fsck -fn /dev/vda && e2fsck -fn /dev/vdb; }",
    "whole() { mount -t ext4 -o ro /dev/vd$2 /$1 && for f in /$1/f*.sum; do md5sum <${f%.sum} | cmp - $f || return 1; done; \
     umount /$1; }",
];

/// A disk with an empty file system, among a test's logs.
fn formatted(test: &str, name: &str) -> Result<PathBuf> {
    let path = logs(test).join(name);
    fs::create_dir_all(logs(test))?;
    let _ = fs::remove_file(&path);
    tool(
        "mke2fs",
        &["-q", "-t", "ext4", "-O", "metadata_csum", &path.display().to_string(), &format!("{SIZE_MIB}M")],
    )?;
    Ok(path)
}

/// Runs a program of e2fsprogs on this machine; what it said.
fn tool(name: &str, words: &[&str]) -> Result<String> {
    // An ordinary user's path may not lead there.
    let known =
        |name: &str| on_path(name).or_else(|| Some(Path::new("/sbin").join(name)).filter(|p| p.is_file()));
    if known(name).is_none() && apt::can_install() {
        apt::install(&["e2fsprogs"], false)?;
    }
    let program =
        known(name).with_context(|| format!("{name} is not here (Debian: apt-get install e2fsprogs)"))?;
    let output = Command::new(program).args(words).output()?;
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    ensure!(output.status.success(), "{name} {}: {}\n{text}", words.join(" "), output.status);
    Ok(text)
}

/// A guest's line that must end well.
fn does(machine: &mut Monitored, guest: u64, line: &str) -> Result<()> {
    // What is echoed is not what was typed; the kernel's own words would come in between.
    let typed = format!("dmesg -n 1; {line}; echo ended-$? $(({guest}+7000))");
    machine.ask(&format!("send {guest} \"{typed}\""))?;
    machine.ask(&format!("wait {guest} \" {}\"", guest + 7000))?;
    let last = machine.last_line(guest, &format!(" {}", guest + 7000))?;
    let log = machine.ask(&format!("log {guest}"))?;
    let tail = log["log"].as_str().unwrap_or_default();
    let tail = tail.get(tail.len().saturating_sub(2000)..).unwrap_or_default();
    ensure!(last.contains("ended-0 "), "guest {guest}: {line}: {last}\n{tail}");
    Ok(())
}

/// Waits until a guest's two writers have done this much more.
fn goes_on(machine: &mut Monitored, guest: u64, rounds: u64) -> Result<()> {
    let more = |which: &str| {
        format!(
            "a=$(cat /count-{which}); until [ $(cat /count-{which}) -ge $((a+{rounds})) ]; do sleep 0.1; done"
        )
    };
    does(machine, guest, &format!("{}; {}", more("own"), more("kept")))
}

fn mid_write(name: &str) -> Result<()> {
    let (own, kept) = (formatted(name, "own.img")?, formatted(name, "kept.img")?);
    let initrd = logs(name).join("initrd.cpio");
    let root = fs::read(images::initramfs(&Toolchain::provide()?)?)?;
    fs::write(&initrd, [root, images::drivers(images::KERNELS[0])?, images::e2fsck()?].concat())?;
    let pristine = fs::read(&own)?;
    let (initrd, private) = (initrd.display().to_string(), format!("{},private", own.display()));
    let kept = kept.display().to_string();
    let words = ["--timeout", "600", "--vcpus", "2", "--memory", "128M", "--initrd", &initrd];
    let disks = ["--disk", &private, "--disk", &kept];
    let mut machine = monitored(name, &[&words[..], &disks].concat())?;
    machine.console.wait("guest ready")?;
    for line in WORDS {
        does(&mut machine, 1, line)?;
    }
    does(&mut machine, 1, "mkdir /own /kept; echo 0 >/count-own; echo 0 >/count-kept; begin")?;
    let mut family = Vec::new();
    for _ in 0..3 {
        goes_on(&mut machine, 1, 2)?;
        family.extend(machine.fork(1, 1)?);
        machine.check()?;
    }
    // One dies in the middle of it, and nobody minds.
    goes_on(&mut machine, family[1], 2)?;
    machine.ask(&format!("kill {}", family.remove(1)))?;
    family.push(1);
    for &guest in &family {
        goes_on(&mut machine, guest, 2)?;
        does(&mut machine, guest, "end && whole own a && whole kept b")?;
    }
    tool("e2fsck", &["-fn", &kept]).context("the file, when the parent has unmounted it")?;
    // The parent and a child write to what they have now, and the parent is killed while it does.
    let child = family[0];
    for guest in [child, 1] {
        does(&mut machine, guest, "begin")?;
        goes_on(&mut machine, guest, 3)?;
    }
    machine.ask("kill 1")?;
    machine.ask("wait 1 gone")?;
    goes_on(&mut machine, child, 2)?;
    does(&mut machine, child, "end && whole own a && whole kept b")?;
    machine.check()?;
    machine.shutdown()?;
    ensure!(fs::read(&own)? == pristine, "a private disk's file has changed");
    // What a guest that lost its power leaves: a journal to be read, and then nothing wrong.
    let told = tool("e2fsck", &["-y", "-E", "journal_only", &kept])?;
    ensure!(told.contains("recovering journal"), "it was not killed while it wrote: {told}");
    tool("e2fsck", &["-fn", &kept]).context("the file of a guest that was killed").map(drop)
}
