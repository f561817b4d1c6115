//! The BPF programs in a network of their own, for tests that send frames through them one by one.
//!
//! A lab has two ways: interface [`CLIENTS`] leads to the clients' network, [`BACKENDS`] to the backends'. Every host there has a
//! known hardware address, so that it is known what routing says. Nothing is ever sent.

use std::cell::RefCell;
use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd as _, BorrowedFd};

use anyhow::{Context, Result};
use netlb::config::{Forwarding, Limits, Timeouts};
use netlb::datapath::kernel::testing::{Harness, Program, Site};
use netlb::dataplane::{ApplyReport, BackendCounters, Desired, Flow, FlowFilter, ServiceStats};
use netlb::model::{Algorithm, Backend, BackendState, Frontend, Owner, Protocol, Service, Weight};
use netlb_common::addr::{Addr, PortBe};
use netlb_common::conntrack::{Direction, State};
use netlb_common::counters::Counter;
use netlb_common::maps::{Config, EndpointKey, Interface, role};
use netlb_common::table::{Data, Slot};
use netlb_common::time::ticks_from_seconds;
use nix::sched::{CloneFlags, unshare};

use crate::exec::Cmd;
use crate::frames::{ACK, Mac, Packet, SYN, SYN_ACK, Segment};
use crate::topology::Family;

pub const CLIENTS: u32 = 10;
pub const BACKENDS: u32 = 20;
/// The node's own addresses on the two ways.
pub const CLIENTS_MAC: Mac = [2, 0, 0, 0, 1, 0];
pub const BACKENDS_MAC: Mac = [2, 0, 0, 0, 2, 0];
/// What datagrams the way to the backends takes; the other takes 1500 bytes.
pub const BACKENDS_MTU: u16 = 1400;
/// Hosts of each network that routing knows, from 1 on.
const HOSTS: u8 = 30;

/// The verdicts of programs.
pub const PASS: i32 = -1;
pub const DROP: i32 = 2;
pub const REDIRECT: i32 = 7;

/// The same of XDP.
pub const XDP_DROP: i32 = 1;
pub const XDP_PASS: i32 = 2;
pub const XDP_TX: i32 = 3;
pub const XDP_REDIRECT: i32 = 4;

/// Everything is tested with each.
pub const CASES: [Case; 4] = [
    Case { family: Family::V4, protocol: Protocol::Tcp },
    Case { family: Family::V4, protocol: Protocol::Udp },
    Case { family: Family::V6, protocol: Protocol::Tcp },
    Case { family: Family::V6, protocol: Protocol::Udp },
];

/// A family and a protocol, with the addresses that a test uses.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Case {
    pub family: Family,
    pub protocol: Protocol,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {}", self.family, self.protocol)
    }
}

impl Case {
    pub fn tcp(family: Family) -> Self {
        Self { family, protocol: Protocol::Tcp }
    }

    pub fn vip(self, port: u16) -> SocketAddr {
        SocketAddr::new(crate::topology::vip(self.family, 10), port)
    }

    /// A client, with a port of its choice.
    pub fn client(self, port: u16) -> SocketAddr {
        SocketAddr::new(self.host(1, 2), port)
    }

    pub fn backend(self, host: u8) -> SocketAddr {
        SocketAddr::new(self.host(2, host), 8080)
    }

    pub fn host(self, network: u8, host: u8) -> IpAddr {
        match self.family {
            Family::V4 => Ipv4Addr::new(10, 244, network, host).into(),
            Family::V6 => Ipv6Addr::new(0xfd00, 0x10, 0x244, network.into(), 0, 0, 0, host.into()).into(),
        }
    }

    /// A service on port 80 of the virtual address, with some of the backends.
    pub fn service(self, backends: &[u8]) -> Service {
        self.service_at(80, backends)
    }

    pub fn service_at(self, port: u16, backends: &[u8]) -> Service {
        self.weighted_at(
            port,
            &Vec::from_iter(backends.iter().map(|host| (*host, 1, BackendState::Active))),
            Algorithm::Maglev,
        )
    }

    pub fn draining(self, active: &[u8], draining: &[u8]) -> Service {
        let active = active.iter().map(|host| (*host, 1, BackendState::Active));
        let all = active.chain(draining.iter().map(|host| (*host, 1, BackendState::Draining)));
        self.weighted_at(80, &Vec::from_iter(all), Algorithm::Maglev)
    }

    pub fn weighted(self, backends: &[(u8, u64)], algorithm: Algorithm) -> Service {
        let active = backends.iter().map(|(host, weight)| (*host, *weight, BackendState::Active));
        self.weighted_at(80, &Vec::from_iter(active), algorithm)
    }

