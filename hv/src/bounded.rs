//! Lists that are read back with a bound: bytes that somebody made up take no memory for more than any guest has.

use alloc::vec::Vec;
use core::fmt;
use core::marker::PhantomData;

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
}
