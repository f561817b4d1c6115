//! The programs at the socket calls of processes, attached to a cgroup.

use std::{
    fs::{self, File},
    io,
    os::{fd::AsFd as _, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail, ensure};
use aya::{
    Ebpf,
    programs::{self, ProgramType},
    sys::{BpfHelper, is_helper_supported},
};
use netlb_common::maps::SocketSettings;
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, fstatfs};

use self::stale::Stale;
use super::{
    links::unpin,
    load::{self, Memory, Program},
    pins::Pins,
    syscall,
};
use crate::{config::SocketScope, dataplane::SocketsStatus};

mod diag;
mod stale;

/// A call of processes.
#[derive(Clone, Copy, Debug)]
struct Hook {
    name: &'static str,
    program: &'static str,
    /// `enum bpf_attach_type` in linux/bpf.h.
    attach_type: u32,
}

/// In the order they are attached in: what shows a process the service it named, and then what has to be shown.
const HOOKS: [Hook; 10] = [
    Hook { name: "recvmsg4", program: "netlb_recvmsg4", attach_type: 19 },
    Hook { name: "recvmsg6", program: "netlb_recvmsg6", attach_type: 20 },
    Hook { name: "getpeername4", program: "netlb_getpeername4", attach_type: 29 },
    Hook { name: "getpeername6", program: "netlb_getpeername6", attach_type: 30 },
    Hook { name: "connect4", program: "netlb_connect4", attach_type: 10 },
    Hook { name: "connect6", program: "netlb_connect6", attach_type: 11 },
    Hook { name: "sendmsg4", program: "netlb_sendmsg4", attach_type: 14 },
    Hook { name: "sendmsg6", program: "netlb_sendmsg6", attach_type: 15 },
    Hook { name: "post_bind4", program: "netlb_post_bind4", attach_type: 12 },
    Hook { name: "post_bind6", program: "netlb_post_bind6", attach_type: 13 },
];

/// The constants of the programs.
pub(super) fn settings(scope: SocketScope) -> io::Result<SocketSettings> {
    let chooses_errors = is_helper_supported(ProgramType::CgroupSockAddr, BpfHelper::BPF_FUNC_set_retval);
    let node = match (scope, syscall::namespace_cookie()) {
        (SocketScope::Node, cookie) => cookie?,
        // Where it is not known, services with source ranges and such are left to the packets' path.
        (_, cookie) => cookie.unwrap_or(0),
    };
    Ok(SocketSettings {
        namespace: if scope == SocketScope::Node { node } else { 0 },
        node,
        chooses_errors: u32::from(chooses_errors.unwrap_or(false)),
        pad: 0,
    })
}

/// The socket hooks.
pub(super) struct Sockets {
    pins: Pins,
    scope: SocketScope,
    /// What is to be attached; nothing where that cannot be.
    ready: Option<Ready>,
    attached: bool,
    warnings: Vec<String>,
}

/// Programs that are ready to be attached.
struct Ready {
    cgroup: Cgroup,
    programs: Programs,
    stale: Stale,
}

/// The programs, loaded.
pub(super) struct Programs(Vec<(Hook, Program)>);

/// Loads the programs. To be called while the object has all maps.
pub(super) fn load(ebpf: &mut Ebpf) -> anyhow::Result<Programs> {
    let mut programs = Vec::with_capacity(HOOKS.len());
    for hook in HOOKS {
        let name = hook.program;
        let program = ebpf.program_mut(name).with_context(|| format!("there is no BPF program {name}"))?;
        let loaded = match program {
            programs::Program::CgroupSockAddr(program) => program.load(),
            programs::Program::CgroupSock(program) => program.load(),
            _ => bail!("BPF program {name} is of an unexpected kind"),
        };
        loaded.map_err(|error| load::refused(name, error))?;
        programs.push((hook, Program::of(program.fd()?, program.info()?.id())?));
    }
    Ok(Programs(programs))
}

impl Sockets {
    pub(super) const fn new(pins: Pins, scope: SocketScope) -> Self {
        Self { pins, scope, ready: None, attached: false, warnings: Vec::new() }
    }

    /// Prepares what is wanted; `programs` is what became of loading them. Without them, packets are served all the same.
    pub(super) fn prepare(
        &mut self,
        programs: Option<anyhow::Result<Programs>>,
        memory: &Memory,
        cgroup: Option<&Path>,
    ) {
        if let Some(programs) = programs {
            match programs.and_then(|programs| Ready::new(programs, memory, cgroup, self.scope)) {
                Ok(ready) => self.ready = Some(ready),
                Err(error) => self.warn(&error),
            }
        }
    }

    /// Attaches the programs, or puts them in the place of those before them.
    pub(super) fn attach(&mut self) {
        let attached = self.ready.as_ref().map(|ready| ready.attach(&self.pins));
        self.attached = matches!(attached, Some(Ok(())));
        if let Some(Err(error)) = attached {
            self.warn(&error);
        }
        // Programs of a netlb before this one would serve what was.
        if !self.attached
            && let Err(error) = detach(&self.pins)
        {
            self.warn(&error.into());
        }
        self.check_connected();
    }

