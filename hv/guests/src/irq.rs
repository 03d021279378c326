//! Interrupts on one vCPU: both timers, SGIs, an SPI pended by software, and none that should not come.
//!
//! Options: `ticks=20`.

use hv_abi::machine::{INTID_PHYSICAL_TIMER, INTID_VIRTUAL_TIMER, SPI_BASE};

use crate::runtime::Machine;
use crate::timer::{self, milliseconds, wait_until};
use crate::{gic, mmu, trap};

const LIMIT: u64 = 20_000;
/// An SPI that no device has.
const SPI: u32 = SPI_BASE + 10;

/// Each source alone.
pub fn run(machine: &Machine) {
    mmu::enable();
    gic::init_distributor();
    gic::init_cpu();
    gic::enable(INTID_VIRTUAL_TIMER);
    gic::enable(INTID_PHYSICAL_TIMER);
    gic::enable(SPI);
    gic::unmask();
    let ticks = machine.option("ticks", 20);
    virtual_timer(ticks);
    physical_timer(ticks);
    software();
    masks();
    let seen = trap::seen();
    println!("{} ticks of each timer, {} spurious", ticks, seen.spurious());
    assert!(seen.spurious() < 4, "{} spurious interrupts", seen.spurious());
}

fn comes(intid: u32, count: u32) {
    let come = wait_until(LIMIT, || trap::seen().count(intid) >= count);
    assert!(come, "interrupt {intid} number {count} is lost");
    assert_eq!(trap::seen().count(intid), count, "interrupt {intid} came too often");
}

fn virtual_timer(ticks: u64) {
    for tick in 1..=ticks {
        let deadline = timer::now() + milliseconds(2);
        timer::arm(deadline);
        #[expect(clippy::cast_possible_truncation, reason = "a small count")]
        comes(INTID_VIRTUAL_TIMER, tick as u32);
        assert!(trap::seen().last() >= deadline, "the virtual timer came early");
        assert_eq!(read_register!("cntv_ctl_el0"), 7, "enabled, masked, and past its time");
    }
}

fn physical_timer(ticks: u64) {
    for tick in 1..=ticks {
        let before = timer::now();
        let (physical, after) = (read_register!("cntpct_el0"), timer::now());
        let between = (before..=after).contains(&physical);
        assert!(between, "CNTPCT {physical:#x} is not between CNTVCT {before:#x} and {after:#x}");
        timer::arm_physical(milliseconds(2));
        #[expect(clippy::cast_possible_truncation, reason = "a small count")]
        comes(INTID_PHYSICAL_TIMER, tick as u32);
        assert!(trap::seen().last() >= before + milliseconds(2), "the physical timer came early");
        assert_eq!(read_register!("cntp_ctl_el0"), 7, "enabled, masked, and past its time");
    }
}

fn software() {
    for count in 1..=5 {
        for intid in 0..16 {
            gic::send(intid, 0);
            comes(intid, count);
        }
        gic::pend(SPI);
        comes(SPI, count);
    }
}

/// What is disabled, masked or taken back does not come; what was only held back does.
fn masks() {
    let seen = trap::seen();
    let spis = seen.count(SPI);
    gic::disable(SPI);
    gic::pend(SPI);
    assert!(gic::is_pending(SPI), "a pended SPI does not read as pending");
    quiet();
    assert_eq!(seen.count(SPI), spis, "a disabled interrupt came");
    gic::enable(SPI);
    comes(SPI, spis + 1);

    gic::mask();
    gic::pend(SPI);
    gic::unpend(SPI);
    gic::unmask();
    quiet();
    assert_eq!(seen.count(SPI), spis + 1, "an interrupt came that was taken back");

    write_register!("icc_pmr_el1", 0x80);
    gic::pend(SPI);
    quiet();
    assert_eq!(seen.count(SPI), spis + 1, "an interrupt came below the priority mask");
    write_register!("icc_pmr_el1", 0xff);
    comes(SPI, spis + 2);

    let timers = seen.count(INTID_VIRTUAL_TIMER);
    gic::mask();
    timer::arm(timer::now());
    assert!(wait_until(LIMIT, || gic::is_pending(INTID_VIRTUAL_TIMER)), "the timer's line does not show");
    timer::arm(u64::MAX);
    assert!(wait_until(LIMIT, || !gic::is_pending(INTID_VIRTUAL_TIMER)), "the timer's line does not fall");
    gic::unmask();
    quiet();
    assert_eq!(seen.count(INTID_VIRTUAL_TIMER), timers, "a timer came that was set off again");
    write_register!("cntv_ctl_el0", 0);
}

fn quiet() {
    let end = timer::now() + milliseconds(3);
    while timer::now() < end {}
}
