//! The suites: what is in them, and how cargo runs them.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::shell;

/// Tests that need the same things and run together. In the order in which they run.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Suite {
    Unit,
    Miri,
    Packet,
    Namespace,
}

/// What a run is about.
#[derive(Debug, Eq, PartialEq)]
pub(crate) struct Selection {
    pub(crate) suites: Vec<Suite>,
    /// Test targets of `tests/tests`.
    targets: Vec<String>,
    /// Text that a test's name contains.
    pub(crate) filter: Option<String>,
}

/// A call of `cargo test`.
#[derive(Debug)]
pub(crate) struct Invocation {
    /// The test target, where there is just one.
    pub(crate) target: Option<String>,
    pub(crate) command: Command,
}

/// Whether Miri can run.
#[derive(Debug)]
pub(crate) enum Miri {
    Installed,
    /// With what is to be done about it.
    Missing(String),
}

impl Suite {
    const ALL: [Self; 4] = [Self::Unit, Self::Miri, Self::Packet, Self::Namespace];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Unit => "unit",
            Self::Miri => "miri",
            Self::Packet => "packet",
            Self::Namespace => "namespace",
        }
    }

    pub(crate) fn description(self) -> &'static str {
        match self {
            Self::Unit => "what can be tested without a kernel",
            Self::Miri => "netlb-common under Miri",
            Self::Packet => "frames through the BPF programs, without a network",
            Self::Namespace => "real programs in network namespaces",
        }
    }

    /// Whether the suite loads BPF programs.
    pub(crate) fn runs_programs(self) -> bool {
        matches!(self, Self::Packet | Self::Namespace)
    }

    /// The suite of a test target in `tests/tests`.
    fn of(target: &str) -> Option<Self> {
        if target.starts_with("packet") {
            Some(Self::Packet)
        } else if target.starts_with("ns_") {
            Some(Self::Namespace)
        } else {
            None
        }
    }

    /// The calls that run the suite.
    pub(crate) fn invocations(self, selection: &Selection, namespace_threads: u16) -> Vec<Invocation> {
        let threads = if self == Self::Namespace { namespace_threads } else { PACKET_THREADS };
        let mut invocations = match self {
            Self::Unit => vec![
                Invocation { target: None, command: test(&["-p", "netlb-common", "-p", "netlb", "-p", "xtask"]) },
                Invocation { target: None, command: test(&["-p", "netlb-integration", "--lib", "--bins"]) },
            ],
            Self::Miri => vec![Invocation { target: None, command: miri() }],
            Self::Packet | Self::Namespace => {
                let targets = Vec::from_iter(self.targets(selection));
                if targets.is_empty() {
                    return Vec::new();
                }
                let mut command = test(&["-p", "netlb-integration"]);
                command.args(targets.iter().flat_map(|target| ["--test", target]));
                let target = <[&str; 1]>::try_from(targets).ok().map(|[target]| target.to_owned());
                vec![Invocation { target, command }]
            }
        };
        for Invocation { command, .. } in &mut invocations {
            command.arg("--").args(&selection.filter);
            if self.runs_programs() {
                command.arg(format!("--test-threads={threads}"));
            }
        }
        invocations
    }

    /// As `invocations`, but one for each test target, so that its name can be shown.
    pub(crate) fn listing(self, selection: &Selection, namespace_threads: u16) -> Vec<Invocation> {
        if !self.runs_programs() {
            return self.invocations(selection, namespace_threads);
        }
        let targets = self.targets(selection).map(|target| Selection {
            suites: vec![self],
            targets: vec![target.to_owned()],
            filter: selection.filter.clone(),
        });
        targets.flat_map(|one| self.invocations(&one, namespace_threads)).collect()
    }

    fn targets(self, selection: &Selection) -> impl Iterator<Item = &str> {
        selection.targets.iter().map(String::as_str).filter(move |target| Self::of(target) == Some(self))
    }
}

impl Selection {
    /// What `only` means, given the test targets there are: a suite, a target, or a part of tests' names.
    pub(crate) fn new(only: Option<&str>, targets: &[String]) -> Self {
        let everything = Self { suites: Suite::ALL.to_vec(), targets: targets.to_vec(), filter: None };
        let Some(only) = only else { return everything };
        if let Some(&suite) = Suite::ALL.iter().find(|suite| suite.name() == only) {
            return Self { suites: vec![suite], ..everything };
        }
        if targets.iter().any(|target| target == only)
            && let Some(suite) = Suite::of(only)
        {
            return Self { suites: vec![suite], targets: vec![only.to_owned()], filter: None };
        }
        Self { filter: Some(only.to_owned()), ..everything }
    }
}

