//! One interrupt at a time, from its source through a list register to its end.

use super::super::lists::{LR_ACTIVE, LR_EOI, LR_HW, LR_PENDING, LR_STATE};
use super::super::{SgiRegister, TIMER_PPI, Vgic};
use super::cpu::Cpu;
use super::{audit, ready};
use crate::vdev::Kicks;

/// Both groups on, every priority let through.
const VMCR: u64 = 0xff00_0003;
const UART: u32 = 33;

fn pair() -> (Vgic, Cpu) {
    (ready(2, 4), Cpu::new(4))
}

#[test]
fn an_sgi_reaches_the_list_registers_of_its_target_alone() {
    let (mut vgic, mut cpu) = pair();
    assert_eq!(vgic.sgi(0, SgiRegister::Sgi1R, 5 << 24 | 0b10), Kicks(0b10));
    assert!(!vgic.is_dirty(0) && vgic.is_dirty(1));
    let _ = Cpu::new(4).turn(&mut vgic, 0);
    assert_eq!(vgic.listed(0), 0);
    let _ = cpu.turn(&mut vgic, 1);
    assert_eq!(cpu.lrs, [0x50a0_0000_0000_0005, 0, 0, 0]);
    assert_eq!(vgic.listed(1), 1);
    assert_eq!(cpu.acknowledge(), Some(5));
    assert_eq!(cpu.end(), Some(5));
    assert!(!cpu.maintenance());
    let _ = cpu.turn(&mut vgic, 1);
    assert_eq!(cpu.writes, 1, "an ended edge needs no second write");
    assert_eq!(vgic.listed(1), 0);
}

#[test]
fn a_flush_with_nothing_new_changes_nothing() {
    let (mut vgic, mut cpu) = pair();
    let _ = vgic.set_spi(UART, true);
    let _ = cpu.turn(&mut vgic, 0);
    let (lrs, writes) = (cpu.lrs.clone(), cpu.writes);
    for _ in 0..3 {
        assert!(!vgic.is_dirty(0));
        let _ = cpu.turn(&mut vgic, 0);
    }
    assert_eq!((cpu.lrs, cpu.writes), (lrs, writes));
}

#[test]
fn a_line_still_high_at_the_end_of_its_interrupt_comes_again() {
    let (mut vgic, mut cpu) = pair();
    assert_eq!(vgic.set_spi(UART, true), Kicks(1));
    let _ = cpu.turn(&mut vgic, 0);
    assert_eq!(cpu.acknowledge(), Some(UART));
    let _ = cpu.turn(&mut vgic, 0);
    assert_eq!(cpu.lrs[0] & LR_STATE, LR_ACTIVE, "level: not pending while active");
    let _ = cpu.end();
    assert!(cpu.maintenance());
    let _ = cpu.turn(&mut vgic, 0);
    assert_eq!(cpu.acknowledge(), Some(UART));
    assert_eq!(vgic.set_spi(UART, false), Kicks(1), "the list register asks for maintenance in vain");
    let _ = cpu.turn(&mut vgic, 0);
    assert_eq!(cpu.lrs[0] & LR_EOI, 0);
    let _ = cpu.end();
    assert!(!cpu.maintenance());
    let _ = cpu.turn(&mut vgic, 0);
    assert_eq!(cpu.acknowledge(), None);
}

#[test]
fn a_line_that_falls_before_its_interrupt_is_taken_takes_it_back() {
    let (mut vgic, mut cpu) = pair();
    let _ = vgic.set_spi(UART, true);
    let _ = cpu.turn(&mut vgic, 0);
    assert_eq!(vgic.set_spi(UART, false), Kicks(1));
    let _ = cpu.turn(&mut vgic, 0);
    assert_eq!(cpu.highest(3), None);
    assert_eq!(vgic.listed(0), 0);
}

#[test]
fn an_edge_while_active_is_pending_and_active() {
    let (mut vgic, mut cpu) = pair();
    let _ = vgic.dist_write(0xc08, 4, 0b1000);
    let _ = vgic.set_spi(UART, true);
    let _ = vgic.set_spi(UART, false);
    let _ = cpu.turn(&mut vgic, 0);
    assert_eq!(cpu.acknowledge(), Some(UART));
    assert_eq!(vgic.set_spi(UART, true), Kicks(1));
    let _ = cpu.turn(&mut vgic, 0);
    assert_eq!(cpu.lrs[0] & LR_STATE, LR_PENDING | LR_ACTIVE);
    assert_eq!(cpu.acknowledge(), None);
    let _ = cpu.end();
    assert_eq!(cpu.acknowledge(), Some(UART));
    let _ = cpu.end();
    let _ = cpu.turn(&mut vgic, 0);
    assert_eq!(cpu.acknowledge(), None);
    assert_eq!(vgic.dist_read(0x204, 4), 0, "the line is high, but it was one edge");
}

