//! What the demo does while its load runs, and what share of the requests each backend is due.
//!
//! The phases' lengths are chosen so that every backend, also the one added late and those drained or removed, is due nearly the same
//! number of requests over the whole run: 23 to 27 % each. So the totals can be read without knowing the phases, and a backend more
//! than 20 % away from an equal share is a fault of the balancing.

use std::net::SocketAddr;
use std::time::Duration;

use netlb_integration::load::Tally;

/// Backends in the order they come, by the number in their names less one.
#[cfg(test)]
const BACKENDS: usize = 4;

/// What is done to a backend, given by its index.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Change {
    Add(usize),
    Drain(usize),
    Activate(usize),
    Remove(usize),
}

/// A part of the run; its changes are made before the first of its requests.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Phase {
    pub title: &'static str,
    pub percent: u32,
    pub changes: &'static [Change],
    /// Backends that take new connections.
    pub active: &'static [usize],
}

pub(crate) const PHASES: [Phase; 5] = [
    Phase { title: "three backends", percent: 10, changes: &[], active: &[0, 1, 2] },
    Phase { title: "backend-2 is drained", percent: 15, changes: &[Change::Drain(1)], active: &[0, 2] },
    Phase {
        title: "backend-2 is back, backend-4 is added",
        percent: 50,
        changes: &[Change::Activate(1), Change::Add(3)],
        active: &[0, 1, 2, 3],
    },
    Phase { title: "backend-1 is removed", percent: 10, changes: &[Change::Remove(0)], active: &[1, 2, 3] },
    Phase { title: "backend-3 is drained", percent: 15, changes: &[Change::Drain(2)], active: &[1, 3] },
];

/// When a phase ends, counted from the beginning of the load.
pub(crate) fn end_of(phase: usize, duration: Duration) -> Duration {
    duration * PHASES.iter().take(phase + 1).map(|phase| phase.percent).sum::<u32>() / 100
}

/// What came of all requests of a run.
#[derive(Debug)]
pub(crate) struct Totals {
    pub phases: Vec<Tally>,
    /// Requests begun while changes were made.
    pub changing: Tally,
    pub all: Tally,
}

impl Totals {
    /// From tallies of phases with one of changes between each two.
    pub(crate) fn of(tallies: &[Tally]) -> Self {
        let sum = |first: usize, step: usize| {
            tallies.iter().skip(first).step_by(step).fold(Tally::default(), |mut sum, tally| {
                sum.add(tally);
                sum
            })
        };
        Self { phases: tallies.iter().step_by(2).cloned().collect(), changing: sum(1, 2), all: sum(0, 1) }
    }

    /// How far a backend is off the requests it was due in the phases, which go in equal parts to the backends active in each.
    pub(crate) fn off(&self, backend: usize, addr: SocketAddr) -> f64 {
        let due: f64 = PHASES
            .iter()
            .zip(&self.phases)
            .filter(|(phase, _)| phase.active.contains(&backend))
            .map(|(phase, tally)| tally.by_backend.values().sum::<u64>() as f64 / phase.active.len() as f64)
            .sum();
        let had: u64 = self.phases.iter().map(|tally| tally.of(addr)).sum();
        had as f64 / due.max(1.0) - 1.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_phases_make_up_the_whole_run() {
        let duration = Duration::from_secs(20);
        assert_eq!(end_of(PHASES.len() - 1, duration), duration);
    }

    #[test]
    fn each_phases_active_backends_follow_from_the_changes() {
        let mut active = vec![0, 1, 2];
        for phase in PHASES {
            for change in phase.changes {
                match *change {
                    Change::Add(backend) | Change::Activate(backend) => active.push(backend),
                    Change::Drain(backend) | Change::Remove(backend) => active.retain(|&other| other != backend),
                }
            }
            active.sort_unstable();
            assert_eq!(phase.active, active, "{}", phase.title);
        }
    }

    #[test]
    fn at_a_steady_rate_every_backend_is_due_about_a_quarter() {
        for backend in 0..BACKENDS {
            let takes = PHASES.iter().filter(|phase| phase.active.contains(&backend));
            let percent: f64 = takes.map(|phase| f64::from(phase.percent) / phase.active.len() as f64).sum();
            assert!((percent / 25.0 - 1.0).abs() < 0.07, "backend {backend}: {percent} %");
        }
    }

    #[test]
    fn requests_during_changes_are_counted_apart_but_in_all() {
        let addrs: [SocketAddr; 3] = ["10.0.0.1:80", "10.0.0.2:80", "10.0.0.3:80"].map(|addr| addr.parse().unwrap());
        let tally = |counts: [u64; 3]| Tally {
            requests: counts.iter().sum(),
            by_backend: addrs.into_iter().zip(counts).collect(),
            ..Tally::default()
        };
        let totals = Totals::of(&[tally([110, 100, 90]), tally([0, 7, 0]), tally([100, 0, 100])]);
        assert_eq!((totals.all.requests, totals.changing.requests), (507, 7));
        assert!((totals.off(0, addrs[0]) - 0.05).abs() < 1e-9, "210 of 200");
        assert!(totals.off(1, addrs[1]).abs() < 1e-9, "100 of 100; the 7 are nobody's due");
    }
}
