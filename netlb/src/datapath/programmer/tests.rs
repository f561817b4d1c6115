use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::IpAddr,
};

use netlb_common::maps::{Backend, NodePortKey, RangeKey, family};
use proptest::prelude::*;

use super::{
    memory::{MemoryMaps, Op, TIMEOUT, TestClock},
    *,
};
use crate::{
    dataplane::{FlowFilter, FlowService, ServiceStats},
    model::{self, Algorithm, BackendState, Definition, Mode, Owner, SnatMode, TrafficPolicy, Weight},
};

const ROOMY: Sizes = Sizes {
    services: 64,
    configs: 192,
    frontends: 129,
    numbers: 129,
    backends: 257,
    owners: 256,
    ring_slots: 1 << 16,
    members: 4096,
    addresses: 64,
    source_ranges: 64,
    affinities: 64,
    node_ports: 64,
    filter_bits_log2: 15,
};
const ACTIVE: u8 = Backend::SERVING | Backend::ACCEPTING;

struct Bench {
    programmer: Programmer<MemoryMaps>,
    clock: TestClock,
}

impl Bench {
    fn new() -> Self {
        Self::with(ROOMY)
    }

    fn with(sizes: Sizes) -> Self {
        let clock = TestClock::new();
        Self::over(MemoryMaps::new(sizes, clock.clone()), clock)
    }

    fn over(maps: MemoryMaps, clock: TestClock) -> Self {
        let reads = clock.clone();
        Self { programmer: Programmer::with_clock(maps, false, move || reads.now()).unwrap(), clock }
    }

    /// Another daemon takes over.
    fn restart(self) -> Self {
        Self::over(self.programmer.maps, self.clock)
    }

    fn apply(&mut self, desired: &[Desired]) -> ApplyReport {
        self.programmer.apply(desired)
    }

    /// Applies, and makes sure that the maps say just that.
    fn serve(&mut self, desired: &[Desired]) -> usize {
        let report = self.apply(desired);
        assert_eq!(report.failed, []);
        self.assert_serves(desired);
        report.changed
    }

    fn tick(&mut self, ticks: u32) {
        self.clock.advance(ticks);
        self.programmer.tick();
    }

    /// Until nothing waits that no flow names.
    fn rest(&mut self) {
        (0..4).for_each(|_| self.tick(60));
    }

    fn maps(&mut self) -> &mut MemoryMaps {
        &mut self.programmer.maps
    }

    fn begin_flow(&mut self, frontend: &str, client: u16) -> Option<u32> {
        self.programmer.maps.begin_flow(&key(frontend), client)
    }

    /// But for what is said of addresses.
    fn log(&self) -> Vec<Op> {
        let mut log = self.programmer.maps.take_log();
        log.retain(|op| !matches!(op, Op::Address(..) | Op::RemoveAddress(_)));
        log
    }

    fn stats(&self, service: &str) -> ServiceStats {
        self.programmer.stats(&[service]).pop().unwrap()
    }

    fn used(&self, map: &str) -> u64 {
        self.programmer.map_usage().into_iter().find(|(name, ..)| *name == map).unwrap().1
    }

    fn config(&self, frontend: &str) -> Config {
        self.programmer.maps.in_force(&key(frontend)).unwrap()
    }

    /// The number of a backend of a service.
    fn backend(&self, service: &str, backend: &str) -> u32 {
        let index = self.programmer.names[service];
        self.programmer.services.get(index).unwrap().backends[&key(&format!("{backend}/tcp"))]
    }

    fn flags(&self, id: u32) -> u8 {
        self.programmer.maps.backend(id).flags
    }

    fn assert_serves(&self, desired: &[Desired]) {
        let mut wanted = HashSet::new();
        for desired in desired {
            let served = self.expected(&desired.service);
            wanted.extend(
                served.iter().map(|(frontend, scope, _)| EndpointKey { scope: *scope, ..frontend_key(frontend) }),
            );
        }
        assert_eq!(self.programmer.maps.services.keys().copied().collect::<HashSet<_>>(), wanted);
        desired.iter().for_each(|desired| self.assert_served(&desired.service));
    }

    /// The entries that a service is to have, with their rules.
    fn expected(&self, service: &Service) -> Vec<(Frontend, u8, resolve::Rule)> {
        let entry = self.programmer.services.get(self.programmer.names[service.name()]).unwrap();
        let frontends = resolve::frontends(service, &self.programmer.node).into_iter();
        let frontends = frontends.filter(|known| entry.held.iter().all(|held| held.frontend != known.frontend));
        let entries = frontends.flat_map(|known| {
            let outside = known.outside.map(|rule| (known.frontend, EndpointKey::OUTSIDE, rule));
            [Some((known.frontend, 0, known.inside)), outside].into_iter().flatten()
        });
        entries.collect()
    }

    fn assert_served(&self, service: &Service) {
        let maps = &self.programmer.maps;
        let entry = self.programmer.services.get(self.programmer.names[service.name()]).unwrap();
        let resolved = Resolved::new(service, &self.programmer.node);
        let expected = self.expected(service);
        for (frontend, scope, rule) in &expected {
            let key = EndpointKey { scope: *scope, ..frontend_key(frontend) };
            let set: Vec<_> = resolved.set(rule.set).iter().map(|backend| (*backend).clone()).collect();
            let members = Members::of(&set);
            let addresses: Vec<_> = members.addresses().collect();
            let ring: Vec<_> =
                members.ring(service.algorithm()).iter().map(|slot| addresses[usize::from(*slot)]).collect();
            let config = maps.in_force(&key).unwrap_or_else(|| panic!("{frontend} is not served"));
            assert_eq!(config.flags & SNATS, snat_flags(rule.snat), "{frontend}");
            let slots = maps.slots(&config);
            let got: Vec<_> = slots.iter().map(|backend| socket_address(backend.addr, backend.port)).collect();
            assert_eq!(got, ring, "{frontend}");
            for backend in &set {
                let id = entry.backends[&endpoint_key(backend.address, key.protocol)];
                assert_eq!(self.flags(id) & ACTIVE, ACTIVE, "{}", backend.address);
            }
        }
        for backend in service.backends().iter().filter(|backend| backend.state == BackendState::Draining) {
            for key in expected.iter().map(|(frontend, ..)| endpoint_key(backend.address, frontend.protocol.number())) {
                let serving = if backend.conditions.serving { Backend::SERVING } else { 0 };
                assert_eq!(self.flags(entry.backends[&key]) & ACTIVE, serving, "{}", backend.address);
            }
        }
    }

    /// Nothing is left of anything.
    fn assert_empty(&self) {
        let used: Vec<_> = self.programmer.map_usage().into_iter().filter(|(_, used, _)| *used != 0).collect();
        assert_eq!(used, []);
        assert_eq!(self.programmer.services.len(), 0);
        assert_eq!(self.programmer.filter.words(15), vec![0; 512]);
        assert_eq!((self.programmer.maps.addresses.len(), self.programmer.maps.ranges.len()), (0, 0));
        assert!(self.programmer.contested.is_empty());
        assert_eq!(self.programmer.maps.owners.len(), 0);
        assert!(self.programmer.names.is_empty());
    }
}

fn key(frontend: &str) -> EndpointKey {
    frontend_key(&frontend.parse().unwrap())
}

/// Backends are `ADDRESS:PORT`, with `*WEIGHT` or ` draining` after it.
fn service(name: &str, frontends: &[&str], backends: &[&str]) -> Desired {
    with_algorithm(name, frontends, backends, Algorithm::Maglev)
}

fn with_algorithm(name: &str, frontends: &[&str], backends: &[&str], algorithm: Algorithm) -> Desired {
    let backend = |text: &&str| {
        let (text, state) = match text.strip_suffix(" draining") {
            Some(text) => (text, BackendState::Draining),
            None => (*text, BackendState::Active),
        };
        let (address, weight) = text.split_once('*').unwrap_or((text, "1"));
        let weight = Weight::new(weight.parse().unwrap()).unwrap();
        model::Backend { weight, state, ..model::Backend::new(address.parse().unwrap()) }
    };
    let frontends = frontends.iter().map(|frontend| frontend.parse().unwrap()).collect();
    let backends = backends.iter().map(backend).collect();
    let service = Service::new(Some(name.to_owned()), frontends, backends, algorithm).unwrap();
    Desired { service: service.into(), owner: Owner::Api }
}

fn with_snat(desired: Desired, snat: SnatMode) -> Desired {
    let service = (*desired.service).clone().with_snat(snat);
    Desired { service: service.into(), ..desired }
}

const SNATS: u32 = Config::SNAT_NEVER | Config::SNAT_PODS | Config::SNAT_OUTSIDE;

const fn snat_flags(snat: resolve::Snat) -> u32 {
    match snat {
        resolve::Snat::Auto => 0,
        resolve::Snat::Never => Config::SNAT_NEVER,
        resolve::Snat::Always { pods: false, outside: true } => Config::SNAT_OUTSIDE,
        resolve::Snat::Always { pods: true, outside: true } => Config::SNAT_PODS | Config::SNAT_OUTSIDE,
        resolve::Snat::Always { .. } => panic!("nobody asks for it"),
    }
}

const WEB: &str = "10.96.0.10:80/tcp";
const DNS: &str = "10.96.0.53:53/udp";
const A: &str = "10.244.0.1:8080";
const B: &str = "10.244.0.2:8080";
const C: &str = "10.244.0.3:8080";

fn web(backends: &[&str]) -> Desired {
    service("web", &[WEB], backends)
}

fn position(log: &[Op], op: impl Fn(&Op) -> bool) -> usize {
    log.iter().position(op).unwrap_or_else(|| panic!("not in {log:?}"))
}

#[test]
fn services_are_added_changed_and_removed() {
    let mut bench = Bench::new();
    let v6 = service("six", &["[fd00::10]:80/tcp"], &["[fd00::1]:8080", "[fd00::2]:8080"]);
    let dns = service("dns", &[DNS, "10.96.0.53:53/tcp"], &["10.244.0.1:53"]);
    assert_eq!(bench.serve(&[web(&[A, B]), v6.clone(), dns.clone()]), 3);
    assert_eq!(bench.serve(&[web(&[A, B]), v6.clone(), dns.clone()]), 0);
    assert_eq!(bench.serve(&[web(&[A, "10.244.0.2:8080*3", C]), dns.clone(), v6.clone()]), 1);
    assert_eq!(bench.serve(&[v6]), 2);
    assert_eq!(bench.serve(&[]), 1);
    bench.rest();
    bench.assert_empty();
}

#[test]
fn what_is_not_touched_is_left_alone() {
    let mut bench = Bench::new();
    let other = service("other", &[DNS], &[C]);
    bench.serve(&[web(&[A, B]), other.clone()]);
    let before = bench.config(DNS);
    let touch = |wanted: Option<Desired>| [Touched { name: "web".to_owned(), wanted }];
    let report = bench.programmer.apply_touched(&touch(Some(web(&[A]))));
    assert_eq!((report.changed, report.failed), (1, vec![]));
    bench.assert_serves(&[web(&[A]), other.clone()]);
    assert_eq!(bench.programmer.apply_touched(&touch(None)).changed, 1);
    assert_eq!(bench.programmer.apply_touched(&touch(None)).changed, 0);
    bench.assert_serves(&[other]);
    assert_eq!(bench.config(DNS), before);
}