#[test]
fn two_edges_before_the_first_is_taken_are_one_interrupt() {
    let (mut vgic, mut cpu) = pair();
    let _ = vgic.sgi(1, SgiRegister::Sgi1R, 1);
    let _ = cpu.turn(&mut vgic, 0);
    let _ = vgic.sgi(1, SgiRegister::Sgi1R, 1);
    let _ = cpu.turn(&mut vgic, 0);
    assert_eq!(cpu.acknowledge(), Some(0));
    let _ = cpu.end();
    let _ = cpu.turn(&mut vgic, 0);
    assert_eq!(cpu.acknowledge(), None);
}

#[test]
fn more_interrupts_than_list_registers_come_in_order_of_priority() {
    let (mut vgic, mut cpu) = pair();
    for intid in 40..60u32 {
        let priority = u64::from((intid * 7) % 31) << 3;
        let _ = vgic.dist_write(u64::from(0x400 + intid), 1, priority);
        let _ = vgic.set_spi(intid, true);
    }
    let mut last = 0;
    for _ in 40..60 {
        let _ = cpu.turn(&mut vgic, 0);
        let intid = cpu.acknowledge().unwrap();
        let priority = (intid * 7) % 31;
        assert!(priority >= last, "{intid} came too late");
        last = priority;
        let _ = vgic.set_spi(intid, false);
        let _ = cpu.end();
    }
    let _ = cpu.turn(&mut vgic, 0);
    assert_eq!(cpu.acknowledge(), None);
}

#[test]
fn what_did_not_fit_comes_without_any_exit_but_maintenance() {
    let (mut vgic, mut cpu) = pair();
    for intid in 0..12 {
        let _ = vgic.sgi(1, SgiRegister::Sgi1R, intid << 24 | 1);
    }
    let _ = cpu.turn(&mut vgic, 0);
    let mut taken = 0;
    while let Some(intid) = cpu.acknowledge() {
        assert_eq!(intid, taken);
        taken += 1;
        let _ = cpu.end();
        if cpu.maintenance() {
            let _ = cpu.turn(&mut vgic, 0);
        }
    }
    assert_eq!(taken, 12);
}

#[test]
fn a_linked_interrupt_that_fills_the_list_registers_makes_way() {
    let mut vgic = ready(1, 1);
    let mut cpu = Cpu::new(1);
    let _ = vgic.redist_write(0, 0x1_041b, 1, 0x80);
    cpu.timer = true;
    let _ = vgic.set_spi(UART, true);
    let _ = cpu.turn(&mut vgic, 0);
    assert_eq!(cpu.acknowledge(), Some(TIMER_PPI));
    cpu.timer = false;
    let _ = cpu.end();
    assert!(cpu.maintenance(), "it asks for none at its own end");
    let _ = cpu.turn(&mut vgic, 0);
    assert_eq!(cpu.acknowledge(), Some(UART));
}

#[test]
fn nested_handlers_beyond_the_list_registers_end_in_order() {
    let mut vgic = ready(1, 2);
    let mut cpu = Cpu::new(2);
    for depth in 0..6u64 {
        let intid = 40 + depth;
        let _ = vgic.dist_write(0x400 + intid, 1, 0xf0 - (depth << 3));
        let _ = vgic.set_spi(u32::try_from(intid).unwrap(), true);
        let _ = cpu.turn(&mut vgic, 0);
        assert_eq!(cpu.acknowledge(), Some(u32::try_from(intid).unwrap()), "each more urgent than the last");
        let _ = cpu.turn(&mut vgic, 0);
    }
    for depth in (0..6).rev() {
        let _ = vgic.set_spi(40 + depth, false);
        assert_eq!(cpu.end(), Some(40 + depth));
        let _ = cpu.turn(&mut vgic, 0);
        audit(&vgic);
        assert_eq!(vgic.dist_read(0x304, 4), ((1 << depth) - 1) << 8, "after {depth}");
    }
}

