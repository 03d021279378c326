//! The interrupt controller as a guest and the hardware see it.

use super::{SgiRegister, Vgic};
use crate::vdev::Kicks;

#[test]
fn an_sgi_reaches_the_list_registers_of_its_target_alone() {
    let mut vgic = Vgic::new(2, 4);
    let _ = vgic.dist_write(0, 4, 3);
    let mut lrs = [0; 4];
    for vcpu in 0..2 {
        let _ = vgic.redist_write(vcpu, 0x1_0080, 4, 0xffff_ffff);
        let _ = vgic.redist_write(vcpu, 0x1_0100, 4, 0xffff_ffff);
        let _ = vgic.flush(vcpu, &mut lrs);
    }
    assert_eq!(vgic.sgi(0, SgiRegister::Sgi1R, 5 << 24 | 0b10), Kicks(0b10));
    assert_eq!(vgic.flush(0, &mut lrs).changed, 0);
    assert_eq!(vgic.flush(1, &mut lrs).changed, 1);
    assert_eq!(lrs, [0x5000_0000_0000_0005, 0, 0, 0]);
}
