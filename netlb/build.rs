//! Builds the BPF programs and leaves the object at `$OUT_DIR/netlb-bpf`, where the loader embeds it.
//!
//! In this order:
//! 1. `NETLB_BPF_OBJECT=FILE` takes that object and builds nothing.
//! 2. `AYA_BUILD_SKIP=1` leaves an empty file: enough for clippy and rustdoc, and a netlb built so loads nothing.
//! 3. `NETLB_BPF_TOOLCHAIN=NAME` builds with that rustup toolchain.
//! 4. rustup's nightly, if it has rust-src.
//! 5. The distribution's compiler (`NETLB_BPF_RUSTC`, else `/usr/bin/rustc`), if it has a prebuilt `core` for BPF.
//!
//! It runs cargo itself: aya-build decides on the compiler's flags alone, and the flow table needs `-Ctarget-cpu=v3`.

#[path = "../xtask/src/toolchain.rs"]
mod toolchain;

use std::collections::BTreeSet;
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail, ensure};
use object::{Object as _, ObjectSymbol as _};
use toolchain::{LINKER_DIR_VAR, REMEDIES, RUSTC_VAR, TARGET, TOOLCHAIN_VAR, Toolchain, setting};

const OBJECT_VAR: &str = "NETLB_BPF_OBJECT";
const SKIP_VAR: &str = "AYA_BUILD_SKIP";

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Not by returning it: with RUST_BACKTRACE set, that would hide the remedy above a page of frames.
            complain(&error);
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    for variable in [OBJECT_VAR, SKIP_VAR, TOOLCHAIN_VAR, RUSTC_VAR, LINKER_DIR_VAR] {
        instruct("rerun-if-env-changed", variable);
    }
    instruct("rerun-if-changed", "build.rs");
    instruct("rerun-if-changed", "../xtask/src/toolchain.rs");
    let object = variable("OUT_DIR")?.join("netlb-bpf");

    if let Some(prebuilt) = setting(OBJECT_VAR).map(PathBuf::from) {
        instruct("rerun-if-changed", prebuilt.display());
        copy(&prebuilt, &object).context(OBJECT_VAR)?;
        return check(&object).with_context(|| format!("{OBJECT_VAR}={}", prebuilt.display()));
    }
    if setting(SKIP_VAR).is_some_and(|value| value == "1" || value.eq_ignore_ascii_case("true")) {
        return fs::write(&object, []).with_context(|| format!("failed to write {}", object.display()));
    }
    copy(&build()?, &object)?;
    check(&object)
}

/// Runs cargo for the BPF target and tells where the object is.
fn build() -> Result<PathBuf> {
    let workspace = variable("CARGO_MANIFEST_DIR")?.join("..");
    // The library of netlb-ebpf, a build-dependency, brings netlb-common and the build back here; these files bring the rest.
    for file in ["netlb-ebpf/src", "netlb-ebpf/build.rs", "netlb-ebpf/Cargo.toml", "Cargo.toml", "Cargo.lock"] {
        instruct("rerun-if-changed", workspace.join(file).display());
    }
    let toolchain = Toolchain::select()?.context(REMEDIES)?;
    let linker = toolchain.linker()?.with_context(|| {
        let llvm = toolchain.llvm;
        format!(
            "there is no bpf-linker for {} (LLVM {llvm}); run `cargo xtask setup`, or put one on PATH",
            toolchain.version
        )
    })?;
    instruct("rerun-if-changed", linker.display());

    // Shared by all profiles of the host, which the programs do not depend on.
    let target_dir = target_dir()?.join("bpf");
    let arch = variable("CARGO_CFG_TARGET_ARCH")?;
    let mut cargo = toolchain.cargo("build", &arch.to_string_lossy(), &linker)?;
    cargo.args(["--quiet", "--package", "netlb-ebpf", "--bin", "netlb-bpf", "--features", "bpf", "--target-dir"]);
    cargo.arg(&target_dir).current_dir(&workspace);
    let output = cargo.output().with_context(|| format!("failed to run {cargo:?}"))?;
    let messages = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "the BPF programs do not build with {} (from {}) and {}:\n{messages}",
        toolchain.version,
        toolchain.sysroot.display(),
        linker.display(),
    );
    for line in messages.lines().filter(|line| !line.is_empty()) {
        instruct("warning", line);
    }
    Ok(target_dir.join(TARGET).join("release/netlb-bpf"))
}

/// Refuses an object that no kernel would load.
///
/// A panic that can be reached leaves a call into `core::panicking` behind; the verifier answers it with "last insn is not an exit or jmp",
/// which helps nobody.
fn check(object: &Path) -> Result<()> {
    let bytes = fs::read(object).with_context(|| format!("failed to read {}", object.display()))?;
    let file = object::File::parse(&*bytes).with_context(|| format!("{} is not an object file", object.display()))?;
    ensure!(file.architecture() == object::Architecture::Bpf, "{} is not a BPF object", object.display());
    let mut panics = BTreeSet::new();
    let mut undefined = BTreeSet::new();
    for symbol in file.symbols() {
        let name = symbol.name().context("a symbol's name is not valid UTF-8")?;
        if name.contains("core9panicking") {
            panics.insert(name);
        } else if symbol.is_undefined() && !name.is_empty() {
            undefined.insert(name);
        }
    }
    if !panics.is_empty() {
        bail!(
            "a BPF program can panic, and the verifier would refuse it. The object calls {}.\n\
             Use `get` instead of an index, `checked_div` or a test for zero before a division, wrapping or checked arithmetic, and no \
             `unwrap`. `llvm-objdump -dl {}` shows the source lines.",
            Vec::from_iter(panics).join(", "),
            object.display(),
        );
    }
    if !undefined.is_empty() {
        bail!(
            "the BPF object calls functions that do not exist for BPF: {}. Signed division and 128-bit arithmetic are the usual reasons.",
            Vec::from_iter(undefined).join(", ")
        );
    }
    Ok(())
}

/// The directory cargo builds in, which is the one that it tags as a cache.
fn target_dir() -> Result<PathBuf> {
    let out_dir = variable("OUT_DIR")?;
    Ok(out_dir.ancestors().find(|dir| dir.join("CACHEDIR.TAG").exists()).unwrap_or(&out_dir).to_owned())
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::copy(from, to).with_context(|| format!("failed to copy {} to {}", from.display(), to.display()))?;
    Ok(())
}

fn variable(name: &str) -> Result<PathBuf> {
    env::var_os(name)
        .map(PathBuf::from)
        .with_context(|| format!("cargo sets {name} for a build script, but it is not set"))
}

/// Tells cargo something.
fn instruct(instruction: &str, value: impl std::fmt::Display) {
    println!("cargo::{instruction}={value}");
}

/// Tells the user something: cargo shows it when the script fails.
#[expect(clippy::print_stderr, reason = "cargo shows it when the script fails")]
fn complain(error: &anyhow::Error) {
    eprintln!("error: {error:#}");
}
