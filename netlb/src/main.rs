//! The `netlb` command.

use std::{io, process::ExitCode};

fn main() -> ExitCode {
    netlb::cli::run(std::env::args_os(), &mut io::stdout(), &mut io::stderr()).into()
}
