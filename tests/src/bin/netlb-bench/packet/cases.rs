//! What is measured: which packets, of how many flows, among how many services.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use netlb::config::Limits;
use netlb::datapath::kernel::testing;
use netlb::model::{Algorithm, Backend, Frontend, Mode, Protocol, Service};
use netlb_integration::frames::{ACK, SYN, SYN_ACK, Segment};
use netlb_integration::lab::{self, BACKENDS, CLIENTS, PASS, REDIRECT, XDP_PASS, XDP_REDIRECT, XDP_TX};
use netlb_integration::topology::Family;

use super::plan::{Endpoint, FRAME_LEN, HEADER_LEN, Memory, Plan};

const TCP: lab::Case = lab::Case { family: Family::V4, protocol: Protocol::Tcp };
const TCP_V6: lab::Case = lab::Case { family: Family::V6, protocol: Protocol::Tcp };
const UDP: lab::Case = lab::Case { family: Family::V4, protocol: Protocol::Udp };

/// Cases that are measured with the same programs and services loaded.
#[derive(Debug)]
pub(crate) struct Group {
    pub(crate) what: &'static str,
    /// The cases of a set take turns with each other.
    pub(crate) sets: &'static [&'static [Case]],
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) scene: Scene,
    pub(crate) traffic: Traffic,
    pub(crate) packets: lab::Case,
    /// The number of flows, as a power of two.
    pub(crate) flows_log2: u32,
    /// Whether flows are spread over all services, or all to the first.
    pub(crate) is_spread: bool,
    pub(crate) size: Size,
    /// Whether a quick run has it.
    pub(crate) quick: bool,
}

/// What the node is like, and so what becomes of packets.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Scene {
    /// Clients and backends are pods of the node, behind interfaces of their own: packets get other destinations, replies other sources.
    Pods,
    /// Clients and backends are outside, behind one uplink: packets get another source as well, and leave by where they came in.
    Uplink,
    /// The same, with packets wrapped instead, and replies elsewhere.
    Wrapped,
    /// Pods talk to the world, and the world sees the node: packets leave by the uplink with another source.
    Masquerade,
}

/// Where a program runs.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Hook {
    Xdp,
    Ingress,
    Egress,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Traffic {
    /// From clients, of flows that are there, in no order.
    Requests,
    /// To clients, of flows that are there, in no order.
    Replies,
    /// From clients, each of a flow that is not there yet.
    New,
    /// To something that is no service.
    Foreign,
    /// From where backends serve, of flows that are not: what backends answer to those who ask them themselves.
    Strays,
}

impl Traffic {
    /// Whether programs are to leave it alone.
    pub(crate) fn is_foreign(self) -> bool {
        matches!(self, Self::Foreign | Self::Strays)
    }
}

/// How many services there are, and how much room for flows.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Size {
    pub(crate) services: u32,
    pub(crate) limits: Limits,
}

/// Limits as they are by default, with a service of each kind.
const USUAL: Size = Size {
    services: 1,
    limits: Limits { services: 16_384, backends: 131_072, flows: 262_144, ring_slots: 1 << 20, sockets: 1024 },
};
const MILLION_FLOWS: Size = Size { services: 1, limits: Limits { flows: 1 << 20, ..USUAL.limits } };
/// The node has some thousand ports for each backend: with so many of them, a flow hardly ever finds its port taken.
const MANY_BACKENDS: Size = Size { services: 1024, ..USUAL };
const MILLION_TO_MANY: Size = Size { services: 1024, ..MILLION_FLOWS };

const fn services(services: u32) -> Size {
    Size {
        services,
        limits: Limits { services: 131_072, backends: 131_072, flows: 262_144, ring_slots: 1 << 20, sockets: 1024 },
    }
}

const fn requests(name: &'static str, flows_log2: u32) -> Case {
    let (scene, traffic) = (Scene::Pods, Traffic::Requests);
    Case { name, scene, traffic, packets: TCP, flows_log2, is_spread: false, size: USUAL, quick: true }
}

