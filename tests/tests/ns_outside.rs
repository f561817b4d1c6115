//! Traffic from outside the cluster, which comes in on an uplink.

use netlb::datapath::kernel::testing::{announced, tcx_places};
use netlb_common::maps::Interface;
use netlb_integration::clients;
use netlb_integration::daemon::{Config, Forwarding, Netlb, Service};
use netlb_integration::exec::wait_until;
use netlb_integration::load::Load;
use netlb_integration::servers::{self, Protocol, Server};
use netlb_integration::testing::TestResult;
use netlb_integration::topology::{Family, Host, Layout, Plan, Testbed, vip};

use anyhow::{Context, Result};
use nix::net::if_::if_nametoindex;
use std::net::SocketAddr;
use std::time::Duration;

const SOON: Duration = Duration::from_secs(10);

#[test]
fn a_client_outside_is_served_by_backends_of_the_node_and_they_see_its_address() -> TestResult {
    for (forwarding, rp_filter) in
        [(Forwarding::Fast, 0), (Forwarding::Fast, 1), (Forwarding::Stack, 1), (Forwarding::Stack, 2)]
    {
        let bed = Plan::new(Layout::Ptp).with_outside_client().rp_filter(rp_filter).build()?;
        let pods = [bed.pod(Host::A, "one")?, bed.pod(Host::A, "two")?];
        let servers = pods.iter().map(|pod| servers::nginx(pod, 8080)).collect::<Result<Vec<_>>>()?;
        let netlb = Netlb::start(bed.node_a(), &Config::new(bed.node_a(), forwarding))?;
        for family in Family::BOTH {
            let case = format!("{forwarding}, rp_filter {rp_filter}, {family}");
            let server = serve(&netlb, family, &servers)?;
            let outside = bed.outside()?;
            for _ in 0..20 {
                let answer = clients::curl(outside, server).with_context(|| case.clone())?;
                assert!(!pods.iter().any(|pod| pod.ip(family) == answer.client.ip()), "{case}: {answer:?}");
            }
        }
        assert_eq!(netlb.counter("needs_snat")?, 0);
    }
    Ok(())
}

/// The reply of a backend behind another node would not come back this way: the client gets an address of the node.
#[test]
fn a_client_outside_is_served_by_backends_of_other_nodes() -> TestResult {
    for (forwarding, rp_filter) in [(Forwarding::Fast, 1), (Forwarding::Stack, 0), (Forwarding::Stack, 1)] {
        let bed = Plan::new(Layout::Routed).with_outside_client().rp_filter(rp_filter).build()?;
        let (near, far) = (bed.pod(Host::A, "near")?, bed.pod(Host::B, "far")?);
        let servers = [servers::nginx(&near, 8080)?, servers::nginx(&far, 8080)?];
        let netlb = Netlb::start(bed.node_a(), &Config::new(bed.node_a(), forwarding))?;
        for family in Family::BOTH {
            let case = format!("{forwarding}, rp_filter {rp_filter}, {family}");
            let server = serve(&netlb, family, &servers)?;
            let outside = bed.outside()?;
            let client = outside.enter(|| local_address(server))??;
            let mut seen = std::collections::BTreeSet::new();
            for _ in 0..30 {
                let answer = clients::curl(outside, server).with_context(|| case.clone())?;
                let is_far = answer.backend == servers[1].addr(family);
                assert_eq!(answer.client.ip() != client, is_far, "{case}: {answer:?} to {client}");
                seen.insert(answer.backend);
            }
            assert_eq!(seen.len(), 2, "{case}: both backends serve");
        }
        assert_eq!(netlb.counter("needs_snat")?, 0);
    }
    Ok(())
}

