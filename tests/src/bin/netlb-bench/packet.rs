//! What netlb's programs take for a packet.
//!
//! Each program runs by `BPF_PROG_TEST_RUN` behind a harness program that makes every packet anew, of another flow. In the same rounds run
//! programs that do nothing: what they take is the floor, and what a program takes above it is its own. Programs take turns, so that
//! whatever else the machine does meets all of them.

mod bed;
mod cases;
mod goals;
mod harness;
mod measure;
#[cfg_attr(not(test), expect(dead_code, reason = "packets are made of plans by the harness programs and in tests"))]
#[path = "../../../../netlb-ebpf/src/bin/netlb-bench-bpf/plan.rs"]
mod plan;

use anyhow::{Context as _, Result};
use netlb_integration::lab;

use crate::report::PacketRow;
use crate::{Options, progress};

pub(crate) use goals::goals;

/// Measures all cases. Moves the calling thread into a network namespace.
pub(crate) fn run(options: &Options) -> Result<Vec<PacketRow>> {
    lab::make_network()?;
    let mut harness =
        harness::Harness::load(&options.harness).with_context(|| options.harness.display().to_string())?;
    let lru = std::fs::read(&options.lru).with_context(|| options.lru.display().to_string())?;
    let effort = if options.quick { measure::QUICK } else { measure::FULL };
    let mut rows = Vec::new();
    for group in cases::GROUPS {
        progress(format_args!("packets: {}", group.what));
        rows.extend(
            measure::group(&mut harness, &lru, group, effort).with_context(|| format!("packets: {}", group.what))?,
        );
    }
    Ok(rows)
}