/// From outside, to backends outside.
const fn snat(name: &'static str, flows_log2: u32) -> Case {
    Case { scene: Scene::Uplink, is_spread: true, size: MANY_BACKENDS, ..requests(name, flows_log2) }
}

/// The same, with direct server return.
const fn dsr(name: &'static str, flows_log2: u32) -> Case {
    Case { scene: Scene::Wrapped, ..snat(name, flows_log2) }
}

/// From pods to the world.
const fn masquerade(name: &'static str, flows_log2: u32) -> Case {
    Case { scene: Scene::Masquerade, ..snat(name, flows_log2) }
}

const fn foreign(name: &'static str, scene: Scene, size: Size) -> Case {
    Case { scene, traffic: Traffic::Foreign, size, ..requests(name, 10) }
}

const fn among(name: &'static str, size: u32) -> Case {
    Case { size: services(size), ..requests(name, 10) }
}

const fn spread(name: &'static str, size: u32) -> Case {
    Case { is_spread: true, flows_log2: 16, ..among(name, size) }
}

const fn spread_new(name: &'static str, size: u32) -> Case {
    Case { traffic: Traffic::New, flows_log2: NEW_FLOWS_LOG2, ..spread(name, size) }
}

/// More than a round takes: none comes twice.
const NEW_FLOWS_LOG2: u32 = 17;

pub(crate) const GROUPS: &[Group] = &[
    Group {
        what: "flows, families, directions",
        sets: &[
            &[requests("established_1", 0)],
            &[requests("established_1k", 10)],
            &[requests("established_64k", 16)],
            &[Case { traffic: Traffic::New, ..requests("new_flow", NEW_FLOWS_LOG2) }],
            &[Case { packets: UDP, ..requests("udp", 10) }],
            &[Case { packets: TCP_V6, ..requests("ipv6", 10) }],
            &[Case { traffic: Traffic::Replies, ..requests("reply", 10) }],
            &[foreign("not_ours", Scene::Pods, USUAL)],
            &[Case { traffic: Traffic::Strays, ..foreign("not_ours_backend", Scene::Pods, USUAL) }],
        ],
    },
    Group {
        what: "an uplink",
        sets: &[
            &[snat("snat_1", 0)],
            &[snat("snat_64k", 16)],
            &[Case { traffic: Traffic::New, ..snat("snat_new", NEW_FLOWS_LOG2) }],
            &[Case { traffic: Traffic::Replies, ..snat("snat_reply", 10) }],
            &[foreign("not_ours_uplink", Scene::Uplink, MANY_BACKENDS)],
        ],
    },
    Group {
        what: "direct server return",
        sets: &[
            &[dsr("dsr_1", 0)],
            &[dsr("dsr_64k", 16)],
            &[Case { traffic: Traffic::New, ..dsr("dsr_new", NEW_FLOWS_LOG2) }],
        ],
    },
    Group {
        what: "pods to the world",
        sets: &[
            &[masquerade("masquerade_64k", 16)],
            &[Case { traffic: Traffic::New, ..masquerade("masquerade_new", NEW_FLOWS_LOG2) }],
            &[Case { traffic: Traffic::Replies, ..masquerade("masquerade_reply", 10) }],
            &[foreign("not_ours_masquerade", Scene::Masquerade, MANY_BACKENDS)],
        ],
    },
    Group {
        what: "a million flows",
        sets: &[
            &[Case { size: MILLION_FLOWS, ..requests("established_1m", 20) }],
            &[Case { size: MILLION_TO_MANY, quick: false, ..snat("snat_1m", 20) }],
            &[Case { size: MILLION_TO_MANY, quick: false, ..dsr("dsr_1m", 20) }],
        ],
    },
    Group {
        what: "up to 100 000 services",
        sets: &[
            &[among("services_1", 1), among("services_10k", 10_000), among("services_100k", 100_000)],
            &[
                spread("services_1_spread", 1),
                spread("services_10k_spread", 10_000),
                spread("services_100k_spread", 100_000),
            ],
            &[
                spread_new("services_1_new", 1),
                spread_new("services_10k_new", 10_000),
                spread_new("services_100k_new", 100_000),
            ],
        ],
    },
];