    /// To be called when backends may have ceased to serve.
    pub(super) fn check_connected(&self) {
        if let Some(ready) = self.ready.as_ref().filter(|_| self.attached) {
            ready.stale.check();
        }
    }

    pub(super) fn status(&self) -> Option<SocketsStatus> {
        let ready = self.ready.as_ref().filter(|_| self.attached)?;
        Some(SocketsStatus {
            scope: self.scope.name().to_owned(),
            cgroup: ready.cgroup.path.display().to_string(),
            hooks: ready.programs.0.iter().map(|(hook, _)| hook.name.to_owned()).collect(),
        })
    }

    pub(super) fn warnings(&self) -> Vec<String> {
        let stale = self.ready.as_ref().and_then(|ready| ready.stale.problem());
        self.warnings.iter().cloned().chain(stale).collect()
    }

    fn warn(&mut self, error: &anyhow::Error) {
        let warning = format!("the node's own processes do not reach services: {error:#}");
        tracing::warn!("{warning}");
        self.warnings.push(warning);
    }
}

impl Ready {
    fn new(programs: Programs, memory: &Memory, cgroup: Option<&Path>, scope: SocketScope) -> anyhow::Result<Self> {
        let cgroup = Cgroup::open(cgroup)?;
        Ok(Self { cgroup, programs, stale: Stale::new(memory, scope)? })
    }

    fn attach(&self, pins: &Pins) -> anyhow::Result<()> {
        for (hook, program) in &self.programs.0 {
            self.link(&pins.socket_link(hook.name), *hook, program)
                .with_context(|| format!("cannot attach {} to {}", hook.name, self.cgroup.path.display()))?;
        }
        Ok(())
    }

    fn link(&self, path: &Path, hook: Hook, program: &Program) -> io::Result<()> {
        match syscall::open_pin(path) {
            Ok(link) => {
                let info = syscall::link_info(link.as_fd())?;
                if info.cgroup() == self.cgroup.id {
                    if info.program != program.id {
                        syscall::update_link(link.as_fd(), program.fd.as_fd())?;
                    }
                    return Ok(());
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        // A link before this one is to another cgroup, or to none any more. Where the two overlap, both programs run for a moment: what the
        // first has exchanged is no service's to the second.
        let link = syscall::create_cgroup_link(program.fd.as_fd(), self.cgroup.directory.as_fd(), hook.attach_type)?;
        unpin(path)?;
        syscall::pin(link.as_fd(), path)
    }
}

/// Takes the programs off, those that exchange addresses first.
pub(super) fn detach(pins: &Pins) -> io::Result<()> {
    HOOKS.iter().rev().try_for_each(|hook| unpin(&pins.socket_link(hook.name)))
}

/// A cgroup of the second version.
struct Cgroup {
    path: PathBuf,
    directory: File,
    id: u64,
}

impl Cgroup {
    fn open(path: Option<&Path>) -> anyhow::Result<Self> {
        let path = match path {
            Some(path) => path.to_owned(),
            None => {
                let mounts = fs::read_to_string("/proc/self/mounts").context("cannot read /proc/self/mounts")?;
                mounted(&mounts).context("no cgroup v2 is mounted (`mount -t cgroup2 none /sys/fs/cgroup`)")?
            }
        };
        let directory = File::open(&path).with_context(|| format!("cannot open the cgroup {}", path.display()))?;
        let is_cgroup = fstatfs(&directory).is_ok_and(|found| found.filesystem_type() == CGROUP2_SUPER_MAGIC);
        ensure!(is_cgroup, "{} is not a cgroup of version 2", path.display());
        // A cgroup's id is its inode's number.
        let id = directory.metadata().with_context(|| format!("cannot look at {}", path.display()))?.ino();
        Ok(Self { path, directory, id })
    }
}

/// Where cgroup v2 is mounted, according to `/proc/self/mounts`.
fn mounted(mounts: &str) -> Option<PathBuf> {
    let mut lines = mounts.lines().map(|line| line.split(' ').skip(1));
    lines.find_map(|mut fields| {
        let path = fields.next()?;
        (fields.next()? == "cgroup2").then(|| PathBuf::from(path))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cgroup_v2_is_found_among_mounts() {
        let hybrid = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\ncgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n\
                      cgroup2 /sys/fs/cgroup/unified cgroup2 rw,relatime 0 0\n";
        assert_eq!(mounted(hybrid).unwrap(), Path::new("/sys/fs/cgroup/unified"));
        assert_eq!(mounted("cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n").unwrap(), Path::new("/sys/fs/cgroup"));
        assert_eq!(mounted("cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n"), None);
    }

    #[test]
    fn what_is_no_cgroup_is_refused_by_name() {
        let refused = |path: &str| Cgroup::open(Some(Path::new(path))).err().map(|error| format!("{error:#}"));
        assert_eq!(refused("/proc").unwrap(), "/proc is not a cgroup of version 2");
        assert!(refused("/nowhere").unwrap().starts_with("cannot open the cgroup /nowhere: "));
    }
}