/// Flows to one address go where others went if nothing can lead them elsewhere: no rule that asks for more than destinations, and no route
/// of several ways.
#[test]
fn the_programs_are_told_whether_there_is_one_way_to_each_destination() -> TestResult {
    let bed = Plan::new(Layout::Ptp).with_outside_client().build()?;
    let node = bed.node_a();
    let netlb = Netlb::start(node, &Config::new(node, Forwarding::Fast))?;
    let uplink = node.uplinks().first().context("no uplink")?;
    let index = node.ns.enter(|| if_nametoindex(uplink.as_str()))??;
    let ip = |line: &str| node.ns.command("ip").args(line.split(' ')).run()?.success();
    let is_told = |what: &str, expected: bool| {
        wait_until(what, SOON, || {
            let announced = announced(netlb.bpffs(), index)?;
            let is_direct = announced.is_some_and(|interface| interface.flags & Interface::DIRECT != 0);
            Ok((is_direct == expected).then_some(()))
        })
    };
    is_told("the first announcement", true)?;
    ip("rule add from 198.51.100.0/24 lookup 99")?;
    is_told("a rule", false)?;
    ip("rule del from 198.51.100.0/24 lookup 99")?;
    is_told("no rule", true)?;
    let ways = [1, 2].map(|last| format!("nexthop via 203.0.113.{last} dev {uplink} onlink")).join(" ");
    ip(&format!("route add 198.51.100.0/24 {ways}"))?;
    is_told("two ways", false)?;
    // What is pinned says the opposite each time.
    netlb.stop()?;
    ip("route del 198.51.100.0/24")?;
    netlb.restart(node)?;
    is_told("one way again", true)?;
    netlb.stop()?;
    ip(&format!("route add 198.51.100.0/24 {ways}"))?;
    netlb.restart(node)?;
    is_told("two ways that are there already", false)?;
    Ok(())
}

/// A node port is served at the node's address. With policy `local`, clients outside get backends of the node, which see who they are; and
/// another address of the node is served as soon as it is there.
#[test]
fn a_node_port_leads_to_backends_of_the_node_where_the_policy_says_so() -> TestResult {
    let bed = Plan::new(Layout::Routed).with_outside_client().build()?;
    let (near, far) = (bed.pod(Host::A, "near")?, bed.pod(Host::B, "far")?);
    let servers = [servers::nginx(&near, 8080)?, servers::nginx(&far, 8080)?];
    let service = |family: Family, policy: &str, port: u16| {
        Service::without_frontend(&format!("{policy}-{family}").to_lowercase(), [])
            .node_port(port)
            .external_traffic_policy(policy)
            .backend_on(servers[0].addr(family), "a")
            .backend_on(servers[1].addr(family), "b")
    };
    let mut config =
        Config::new(bed.node_a(), Forwarding::Fast).node("name = \"a\"").node("node_port_addresses = \"all\"");
    for (family, port) in Family::BOTH.into_iter().zip([30080, 31080]) {
        config = config.service(service(family, "cluster", port)).service(service(family, "local", port + 1));
    }
    let netlb = Netlb::start(bed.node_a(), &config)?;
    let outside = bed.outside()?;
    for (family, port) in Family::BOTH.into_iter().zip([30080, 31080]) {
        let node = Host::A.underlay_address(family);
        let client = outside.enter(|| local_address(SocketAddr::new(node, port)))??;
        for (port, is_local) in [(port, false), (port + 1, true)] {
            let mut seen = std::collections::BTreeSet::new();
            for _ in 0..30 {
                let server = SocketAddr::new(node, port);
                let answer = clients::curl(outside, server).with_context(|| server.to_string())?;
                assert!(!is_local || answer.client.ip() == client, "{answer:?} to {client}");
                seen.insert(answer.backend);
            }
            let expected =
                if is_local { vec![servers[0].addr(family)] } else { servers.iter().map(|s| s.addr(family)).collect() };
            assert_eq!(seen, expected.into_iter().collect(), "{family}, local: {is_local}");
        }
        // Pods of the node have all backends, whatever the policy.
        let mut seen = std::collections::BTreeSet::new();
        for _ in 0..30 {
            seen.insert(clients::curl(&near.ns, SocketAddr::new(node, port + 1))?.backend);
        }
        assert_eq!(seen.len(), 2, "{family}, from a pod");
    }
    let node = &bed.node_a().ns;
    node.command("ip")
        .args(["address", "add", "198.51.100.77/32", "dev", &bed.node_a().uplinks()[0]])
        .run()?
        .success()?;
    let via = Host::A.underlay_address(Family::V4).to_string();
    outside.command("ip").args(["route", "add", "198.51.100.77/32", "via", &via]).run()?.success()?;
    let server: SocketAddr = "198.51.100.77:30081".parse()?;
    let answer = || Ok(clients::curl(outside, server).ok());
    wait_until("the new address", SOON, answer)?;
    let status = netlb.must(["status"])?;
    assert!(!status.contains("out of sync"), "{status}");
    Ok(())
}

