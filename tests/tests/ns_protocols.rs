//! Real protocols go through a virtual address unharmed: short and long streams, datagrams, and with every way of offloading.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use anyhow::{Result, ensure};
use netlb_integration::clients::{self, Wrk};
use netlb_integration::cluster::Cluster;
use netlb_integration::daemon::Forwarding;
use netlb_integration::netns::Namespace;
use netlb_integration::servers::{self, Answer, Protocol};
use netlb_integration::testing::TestResult;
use netlb_integration::topology::{Family, Layout, Plan};

const PATIENCE: Duration = Duration::from_secs(3);

/// Features of a pod's interface to be switched off together. What a checksum or a segment is when it reaches netlb depends on them.
const OFFLOADS: [(&str, &[&str]); 4] = [
    ("all as the kernel has them", &[]),
    ("no checksum offload", &["tx", "rx"]),
    ("no segmentation offload", &["tso", "gso", "gro"]),
    ("no offload at all", &["tx", "rx", "tso", "gso", "gro"]),
];

#[test]
fn redis_keeps_what_it_is_told() -> TestResult {
    for forwarding in Forwarding::BOTH {
        let cluster = ptp(forwarding, (6379, Protocol::Tcp), 1, |pod| servers::redis(pod, 6379))?;
        for family in Family::BOTH {
            let (client, server) = (&cluster.client.ns, cluster.vip(family));
            let value = "x".repeat(100_000);
            assert_eq!(clients::redis(client, server, &["SET", "key", &value])?, "OK", "{forwarding}, {family}");
            assert_eq!(clients::redis(client, server, &["GET", "key"])?, value, "{forwarding}, {family}");
        }
    }
    Ok(())
}

#[test]
fn dns_is_answered_over_udp_and_tcp() -> TestResult {
    for forwarding in Forwarding::BOTH {
        for (protocol, tcp) in [(Protocol::Udp, false), (Protocol::Tcp, true)] {
            let cluster = ptp(forwarding, (53, protocol), 2, |pod| servers::dns(pod, 53))?;
            for family in Family::BOTH {
                let mut names = Vec::new();
                for _ in 0..30 {
                    names.push(clients::dns_who(&cluster.client.ns, cluster.vip(family), tcp)?);
                }
                names.sort();
                names.dedup();
                assert_eq!(
                    names,
                    ["backend-1", "backend-2"],
                    "{forwarding}, {family}, {protocol:?}: both answer in 30 questions"
                );
            }
        }
    }
    Ok(())
}

#[test]
fn iperf3_streams_both_ways() -> TestResult {
    for forwarding in Forwarding::BOTH {
        let cluster = ptp(forwarding, (5201, Protocol::Tcp), 1, |pod| servers::iperf3(pod, 5201))?;
        for family in Family::BOTH {
            for reverse in [false, true] {
                servers::await_iperf3(&cluster.servers[0])?;
                let report = clients::iperf3(&cluster.client.ns, cluster.vip(family), 1, reverse)?;
                let megabits = report.bits_per_second / 1e6;
                assert!(megabits > 100.0, "{forwarding}, {family}, reverse: {reverse}: {megabits:.0} Mbit/s");
            }
        }
    }
    Ok(())
}

#[test]
fn wrk_sees_no_error_with_kept_and_with_new_connections() -> TestResult {
    for forwarding in Forwarding::BOTH {
        let cluster = ptp(forwarding, (80, Protocol::Tcp), 2, |pod| servers::nginx(pod, 8080))?;
        for family in Family::BOTH {
            for reconnect in [false, true] {
                let wrk = Wrk { server: cluster.vip(family), connections: 16, seconds: 2, reconnect };
                let report = wrk.run(&cluster.client.ns)?;
                assert_eq!(report.failed(), 0, "{forwarding}, {family}, new connections: {reconnect}: {report:?}");
                assert!(report.requests > 500, "{forwarding}, {family}, new connections: {reconnect}: {report:?}");
            }
        }
    }
    Ok(())
}

#[test]
fn a_download_of_200_mb_arrives_as_it_was() -> TestResult {
    for forwarding in Forwarding::BOTH {
        let cluster = ptp(forwarding, (80, Protocol::Tcp), 1, |pod| servers::nginx(pod, 8080))?;
        let original = servers::nginx_file(&cluster.servers[0], "data", 200)?;
        let copy = original.with_extension("copy");
        for family in Family::BOTH {
            clients::download(&cluster.client.ns, cluster.vip(family), "data", &copy)?;
            assert_eq!(clients::sha256(&copy)?, clients::sha256(&original)?, "{forwarding}, {family}: sha256");
        }
    }
    Ok(())
}

