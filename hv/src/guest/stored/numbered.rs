//! Values with a number of their own in every place, for tests: what gets lost, or changes places, shows.
//!
//! A type that can be read back from an image says, while it is read, which places it has: this reader gives each the next
//! number. A place too small for that gets a part of it, another one in each pass, so that any two places differ in some
//! pass. [`differences`] names the places in which two values differ.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

use serde::de::value::U32Deserializer;
use serde::de::{
    DeserializeSeed, Deserializer, EnumAccess, IntoDeserializer, SeqAccess, VariantAccess, Visitor,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::guest::snapshot::Moment;
use crate::guest::vcpu::{Context, Power};

/// Elements of a list that says no number: some have room for one only.
const LIST: usize = 1;
/// Passes after which any two places have differed: there are fewer than two to the power of that.
pub(crate) const PASSES: u32 = 14;

/// What is given next.
pub(crate) struct Numbers {
    next: u64,
    pass: u32,
    /// Bytes of the numbers that were given.
    bytes: usize,
}

/// A value with a number in every place.
pub(crate) fn numbered<'d, T: Deserialize<'d>>(pass: u32) -> T {
    counted(pass).0
}

/// The same, and the bytes of all its numbers.
pub(crate) fn counted<'d, T: Deserialize<'d>>(pass: u32) -> (T, usize) {
    let mut numbers = Numbers { next: 0, pass, bytes: 0 };
    let value = T::deserialize(&mut numbers).unwrap();
    assert!(numbers.next < 1 << PASSES, "{} places", numbers.next);
    (value, numbers.bytes)
}

/// A guest of two vCPUs.
pub(crate) fn moment(pass: u32) -> Moment {
    let contexts = Vec::from(numbered::<[Context; 2]>(pass));
    let powers = Vec::from(numbered::<[Power; 2]>(pass));
    Moment { contexts, powers, ..numbered(pass) }
}

/// The places in which two values differ, and what is there.
pub(crate) fn differences(one: &impl Serialize, other: &impl Serialize) -> Vec<String> {
    let mut found = Vec::new();
    compare("", &serde_json::to_value(one).unwrap(), &serde_json::to_value(other).unwrap(), &mut found);
    found
}

fn compare(place: &str, one: &Value, other: &Value, found: &mut Vec<String>) {
    match (one, other) {
        (Value::Array(ones), Value::Array(others)) if ones.len() == others.len() => {
            for (index, (one, other)) in ones.iter().zip(others).enumerate() {
                compare(&format!("{place}[{index}]"), one, other, found);
            }
        }
        (Value::Object(ones), Value::Object(others)) if ones.keys().eq(others.keys()) => {
            for ((name, one), other) in ones.iter().zip(others.values()) {
                compare(&format!("{place}.{name}"), one, other, found);
            }
        }
        _ if one == other => {}
        _ => found.push(format!("{place}: {one} and {other}")),
    }
}

/// A type that gets no numbers: there is none in what is stored.
#[derive(Debug)]
pub(crate) struct Unnumbered(String);

impl fmt::Display for Unnumbered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl core::error::Error for Unnumbered {}

impl serde::de::Error for Unnumbered {
    fn custom<T: fmt::Display>(why: T) -> Self {
        Self(format!("{why}"))
    }
}

impl Numbers {
    fn draw(&mut self, bytes: usize) -> u64 {
        self.next += 1;
        self.bytes += bytes;
        self.next
    }

    /// A part that fits: all of it where there is room.
    fn part(&mut self, bytes: usize) -> u64 {
        let number = self.draw(bytes);
        if bytes == 1 { number >> self.pass & 0xff } else { number }
    }
}

/// Numbers of these types.
macro_rules! whole {
    ($($function:ident $visit:ident $type:ty;)*) => {$(
        fn $function<V: Visitor<'d>>(self, visitor: V) -> Result<V::Value, Unnumbered> {
            visitor.$visit(<$type>::try_from(self.part(size_of::<$type>())).unwrap())
        }
    )*};
}