    fn weighted_at(self, port: u16, backends: &[(u8, u64, BackendState)], algorithm: Algorithm) -> Service {
        let backend = |(host, weight, state): &(u8, u64, BackendState)| Backend {
            weight: Weight::new(*weight).expect("a weight"),
            state: *state,
            ..Backend::new(self.backend(*host))
        };
        let frontend = Frontend { address: self.vip(port), protocol: self.protocol };
        let name = format!("{}-{}-{port}", self.protocol, self.family).to_lowercase();
        Service::new(Some(name), vec![frontend], backends.iter().map(backend).collect(), algorithm).expect("a service")
    }

    /// A packet, as it arrives at the node from a client or a backend: the first of a connection or a datagram.
    pub fn packet(self, source: SocketAddr, destination: SocketAddr) -> Packet {
        self.segment(source, destination, SYN)
    }

    /// A segment of TCP, or just a datagram.
    pub fn segment(self, source: SocketAddr, destination: SocketAddr, segment: Segment) -> Packet {
        let packet = match self.protocol {
            Protocol::Tcp => Packet::tcp(source, destination, segment),
            Protocol::Udp => Packet::udp(source, destination),
        };
        match source.ip() == self.client(0).ip() {
            true => packet.macs(CLIENTS_MAC, mac(source.ip())),
            false => packet.macs(BACKENDS_MAC, mac(source.ip())),
        }
    }
}

/// An address as maps hold it.
pub fn addr(ip: IpAddr) -> Addr {
    match ip {
        IpAddr::V4(ip) => Addr::from_v4(ip.octets()),
        IpAddr::V6(ip) => Addr::from_bytes(ip.octets()),
    }
}

/// The hardware address of a host in the lab.
pub fn mac(host: IpAddr) -> Mac {
    match host {
        IpAddr::V4(ip) => {
            let [.., network, host] = ip.octets();
            [2, 0, 4, 0, network, host]
        }
        IpAddr::V6(ip) => {
            let [.., host] = ip.octets();
            [2, 0, 6, 0, ip.segments()[3] as u8, host]
        }
    }
}

/// What came of a frame.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    pub verdict: i32,
    pub frame: Vec<u8>,
}

#[derive(Debug)]
pub struct Lab {
    pub harness: Harness,
    /// The counters when they were last looked at.
    seen: RefCell<Vec<u64>>,
}

/// Few enough that it loads quickly.
pub const LIMITS: Limits = Limits { services: 16, backends: 256, flows: 8_192, ring_slots: 1 << 19, sockets: 1024 };

impl Lab {
    /// Packets leave to their next hop.
    pub fn fast() -> Result<Self> {
        Self::new(Forwarding::Fast, &LIMITS)
    }

    /// Packets are left to the kernel.
    pub fn stack() -> Result<Self> {
        Self::new(Forwarding::Stack, &LIMITS)
    }

    /// Moves the calling thread into a network namespace that ends with it.
    pub fn new(forwarding: Forwarding, limits: &Limits) -> Result<Self> {
        make_network()?;
        Ok(Self { harness: load(forwarding, limits)?, seen: RefCell::new(vec![0; Counter::ALL.len()]) })
    }

    /// With networks that the programs know.
    pub fn at(site: &Site) -> Result<Self> {
        Self::at_with(site, Forwarding::Fast)
    }

    pub fn at_with(site: &Site, forwarding: Forwarding) -> Result<Self> {
        make_network()?;
        let harness = known(Harness::at(site, &LIMITS, &Timeouts::default(), forwarding)?)?;
        Ok(Self { harness, seen: RefCell::new(vec![0; Counter::ALL.len()]) })
    }

    /// Writes a record like the one in force at an address, but for some changes; they may change whose it is.
    pub fn configure(&mut self, case: Case, vip: SocketAddr, change: impl FnOnce(&mut Config)) {
        let mut config = self.config(case, vip);
        change(&mut config);
        self.harness.set_config(config).expect("room for a record");
    }

    /// The record in force at an address.
    pub fn config(&self, case: Case, vip: SocketAddr) -> Config {
        let key = EndpointKey::new(addr(vip.ip()), PortBe::new(vip.port()), case.protocol.number());
        self.harness.config(&key).unwrap_or_else(|| panic!("nothing is served at {vip}"))
    }