#[test]
fn nothing_is_written_where_nothing_changes() {
    let mut bench = Bench::new();
    bench.serve(&[web(&[A, B]), service("other", &[DNS], &[C])]);
    bench.log();
    bench.serve(&[service("other", &[DNS], &[C]), web(&[B, A])]);
    assert_eq!(bench.log(), []);
}

#[test]
fn a_change_is_whole_before_it_is_in_force() {
    let mut bench = Bench::new();
    bench.serve(&[web(&[A, B])]);
    let (a, b) = (bench.backend("web", A), bench.backend("web", B));
    bench.log();
    bench.serve(&[web(&[A, C])]);
    let log = bench.log();
    let c = bench.backend("web", C);
    let order = [
        position(&log, |op| *op == Op::Backend(c)),
        position(&log, |op| matches!(op, Op::Ring(_))),
        position(&log, |op| matches!(op, Op::Members(_))),
        position(&log, |op| matches!(op, Op::Config(_))),
        position(&log, |op| matches!(op, Op::Owners(_))),
        position(&log, |op| *op == Op::Service(key(WEB))),
        position(&log, |op| *op == Op::Flags(b, 0)),
    ];
    assert!(order.is_sorted(), "{log:?}");
    assert!(!log.iter().any(|op| matches!(op, Op::Flags(id, _) | Op::Backend(id) if *id == a)), "{log:?}");
    assert_eq!(log.iter().filter(|op| matches!(op, Op::Service(_) | Op::RemoveService(_))).count(), 1);
}

#[test]
fn a_change_of_snat_alone_is_a_new_record_put_in_force() {
    let mut bench = Bench::new();
    bench.serve(&[web(&[A, B])]);
    assert_eq!(bench.config(WEB).flags, 0);
    for (snat, flags) in
        [(SnatMode::Always, Config::SNAT_OUTSIDE), (SnatMode::Never, Config::SNAT_NEVER), (SnatMode::Auto, 0)]
    {
        let before = bench.config(WEB);
        bench.log();
        assert_eq!(bench.serve(&[with_snat(web(&[A, B]), snat)]), 1);
        let log = bench.log();
        let [Op::Config(_), Op::Service(of)] = log[..] else { panic!("{snat}: {log:?}") };
        assert_eq!(of, key(WEB));
        let config = bench.config(WEB);
        assert_eq!(config, Config { flags, generation: config.generation, ..before }, "{snat}");
        assert_ne!(config.generation, before.generation, "{snat}");
    }
}

#[test]
fn a_removed_service_is_out_of_force_before_its_backends_are() {
    let mut bench = Bench::new();
    bench.serve(&[web(&[A])]);
    bench.log();
    bench.serve(&[]);
    let log = bench.log();
    assert!(matches!(log[..], [Op::RemoveService(_), Op::Flags(_, 0)]), "{log:?}");
}

#[test]
fn old_records_are_reused_only_after_a_grace_period() {
    let mut bench = Bench::new();
    bench.serve(&[web(&[A])]);
    let first = bench.config(WEB);
    bench.serve(&[web(&[A, B])]);
    bench.serve(&[web(&[A, B, C])]);
    assert_eq!(bench.used("CONFIGS"), 3);
    assert!(!bench.log().contains(&Op::Grace), "which nobody waits for while there is room");
    bench.tick(1);
    assert_eq!(bench.log(), [Op::Grace]);
    assert_eq!(bench.used("CONFIGS"), 1);
    bench.serve(&[web(&[B])]);
    assert_eq!(bench.config(WEB).ring, first.ring, "the region is used again");
    bench.tick(1);
    bench.tick(1);
    assert_eq!(bench.log().iter().filter(|op| **op == Op::Grace).count(), 1, "and only where something waits");
}

#[test]
fn a_service_without_backends_has_no_ring() {
    let mut bench = Bench::new();
    bench.serve(&[web(&[])]);
    let config = bench.config(WEB);
    assert_eq!((config.ring_len, config.members_len), (0, 0));
    bench.serve(&[web(&["10.244.0.1:8080 draining"])]);
    assert_eq!((bench.config(WEB), bench.used("RINGS")), (config, 0));
    bench.serve(&[web(&[A])]);
    assert_eq!(bench.config(WEB).ring_len, 251);
}

#[test]
fn a_draining_backend_keeps_its_flows_and_gets_no_new_ones() {
    let mut bench = Bench::new();
    bench.serve(&[web(&[A, B])]);
    let a = bench.backend("web", A);
    bench.log();
    bench.serve(&[web(&["10.244.0.1:8080 draining", B])]);
    let log = bench.log();
    assert_eq!(bench.flags(a), Backend::SERVING);
    assert!(
        position(&log, |op| *op == Op::Service(key(WEB))) < position(&log, |op| *op == Op::Flags(a, Backend::SERVING))
    );
    bench.serve(&[web(&[A, B])]);
    let log = bench.log();
    assert!(position(&log, |op| *op == Op::Flags(a, ACTIVE)) < position(&log, |op| *op == Op::Service(key(WEB))));
    assert_eq!(bench.backend("web", A), a);
}

#[test]
fn a_backend_keeps_its_number_until_its_flows_end() {
    let mut bench = Bench::new();
    bench.serve(&[web(&[A])]);
    let a = bench.begin_flow(WEB, 1).unwrap();
    bench.serve(&[web(&[B])]);
    assert_eq!(bench.flags(a), 0);
    bench.tick(20);
    bench.tick(20);
    assert_eq!(bench.programmer.maps.backend(a).port.get(), 8080, "there is a flow");
    assert!(bench.programmer.maps.owners.contains_key(&key(&format!("{A}/tcp"))));
    assert_eq!(
        bench.stats("web").backends[0],
        (A.parse().unwrap(), crate::dataplane::BackendCounters { flows: 1, active: 1 })
    );

    bench.serve(&[web(&[A, B])]);
    assert_eq!(bench.backend("web", A), a, "it comes back to its flows");
    assert_eq!(bench.flags(a), ACTIVE);
    bench.serve(&[web(&[B])]);

    bench.clock.advance(TIMEOUT * 4);
    bench.rest();
    assert_eq!(bench.programmer.maps.backend(a), Backend::default());
    assert!(!bench.programmer.maps.owners.contains_key(&key(&format!("{A}/tcp"))));
    assert_eq!((bench.used("BACKENDS"), bench.used("flows")), (1, 0));
    assert_eq!(bench.stats("web").backends.len(), 1);
    bench.serve(&[web(&[B, C])]);
    assert_eq!(bench.backend("web", C), a, "now it is another's");
    assert_eq!(bench.programmer.maps.backend_flows(a), 0);
}

#[test]
fn a_number_is_not_free_before_packets_that_saw_it_are_done() {
    let mut bench = Bench::new();
    bench.serve(&[web(&[A])]);
    let a = bench.backend("web", A);
    bench.serve(&[web(&[B])]);
    bench.log();
    bench.tick(5);
    assert_eq!(bench.log()[0], Op::Grace, "before the scan");
    assert_ne!(bench.programmer.maps.backend(a), Backend::default());
    bench.tick(1);
    assert_eq!(bench.log(), [Op::Grace, Op::Backend(a)], "and after it");
}

#[test]
fn nothing_is_reused_and_no_number_is_free_while_a_grace_period_goes_on() {
    let mut bench = Bench::new();
    bench.maps().grace_takes_long = true;
    bench.serve(&[web(&[A])]);
    let a = bench.backend("web", A);
    bench.serve(&[web(&[B])]);
    for _ in 0..3 {
        bench.tick(10);
        assert_eq!((bench.used("CONFIGS"), bench.used("BACKENDS")), (2, 2));
    }
    // Replaced while the other rests: it has to wait for a grace period of its own.
    bench.serve(&[web(&[C])]);
    bench.maps().end_grace();
    bench.tick(10);
    assert_eq!(bench.used("CONFIGS"), 2);
    bench.tick(10);
    assert_ne!(
        bench.programmer.maps.backend(a),
        Backend::default(),
        "the scan found no flow, but packets may have read it"
    );
    assert_eq!((bench.used("CONFIGS"), bench.used("BACKENDS")), (2, 3));
    for _ in 0..4 {
        bench.maps().end_grace();
        bench.tick(10);
    }
    assert_eq!((bench.used("CONFIGS"), bench.used("BACKENDS")), (1, 1));
}

#[test]
fn a_removed_service_comes_back_to_its_flows() {
    let mut bench = Bench::new();
    bench.serve(&[web(&[A])]);
    let a = bench.begin_flow(WEB, 1).unwrap();
    let before = bench.config(WEB);
    bench.serve(&[]);
    bench.tick(20);
    let flows = bench.programmer.flows(&FlowFilter::default(), 9);
    assert_eq!((flows.len(), flows[0].service_name()), (1, Some("web")));
    bench.serve(&[web(&[A])]);
    let after = bench.config(WEB);
    assert_eq!((after.service, after.frontend, bench.backend("web", A)), (before.service, before.frontend, a));
    assert_eq!(bench.stats("web").service.flows, 1);
}

#[test]
fn counters_begin_at_zero_for_who_gets_a_number_next() {
    let mut bench = Bench::new();
    bench.serve(&[web(&[A])]);
    bench.begin_flow(WEB, 1);
    bench.serve(&[]);
    bench.clock.advance(TIMEOUT * 4 + 4);
    bench.rest();
    bench.assert_empty();
    bench.serve(&[service("other", &[DNS], &[B])]);
    assert_eq!(bench.config(DNS).service, 1);
    let zero = bench.stats("other");
    assert_eq!((zero.service.flows, zero.backends[0].1.flows), (0, 0));
}

#[test]
fn equal_rings_are_one() {
    let mut bench = Bench::new();
    let other = service("other", &["10.96.0.11:80/tcp", "10.96.0.11:443/tcp"], &[A, B]);
    bench.serve(&[web(&[A, B]), other.clone()]);
    assert_eq!(bench.used("RINGS"), 256);
    assert_eq!(bench.used("MEMBERS"), 32, "one list for each service");
    assert_eq!(bench.config(WEB).ring, bench.config("10.96.0.11:443/tcp").ring);
    bench.serve(&[other]);
    bench.tick(1);
    assert_eq!(bench.used("RINGS"), 256);
    bench.serve(&[]);
    bench.tick(1);
    assert_eq!(bench.used("RINGS"), 0);
}

