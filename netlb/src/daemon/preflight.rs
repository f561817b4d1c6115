//! What the kernel will want, checked before anything is done: the capabilities, and a BPF file system.

use std::path::Path;

use anyhow::Context as _;
use nix::sys::statfs::{self, FsType};

use crate::exit::{ExitCode, Failure};

/// `BPF_FS_MAGIC`, linux/magic.h.
const BPF_FS: FsType = FsType(0xcafe_4a11);

/// Numbers from linux/capability.h.
const CAP_NET_ADMIN: u32 = 12;
const CAP_SYS_ADMIN: u32 = 21;
const CAP_PERFMON: u32 = 38;
const CAP_BPF: u32 = 39;

/// Refuses a process that could not load programs.
pub(super) fn check_capabilities() -> anyhow::Result<()> {
    let status = std::fs::read_to_string("/proc/self/status").context("cannot read /proc/self/status")?;
    let missing = missing_capabilities(&status).context("there is no CapEff in /proc/self/status")?;
    if missing.is_empty() {
        return Ok(());
    }
    let message = format!("missing {}", missing.join(" "));
    let hint = "run netlb as root, or give its unit AmbientCapabilities=CAP_BPF CAP_NET_ADMIN CAP_PERFMON";
    Err(Failure::new(ExitCode::Permission, message).with_hint(hint).into())
}

/// The capabilities the daemon needs that a `/proc/PID/status` lacks.
fn missing_capabilities(status: &str) -> Option<Vec<&'static str>> {
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    let effective = u64::from_str_radix(line.trim(), 16).ok()?;
    let has = |capability: u32| effective & (1 << capability) != 0;
    // CAP_SYS_ADMIN stands in for what was split from it (bpf_capable() and perfmon_capable() in the kernel).
    let needed = [
        ("CAP_BPF", has(CAP_BPF) || has(CAP_SYS_ADMIN)),
        ("CAP_NET_ADMIN", has(CAP_NET_ADMIN)),
        ("CAP_PERFMON", has(CAP_PERFMON) || has(CAP_SYS_ADMIN)),
    ];
    Some(needed.into_iter().filter_map(|(name, has)| (!has).then_some(name)).collect())
}

/// Refuses a directory for pins that is not on a BPF file system.
pub(super) fn check_bpffs(directory: &Path) -> anyhow::Result<()> {
    if is_on_bpffs(directory)? {
        return Ok(());
    }
    let message = format!("{} is not on a BPF file system", directory.display());
    Err(Failure::new(ExitCode::Failed, message).with_hint("mount -t bpf bpf /sys/fs/bpf").into())
}

/// Whether a directory, or the nearest one above it that exists, is on a BPF file system.
pub(crate) fn is_on_bpffs(directory: &Path) -> anyhow::Result<bool> {
    let existing = directory.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    let stats = statfs::statfs(existing).with_context(|| format!("cannot look at {}", existing.display()))?;
    Ok(stats.filesystem_type() == BPF_FS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_capabilities_are_named() {
        let missing = |effective: &str| missing_capabilities(&format!("Name:\tx\nCapEff:\t{effective}\nCapBnd:\t0\n"));
        assert_eq!(missing("000001ffffffffff").unwrap(), [""; 0]);
        assert_eq!(missing("0000000000000000").unwrap(), ["CAP_BPF", "CAP_NET_ADMIN", "CAP_PERFMON"]);
        assert_eq!(missing("0000008000001000").unwrap(), ["CAP_PERFMON"]);
        assert_eq!(missing("0000000000200000").unwrap(), ["CAP_NET_ADMIN"]);
        assert_eq!(missing_capabilities("nothing"), None);
    }

    #[test]
    fn a_directory_elsewhere_is_no_bpffs() {
        let directory = tempfile::tempdir().unwrap();
        let error = check_bpffs(&directory.path().join("not/there/yet")).unwrap_err();
        let failure = error.downcast_ref::<Failure>().unwrap();
        assert_eq!(failure.hint.as_deref(), Some("mount -t bpf bpf /sys/fs/bpf"));
    }
}
