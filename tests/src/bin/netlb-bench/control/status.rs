//! What the daemon, and the kernel about the daemon, say of what it takes.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use netlb::view::StatusView;
use netlb_integration::daemon::Netlb;

use crate::path::cpu::run_time;

/// What `netlb status` says of size.
#[derive(Clone, Copy, Debug)]
pub(super) struct Status {
    /// Seconds that loading the data plane took.
    pub(super) load_seconds: f64,
    pub(super) kernel_mb: f64,
    pub(super) flow_table_mb: f64,
}

impl Status {
    /// Asks a daemon that is to have all its services programmed.
    pub(super) fn of(netlb: &Netlb, services: u32) -> Result<Self> {
        let json = netlb.must(["status", "-o", "json"])?;
        let status: StatusView = serde_json::from_str(&json).with_context(|| format!("not a status: {json:?}"))?;
        let StatusView { services: have, out_of_sync, load_seconds, kernel_bytes, flow_table, .. } = status;
        ensure!(have == u64::from(services), "netlb has {have} services of {services}");
        ensure!(out_of_sync.is_empty(), "{} services are not programmed: {:?}", out_of_sync.len(), out_of_sync.first());
        let flow_table = flow_table.context("the status does not tell the flow table's size")?;
        Ok(Self { load_seconds, kernel_mb: kernel_bytes as f64 / 1e6, flow_table_mb: flow_table.bytes as f64 / 1e6 })
    }
}

/// Megabytes of a process's own memory. Maps it shares with the kernel are not among them: the kernel's figures have them.
pub(super) fn resident(pid: u32) -> Result<f64> {
    let text = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    let kib = line.and_then(|line| line.split_whitespace().next()).context("no RssAnon")?;
    Ok(kib.parse::<f64>()? * 1024.0 / 1e6)
}

/// CPU time of all threads of a process that live now.
pub(super) fn cpu_time(pid: u32) -> Result<Duration> {
    let tasks: PathBuf = Path::new("/proc").join(pid.to_string()).join("task");
    let mut sum = Duration::ZERO;
    for task in fs::read_dir(&tasks)? {
        sum += run_time(&task?.path().join("schedstat"))?;
    }
    Ok(sum)
}