#[test]
fn a_deactivation_that_traps_finds_what_no_list_register_holds() {
    let mut vgic = ready(1, 1);
    let mut cpu = Cpu::new(1);
    cpu.split = true;
    let _ = vgic.sgi(0, SgiRegister::Sgi1R, 1 << 24 | 1);
    let _ = cpu.turn(&mut vgic, 0);
    assert_eq!(cpu.acknowledge(), Some(1));
    assert_eq!(cpu.end(), Some(1));
    let _ = vgic.sgi(0, SgiRegister::Sgi1R, 2 << 24 | 1);
    let _ = cpu.turn(&mut vgic, 0);
    assert!(cpu.traps_deactivation());
    assert_eq!(vgic.redist_read(0, 0x1_0300, 4), 0b10);
    let _ = vgic.deactivate(0, 1);
    let _ = cpu.turn(&mut vgic, 0);
    assert!(!cpu.traps_deactivation());
    assert_eq!(vgic.redist_read(0, 0x1_0300, 4), 0);
    assert_eq!(cpu.acknowledge(), Some(2));
}

#[test]
fn an_spi_that_one_vcpu_took_is_deactivated_by_another_and_comes_again() {
    for by_register in [false, true] {
        let (mut vgic, mut first) = pair();
        let mut second = Cpu::new(4);
        first.split = true;
        let _ = vgic.set_spi(UART, true);
        let _ = first.turn(&mut vgic, 0);
        let _ = second.turn(&mut vgic, 1);
        assert_eq!((first.acknowledge(), first.end()), (Some(UART), Some(UART)));
        let _ = first.turn(&mut vgic, 0);
        assert_eq!(first.highest(3), None, "active until somebody deactivates it");

        let _ = vgic.sgi(0, SgiRegister::Sgi1R, 5 << 24 | 0b10);
        let _ = second.turn(&mut vgic, 1);
        assert!(second.traps_deactivation(), "its list registers do not hold what the other took");
        let kicks = if by_register { vgic.dist_write(0x384, 4, 1 << 1) } else { vgic.deactivate(1, UART) };
        assert_eq!(kicks.0 & 1, 1, "the vCPU whose list register has it must look");
        let _ = first.turn(&mut vgic, 0);
        audit(&vgic);
        assert_eq!(vgic.dist_read(0x304, 4), 0, "active");
        assert_eq!(first.acknowledge(), Some(UART), "the line is still high");
    }
}

#[test]
fn a_pending_spi_whose_route_changes_goes_to_the_other_vcpu() {
    let (mut vgic, mut first) = pair();
    let mut second = Cpu::new(4);
    let _ = vgic.set_spi(UART, true);
    let _ = first.turn(&mut vgic, 0);
    assert_eq!(vgic.dist_write(0x6000 + 8 * u64::from(UART), 8, 1), Kicks(1), "who has it gives it back");
    assert_eq!(first.turn(&mut vgic, 0), Kicks(2), "and it is passed on");
    let _ = second.turn(&mut vgic, 1);
    assert_eq!((first.highest(3), second.acknowledge()), (None, Some(UART)));
    // Active on the second: it stays there until it ends.
    let _ = vgic.dist_write(0x6000 + 8 * u64::from(UART), 8, 0);
    let _ = second.turn(&mut vgic, 1);
    let _ = first.turn(&mut vgic, 0);
    assert_eq!(first.highest(3), None);
    let _ = second.end();
    assert!(second.maintenance());
    assert_eq!(second.turn(&mut vgic, 1), Kicks(1));
    let _ = first.turn(&mut vgic, 0);
    assert_eq!(first.acknowledge(), Some(UART));
}

#[test]
fn an_spi_routed_to_nobody_waits_for_a_route() {
    let (mut vgic, mut cpu) = pair();
    let _ = vgic.dist_write(0x6000 + 8 * u64::from(UART), 8, 0x1_0000_0001);
    assert_eq!(vgic.set_spi(UART, true), Kicks::NONE);
    let _ = cpu.turn(&mut vgic, 0);
    assert_eq!(cpu.highest(3), None);
    assert_eq!(vgic.dist_write(0x6000 + 8 * u64::from(UART), 4, 0), Kicks::NONE, "no such affinity still");
    assert_eq!(vgic.dist_write(0x6000 + 8 * u64::from(UART), 8, 1), Kicks(2));
}

#[test]
fn disabling_takes_back_and_enabling_gives_again() {
    let (mut vgic, mut cpu) = pair();
    let _ = vgic.set_spi(UART, true);
    let _ = cpu.turn(&mut vgic, 0);
    assert_eq!(vgic.dist_write(0x184, 4, 1 << 1), Kicks(1));
    let _ = cpu.turn(&mut vgic, 0);
    assert_eq!(cpu.highest(3), None);
    assert_eq!(vgic.dist_read(0x204, 4), 1 << 1, "still pending");
    assert_eq!(vgic.dist_write(0x104, 4, 1 << 1), Kicks(1));
    let _ = cpu.turn(&mut vgic, 0);
    assert_eq!(cpu.highest(3), Some(UART));
    let _ = vgic.dist_write(0, 4, 1);
    let _ = cpu.turn(&mut vgic, 0);
    assert_eq!(cpu.highest(3), None, "group 1 is off");
}

