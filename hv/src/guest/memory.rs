//! Stage-2 aborts: where the guest was, and what becomes of it.
//!
//! First the address (DESIGN 14 says when which register can be trusted), then the device window, which
//! is the short path, then the memory manager. A fault that must wait comes back as [`Exit::Wait`]; the
//! instruction then runs again from its start, which is what makes any fault safe to forget.
//! Called by `exit`; calls `mmio` and `vmobject`.

use super::exit::{Exit, Refault, Run, Waiting, inject};
use super::inject::Exception;
use super::mmio::{self, Target, WINDOW_END, WINDOW_START};
use super::syndrome::{Abort, Access, DataAbort, Fault, Syndrome};
use super::vcpu::count;
use super::{Complaint, aarch32, disks, forkpage, rank};
use crate::arch;
use crate::mm;
use hv_abi::machine::FLASH0;
use vmobject::addr::Ipa;
use vmobject::fault::{FaultError, Faulted, WaitFor};
use vmobject::lock::Held;
use vmobject::map::Instruction;
use vmobject::prot::Prot;

/// The page number's place in HPFAR_EL2, and how far it has to move.
const HPFAR_PAGE: u64 = 0x0fff_ffff_fff0;

/// Where stage 2 refused; `None` when that cannot be known, and the guest is to try again.
#[inline]
fn address(abort: Abort, write: bool, far: u64, hpfar: u64) -> Option<Ipa> {
    let in_page = far & 0xfff;
    if matches!(abort.fault, Fault::Permission) && !abort.walk {
        // HPFAR is UNKNOWN here, whatever QEMU shows.
        return arch::at::at_s1e1r(far, write).ok().map(|at| Ipa::new(at.page().bits() | in_page));
    }
    Some(Ipa::new((hpfar & HPFAR_PAGE) << 8 | in_page))
}

/// A load, store or maintenance instruction.
#[inline]
pub fn data(
    run: &mut Run<'_>,
    data: DataAbort,
    esr: u64,
    far: u64,
    hpfar: u64,
    held: &mut Held<'_, { rank::VCPU }>,
) -> Exit {
    if !is_ours(data.abort.fault) {
        return not_ours(run, data.abort.fault, esr, far);
    }
    let write = data.is_write();
    let Some(at) = address(data.abort, write, far, hpfar) else { return Exit::Resume };
    if (WINDOW_START..WINDOW_END).contains(&at.bits()) {
        return device(run, data, at, esr, far, held);
    }
    if write && !data.abort.walk && FLASH0.contains(at.bits()) {
        // A command for a flash chip that has none: it goes nowhere, and the bus does not mind. Of a store that does more
        // than store (a write-back, say) the rest would be lost with it.
        if data.access.is_none() {
            return undecodable(run, at, external(data, far));
        }
        aarch32::advance(&mut run.context.regs, esr);
        return Exit::Resume;
    }
    count(&run.vcpu.counts.faults);
    let wanted = if write { Prot::WRITE } else { Prot::READ };
    match served(run, Refault { at, wanted }, held) {
        Ok(exit) => exit,
        Err(error) => refused(run, at, error, external(data, far), denied(data, far)),
    }
}

/// What a load or store gets where nothing is.
const fn external(data: DataAbort, far: u64) -> Exception {
    Exception::DataAbort { far, walk: data.abort.walk, wnr: data.wnr, maintenance: data.maintenance }
}

/// What a load or store gets that is not allowed.
const fn denied(data: DataAbort, far: u64) -> Exception {
    Exception::Denied { far, fetch: false, wnr: data.wnr }
}

/// An instruction fetch.
pub fn fetch(
    run: &mut Run<'_>,
    abort: Abort,
    esr: u64,
    far: u64,
    hpfar: u64,
    held: &mut Held<'_, { rank::VCPU }>,
) -> Exit {
    if !is_ours(abort.fault) {
        return not_ours(run, abort.fault, esr, far);
    }
    let write = abort.walk && matches!(abort.fault, Fault::Permission);
    let Some(at) = address(abort, write, far, hpfar) else { return Exit::Resume };
    if (WINDOW_START..WINDOW_END).contains(&at.bits()) {
        return hole(run, at, no_code(abort, far));
    }
    count(&run.vcpu.counts.faults);
    let wanted = match (abort.walk, write) {
        (true, true) => Prot::WRITE,
        (true, false) => Prot::READ,
        (false, _) => Prot::EXECUTE,
    };
    match served(run, Refault { at, wanted }, held) {
        Ok(exit) => exit,
        Err(error) => refused(run, at, error, no_code(abort, far), not_code(far)),
    }
}

/// Serves the fault once more that the guest left with, which has had to wait.
pub fn again(run: &mut Run<'_>, fault: Refault, held: &mut Held<'_, { rank::VCPU }>) -> Exit {
    match served(run, fault, held) {
        Ok(exit) => exit,
        Err(error) => refused_again(run, fault, error),
    }
}

#[cold]
fn refused_again(run: &mut Run<'_>, fault: Refault, error: FaultError) -> Exit {
    let (esr, far) = arch::switch::last_fault();
    let syndrome = Syndrome::decode(esr);
    if let Syndrome::Data(data) = syndrome {
        refused(run, fault.at, error, external(data, far), denied(data, far))
    } else if let Syndrome::Fetch(abort) = syndrome {
        refused(run, fault.at, error, no_code(abort, far), not_code(far))
    } else {
        Exit::Resume // nothing else faults
    }
}

/// What a fetch gets where nothing is.
const fn no_code(abort: Abort, far: u64) -> Exception {
    Exception::FetchAbort { far, walk: abort.walk }
}

