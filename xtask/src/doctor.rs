//! `cargo xtask doctor`: the same checks as `setup`, and the kernel's, as a table.

use std::path::Path;

use anyhow::{Result, ensure};

use crate::requirements::{self, Check, State};
use crate::{host, ui};

/// The oldest kernel netlb is written for.
const KERNEL: (u32, u32) = (5, 15);

/// Show what this machine has and lacks
#[derive(Debug, clap::Args)]
pub(crate) struct Doctor {}

impl Doctor {
    pub(crate) fn run(self) -> Result<()> {
        let mut checks = requirements::checks()?;
        checks.extend(machine()?);
        let missing = checks.iter().filter(|check| check.is_missing()).count();
        ui::table(&Vec::from_iter(checks.into_iter().map(|Check { what, state }| match state {
            State::Found(found) => ["ok".to_owned(), what, found],
            State::Missing { fix } => ["missing".to_owned(), what, fix],
        })));
        ensure!(missing == 0, "{missing} missing");
        Ok(())
    }
}

fn machine() -> Result<Vec<Check>> {
    let (release, version) = host::kernel()?;
    let jit = match host::has_jit() {
        Some(_) => "on",
        None => "not told in this network namespace",
    };
    let cgroup = host::cgroup2()?;
    let at = cgroup.as_deref().map(Path::to_string_lossy).unwrap_or_default();
    Ok(vec![
        Check::new(
            "kernel",
            version.is_none_or(|version| version >= KERNEL),
            &release,
            &format!("this is {release}; netlb needs 5.15 or later, and 6.6 for TCX"),
        ),
        Check::new(
            "kernel BTF",
            Path::new("/sys/kernel/btf/vmlinux").exists(),
            "/sys/kernel/btf/vmlinux",
            "a kernel built with CONFIG_DEBUG_INFO_BTF=y",
        ),
        Check::new("BPF JIT", host::has_jit() != Some(false), jit, "sysctl net.core.bpf_jit_enable=1"),
        Check::new(
            "capabilities",
            host::may_load_programs()?,
            "may load and attach programs",
            "run as root; in a container, with CAP_NET_ADMIN and CAP_BPF, CAP_PERFMON or CAP_SYS_ADMIN",
        ),
        Check::new("cgroup v2", cgroup.is_some(), &at, "mount -t cgroup2 none /sys/fs/cgroup"),
    ])
}
