//! A stage-2 table walk as the Arm ARM's pseudocode has it (J1.1, `AArch64.S2Walk` and what it calls), for
//! the 4 KiB granule.
//!
//! Written from the architecture and on purpose of nothing else in this crate, so it has constants and
//! arithmetic of its own. It reads descriptors through a closure, changes nothing, and says what the
//! hardware would do next: use the translation, set flags in the descriptor first, or fault.

use alloc::vec::Vec;

/// The registers that a walk depends on.
#[derive(Clone, Copy, Debug)]
pub struct Regime {
    /// VTCR_EL2.
    pub vtcr: u64,
    /// VTTBR_EL2.
    pub vttbr: u64,
    /// HCR_EL2.
    pub hcr: u64,
}

/// What an access does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Loads.
    Read,
    /// Stores, or changes atomically.
    Write,
    /// Fetches an instruction.
    Execute,
}

/// Why a walk did not end in a translation, with the level it ended at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// No valid descriptor, or the address is out of reach.
    Translation(u32),
    /// A descriptor's address is wider than VTCR_EL2.PS.
    AddressSize(u32),
    /// The access flag is clear and the hardware does not set it.
    AccessFlag(u32),
    /// The leaf does not allow it.
    Permission(u32),
    /// VTCR_EL2 or VTTBR_EL2 is not what the architecture allows.
    Malformed,
}

/// Where a walk ended: a valid leaf.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// The first address that it maps.
    pub base: u64,
    /// Bytes that it maps.
    pub bytes: u64,
    /// Where they are.
    pub output: u64,
    /// Level of the leaf.
    pub level: u32,
    /// Reading, writing (as `S2AP[1]` is now), executing is allowed.
    pub allows: [bool; 3],
    /// The hardware may set `S2AP[1]`.
    pub may_mark: bool,
    /// The access flag.
    pub accessed: bool,
    /// Memory is normal and write-back cacheable, and inner shareable.
    pub cacheable: bool,
    /// Where the descriptor is, and what it was.
    pub descriptor: (u64, u64),
    /// The tables on the way: the level that each is of, and its address.
    pub tables: Vec<(u32, u64)>,
}

const fn field(value: u64, low: u32, bits: u32) -> u64 {
    (value >> low) & ((1 << bits) - 1)
}

/// Bits of an input address, the first level, and the start of the tables; `None` if they do not agree.
fn start(regime: Regime) -> Option<(u32, u32, u64)> {
    let input = 64 - u32::try_from(field(regime.vtcr, 0, 6)).ok()?;
    let level = match field(regime.vtcr, 6, 2) {
        0 => 2,
        1 => 1,
        2 => 0,
        _ => return None,
    };
    let output = output_bits(regime.vtcr)?;
    // A granule of 4 KiB, RES1 set, walks inner shareable and write-back.
    let res1 = field(regime.vtcr, 31, 1) == 1;
    if field(regime.vtcr, 14, 2) != 0 || !res1 || field(regime.vtcr, 8, 6) != 0b11_01_01 {
        return None;
    }
    // AArch64.S2InconsistentSL: an entry of the first level translates 1 to 9 bits, or up to 13 with
    // tables side by side.
    let below = (3 - level) * 9 + 12;
    if input <= below || input > below + 13 || input > output || (level == 0 && output < 44) {
        return None;
    }
    // The tables are aligned to their size.
    let size = (8 << (input - below)).max(4096);
    let base = regime.vttbr & 0xffff_ffff_fffe;
    base.is_multiple_of(size).then_some((input, level, base))
}

fn output_bits(vtcr: u64) -> Option<u32> {
    [32, 36, 40, 42, 44, 48].get(usize::try_from(field(vtcr, 16, 3)).ok()?).copied()
}

/// Walks to the leaf that maps `input`, without asking what it allows. `from` starts below the top: a level
/// and a table of it, as a walk cache has them.
pub fn find(
    regime: Regime,
    input: u64,
    from: Option<(u32, u64)>,
    mut read: impl FnMut(u64) -> u64,
) -> Result<Leaf, Fault> {
    let (input_bits, first, base) = start(regime).ok_or(Fault::Malformed)?;
    let output_bits = output_bits(regime.vtcr).ok_or(Fault::Malformed)?;
    if input >> input_bits != 0 {
        return Err(Fault::Translation(0));
    }
    let (mut level, mut table) = from.unwrap_or((first, base));
    let mut tables = Vec::new();
    loop {
        tables.push((level, table));
        let shift = (3 - level) * 9 + 12;
        // The first index is wider with tables side by side; a walk from below the top has nine bits.
        let width = if level == first { input_bits - shift } else { 9 };
        let address = table + 8 * field(input, shift, width);
        let descriptor = read(address);
        let output = descriptor & 0x0000_ffff_ffff_f000;
        match (descriptor & 3, level) {
            (3, 3) | (1, 1 | 2) => {
                let bytes = 1 << shift;
                if output >> output_bits != 0 {
                    return Err(Fault::AddressSize(level));
                }
                if !output.is_multiple_of(bytes) {
                    // RES0 bits of a block's address.
                    return Err(Fault::Malformed);
                }
                let memory = field(descriptor, 2, 4);
                let write_back = if field(regime.hcr, 46, 1) == 1 { 0b0110 } else { 0b1111 };
                return Ok(Leaf {
                    base: input & !(bytes - 1),
                    bytes,
                    output,
                    level,
                    allows: [
                        field(descriptor, 6, 1) == 1,
                        field(descriptor, 7, 1) == 1,
                        field(descriptor, 54, 1) == 0,
                    ],
                    may_mark: field(regime.vtcr, 22, 1) == 1 && field(descriptor, 51, 1) == 1,
                    accessed: field(descriptor, 10, 1) == 1,
                    cacheable: memory == write_back && field(descriptor, 8, 2) == 0b11,
                    descriptor: (address, descriptor),
                    tables,
                });
            }
            (3, 0..=2) => {
                if output >> output_bits != 0 {
                    return Err(Fault::AddressSize(level));
                }
                (level, table) = (level + 1, output);
            }
            (_, _) => return Err(Fault::Translation(level)),
        }
    }
}

/// What the hardware does with a leaf for an access: `Ok` with the descriptor as it must be first, the same
/// when nothing has to be set.
pub fn check(regime: Regime, leaf: &Leaf, access: Access) -> Result<u64, Fault> {
    let mut wanted = leaf.descriptor.1;
    if !leaf.accessed {
        if field(regime.vtcr, 21, 1) == 0 {
            return Err(Fault::AccessFlag(leaf.level));
        }
        wanted |= 1 << 10;
    }
    let [read, write, execute] = leaf.allows;
    let allowed = match access {
        Access::Read => read,
        Access::Write => write || leaf.may_mark,
        Access::Execute => execute,
    };
    if !allowed {
        return Err(Fault::Permission(leaf.level));
    }
    if access == Access::Write && !write {
        wanted |= 1 << 7;
    }
    Ok(wanted)
}
