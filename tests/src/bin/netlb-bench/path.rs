//! What a packet's way costs: several load balancers beside the same way without one.
//!
//! All peers of a size stand side by side, each in namespaces of its own, and take turns: A B C, then B C A. Each sample is divided by
//! the one of `direct` in the same round, and the median of the rounds is reported, because the machine is not the same from one minute
//! to the next. `direct again` shows what is left of that.

pub(crate) mod cpu;
pub(crate) mod haproxy;
pub(crate) mod iptables;
pub(crate) mod nftables;
pub(crate) mod peers;
pub(crate) mod services;
mod site;
pub(crate) mod workload;

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use netlb_integration::topology::Family;

use self::peers::{Balancer, DIRECT, NETLB_FAST, NETLB_SOCKET, PEERS, Peer};
use self::site::{Scene, Site};
use self::workload::{Sample, Traffic, Work};
use crate::notes::note;
use crate::report::{Goal, PathRow};
use crate::{Options, Scale};

const CONNECTIONS: &str = "new TCP connection";
const ROUND_TRIPS: &str = "TCP_RR";
const STREAM: &str = "TCP stream";
const UDP_FLOWS: &str = "new UDP flow";
/// Each of so many rounds has ports of its own for new UDP flows.
const MAX_ROUNDS: usize = 20;
const MIN_ROUNDS: usize = 3;

/// What is measured of peers that stand side by side.
#[derive(Debug)]
struct Stage {
    scene: Scene,
    /// Numbers of services.
    sizes: &'static [u32],
    quick_sizes: &'static [u32],
    /// Of the time there is, for each size.
    share: u32,
    measures: &'static [Measure],
}

/// Something to measure.
#[derive(Debug)]
struct Measure {
    name: &'static str,
    traffic: Traffic,
    family: Family,
    /// By the client outside, instead of the client pod.
    outside: bool,
    quick: bool,
    /// Operations of a sample, for an eighth of a second or so.
    operations: u64,
}

impl Measure {
    const fn new(name: &'static str, traffic: Traffic, operations: u64) -> Self {
        Self { name, traffic, family: Family::V4, outside: false, quick: true, operations }
    }

    const fn ipv6(self) -> Self {
        Self { family: Family::V6, ..self }
    }

    const fn outside(self) -> Self {
        Self { outside: true, ..self }
    }

    const fn full_only(self) -> Self {
        Self { quick: false, ..self }
    }
}

const STAGES: &[Stage] = &[
    Stage {
        scene: Scene::Near,
        sizes: &[1, 1000, 10_000],
        quick_sizes: &[1, 1000],
        share: 3,
        measures: &[
            Measure::new(CONNECTIONS, Traffic::Connections, 1200),
            Measure::new(ROUND_TRIPS, Traffic::RoundTrips, 6000),
            Measure::new(STREAM, Traffic::Stream, 120),
            Measure::new(UDP_FLOWS, Traffic::UdpFlows, 3000),
            Measure::new("UDP flood", Traffic::UdpFlood, 400),
            Measure::new("new TCP connection, IPv6", Traffic::Connections, 1200).ipv6().full_only(),
            Measure::new("TCP_RR, IPv6", Traffic::RoundTrips, 6000).ipv6(),
            Measure::new("new TCP connection, from outside", Traffic::Connections, 1200).outside().full_only(),
            Measure::new("UDP flood, from outside", Traffic::UdpFlood, 400).outside().full_only(),
        ],
    },
    Stage {
        scene: Scene::Far,
        sizes: &[1, 1000],
        quick_sizes: &[1],
        share: 1,
        measures: &[
            Measure::new("new TCP connection, by the uplink", Traffic::Connections, 800).outside(),
            Measure::new("TCP_RR, by the uplink", Traffic::RoundTrips, 4000).outside(),
            Measure::new("new UDP flow, by the uplink", Traffic::UdpFlows, 2000).outside(),
            Measure::new("UDP flood, by the uplink", Traffic::UdpFlood, 400).outside(),
        ],
    },
];

/// Measures that belong into one table.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scope(&'static Stage);

impl Scope {
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        STAGES.iter().map(Self)
    }

    pub(crate) fn what(self) -> &'static str {
        match self.0.scene {
            Scene::Near => "backends in pods of the node",
            Scene::Far => "clients outside and backends on another node",
        }
    }

    pub(crate) fn measures(self) -> impl Iterator<Item = &'static str> {
        self.0.measures.iter().map(|measure| measure.name)
    }

    pub(crate) fn has(self, measure: &str) -> bool {
        self.measures().any(|name| name == measure)
    }
}