#[test]
fn another_frontend_leaves_those_there_are_alone() {
    let mut bench = Bench::new();
    bench.serve(&[web(&[A, B])]);
    let before = bench.config(WEB);
    bench.log();
    assert_eq!(bench.serve(&[service("web", &[WEB, "10.96.0.10:443/tcp"], &[A, B])]), 1);
    assert!(!bench.log().iter().any(|op| matches!(op, Op::Ring(_) | Op::Members(_) | Op::Backend(_))));
    assert_eq!(bench.config(WEB), before);
    let owners = bench.programmer.maps.owners[&key(&format!("{A}/tcp"))].0;
    assert_eq!(owners[..3], [before.frontend, bench.config("10.96.0.10:443/tcp").frontend, 0]);
    assert_eq!(bench.serve(&[web(&[A, B])]), 1);
    bench.rest();
    assert_eq!(bench.programmer.maps.owners[&key(&format!("{A}/tcp"))].0[..2], [before.frontend, 0]);
}

#[test]
fn a_frontend_moves_by_one_switch() {
    for order in [false, true] {
        let mut bench = Bench::new();
        let both = |web: Desired, api: Desired| if order { vec![web, api] } else { vec![api, web] };
        let api = "10.96.0.20:80/tcp";
        bench.serve(&both(service("web", &[WEB, api], &[A]), service("api", &["10.96.0.21:80/tcp"], &[B])));
        let flow = bench.begin_flow(api, 7).unwrap();
        bench.log();
        let changed = bench.serve(&both(web(&[A]), service("api", &["10.96.0.21:80/tcp", api], &[B])));
        assert_eq!(changed, 2);
        let log = bench.log();
        let stores: Vec<_> = log.iter().filter(|op| matches!(op, Op::Service(_) | Op::RemoveService(_))).collect();
        assert_eq!(stores, [&Op::Service(key(api))], "{log:?}");
        bench.tick(30);
        bench.tick(1);
        assert_eq!(bench.flags(flow), ACTIVE, "the old flow goes on");
        assert_eq!(bench.programmer.flows(&FlowFilter::default(), 1)[0].service_name(), Some("web"));
        bench.serve(&[]);
        bench.clock.advance(TIMEOUT * 4);
        bench.rest();
        bench.assert_empty();
    }
}

#[test]
fn datagrams_go_where_their_frontend_moved() {
    let mut bench = Bench::new();
    let (dns, other) = ("10.96.0.30:53/udp", "10.96.0.31:53/udp");
    bench.serve(&[service("one", &[dns, other], &[A]), service("two", &["10.96.0.32:53/udp"], &[B])]);
    bench.begin_flow(dns, 7).unwrap();
    bench.begin_flow(other, 8).unwrap();
    bench.tick(1);
    assert_eq!(bench.programmer.flows(&FlowFilter::default(), 9).len(), 2);
    bench.serve(&[service("one", &[other], &[A]), service("two", &["10.96.0.32:53/udp", dns], &[B])]);
    bench.tick(1);
    let left = bench.programmer.flows(&FlowFilter::default(), 9);
    assert_eq!(left.iter().map(|flow| flow.client.port()).collect::<Vec<_>>(), [8], "that of the frontend that stayed");
    assert_eq!(bench.programmer.maps.live(), 2, "both directions");
    bench.begin_flow(dns, 9).unwrap();
    bench.tick(1);
    assert_eq!(bench.programmer.flows(&FlowFilter::default(), 9).len(), 2, "a new one stays");
}

#[test]
fn a_frontend_of_a_removed_service_moves_by_one_switch() {
    let mut bench = Bench::new();
    bench.serve(&[web(&[A])]);
    bench.log();
    assert_eq!(bench.serve(&[service("other", &[WEB, "10.96.0.10:443/tcp"], &[A])]), 2);
    let log = bench.log();
    assert!(!log.contains(&Op::RemoveService(key(WEB))), "{log:?}");
    bench.rest();
    assert_eq!((bench.used("CONFIGS"), bench.used("FRONTENDS"), bench.used("BACKENDS")), (2, 2, 1));
}

#[test]
fn a_frontend_ends_where_it_cannot_go_where_it_is_wanted() {
    let mut bench = Bench::new();
    bench.serve(&[web(&[A])]);
    bench.maps().broken.insert(key(WEB));
    let report = bench.apply(&[service("other", &[WEB, "10.96.0.10:443/tcp"], &[A])]);
    assert_eq!(report.failed[0].0, "other");
    assert_eq!(bench.log().last(), Some(&Op::RemoveService(key(WEB))));
    bench.maps().broken.clear();
    bench.serve(&[service("other", &[WEB, "10.96.0.10:443/tcp"], &[A])]);
    bench.rest();
    assert_eq!(bench.used("BACKENDS"), 1);
}

/// Two services fit, the third does not, until one of them goes.
fn assert_third_fails(sizes: Sizes, map: &'static str, option: &'static str) {
    let third = || service("third", &["10.96.0.3:80/tcp"], &["10.244.0.3:80", "10.244.0.4:80"]);
    let first = service("first", &["10.96.0.1:80/tcp"], &["10.244.0.1:80"]);
    let second = service("second", &["10.96.0.2:80/tcp"], &["10.244.0.2:80"]);
    let mut bench = Bench::with(sizes);
    let report = bench.apply(&[first.clone(), third(), second.clone()]);
    let [(name, ApplyError::MapFull { map: full, option: raise, .. })] = &report.failed[..] else {
        panic!("{report:?}");
    };
    assert!(name == "third" || name == "second", "{name}");
    assert_eq!((*full, *raise), (map, option));
    // Whatever is left of the failure is out of the way.
    bench.serve(std::slice::from_ref(&first));
    bench.serve(&[third()]);
    let report = bench.apply(&[third(), first.clone(), second.clone()]);
    assert!(report.failed.iter().any(|(name, _)| name == "second"), "{report:?}");
    assert!(report.failed.iter().all(|(name, _)| name != "third"), "{report:?}");
    bench.serve(&[first, second]);
    bench.serve(&[]);
    bench.rest();
    bench.assert_empty();
}

#[test]
fn a_full_map_fails_the_service_that_finds_it_so() {
    let sizes = ROOMY;
    assert_third_fails(Sizes { services: 2, ..sizes }, "SERVICES", "limits.services");
    assert_third_fails(Sizes { configs: 3, ..sizes }, "CONFIGS", "limits.services");
    assert_third_fails(Sizes { backends: 4, ..sizes }, "BACKENDS", "limits.backends");
    assert_third_fails(Sizes { owners: 3, ..sizes }, "OWNERS", "limits.backends");
    assert_third_fails(Sizes { ring_slots: 256, ..sizes }, "RINGS", "limits.ring_slots");
    assert_third_fails(Sizes { members: 32, ..sizes }, "MEMBERS", "limits.backends");
    // There are as many services as frontends at most.
    assert_third_fails(Sizes { numbers: 3, ..sizes }, "SERVICE_STATS", "limits.services");
}

#[test]
fn more_frontends_than_there_is_room_for_fail() {
    let mut bench = Bench::with(Sizes { frontends: 3, ..ROOMY });
    let report = bench.apply(&[service("web", &[WEB, DNS, "10.96.0.10:443/tcp"], &[A])]);
    let full = ApplyError::MapFull { map: "FRONTENDS", size: 2, option: "limits.services" };
    assert_eq!(report.failed, [("web".to_owned(), full)]);
    bench.tick(1);
    bench.assert_empty();
}

#[test]
fn a_service_that_fails_keeps_what_it_had() {
    let mut bench = Bench::with(Sizes { backends: 4, ..ROOMY });
    bench.serve(&[web(&[A, B])]);
    let before = bench.config(WEB);
    let report = bench.apply(&[service("web", &[WEB, DNS], &[A, C])]);
    assert_eq!((report.failed.len(), report.changed), (1, 0));
    assert_eq!(bench.config(WEB), before);
    bench.assert_serves(&[web(&[A, B])]);
    let report = bench.apply(&[service("web", &[WEB, DNS], &[A, C])]);
    assert_eq!(report.failed.len(), 1, "it is tried each time");
    assert_eq!(bench.serve(&[web(&[A, B])]), 0);
}

#[test]
fn an_error_of_the_kernel_is_undone() {
    let mut bench = Bench::new();
    let (first, second) = ("10.96.0.10:80/tcp", "10.96.0.10:443/tcp");
    bench.serve(&[service("web", &[first], &[A])]);
    let before = bench.config(first);
    bench.maps().broken.insert(key(second));
    let report = bench.apply(&[service("web", &[first, second], &[B]), service("other", &[DNS], &[C])]);
    assert!(matches!(&report.failed[..], [(name, ApplyError::Kernel(_))] if name == "web"), "{report:?}");
    assert_eq!(report.changed, 1);
    assert_eq!(bench.config(first), before, "the first frontend was switched back");
    bench.rest();
    assert_eq!((bench.used("BACKENDS"), bench.used("FRONTENDS"), bench.used("CONFIGS")), (2, 2, 2));
    bench.maps().broken.clear();
    bench.serve(&[service("web", &[first, second], &[B])]);
}

#[test]
fn what_cannot_be_removed_is_tried_again() {
    let (first, second) = ("10.96.0.10:80/tcp", "10.96.0.10:443/tcp");
    let both = || service("web", &[first, second], &[A]);
    for wanted in [vec![], vec![service("web", &[first], &[A])]] {
        let mut bench = Bench::new();
        bench.serve(&[both()]);
        bench.maps().stuck.insert(key(second));
        for _ in 0..2 {
            let report = bench.apply(&wanted);
            assert!(matches!(&report.failed[..], [(name, ApplyError::Kernel(_))] if name == "web"), "{report:?}");
        }
        bench.serve(&[both()]);
        assert_eq!(bench.apply(&wanted).failed.len(), 1);
        bench.maps().stuck.clear();
        bench.serve(&wanted);
        bench.serve(&[]);
        bench.rest();
        bench.assert_empty();
    }
}

#[test]
fn a_switch_that_can_neither_go_on_nor_back_is_completed_later() {
    let (first, second) = ("10.96.0.10:80/tcp", "10.96.0.10:443/tcp");
    let both = || service("web", &[first, second], &[A]);
    let mut bench = Bench::new();
    bench.maps().broken.insert(key(second));
    bench.maps().stuck.insert(key(first));
    assert_eq!(bench.apply(&[both()]).failed.len(), 1);
    bench.rest();
    bench.maps().broken.clear();
    bench.maps().stuck.clear();
    bench.serve(&[both()]);
    bench.serve(&[]);
    bench.rest();
    bench.assert_empty();
}

#[test]
fn a_full_set_of_services_can_change_all_its_frontends() {
    let mut bench = Bench::with(Sizes { services: 3, configs: 5, ..ROOMY });
    let three = |host: u8| {
        let service = |n: u8| service(&format!("s{n}"), &[&format!("10.96.{host}.{n}:80/tcp")], &[A]);
        [service(0), service(1), service(2)]
    };
    bench.serve(&three(0));
    bench.serve(&three(1));
    let swapped = |n: u8, host: u8| service(&format!("s{n}"), &[&format!("10.96.1.{host}:80/tcp")], &[A]);
    bench.serve(&[swapped(0, 1), swapped(1, 2), swapped(2, 0)]);
}