/// Hosts on a wire leave no checksum to anybody: only such packets are XDP's. What is for a pod goes up to TC.
#[test]
fn xdp_sends_what_leaves_by_the_uplink_again() -> TestResult {
    for mode in ["generic", "native"] {
        let bed = Plan::new(Layout::Routed).with_outside_client().build()?;
        let (near, far) = (bed.pod(Host::A, "near")?, bed.pod(Host::B, "far")?);
        let servers = [servers::nginx(&near, 8080)?, servers::nginx(&far, 8080)?];
        far.offload(&["tx-checksum-ip-generic"], false)?;
        let outside = bed.outside()?;
        outside.command("ethtool").args(["-K", "eth0", "tx-checksum-ip-generic", "off"]).run()?.success()?;
        let netlb = Netlb::start(bed.node_a(), &Config::new(bed.node_a(), Forwarding::Fast).xdp(mode))?;
        let status = netlb.must(["status"])?;
        assert!(status.contains("xdp, tcx"), "{mode}: {status}");
        if mode == "native" {
            receive_from_xdp(&bed)?;
        }
        for family in Family::BOTH {
            for (server, is_far) in servers.iter().zip([false, true]) {
                let vip = serve(&netlb, family, std::slice::from_ref(server))?;
                let before = netlb.counter("sent_by_xdp")?;
                for _ in 0..10 {
                    let answer = clients::curl(outside, vip).with_context(|| format!("{mode}, {family}"))?;
                    assert_eq!(answer.backend, server.addr(family), "{mode}");
                }
                let sent = netlb.counter("sent_by_xdp")? - before;
                assert_eq!(sent >= 80, is_far, "{mode}, {family}: {sent} packets for a backend that is far: {is_far}");
                netlb.must(["svc", "rm", &name(family)])?;
            }
        }
    }
    Ok(())
}

/// The kernel keeps the mode of a link whose program is exchanged.
#[test]
fn a_daemon_that_is_started_again_changes_the_mode_of_xdp() -> TestResult {
    let bed = Plan::new(Layout::Routed).with_outside_client().build()?;
    let pod = bed.pod(Host::A, "backend")?;
    let server = servers::nginx(&pod, 8080)?;
    let node = bed.node_a();
    let config = |mode| Config::new(node, Forwarding::Fast).xdp(mode);
    let netlb = Netlb::start(node, &config("off"))?;
    let vip = serve(&netlb, Family::V4, std::slice::from_ref(&server))?;
    for (mode, expected) in [("generic", 2), ("generic", 2), ("native", 1), ("generic", 2), ("off", 0), ("native", 1)] {
        netlb.stop()?;
        netlb.configure(&config(mode))?;
        netlb.restart(node)?;
        // `XDP_ATTACHED_DRV` and `XDP_ATTACHED_SKB`.
        assert_eq!(xdp(&bed)?["mode"].as_u64().unwrap_or_default(), expected, "{mode}");
        clients::curl(bed.outside()?, vip).with_context(|| mode.to_owned())?;
    }
    // A driver that refuses, as a veth does whose other end may send frames this long.
    netlb.stop()?;
    netlb.configure(&config("generic"))?;
    netlb.restart(node)?;
    bed.switch()?.command("ip").args(["link", "set", "to-a", "mtu", "9000"]).run()?.success()?;
    netlb.stop()?;
    netlb.configure(&config("native"))?;
    for _ in 0..2 {
        netlb.restart(node)?;
        let status = netlb.must(["status"])?;
        assert!(status.contains("its packets are treated at TC"), "{status}");
        assert_eq!(xdp(&bed)?["mode"], serde_json::Value::Null);
        clients::curl(bed.outside()?, vip)?;
        netlb.stop()?;
    }
    Ok(())
}

