//! Control groups: the CPU time of several programs together.
//!
//! Version 2 accounts CPU time in every group, also where no controller is enabled in it and where version 1 has the controllers.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::exec::wait_until;
use crate::run::Run;

const END: Duration = Duration::from_secs(10);

/// A group of this run, removed on drop together with the processes in it.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    pub fn new(role: &str) -> Result<Self> {
        let run = Run::current()?;
        let root =
            root()?.context("no cgroup2 file system is mounted, which tells the CPU time of a group of programs")?;
        let path = root.join(format!("{}-{}-{role}", run.id(), run.next_number()));
        fs::create_dir(&path).with_context(|| format!("failed to create {}", path.display()))?;
        Ok(Self { path })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Moves a process into the group; children it has already stay where they are.
    pub fn add(&self, pid: u32) -> Result<()> {
        join(&self.path, &pid.to_string())
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // What cannot be removed here is left to the guardian and the next run's sweep.
        let _ = remove(&self.path);
    }
}

/// Moves the calling process into a group.
pub fn enter(path: &Path) -> Result<()> {
    join(path, "0")
}

/// The CPU time that processes used in a group, those that have ended included.
pub fn cpu_time(path: &Path) -> Result<Duration> {
    let file = path.join("cpu.stat");
    let text = fs::read_to_string(&file).with_context(|| format!("failed to read {}", file.display()))?;
    let usage = text.lines().find_map(|line| line.strip_prefix("usage_usec "));
    Ok(Duration::from_micros(usage.with_context(|| format!("no usage_usec in {}", file.display()))?.parse()?))
}

/// Where version 2 is mounted: below the version 1 controllers or instead of them.
pub(crate) fn root() -> Result<Option<PathBuf>> {
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    let mut mounts = mounts.lines().map(|line| line.split(' '));
    Ok(mounts.find_map(|mut words| {
        let path = words.nth(1)?;
        (words.next()? == "cgroup2").then(|| path.into())
    }))
}

/// Ends the processes of a group and removes it.
pub(crate) fn remove(path: &Path) -> Result<()> {
    // Linux 5.14; a group without it has no processes by now, unless something else failed.
    let _ = fs::write(path.join("cgroup.kill"), "1");
    wait_until(&format!("{} to be removed", path.display()), END, || {
        Ok((fs::remove_dir(path).is_ok() || !path.exists()).then_some(()))
    })
}

fn join(path: &Path, pid: &str) -> Result<()> {
    let procs = path.join("cgroup.procs");
    fs::write(&procs, pid).with_context(|| format!("failed to write {pid} to {}", procs.display()))
}
