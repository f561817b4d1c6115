//! What the balancers are loaded with.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use netlb_integration::servers::Protocol;
use netlb_integration::topology::{Family, vip};

pub(crate) const SERVICE_PORT: u16 = 80;
pub(crate) const BACKEND_PORT: u16 = 8080;
/// Services beside the measured one, and their backends, none of which exists.
const OTHER_SERVICES: Ipv4Addr = Ipv4Addr::new(10, 97, 0, 0);
const OTHER_BACKENDS: Ipv4Addr = Ipv4Addr::new(10, 128, 0, 0);
/// With an IPv4 address in its last bytes.
const OTHERS_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x10, 0x97, 0, 0, 0, 0, 0);
/// Up to so many services are there for IPv6 as well.
const DUAL_STACK: u32 = 1000;

/// A port of a service.
#[derive(Clone, Debug)]
pub(crate) struct Service {
    pub(crate) name: String,
    pub(crate) frontend: SocketAddr,
    pub(crate) protocol: Protocol,
    pub(crate) backends: Vec<SocketAddr>,
}

impl Service {
    pub(crate) fn family(&self) -> Family {
        if self.frontend.is_ipv4() { Family::V4 } else { Family::V6 }
    }
}

/// The address of the service that is measured.
pub(crate) fn measured(family: Family) -> SocketAddr {
    SocketAddr::new(vip(family, 10), SERVICE_PORT)
}

/// Whether among so many services there are those of a family.
pub(crate) fn has_family(count: u32, family: Family) -> bool {
    family == Family::V4 || count <= DUAL_STACK
}

/// `count` services of each family, in the order in which they are loaded. The measured one, which has a port for TCP and one for UDP, is
/// in the middle: where rules are tried one after the other, this is the mean. The others have one backend each, because nobody asks for
/// them.
pub(crate) fn with_measured(count: u32, backends: impl Fn(Family) -> Vec<SocketAddr>) -> Vec<Service> {
    let of_family = |family: Family| {
        let mut services = others(count - 1, 1);
        if family == Family::V6 {
            services.iter_mut().for_each(Service::make_v6);
        }
        let middle = services.len() / 2;
        let ports = [Protocol::Tcp, Protocol::Udp].map(|protocol| Service {
            name: format!("measured-{}-{}", protocol.name(), family.to_string().to_lowercase()),
            frontend: measured(family),
            protocol,
            backends: backends(family),
        });
        services.splice(middle..middle, ports);
        services
    };
    Family::BOTH.into_iter().filter(|family| has_family(count, *family)).flat_map(of_family).collect()
}

/// `count` services of TCP that nobody asks for, no two of which have a backend in common.
pub(crate) fn others(count: u32, backends: u32) -> Vec<Service> {
    let service = |number: u32| Service {
        name: format!("other-{number}"),
        frontend: nth(OTHER_SERVICES, number, SERVICE_PORT),
        protocol: Protocol::Tcp,
        backends: (0..backends)
            .map(|nth_backend| nth(OTHER_BACKENDS, number * backends + nth_backend, BACKEND_PORT))
            .collect(),
    };
    (0..count).map(service).collect()
}

impl Service {
    fn make_v6(&mut self) {
        let v6 = |address: &mut SocketAddr| {
            if let IpAddr::V4(ip) = address.ip() {
                address.set_ip(Ipv6Addr::from_bits(OTHERS_V6.to_bits() | u128::from(ip.to_bits())).into());
            }
        };
        self.name += "-ipv6";
        v6(&mut self.frontend);
        self.backends.iter_mut().for_each(v6);
    }
}

fn nth(first: Ipv4Addr, number: u32, port: u16) -> SocketAddr {
    SocketAddr::new(IpAddr::V4(Ipv4Addr::from_bits(first.to_bits() + number)), port)
}
