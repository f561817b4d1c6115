//! Which compiler and which linker build the BPF programs.
//!
//! The build script of netlb and `cargo xtask` share this file, so that `setup` and `doctor` look at what the build will use. A compiler
//! qualifies if it can get `core` for the BPF target: prebuilt, as some distributions ship it, or built from `rust-src`. The linker reads
//! the compiler's LLVM bitcode and must therefore be linked to the same major version of LLVM, or a later one.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

/// The release of bpf-linker that `cargo xtask setup` builds.
pub(crate) const LINKER_VERSION: &str = "0.13.0";

/// Name or path of a rustup toolchain to build the programs with.
pub(crate) const TOOLCHAIN_VAR: &str = "NETLB_BPF_TOOLCHAIN";
/// The distribution's compiler, where it is not `/usr/bin/rustc`.
pub(crate) const RUSTC_VAR: &str = "NETLB_BPF_RUSTC";
/// Directory of the bpf-linker to use, before any other.
pub(crate) const LINKER_DIR_VAR: &str = "NETLB_BPF_LINKER_DIR";

/// What to do when no compiler qualifies.
pub(crate) const REMEDIES: &str = "\
no compiler here can build for BPF; any one of these helps:
  cargo xtask setup                                        installs what is missing (Debian, Ubuntu)
  rustup toolchain install nightly --component rust-src    builds `core` from source
  apt-get install rustc-web libstd-rust-web-dev-bpf        a compiler with a prebuilt `core`";

/// Crates that need unstable features. A stable compiler grants them to these only; `1` would grant them to every dependency.
const UNSTABLE_CRATES: &str = "aya_ebpf,netlb_common,netlb_ebpf,netlb_bpf";

/// A compiler that can build the programs.
#[derive(Debug)]
pub(crate) struct Toolchain {
    pub(crate) source: Source,
    core: Core,
    nightly: bool,
    /// As `rustc --version` tells it.
    pub(crate) version: String,
    /// Major version of the LLVM inside the compiler.
    pub(crate) llvm: u32,
    pub(crate) sysroot: PathBuf,
}

/// Where a compiler comes from.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Source {
    /// A rustup toolchain, by name or path.
    Rustup(String),
    /// A compiler outside rustup, by path.
    Distribution(PathBuf),
}

/// How the compiler gets `core` for the BPF target.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Core {
    Prebuilt,
    FromSource,
}

impl Toolchain {
    /// The compiler the build uses: the one named in the environment, else rustup's nightly, else the distribution's.
    ///
    /// `None` if nothing was named and neither of the others can build for BPF.
    pub(crate) fn select() -> Result<Option<Self>> {
        if let Some(name) = setting(TOOLCHAIN_VAR) {
            let name = name.into_string().ok().with_context(|| format!("{TOOLCHAIN_VAR} is not valid UTF-8"))?;
            let found = Self::probe(Source::Rustup(name.clone()))
                .with_context(|| format!("{TOOLCHAIN_VAR}={name}: this toolchain does not run"))?;
            return match found {
                Some(toolchain) => Ok(Some(toolchain)),
                None => bail!(
                    "{TOOLCHAIN_VAR}={name}: this toolchain has neither rust-src nor a prebuilt core for {TARGET}"
                ),
            };
        }
        if let Ok(Some(nightly)) = Self::probe(Source::Rustup("nightly".to_owned())) {
            return Ok(Some(nightly));
        }
        let named = setting(RUSTC_VAR);
        let rustc = PathBuf::from(named.clone().unwrap_or_else(|| OsString::from("/usr/bin/rustc")));
        let found = match Self::probe(Source::Distribution(rustc.clone())) {
            // Sources of `core` beside a distribution's compiler do not help: it needs the crates they depend on as well.
            Ok(found) => found.filter(|toolchain| toolchain.core == Core::Prebuilt),
            Err(error) if named.is_some() => {
                return Err(error.context(format!("{RUSTC_VAR}={}: this compiler does not run", rustc.display())));
            }
            Err(_) => None,
        };
        if found.is_none() && named.is_some() {
            bail!("{RUSTC_VAR}={}: this compiler has no prebuilt core for {TARGET}", rustc.display());
        }
        Ok(found)
    }

    /// What `source` is, or `None` if it has no `core` for BPF. An error means that it does not run at all.
    fn probe(source: Source) -> Result<Option<Self>> {
        let sysroot = PathBuf::from(answer(source.rustc().args(["--print", "sysroot"]))?.trim());
        let rustlib = sysroot.join("lib/rustlib");
        let core = if has_libcore(&rustlib.join(TARGET).join("lib")) {
            Core::Prebuilt
        } else if rustlib.join("src/rust/library/core/Cargo.toml").exists() {
            Core::FromSource
        } else {
            return Ok(None);
        };
        let verbose = answer(source.rustc().arg("-vV"))?;
        let field = |name: &str| verbose.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        let release = field("release:").context("`rustc -vV` tells no release")?;
        let llvm = field("LLVM version:").context("`rustc -vV` tells no LLVM version")?;
        let llvm = llvm
            .split('.')
            .next()
            .and_then(|major| major.parse().ok())
            .with_context(|| format!("`rustc -vV` tells LLVM version `{llvm}`, which has no major number"))?;
        let nightly = release.contains("nightly") || release.contains("dev");
        let version = verbose.lines().next().unwrap_or_default().to_owned();
        Ok(Some(Self { source, core, nightly, version, llvm, sysroot }))
    }

