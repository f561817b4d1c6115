//! A service is reached at its virtual address from a pod, however pods and hosts are joined.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use netlb_integration::clients;
use netlb_integration::cluster::Cluster;
use netlb_integration::daemon::{Config, Forwarding, Netlb, Service};
use netlb_integration::load;
use netlb_integration::netns::Namespace;
use netlb_integration::servers::{self, Answer, Protocol};
use netlb_integration::testing::TestResult;
use netlb_integration::topology::{Family, Host, Layout, Plan, vip};

const REQUESTS: usize = 600;

/// Each line is a test: a layout, and how packets are forwarded on it. Each is run with both families.
macro_rules! every_backend_answers {
    ($($name:ident: $layout:ident, $forwarding:ident;)+) => {
        $(#[test]
        fn $name() -> TestResult {
            every_backend_answers_and_sees_the_client(Layout::$layout, Forwarding::$forwarding)
        })+
    };
}

every_backend_answers! {
    over_routed_veths_fast: Ptp, Fast;
    over_routed_veths_by_the_stack: Ptp, Stack;
    over_a_bridge_fast: Bridge, Fast;
    over_a_bridge_by_the_stack: Bridge, Stack;
    between_routed_hosts_fast: Routed, Fast;
    between_routed_hosts_by_the_stack: Routed, Stack;
    through_vxlan_fast: Vxlan, Fast;
    through_vxlan_by_the_stack: Vxlan, Stack;
}

fn every_backend_answers_and_sees_the_client(layout: Layout, forwarding: Forwarding) -> TestResult {
    let plan = Plan::new(layout).pod_mtu(1450);
    let cluster = Cluster::start(plan, forwarding, (80, Protocol::Tcp), 3, |pod| servers::nginx(pod, 8080))?;
    let client = &cluster.client;
    for family in Family::BOTH {
        let case = format!("{layout:?}, {forwarding}, {family}");
        let server = cluster.vip(family);
        let by_curl = clients::curl(&client.ns, server)?;
        assert_eq!(by_curl.client.ip(), client.ip(family), "{case}: the backend sees the client's own address");

        let answers = ask(&client.ns, server, REQUESTS);
        assert_eq!(answers.failures, Vec::<String>::new(), "{case}: failed requests of {REQUESTS}");
        let strangers: Vec<_> = answers.good.iter().filter(|answer| answer.client.ip() != client.ip(family)).collect();
        assert!(strangers.is_empty(), "{case}: backends see other addresses than {}: {strangers:?}", client.ip(family));
        let backends = cluster.servers.iter().map(|server| (server.addr(family), 1)).collect::<Vec<_>>();
        assert_shares(&case, &answers.good, &backends);

        for backend in &cluster.servers {
            let direct = ask(&client.ns, backend.addr(family), 1);
            assert_eq!(direct.failures, Vec::<String>::new(), "{case}: a request to a backend's own address");
        }
    }
    Ok(())
}

#[test]
fn weights_decide_the_shares() -> TestResult {
    for algorithm in ["maglev", "random", "round-robin"] {
        let bed = Plan::new(Layout::Ptp).build()?;
        let client = bed.pod(Host::A, "client")?;
        let (light, heavy) = (bed.pod(Host::A, "light")?, bed.pod(Host::A, "heavy")?);
        let (light_server, heavy_server) = (servers::nginx(&light, 8080)?, servers::nginx(&heavy, 8080)?);
        let [light, heavy] = [&light_server, &heavy_server].map(|server| server.addr(Family::V4));
        let server = SocketAddr::new(vip(Family::V4, 10), 80);
        let service = Service::new("web", format!("{server}/tcp"), [light]).weighted(heavy, 3).algorithm(algorithm);
        let _netlb = Netlb::start(bed.node_a(), &Config::new(bed.node_a(), Forwarding::Fast).service(service))?;
        let answers = ask(&client.ns, server, REQUESTS);
        assert_eq!(answers.failures, Vec::<String>::new(), "{algorithm}");
        assert_shares(algorithm, &answers.good, &[(light, 1), (heavy, 3)]);
    }
    Ok(())
}

