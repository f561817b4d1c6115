//! A run: one process that builds testbeds, and the name everything it makes carries.
//!
//! The name is `nl<pid>`; namespaces, bpffs directories and state directories start with it. The run's directory holds the start time
//! of the process, so that a later run can tell a dead run from one whose pid was given to another process.

use std::fs;
use std::path::{Path, PathBuf};
use std::process;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, anyhow};

use crate::guardian::Guardian;
use crate::sweep;

/// Where each run keeps its directory; on a tmpfs, so that a reboot leaves nothing.
pub const RUNS: &str = "/run/netlb-test";

/// File in a run's directory that says the run's testbed is to outlive it.
const KEPT: &str = "kept";
const START_TIME: &str = "start-time";

/// The run of this process.
#[derive(Debug)]
pub struct Run {
    id: RunId,
    next: AtomicU32,
    guardian: Guardian,
}

impl Run {
    /// The run of this process, begun at the first call: leftovers of dead runs are removed, and a guardian is started.
    pub fn current() -> Result<&'static Self> {
        static CURRENT: OnceLock<Result<Run, String>> = OnceLock::new();
        CURRENT
            .get_or_init(|| Self::begin().map_err(|error| format!("{error:#}")))
            .as_ref()
            .map_err(|error| anyhow!("failed to begin a run: {error}"))
    }

    fn begin() -> Result<Self> {
        let id = RunId::of(process::id());
        sweep::remove_dead_runs()?;
        let dir = id.dir();
        fs::create_dir_all(&dir).with_context(|| format!("failed to create {}", dir.display()))?;
        let start = start_time(id.pid).context("this process has no start time in /proc")?;
        fs::write(dir.join(START_TIME), start.to_string())?;
        Ok(Self { id, next: AtomicU32::new(0), guardian: Guardian::start(id)? })
    }

    pub fn id(&self) -> RunId {
        self.id
    }

    /// A number this run has not used yet.
    pub fn next_number(&self) -> u32 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    /// A new empty directory, removed with the run.
    pub fn new_dir(&self, what: &str) -> Result<PathBuf> {
        let dir = self.id.dir().join(format!("{}-{what}", self.next_number()));
        fs::create_dir_all(&dir).with_context(|| format!("failed to create {}", dir.display()))?;
        Ok(dir)
    }

    /// From now on nothing of this run is removed when the process ends; the sweep removes it only when asked by name.
    ///
    /// To be called before the first process of the testbed is started: those die with this process otherwise.
    pub fn keep(&self) -> Result<()> {
        fs::write(self.id.dir().join(KEPT), "")?;
        self.guardian.dismiss()
    }

    pub fn is_kept(&self) -> bool {
        self.id.is_kept()
    }
}

/// The id of a run: the pid of its process.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct RunId {
    pid: u32,
}

impl RunId {
    pub fn of(pid: u32) -> Self {
        Self { pid }
    }

    /// The run that made the object with this name, if a run did.
    pub fn from_name(name: &str) -> Option<Self> {
        let rest = name.strip_prefix("nl")?;
        let pid = rest.split_once('-').map_or(rest, |(pid, _)| pid);
        if pid.starts_with('0') || !pid.bytes().all(|byte| byte.is_ascii_digit()) {
            return None;
        }
        Some(Self { pid: pid.parse().ok()? })
    }

    pub fn pid(self) -> u32 {
        self.pid
    }

    pub fn dir(self) -> PathBuf {
        Path::new(RUNS).join(self.to_string())
    }

    pub fn is_kept(self) -> bool {
        self.dir().join(KEPT).exists()
    }

    /// Whether the run's process still lives.
    ///
    /// Between its first moment and the writing of its start time a run has only its pid to be known by.
    pub fn is_alive(self) -> bool {
        let Some(now) = start_time(self.pid) else { return false };
        fs::read_to_string(self.dir().join(START_TIME)).map_or(true, |then| then.is_empty() || then == now.to_string())
    }
}

impl std::fmt::Display for RunId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "nl{}", self.pid)
    }
}

/// When a process started, in clock ticks since boot; nothing for a process that is gone or only waits to be reaped.
fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the program's name in brackets, which may itself hold spaces and brackets (proc_pid_stat(5)).
    let mut fields = stat.get(stat.rfind(')')? + 1..)?.split_whitespace();
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok() // field 22; `state`, just taken, is field 3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_run_is_read_from_the_names_of_what_it_made_and_from_no_others() {
        for name in ["nl1234", "nl1234-0-client", "nl1234-bpf"] {
            assert_eq!(RunId::from_name(name), Some(RunId::of(1234)), "{name}");
        }
        for name in ["", "nl", "nl-", "nl12x-0", "nl+12", "nl0", "netlb", "blue"] {
            assert_eq!(RunId::from_name(name), None, "{name}");
        }
    }

    #[test]
    fn this_process_is_alive_and_a_pid_beyond_the_limit_is_not() {
        assert!(RunId::of(process::id()).is_alive());
        assert!(!RunId::of(u32::MAX).is_alive());
    }
}
