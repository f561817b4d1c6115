//! `cargo xtask bench`: how fast netlb is on this machine.

use std::ffi::OsString;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use crate::artifacts::Artifacts;
use crate::{bpf, host, setup, shell, ui};

/// Build netlb and measure it: its programs packet by packet, real traffic beside other load balancers, loads and changes
///
/// Ends with a table of the goals. A goal that is missed is no error.
#[derive(Debug, clap::Args)]
pub(crate) struct Bench {
    /// Measure less often, in about a quarter of the time
    #[arg(long)]
    quick: bool,
    /// Measure next to nothing, and only show that the bench works: its figures say nothing
    #[arg(long, conflicts_with = "quick")]
    smoke: bool,
    /// Measure this part only
    #[arg(long, value_name = "PART", value_parser = ["packet", "path", "control"])]
    only: Option<String>,
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
    #[command(flatten)]
    setup: setup::Options,
}

impl Bench {
    pub(crate) fn run(self) -> Result<()> {
        ensure!(host::is_root()?, "the bench makes network namespaces and loads BPF programs: run it as root");
        self.setup.run()?;
        let mut bench = program()?;
        if self.quick {
            bench.arg("--quick");
        }
        if self.smoke {
            bench.arg("--smoke");
        }
        for (option, value) in [
            ("--only", self.only.map(OsString::from)),
            ("--case", self.case.map(OsString::from)),
            ("--json", self.json.map(OsString::from)),
            ("--markdown", self.markdown.map(OsString::from)),
            ("--from", self.from.map(OsString::from)),
            ("--plot", self.plot.map(OsString::from)),
        ] {
            if let Some(value) = value {
                bench.arg(option).arg(value);
            }
        }
        let error = bench.exec();
        Err(error).with_context(|| format!("failed to run {}", bench.get_program().display()))
    }
}

/// Runs all of the bench, as short as can be: so it does not stop working without anybody noticing.
pub(crate) fn smoke() -> Result<()> {
    ui::step("the bench, as short as can be");
    shell::run(program()?.arg("--smoke"))
}

/// The bench, built, with what it is to measure.
fn program() -> Result<Command> {
    let artifacts = Artifacts::build()?;
    let harness = bpf::build("netlb-bench-bpf", &[], "bpf")?;
    let lru = bpf::build("netlb-bpf", &["lru"], "bpf-lru")?;
    let mut bench = Command::new(artifacts.helper("netlb-bench"));
    bench.arg("--harness").arg(harness).arg("--lru").arg(lru).env("NETLB_BIN", artifacts.netlb());
    Ok(bench)
}