/// Frames as the harness makes them, and where they come in.
#[derive(Clone, Debug)]
pub(crate) struct Packets {
    pub(crate) frame: [u8; FRAME_LEN],
    pub(crate) interface: u32,
    pub(crate) plan: Plan,
}

const _: () = assert!(HEADER_LEN <= FRAME_LEN);

const CLIENT_PORTS_LOG2: u32 = 15;
const FIRST_CLIENT_PORT: u16 = 1 << 15;
const SERVICE_PORTS_LOG2: u32 = 10;
const FIRST_SERVICE_PORT: u16 = 1 << 10;
const BACKEND_PORTS_LOG2: u32 = 12;
const FIRST_BACKEND_PORT: u16 = 1 << 12;
/// Ports that flows keep where they get another source: so it is known where replies go.
const KEPT_PORTS_LOG2: u32 = 12;
const FIRST_KEPT_PORT: u16 = 61_000;
/// The first host of a network beyond the clients'.
const WORLD: IpAddr = IpAddr::V4(Ipv4Addr::new(198, 18, 0, 1));
/// The node's address at its uplink, in the clients' network.
pub(crate) const NODE: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 244, 1, 100));
/// All of these hosts send from every port, one after the other.
const ALL_HOSTS: u32 = u32::MAX;

impl Case {
    /// What is measured.
    pub(crate) fn packets(&self, seed: u64) -> Packets {
        match self.traffic {
            Traffic::Requests => self.requests(ACK).shuffled(seed),
            Traffic::Replies | Traffic::Strays => self.replies(ACK).shuffled(seed),
            Traffic::New => self.requests(SYN),
            Traffic::Foreign => {
                let foreign = SocketAddr::new(numbered(self.packets.vip(0).ip(), 200), 80);
                self.requests_to(foreign, SERVICE_PORTS_LOG2, ACK).shuffled(seed)
            }
        }
    }

    /// What comes before, of each flow in turn, and at which hook: what makes the flows, if they are to be there.
    pub(crate) fn openings(&self) -> Vec<(Hook, Packets)> {
        let sent = match self.scene {
            Scene::Pods | Scene::Uplink => Hook::Ingress,
            // The harness has frames of one length at XDP only.
            Scene::Wrapped => Hook::Xdp,
            Scene::Masquerade => Hook::Egress,
        };
        let request = |segment| (sent, self.requests(segment));
        let reply = |segment| (Hook::Ingress, self.replies(segment));
        match (self.traffic, self.packets.protocol) {
            (Traffic::New | Traffic::Foreign | Traffic::Strays, _) => Vec::new(),
            _ if self.scene == Scene::Wrapped => vec![request(SYN), request(ACK)],
            (_, Protocol::Tcp) => vec![request(SYN), reply(SYN_ACK), request(ACK)],
            (_, Protocol::Udp) => vec![request(ACK), reply(ACK)],
        }
    }

