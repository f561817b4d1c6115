//! What is measured: which packets, of how many flows, among how many services.

use std::net::{IpAddr, SocketAddr};

use netlb::config::Limits;
use netlb::model::{Algorithm, Backend, Frontend, Protocol, Service};
use netlb_integration::frames::{ACK, SYN, SYN_ACK, Segment};
use netlb_integration::lab::{self, BACKENDS, CLIENTS};
use netlb_integration::topology::Family;

use super::plan::{Endpoint, HEADER_LEN, Plan};

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
    pub(crate) traffic: Traffic,
    pub(crate) packets: lab::Case,
    /// The number of flows, as a power of two.
    pub(crate) flows_log2: u32,
    /// Whether flows are spread over all services, or all to the first.
    pub(crate) is_spread: bool,
    pub(crate) size: Size,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Traffic {
    /// From clients, of flows that are there, in no order.
    Requests,
    /// From backends, of flows that are there, in no order.
    Replies,
    /// From clients, each of a flow that is not there yet.
    New,
    /// To something that is no service.
    Foreign,
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

const fn services(services: u32) -> Size {
    Size {
        services,
        limits: Limits { services: 131_072, backends: 131_072, flows: 262_144, ring_slots: 1 << 20, sockets: 1024 },
    }
}

const fn requests(name: &'static str, flows_log2: u32) -> Case {
    Case { name, traffic: Traffic::Requests, packets: TCP, flows_log2, is_spread: false, size: USUAL }
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
            &[Case { traffic: Traffic::Foreign, ..requests("not_ours", 10) }],
        ],
    },
    Group { what: "a million flows", sets: &[&[Case { size: MILLION_FLOWS, ..requests("established_1m", 20) }]] },
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

pub(crate) const FRAME_LEN: usize = 128;
const _: () = assert!(HEADER_LEN <= FRAME_LEN);

const CLIENT_PORTS_LOG2: u32 = 15;
const FIRST_CLIENT_PORT: u16 = 1 << 15;
const SERVICE_PORTS_LOG2: u32 = 10;
const FIRST_SERVICE_PORT: u16 = 1 << 10;
const BACKEND_PORTS_LOG2: u32 = 12;
const FIRST_BACKEND_PORT: u16 = 1 << 12;

impl Case {
    /// What is measured.
    pub(crate) fn packets(&self, seed: u64) -> Packets {
        match self.traffic {
            Traffic::Requests => self.requests(ACK).shuffled(seed),
            Traffic::Replies => self.replies(ACK).shuffled(seed),
            Traffic::New => self.requests(SYN),
            Traffic::Foreign => {
                let foreign = SocketAddr::new(numbered(self.packets.vip(0).ip(), 200), 80);
                self.requests_to(foreign, ACK).shuffled(seed)
            }
        }
    }

    /// What comes before, of each flow in turn: what makes the flows, if they are to be there.
    pub(crate) fn openings(&self) -> Vec<Packets> {
        match (self.traffic, self.packets.protocol) {
            (Traffic::New | Traffic::Foreign, _) => Vec::new(),
            (_, Protocol::Tcp) => vec![self.requests(SYN), self.replies(SYN_ACK), self.requests(ACK)],
            (_, Protocol::Udp) => vec![self.requests(ACK), self.replies(ACK)],
        }
    }

    fn requests(&self, segment: Segment) -> Packets {
        self.requests_to(frontend(self.packets, 0), segment)
    }

    fn requests_to(&self, destination: SocketAddr, segment: Segment) -> Packets {
        let client = self.packets.client(FIRST_CLIENT_PORT);
        let (source_at, destination_at) = offsets(self.packets.family);
        Packets {
            frame: frame(self.packets, client, destination, segment),
            interface: CLIENTS,
            plan: self.plan(
                endpoint(client, CLIENT_PORTS_LOG2, source_at),
                endpoint(destination, SERVICE_PORTS_LOG2, destination_at),
            ),
        }
        .filled()
    }

    fn replies(&self, segment: Segment) -> Packets {
        let (client, backend) = (self.packets.client(FIRST_CLIENT_PORT), backend(self.packets, 0));
        let (source_at, destination_at) = offsets(self.packets.family);
        Packets {
            frame: frame(self.packets, backend, client, segment),
            interface: BACKENDS,
            plan: self.plan(
                endpoint(client, CLIENT_PORTS_LOG2, destination_at),
                endpoint(backend, BACKEND_PORTS_LOG2, source_at),
            ),
        }
        .filled()
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
            _reserved: 0,
        }
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

    /// Of flows in no order.
    fn shuffled(mut self, seed: u64) -> Self {
        (self.plan.is_random, self.plan.state) = (1, seed);
        self
    }
}

/// A service with one backend of its own, which is therefore known.
pub(crate) fn service(packets: lab::Case, number: u32) -> Service {
    let frontend = Frontend { address: frontend(packets, number), protocol: packets.protocol };
    let backend = Backend::new(backend(packets, number));
    Service::new(None, vec![frontend], vec![backend], Algorithm::Maglev).expect("a service")
}

/// The services of a bed.
pub(crate) fn services_of(size: Size) -> Vec<Service> {
    let first = [TCP, TCP_V6, UDP].map(|packets| service(packets, 0));
    first.into_iter().chain((1..size.services).map(|number| service(TCP, number))).collect()
}

fn frontend(packets: lab::Case, number: u32) -> SocketAddr {
    nth(packets.vip(FIRST_SERVICE_PORT), SERVICE_PORTS_LOG2, number)
}

fn backend(packets: lab::Case, number: u32) -> SocketAddr {
    let first = SocketAddr::new(packets.backend(1).ip(), FIRST_BACKEND_PORT);
    nth(first, BACKEND_PORTS_LOG2, number)
}

/// An endpoint as the harness counts them.
fn nth(first: SocketAddr, ports_log2: u32, number: u32) -> SocketAddr {
    let endpoint = endpoint(first, ports_log2, (0, 0));
    SocketAddr::new(numbered(first.ip(), endpoint.host(number)), endpoint.port(number))
}

fn endpoint(first: SocketAddr, ports_log2: u32, (host_at, port_at): (u32, u32)) -> Endpoint {
    let first_host = u16::from_be_bytes(match first.ip() {
        IpAddr::V4(ip) => [ip.octets()[2], ip.octets()[3]],
        IpAddr::V6(ip) => [ip.octets()[14], ip.octets()[15]],
    });
    Endpoint { host_at, port_at, first_host: first_host.into(), first_port: first.port().into(), ports_log2 }
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
            for (at, value) in [(endpoint.host_at, endpoint.host(number)), (endpoint.port_at, endpoint.port(number))] {
                let at = at as usize;
                frame[at..at + 2].copy_from_slice(&value.to_be_bytes());
            }
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
        for case in cases().filter(|case| case.traffic != Traffic::Foreign) {
            let (mut requests, mut replies) = (case.requests(ACK), case.replies(ACK));
            let services = HashSet::<_>::from_iter(
                services_of(case.size)
                    .into_iter()
                    .map(|service| (service.frontends()[0].address, service.backends()[0].address)),
            );
            let mut clients = HashSet::new();
            for _ in 0..1000.min(1 << case.flows_log2) {
                let (request, reply) = (make(&mut requests), make(&mut replies));
                assert_eq!(source(&request), destination(&reply), "{}", case.name);
                assert!(services.contains(&(destination(&request), source(&reply))), "{}", case.name);
                assert!(clients.insert(source(&request)), "{}: {} comes twice", case.name, source(&request));
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
