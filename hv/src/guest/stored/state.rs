//! A stored guest's state as bytes: everything that a snapshot has but the contents of its memory, and what the
//! machine was that it ran on.
//!
//! The values are those that a switch and a clone move, so there is no second list of registers here; their order in
//! the source is the format's, and a test notices when that changes ([`hv_abi::image::VERSION`] is to be raised
//! then). What is read back is checked before it is used: damage is found by sums, and what somebody made up may be
//! anything, so a value that no guest can have is refused. Called by `guest::stored`.

use alloc::vec::Vec;
use core::fmt;

use hv_abi::machine::{MAX_VCPUS, RAM_BASE, RAM_LEAST, RAM_LIMIT, affinity};
use hv_abi::manifest::DISKS_LIMIT;
use serde::{Deserialize, Serialize};
use vmobject::VmError;
use vmobject::addr::{Ipa, IpaRange};
use vmobject::map::Snapshot as Memory;
use vmobject::prot::Prot;

use crate::arch::context::id_field;
use crate::arch::{self, gich, timer};
use crate::bounded;
use crate::guest::idregs::GuestIds;
use crate::guest::snapshot::Moment;
use crate::guest::{disks, ids};

/// Regions of a guest's memory at most: RAM, flash, the generation's page and disks are some twenty.
const MAX_REGIONS: usize = 64;

/// What a guest must find again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// MIDR_EL1.
    midr: u64,
    /// The counter's frequency in hertz.
    frequency: u64,
    ids: GuestIds,
}

impl Machine {
    /// This one.
    pub fn this() -> Self {
        Self { midr: arch::id::read().midr, frequency: timer::freq(), ids: ids().clone() }
    }
}

/// A range of a guest's memory; the pages of all regions follow each other in an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Region {
    #[serde(with = "range")]
    range: IpaRange,
    prot: u8,
}

/// How a range of a map is kept: where it starts, and pages.
pub mod range {
    use serde::de::Error as _;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};
    use vmobject::addr::{Ipa, IpaRange};

    /// Keeps it.
    pub fn serialize<S: Serializer>(range: &IpaRange, to: S) -> Result<S::Ok, S::Error> {
        (range.start().bits(), range.pages()).serialize(to)
    }

    /// Reads it back.
    pub fn deserialize<'d, D: Deserializer<'d>>(from: D) -> Result<IpaRange, D::Error> {
        let (start, pages) = <(u64, u64)>::deserialize(from)?;
        let pages = u32::try_from(pages).map_err(D::Error::custom)?;
        IpaRange::from_pages(Ipa::new(start), pages).ok_or_else(|| D::Error::custom("no range"))
    }
}

/// All that is stored of a guest but its pages: its own moment, or for as long as it is written somebody's.
#[derive(Clone, Serialize, Deserialize)]
pub struct State<M = Moment> {
    machine: Machine,
    /// The second, since 1970, when it was taken.
    pub seconds: u32,
    /// Its memory, in the order of its pages.
    #[serde(deserialize_with = "bounded::list::<_, _, MAX_REGIONS>")]
    pub regions: Vec<Region>,
    /// The rest of it.
    pub moment: M,
}

/// Why a stored state is not used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StateError {
    /// It cannot be read.
    Unreadable,
    /// This part of it is like no guest's.
    Unsound(&'static str),
    /// It ran on a CPU with another MIDR: there, and here.
    Cpu(u64, u64),
    /// A register of its CPU said something else: its CRm and op2, what it said there, and here.
    Register(usize, usize, u64, u64),
    /// Its counter had another frequency: there, and here.
    Frequency(u64, u64),
}

impl fmt::Display for StateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreadable => f.write_str("its state cannot be read"),
            Self::Unsound(what) => write!(f, "its {what} are like no guest's"),
            Self::Cpu(there, here) => {
                write!(
                    f,
                    "it ran on a CPU with MIDR {there:#x}, and this one has {here:#x}; use the same --cpu"
                )
            }
            Self::Register(crm, op2, there, here) => {
                write!(
                    f,
                    "its CPU's register S3_0_C0_C{crm}_{op2} said {there:#x}, and this one says {here:#x}"
                )
            }
            Self::Frequency(there, here) => {
                write!(f, "its counter ran at {there} Hz, and this one runs at {here} Hz")
            }
        }
    }
}

