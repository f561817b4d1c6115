//! Which interfaces carry service traffic, and as what: a function of what the kernel says of them.

use netlb_common::maps::{Interface, role};

use crate::config::{Glob, Node};

/// What is known of an interface.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) name: String,
    /// Its frames begin with an Ethernet header.
    pub(super) is_ethernet: bool,
    pub(super) is_loopback: bool,
    pub(super) kind: Kind,
    /// Index of the bridge, bond, … it belongs to.
    pub(super) master: Option<u32>,
    /// Index of the interface it is tied to, such as a veth's other end.
    pub(super) peer: Option<u32>,
    /// That one is in another network namespace, where its index is meant.
    pub(super) peer_is_elsewhere: bool,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Kind {
    /// veth or netkit: two ends.
    Pair,
    Bridge,
    Other,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Role {
    Pod,
    Uplink,
    Bridge,
}

impl Role {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Pod => "pod",
            Self::Uplink => "uplink",
            Self::Bridge => "bridge",
        }
    }

    const fn number(self) -> u8 {
        match self {
            Self::Pod => role::POD,
            Self::Uplink => role::UPLINK,
            Self::Bridge => role::BRIDGE,
        }
    }
}

/// What an interface is to us, if anything. `master` is the interface it belongs to. Of several patterns that match, those for uplinks go
/// before those for bridges and those for pods, so that `pod_interfaces = ["*"]` is possible.
pub(super) fn role(node: &Node, link: &Link, master: Option<&Link>) -> Option<Role> {
    let matches = |globs: &[Glob], link: &Link| globs.iter().any(|glob| glob.matches(&link.name));
    if matches(&node.uplinks, link) {
        Some(Role::Uplink)
    } else if matches(&node.bridges, link) {
        Some(Role::Bridge)
    } else if matches(&node.pod_interfaces, link)
        || master.is_some_and(|master| master.kind == Kind::Bridge && matches(&node.bridges, master))
    {
        Some(Role::Pod)
    } else {
        None
    }
}

/// What routing goes by beside where a packet came in, as far as the kernel tells. By default, nothing is known.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) struct Routing {
    /// Rules ask for destinations, and for no more.
    pub(super) by_destination: bool,
    /// To no destination there is more than one way.
    pub(super) one_way: bool,
}

/// What the programs are told of an interface.
pub(super) fn announcement(link: &Link, master: Option<&Link>, role: Role, routing: Routing) -> Interface {
    // What leaves by an uplink is for a neighbour on its link, also where a virtual one ends in another namespace.
    let is_peer = role == Role::Pod && link.kind == Kind::Pair && link.peer_is_elsewhere;
    // What is beyond uplinks may be reached by several ways, of which each flow has one.
    let is_direct = routing.by_destination && (routing.one_way || role != Role::Uplink);
    let flag = |is_so, flag| if is_so { flag } else { 0 };
    Interface {
        role: role.number(),
        flags: flag(is_peer, Interface::PEER) | flag(is_direct, Interface::DIRECT),
        pad: 0,
        master: master.filter(|master| master.kind == Kind::Bridge).map_or(0, |master| master.index),
    }
}

/// Why an interface that matches cannot carry service traffic.
pub(super) fn problem(link: &Link, role: Role) -> Option<&'static str> {
    if !link.is_ethernet {
        Some("not an Ethernet interface")
    } else if role == Role::Bridge && link.kind != Kind::Bridge {
        Some("matches `bridges` and is not a bridge")
    } else {
        None
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in super::super) fn link(index: u32, name: &str) -> Link {
        Link {
            index,
            name: name.to_owned(),
            is_ethernet: true,
            is_loopback: false,
            kind: Kind::Other,
            master: None,
            peer: None,
            peer_is_elsewhere: false,
        }
    }

    pub(in super::super) fn node(pods: &str, uplinks: &str, bridges: &str) -> Node {
        let globs = |text: &str| text.split_whitespace().map(|glob| glob.parse().unwrap()).collect();
        Node { pod_interfaces: globs(pods), uplinks: globs(uplinks), bridges: globs(bridges), ..Node::default() }
    }

    #[test]
    fn names_decide() {
        let node = node("veth*", "eth0 vxlan*", "cni?");
        let role = |name| role(&node, &link(1, name), None);
        assert_eq!(role("veth12ab"), Some(Role::Pod));
        assert_eq!(role("eth0"), Some(Role::Uplink));
        assert_eq!(role("vxlan.calico"), Some(Role::Uplink));
        assert_eq!(role("cni0"), Some(Role::Bridge));
        assert_eq!(role("eth1"), None);
        assert_eq!(role("lo"), None);
    }

    #[test]
    fn uplinks_go_before_the_others() {
        let node = node("*", "eth0", "cni0");
        assert_eq!(role(&node, &link(1, "eth0"), None), Some(Role::Uplink));
        assert_eq!(role(&node, &link(1, "cni0"), None), Some(Role::Bridge));
        assert_eq!(role(&node, &link(1, "any"), None), Some(Role::Pod));
    }

    #[test]
    fn ports_of_a_matching_bridge_are_pods() {
        let node = node("", "", "cni0");
        let bridge = |name| Link { kind: Kind::Bridge, ..link(1, name) };
        let port = link(2, "tap0");
        assert_eq!(role(&node, &port, Some(&bridge("cni0"))), Some(Role::Pod));
        assert_eq!(role(&node, &port, Some(&bridge("docker0"))), None);
        assert_eq!(role(&node, &port, Some(&link(1, "cni0"))), None, "a bond called like a bridge");
    }

    #[test]
    fn the_announcement_tells_of_bridge_and_peer() {
        let bridge = Link { kind: Kind::Bridge, ..link(7, "cni0") };
        let pod = Link { kind: Kind::Pair, peer: Some(2), peer_is_elsewhere: true, ..link(9, "veth1") };
        let unknown = Routing::default();
        let interface = announcement(&pod, Some(&bridge), Role::Pod, unknown);
        assert_eq!((interface.role, interface.flags, interface.master), (role::POD, Interface::PEER, 7));
        assert_eq!(announcement(&pod, None, Role::Uplink, unknown).flags, 0, "the next hop is not the peer");
        let here = Link { peer_is_elsewhere: false, ..pod.clone() };
        assert_eq!(announcement(&here, None, Role::Pod, unknown).flags, 0);
        let macvlan = Link { kind: Kind::Other, ..pod };
        assert_eq!(announcement(&macvlan, None, Role::Pod, unknown).flags, 0, "only pairs have a peer to redirect to");
        let direct = |role, by_destination, one_way| {
            let routing = Routing { by_destination, one_way };
            announcement(&link(9, "veth1"), None, role, routing).flags & Interface::DIRECT != 0
        };
        assert!(direct(Role::Pod, true, false) && direct(Role::Bridge, true, false));
        assert!(!direct(Role::Uplink, true, false), "there may be several ways");
        assert!(direct(Role::Uplink, true, true) && !direct(Role::Uplink, false, true));
        assert!(!direct(Role::Pod, false, true), "rules may ask for more");
        let bonded = announcement(&here, Some(&link(3, "bond0")), Role::Uplink, unknown);
        assert_eq!((bonded.role, bonded.master), (role::UPLINK, 0));
    }

    #[test]
    fn what_has_no_ethernet_frames_is_refused() {
        let lo = Link { is_ethernet: false, ..link(1, "lo") };
        assert!(problem(&lo, Role::Pod).is_some());
        assert!(problem(&link(1, "eth0"), Role::Uplink).is_none());
        assert!(problem(&link(1, "br"), Role::Bridge).is_some());
    }
}
