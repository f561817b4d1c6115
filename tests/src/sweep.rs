//! Removal of what runs left behind.
//!
//! Everything is found by name, so nothing has to be written down while a run goes: namespaces, cgroups and bpffs directories carry the
//! run's id, and its processes are those inside its namespaces and cgroups.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::cgroup;
use crate::exec::{Cmd, wait_until};
use crate::run::{RUNS, RunId};

const NAMESPACES: &str = "/run/netns";
const BPFFS: &str = "/sys/fs/bpf";

/// What was removed, in words.
#[derive(Debug, Default)]
pub struct Removed {
    pub what: Vec<String>,
}

/// Removes what runs left whose process is gone, except what was meant to be kept.
pub fn remove_dead_runs() -> Result<Removed> {
    let mut removed = Removed::default();
    for run in runs()? {
        if !run.is_alive() && !run.is_kept() {
            removed.what.extend(remove(run)?.what);
        }
    }
    Ok(removed)
}

/// The runs whose testbeds were kept.
pub fn kept_runs() -> Result<Vec<RunId>> {
    Ok(runs()?.into_iter().filter(|run| !run.is_alive() && run.is_kept()).collect())
}

/// Removes all of one run: its processes first, since they hold the rest.
pub fn remove(run: RunId) -> Result<Removed> {
    let mut removed = Removed::default();
    let namespaces = named(NAMESPACES, run)?;
    for namespace in &namespaces {
        for process in kill_processes(namespace)? {
            removed.what.push(format!("process {process}"));
        }
    }
    for cgroup in cgroups(run)? {
        cgroup::remove(&cgroup)?;
        removed.what.push(format!("cgroup {}", cgroup.display()));
    }
    for namespace in &namespaces {
        delete_namespace(namespace)?;
        removed.what.push(format!("namespace {}", file_name(namespace)));
    }
    for dir in named(BPFFS, run)?.into_iter().chain([run.dir()]) {
        match fs::remove_dir_all(&dir) {
            Ok(()) => removed.what.push(format!("directory {}", dir.display())),
            // A guardian may be at the same work.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).with_context(|| format!("failed to remove {}", dir.display())),
        }
    }
    Ok(removed)
}

/// Ends the processes inside a namespace and waits until they are gone.
pub(crate) fn kill_processes(namespace: &Path) -> Result<Vec<String>> {
    let mut killed = BTreeSet::new();
    wait_until(&format!("the end of the processes in {}", namespace.display()), Duration::from_secs(10), || {
        let alive = processes_in(namespace)?;
        for &pid in &alive {
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            killed.insert(format!("{pid} ({})", name.trim()));
            // It may be gone by now, which is as good.
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        Ok(alive.is_empty().then_some(()))
    })?;
    Ok(killed.into_iter().collect())
}

/// Takes away a namespace's name; the kernel removes it, and its interfaces, with its last user.
pub(crate) fn delete_namespace(namespace: &Path) -> Result<()> {
    let deleted = Cmd::new("ip").args(["netns", "delete", file_name(namespace)]).run()?;
    if !deleted.status.success() && namespace.exists() {
        bail!("{deleted}");
    }
    Ok(())
}

fn runs() -> Result<BTreeSet<RunId>> {
    let mut runs = BTreeSet::new();
    let cgroups = cgroup::mount_point()?;
    for dir in [RUNS, NAMESPACES, BPFFS].map(Path::new).into_iter().chain(cgroups.as_deref()) {
        runs.extend(entries(dir)?.iter().filter_map(|path| RunId::from_name(file_name(path))));
    }
    Ok(runs)
}

fn cgroups(run: RunId) -> Result<Vec<PathBuf>> {
    cgroup::mount_point()?.map_or_else(|| Ok(Vec::new()), |root| named(root, run))
}

fn named(dir: impl AsRef<Path>, run: RunId) -> Result<Vec<PathBuf>> {
    Ok(entries(dir)?.into_iter().filter(|path| RunId::from_name(file_name(path)) == Some(run)).collect())
}

fn entries(dir: impl AsRef<Path>) -> Result<Vec<PathBuf>> {
    let dir = dir.as_ref();
    match fs::read_dir(dir) {
        Ok(entries) => entries.map(|entry| Ok(entry?.path())).collect(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error).with_context(|| format!("failed to list {}", dir.display())),
    }
}

fn file_name(path: &Path) -> &str {
    path.file_name().and_then(|name| name.to_str()).unwrap_or_default()
}

fn processes_in(namespace: &Path) -> Result<Vec<i32>> {
    // A name without a mount is what is left when a run was killed between the two steps of making a namespace.
    let Ok(wanted) = fs::metadata(namespace) else { return Ok(Vec::new()) };
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        // Fails for processes that ended meanwhile and for those that wait to be reaped.
        let Ok(its) = fs::metadata(format!("/proc/{pid}/ns/net")) else { continue };
        if its.dev() == wanted.dev() && its.ino() == wanted.ino() && pid != std::process::id().cast_signed() {
            found.push(pid);
        }
    }
    Ok(found)
}
