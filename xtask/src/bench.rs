//! `cargo xtask bench`: how fast netlb is on this machine.

use std::ffi::OsString;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use crate::artifacts::Artifacts;
use crate::{bpf, host, setup};

/// Build netlb and measure it: its programs packet by packet, real traffic beside other load balancers, loads and changes
///
/// Ends with a table of the goals. A goal that is missed is no error.
#[derive(Debug, clap::Args)]
pub(crate) struct Bench {
    /// Measure less often, in about a quarter of the time
    #[arg(long)]
    quick: bool,
    /// Measure this part only
    #[arg(long, value_name = "PART", value_parser = ["packet", "path", "control"])]
    only: Option<String>,
    /// Write the figures into this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
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
        let artifacts = Artifacts::build()?;
        let harness = bpf::build("netlb-bench-bpf", &[], "bpf")?;
        let lru = bpf::build("netlb-bpf", &["lru"], "bpf-lru")?;
        let program = artifacts.helper("netlb-bench");
        let mut bench = Command::new(&program);
        bench.arg("--harness").arg(harness).arg("--lru").arg(lru);
        if self.quick {
            bench.arg("--quick");
        }
        for (option, value) in [
            ("--only", self.only.map(OsString::from)),
            ("--json", self.json.map(OsString::from)),
            ("--plot", self.plot.map(OsString::from)),
        ] {
            if let Some(value) = value {
                bench.arg(option).arg(value);
            }
        }
        let error = bench.env("NETLB_BIN", artifacts.netlb()).exec();
        Err(error).with_context(|| format!("failed to run {}", program.display()))
    }
}
