//! `netlb completions`.

use clap::CommandFactory as _;
use clap_complete::Shell;

use super::{Cli, output::Output};

#[derive(clap::Args, Debug)]
pub(super) struct Completions {
    shell: Shell,
}

impl Completions {
    pub(super) fn run(&self, out: &mut Output<'_>) -> anyhow::Result<()> {
        // Into memory first: the generator panics on a closed pipe.
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut Cli::command(), "netlb", &mut script);
        out.raw(&script)
    }
}
