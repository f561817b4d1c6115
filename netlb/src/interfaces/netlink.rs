//! What the kernel says of its interfaces.

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd},
};

use futures_util::{StreamExt as _, TryStreamExt as _, stream::BoxStream};
use rtnetlink::{
    Handle, IpVersion, MulticastGroup, RouteMessageBuilder,
    packet_core::{NetlinkMessage, NetlinkPayload},
    packet_route::{
        AddressFamily, RouteNetlinkMessage,
        address::{AddressAttribute, AddressFlags, AddressMessage, AddressScope},
        link::{InfoKind, LinkAttribute, LinkExtentMask, LinkInfo, LinkLayerType, LinkMessage},
        neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage},
        route::{RouteAttribute, RouteMessage},
        rule::{RuleAttribute, RuleMessage},
    },
    sys::AsyncSocket as _,
};
use tokio::task::JoinHandle;

use super::{
    facts::Address,
    link::{Kind, Link, Routing},
};

/// Room for news while we are busy: some thousand messages.
static BUFFER: libc::c_int = 4 << 20;

/// A change of the interfaces, or of the ways through them.
#[derive(Debug)]
pub(super) enum Event {
    Changed(Link),
    Gone(u32),
    /// Addresses that other hosts may reach.
    Readdressed,
    /// Routes, or where neighbours are.
    Rerouted,
    /// What routing goes by: see [`Routing`].
    Ruled,
    /// There were more changes than the socket had room for.
    Lost,
    /// There will be no more events.
    Ended,
}

/// Two connections, so that an answer is not lost among the news.
pub(super) struct Netlink {
    news: BoxStream<'static, NetlinkMessage<RouteNetlinkMessage>>,
    requests: Handle,
    neighbours: Neighbours,
    /// Whether there was a route of several ways since all of them were looked at; none before that.
    has_several_ways: Option<bool>,
    tasks: [JoinHandle<()>; 2],
}

impl Drop for Netlink {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

impl Netlink {
    /// Has to be called within the runtime. From here on no change is missed.
    pub(super) fn open() -> io::Result<Self> {
        let (mut listening, _, news) = rtnetlink::new_multicast_connection(&[
            MulticastGroup::Link,
            MulticastGroup::Neigh,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv6Ifaddr,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv6Route,
            MulticastGroup::Ipv4Rule,
            MulticastGroup::Ipv6Rule,
        ])?;
        if let Err(error) = enlarge(listening.socket_mut().socket_mut().as_fd()) {
            tracing::debug!("cannot enlarge the buffer for news of interfaces: {error}");
        }
        let (asking, requests, _) = rtnetlink::new_connection()?;
        let news = news.map(|(message, _)| message).boxed();
        Ok(Self {
            news,
            requests,
            neighbours: Neighbours::default(),
            has_several_ways: None,
            tasks: [tokio::spawn(listening), tokio::spawn(asking)],
        })
    }

