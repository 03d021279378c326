//! `memtest [MIB] [ROUNDS]`, a program for Linux: fills so much memory, 32 MiB unless told, and reads it again, twice
//! unless told.
//!
//! The memory is anonymous and in equal parts, one for each CPU, which all work at once. Every word of every round has a
//! value of its own, made from a number that is drawn for the round: a page in another's place, of another round or of
//! another guest is noticed as a bit that turned is (but one that a relative had who was forked in this round has these numbers
//! as well). Every second round is written from the end down. The last line says
//! `memtest: MIB MiB, ROUNDS rounds, ok`; the first word that is wrong, where it is, and the status is 1.
#![cfg_attr(target_os = "none", no_std, no_main)]
#![cfg_attr(
    target_os = "none",
    expect(unsafe_code, reason = "a program without a library makes its own system calls")
)]

/// There is nothing to do on the host.
#[cfg(not(target_os = "none"))]
fn main() {}

#[cfg(target_os = "none")]
mod linux {
    use core::fmt;
    use hv_guest_programs::{Stack, call, exit, map, say};

    /// Numbers of arm64's system calls.
    mod number {
        pub(super) const SCHED_GETAFFINITY: usize = 123;
        pub(super) const CLONE: usize = 220;
        pub(super) const WAIT4: usize = 260;
        pub(super) const GETRANDOM: usize = 278;
    }

    const MAP_PRIVATE_ANONYMOUS: usize = 0x22;
    const NO_FILE: usize = usize::MAX;
    /// What a parent is told when its child ends.
    const SIGCHLD: usize = 17;
    /// The odd number next to 2^64 divided by the golden ratio: products with it differ in all their bits.
    const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;

    fn end(status: usize, words: fmt::Arguments<'_>) -> ! {
        say(1, format_args!("memtest: {words}"));
        exit(status)
    }

    fn asked(what: &str, answer: Result<usize, isize>) -> usize {
        match answer {
            Ok(answer) => answer,
            Err(error) => end(2, format_args!("{what}: error {}", -error)),
        }
    }

    /// How many CPUs this may run on.
    fn cpus() -> usize {
        let mut set = [0_u64; 16];
        asked(
            "its CPUs",
            call(number::SCHED_GETAFFINITY, [0, size_of_val(&set), set.as_mut_ptr() as usize, 0, 0, 0]),
        );
        set.iter().map(|word| word.count_ones() as usize).sum()
    }

    /// A number that nobody else has.
    fn seed() -> u64 {
        let mut seed = 0_u64;
        asked(
            "a random number",
            call(number::GETRANDOM, [&raw mut seed as usize, size_of_val(&seed), 0, 0, 0, 0]),
        );
        seed
    }

    /// Memory that has never been touched.
    fn memory<'a>(bytes: usize) -> &'a mut [u64] {
        let at = asked("its memory", map(bytes, MAP_PRIVATE_ANONYMOUS, NO_FILE, 0)) as *mut u64;
        // SAFETY: so many bytes are there now, zero, and nobody else knows of them.
        unsafe { core::slice::from_raw_parts_mut(at, bytes / size_of::<u64>()) }
    }

    /// Fills a part and reads it, so many times.
    fn test(bytes: usize, rounds: usize) {
        let words = memory(bytes);
        for round in 1..=rounds {
            let seed = seed();
            let value = |index: usize| (index as u64 ^ seed).wrapping_mul(SPREAD ^ (round as u64) << 1);
            let fill = |(index, word): (usize, &mut u64)| *word = value(index);
            if round % 2 == 1 {
                words.iter_mut().enumerate().for_each(fill);
            } else {
                words.iter_mut().enumerate().rev().for_each(fill);
            }
            // The compiler may not conclude what is read from what was written.
            let words = core::hint::black_box(&mut *words);
            if let Some((index, word)) =
                words.iter().enumerate().find(|(index, word)| **word != value(*index))
            {
                let (at, right) = (index * size_of::<u64>(), value(index));
                end(
                    1,
                    format_args!(
                        "round {round} FAILED: {word:#x} at {at:#x} of {bytes:#x} is not {right:#x}"
                    ),
                );
            }
        }
    }

    fn number(word: Option<&str>, otherwise: usize) -> Option<usize> {
        word.map_or(Some(otherwise), |word| word.parse().ok().filter(|number| (1..1 << 20).contains(number)))
    }

    #[unsafe(no_mangle)]
    extern "C" fn main(stack: &Stack) -> ! {
        let asked_for =
            stack.arguments().and_then(|[mib, rounds]| Some((number(mib, 32)?, number(rounds, 2)?)));
        let Some((mib, rounds)) = asked_for else {
            end(2, format_args!("usage: memtest [MIB] [ROUNDS]"));
        };
        let parts = cpus();
        let bytes = (mib << 20) / parts / size_of::<u64>() * size_of::<u64>();
        for _ in 0..parts {
            if asked("a process", call(number::CLONE, [SIGCHLD, 0, 0, 0, 0, 0])) == 0 {
                test(bytes, rounds);
                exit(0);
            }
        }
        let mut worst = 0_u32;
        for _ in 0..parts {
            let mut status = 0_u32;
            asked("its end", call(number::WAIT4, [usize::MAX, &raw mut status as usize, 0, 0, 0, 0]));
            worst = worst.max(status);
        }
        if worst != 0 {
            end(1, format_args!("{mib} MiB, {rounds} rounds, FAILED"));
        }
        end(0, format_args!("{mib} MiB, {rounds} rounds, ok"))
    }
}