/// Measures all peers at all numbers of services.
pub(crate) fn run(options: &Options) -> Result<Vec<PathRow>> {
    let budget = match options.scale {
        Scale::Smoke => Duration::ZERO,
        Scale::Quick => Duration::from_secs(95),
        Scale::Full => Duration::from_secs(780),
    };
    let sizes = |stage: &Stage| match options.scale {
        Scale::Smoke => &[1],
        Scale::Quick => stage.quick_sizes,
        Scale::Full => stage.sizes,
    };
    let all = Vec::from_iter(STAGES.iter().flat_map(|stage| sizes(stage).iter().map(move |size| (stage, *size))));
    let begin = Instant::now();
    let mut rows = Vec::new();
    for (index, (stage, size)) in all.iter().enumerate() {
        // What one does not use is there for the next ones.
        let shares: u32 = all[index..].iter().map(|(stage, _)| stage.share).sum();
        let deadline = Instant::now() + budget.saturating_sub(begin.elapsed()) * stage.share / shares;
        rows.extend(stage_rows(options, stage, *size, deadline)?);
    }
    Ok(rows)
}

/// What is hoped for, with what it came to.
pub(crate) fn goals(rows: &[PathRow]) -> Vec<Goal> {
    type Column = fn(&PathRow) -> Option<f64>;
    let (cpu, p50): (Column, Column) = (|row| row.cpu_ratio, |row| row.p50_ratio);
    let wanted = [
        (NETLB_FAST, ROUND_TRIPS, "CPU", cpu, 0.92),
        (NETLB_FAST, ROUND_TRIPS, "p50", p50, 0.92),
        (NETLB_FAST, CONNECTIONS, "CPU", cpu, 0.97),
        (NETLB_FAST, CONNECTIONS, "p50", p50, 0.97),
        (NETLB_FAST, UDP_FLOWS, "CPU", cpu, 0.97),
        (NETLB_FAST, STREAM, "CPU", cpu, 1.0),
        // Nothing is done for the packets of a socket, so this is the noise.
        (NETLB_SOCKET, ROUND_TRIPS, "CPU", cpu, 1.05),
        (NETLB_SOCKET, ROUND_TRIPS, "p50", p50, 1.05),
    ];
    let mut goals = Vec::new();
    for (peer, measure, what, column, at_most) in wanted {
        let figures = rows.iter().filter(|row| row.peer == peer && row.measure == measure).filter_map(column);
        if let Some(figure) = figures.reduce(f64::max) {
            let what = format!("{measure}: {what} of {peer} / direct, at the worst number of services");
            goals.push(Goal { what, figure: Some(figure), at_most });
        }
    }
    goals
}

/// A peer that is set up, and its samples so far: by measure, then by round.
struct Stand {
    // Dropped in this order: the balancer before its node.
    balancer: Balancer,
    site: Site,
    peer: &'static Peer,
    samples: Vec<Vec<Option<Sample>>>,
    operations: u64,
}

fn stage_rows(options: &Options, stage: &Stage, services: u32, deadline: Instant) -> Result<Vec<PathRow>> {
    let is_quick = options.scale == Scale::Quick;
    let measures = stage
        .measures
        .iter()
        .filter(|measure| (measure.quick || !is_quick) && services::has_family(services, measure.family));
    let measures = Vec::from_iter(measures);
    let mut stands = Vec::new();
    let takes_part = |peer: &&Peer| match options.scale {
        Scale::Smoke => peer.is_netlb() || peer.name == DIRECT,
        Scale::Quick => peer.quick,
        Scale::Full => true,
    };
    for peer in PEERS.iter().filter(|peer| peer.is_in(stage.scene)).filter(takes_part) {
        let begin = Instant::now();
        match Stand::new(options, peer, stage.scene, services, measures.len()) {
            Ok(stand) => {
                note(format_args!("path, {services} services: {} is set up, {:.1?}", peer.name, begin.elapsed()));
                stands.push(stand);
            }
            Err(error) => blame(options, format_args!("{} is left out: {error:#}", peer.name))?,
        }
    }
    ensure!(stands.first().is_some_and(|stand| stand.peer.name == DIRECT), "nothing to compare with");
    let least = if options.scale == Scale::Smoke { 1 } else { MIN_ROUNDS };
    let mut rounds = 0;
    let mut longest = Duration::ZERO;
    while rounds < least || rounds < MAX_ROUNDS && Instant::now() + longest < deadline {
        let begin = Instant::now();
        for (index, measure) in measures.iter().enumerate() {
            let first = rounds % stands.len();
            for place in (first..stands.len()).chain(0..first) {
                stands[place].sample(options, index, measure, rounds)?;
            }
        }
        longest = longest.max(begin.elapsed());
        rounds += 1;
    }
    note(format_args!("path, {services} services: {rounds} rounds, {longest:.1?} each at most"));
    for stand in &stands {
        if let Err(error) = stand.balancer.check(stand.operations) {
            blame(options, format_args!("{} cannot be trusted: {error:#}", stand.peer.name))?;
        }
    }
    let (direct, others) = stands.split_first().context("nothing was measured")?;
    let mut rows = Vec::new();
    for (index, measure) in measures.iter().enumerate() {
        note(direct.figures(index, measure, services));
        for stand in others.iter().filter(|stand| stand.peer.carries(measure.traffic)) {
            note(stand.figures(index, measure, services));
            rows.push(stand.row(index, measure, services, direct));
        }
    }
    Ok(rows)
}

/// Says what went wrong with a peer: no reason to stop measuring the others, but where the question is whether all can be measured.
fn blame(options: &Options, what: std::fmt::Arguments<'_>) -> Result<()> {
    if options.scale == Scale::Smoke {
        bail!("path: {what}");
    }
    note(format_args!("path: {what}"));
    Ok(())
}

