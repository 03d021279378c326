//! Every way a guest stops, and what is done about it.
//!
//! [`sync`] is one exhaustive `match` on the syndrome. What it decides comes back as an [`Exit`]; what it
//! wants from other vCPUs as `kicks` in the [`Run`]. Nothing here calls the scheduler. A thing that we
//! do not know is injected as the architecture says, logged once, and never a panic (invariant I11).
//! Called by `sched`; calls one module for each trap family.

use super::inject::{self, Exception};
use super::syndrome::{Syndrome, SysAccess, SysReg, Wfx};
use super::sysreg::Emulated;
use super::vcpu::{Context, Vcpu, count};
use super::{Guest, aarch32, hypercall, memory, rank, sysreg};
use crate::arch;
use vmobject::addr::Ipa;
use vmobject::lock::Held;
use vmobject::prot::Prot;
use vmobject::store::IoToken;

/// One vCPU on this CPU, for as long as it runs.
pub struct Run<'r> {
    /// Its guest.
    pub guest: &'r Guest,
    /// What others may see of it.
    pub vcpu: &'r Vcpu,
    /// Its registers; the EL1 half is in the hardware.
    pub context: &'r mut Context,
    /// vCPUs of this guest that have something to look at; bit `n` is vCPU `n`.
    pub kicks: u64,
    /// The guest's physical timer was written: its deadline may have moved.
    pub timer_changed: bool,
    /// The FP registers in the hardware are this vCPU's.
    pub fp_live: bool,
}

/// Why a guest ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// PSCI SYSTEM_OFF.
    Off,
    /// PSCI SYSTEM_RESET.
    Reset,
    /// The monitor's wish.
    Killed,
    /// What it must have in its memory to go on cannot be had.
    Lost,
}

impl Ending {
    /// The words for people.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Off => "powered off",
            Self::Reset => "reset",
            Self::Killed => "killed",
            Self::Lost => "a page was lost",
        }
    }
}

/// What a vCPU waits for, when not for an interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waiting {
    /// A transfer.
    Io(IoToken),
    /// Memory becoming free.
    Memory,
}

/// An access that faulted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refault {
    /// Where.
    pub at: Ipa,
    /// For what.
    pub wanted: Prot,
}

/// What happens next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// The guest goes on.
    Resume,
    /// The vCPU waits for an interrupt; its instruction is done.
    Idle,
    /// The vCPU waits; its instruction runs again, or its fault is served again.
    Wait(Waiting, Refault),
    /// The vCPU switched itself off.
    Off,
    /// The guest ends.
    End(Ending),
    /// The guest wants to be forked into that many children; the answer is still to be given.
    Fork(u32, Asked),
}

/// How a guest asked to be forked, and where it looks for the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// By a call: in the registers of the vCPU that called.
    Call,
    /// By a store to the fork page: there.
    Page,
}

/// Handles a synchronous exception.
#[inline]
pub fn sync(run: &mut Run<'_>, esr: u64, far: u64, hpfar: u64, held: &mut Held<'_, { rank::VCPU }>) -> Exit {
    match Syndrome::decode(esr) {
        Syndrome::Hvc(_) => {
            count(&run.vcpu.counts.calls);
            hypercall::call(run, held)
        }
        Syndrome::Smc(_) => {
            count(&run.vcpu.counts.calls);
            aarch32::advance(&mut run.context.regs, esr);
            hypercall::call(run, held)
        }
        Syndrome::Data(data) => memory::data(run, data, esr, far, hpfar, held),
        Syndrome::Fetch(abort) => memory::fetch(run, abort, esr, far, hpfar, held),
        Syndrome::Sys(access) => system(run, access, esr, held),
        Syndrome::Wfx(wfx) => wait(run, wfx, esr),
        Syndrome::Fp(condition) => {
            if aarch32::passed(condition, run.context.regs.pstate) {
                arch::fpsimd::trap(false);
                arch::fpsimd::load(&run.context.fp);
                run.fp_live = true;
            } else {
                aarch32::advance(&mut run.context.regs, esr);
            }
            Exit::Resume
        }
        Syndrome::Cp15(access) => {
            if !aarch32::passed(access.condition, run.context.regs.pstate) {
                aarch32::advance(&mut run.context.regs, esr);
                return Exit::Resume;
            }
            match aarch32::system_register(access.register) {
                Some(register) => {
                    system(run, SysAccess { register, rt: access.rt, read: access.read }, esr, held)
                }
                None => undefined(run, esr),
            }
        }
        Syndrome::Cp15Pair(pair) => {
            if !aarch32::passed(pair.condition, run.context.regs.pstate) {
                aarch32::advance(&mut run.context.regs, esr);
                return Exit::Resume;
            }
            match aarch32::system_register_pair(pair.opc1, pair.crm) {
                Some(register) => {
                    let halves = [usize::from(pair.rt), usize::from(pair.rt2)];
                    system_pair(run, register, halves, pair.read, esr, held)
                }
                None => undefined(run, esr),
            }
        }
        Syndrome::Cp14(condition) | Syndrome::Call32(condition) => {
            if aarch32::passed(condition, run.context.regs.pstate) {
                return undefined(run, esr);
            }
            aarch32::advance(&mut run.context.regs, esr);
            Exit::Resume
        }
        Syndrome::Illegal => inject(run, Exception::IllegalState),
        Syndrome::Unknown | Syndrome::Other(_) => undefined(run, esr),
    }
}

