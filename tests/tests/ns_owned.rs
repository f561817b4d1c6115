//! Networks that are the services' own (`owned_cidrs`): what becomes of packets to ports and addresses that no service has.

use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use netlb_integration::daemon::{Config, Forwarding, Netlb, Service};
use netlb_integration::load;
use netlb_integration::netns::Namespace;
use netlb_integration::raw;
use netlb_integration::servers::{self, Server};
use netlb_integration::testing::TestResult;
use netlb_integration::topology::{Family, Host, Layout, Plan, Pod, Testbed, vip};

const OWNED: &str = "owned_cidrs = [\"10.96.0.0/16\", \"fd00:10:96::/112\"]";
/// A refusal comes at once, or not at all.
const PATIENCE: Duration = Duration::from_millis(900);
const UNKNOWN_PORT: u16 = 81;
/// The number of an address that no service has, and of one that the node has.
const NOBODYS: u8 = 99;
const NODES: u8 = 200;

struct Bed {
    // Dropped in this order: the daemon before its node, the server before its pod.
    netlb: Netlb,
    _server: Server,
    _backend: Pod,
    client: Pod,
    bed: Testbed,
}

impl Bed {
    /// A service at number 10 of the network, and an address of the node within it, of a device that nothing goes out of.
    fn start(layout: Layout, forwarding: Forwarding, lines: &str) -> Result<Self> {
        let bed = Plan::new(layout).with_outside_client().build()?;
        let (client, backend) = (bed.pod(Host::A, "client")?, bed.pod(Host::A, "backend")?);
        let server = servers::nginx(&backend, 8080)?;
        let node = &bed.node_a().ns;
        for (family, bits) in [(Family::V4, 32), (Family::V6, 128)] {
            node.ip(&format!("addr add {}/{bits} dev lo\n", vip(family, NODES)))?;
        }
        let mut config = Config::new(bed.node_a(), forwarding).node(lines);
        for family in Family::BOTH {
            let frontend = format!("{}/tcp", SocketAddr::new(vip(family, 10), 80));
            config = config.service(Service::new(&format!("web-{family}"), frontend, [server.addr(family)]));
        }
        if layout == Layout::Bridge {
            config = config.bridge("br0");
        }
        let netlb = Netlb::start(bed.node_a(), &config)?;
        Ok(Self { netlb, _server: server, _backend: backend, client, bed })
    }

    /// Each family from a pod and from outside.
    fn clients(&self) -> Result<Vec<(Family, &'static str, &Namespace)>> {
        let clients = [("a pod", &self.client.ns), ("outside", self.bed.outside()?)];
        Ok(Family::BOTH.into_iter().flat_map(|family| clients.map(|(who, ns)| (family, who, ns))).collect())
    }

    fn address_of_outside(&self, family: Family) -> Result<IpAddr> {
        let to = SocketAddr::new(Host::A.underlay_address(family), 9);
        let socket = self.bed.outside()?.enter(|| open(to))??;
        Ok(socket.local_addr()?.ip())
    }

    /// How much counters grew while something was done, by their names.
    fn counted<T>(&self, names: &[&str], work: impl FnOnce() -> Result<T>) -> Result<(T, Vec<u64>)> {
        let count = || names.iter().map(|name| self.netlb.counter(name)).collect::<Result<Vec<_>>>();
        let before = count()?;
        let done = work()?;
        Ok((done, count()?.into_iter().zip(before).map(|(now, before)| now - before).collect()))
    }
}

/// Each line is a test: how pods are joined to their node, and how packets are forwarded.
macro_rules! owned_networks {
    ($($name:ident: $layout:ident, $forwarding:ident;)+) => {
        $(#[test]
        fn $name() -> TestResult {
            let bed = Bed::start(Layout::$layout, Forwarding::$forwarding, OWNED)?;
            for (family, who, ns) in bed.clients()? {
                let what = format!("{family}, {who}; {}", bed.netlb.log());
                a_port_that_no_service_has_is_refused_at_once(&bed, family, ns, &what)?;
                an_address_that_no_service_has_is_nobodys(&bed, family, ns, &what)?;
                a_service_answers_echo_requests(&bed, family, ns, &what)?;
                an_address_of_the_node_is_left_to_it(&bed, family, ns, &what)?;
            }
            Ok(())
        })+
    };
}

owned_networks! {
    owned_networks_over_routed_veths_fast: Ptp, Fast;
    owned_networks_over_routed_veths_by_the_stack: Ptp, Stack;
    owned_networks_over_a_bridge_fast: Bridge, Fast;
}

fn a_port_that_no_service_has_is_refused_at_once(bed: &Bed, family: Family, ns: &Namespace, what: &str) -> Result<()> {
    ns.enter(|| load::get(SocketAddr::new(vip(family, 10), 80)))?.with_context(|| what.to_owned())?;
    let to = SocketAddr::new(vip(family, 10), UNKNOWN_PORT);
    let (outcomes, counts) = bed.counted(&["unknown_port", "rejected"], || {
        Ok([outcome(ns, || connect(to))?, outcome(ns, || speak(to))?, outcome(ns, || speak(at_80(to)))?])
    })?;
    assert_eq!(outcomes, [Some(ErrorKind::ConnectionRefused); 3], "TCP, UDP, and UDP at the port of TCP: {what}");
    assert_eq!(counts, [3, 3], "{what}");
    Ok(())
}

