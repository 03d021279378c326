//! The monitor: what a person or a script says to a running hypervisor, and what it answers.
//!
//! Two doors lead here: Ctrl-T on the console ([`console`], with [`mod@line`] for editing) and the control
//! socket, where each line is a command and each answer one JSON object. Both end in [`parse::parse`], which
//! turns words into a [`parse::Command`], and in [`cmd::run`], which answers with one value, shown as text or as
//! JSON. [`cmd::Host`] is all that a command needs; [`host`] gives it the guests, with [`view`] for what is
//! shown of memory and [`mod@configure`] for what is created. [`paced`] keeps long
//! answers in bounded parts. [`desk`] is where lines wait until a CPU goes round, and where answers leave.

pub mod line;

pub mod console;

pub mod parse;

pub mod paced;

pub mod cmd;

pub mod view;

pub mod configure;

pub mod host;

pub mod desk;
