//! What reads and writes of the register frames do.

use super::super::{INTIDS, MAX_VCPUS, SgiRegister, Vgic, affinity};
use super::{Dice, audit, ready};
use crate::vdev::Kicks;

#[test]
fn the_distributor_has_one_security_state_and_affinity_routing_for_ever() {
    let mut vgic = Vgic::new(2, 4);
    assert_eq!(vgic.dist_read(0, 4), 0x50);
    let _ = vgic.dist_write(0, 4, 0xffff_ffff);
    assert_eq!(vgic.dist_read(0, 4), 0x53);
    let _ = vgic.dist_write(0, 4, 0);
    assert_eq!(vgic.dist_read(0, 4), 0x50);
}

#[test]
fn identification_says_gicv3_without_lpis_or_message_interrupts() {
    let mut vgic = Vgic::new(4, 4);
    let kind = vgic.dist_read(4, 4);
    assert_eq!((kind & 0x1f) + 1, u64::from(INTIDS / 32));
    assert_eq!(kind & (1 << 17 | 1 << 16 | 1 << 10 | 1 << 8), 0);
    assert_eq!(kind >> 19 & 0x1f, 9);
    assert_eq!(vgic.dist_read(0xffe8, 4) >> 4 & 0xf, 3);
    assert_eq!(vgic.dist_read(0xfff0, 4), 0x0d);
    assert_eq!(vgic.dist_read(0xc, 4), 0);
    for vcpu in 0..4 {
        assert_eq!(vgic.redist_read(vcpu, 0xffe8, 4) >> 4 & 0xf, 3);
        let kind = vgic.redist_read(vcpu, 8, 8);
        assert_eq!(kind >> 32, vcpu as u64);
        assert_eq!(kind >> 8 & 0xffff, vcpu as u64);
        assert_eq!(kind & 0x10 != 0, vcpu == 3, "only the last is the last");
        assert_eq!(vgic.redist_read(vcpu, 8, 4), kind & 0xffff_ffff);
        assert_eq!(vgic.redist_read(vcpu, 0xc, 4), kind >> 32);
    }
}

#[test]
fn a_redistributor_wakes_when_told() {
    let mut vgic = Vgic::new(1, 4);
    assert_eq!(vgic.redist_read(0, 0x14, 4), 0b110);
    let _ = vgic.redist_write(0, 0x14, 4, 0);
    assert_eq!(vgic.redist_read(0, 0x14, 4), 0);
    let _ = vgic.redist_write(0, 0x14, 4, 2);
    assert_eq!(vgic.redist_read(0, 0x14, 4), 0b110);
}

#[test]
fn private_interrupts_are_not_in_the_distributor() {
    let mut vgic = ready(1, 4);
    for offset in [0x80, 0x100, 0x180, 0x200, 0x300, 0x400, 0x41c, 0xc00, 0xc04, 0xd00, 0x6000, 0x60f8] {
        let _ = vgic.dist_write(offset, 4, 0xffff_ffff);
        assert_eq!(vgic.dist_read(offset, 4), 0, "{offset:#x}");
    }
    assert_eq!(vgic.dist_read(0x400, 1), 0);
    assert_eq!(vgic.redist_read(0, 0x1_0100, 4), 0xffff_ffff);
}

#[test]
fn set_and_clear_registers_change_only_the_bits_written() {
    let mut vgic = Vgic::new(1, 4);
    for (set, clear) in [(0x100, 0x180), (0x200, 0x280), (0x300, 0x380)] {
        let _ = vgic.dist_write(set + 4, 4, 0xff00);
        let _ = vgic.dist_write(set + 4, 4, 0x0001);
        let _ = vgic.dist_write(clear + 4, 4, 0x0f00);
        assert_eq!(vgic.dist_read(set + 4, 4), 0xf001);
        assert_eq!(vgic.dist_read(clear + 4, 4), 0xf001);
        let _ = vgic.redist_write(0, 0x1_0000 + set, 4, 0x8000_0001);
        let _ = vgic.redist_write(0, 0x1_0000 + clear, 4, 1);
        assert_eq!(vgic.redist_read(0, 0x1_0000 + set, 4), 0x8000_0000);
        assert_eq!(vgic.redist_read(0, 0x1_0004 + set, 4), 0, "only one word of private interrupts");
    }
}

#[test]
fn priorities_keep_five_bits_and_are_taken_by_byte_and_by_word() {
    let mut vgic = Vgic::new(1, 4);
    let _ = vgic.dist_write(0x420, 4, 0xffa5_0781);
    assert_eq!(vgic.dist_read(0x420, 4), 0xf8a0_0080);
    assert_eq!(vgic.dist_read(0x422, 1), 0xa0);
    let _ = vgic.dist_write(0x421, 1, 0xff);
    assert_eq!(vgic.dist_read(0x420, 4), 0xf8a0_f880);
    let _ = vgic.redist_write(0, 0x1_041b, 1, 0x55);
    assert_eq!(vgic.redist_read(0, 0x1_0418, 4), 0x5000_0000);
    assert_eq!(vgic.redist_read(0, 0x1_041b, 1), 0x50);
}

