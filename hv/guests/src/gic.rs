//! The GICv3, as plainly as it goes: everything group 1, one priority, EOI drops and deactivates.

use hv_abi::machine::{GICD, GICR_BASE, GICR_STRIDE, affinity};

use crate::mmio::{read32, write8, write32};
use crate::register::cpu;

const CTLR: u64 = GICD.base;
const IGROUPR: u64 = 0x80;
const ISENABLER: u64 = 0x100;
const ICENABLER: u64 = 0x180;
const ISPENDR: u64 = 0x200;
const ICPENDR: u64 = 0x280;
const ICACTIVER: u64 = 0x380;
const IPRIORITYR: u64 = 0x400;
const ICFGR: u64 = 0xc00;
const IROUTER: u64 = 0x6000;
/// The frame of a redistributor that has its SGIs and PPIs.
const SGI_FRAME: u64 = 0x1_0000;
const WAKER: u64 = 0x14;

/// The SGI frame of this vCPU's redistributor.
pub fn private() -> u64 {
    GICR_BASE + GICR_STRIDE * cpu() as u64 + SGI_FRAME
}

/// Where a number's bit is, from a bank of registers on: the register, and the bit.
fn bit(bank: u64, intid: u32) -> (u64, u32) {
    let base = if intid < 32 { private() } else { GICD.base };
    (base + bank + u64::from(intid / 32) * 4, 1 << (intid % 32))
}

/// Sets the distributor up: affinity routing, group 1 on.
pub fn init_distributor() {
    write32(CTLR, 1 << 4);
    wait();
    write32(CTLR, 1 << 4 | 1 << 1);
    wait();
}

fn wait() {
    while read32(CTLR) & 1 << 31 != 0 {}
}

/// Sets this vCPU's part up: its SGIs are on, its PPIs off.
pub fn init_cpu() {
    let waker = private() - SGI_FRAME + WAKER;
    write32(waker, read32(waker) & !(1 << 1));
    while read32(waker) & 1 << 2 != 0 {}
    let base = private();
    write32(base + ICENABLER, 0xffff_0000);
    write32(base + ICPENDR, u32::MAX);
    write32(base + ICACTIVER, u32::MAX);
    write32(base + IGROUPR, u32::MAX);
    for intid in 0..32 {
        write8(base + IPRIORITYR + intid, 0xa0);
    }
    write32(base + ISENABLER, 0x0000_ffff);
    write_register!("icc_sre_el1", 7);
    write_register!("icc_pmr_el1", 0xff);
    write_register!("icc_bpr1_el1", 0);
    write_register!("icc_ctlr_el1", 0);
    write_register!("icc_igrpen1_el1", 1);
}

/// Lets an interrupt through; an SPI comes to this vCPU, as an edge.
pub fn enable(intid: u32) {
    if intid >= 32 {
        let (group, mask) = bit(IGROUPR, intid);
        write32(group, read32(group) | mask);
        write8(GICD.base + IPRIORITYR + u64::from(intid), 0xa0);
        let config = GICD.base + ICFGR + u64::from(intid / 16) * 4;
        write32(config, read32(config) | 2 << (intid % 16 * 2));
        crate::mmio::write64(GICD.base + IROUTER + u64::from(intid) * 8, affinity(cpu()));
    }
    let (register, mask) = bit(ISENABLER, intid);
    write32(register, mask);
}

/// Holds an interrupt back.
pub fn disable(intid: u32) {
    let (register, mask) = bit(ICENABLER, intid);
    write32(register, mask);
    wait();
}

/// Makes an interrupt pending by software.
pub fn pend(intid: u32) {
    let (register, mask) = bit(ISPENDR, intid);
    write32(register, mask);
}

/// Takes that back.
pub fn unpend(intid: u32) {
    let (register, mask) = bit(ICPENDR, intid);
    write32(register, mask);
}

/// True while an interrupt is pending.
pub fn is_pending(intid: u32) -> bool {
    let (register, mask) = bit(ISPENDR, intid);
    read32(register) & mask != 0
}

/// Sends an SGI to a vCPU.
pub fn send(intid: u32, to: usize) {
    let affinity = affinity(to);
    let value = u64::from(intid) << 24 | (affinity >> 8) << 16 | 1 << (affinity & 0xf);
    instruction!("dsb ishst");
    write_register!("icc_sgi1r_el1", value);
}

/// Lets interrupts in.
pub fn unmask() {
    instruction!("msr daifclr, #2\nisb");
}

/// Keeps interrupts out.
pub fn mask() {
    instruction!("msr daifset, #2\nisb");
}
