//! Address translation as the guest would do it.

use super::sysreg::{instruction, read_sysreg, write_sysreg};
use vmobject::addr::Ipa;

/// Stage 1 of the guest did not translate the address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotTranslated;

/// PAR_EL1.F: the translation failed.
const PAR_FAILED: u64 = 1;
/// PAR_EL1.PA, up to 52 bits.
const PAR_PA: u64 = 0x000f_ffff_ffff_f000;

/// What the guest's stage 1 makes of `va` at EL1, with the tables and registers that are loaded now.
///
/// Leaves the guest's PAR_EL1 as it was. The walk goes through stage 2, so it fails as well when a table of
/// the guest is not mapped: the caller enters the guest again, which then faults on the table first.
pub fn at_s1e1r(va: u64, write: bool) -> Result<Ipa, NotTranslated> {
    let guests = read_sysreg!("par_el1");
    if write {
        instruction!("at s1e1w", va);
    } else {
        instruction!("at s1e1r", va);
    }
    instruction!("isb");
    let par = read_sysreg!("par_el1");
    write_sysreg!("par_el1", guests);
    if par & PAR_FAILED != 0 {
        return Err(NotTranslated);
    }
    Ok(Ipa::new((par & PAR_PA) | (va & 0xfff)))
}
