//! A PL011 serial port: transmission by polling, reception by interrupt.
//!
//! Output waits for room in the FIFO: a log line is short and the FIFO always drains. Input never waits:
//! [`Pl011::read`] takes what is there; with the receive interrupt on, the owner calls it until `None`.
//! The register layout is the `arm-pl011-uart` crate's.
#![expect(unsafe_code, reason = "the registers' address comes from the device tree, as a number")]

use crate::platform;
use arm_pl011_uart::{
    DataBits, FifoLevel, Interrupts, LineConfig, PL011Registers, Parity, StopBits, Uart, UniqueMmioPointer,
};
use core::fmt;
use core::ptr::NonNull;

/// The line's rate; QEMU ignores it.
const BAUD: u32 = 115_200;
/// The clock taken where the tree names none: the PrimeCell's usual one.
const DEFAULT_CLOCK_HZ: u32 = 24_000_000;
/// Looks at a full FIFO before a byte is dropped. A port that does not drain must not stop the hypervisor.
const PATIENCE: u32 = 1_000_000;

/// One port.
pub struct Pl011 {
    uart: Uart<'static>,
}

impl Pl011 {
    /// Takes the port over and sets its line to 115200 8N1, all interrupts masked. `None` if it has no address.
    ///
    /// # Safety
    /// `port` is a PL011 of this machine, mapped as device memory at its physical address, and nobody else
    /// writes its registers as long as the value lives. (A panic may, on the way out.)
    pub unsafe fn new(port: &platform::Uart) -> Option<Self> {
        let address = usize::try_from(port.device.region.base.bits()).ok()?;
        let registers = NonNull::new(core::ptr::with_exposed_provenance_mut::<PL011Registers>(address))?;
        // SAFETY: the caller says that this is a mapped PL011, and ours.
        let mut uart = Uart::new(unsafe { UniqueMmioPointer::new(registers) });
        uart.set_interrupt_masks(Interrupts::empty());
        let line = LineConfig { data_bits: DataBits::Bits8, parity: Parity::None, stop_bits: StopBits::One };
        // A clock too slow for the rate leaves the port as the firmware set it, which is better than nothing.
        let _ = uart.enable(line, BAUD, port.clock_hz.unwrap_or(DEFAULT_CLOCK_HZ));
        Some(Self { uart })
    }

    /// Sends a byte, waiting for room.
    pub fn write(&mut self, byte: u8) {
        for _ in 0..PATIENCE {
            if self.try_write(byte) {
                return;
            }
            core::hint::spin_loop();
        }
    }

    /// Sends a byte if there is room.
    pub fn try_write(&mut self, byte: u8) -> bool {
        let room = !self.uart.is_tx_fifo_full();
        if room {
            self.uart.write_word(byte);
        }
        room
    }

    /// A received byte, if there is one. Bytes that arrived damaged are skipped.
    pub fn read(&mut self) -> Option<u8> {
        loop {
            match self.uart.read_word() {
                Ok(byte) => return byte,
                // The FIFO has one entry less after each: the loop ends.
                Err(_) => continue,
            }
        }
    }

    /// Turns the receive interrupt on or off: a byte, or the line idle with bytes in the FIFO. It goes when the FIFO is read
    /// empty (TRM DDI 0183, 2.8), and is never cleared otherwise: with bytes in the FIFO it would not come again.
    pub fn set_receive_interrupt(&mut self, on: bool) {
        self.uart.set_interrupt_fifo_levels(FifoLevel::Bytes4, FifoLevel::Bytes16);
        let masks = if on { Interrupts::RXI | Interrupts::RTI } else { Interrupts::empty() };
        self.uart.set_interrupt_masks(masks);
    }
}

/// Text, with a carriage return before each newline.
impl fmt::Write for Pl011 {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            if byte == b'\n' {
                self.write(b'\r');
            }
            self.write(byte);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::{Device, Interrupt, Region};
    use core::fmt::Write;
    use std::boxed::Box;

    fn port(registers: *mut [u32; 1024]) -> Pl011 {
        let region = Region::new(registers.expose_provenance() as u64, 0x1000).unwrap();
        let device = Device { region, interrupt: Interrupt { intid: 33, edge: false } };
        // SAFETY: the registers are a page of ours, leaked, which nobody else touches meanwhile.
        unsafe { Pl011::new(&platform::Uart { device, clock_hz: None }) }.unwrap()
    }

    fn registers() -> *mut [u32; 1024] {
        Box::into_raw(Box::new([0; 1024]))
    }

    fn set(registers: *mut [u32; 1024], offset: usize, value: u32) {
        // SAFETY: inside the leaked page.
        unsafe { registers.cast::<u32>().wrapping_add(offset / 4).write_volatile(value) }
    }

    fn get(registers: *mut [u32; 1024], offset: usize) -> u32 {
        // SAFETY: inside the leaked page.
        unsafe { registers.cast::<u32>().wrapping_add(offset / 4).read_volatile() }
    }

    #[test]
    fn a_new_port_is_enabled_with_its_interrupts_masked() {
        let page = registers();
        set(page, 0x38, 0x7ff);
        let _port = port(page);
        assert_eq!(get(page, 0x38), 0);
        assert_eq!(get(page, 0x30), 0x301);
        assert_eq!(get(page, 0x2c), 0x70);
    }

    #[test]
    fn a_full_fifo_takes_no_byte_and_an_empty_one_gives_none() {
        let page = registers();
        let mut port = port(page);
        set(page, 0x18, 1 << 5 | 1 << 4);
        assert!(!port.try_write(b'x'));
        assert_eq!(port.read(), None);
        set(page, 0x18, 0);
        port.write_str("y").unwrap();
        assert_eq!(get(page, 0), u32::from(b'y'));
        assert_eq!(port.read(), Some(b'y'));
    }
}
