//! The command line: arguments in, text and an exit code out.
//!
//! A command parses into checked types, asks the daemon, and writes a view. Nothing here prints or exits on its own: `run` is given its
//! outputs, and returns the code.

use std::{
    ffi::OsString,
    io::{self, Write},
    path::PathBuf,
};

use clap::{Args, Parser, Subcommand, error::ErrorKind};

use self::output::{Format, Output};
use crate::{
    client::Client,
    config::Api,
    exit::{ExitCode, Verdict},
    view::{ErrorBody, ErrorView},
};

mod apply;
mod backend;
mod cleanup;
mod completions;
mod flows;
mod output;
mod run;
mod service;
mod status;
mod tables;
#[cfg(test)]
mod tests;
mod version;
mod watch;

/// A load balancer for service virtual IPs.
#[derive(Debug, Parser)]
#[command(name = "netlb", version, after_help = ExitCode::HELP, max_term_width = 100, propagate_version = false)]
struct Cli {
    #[command(flatten)]
    globals: Globals,
    #[command(subcommand)]
    command: Command,
}

#[derive(Args, Debug)]
struct Globals {
    /// The daemon's socket [default: /run/netlb/netlb.sock]
    #[arg(long, global = true, env = "NETLB_SOCKET", value_name = "PATH")]
    socket: Option<PathBuf>,
    /// How to print what there is to print
    #[arg(short, long, global = true, value_enum, default_value_t, value_name = "FORMAT")]
    output: Format,
    /// Leave out the line above a table
    #[arg(long, global = true)]
    no_headers: bool,
    /// Say nothing about what went well
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    quiet: bool,
    /// Say more; the daemon then logs at level debug
    #[arg(short, long, global = true)]
    verbose: bool,
    /// Print again whenever something changes (lists and status)
    #[arg(short, long, global = true)]
    watch: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the daemon, or check its configuration file
    Run(run::Run),
    /// Add, change, remove and show services
    #[command(name = "svc", visible_alias = "service", subcommand)]
    Service(service::Service),
    /// Add, change, drain and remove a service's backends
    #[command(subcommand)]
    Backend(backend::Backend),
    /// List, count and remove flows
    #[command(subcommand)]
    Flows(flows::Flows),
    /// Create or replace the services of a file in one transaction
    Apply(apply::Apply),
    /// Show how the daemon and its data plane do
    Status(status::Status),
    /// Remove everything netlb left in the kernel; works without a daemon
    Cleanup(cleanup::Cleanup),
    /// Print a completion script for a shell
    Completions(completions::Completions),
    /// Print the version
    Version(version::Version),
}

/// Runs one command line.
pub fn run<I, T>(arguments: I, out: &mut dyn Write, err: &mut dyn Write) -> ExitCode
where
    I: IntoIterator<Item = T>,
    T: Into<OsString> + Clone,
{
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(error) => return explain(&error, out, err),
    };
    let format = cli.globals.output;
    match execute(cli, out, err).and_then(|()| Ok(out.flush()?)) {
        Ok(()) => ExitCode::Ok,
        // Whoever read the output has seen enough.
        Err(error) if is_closed_pipe(&error) => ExitCode::Ok,
        Err(error) => report(&error, format, err),
    }
}

fn execute(cli: Cli, out: &mut dyn Write, err: &mut dyn Write) -> anyhow::Result<()> {
    let Cli { globals, command } = cli;
    let mut out = Output::new(out, globals.output, !globals.no_headers, globals.quiet);
    let client = || Client::new(globals.socket.as_deref().unwrap_or(Api::DEFAULT_SOCKET.as_ref()));
    match command {
        Command::Run(command) => command.run(globals.socket, globals.verbose, &mut out),
        Command::Service(command) => command.run(&client()?, globals.watch, &mut out),
        Command::Backend(command) => command.run(&client()?, globals.watch, &mut out),
        Command::Flows(command) => command.run(&client()?, globals.watch, &mut out),
        Command::Apply(command) => command.run(&client()?, &mut out),
        Command::Status(command) => command.run(&client()?, globals.watch, &mut out),
        Command::Cleanup(command) => command.run(globals.socket, &mut out, err),
        Command::Completions(command) => command.run(&mut out),
        Command::Version(command) => command.run(&mut out),
    }
}

/// `--help`, `--version`, and command lines that are none.
fn explain(error: &clap::Error, out: &mut dyn Write, err: &mut dyn Write) -> ExitCode {
    let text = error.render();
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            // A closed pipe is all that can go wrong, and no reason to complain.
            drop(write!(out, "{text}").and_then(|()| out.flush()));
            ExitCode::Ok
        }
        _ => {
            drop(write!(err, "{text}"));
            ExitCode::Usage
        }
    }
}

/// Tells an error, and chooses the exit code.
fn report(error: &anyhow::Error, format: Format, err: &mut dyn Write) -> ExitCode {
    let Verdict { exit, code, hint } = Verdict::of(error);
    let message = format!("{error:#}");
    // With nowhere to write to, the exit code still tells.
    drop(match format {
        Format::Json | Format::Yaml => {
            let view = ErrorView { error: ErrorBody { code, message, hint } };
            serde_json::to_string(&view).map_err(io::Error::from).and_then(|json| writeln!(err, "{json}"))
        }
        Format::Table | Format::Wide | Format::Name => {
            let hint = hint.map_or_else(String::new, |hint| format!("hint: {hint}\n"));
            write!(err, "error: {message}\n{hint}")
        }
    });
    exit
}

fn is_closed_pipe(error: &anyhow::Error) -> bool {
    let is_closed = |error: &io::Error| error.kind() == io::ErrorKind::BrokenPipe;
    error.chain().any(|cause| cause.downcast_ref().is_some_and(is_closed))
}
