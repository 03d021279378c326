//! The CPU itself: assembly and EL2 registers.
