//! What the balancers are loaded with.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use netlb_integration::servers::Protocol;
use netlb_integration::topology::{Family, vip};

pub(crate) const SERVICE_PORT: u16 = 80;
pub(crate) const BACKEND_PORT: u16 = 8080;
/// Services beside the measured one, and their backends, none of which exists.
const OTHER_SERVICES: Ipv4Addr = Ipv4Addr::new(10, 97, 0, 0);
const OTHER_BACKENDS: Ipv4Addr = Ipv4Addr::new(10, 128, 0, 0);

/// A port of a service.
#[derive(Clone, Debug)]
pub(crate) struct Service {
    pub(crate) name: String,
    pub(crate) frontend: SocketAddr,
    pub(crate) protocol: Protocol,
    pub(crate) backends: Vec<SocketAddr>,
}

/// The address of the service that is measured.
pub(crate) fn measured() -> SocketAddr {
    SocketAddr::new(vip(Family::V4, 10), SERVICE_PORT)
}

/// `count` services in the order in which they are loaded. The measured one, which has a port for TCP and one for UDP, is in the middle:
/// where rules are tried one after the other, this is the mean. The others have one backend each, because nobody asks for them.
pub(crate) fn with_measured(count: u32, backends: &[SocketAddr]) -> Vec<Service> {
    let mut services = others(count - 1, 1);
    let middle = services.len() / 2;
    let ports = [Protocol::Tcp, Protocol::Udp].map(|protocol| Service {
        name: format!("measured-{}", protocol.name()),
        frontend: measured(),
        protocol,
        backends: backends.to_vec(),
    });
    services.splice(middle..middle, ports);
    services
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

fn nth(first: Ipv4Addr, number: u32, port: u16) -> SocketAddr {
    SocketAddr::new(IpAddr::V4(Ipv4Addr::from_bits(first.to_bits() + number)), port)
}
