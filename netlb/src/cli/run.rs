//! `netlb run`.

use std::path::PathBuf;

use super::output::Output;
use crate::{
    config::Config,
    daemon::{self, DEFAULT_BPFFS, DEFAULT_STATE_DIR},
};

#[derive(clap::Args, Debug)]
pub(super) struct Run {
    /// Configuration file
    #[arg(short, long, value_name = "FILE", default_value = "/etc/netlb/netlb.toml")]
    config: PathBuf,
    /// Only check the configuration file
    #[arg(long)]
    check: bool,
    /// Where services added by the API are kept
    #[arg(long, value_name = "DIR", default_value = DEFAULT_STATE_DIR)]
    state_dir: PathBuf,
    /// Where kernel objects are pinned, on a BPF file system
    #[arg(long, value_name = "DIR", default_value = DEFAULT_BPFFS)]
    bpffs: PathBuf,
}

impl Run {
    pub(super) fn run(self, socket: Option<PathBuf>, verbose: bool, out: &mut Output<'_>) -> anyhow::Result<()> {
        let Self { config, check, state_dir, bpffs } = self;
        if check {
            let checked = Config::load(&config)?;
            let backends: usize = checked.services.iter().map(|service| service.backends().len()).sum();
            let services = checked.services.len();
            return out.say(&format!("{}: ok ({services} services, {backends} backends)", config.display()));
        }
        daemon::run(daemon::Options { config, socket, state_dir, bpffs, verbose })
    }
}
