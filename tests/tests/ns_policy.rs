//! Which backends answer whom, and whom they see: every way to a service, from every place, by one table.

use std::collections::BTreeSet;
use std::fmt;
use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use netlb_integration::daemon::{Forwarding, Service};
use netlb_integration::places::{Asker, From, LOCAL, Places, REMOTE, Seen};
use netlb_integration::servers::Protocol;
use netlb_integration::testing::TestResult;
use netlb_integration::topology::{Family, Host, vip};

/// A way to a service.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Way {
    ClusterIp,
    ExternalIp,
    LoadBalancerIp,
    NodePort,
}

const EXTERNAL: [Way; 3] = [Way::ExternalIp, Way::LoadBalancerIp, Way::NodePort];

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Policy {
    Cluster,
    Local,
}

impl Policy {
    const fn other(self) -> Self {
        match self {
            Self::Cluster => Self::Local,
            Self::Local => Self::Cluster,
        }
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cluster => "cluster",
            Self::Local => "local",
        })
    }
}

/// The backends that a client gets: those of both nodes, or of the one its packets come to.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Set {
    All,
    Local,
}

/// What a kind of way and its policy mean for clients here, processes of the node and clients elsewhere, as kube-proxy has it.
struct Row {
    ways: &'static [Way],
    policy: Policy,
    pod: (Set, Seen),
    node: (Set, Seen),
    elsewhere: (Set, Seen),
}

const TABLE: [Row; 4] = [
    Row {
        ways: &[Way::ClusterIp],
        policy: Policy::Cluster,
        pod: (Set::All, Seen::Client),
        node: (Set::All, Seen::Node),
        elsewhere: (Set::All, Seen::Node),
    },
    Row {
        ways: &[Way::ClusterIp],
        policy: Policy::Local,
        pod: (Set::Local, Seen::Client),
        node: (Set::Local, Seen::Node),
        elsewhere: (Set::Local, Seen::Node),
    },
    Row {
        ways: &EXTERNAL,
        policy: Policy::Cluster,
        pod: (Set::All, Seen::Node),
        node: (Set::All, Seen::Node),
        elsewhere: (Set::All, Seen::Node),
    },
    Row {
        ways: &EXTERNAL,
        policy: Policy::Local,
        pod: (Set::All, Seen::Client),
        node: (Set::All, Seen::Node),
        elsewhere: (Set::Local, Seen::Client),
    },
];

impl Row {
    fn of(&self, from: From) -> (Set, Seen) {
        match from {
            From::Pod | From::Backend => self.pod,
            From::Node => self.node,
            From::OtherPod | From::Outside => self.elsewhere,
        }
    }
}

/// With `snat = "auto"` clients keep their address wherever replies come back through the node: at its own pods, and from them.
fn keeps_its_address(from: From, backend: &str) -> bool {
    match from {
        From::Pod | From::Backend => true,
        From::Node => false,
        From::OtherPod | From::Outside => backend == LOCAL,
    }
}

const SNATS: [&str; 2] = ["auto", "always"];

/// The addresses and the node port of a family's service with a policy for this way, and one of [`SNATS`]. The other ways have the other
/// policy.
fn address(way: Way, policy: Policy, family: Family, snat: &str) -> SocketAddr {
    let of_service = if way == Way::ClusterIp { policy } else { policy.other() };
    let number = match of_service {
        Policy::Cluster => 1,
        Policy::Local => 2,
    };
    let number = if snat == SNATS[0] { number } else { number + 2 };
    match way {
        Way::ClusterIp => SocketAddr::new(vip(family, 10 + number), 80),
        Way::ExternalIp => SocketAddr::new(vip(family, 20 + number), 80),
        Way::LoadBalancerIp => SocketAddr::new(vip(family, 30 + number), 80),
        Way::NodePort => SocketAddr::new(Host::A.underlay_address(family), 30000 + u16::from(number)),
    }
}

