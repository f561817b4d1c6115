//! How fast netlb is: its programs packet by packet beside programs that do nothing and beside another table, real traffic beside other
//! load balancers and none, and loads and changes of services.

mod control;
mod notes;
mod packet;
mod path;
mod plot;
mod report;

use std::fs;
use std::io::{self, Write as _};
use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};
use clap::{Parser, ValueEnum};
use netlb_integration::guardian;

use crate::report::Report;

/// Measure netlb on this machine
///
/// Needs root. Prints the figures and the goals; a goal that is missed is no error.
#[derive(Debug, Parser)]
struct Args {
    /// Measure less often
    #[arg(long)]
    quick: bool,
    /// Measure this part only
    #[arg(long, value_name = "PART")]
    only: Option<Part>,
    /// Write the figures into this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write plots (SVG) into this directory
    #[arg(long, value_name = "DIR")]
    plot: Option<PathBuf>,
    /// The object with the harness programs
    #[arg(long, value_name = "FILE")]
    harness: PathBuf,
    /// The object of netlb with an LRU hash for a flow table
    #[arg(long, value_name = "FILE")]
    lru: PathBuf,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
enum Part {
    /// The programs, by BPF_PROG_TEST_RUN
    Packet,
    /// Traffic of real sockets
    Path,
    /// Loading and changing services
    Control,
}

/// What every part is told.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    /// Whether a few minutes are all there is.
    pub(crate) quick: bool,
    /// The object with the harness programs of the packet part.
    pub(crate) harness: PathBuf,
    /// The object of netlb with an LRU hash for a flow table.
    pub(crate) lru: PathBuf,
}

fn main() -> Result<()> {
    if guardian::serve_if_asked()? || path::workload::serve_if_asked()? {
        return Ok(());
    }
    let args = Args::parse();
    if !nix::unistd::geteuid().is_root() {
        bail!("the bench makes network namespaces and loads programs into the kernel: run it as root");
    }
    // A file that cannot be written should not be found out after the measuring.
    if let Some(dir) = &args.plot {
        fs::create_dir_all(dir).with_context(|| format!("failed to make {}", dir.display()))?;
    }
    let json = args.json.as_ref().map(|path| {
        let file = fs::File::create(path).with_context(|| format!("failed to write {}", path.display()))?;
        anyhow::Ok((path, file))
    });
    let json = json.transpose()?;

    let options = Options { quick: args.quick, harness: args.harness, lru: args.lru };
    let wants = |part| args.only.is_none_or(|only| only == part);
    let mut report = Report::default();
    let mut goals = Vec::new();
    if wants(Part::Packet) {
        report.packet = packet::run(&options)?;
        goals.extend(packet::goals(&report.packet));
    }
    if wants(Part::Path) {
        report.path = path::run(&options)?;
        goals.extend(path::goals(&report.path));
    }
    if wants(Part::Control) {
        report.control = control::run(&options)?;
        goals.extend(control::goals(&report.control));
    }

    if let Some((path, mut file)) = json {
        writeln!(file, "{}", serde_json::to_string_pretty(&report)?)
            .with_context(|| format!("failed to write {}", path.display()))?;
    }
    if let Some(dir) = &args.plot {
        plot::write(&report, dir)?;
    }
    let mut out = io::stdout().lock();
    report.print(&mut out)?;
    report::print_goals(&goals, &mut out)?;
    Ok(())
}

/// Tells what is being done, beside the results.
pub(crate) fn progress(what: impl std::fmt::Display) {
    let _ = writeln!(io::stderr().lock(), "==> {what}");
}