#[test]
fn a_service_added_on_the_command_line_is_served_at_once_and_is_gone_when_it_is_removed() -> TestResult {
    let bed = Plan::new(Layout::Ptp).build()?;
    let (client, backend) = (bed.pod(Host::A, "client")?, bed.pod(Host::A, "backend")?);
    let nginx = servers::nginx(&backend, 8080)?;
    let netlb = Netlb::start(bed.node_a(), &Config::new(bed.node_a(), Forwarding::Fast))?;
    for family in Family::BOTH {
        let server = SocketAddr::new(vip(family, 20), 80);
        let (frontend, backend) = (format!("{server}/tcp"), nginx.addr(family).to_string());
        netlb.must(["svc", "add", &frontend, "--backend", &backend, "--name", "added"])?;
        assert_eq!(ask(&client.ns, server, 1).failures, Vec::<String>::new(), "{family}: added");
        netlb.must(["svc", "rm", "added"])?;
        assert_eq!(ask(&client.ns, server, 1).good, Vec::<Answer>::new(), "{family}: removed");
    }
    Ok(())
}

#[test]
fn one_virtual_address_has_services_on_several_ports_and_protocols() -> TestResult {
    let bed = Plan::new(Layout::Ptp).build()?;
    let client = bed.pod(Host::A, "client")?;
    let pods = [bed.pod(Host::A, "one")?, bed.pod(Host::A, "two")?];
    let nginx = [servers::nginx(&pods[0], 8080)?, servers::nginx(&pods[1], 9090)?];
    let dns = servers::dns(&pods[0], 53)?;
    for family in Family::BOTH {
        let at = |port| SocketAddr::new(vip(family, 10), port);
        let config = Config::new(bed.node_a(), Forwarding::Fast)
            .service(Service::new("one", format!("{}/tcp", at(80)), [nginx[0].addr(family)]))
            .service(Service::new("two", format!("{}/tcp", at(81)), [nginx[1].addr(family)]))
            .service(Service::new("dns", format!("{}/udp", at(80)), [dns.addr(family)]));
        let _netlb = Netlb::start(bed.node_a(), &config)?;
        assert_eq!(clients::curl(&client.ns, at(80))?.name, "one", "{family}");
        assert_eq!(clients::curl(&client.ns, at(81))?.name, "two", "{family}");
        assert_eq!(clients::dns_who(&client.ns, at(80), false)?, "one", "{family}");
        assert!(clients::curl(&client.ns, at(82)).is_err(), "{family}: nobody serves port 82");
    }
    Ok(())
}

#[derive(Debug, Default)]
struct Answers {
    good: Vec<Answer>,
    failures: Vec<String>,
}

/// Asks a web server from a namespace, each time on a new connection.
fn ask(ns: &Namespace, server: SocketAddr, times: usize) -> Answers {
    let ask = || {
        let mut answers = Answers::default();
        for _ in 0..times {
            match load::get(server) {
                Ok(answer) => answers.good.push(answer),
                Err(error) => answers.failures.push(format!("{server}: {error:#}")),
            }
            // A failure may take seconds; a few tell as much as hundreds.
            if answers.failures.len() == 3 {
                break;
            }
        }
        answers
    };
    ns.enter(ask).unwrap_or_else(|error| Answers { failures: vec![format!("{error:#}")], ..Answers::default() })
}

/// Every backend has its share of the answers, give or take a quarter, and nobody else has any.
fn assert_shares(case: &str, answers: &[Answer], weighted: &[(SocketAddr, usize)]) {
    let mut counts: BTreeMap<_, usize> = BTreeMap::new();
    for answer in answers {
        *counts.entry(answer.backend).or_default() += 1;
    }
    let weights: usize = weighted.iter().map(|(_, weight)| weight).sum();
    for &(backend, weight) in weighted {
        let (count, share) = (counts.remove(&backend).unwrap_or(0), answers.len() * weight / weights);
        assert!(
            count.abs_diff(share) <= share / 4,
            "{case}: {backend} answered {count} of {} requests, its share is {share}",
            answers.len()
        );
    }
    assert!(counts.is_empty(), "{case}: others answered: {counts:?}");
}
