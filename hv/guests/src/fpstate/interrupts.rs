//! The interrupt controller: interrupts of both groups that are pending, active, and both, priorities that are active, and
//! every register that keeps what is written.

use hv_abi::machine::{
    GICD, GICR_STRIDE, INTID_PHYSICAL_TIMER, INTID_VIRTUAL_TIMER, INTID_VMGENID, affinity,
};

use super::Ledger;
use crate::gic;
use crate::mmio::{read32, read64, write8, write32, write64};
use crate::register::cpu;
use crate::runtime::Random;
use crate::timer::wait_until;
use crate::virtio::low;

/// The interrupt of the generation id.
pub(super) const GENERATION: u32 = INTID_VMGENID;

const IGROUPR: u64 = 0x80;
const ISENABLER: u64 = 0x100;
const ICENABLER: u64 = 0x180;
const ISPENDR: u64 = 0x200;
const ICPENDR: u64 = 0x280;
const ISACTIVER: u64 = 0x300;
const ICACTIVER: u64 = 0x380;
const IPRIORITYR: u64 = 0x400;
const ICFGR: u64 = 0xc00;
const IROUTER: u64 = 0x6000;
/// A word of shared interrupts that no device has: 96 to 127.
const FREE: u64 = 3;
/// The number that stands for no interrupt begins here.
const SPURIOUS: u64 = 1020;
const LIMIT: u64 = 20_000;

/// A software interrupt: number, priority, and group.
#[derive(Clone, Copy)]
struct Sgi(u32, u8, u8);

/// Taken one in another, in this order.
const NESTED: [Sgi; 3] = [Sgi(0, 0x90, 1), Sgi(1, 0x60, 0), Sgi(2, 0x30, 1)];
/// Pending, in the order in which they come; the first is active, too.
const PENDING: [Sgi; 4] = [NESTED[0], Sgi(3, 0xc0, 1), Sgi(4, 0xd0, 0), Sgi(5, 0xe0, 1)];

impl Sgi {
    /// Takes the most urgent interrupt of its group, which must be this one.
    fn take(self) {
        let Self(intid, _, group) = self;
        let mut got = SPURIOUS;
        let come = wait_until(LIMIT, || {
            got = if group == 0 { read_register!("icc_iar0_el1") } else { read_register!("icc_iar1_el1") };
            got < SPURIOUS
        });
        assert!(come && got == intid.into(), "SGI {intid} was to come, and {got} did");
    }

    fn end(self) {
        let Self(intid, _, group) = self;
        if group == 0 {
            write_register!("icc_eoir0_el1", intid.into());
        } else {
            write_register!("icc_eoir1_el1", intid.into());
        }
    }
}

/// What one vCPU has of it; the first has what is shared.
pub(super) struct Interrupts {
    shared: bool,
}

impl Interrupts {
    /// Puts all in place.
    pub(super) fn begin(shared: bool, odd: bool, random: &mut Random) -> Self {
        if shared {
            write32(GICD.base, 1 << 4 | 3);
        }
        gic::init_cpu();
        let private = gic::private();
        for intid in 6..32 {
            write8(private + IPRIORITYR + intid, random.draw().to_le_bytes()[0] & 0xf8);
        }
        let zero = |group: u32, Sgi(intid, _, of): Sgi| if of == 0 { group & !(1 << intid) } else { group };
        let all = NESTED.into_iter().chain(PENDING);
        write32(private + IGROUPR, all.clone().fold(low(random.draw()) | 0x3f, zero));
        // Those of the timers stay off: one's time comes now and then on a machine that is older.
        let timers = 1 << INTID_VIRTUAL_TIMER | 1 << INTID_PHYSICAL_TIMER;
        write32(private + ISENABLER, low(random.draw()) & 0xffff_0000 & !timers);
        write32(private + ICFGR + 4, low(random.draw()) & 0xaaaa_aaaa & !(2 << 22 | 2 << 28));
        all.for_each(|Sgi(intid, priority, _)| write8(private + IPRIORITYR + u64::from(intid), priority));
        write_register!("icc_igrpen0_el1", 1);
        for sgi in NESTED {
            gic::pend(sgi.0);
            sgi.take();
        }
        PENDING.into_iter().for_each(|sgi| gic::pend(sgi.0));
        if shared {
            Self::begin_shared(random);
        }
        // The running priority stays; what may come later changes.
        write_register!("icc_pmr_el1", random.draw() & 0x78 | 0x80);
        write_register!("icc_bpr0_el1", if odd { 4 } else { 5 });
        write_register!("icc_bpr1_el1", if odd { 6 } else { 7 });
        write_register!("icc_ctlr_el1", if odd { 2 } else { 0 });
        write_register!("icc_igrpen0_el1", u64::from(odd));
        write_register!("icc_igrpen1_el1", u64::from(!odd));
        Self { shared }
    }

