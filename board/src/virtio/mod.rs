//! The disk and the control port.
