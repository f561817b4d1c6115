//! `cargo xtask setup`: brings a Debian or Ubuntu machine to where netlb builds and its tests run.
//!
//! Every step looks first and does nothing when there is nothing to do. What gets installed is said before it is.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};

use crate::requirements::{self, Check, State, TOOLS, Tool};
use crate::toolchain::{LINKER_VERSION, REMEDIES, Toolchain};
use crate::{host, shell, ui};

/// Install what building and testing need (Debian, Ubuntu)
#[derive(Debug, clap::Args)]
pub(crate) struct Setup {
    #[command(flatten)]
    options: Options,
}

/// Set-up options of the commands that begin with it.
#[derive(Clone, Copy, Debug, clap::Args)]
pub(crate) struct Options {
    /// Change nothing on this machine: name what is missing and fail
    #[arg(long)]
    pub(crate) no_install: bool,
}

impl Setup {
    pub(crate) fn run(self) -> Result<()> {
        self.options.run()?;
        ui::note("everything netlb needs is here");
        Ok(())
    }
}

impl Options {
    pub(crate) fn run(self) -> Result<()> {
        if self.no_install { verify() } else { install() }
    }
}

/// Names everything that is missing.
fn verify() -> Result<()> {
    let missing = Vec::from_iter(requirements::checks()?.into_iter().filter(Check::is_missing));
    if missing.is_empty() {
        return Ok(());
    }
    let lines = missing.iter().map(|check| match &check.state {
        State::Missing { fix } => format!("  {}: {fix}", check.what),
        State::Found(_) => check.what.clone(),
    });
    let lines = Vec::from_iter(lines).join("\n");
    bail!("{} missing (`cargo xtask setup` gets all of it):\n{lines}", missing.len());
}

fn install() -> Result<()> {
    let tools = Vec::from_iter(TOOLS.iter().filter(|tool| !tool.is_installed()));
    let mut packages = Vec::from_iter(tools.iter().map(|tool| tool.package));
    let compiler = Toolchain::select()?;
    if compiler.is_none() {
        packages.extend(compiler_packages()?);
    }
    install_packages(&packages)?;
    keep_from_starting(&tools);

    let compiler = match compiler {
        Some(compiler) => compiler,
        None => Toolchain::select()?.context(REMEDIES)?,
    };
    if requirements::working_linker(&compiler)?.is_none() {
        install_linker(&compiler)?;
    }
    mount_bpffs()
}

/// The distribution's compiler with a prebuilt `core` for BPF, and its clippy, which only `cargo xtask lint` wants.
fn compiler_packages() -> Result<Vec<&'static str>> {
    const FAMILIES: [([&str; 2], &str); 2] = [
        (["rustc-web", "libstd-rust-web-dev-bpf"], "rust-web-clippy"),
        (["rustc", "libstd-rust-dev-bpf"], "rust-clippy"),
    ];
    let choose = || {
        // The families exclude each other: stay with the one that is there.
        let installed = FAMILIES.iter().find(|([compiler, _], _)| is_package_installed(compiler));
        let mut candidates = installed.into_iter().chain(FAMILIES.iter().filter(|_| installed.is_none()));
        candidates.find(|(packages, _)| packages.iter().all(|package| is_available(package)))
    };
    let family = match choose() {
        Some(family) => Some(family),
        None if shell::find("apt-get").is_some() => {
            update_lists()?;
            choose()
        }
        None => None,
    };
    let (packages, clippy) =
        family.with_context(|| format!("this distribution has no compiler with a `core` for BPF\n{REMEDIES}"))?;
    Ok(packages.iter().chain([clippy].into_iter().filter(|clippy| is_available(clippy))).copied().collect())
}