/// The kernel keeps the place of a link whose program is exchanged. Another netlb, which serves nothing, is the other program.
#[test]
fn a_daemon_that_is_started_again_changes_its_place_among_programs() -> TestResult {
    let bed = Plan::new(Layout::Ptp).with_outside_client().build()?;
    let pod = bed.pod(Host::A, "backend")?;
    let server = servers::nginx(&pod, 8080)?;
    let node = bed.node_a();
    let uplink = node.uplinks().first().context("no uplink")?;
    let index = node.ns.enter(|| if_nametoindex(uplink.as_str()))??;
    for forwarding in [Forwarding::Fast, Forwarding::Stack] {
        let config = |order| Config::new(node, forwarding).node(&format!("tcx_order = {order:?}"));
        let netlb = Netlb::start(node, &config("first"))?;
        let other = Netlb::start(node, &config("first"))?;
        let vip = serve(&netlb, Family::V4, std::slice::from_ref(&server))?;
        let load = Load::start(bed.outside()?, vip, 2, 500);
        let places = |netlb: &Netlb| node.ns.enter(|| tcx_places(netlb.bpffs(), index));
        for (order, expected) in [("first", 1), ("last", 1), ("first", 0), ("last", 1), ("last", 1)] {
            netlb.stop()?;
            netlb.configure(&config(order))?;
            netlb.restart(node)?;
            assert_eq!(places(&netlb)??, [expected; 2], "{forwarding}, {order}");
            assert_eq!(places(&other)??, [1 - expected; 2], "{forwarding}, {order}");
        }
        let total = load.stop().remove(0);
        assert!(total.requests > 100, "{forwarding}: {total:?}");
        assert_eq!(total.failed, 0, "{forwarding}: of {}: {:?}", total.requests, total.failures);
    }
    Ok(())
}

/// What the kernel says of XDP on the uplink of node A.
fn xdp(bed: &Testbed) -> Result<serde_json::Value> {
    let link = bed.node_a().ns.command("ip").args(["-json", "link", "show", "up0"]).run()?.success()?;
    let link: serde_json::Value = serde_json::from_str(&link.stdout)?;
    Ok(link[0]["xdp"].clone())
}

/// Has the switch take what node A sends by XDP: a veth drops it unless its other end has a program. The node's own lets everything pass there.
fn receive_from_xdp(bed: &Testbed) -> Result<()> {
    let program = xdp(bed)?["prog"]["id"].as_u64().context("no program on up0")?.to_string();
    let attach = ["net", "attach", "xdpdrv", "id", &program, "dev", "to-a"];
    bed.switch()?.command("bpftool").args(attach).run()?.success()?;
    Ok(())
}

/// The address that the calling thread's namespace sends from.
fn local_address(to: SocketAddr) -> std::io::Result<std::net::IpAddr> {
    let any: SocketAddr = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }.parse().expect("an address");
    let socket = std::net::UdpSocket::bind(any)?;
    socket.connect(to)?;
    Ok(socket.local_addr()?.ip())
}

/// A client with a filter for martians and a node that drops what it would forward: the fast path does not depend on either.
#[test]
fn the_fast_way_needs_neither_forward_rules_nor_connection_tracking() -> TestResult {
    let bed = Plan::new(Layout::Ptp).with_outside_client().build()?;
    let pod = bed.pod(Host::A, "backend")?;
    let server = servers::nginx(&pod, 8080)?;
    let node = &bed.node_a().ns;
    for iptables in ["iptables", "ip6tables"] {
        node.command(iptables).args(["-P", "FORWARD", "DROP"]).run()?.success()?;
    }
    let netlb = Netlb::start(bed.node_a(), &Config::new(bed.node_a(), Forwarding::Fast))?;
    for family in Family::BOTH {
        let vip = serve(&netlb, family, std::slice::from_ref(&server))?;
        clients::curl(bed.outside()?, vip).with_context(|| family.to_string())?;
    }
    Ok(())
}

fn name(family: Family) -> String {
    format!("web-{}", family.to_string().to_lowercase())
}

/// Adds a service with these backends, and says where it is.
fn serve(netlb: &Netlb, family: Family, servers: &[Server]) -> Result<SocketAddr> {
    let server = SocketAddr::new(vip(family, 10), 80);
    let backends = servers.iter().map(|server| server.addr(family));
    netlb.add_service(&name(family), &format!("{server}/{}", Protocol::Tcp.name()), backends)?;
    Ok(server)
}
