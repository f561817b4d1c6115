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

use anyhow::{Context as _, Result, ensure};

use self::peers::{Balancer, NETLB_FAST, PEERS, Peer};
use self::site::Site;
use self::workload::{Sample, Traffic, Work};
use crate::Options;
use crate::notes::note;
use crate::report::{Goal, PathRow};

const CONNECTIONS: &str = "new TCP connection";
const ROUND_TRIPS: &str = "TCP_RR";
const STREAM: &str = "TCP stream";
const UDP_FLOWS: &str = "new UDP flow";
/// Each of so many rounds has ports of its own for new UDP flows.
const MAX_ROUNDS: usize = 20;
const MIN_ROUNDS: usize = 3;

/// Something to measure.
#[derive(Debug)]
struct Measure {
    name: &'static str,
    traffic: Traffic,
    /// By the client outside, instead of the client pod.
    outside: bool,
    quick: bool,
    /// Operations of a sample, for an eighth of a second or so.
    operations: u64,
}

const MEASURES: &[Measure] = &[
    Measure { name: CONNECTIONS, traffic: Traffic::Connections, outside: false, quick: true, operations: 1200 },
    Measure { name: ROUND_TRIPS, traffic: Traffic::RoundTrips, outside: false, quick: true, operations: 6000 },
    Measure { name: STREAM, traffic: Traffic::Stream, outside: false, quick: true, operations: 120 },
    Measure { name: UDP_FLOWS, traffic: Traffic::UdpFlows, outside: false, quick: true, operations: 3000 },
    Measure { name: "UDP flood", traffic: Traffic::UdpFlood, outside: false, quick: true, operations: 400 },
    Measure {
        name: "new TCP connection from outside",
        traffic: Traffic::Connections,
        outside: true,
        quick: false,
        operations: 1200,
    },
    Measure {
        name: "UDP flood from outside",
        traffic: Traffic::UdpFlood,
        outside: true,
        quick: false,
        operations: 400,
    },
];

/// Measures all peers at all numbers of services.
pub(crate) fn run(options: &Options) -> Result<Vec<PathRow>> {
    let (sizes, budget): (&[u32], _) = if options.quick {
        (&[1, 1000], Duration::from_secs(104))
    } else {
        (&[1, 1000, 10_000], Duration::from_secs(840))
    };
    let begin = Instant::now();
    let mut rows = Vec::new();
    for (size, left) in sizes.iter().zip((1..=sizes.len() as u32).rev()) {
        // What a size does not use is there for the next ones, where there is more to set up.
        let deadline = Instant::now() + budget.saturating_sub(begin.elapsed()) / left;
        rows.extend(size_rows(options, *size, deadline)?);
    }
    Ok(rows)
}

/// What is hoped for, with what it came to.
pub(crate) fn goals(rows: &[PathRow]) -> Vec<Goal> {
    type Column = fn(&PathRow) -> Option<f64>;
    let (cpu, p50): (Column, Column) = (|row| row.cpu_ratio, |row| row.p50_ratio);
    let wanted = [
        (ROUND_TRIPS, "CPU", cpu, 0.92),
        (ROUND_TRIPS, "p50", p50, 0.92),
        (CONNECTIONS, "CPU", cpu, 0.97),
        (CONNECTIONS, "p50", p50, 0.97),
        (UDP_FLOWS, "CPU", cpu, 0.97),
        (STREAM, "CPU", cpu, 1.0),
    ];
    let mut goals = Vec::new();
    for (measure, what, column, limit) in wanted {
        let figures = rows.iter().filter(|row| row.peer == NETLB_FAST && row.measure == measure).filter_map(column);
        if let Some(figure) = figures.reduce(f64::max) {
            let name = format!("{measure}: {what} of {NETLB_FAST} against direct, at the worst number of services");
            goals.push(Goal { what: name, figure: Some(figure), at_most: limit });
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

fn size_rows(options: &Options, services: u32, deadline: Instant) -> Result<Vec<PathRow>> {
    let measures: Vec<_> = MEASURES.iter().filter(|measure| measure.quick || !options.quick).collect();
    let mut stands = Vec::new();
    for peer in PEERS.iter().filter(|peer| peer.quick || !options.quick) {
        let begin = Instant::now();
        match Stand::new(peer, services, measures.len()) {
            Ok(stand) => {
                note(format_args!("path, {services} services: {} is set up, {:.1?}", peer.name, begin.elapsed()));
                stands.push(stand);
            }
            Err(error) => note(format_args!("path, {services} services: {} is left out: {error:#}", peer.name)),
        }
    }
    ensure!(stands.first().is_some_and(|stand| stand.peer.name == PEERS[0].name), "nothing to compare with");
    let mut rounds = 0;
    let mut longest = Duration::ZERO;
    while rounds < MIN_ROUNDS || rounds < MAX_ROUNDS && Instant::now() + longest < deadline {
        let begin = Instant::now();
        for (index, measure) in measures.iter().enumerate() {
            let first = rounds % stands.len();
            for place in (first..stands.len()).chain(0..first) {
                stands[place].sample(index, measure, rounds)?;
            }
        }
        longest = longest.max(begin.elapsed());
        rounds += 1;
    }
    note(format_args!("path, {services} services: {rounds} rounds, {longest:.1?} each at most"));
    for stand in &stands {
        if let Err(error) = stand.balancer.check(stand.operations) {
            note(format_args!("path, {services} services: {} cannot be trusted: {error:#}", stand.peer.name));
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

impl Stand {
    fn new(peer: &'static Peer, services: u32, measures: usize) -> Result<Self> {
        let site = Site::new(workload::core()?)?;
        let balancer = peer.set_up(&site, &services::with_measured(services, &site.backends()))?;
        Ok(Self { balancer, site, peer, samples: vec![Vec::new(); measures], operations: 0 })
    }

    /// Takes a sample, or leaves a hole where it fails and says why.
    fn sample(&mut self, index: usize, measure: &Measure, round: usize) -> Result<()> {
        let Self { site, peer, .. } = self;
        if !peer.carries(measure.traffic) {
            return Ok(());
        }
        let warm_up = measure.operations / 20;
        let ports = usize::from(u16::MAX - 1024) / MAX_ROUNDS;
        let client = if measure.outside { site.bed.outside()? } else { site.client() };
        let work = Work {
            traffic: measure.traffic,
            operations: measure.operations,
            warm_up,
            client: client.name().to_owned(),
            targets: peer.targets(site),
            servers: site.servers(),
            first_port: u16::try_from(1024 + ports * (round % MAX_ROUNDS))?,
            cgroup: site.cgroup.path().to_owned(),
            core: site.core,
        };
        let sample = match work.run() {
            Ok(sample) => {
                self.operations += sample.operations;
                if sample.failures > 0 {
                    let (name, failures) = (peer.name, sample.failures);
                    note(format_args!("{name}, {}: {failures} of {} failed", measure.name, measure.operations));
                }
                Some(sample)
            }
            Err(error) => {
                note(format_args!("{}, {}: {error:#}", peer.name, measure.name));
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
fn median(figures: impl Iterator<Item = f64>) -> Option<f64> {
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
            rate_ratio: None,
        };
        let goals = goals(&[row(1, Some(0.8)), row(1000, Some(0.95)), row(10_000, None)]);
        assert_eq!(goals.len(), 1, "there is no p50 to judge");
        assert_eq!(goals[0].figure, Some(0.95));
    }
}
