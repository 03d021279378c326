//! Lists and arrays that are read back with a bound: bytes that somebody made up take no more memory than a guest has.

use alloc::vec::Vec;
use core::fmt;
use core::marker::PhantomData;

use arrayvec::ArrayVec;
use serde::de::{Deserialize, Deserializer, Error, SeqAccess, Visitor};

struct AtMost<T, const MOST: usize>(PhantomData<T>);

impl<'d, T: Deserialize<'d>, const MOST: usize> Visitor<'d> for AtMost<T, MOST> {
    type Value = Vec<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a list of {MOST} at most")
    }

    fn visit_seq<A: SeqAccess<'d>>(self, mut seq: A) -> Result<Vec<T>, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = seq.next_element()? {
            if list.len() == MOST {
                return Err(A::Error::invalid_length(MOST + 1, &self));
            }
            list.try_reserve(1).map_err(A::Error::custom)?;
            list.push(item);
        }
        Ok(list)
    }
}

/// A list of `MOST` at most; with more there is an error before memory is taken for them.
pub fn list<'d, D: Deserializer<'d>, T: Deserialize<'d>, const MOST: usize>(
    from: D,
) -> Result<Vec<T>, D::Error> {
    from.deserialize_seq(AtMost::<T, MOST>(PhantomData))
}

/// An array whose length is a parameter of its type: kept as a tuple, as serde keeps those of lengths that it knows.
pub mod array {
    use super::Exactly;
    use core::marker::PhantomData;
    use serde::de::{Deserialize, Deserializer};
    use serde::ser::{Serialize, SerializeTuple, Serializer};

    /// Writes it.
    pub fn serialize<S: Serializer, T: Serialize, const COUNT: usize>(
        array: &[T; COUNT],
        to: S,
    ) -> Result<S::Ok, S::Error> {
        let mut tuple = to.serialize_tuple(COUNT)?;
        array.iter().try_for_each(|item| tuple.serialize_element(item))?;
        tuple.end()
    }

    /// Reads it back; with fewer there is an error.
    pub fn deserialize<'d, D: Deserializer<'d>, T: Deserialize<'d>, const COUNT: usize>(
        from: D,
    ) -> Result<[T; COUNT], D::Error> {
        from.deserialize_tuple(COUNT, Exactly(PhantomData))
    }
}

struct Exactly<T, const COUNT: usize>(PhantomData<T>);

impl<'d, T: Deserialize<'d>, const COUNT: usize> Visitor<'d> for Exactly<T, COUNT> {
    type Value = [T; COUNT];

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "an array of {COUNT}")
    }

    fn visit_seq<A: SeqAccess<'d>>(self, mut seq: A) -> Result<[T; COUNT], A::Error> {
        let mut array = ArrayVec::new();
        while !array.is_full() {
            let item = seq.next_element()?.ok_or_else(|| A::Error::invalid_length(array.len(), &self))?;
            array.push(item);
        }
        array.into_inner().map_err(|short| A::Error::invalid_length(short.len(), &"as many"))
    }
}

#[cfg(test)]
mod tests {
    use alloc::string::ToString;
    use alloc::vec::Vec;

    #[test]
    fn a_list_with_one_too_many_is_refused() {
        let read = |text: &str| super::list::<_, u8, 3>(&mut serde_json::Deserializer::from_str(text));
        assert_eq!(read("[1, 2, 3]").unwrap(), Vec::from([1, 2, 3]));
        assert!(read("[1, 2, 3, 4]").unwrap_err().to_string().contains("a list of 3 at most"));
    }

    #[test]
    fn an_array_has_exactly_so_many() {
        let read =
            |text: &str| super::array::deserialize::<_, u8, 3>(&mut serde_json::Deserializer::from_str(text));
        let written = super::array::serialize(&[1_u8, 2, 3], serde_json::value::Serializer).unwrap();
        assert_eq!(written.to_string(), "[1,2,3]");
        assert_eq!(read("[1, 2, 3]").unwrap(), [1, 2, 3]);
        assert!(read("[1, 2]").unwrap_err().to_string().contains("an array of 3"));
        assert!(read("[1, 2, 3, 4]").is_err());
    }
}