/// The regions of a guest's memory.
pub fn regions(memory: &Memory) -> Result<Vec<Region>, VmError> {
    let (mut regions, count) = (Vec::new(), memory.iter().count());
    if count > MAX_REGIONS {
        return Err(VmError::Limit("regions of a stored guest"));
    }
    regions.try_reserve_exact(count).map_err(|_| VmError::NoMemory)?;
    regions.extend(memory.iter().map(|entry| Region { range: entry.range, prot: entry.prot.bits() }));
    Ok(regions)
}

impl Region {
    /// Its place, and what the guest may do there.
    pub fn parts(&self) -> (IpaRange, Prot) {
        (self.range, Prot::from_bits(self.prot).unwrap_or(Prot::NONE))
    }
}

/// Pages of all regions.
pub fn pages(regions: &[Region]) -> u64 {
    regions.iter().map(|region| region.range.pages()).sum()
}

/// Where the page of this number is.
pub fn place(regions: &[Region], number: u64) -> Option<Ipa> {
    let mut left = number;
    for Region { range, .. } in regions {
        if left < range.pages() {
            return range.start().checked_add(left << vmobject::addr::PAGE_SHIFT);
        }
        left -= range.pages();
    }
    None
}

impl<M: Serialize> State<M> {
    /// Of a guest on this machine.
    pub fn new(moment: M, regions: Vec<Region>, seconds: u32) -> Self {
        Self { machine: Machine::this(), seconds, regions, moment }
    }

    /// As bytes; `None` for want of memory.
    pub fn encode(&self) -> Option<Vec<u8>> {
        postcard::to_allocvec(self).ok()
    }
}

impl State {
    /// From bytes, for this machine.
    pub fn decode(bytes: &[u8]) -> Result<Self, StateError> {
        let mut state: Self = postcard::from_bytes(bytes).map_err(|_| StateError::Unreadable)?;
        let (there, here) = (&state.machine, Machine::this());
        if there.midr != here.midr {
            return Err(StateError::Cpu(there.midr, here.midr));
        }
        if let Some((crm, op2, here, there)) = here.ids.difference(&there.ids) {
            return Err(StateError::Register(crm, op2, there, here));
        }
        if there.frequency != here.frequency {
            return Err(StateError::Frequency(there.frequency, here.frequency));
        }
        state.adopt(&here).map_err(StateError::Unsound)?;
        Ok(state)
    }

    /// Makes it one of this machine's; what is not sound.
    fn adopt(&mut self, here: &Machine) -> Result<(), &'static str> {
        let Moment { config, contexts, powers, devices, .. } = &mut self.moment;
        let vcpus = config.vcpus;
        let sound = |sound: bool, what| if sound { Ok(()) } else { Err(what) };
        sound((1..=MAX_VCPUS).contains(&vcpus) && contexts.len() == vcpus && powers.len() == vcpus, "vCPUs")?;
        config.stored = true;
        config.tidy_name();
        // A grant to fork is this machine's to give, to whoever is made from it.
        config.grant_fork = 0;
        let memory = (RAM_LEAST..=RAM_LIMIT).contains(&config.memory);
        sound(memory && config.memory % vmobject::addr::PAGE_SIZE == 0, "bytes of RAM")?;
        let aarch32 = id_field(arch::id::read().pfr0, 0) == 2;
        for (index, context) in contexts.iter().enumerate() {
            let own = context.el1.vmpidr == affinity(index) | 1 << 31;
            sound(own && context.regs.is_sound(aarch32) && context.debug.is_sound(), "registers")?;
        }
        sound(config.is_sound(), "names")?;
        sound(devices.adopt(vcpus, gich::nr_lrs(), here.frequency), "devices")?;
        // What is stored is a copy of a guest, and a disk that the guest wrote through was not copied as such. One that
        // says so would write to this machine's disk of that name after its next reset.
        sound(disks::written_through(config).is_none(), "written-through disks")?;
        sound(config.disks.len() == devices.disks.len() && config.disks.len() <= DISKS_LIMIT, "disks")?;
        let prots = self.regions.iter().all(|region| Prot::from_bits(region.prot).is_some());
        let ram = self.regions.iter().any(|region| region.range.contains(Ipa::new(RAM_BASE)));
        sound(prots && ram, "regions")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::devices::Devices;
    use crate::guest::vcpu::{Power, Vcpu};
    use crate::loader::manifest::Boot;
    use crate::loader::manifest::parse_guest;
    use crate::loader::{DiskConfig, Writes};
    use alloc::vec;
    use vmobject::lock::Held;

