//! What this machine and its kernel are.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

/// Where netlb pins its maps and links.
pub(crate) const BPFFS: &str = "/sys/fs/bpf";

/// Whether the process has root's user id.
pub(crate) fn is_root() -> Result<bool> {
    let ids = status_field("Uid:")?;
    Ok(ids.split_whitespace().nth(1) == Some("0"))
}

/// Whether the process may load and attach programs.
pub(crate) fn may_load_programs() -> Result<bool> {
    const NET_ADMIN: u32 = 12;
    const SYS_ADMIN: u32 = 21;
    const PERFMON: u32 = 38;
    const BPF: u32 = 39;
    let effective = status_field("CapEff:")?;
    let effective = u64::from_str_radix(&effective, 16).with_context(|| format!("CapEff is `{effective}`"))?;
    let has = |capability: u32| effective >> capability & 1 == 1;
    Ok(has(NET_ADMIN) && (has(SYS_ADMIN) || has(BPF) && has(PERFMON)))
}

/// The running kernel: its name, and its version if that can be read from the name.
pub(crate) fn kernel() -> Result<(String, Option<(u32, u32)>)> {
    let release = read("/proc/sys/kernel/osrelease")?.trim().to_owned();
    let version = version(&release);
    Ok((release, version))
}

/// Whether the kernel compiles programs to machine code. `None` where it does not tell, as outside the first network namespace.
pub(crate) fn has_jit() -> Option<bool> {
    let value = fs::read_to_string("/proc/sys/net/core/bpf_jit_enable").ok()?;
    Some(value.trim() != "0")
}

/// Whether the BPF file system is where netlb expects it.
pub(crate) fn has_bpffs() -> Result<bool> {
    Ok(mounts(&read("/proc/self/mounts")?, "bpf").any(|path| path == Path::new(BPFFS)))
}

/// Where cgroup v2 is mounted.
pub(crate) fn cgroup2() -> Result<Option<PathBuf>> {
    Ok(mounts(&read("/proc/self/mounts")?, "cgroup2").next())
}

/// The places in `table` (as `/proc/self/mounts` has them) where a file system of this type is mounted.
fn mounts<'a>(table: &'a str, kind: &'a str) -> impl Iterator<Item = PathBuf> + 'a {
    table.lines().filter_map(move |line| {
        let mut fields = line.split(' ');
        let (_device, path, found) = (fields.next()?, fields.next()?, fields.next()?);
        // The kernel writes a space in a path as an octal escape.
        (found == kind).then(|| PathBuf::from(path.replace("\\040", " ")))
    })
}

fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

fn status_field(name: &str) -> Result<String> {
    let status = read("/proc/self/status")?;
    let value = status.lines().find_map(|line| line.strip_prefix(name));
    Ok(value.with_context(|| format!("/proc/self/status has no {name}"))?.trim().to_owned())
}

fn read(path: &str) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("failed to read {path}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_read_from_the_names_distributions_use() {
        for (release, expected) in [
            ("6.18.44", Some((6, 18))),
            ("5.15.0-91-generic", Some((5, 15))),
            ("6.1-custom", Some((6, 1))),
            ("6.18.44-fc-v657", Some((6, 18))),
            ("unknown", None),
            ("6", None),
        ] {
            assert_eq!(version(release), expected, "{release}");
        }
    }

    #[test]
    fn the_cgroup_mount_is_found_beside_those_of_version_1() {
        let table = "cgroup /sys/fs/cgroup/cpu cgroup rw 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\nbpf /a\\040b bpf rw 0 0\n";
        let at = |kind| Vec::from_iter(mounts(table, kind));
        assert_eq!(at("cgroup2"), [Path::new("/sys/fs/cgroup/unified")]);
        assert_eq!(at("bpf"), [Path::new("/a b")]);
        assert!(at("tracefs").is_empty());
    }
}
