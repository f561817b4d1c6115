//! ICMP errors find through a virtual address: to the client whose request was refused or too long, and to the backend whose reply was.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use netlb_integration::daemon::{Config, Forwarding, Netlb, Service};
use netlb_integration::netns::Namespace;
use netlb_integration::run::Run;
use netlb_integration::testing::TestResult;
use netlb_integration::topology::{Family, Host, Layout, Plan, Pod, Testbed, vip};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, setsockopt, sockopt};

/// What is told at once takes a fraction of a second; what is not takes until somebody gives up.
const AT_ONCE: Duration = Duration::from_secs(5);
const LENGTH: usize = 10 << 20;
/// Of the narrow part of a path, which only the router before it knows.
const NARROW: u32 = 1300;

/// Who is where.
#[derive(Clone, Copy, Debug)]
enum Site {
    /// Both are pods of the node.
    Near,
    /// The backend is a pod of another node.
    Far,
    /// The client is outside.
    Outside,
    /// The same, and the backend a pod of another node: the client gets an address of the node.
    OutsideFar,
    /// One pod is both.
    Hairpin,
}

impl Site {
    fn build(self) -> Result<Testbed> {
        match self {
            Self::Near | Self::Hairpin => Plan::new(Layout::Ptp).build(),
            Self::Far => Plan::new(Layout::Routed).build(),
            Self::Outside => Plan::new(Layout::Ptp).with_outside_client().build(),
            Self::OutsideFar => Plan::new(Layout::Routed).with_outside_client().build(),
        }
    }

    fn backend(self, bed: &Testbed) -> Result<Pod> {
        bed.pod(if matches!(self, Self::Far | Self::OutsideFar) { Host::B } else { Host::A }, "backend")
    }
}

fn server(family: Family) -> SocketAddr {
    SocketAddr::new(vip(family, 10), 80)
}

/// netlb on node A, with the backend behind the virtual address.
fn serve(bed: &Testbed, forwarding: Forwarding, family: Family, protocol: &str, backend: &Pod) -> Result<Netlb> {
    let backend = SocketAddr::new(backend.ip(family), 9000);
    let service = Service::new("sink", format!("{}/{protocol}", server(family)), [backend]);
    Netlb::start(bed.node_a(), &Config::new(bed.node_a(), forwarding).service(service))
}

#[test]
fn a_client_learns_at_once_that_its_backend_has_no_socket() -> TestResult {
    for site in [Site::Near, Site::Far, Site::Outside, Site::OutsideFar, Site::Hairpin] {
        let bed = site.build()?;
        let backend = site.backend(&bed)?;
        let pod = bed.pod(Host::A, "client")?;
        let client = match site {
            Site::Near | Site::Far => &pod.ns,
            Site::Hairpin => &backend.ns,
            Site::Outside | Site::OutsideFar => bed.outside()?,
        };
        for forwarding in Forwarding::BOTH {
            for family in Family::BOTH {
                let netlb = serve(&bed, forwarding, family, "udp", &backend)?;
                let what = || format!("{site:?}, {forwarding}, {family}; {}", netlb.log());
                let error = client.enter(|| ask(server(family)))?.with_context(what)?;
                assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{}", what());
            }
        }
    }
    Ok(())
}

/// The node's kernel looks for the host for three seconds, and says then what it knows the packet as.
#[test]
fn a_client_learns_that_its_backend_is_not_there() -> TestResult {
    let bed = Site::Far.build()?;
    let client = bed.pod(Host::A, "client")?;
    for forwarding in Forwarding::BOTH {
        for (family, nobody) in Family::BOTH.into_iter().zip(["192.168.50.77", "fd00:192:168:50::77"]) {
            let backend = SocketAddr::new(nobody.parse()?, 9000);
            let service = Service::new("sink", format!("{}/udp", server(family)), [backend]);
            let netlb = Netlb::start(bed.node_a(), &Config::new(bed.node_a(), forwarding).service(service))?;
            let what = || format!("{forwarding}, {family}; {}", netlb.log());
            let error = client.ns.enter(|| ask(server(family)))?.with_context(what)?;
            assert_eq!(error.kind(), ErrorKind::HostUnreachable, "{}", what());
            assert_eq!(netlb.counter("icmp_translated")?, 1, "{}", what());
        }
    }
    Ok(())
}

