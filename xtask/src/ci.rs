//! `cargo xtask ci`: what runs for every change.

use anyhow::Result;

use crate::lint::Lint;
use crate::test::Test;
use crate::{bench, setup, ui};

/// Set up, lint, test, and see that the bench works, as for every change
#[derive(Debug, clap::Args)]
pub(crate) struct Ci {
    #[command(flatten)]
    setup: setup::Options,
}

impl Ci {
    pub(crate) fn run(self) -> Result<()> {
        self.setup.run()?;
        // A lint is no reason to hide what the tests say.
        let lint = Lint {}.run();
        let test = Test::everything(self.setup).run();
        let mut errors = Vec::from_iter([lint, test, bench::smoke()].into_iter().filter_map(Result::err));
        let Some(last) = errors.pop() else { return Ok(()) };
        errors.iter().for_each(ui::error);
        Err(last)
    }
}