    /// `cargo SUBCOMMAND` for the BPF target, with this compiler and `linker`. The programs will run on a kernel of `arch`.
    pub(crate) fn cargo(&self, subcommand: &str, arch: &str, linker: &Path) -> Result<Command> {
        let mut cargo = match &self.source {
            Source::Rustup(name) => {
                let mut rustup = Command::new("rustup");
                rustup.args(["run", name, "cargo"]);
                rustup.env_remove("RUSTC");
                rustup
            }
            Source::Distribution(rustc) => {
                // The running cargo drives any compiler. rustup's own proxies play no part in this.
                let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo")));
                cargo.env("RUSTC", rustc);
                cargo
            }
        };
        cargo.arg(subcommand).args(["--release", "--target", TARGET]);
        if self.core == Core::FromSource {
            cargo.args(["-Z", "build-std=core"]);
        }
        match (self.nightly, self.core) {
            (true, _) => cargo.env_remove("RUSTC_BOOTSTRAP"),
            (false, Core::Prebuilt) => cargo.env("RUSTC_BOOTSTRAP", UNSTABLE_CRATES),
            (false, Core::FromSource) => cargo.env("RUSTC_BOOTSTRAP", "1"),
        };
        // cargo takes the flags of one source only. This one comes before all others, so that what a user sets for the host stays there.
        let flags = [
            // Read by aya-ebpf, for the layout of the kernel's registers.
            &format!("--cfg=bpf_target_arch=\"{arch}\""),
            // v3 has the atomics that return a value; v4 would need kernel 6.6.
            "-Ctarget-cpu=v3",
            // Types and map definitions reach the loader as BTF, which the linker makes from debug information.
            "-Cdebuginfo=2",
            "-Clink-arg=--btf",
            // Else each place that is filled with zeros, and each address of IPv6 that is copied, is a call of a function that does it byte by byte.
            "-Clink-arg=--disable-expand-memcpy-in-order",
        ];
        cargo.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
        // Set when clippy runs the build script.
        for wrapper in ["RUSTC_WORKSPACE_WRAPPER", "CLIPPY_ARGS"] {
            cargo.env_remove(wrapper);
        }
        let path = env::var_os("PATH").unwrap_or_default();
        let dirs = linker.parent().map(Path::to_owned).into_iter().chain(env::split_paths(&path));
        cargo.env("PATH", env::join_paths(dirs)?);
        Ok(cargo)
    }

    /// The linker to use with this compiler, if there is one.
    pub(crate) fn linker(&self) -> Result<Option<PathBuf>> {
        if let Some(dir) = setting(LINKER_DIR_VAR) {
            let linker = PathBuf::from(dir).join("bpf-linker");
            if !linker.exists() {
                bail!("{LINKER_DIR_VAR}: there is no {}", linker.display());
            }
            return Ok(Some(linker));
        }
        let cached = self.linker_root()?.join("bin/bpf-linker");
        let cached = cached.exists().then_some(cached);
        let path = env::var_os("PATH").unwrap_or_default();
        let on_path = env::split_paths(&path).map(|dir| dir.join("bpf-linker")).find(|file| file.is_file());
        Ok(match self.source {
            Source::Rustup(_) => on_path.or(cached),
            // A linker on PATH is linked to who knows which LLVM; the cached one to the distribution's.
            Source::Distribution(_) => cached.or(on_path),
        })
    }

    /// Where `cargo xtask setup` puts the linker for this compiler, as `cargo install --root` understands it.
    pub(crate) fn linker_root(&self) -> Result<PathBuf> {
        let cache = env::var_os("XDG_CACHE_HOME")
            .map(PathBuf::from)
            .filter(|dir| dir.is_absolute())
            .or_else(|| env::home_dir().map(|home| home.join(".cache")))
            .context("neither XDG_CACHE_HOME nor HOME is set")?;
        Ok(cache.join("netlb").join(format!("bpf-linker-{LINKER_VERSION}-llvm{}", self.llvm)))
    }
}

impl Source {
    fn rustc(&self) -> Command {
        match self {
            Self::Rustup(name) => {
                let mut rustup = Command::new("rustup");
                rustup.args(["run", name, "rustc"]);
                rustup
            }
            Self::Distribution(rustc) => Command::new(rustc),
        }
    }
}

/// The programs have the byte order of the kernel that runs them; building for a machine of the other order is not supported.
pub(crate) const TARGET: &str = if cfg!(target_endian = "big") { "bpfeb-unknown-none" } else { "bpfel-unknown-none" };

fn has_libcore(dir: &Path) -> bool {
    fs::read_dir(dir).is_ok_and(|entries| {
        entries.flatten().any(|entry| {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            name.starts_with("libcore-") && name.ends_with(".rlib")
        })
    })
}

/// A variable of the environment; empty is as good as unset.
pub(crate) fn setting(name: &str) -> Option<OsString> {
    env::var_os(name).filter(|value| !value.is_empty())
}

/// What a command prints.
fn answer(command: &mut Command) -> Result<String> {
    let output = command.stderr(Stdio::null()).output().with_context(|| format!("failed to run {command:?}"))?;
    if !output.status.success() {
        bail!("{command:?} failed: {}", output.status);
    }
    String::from_utf8(output.stdout).with_context(|| format!("{command:?} printed something that is not UTF-8"))
}
