use std::sync::Arc;

use super::*;
use crate::model::{Conditions, Definition, Placement};

/// A backend by its last number, on one of the nodes `here` and `there`.
fn backend(last: u8, node: &str) -> Backend {
    let placement = Placement { node: Some(node.to_owned()), ..Placement::default() };
    Backend { placement: Some(Arc::new(placement)), ..Backend::new(format!("10.244.1.{last}:80").parse().unwrap()) }
}

fn when(mut backend: Backend, ready: bool, serving: bool, terminating: bool) -> Backend {
    backend.conditions = Conditions { ready, serving, terminating };
    backend
}

fn hinted(mut backend: Backend, nodes: &[&str], zones: &[&str]) -> Backend {
    let owned = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
    let placement = Arc::make_mut(backend.placement.as_mut().unwrap());
    (placement.hint_nodes, placement.hint_zones) = (owned(nodes), owned(zones));
    backend
}

fn definition(backends: Vec<Backend>) -> Definition {
    Definition { frontends: vec!["10.96.0.10:80/tcp".parse().unwrap()], backends, ..Definition::default() }
}

fn service(backends: Vec<Backend>) -> Service {
    Service::define(definition(backends)).unwrap()
}

fn here() -> Node {
    Node {
        name: "here".to_owned(),
        zone: Some("a".to_owned()),
        node_port_addresses: vec!["192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap()],
        addresses: vec!["192.0.2.1".parse().unwrap(), "198.51.100.1".parse().unwrap()],
        serves_sockets: true,
    }
}

/// The last numbers of the backends in both sets.
fn sets(backends: Vec<Backend>) -> (Vec<u8>, Vec<u8>) {
    let service = service(backends);
    let resolved = Resolved::new(&service, &here());
    let last = |set: &[&Backend]| {
        set.iter().map(|backend| backend.address.to_string()[9..].split(':').next().unwrap().parse().unwrap()).collect()
    };
    (last(&resolved.cluster), last(&resolved.local))
}

#[test]
fn policies_choose_from_all_and_from_those_here() {
    assert_eq!(sets(vec![backend(1, "here"), backend(2, "there")]), (vec![1, 2], vec![1]));
    // One that nobody says the node of is not known to be here.
    let unknown = Backend::new("10.244.1.3:80".parse().unwrap());
    assert_eq!(sets(vec![unknown]), (vec![3], vec![]));
}

#[test]
fn each_set_falls_back_by_itself_to_those_that_leave_and_answer_still() {
    let leaving = |last, node| when(backend(last, node), false, true, true);
    assert_eq!(sets(vec![leaving(1, "here"), backend(2, "there")]), (vec![2], vec![1]));
    assert_eq!(sets(vec![leaving(1, "here"), leaving(2, "there")]), (vec![1, 2], vec![1]));
    let dead = when(backend(3, "here"), false, false, true);
    assert_eq!(sets(vec![leaving(1, "there"), dead]), (vec![1], vec![]));
    // Not ready yet is not on its way out.
    assert_eq!(sets(vec![when(backend(1, "here"), false, true, false)]), (vec![], vec![]));
}

#[test]
fn draining_backends_are_in_no_set() {
    let mut drains = backend(1, "here");
    drains.state = BackendState::Draining;
    assert_eq!(sets(vec![drains.clone(), backend(2, "here")]), (vec![2], vec![2]));
    assert_eq!(sets(vec![drains]), (vec![], vec![]));
}

#[test]
fn hints_count_where_every_ready_backend_has_them_and_one_is_for_us() {
    let a = |last| hinted(backend(last, "there"), &[], &["a"]);
    let b = |last| hinted(backend(last, "there"), &[], &["b"]);
    assert_eq!(sets(vec![a(1), b(2)]).0, [1]);
    assert_eq!(sets(vec![b(1), b(2)]).0, [1, 2], "none is for our zone");
    assert_eq!(sets(vec![a(1), backend(2, "there")]).0, [1, 2], "one has none");
    let ours = |last| hinted(backend(last, "there"), &["here"], &["b"]);
    let theirs = |last| hinted(backend(last, "there"), &["there"], &["a"]);
    assert_eq!(sets(vec![ours(1), theirs(2)]).0, [1], "nodes come before zones");
    assert_eq!(
        sets(vec![theirs(1), hinted(backend(2, "there"), &["there"], &["b"])]).0,
        [1],
        "zones where no node is us"
    );
    // They say nothing of policies, and nothing where all leave.
    assert_eq!(sets(vec![b(1), hinted(backend(2, "here"), &[], &["b"]), a(3)]), (vec![3], vec![2]));
    let leaving = when(b(1), false, true, true);
    assert_eq!(sets(vec![leaving, when(a(2), false, true, true)]).0, [1, 2]);
}

#[test]
fn an_empty_set_drops_where_others_have_backends_and_rejects_where_nobody_has() {
    let drops = |backends| {
        let service = service(backends);
        let resolved = Resolved::new(&service, &here());
        (resolved.drops(Set::Cluster), resolved.drops(Set::Local))
    };
    assert_eq!(drops(vec![backend(1, "there")]), (false, true));
    assert_eq!(drops(vec![]), (false, false));
    assert_eq!(drops(vec![when(backend(1, "there"), false, false, false)]), (false, false));
}

#[test]
fn every_kind_of_address_has_the_rules_of_its_policy() {
    use TrafficPolicy::{Cluster, Local};
    let of = |internal, external, snat| {
        let service = Service::define(Definition {
            external_ips: vec!["203.0.113.1:80/tcp".parse().unwrap()],
            load_balancer_ips: vec!["203.0.113.2:80/tcp".parse().unwrap()],
            node_ports: vec![NodePort {
                port: 30080.try_into().unwrap(),
                protocol: "10.0.0.1:1/tcp".parse::<Frontend>().unwrap().protocol,
            }],
            internal_traffic_policy: internal,
            external_traffic_policy: external,
            snat,
            ..definition(vec![])
        });
        let service = service.unwrap();
        Resolved::new(&service, &here()).frontends
    };
    let always = |pods| Snat::Always { pods, outside: true };
    let rule = |set, snat| Rule { set, snat };

    let upstream = of(Cluster, Cluster, SnatMode::Always);
    let kinds: Vec<_> = upstream.iter().map(|frontend| (frontend.frontend.to_string(), frontend.kind)).collect();
    assert_eq!(
        kinds,
        [
            ("10.96.0.10:80/tcp".to_owned(), Kind::Cluster),
            ("203.0.113.1:80/tcp".to_owned(), Kind::External),
            ("203.0.113.2:80/tcp".to_owned(), Kind::LoadBalancer),
            ("192.0.2.1:30080/tcp".to_owned(), Kind::Node),
            ("127.0.0.1:30080/tcp".to_owned(), Kind::Node),
        ]
    );
    assert_eq!((upstream[0].inside, upstream[0].outside), (rule(Set::Cluster, always(false)), None));
    for external in &upstream[1..] {
        assert_eq!((external.inside, external.outside), (rule(Set::Cluster, always(true)), None));
    }
    let internal = of(Local, Cluster, SnatMode::Auto);
    assert_eq!((internal[0].inside, internal[0].outside), (rule(Set::Local, Snat::Auto), None));
    assert!(internal[1..].iter().all(|external| external.inside == rule(Set::Cluster, Snat::Auto)));
    let external = of(Cluster, Local, SnatMode::Always);
    assert_eq!(external[0].inside, rule(Set::Cluster, always(false)));
    for external in &external[1..] {
        assert_eq!(external.inside, rule(Set::Cluster, Snat::Auto), "pods reach all, as themselves");
        assert_eq!(external.outside, Some(rule(Set::Local, Snat::Never)));
    }
}

#[test]
fn what_is_published_is_served_at_all_addresses_or_at_one() {
    let published = |publish: &[&str], serves_sockets| {
        let publish = publish.iter().map(|text| text.parse().unwrap()).collect();
        let service = Service::define(Definition { publish, ..Definition::default() }).unwrap();
        let resolved = Resolved::new(&service, &Node { serves_sockets, ..here() });
        resolved.frontends.iter().map(|frontend| frontend.frontend.to_string()).collect::<Vec<_>>()
    };
    assert_eq!(published(&["8080:80"], false), ["192.0.2.1:8080/tcp", "198.51.100.1:8080/tcp"]);
    assert_eq!(published(&["192.0.2.1:8080:80/udp"], true), ["192.0.2.1:8080/udp"]);
    assert_eq!(published(&["0.0.0.0:53:53/udp"], true).len(), 3, "and at 127.0.0.1, for sockets");
}