/// Types that nothing stored has.
macro_rules! none {
    ($($function:ident)*) => {$(
        fn $function<V: Visitor<'d>>(self, _: V) -> Result<V::Value, Unnumbered> {
            Err(Unnumbered(stringify!($function).into()))
        }
    )*};
}

impl<'d> Deserializer<'d> for &mut Numbers {
    type Error = Unnumbered;

    whole! {
        deserialize_u8 visit_u8 u8;
        deserialize_u16 visit_u16 u16;
        deserialize_u32 visit_u32 u32;
        deserialize_u128 visit_u128 u128;
    }

    none! {
        deserialize_any deserialize_i8 deserialize_i16 deserialize_i32 deserialize_i64 deserialize_f32
        deserialize_f64 deserialize_char deserialize_bytes deserialize_byte_buf deserialize_unit
        deserialize_map deserialize_identifier deserialize_ignored_any
    }

    fn deserialize_bool<V: Visitor<'d>>(self, visitor: V) -> Result<V::Value, Unnumbered> {
        let number = self.draw(1);
        visitor.visit_bool(number >> self.pass & 1 != 0)
    }

    fn deserialize_u64<V: Visitor<'d>>(self, visitor: V) -> Result<V::Value, Unnumbered> {
        // A multiple of a page: some of them are addresses.
        visitor.visit_u64(self.draw(8) << 12)
    }

    fn deserialize_str<V: Visitor<'d>>(self, visitor: V) -> Result<V::Value, Unnumbered> {
        let number = self.draw(0);
        visitor.visit_string(format!("text {number}"))
    }

    fn deserialize_string<V: Visitor<'d>>(self, visitor: V) -> Result<V::Value, Unnumbered> {
        self.deserialize_str(visitor)
    }

    fn deserialize_option<V: Visitor<'d>>(self, visitor: V) -> Result<V::Value, Unnumbered> {
        visitor.visit_some(self)
    }

    fn deserialize_unit_struct<V: Visitor<'d>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, Unnumbered> {
        visitor.visit_unit()
    }

    fn deserialize_newtype_struct<V: Visitor<'d>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, Unnumbered> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_seq<V: Visitor<'d>>(self, visitor: V) -> Result<V::Value, Unnumbered> {
        visitor.visit_seq(Elements { numbers: self, left: LIST })
    }

    fn deserialize_tuple<V: Visitor<'d>>(self, left: usize, visitor: V) -> Result<V::Value, Unnumbered> {
        visitor.visit_seq(Elements { numbers: self, left })
    }

    fn deserialize_tuple_struct<V: Visitor<'d>>(
        self,
        _: &'static str,
        left: usize,
        visitor: V,
    ) -> Result<V::Value, Unnumbered> {
        visitor.visit_seq(Elements { numbers: self, left })
    }

    fn deserialize_struct<V: Visitor<'d>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Unnumbered> {
        visitor.visit_seq(Elements { numbers: self, left: fields.len() })
    }

    fn deserialize_enum<V: Visitor<'d>>(
        self,
        _: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Unnumbered> {
        let number = self.draw(0) >> self.pass;
        let variant = u32::try_from(number % variants.len() as u64).unwrap();
        visitor.visit_enum(Variant { numbers: self, variant })
    }
}

struct Elements<'n> {
    numbers: &'n mut Numbers,
    left: usize,
}

impl<'d> SeqAccess<'d> for Elements<'_> {
    type Error = Unnumbered;

    fn next_element_seed<T: DeserializeSeed<'d>>(&mut self, seed: T) -> Result<Option<T::Value>, Unnumbered> {
        if self.left == 0 {
            return Ok(None);
        }
        self.left -= 1;
        seed.deserialize(&mut *self.numbers).map(Some)
    }
}

struct Variant<'n> {
    numbers: &'n mut Numbers,
    variant: u32,
}

impl<'d> EnumAccess<'d> for Variant<'_> {
    type Error = Unnumbered;
    type Variant = Self;

    fn variant_seed<T: DeserializeSeed<'d>>(self, seed: T) -> Result<(T::Value, Self), Unnumbered> {
        let which: U32Deserializer<Unnumbered> = self.variant.into_deserializer();
        Ok((seed.deserialize(which)?, self))
    }
}

