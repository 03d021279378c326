//! Everything that a guest must not do: addresses with nothing there, instructions that do not exist,
//! every system register, calls that nobody knows, a vCPU started in the void. Each has a defined answer,
//! and the guest is alive afterwards.
//!
//! Options: `calls=2000`, `seed=1`.

use hv_abi::call::{self, psci, status};
use hv_abi::machine::{HOLE, RAM_BASE};

use crate::memory::{call, execute, poke, publish_code, scratch};
use crate::runtime::{Machine, Random};
use crate::trap::Fault;
use crate::{mmu, power};

/// All of it.
pub fn run(machine: &Machine) {
    let strict = machine.is_ours();
    if machine.vcpus > 1 {
        assert!(power::cpu_on_at(1, HOLE + 1, 0) < 0, "a vcpu started at an odd address");
        assert_eq!(power::cpu_on_at(1, HOLE, 0), status::SUCCESS, "starting a vcpu in the void");
    }
    instructions();
    registers();
    calls(machine, strict);
    past_the_end(machine);
    for at in [1 << 44, 1 << 47, 1 << 52, !0xfff] {
        faults("an address that is too long", load(at));
        faults("a fetch from there", call(at));
    }
    mmu::enable();
    past_the_end(machine);
    let far = [machine.end() + (1 << 30), 0x7f_ffff_f000];
    for at in [HOLE, machine.end()].into_iter().chain(far.into_iter().filter(|_| strict)) {
        aborts("a load", load(at));
        aborts("a store", probe!("str xzr, [{at}]", at = in(reg) at));
        aborts("a fetch", call(at));
    }
    aborts("a load over the end", load(machine.end() - 4));
    aborts("a store over the end", probe!("str xzr, [{at}]", at = in(reg) machine.end() - 4));
    println!("still here");
}

fn load(at: u64) -> Option<Fault> {
    probe!("ldr {a}, [{at}]", a = out(reg) _, at = in(reg) at)
}

fn faults(what: &str, fault: Option<Fault>) {
    assert!(fault.is_some_and(|f| matches!(f.class(), 0x21 | 0x22 | 0x25)), "{what}: {fault:x?}");
}

fn aborts(what: &str, fault: Option<Fault>) {
    assert!(fault.is_some_and(Fault::is_external_abort), "{what}: {fault:x?} instead of an external abort");
}

/// Runs off the end of RAM: the fetch of the first instruction behind it must not succeed.
fn past_the_end(machine: &Machine) {
    const NOP: u64 = 0xd503_201f;
    let end = machine.end();
    poke(end - 8, NOP << 32 | NOP);
    publish_code(end - 8);
    for from in [end, end - 4, end - 8] {
        let fault = call(from);
        aborts("a fetch past the end of RAM", fault);
        assert_eq!(fault.map(|f| (f.class(), f.far)), Some((0x21, end)), "where that fetch was");
    }
}

/// Instructions that do not exist, or not here, and the two that ask for an exception.
fn instructions() {
    const UDF: u32 = 0;
    const UNALLOCATED: u32 = 0x0200_0000;
    const HLT: u32 = 0xd440_0000;
    const DCPS1: u32 = 0xd4a0_0001;
    const DRPS: u32 = 0xd6bf_03e0;
    for instruction in [UDF, UNALLOCATED, HLT, DCPS1, DRPS, 0xffff_ffff] {
        let answer = execute(instruction, 0);
        assert!(answer.is_err_and(Fault::is_undefined), "{instruction:#010x}: {answer:x?}");
    }
    for (instruction, class) in [(0xd400_0001, 0x15), (0xd420_0000, 0x3c)] {
        let answer = execute(instruction, 0).map_err(Fault::class);
        assert_eq!(answer, Err(class), "{instruction:#010x}");
    }
}

