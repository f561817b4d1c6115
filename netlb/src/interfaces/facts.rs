//! What the kernel's interfaces and addresses say of the node.

use std::{collections::BTreeMap, net::IpAddr};

use super::link::{Kind, Link, Role, role};
use crate::config::Node;

/// An address that other hosts may reach.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Address {
    /// The interface that has it.
    pub(super) index: u32,
    pub(super) ip: IpAddr,
    /// Known not to be another host's too.
    pub(super) is_usable: bool,
    /// Not about to go.
    pub(super) is_preferred: bool,
    /// Beside another of its network; of IPv6, made up for privacy.
    pub(super) is_secondary: bool,
}

/// The node's addresses.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Facts {
    /// All that other hosts reach it by, sorted.
    pub(crate) addresses: Vec<IpAddr>,
    /// The first one of each family.
    pub(crate) primary: Vec<IpAddr>,
}

impl Facts {
    pub(super) fn new(node: &Node, links: &BTreeMap<u32, Link>, addresses: &[Address]) -> Self {
        let place = |address: &Address| {
            let link = links.get(&address.index)?;
            let master = link.master.and_then(|master| links.get(&master));
            Some((link, master, role(node, link, master)))
        };
        let usable = || addresses.iter().filter(|address| address.is_usable);
        let of_node = usable().filter(|address| place(address).is_some_and(|(_, _, role)| role != Some(Role::Pod)));
        let mut all: Vec<_> = of_node.map(|address| address.ip).collect();
        all.sort_unstable();
        all.dedup();
        let is_on_uplink = |address: &Address| place(address).is_some_and(|(_, _, role)| role == Some(Role::Uplink));
        let is_elsewhere = |address: &Address| {
            place(address).is_some_and(|(link, master, role)| {
                let is_port = master.is_some_and(|master| master.kind == Kind::Bridge);
                role.is_none() && link.kind != Kind::Bridge && !link.is_loopback && !is_port
            })
        };
        let first = |is_v6: bool, is_there: &dyn Fn(&Address) -> bool| {
            usable()
                .filter(|address| address.is_preferred && address.ip.is_ipv6() == is_v6 && is_there(address))
                .min_by_key(|address| (address.index, address.is_secondary))
                .map(|address| address.ip)
        };
        let primary = [false, true].map(|is_v6| first(is_v6, &is_on_uplink).or_else(|| first(is_v6, &is_elsewhere)));
        Self { addresses: all, primary: primary.into_iter().flatten().collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::link::tests::{link, node},
        *,
    };

    fn address(index: u32, ip: &str) -> Address {
        Address { index, ip: ip.parse().unwrap(), is_usable: true, is_preferred: true, is_secondary: false }
    }

    fn links() -> BTreeMap<u32, Link> {
        let links = [
            Link { is_ethernet: false, is_loopback: true, ..link(1, "lo") },
            link(2, "eth0"),
            link(3, "eth1"),
            Link { kind: Kind::Bridge, ..link(4, "cni0") },
            Link { master: Some(4), ..link(5, "tap0") },
            link(6, "pod1"),
        ];
        links.into_iter().map(|link| (link.index, link)).collect()
    }

    fn facts(uplinks: &str, addresses: &[Address]) -> (Vec<String>, Vec<String>) {
        let Facts { addresses, primary } = Facts::new(&node("pod*", uplinks, ""), &links(), addresses);
        let texts = |all: Vec<IpAddr>| all.iter().map(ToString::to_string).collect();
        (texts(addresses), texts(primary))
    }

    #[test]
    fn the_first_address_of_an_uplink_is_the_primary_one() {
        let addresses = [
            address(1, "198.51.100.9"),
            address(2, "192.0.2.1"),
            address(3, "203.0.113.1"),
            Address { is_secondary: true, ..address(3, "2001:db8::99") },
            address(3, "2001:db8::1"),
            address(4, "10.244.0.1"),
            address(6, "10.244.0.2"),
        ];
        let (all, primary) = facts("eth*", &addresses);
        let of_node = ["10.244.0.1", "192.0.2.1", "198.51.100.9", "203.0.113.1", "2001:db8::1", "2001:db8::99"];
        assert_eq!(all, of_node, "but not of a pod");
        assert_eq!(primary, ["192.0.2.1", "2001:db8::1"]);
        assert_eq!(facts("eth1", &addresses).1, ["203.0.113.1", "2001:db8::1"]);
    }

    #[test]
    fn without_one_on_an_uplink_another_is() {
        let addresses =
            [address(1, "198.51.100.9"), address(4, "10.0.0.4"), address(5, "10.0.0.5"), address(6, "10.0.0.6")];
        assert_eq!(facts("eth1", &addresses).1, [""; 0], "of no loopback, bridge, port or pod");
        let addresses = [addresses.to_vec(), vec![address(2, "192.0.2.1")]].concat();
        assert_eq!(facts("eth1", &addresses).1, ["192.0.2.1"]);
    }

    #[test]
    fn what_may_be_anothers_or_is_about_to_go_is_no_primary_address() {
        let tentative = Address { is_usable: false, ..address(2, "2001:db8::1") };
        let deprecated = Address { is_preferred: false, ..address(2, "2001:db8::2") };
        let (all, primary) = facts("eth0", &[tentative, deprecated, address(2, "2001:db8::3")]);
        assert_eq!(all, ["2001:db8::2", "2001:db8::3"]);
        assert_eq!(primary, ["2001:db8::3"]);
    }
}
