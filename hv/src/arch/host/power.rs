//! Ending the machine.

/// Leaves with an exit status.
pub fn exit(status: u32) -> ! {
    std::process::exit(i32::try_from(status).unwrap_or(1))
}