#[test]
fn room_is_made_where_flows_have_ended() {
    let mut bench = Bench::with(Sizes { backends: 3, ..ROOMY });
    bench.serve(&[web(&[A, B])]);
    bench.begin_flow(WEB, 1);
    bench.serve(&[web(&[])]);
    let report = bench.apply(&[web(&[C, "10.244.0.4:8080"])]);
    assert_eq!(report.failed.len(), 1, "one number has a flow");
    assert_eq!(bench.apply(&[web(&[C])]).failed, []);
    bench.clock.advance(TIMEOUT * 4 + 4);
    bench.serve(&[web(&[C, "10.244.0.4:8080"])]);
}

#[test]
fn a_new_daemon_goes_on_from_the_maps() {
    let desired = [
        web(&[A, B, "10.244.0.9:8080 draining"]),
        with_algorithm(
            "dns",
            &[DNS, "10.96.0.53:53/tcp"],
            &["10.244.0.1:53*3", "10.244.0.2:53"],
            Algorithm::RoundRobin,
        ),
        service("six", &["[fd00::10]:80/tcp"], &["[fd00::1]:8080"]),
        service("empty", &["10.96.0.99:80/tcp"], &[]),
        with_snat(service("always", &["10.96.0.97:80/tcp"], &[A]), SnatMode::Always),
        with_snat(service("never", &["10.96.0.98:80/tcp"], &[A]), SnatMode::Never),
    ];
    let mut bench = Bench::new();
    bench.serve(&desired);
    let flow = bench.begin_flow(WEB, 5);
    let configs = |bench: &Bench| {
        let keys = bench.programmer.maps.services.keys().map(|key| (frontend_of(key), *key));
        let configs = keys.map(|(frontend, key)| (frontend, bench.programmer.maps.in_force(&key)));
        configs.collect::<BTreeMap<_, _>>()
    };
    let (before, usage) = (configs(&bench), bench.programmer.map_usage());
    bench.log();

    let mut bench = bench.restart();
    assert_eq!(bench.log(), [Op::Grace]);
    assert_eq!(bench.programmer.map_usage(), usage);
    assert_eq!(bench.serve(&desired), 0);
    assert_eq!(bench.log(), []);
    assert_eq!(configs(&bench), before);
    assert_eq!(bench.begin_flow(WEB, 5), flow);
    assert_eq!(bench.programmer.flows(&FlowFilter { service: Some("web".to_owned()) }, 9).len(), 1);

    let mut bench = bench.restart();
    assert_eq!(bench.serve(&desired[1..]), 1, "what is not wanted any more goes");
    let mut bench = bench.restart();
    assert_eq!(bench.programmer.flows(&FlowFilter::default(), 9)[0].service_name(), Some(WEB), "for want of a name");
    assert_eq!(bench.programmer.count_flows(&FlowFilter { service: Some(WEB.to_owned()) }), 1);
    bench.serve(&desired[1..]);
    bench.clock.advance(TIMEOUT * 4 + 4);
    bench.serve(&[]);
    bench.rest();
    bench.assert_empty();
}

#[test]
fn a_new_daemon_takes_away_what_makes_no_sense() {
    let mut bench = Bench::new();
    let other = service("other", &["10.96.0.11:80/tcp"], &[B]);
    bench.serve(&[web(&[A]), other.clone()]);
    let (web_ref, stray) = (bench.maps().services[&key(WEB)], key("10.96.0.77:80/tcp"));
    bench.maps().watches = false;
    bench.maps().set_service(&stray, web_ref).unwrap();
    bench.maps().set_service(&key("10.96.0.78:80/tcp"), ConfigRef::new(u32::MAX, 1)).unwrap();
    let config = Config { members: 4000, members_len: 500, ..bench.config(WEB) };
    bench.maps().set_config(web_ref.index(), &config);
    bench.maps().set_owners(&[(stray, netlb_common::maps::Owners::default())]).unwrap();

    let mut bench = bench.restart();
    assert_eq!(bench.programmer.maps.services.len(), 1);
    assert!(!bench.programmer.maps.owners.contains_key(&stray));
    bench.maps().watches = true;
    assert_eq!(bench.serve(&[web(&[A]), other]), 2, "the old one goes, and a new one comes");
}

#[test]
fn a_crash_in_the_middle_of_a_change_leaves_nothing_behind() {
    let mut bench = Bench::new();
    bench.serve(&[web(&[A])]);
    let id = bench.backend("web", A);
    let half = Backend { port: PortBe::new(1), ..bench.programmer.maps.backend(id) };
    bench.maps().set_backend(77, &half);
    bench.maps().set_backend(78, &Backend { service: 9, ..half });
    let mut bench = bench.restart();
    assert_eq!(bench.used("BACKENDS"), 3);
    bench.serve(&[web(&[A])]);
    bench.rest();
    assert_eq!(bench.used("BACKENDS"), 1);
    assert_eq!(bench.programmer.services.len(), 1);
}

#[test]
fn unknown_names_have_no_counters_and_no_flows() {
    let mut bench = Bench::new();
    bench.serve(&[web(&[A])]);
    bench.begin_flow(WEB, 1);
    let stats = bench.programmer.stats(&["nobody", "web", "nobody"]);
    assert_eq!(stats[0], ServiceStats::default());
    assert_eq!((stats[1].service.flows, stats[1].backends[0].1.active), (1, 1));
    let filter = FlowFilter { service: Some("nobody".to_owned()) };
    assert_eq!(bench.programmer.count_flows(&filter), 0);
    assert_eq!(bench.programmer.flows(&filter, 10), []);
    assert_eq!(bench.programmer.flush_flows(&filter), 0);
    assert_eq!(bench.programmer.stats(&[]), []);
}

#[test]
fn answers_to_changes_count_flows_once_in_a_tick() {
    let mut bench = Bench::new();
    bench.serve(&[web(&[A])]);
    let active = |bench: &mut Bench| bench.programmer.recent_stats(&["web"])[0].backends[0].1.active;
    assert_eq!(active(&mut bench), 0, "no flow was ever");
    bench.begin_flow(WEB, 1);
    assert_eq!(active(&mut bench), 1, "the first one is counted at once");
    bench.begin_flow(WEB, 2);
    assert_eq!((active(&mut bench), bench.stats("web").backends[0].1.active), (1, 2));
    bench.clock.advance(1);
    assert_eq!(active(&mut bench), 2);
}

#[test]
fn a_scan_looks_no_further_than_for_what_waits() {
    let mut bench = Bench::new();
    bench.serve(&[web(&[A, B]), service("dns", &[DNS], &["10.244.0.2:53"])]);
    bench.begin_flow(DNS, 1);
    let b = bench.backend("web", B);
    for client in 2.. {
        if bench.begin_flow(WEB, client) == Some(b) {
            break;
        }
        bench.programmer.flush_flows(&FlowFilter { service: Some("web".to_owned()) });
    }
    // Both wait; one of them has a flow.
    bench.serve(&[web(&[]), service("dns", &[DNS], &["10.244.0.2:53"])]);
    bench.rest();
    assert_eq!(bench.used("BACKENDS"), 2);
    bench.programmer.flush_flows(&FlowFilter::default());
    bench.rest();
    assert_eq!(bench.used("BACKENDS"), 1);
}

#[test]
fn flows_say_who_talks_to_whom() {
    let mut bench = Bench::new();
    bench.serve(&[web(&[A]), service("dns", &[DNS], &["10.244.0.2:53"])]);
    bench.begin_flow(WEB, 4000);
    bench.clock.advance(9);
    bench.begin_flow(DNS, 4001);
    let mut flows = bench.programmer.flows(&FlowFilter::default(), 10);
    flows.sort_by_key(|flow| flow.client);
    assert_eq!(flows.len(), 2);
    let expected = crate::dataplane::Flow {
        service: Some(FlowService {
            name: "web".to_owned(),
            frontend: WEB.parse().unwrap(),
            backend: A.parse().unwrap(),
        }),
        client: "10.244.9.9:4000".parse().unwrap(),
        protocol: "tcp".to_owned(),
        source: None,
        state: "established".to_owned(),
        idle_seconds: flows[0].idle_seconds,
    };
    assert_eq!(flows[0], expected);
    assert!((5..14).contains(&expected.idle_seconds), "{}", expected.idle_seconds);
    assert_eq!((flows[1].state.as_str(), flows[1].idle_seconds), ("udp-both-ways", 0));
    assert_eq!(bench.programmer.flows(&FlowFilter::default(), 1).len(), 1);
    assert_eq!(bench.programmer.count_flows(&FlowFilter { service: Some("dns".to_owned()) }), 1);
    assert_eq!(bench.used("flows"), 4);
}

#[test]
fn flows_that_packets_refresh_during_a_scan_are_seen() {
    let mut bench = Bench::new();
    bench.serve(&[with_algorithm("web", &[WEB], &[A], Algorithm::LeastConn)]);
    let id = bench.begin_flow(WEB, 1).unwrap();
    bench.maps().flows.scan_ticks = 8.into();
    let all = FlowFilter::default();
    assert_eq!(bench.programmer.count_flows(&all), 1);
    assert_eq!(bench.programmer.flows(&all, 9).len(), 1);
    assert_eq!(bench.stats("web").backends[0].1.active, 1);
    assert_eq!(bench.used("flows"), 2);
    bench.programmer.count_loads();
    assert_eq!(bench.maps().backend(id).base, 0, "one was given, and one lives");
    assert_eq!(bench.programmer.flush_flows(&all), 1);
    assert_eq!(bench.maps().live(), 0);
}

#[test]
fn what_is_masqueraded_is_among_all_flows_and_no_services() {
    let mut bench = Bench::new();
    bench.serve(&[web(&[A])]);
    bench.begin_flow(WEB, 4000);
    let (all, of_web) = (FlowFilter::default(), FlowFilter { service: Some("web".to_owned()) });
    assert_eq!(bench.programmer.sources(), Vec::<IpAddr>::new());
    bench.maps().begin_masqueraded(4001, Addr::from_v4([192, 0, 2, 1]), PortBe::new(61000));
    assert_eq!(bench.programmer.sources(), [IpAddr::from([192, 0, 2, 1])]);
    let usage = bench.programmer.map_usage();
    assert!(usage.contains(&("SNAT_ADDRESSES", 1, 255)), "{usage:?}");
    let mut flows = bench.programmer.flows(&all, 10);
    flows.sort_by_key(|flow| flow.client);
    let [served, masqueraded] = flows.try_into().unwrap();
    assert_eq!((served.service.unwrap().name.as_str(), served.source), ("web", None));
    assert_eq!((masqueraded.service, masqueraded.protocol.as_str()), (None, "tcp"));
    assert_eq!(masqueraded.source, Some("192.0.2.1:61000".parse().unwrap()));
    assert_eq!(masqueraded.client, "10.244.9.9:4001".parse().unwrap());
    assert_eq!((bench.programmer.count_flows(&all), bench.programmer.count_flows(&of_web)), (2, 1));
    assert_eq!(bench.programmer.flows(&of_web, 10).len(), 1);
}

