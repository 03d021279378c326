//! The monitor: what a person or a script says to a running hypervisor, and what it answers.
//!
//! Two doors lead here: Ctrl-T on the console ([`console`], with [`mod@line`] for editing) and the control
//! socket, where each line is a command and each answer one JSON object. Both end in [`parse::parse`], which
//! turns words into a [`parse::Command`], and in [`cmd::execute`], which answers with one value, shown as
//! text or as JSON. Nothing here knows how guests are kept: that is behind the [`cmd::Host`] trait.

pub mod cmd;
pub mod console;
pub mod line;
pub mod parse;