#[test]
fn active_and_pending_can_be_written_while_a_list_register_has_them() {
    let (mut vgic, mut cpu) = pair();
    let _ = vgic.sgi(1, SgiRegister::Sgi1R, 3 << 24 | 1);
    let _ = cpu.turn(&mut vgic, 0);
    let _ = vgic.redist_write(0, 0x1_0280, 4, 1 << 3);
    let _ = cpu.turn(&mut vgic, 0);
    assert_eq!(cpu.highest(3), None, "ICPENDR");
    let _ = vgic.redist_write(0, 0x1_0200, 4, 1 << 3);
    let _ = cpu.turn(&mut vgic, 0);
    assert_eq!(cpu.acknowledge(), Some(3), "ISPENDR");
    let _ = vgic.redist_write(0, 0x1_0380, 4, 1 << 3);
    let _ = cpu.turn(&mut vgic, 0);
    assert_eq!(vgic.redist_read(0, 0x1_0300, 4), 0, "ICACTIVER");
    assert_eq!(vgic.listed(0), 0);
    let _ = vgic.redist_write(0, 0x1_0300, 4, 1 << 3);
    let _ = cpu.turn(&mut vgic, 0);
    assert_eq!(cpu.lrs[0] & LR_STATE, LR_ACTIVE, "ISACTIVER");
    cpu.deactivate(3);
    let _ = cpu.turn(&mut vgic, 0);
    assert_eq!(vgic.redist_read(0, 0x1_0300, 4), 0);
}

#[test]
fn a_read_that_depends_on_a_running_vcpu_says_so() {
    let (mut vgic, mut cpu) = pair();
    let _ = vgic.set_spi(UART, true);
    let _ = cpu.turn(&mut vgic, 0);
    assert_eq!(vgic.dist_read(0x304, 4), 0);
    assert_eq!(vgic.take_stale(), Kicks(1));
    assert_eq!(vgic.take_stale(), Kicks::NONE);
    let _ = cpu.acknowledge();
    let _ = vgic.sync(0, |lr| cpu.lrs[lr]);
    assert_eq!(vgic.dist_read(0x304, 4), 1 << 1);
    assert_eq!(vgic.take_stale(), Kicks::NONE, "nothing is listed between sync and flush of what changed");
    assert_eq!(vgic.dist_read(0x308, 4), 0);
    assert_eq!(vgic.take_stale(), Kicks::NONE);
}

#[test]
fn the_timer_interrupt_is_linked_and_fires_again_while_its_line_is_high() {
    let (mut vgic, mut cpu) = pair();
    cpu.timer = true;
    let _ = cpu.turn(&mut vgic, 0);
    assert!(cpu.timer_active);
    assert_eq!(cpu.lrs[0] & (LR_HW | LR_STATE), LR_HW | LR_PENDING);
    assert_eq!(cpu.lrs[0] >> 32 & 0x1fff, u64::from(TIMER_PPI));
    assert_eq!(cpu.acknowledge(), Some(TIMER_PPI));
    let _ = cpu.turn(&mut vgic, 0);
    assert!(cpu.timer_active, "the guest is not done");
    let _ = cpu.end();
    assert!(!cpu.timer_active, "the guest's end was the physical one's");
    // The guest did not move its comparator: the physical interrupt is there before the sync is.
    let _ = cpu.turn(&mut vgic, 0);
    assert_eq!(cpu.acknowledge(), Some(TIMER_PPI));
    cpu.timer = false;
    let _ = cpu.end();
    let _ = cpu.turn(&mut vgic, 0);
    assert_eq!((cpu.highest(3), cpu.timer_active, vgic.timer_is_live(0)), (None, false, false));
    assert_eq!(cpu.releases, 0);
}

#[test]
fn a_timer_turned_off_before_its_interrupt_is_taken_lets_the_physical_one_go() {
    let (mut vgic, mut cpu) = pair();
    cpu.timer = true;
    let _ = cpu.turn(&mut vgic, 0);
    cpu.timer = false;
    let _ = cpu.turn(&mut vgic, 0);
    assert_eq!((cpu.highest(3), cpu.timer_active), (None, false));
    cpu.timer = true;
    let _ = cpu.turn(&mut vgic, 0);
    assert_eq!(cpu.acknowledge(), Some(TIMER_PPI));
}

