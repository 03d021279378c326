//! Everything a person types: `cargo xtask COMMAND`.
//!
//! Read in this order, which is also who may use whom: a module uses only those before it.
//!
//! * `progress` - what takes longer than a moment says so.
//! * `apt`, `toolchain`, `qemu` - each sees that what it stands for is there, or provides it.
//! * `options` - what options mean that are more than a number or a word.
//! * `build`, `images`, `disk`, `errors` - what the machine runs, the disk that brings it there, and how that fails.
//! * `symbols`, `ending` - names for the addresses that a run leaves; leaving well.
//! * `stored` - disks for stored guests.
//! * `ctl`, `session`, `script`, `run`, `monitored`, `test`, `sim`, `demo`, `bench`, `report`, `doctor` - the commands.

mod apt;
mod bench;
mod build;
mod ctl;
mod demo;
mod disk;
mod doctor;
mod ending;
mod errors;
mod images;
mod monitored;
mod options;
mod progress;
mod qemu;
mod report;
mod run;
mod script;
mod session;
mod sim;
mod stored;
mod symbols;
mod test;
mod toolchain;

use anyhow::{Context, Result, ensure};
use clap::{Parser, Subcommand};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Builds, runs and tests the hypervisor")]
enum Cli {
    /// Boot the hypervisor and one Linux guest, console attached
    Run(run::Run),
    /// Every test: tidy, host, boot
    Test(test::Test),
    /// One monitor command to a running hypervisor
    Ctl {
        /// Control socket
        #[arg(long)]
        socket: Option<PathBuf>,
        /// The answer as one line of JSON
        #[arg(long)]
        json: bool,
        /// The command
        #[arg(required = true, trailing_var_arg = true)]
        words: Vec<String>,
    },
    /// The host simulator of the memory manager
    Sim(sim::Sim),
    /// A narrated demonstration on real Linux guests
    Demo(demo::Demo),
    /// What the way through EL2 costs, in instructions
    Bench(bench::Bench),
    /// The last bench and demonstrations as one page: target/report.html
    Report,
    /// `run` under gdb, symbols loaded
    Debug(run::Run),
    /// What guest is stored in a file, and whether it is whole
    Image {
        /// The file
        file: PathBuf,
    },
    /// What this machine has and lacks
    Doctor,
    #[command(flatten)]
    Inner(Inner),
}

#[derive(Subcommand)]
enum Inner {
    /// Build the hypervisor only
    Build,
}

/// The project's top folder.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map_or_else(|| PathBuf::from("."), Path::to_path_buf)
}

/// A program on the path.
fn on_path(name: &str) -> Option<PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH")?).map(|dir| dir.join(name)).find(|p| p.is_file())
}

fn debug(mut options: run::Run) -> Result<()> {
    const PORT: u16 = 3117;
    ensure!(on_path("gdb-multiarch").is_some(), "gdb-multiarch is not here: apt-get install gdb-multiarch");
    options.gdb = Some(PORT);
    options.timeout = 0;
    let elf = build::hypervisor(&toolchain::Toolchain::provide()?)?;
    let session = options.session(&options.dir, false)?;
    eprintln!("xtask: the guest's console is {}", options.dir.join("console.log").display());
    ending::leave_interrupts();
    let status = Command::new("gdb-multiarch")
        .arg("-ex")
        .arg(format!("target remote 127.0.0.1:{PORT}"))
        .arg(elf)
        .status()
        .context("starting gdb")?;
    if let Some(panic) = session.panic() {
        eprintln!("{panic}");
    }
    ensure!(status.success(), "gdb ended with {status}");
    Ok(())
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Err(error) = ending::watch() {
        eprintln!("xtask: {error:#}");
        return ExitCode::FAILURE;
    }
    let result = match cli {
        Cli::Run(options) => options.run(),
        Cli::Test(options) => return test::run(&options),
        Cli::Ctl { socket, json, words } => {
            ctl::run(&socket.unwrap_or_else(run::default_socket), json, &words)
        }
        Cli::Bench(options) => options.run(),
        Cli::Sim(options) => options.run(),
        Cli::Demo(options) => options.run(),
        Cli::Report => report::run(),
        Cli::Debug(options) => debug(options),
        Cli::Image { file } => stored::show(&file),
        Cli::Doctor => {
            doctor::run();
            Ok(())
        }
        Cli::Inner(Inner::Build) => toolchain::Toolchain::provide().and_then(|t| {
            println!("{}", build::hypervisor(&t)?.display());
            Ok(())
        }),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