#[test]
fn a_backend_for_two_protocols_is_one_in_the_counters() {
    let mut bench = Bench::new();
    bench.serve(&[service("dns", &[DNS, "10.96.0.53:53/tcp"], &["10.244.0.2:53"])]);
    bench.begin_flow(DNS, 1);
    bench.begin_flow("10.96.0.53:53/tcp", 2);
    let counters = crate::dataplane::BackendCounters { flows: 2, active: 2 };
    assert_eq!(bench.stats("dns").backends, [("10.244.0.2:53".parse().unwrap(), counters)]);
}

#[test]
fn live_flows_are_counted_for_those_that_go_by_them() {
    let mut bench = Bench::new();
    let with = |algorithm| [with_algorithm("web", &[WEB], &["10.244.0.1:8080*3", "10.244.0.2:8080"], algorithm)];
    bench.serve(&with(Algorithm::Random));
    let ids = [A, B].map(|backend| bench.backend("web", backend));
    assert_eq!(ids.map(|id| bench.programmer.maps.backend(id).weight), [3, 1]);
    let live = |bench: &Bench| {
        ids.map(|id| bench.programmer.maps.backend_flows(id).wrapping_add(bench.programmer.maps.backend(id).base))
    };
    let all = |bench: &Bench| ids.map(|id| bench.programmer.maps.backend_flows(id));
    (0..20).for_each(|client| assert!(bench.begin_flow(WEB, client).is_some()));
    assert_eq!(all(&bench).iter().sum::<u64>(), 20);
    bench.clock.advance(TIMEOUT * 4 + 4);
    bench.tick(2);
    assert_eq!(live(&bench), all(&bench), "nobody asks");
    for client in 30..34 {
        bench.begin_flow(WEB, client);
    }
    bench.serve(&with(Algorithm::LeastConn));
    assert_eq!(live(&bench), [0, 0], "what was before is not known yet");
    bench.tick(1);
    assert_eq!(live(&bench).iter().sum::<u64>(), 4, "most are over");
    bench.programmer.flush_flows(&FlowFilter::default());
    bench.tick(2);
    assert_eq!(live(&bench), [0, 0]);
    let before = all(&bench);
    (100..110).for_each(|client| assert!(bench.begin_flow(WEB, client).is_some()));
    let new = [0, 1].map(|n| all(&bench)[n] - before[n]);
    assert_eq!((live(&bench), new.iter().sum()), (new, 10), "those that begin count at once");
    bench.tick(2);
    assert_eq!(live(&bench), new);
    bench.programmer.flush_flows(&FlowFilter::default());
    bench.tick(1);
    assert_eq!(live(&bench), new, "not looked at in every second");
    bench.tick(1);
    assert_eq!(live(&bench), [0, 0]);
    // A weight that changes is followed, and the number of a backend that goes is as new to the next one.
    bench.serve(&[with_algorithm("web", &[WEB], &["10.244.0.1:8080*2", "10.244.0.2:8080"], Algorithm::LeastConn)]);
    assert_eq!(ids.map(|id| bench.programmer.maps.backend(id).weight), [2, 1]);
    bench.serve(&[]);
    bench.rest();
    assert_eq!(ids.map(|id| bench.programmer.maps.backend(id)), [Backend::default(); 2]);
}

#[test]
fn flushed_flows_are_gone_in_both_directions() {
    let mut bench = Bench::new();
    bench.serve(&[web(&[A, B]), service("dns", &[DNS], &["10.244.0.2:53"])]);
    assert!((0..20).all(|client| bench.begin_flow(WEB, client).is_some()));
    assert!((20..25).all(|client| bench.begin_flow(DNS, client).is_some()));
    assert_eq!(bench.programmer.maps.live(), 50);
    assert_eq!(bench.programmer.flush_flows(&FlowFilter { service: Some("web".to_owned()) }), 20);
    assert_eq!(bench.programmer.maps.live(), 10);
    assert_eq!(bench.programmer.flush_flows(&FlowFilter::default()), 5);
    assert_eq!(bench.programmer.maps.live(), 0);
}

#[test]
fn expired_flows_never_revive() {
    let mut bench = Bench::new();
    bench.serve(&[service("dns", &[DNS], &["10.244.0.2:53"])]);
    bench.begin_flow(DNS, 1);
    bench.clock.advance(TIMEOUT + 1);
    assert_eq!(bench.programmer.maps.live(), 0);
    (0..256).for_each(|_| bench.tick(1));
    bench.clock.advance((1 << 14) - 256 - TIMEOUT);
    assert_eq!(bench.programmer.maps.live(), 0, "when the time field has come round");
}

#[test]
fn busy_flows_live_on_however_long_a_grace_period_takes() {
    let mut bench = Bench::new();
    let dns = |backends: &[&str]| service("dns", &[DNS], backends);
    for ticks in [1, 10, TIMEOUT - 6] {
        bench.maps().grace_ticks = 0;
        bench.serve(&[dns(&["10.244.0.2:53", "10.244.0.3:53"])]);
        bench.begin_flow(DNS, 1);
        bench.serve(&[dns(&["10.244.0.2:53"])]);
        bench.maps().grace_ticks = ticks;
        bench.tick(5);
        assert_eq!(bench.programmer.maps.live(), 2, "after {ticks} ticks");
    }
}

#[test]
fn a_shared_backend_knows_its_first_eight_frontends() {
    let mut bench = Bench::new();
    let services = |count: u8| -> Vec<_> {
        (0..count).map(|n| service(&format!("s{n}"), &[&format!("10.96.1.{n}:80/tcp")], &[A])).collect()
    };
    bench.serve(&services(10));
    let endpoint = key(&format!("{A}/tcp"));
    assert_eq!(bench.programmer.maps.owners[&endpoint].0, [1, 2, 3, 4, 5, 6, 7, 8]);
    bench.serve(&services(10)[3..]);
    bench.rest();
    assert_eq!(bench.programmer.maps.owners[&endpoint].0, [4, 5, 6, 7, 8, 9, 10, 0]);
    let bench = bench.restart();
    let mut owners = bench.programmer.maps.owners[&endpoint].0;
    owners.sort_unstable();
    assert_eq!(owners, [0, 4, 5, 6, 7, 8, 9, 10]);
}

#[test]
#[expect(clippy::print_stdout, reason = "for whoever asks how long it takes")]
fn ten_thousand_services_load_and_change_quickly() {
    let mut bench = Bench::with(Sizes {
        services: 16_384,
        configs: 32_832,
        frontends: 32_769,
        numbers: 24_577,
        backends: 131_073,
        owners: 131_072,
        ring_slots: 1 << 24,
        members: 524_288,
        addresses: 17_408,
        source_ranges: 65_536,
        affinities: 65_536,
        node_ports: 65_536,
        filter_bits_log2: 21,
    });
    bench.maps().watches = false;
    let service = |n: u32, backends: u32| {
        let frontend = format!("10.{}.{}.{}:80/tcp", 96 + n / 65_536, n / 256 % 256, n % 256);
        let backends: Vec<_> = (0..backends)
            .map(|m| n * 10 + m)
            .map(|m| format!("10.{}.{}.{}:8080", 128 + m / 65_536, m / 256 % 256, m % 256))
            .collect();
        let backends: Vec<_> = backends.iter().map(String::as_str).collect();
        service(&format!("service-{n}"), &[&frontend], &backends)
    };
    let mut desired: Vec<_> = (0..10_000).map(|n| service(n, 10)).collect();
    let report = bench.apply(&desired);
    assert_eq!((report.failed.len(), report.changed), (0, 10_000));
    println!("10 000 services of 10 backends: loaded in {:?}", report.took);
    let before = std::mem::replace(&mut desired[5000], service(5000, 9));
    let report = bench.programmer.apply_touched(&touched(&[before], &desired[5000..=5000]));
    assert_eq!(report.changed, 1);
    println!("one change: {:?}", report.took);
    println!("no change: {:?}", bench.apply(&desired).took);
    let start = Instant::now();
    let names: Vec<_> = desired.iter().map(|desired| desired.service.name()).collect();
    assert_eq!(bench.programmer.stats(&names).len(), 10_000);
    println!("counters of all: {:?}", start.elapsed());
    let start = Instant::now();
    let mut bench = bench.restart();
    println!("taken over by the next daemon in {:?}", start.elapsed());
    let report = bench.apply(&desired);
    assert_eq!((report.failed.len(), report.changed), (0, 0));
    println!("first apply after that: {:?}", report.took);
}

/// How a data plane is told what is wanted.
#[derive(Clone, Copy, Debug)]
enum Extent {
    All,
    Touched,
}

/// The names under which something else is wanted than before.
fn touched(before: &[Desired], after: &[Desired]) -> Vec<Touched> {
    let by_name = |desired: &[Desired]| -> BTreeMap<_, _> {
        desired.iter().map(|desired| (desired.service.name().to_owned(), desired.clone())).collect()
    };
    let (before, after) = (by_name(before), by_name(after));
    let names: BTreeSet<_> = before.keys().chain(after.keys()).collect();
    let differs = names.into_iter().filter(|name| before.get(*name) != after.get(*name));
    differs.map(|name| Touched { name: name.clone(), wanted: after.get(name).cloned() }).collect()
}

/// What may happen to a data plane.
#[derive(Clone, Debug)]
enum Step {
    /// All services, or those that differ from the last ones.
    Serve(Vec<Desired>, Extent),
    Flow {
        frontend: usize,
        client: u16,
    },
    Tick(u32),
    Restart,
    /// Makes the kernel fail at some frontends: a bit each.
    Fail {
        switches: u8,
        removals: u8,
    },
}

const FRONTENDS: [&str; 6] =
    [WEB, DNS, "10.96.0.10:443/tcp", "10.96.0.53:53/tcp", "10.96.0.11:80/tcp", "10.96.0.11:80/udp"];

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let backend = (1..6_u8, prop_oneof![Just(""), Just("*2"), Just("*7"), Just(" draining")]);
    let backends = prop::collection::btree_map(backend.0, backend.1, 0..5);
    let algorithm = proptest::sample::select(&Algorithm::ALL[..]);
    let snat = prop_oneof![4 => Just(SnatMode::Auto), 1 => Just(SnatMode::Always), 1 => Just(SnatMode::Never)];
    // Each frontend goes to one of the services, or to none.
    let owners = prop::collection::vec(0..5_usize, FRONTENDS.len());
    let desired = (owners, prop::collection::vec((backends, algorithm, snat), 4)).prop_map(|(owners, services)| {
        let desired = services.into_iter().enumerate().filter_map(|(number, (backends, algorithm, snat))| {
            let mine = |(frontend, owner): (&&'static str, &usize)| (*owner == number).then_some(*frontend);
            let frontends: Vec<_> = FRONTENDS.iter().zip(&owners).filter_map(mine).collect();
            let backends: Vec<_> =
                backends.into_iter().map(|(host, suffix)| format!("10.244.0.{host}:8080{suffix}")).collect();
            let backends: Vec<_> = backends.iter().map(String::as_str).collect();
            let name = format!("s{number}");
            (!frontends.is_empty()).then(|| with_snat(with_algorithm(&name, &frontends, &backends, algorithm), snat))
        });
        desired.collect::<Vec<_>>()
    });
    let step = prop_oneof![
        4 => (desired, prop_oneof![1 => Just(Extent::All), 2 => Just(Extent::Touched)])
            .prop_map(|(desired, extent)| Step::Serve(desired, extent)),
        3 => (0..FRONTENDS.len(), any::<u16>()).prop_map(|(frontend, client)| Step::Flow { frontend, client }),
        3 => prop_oneof![0..8_u32, Just(TIMEOUT * 2), Just(TIMEOUT * 5)].prop_map(Step::Tick),
        1 => Just(Step::Restart),
        1 => (any::<u8>(), any::<u8>()).prop_map(|(switches, removals)| {
            Step::Fail { switches: switches & removals, removals: removals & removals.rotate_left(3) }
        }),
    ];
    prop::collection::vec(step, 1..40)
}