    /// The hooks that such packets come by.
    pub(crate) fn hooks(&self) -> &'static [Hook] {
        match (self.scene, self.traffic) {
            (Scene::Uplink | Scene::Masquerade, Traffic::Foreign) => &[Hook::Xdp, Hook::Ingress, Hook::Egress],
            (Scene::Pods | Scene::Uplink, _) => &[Hook::Xdp, Hook::Ingress],
            (Scene::Wrapped, _) => &[Hook::Xdp],
            (Scene::Masquerade, Traffic::Replies) => &[Hook::Ingress],
            (Scene::Masquerade, _) => &[Hook::Egress],
        }
    }

    /// What a program should answer to such packets.
    pub(crate) fn verdict(&self, hook: Hook) -> i32 {
        match (hook, self.traffic.is_foreign(), self.scene) {
            (Hook::Xdp, true, _) => XDP_PASS,
            (Hook::Xdp, false, Scene::Uplink | Scene::Wrapped) => XDP_TX,
            (Hook::Xdp, false, _) => XDP_REDIRECT,
            (Hook::Ingress, true, _) | (Hook::Egress, ..) => PASS,
            (Hook::Ingress, false, _) => REDIRECT,
        }
    }

    fn requests(&self, segment: Segment) -> Packets {
        let (first, ports_log2) = match self.scene {
            Scene::Masquerade => (SocketAddr::new(WORLD, FIRST_BACKEND_PORT), BACKEND_PORTS_LOG2),
            Scene::Pods | Scene::Uplink | Scene::Wrapped => (frontend(self.packets, 0), SERVICE_PORTS_LOG2),
        };
        self.requests_to(first, ports_log2, segment)
    }

    fn requests_to(&self, destination: SocketAddr, ports_log2: u32, segment: Segment) -> Packets {
        let (client, client_ports_log2) = self.clients();
        let (source_at, destination_at) = offsets(self.packets.family);
        Packets {
            frame: frame(self.packets, client, destination, segment),
            interface: CLIENTS,
            plan: self.plan(
                endpoint(client, client_ports_log2, ALL_HOSTS, source_at),
                endpoint(destination, ports_log2, ALL_HOSTS, destination_at),
            ),
        }
        .filled()
    }

    fn replies(&self, segment: Segment) -> Packets {
        let (client, ports_log2) = self.clients();
        // Whom the sender knows, which is the node where it is not the client.
        let (client, more_hosts) = match self.scene {
            Scene::Pods => (client, ALL_HOSTS),
            Scene::Uplink | Scene::Wrapped | Scene::Masquerade => (SocketAddr::new(NODE, client.port()), 0),
        };
        let (sender, interface) = match self.scene {
            Scene::Pods => (backend(self.packets, self.scene, 0), BACKENDS),
            Scene::Uplink | Scene::Wrapped => (backend(self.packets, self.scene, 0), CLIENTS),
            Scene::Masquerade => (SocketAddr::new(WORLD, FIRST_BACKEND_PORT), CLIENTS),
        };
        let (source_at, destination_at) = offsets(self.packets.family);
        Packets {
            frame: frame(self.packets, sender, client, segment),
            interface,
            plan: self.plan(
                endpoint(client, ports_log2, more_hosts, destination_at),
                endpoint(sender, BACKEND_PORTS_LOG2, ALL_HOSTS, source_at),
            ),
        }
        .filled()
    }

    /// The first client, and of how many ports each sends.
    fn clients(&self) -> (SocketAddr, u32) {
        let ip = match (self.scene, self.traffic) {
            (Scene::Pods, _) => self.packets.client(0).ip(),
            (Scene::Uplink | Scene::Wrapped, _) => numbered(WORLD, 2),
            // A stranger: what it sends is not the node's to translate.
            (Scene::Masquerade, Traffic::Foreign) => WORLD,
            (Scene::Masquerade, _) => self.packets.host(2, 3),
        };
        // New flows have ports as clients usually do, none of which the node could keep.
        match (self.scene, self.traffic) {
            (Scene::Pods, _) | (_, Traffic::New | Traffic::Foreign) => {
                (SocketAddr::new(ip, FIRST_CLIENT_PORT), CLIENT_PORTS_LOG2)
            }
            (Scene::Uplink | Scene::Wrapped | Scene::Masquerade, _) => {
                (SocketAddr::new(ip, FIRST_KEPT_PORT), KEPT_PORTS_LOG2)
            }
        }
    }

    fn plan(&self, client: Endpoint, service: Endpoint) -> Plan {
        Plan {
            header: [0; _],
            state: 0,
            flows_log2: self.flows_log2,
            is_random: 0,
            services: if self.is_spread { self.size.services } else { 1 },
            client,
            service,
            flow: 0,
            memory: self.memory().unwrap_or(Memory { mask: 0, buckets: 0, records: 0, _reserved: 0 }),
        }
    }

    /// What of the flow table any program like netlb's needs for such a packet at XDP, if it needs any: the bucket in which a flow is found;
    /// where it is new, that of the other direction and what is written beside both; and what stands beside where a bucket is not enough.
    pub(crate) fn memory(&self) -> Option<Memory> {
        let (buckets, records) = match (self.scene, self.traffic) {
            (_, Traffic::Foreign | Traffic::Strays) | (Scene::Masquerade, _) => return None,
            (Scene::Wrapped, _) => (1, 1),
            (_, Traffic::New) => (2, 2),
            (Scene::Pods, _) => (1, 0),
            (Scene::Uplink, _) => (1, 1),
        };
        let mask = testing::flow_buckets(self.size.limits.flows) - 1;
        Some(Memory { mask, buckets, records, _reserved: 0 })
    }
}