/// Reads every system register there could be; writes zero to those that cannot be read; runs every
/// instruction of the same encoding on a page that nobody minds.
fn registers() {
    // Undefined, which in the ID registers' space may have a class of its own; or held back by CPACR_EL1:
    // floating point, SVE, SME.
    let right = |fault: Fault| matches!(fault.class(), 0 | 0x18 | 0x07 | 0x19 | 0x1d);
    let (mut read, mut written, mut undefined) = (0u32, 0u32, 0u32);
    for encoding in 0..1 << 15 {
        let (mrs, msr) = (0xd530_0000 | encoding << 5, 0xd510_0000 | encoding << 5);
        match execute(mrs, 0) {
            Ok(_) => read += 1,
            Err(fault) => {
                assert!(right(fault), "reading {}: {fault:x?}", Encoding(encoding));
                match execute(msr, 0) {
                    Ok(_) => written += 1,
                    Err(fault) if right(fault) => undefined += 1,
                    Err(fault) => panic!("writing {}: {fault:x?}", Encoding(encoding)),
                }
            }
        }
    }
    println!("system registers: {read} can be read, {written} only written, {undefined} neither");
    let mut done = 0u32;
    for encoding in 0..1 << 14 {
        for instruction in [0xd508_0000 | encoding << 5, 0xd528_0000 | encoding << 5] {
            match execute(instruction, scratch()) {
                Ok(_) => done += 1,
                Err(fault) => {
                    let right = right(fault) || fault.class() == 0x25;
                    assert!(right, "instruction {instruction:#010x}: {fault:x?}");
                }
            }
        }
    }
    println!("system instructions: {done} exist");
}

/// A register's encoding, printed as assemblers take it.
struct Encoding(u32);

impl core::fmt::Display for Encoding {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let field = |low: u32, mask: u32| self.0 >> low & mask;
        let (op0, op1) = (2 + field(14, 1), field(11, 7));
        write!(f, "S{op0}_{op1}_C{}_C{}_{}", field(7, 15), field(3, 15), field(0, 7))
    }
}

/// Calls with numbers that nobody has given out, by HVC and by SMC.
fn calls(machine: &Machine, strict: bool) {
    let mut random = Random::new(machine.option("seed", 1));
    for _ in 0..machine.option("calls", 2000) {
        let number = random.draw() & 0xffff_ffff;
        // Not the standard's services: they exist, and some end the guest.
        if matches!(number >> 24 & 0x3f, 0 | 4 | 6) {
            continue;
        }
        let arguments = [random.draw(), random.draw(), random.draw()];
        let answer = power::hvc(number, arguments)[0].cast_signed();
        assert_eq!(answer, status::NOT_SUPPORTED, "HVC {number:#x}");
        if strict {
            let answer = smc(number, arguments).map(u64::cast_signed);
            assert_eq!(answer, Ok(status::NOT_SUPPORTED), "SMC {number:#x}");
        }
    }
    let never = power::hvc(call::NEVER.into(), [0; 3])[0].cast_signed();
    assert_eq!(never, status::NOT_SUPPORTED, "a vendor call that is not there");
    if strict {
        let version = power::hvc(psci::VERSION.into(), [0; 3])[0];
        assert_eq!(smc(psci::VERSION.into(), [0; 3]), Ok(version), "PSCI_VERSION by SMC");
    }
    for (target, answer) in [(!0, status::INVALID_PARAMETERS), (1 << 40, status::INVALID_PARAMETERS)] {
        let on = power::hvc(psci::CPU_ON.into(), [target, RAM_BASE, 0])[0].cast_signed();
        assert_eq!(on, answer, "CPU_ON of {target:#x}");
    }
}

fn smc(number: u64, [x1, x2, x3]: [u64; 3]) -> Result<u64, Fault> {
    let mut x0 = number;
    let fault = probe!("smc #0", inout("x0") x0, inout("x1") x1 => _, inout("x2") x2 => _,
        inout("x3") x3 => _);
    fault.map_or(Ok(x0), Err)
}
