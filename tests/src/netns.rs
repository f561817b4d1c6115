//! Network namespaces.
//!
//! They are made by name, as `ip netns` does, so that a person can look into them. They are entered by setns alone: `ip netns exec`
//! mounts a new /sys, which would hide /sys/fs/bpf.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;

use anyhow::{Context, Result};
use nix::sched::{CloneFlags, setns};

use crate::exec::Cmd;
use crate::run::Run;
use crate::sweep;

/// A namespace, removed on drop together with the processes in it.
#[derive(Debug)]
pub struct Namespace {
    name: String,
    handle: Handle,
}

impl Namespace {
    /// Makes a namespace called `nl<pid>-<bed>-<role>`, with its loopback interface up.
    pub fn new(bed: u32, role: &str) -> Result<Self> {
        let name = format!("{}-{bed}-{role}", Run::current()?.id());
        Cmd::new("ip").args(["netns", "add", &name]).run()?.success()?;
        let handle = Handle::open(&name)?;
        let namespace = Self { name, handle };
        // Addresses are usable at once, without duplicate address detection; nothing is learned from router advertisements.
        for (key, value) in [("accept_dad", "0"), ("accept_ra", "0"), ("router_solicitations", "0")] {
            namespace.sysctl(&format!("net/ipv6/conf/default/{key}"), value)?;
        }
        namespace.ip("link set lo up")?;
        Ok(namespace)
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// Runs `work` inside the namespace. A socket made there stays there, whichever thread uses it later.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        self.handle.enter(work).with_context(|| format!("failed to enter namespace {}", self.name))
    }

    /// A command that will run inside the namespace.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Cmd {
        Cmd::new(program).inside(self)
    }

    /// Runs lines of `ip` commands, without the leading `ip`, in order; stops at the first that fails.
    pub fn ip(&self, lines: &str) -> Result<()> {
        Cmd::new("ip").args(["-n", &self.name, "-batch", "-"]).input(lines).run()?.success()?;
        Ok(())
    }

    /// Sets a kernel parameter of the namespace; `key` is its path below /proc/sys.
    pub fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        let path = PathBuf::from("/proc/sys").join(key);
        self.enter(|| fs::write(&path, value))?.with_context(|| format!("failed to set {key} to {value}"))
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let path = path(&self.name);
        // What cannot be removed here is left to the guardian and the next run's sweep.
        let _ = sweep::kill_processes(&path);
        let _ = sweep::delete_namespace(&path);
    }
}

/// A way into a namespace that does not keep its name.
#[derive(Clone, Debug)]
pub struct Handle(Arc<File>);

impl Handle {
    /// The namespace with this name.
    pub fn open(name: &str) -> Result<Self> {
        let path = path(name);
        let file = File::open(&path).with_context(|| format!("failed to open {}", path.display()))?;
        Ok(Self(Arc::new(file)))
    }

    /// As [`Namespace::enter`].
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        thread::scope(|scope| {
            let inside = scope.spawn(|| self.enter_this_thread().map(|()| work()));
            inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Moves the calling thread into the namespace for the rest of its life.
    pub fn enter_this_thread(&self) -> io::Result<()> {
        setns(self.0.as_fd(), CloneFlags::CLONE_NEWNET).map_err(io::Error::from)
    }
}

fn path(name: &str) -> PathBuf {
    PathBuf::from("/run/netns").join(name)
}