/// A service of both protocols with one policy for its cluster address, and the other one for the rest.
fn service(places: &Places, internal: Policy, family: Family, snat: &str) -> Service {
    let external = internal.other();
    let at = |way, policy| address(way, policy, family, snat);
    let frontend = |protocol| format!("{}/{protocol}", at(Way::ClusterIp, internal));
    let service = Service::without_frontend(&format!("{internal}-{snat}-{family}"), []);
    let service = service
        .frontend(frontend("tcp"))
        .frontend(frontend("udp"))
        .external_ip(at(Way::ExternalIp, external).ip())
        .lb_ip(at(Way::LoadBalancerIp, external).ip())
        .node_port(at(Way::NodePort, external).port())
        .internal_traffic_policy(&internal.to_string())
        .external_traffic_policy(&external.to_string())
        .snat(snat);
    places.backends(family, &[LOCAL, REMOTE]).into_iter().fold(service, Service::backend)
}

/// Each line is a test: how packets are forwarded, whose sockets are served, where XDP runs, and where clients are.
macro_rules! every_row_holds {
    ($($name:ident: $forwarding:ident, $scope:literal, $xdp:literal, $from:expr;)+) => {
        $(#[test]
        fn $name() -> TestResult {
            every_row_of_the_table_holds(Forwarding::$forwarding, $scope, $xdp, &$from)
        })+
    };
}

every_row_holds! {
    policies_hold_fast: Fast, "node", "off", From::ALL;
    policies_hold_by_the_stack: Stack, "node", "off", From::ALL;
    policies_hold_by_xdp: Fast, "node", "generic", [From::OtherPod, From::Outside];
    policies_hold_for_sockets_of_pods: Fast, "all", "off", [From::Pod, From::Node];
}

fn every_row_of_the_table_holds(forwarding: Forwarding, scope: &str, xdp: &'static str, from: &[From]) -> TestResult {
    let mut places = Places::new()?;
    if xdp != "off" {
        places.complete_checksums()?;
    }
    let mut config = places.config(forwarding, scope).xdp(xdp);
    for (family, snat) in Family::BOTH.into_iter().flat_map(|family| SNATS.map(|snat| (family, snat))) {
        for policy in [Policy::Cluster, Policy::Local] {
            config = config.service(service(&places, policy, family, snat));
        }
    }
    places.serve(&config)?;
    places.everywhere(from, |asker| {
        for (protocol, snat) in
            [Protocol::Tcp, Protocol::Udp].into_iter().flat_map(|protocol| SNATS.map(|snat| (protocol, snat)))
        {
            let cells = TABLE.iter().flat_map(|row| row.ways.iter().map(move |way| (row, *way)));
            for ((row, way), family) in cells.flat_map(|cell| Family::BOTH.map(|family| (cell, family))) {
                let case = format!("{way:?}, {}, {family}, snat {snat}", row.policy);
                cell_holds(asker, row, protocol, address(way, row.policy, family, snat), snat).context(case)?;
            }
        }
        Ok(())
    })?;
    if xdp != "off" {
        assert!(places.netlb()?.counter("sent_by_xdp")? > 100, "flows to the other node are XDP's");
    }
    Ok(())
}

fn cell_holds(asker: &mut Asker, row: &Row, protocol: Protocol, to: SocketAddr, snat: &str) -> Result<()> {
    let from = asker.from;
    let (set, seen) = row.of(from);
    let backends: &[&str] = if set == Set::All { &[LOCAL, REMOTE] } else { &[LOCAL] };
    let what = format!("{}, from {from:?} to {to}", protocol.name());
    let answers = asker.ask_all(protocol, to, backends).context(what.clone())?;
    let who: BTreeSet<_> = answers.iter().map(|(name, _)| &**name).collect();
    ensure!(Vec::from_iter(&who) == Vec::from_iter(backends), "{what}: {who:?} answer");
    for (name, sees) in answers {
        let keeps = seen == Seen::Client || (snat == "auto" && keeps_its_address(from, &name));
        ensure!(
            (sees == Seen::Client) == keeps && matches!(sees, Seen::Client | Seen::Node),
            "{what}: {name} sees {sees:?}"
        );
    }
    Ok(())
}
