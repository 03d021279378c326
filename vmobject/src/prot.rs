//! What a guest may do with a page.

use core::fmt;
use core::ops::{BitAnd, BitOr};

/// A set of permissions: any of read, write, execute.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Prot(u8);

impl Prot {
    /// Nothing at all.
    pub const NONE: Self = Self(0);
    /// May be read.
    pub const READ: Self = Self(1);
    /// May be written.
    pub const WRITE: Self = Self(2);
    /// May be executed, at EL1 and EL0 alike.
    pub const EXECUTE: Self = Self(4);
    /// Read and execute: what a shared page allows.
    pub const READ_EXECUTE: Self = Self(5);
    /// Everything: what private RAM allows.
    pub const ALL: Self = Self(7);

    /// True when everything in `wanted` is allowed.
    pub const fn allows(self, wanted: Self) -> bool {
        self.0 & wanted.0 == wanted.0
    }
    /// These permissions less those in `gone`.
    pub const fn without(self, gone: Self) -> Self {
        Self(self.0 & !gone.0)
    }
    /// As a number that keeps: one bit each for read, write and execute.
    pub const fn bits(self) -> u8 {
        self.0
    }
    /// What [`Self::bits`] gave; `None` for what it never gives.
    pub const fn from_bits(bits: u8) -> Option<Self> {
        if bits & !Self::ALL.0 == 0 { Some(Self(bits)) } else { None }
    }
    /// True when nothing is allowed.
    pub const fn is_none(self) -> bool {
        self.0 == 0
    }
}

impl BitOr for Prot {
    type Output = Self;
    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl BitAnd for Prot {
    type Output = Self;
    fn bitand(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
}

impl fmt::Debug for Prot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (bit, letter) in [(Self::READ, 'r'), (Self::WRITE, 'w'), (Self::EXECUTE, 'x')] {
            write!(f, "{}", if self.allows(bit) { letter } else { '-' })?;
        }
        Ok(())
    }
}
