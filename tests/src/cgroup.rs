//! Control groups: the CPU time of several programs together, and processes whose calls netlb is to see.
//!
//! Version 2 accounts CPU time in every group, also where no controller is enabled in it and where version 1 has the controllers.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::exec::wait_until;
use crate::run::Run;

/// A child of the root of cgroup v2, removed on drop together with the processes in it. It is called as namespaces are, by the run.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    handle: Handle,
}

impl Cgroup {
    pub fn new(role: &str) -> Result<Self> {
        let run = Run::current()?;
        let root = mount_point()?.context("no cgroup v2 is mounted (`mount -t cgroup2 none /sys/fs/cgroup`)")?;
        let path = root.join(format!("{}-{}-{role}", run.id(), run.next_number()));
        fs::create_dir(&path).with_context(|| format!("failed to make the cgroup {}", path.display()))?;
        let processes = OpenOptions::new().write(true).open(path.join("cgroup.procs"))?;
        Ok(Self { path, handle: Handle(Arc::new(processes)) })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Moves a process into the group; children it has already stay where they are.
    pub fn add(&self, pid: u32) -> Result<()> {
        join(&self.path, &pid.to_string())
    }

    pub(crate) fn handle(&self) -> Handle {
        self.handle.clone()
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

/// A way into a cgroup.
#[derive(Clone, Debug)]
pub(crate) struct Handle(Arc<File>);

impl Handle {
    /// Moves the calling process into the cgroup. A system call and nothing else.
    pub(crate) fn enter(&self) -> io::Result<()> {
        io::Write::write_all(&mut &*self.0, b"0")
    }
}

/// Where cgroup v2 is mounted.
pub(crate) fn mount_point() -> Result<Option<PathBuf>> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("failed to read the mounts")?;
    let mut lines = mounts.lines().map(|line| line.split(' ').skip(1));
    Ok(lines.find_map(|mut fields| {
        let path = fields.next()?;
        (fields.next()? == "cgroup2").then(|| PathBuf::from(path))
    }))
}

/// Ends the processes in a cgroup and removes it.
pub(crate) fn remove(path: &Path) -> Result<()> {
    wait_until(&format!("the end of the processes in {}", path.display()), Duration::from_secs(10), || {
        match fs::read_to_string(path.join("cgroup.procs")) {
            Ok(processes) => {
                for process in processes.lines().filter_map(|line| line.parse().ok()) {
                    // It may be gone by now, which is as good.
                    let _ = kill(Pid::from_raw(process), Signal::SIGKILL);
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Some(())),
            Err(error) => return Err(error.into()),
        }
        match fs::remove_dir(path) {
            Ok(()) => Ok(Some(())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Some(())),
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => Ok(None),
            Err(error) => Err(error.into()),
        }
    })
}

fn join(path: &Path, pid: &str) -> Result<()> {
    let procs = path.join("cgroup.procs");
    fs::write(&procs, pid).with_context(|| format!("failed to write {pid} to {}", procs.display()))
}