    /// Begins a case: no flows, these services, and counters at zero.
    pub fn begin(&mut self, services: impl IntoIterator<Item = Service>) {
        self.serve(services);
        self.harness.programmer_mut().flush_flows(&FlowFilter::default());
        self.counts();
    }

    /// Serves these services and no others.
    pub fn serve(&mut self, services: impl IntoIterator<Item = Service>) {
        let desired =
            Vec::from_iter(services.into_iter().map(|service| Desired { service: service.into(), owner: Owner::File }));
        let ApplyReport { failed, .. } = self.harness.programmer_mut().apply(&desired);
        assert!(failed.is_empty(), "{failed:?}");
    }

    /// Lets a frame in by the interface of the clients.
    #[track_caller]
    pub fn from_clients(&self, frame: impl AsRef<[u8]>) -> Outcome {
        self.run(Program::Ingress, frame, CLIENTS)
    }

    /// Lets a frame in by the interface of the backends.
    #[track_caller]
    pub fn from_backends(&self, frame: impl AsRef<[u8]>) -> Outcome {
        self.run(Program::Ingress, frame, BACKENDS)
    }

    /// Lets a frame out to the clients.
    #[track_caller]
    pub fn to_clients(&self, frame: impl AsRef<[u8]>) -> Outcome {
        self.run(Program::Egress, frame, CLIENTS)
    }

    /// Has XDP receive a frame from the clients.
    #[track_caller]
    pub fn xdp_from_clients(&self, frame: impl AsRef<[u8]>) -> Outcome {
        self.run(Program::Xdp, frame, CLIENTS)
    }

    /// The same from the backends.
    #[track_caller]
    pub fn xdp_from_backends(&self, frame: impl AsRef<[u8]>) -> Outcome {
        self.run(Program::Xdp, frame, BACKENDS)
    }

    #[track_caller]
    pub fn run(&self, program: Program, frame: impl AsRef<[u8]>, interface: u32) -> Outcome {
        let run = self.harness.test_run(program, frame.as_ref(), interface);
        let (verdict, frame) = run.unwrap_or_else(|error| panic!("failed to run {program:?}: {error}"));
        Outcome { verdict, frame }
    }

    /// The same with a packet that a device has summed. The kernel compares that sum with one of what the program made.
    #[track_caller]
    pub fn run_summed(&self, program: Program, frame: impl AsRef<[u8]>, interface: u32) -> Outcome {
        self.test_run(program, frame.as_ref(), interface, &Arrival { is_summed: true, segments: None })
    }

    /// The same with a packet that stands for a number of segments with so many bytes of payload each.
    #[track_caller]
    pub fn run_segments(&self, program: Program, frame: impl AsRef<[u8]>, interface: u32, of: (u32, u32)) -> Outcome {
        self.test_run(program, frame.as_ref(), interface, &Arrival { is_summed: false, segments: Some(of) })
    }

    #[track_caller]
    fn test_run(&self, program: Program, frame: &[u8], interface: u32, arrival: &Arrival) -> Outcome {
        let program = self.harness.descriptor(program).expect("a loaded program");
        test_run(program, frame, interface, arrival).unwrap_or_else(|error| panic!("{error}"))
    }

    /// Which backend gets a packet.
    #[track_caller]
    pub fn backend_of(&self, packet: &Packet) -> SocketAddr {
        let out = self.from_clients(packet.frame());
        assert!([PASS, REDIRECT].contains(&out.verdict), "{packet:?} is not sent on: verdict {}", out.verdict);
        let destination = destination(&out.frame);
        assert_ne!(destination, packet.destination, "{packet:?} is not translated");
        destination
    }

    /// A reply to a packet of a client, back from where it was sent to; what the client gets.
    #[track_caller]
    pub fn reply(&self, case: Case, client: SocketAddr, backend: SocketAddr, segment: Segment) -> Outcome {
        self.from_backends(case.segment(backend, client, segment).frame())
    }

    /// Begins a connection of a client to the virtual address and has it established, or a dialogue. Needs [`Lab::fast`].
    #[track_caller]
    pub fn connect(&self, case: Case, client: SocketAddr, vip: SocketAddr) -> SocketAddr {
        let backend = self.backend_of(&case.packet(client, vip));
        assert_eq!(self.reply(case, client, backend, SYN_ACK).verdict, REDIRECT);
        assert_eq!(self.backend_of(&case.segment(client, vip, ACK)), backend);
        backend
    }