/// Sends a datagram and says what the connected socket hears of it.
fn ask(server: SocketAddr) -> Result<io::Error> {
    let socket = UdpSocket::bind(if server.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })?;
    socket.connect(server)?;
    socket.set_read_timeout(Some(AT_ONCE))?;
    // Otherwise a socket hears only of what is for good.
    match server {
        SocketAddr::V4(_) => setsockopt(&socket, sockopt::Ipv4RecvErr, &true)?,
        SocketAddr::V6(_) => setsockopt(&socket, sockopt::Ipv6RecvErr, &true)?,
    }
    socket.send(b"anybody?")?;
    match socket.recv(&mut [0; 16]) {
        Ok(len) => bail!("an answer of {len} bytes"),
        Err(error) => Ok(error),
    }
}

/// The message goes to the virtual address, and the backend is who sends smaller segments from then on.
#[test]
fn a_download_over_a_narrow_path_to_a_client_outside_is_done_at_once() -> TestResult {
    for site in [Site::Outside, Site::OutsideFar] {
        let bed = site.build()?;
        let backend = site.backend(&bed)?;
        let client = behind_a_router(&bed, NARROW)?;
        transfer_each_way(&bed, &client, &backend, Load::Download).with_context(|| format!("{site:?}"))?;
    }
    Ok(())
}

/// The message is about a packet to the backend, which its sender does not know.
#[test]
fn an_upload_over_a_narrow_path_to_a_backend_is_done_at_once() -> TestResult {
    for site in [Site::Far, Site::OutsideFar] {
        let bed = site.build()?;
        let backend = site.backend(&bed)?;
        // The other node is the router: the pod itself believes in 1500 bytes, and says so to its peers.
        bed.node(Host::B)?.ns.ip(&format!("link set {} mtu {NARROW}\n", backend.interface()))?;
        let pod = bed.pod(Host::A, "client")?;
        let client = if matches!(site, Site::Far) { &pod.ns } else { bed.outside()? };
        transfer_each_way(&bed, client, &backend, Load::Upload).with_context(|| format!("{site:?}"))?;
    }
    Ok(())
}

