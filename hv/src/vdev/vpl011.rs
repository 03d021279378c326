//! The console's UART: a PL011 whose line is infinitely fast.
//!
//! What is written is sent at once, so the transmit FIFO is always empty; what is typed waits in a receive
//! FIFO of sixteen bytes (one, while FIFOs are off). There is no time in it, so the receive timeout is
//! raised as soon as anything is there. Registers may be read and written with any size. Used by `guest`.

use super::primecell_id;
use serde::{Deserialize, Serialize};

/// Bytes that the receive FIFO holds.
pub const FIFO: usize = 16;

const DR: u64 = 0x00;
const RSR: u64 = 0x04;
const FR: u64 = 0x18;
const ILPR: u64 = 0x20;
const IBRD: u64 = 0x24;
const FBRD: u64 = 0x28;
const LCR_H: u64 = 0x2c;
const CR: u64 = 0x30;
const IFLS: u64 = 0x34;
const IMSC: u64 = 0x38;
const RIS: u64 = 0x3c;
const MIS: u64 = 0x40;
const ICR: u64 = 0x44;
const DMACR: u64 = 0x48;

const FR_RXFE: u16 = 1 << 4;
const FR_RXFF: u16 = 1 << 6;
const FR_TXFE: u16 = 1 << 7;
const LCR_FEN: u16 = 1 << 4;
const CR_LOOPBACK: u16 = 1 << 7;
const INT_RX: u16 = 1 << 4;
const INT_TX: u16 = 1 << 5;
const INT_TIMEOUT: u16 = 1 << 6;
const INT_ALL: u16 = 0x7ff;

const ID: [u8; 8] = [0x11, 0x10, 0x14, 0x00, 0x0d, 0xf0, 0x05, 0xb1];

/// A UART.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Vpl011 {
    fifo: [u8; FIFO],
    first: usize,
    count: usize,
    low_power: u16,
    baud_whole: u16,
    baud_part: u16,
    line: u16,
    control: u16,
    levels: u16,
    mask: u16,
    raised: u16,
    dma: u16,
}

impl Default for Vpl011 {
    fn default() -> Self {
        Self::new()
    }
}

impl Vpl011 {
    /// As after reset.
    pub const fn new() -> Self {
        Self {
            fifo: [0; FIFO],
            first: 0,
            count: 0,
            low_power: 0,
            baud_whole: 0,
            baud_part: 0,
            line: 0,
            control: 0x300,
            levels: 0x12,
            mask: 0,
            raised: 0,
            dma: 0,
        }
    }

    /// True unless no UART could be like this: for one that was stored.
    pub const fn is_sound(&self) -> bool {
        self.first < FIFO && self.count <= FIFO
    }

    /// Whether its interrupt line is high.
    pub const fn level(&self) -> bool {
        self.raised & self.mask != 0
    }

    /// How many bytes [`Self::push`] would take now.
    pub const fn room(&self) -> usize {
        self.depth().saturating_sub(self.count)
    }

    /// A typed byte arrives; false when there is no room, and it must be kept.
    pub fn push(&mut self, byte: u8) -> bool {
        if self.room() == 0 {
            return false;
        }
        self.fifo[(self.first + self.count) % FIFO] = byte;
        self.count += 1;
        if self.count >= self.trigger() {
            self.raised |= INT_RX;
        }
        self.raised |= INT_TIMEOUT;
        true
    }

    /// Reads the register at `offset`; a part of one, when not at its start.
    pub fn read(&mut self, offset: u64) -> u64 {
        let register = u64::from(self.register(offset & !3));
        register >> (8 * (offset & 3))
    }

    fn register(&mut self, offset: u64) -> u16 {
        match offset {
            DR => self.take(),
            FR => {
                let mut flags = FR_TXFE;
                if self.count == 0 {
                    flags |= FR_RXFE;
                }
                if self.room() == 0 {
                    flags |= FR_RXFF;
                }
                flags
            }
            ILPR => self.low_power,
            IBRD => self.baud_whole,
            FBRD => self.baud_part,
            LCR_H => self.line,
            CR => self.control,
            IFLS => self.levels,
            IMSC => self.mask,
            RIS => self.raised,
            MIS => self.raised & self.mask,
            DMACR => self.dma,
            0xfe0..=0xfff => u16::try_from(primecell_id(&ID, offset)).unwrap_or(0),
            _ => 0,
        }
    }

