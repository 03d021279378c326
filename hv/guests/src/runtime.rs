//! The machine as a guest knows it: what the device tree says, its options, its other vCPUs.

use core::fmt;
use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use dtoolkit::fdt::Fdt;
use dtoolkit::{Node, Property};
use hv_abi::call::smccc;
use hv_abi::machine::RAM_BASE;
use hv_abi::manifest::APPEND_LIMIT;

use crate::{console, mmu, power};

core::arch::global_asm!(include_str!("start.S"));

unsafe extern "C" {
    static __image_start: u8;
    static __image_end: u8;
    fn secondary_start();
}

/// What a guest may want to know about its machine.
pub struct Machine {
    /// Bytes of RAM.
    pub memory: u64,
    /// vCPUs.
    pub vcpus: usize,
    /// Where the tree lies.
    pub tree: u64,
    append: [u8; APPEND_LIMIT],
    append_bytes: usize,
}

impl Machine {
    /// Reads the tree; a loader that says nothing has put it at RAM's start.
    fn read(tree: u64) -> Self {
        let tree = if tree == 0 { RAM_BASE } else { tree };
        let mut machine = Self { memory: 0, vcpus: 0, tree, append: [0; APPEND_LIMIT], append_bytes: 0 };
        // SAFETY: the loader put a tree there, and nobody writes it.
        let fdt = match unsafe { Fdt::from_raw(tree as *const u8) } {
            Ok(fdt) => fdt,
            Err(error) => panic!("no device tree at {tree:#x}: {error}"),
        };
        for node in fdt.root().children() {
            match node.name_without_address() {
                "memory" => machine.memory = node.property("reg").map_or(0, |reg| last_word(reg.value())),
                "cpus" => {
                    machine.vcpus = node.children().filter(|n| n.name_without_address() == "cpu").count();
                }
                "chosen" => {
                    if let Some(append) = node.property("bootargs") {
                        let text = append.value().strip_suffix(&[0]).unwrap_or_default();
                        machine.append_bytes = text.len().min(APPEND_LIMIT);
                        for (to, from) in machine.append.iter_mut().zip(text) {
                            *to = *from;
                        }
                    }
                }
                _ => {}
            }
        }
        machine
    }

    /// The command line.
    pub fn append(&self) -> &str {
        core::str::from_utf8(&self.append[..self.append_bytes]).unwrap_or_default()
    }

    /// The number in the option `name=NUMBER`, or what it is without one.
    pub fn option(&self, name: &str, otherwise: u64) -> u64 {
        let value = |word: &str| word.strip_prefix(name)?.strip_prefix('=')?.parse().ok();
        self.append().split_whitespace().find_map(value).unwrap_or(otherwise)
    }

    /// True when the command line has that word.
    pub fn flag(&self, name: &str) -> bool {
        self.append().split_whitespace().any(|word| word == name)
    }

    /// First address after RAM.
    pub fn end(&self) -> u64 {
        RAM_BASE + self.memory
    }

    /// The guest's own image, its stacks included.
    pub fn image(&self) -> (u64, u64) {
        (&raw const __image_start as u64, &raw const __image_end as u64)
    }

    /// True when this project's hypervisor is above: some answers are defined only then.
    pub fn is_ours(&self) -> bool {
        power::hvc(smccc::VENDOR_UID.into(), [0; 3]) == smccc::UID.map(u64::from)
    }
}

fn last_word(bytes: &[u8]) -> u64 {
    bytes.last_chunk().map_or(0, |word| u64::from_be_bytes(*word))
}

/// The word `linger` is on the command line.
static LINGER: AtomicBool = AtomicBool::new(false);

/// Runs a guest to its end.
pub fn run(name: &str, guest: fn(&Machine), tree: u64) -> ! {
    let machine = Machine::read(tree);
    LINGER.store(machine.flag("linger"), Ordering::Relaxed);
    guest(&machine);
    println!("guest {name}: ok");
    end()
}

/// Switches the machine off, after a typed byte if its last words are to be read before.
fn end() -> ! {
    if LINGER.load(Ordering::Relaxed) {
        console::read();
    }
    power::off()
}

/// Ends a guest that has failed.
pub fn fail(name: &str, info: &core::panic::PanicInfo<'_>) -> ! {
    match info.location() {
        Some(place) => failed(name, format_args!("{} ({}:{})", info.message(), place.file(), place.line())),
        None => failed(name, format_args!("{}", info.message())),
    }
}

fn failed(name: &str, why: fmt::Arguments<'_>) -> ! {
    println!("guest {name}: FAILED {why}");
    // What was typed before is not the answer to that.
    console::forget();
    end()
}

/// What a secondary runs, as a function's address; with the MMU on, or not.
static BODY: AtomicUsize = AtomicUsize::new(0);
static WITH_MMU: AtomicBool = AtomicBool::new(false);

/// Starts vCPU `index`, which runs `body(index)` and then switches itself off. What PSCI answered.
pub fn start_vcpu(index: usize, body: fn(usize), with_mmu: bool) -> i64 {
    BODY.store(body as usize, Ordering::Release);
    WITH_MMU.store(with_mmu, Ordering::Release);
    power::cpu_on_at(index, secondary_start as *const () as u64, index as u64)
}

#[unsafe(no_mangle)]
extern "C" fn guest_secondary(index: usize) -> ! {
    if WITH_MMU.load(Ordering::Acquire) {
        mmu::enable();
    }
    let body = BODY.load(Ordering::Acquire);
    // SAFETY: only `start_vcpu` writes it, and before it starts anybody.
    let body = unsafe { core::mem::transmute::<usize, fn(usize)>(body) };
    body(index);
    power::cpu_off()
}

/// A generator of numbers that repeat: xorshift64*.
pub struct Random(u64);

impl Random {
    /// From a seed, which is made odd.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }
    /// The next number.
    pub fn draw(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    /// The next number below `limit`.
    pub fn below(&mut self, limit: u64) -> u64 {
        (self.draw() >> 16) % limit
    }
}