/// The maps in memory watch every write on the way.
fn run(sizes: Sizes, steps: Vec<Step>, may_fail: bool) {
    let mut bench = Bench::with(sizes);
    let mut before = Vec::new();
    let mut failed = HashSet::new();
    let mut is_new = true;
    for step in steps {
        match step {
            Step::Serve(desired, extent) => {
                let report = match extent {
                    Extent::Touched if !is_new => {
                        let touched = touched(&before, &desired);
                        for Touched { name, .. } in &touched {
                            failed.remove(name);
                        }
                        bench.programmer.apply_touched(&touched)
                    }
                    _ => {
                        failed.clear();
                        bench.apply(&desired)
                    }
                };
                is_new = false;
                assert!(may_fail || report.failed.is_empty(), "{report:?}");
                failed.extend(report.failed.into_iter().map(|(name, _)| name));
                if failed.is_empty() {
                    bench.assert_serves(&desired);
                    bench.log();
                    assert_eq!(bench.apply(&desired).changed, 0);
                    assert_eq!(bench.log(), [], "all of it, a second time");
                }
                let fine = desired.iter().filter(|desired| !failed.contains(desired.service.name()));
                fine.for_each(|desired| bench.assert_served(&desired.service));
                before = desired;
            }
            Step::Flow { frontend, client } => {
                bench.begin_flow(FRONTENDS[frontend], client);
            }
            Step::Tick(ticks) => bench.tick(ticks),
            Step::Restart => {
                bench = bench.restart();
                is_new = true;
            }
            Step::Fail { switches, removals } if may_fail => {
                let pick = |bits: u8| (0..6).filter(move |n| bits >> n & 1 != 0).map(|n| key(FRONTENDS[n])).collect();
                bench.maps().broken = pick(switches);
                bench.maps().stuck = pick(removals);
            }
            Step::Fail { .. } => {}
        }
    }
    bench.maps().broken.clear();
    bench.maps().stuck.clear();
    assert_eq!(bench.apply(&[]).failed, []);
    bench.clock.advance(TIMEOUT * 4 + 4);
    bench.rest();
    bench.assert_empty();
}

proptest! {
    #[test]
    fn whatever_happens_packets_see_whole_services(steps in steps()) {
        run(ROOMY, steps, false);
    }

    #[test]
    fn with_errors_as_well(steps in steps()) {
        run(ROOMY, steps, true);
    }

    #[test]
    fn with_too_little_room_as_well(
        steps in steps(),
        services in 2..8_u32,
        configs in 3..12_u32,
        frontends in 3..12_u32,
        backends in 3..20_u32,
        owners in 2..12_u32,
        lines in 8..80_u32,
        members in 2..12_u32,
    ) {
        let sizes = Sizes {
            services, configs, frontends, backends, owners, ring_slots: lines * 32, members: members * 16, ..ROOMY
        };
        run(sizes, steps, true);
    }
}

/// A node with these addresses, all of them for node ports.
fn node(addresses: &[&str]) -> Node {
    let addresses: Vec<IpAddr> = addresses.iter().map(|address| address.parse().unwrap()).collect();
    Node { name: "here".to_owned(), node_port_addresses: addresses.clone(), addresses, ..Node::default() }
}

/// A backend by its last number; `here` is on this node.
fn placed(last: u8, is_here: bool) -> model::Backend {
    let name = if is_here { "here" } else { "there" };
    let placement = model::Placement { node: Some(name.to_owned()), ..model::Placement::default() };
    let address = SocketAddr::from(([10, 244, 0, last], 8080));
    model::Backend { placement: Some(placement.into()), ..model::Backend::new(address) }
}

fn when(mut backend: model::Backend, ready: bool, serving: bool, terminating: bool) -> model::Backend {
    backend.conditions = model::Conditions { ready, serving, terminating };
    backend
}

fn defined(name: &str, change: impl FnOnce(&mut Definition)) -> Desired {
    let mut definition = Definition { name: Some(name.to_owned()), ..Definition::default() };
    change(&mut definition);
    Desired { service: Service::define(definition).unwrap().into(), owner: Owner::Api }
}

fn node_port(text: &str) -> model::NodePort {
    let (port, protocol) = text.split_once('/').unwrap();
    let protocol = if protocol == "tcp" { Protocol::Tcp } else { Protocol::Udp };
    model::NodePort { port: port.parse().unwrap(), protocol }
}

fn addr(ip: &str) -> Addr {
    key(&format!("{ip}:1/tcp")).addr
}

impl Bench {
    fn at(node: Node) -> Self {
        let mut bench = Self::new();
        assert_eq!(bench.programmer.set_node(node).failed, []);
        bench
    }

    /// The record for flows from outside.
    fn outside(&self, frontend: &str) -> Option<Config> {
        self.programmer.maps.in_force(&outside(key(frontend)))
    }

    /// The last numbers of the backends of a record.
    fn hosts(&self, config: &Config) -> BTreeSet<u8> {
        let backends = self.programmer.maps.slots(config).into_iter();
        backends.map(|backend| *backend.addr.to_bytes().last().unwrap()).collect()
    }

    fn backend_flags(&self, service: &str, last: u8) -> u8 {
        let entry = self.programmer.services.get(self.programmer.names[service]).unwrap();
        let (_, id) = entry.backends.iter().find(|(key, _)| *key.addr.to_bytes().last().unwrap() == last).unwrap();
        self.flags(*id)
    }
}

const EXTERNAL: &str = "192.0.2.80:80/tcp";
const NODE_PORT: &str = "198.51.100.1:30080/tcp";
const LOCAL: u8 = Backend::LOCAL;

fn shop(change: impl FnOnce(&mut Definition)) -> Desired {
    defined("shop", |shop| {
        shop.frontends.push(WEB.parse().unwrap());
        shop.external_ips.push(EXTERNAL.parse().unwrap());
        shop.node_ports.push(node_port("30080/tcp"));
        shop.backends = vec![placed(1, true), placed(2, false)];
        change(shop);
    })
}

#[test]
fn each_policy_has_its_records_and_rings() {
    let mut bench = Bench::at(node(&["198.51.100.1"]));
    bench.serve(&[shop(|_| ())]);
    for frontend in [WEB, EXTERNAL, NODE_PORT] {
        let config = bench.config(frontend);
        let flags = if frontend == NODE_PORT { Config::NODE } else { 0 };
        assert_eq!((config.flags, config.affinity), (flags, 0), "{frontend}");
        assert_eq!(bench.hosts(&config), [1, 2].into());
        assert_eq!(bench.outside(frontend), None);
    }
    assert_eq!((bench.backend_flags("shop", 1), bench.backend_flags("shop", 2)), (ACTIVE | LOCAL, ACTIVE));
    assert_eq!((bench.used("RINGS"), bench.used("MEMBERS"), bench.used("SERVICES")), (256, 16, 3));

    let local = || shop(|shop| shop.external_traffic_policy = TrafficPolicy::Local);
    assert_eq!(bench.serve(&[local()]), 1);
    for frontend in [EXTERNAL, NODE_PORT] {
        let (inside, outside) = (bench.config(frontend), bench.outside(frontend).unwrap());
        let node = if frontend == NODE_PORT { Config::NODE } else { 0 };
        let outside_flags = node | Config::SNAT_NEVER | Config::LOCAL;
        assert_eq!((inside.flags, outside.flags), (node | Config::OUTSIDE, outside_flags), "{frontend}");
        assert_eq!((bench.hosts(&inside), bench.hosts(&outside)), ([1, 2].into(), [1].into()));
        assert_eq!(inside.frontend, outside.frontend);
    }
    assert_eq!((bench.config(WEB).flags, bench.outside(WEB)), (0, None));
    assert_eq!((bench.used("SERVICES"), bench.used("FRONTENDS")), (5, 3));

    let internal = || shop(|shop| shop.internal_traffic_policy = TrafficPolicy::Local);
    bench.serve(&[internal()]);
    assert_eq!((bench.config(WEB).flags, bench.hosts(&bench.config(WEB))), (Config::LOCAL, [1].into()));
    assert_eq!((bench.config(EXTERNAL).flags, bench.outside(EXTERNAL)), (0, None));
    bench.serve(&[]);
    bench.programmer.set_node(Node::default());
    bench.rest();
    bench.assert_empty();
}

/// A client that came to it by the local policy does not keep it where it is none of the backends there are to choose from.
#[test]
fn backends_of_the_local_set_alone_are_known() {
    let mut bench = Bench::at(node(&["198.51.100.1"]));
    let leaving = |is_leaving: bool| {
        shop(|shop| {
            shop.external_traffic_policy = TrafficPolicy::Local;
            shop.backends[0].conditions =
                model::Conditions { ready: !is_leaving, serving: true, terminating: is_leaving };
        })
    };
    for _ in 0..2 {
        bench.serve(&[leaving(true)]);
        assert_eq!(
            (bench.hosts(&bench.config(WEB)), bench.hosts(&bench.outside(NODE_PORT).unwrap())),
            ([2].into(), [1].into())
        );
        let flags = ACTIVE | LOCAL | Backend::ONLY_LOCAL;
        assert_eq!((bench.backend_flags("shop", 1), bench.backend_flags("shop", 2)), (flags, ACTIVE));
        bench.serve(&[leaving(false)]);
        assert_eq!((bench.backend_flags("shop", 1), bench.backend_flags("shop", 2)), (ACTIVE | LOCAL, ACTIVE));
    }
}

#[test]
fn an_empty_set_drops_and_nobody_rejects() {
    let mut bench = Bench::at(node(&["198.51.100.1"]));
    let far = |shop: &mut Definition| {
        shop.external_traffic_policy = TrafficPolicy::Local;
        shop.backends.remove(0);
    };
    bench.serve(&[shop(far)]);
    let outside = bench.outside(EXTERNAL).unwrap();
    assert_eq!((outside.flags & Config::DROP, outside.ring_len), (Config::DROP, 0));
    assert_eq!(bench.config(EXTERNAL).flags & Config::DROP, 0);
    bench.serve(&[shop(|shop| {
        far(shop);
        shop.backends.clear();
    })]);
    assert_eq!(bench.outside(EXTERNAL).unwrap().flags & Config::DROP, 0);
}

