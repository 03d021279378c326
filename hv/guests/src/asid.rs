//! Two vCPUs with the same addresses, the same ASID and different tables: neither ever sees what the
//! other's tables say, in data or in code. Time-sliced on one CPU this fails unless stale translations go.
//!
//! Options: `ms=500`.

use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use hv_abi::call::status;

use crate::memory::{peek, poke, publish_code};
use crate::mmu::{self, NORMAL, NOT_GLOBAL, PAGE, TABLE, Table};
use crate::power;
use crate::runtime::{Machine, start_vcpu};
use crate::timer::{milliseconds, now, wait_until};

const ASID: u64 = 1;
/// How long one may keep the other waiting, in milliseconds.
const LIMIT: u64 = 20_000;
/// Data pages of each vCPU.
const PAGES: usize = 32;
/// Where both have theirs: the last GiB of the map.
const BASE: u64 = 511 << 30;
/// Behind the data, a page of code.
const CODE: u64 = BASE + PAGES as u64 * 4096;

/// What one vCPU has of its own.
struct Own {
    root: Table,
    middle: Table,
    leaves: Table,
    data: [Table; PAGES],
    code: Table,
}

static OWN: [Own; 2] = [const {
    Own {
        root: Table::new(),
        middle: Table::new(),
        leaves: Table::new(),
        data: [const { Table::new() }; PAGES],
        code: Table::new(),
    }
}; 2];

/// When both have looked for long enough; not known before both are there.
static END: AtomicU64 = AtomicU64::new(u64::MAX);
static ROUNDS: [AtomicU64; 2] = [const { AtomicU64::new(0) }; 2];
static READY: AtomicBool = AtomicBool::new(false);

/// Both look at their own for a while.
pub fn run(machine: &Machine) {
    assert!(machine.vcpus >= 2, "this needs two vcpus");
    assert_eq!(start_vcpu(1, body, false), status::SUCCESS, "starting the other vcpu");
    assert!(wait_until(LIMIT, || READY.load(Ordering::Acquire)), "the other vcpu does not come");
    begin(0);
    END.store(now() + milliseconds(machine.option("ms", 500)), Ordering::Release);
    look(0);
    assert!(wait_until(2 * LIMIT, || power::is_off(1)), "the other vcpu does not end");
    let [one, other] = [0, 1].map(|index: usize| ROUNDS[index].load(Ordering::Acquire));
    println!("{one} and {other} rounds");
    assert!(one > 0 && other > 0, "one of the two never ran");
}

fn body(index: usize) {
    READY.store(true, Ordering::Release);
    begin(index);
    look(index);
}

/// Enters a vCPU's own map.
fn begin(index: usize) {
    let own = &OWN[index];
    map(own, index);
    mmu::enable_with(own.root.address(), ASID);
}

/// True until the end, and for a while after it if one of the two has had no turn yet.
fn goes_on() -> bool {
    let (now, end) = (now(), END.load(Ordering::Acquire));
    let both = ROUNDS.iter().all(|rounds| rounds.load(Ordering::Acquire) > 0);
    now < end || !both && now < end.saturating_add(milliseconds(LIMIT))
}

fn look(index: usize) {
    let mut round = 0;
    while goes_on() {
        round += 1;
        for page in 0..PAGES {
            let at = BASE + page as u64 * 4096;
            assert_eq!(
                peek(at),
                tag(index, page),
                "vcpu {index} sees another's page {page} in round {round}"
            );
            assert_eq!(peek(at + 8), round - 1, "vcpu {index} has lost a write to page {page}");
            poke(at + 8, round);
        }
        let said: u64;
        // SAFETY: the page holds two instructions, one that sets X0 and the return.
        unsafe { core::arch::asm!("blr {at}", at = in(reg) CODE, out("x0") said, clobber_abi("C")) };
        assert_eq!(said, index as u64 + 1, "vcpu {index} runs the other's code in round {round}");
        if round % 64 == 0 {
            // Now and then everything is walked again.
            instruction!("dsb ish\ntlbi vmalle1\ndsb ish\nisb");
        }
        ROUNDS[index].store(round, Ordering::Release);
    }
}

fn tag(index: usize, page: usize) -> u64 {
    (index as u64 + 1) << 32 | page as u64
}

fn map(own: &Own, index: usize) {
    const RET: u64 = 0xd65f_03c0;
    const MOVZ_X0: u64 = 0xd280_0000;
    mmu::fill(&own.root);
    own.root.set(511, own.middle.address() | TABLE);
    own.middle.set(0, own.leaves.address() | TABLE);
    for (page, data) in own.data.iter().enumerate() {
        data.set(0, tag(index, page));
        own.leaves.set(page, data.address() | NORMAL | NOT_GLOBAL | PAGE);
    }
    own.leaves.set(PAGES, own.code.address() | NORMAL | NOT_GLOBAL | PAGE);
    own.code.set(0, RET << 32 | MOVZ_X0 | (index as u64 + 1) << 5);
    publish_code(own.code.address());
}
