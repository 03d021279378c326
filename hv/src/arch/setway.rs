//! Which operands of `DC CISW` name a line that exists.
//!
//! For a level, set or way that is not there the instruction is CONSTRAINED UNPREDICTABLE and may be UNDEFINED
//! (DDI 0487, "DC CISW"); executed for a guest, that would be an exception at EL2. So the operand is compared with
//! what CLIDR_EL1 and CCSIDR_EL1 say before anybody executes it. Pure; used by `cache`.

/// The level that an operand names, from 0 on, if CLIDR_EL1 says that a data cache is there.
pub const fn level(operand: u64, clidr: u64) -> Option<u64> {
    let level = operand >> 1 & 0b111;
    // Seven levels; data or unified is 0b010 and above.
    if level < 7 && clidr >> (3 * level) & 0b111 >= 0b010 { Some(level) } else { None }
}

/// True if the set and the way of an operand are there, in the cache that CCSIDR_EL1 describes: in the format of
/// FEAT_CCIDX if `wide`.
pub const fn exists(operand: u64, ccsidr: u64, wide: bool) -> bool {
    let (last_set, last_way) = if wide {
        (ccsidr >> 32 & 0x00ff_ffff, ccsidr >> 3 & 0x001f_ffff)
    } else {
        (ccsidr >> 13 & 0x7fff, ccsidr >> 3 & 0x3ff)
    };
    let set_at = (ccsidr & 0b111) + 4;
    // The ways' bits are the uppermost of the word: as many as number them all.
    let way_bits = u64::BITS - last_way.leading_zeros();
    let way_at = 32 - way_bits;
    let word = operand & 0xffff_ffff;
    let way = if way_bits == 0 { 0 } else { word >> way_at };
    let set = (word & ((1 << way_at) - 1)) >> set_at;
    operand >> 32 == 0 && way <= last_way && set <= last_set
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 32 KiB in 4 ways of 128 sets, lines of 64 bytes.
    const SMALL: u64 = 127 << 13 | 3 << 3 | 2;
    const WIDE: u64 = 127 << 32 | 3 << 3 | 2;

    #[test]
    fn a_level_exists_where_it_has_data() {
        // Separate, unified, instructions only.
        let clidr = 0b001_100_011;
        assert_eq!(
            [0, 2, 4, 6, 14].map(|operand| level(operand, clidr)),
            [Some(0), Some(1), None, None, None]
        );
    }

    #[test]
    fn every_line_of_a_cache_exists_and_no_other() {
        for (ccsidr, wide) in [(SMALL, false), (WIDE, true)] {
            for way in 0..4 {
                for set in [0, 1, 127] {
                    assert!(exists(way << 30 | set << 6, ccsidr, wide), "way {way}, set {set}");
                }
                assert!(!exists(way << 30 | 128 << 6, ccsidr, wide), "way {way} has no set 128");
            }
            assert!(!exists(1 << 32, ccsidr, wide), "bits above the word");
        }
        // Three ways want two bits, of which one value is none.
        assert!(exists(2 << 30, 127 << 13 | 2 << 3 | 2, false));
        assert!(!exists(3 << 30, 127 << 13 | 2 << 3 | 2, false));
        // One way has no bits.
        assert!(exists(127 << 6, 127 << 13 | 2, false));
        assert!(!exists(1 << 31, 127 << 13 | 2, false));
    }
}