    /// What was counted since this was last asked.
    pub fn counts(&self) -> Vec<(Counter, u64)> {
        let now = Vec::from_iter(Counter::ALL.iter().map(|counter| self.harness.counter(*counter)));
        let seen = self.seen.replace(now.clone());
        let counts = Counter::ALL.iter().zip(now.iter().zip(seen)).map(|(counter, (now, seen))| (*counter, now - seen));
        counts.filter(|(_, count)| *count > 0).collect()
    }

    /// What was counted of one thing since [`counts`](Self::counts) was last called.
    pub fn count(&self, counter: Counter) -> u64 {
        self.harness.counter(counter) - self.seen.borrow()[counter as usize]
    }

    pub fn stats(&self, service: &Service) -> ServiceStats {
        self.harness.programmer().stats(&[service.name()]).remove(0)
    }

    pub fn backend_stats(&self, service: &Service, backend: SocketAddr) -> BackendCounters {
        let stats = self.stats(service).backends;
        stats.into_iter().find(|(address, _)| *address == backend).map(|(_, counters)| counters).unwrap_or_default()
    }

    pub fn flows(&self) -> Vec<Flow> {
        self.harness.programmer().flows(&FlowFilter::default(), usize::MAX)
    }

    pub fn count_flows(&self) -> u64 {
        self.harness.programmer().count_flows(&FlowFilter::default())
    }

    /// The states in the table, of each direction, whether expired or not. For tests with one flow or none.
    pub fn states(&self) -> (Vec<&'static str>, Vec<&'static str>) {
        let of = |direction| {
            let slots = self.slots().map(|slot| Data(slot.data.load()));
            slots.filter(|data| data.direction() == direction).map(|data| data.state().name()).collect()
        };
        (of(Direction::Forward), of(Direction::Reply))
    }

    /// Slots in use.
    fn slots(&self) -> impl Iterator<Item = &Slot> {
        let table = self.harness.flow_table();
        let buckets = (0..=table.mask()).filter_map(move |index| table.bucket(index));
        let slots = buckets.flat_map(|bucket| &bucket.slots);
        slots.filter(|slot| Data(slot.data.load()).state().0 > State::CLAIMING.0)
    }

    /// Loses all slots of a direction. Says how many.
    pub fn lose(&self, direction: Direction) -> usize {
        let lost = self.slots().filter(|slot| Data(slot.data.load()).direction() == direction);
        Vec::from_iter(lost.map(|slot| slot.data.swap(0))).len()
    }

    /// Makes every slot so much older.
    pub fn age(&self, seconds: u64) {
        const TIME: u64 = 0x3fff;
        for slot in self.slots() {
            let data = slot.data.load();
            let units = ticks_from_seconds(seconds) >> Data(data).state().unit_shift();
            slot.data.swap(data & !TIME | data.wrapping_sub(units) & TIME);
        }
    }
}

/// Gives the node addresses on both ways: host 100 of the clients' network and of the backends'.
pub fn add_node_addresses() -> Result<()> {
    for case in [CASES[0], CASES[2]] {
        for (network, device) in [(1, "clients"), (2, "backends")] {
            let address = case.host(network, 100);
            let len = if address.is_ipv4() { 24 } else { 64 };
            let mut line = format!("address add {address}/{len} dev {device}");
            if address.is_ipv6() {
                line += " nodad";
            }
            Cmd::new("ip").args(line.split(' ')).run()?.success()?;
        }
    }
    Ok(())
}

/// Moves the calling thread into a network namespace that ends with it, and makes the two ways there.
pub fn make_network() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNET).context("failed to make a network namespace; tests run as root")?;
    let mut lines = String::from("link set lo up\n");
    for (index, name, network, mtu, address) in
        [(CLIENTS, "clients", 1, 1500, CLIENTS_MAC), (BACKENDS, "backends", 2, BACKENDS_MTU, BACKENDS_MAC)]
    {
        let address = text(address);
        lines += &format!(
            "link add {name} index {index} address {address} mtu {mtu} type veth peer name {name}-end mtu {mtu}\n\
             link set {name} addrgenmode none\n\
             link set {name} up\n\
             link set {name}-end addrgenmode none\n\
             link set {name}-end up\n"
        );
        for family in Family::BOTH {
            let of = |host| Case::tcp(family).host(network, host);
            let (network, len) = (of(0), if family == Family::V4 { 24 } else { 64 });
            lines += &format!("route add {network}/{len} dev {name}\n");
            for host in 1..=HOSTS {
                let (host, mac) = (of(host), text(mac(of(host))));
                lines += &format!("neigh add {host} lladdr {mac} dev {name} nud permanent\n");
            }
        }
    }
    // The kernel's routing speaks only where it forwards. Read below the calling thread: others are in other namespaces.
    for key in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
        std::fs::write(format!("/proc/sys/net/{key}"), "1").with_context(|| format!("failed to set {key}"))?;
    }
    Cmd::new("ip").args(["-batch", "-"]).input(lines).run()?.success()?;
    Ok(())
}