    /// Waits for the next change.
    pub(super) async fn next(&mut self) -> Event {
        loop {
            let Some(message) = self.news.next().await else { return Event::Ended };
            match message.payload {
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(message)) => {
                    if let Some(link) = read(&message) {
                        return Event::Changed(link);
                    }
                }
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelLink(message)) if is_whole(&message) => {
                    return Event::Gone(message.header.index);
                }
                // Whether that goes away again, a look at all routes would tell, of which there may be a million.
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewRoute(route))
                    if self.has_several_ways == Some(false) && is_by_flow(&route) =>
                {
                    self.has_several_ways = Some(true);
                    return Event::Ruled;
                }
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewRoute(_) | RouteNetlinkMessage::DelRoute(_)) => {
                    return Event::Rerouted;
                }
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewRule(_) | RouteNetlinkMessage::DelRule(_)) => {
                    return Event::Ruled;
                }
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewNeighbour(message))
                    if self.neighbours.has_moved(&message) =>
                {
                    return Event::Rerouted;
                }
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelNeighbour(message))
                    if self.neighbours.is_gone(&message) =>
                {
                    return Event::Rerouted;
                }
                NetlinkPayload::InnerMessage(
                    RouteNetlinkMessage::NewAddress(message) | RouteNetlinkMessage::DelAddress(message),
                ) if is_global(&message) => return Event::Readdressed,
                NetlinkPayload::Overrun(_) => {
                    self.has_several_ways = None;
                    return Event::Lost;
                }
                _ => {}
            }
        }
    }

    /// All interfaces. News that are older than the list and come after it do no harm: what made them old comes as well.
    pub(super) async fn list(&self) -> io::Result<Vec<Link>> {
        let request = self.requests.link().get();
        let request = request.set_filter_mask(AddressFamily::Unspec, vec![LinkExtentMask::SkipStats]);
        let messages: Vec<_> = request.execute().try_collect().await.map_err(io::Error::other)?;
        Ok(messages.iter().filter_map(read).collect())
    }

    /// All addresses that other hosts may reach, in the kernel's order.
    pub(super) async fn addresses(&self) -> io::Result<Vec<Address>> {
        let messages: Vec<_> = self.requests.address().get().execute().try_collect().await.map_err(io::Error::other)?;
        Ok(messages.iter().filter(|message| is_global(message)).filter_map(read_address).collect())
    }

    /// What routing goes by. All routes are looked at once, and after that those that come.
    pub(super) async fn routing(&mut self) -> Routing {
        if self.has_several_ways.is_none() {
            self.has_several_ways = self.look_for_several_ways().await;
        }
        Routing { by_destination: self.routes_by_destination().await, one_way: self.has_several_ways == Some(false) }
    }

    async fn look_for_several_ways(&self) -> Option<bool> {
        let (v4, v6) = (RouteMessageBuilder::<Ipv4Addr>::new().build(), RouteMessageBuilder::<Ipv6Addr>::new().build());
        for (question, name) in [(v4, "IPv4"), (v6, "IPv6")] {
            let mut routes = Box::pin(self.requests.route().get(question).execute());
            loop {
                match routes.try_next().await {
                    Ok(Some(route)) if is_by_flow(&route) => return Some(true),
                    Ok(Some(_)) => {}
                    Ok(None) => break,
                    Err(error) => {
                        tracing::debug!("cannot list the routes of {name}: {error}");
                        return None;
                    }
                }
            }
        }
        Some(false)
    }

    /// Whether rules ask for nothing but where a packet goes and where it came in, as far as the kernel tells.
    async fn routes_by_destination(&self) -> bool {
        for (version, name) in [(IpVersion::V4, "IPv4"), (IpVersion::V6, "IPv6")] {
            match self.requests.rule().get(version).execute().try_collect::<Vec<_>>().await {
                Ok(rules) if rules.iter().all(is_by_destination) => {}
                Ok(_) => return false,
                Err(error) => {
                    tracing::debug!("cannot list the rules of {name}: {error}");
                    return false;
                }
            }
        }
        true
    }

    pub(super) async fn get(&self, index: u32) -> io::Result<Option<Link>> {
        let mut messages = Box::pin(self.requests.link().get().match_index(index).execute());
        let message = messages.try_next().await.map_err(io::Error::other)?;
        Ok(message.as_ref().and_then(read))
    }
}

/// Where neighbours are, as far as the kernel told. It tells as well when it looks whether they are there still, which is often.
#[derive(Debug, Default)]
struct Neighbours(HashMap<(u32, IpAddr), Vec<u8>>);

impl Neighbours {
    /// Whether a neighbour was somewhere else before.
    fn has_moved(&mut self, message: &NeighbourMessage) -> bool {
        let Some(key) = key(message) else { return false };
        let address = message.attributes.iter().find_map(|attribute| match attribute {
            NeighbourAttribute::LinkLayerAddress(address) => Some(address.clone()),
            _ => None,
        });
        match address {
            Some(address) => self.0.insert(key, address.clone()).is_some_and(|before| before != address),
            None => self.0.remove(&key).is_some(),
        }
    }

    fn is_gone(&mut self, message: &NeighbourMessage) -> bool {
        key(message).is_some_and(|key| self.0.remove(&key).is_some())
    }
}

/// Whom a message is about. None if that is what a bridge has learnt.
fn key(message: &NeighbourMessage) -> Option<(u32, IpAddr)> {
    let address = message.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::Destination(NeighbourAddress::Inet(address)) => Some(IpAddr::from(*address)),
        NeighbourAttribute::Destination(NeighbourAddress::Inet6(address)) => Some(IpAddr::from(*address)),
        _ => None,
    });
    Some((message.header.ifindex, address?))
}