impl Stand {
    fn new(options: &Options, peer: &'static Peer, scene: Scene, services: u32, measures: usize) -> Result<Self> {
        let site = Site::new(scene, workload::core()?, &options.harness)?;
        let balancer = peer.set_up(&site, &services::with_measured(services, |family| site.backends(family)))?;
        Ok(Self { balancer, site, peer, samples: vec![Vec::new(); measures], operations: 0 })
    }

    /// Takes a sample, or leaves a hole where it fails and says why.
    fn sample(&mut self, options: &Options, index: usize, measure: &Measure, round: usize) -> Result<()> {
        let Self { site, peer, .. } = self;
        if !peer.carries(measure.traffic) {
            return Ok(());
        }
        let operations = if options.scale == Scale::Smoke { measure.operations / 20 } else { measure.operations };
        let ports = usize::from(u16::MAX - 1024) / MAX_ROUNDS;
        let work = Work {
            traffic: measure.traffic,
            operations,
            warm_up: operations / 20,
            client: site.client(measure.outside)?.name().to_owned(),
            targets: peer.targets(site, measure.family),
            servers: site.servers(measure.family),
            first_port: u16::try_from(1024 + ports * (round % MAX_ROUNDS))?,
            cgroup: site.cgroup.path().to_owned(),
            core: site.core,
        };
        let sample = match work.run() {
            Ok(sample) => {
                self.operations += sample.operations;
                if sample.failures > 0 {
                    let (name, failures) = (peer.name, sample.failures);
                    let what = format_args!("{name}, {}: {failures} of {operations} failed", measure.name);
                    blame(options, what)?;
                }
                Some(sample)
            }
            Err(error) => {
                blame(options, format_args!("{}, {}: {error:#}", peer.name, measure.name))?;
                None
            }
        };
        self.samples[index].push(sample);
        Ok(())
    }

    fn row(&self, index: usize, measure: &Measure, services: u32, direct: &Self) -> PathRow {
        let ratio = |figure: fn(&Sample) -> f64| {
            let rounds = self.samples[index].iter().zip(&direct.samples[index]);
            median(rounds.filter_map(|(one, other)| Some(figure(one.as_ref()?) / figure(other.as_ref()?))))
        };
        PathRow {
            measure: measure.name.to_owned(),
            services,
            peer: self.peer.name.to_owned(),
            cpu_ratio: ratio(cpu_per_operation),
            p50_ratio: if measure.traffic.has_latency() { ratio(|sample| sample.p50) } else { None },
            p99_ratio: if measure.traffic.has_latency() { ratio(|sample| sample.p99) } else { None },
            rate_ratio: ratio(rate),
        }
    }

    /// The figures themselves, in one line.
    fn figures(&self, index: usize, measure: &Measure, services: u32) -> String {
        let figure =
            |figure: fn(&Sample) -> f64| median(self.samples[index].iter().flatten().map(figure)).unwrap_or(f64::NAN);
        let mut line = format!(
            "{:<32} {services:>6} {:<18} {:>8.2} µs CPU {:>9.0} /s",
            measure.name,
            self.peer.name,
            figure(cpu_per_operation) * 1e6,
            figure(rate)
        );
        if measure.traffic.has_latency() {
            let [p50, p99] = [figure(|sample| sample.p50), figure(|sample| sample.p99)].map(|seconds| seconds * 1e6);
            line += &format!("  p50 {p50:.1} µs  p99 {p99:.1} µs");
        }
        line
    }
}

fn cpu_per_operation(sample: &Sample) -> f64 {
    sample.cpu / sample.operations as f64
}

fn rate(sample: &Sample) -> f64 {
    sample.operations as f64 / sample.seconds
}

/// The middle of some figures; of an even number, the mean of the two in the middle.
pub(crate) fn median(figures: impl Iterator<Item = f64>) -> Option<f64> {
    let mut figures: Vec<_> = figures.collect();
    figures.sort_by(f64::total_cmp);
    let (below, above) = (figures.get(figures.len().checked_sub(1)? / 2)?, figures.get(figures.len() / 2)?);
    Some(f64::midpoint(*below, *above))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle_also_of_two_and_of_none() {
        assert_eq!(median([3.0, 1.0, 2.0].into_iter()), Some(2.0));
        assert_eq!(median([4.0, 1.0].into_iter()), Some(2.5));
        assert_eq!(median(std::iter::empty()), None);
    }

    #[test]
    fn a_goal_is_held_against_the_worst_number_of_services() {
        let row = |services, cpu_ratio| PathRow {
            measure: ROUND_TRIPS.to_owned(),
            services,
            peer: NETLB_FAST.to_owned(),
            cpu_ratio,
            p50_ratio: None,
            p99_ratio: None,
            rate_ratio: None,
        };
        let goals = goals(&[row(1, Some(0.8)), row(1000, Some(0.95)), row(10_000, None)]);
        assert_eq!(goals.len(), 1, "there is no p50 to judge");
        assert_eq!(goals[0].figure, Some(0.95));
    }
}
