use std::time::{Duration, Instant};

use super::*;
use crate::model::{Algorithm, BackendState, Mode, SnatMode};

fn parse(text: &str) -> Config {
    Config::parse("netlb.toml", text).unwrap_or_else(|error| panic!("{error}"))
}

fn refused(text: &str) -> String {
    match Config::parse("netlb.toml", text) {
        Ok(config) => panic!("accepted as {config:?}"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn masquerading_names_networks_of_both_families() {
    let text = "[masquerade]\npod_cidrs = [\"10.244.0.0/16\", \"fd00:10:244::/48\"]\nexclude = [\"192.0.2.7/24\"]\n";
    let config = Config::parse("netlb.toml", text).unwrap();
    let networks = |cidrs: &Cidrs| cidrs.networks().iter().map(ToString::to_string).collect::<Vec<_>>();
    assert_eq!(networks(&config.masquerade.pod_cidrs), ["10.244.0.0/16", "fd00:10:244::/48"]);
    assert_eq!(networks(&config.masquerade.exclude), ["192.0.2.0/24"]);
    assert_eq!(config.needs_restart(&Config::default()), ["[masquerade]"]);
    let error = refused("[masquerade]\npod_cidrs = [\"10.244.0.0/33\"]\n");
    assert!(error.starts_with("netlb.toml:2:14: ") && error.contains("`10.244.0.0/33` is not a network"), "{error}");
    let many = ["\"10.0.0.0/8\""; 9].join(", ");
    let error = refused(&format!("[masquerade]\nexclude = [{many}]\n"));
    assert!(error.contains("9 networks are too many; the most is 8"), "{error}");
}

#[test]
fn sources_are_addresses_that_a_node_can_have() {
    let config = Config::parse("netlb.toml", "[snat]\naddresses = [\"192.0.2.1\", \"2001:db8::1\"]\n").unwrap();
    assert_eq!(config.snat.addresses.len(), 2);
    assert_eq!(config.needs_restart(&Config::default()), ["[snat]"]);
    let refused = |addresses: &str| refused(&format!("[snat]\naddresses = [{addresses}]\n"));
    assert!(refused("\"127.0.0.1\"").contains("127.0.0.1 cannot be the source of what leaves the node"));
    assert!(refused("\"ff02::1\"").contains("ff02::1 cannot be"));
    assert!(refused("\"192.0.2.1\", \"192.0.2.1\"").contains("192.0.2.1 is named twice"));
    let many = (1..10).map(|n| format!("\"192.0.2.{n}\"")).collect::<Vec<_>>().join(", ");
    assert!(refused(&many).contains("more than 8 addresses of one family"));
}

#[test]
fn an_empty_file_is_a_configuration() {
    assert_eq!(parse(""), Config::default());
    assert_eq!(parse("").limits.flows, 300_000);
}

#[test]
fn every_documented_key_is_read() {
    let config = parse(
        r#"
[node]
pod_interfaces = ["veth*", "pod-*"]
uplinks = ["eth0"]
bridges = ["cni0", "br*"]
forwarding = "stack"
tcx_order = "last"
attach = "clsact"
name = "node-1"
zone = "a"
node_port_addresses = ["192.0.2.1/24", "2001:db8::/64"]
pod_cidrs = ["10.244.1.0/24"]
owned_cidrs = ["10.96.0.0/12", "fd00:10:96::/112"]
echo = false
[socket]
scope = "node"
cgroup = "/sys/fs/cgroup/system.slice"
[api]
socket = "/run/other.sock"
[limits]
services = 10
backends = 20
flows = 30
ring_slots = 40
sockets = 50
[timeouts]
tcp_syn = "5s"
tcp_established = "4h30m"
tcp_closing = "1s"
tcp_half_closed = "1m"
udp_one_way = "1h"
udp_both_ways = "1m30s"
[log]
level = "debug"
format = "json"
dataplane = "warn"
[[service]]
name = "web"
frontends = ["10.96.0.10:80/tcp", "10.96.0.10:443/TCP"]
backends = ["10.244.1.2:8080", "10.244.2.7:8080=2", { address = "10.244.2.8:8080", weight = 3, state = "draining" }]
algorithm = "round-robin"
snat = "always"
[[service]]
frontend = "[fd00::10]:53/udp"
"#,
    );
    assert!(config.node.pod_interfaces[1].matches("pod-7"));
    assert_eq!(config.node.forwarding, Forwarding::Stack);
    assert_eq!((config.node.name.as_deref(), config.node.zone.as_deref()), (Some("node-1"), Some("a")));
    let networks = vec!["192.0.2.0/24".parse().unwrap(), "2001:db8::/64".parse().unwrap()];
    assert_eq!(config.node.node_port_addresses, NodePortAddresses::In(networks));
    assert_eq!((config.node.pod_cidrs.networks().len(), config.node.owned_cidrs.networks().len()), (1, 2));
    assert!(!config.node.echo && parse("").node.echo);
    let cgroup = Some("/sys/fs/cgroup/system.slice".into());
    assert_eq!(config.socket, Socket { scope: SocketScope::Node, cgroup });
    assert_eq!(config.limits, Limits { services: 10, backends: 20, flows: 30, ring_slots: 40, sockets: 50 });
    assert_eq!(config.timeouts.tcp_established, Duration::from_secs(16_200));
    assert_eq!(config.log, Log { level: LogLevel::Debug, format: LogFormat::Json, dataplane: LogLevel::Warn });
    let [web, dns] = &config.services[..] else { panic!("{:?}", config.services) };
    assert_eq!(web.name(), "web");
    assert_eq!((web.algorithm(), web.snat()), (Algorithm::RoundRobin, SnatMode::Always));
    assert_eq!(web.backends().iter().map(|b| b.weight.get()).collect::<Vec<_>>(), [1, 2, 3]);
    assert_eq!(web.backends()[2].state, BackendState::Draining);
    assert_eq!((dns.name(), dns.snat()), ("[fd00::10]:53/udp", SnatMode::Auto));
}

#[test]
fn a_service_with_direct_server_return_and_the_nodes_that_are_accepted() {
    let config = parse(
        r#"
[dsr]
accept_from = ["192.168.0.0/24", "fd00::/64"]
[[service]]
frontend = "10.96.0.10:80/tcp"
mode = "dsr"
"#,
    );
    assert_eq!(config.dsr.accept_from.networks().len(), 2);
    assert_eq!(config.services[0].definition().mode, Mode::Dsr);
    assert!(parse("").dsr.accept_from.networks().is_empty());
    let both = "[[service]]\nfrontend = \"10.96.0.10:80/tcp\"\nmode = \"dsr\"\nsnat = \"never\"\n";
    assert!(refused(both).contains("has mode dsr, where backends see clients' addresses, and snat never"));
}

#[test]
fn an_unknown_key_is_refused_with_its_place_and_the_nearest_known_one() {
    assert_eq!(
        refused("[[service]]\nfrontend = \"10.96.0.10:80/tcp\"\nbackend = [\"10.244.1.2:8080\"]\n"),
        "\
netlb.toml:3:1: unknown field `backend`, expected one of `name`, `frontends`, `frontend`, `external_ips`, `lb_ips`, `load_balancer_ips`, `node_ports`, `node_port`, `publish`, `source_ranges`, `family`, `backends`, `algorithm`, `snat`, `mode`, `affinity`, `external_traffic_policy`, `internal_traffic_policy`
  |
3 | backend = [\"10.244.1.2:8080\"]
  | ^^^^^^^
  = help: did you mean `backends`?"
    );
}

#[test]
fn unknown_keys_are_refused_in_every_section() {
    for text in [
        "nod = 1",
        "[node]\nuplink = []",
        "[socket]\nscop = 1",
        "[api]\nsock = 1",
        "[limits]\nflow = 1",
        "[timeouts]\ntcp = 1",
        "[log]\nlvl = 1",
    ] {
        assert!(refused(text).contains("unknown field"), "{text}");
    }
}

#[test]
fn a_wrong_value_is_shown_with_its_place() {
    assert_eq!(
        refused("[node]\nforwarding = \"quick\"\n"),
        "\
netlb.toml:2:14: unknown variant `quick`, expected `fast` or `stack`
  |
2 | forwarding = \"quick\"
  |              ^^^^^^^"
    );
    let error = refused("[[service]]\nfrontend = \"10.96.0.10:80/tcp\"\nsnat = \"sometimes\"\n");
    assert!(
        error.starts_with("netlb.toml:3:8: unknown variant `sometimes`, expected one of `auto`, `always`, `never`"),
        "{error}"
    );
    let error =
        refused("[[service]]\nfrontend = \"10.96.0.10:80/tcp\"\nbackends = [\"10.0.0.1:1\", \"10.0.0.2:1=0\"]\n");
    assert!(error.starts_with("netlb.toml:3:27: weight 0 is not 1 to 1000"), "{error}");
    let error = refused("[[service]]\nfrontend = \"10.96.0.10:0/tcp\"\n");
    assert!(error.starts_with("netlb.toml:2:12: `10.96.0.10:0` has port 0"), "{error}");
    let error = refused("[node]\nuplinks = [\"eth 0\"]\n");
    assert!(error.starts_with("netlb.toml:2:12: ` ` in `eth 0` cannot be in an interface name"), "{error}");
}

#[test]
fn networks_are_few_and_networks() {
    let error = refused("[node]\npod_cidrs = [\"10.244.0.0/16\", \"10.244.0.0/33\"]\n");
    assert!(error.starts_with("netlb.toml:2:31: `10.244.0.0/33` is not a network such as"), "{error}");
    let nine = ["\"10.0.0.0/8\""; 9].join(", ");
    let error = refused(&format!("[node]\nowned_cidrs = [{nine}]\n"));
    assert!(error.starts_with("netlb.toml:2:15: 9 networks are too many; the most is 8"), "{error}");
    let error = refused("[node]\nnode_port_addresses = \"some\"\n");
    assert!(error.contains("2:23") && error.contains("expected \"primary\", \"all\" or a list of networks"), "{error}");
    assert_eq!(parse("[node]\nnode_port_addresses = \"all\"\n").node.node_port_addresses, NodePortAddresses::All);
}

#[test]
fn node_ports_are_served_at_the_addresses_that_are_meant() {
    let ips = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect::<Vec<std::net::IpAddr>>();
    let (all, primary) = (ips(&["192.0.2.1", "198.51.100.1", "2001:db8::1"]), ips(&["198.51.100.1", "2001:db8::1"]));
    assert_eq!(NodePortAddresses::Primary.of(&all, &primary), primary);
    assert_eq!(NodePortAddresses::All.of(&all, &primary), all);
    let some = NodePortAddresses::In(vec!["192.0.2.0/24".parse().unwrap()]);
    assert_eq!(some.of(&all, &primary), ips(&["192.0.2.1"]));
}

#[test]
fn timeouts_and_limits_have_ranges() {
    for (text, problem) in [
        ("tcp_syn = \"0s\"", "timeout 0s is not 1s to 1h"),
        ("tcp_syn = \"61m\"", "timeout 61m is not 1s to 1h"),
        ("tcp_established = \"5h\"", "timeout 5h is not 1s to 4h30m"),
        ("udp_one_way = \"1500ms\"", "timeout 1500ms is not in whole seconds"),
        ("udp_one_way = 60", "invalid type: integer `60`, expected a duration such as \"60s\" or \"2h13m\""),
    ] {
        assert!(refused(&format!("[timeouts]\n{text}\n")).contains(problem), "{text}");
    }
    assert!(refused("[limits]\nflows = 0\n").contains("0 is not 1 to 67108864"));
    assert!(refused("[limits]\nflows = 99999999999\n").contains("99999999999 is not 1 to"));
    assert!(refused("[limits]\nflows = -1\n").contains("invalid value"));
}

#[test]
fn a_service_that_is_none_is_shown_at_its_table() {
    assert_eq!(
        refused("# first\n\n[[service]]\nname = \"web\"\nbackends = []\n"),
        "\
netlb.toml:3:1: service `web` has no frontend; give one as ADDRESS:PORT/PROTOCOL, or a node port, or a port to publish
  |
3 | [[service]]
  | ^^^^^^^^^^^"
    );
}

#[test]
fn two_services_with_one_frontend_or_name_are_refused_with_both_lines() {
    let error = refused(
        "[[service]]\nname = \"a\"\nfrontend = \"10.96.0.10:80/tcp\"\n[[service]]\nname = \"b\"\nfrontend = \"10.96.0.10:80/tcp\"\n",
    );
    assert!(
        error.starts_with("netlb.toml:4:1: frontend 10.96.0.10:80/tcp of service `b` is already used by `a`, the [[service]] on line 1"),
        "{error}"
    );
    let error = refused(
        "[[service]]\nname = \"a\"\nfrontend = \"10.96.0.10:80/tcp\"\n\n[[service]]\nname = \"a\"\nfrontend = \"10.96.0.11:80/tcp\"\n",
    );
    assert!(
        error.starts_with("netlb.toml:5:1: service name `a` is already used by the [[service]] on line 1"),
        "{error}"
    );
}

#[test]
fn a_port_of_the_node_belongs_to_one_service() {
    let file = |one: &str, two: &str| {
        format!("[[service]]\nname = \"a\"\n{one}\n[[service]]\nname = \"b\"\nbackends = [\"10.0.0.1:80\"]\n{two}\n")
    };
    let wide = "publish = [\"8080:80\"]";
    let narrow = "publish = [\"192.0.2.1:8080:80\"]";
    let port = "node_port = 8080";
    for (one, two, what) in [
        (port, port, "port 8080/tcp on the node's IPv4 addresses"),
        (wide, port, "port 8080/tcp on the node's IPv4 addresses"),
        (wide, narrow, "frontend 192.0.2.1:8080/tcp"),
        (narrow, wide, "port 8080/tcp on the node's IPv4 addresses"),
        (narrow, port, "port 8080/tcp on the node's IPv4 addresses"),
        (narrow, narrow, "frontend 192.0.2.1:8080/tcp"),
        ("external_ips = [\"192.0.2.1:8080/tcp\"]", narrow, "frontend 192.0.2.1:8080/tcp"),
    ] {
        let error = refused(&file(one, two));
        let expected =
            format!("netlb.toml:4:1: {what} of service `b` is already used by `a`, the [[service]] on line 1");
        assert!(error.starts_with(&expected), "{error}");
    }
    for other in ["node_port = \"8080/udp\"", "publish = [\"192.0.2.2:8080:80\"]", "frontend = \"10.96.0.1:8080/tcp\""]
    {
        assert_eq!(parse(&file(narrow, other)).services.len(), 2, "{other}");
    }
}

#[test]
fn the_example_file_is_read() {
    let services = parse_services("services.toml", include_str!("../../../docs/services.toml")).unwrap();
    let names: Vec<_> = services.iter().map(Service::name).collect();
    assert_eq!(names, ["default/web", "site", "dns", "[fd00:96::10]:80/tcp"]);
    let claims: Vec<_> = services.iter().map(|service| service.claims().count()).collect();
    assert_eq!(claims, [7, 2, 4, 1]);
}

#[test]
fn a_service_has_everything_that_is_written() {
    let config = parse(
        r#"
[[service]]
name = "default/web"
frontends = ["10.96.0.10:80/tcp", "10.96.0.10:443/tcp"]
external_ips = ["192.0.2.10"]
load_balancer_ips = ["203.0.113.10:80/tcp"]
source_ranges = ["198.51.100.0/24", "198.51.101.7"]
node_ports = [30080, "30443/tcp"]
affinity = "client-ip:600"
external_traffic_policy = "local"
internal_traffic_policy = "Cluster"
backends = [
    { address = "10.244.1.2:8080", node = "a", zone = "east", hints = { zones = ["east"] } },
    { address = "10.244.2.7:8080", node = "b", ready = false, serving = true, terminating = true, hints.nodes = ["b"] },
]

[[service]]
name = "site"
publish = ["8080:80", "192.0.2.1:8443:80"]
backends = ["10.244.1.3"]
"#,
    );
    let [web, site] = &config.services[..] else { panic!("{:?}", config.services) };
    let claims: Vec<_> = web.claims().map(|claim| claim.to_string()).collect();
    let expected = [
        "10.96.0.10:80/tcp",
        "10.96.0.10:443/tcp",
        "192.0.2.10:80/tcp",
        "192.0.2.10:443/tcp",
        "203.0.113.10:80/tcp",
        "0.0.0.0:30080/tcp",
        "0.0.0.0:30443/tcp",
    ];
    assert_eq!(claims, expected);
    assert_eq!(
        web.definition().source_ranges,
        ["198.51.100.0/24".parse().unwrap(), "198.51.101.7/32".parse().unwrap()]
    );
    let [one, two] = web.backends() else { panic!() };
    assert!(one.is_on("a") && one.is_ready() && two.is_on("b") && two.is_last_resort());
    assert_eq!(two.placement.as_ref().unwrap().hint_nodes, ["b"]);
    assert_eq!(site.backends()[0].address, "10.244.1.3:80".parse().unwrap());
}

#[test]
fn a_service_of_ports_without_backends_has_the_family_it_is_given() {
    let config = parse(
        r#"
[[service]]
name = "web4"
node_port = 30080
backends = ["10.244.1.3:80"]

[[service]]
name = "web6"
node_port = 30080
family = "ipv6"
"#,
    );
    let claims: Vec<_> = config.services.iter().flat_map(Service::claims).map(|claim| claim.to_string()).collect();
    assert_eq!(claims, ["0.0.0.0:30080/tcp", "[::]:30080/tcp"]);
}

#[test]
fn a_wrong_part_of_a_service_is_shown_with_its_place() {
    for (key, place) in [
        ("node_ports = [30080, 70000]", "5:22: `70000` is not PORT"),
        ("publish = [\"80\"]", "5:12: `80` is not [ADDRESS:]PORT:TARGET"),
        ("source_ranges = [\"10.0.0.1/8\"]", "5:18: `10.0.0.1/8` is an address within a network"),
        ("external_ips = [\"10.0.0\"]", "5:17: `10.0.0` is not ADDRESS or"),
        ("external_traffic_policy = \"far\"", "5:27: `far` is not a traffic policy"),
        ("affinity = \"cookie\"", "5:12: affinity `cookie` is not"),
        ("nodeport = 1", "5:1: unknown field `nodeport`"),
    ] {
        let error = refused(&format!("# 1\n# 2\n[[service]]\nfrontend = \"10.96.0.10:80/tcp\"\n{key}\n"));
        assert!(error.starts_with(&format!("netlb.toml:{place}")), "{error}");
    }
    let error = refused(
        "[[service]]\nfrontend = \"10.96.0.10:80/tcp\"\nbackends = [{ address = \"10.0.0.1:1\", hints = { zone = [] } }]\n",
    );
    assert!(error.contains("unknown field `zone`, expected `nodes` or `zones`"), "{error}");
    assert!(error.contains("netlb.toml:3:") && error.contains("did you mean `zones`?"), "{error}");
}

#[test]
fn a_file_cut_anywhere_is_refused_or_whole_and_never_a_panic() {
    let text = "[[service]]\nname = \"wéb\"\nfrontends = [\"10.96.0.10:80/tcp\"]\nbackends = [\"10.244.1.2:8080\"]\n";
    for cut in (0..text.len()).filter(|cut| text.is_char_boundary(*cut)) {
        drop(Config::parse("netlb.toml", &text[..cut]).map_err(|error| error.to_string()));
    }
    assert!(refused("[[service]]\nfrontends = [\"10.96.0.10:80/tcp\"").starts_with("netlb.toml:2:"));
}

#[test]
fn sections_read_at_start_only_are_named() {
    let old = Config::default();
    let new = parse("[node]\nuplinks = [\"eth0\"]\n[timeouts]\ntcp_syn = \"5s\"\n");
    assert_eq!(old.needs_restart(&new), ["[node]", "[timeouts]"]);
    let services = parse("[[service]]\nfrontend = \"10.96.0.10:80/tcp\"\n");
    assert!(old.needs_restart(&services).is_empty());
}

#[test]
fn ten_thousand_services_are_read_in_good_time() {
    use std::fmt::Write as _;
    let mut text = String::new();
    for service in 0..10_000_u32 {
        let [_, _, high, low] = service.to_be_bytes();
        writeln!(text, "[[service]]\nname = \"s{service}\"\nfrontends = [\"10.96.{high}.{low}:80/tcp\"]\nbackends = [")
            .unwrap();
        for backend in 0..10 {
            writeln!(text, "  \"10.{backend}.{high}.{low}:8080\",").unwrap();
        }
        text.push_str("]\n");
    }
    let start = Instant::now();
    assert_eq!(parse(&text).services.len(), 10_000);
    // Unoptimised on a busy machine: what this catches is a square.
    assert!(start.elapsed() < Duration::from_secs(20), "took {:?}", start.elapsed());
}

mod written_and_read {
    use std::sync::Arc;

    use proptest::{collection::vec, option, prelude::*};

    use super::parse;
    use crate::{
        model::{
            Affinity, Algorithm, Backend, BackendState, Conditions, Definition, Family, Frontend, Mode, NodePort,
            Placement, Protocol, Publish, Service, SnatMode, TrafficPolicy, Weight,
        },
        spec::ServiceSpec,
    };

    fn any_policy() -> impl Strategy<Value = TrafficPolicy> {
        prop_oneof![Just(TrafficPolicy::Cluster), Just(TrafficPolicy::Local)]
    }

    fn any_affinity() -> impl Strategy<Value = Affinity> {
        prop_oneof![Just(Affinity::NONE), (1..=86_400_u32).prop_map(|s| format!("client-ip:{s}").parse().unwrap())]
    }

    fn any_snat() -> impl Strategy<Value = SnatMode> {
        prop_oneof![Just(SnatMode::Auto), Just(SnatMode::Always), Just(SnatMode::Never)]
    }

    fn any_protocol() -> impl Strategy<Value = Protocol> {
        prop_oneof![Just(Protocol::Tcp), Just(Protocol::Udp)]
    }

    /// Addresses of one network, each at most once.
    fn any_frontends(network: u8) -> impl Strategy<Value = Vec<Frontend>> {
        proptest::collection::btree_set((any::<u8>(), 1_u16.., any_protocol()), 0..4).prop_map(move |set| {
            let frontend =
                |(host, port, protocol)| Frontend { address: ([192, 0, network, host], port).into(), protocol };
            set.into_iter().map(frontend).collect()
        })
    }

    fn any_placement() -> impl Strategy<Value = Option<Arc<Placement>>> {
        let name = || "[a-z]{1,8}";
        let placement = (option::of(name()), option::of(name()), vec(name(), 0..3), vec(name(), 0..3));
        placement.prop_map(|(node, zone, hint_nodes, hint_zones)| {
            let placement = Placement { node, zone, hint_nodes, hint_zones };
            (placement != Placement::default()).then(|| Arc::new(placement))
        })
    }

    fn any_backends() -> impl Strategy<Value = Vec<Backend>> {
        let backend = (1_u64..=1000, any::<[bool; 4]>(), any_placement());
        vec(backend, 0..8).prop_map(|backends| {
            type Said = (u64, [bool; 4], Option<Arc<Placement>>);
            let backend = |(host, (weight, [draining, ready, serving, terminating], placement)): (u8, Said)| Backend {
                address: ([10, 0, 0, host], 80).into(),
                weight: Weight::new(weight).unwrap(),
                state: if draining { BackendState::Draining } else { BackendState::Active },
                conditions: Conditions { ready, serving, terminating },
                placement,
            };
            (1..).zip(backends).map(backend).collect()
        })
    }

    fn any_ports() -> impl Strategy<Value = (Vec<NodePort>, Vec<Publish>)> {
        let ports = proptest::collection::btree_map((any::<std::num::NonZeroU16>(), any_protocol()), 0..3_u8, 0..5);
        ports.prop_map(|ports| {
            let (mut node_ports, mut publish) = (vec![], vec![]);
            for ((port, protocol), kind) in ports {
                let port = NodePort { port, protocol };
                let published = |address| Publish { address, port, target: 80.try_into().unwrap() };
                match kind {
                    0 => node_ports.push(port),
                    1 => publish.push(published(None)),
                    _ => publish.push(published(Some([192, 0, 4, 1].into()))),
                }
            }
            (node_ports, publish)
        })
    }

    fn any_service() -> impl Strategy<Value = Service> {
        let ways = (any_frontends(1), any_frontends(2), any_frontends(3), any_ports());
        let any_mode = prop_oneof![Just(Mode::Nat), Just(Mode::Dsr)];
        let any_family = option::of(prop_oneof![Just(Family::Ipv4), Just(Family::Ipv6)]);
        let how = (any_snat(), any_mode, any_affinity(), any_policy(), any_policy(), any_family);
        let ranges = vec((any::<[u8; 4]>(), 0..=32_u8), 0..3);
        (option::of("[a-z][a-z0-9/_.-]{0,20}"), ways, ranges, any_backends(), how).prop_filter_map(
            "is reached somewhere",
            |(name, (frontends, external_ips, load_balancer_ips, (node_ports, publish)), ranges, backends, how)| {
                let range =
                    |(address, length): ([u8; 4], u8)| ipnet::IpNet::new(address.into(), length).unwrap().trunc();
                let (snat, mode, affinity, external_traffic_policy, internal_traffic_policy, family) = how;
                let source_ranges =
                    if load_balancer_ips.is_empty() { vec![] } else { ranges.into_iter().map(range).collect() };
                let algorithm = Algorithm::Random;
                Service::define(Definition {
                    name,
                    frontends,
                    external_ips,
                    load_balancer_ips,
                    node_ports,
                    publish,
                    source_ranges,
                    family,
                    backends,
                    algorithm,
                    snat,
                    mode: if snat == SnatMode::Auto { mode } else { Mode::Nat },
                    affinity,
                    external_traffic_policy,
                    internal_traffic_policy,
                })
                .ok()
            },
        )
    }

    #[derive(serde::Serialize)]
    struct File {
        service: Vec<ServiceSpec>,
    }

    proptest! {
        #[test]
        fn services_survive_being_written_and_read(service in any_service()) {
            let spec = ServiceSpec::from(&service);
            let json = serde_json::to_string(&spec).unwrap();
            let read: ServiceSpec = serde_json::from_str(&json).unwrap();
            prop_assert_eq!(&read.into_service().unwrap(), &service);
            let text = toml::to_string(&File { service: vec![spec] }).unwrap();
            prop_assert_eq!(parse(&text).services, vec![service]);
        }
    }
}
