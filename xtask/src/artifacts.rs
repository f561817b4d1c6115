//! What cargo builds for the demo and the tests, and where it is.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::{shell, ui};

/// Release builds of netlb and of the programs around it.
#[derive(Clone, Debug)]
pub(crate) struct Artifacts {
    release: PathBuf,
}

impl Artifacts {
    /// Builds them.
    pub(crate) fn build() -> Result<Self> {
        ui::step("building netlb");
        shell::run(&mut build())?;
        Self::locate()
    }

    /// Where they are once built.
    pub(crate) fn locate() -> Result<Self> {
        Ok(Self { release: target_dir()?.join("release") })
    }

    pub(crate) fn netlb(&self) -> PathBuf {
        self.release.join("netlb")
    }

    /// A program of the `netlb-integration` package.
    pub(crate) fn helper(&self, name: &str) -> PathBuf {
        self.release.join(name)
    }
}

/// The build itself. Who wants a part of it runs the whole: another choice of packages has other features, and builds netlb once more.
pub(crate) fn build() -> Command {
    shell::cargo(["build", "--release", "-p", "netlb", "-p", "netlb-integration", "--bins"])
}

/// The directory that cargo builds in.
pub(crate) fn target_dir() -> Result<PathBuf> {
    let metadata = shell::output(&mut shell::cargo(["metadata", "--no-deps", "--format-version", "1"]))?;
    let metadata: Value =
        serde_json::from_str(&metadata).context("`cargo metadata` printed something that is not JSON")?;
    let dir = metadata["target_directory"].as_str().context("`cargo metadata` tells no target_directory")?;
    Ok(PathBuf::from(dir))
}