/// What a fetch gets that is not allowed.
const fn not_code(far: u64) -> Exception {
    Exception::Denied { far, fetch: true, wnr: false }
}

/// Stage 2 made these; everything else came from the guest's own doing or from the bus.
const fn is_ours(fault: Fault) -> bool {
    matches!(fault, Fault::Translation | Fault::AccessFlag | Fault::Permission | Fault::AddressSize)
}

#[cold]
fn not_ours(run: &mut Run<'_>, fault: Fault, esr: u64, far: u64) -> Exit {
    if matches!(fault, Fault::Conflict) {
        // Either entry is right; both go, and the guest tries again.
        arch::tlb::local_flush_guest();
        return Exit::Resume;
    }
    if run.guest.complain_once(Complaint::Abort) {
        log::warn!("guest {}: {fault:?}, esr {esr:#x} at {:#x}", run.guest.id, run.context.regs.pc);
    }
    inject(run, Exception::Passed { far, esr })
}

#[cold]
fn hole(run: &mut Run<'_>, at: Ipa, exception: Exception) -> Exit {
    if run.guest.complain_once(Complaint::Hole) {
        log::warn!("guest {}: nothing is at {at}; pc {:#x}", run.guest.id, run.context.regs.pc);
    }
    inject(run, exception)
}

/// What the memory manager makes of an access.
#[inline]
fn served(run: &Run<'_>, fault: Refault, held: &mut Held<'_, { rank::VCPU }>) -> Result<Exit, FaultError> {
    let Refault { at, wanted } = fault;
    if at.bits() >= disks::BASE {
        // Where disks are kept, and nothing of the guest's.
        return Err(FaultError::Hole(at));
    }
    let by = Instruction { vcpu: run.vcpu.index, pc: run.context.regs.pc };
    match mm::vm().fault_for(&run.guest.map, Some(by), at, wanted, held) {
        Ok(Faulted::Mapped) => Ok(Exit::Resume),
        Ok(Faulted::Wait(wait)) => Ok(Exit::Wait(waiting(wait), fault)),
        Err(error) => Err(error),
    }
}

/// What the guest feels of an access that it cannot have.
#[cold]
fn refused(run: &mut Run<'_>, at: Ipa, error: FaultError, nothing: Exception, denied: Exception) -> Exit {
    match error {
        FaultError::Hole(_) => hole(run, at, nothing),
        FaultError::Denied { .. } => inject(run, denied),
        FaultError::Lost(lost) => {
            // Whoever touches it again asks the store again: it may have been a passing trouble.
            if run.guest.complain_once(Complaint::Lost) {
                log::error!("guest {}: no page at {at}: {}", run.guest.id, mm::disks().told(lost));
            }
            inject(run, nothing)
        }
    }
}

/// An access to the device window.
#[inline]
fn device(
    run: &mut Run<'_>,
    data: DataAbort,
    at: Ipa,
    esr: u64,
    far: u64,
    held: &mut Held<'_, { rank::VCPU }>,
) -> Exit {
    let Some(target) = mmio::find(at, run.guest.vcpus.len(), run.guest.config.disks.len()) else {
        return hole(run, at, external(data, far));
    };
    let (Some(access), false, false) = (data.access, data.abort.walk, data.maintenance) else {
        return undecodable(run, at, external(data, far));
    };
    if access.size > target.widest() {
        return undecodable(run, at, external(data, far));
    }
    count(&run.vcpu.counts.mmio);
    if let Target::Fork(offset) = target {
        return fork_page(run, access, (data.wnr, offset), esr, held);
    }
    let effect = {
        let (mut devices, _held) = run.guest.devices.lock(held);
        if data.wnr {
            let value = mmio::stored(access, &run.context.regs);
            devices.write(target, access.size, value, run.guest.time())
        } else {
            let (value, kicks) = devices.read(target, access.size, run.vcpu.index, run.guest.time());
            run.context.regs.write(usize::from(access.rt), mmio::extended(access, value));
            mmio::Effect { kicks, output: None, work: false }
        }
    };
    aarch32::advance(&mut run.context.regs, esr);
    run.kicks |= effect.kicks;
    if effect.work {
        // This vCPU does it before it goes on.
        run.guest.work.want();
        run.kicks |= 1 << run.vcpu.index;
    }
    if let Some(byte) = effect.output {
        run.guest.print(byte, held);
    }
    Exit::Resume
}

#[cold]
fn fork_page(
    run: &mut Run<'_>,
    access: Access,
    (store, offset): (bool, u64),
    esr: u64,
    held: &mut Held<'_, { rank::VCPU }>,
) -> Exit {
    let exit = if store {
        forkpage::write(run, offset, mmio::stored(access, &run.context.regs), held)
    } else {
        let value = forkpage::read(run, offset, held);
        run.context.regs.write(usize::from(access.rt), mmio::extended(access, value));
        Exit::Resume
    };
    aarch32::advance(&mut run.context.regs, esr);
    exit
}

#[cold]
fn undecodable(run: &mut Run<'_>, at: Ipa, external: Exception) -> Exit {
    if run.guest.complain_once(Complaint::Device) {
        log::warn!(
            "guest {}: device access at {at} that no device takes; pc {:#x}",
            run.guest.id,
            run.context.regs.pc
        );
    }
    inject(run, external)
}

const fn waiting(what: WaitFor) -> Waiting {
    match what {
        WaitFor::Io(token) => Waiting::Io(token),
        // No fault waits for its turn.
        WaitFor::Memory | WaitFor::Turn => Waiting::Memory,
    }
}