#[test]
fn configuration_of_sgis_and_of_the_linked_timer_is_fixed() {
    let mut vgic = Vgic::new(1, 4);
    assert_eq!(vgic.redist_read(0, 0x1_0c00, 4), 0xaaaa_aaaa);
    let _ = vgic.redist_write(0, 0x1_0c00, 4, 0);
    assert_eq!(vgic.redist_read(0, 0x1_0c00, 4), 0xaaaa_aaaa);
    let _ = vgic.redist_write(0, 0x1_0c04, 4, 0xffff_ffff);
    assert_eq!(vgic.redist_read(0, 0x1_0c04, 4), 0xaaaa_aaaa & !(0b11 << 22));
    let _ = vgic.dist_write(0xc08, 4, 0xffff_ffff);
    let _ = vgic.dist_write(0xc0c, 4, 0x8000_0000);
    assert_eq!(vgic.dist_read(0xc08, 4), 0xaaaa_aaaa);
    assert_eq!(vgic.dist_read(0xc0c, 4), 0x8000_0000);
}

#[test]
fn a_route_is_one_register_or_two_halves_and_never_one_of_many() {
    let mut vgic = Vgic::new(2, 4);
    let at = 0x6000 + 8 * 40;
    let _ = vgic.dist_write(at, 8, u64::MAX);
    assert_eq!(vgic.dist_read(at, 8), 0xff_00ff_ffff);
    let _ = vgic.dist_write(at, 4, 0x8000_0001);
    assert_eq!(vgic.dist_read(at, 8), 0xff_0000_0001);
    let _ = vgic.dist_write(at + 4, 4, 0);
    assert_eq!(vgic.dist_read(at, 8), 1);
    assert_eq!((vgic.dist_read(at, 4), vgic.dist_read(at + 4, 4)), (1, 0));
    assert_eq!(vgic.dist_read(0x6000 + 8 * u64::from(INTIDS), 8), 0);
}

#[test]
fn an_access_of_the_wrong_size_or_place_reads_zero_and_writes_nothing() {
    let mut vgic = ready(2, 4);
    let before = (vgic.dist_read(0x104, 4), vgic.dist_read(0x424, 4), vgic.redist_read(0, 0x1_0100, 4));
    for bytes in [0, 1, 2, 3, 8, 16] {
        let _ = vgic.dist_write(0x184, bytes, u64::MAX);
        let _ = vgic.redist_write(0, 0x1_0180, bytes, u64::MAX);
        assert_eq!(vgic.dist_read(0x104, bytes), 0);
        assert_eq!(vgic.redist_read(0, 0x1_0100, bytes), 0);
    }
    for bytes in [2, 8] {
        let _ = vgic.dist_write(0x424, bytes, 0);
        assert_eq!(vgic.dist_read(0x424, bytes), 0);
    }
    for offset in [0x185, 0x186, 0x187, 0x2_0000, u64::MAX - 3] {
        let _ = vgic.dist_write(offset, 4, u64::MAX);
        let _ = vgic.redist_write(0, 0x1_0000u64.wrapping_add(offset), 4, u64::MAX);
        assert_eq!(vgic.dist_read(offset, 4), 0);
    }
    assert_eq!(
        before,
        (vgic.dist_read(0x104, 4), vgic.dist_read(0x424, 4), vgic.redist_read(0, 0x1_0100, 4))
    );
    assert_eq!(vgic.redist_read(2, 8, 8), 0, "no such vCPU");
}

#[test]
fn an_sgi_goes_to_its_target_list_or_to_everybody_else() {
    let send = |from, value| ready(40, 4).sgi(from, SgiRegister::Sgi1R, value);
    assert_eq!(send(0, 0b1010), Kicks(0b1010));
    assert_eq!(send(1, 0b1010), Kicks(0b1010), "oneself included");
    assert_eq!(send(3, 0xffff | 1 << 16), Kicks(0xffff << 16));
    assert_eq!(send(3, 0xffff | 2 << 16), Kicks(0xff << 32), "those that there are");
    assert_eq!(send(3, 0xffff | 4 << 16), Kicks::NONE);
    assert_eq!(send(3, 0xffff | 255 << 16), Kicks::NONE);
    assert_eq!(send(3, 0xffff | 1 << 32), Kicks::NONE, "affinity 2");
    assert_eq!(send(3, 0xffff | 1 << 48), Kicks::NONE, "affinity 3");
    assert_eq!(send(3, 0xffff | 1 << 44), Kicks::NONE, "a range");
    assert_eq!(send(3, 1 << 40), Kicks(((1 << 40) - 1) & !(1 << 3)));
    assert_eq!(ready(64, 4).sgi(63, SgiRegister::Sgi1R, 1 << 40), Kicks(u64::MAX >> 1));
    assert_eq!(affinity(33), 0x201);
}

