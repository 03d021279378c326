//! `cargo xtask doctor`: what this machine has and lacks, and what that means for each command.

use crate::toolchain::Toolchain;
use crate::{apt, images, on_path, qemu};
use std::process::Command;

/// Something that commands need.
struct Need {
    name: &'static str,
    /// What is here, or how to come by it.
    state: Result<String, String>,
    /// Who needs it.
    commands: &'static [&'static str],
    /// The first command that needs it installs it, given the means.
    provided: bool,
}

const COMMANDS: [&str; 5] = ["run", "test", "bench", "debug", "ctl"];

fn needs() -> Vec<Need> {
    let program = |name: &str, remedy: &str| match on_path(name) {
        Some(path) => Ok(path.display().to_string()),
        None => Err(remedy.to_owned()),
    };
    let cargo_has = |verb: &str, remedy: &str| {
        let output = Command::new("cargo").args([verb, "--version"]).output();
        match output {
            Ok(output) if output.status.success() => {
                Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
            }
            Ok(_) | Err(_) => Err(remedy.to_owned()),
        }
    };
    let images = if images::are_cached() {
        Ok("in target/images".to_owned())
    } else if apt::can_download() {
        Ok("fetched with apt when first needed".to_owned())
    } else {
        Err("no apt here: give `run` a --kernel FILE and an --initrd FILE, or it boots a tiny guest"
            .to_owned())
    };
    let need = |name, state, commands, provided| Need { name, state, commands, provided };
    vec![
        need(
            "AArch64 toolchain",
            Toolchain::find().map(|t| t.version),
            &["run", "test", "bench", "debug"],
            true,
        ),
        need("QEMU", qemu::found(), &["run", "test", "bench", "debug"], true),
        need("Debian's arm64 kernels", images, &["test"], false),
        need("rustfmt", cargo_has("fmt", "rustup component add rustfmt"), &["test"], false),
        need("clippy", cargo_has("clippy", "rustup component add clippy"), &["test"], false),
        need("gdb", program("gdb-multiarch", "apt-get install gdb-multiarch"), &["debug"], true),
    ]
}

/// Prints it.
pub(crate) fn run() {
    let needs = needs();
    for need in &needs {
        let (word, detail) = match &need.state {
            Ok(detail) => ("yes", detail),
            Err(remedy) => ("NO", remedy),
        };
        println!("{word:<4}{:<24} {detail}", need.name);
    }
    println!();
    for command in COMMANDS {
        println!("{command:<6} {}", verdict(command, &needs, apt::can_install()));
    }
}

/// What becomes of a command on this machine.
fn verdict(command: &str, needs: &[Need], can_install: bool) -> String {
    let lacking = needs.iter().filter(|need| need.state.is_err() && need.commands.contains(&command));
    let (installs, lacks): (Vec<&Need>, Vec<&Need>) = lacking.partition(|need| need.provided && can_install);
    let names = |list: &[&Need]| list.iter().map(|need| need.name).collect::<Vec<_>>().join(", ");
    match (installs.is_empty(), lacks.is_empty()) {
        (true, true) => "works".to_owned(),
        (false, true) => format!("works, and installs first: {}", names(&installs)),
        (_, false) => format!("does not work without: {}", names(&lacks)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_lacks_what_nobody_installs_for_it_and_no_more() {
        let need = |name, here: bool, commands, provided| Need {
            name,
            state: if here { Ok(String::new()) } else { Err(String::new()) },
            commands,
            provided,
        };
        let needs = [
            need("a", false, &["run"], true),
            need("b", false, &["test"], false),
            need("c", true, &["run"], false),
        ];
        assert_eq!(verdict("run", &needs, true), "works, and installs first: a");
        assert_eq!(verdict("run", &needs, false), "does not work without: a");
        assert_eq!(verdict("test", &needs, true), "does not work without: b");
        assert_eq!(verdict("ctl", &needs, false), "works");
    }
}
