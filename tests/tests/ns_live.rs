//! Backends, pods and the daemon come and go while traffic flows, and nobody notices.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::Result;
use netlb_integration::clients::Wrk;
use netlb_integration::cluster::{Cluster, service};
use netlb_integration::daemon::{Config, Forwarding, Netlb};
use netlb_integration::exec::wait_until;
use netlb_integration::load::{self, KeptConnection, Load};
use netlb_integration::servers::{self, Protocol, Server};
use netlb_integration::testing::TestResult;
use netlb_integration::topology::{Family, Host, Layout, Plan, Pod};
use nix::sys::signal::Signal;

/// Times a backend is added, drained and removed, the families taking turns.
const ROUNDS: usize = 200;
/// In seconds, longer than any test; the loads are stopped when the test has done its part.
const LONG: u32 = 300;
const SOON: Duration = Duration::from_secs(10);
/// The first retransmission of a lost SYN comes after a second.
const UNDELAYED: Duration = Duration::from_millis(900);

/// These tests put loads on the machine and ask for promptness: one at a time.
static ALONE: Mutex<()> = Mutex::new(());

fn web(backends: u32) -> Result<Cluster> {
    Cluster::start(Plan::new(Layout::Ptp), Forwarding::Fast, (80, Protocol::Tcp), backends, nginx)
}

fn nginx(pod: &Pod) -> Result<Server> {
    servers::nginx(pod, 8080)
}

#[test]
fn no_request_fails_and_a_long_lived_connection_stays_while_a_backend_comes_and_goes_200_times() -> TestResult {
    let _alone = ALONE.lock();
    let mut cluster = web(2)?;
    cluster.spare(nginx)?;
    let Cluster { netlb, servers, client, .. } = &cluster;
    // Both families at once, each with a long-lived connection, busy old connections, and ever new ones.
    let mut lanes = Vec::new();
    for family in Family::BOTH {
        let server = cluster.vip(family);
        let mut kept = client.ns.enter(|| KeptConnection::open(server))??;
        let first = kept.get()?;
        let wrk = Wrk { server, connections: 8, seconds: LONG, reconnect: false }.start(&client.ns)?;
        let load = Load::start(&client.ns, server, 2, 500);
        lanes.push((family, servers[2].addr(family), kept, first, wrk, load));
    }
    for round in 0..ROUNDS {
        let (family, spare, kept, first, _, _) = &mut lanes[round % Family::BOTH.len()];
        netlb.add_backend(service(*family), *spare)?;
        netlb.drain_backend(service(*family), *spare)?;
        netlb.remove_backend(service(*family), *spare)?;
        let answer =
            kept.get().map_err(|error| error.context(format!("the long-lived connection, {family}, round {round}")))?;
        assert_eq!((answer.backend, answer.client), (first.backend, first.client), "{family}, round {round}");
    }
    for (family, _, _, _, wrk, load) in lanes {
        let wrk = wrk.stop()?;
        let total = load.stop().remove(0);
        assert_eq!(total.failed, 0, "{family}: of {} requests: {:?}", total.requests, total.failures);
        assert_eq!(wrk.failed(), 0, "{family}: {wrk:?}");
        assert!(total.requests > 100 && wrk.requests > 100, "{family}: there was a load: {total:?}, {wrk:?}");
    }
    Ok(())
}

#[test]
fn a_draining_backend_keeps_its_connections_and_gets_no_new_ones() -> TestResult {
    let _alone = ALONE.lock();
    let cluster = web(2)?;
    for family in Family::BOTH {
        let (server, drained) = (cluster.vip(family), cluster.servers[1].addr(family));
        let mut kept = wait_until("a connection to the second backend", SOON, || {
            let mut connection = cluster.client.ns.enter(|| KeptConnection::open(server))??;
            Ok((connection.get()?.backend == drained).then_some(connection))
        })?;
        cluster.netlb.drain_backend(service(family), drained)?;
        for _ in 0..100 {
            assert_ne!(cluster.client.ns.enter(|| load::get(server))??.backend, drained, "{family}: a new connection");
        }
        assert_eq!(kept.get()?.backend, drained, "{family}: the connection from before");
        cluster.netlb.activate_backend(service(family), drained)?;
        wait_until("the backend to get connections again", SOON, || {
            Ok((cluster.client.ns.enter(|| load::get(server))??.backend == drained).then_some(()))
        })?;
    }
    Ok(())
}

