//! Device registers, one plain instruction an access: what the compiler would make of a volatile access
//! may write back its address, and then the hypervisor has no syndrome to emulate it by.

macro_rules! access {
    ($read:ident, $write:ident, $type:ty, $load:literal, $store:literal) => {
        /// Reads a device register of that width.
        pub fn $read(at: u64) -> $type {
            let value: u64;
            // SAFETY: a device register is nobody's memory; a wrong address traps.
            unsafe {
                core::arch::asm!($load, out(reg) value, in(reg) at, options(nostack))
            };
            #[expect(clippy::cast_possible_truncation, reason = "the load has cleared the rest")]
            {
                value as $type
            }
        }
        /// Writes a device register of that width.
        pub fn $write(at: u64, value: $type) {
            let value = u64::from(value);
            // SAFETY: a device register is nobody's memory; a wrong address traps.
            unsafe {
                core::arch::asm!($store, in(reg) value, in(reg) at, options(nostack))
            };
        }
    };
}

access!(read8, write8, u8, "ldrb {0:w}, [{1}]", "strb {0:w}, [{1}]");
access!(read16, write16, u16, "ldrh {0:w}, [{1}]", "strh {0:w}, [{1}]");
access!(read32, write32, u32, "ldr {0:w}, [{1}]", "str {0:w}, [{1}]");

/// Reads a device register of 64 bits.
pub fn read64(at: u64) -> u64 {
    let value: u64;
    // SAFETY: a device register is nobody's memory; a wrong address traps.
    unsafe { core::arch::asm!("ldr {}, [{}]", out(reg) value, in(reg) at, options(nostack)) };
    value
}

/// Writes a device register of 64 bits.
pub fn write64(at: u64, value: u64) {
    // SAFETY: a device register is nobody's memory; a wrong address traps.
    unsafe { core::arch::asm!("str {}, [{}]", in(reg) value, in(reg) at, options(nostack)) };
}
