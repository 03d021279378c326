//! Says hello: the least that runs. What it prints is what a flat program is promised.

use crate::runtime::Machine;

/// Prints where it is and what it was given.
pub fn run(machine: &Machine) {
    let level = read_register!("currentel") >> 2 & 3;
    let mmu = read_register!("sctlr_el1") & 1;
    println!(
        "hello from EL{level}, MMU {}, tree at {:#x}",
        if mmu == 0 { "off" } else { "on" },
        machine.tree
    );
    println!("{} MiB, {} vcpus, arguments: {}", machine.memory >> 20, machine.vcpus, machine.append());
    assert_eq!((level, mmu), (1, 0));
    assert!(machine.memory > 0 && machine.vcpus > 0, "the tree says nothing");
}