impl Packets {
    /// With the frame in the plan.
    fn filled(mut self) -> Self {
        for (word, bytes) in self.plan.header.iter_mut().zip(self.frame.as_chunks().0) {
            *word = u64::from_ne_bytes(*bytes);
        }
        self
    }

    /// Of each flow in turn.
    pub(crate) fn in_order(&self) -> Self {
        let mut packets = self.clone();
        (packets.plan.is_random, packets.plan.state) = (0, 0);
        packets
    }

    /// Of flows in no order.
    fn shuffled(mut self, seed: u64) -> Self {
        (self.plan.is_random, self.plan.state) = (1, seed);
        self
    }
}

/// A service with one backend of its own, which is therefore known.
fn service(packets: lab::Case, scene: Scene, number: u32) -> Service {
    let frontend = Frontend { address: frontend(packets, number), protocol: packets.protocol };
    let backend = Backend::new(backend(packets, scene, number));
    let service = Service::new(None, vec![frontend], vec![backend], Algorithm::Maglev).expect("a service");
    if scene != Scene::Wrapped {
        return service;
    }
    service.redefine(|service| service.mode = Mode::Dsr).expect("a service")
}

/// The services of a bed.
pub(crate) fn services_of(scene: Scene, size: Size) -> Vec<Service> {
    let first = [TCP, TCP_V6, UDP].map(|packets| service(packets, scene, 0));
    first.into_iter().chain((1..size.services).map(|number| service(TCP, scene, number))).collect()
}

fn frontend(packets: lab::Case, number: u32) -> SocketAddr {
    nth(packets.vip(FIRST_SERVICE_PORT), SERVICE_PORTS_LOG2, number)
}

fn backend(packets: lab::Case, scene: Scene, number: u32) -> SocketAddr {
    let network = if matches!(scene, Scene::Uplink | Scene::Wrapped) { 1 } else { 2 };
    nth(SocketAddr::new(packets.host(network, 1), FIRST_BACKEND_PORT), BACKEND_PORTS_LOG2, number)
}

/// An endpoint as the harness counts them.
fn nth(first: SocketAddr, ports_log2: u32, number: u32) -> SocketAddr {
    let endpoint = endpoint(first, ports_log2, ALL_HOSTS, (0, 0));
    SocketAddr::new(numbered(first.ip(), endpoint.host(number)), endpoint.port(number))
}

fn endpoint(first: SocketAddr, ports_log2: u32, more_hosts: u32, (host_at, port_at): (u32, u32)) -> Endpoint {
    let mut network = [0; 8];
    let (word_len, first_host) = match first.ip() {
        IpAddr::V4(ip) => {
            let [a, b, c, d] = ip.octets();
            network[..2].copy_from_slice(&[a, b]);
            (4, [c, d])
        }
        IpAddr::V6(ip) => {
            network[..6].copy_from_slice(&ip.octets()[8..14]);
            (8, [ip.octets()[14], ip.octets()[15]])
        }
    };
    Endpoint {
        address_at: (host_at + 2).saturating_sub(word_len),
        port_at,
        first_host: u16::from_be_bytes(first_host).into(),
        first_port: first.port().into(),
        ports_log2,
        more_hosts,
        word_len,
        _reserved: 0,
        network,
    }
}

