//! `cargo xtask lint`: format, clippy, licences.

use std::process::Command;

use anyhow::{Result, ensure};

use crate::toolchain::{Source, Toolchain};
use crate::{artifacts, requirements, shell, ui};

/// Check format, lints and licences
#[derive(Debug, clap::Args)]
pub(crate) struct Lint {}

impl Lint {
    pub(crate) fn run(self) -> Result<()> {
        let mut steps = vec![("fmt", shell::cargo(["fmt", "--all", "--check"])), ("clippy", clippy()?)];
        match bpf_clippy()? {
            Ok(clippy) => steps.push(("clippy for BPF", clippy)),
            Err(reason) => ui::note(format_args!("the BPF programs are not linted: {reason}")),
        }
        if shell::find("cargo-deny").is_some() {
            steps.push(("deny", shell::cargo(["deny", "check"])));
        } else {
            ui::note("licences are not checked: cargo-deny is not installed (cargo install cargo-deny)");
        }
        let mut failed = Vec::new();
        for (name, mut command) in steps {
            ui::step(name);
            if let Err(error) = shell::run(&mut command) {
                ui::error(&error);
                failed.push(name);
            }
        }
        ensure!(failed.is_empty(), "lint failed: {}", failed.join(", "));
        Ok(())
    }
}

/// clippy for all that runs in user space. It has its own directory, because without the BPF object every build of netlb is another one.
fn clippy() -> Result<Command> {
    let mut cargo = shell::cargo(["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]);
    cargo.env("AYA_BUILD_SKIP", "1").env("CARGO_TARGET_DIR", artifacts::target_dir()?.join("lint"));
    Ok(cargo)
}

/// clippy for the programs, which only the compiler that builds them can check, or why there is none.
fn bpf_clippy() -> Result<Result<Command, String>> {
    let Some(toolchain) = Toolchain::select()? else {
        return Ok(Err("no compiler here can build for BPF".to_owned()));
    };
    let Some(linker) = requirements::working_linker(&toolchain)? else {
        return Ok(Err("there is no bpf-linker".to_owned()));
    };
    let mut cargo = match &toolchain.source {
        Source::Rustup(name) => {
            if !shell::succeeds(Command::new("rustup").args(["run", name, "cargo", "clippy", "--version"])) {
                return Ok(Err(format!(
                    "toolchain {name} has no clippy (rustup component add clippy --toolchain {name})"
                )));
            }
            toolchain.cargo("clippy", std::env::consts::ARCH, &linker)?
        }
        Source::Distribution(rustc) => {
            let clippy = rustc.with_file_name("cargo-clippy");
            if !clippy.exists() {
                return Ok(Err(format!("there is no {} (apt-get install rust-web-clippy)", clippy.display())));
            }
            // cargo finds its subcommands by PATH, where another toolchain's clippy may come first.
            let cargo = toolchain.cargo("clippy", std::env::consts::ARCH, &linker)?;
            let mut direct = Command::new(clippy);
            direct.args(cargo.get_args());
            for (name, value) in cargo.get_envs() {
                match value {
                    Some(value) => direct.env(name, value),
                    None => direct.env_remove(name),
                };
            }
            direct
        }
    };
    cargo.args(["--package", "netlb-ebpf", "--bins", "--features", "bpf", "--target-dir"]);
    cargo.arg(artifacts::target_dir()?.join("lint/bpf")).args(["--", "-D", "warnings"]);
    cargo.current_dir(shell::workspace());
    Ok(Ok(cargo))
}
