//! Failing on purpose: shows that what should end the machine does, with a story and exit status 1.
//!
//! The host's command line asks for it with `selftest=NAME`; boot tests do. Nothing here returns when what it
//! tests works.

use alloc::boxed::Box;
use alloc::vec::Vec;

use crate::arch::percpu;
use crate::mm;
use board::platform::Platform;
use log::info;
use vmobject::object::index::Leaf;

unsafe extern "C" {
    // The linker script's; only its address means anything.
    static __boot_stack_guard: u8;
    static __image_start: u8;
}

/// Those that come back when all is well.
const CHECKS: [(&str, fn()); 2] = [("copy", copy), ("heap", heap)];
/// What can be asked for.
const NAMES: [(&str, fn()); 5] = [
    ("panic", panic),
    ("overflow", overflow),
    ("guard", guard),
    ("write-text", write_text),
    ("run-data", run_data),
];

/// What the command line asks for.
fn asked(platform: &Platform) -> impl Iterator<Item = &str> {
    platform.bootargs.split_whitespace().filter_map(|word| word.strip_prefix("selftest="))
}

/// Runs the checks that the command line asks for, before any guest runs.
pub(super) fn check(platform: &Platform) {
    for name in asked(platform) {
        if let Some((_, check)) = CHECKS.iter().find(|known| known.0 == name) {
            check();
            info!("self test: {name}: ok");
        }
    }
}

/// Fails as the command line asks for, on the first CPU; with `selftest=last-NAME` on the last.
pub(super) fn run(platform: &Platform) {
    for name in asked(platform) {
        let (name, cpu) = match name.strip_prefix("last-") {
            Some(name) => (name, percpu::count().saturating_sub(1)),
            None => (name, 0),
        };
        if let Some((_, test)) = NAMES.iter().find(|known| known.0 == name)
            && percpu::cpu() == cpu
        {
            info!("self test: {name}");
            test();
            info!("self test: {name} FAILED: we are still here");
        }
    }
}

/// Moves and fills pieces of every size at every alignment, up and down, and looks at each byte around them.
fn copy() {
    const ROOM: usize = 320;
    let fresh = || core::array::from_fn::<u8, ROOM, _>(|at| (at % 251).to_le_bytes()[0]);
    for bytes in 0..200 {
        for (from, to) in
            (0..16).flat_map(|from| (0..16).map(move |to| (from, to))).chain([(0, 100), (100, 0), (7, 61)])
        {
            let (source, mut moved) = (fresh(), fresh());
            // Opaque, so that these are the calls and not what the compiler makes of them.
            core::hint::black_box(&mut moved).copy_within(from..from + bytes, to);
            let mut filled = fresh();
            core::hint::black_box(&mut filled)[to..to + bytes].fill(core::hint::black_box(0xa5));
            let mut copied = [0; ROOM];
            core::hint::black_box(&mut copied)[to..to + bytes].copy_from_slice(&source[from..from + bytes]);
            for at in 0..ROOM {
                let inside = (to..to + bytes).contains(&at);
                let there = if inside { source[at - to + from] } else { source[at] };
                assert_eq!(moved[at], there, "byte {at} of {bytes} moved from {from} to {to}");
                assert_eq!(
                    filled[at],
                    if inside { 0xa5 } else { source[at] },
                    "byte {at} of {bytes} filled at {to}"
                );
                assert_eq!(copied[at], if inside { there } else { 0 }, "byte {at} of {bytes} copied to {to}");
            }
        }
    }
}

/// Fills the heap as guests may, in small pieces, with what has blocks of its own there and with what has none, twice; then
/// what must not fail still finds memory. With every other piece gone there is no room, for nothing larger would fit; with
/// all of them there is.
fn heap() {
    assert!(mm::has_room(), "nothing is in it yet");
    for _ in 0..2 {
        fill_heap(|bytes| bytes);
        fill_heap(LikeALeaf);
    }
}

/// What is laid out as a leaf of an object's index.
#[repr(align(64))]
struct LikeALeaf([u8; 256]);
const _: () =
    assert!(size_of::<LikeALeaf>() == size_of::<Leaf>() && align_of::<LikeALeaf>() == align_of::<Leaf>());

impl AsRef<[u8]> for LikeALeaf {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

fn fill_heap<T: AsRef<[u8]>>(piece: impl Fn([u8; 256]) -> T) {
    let mut pieces: Vec<Option<Vec<T>>> = Vec::new();
    pieces.try_reserve_exact(1 << 20).expect("room for the list");
    while mm::has_room() {
        let mut one = Vec::new();
        one.try_reserve_exact(1).expect("who has asked finds some");
        one.push(piece([0xa5; 256]));
        pieces.push(Some(one));
    }
    let vital: [Box<[u8; 4096]>; 64] = core::array::from_fn(|_| Box::new([0x5a; 4096]));
    info!("self test: heap: full after {} pieces", pieces.len());
    pieces.iter_mut().step_by(2).for_each(|piece| drop(piece.take()));
    assert!(!mm::has_room(), "all that is free is small");
    let more: [Box<[u8; 4096]>; 64] = core::array::from_fn(|_| Box::new([0x3c; 4096]));
    let is_all = |piece: &[u8], byte| piece.iter().all(|&found| found == byte);
    let is_kept = |one: &Vec<T>| one.iter().all(|piece| is_all(piece.as_ref(), 0xa5));
    assert!(pieces.iter().flatten().all(is_kept));
    assert!(vital.iter().all(|piece| is_all(&**piece, 0x5a)));
    assert!(more.iter().all(|piece| is_all(&**piece, 0x3c)));
    // From a block and into one: where it lies is another, and what is in it is the same.
    let mut one = pieces.iter_mut().find_map(Option::take).expect("every other was kept");
    assert!(one.try_reserve_exact(1).is_ok_and(|()| one.capacity() == 2), "what is set aside is enough");
    assert!(is_kept(&one));
    one.shrink_to_fit();
    assert!(one.capacity() == 1 && is_kept(&one));
    drop((one, pieces, vital, more));
    // A few pieces at a time are set aside again.
    assert!((0..1000).any(|_| mm::has_room()), "all of it is free");
}

fn panic() {
    panic!("as asked");
}

/// Runs down the stack until its guard page.
fn overflow() {
    #[expect(unconditional_recursion, reason = "that is the test")]
    fn deeper(depth: u64) -> u64 {
        let room = core::hint::black_box([depth; 64]);
        deeper(depth.wrapping_add(1)).wrapping_add(room[63])
    }
    core::hint::black_box(deeper(0));
}

/// Reads a page that the map leaves out.
fn guard() {
    // SAFETY: none: the test is that the MMU stops it.
    let byte = unsafe { (&raw const __boot_stack_guard).read_volatile() };
    core::hint::black_box(byte);
}

/// Writes to code.
fn write_text() {
    // SAFETY: none: the test is that the MMU stops it.
    unsafe { (&raw const __image_start).cast_mut().write_volatile(0) };
}

/// Executes data: a RET, on the stack.
fn run_data() {
    let code = core::hint::black_box([0xd65f_03c0_u32; 4]);
    // SAFETY: none: the test is that the MMU stops it; if it does not, the RET comes straight back.
    let run: extern "C" fn() = unsafe { core::mem::transmute(code.as_ptr()) };
    run();
}