#[test]
fn a_hundred_new_pods_reach_the_service_with_their_first_packet() -> TestResult {
    let _alone = ALONE.lock();
    for layout in [Layout::Ptp, Layout::Bridge] {
        let cluster = Cluster::start(Plan::new(layout), Forwarding::Fast, (80, Protocol::Tcp), 2, nginx)?;
        let mut pods = Vec::new();
        let mut lost = Vec::new();
        for number in 0..100 {
            let pod = cluster.bed.pod(Host::A, &format!("new{number}"))?;
            for family in Family::BOTH {
                let begin = Instant::now();
                let result = pod.ns.enter(|| load::get(cluster.vip(family)))?;
                match result {
                    Ok(answer) if answer.client.ip() == pod.ip(family) && begin.elapsed() < UNDELAYED => {}
                    other => lost.push(format!("pod {number}, {family}, after {:?}: {other:?}", begin.elapsed())),
                }
            }
            // A dead data plane need not be asked a hundred times.
            if lost.len() == 4 {
                break;
            }
            pods.push(pod);
        }
        assert_eq!(lost, Vec::<String>::new(), "{layout:?}: requests that failed, came late or from another address");
    }
    Ok(())
}

#[test]
fn a_new_pod_serves_as_a_backend_as_soon_as_it_is_added() -> TestResult {
    let _alone = ALONE.lock();
    let mut cluster = web(1)?;
    let old = cluster.servers[0].addr(Family::V4);
    let server = cluster.vip(Family::V4);
    let load = Load::start(&cluster.client.ns, server, 2, 500);
    for _ in 0..10 {
        cluster.spare(nginx)?;
        let new = cluster.servers.last().map(|server| server.addr(Family::V4)).ok_or("no server")?;
        cluster.netlb.add_backend(service(Family::V4), new)?;
        wait_until("requests to the new backend", SOON, || Ok((load.total().of(new) > 0).then_some(())))?;
    }
    let total = load.stop().remove(0);
    assert_eq!(total.failed, 0, "of {}: {:?}", total.requests, total.failures);
    assert!(total.of(old) > 0);
    Ok(())
}

#[test]
fn traffic_flows_on_while_the_daemon_is_stopped_killed_and_started_again() -> TestResult {
    let _alone = ALONE.lock();
    let cluster = web(2)?;
    for family in Family::BOTH {
        let server = cluster.vip(family);
        let mut kept = cluster.client.ns.enter(|| KeptConnection::open(server))??;
        let before = kept.get()?;
        let load = Load::start(&cluster.client.ns, server, 2, 500);
        let more = |what: &str| {
            let goal = load.total().requests + 200;
            wait_until(what, SOON, || Ok((load.total().requests >= goal).then_some(())))
        };
        more("requests before the daemon ends")?;
        let status = cluster.netlb.stop()?;
        assert!(status.success(), "SIGTERM is an orderly end: {status}");
        more("requests without a daemon")?;
        cluster.netlb.restart(cluster.bed.node_a())?;
        more("requests with the second daemon")?;
        cluster.netlb.kill()?;
        more("requests after a kill")?;
        cluster.netlb.restart(cluster.bed.node_a())?;
        more("requests with the third daemon")?;
        assert_eq!(kept.get()?.client, before.client, "{family}: the connection from before");
        let total = load.stop().remove(0);
        assert_eq!(total.failed, 0, "{family}: of {} requests: {:?}", total.requests, total.failures);
    }
    Ok(())
}

#[test]
fn a_daemon_that_starts_is_not_ended_by_the_signal_to_read_its_file() -> TestResult {
    let _alone = ALONE.lock();
    let cluster = web(1)?;
    cluster.netlb.stop()?;
    cluster.netlb.restart_with(cluster.bed.node_a(), Signal::SIGHUP)?;
    Ok(())
}

#[test]
fn an_interface_that_refuses_one_of_the_filters_keeps_none() -> TestResult {
    let _alone = ALONE.lock();
    let bed = Plan::new(Layout::Ptp).build()?;
    let (node, whole, half) = (bed.node_a(), bed.pod(Host::A, "whole")?, bed.pod(Host::A, "half")?);
    let tc = |line: String| node.ns.command("tc").args(line.split(' '));
    tc(format!("qdisc add dev {} clsact", half.interface())).run()?.success()?;
    // At the priority of ours, for another protocol.
    let other = format!("dev {} egress prio 1 protocol ip", half.interface());
    tc(format!("filter add {other} bpf bytecode")).arg("1,6 0 0 0,").run()?.success()?;
    let _netlb = Netlb::start(node, &Config::new(node, Forwarding::Fast).node("attach = \"clsact\""))?;
    let filters = |pod: &Pod| -> Result<_> {
        Ok(tc(format!("filter show dev {} ingress", pod.interface())).run()?.success()?.stdout)
    };
    assert!(filters(&whole)?.contains("netlb"));
    assert_eq!(filters(&half)?, "");
    tc(format!("filter del {other}")).run()?.success()?;
    wait_until("the interface to be attached", SOON, || Ok(filters(&half)?.contains("netlb").then_some(())))?;
    Ok(())
}