    fn state() -> State {
        let config = parse_guest(r#"{"name": "g", "kernel": "k", "append": "quiet", "vcpus": 2}"#).unwrap();
        let contexts =
            (0..2).map(|index| Vcpu::new(index).context.lock(&mut Held::root()).0.clone()).collect();
        let moment = Moment {
            devices: Devices::new(2, 4, timer::freq(), 1_700_000_000).into(),
            config,
            contexts,
            powers: vec![Power::On, Power::OnPending { entry: 1, context: 2 }],
            time: 12345,
        };
        let range = |start, pages| IpaRange::from_pages(Ipa::new(start), pages).unwrap();
        let region = |start, pages| Region { range: range(start, pages), prot: 7 };
        State::new(moment, vec![region(RAM_BASE, 4), region(RAM_BASE + 0x10_0000, 2)], 99)
    }

    /// Why a state that was changed is not used.
    fn refused(change: fn(&mut State)) -> StateError {
        let mut state = state();
        change(&mut state);
        State::decode(&state.encode().unwrap()).err().unwrap()
    }

    #[test]
    fn what_is_read_back_is_what_was_kept() {
        let bytes = state().encode().unwrap();
        let found = State::decode(&bytes).unwrap();
        assert_eq!(found.encode().unwrap(), bytes);
        assert_eq!((found.seconds, found.moment.time, pages(&found.regions)), (99, 12345, 6));
        let places = [0, 3, 4, 5, 6].map(|number| place(&found.regions, number).map(Ipa::bits));
        let ram = RAM_BASE;
        assert_eq!(
            places,
            [Some(ram), Some(ram + 0x3000), Some(ram + 0x10_0000), Some(ram + 0x10_1000), None]
        );
    }

    #[test]
    fn names_that_no_manifest_has_and_more_than_a_guest_can_have_are_refused() {
        let long = |state: &mut State| state.moment.config.append = "a".repeat(3000);
        assert_eq!(refused(long), StateError::Unsound("names"));
        let control = |state: &mut State| state.moment.config.boot = Boot::Bios { image: "a\x1b[2J".into() };
        assert_eq!(refused(control), StateError::Unsound("names"));
        for (given, taken) in
            [("", "stored"), ("a\x1b[2J", "a[2J"), (&"\u{fc}".repeat(200), &"\u{fc}".repeat(127))]
        {
            let mut state = state();
            state.moment.config.name = given.into();
            assert_eq!(State::decode(&state.encode().unwrap()).unwrap().moment.config.name, taken);
        }
        let regions = |state: &mut State| state.regions = vec![state.regions[0]; MAX_REGIONS + 1];
        assert_eq!(refused(regions), StateError::Unreadable);
        let vcpus = |state: &mut State| state.moment.powers = vec![Power::On; MAX_VCPUS + 1];
        assert_eq!(refused(vcpus), StateError::Unreadable);
        let wide = |state: &mut State| state.moment.contexts[0].regs.pstate = 0x10;
        let here = id_field(arch::id::read().pfr0, 0) == 2;
        let mut state = state();
        wide(&mut state);
        assert_eq!(State::decode(&state.encode().unwrap()).is_ok(), here, "AArch32 where there is none");
    }

    #[test]
    fn no_state_grants_a_fork() {
        let mut state = state();
        state.moment.config.grant_fork = u32::MAX;
        assert_eq!(State::decode(&state.encode().unwrap()).unwrap().moment.config.grant_fork, 0);
    }

    #[test]
    fn the_format_changes_only_together_with_its_version() {
        // Fields that come, go or move between types are noticed. When it fails: raise `hv_abi::image::VERSION`, then
        // write down what it finds.
        let bytes = state().encode().unwrap();
        let sum = hv_abi::image::sum(&bytes, hv_abi::image::VERSION.into());
        assert_eq!((hv_abi::image::VERSION, bytes.len(), sum), (4, 1236, 2_179_879_949));
    }

    #[test]
    fn a_state_of_another_machine_is_refused_with_what_differs() {
        let here = Machine::this();
        assert_eq!(refused(|state| state.machine.midr = 7), StateError::Cpu(7, here.midr));
        let frequency = refused(|state| state.machine.frequency = 9);
        assert_eq!(frequency, StateError::Frequency(9, here.frequency));
        assert_eq!(refused(|state| state.moment.powers.clear()), StateError::Unsound("vCPUs"));
        // EL2h: whoever made this up would be us.
        let el2 = refused(|state| state.moment.contexts[1].regs.pstate = 0x3c9);
        assert_eq!(el2, StateError::Unsound("registers"));
        assert_eq!(
            refused(|state| state.moment.contexts[0].el1.vmpidr = 1),
            StateError::Unsound("registers")
        );
        assert_eq!(
            refused(|state| state.moment.contexts[0].debug.bcr[3] = 0x2001),
            StateError::Unsound("registers")
        );
        assert_eq!(refused(|state| state.regions.clear()), StateError::Unsound("regions"));
        assert_eq!(refused(|state| state.moment.config.memory = 1), StateError::Unsound("bytes of RAM"));
        assert_eq!(
            refused(|state| state.moment.config.disks.push(disk(Writes::Through))),
            StateError::Unsound("written-through disks")
        );
        let more = refused(|state| state.moment.config.disks.push(disk(Writes::Private)));
        assert_eq!(more, StateError::Unsound("disks"), "more than its devices know");
    }

    fn disk(writes: Writes) -> DiskConfig {
        DiskConfig { id: "guest-disk-0".into(), writes }
    }

    #[test]
    fn no_bytes_make_the_reader_panic_and_what_it_takes_can_be_used() {
        let whole = state().encode().unwrap();
        let mut dice = 1_u64;
        let mut roll = |sides: usize| {
            dice = dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            usize::try_from(dice >> 33).unwrap() % sides
        };
        let mut taken = 0;
        for _ in 0..20_000 {
            let mut bytes = whole.clone();
            for _ in 0..=roll(3) {
                let at = roll(bytes.len());
                bytes[at] = u8::try_from(roll(256)).unwrap();
            }
            bytes.truncate(if roll(8) == 0 { roll(bytes.len()) } else { bytes.len() });
            let Ok(mut state) = State::decode(&bytes) else { continue };
            taken += 1;
            let devices = &mut state.moment.devices;
            for vcpu in 0..2 {
                let _ = devices.timer_update(vcpu, 1 << 40);
                assert!(devices.timer_deadline(vcpu).is_none_or(|at| at > 1 << 40), "due, and looked at");
                let _ = devices.vgic.flush(vcpu, |_, _| {});
                let _ = devices.vgic.unlist(vcpu);
            }
            let _ = devices.type_in(b"x");
            for offset in (0..0x1000).step_by(4) {
                let _ = devices.uart.read(offset);
                let _ = devices.rtc.read(offset, 5);
                let _ = devices.vgic.dist_read(offset, 4);
                let _ = devices.vgic.redist_read(1, offset, 4);
            }
        }
        assert!(taken > 1000, "{taken}");
    }
}
