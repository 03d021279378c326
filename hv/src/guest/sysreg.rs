//! Trapped system registers and instructions.
//!
//! One `match` on the register; what is not in it is UNDEFINED for a guest (invariant I11): registers of
//! features that a guest is not given, IMPLEMENTATION DEFINED ones, the PMU. Identification registers
//! come from [`super::idregs`], debug registers from [`super::debug`], timers from the guest's devices.
//! Called by `exit`; the instruction is advanced there.

use super::debug::{self, Outcome};
use super::exit::Run;
use super::syndrome::{SysAccess, SysReg};
use crate::arch;
use crate::vdev::vgic::SgiRegister;
use vmobject::lock::Held;

use super::rank;

/// What to do with the instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Emulated {
    /// It is done.
    Done,
    /// It is done, and this goes into its register.
    Value(u64),
    /// It is UNDEFINED.
    Undefined,
}

const ICC_SGI1R: SysReg = SysReg::new(3, 0, 12, 11, 5);
const ICC_ASGI1R: SysReg = SysReg::new(3, 0, 12, 11, 6);
const ICC_SGI0R: SysReg = SysReg::new(3, 0, 12, 11, 7);
const ICC_DIR: SysReg = SysReg::new(3, 0, 12, 11, 1);
const ICC_SRE: SysReg = SysReg::new(3, 0, 12, 12, 5);
const CNTPCT: SysReg = SysReg::new(3, 3, 14, 0, 1);
const CNTPCTSS: SysReg = SysReg::new(3, 3, 14, 0, 5);
const CNTP_TVAL: SysReg = SysReg::new(3, 3, 14, 2, 0);
const CNTP_CTL: SysReg = SysReg::new(3, 3, 14, 2, 1);
const CNTP_CVAL: SysReg = SysReg::new(3, 3, 14, 2, 2);
const ACTLR: SysReg = SysReg::new(3, 0, 1, 0, 1);
const REVIDR: SysReg = SysReg::new(3, 0, 0, 0, 6);
const AIDR: SysReg = SysReg::new(3, 1, 0, 0, 7);
const DC_ISW: SysReg = SysReg::new(1, 0, 7, 6, 2);
const DC_CSW: SysReg = SysReg::new(1, 0, 7, 10, 2);
const DC_CISW: SysReg = SysReg::new(1, 0, 7, 14, 2);

/// A register of the guest's EL1 physical timer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TimerRegister {
    /// CNTP_TVAL_EL0.
    Value,
    /// CNTP_CTL_EL0.
    Control,
    /// CNTP_CVAL_EL0.
    Compare,
}

/// Does a trapped access; `value` is what a write writes.
pub fn access(
    run: &mut Run<'_>,
    access: SysAccess,
    value: u64,
    held: &mut Held<'_, { rank::VCPU }>,
) -> Emulated {
    match access.register {
        ICC_SGI1R | ICC_ASGI1R | ICC_SGI0R if access.read => Emulated::Undefined,
        ICC_SGI1R => send(run, SgiRegister::Sgi1R, value, held),
        ICC_ASGI1R => send(run, SgiRegister::Asgi1R, value, held),
        ICC_SGI0R => send(run, SgiRegister::Sgi0R, value, held),
        // Traps with several vCPUs, and while more interrupts are active than there are list registers.
        ICC_DIR if !access.read => {
            let intid = u32::try_from(value & 0xff_ffff).unwrap_or(0);
            let (mut devices, _held) = run.guest.devices.lock(held);
            run.kicks |= devices.deactivate(run.vcpu.index, intid);
            Emulated::Done
        }
        // System registers, no bypass, and that is all there is.
        ICC_SRE if access.read => Emulated::Value(7),
        ICC_SRE => Emulated::Done,
        CNTPCT | CNTPCTSS if access.read => Emulated::Value(run.guest.time()),
        CNTP_TVAL => timer(run, TimerRegister::Value, access.read, value, held),
        CNTP_CTL => timer(run, TimerRegister::Control, access.read, value, held),
        CNTP_CVAL => timer(run, TimerRegister::Compare, access.read, value, held),
        // What these say is the implementer's, and would differ from host to host.
        ACTLR | REVIDR | AIDR if access.read => Emulated::Value(0),
        ACTLR => Emulated::Done,
        // A guest that cleans by set and way wants its data in memory, now, from this CPU. Invalidating
        // alone would lose a neighbour's data, so that cleans too.
        DC_ISW | DC_CSW | DC_CISW if !access.read => {
            arch::cache::clean_invalidate_set_way(value);
            Emulated::Done
        }
        register => other(run, SysAccess { register, ..access }, value),
    }
}

#[inline]
fn send(
    run: &mut Run<'_>,
    register: SgiRegister,
    value: u64,
    held: &mut Held<'_, { rank::VCPU }>,
) -> Emulated {
    let (mut devices, _held) = run.guest.devices.lock(held);
    run.kicks |= devices.sgi(run.vcpu.index, register, value);
    Emulated::Done
}

fn other(run: &mut Run<'_>, access: SysAccess, value: u64) -> Emulated {
    if access.register.parts()[0] == 2 {
        return match debug::access(access, value, run.context, arch::debug::slots()) {
            Outcome::Value(value) => Emulated::Value(value),
            Outcome::Done => Emulated::Done,
            Outcome::Reload => {
                arch::debug::load(&run.context.debug);
                Emulated::Done
            }
            Outcome::Undefined => Emulated::Undefined,
        };
    }
    match super::ids().read(access.register) {
        Some(value) if access.read => Emulated::Value(value),
        Some(_) | None => Emulated::Undefined,
    }
}

fn timer(
    run: &mut Run<'_>,
    register: TimerRegister,
    read: bool,
    value: u64,
    held: &mut Held<'_, { rank::VCPU }>,
) -> Emulated {
    let now = run.guest.time();
    let (mut devices, _held) = run.guest.devices.lock(held);
    if read {
        return Emulated::Value(devices.timer_read(run.vcpu.index, register, now));
    }
    run.kicks |= devices.timer_write(run.vcpu.index, register, value, now);
    run.timer_changed = true;
    Emulated::Done
}
