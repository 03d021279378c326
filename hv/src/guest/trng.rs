//! The random number service of SMCCC (Arm DEN 0098), and where its numbers and the entropy device's come from.
//!
//! One generator a guest: ChaCha20, keyed at the guest's creation from the machine's own generator, so
//! what one guest draws says nothing about another's. The key is replaced after every draw: what was drawn
//! cannot be computed back. The machine's generator is keyed from the host's `rng-seed` and its counter.
//! Used by `smccc` and `rng`.

/// Function numbers, without the 64-bit flag.
pub mod function {
    /// TRNG_VERSION.
    pub const VERSION: u32 = 0x8400_0050;
    /// TRNG_FEATURES.
    pub const FEATURES: u32 = 0x8400_0051;
    /// TRNG_GET_UUID.
    pub const GET_UUID: u32 = 0x8400_0052;
    /// TRNG_RND.
    pub const RND: u32 = 0x8400_0053;
}

/// 128 bits that name this source of entropy; made up once, for this project.
pub const UUID: [u32; 4] = [0x7d1c_0a52, 0x4e0b_93a4, 0x61c8_8fb0, 0x2a97_5e13];

/// A generator: a key, and how often it was used.
#[derive(Clone, Debug)]
pub struct Generator {
    key: [u32; 8],
    draws: u64,
}

impl Generator {
    /// From whatever unpredictable words there are.
    pub fn new(seed: &[u64], now: u64) -> Self {
        let mut generator = Self { key: [0x6576_6f6d; 8], draws: now };
        for &word in seed {
            generator.stir(word);
        }
        generator.stir(now);
        generator
    }

    /// Mixes a word into the key.
    pub fn stir(&mut self, word: u64) {
        #[expect(clippy::cast_possible_truncation, reason = "the two halves are meant")]
        let (low, high) = (word as u32, (word >> 32) as u32);
        self.key[0] ^= low;
        self.key[1] ^= high;
        let _ = self.block();
    }

    /// Eight words for the caller; the other eight become the next key.
    pub fn block(&mut self) -> [u32; 8] {
        #[expect(clippy::cast_possible_truncation, reason = "the two halves are meant")]
        let (low, high) = (self.draws as u32, (self.draws >> 32) as u32);
        self.draws = self.draws.wrapping_add(1);
        let out = chacha20(&self.key, [low, high, 0, 0]);
        let (mut given, mut key) = ([0; 8], [0; 8]);
        key.copy_from_slice(&out[..8]);
        given.copy_from_slice(&out[8..]);
        self.key = key;
        given
    }

    /// So many bytes.
    pub fn fill(&mut self, out: &mut [u8]) {
        for part in out.chunks_mut(32) {
            let block = self.block();
            for (to, word) in part.chunks_mut(4).zip(block) {
                to.copy_from_slice(&word.to_le_bytes()[..to.len()]);
            }
        }
    }

    /// Three 64-bit words.
    pub fn words(&mut self) -> [u64; 3] {
        let b = self.block();
        let pair = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
        [pair(b[0], b[1]), pair(b[2], b[3]), pair(b[4], b[5])]
    }

    /// The generator of something that must not share our numbers.
    pub fn child(&mut self) -> Self {
        let key = self.block();
        Self { key, draws: 0 }
    }
}

/// One block of ChaCha20 (RFC 8439, 2.3), with the counter and nonce as four words.
fn chacha20(key: &[u32; 8], counter: [u32; 4]) -> [u32; 16] {
    let mut state = [0u32; 16];
    state[..4].copy_from_slice(&[0x6170_7865, 0x3320_646e, 0x7962_2d32, 0x6b20_6574]);
    state[4..12].copy_from_slice(key);
    state[12..].copy_from_slice(&counter);
    let start = state;
    for _ in 0..10 {
        for [a, b, c, d] in [[0, 4, 8, 12], [1, 5, 9, 13], [2, 6, 10, 14], [3, 7, 11, 15]] {
            quarter(&mut state, a, b, c, d);
        }
        for [a, b, c, d] in [[0, 5, 10, 15], [1, 6, 11, 12], [2, 7, 8, 13], [3, 4, 9, 14]] {
            quarter(&mut state, a, b, c, d);
        }
    }
    for (word, first) in state.iter_mut().zip(start) {
        *word = word.wrapping_add(first);
    }
    state
}

fn quarter(s: &mut [u32; 16], a: usize, b: usize, c: usize, d: usize) {
    s[a] = s[a].wrapping_add(s[b]);
    s[d] = (s[d] ^ s[a]).rotate_left(16);
    s[c] = s[c].wrapping_add(s[d]);
    s[b] = (s[b] ^ s[c]).rotate_left(12);
    s[a] = s[a].wrapping_add(s[b]);
    s[d] = (s[d] ^ s[a]).rotate_left(8);
    s[c] = s[c].wrapping_add(s[d]);
    s[b] = (s[b] ^ s[c]).rotate_left(7);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chacha20_is_the_one_of_rfc_8439() {
        let mut key = [0u32; 8];
        for (i, word) in key.iter_mut().enumerate() {
            let i = u8::try_from(i * 4).unwrap();
            *word = u32::from_le_bytes([i, i + 1, i + 2, i + 3]);
        }
        let out = chacha20(&key, [1, 0x0900_0000, 0x4a00_0000, 0]);
        assert_eq!(out[0], 0xe4e7_f110);
        assert_eq!(out[15], 0x4e3c_50a2);
    }

    #[test]
    fn two_draws_differ_and_so_do_two_guests() {
        let mut machine = Generator::new(&[1, 2, 3], 4);
        let (mut one, mut two) = (machine.child(), machine.child());
        assert_ne!(one.words(), one.words());
        assert_ne!(one.words(), two.words());
    }

    #[test]
    fn bytes_are_the_blocks_one_after_the_other_and_what_is_not_asked_for_stays() {
        let mut machine = Generator::new(&[1], 2);
        let mut same = machine.clone();
        let mut bytes = [0xee; 48];
        machine.fill(&mut bytes[..39]);
        let blocks: [[u32; 8]; 2] = [same.block(), same.block()];
        for (at, byte) in bytes[..39].iter().enumerate() {
            assert_eq!(*byte, blocks[at / 32][at % 32 / 4].to_le_bytes()[at % 4], "byte {at}");
        }
        assert_eq!(bytes[39..], [0xee; 9]);
    }
}
