//! Random accesses to every register of the interrupt controller, of every width, and to the CPU
//! interface. What comes back does not matter, only that something does.
//!
//! Options: `count=20000`, `seed=1`.

use hv_abi::machine::{GICD, GICR_BASE, GICR_STRIDE};

use crate::gic;
use crate::runtime::{Machine, Random};
use crate::trap::Fault;

/// As many as were asked for; now and then interrupts are let in for a moment.
pub fn run(machine: &Machine) {
    let mut random = Random::new(machine.option("seed", 1));
    let mut aborts = 0u32;
    let count = machine.option("count", 20_000);
    for round in 0..count {
        if round % 8 == 7 {
            interface(&mut random);
            continue;
        }
        // One redistributor more than there are.
        let at = if random.below(2) == 0 {
            GICD.base + random.below(GICD.size)
        } else {
            GICR_BASE + random.below(GICR_STRIDE * (machine.vcpus as u64 + 1))
        };
        if let Some(fault) = access(&mut random, at) {
            assert_eq!(fault.class(), 0x25, "{at:#x}: {fault:x?}");
            aborts += 1;
        }
        if round % 1000 == 999 {
            gic::unmask();
            gic::mask();
        }
    }
    println!("{count} accesses, {aborts} aborts");
}

fn access(random: &mut Random, at: u64) -> Option<Fault> {
    let width = random.below(4);
    // Mostly aligned.
    let at = if random.below(8) == 0 { at } else { at & !((1 << width) - 1) };
    let value = match random.below(4) {
        0 => 0,
        1 => !0,
        _ => random.draw(),
    };
    match (random.below(2) == 0, width) {
        (true, 0) => probe!("ldrb {a:w}, [{at}]", a = out(reg) _, at = in(reg) at),
        (true, 1) => probe!("ldrh {a:w}, [{at}]", a = out(reg) _, at = in(reg) at),
        (true, 2) => probe!("ldr {a:w}, [{at}]", a = out(reg) _, at = in(reg) at),
        (true, _) => probe!("ldr {a}, [{at}]", a = out(reg) _, at = in(reg) at),
        (false, 0) => probe!("strb {a:w}, [{at}]", a = in(reg) value, at = in(reg) at),
        (false, 1) => probe!("strh {a:w}, [{at}]", a = in(reg) value, at = in(reg) at),
        (false, 2) => probe!("str {a:w}, [{at}]", a = in(reg) value, at = in(reg) at),
        (false, _) => probe!("str {a}, [{at}]", a = in(reg) value, at = in(reg) at),
    }
}

/// One access to the CPU interface; none of them may fault.
fn interface(random: &mut Random) {
    let value = random.draw();
    let fault = match random.below(14) {
        0 => probe!("msr icc_pmr_el1, {a}", a = in(reg) value),
        1 => probe!("msr icc_bpr1_el1, {a}", a = in(reg) value & 7),
        2 => probe!("msr icc_ctlr_el1, {a}", a = in(reg) value & 3),
        3 => probe!("msr icc_igrpen1_el1, {a}", a = in(reg) value & 1),
        4 => probe!("msr icc_igrpen0_el1, {a}", a = in(reg) value & 1),
        5 => probe!("msr icc_sgi1r_el1, {a}", a = in(reg) value),
        6 => probe!("msr icc_sgi0r_el1, {a}", a = in(reg) value),
        7 => probe!("msr icc_asgi1r_el1, {a}", a = in(reg) value),
        8 => probe!("msr icc_eoir1_el1, {a}", a = in(reg) value & 0x3ff),
        9 => probe!("msr icc_dir_el1, {a}", a = in(reg) value & 0x3ff),
        10 => probe!("msr icc_ap1r0_el1, {a}", a = in(reg) value & 0xffff_ffff),
        11 => probe!("mrs {a}, icc_iar1_el1", a = out(reg) _),
        12 => probe!("mrs {a}, icc_hppir1_el1", a = out(reg) _),
        _ => probe!("mrs {a}, icc_rpr_el1", a = out(reg) _),
    };
    assert!(fault.is_none(), "the CPU interface: {fault:x?}");
}