/// Whether a route leads different ways, or not all that goes to its destination.
fn is_by_flow(route: &RouteMessage) -> bool {
    let is_several = |attribute: &RouteAttribute| {
        matches!(attribute, RouteAttribute::MultiPath(_) | RouteAttribute::NhId(_) | RouteAttribute::Source(_))
    };
    route.header.source_prefix_length != 0 || route.attributes.iter().any(is_several)
}

/// Whether a rule treats all packets alike that go to one address and came in by one interface. Marks, users and sockets are none of what
/// the programs ask about.
fn is_by_destination(rule: &RuleMessage) -> bool {
    rule.header.src_len == 0
        && rule.attributes.iter().all(|attribute| {
            matches!(
                attribute,
                RuleAttribute::Destination(_)
                    | RuleAttribute::Iifname(_)
                    | RuleAttribute::Oifname(_)
                    | RuleAttribute::Goto(_)
                    | RuleAttribute::Priority(_)
                    | RuleAttribute::FwMark(_)
                    | RuleAttribute::FwMask(_)
                    | RuleAttribute::Realm(_)
                    | RuleAttribute::SuppressIfGroup(_)
                    | RuleAttribute::SuppressPrefixLen(_)
                    | RuleAttribute::Table(_)
                    | RuleAttribute::L3MDev(_)
                    | RuleAttribute::UidRange(_)
                    | RuleAttribute::Protocol(_)
            )
        })
}

/// Makes a socket's receive buffer larger than net.core.rmem_max allows those without privileges.
fn enlarge(socket: BorrowedFd<'_>) -> io::Result<()> {
    let value: *const libc::c_int = &raw const BUFFER;
    let len = size_of_val(&BUFFER) as libc::socklen_t;
    // SAFETY: the option's value is an int, alive for the call.
    let result =
        unsafe { libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, value.cast(), len) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Whether a message is about an interface as such. The same group carries what a bridge says of its ports (a port that leaves is reported
/// as a deleted link!), and what a wireless interface says, which leaves out most of it.
fn is_whole(message: &LinkMessage) -> bool {
    message.header.interface_family == AddressFamily::Unspec
        && !message.attributes.iter().any(|attribute| matches!(attribute, LinkAttribute::Wireless(_)))
}

fn is_global(message: &AddressMessage) -> bool {
    matches!(message.header.scope, AddressScope::Universe | AddressScope::Site)
}

fn read_address(message: &AddressMessage) -> Option<Address> {
    let (mut local, mut address) = (None, None);
    let mut flags = AddressFlags::from_bits_retain(message.header.flags.bits().into());
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(ip) => local = Some(*ip),
            // With a peer this is the peer's, and the other one is ours.
            AddressAttribute::Address(ip) => address = Some(*ip),
            AddressAttribute::Flags(all) => flags = *all,
            _ => {}
        }
    }
    let has = |flag| flags.contains(flag);
    Some(Address {
        index: message.header.index,
        ip: local.or(address)?,
        is_usable: !has(AddressFlags::Tentative) && !has(AddressFlags::Dadfailed),
        is_preferred: !has(AddressFlags::Deprecated),
        is_secondary: has(AddressFlags::Secondary),
    })
}

