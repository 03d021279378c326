//! Boot tests: the hypervisor under QEMU, real kernels and tiny guests, each with its own bound on time.

use super::machine::{boot, logs, start, tiny_guest};
use super::terminal;
use crate::images;
use anyhow::{Result, bail, ensure};
use libtest_mimic::Trial;
use std::fs;

/// What EL2 does wrong on purpose, and what it must tell of it beside the function's name: the syndrome in ESR_EL2 is
/// a write or a read where nothing is mapped, a write to what is read-only, a fetch from what is not executable.
const SELF_TESTS: [(&str, &str, &str, &str); 5] = [
    (
        "a_panic_at_el2_ends_the_machine_and_names_the_function",
        "panic",
        "panic on CPU 0: as asked",
        "hv::boot::selftest::panic",
    ),
    (
        "a_stack_that_overflows_at_el2_hits_its_guard_page",
        "last-overflow",
        "panic on CPU 1: synchronous exception at EL2: ESR 0x96000047",
        "selftest::overflow::deeper",
    ),
    (
        "a_guard_page_of_el2_cannot_be_read",
        "guard",
        "panic on CPU 0: synchronous exception at EL2: ESR 0x96000007",
        "hv::boot::selftest::guard",
    ),
    (
        "el2_cannot_write_its_own_code",
        "write-text",
        "panic on CPU 0: synchronous exception at EL2: ESR 0x9600004f",
        "hv::boot::selftest::write_text",
    ),
    (
        "el2_cannot_execute_its_data",
        "run-data",
        "panic on CPU 0: synchronous exception at EL2: ESR 0x8600000f",
        "hv::boot::selftest::run_data",
    ),
];

pub(super) fn trials() -> Vec<Trial> {
    let tiny_guests =
        ["hello", "touch", "smp", "irq", "wfi", "mmio", "wild", "gicfuzz", "asid", "fpstate", "balloon"];
    let mut trials: Vec<Trial> = tiny_guests.into_iter().map(tiny).collect();
    let linux: &[(&str, &[&str])] = &[
        ("linux_6_12_on_neoverse_n1", &["--cpu", "neoverse-n1", "--host-cpus", "2"]),
        ("linux_6_1_on_cortex_a53", &["--kernel", "6.1", "--cpu", "cortex-a53", "--host-cpus", "1"]),
        ("linux_6_12_with_4_vcpus_on_max", &["--vcpus", "4", "--cpu", "max", "--host-cpus", "4"]),
        ("linux_6_12_with_4_vcpus_on_1_cpu", &["--vcpus", "4", "--cpu", "neoverse-v1", "--host-cpus", "1"]),
    ];
    for (name, words) in linux {
        trials.push(boot(*name, move |name| boots_to_a_shell(name, words)));
    }
    for (name, what, story, function) in SELF_TESTS {
        trials.push(boot(name, move |name| stops(name, what, story, function)));
    }
    trials.push(boot("a_terminal_is_as_it_was_whichever_way_a_run_ends", |name| {
        terminal::is_as_it_was(&logs(name))
    }));
    trials.push(boot("a_guest_with_more_memory_than_the_host_swaps_and_keeps_its_contents", swaps));
    trials.push(boot("el2_moves_and_fills_every_byte_and_no_other", moves_bytes));
    trials.push(boot("el2_keeps_heap_for_what_must_not_fail_when_guests_have_filled_it", keeps_some_heap));
    trials.push(boot("u_boot_reaches_its_prompt_and_answers", u_boot_answers));
    trials
}

/// Both kernels on every model of CPU, with every number of vCPUs and host CPUs: what `--matrix` runs.
pub(super) fn matrix() -> Vec<Trial> {
    let mut trials = Vec::new();
    for kernel in images::KERNELS {
        for cpu in ["cortex-a53", "neoverse-n1", "neoverse-v1", "max"] {
            for (vcpus, cpus) in [(1, 1), (1, 2), (1, 4), (4, 1), (4, 2), (4, 4)] {
                let name = format!("matrix_linux_{kernel}_on_{cpu}_with_{vcpus}_vcpus_on_{cpus}_cpus");
                let words = format!("--kernel {kernel} --cpu {cpu} --vcpus {vcpus} --host-cpus {cpus}");
                trials.push(boot(name.replace(['.', '-'], "_"), move |name| {
                    boots_to_a_shell(name, &words.split(' ').collect::<Vec<_>>())
                }));
            }
        }
    }
    trials
}