    fn begin_shared(random: &mut Random) {
        gic::enable(GENERATION);
        let word = FREE * 4;
        write32(GICD.base + IGROUPR + word, low(random.draw()));
        for byte in 0..32 {
            write8(GICD.base + IPRIORITYR + FREE * 32 + byte, random.draw().to_le_bytes()[0] & 0xf8);
        }
        for half in 0..2 {
            write32(GICD.base + ICFGR + FREE * 8 + half * 4, low(random.draw()) & 0xaaaa_aaaa);
        }
        for intid in FREE * 32..FREE * 32 + 32 {
            // Some of them go to nobody.
            write64(GICD.base + IROUTER + intid * 8, affinity(cpu()) | random.draw() & 0x3 << 32);
        }
        write32(GICD.base + ISENABLER + word, low(random.draw()));
        // Pending, active, and both.
        write32(GICD.base + ISPENDR + word, low(random.draw() & random.draw()) | 0x3);
        write32(GICD.base + ISACTIVER + word, 0x8000_0006);
    }

    /// Looks at all.
    pub(super) fn see(&self, ledger: &mut Ledger) {
        macro_rules! see {
            ($($name:literal)*) => {$(ledger.see($name, 0, read_register!($name));)*};
        }
        see!(
            "icc_pmr_el1" "icc_bpr0_el1" "icc_bpr1_el1" "icc_ctlr_el1" "icc_igrpen0_el1" "icc_igrpen1_el1"
            "icc_ap0r0_el1" "icc_ap1r0_el1" "icc_rpr_el1" "icc_hppir0_el1" "icc_hppir1_el1" "icc_sre_el1" "isr_el1"
        );
        let private = gic::private();
        let mut word = |frame: u64, offset: u64, without: u32| {
            ledger.see(
                "a register of the interrupt controller",
                offset,
                (read32(frame + offset) & !without).into(),
            );
        };
        let bits = [IGROUPR, ISENABLER, ISPENDR, ISACTIVER];
        [0x0, 0x14].into_iter().for_each(|offset| word(private - GICR_STRIDE / 2, offset, 0));
        bits.into_iter().for_each(|bank| word(private, bank, 0));
        (IPRIORITYR..IPRIORITYR + 32).step_by(4).for_each(|offset| word(private, offset, 0));
        (ICFGR..ICFGR + 8).step_by(4).for_each(|offset| word(private, offset, 0));
        if !self.shared {
            return;
        }
        word(GICD.base, 0, 0);
        for bank in bits {
            for number in 1..=FREE {
                // That one tells of a change, and is looked at by itself.
                let without = if bank == ISPENDR && number == 1 { 1 << (GENERATION % 32) } else { 0 };
                word(GICD.base, bank + number * 4, without);
            }
        }
        (IPRIORITYR + 32..IPRIORITYR + 128).step_by(4).for_each(|offset| word(GICD.base, offset, 0));
        (ICFGR + 8..ICFGR + 32).step_by(4).for_each(|offset| word(GICD.base, offset, 0));
        for intid in 32..128 {
            let at = IROUTER + intid * 8;
            ledger.see("a route", intid, read64(GICD.base + at));
        }
    }

    /// What was active ends, and what was pending comes.
    pub(super) fn end(self) {
        if self.shared {
            for clear in [ICENABLER, ICPENDR, ICACTIVER] {
                (1..=FREE).for_each(|word| write32(GICD.base + clear + word * 4, u32::MAX));
            }
        }
        // With what they were taken under: an interrupt that ends is found by its priority's group, too.
        write_register!("icc_bpr0_el1", 0);
        write_register!("icc_bpr1_el1", 0);
        write_register!("icc_ctlr_el1", 0);
        write_register!("icc_igrpen0_el1", 1);
        write_register!("icc_igrpen1_el1", 1);
        for sgi in NESTED.into_iter().rev() {
            assert_eq!(read_register!("icc_rpr_el1"), sgi.1.into(), "the running priority");
            sgi.end();
        }
        assert_eq!(read_register!("icc_rpr_el1"), 0xff, "something is active still");
        write_register!("icc_pmr_el1", 0xff);
        for sgi in PENDING {
            sgi.take();
            sgi.end();
        }
        let (group0, group1) = (read_register!("icc_iar0_el1"), read_register!("icc_iar1_el1"));
        assert!(group0 >= SPURIOUS && group1 >= SPURIOUS, "{group0} and {group1} came that nobody sent");
    }
}