impl<'d> VariantAccess<'d> for Variant<'_> {
    type Error = Unnumbered;

    fn unit_variant(self) -> Result<(), Unnumbered> {
        Ok(())
    }

    fn newtype_variant_seed<T: DeserializeSeed<'d>>(self, seed: T) -> Result<T::Value, Unnumbered> {
        seed.deserialize(self.numbers)
    }

    fn tuple_variant<V: Visitor<'d>>(self, left: usize, visitor: V) -> Result<V::Value, Unnumbered> {
        visitor.visit_seq(Elements { numbers: self.numbers, left })
    }

    fn struct_variant<V: Visitor<'d>>(
        self,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Unnumbered> {
        visitor.visit_seq(Elements { numbers: self.numbers, left: fields.len() })
    }
}

mod tests {
    use super::*;
    use crate::arch::context::{DEBUG_CONTROL_WRITABLE, DebugContext, El1Context, FpContext, GuestRegs};
    use crate::guest::devices::Devices;
    use crate::guest::stored::state::{Region, State};
    use crate::guest::vcpu::VgicContext;
    use alloc::boxed::Box;
    use alloc::vec;
    use hv_abi::machine::{RAM_BASE, affinity};

    /// A list with no place left out is as long as the value, up to what its alignment adds.
    fn is_whole<T: for<'d> Deserialize<'d>>() {
        let (_, bytes) = counted::<T>(0);
        assert_eq!(
            bytes.next_multiple_of(align_of::<T>()),
            size_of::<T>(),
            "{}",
            core::any::type_name::<T>()
        );
    }

    #[test]
    fn no_register_of_a_vcpu_is_left_out_of_what_is_stored() {
        is_whole::<GuestRegs>();
        is_whole::<El1Context>();
        is_whole::<FpContext>();
        is_whole::<DebugContext>();
        is_whole::<VgicContext>();
        // And that is all that there is.
        let Context { regs: _, el1: _, fp: _, debug: _, vgic: _, os_lock: _, serror: _ } = numbered(0);
        let fields = serde_json::to_value(numbered::<Context>(0)).unwrap();
        assert_eq!(fields.as_object().map(|fields| fields.len()), Some(7));
    }

    #[test]
    fn each_place_of_a_stored_guest_comes_back_with_its_own_value() {
        for pass in 0..PASSES {
            let state = State::new(moment(pass), numbered::<Vec<Region>>(pass), 7);
            let bytes = state.encode().unwrap();
            let found: State = postcard::from_bytes(&bytes).unwrap();
            assert_eq!(differences(&state, &found), [""; 0], "in pass {pass}");
        }
    }

    #[test]
    fn what_a_machine_takes_over_has_every_register_that_was_stored() {
        for pass in 0..PASSES {
            let mut moment = moment(pass);
            // As far as a guest can have it.
            moment.config.vcpus = 2;
            moment.config.memory = 4 << 20;
            moment.config.disks.clear();
            moment.devices = Box::new(Devices::new(2, 4, crate::arch::timer::freq(), 7));
            for (index, context) in moment.contexts.iter_mut().enumerate() {
                context.el1.vmpidr = affinity(index) | 1 << 31;
                context.regs.pstate = context.regs.pstate & 0xf000_0000 | 0x3c5;
                let debug = &mut context.debug;
                for control in debug.bcr.iter_mut().chain(&mut debug.wcr) {
                    *control = *control >> 12 & DEBUG_CONTROL_WRITABLE;
                }
            }
            let region = serde_json::json!({ "range": [RAM_BASE, 1024], "prot": 7 });
            let regions = vec![serde_json::from_value::<Region>(region).unwrap()];
            let state = State::new(moment, regions, 7);
            let found = State::decode(&state.encode().unwrap()).unwrap();
            assert_eq!(
                differences(&state.moment.contexts, &found.moment.contexts),
                [""; 0],
                "in pass {pass}"
            );
            assert_eq!(differences(&state.moment.powers, &found.moment.powers), [""; 0], "in pass {pass}");
            assert_eq!(found.moment.time, state.moment.time);
        }
    }
}
