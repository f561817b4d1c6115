//! `cargo xtask ci`: what runs for every change.

use anyhow::Result;

use crate::lint::Lint;
use crate::test::Test;
use crate::{setup, ui};

/// Set up, lint and test, as for every change
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
        match (lint, test) {
            (Err(lint), Err(test)) => {
                ui::error(&lint);
                Err(test)
            }
            (Err(error), Ok(())) | (Ok(()), Err(error)) => Err(error),
            (Ok(()), Ok(())) => Ok(()),
        }
    }
}
