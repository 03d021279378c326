//! Waiting: WFI returns when it must, even with interrupts masked; WFE with an event; and, with the
//! word `forever`, a WFI that nothing will ever end, for others to clean up after.

use hv_abi::machine::INTID_VIRTUAL_TIMER;

use crate::runtime::Machine;
use crate::timer::{self, milliseconds};
use crate::{gic, trap};

/// How late a timer may be on a host that is busy, in milliseconds.
const LIMIT: u64 = 20_000;

/// Waits in each way.
pub fn run(machine: &Machine) {
    if machine.flag("forever") {
        println!("guest wfi: asleep");
        loop {
            instruction!("wfi");
        }
    }
    gic::init_distributor();
    gic::init_cpu();
    // Pending and masked: returns at once, and nothing was taken.
    gic::send(5, 0);
    while !gic::is_pending(5) {}
    instruction!("wfi");
    assert_eq!(trap::seen().count(5), 0, "a masked interrupt was taken");
    gic::unmask();
    gic::mask();
    assert_eq!(trap::seen().count(5), 1, "an SGI was lost over a WFI");

    gic::enable(INTID_VIRTUAL_TIMER);
    for round in 1..=20 {
        let deadline = timer::now() + milliseconds(5);
        timer::arm(deadline);
        // It may return for nothing, but the timer must end it in the end.
        while timer::now() < deadline {
            instruction!("wfi");
        }
        let late = timer::now() - deadline;
        // An emulated timer may raise its line a moment after the counter says so.
        gic::unmask();
        timer::wait_until(LIMIT, || trap::seen().count(INTID_VIRTUAL_TIMER) >= round);
        gic::mask();
        assert_eq!(trap::seen().count(INTID_VIRTUAL_TIMER), round, "timer {round} was lost over a WFI");
        assert!(late < milliseconds(LIMIT), "woken {late} ticks late");
    }
    instruction!("sevl");
    instruction!("wfe");
    instruction!("sev");
    instruction!("wfe");
    println!("waits end");
}
