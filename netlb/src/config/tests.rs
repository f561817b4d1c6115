use std::time::{Duration, Instant};

use super::*;
use crate::model::{Algorithm, BackendState, SnatMode};

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
fn an_empty_file_is_a_configuration() {
    assert_eq!(parse(""), Config::default());
    assert_eq!(parse("").limits.flows, 262_144);
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
fn an_unknown_key_is_refused_with_its_place_and_the_nearest_known_one() {
    assert_eq!(
        refused("[[service]]\nfrontend = \"10.96.0.10:80/tcp\"\nbackend = [\"10.244.1.2:8080\"]\n"),
        "\
netlb.toml:3:1: unknown field `backend`, expected one of `name`, `frontends`, `frontend`, `backends`, `algorithm`, `snat`
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
        error.starts_with("netlb.toml:4:1: frontend 10.96.0.10:80/tcp is already used by the [[service]] on line 1"),
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

proptest::proptest! {
    #[test]
    fn services_survive_being_written_and_read(
        name in "[a-z][a-z0-9/_.-]{0,20}",
        backends in proptest::collection::btree_map(1_u16.., 1_u64..=1000, 0..20),
        draining in proptest::bool::ANY,
    ) {
        use crate::{model::{Backend, Weight}, spec::ServiceSpec};
        let backends = backends.iter().map(|(port, weight)| Backend {
            weight: Weight::new(*weight).unwrap(),
            state: if draining { BackendState::Draining } else { BackendState::Active },
            ..Backend::new(([10, 0, 0, 1], *port).into())
        });
        let service =
            Service::new(Some(name), vec!["10.96.0.1:80/tcp".parse().unwrap()], backends.collect(), Algorithm::Random).unwrap();
        #[derive(serde::Serialize)]
        struct File { service: Vec<ServiceSpec> }
        let text = toml::to_string(&File { service: vec![ServiceSpec::from(&service)] }).unwrap();
        proptest::prop_assert_eq!(parse(&text).services, vec![service]);
    }
}