/// The address with other last bytes.
fn numbered(address: IpAddr, host: u16) -> IpAddr {
    let [c, d] = host.to_be_bytes();
    match address {
        IpAddr::V4(ip) => {
            let [a, b, ..] = ip.octets();
            [a, b, c, d].into()
        }
        IpAddr::V6(ip) => {
            let mut segments = ip.segments();
            segments[7] = host;
            segments.into()
        }
    }
}

/// Where a frame has its source and its destination: the address's last two bytes, and the port.
fn offsets(family: Family) -> ((u32, u32), (u32, u32)) {
    match family {
        Family::V4 => ((28, 34), (32, 36)),
        Family::V6 => ((36, 54), (52, 56)),
    }
}

fn frame(packets: lab::Case, source: SocketAddr, destination: SocketAddr, segment: Segment) -> [u8; FRAME_LEN] {
    let packet = packets.segment(source, destination, segment).payload([]);
    let payload = FRAME_LEN - packet.frame().len();
    packet.payload(vec![0; payload]).frame().try_into().expect("as long as that")
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use netlb_integration::lab::{destination, source};

    use super::*;

    /// What the harness makes of a plan.
    fn make(packets: &mut Packets) -> [u8; FRAME_LEN] {
        let plan = &mut packets.plan;
        let flow = plan.next_flow();
        let mut frame = packets.frame;
        for (endpoint, number) in [(plan.client, flow), (plan.service, plan.service_of(flow))] {
            let (at, len) = (endpoint.address_at as usize, endpoint.word_len as usize);
            frame[at..at + len].copy_from_slice(&endpoint.address_end(number).to_le_bytes()[..len]);
            let at = endpoint.port_at as usize;
            frame[at..at + 2].copy_from_slice(&endpoint.port(number).to_be_bytes());
        }
        frame
    }

    fn cases() -> impl Iterator<Item = &'static Case> {
        GROUPS.iter().flat_map(|group| group.sets).flat_map(|set| *set)
    }

    #[test]
    fn cases_have_names_of_their_own() {
        let mut names = HashSet::new();
        assert_eq!(cases().find(|case| !names.insert(case.name)).map(|case| case.name), None);
    }

    #[test]
    fn replies_are_those_to_the_requests() {
        for case in cases().filter(|case| !case.traffic.is_foreign() && case.scene != Scene::Wrapped) {
            let (mut requests, mut replies) = (case.requests(ACK), case.replies(ACK));
            let services = services_of(case.scene, case.size);
            let services = services.iter().map(|one| (one.frontends()[0].address, one.backends()[0].address));
            let services = HashSet::<_>::from_iter(services);
            let mut clients = HashSet::new();
            let mut answered = HashSet::new();
            for _ in 0..1000.min(1 << case.flows_log2) {
                let (request, reply) = (make(&mut requests), make(&mut replies));
                if case.scene == Scene::Pods {
                    assert_eq!(source(&request), destination(&reply), "{}", case.name);
                } else {
                    let node = SocketAddr::new(NODE, source(&request).port());
                    assert_eq!(node, destination(&reply), "{}", case.name);
                }
                if case.scene == Scene::Masquerade {
                    assert_eq!(destination(&request), source(&reply), "{}", case.name);
                } else {
                    assert!(services.contains(&(destination(&request), source(&reply))), "{}", case.name);
                }
                assert!(clients.insert(source(&request)), "{}: {} comes twice", case.name, source(&request));
                let answered = answered.insert((source(&reply), destination(&reply)));
                assert!(answered, "{}: a flow has another's replies", case.name);
            }
        }
    }

    #[test]
    fn every_flow_comes_in_no_order() {
        let mut packets = requests("", 4).packets(7);
        let flows = Vec::from_iter((0..400).map(|_| packets.plan.next_flow()));
        assert_eq!(HashSet::<_>::from_iter(&flows).len(), 16);
        assert!(flows.windows(2).any(|two| two[1] < two[0]));
    }
}