#[test]
fn a_disabled_timer_interrupt_keeps_the_physical_one_active_and_fires_once_enabled() {
    let (mut vgic, mut cpu) = pair();
    let _ = vgic.redist_write(0, 0x1_0180, 4, 1 << 27);
    cpu.timer = true;
    let _ = cpu.turn(&mut vgic, 0);
    assert_eq!((cpu.highest(3), cpu.timer_active), (None, true), "no storm");
    assert_eq!(vgic.redist_write(0, 0x1_0100, 4, 1 << 27), Kicks(1));
    let _ = cpu.turn(&mut vgic, 0);
    assert_eq!(cpu.acknowledge(), Some(TIMER_PPI));
}

#[test]
fn clearing_the_timers_active_state_lets_the_physical_one_go() {
    let (mut vgic, mut cpu) = pair();
    cpu.timer = true;
    let _ = cpu.turn(&mut vgic, 0);
    let _ = cpu.acknowledge();
    cpu.timer = false;
    let _ = vgic.redist_write(0, 0x1_0380, 4, 1 << 27);
    let _ = cpu.turn(&mut vgic, 0);
    assert_eq!((cpu.timer_active, vgic.redist_read(0, 0x1_0300, 4)), (false, 0));
}

#[test]
fn a_vcpu_takes_its_interrupts_and_the_timers_state_to_another_cpu() {
    let (mut vgic, mut cpu) = pair();
    cpu.timer = true;
    let _ = vgic.set_spi(UART, true);
    let _ = vgic.sgi(1, SgiRegister::Sgi1R, 1);
    let _ = cpu.turn(&mut vgic, 0);
    assert_eq!(cpu.acknowledge(), Some(0));
    let _ = cpu.end();
    assert_eq!(cpu.acknowledge(), Some(TIMER_PPI));
    let _ = vgic.sync(0, |lr| cpu.lrs[lr]);
    let _ = vgic.unlist(0);
    audit(&vgic);
    assert_eq!(vgic.listed(0), 0);
    let mut copy = vgic.clone();
    let mut other = Cpu::new(4);
    other.running = cpu.running.clone();
    other.timer = true;
    other.timer_active = vgic.timer_is_live(0);
    let _ = other.turn(&mut vgic, 0);
    assert_eq!(other.lrs[0] & (LR_HW | LR_STATE), LR_HW | LR_ACTIVE);
    other.timer = false;
    let _ = other.end();
    assert!(!other.timer_active);
    assert_eq!(other.acknowledge(), Some(UART));
    // A copy of the guest goes on from the same place.
    assert_eq!((copy.redist_read(0, 0x1_0300, 4), copy.dist_read(0x204, 4)), (1 << 27, 1 << 1));
}

#[test]
fn a_list_register_that_asks_for_maintenance_is_cleared_when_its_vcpu_leaves() {
    let (mut vgic, mut cpu) = pair();
    let _ = vgic.set_spi(UART, true);
    let _ = cpu.turn(&mut vgic, 0);
    let _ = cpu.acknowledge();
    let _ = cpu.end();
    // It waits for an interrupt before the maintenance interrupt gets through, and then makes way.
    let _ = vgic.sync(0, |lr| cpu.lrs[lr]);
    let _ = cpu.leave(&mut vgic, 0);
    assert_eq!(vgic.listed(0), 0);
    assert!(vgic.has_pending(0, VMCR));
}

#[test]
fn waiting_ends_for_what_the_interface_lets_through() {
    let (mut vgic, mut cpu) = pair();
    assert!(!vgic.has_pending(0, VMCR));
    let _ = vgic.set_spi(UART, true);
    for _ in 0..2 {
        // First from the bank, then from the list register.
        assert!(vgic.has_pending(0, VMCR));
        assert!(!vgic.has_pending(1, VMCR), "another vCPU");
        assert!(!vgic.has_pending(0, 0xff00_0001), "group 1 off");
        assert!(vgic.has_pending(0, 0xff00_0002));
        assert!(!vgic.has_pending(0, 0xa000_0003), "masked by priority");
        assert!(vgic.has_pending(0, 0xa800_0003));
        assert!(vgic.requests_wake(0), "whatever the interface says");
        let _ = cpu.turn(&mut vgic, 0);
    }
    let _ = cpu.acknowledge();
    let _ = cpu.turn(&mut vgic, 0);
    assert!(!vgic.has_pending(0, VMCR), "active is not pending");
    let _ = vgic.dist_write(0, 4, 0);
    assert!(!vgic.requests_wake(0));
}
