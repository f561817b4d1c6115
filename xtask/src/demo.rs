//! `cargo xtask demo`: from a bare machine to traffic through netlb in one command.

use std::os::unix::process::CommandExt as _;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use crate::artifacts::Artifacts;
use crate::{host, setup};

/// Build netlb and watch it balance traffic between network namespaces of this machine
#[derive(Debug, clap::Args)]
pub(crate) struct Demo {
    /// How long the traffic runs, in seconds
    #[arg(long, value_name = "SECONDS")]
    duration: Option<u32>,
    /// Use IPv6 addresses
    #[arg(long)]
    ipv6: bool,
    /// Leave the network namespaces and netlb running
    #[arg(long)]
    keep: bool,
    /// Print the result as JSON, and nothing else on stdout
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    setup: setup::Options,
}

impl Demo {
    pub(crate) fn run(self) -> Result<()> {
        ensure!(host::is_root()?, "the demo makes network namespaces and loads BPF programs: run it as root");
        self.setup.run()?;
        let artifacts = Artifacts::build()?;
        let program = artifacts.helper("netlb-demo");
        let mut demo = Command::new(&program);
        if let Some(duration) = self.duration {
            demo.arg("--duration").arg(duration.to_string());
        }
        for (flag, given) in [("--ipv6", self.ipv6), ("--keep", self.keep), ("--json", self.json)] {
            if given {
                demo.arg(flag);
            }
        }
        let error = demo.env("NETLB_BIN", artifacts.netlb()).exec();
        Err(error).with_context(|| format!("failed to run {}", program.display()))
    }
}
