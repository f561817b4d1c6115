//! Datagrams longer than a packet go through a virtual address and back, in whatever order their fragments come.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use netlb_integration::cluster::Cluster;
use netlb_integration::daemon::{Config, Forwarding, Netlb, Service};
use netlb_integration::frames::{Packet, fragments};
use netlb_integration::raw;
use netlb_integration::servers::{self, Answer, Protocol};
use netlb_integration::testing::TestResult;
use netlb_integration::topology::{Family, Host, Layout, Plan, vip};

const PATIENCE: Duration = Duration::from_secs(5);
/// Bytes of a datagram in each fragment that fits 1500.
const SIZE: usize = 1440;

#[test]
fn long_datagrams_come_back_over_routed_veths() -> TestResult {
    long_datagrams_come_back(Layout::Ptp)
}

#[test]
fn long_datagrams_come_back_over_a_bridge() -> TestResult {
    long_datagrams_come_back(Layout::Bridge)
}

#[test]
fn long_datagrams_come_back_between_routed_hosts() -> TestResult {
    long_datagrams_come_back(Layout::Routed)
}

fn long_datagrams_come_back(layout: Layout) -> TestResult {
    for forwarding in Forwarding::BOTH {
        let cluster = start(layout, forwarding)?;
        for family in Family::BOTH {
            for len in [1473, 8_000, 60_000] {
                // Several sockets, for several backends.
                for _ in 0..10 {
                    let server = cluster.vip(family);
                    let answer = cluster.client.ns.enter(|| {
                        let socket = UdpSocket::bind(SocketAddr::new(cluster.client.ip(family), 0))?;
                        let datagram = datagram(len);
                        socket.send_to(&datagram, server)?;
                        answer(&socket, server, &datagram)
                    })?;
                    let what = format!("{layout:?}, {forwarding}, {family}, {len} bytes");
                    let answer = answer.map_err(|error| error.context(what.clone()))?;
                    assert_eq!(answer.client.ip(), cluster.client.ip(family), "{what}: whom the backend sees");
                }
            }
        }
    }
    Ok(())
}

/// Backends that do not forbid it leave it to routers to cut their packets, and a redirect cuts none.
#[test]
fn replies_that_do_not_fit_the_way_to_the_client_are_cut_by_the_kernel() -> TestResult {
    for forwarding in Forwarding::BOTH {
        let serve = |pod: &_| servers::echo(pod, Protocol::Udp, 7001);
        let cluster = Cluster::start(Plan::new(Layout::Ptp).rp_filter(1), forwarding, (7000, Protocol::Udp), 1, serve)?;
        cluster.bed.node_a().ns.ip(&format!("link set {} mtu 1400", cluster.client.interface()))?;
        cluster.client.ns.ip("link set eth0 mtu 1400")?;
        let (client, server) = (cluster.client.ip(Family::V4), cluster.vip(Family::V4));
        for len in [1473, 8_000] {
            let answer = cluster.client.ns.enter(|| {
                let socket = UdpSocket::bind(SocketAddr::new(client, 0))?;
                let datagram = datagram(len);
                socket.send_to(&datagram, server)?;
                answer(&socket, server, &datagram)
            })?;
            let answer = answer.with_context(|| format!("{forwarding}, {len} bytes"))?;
            assert_eq!(answer.client.ip(), client, "{forwarding}, {len} bytes: whom the backend sees");
        }
    }
    Ok(())
}

#[test]
fn fragments_in_any_order_are_put_together() -> TestResult {
    for layout in [Layout::Ptp, Layout::Bridge] {
        for forwarding in Forwarding::BOTH {
            let cluster = start(layout, forwarding)?;
            for family in Family::BOTH {
                let mut id = 0x1234;
                for len in [8_000, 60_000] {
                    for (order, arrange) in ORDERS {
                        id += 1;
                        let what = format!("{layout:?}, {forwarding}, {family}, {len} bytes {order}");
                        let answer = cluster.client.ns.enter(|| {
                            ask_by_fragments(cluster.client.ip(family), cluster.vip(family), id, len, arrange)
                        })?;
                        let answer = answer.map_err(|error| error.context(what.clone()))?;
                        assert_eq!(answer.client.ip(), cluster.client.ip(family), "{what}: whom the backend sees");
                    }
                }
            }
        }
    }
    Ok(())
}