#[test]
fn streams_are_whole_with_any_offloads_of_client_and_backend() -> TestResult {
    for forwarding in Forwarding::BOTH {
        for (title, off) in OFFLOADS {
            let cluster = ptp(forwarding, (80, Protocol::Tcp), 1, |pod| servers::nginx(pod, 8080))?;
            switch_off(&cluster, off)?;
            let original = servers::nginx_file(&cluster.servers[0], "data", 20)?;
            let copy = original.with_extension("copy");
            for family in Family::BOTH {
                clients::download(&cluster.client.ns, cluster.vip(family), "data", &copy)?;
                assert_eq!(
                    clients::sha256(&copy)?,
                    clients::sha256(&original)?,
                    "{title}, {forwarding}, {family}: sha256"
                );
            }
        }
    }
    Ok(())
}

#[test]
fn datagrams_of_every_size_come_back_from_the_virtual_address_with_any_offloads() -> TestResult {
    for forwarding in Forwarding::BOTH {
        for (title, off) in OFFLOADS {
            let cluster = ptp(forwarding, (7000, Protocol::Udp), 1, |pod| servers::echo(pod, Protocol::Udp, 7001))?;
            switch_off(&cluster, off)?;
            for family in Family::BOTH {
                for size in [0, 1, 2, 3, 512, 1300] {
                    let what = vec![b'u'; size];
                    let case = format!("{title}, {forwarding}, {family}, {size} bytes");
                    let (from, answer) = udp_echo(&cluster.client.ns, cluster.vip(family), &what)?;
                    assert_eq!(from, cluster.vip(family), "{case}: the answer's sender");
                    assert_eq!(answer.client.ip(), cluster.client.ip(family), "{case}: whom the backend sees");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn datagrams_of_one_socket_stay_with_one_backend() -> TestResult {
    let cluster = ptp(Forwarding::Fast, (7000, Protocol::Udp), 3, |pod| servers::echo(pod, Protocol::Udp, 7001))?;
    for family in Family::BOTH {
        let server = cluster.vip(family);
        let names = cluster.client.ns.enter(|| {
            let socket = UdpSocket::bind(any(server))?;
            (0..50)
                .map(|_| udp_ask(&socket, server, b"again").map(|(_, answer)| answer.name))
                .collect::<Result<Vec<_>>>()
        })??;
        assert!(names.iter().all(|name| *name == names[0]), "{family}: {names:?}");
    }
    Ok(())
}

#[test]
fn a_connection_that_lies_idle_and_half_closes_is_carried_to_its_end() -> TestResult {
    let cluster = ptp(Forwarding::Fast, (7000, Protocol::Tcp), 2, |pod| servers::echo(pod, Protocol::Tcp, 7001))?;
    for family in Family::BOTH {
        let server = cluster.vip(family);
        let lines = cluster.client.ns.enter(|| {
            let mut stream = TcpStream::connect_timeout(&server, PATIENCE)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.write_all(b"first\nsecond\n")?;
            stream.shutdown(std::net::Shutdown::Write)?;
            BufReader::new(stream).lines().map(|line| Ok(line?)).collect::<Result<Vec<_>>>()
        })??;
        assert_eq!(lines.len(), 2, "{family}: both lines come back after the client's FIN: {lines:?}");
    }
    Ok(())
}

fn ptp(
    forwarding: Forwarding,
    frontend: (u16, Protocol),
    backends: u32,
    serve: impl Fn(&netlb_integration::topology::Pod) -> Result<servers::Server>,
) -> Result<Cluster> {
    Cluster::start(Plan::new(Layout::Ptp), forwarding, frontend, backends, serve)
}

fn switch_off(cluster: &Cluster, features: &[&str]) -> Result<()> {
    if features.is_empty() {
        return Ok(());
    }
    [&cluster.client].into_iter().chain(&cluster.backends).try_for_each(|pod| pod.offload(features, false))
}

fn udp_echo(ns: &Namespace, server: SocketAddr, what: &[u8]) -> Result<(SocketAddr, Answer)> {
    ns.enter(|| udp_ask(&UdpSocket::bind(any(server))?, server, what))?
}

/// On an unconnected socket, which takes answers from anybody: the sender is to be looked at.
fn udp_ask(socket: &UdpSocket, server: SocketAddr, what: &[u8]) -> Result<(SocketAddr, Answer)> {
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.send_to(what, server)?;
    let mut answer = vec![0; 4096];
    let (length, from) = socket.recv_from(&mut answer)?;
    let echoed = [b" ", what, b"\n"].concat();
    ensure!(
        answer[..length].ends_with(&echoed),
        "{} bytes came back otherwise: {:?}",
        what.len(),
        String::from_utf8_lossy(&answer[..length])
    );
    Ok((from, Answer::parse(&String::from_utf8_lossy(&answer[..length]))?))
}

fn any(server: SocketAddr) -> &'static str {
    if server.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }
}
