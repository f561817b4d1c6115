//! `netlb version`.

use serde::Serialize;

use super::output::{Output, Style, View};

#[derive(clap::Args, Debug)]
pub(super) struct Version {}

#[derive(Serialize)]
struct VersionView {
    version: &'static str,
}

impl View for VersionView {
    fn text(&self, _: Style) -> String {
        format!("netlb {}", self.version)
    }

    fn names(&self) -> Vec<String> {
        vec![self.version.to_owned()]
    }
}

impl Version {
    #[expect(clippy::unused_self, reason = "as every command")]
    pub(super) fn run(&self, out: &mut Output<'_>) -> anyhow::Result<()> {
        out.print(&VersionView { version: env!("CARGO_PKG_VERSION") })
    }
}