/// A tiny guest that says `ok` and powers off.
fn tiny(name: &'static str) -> Trial {
    boot(name, move |name| {
        let file = tiny_guest(name, name)?;
        // Two vCPUs with one ASID can only be told each other's translations where they share a CPU.
        let cpus = if name == "asid" { "1" } else { "2" };
        let words = ["--batch", "--timeout", "60", "--vcpus", "2", "--host-cpus", cpus, "--kernel", &file];
        let mut session = start(name, &words)?;
        session.finish()?;
        let ok = format!("guest {name}: ok");
        ensure!(session.text().contains(&ok), "the guest did not say \"{ok}\"");
        Ok(())
    })
}

/// Linux to userspace, a memory test there, a clean power-off.
fn boots_to_a_shell(name: &str, words: &[&str]) -> Result<()> {
    let mut all = vec!["--batch", "--timeout", "240"];
    all.extend_from_slice(words);
    let mut session = start(name, &all)?;
    let version = if words.contains(&"6.1") { images::KERNELS[1] } else { images::KERNELS[0] };
    // The kernel's version is part of what is waited for: the rest of the line may still be on its way.
    session.wait(&format!("guest ready: guest {version}."))?;
    // The hypervisor's own clock, a PL031 too, is where it has this from.
    ensure!(session.text().contains("setting system clock to 20"), "the guest does not know what year it is");
    session.send("memtest 32 2; poweroff -f\n")?;
    session.wait("memtest: 32 MiB, 2 rounds, ok")?;
    session.finish()
}

/// Linux fills and compares more memory than the host has.
fn swaps(name: &str) -> Result<()> {
    let words =
        "--batch --timeout 400 --memory 512M --host-memory 192M --swap 512M --append guest.run=memtest+220";
    let mut session = start(name, &words.split(' ').collect::<Vec<_>>())?;
    session.wait("memtest: 220 MiB, 2 rounds, ok")?;
    session.finish()
}

/// U-Boot reaches its prompt and answers.
fn u_boot_answers(name: &str) -> Result<()> {
    let bios = images::u_boot()?.display().to_string();
    let mut session = start(name, &["--until", "=>", "--timeout", "120", "--bios", &bios])?;
    session.wait("Hit any key")?;
    session.send("\n")?;
    session.wait("=>")?;
    session.send("version\n")?;
    session.wait("U-Boot 20")?;
    session.stop();
    Ok(())
}

/// EL2 does wrong on purpose: QEMU must end with status 1, and the error must tell the story, with registers where an
/// exception has some, and name the function.
fn stops(name: &str, what: &str, story: &str, function: &str) -> Result<()> {
    let image = logs(name).join("empty.bin");
    fs::create_dir_all(logs(name))?;
    fs::write(&image, [0; 64])?;
    let image = image.display().to_string();
    let append = format!("selftest={what}");
    let words = ["--batch", "--timeout", "60", "--kernel", &image, "--host-append", &append];
    let Err(told) = start(name, &words)?.finish() else { bail!("the machine ended as if all were well") };
    let told = format!("{told:#}");
    for word in ["(exit status: 1)", story, "backtrace 0: 0x", function] {
        ensure!(told.contains(word), "nothing says \"{word}\":\n{told}");
    }
    ensure!(!story.contains("exception") || told.contains("x30 "), "no registers:\n{told}");
    Ok(())
}

/// EL2's heap, filled as guests may fill it: what must not fail still finds memory, and what is freed is room again.
fn keeps_some_heap(name: &str) -> Result<()> {
    let hello = tiny_guest(name, "hello")?;
    let words = ["--batch", "--timeout", "120", "--kernel", &hello, "--host-append", "selftest=heap"];
    start(name, &words)?.finish()?;
    let log = fs::read_to_string(logs(name).join("hv.log"))?;
    ensure!(log.matches("self test: heap: full after").count() == 4, "it was not filled twice with each");
    ensure!(log.contains("self test: heap: ok"), "the self test did not say that it is well");
    Ok(())
}

/// EL2's own memcpy, memmove and memset, on the machine itself.
fn moves_bytes(name: &str) -> Result<()> {
    let hello = tiny_guest(name, "hello")?;
    let words = ["--batch", "--timeout", "120", "--kernel", &hello, "--host-append", "selftest=copy"];
    start(name, &words)?.finish()?;
    let log = fs::read_to_string(logs(name).join("hv.log"))?;
    ensure!(log.contains("self test: copy: ok"), "the self test did not say that it is well");
    Ok(())
}
