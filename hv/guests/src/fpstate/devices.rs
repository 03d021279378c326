//! The console's registers and what was typed, the clock's, and a virtio device that is some buffers on its way.

use hv_abi::machine::{PL011, PL031, RAM_BASE, VIRTIO_SLOTS};

use super::Ledger;
use crate::console;
use crate::memory::{peek, poke};
use crate::mmio::{read32, write32};
use crate::runtime::Random;
use crate::virtio::{Queue, STATUS, Transport, low};

/// What is typed: more than the FIFO holds. Tests type it.
const TYPED: &str = "abcdefghijklmnopqrstuvwxyz\r";
const FR: u64 = PL011.base + 0x18;
const FULL: u32 = 1 << 6;
/// Low power, divisors, line, control, levels, masks; DMA.
const UART: [u64; 8] = [0x20, 0x24, 0x28, 0x2c, 0x30, 0x34, 0x38, 0x48];
const RTC_MATCH: u64 = PL031.base + 0x04;
const RTC_LOAD: u64 = PL031.base + 0x08;
const RTC_MASK: u64 = PL031.base + 0x10;

/// The source of entropy.
const ENTROPY: Transport = Transport::new(VIRTIO_SLOTS as u64 - 2);
const RINGS: u64 = RAM_BASE + 0x28_0000;
const BUFFER: u64 = RINGS + 0x1000;
const BYTES: u64 = 8;
/// Identity, what it offers, its queue, why it has interrupted, how far it is, its configuration's generation.
const VIRTIO: [u64; 9] = [0x00, 0x04, 0x08, 0x10, 0x34, 0x44, 0x60, STATUS, 0xfc];

/// All of them.
pub(super) struct Devices {
    entropy: Option<Queue>,
    typed: bool,
}

impl Devices {
    /// Puts them in place, and waits until the FIFO is full if something is to be typed.
    pub(super) fn begin(ours: bool, typed: bool, random: &mut Random) -> Self {
        let entropy = ours.then(|| {
            ENTROPY.begin(0);
            let mut queue = Queue::new(ENTROPY, 0, RINGS);
            ENTROPY.go();
            // The other half of its features is shown.
            ENTROPY.set(0x14, 1);
            for number in 0..3 {
                draw(&mut queue, BUFFER + number * BYTES);
            }
            queue
        });
        let mut draw = |mask: u32, set: u32| low(random.draw()) & mask | set;
        // FIFOs, eight bits; receiving and sending on; not the interrupts that printing raises.
        let values = [
            draw(0xff, 0),
            draw(0xffff, 0),
            draw(0x3f, 0),
            draw(0x8e, 0x70),
            draw(0xfc00, 0x300),
            draw(0x7, 0x18),
            draw(0x78f, 0),
            draw(0x7, 0),
        ];
        for (offset, value) in UART.into_iter().zip(values) {
            write32(PL011.base + offset, value);
        }
        let seconds = draw(u32::MAX, 0);
        write32(RTC_LOAD, seconds);
        write32(RTC_MATCH, seconds.wrapping_add(0x1000_0000));
        write32(RTC_MASK, draw(1, 0));
        println!("fpstate: may be typed to");
        while typed && read32(FR) & FULL == 0 {}
        Self { entropy, typed }
    }

    /// Looks at them.
    pub(super) fn see(&self, ledger: &mut Ledger) {
        let uart = UART.into_iter().chain([0x18, 0x3c, 0x40]);
        uart.for_each(|offset| {
            ledger.see("a register of the console", offset, read32(PL011.base + offset).into())
        });
        for at in [RTC_MATCH, RTC_LOAD, RTC_MASK, PL031.base + 0x14] {
            ledger.see("a register of the clock", at, read32(at).into());
        }
        if self.entropy.is_some() {
            for offset in VIRTIO {
                let value = ENTROPY.get(u64::from(low(offset)));
                ledger.see("a register of a virtio device", offset, value.into());
            }
        }
    }

    /// What was typed comes, and one more buffer is filled; what with.
    pub(super) fn end(self) -> u64 {
        if self.typed {
            for byte in TYPED.bytes() {
                assert_eq!(char::from(console::read()), char::from(byte), "what was typed");
            }
        }
        let Some(mut queue) = self.entropy else { return 0 };
        draw(&mut queue, BUFFER + 3 * BYTES);
        peek(BUFFER + 3 * BYTES)
    }
}

/// Has one buffer filled.
fn draw(queue: &mut Queue, at: u64) {
    poke(at, 0);
    queue.offer(at, low(BYTES), true);
    assert!(queue.is_served() && peek(at) != 0, "the source of entropy has stopped");
}