#[test]
fn the_record_for_outside_comes_before_the_one_that_asks_for_it_and_goes_after() {
    let mut bench = Bench::at(node(&["198.51.100.1"]));
    let web = |policy| {
        defined("shop", |shop| {
            shop.external_ips.push(EXTERNAL.parse().unwrap());
            shop.external_traffic_policy = policy;
            shop.backends = vec![placed(1, true), placed(2, false)];
        })
    };
    let (first, second) = (key(EXTERNAL), outside(key(EXTERNAL)));
    let stores = |bench: &Bench| {
        let mut log = bench.log();
        log.retain(|op| matches!(op, Op::Service(_) | Op::RemoveService(_)));
        log
    };
    bench.serve(&[web(TrafficPolicy::Local)]);
    assert_eq!(stores(&bench), [Op::Service(second), Op::Service(first)]);
    bench.serve(&[web(TrafficPolicy::Cluster)]);
    assert_eq!(stores(&bench), [Op::Service(first), Op::RemoveService(second)]);
    bench.serve(&[web(TrafficPolicy::Local)]);
    assert_eq!(stores(&bench), [Op::Service(second), Op::Service(first)]);
    bench.maps().broken.insert(first);
    let report = bench.apply(&[web(TrafficPolicy::Cluster)]);
    assert_eq!(report.failed.len(), 1);
    assert!(bench.outside(EXTERNAL).is_some());
    bench.maps().broken.clear();
    stores(&bench);
    bench.serve(&[]);
    assert_eq!(stores(&bench), [Op::RemoveService(first), Op::RemoveService(second)]);
}

#[test]
fn what_is_given_up_is_room_for_what_is_new() {
    let web = |policy, frontends: &[&str]| {
        defined("shop", |shop| {
            shop.external_ips = frontends.iter().map(|frontend| frontend.parse().unwrap()).collect();
            shop.external_traffic_policy = policy;
            shop.backends = vec![placed(1, true)];
        })
    };
    let mut bench = Bench::with(Sizes { services: 2, ..ROOMY });
    bench.serve(&[web(TrafficPolicy::Local, &[EXTERNAL])]);
    bench.serve(&[web(TrafficPolicy::Cluster, &[EXTERNAL, "192.0.2.81:80/tcp"])]);
    let report = bench.apply(&[web(TrafficPolicy::Local, &[EXTERNAL, "192.0.2.81:80/tcp"])]);
    assert!(matches!(report.failed[..], [(_, ApplyError::MapFull { map: "SERVICES", .. })]), "{report:?}");
}

#[test]
fn node_ports_follow_the_addresses_of_the_node() {
    let mut bench = Bench::at(node(&[]));
    let desired = [shop(|_| ()), service("other", &[DNS], &[C])];
    bench.serve(&desired);
    bench.log();
    let report = bench.programmer.set_node(node(&["198.51.100.1"]));
    assert_eq!((report.changed, report.failed), (1, vec![]));
    bench.assert_serves(&desired);
    let log = bench.log();
    assert_eq!(
        log.iter().filter(|op| matches!(op, Op::Service(_))).collect::<Vec<_>>(),
        [&Op::Service(key(NODE_PORT))]
    );
    assert_eq!(bench.programmer.set_node(node(&["198.51.100.1"])).changed, 0);
    assert_eq!(bench.log(), []);
    assert_eq!(bench.programmer.set_node(node(&["198.51.100.2"])).changed, 1);
    bench.assert_serves(&desired);
    assert_eq!(bench.apply(&desired).changed, 0);
}

/// A backend's node knows the service's addresses, and not those of the node that packets were sent to.
#[test]
fn ports_of_the_node_have_no_direct_server_return() {
    let mut bench = Bench::at(node(&["198.51.100.1"]));
    bench.serve(&[shop(|shop| shop.mode = Mode::Dsr)]);
    for (frontend, is_direct) in [(WEB, true), (EXTERNAL, true), (NODE_PORT, false)] {
        assert_eq!(bench.config(frontend).flags & Config::DSR != 0, is_direct, "{frontend}");
    }
}

#[test]
fn what_has_no_room_at_a_new_address_is_tried_again_until_it_has() {
    let ports = |name: &str, port: &str| {
        defined(name, |ports| {
            ports.node_ports.push(node_port(port));
            ports.backends = vec![placed(1, true)];
        })
    };
    let both = [ports("one", "30080/tcp"), ports("two", "30081/tcp")];
    let all = [both.clone().as_slice(), &[web(&[A])]].concat();
    let mut bench = Bench::with(Sizes { services: 4, ..ROOMY });
    bench.programmer.set_node(node(&["198.51.100.1"]));
    bench.serve(&all);
    let failed = bench.programmer.set_node(node(&["198.51.100.1", "198.51.100.2"])).failed;
    let full = ApplyError::MapFull { map: "SERVICES", size: 4, option: "limits.services" };
    assert!(matches!(&failed[..], [(_, error)] if *error == full), "{failed:?}");
    for _ in 0..2 {
        assert_eq!(bench.apply(&all).failed, failed);
    }
    assert_eq!(bench.serve(&both), 2, "one gains an address, another goes");
    bench.log();
    assert_eq!(bench.serve(&both), 0);
    assert_eq!(bench.log(), []);
}

#[test]
fn the_programs_are_told_of_node_ports_while_they_are_served() {
    let mut bench = Bench::at(node(&["198.51.100.1", "198.51.100.2"]));
    let port = |protocol| NodePortKey::new(PortBe::new(30_080), protocol);
    let ports = |backend: model::Backend| {
        defined(if backend.address.is_ipv6() { "v6" } else { "v4" }, move |ports| {
            ports.node_ports = vec![node_port("30080/tcp"), node_port("30080/udp")];
            ports.backends = vec![backend];
        })
    };
    let v6 = model::Backend { address: "[fd00::9]:8080".parse().unwrap(), ..placed(1, true) };
    let (v4, v6) = (ports(placed(1, true)), ports(v6));
    let told = |bench: &mut Bench| {
        let ports = &bench.maps().node_ports;
        [6, 17].map(|protocol| ports.get(&port(protocol)).copied().unwrap_or_default())
    };
    bench.serve(std::slice::from_ref(&v4));
    assert_eq!(told(&mut bench), [family::V4; 2]);
    assert_eq!(bench.programmer.node_ports(), BTreeSet::from([30_080]));
    assert_ne!(bench.config(NODE_PORT).flags & Config::NODE, 0);
    bench.programmer.set_node(node(&["198.51.100.1", "2001:db8::1"]));
    bench.serve(&[v4, v6.clone()]);
    assert_eq!(told(&mut bench), [family::V4 | family::V6; 2]);
    bench = bench.restart();
    assert_eq!(bench.programmer.node_ports(), BTreeSet::from([30_080]));
    bench.programmer.set_node(node(&["198.51.100.1", "2001:db8::1"]));
    bench.serve(&[v6]);
    assert_eq!(told(&mut bench), [family::V6; 2]);
    bench.programmer.set_node(node(&["198.51.100.1"]));
    assert_eq!(told(&mut bench), [0; 2], "without an address of its family it is served nowhere");
    assert_eq!((bench.maps().node_ports.len(), bench.programmer.node_ports().len()), (0, 0));
}

#[test]
fn who_names_an_address_of_the_node_has_it() {
    let ports = || {
        defined("ports", |ports| {
            ports.node_ports.push(node_port("30080/tcp"));
            ports.backends = vec![placed(1, true)];
        })
    };
    let named = || service("named", &[NODE_PORT], &[B]);
    let held = || ApplyError::Held { frontend: NODE_PORT.parse().unwrap(), holder: "named".to_owned() };
    let of =
        |bench: &Bench| bench.programmer.services.get(bench.config(NODE_PORT).service).unwrap().name.clone().unwrap();
    for order in [false, true] {
        let both = || if order { vec![ports(), named()] } else { vec![named(), ports()] };
        let mut bench = Bench::at(node(&["198.51.100.1", "198.51.100.2"]));
        for _ in 0..3 {
            let report = bench.apply(&both());
            assert_eq!(report.failed, [("ports".to_owned(), held())]);
            assert_eq!(of(&bench), "named");
            bench.assert_served(&ports().service);
        }
        let stores = bench.log().iter().filter(|op| **op == Op::Service(key(NODE_PORT))).count();
        assert_eq!(stores, 1, "it does not go to and fro");
        // The one lets go, and the other has it by one switch.
        let touch = |wanted: Option<Desired>| [Touched { name: "named".to_owned(), wanted }];
        assert_eq!(bench.programmer.apply_touched(&touch(None)).failed, []);
        assert_eq!(of(&bench), "ports");
        let removed = bench.log().contains(&Op::RemoveService(key(NODE_PORT)));
        assert!(!removed);
        bench.assert_serves(&[ports()]);
        let report = bench.programmer.apply_touched(&touch(Some(named())));
        assert_eq!(report.failed, [("ports".to_owned(), held())]);
        assert_eq!(of(&bench), "named");
        // An address that comes to the node later is as well somebody's already.
        bench.programmer.set_node(node(&[]));
        assert_eq!(bench.apply(&both()).failed, []);
        assert_eq!(bench.programmer.set_node(node(&["198.51.100.1"])).failed, [("ports".to_owned(), held())]);
        bench.serve(&[]);
        bench.programmer.set_node(Node::default());
        bench.rest();
        bench.assert_empty();
    }
}

#[test]
fn a_service_with_another_name_keeps_what_it_has() {
    let mut bench = Bench::at(node(&["198.51.100.1"]));
    let named = |name: &str, last: u8| {
        defined(name, |service| {
            service.frontends.push(DNS.parse().unwrap());
            service.node_ports.push(node_port("30080/tcp"));
            service.backends = vec![placed(last, false), placed(9, true)];
        })
    };
    bench.serve(&[named("one", 1)]);
    let before = (bench.config(DNS), bench.config(NODE_PORT));
    for name in ["two", "one"] {
        bench.log();
        bench.serve(&[named(name, 1)]);
        assert_eq!((bench.config(DNS), bench.config(NODE_PORT)), before);
        assert_eq!(bench.backend_flags(name, 1), ACTIVE);
    }
    // By a change of these alone, which may change more than the name.
    let touched = |name: &str, wanted| Touched { name: name.to_owned(), wanted };
    let report = bench.programmer.apply_touched(&[touched("one", None), touched("three", Some(named("three", 2)))]);
    assert_eq!(report.failed, []);
    assert_eq!(bench.config(DNS).service, before.0.service);
    assert_eq!((bench.backend_flags("three", 9), bench.backend_flags("three", 1)), (ACTIVE | LOCAL, 0));
    bench.serve(&[]);
    bench.programmer.set_node(Node::default());
    bench.rest();
    bench.assert_empty();
}

