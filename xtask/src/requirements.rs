//! What building and testing need, and how to tell that it is there.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use crate::toolchain::Toolchain;
use crate::{host, shell};

/// A thing that is needed.
#[derive(Clone, Debug)]
pub(crate) struct Check {
    pub(crate) what: String,
    /// What was found.
    pub(crate) state: State,
}

#[derive(Clone, Debug)]
pub(crate) enum State {
    Found(String),
    Missing { fix: String },
}

/// A program of a Debian package.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tool {
    pub(crate) package: &'static str,
    probe: Probe,
    /// Service that the package would start at boot.
    pub(crate) unit: Option<&'static str>,
}

#[derive(Clone, Copy, Debug)]
enum Probe {
    Program(&'static str),
    File(&'static str),
}

/// What tests and the demo run.
pub(crate) const TOOLS: [Tool; 19] = [
    Tool::program("iproute2", "ip"),
    Tool::program("bpftool", "bpftool"),
    Tool::program("curl", "curl"),
    Tool::program("dnsperf", "dnsperf"),
    Tool::program("ethtool", "ethtool"),
    Tool::program("haproxy", "haproxy").service("haproxy"),
    Tool::program("iperf3", "iperf3"),
    Tool::program("iptables", "iptables"),
    Tool::program("jq", "jq"),
    Tool::program("knot", "knotd").service("knot"),
    Tool::program("knot-dnsutils", "kdig"),
    Tool::program("mount", "mount"),
    Tool::program("nftables", "nft"),
    Tool::program("nginx-light", "nginx").service("nginx"),
    Tool::program("redis-server", "redis-server").service("redis-server"),
    Tool::program("redis-tools", "redis-cli"),
    Tool::program("tcpdump", "tcpdump"),
    Tool::program("wrk", "wrk"),
    Tool::file("containernetworking-plugins", "/usr/lib/cni/bridge"),
];

impl Tool {
    const fn program(package: &'static str, program: &'static str) -> Self {
        Self { package, probe: Probe::Program(program), unit: None }
    }

    const fn file(package: &'static str, file: &'static str) -> Self {
        Self { package, probe: Probe::File(file), unit: None }
    }

    const fn service(self, unit: &'static str) -> Self {
        Self { unit: Some(unit), ..self }
    }

    pub(crate) fn is_installed(&self) -> bool {
        match self.probe {
            Probe::Program(program) => shell::find(program).is_some(),
            Probe::File(file) => Path::new(file).exists(),
        }
    }
}

/// Everything that building and testing need.
pub(crate) fn checks() -> Result<Vec<Check>> {
    let toolchain = Toolchain::select();
    let mut checks = vec![compiler(&toolchain), linker(&toolchain)];
    checks.extend(TOOLS.iter().map(|tool| {
        let Tool { package, .. } = tool;
        Check::new(*package, tool.is_installed(), "", &format!("apt-get install {package}"))
    }));
    checks.push(Check::new(
        "BPF file system",
        host::has_bpffs()?,
        host::BPFFS,
        &format!("mount -t bpf bpf {}", host::BPFFS),
    ));
    Ok(checks)
}

/// The linker for this compiler, if it is there and runs.
pub(crate) fn working_linker(toolchain: &Toolchain) -> Result<Option<PathBuf>> {
    // It is linked to a shared LLVM, which an upgrade can take away.
    Ok(toolchain.linker()?.filter(|linker| shell::succeeds(Command::new(linker).arg("--version"))))
}

fn compiler(toolchain: &Result<Option<Toolchain>>) -> Check {
    let what = "compiler for BPF".to_owned();
    let state = match toolchain {
        Ok(Some(toolchain)) => {
            State::Found(format!("{}, LLVM {}, in {}", toolchain.version, toolchain.llvm, toolchain.sysroot.display()))
        }
        Ok(None) => State::Missing {
            fix: "cargo xtask setup; or rustup toolchain install nightly --component rust-src".to_owned(),
        },
        Err(error) => State::Missing { fix: format!("{error:#}") },
    };
    Check { what, state }
}

fn linker(toolchain: &Result<Option<Toolchain>>) -> Check {
    let what = "bpf-linker".to_owned();
    let state = match toolchain {
        Ok(Some(toolchain)) => match working_linker(toolchain) {
            Ok(Some(linker)) => State::Found(linker.display().to_string()),
            Ok(None) => State::Missing { fix: format!("cargo xtask setup (builds it for LLVM {})", toolchain.llvm) },
            Err(error) => State::Missing { fix: format!("{error:#}") },
        },
        _ => State::Missing { fix: "first the compiler, then cargo xtask setup".to_owned() },
    };
    Check { what, state }
}

impl Check {
    pub(crate) fn new(what: impl Into<String>, ok: bool, found: &str, fix: &str) -> Self {
        let state = if ok { State::Found(found.to_owned()) } else { State::Missing { fix: fix.to_owned() } };
        Self { what: what.into(), state }
    }

    pub(crate) fn is_missing(&self) -> bool {
        matches!(self.state, State::Missing { .. })
    }
}
