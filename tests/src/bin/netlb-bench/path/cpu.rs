//! CPU time of a measurement.
//!
//! The kernel handles packets in the time of whichever program runs at that moment. On a core of its own that is the client, a server
//! or the proxy, all of which are in the control group, or the core's ksoftirqd, which takes over when there is much to do.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use netlb_integration::cgroup;

/// Reads the time that was used so far.
#[derive(Debug)]
pub(super) struct Meter {
    cgroup: PathBuf,
    ksoftirqd: PathBuf,
}

impl Meter {
    pub(super) fn new(cgroup: &Path, core: usize) -> Result<Self> {
        let name = format!("ksoftirqd/{core}");
        for entry in fs::read_dir("/proc")? {
            let dir = entry?.path();
            if fs::read_to_string(dir.join("comm")).is_ok_and(|comm| comm.trim() == name) {
                return Ok(Self { cgroup: cgroup.to_owned(), ksoftirqd: dir.join("schedstat") });
            }
        }
        anyhow::bail!("there is no {name}")
    }

    pub(super) fn read(&self) -> Result<Duration> {
        Ok(cgroup::cpu_time(&self.cgroup)? + run_time(&self.ksoftirqd)?)
    }
}

/// The first field of a `schedstat`: nanoseconds on a core.
pub(crate) fn run_time(schedstat: &Path) -> Result<Duration> {
    let text = fs::read_to_string(schedstat).with_context(|| format!("failed to read {}", schedstat.display()))?;
    let nanos = text.split_whitespace().next().context("an empty schedstat")?;
    Ok(Duration::from_nanos(nanos.parse()?))
}
