//! How new flows are shared out among backends.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use netlb::dataplane::FlowFilter;
use netlb::model::Algorithm;
use netlb_common::counters::Counter;
use netlb_integration::lab::{CASES, Case, Lab};
use netlb_integration::testing::TestResult;

const FLOWS: u16 = 4_000;
const ALGORITHMS: [Algorithm; 4] = [Algorithm::Maglev, Algorithm::Random, Algorithm::RoundRobin, Algorithm::LeastConn];

#[test]
fn weights_decide_the_shares() -> TestResult {
    let mut lab = Lab::fast()?;
    for algorithm in ALGORITHMS {
        for case in CASES {
            for weights in
                [&[(1, 1), (2, 1), (3, 1), (4, 1)][..], &[(1, 1), (2, 2), (3, 5)], &[(1, 1000), (2, 100)], &[(1, 7)]]
            {
                // The service before would be changed to this one, and its flows be known for another second.
                lab.begin([]);
                lab.begin([case.weighted(weights, algorithm)]);
                let counts = shares(&lab, case);
                let all: u64 = weights.iter().map(|(_, weight)| weight).sum();
                for (host, weight) in weights {
                    let count = counts.get(&case.backend(*host)).copied().unwrap_or_default();
                    let share = f64::from(FLOWS) * *weight as f64 / all as f64;
                    // Random choice spreads by the root of the share: six times that is never seen. The rings differ by a few percent.
                    let most = 6.0 * share.sqrt() + 0.03 * share;
                    assert!((count as f64 - share).abs() <= most, "{case}, {algorithm}, {weights:?}: {counts:?}");
                }
                assert_eq!(counts.values().sum::<u64>(), u64::from(FLOWS), "{case}, {algorithm}: {counts:?}");
                assert_eq!(lab.count(Counter::FlowsCreated), u64::from(FLOWS), "{case}, {algorithm}");
            }
        }
    }
    Ok(())
}

#[test]
fn rounds_are_even() -> TestResult {
    let mut lab = Lab::fast()?;
    for case in CASES {
        lab.begin([case.weighted(&[(1, 1), (2, 1), (3, 1), (4, 1), (5, 1)], Algorithm::RoundRobin)]);
        let counts = shares(&lab, case);
        let (least, most) = (counts.values().min().unwrap(), counts.values().max().unwrap());
        assert!(most - least <= 40, "{case}: {counts:?}");
    }
    Ok(())
}

#[test]
fn new_flows_go_to_the_less_busy_backend() -> TestResult {
    let mut lab = Lab::fast()?;
    for case in CASES {
        let service = |backends: &[(u8, u64)]| case.weighted(backends, Algorithm::LeastConn);
        let begin = |lab: &Lab, clients: std::ops::Range<u16>| {
            let mut counts = BTreeMap::<_, u32>::new();
            for port in clients {
                *counts.entry(lab.backend_of(&case.packet(case.client(port), case.vip(80)))).or_default() += 1;
            }
            [1, 2].map(|host| counts.get(&case.backend(host)).copied().unwrap_or_default())
        };
        lab.begin([service(&[(1, 1)])]);
        assert_eq!(begin(&lab, 1000..2000), [1000, 0], "{case}");
        lab.serve([service(&[(1, 1), (2, 1)])]);
        // Three of four, since one in four draws the first backend twice. By chance it would be half of them.
        let [_, second] = begin(&lab, 2000..2400);
        assert!((250..350).contains(&second), "{case}: {second} of 400");
        // What counts is who has flows now, not who had them.
        lab.harness.programmer_mut().flush_flows(&FlowFilter::default());
        lab.harness.programmer_mut().tick();
        let [first, second] = begin(&lab, 3000..3400);
        assert!(first.abs_diff(second) < 40, "{case}: {first} and {second}");
    }
    Ok(())
}

#[test]
fn by_source_hash_a_client_has_one_backend() -> TestResult {
    let mut lab = Lab::fast()?;
    for case in CASES {
        lab.begin([case.weighted(&[1, 2, 3, 4, 5].map(|host| (host, 1)), Algorithm::SourceHash)]);
        let mut seen = BTreeSet::new();
        for host in 1..=40 {
            let of = |port| {
                let client = SocketAddr::new(case.host(1, host), port);
                lab.backend_of(&case.packet(client, case.vip(80)))
            };
            let backend = of(40_000);
            assert!((40_001..40_010).all(|port| of(port) == backend), "{case}, {host}");
            seen.insert(backend);
        }
        assert_eq!(seen.len(), 5, "{case}: {seen:?}");
    }
    Ok(())
}

/// Every node sends a flow to the same backend, though each has a table with a key of its own.
#[test]
fn maglev_chooses_the_same_on_every_node() -> TestResult {
    let service = |case: Case| case.weighted(&[(1, 1), (2, 3), (3, 1), (4, 2), (5, 1)], Algorithm::Maglev);
    let chosen = |lab: &mut Lab, case: Case| {
        lab.begin([service(case)]);
        let clients = (1..=500).map(|port| case.client(port));
        Vec::from_iter(clients.map(|client| lab.backend_of(&case.packet(client, case.vip(80)))))
    };
    let (mut one, mut other) = (Lab::fast()?, Lab::stack()?);
    for case in CASES {
        assert_eq!(chosen(&mut one, case), chosen(&mut other, case), "{case}");
    }
    Ok(())
}

#[test]
fn maglev_moves_few_new_flows_when_a_backend_goes() -> TestResult {
    let mut lab = Lab::fast()?;
    for case in CASES {
        let all = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10];
        let chosen = |lab: &Lab| {
            let clients = (1..=2_000).map(|port| case.client(port));
            Vec::from_iter(clients.map(|client| lab.backend_of(&case.packet(client, case.vip(80)))))
        };
        lab.begin([case.service(&all)]);
        let before = chosen(&lab);
        lab.begin([case.service(&all[..9])]);
        let after = chosen(&lab);
        let moved = before.iter().zip(&after).filter(|(before, after)| before != after && **before != case.backend(10));
        let moved = moved.count();
        assert!(moved < 2_000 / 20, "{case}: {moved} of 2000 moved that need not");
    }
    Ok(())
}

/// New flows by backend.
fn shares(lab: &Lab, case: Case) -> BTreeMap<SocketAddr, u64> {
    let mut counts = BTreeMap::new();
    for port in 0..FLOWS {
        *counts.entry(lab.backend_of(&case.packet(case.client(20_000 + port), case.vip(80)))).or_default() += 1;
    }
    counts
}
