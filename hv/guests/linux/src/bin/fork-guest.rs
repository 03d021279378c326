//! `fork-guest N`, a program for Linux: forks the guest that it runs in, through the fork page.
//!
//! It prints one line in each relative, `fork-guest: place P of N, guest G`, where P is 0 in the parent. A child's kernel
//! has drawn random numbers from what its parent had; so before that line a child mixes bytes of its own into the kernel's
//! pool and has it begin anew, which kernels without a driver for the generation id (before 6.10) would not do.
//! Static, without a library; it needs `/dev/mem`, so root.
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
    use core::arch::asm;
    use core::fmt;
    use hv_abi::call::status;
    use hv_abi::forkpage::{
        FORK, GUEST, MAGIC, MAGIC_VALUE, OF, PLACE, RANDOM, STATUS, VERSION, VERSION_VALUE,
    };
    use hv_abi::machine::FORK_PAGE;
    use hv_guest_programs::{Stack, call, exit, map, open};

    /// Numbers of arm64's system calls.
    mod number {
        pub(super) const IOCTL: usize = 29;
        pub(super) const FLOCK: usize = 32;
    }

    const O_RDWR: usize = 2;
    /// arm64: makes a mapping of `/dev/mem` that of a device.
    const O_SYNC: usize = 0o4_010_000;
    const LOCK_EX: usize = 2;
    const MAP_SHARED: usize = 1;
    /// Adds bytes to the kernel's pool, with a credit in bits.
    const RNDADDENTROPY: usize = 0x4008_5203;
    /// Has its generator take a new key from the pool.
    const RNDRESEEDCRNG: usize = 0x5207;

    #[expect(clippy::cast_possible_truncation, reason = "a usize has 64 bits here")]
    const fn word(value: u64) -> usize {
        value as usize
    }

    fn say(to: usize, words: fmt::Arguments<'_>) {
        hv_guest_programs::say(to, format_args!("fork-guest: {words}"));
    }

    fn fail(words: fmt::Arguments<'_>) -> ! {
        say(2, words);
        exit(1)
    }

    /// The fork page, mapped.
    struct Page(usize);

    impl Page {
        /// Maps it, and keeps everybody else who does so waiting.
        fn open() -> Self {
            let mapped = open(c"/dev/mem", O_RDWR | O_SYNC).and_then(|file| {
                call(number::FLOCK, [file, LOCK_EX, 0, 0, 0, 0])?;
                let (size, offset) = (word(FORK_PAGE.size), word(FORK_PAGE.base));
                map(size, MAP_SHARED, file, offset)
            });
            match mapped {
                Ok(at) => Self(at),
                Err(error) => fail(format_args!("/dev/mem: error {}", -error)),
            }
        }

        fn read(&self, register: u64) -> u32 {
            let value: u32;
            let at = self.0 + word(register);
            // SAFETY: the page is mapped for as long as we live.
            unsafe { asm!("ldr {:w}, [{}]", out(reg) value, in(reg) at, options(nostack)) };
            value
        }

        fn write(&self, register: u64, value: u32) {
            let at = self.0 + word(register);
            // SAFETY: as above. What other programs have in memory is as they left it, in every relative.
            unsafe { asm!("str {:w}, [{}]", in(reg) value, in(reg) at, options(nostack)) };
        }
    }

    /// What RNDADDENTROPY takes.
    #[repr(C)]
    struct Entropy {
        bits: u32,
        bytes: u32,
        words: [u32; 16],
    }

    /// Gives the kernel's generator bytes that no relative has.
    fn reseed(page: &Page) -> Result<(), isize> {
        let pool = open(c"/dev/random", O_RDWR)?;
        let mut entropy = Entropy { bits: 256, bytes: 64, words: [0; 16] };
        entropy.words.fill_with(|| page.read(RANDOM));
        call(number::IOCTL, [pool, RNDADDENTROPY, &raw const entropy as usize, 0, 0, 0])?;
        call(number::IOCTL, [pool, RNDRESEEDCRNG, 0, 0, 0, 0]).map(drop)
    }

    #[unsafe(no_mangle)]
    extern "C" fn main(stack: &Stack) -> ! {
        let count = match stack.arguments() {
            Some([Some(count), None]) => count.parse().ok(),
            _ => None,
        };
        let Some(count) = count else {
            fail(format_args!("usage: fork-guest CHILDREN"));
        };
        let page = Page::open();
        if (page.read(MAGIC), page.read(VERSION)) != (MAGIC_VALUE, VERSION_VALUE) {
            fail(format_args!("no fork page here: this is another machine"));
        }
        page.write(FORK, count);
        match i64::from(page.read(STATUS).cast_signed()) {
            status::SUCCESS => {}
            status::DENIED => {
                fail(format_args!("refused: not granted (run --grant-fork N), too many, or too often"));
            }
            status::INVALID_PARAMETERS => fail(format_args!("no such number of children: {count}")),
            other => fail(format_args!("error {other}")),
        }
        let place = page.read(PLACE);
        if place != 0
            && let Err(error) = reseed(&page)
        {
            fail(format_args!("/dev/random: error {}", -error));
        }
        say(1, format_args!("place {place} of {}, guest {}", page.read(OF), page.read(GUEST)));
        exit(0)
    }
}