impl Miri {
    pub(crate) fn look() -> Result<Self> {
        const FIX: &str = "rustup toolchain install nightly --component miri,rust-src";
        let runs = shell::succeeds(Command::new("rustup").args(["run", "nightly", "cargo", "miri", "--version"]));
        if !runs {
            return Ok(Self::Missing(FIX.to_owned()));
        }
        let sysroot = shell::output(Command::new("rustup").args(["run", "nightly", "rustc", "--print", "sysroot"]))?;
        let sources = Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core/Cargo.toml");
        Ok(if sources.exists() { Self::Installed } else { Self::Missing(FIX.to_owned()) })
    }
}

/// The test targets in `tests/tests` that belong to a suite, sorted by name.
pub(crate) fn test_targets() -> Result<Vec<String>> {
    let dir = shell::workspace().join("tests/tests");
    if !dir.exists() {
        return Ok(Vec::new());
    }
    let mut targets = Vec::new();
    for entry in fs::read_dir(&dir).with_context(|| format!("failed to read {}", dir.display()))? {
        let path = entry.with_context(|| format!("failed to read {}", dir.display()))?.path();
        let is_target = path.join("main.rs").exists() || path.extension().is_some_and(|extension| extension == "rs");
        if is_target && let Some(name) = path.file_stem().and_then(|name| name.to_str()) {
            targets.push(name.to_owned());
        }
    }
    targets.retain(|target| Suite::of(target).is_some());
    targets.sort();
    Ok(targets)
}

/// Loading programs and sending frames through them takes little time, most of it in the kernel.
const PACKET_THREADS: u16 = 2;

fn test(packages: &[&str]) -> Command {
    shell::cargo(["test", "--no-fail-fast"].iter().chain(packages))
}

fn miri() -> Command {
    let mut miri = Command::new("rustup");
    miri.args(["run", "nightly", "cargo", "miri", "test", "--no-fail-fast", "-p", "netlb-common"]);
    // proptest asks for the directory it runs in. Under Miri, a case costs a thousand times what it costs otherwise.
    miri.env("MIRIFLAGS", "-Zmiri-disable-isolation").env("PROPTEST_CASES", "8");
    miri.current_dir(shell::workspace());
    miri
}

#[cfg(test)]
mod tests {
    use super::*;

    fn targets() -> Vec<String> {
        ["ns_cli", "packet_tcp", "packet_udp"].map(str::to_owned).to_vec()
    }

    #[test]
    fn without_a_name_everything_runs() {
        let selection = Selection::new(None, &targets());
        assert_eq!(selection, Selection { suites: Suite::ALL.to_vec(), targets: targets(), filter: None });
    }

    #[test]
    fn a_suite_runs_with_all_its_targets() {
        let selection = Selection::new(Some("packet"), &targets());
        assert_eq!(selection.suites, [Suite::Packet]);
        assert_eq!(selection.filter, None);
        assert_eq!(Vec::from_iter(Suite::Packet.targets(&selection)), ["packet_tcp", "packet_udp"]);
    }

    #[test]
    fn a_target_runs_alone() {
        let selection = Selection::new(Some("packet_udp"), &targets());
        assert_eq!(
            selection,
            Selection { suites: vec![Suite::Packet], targets: vec!["packet_udp".to_owned()], filter: None }
        );
    }

    #[test]
    fn any_other_name_is_looked_for_in_all_suites() {
        let selection = Selection::new(Some("syn_to_a_vip"), &targets());
        assert_eq!(selection.suites, Suite::ALL);
        assert_eq!(selection.filter.as_deref(), Some("syn_to_a_vip"));
    }

    #[test]
    fn cargo_gets_the_targets_the_filter_and_the_threads() {
        let selection =
            Selection { suites: vec![Suite::Namespace], targets: targets(), filter: Some("dns".to_owned()) };
        let [invocation] = <[Invocation; 1]>::try_from(Suite::Namespace.invocations(&selection, 4)).expect("one call");
        let args = Vec::from_iter(invocation.command.get_args());
        assert_eq!(
            args,
            ["test", "--no-fail-fast", "-p", "netlb-integration", "--test", "ns_cli", "--", "dns", "--test-threads=4"]
        );
    }

    #[test]
    fn a_suite_without_targets_calls_nothing() {
        let selection = Selection::new(Some("namespace"), &[]);
        assert!(Suite::Namespace.invocations(&selection, 2).is_empty());
    }
}
