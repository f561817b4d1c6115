//! What services cost before the first packet: loading them, changing one of them, keeping them.

mod change;
mod load;
mod status;

use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use netlb_integration::daemon::{Config, Forwarding, Netlb};
use netlb_integration::topology::{Layout, Plan};

use self::change::{Bystander, Times};
use self::status::{Status, cpu_time, resident};
use crate::notes::note;
use crate::path::peers::netlb_config;
use crate::path::services::others;
use crate::report::{ControlRow, Goal};
use crate::{Options, Scale};

const NETLB: &str = "netlb";
const LOAD: &str = "load";
const SEEN_P99: &str = "change seen by new flows, p99";
const MAPS: &str = "kernel memory without the flow table";
const FLOW: &str = "flow table, per connection at design load";
const IDLE: &str = "CPU while idle, per second";
/// Backends of each service.
const BACKENDS: u32 = 10;
/// Connections the flow table is made for; what the configuration has when it says nothing.
const DESIGN_LOAD: u32 = 300_000;
/// The number of services that changes and idleness are measured at.
const USUAL: u32 = 10_000;

/// How much is measured.
struct Extent {
    sizes: &'static [u32],
    /// Numbers of services that peers are loaded with, and how long that may take.
    peers: &'static [u32],
    limit: Duration,
    changes: u32,
    idle: Duration,
}

/// Shows that everything runs.
const SMOKE: Extent =
    Extent { sizes: &[100], peers: &[100], limit: Duration::from_secs(5), changes: 10, idle: Duration::ZERO };

const QUICK: Extent = Extent {
    sizes: &[1000, USUAL],
    peers: &[1000],
    limit: Duration::from_secs(5),
    changes: 200,
    idle: Duration::from_secs(5),
};

const FULL: Extent = Extent {
    sizes: &[1000, USUAL, 100_000],
    peers: &[1000, USUAL],
    limit: Duration::from_secs(40),
    changes: 1000,
    idle: Duration::from_secs(20),
};

pub(crate) fn run(options: &Options) -> Result<Vec<ControlRow>> {
    let extent = match options.scale {
        Scale::Smoke => &SMOKE,
        Scale::Quick => &QUICK,
        Scale::Full => &FULL,
    };
    let mut rows = Vec::new();
    for &services in extent.sizes {
        match netlb_rows(extent, services) {
            Ok(found) => rows.extend(found),
            Err(error) if options.scale == Scale::Smoke => return Err(error),
            // What was found so far is not to be lost.
            Err(error) => note(format_args!("control, {services} services: not measured: {error:#}")),
        }
    }
    for &services in extent.peers {
        for peer in load::PEERS {
            rows.push(row(LOAD, services, peer.name, load::seconds(peer, services, extent.limit)?, None));
        }
    }
    Ok(rows)
}

/// What is hoped for, with what it came to.
pub(crate) fn goals(rows: &[ControlRow]) -> Vec<Goal> {
    type Column = fn(&ControlRow) -> Option<f64>;
    let (seconds, bytes, megabytes): (Column, Column, Column) =
        (|row| row.seconds, |row| Some((row.kernel_mb? * 1e6).round()), |row| row.kernel_mb);
    let wanted = [
        (LOAD, USUAL, "s", seconds, 1.0),
        (LOAD, 100_000, "s", seconds, 10.0),
        (SEEN_P99, USUAL, "s", seconds, 0.001),
        (MAPS, USUAL, "MB", megabytes, 60.0),
        (FLOW, USUAL, "bytes", bytes, 256.0),
        (IDLE, USUAL, "s", seconds, 0.001),
    ];
    let mut goals = Vec::new();
    for (measure, services, unit, column, limit) in wanted {
        let found = rows.iter().find(|row| row.peer == NETLB && row.measure == measure && row.services == services);
        if let Some(figure) = found.and_then(column) {
            goals.push(Goal {
                what: format!("{measure}, {services} services × {BACKENDS}, {unit}"),
                figure: Some(figure),
                at_most: limit,
            });
        }
    }
    goals
}

fn netlb_rows(extent: &Extent, services: u32) -> Result<Vec<ControlRow>> {
    let bed = Plan::new(Layout::Ptp).build()?;
    let bystander = Bystander::new(&bed)?;
    let config = netlb_config(Config::new(bed.node_a(), Forwarding::Fast), &others(services, BACKENDS));
    let begin = Instant::now();
    let netlb = Netlb::start(bed.node_a(), &config.extra(&limits(services)))?;
    let loaded = begin.elapsed();
    let Status { load_seconds, kernel_mb, flow_table_mb } = Status::of(&netlb, services)?;
    note(format_args!(
        "control, {services} services: netlb answers after {loaded:.3?}, of which the data plane took {load_seconds:.3} s"
    ));
    let row = |measure: &str, seconds, kernel_mb| row(measure, services, NETLB, seconds, kernel_mb);
    let mut rows = vec![
        row(LOAD, Some(loaded.as_secs_f64()), None),
        row("kernel memory", None, Some(kernel_mb)),
        row(MAPS, None, Some(kernel_mb - flow_table_mb)),
        row(FLOW, None, Some(flow_table_mb / f64::from(DESIGN_LOAD))),
        row("memory of the daemon, without its maps", None, Some(resident(netlb.pid())?)),
    ];
    if services <= USUAL {
        let Times { calls, seen } = bystander.watch(&netlb, extent.changes)?;
        for (measure, time) in [
            ("API call for one change, p50", calls.percentile(50)),
            ("API call for one change, p99", calls.percentile(99)),
            ("change seen by new flows, p50", seen.percentile(50)),
            (SEEN_P99, seen.percentile(99)),
        ] {
            rows.push(row(measure, Some(time.as_secs_f64()), None));
        }
    }
    if services == USUAL {
        let before = cpu_time(netlb.pid())?;
        thread::sleep(extent.idle);
        let used = cpu_time(netlb.pid())?.saturating_sub(before);
        rows.push(row(IDLE, Some(used.as_secs_f64() / extent.idle.as_secs_f64()), None));
    }
    Ok(rows)
}

/// Tables that hold this many services; those of the default hold ten thousand.
fn limits(services: u32) -> String {
    let mut limits = format!("\n[limits]\nflows = {DESIGN_LOAD}\n");
    if services > USUAL {
        // With a ring of 1021 slots for ten backends, in lines of 32; the measured service is one more.
        let (backends, slots) = (services * (BACKENDS + 1), services * 1056);
        limits += &format!("services = {}\nbackends = {backends}\nring_slots = {slots}\n", services + 1000);
    }
    limits
}

fn row(measure: &str, services: u32, peer: &str, seconds: Option<f64>, kernel_mb: Option<f64>) -> ControlRow {
    let (measure, peer) = (measure.to_owned(), peer.to_owned());
    ControlRow { measure, services, backends: BACKENDS, peer, seconds, kernel_mb }
}
