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

use std::thread;

use anyhow::{Context as _, Result, bail};
use netlb_integration::exec::Cmd;
use netlb_integration::lab;

use crate::report::PacketRow;
use crate::{Options, Scale, progress};

pub(crate) use goals::goals;

pub(crate) fn case_names() -> impl Iterator<Item = &'static str> {
    cases::GROUPS.iter().flat_map(|group| group.sets).flat_map(|set| *set).map(|case| case.name)
}

/// Measures all cases, in a thread of its own, since that is in another network namespace.
pub(crate) fn run(options: &Options) -> Result<Vec<PacketRow>> {
    thread::scope(|scope| {
        let rows = scope.spawn(|| measure_all(options)).join();
        rows.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn measure_all(options: &Options) -> Result<Vec<PacketRow>> {
    lab::make_network()?;
    // The node has an address at its uplink, and a way to the world there.
    let lines = format!(
        "address add {}/24 dev clients\nroute add 198.18.0.0/15 via {} dev clients\n",
        cases::NODE,
        lab::CASES[0].host(1, 2)
    );
    Cmd::new("ip").args(["-batch", "-"]).input(lines).run()?.success()?;
    let mut harness =
        harness::Harness::load(&options.harness).with_context(|| options.harness.display().to_string())?;
    let lru = std::fs::read(&options.lru).with_context(|| options.lru.display().to_string())?;
    let effort = match options.scale {
        Scale::Smoke => measure::SMOKE,
        Scale::Quick => measure::QUICK,
        Scale::Full => measure::FULL,
    };
    let has_case = |name: &String| case_names().any(|case| case == name);
    let is_wanted = |case: &cases::Case| match &options.case {
        None => true,
        Some(name) if has_case(name) => case.name == name,
        Some(name) => case.name.contains(name.as_str()),
    };
    let mut rows = Vec::new();
    for group in cases::GROUPS {
        progress(format_args!("packets: {}", group.what));
        rows.extend(
            measure::group(&mut harness, &lru, group, is_wanted, effort)
                .with_context(|| format!("packets: {}", group.what))?,
        );
    }
    if let Some(name) = options.case.as_ref().filter(|_| rows.is_empty()) {
        bail!(
            "no case that is measured has {name:?} in its name; there are {}",
            Vec::from_iter(case_names()).join(", ")
        );
    }
    Ok(rows)
}