#[test]
fn datagrams_move_when_their_backend_stops_serving_and_stay_where_nobody_serves() {
    let mut bench = Bench::at(node(&[]));
    let serve = |bench: &mut Bench, backends: Vec<model::Backend>| {
        bench.serve(&[defined("dns", |dns| {
            dns.frontends.push(DNS.parse().unwrap());
            dns.backends = backends;
        })]);
    };
    let (one, two) = (placed(1, false), placed(2, false));
    serve(&mut bench, vec![one.clone(), two.clone()]);
    // On its way out it keeps its flows and gets no new ones.
    serve(&mut bench, vec![when(one.clone(), false, true, true), two.clone()]);
    assert_eq!(bench.backend_flags("dns", 1), Backend::SERVING);
    assert_eq!(bench.hosts(&bench.config(DNS)), [2].into());
    assert_eq!(bench.config(DNS).members_len, 2, "flows that lost their slot are looked for at it");
    serve(&mut bench, vec![when(one.clone(), false, false, true), two.clone()]);
    assert_eq!(bench.backend_flags("dns", 1), 0);
    // The last resort takes flows.
    serve(&mut bench, vec![when(one.clone(), false, true, true)]);
    assert_eq!((bench.backend_flags("dns", 1), bench.backend_flags("dns", 2)), (ACTIVE, 0));
    // Nobody serves: nothing is cut until somebody does.
    serve(&mut bench, vec![when(one.clone(), false, false, true)]);
    assert_eq!(bench.backend_flags("dns", 1), Backend::SERVING);
    serve(&mut bench, vec![]);
    assert_eq!((bench.backend_flags("dns", 1), bench.config(DNS).ring_len), (Backend::SERVING, 0));
    serve(&mut bench, vec![when(two.clone(), false, false, false)]);
    assert_eq!(bench.backend_flags("dns", 1), Backend::SERVING);
    serve(&mut bench, vec![two.clone()]);
    assert_eq!((bench.backend_flags("dns", 1), bench.backend_flags("dns", 2)), (0, ACTIVE));
    // One after the other, as those who watch them say it.
    serve(&mut bench, vec![one.clone(), two.clone()]);
    serve(&mut bench, vec![when(one.clone(), false, false, false), two.clone()]);
    assert_eq!(bench.backend_flags("dns", 1), 0);
    serve(&mut bench, vec![when(one.clone(), false, false, false), when(two.clone(), false, false, false)]);
    assert_eq!([1, 2].map(|last| bench.backend_flags("dns", last)), [Backend::SERVING; 2]);
    serve(&mut bench, vec![when(one, false, false, false), two]);
    assert_eq!((bench.backend_flags("dns", 1), bench.backend_flags("dns", 2)), (0, ACTIVE));
    bench.serve(&[]);
    bench.rest();
    bench.assert_empty();
}

#[test]
fn source_ranges_are_there_before_they_are_asked_for() {
    const BALANCER: &str = "192.0.2.90:80/tcp";
    let shop = |ranges: &[&str]| {
        defined("shop", |shop| {
            shop.load_balancer_ips.push(BALANCER.parse().unwrap());
            shop.external_ips.push(EXTERNAL.parse().unwrap());
            shop.source_ranges = ranges.iter().map(|range| range.parse().unwrap()).collect();
            shop.backends = vec![placed(1, true)];
        })
    };
    let ranges = |bench: &Bench| -> HashSet<(u32, Addr, u32)> {
        let ranges = bench.programmer.maps.ranges.iter();
        let flat = |key: &RangeKey| {
            let bytes: Vec<u8> = key.addr.iter().flat_map(|word| word.to_ne_bytes()).collect();
            Addr::from_bytes(bytes.try_into().unwrap())
        };
        ranges.map(|(bits, key)| (key.service, flat(key), bits - RangeKey::SERVICE_BITS)).collect()
    };
    let mut bench = Bench::at(node(&["198.51.100.1"]));
    bench.serve(&[shop(&[])]);
    assert_eq!((bench.config(BALANCER).flags, ranges(&bench)), (0, [].into()));
    bench.log();
    bench.serve(&[shop(&["203.0.113.77/24", "10.0.0.0/8"])]);
    let log = bench.log();
    assert!(position(&log, |op| matches!(op, Op::Range(..))) < position(&log, |op| *op == Op::Service(key(BALANCER))));
    assert_eq!((bench.config(BALANCER).flags, bench.config(EXTERNAL).flags), (Config::RANGES, 0));
    let service = bench.config(BALANCER).service;
    let (ten, doc) = ((service, addr("10.0.0.0"), 96 + 8), (service, addr("203.0.113.0"), 96 + 24));
    assert_eq!(ranges(&bench), [ten, doc].into());
    assert_eq!(bench.used("SOURCE_RANGES"), 2);
    // The node is let in, and so is the address itself.
    assert_eq!(bench.programmer.set_node(node(&["10.0.0.1"])).changed, 1);
    assert_eq!(bench.config(BALANCER).flags, Config::RANGES | Config::RANGES_HAVE_NODE);
    assert_eq!(ranges(&bench), [ten, doc, (service, addr("192.0.2.90"), 128)].into());

    let stale = RangeKey::new(service + 9, addr("10.0.0.0"));
    bench.maps().ranges.insert((64, stale));
    let mut bench = bench.restart();
    bench.programmer.set_node(node(&["10.0.0.1"]));
    bench.serve(&[shop(&["203.0.113.77/24"])]);
    assert_eq!((ranges(&bench), bench.config(BALANCER).flags), ([doc].into(), Config::RANGES));
    bench.log();
    bench.serve(&[shop(&[])]);
    let log = bench.log();
    assert!(
        position(&log, |op| *op == Op::Service(key(BALANCER))) < position(&log, |op| matches!(op, Op::RemoveRange(..)))
    );
    bench.serve(&[shop(&["203.0.113.77/24"])]);
    bench.serve(&[]);
    assert_eq!(ranges(&bench), [].into());
}

#[test]
fn addresses_are_known_as_long_as_a_service_or_the_node_has_them() {
    use netlb_common::maps::address::{NODE, SERVICE};
    let known =
        |bench: &Bench| bench.programmer.maps.addresses.iter().map(|(a, b)| (*a, *b)).collect::<HashMap<_, _>>();
    let mut bench = Bench::at(node(&["198.51.100.1"]));
    let (vip, external, host) = (addr("10.96.0.10"), addr("192.0.2.80"), addr("198.51.100.1"));
    bench.serve(&[shop(|_| ()), service("other", &["10.96.0.10:443/tcp"], &[A])]);
    let all = HashMap::from([(vip, SERVICE), (external, SERVICE), (host, NODE)]);
    assert_eq!(known(&bench), all, "a node port makes no address a service's");
    bench.programmer.maps.take_log();
    bench.serve(&[service("other", &["10.96.0.10:443/tcp"], &[A]), service("ext", &[EXTERNAL], &[A])]);
    let written = bench.programmer.maps.take_log();
    assert!(!written.iter().any(|op| matches!(op, Op::Address(..) | Op::RemoveAddress(_))), "{written:?}");
    bench.programmer.set_node(node(&["192.0.2.80"]));
    assert_eq!(known(&bench), HashMap::from([(vip, SERVICE), (external, SERVICE | NODE)]));

    bench.maps().addresses.insert(addr("10.96.0.99"), SERVICE);
    let mut bench = bench.restart();
    bench.programmer.set_node(node(&["192.0.2.80"]));
    assert_eq!(bench.used("ADDRESSES"), 3, "nothing goes before all services are known");
    bench.serve(&[service("ext", &[EXTERNAL], &[A])]);
    assert_eq!(known(&bench), HashMap::from([(external, SERVICE | NODE)]));
}

#[test]
fn clients_are_forgotten_when_their_time_is_over() {
    use netlb_common::maps::{Affinity, AffinityKey};
    let web = |seconds: &str| {
        defined("web", |web| {
            web.frontends.push(WEB.parse().unwrap());
            web.affinity = seconds.parse().unwrap();
            web.backends = vec![placed(1, true)];
        })
    };
    let mut bench = Bench::new();
    bench.serve(&[web("client-ip:60"), service("other", &[DNS], &[A])]);
    let (config, other) = (bench.config(WEB), bench.config(DNS));
    assert_eq!((config.affinity, other.affinity), (56, 0));
    let backend = bench.maps().members(config.members, 1)[0];
    let now = bench.clock.now();
    let remember = |bench: &mut Bench, last: u8, service, backend| {
        let key = AffinityKey::new(Addr::from_v4([10, 1, 1, last]), service, 6);
        bench.maps().affinities.push((key, Affinity::new(backend, now)));
    };
    remember(&mut bench, 1, config.service, backend);
    remember(&mut bench, 2, other.service, backend);
    remember(&mut bench, 3, other.service + 9, backend);
    remember(&mut bench, 4, config.service, backend + 50);
    bench.tick(56);
    let left: Vec<_> = bench.maps().affinities.iter().map(|(key, _)| key.client).collect();
    assert_eq!(left, [Addr::from_v4([10, 1, 1, 1])]);
    assert_eq!(bench.used("AFFINITY"), 1);
    let mut bench = bench.restart();
    bench.tick(0);
    assert_eq!(bench.maps().affinities.len(), 1);
    bench.tick(1);
    assert_eq!(bench.maps().affinities.len(), 0);
    bench.serve(&[web("client-ip:60")]);
    remember(&mut bench, 1, config.service, backend);
    bench.serve(&[web("none")]);
    assert_eq!(bench.config(WEB).affinity, 0);
    bench.tick(1);
    assert_eq!(bench.maps().affinities.len(), 0);
    // What a packet that was under way made late. Where nobody asks for entries, they are looked for once in a while.
    remember(&mut bench, 1, config.service, backend);
    bench.tick(100);
    assert_eq!(bench.maps().affinities.len(), 1);
    bench.tick(200);
    assert_eq!(bench.maps().affinities.len(), 0);
}

#[test]
fn a_new_daemon_takes_over_both_records_of_a_frontend() {
    let mut bench = Bench::at(node(&["198.51.100.1"]));
    let desired = [shop(|shop| {
        shop.external_traffic_policy = TrafficPolicy::Local;
        shop.frontends.clear();
        shop.external_ips.clear();
    })];
    bench.serve(&desired);
    let usage = bench.programmer.map_usage();
    bench.log();
    let mut bench = bench.restart();
    bench.programmer.set_node(node(&["198.51.100.1"]));
    assert_eq!(bench.programmer.map_usage(), usage);
    assert_eq!(bench.serve(&desired), 0);
    assert_eq!(bench.log(), [Op::Grace]);
    assert_eq!(bench.programmer.names["shop"], bench.config(NODE_PORT).service, "known by its node port");
    let mut bench = bench.restart();
    bench.serve(&[]);
    bench.rest();
    bench.assert_empty();
}