fn an_address_that_no_service_has_is_nobodys(bed: &Bed, family: Family, ns: &Namespace, what: &str) -> Result<()> {
    let to = SocketAddr::new(vip(family, NOBODYS), 80);
    let (outcomes, counts) = bed.counted(&["owned_unknown", "rejected", "echo_answered"], || {
        let pinged = ns.enter(|| raw::ping(to.ip(), PATIENCE))?;
        assert!(pinged.is_err(), "{what}");
        Ok([outcome(ns, || connect(to))?, outcome(ns, || speak(to))?])
    })?;
    // Without an answer, where the kernel of the node would have said that it knows no way.
    assert!(outcomes.iter().all(|outcome| outcome.is_some_and(is_silence)), "{outcomes:?}: {what}");
    assert!(counts[0] >= 3, "a SYN, a datagram and an echo request: {counts:?}: {what}");
    assert_eq!(counts[1..], [0, 0], "{what}");
    Ok(())
}

fn a_service_answers_echo_requests(bed: &Bed, family: Family, ns: &Namespace, what: &str) -> Result<()> {
    let (pinged, counts) = bed.counted(&["echo_answered"], || ns.enter(|| raw::ping(vip(family, 10), PATIENCE)))?;
    assert!(pinged.is_ok(), "{pinged:?}: {what}");
    assert_eq!(counts, [3], "{what}");
    Ok(())
}

#[test]
fn a_service_keeps_silent_where_echo_is_switched_off() -> TestResult {
    let bed = Bed::start(Layout::Ptp, Forwarding::Fast, &format!("{OWNED}\necho = false"))?;
    for (family, who, ns) in bed.clients()? {
        let (pinged, counts) = bed.counted(&["echo_answered"], || ns.enter(|| raw::ping(vip(family, 10), PATIENCE)))?;
        assert!(pinged.is_err(), "{family}, {who}");
        assert_eq!(counts, [0], "{family}, {who}");
    }
    Ok(())
}

/// An address of the node within such a network is the node's: its kernel answers, and netlb does not.
fn an_address_of_the_node_is_left_to_it(bed: &Bed, family: Family, ns: &Namespace, what: &str) -> Result<()> {
    let ip = vip(family, NODES);
    let listener = bed.bed.node_a().ns.enter(|| TcpListener::bind((ip, 0)))??;
    let (open, closed) = (listener.local_addr()?, SocketAddr::new(ip, UNKNOWN_PORT));
    let names = ["unknown_port", "owned_unknown", "rejected", "echo_answered"];
    let (outcomes, counts) = bed.counted(&names, || {
        ns.enter(|| raw::ping(ip, PATIENCE))?.with_context(|| what.to_owned())?;
        Ok([outcome(ns, || connect(open))?, outcome(ns, || connect(closed))?, outcome(ns, || speak(closed))?])
    })?;
    let refused = Some(ErrorKind::ConnectionRefused);
    assert_eq!(outcomes, [None, refused, refused], "by the node itself: {what}");
    assert_eq!(counts, [0; 4], "{what}");
    Ok(())
}

/// What routing says of an address goes as long as no network of services is said to have it.
#[test]
fn addresses_go_their_way_unless_they_are_owned() -> TestResult {
    for (lines, is_owned) in [("", false), (OWNED, true)] {
        let bed = Bed::start(Layout::Ptp, Forwarding::Fast, lines)?;
        let (node, outside) = (&bed.bed.node_a().ns, bed.bed.outside()?);
        for family in Family::BOTH {
            let (ip, bits, at_once) = match family {
                Family::V4 => (vip(family, NOBODYS), 32, ""),
                Family::V6 => (vip(family, NOBODYS), 128, " nodad"),
            };
            let to_outside = bed.address_of_outside(family)?;
            outside.ip(&format!("addr add {ip}/{bits} dev lo{at_once}\n"))?;
            node.ip(&format!("route add {ip}/{bits} via {to_outside}\n"))?;
            let listener = outside.enter(|| TcpListener::bind((ip, 0)))??;
            let to = listener.local_addr()?;
            let reached = outcome(&bed.client.ns, || connect(to))?;
            assert_eq!(reached.is_none(), !is_owned, "{family}, {lines}: {reached:?}");
        }
    }
    Ok(())
}

fn at_80(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip(), 80)
}

/// The error of a call in a namespace, which came at once or is silence.
fn outcome(ns: &Namespace, call: impl FnOnce() -> io::Result<()> + Send) -> Result<Option<ErrorKind>> {
    let (result, took) = ns.enter(|| {
        let begin = Instant::now();
        (call(), begin.elapsed())
    })?;
    let error = result.err().map(|error| error.kind());
    assert!(took < PATIENCE || error.is_some_and(is_silence), "{error:?} after {took:?}");
    Ok(error)
}

fn is_silence(error: ErrorKind) -> bool {
    matches!(error, ErrorKind::TimedOut | ErrorKind::WouldBlock)
}

fn connect(to: SocketAddr) -> io::Result<()> {
    TcpStream::connect_timeout(&to, PATIENCE).map(drop)
}

/// Sends a datagram on a connected socket, and waits for what comes.
fn speak(to: SocketAddr) -> io::Result<()> {
    let socket = open(to)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.send(b"anybody?")?;
    socket.recv(&mut [0; 16]).map(drop)
}

/// A connected datagram socket.
fn open(to: SocketAddr) -> io::Result<UdpSocket> {
    let any: SocketAddr = if to.is_ipv4() { ([0; 4], 0).into() } else { ([0_u16; 8], 0).into() };
    let socket = UdpSocket::bind(any)?;
    socket.connect(to)?;
    Ok(socket)
}