/// Gives the guest an exception.
#[cold]
pub fn inject(run: &mut Run<'_>, exception: Exception) -> Exit {
    count(&run.vcpu.counts.injected);
    let context = &mut *run.context;
    arch::switch::save_el1(&mut context.el1);
    inject::take(&mut context.regs, &mut context.el1, exception, super::ids().features());
    arch::switch::load_el1(&context.el1);
    Exit::Resume
}

#[cold]
fn undefined(run: &mut Run<'_>, esr: u64) -> Exit {
    if run.guest.complain_once(super::Complaint::Undefined) {
        log::warn!("guest {}: undefined, esr {:#x} at {:#x}", run.guest.id, esr, run.context.regs.pc);
    }
    inject(run, Exception::Undefined)
}

fn wait(run: &mut Run<'_>, wfx: Wfx, esr: u64) -> Exit {
    let execute = aarch32::passed(wfx.condition, run.context.regs.pstate);
    aarch32::advance(&mut run.context.regs, esr);
    // WFE does not trap and the timed forms are hidden; should one come, it may end at once.
    if execute && !wfx.event && !wfx.timed { Exit::Idle } else { Exit::Resume }
}

#[inline]
fn system(run: &mut Run<'_>, access: SysAccess, esr: u64, held: &mut Held<'_, { rank::VCPU }>) -> Exit {
    count(&run.vcpu.counts.sysreg);
    let rt = usize::from(access.rt);
    let value = if access.read { 0 } else { run.context.regs.read(rt) };
    match sysreg::access(run, access, value, held) {
        Emulated::Done => {}
        Emulated::Value(value) => run.context.regs.write(rt, value),
        Emulated::Undefined => return unknown_register(run, access, esr),
    }
    aarch32::advance(&mut run.context.regs, esr);
    Exit::Resume
}

#[cold]
fn unknown_register(run: &mut Run<'_>, access: SysAccess, esr: u64) -> Exit {
    if run.guest.complain_once(super::Complaint::Register) {
        let verb = if access.read { "read" } else { "write" };
        log::warn!("guest {}: {verb} of {} at {:#x}", run.guest.id, access.register, run.context.regs.pc);
    }
    let _ = esr;
    inject(run, Exception::Undefined)
}

/// A 64-bit register moved through two 32-bit ones.
fn system_pair(
    run: &mut Run<'_>,
    register: SysReg,
    halves: [usize; 2],
    read: bool,
    esr: u64,
    held: &mut Held<'_, { rank::VCPU }>,
) -> Exit {
    count(&run.vcpu.counts.sysreg);
    let regs = &run.context.regs;
    let value = regs.read(halves[0]) & 0xffff_ffff | regs.read(halves[1]) << 32;
    match sysreg::access(run, SysAccess { register, rt: 31, read }, value, held) {
        Emulated::Done => {}
        Emulated::Value(value) => {
            run.context.regs.write(halves[0], value & 0xffff_ffff);
            run.context.regs.write(halves[1], value >> 32);
        }
        Emulated::Undefined => return undefined(run, esr),
    }
    aarch32::advance(&mut run.context.regs, esr);
    Exit::Resume
}
