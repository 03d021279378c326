//! Says why it exists.
#![no_std]
