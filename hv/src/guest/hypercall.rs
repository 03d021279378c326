//! HVC and SMC: PSCI, then the calling convention's own services.
//!
//! Both instructions are the same call; a trapped SMC alone must be stepped over, which `exit` does. What
//! a call wants from other vCPUs goes up as a kick; what it wants from the guest as a whole is an
//! [`Exit`]. Calls `psci`, `smccc`.

use super::exit::{Asked, Ending, Exit, Run};
use super::psci::{self, Request, code};
use super::sysreg::TimerRegister;
use super::vcpu::Power;
use super::{rank, smccc};
use hv_abi::call::vendor;
use hv_abi::machine::index_of;
use hv_abi::manifest::FORK_LIMIT;
use vmobject::lock::Held;

/// Fast calls of the architecture.
const ARCHITECTURE: u32 = 0x80;
/// Fast calls of standard services: PSCI, random numbers.
const STANDARD: u32 = 0x84;
/// Fast calls of the hypervisor's vendor.
const VENDOR: u32 = 0x86;

/// Answers the call in the guest's registers.
#[inline]
pub fn call(run: &mut Run<'_>, held: &mut Held<'_, { rank::VCPU }>) -> Exit {
    let x = &run.context.regs.x;
    #[expect(clippy::cast_possible_truncation, reason = "a function number is 32 bits wide")]
    let number = x[0] as u32;
    // The service that a number belongs to, whichever convention it uses: ours all are fast calls.
    let owner = number >> 24 & !0x40;
    if !matches!(owner, ARCHITECTURE | STANDARD | VENDOR) {
        run.context.regs.x[0] = code::NOT_SUPPORTED;
        return Exit::Resume;
    }
    match psci::call(number, [x[1], x[2], x[3]]) {
        Some(Request::Answer(answer)) => {
            run.context.regs.x[0] = answer;
            Exit::Resume
        }
        Some(request) => power(run, request, held),
        None if number == vendor::FORK => fork(run),
        None => service(run, number, held),
    }
}

/// The caller's guest is forked once its registers are in memory.
#[cold]
fn fork(run: &mut Run<'_>) -> Exit {
    match u32::try_from(run.context.regs.x[1]) {
        Ok(count @ 1..=FORK_LIMIT) => Exit::Fork(count, Asked::Call),
        Ok(_) | Err(_) => {
            run.context.regs.x[0] = code::INVALID_PARAMETERS;
            Exit::Resume
        }
    }
}

#[cold]
fn service(run: &mut Run<'_>, number: u32, held: &mut Held<'_, { rank::VCPU }>) -> Exit {
    let argument = run.context.regs.x[1];
    let guest = run.guest;
    let answer = if number == vendor::IDENTITY {
        let (id, birth) = (u64::from(guest.id.0), &guest.birth);
        [code::SUCCESS, id, birth.place.into(), birth.of.into()].map(Some)
    } else {
        smccc::call(number, argument, || guest.random.lock(held).0.words())
    };
    for (register, value) in run.context.regs.x.iter_mut().zip(answer) {
        if let Some(value) = value {
            *register = value;
        }
    }
    Exit::Resume
}

#[cold]
fn power(run: &mut Run<'_>, request: Request, held: &mut Held<'_, { rank::VCPU }>) -> Exit {
    let answer = match request {
        Request::Answer(answer) => answer,
        Request::Suspend => {
            run.context.regs.x[0] = code::SUCCESS;
            return Exit::Idle;
        }
        Request::CpuOff => return cpu_off(run, held),
        Request::CpuOn { target, entry, context } => cpu_on(run, target, entry, context, held),
        Request::AffinityInfo { target } => affinity_info(run, target, held),
        Request::SystemOff => return Exit::End(Ending::Off),
        Request::SystemReset => return Exit::End(Ending::Reset),
    };
    run.context.regs.x[0] = answer;
    Exit::Resume
}

/// Switches the caller off, and its timers with it: the virtual one is among the registers that a start makes anew, the
/// physical one is a device of ours, and once this vCPU is off another may start it.
fn cpu_off(run: &mut Run<'_>, held: &mut Held<'_, { rank::VCPU }>) -> Exit {
    let now = run.guest.time();
    {
        let (mut devices, _held) = run.guest.devices.lock(held);
        run.kicks |= devices.timer_write(run.vcpu.index, TimerRegister::Control, 0, now);
    }
    let (mut power, _held) = run.vcpu.power.lock(held);
    *power = Power::Off;
    Exit::Off
}

fn cpu_on(
    run: &mut Run<'_>,
    target: u64,
    entry: u64,
    context: u64,
    held: &mut Held<'_, { rank::VCPU }>,
) -> u64 {
    let Some(vcpu) = index_of(target).and_then(|index| run.guest.vcpus.get(index)) else {
        return code::INVALID_PARAMETERS;
    };
    if entry & 0b11 != 0 {
        return code::INVALID_ADDRESS;
    }
    match vcpu.power_on(entry, context, held) {
        Ok(()) => {
            run.kicks |= 1 << vcpu.index;
            code::SUCCESS
        }
        Err(Power::OnPending { .. }) => code::ON_PENDING,
        Err(Power::On | Power::Off) => code::ALREADY_ON,
    }
}

fn affinity_info(run: &Run<'_>, target: u64, held: &mut Held<'_, { rank::VCPU }>) -> u64 {
    let Some(vcpu) = index_of(target).and_then(|index| run.guest.vcpus.get(index)) else {
        return code::INVALID_PARAMETERS;
    };
    let (power, _held) = vcpu.power.lock(held);
    match *power {
        Power::On => 0,
        Power::Off => 1,
        Power::OnPending { .. } => 2,
    }
}
