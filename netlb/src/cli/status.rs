//! `netlb status`.

use super::{output::Output, watch};
use crate::{client::Client, view::StatusView};

#[derive(clap::Args, Debug)]
pub(super) struct Status {}

impl Status {
    #[expect(clippy::unused_self, reason = "as every command")]
    pub(super) fn run(&self, client: &Client, watch: bool, out: &mut Output<'_>) -> anyhow::Result<()> {
        watch::show(watch, out, || client.get::<StatusView>("/v1/status"))
    }
}
