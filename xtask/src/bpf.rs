//! BPF objects that are not part of netlb.

use std::path::PathBuf;

use anyhow::{Context as _, Result};

use crate::toolchain::{REMEDIES, TARGET, Toolchain};
use crate::{artifacts, requirements, shell, ui};

/// Builds a binary of `netlb-ebpf` with these features besides `bpf`, and tells where the object is.
///
/// Objects of one name with other features need a directory of their own below the target directory.
pub(crate) fn build(binary: &str, features: &[&str], dir: &str) -> Result<PathBuf> {
    ui::step(format_args!("building {binary}"));
    let toolchain = Toolchain::select()?.context(REMEDIES)?;
    let linker =
        requirements::working_linker(&toolchain)?.context("there is no bpf-linker; run `cargo xtask setup`")?;
    let target_dir = artifacts::target_dir()?.join(dir);
    let mut cargo = toolchain.cargo("build", std::env::consts::ARCH, &linker)?;
    cargo.args(["--quiet", "--package", "netlb-ebpf", "--bin", binary, "--target-dir"]).arg(&target_dir);
    cargo.arg("--features").arg([&["bpf"], features].concat().join(","));
    shell::run(cargo.current_dir(shell::workspace()))?;
    Ok(target_dir.join(TARGET).join("release").join(binary))
}
