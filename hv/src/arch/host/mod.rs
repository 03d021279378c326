//! The CPU, played by memory: the same names as `aarch64`, so that the library compiles and is tested on
//! any machine. Each thread has a CPU of its own, so tests do not meet.
//!
//! What only exists here is for tests: [`switch::expect`] says how the next guest runs end, [`irq::raise`]
//! and [`timer::set`] play the outside world, and each module's `with` shows its registers.

pub mod at;
pub mod cache;
pub mod debug;
pub mod el2;
pub mod fpsimd;
pub mod gich;
pub mod id;
pub mod irq;
pub mod page;
pub mod percpu;
pub mod power;
pub mod switch;
pub mod timer;
pub mod tlb;