/// A host behind the outside one, which becomes its router: the way to it takes datagrams of `mtu` bytes, and it does not know.
fn behind_a_router(bed: &Testbed, mtu: u32) -> Result<Namespace> {
    let router = bed.outside()?;
    let ns = Namespace::new(Run::current()?.next_number(), "beyond")?;
    for key in ["net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"] {
        router.sysctl(key, "1")?;
    }
    ns.ip(&format!("link add eth0 type veth peer name narrow\nlink set narrow netns {}\n", router.name()))?;
    router.ip(&format!(
        "link set narrow mtu {mtu} up\n\
         addr add 192.0.2.1/24 dev narrow\n\
         addr add fd00:192:0:2::1/64 dev narrow nodad\n"
    ))?;
    ns.ip("link set eth0 up\n\
           addr add 192.0.2.2/24 dev eth0\n\
           addr add fd00:192:0:2::2/64 dev eth0 nodad\n\
           route add default via 192.0.2.1\n\
           route add ::/0 via fd00:192:0:2::1\n")?;
    bed.node_a().ns.ip("route add 192.0.2.0/24 via 192.168.50.100\n\
         route add fd00:192:0:2::/64 via fd00:192:168:50::64\n")?;
    Ok(ns)
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Load {
    Upload,
    Download,
}

/// Every transfer is the first on its path: what was learned of it is forgotten.
fn transfer_each_way(bed: &Testbed, client: &Namespace, backend: &Pod, load: Load) -> Result<()> {
    for forwarding in Forwarding::BOTH {
        for family in Family::BOTH {
            let netlb = serve(bed, forwarding, family, "tcp", backend)?;
            for ns in [client, &backend.ns] {
                for family in ["-4", "-6"] {
                    ns.command("ip").args([family, "route", "flush", "cache"]).run()?.success()?;
                }
            }
            let elapsed = transfer(client, backend, family, load)
                .with_context(|| format!("{load:?}, {forwarding}, {family}; {}", netlb.log()))?;
            ensure!(elapsed < AT_ONCE, "{load:?}, {forwarding}, {family}: it took {elapsed:?}");
            let translated = netlb.counter("icmp_translated")?;
            ensure!(translated > 0, "{load:?}, {forwarding}, {family}: no error was needed");
        }
    }
    Ok(())
}

fn transfer(client: &Namespace, backend: &Pod, family: Family, load: Load) -> Result<Duration> {
    let address = SocketAddr::new(backend.ip(family), 9000);
    // The socket is the backend's, whichever thread serves it.
    let listener = backend.ns.enter(|| TcpListener::bind(address))??;
    thread::scope(|scope| {
        let served = scope.spawn(|| {
            let (stream, _) = listener.accept()?;
            if load == Load::Upload { take(stream) } else { give(stream) }
        });
        let begin = Instant::now();
        let outcome = client.enter(|| -> Result<()> {
            let stream = TcpStream::connect_timeout(&server(family), AT_ONCE).context("failed to connect")?;
            if load == Load::Upload { give(stream) } else { take(stream) }
        })?;
        let elapsed = begin.elapsed();
        if outcome.is_err() {
            // A server that nobody reached would wait on: this connection ends it.
            let _ = backend.ns.enter(|| TcpStream::connect(address));
        }
        let served = served.join().unwrap_or_else(|_| bail!("the server panicked"));
        outcome?;
        served?;
        Ok(elapsed)
    })
}

fn give(mut stream: TcpStream) -> Result<()> {
    stream.set_write_timeout(Some(AT_ONCE))?;
    stream.set_read_timeout(Some(AT_ONCE))?;
    stream.write_all(&vec![b'd'; LENGTH]).context("the transfer stalled")?;
    stream.shutdown(Shutdown::Write)?;
    // The other side closes when it has all.
    stream.read_to_end(&mut Vec::new()).context("the transfer did not come to its end")?;
    Ok(())
}

fn take(mut stream: TcpStream) -> Result<()> {
    stream.set_read_timeout(Some(AT_ONCE))?;
    let mut got = Vec::new();
    stream.read_to_end(&mut got).context("the transfer stalled")?;
    ensure!(got.len() == LENGTH, "{} of {LENGTH} bytes came", got.len());
    Ok(())
}

/// As traceroute finds the routers of a path: by packets that do not get beyond them.
#[test]
fn a_router_on_the_way_to_the_backend_shows_itself_to_the_client() -> TestResult {
    let bed = Site::Far.build()?;
    let backend = Site::Far.backend(&bed)?;
    let client = bed.pod(Host::A, "client")?;
    for forwarding in Forwarding::BOTH {
        for family in Family::BOTH {
            let netlb = serve(&bed, forwarding, family, "udp", &backend)?;
            let (about, router) = client
                .ns
                .enter(|| probe(server(family), 2))?
                .with_context(|| format!("{forwarding}, {family}; {}", netlb.log()))?;
            let expected = (server(family), Host::B.underlay_address(family));
            assert_eq!((about, router), expected, "{forwarding}, {family}: what the packet was, and who answered");
        }
    }
    Ok(())
}

/// Sends a datagram that may take so many hops. Says where the one that an error came back about went to, and whom that error is from.
fn probe(server: SocketAddr, hops: i32) -> Result<(SocketAddr, IpAddr)> {
    let socket = UdpSocket::bind(if server.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })?;
    if server.is_ipv4() {
        setsockopt(&socket, sockopt::Ipv4RecvErr, &true)?;
        setsockopt(&socket, sockopt::Ipv4Ttl, &hops)?;
    } else {
        setsockopt(&socket, sockopt::Ipv6RecvErr, &true)?;
        setsockopt(&socket, sockopt::Ipv6Ttl, &hops)?;
    }
    socket.connect(server)?;
    socket.set_read_timeout(Some(AT_ONCE))?;
    socket.send(b"how far?")?;
    let error = socket.recv(&mut [0; 16]).err().context("an answer")?;
    ensure!(error.kind() == ErrorKind::HostUnreachable, "{error}");
    let mut control = vec![0; 256];
    let mut data = [0; 16];
    let mut parts = [io::IoSliceMut::new(&mut data)];
    let message =
        recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut parts, Some(&mut control), MsgFlags::MSG_ERRQUEUE)?;
    let about = message.address.as_ref().and_then(endpoint).context("no address")?;
    for part in message.cmsgs()? {
        match part {
            ControlMessageOwned::Ipv4RecvErr(_, Some(from)) => {
                return Ok((about, IpAddr::from(from.sin_addr.s_addr.to_ne_bytes())));
            }
            ControlMessageOwned::Ipv6RecvErr(_, Some(from)) => {
                return Ok((about, IpAddr::from(from.sin6_addr.s6_addr)));
            }
            _ => {}
        }
    }
    bail!("nobody to have sent the error about {about}")
}

fn endpoint(address: &SockaddrStorage) -> Option<SocketAddr> {
    let v4 = address.as_sockaddr_in().map(|address| SocketAddr::new(address.ip().into(), address.port()));
    v4.or_else(|| address.as_sockaddr_in6().map(|address| SocketAddr::new(address.ip().into(), address.port())))
}