#[test]
fn the_registers_of_group_0_send_only_what_is_in_group_0() {
    for (register, group, arrives) in [
        (SgiRegister::Sgi0R, 0, true),
        (SgiRegister::Sgi0R, 1, false),
        (SgiRegister::Asgi1R, 0, true),
        (SgiRegister::Asgi1R, 1, false),
        (SgiRegister::Sgi1R, 0, true),
        (SgiRegister::Sgi1R, 1, true),
    ] {
        let mut vgic = ready(2, 4);
        let _ = vgic.redist_write(1, 0x1_0080, 4, group << 7);
        let kicks = vgic.sgi(0, register, 7 << 24 | 0b10);
        assert_eq!(kicks, if arrives { Kicks(0b10) } else { Kicks::NONE }, "{register:?} {group}");
    }
}

#[test]
fn an_sgi_that_is_pending_already_kicks_nobody() {
    let mut vgic = ready(2, 4);
    assert_eq!(vgic.sgi(0, SgiRegister::Sgi1R, 0b10), Kicks(0b10));
    assert_eq!(vgic.sgi(0, SgiRegister::Sgi1R, 0b10), Kicks::NONE);
    let mut vgic = ready(2, 4);
    let _ = vgic.redist_write(1, 0x1_0180, 4, 1);
    assert_eq!(vgic.sgi(0, SgiRegister::Sgi1R, 0b10), Kicks::NONE, "disabled");
    assert_eq!(vgic.redist_write(1, 0x1_0100, 4, 1), Kicks(0b10), "until enabled");
}

#[test]
fn numbers_that_do_not_exist_are_ignored() {
    let mut vgic = Vgic::new(1000, 0);
    assert_eq!(vgic.vcpus(), MAX_VCPUS);
    for intid in [0, 15, 31, INTIDS, 1023, u32::MAX] {
        assert_eq!(vgic.set_spi(intid, true), Kicks::NONE);
    }
    for intid in [0, 15, 32, u32::MAX] {
        assert_eq!(vgic.set_ppi(0, intid, true), Kicks::NONE);
    }
    assert_eq!(vgic.set_ppi(64, 30, true), Kicks::NONE);
    assert_eq!(vgic.timer_fired(usize::MAX), Kicks::NONE);
    assert_eq!(vgic.deactivate(64, 3), Kicks::NONE);
    assert_eq!(vgic.deactivate(0, 5000), Kicks::NONE);
    assert_eq!(vgic.sync(64, |_| 1), Kicks::NONE);
    assert!(!vgic.has_pending(64, u64::MAX));
    let mut writes = 0;
    let _ = vgic.flush(64, |_, _| writes += 1);
    assert_eq!(writes, 0);
}

/// A guest that writes anything anywhere, on several vCPUs whose list registers come back as anything.
#[test]
fn a_wild_sweep_of_every_register_never_panics_and_breaks_no_invariant() {
    for seed in 1..=40 {
        let mut dice = Dice(seed);
        let vcpus = 1 + dice.below(8);
        let mut vgic = Vgic::new(vcpus, 1 + dice.below(16));
        let mut lrs = [0u64; 16];
        for _ in 0..20_000 {
            let vcpu = dice.below(vcpus);
            let bytes = [1, 2, 4, 4, 4, 8][dice.below(6)];
            let value = match dice.below(4) {
                0 => dice.roll(),
                1 => 1 << dice.below(64),
                2 => u64::MAX,
                _ => u64::MAX << dice.below(64),
            };
            let frame = [0x1000, 0x1000, 0x8000, 0x2_0000][dice.below(4)];
            let offset = (dice.roll() % frame) & if dice.chance(90) { !3 } else { u64::MAX };
            match dice.below(14) {
                0..3 => drop(vgic.dist_write(offset, bytes, value)),
                3..6 => drop(vgic.redist_write(vcpu, 0x1_0000 ^ offset, bytes, value)),
                6 => assert!(bytes == 8 || vgic.dist_read(offset, bytes) >> (8 * bytes) == 0),
                7 => assert!(bytes == 8 || vgic.redist_read(vcpu, offset, bytes) >> (8 * bytes) == 0),
                8 => drop(vgic.sgi(vcpu, SgiRegister::Sgi1R, value & !(0xff << 32 | 0xffff << 44) | 1)),
                9 => drop(vgic.set_spi(32 + u32::try_from(dice.below(100)).unwrap(), dice.chance(50))),
                10 => drop(vgic.set_ppi(vcpu, 16 + u32::try_from(dice.below(16)).unwrap(), dice.chance(50))),
                11 => drop((vgic.timer_fired(vcpu), vgic.has_pending(vcpu, value))),
                12 => {
                    // Any state of what was listed: more than hardware can do.
                    let _ = vgic.flush(vcpu, |lr, value| lrs[lr] = value);
                    for lr in &mut lrs {
                        *lr = *lr & !(3 << 62) | (dice.roll() & 3 << 62);
                    }
                    let _ = vgic.sync(vcpu, |lr| lrs[lr]);
                }
                _ => drop((vgic.ended_unlisted(vcpu, 3), vgic.take_stale(), vgic.unlist(vcpu))),
            }
        }
        audit(&vgic);
    }
}