fn install_packages(packages: &[&str]) -> Result<()> {
    // The services the tests run are for the tests alone: nothing may start them on this machine. And nothing may be removed, as a compiler
    // of another family would be.
    const INSTALL: &str = r#"
        policy=/usr/sbin/policy-rc.d
        if [ ! -e $policy ]; then
            trap 'rm -f $policy' EXIT
            trap 'exit 130' INT TERM
            printf '#!/bin/sh\nexit 101\n' >$policy
            chmod +x $policy
        fi
        DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends --no-remove "$@"
    "#;
    if packages.is_empty() {
        return Ok(());
    }
    let list = packages.join(" ");
    ensure!(
        shell::find("apt-get").is_some(),
        "this machine has no apt-get; these are missing (Debian's names): {list}"
    );
    ui::step(format_args!("installing with apt-get: {list}"));
    let install = || shell::run(shell::as_root("sh")?.args(["-e", "-c", INSTALL, "sh"]).args(packages));
    if packages.iter().all(|package| is_available(package)) && install().is_ok() {
        return Ok(());
    }
    // Old lists name packages that the mirrors no longer have.
    update_lists()?;
    install().with_context(|| format!("failed to install {list}"))
}

fn update_lists() -> Result<()> {
    ui::step("updating the package lists");
    shell::run(shell::as_root("apt-get")?.arg("update"))
}

/// Takes the services that have just been installed out of the boot.
fn keep_from_starting(installed: &[&Tool]) {
    if !Path::new("/run/systemd/system").exists() {
        return;
    }
    for unit in installed.iter().filter_map(|tool| tool.unit) {
        let disabled =
            shell::as_root("systemctl").and_then(|mut systemctl| shell::run(systemctl.args(["disable", unit])));
        if let Err(error) = disabled {
            ui::note(format_args!("{unit} will start at the next boot: {error:#}"));
        }
    }
}

/// Builds bpf-linker against the LLVM that the compiler has inside.
fn install_linker(compiler: &Toolchain) -> Result<()> {
    let llvm = compiler.llvm;
    let package = format!("llvm-{llvm}-dev");
    let prefix = format!("/usr/lib/llvm-{llvm}");
    if !Path::new(&prefix).join("lib/libLLVM.so").exists() {
        install_packages(&[&package]).with_context(|| {
            format!(
                "bpf-linker must be linked to LLVM {llvm}, as {} is; get one with `cargo binstall bpf-linker`",
                compiler.version
            )
        })?;
    }
    let root = compiler.linker_root()?;
    ui::step(format_args!("building bpf-linker {LINKER_VERSION} for LLVM {llvm} into {}", root.display()));
    fs::create_dir_all(&root).with_context(|| format!("failed to create {}", root.display()))?;
    let mut cargo = shell::cargo(["install", "bpf-linker", "--force", "--locked", "--version", LINKER_VERSION]);
    cargo.args(["--no-default-features", "--features", &format!("llvm-{llvm}")]).arg("--root").arg(&root);
    cargo.env("LLVM_PREFIX", prefix);
    // Its build is nothing for our target directory.
    cargo.env_remove("CARGO_TARGET_DIR");
    shell::run(&mut cargo)?;
    ensure!(requirements::working_linker(compiler)?.is_some(), "bpf-linker was built, but it does not run");
    Ok(())
}

fn mount_bpffs() -> Result<()> {
    if host::has_bpffs()? {
        return Ok(());
    }
    ui::step(format_args!("mounting the BPF file system at {}", host::BPFFS));
    shell::run(shell::as_root("mount")?.args(["-t", "bpf", "bpf", host::BPFFS]))
}

/// Whether apt knows where to get a package.
fn is_available(package: &str) -> bool {
    let policy = Command::new("apt-cache").args(["policy", package]).env("LC_ALL", "C").output();
    policy.is_ok_and(|policy| {
        let policy = String::from_utf8_lossy(&policy.stdout);
        policy.lines().any(|line| line.trim().strip_prefix("Candidate: ").is_some_and(|version| version != "(none)"))
    })
}

fn is_package_installed(package: &str) -> bool {
    let query = Command::new("dpkg-query").args(["--show", "--showformat=${db:Status-Status}", package]).output();
    query.is_ok_and(|query| query.stdout == b"installed")
}