    /// Writes the register at `offset`; the byte that it sends, if it sends one.
    pub fn write(&mut self, offset: u64, value: u64) -> Option<u8> {
        let [byte, high, ..] = value.to_le_bytes();
        let value = u16::from_le_bytes([byte, high]);
        match offset {
            DR => return self.send(byte),
            // Errors never happen, so clearing them is nothing.
            RSR => {}
            ILPR => self.low_power = value & 0xff,
            IBRD => self.baud_whole = value,
            FBRD => self.baud_part = value & 0x3f,
            LCR_H => {
                // Turning the FIFOs on or off empties them.
                if (self.line ^ value) & LCR_FEN != 0 {
                    self.first = 0;
                    self.count = 0;
                    self.raised &= !(INT_RX | INT_TIMEOUT);
                }
                self.line = value & 0xff;
            }
            CR => self.control = value & 0xff87,
            IFLS => self.levels = value & 0x3f,
            IMSC => self.mask = value & INT_ALL,
            ICR => self.raised &= !value,
            DMACR => self.dma = value & 7,
            _ => {}
        }
        None
    }

    fn send(&mut self, byte: u8) -> Option<u8> {
        // Gone at once: the FIFO passes its threshold with every byte.
        self.raised |= INT_TX;
        if self.control & CR_LOOPBACK != 0 {
            self.push(byte);
            return None;
        }
        Some(byte)
    }

    fn take(&mut self) -> u16 {
        if self.count == 0 {
            return 0;
        }
        let byte = self.fifo[self.first];
        self.first = (self.first + 1) % FIFO;
        self.count -= 1;
        if self.count < self.trigger() {
            self.raised &= !INT_RX;
        }
        if self.count == 0 {
            self.raised &= !INT_TIMEOUT;
        }
        u16::from(byte)
    }

    const fn depth(&self) -> usize {
        if self.line & LCR_FEN != 0 { FIFO } else { 1 }
    }

