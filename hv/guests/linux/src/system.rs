//! System calls, and what every program needs around them.

use core::arch::{asm, global_asm};
use core::ffi::{CStr, c_char};
use core::fmt::{self, Write};

// The stack pointer is at argc, with argv behind it.
global_asm!(".global _start", "_start: mov x29, #0", "mov x30, #0", "mov x0, sp", "b main");

/// Numbers of arm64's system calls.
mod number {
    pub(super) const OPENAT: usize = 56;
    pub(super) const WRITE: usize = 64;
    pub(super) const EXIT_GROUP: usize = 94;
    pub(super) const MMAP: usize = 222;
}

const PROT_READ_WRITE: usize = 3;
const AT_FDCWD: usize = (-100isize).cast_unsigned();

/// What the kernel leaves on the stack of a program that begins, as far as programs look.
#[repr(C)]
pub struct Stack {
    count: usize,
    words: [*const c_char; 3],
}

impl Stack {
    /// The words behind the program's name, of which there may be two; `None` with more of them, or when one is not text.
    pub fn arguments(&self) -> Option<[Option<&str>; 2]> {
        if self.count > self.words.len() {
            return None;
        }
        let mut found = [None; 2];
        for (found, &word) in found.iter_mut().zip(self.words.get(1..self.count)?) {
            // SAFETY: the kernel made it, and each argument ends with a zero.
            *found = Some(unsafe { CStr::from_ptr(word) }.to_str().ok()?);
        }
        Some(found)
    }
}

/// Makes a system call; the error's number when the kernel answers with one. Whoever calls vouches for what the arguments
/// point to.
pub fn call(number: usize, arguments: [usize; 6]) -> Result<usize, isize> {
    let [a, b, c, d, e, f] = arguments;
    let answer: usize;
    // SAFETY: the kernel reads and writes what the arguments point to, which callers vouch for: our own values.
    unsafe {
        asm!("svc #0", in("x8") number, inlateout("x0") a => answer, in("x1") b, in("x2") c, in("x3") d, in("x4") e,
            in("x5") f, options(nostack));
    }
    let error = answer.cast_signed();
    if (-4095..0).contains(&error) { Err(error) } else { Ok(answer) }
}

/// Ends the program.
pub fn exit(status: usize) -> ! {
    loop {
        let _ = call(number::EXIT_GROUP, [status, 0, 0, 0, 0, 0]);
    }
}

/// Opens a file.
pub fn open(path: &CStr, flags: usize) -> Result<usize, isize> {
    call(number::OPENAT, [AT_FDCWD, path.as_ptr() as usize, flags, 0, 0, 0])
}

/// Maps so many bytes to be read and written, of a file from this offset on unless the flags say otherwise: where.
pub fn map(bytes: usize, flags: usize, file: usize, offset: usize) -> Result<usize, isize> {
    call(number::MMAP, [0, bytes, PROT_READ_WRITE, flags, file, offset])
}

/// A line that is written at once, so that no other's comes in between.
struct Line {
    text: [u8; 160],
    used: usize,
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let room = self.text.get_mut(self.used..self.used + text.len()).ok_or(fmt::Error)?;
        room.copy_from_slice(text.as_bytes());
        self.used += text.len();
        Ok(())
    }
}

/// Writes a line of at most 159 bytes to a file that is open: 1 is the standard output, 2 that of errors.
pub fn say(to: usize, words: fmt::Arguments<'_>) {
    let mut line = Line { text: [0; 160], used: 0 };
    let _ = writeln!(line, "{words}");
    let text = &line.text[..line.used];
    let _ = call(number::WRITE, [to, text.as_ptr() as usize, text.len(), 0, 0, 0]);
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    exit(101)
}
