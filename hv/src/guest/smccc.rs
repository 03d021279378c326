//! The calling convention's own services: its version, its features, random numbers, who we are.
//!
//! [`call`] answers everything that needs no other vCPU; PSCI comes first, in `psci`. A number that
//! nobody knows is answered NOT_SUPPORTED in X0, as the convention says. Called by `hypercall`.

use super::psci::code;
use super::trng;
use hv_abi::call::smccc::{UID, VENDOR_REVISION, VENDOR_UID};

/// SMCCC_VERSION.
pub const VERSION_FUNCTION: u32 = 0x8000_0000;
/// SMCCC_ARCH_FEATURES.
const ARCH_FEATURES: u32 = 0x8000_0001;
/// The version we speak: 1.1, the last whose calls all guests know how to detect.
const VERSION: u64 = 0x1_0001;

/// What to put into X0 to X3; `None` leaves a register alone.
pub type Answer = [Option<u64>; 4];

const fn one(value: u64) -> Answer {
    [Some(value), None, None, None]
}

fn words(words: [u32; 4]) -> Answer {
    words.map(|word| Some(u64::from(word)))
}

/// Answers a call, drawing random words only when it asks for some; an unknown number is NOT_SUPPORTED.
pub fn call(number: u32, argument: u64, random: impl FnOnce() -> [u64; 3]) -> Answer {
    const SMC64: u32 = super::psci::function::SMC64;
    match number {
        VERSION_FUNCTION => one(VERSION),
        ARCH_FEATURES => one(arch_features(argument & 0xffff_ffff)),
        VENDOR_UID => words(UID),
        VENDOR_REVISION => [Some(0), Some(1), None, None],
        trng::function::VERSION => one(0x1_0000),
        trng::function::FEATURES => one(trng_features(argument & 0xffff_ffff)),
        trng::function::GET_UUID => words(trng::UUID),
        _ if number & !SMC64 == trng::function::RND => draw(number & SMC64 != 0, argument, random),
        _ => one(code::NOT_SUPPORTED),
    }
}

fn arch_features(asked: u64) -> u64 {
    if asked == u64::from(VERSION_FUNCTION) || asked == u64::from(ARCH_FEATURES) {
        code::SUCCESS
    } else {
        // Workarounds among them: EL2 holds no mitigation that a guest would have to ask for.
        code::NOT_SUPPORTED
    }
}

fn trng_features(asked: u64) -> u64 {
    let known = [
        trng::function::VERSION,
        trng::function::FEATURES,
        trng::function::GET_UUID,
        trng::function::RND,
        trng::function::RND | super::psci::function::SMC64,
    ];
    if known.iter().any(|&number| u64::from(number) == asked) { code::SUCCESS } else { code::NOT_SUPPORTED }
}

/// `bits` random bits, the last word first: X3, then X2, then X1.
fn draw(wide: bool, bits: u64, random: impl FnOnce() -> [u64; 3]) -> Answer {
    let width: u64 = if wide { 64 } else { 32 };
    let bits = if wide { bits } else { bits & 0xffff_ffff };
    if bits == 0 || bits > 3 * width {
        return one(code::INVALID_PARAMETERS);
    }
    let drawn = random();
    let mut answer = [Some(code::SUCCESS), Some(0), Some(0), Some(0)];
    for (index, word) in drawn.iter().enumerate() {
        let left = bits.saturating_sub(width.saturating_mul(index as u64)).min(width);
        let mask = match left {
            0 => 0,
            left => u64::MAX >> (64 - left),
        };
        answer[3 - index] = Some(word & mask);
    }
    answer
}

#[cfg(test)]
mod tests {
    use super::trng::Generator;
    use super::*;

    #[test]
    fn exactly_the_bits_that_were_asked_for_are_given() {
        let mut random = Generator::new(&[1], 2);
        for bits in 1..=192u64 {
            let [status, x1, x2, x3] = call(0xc400_0053, bits, || random.words());
            assert_eq!(status, Some(0));
            let beyond = |word: u64, below: u64| {
                let have = bits.saturating_sub(below).min(64);
                have < 64 && word >> have != 0
            };
            assert!(
                !beyond(x3.unwrap(), 0) && !beyond(x2.unwrap(), 64) && !beyond(x1.unwrap(), 128),
                "{bits}"
            );
        }
        assert_eq!(call(0xc400_0053, 193, || random.words())[0], Some(code::INVALID_PARAMETERS));
        assert_eq!(call(0x8400_0053, 97, || random.words())[0], Some(code::INVALID_PARAMETERS));
        assert_eq!(call(0x8400_0053, 0, || random.words())[0], Some(code::INVALID_PARAMETERS));
    }

    #[test]
    fn an_unknown_call_touches_x0_only() {
        let mut random = Generator::new(&[1], 2);
        assert_eq!(call(0xc600_1234, 0, || random.words()), [Some(u64::MAX), None, None, None]);
    }
}
