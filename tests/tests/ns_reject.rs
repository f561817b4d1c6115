//! Whoever turns to a service without backends is told at once, by whatever way.

use std::io::{self, ErrorKind};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use netlb_integration::daemon::{Config, Forwarding, Netlb, Service};
use netlb_integration::netns::Namespace;
use netlb_integration::servers::Protocol;
use netlb_integration::testing::TestResult;
use netlb_integration::topology::{Family, Host, Layout, Plan, vip};

const AT_ONCE: Duration = Duration::from_millis(900);

#[test]
fn a_service_without_backends_refuses_pods_and_clients_outside() -> TestResult {
    let bed = Plan::new(Layout::Ptp).with_outside_client().build()?;
    let pod = bed.pod(Host::A, "client")?;
    // In the end the pod leaves checksums to its device, and the node's side of it sums up itself.
    for (forwarding, sums) in [(Forwarding::Fast, false), (Forwarding::Stack, false), (Forwarding::Fast, true)] {
        if sums {
            let node = &bed.node_a().ns;
            node.command("ethtool").args(["-K", pod.interface(), "tx-checksum-ip-generic", "off"]).run()?.success()?;
        }
        let mut config = Config::new(bed.node_a(), forwarding);
        for family in Family::BOTH {
            for protocol in [Protocol::Tcp, Protocol::Udp].map(Protocol::name) {
                let frontend = format!("{}/{protocol}", SocketAddr::new(vip(family, 10), 80));
                config = config.service(Service::new(&format!("nobody-{protocol}-{family}"), frontend, []));
            }
        }
        let netlb = Netlb::start(bed.node_a(), &config)?;
        for family in Family::BOTH {
            let server = SocketAddr::new(vip(family, 10), 80);
            for (who, ns) in [("a pod", &pod.ns), ("outside", bed.outside()?)] {
                let what = format!("{who}, {forwarding}, {family}, sums: {sums}; {}", netlb.log());
                assert_refused(ns, &what, || TcpStream::connect_timeout(&server, 2 * AT_ONCE).map(drop))?;
                assert_refused(ns, &what, || speak(server))?;
            }
        }
    }
    Ok(())
}

/// Sends a datagram on a connected socket, and waits for what comes.
fn speak(server: SocketAddr) -> io::Result<()> {
    let any: SocketAddr = if server.is_ipv4() { ([0; 4], 0).into() } else { ([0_u16; 8], 0).into() };
    let socket = UdpSocket::bind(any)?;
    socket.set_read_timeout(Some(2 * AT_ONCE))?;
    socket.connect(server)?;
    socket.send(b"anybody?")?;
    socket.recv(&mut [0; 16]).map(drop)
}

fn assert_refused(ns: &Namespace, what: &str, call: impl FnOnce() -> io::Result<()> + Send) -> Result<()> {
    let (result, took) = ns
        .enter(|| {
            let begin = Instant::now();
            (call(), begin.elapsed())
        })
        .context("failed to enter a namespace")?;
    let error = result.err().map(|error| error.kind());
    assert_eq!(error, Some(ErrorKind::ConnectionRefused), "{what}");
    assert!(took < AT_ONCE, "{what}: it took {took:?}");
    Ok(())
}
