//! How fast netlb is: its programs packet by packet beside programs that do nothing and beside another table, real traffic beside other
//! load balancers and none, and loads and changes of services.

mod control;
mod markdown;
mod notes;
mod packet;
mod path;
mod plot;
mod report;

use std::fs;
use std::io::{self, Write as _};
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use clap::{Parser, ValueEnum};
use netlb_integration::guardian;

use crate::markdown::Document;
use crate::report::{Goal, Report};

/// Measure netlb on this machine
///
/// Needs root. Prints the figures and the goals; a goal that is missed is no error.
#[derive(Debug, Parser)]
struct Args {
    /// Measure less often
    #[arg(long)]
    quick: bool,
    /// Measure next to nothing, and only show that the bench works: its figures say nothing
    #[arg(long, conflicts_with = "quick")]
    smoke: bool,
    /// Measure this part only
    #[arg(long, value_name = "PART")]
    only: Option<Part>,
    /// Of the programs' cases, measure the one with this name, or else those with this in their name
    #[arg(long, value_name = "NAME")]
    case: Option<String>,
    /// Write the figures into this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write the figures as tables into this file: where it has marks for them, if it is there
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
    /// Measure nothing, and show what is in this file, which was written by --json
    #[arg(long, value_name = "FILE", conflicts_with_all = ["quick", "smoke"])]
    from: Option<PathBuf>,
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
pub(crate) enum Part {
    /// The programs, by BPF_PROG_TEST_RUN
    Packet,
    /// Traffic of real sockets
    Path,
    /// Loading and changing services
    Control,
}

/// How much is measured.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Scale {
    /// Next to nothing, within seconds.
    Smoke,
    /// What a few minutes have room for.
    Quick,
    Full,
}

/// What every part is told.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    pub(crate) scale: Scale,
    /// What the names of the cases of the packet part have in them.
    pub(crate) case: Option<String>,
    /// The object with the harness programs of the packet part.
    pub(crate) harness: PathBuf,
    /// The object of netlb with an LRU hash for a flow table.
    pub(crate) lru: PathBuf,
}

impl Part {
    const ALL: [Self; 3] = [Self::Packet, Self::Path, Self::Control];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Packet => "packet",
            Self::Path => "path",
            Self::Control => "control",
        }
    }

    /// Measures it.
    fn run(self, options: &Options, report: &mut Report) -> Result<()> {
        match self {
            Self::Packet => report.packet = packet::run(options)?,
            Self::Path => report.path = path::run(options)?,
            Self::Control => report.control = control::run(options)?,
        }
        Ok(())
    }

    fn has_rows(self, report: &Report) -> bool {
        match self {
            Self::Packet => !report.packet.is_empty(),
            Self::Path => !report.path.is_empty(),
            Self::Control => !report.control.is_empty(),
        }
    }

    fn goals(self, report: &Report) -> Vec<Goal> {
        match self {
            Self::Packet => packet::goals(&report.packet),
            Self::Path => path::goals(&report.path),
            Self::Control => control::goals(&report.control),
        }
    }
}

fn main() -> Result<()> {
    if guardian::serve_if_asked()? || path::workload::serve_if_asked()? {
        return Ok(());
    }
    let args = Args::parse();
    let mut report = Report::default();
    if let Some(path) = &args.from {
        let text = fs::read_to_string(path).with_context(|| format!("failed to read {}", path.display()))?;
        report =
            serde_json::from_str(&text).with_context(|| format!("not the figures of a bench: {}", path.display()))?;
    } else if !nix::unistd::geteuid().is_root() {
        bail!("the bench makes network namespaces and loads programs into the kernel: run it as root");
    }
    let wants = |part: &Part| args.only.is_none_or(|only| only == *part);
    let mut parts = Vec::from_iter(Part::ALL.into_iter().filter(wants));
    if args.from.is_some() {
        parts.retain(|part| part.has_rows(&report));
    }

    // A file that cannot be written should not be found out after the measuring.
    if let Some(dir) = &args.plot {
        fs::create_dir_all(dir).with_context(|| format!("failed to make {}", dir.display()))?;
    }
    let document = args.markdown.as_ref().map(|path| Document::open(path, parts.iter().copied())).transpose()?;
    let json = args.json.as_ref().map(|path| {
        let file = fs::File::create(path).with_context(|| format!("failed to write {}", path.display()))?;
        anyhow::Ok((path, file))
    });
    let json = json.transpose()?;

    if args.from.is_none() {
        let scale = match (args.smoke, args.quick) {
            (true, _) => Scale::Smoke,
            (false, true) => Scale::Quick,
            (false, false) => Scale::Full,
        };
        let options = Options { scale, case: args.case, harness: args.harness, lru: args.lru };
        for part in &parts {
            let begin = Instant::now();
            part.run(&options, &mut report)?;
            progress(format_args!("{}: {:.0?}", part.name(), begin.elapsed()));
        }
    }
    let goals = Vec::from_iter(parts.iter().map(|part| (*part, part.goals(&report))));

    if let Some((path, mut file)) = json {
        writeln!(file, "{}", serde_json::to_string_pretty(&report)?)
            .with_context(|| format!("failed to write {}", path.display()))?;
    }
    if let Some(document) = document {
        document.write(&report, &goals)?;
    }
    if let Some(dir) = &args.plot {
        plot::write(&report, dir)?;
    }
    if args.smoke {
        return Ok(());
    }
    let mut out = io::stdout().lock();
    report.print(&mut out)?;
    report::print_goals(goals.iter().flat_map(|(_, goals)| goals), &mut out)?;
    Ok(())
}

/// Tells what is being done, beside the results.
pub(crate) fn progress(what: impl std::fmt::Display) {
    let _ = writeln!(io::stderr().lock(), "==> {what}");
}