/// Loads the programs and tells them about the two ways.
pub fn load(forwarding: Forwarding, limits: &Limits) -> Result<Harness> {
    known(Harness::new(limits, &Timeouts::default(), forwarding)?)
}

/// The same with the programs of another object.
pub fn load_object(object: &[u8], limits: &Limits) -> Result<Harness> {
    known(Harness::of(object, limits, &Timeouts::default(), Forwarding::Fast)?)
}

/// Tells the programs of the interfaces.
fn known(mut harness: Harness) -> Result<Harness> {
    for index in [CLIENTS, BACKENDS] {
        harness.set_interface(index, Interface { role: role::POD, ..Interface::default() })?;
    }
    Ok(harness)
}

/// In what state a packet comes from a device.
struct Arrival {
    /// With a sum of its own (CHECKSUM_COMPLETE).
    is_summed: bool,
    /// How many segments it stands for, and their payload's length.
    segments: Option<(u32, u32)>,
}

/// `BPF_PROG_TEST_RUN`, with what the loader has no words for.
fn test_run(program: BorrowedFd<'_>, frame: &[u8], interface: u32, arrival: &Arrival) -> io::Result<Outcome> {
    /// The part of `union bpf_attr` for this command.
    #[derive(Default)]
    #[repr(C)]
    struct TestRun {
        program: i32,
        verdict: u32,
        data_size_in: u32,
        data_size_out: u32,
        data_in: u64,
        data_out: u64,
        repeat: u32,
        duration: u32,
        context_size_in: u32,
        context_size_out: u32,
        context_in: u64,
        context_out: u64,
        flags: u32,
        cpu: u32,
        batch_size: u32,
        pad: u32,
    }
    const TEST_RUN: libc::c_long = 10;
    /// `BPF_F_TEST_SKB_CHECKSUM_COMPLETE` (since Linux 6.16).
    const CHECKSUM_COMPLETE: u32 = 1 << 2;
    // `struct __sk_buff`: `ifindex`, `gso_segs` and `gso_size`.
    let mut context = [0_u8; 192];
    let (segments, size) = arrival.segments.unwrap_or_default();
    for (at, value) in [(40, interface), (164, segments), (176, size)] {
        context[at..at + 4].copy_from_slice(&value.to_ne_bytes());
    }
    let mut out = vec![0; frame.len() + 512];
    let mut attributes = TestRun {
        program: program.as_raw_fd(),
        data_size_in: frame.len() as u32,
        data_size_out: out.len() as u32,
        data_in: frame.as_ptr() as u64,
        data_out: out.as_mut_ptr() as u64,
        context_size_in: context.len() as u32,
        context_in: context.as_ptr() as u64,
        flags: if arrival.is_summed { CHECKSUM_COMPLETE } else { 0 },
        ..TestRun::default()
    };
    // SAFETY: the attributes name buffers that outlive the call, with their lengths.
    let result = unsafe { libc::syscall(libc::SYS_bpf, TEST_RUN, &raw mut attributes, size_of::<TestRun>()) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    out.truncate(attributes.data_size_out as usize);
    Ok(Outcome { verdict: attributes.verdict as i32, frame: out })
}

fn text(mac: Mac) -> String {
    let [a, b, c, d, e, f] = mac;
    format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
}

/// The address and port that a frame without options or extension headers goes to.
pub fn destination(frame: &[u8]) -> SocketAddr {
    if is_ipv4(frame) { endpoint::<4>(frame, 30, 36) } else { endpoint::<16>(frame, 38, 56) }
}

/// The same of where it is from.
pub fn source(frame: &[u8]) -> SocketAddr {
    if is_ipv4(frame) { endpoint::<4>(frame, 26, 34) } else { endpoint::<16>(frame, 22, 54) }
}

fn is_ipv4(frame: &[u8]) -> bool {
    frame[12..14] == [8, 0]
}

fn endpoint<const LEN: usize>(frame: &[u8], address: usize, port: usize) -> SocketAddr
where
    IpAddr: From<[u8; LEN]>,
{
    let octets: [u8; LEN] = frame[address..address + LEN].try_into().expect("as long as asked for");
    SocketAddr::new(octets.into(), u16::from_be_bytes([frame[port], frame[port + 1]]))
}