/// A network card with several queues may have brought the backend's node to this.
#[test]
fn replies_in_any_order_are_put_together() -> TestResult {
    for (layout, mtu, size) in [
        (Layout::Ptp, 1500, SIZE),
        (Layout::Bridge, 1500, SIZE),
        (Layout::Ptp, 9000, 8936),
        (Layout::Bridge, 9000, 8936),
    ] {
        let bed = Plan::new(layout).pod_mtu(mtu).build()?;
        let (client, backend) = (bed.pod(Host::A, "client")?, bed.pod(Host::A, "backend")?);
        for forwarding in Forwarding::BOTH {
            for family in Family::BOTH {
                let (at, front) = (SocketAddr::new(backend.ip(family), 7001), SocketAddr::new(vip(family, 10), 7000));
                let mut config = Config::new(bed.node_a(), forwarding);
                if layout == Layout::Bridge {
                    config = config.bridge("br0");
                }
                let service = Service::new("long", format!("{front}/udp"), [at]);
                let netlb = Netlb::start(bed.node_a(), &config.service(service))?;
                let socket = client.ns.enter(|| UdpSocket::bind(SocketAddr::new(client.ip(family), 0)))??;
                let server = backend.ns.enter(|| UdpSocket::bind(at))??;
                for socket in [&socket, &server] {
                    socket.set_read_timeout(Some(PATIENCE))?;
                }
                for (id, (order, arrange)) in (0x2345..).zip(ORDERS) {
                    let what = format!("{layout:?}, {mtu}, {forwarding}, {family}, {order}; {}", netlb.log());
                    let sent = datagram(60_000);
                    socket.send_to(b"how long?", front)?;
                    let (_, from) = server.recv_from(&mut [0; 16]).with_context(|| what.clone())?;
                    let packet = Packet::udp(at, from).may_fragment().payload(&*sent);
                    let mut frames = fragments(&packet.frame(), id, size);
                    arrange(&mut frames);
                    backend.ns.enter(|| -> Result<()> {
                        let sender = raw::sender(from.ip())?;
                        frames.iter().try_for_each(|frame| raw::send(&sender, frame, from.ip()))?;
                        Ok(())
                    })??;
                    let mut heard = vec![0; 1 << 16];
                    let (len, from) = socket.recv_from(&mut heard).with_context(|| what.clone())?;
                    assert!(from == front && heard[..len] == sent, "{what}: {len} bytes from {from}");
                }
                assert!(netlb.counter("fragments_held")? >= 6, "{layout:?}, {mtu}, {forwarding}, {family}");
                assert_eq!(netlb.counter("fragment")?, 0, "{layout:?}, {mtu}, {forwarding}, {family}");
            }
        }
    }
    Ok(())
}

/// Orders that fragments are sent in.
type Order = (&'static str, fn(&mut Vec<Vec<u8>>));

const ORDERS: [Order; 4] = [
    ("in order", |_| ()),
    ("the last one first", |frames| frames.reverse()),
    ("the first one last", |frames| frames.rotate_left(1)),
    ("shuffled", |frames| frames.sort_by_key(|frame| frame.iter().map(|byte| u32::from(*byte)).sum::<u32>() % 97)),
];

/// Sends a datagram in fragments made here, from an address of the calling thread's namespace.
fn ask_by_fragments(
    client: IpAddr,
    server: SocketAddr,
    id: u32,
    len: usize,
    arrange: impl Fn(&mut Vec<Vec<u8>>),
) -> Result<Answer> {
    let socket = UdpSocket::bind(SocketAddr::new(client, 0))?;
    let datagram = datagram(len);
    let packet = Packet::udp(socket.local_addr()?, server).may_fragment().payload(&*datagram);
    let mut frames = fragments(&packet.frame(), id, SIZE);
    arrange(&mut frames);
    let sender = raw::sender(server.ip())?;
    for frame in frames {
        raw::send(&sender, &frame, server.ip())?;
    }
    answer(&socket, server, &datagram)
}

fn start(layout: Layout, forwarding: Forwarding) -> Result<Cluster> {
    let serve = |pod: &_| servers::echo(pod, Protocol::Udp, 7001);
    Cluster::start(Plan::new(layout), forwarding, (7000, Protocol::Udp), 3, serve)
}

fn datagram(len: usize) -> Vec<u8> {
    (0..len as u32).map(|n| (n.wrapping_mul(0x9e37_79b1) >> 24) as u8).collect()
}

/// The server's answer, which has all that was sent.
fn answer(socket: &UdpSocket, server: SocketAddr, sent: &[u8]) -> Result<Answer> {
    socket.set_read_timeout(Some(PATIENCE))?;
    let mut answer = vec![0; 1 << 16];
    let (len, from) = socket.recv_from(&mut answer)?;
    ensure!(from == server, "the answer is from {from}");
    let echoed = [b" ", sent, b"\n"].concat();
    ensure!(answer[..len].ends_with(&echoed), "{} bytes came back otherwise", sent.len());
    let words = String::from_utf8_lossy(&answer[..len - echoed.len()]).into_owned();
    Answer::parse(&words)
}

#[test]
fn nothing_of_a_datagram_is_answered_or_kept_for_good() -> TestResult {
    let cluster = start(Layout::Ptp, Forwarding::Fast)?;
    for family in Family::BOTH {
        let server = cluster.vip(family);
        // Everything but the first fragment, many times; then a whole datagram the same way.
        for id in 0..100 {
            let lost = cluster.client.ns.enter(|| {
                let any = SocketAddr::new(cluster.client.ip(family), 4000);
                let packet = Packet::udp(any, server).may_fragment().payload(datagram(8000));
                let sender = raw::sender(server.ip())?;
                let frames = fragments(&packet.frame(), 0x7000 + id, SIZE);
                frames[1..].iter().try_for_each(|frame| raw::send(&sender, frame, server.ip()))
            })?;
            lost?;
        }
        std::thread::sleep(Duration::from_secs(5));
        let ask = || ask_by_fragments(cluster.client.ip(family), server, 0x99, 8000, |frames| frames.reverse());
        cluster.client.ns.enter(ask)??;
    }
    Ok(())
}