fn read(message: &LinkMessage) -> Option<Link> {
    if !is_whole(message) {
        return None;
    }
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        is_ethernet: message.header.link_layer_type == LinkLayerType::Ether,
        is_loopback: message.header.link_layer_type == LinkLayerType::Loopback,
        kind: Kind::Other,
        master: None,
        peer: None,
        peer_is_elsewhere: false,
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Controller(index) => link.master = Some(*index).filter(|index| *index != 0),
            LinkAttribute::Link(index) => link.peer = Some(*index),
            LinkAttribute::LinkNetNsId(_) => link.peer_is_elsewhere = true,
            LinkAttribute::LinkInfo(infos) => {
                for info in infos {
                    match info {
                        LinkInfo::Kind(InfoKind::Veth | InfoKind::Netkit) => link.kind = Kind::Pair,
                        LinkInfo::Kind(InfoKind::Bridge) => link.kind = Kind::Bridge,
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    (!link.name.is_empty()).then_some(link)
}

#[cfg(test)]
mod tests {
    use rtnetlink::packet_route::IpProtocol;

    use super::*;

    fn message(attributes: Vec<LinkAttribute>) -> LinkMessage {
        let mut message = LinkMessage::default();
        message.header.index = 9;
        message.header.link_layer_type = LinkLayerType::Ether;
        message.attributes = attributes;
        message
    }

    fn name() -> LinkAttribute {
        LinkAttribute::IfName("veth0".to_owned())
    }

    #[test]
    fn a_pod_interface_is_read() {
        let link = read(&message(vec![
            name(),
            LinkAttribute::Controller(5),
            LinkAttribute::Link(2),
            LinkAttribute::LinkNetNsId(0),
            LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Veth)]),
        ]));
        let expected = Link {
            index: 9,
            name: "veth0".to_owned(),
            is_ethernet: true,
            is_loopback: false,
            kind: Kind::Pair,
            master: Some(5),
            peer: Some(2),
            peer_is_elsewhere: true,
        };
        assert_eq!(link, Some(expected));
    }

    #[test]
    fn a_neighbour_moves_only_to_another_address() {
        let message = |address: Option<[u8; 6]>| {
            let mut message = NeighbourMessage::default();
            message.header.ifindex = 3;
            message.attributes.push(NeighbourAttribute::Destination(NeighbourAddress::Inet([10, 0, 0, 1].into())));
            message.attributes.extend(address.map(|address| NeighbourAttribute::LinkLayerAddress(address.to_vec())));
            message
        };
        let (here, there) = (message(Some([2, 0, 0, 0, 0, 1])), message(Some([2, 0, 0, 0, 0, 2])));
        let mut neighbours = Neighbours::default();
        assert!(!neighbours.has_moved(&here), "nobody knew it before");
        assert!(!neighbours.has_moved(&here));
        assert!(neighbours.has_moved(&there));
        assert!(neighbours.has_moved(&message(None)), "it is nowhere now");
        assert!(!neighbours.is_gone(&there));
        neighbours.has_moved(&here);
        assert!(neighbours.is_gone(&here));
        assert!(!neighbours.has_moved(&NeighbourMessage::default()), "what a bridge has learnt");
    }

    #[test]
    fn what_a_bridge_says_of_its_ports_is_not_about_the_interface() {
        let mut port = message(vec![name(), LinkAttribute::Controller(5)]);
        port.header.interface_family = AddressFamily::Bridge;
        assert!(!is_whole(&port) && read(&port).is_none());
    }

    #[test]
    fn routes_that_lead_different_ways_are_noticed() {
        let route = |attributes: Vec<RouteAttribute>| {
            let mut route = RouteMessage::default();
            route.attributes = attributes;
            is_by_flow(&route)
        };
        assert!(!route(vec![RouteAttribute::Oif(2), RouteAttribute::Priority(100)]));
        assert!(route(vec![RouteAttribute::MultiPath(Vec::new())]));
        assert!(route(vec![RouteAttribute::Oif(2), RouteAttribute::NhId(7)]), "it may be a group");
        let mut of_a_source = RouteMessage::default();
        of_a_source.header.source_prefix_length = 64;
        assert!(is_by_flow(&of_a_source));
    }

    #[test]
    fn rules_that_ask_whence_a_packet_comes_are_noticed() {
        let rule = |source_len, attributes: &[RuleAttribute]| {
            let mut rule = RuleMessage::default();
            rule.header.src_len = source_len;
            rule.attributes = attributes.to_vec();
            is_by_destination(&rule)
        };
        let of_the_kernel = [RuleAttribute::Priority(32766), RuleAttribute::Table(254)];
        assert!(rule(0, &of_the_kernel));
        assert!(rule(0, &[RuleAttribute::FwMark(0x4000), RuleAttribute::Iifname("pod1".to_owned())]));
        assert!(!rule(16, &[RuleAttribute::Source([10, 244, 0, 0].into()), RuleAttribute::Table(100)]));
        assert!(!rule(0, &[RuleAttribute::IpProtocol(IpProtocol::Udp)]));
        assert!(!rule(0, &[RuleAttribute::TunId(7)]));
    }
}
