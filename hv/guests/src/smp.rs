//! All vCPUs on, SGIs to each and around, all off, and each on again, with the timers off that it left on.
//!
//! Options: `rounds=50`, `laps=20`.

use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use hv_abi::call::status;
use hv_abi::machine::MAX_VCPUS;

use crate::register::cpu;
use crate::runtime::{Machine, start_vcpu};
use crate::timer::wait_until;
use crate::{gic, mmu, power, trap};

const PING: u32 = 1;
const RING: u32 = 2;
const WAKE: u32 = 3;
const LIMIT: u64 = 20_000;

static ONLINE: [AtomicBool; MAX_VCPUS] = [const { AtomicBool::new(false) }; MAX_VCPUS];
static VCPUS: AtomicU64 = AtomicU64::new(1);
static STOP: AtomicBool = AtomicBool::new(false);

/// The whole round.
pub fn run(machine: &Machine) {
    mmu::enable();
    gic::init_distributor();
    gic::init_cpu();
    gic::unmask();
    let vcpus = machine.vcpus;
    VCPUS.store(vcpus as u64, Ordering::Relaxed);
    let others = 1..vcpus;
    for index in others.clone() {
        assert!(power::is_off(index), "vcpu {index} runs before it was started");
        assert_eq!(start_vcpu(index, secondary, true), status::SUCCESS, "starting vcpu {index}");
        assert!(wait_until(LIMIT, || ONLINE[index].load(Ordering::Acquire)), "vcpu {index} does not come");
        assert_eq!(start_vcpu(index, secondary, true), status::ALREADY_ON, "starting vcpu {index} again");
    }
    assert_eq!(start_vcpu(vcpus, secondary, true), status::INVALID_PARAMETERS, "a vcpu that is not there");
    let rounds = machine.option("rounds", 50);
    for round in 1..=rounds {
        for index in others.clone() {
            gic::send(PING, index);
            let come = || u64::from(trap::of(index).count(PING)) == round;
            assert!(wait_until(LIMIT, come), "SGI {round} to vcpu {index} is lost");
        }
    }
    if vcpus > 1 {
        let laps = machine.option("laps", 20);
        for lap in 1..=laps {
            gic::send(RING, 1);
            let come = || u64::from(trap::of(0).count(RING)) == lap;
            assert!(wait_until(LIMIT, come), "lap {lap} of the ring is lost");
        }
    }
    STOP.store(true, Ordering::Release);
    for index in others.clone() {
        gic::send(WAKE, index);
        assert!(wait_until(LIMIT, || power::is_off(index)), "vcpu {index} does not go off");
        assert_eq!(u64::from(trap::of(index).count(PING)), rounds, "vcpu {index} got an SGI twice");
        ONLINE[index].store(false, Ordering::Relaxed);
    }
    for index in others {
        assert_eq!(start_vcpu(index, secondary, true), status::SUCCESS, "starting vcpu {index} once more");
        assert!(wait_until(LIMIT, || ONLINE[index].load(Ordering::Acquire)), "vcpu {index} stays away");
        assert!(wait_until(LIMIT, || power::is_off(index)), "vcpu {index} does not go off again");
    }
    println!("{vcpus} vcpus, {rounds} rounds");
}

fn secondary(index: usize) {
    assert_eq!(index, cpu(), "X0 and MPIDR_EL1 disagree");
    let timers = [read_register!("cntv_ctl_el0"), read_register!("cntp_ctl_el0")];
    assert_eq!(timers.map(|control| control & 1), [0; 2], "a timer is on in a vcpu that was off");
    gic::init_cpu();
    ONLINE[index].store(true, Ordering::Release);
    let vcpus = VCPUS.load(Ordering::Relaxed);
    let mut passed_on = trap::seen().count(RING);
    // Masked while it looks, so that what comes after the look ends the WFI.
    while !STOP.load(Ordering::Acquire) {
        instruction!("wfi");
        gic::unmask();
        gic::mask();
        if trap::seen().count(RING) > passed_on {
            passed_on += 1;
            gic::send(RING, if index as u64 + 1 == vcpus { 0 } else { index + 1 });
        }
    }
    // On, masked, and left so: it is switched off like that.
    write_register!("cntv_ctl_el0", 3);
    write_register!("cntp_ctl_el0", 3);
}