    const fn trigger(&self) -> usize {
        if self.line & LCR_FEN == 0 {
            return 1;
        }
        match self.levels >> 3 & 7 {
            0 => FIFO / 8,
            1 => FIFO / 4,
            2 => FIFO / 2,
            3 => FIFO * 3 / 4,
            _ => FIFO * 7 / 8,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As Linux sets it up: FIFOs, receive and timeout interrupts, at half full.
    fn linux() -> Vpl011 {
        let mut uart = Vpl011::new();
        uart.write(IBRD, 13);
        uart.write(FBRD, 1);
        uart.write(LCR_H, 0x70);
        uart.write(IFLS, 0x12);
        uart.write(ICR, 0xffff);
        uart.write(CR, 0xb01);
        uart.write(IMSC, u64::from(INT_RX | INT_TIMEOUT));
        uart
    }

    #[test]
    fn a_polling_guest_prints_from_the_first_instruction_with_bytes() {
        let mut uart = Vpl011::new();
        assert_eq!(uart.read(FR) & (1 << 5 | 1 << 3), 0, "not full, not busy");
        assert_eq!(uart.write(DR, 0x141), Some(0x41), "the byte alone");
        assert_eq!(uart.read(FR), 0x90);
        assert!(!uart.level());
    }

    #[test]
    fn typed_bytes_raise_the_line_until_they_are_read() {
        let mut uart = linux();
        assert!(!uart.level());
        assert!(uart.push(b'a'));
        assert!(uart.level(), "one byte does not fill half of it, but no more may come");
        assert_eq!(uart.read(MIS), u64::from(INT_TIMEOUT));
        assert!(uart.push(b'b') && uart.push(b'c') && uart.push(b'd') && uart.push(b'e') && uart.push(b'f'));
        assert_eq!(uart.read(MIS), u64::from(INT_TIMEOUT));
        assert!(uart.push(b'g') && uart.push(b'h'), "half full is what Linux asks for");
        assert_eq!(uart.read(MIS), u64::from(INT_TIMEOUT | INT_RX));
        for byte in *b"abcdefgh" {
            assert!(uart.level());
            assert_eq!(uart.read(FR) & u64::from(FR_RXFE), 0);
            assert_eq!(uart.read(DR), u64::from(byte));
        }
        assert!(!uart.level());
        assert_eq!(uart.read(FR) & u64::from(FR_RXFE), u64::from(FR_RXFE));
        assert_eq!(uart.read(DR), 0);
    }

    #[test]
    fn what_does_not_fit_is_left_with_whoever_typed_it() {
        let mut uart = linux();
        assert_eq!(uart.room(), FIFO);
        for n in 0..16 {
            assert!(uart.push(n));
        }
        assert!(!uart.push(99));
        assert_eq!(uart.read(FR) & u64::from(FR_RXFF), u64::from(FR_RXFF));
        assert_eq!(uart.read(DR), 0);
        assert!(uart.push(16));
        let rest: std::vec::Vec<u64> = (0..16).map(|_| uart.read(DR)).collect();
        assert_eq!(rest, (1..17).collect::<std::vec::Vec<_>>());
        // Without FIFOs there is room for one.
        let mut uart = Vpl011::new();
        assert!(uart.push(1) && !uart.push(2));
        assert_eq!(uart.read(RIS), u64::from(INT_RX | INT_TIMEOUT));
    }

    #[test]
    fn turning_the_fifo_on_or_off_empties_it_and_an_empty_one_asks_for_nothing() {
        let mut uart = linux();
        for line in [0x60, 0x70] {
            assert!(uart.push(1) && uart.level());
            uart.write(LCR_H, line);
            assert_eq!(uart.read(FR) & u64::from(FR_RXFE), u64::from(FR_RXFE));
            assert_eq!((uart.level(), uart.read(RIS)), (false, 0), "no byte that is read would end it");
        }
    }

    #[test]
    fn a_sent_byte_raises_the_transmit_interrupt_until_cleared() {
        let mut uart = linux();
        uart.write(IMSC, u64::from(INT_TX));
        assert!(!uart.level());
        uart.write(DR, 65);
        assert!(uart.level());
        uart.write(ICR, u64::from(INT_TX));
        assert!(!uart.level());
        assert_eq!(uart.read(RIS) & u64::from(INT_TX), 0);
    }

    #[test]
    fn a_loop_sends_to_itself() {
        let mut uart = linux();
        uart.write(CR, 0xb81);
        assert_eq!(uart.write(DR, 7), None);
        assert_eq!(uart.read(DR), 7);
    }

    #[test]
    fn registers_read_as_written_and_in_parts() {
        let mut uart = linux();
        assert_eq!((uart.read(IBRD), uart.read(FBRD), uart.read(LCR_H)), (13, 1, 0x70));
        assert_eq!((uart.read(CR), uart.read(CR + 1), uart.read(CR + 2)), (0xb01, 0xb, 0));
        let id: std::vec::Vec<u64> = (0xfe0..0x1000).step_by(4).map(|at| uart.read(at)).collect();
        assert_eq!(id, [0x11, 0x10, 0x14, 0, 0x0d, 0xf0, 0x05, 0xb1]);
    }

    #[test]
    fn anything_anywhere_does_not_panic() {
        let mut uart = Vpl011::new();
        let mut seed = 1u64;
        for _ in 0..200_000 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let offset = if seed & 1 << 20 != 0 { seed >> 40 & 0xfff } else { seed >> 40 & 0x7f };
            match seed >> 62 {
                0 => drop(uart.read(offset)),
                1 => drop(uart.push(seed.to_le_bytes()[5])),
                _ => drop(uart.write(offset, seed >> 8)),
            }
            assert!(uart.count <= FIFO && uart.first < FIFO);
        }
        uart.read(u64::MAX);
        uart.write(u64::MAX, u64::MAX);
    }
}
