//! Testbeds: nodes and pods as namespaces, wired as clusters wire them. Every testbed is dual stack.
//!
//! | what | IPv4 | IPv6 |
//! |---|---|---|
//! | pods of node A, B | 10.244.1.0/24, 10.244.2.0/24 | fd00:10:244:1::/64, fd00:10:244:2::/64 |
//! | virtual addresses | 10.96.0.0/16 | fd00:10:96::/112 |
//! | underlay of the nodes | 192.168.50.0/24 | fd00:192:168:50::/64 |
//!
//! On a node the interfaces are called `pod-<name>` (a pod's), `up0` (the uplink), `vx0` (VXLAN) and `br0` (the pods' bridge); in a pod
//! there is `eth0`. Nothing here knows of netlb: a virtual address is reached by the pod's default route, that is, not at all.

use std::fmt;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::cni::{Attachment, Plugin};
use crate::exec::{Cmd, wait_until};
use crate::netns::Namespace;
use crate::run::Run;

/// MTU of the underlay; VXLAN takes 50 bytes of it.
const UNDERLAY_MTU: u32 = 1500;
const VXLAN_MTU: u32 = UNDERLAY_MTU - 50;
/// The port flannel uses, which is also the kernel's default.
const VXLAN_PORT: u16 = 8472;
const SETTLED: Duration = Duration::from_secs(10);
/// Host part of the outside client's underlay address.
const OUTSIDE: u8 = 100;

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Family {
    V4,
    V6,
}

impl Family {
    pub const BOTH: [Self; 2] = [Self::V4, Self::V6];
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

/// How pods are joined to their node, and nodes to each other.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Layout {
    /// One node; each pod on a routed veth of its own, as the CNI plugin `ptp` does it.
    Ptp,
    /// One node; pods on a bridge that holds the gateway address, as the CNI plugin `bridge` does it.
    Bridge,
    /// Two nodes with routed pods, and a route to the other's pods by its underlay address.
    Routed,
    /// Two nodes with routed pods; the other's pods are reached through a VXLAN device, as flannel does it.
    Vxlan,
}

impl Layout {
    pub const ALL: [Self; 4] = [Self::Ptp, Self::Bridge, Self::Routed, Self::Vxlan];

    fn hosts(self) -> &'static [Host] {
        match self {
            Self::Ptp | Self::Bridge => &[Host::A],
            Self::Routed | Self::Vxlan => &[Host::A, Host::B],
        }
    }
}

/// What a testbed is to be like.
#[derive(Clone, Debug)]
pub struct Plan {
    layout: Layout,
    pod_mtu: u32,
    rp_filter: Option<u8>,
    forwarding: bool,
    outside: bool,
    vlan: Option<u16>,
}

impl Plan {
    pub fn new(layout: Layout) -> Self {
        Self { layout, pod_mtu: UNDERLAY_MTU, rp_filter: None, forwarding: true, outside: false, vlan: None }
    }

    /// MTU of both ends of the pods' veths (default 1500, which is too much for VXLAN: path MTU discovery has to cope).
    pub fn pod_mtu(mut self, mtu: u32) -> Self {
        self.pod_mtu = mtu;
        self
    }

    /// Reverse path filter of the nodes' interfaces: 0 off, 1 strict, 2 loose (default: as the kernel has it).
    pub fn rp_filter(mut self, mode: u8) -> Self {
        self.rp_filter = Some(mode);
        self
    }

    /// Whether the nodes' kernels forward packets (default: they do).
    pub fn forwarding(mut self, on: bool) -> Self {
        self.forwarding = on;
        self
    }

    /// With a client on the underlay that reaches the virtual addresses by node A.
    pub fn with_outside_client(mut self) -> Self {
        self.outside = true;
        self
    }

    /// The underlay is a VLAN on the uplinks.
    pub fn vlan(mut self, id: u16) -> Self {
        self.vlan = Some(id);
        self
    }

    pub fn build(self) -> Result<Testbed> {
        Testbed::build(self)
    }

    fn has_underlay(&self) -> bool {
        self.outside || self.layout.hosts().len() > 1
    }

    fn uplink(&self) -> String {
        self.vlan.map_or_else(|| "up0".to_owned(), |id| format!("up0.{id}"))
    }
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Host {
    A,
    B,
}

impl Host {
    fn index(self) -> u8 {
        match self {
            Self::A => 1,
            Self::B => 2,
        }
    }

    fn other(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }

    fn role(self) -> &'static str {
        match self {
            Self::A => "a",
            Self::B => "b",
        }
    }

    /// Address in the host's pod range; 1 is the gateway, 0 that of the VXLAN device.
    pub fn pod_address(self, family: Family, number: u8) -> IpAddr {
        match family {
            Family::V4 => Ipv4Addr::new(10, 244, self.index(), number).into(),
            Family::V6 => Ipv6Addr::new(0xfd00, 0x10, 0x244, self.index().into(), 0, 0, 0, number.into()).into(),
        }
    }

    pub fn underlay_address(self, family: Family) -> IpAddr {
        underlay_address(family, 10 + self.index())
    }

    /// Set by hand, since the other host's neighbour entries name it.
    fn vxlan_mac(self) -> String {
        format!("02:00:0a:f4:{:02x}:00", self.index())
    }
}

/// A virtual address: 10.96.0.`number` or fd00:10:96::`number`.
pub fn vip(family: Family, number: u8) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(10, 96, 0, number).into(),
        Family::V6 => Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, number.into()).into(),
    }
}

fn underlay_address(family: Family, number: u8) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(192, 168, 50, number).into(),
        Family::V6 => Ipv6Addr::new(0xfd00, 0x192, 0x168, 0x50, 0, 0, 0, number.into()).into(),
    }
}

/// Nodes, what joins them, and the pods made so far. Pods are removed when they are dropped, the rest with the testbed.
#[derive(Debug)]
pub struct Testbed {
    number: u32,
    plan: Plan,
    nodes: Vec<Node>,
    outside: Option<Namespace>,
    switch: Option<Namespace>,
}

impl Testbed {
    fn build(plan: Plan) -> Result<Self> {
        let number = Run::current()?.next_number();
        let switch = plan.has_underlay().then(|| switch(number)).transpose()?;
        let mut nodes = Vec::new();
        for &host in plan.layout.hosts() {
            nodes.push(Node::new(number, host, &plan, switch.as_ref())?);
        }
        let outside = match &switch {
            Some(switch) if plan.outside => Some(outside_client(number, &plan, switch)?),
            _ => None,
        };
        Ok(Self { number, plan, nodes, outside, switch })
    }

    pub fn layout(&self) -> Layout {
        self.plan.layout
    }

    pub fn node_a(&self) -> &Node {
        &self.nodes[0]
    }

    pub fn node(&self, host: Host) -> Result<&Node> {
        self.nodes
            .iter()
            .find(|node| node.host == host)
            .with_context(|| format!("a testbed {:?} has no host {host:?}", self.plan.layout))
    }

    /// The client outside of the cluster.
    pub fn outside(&self) -> Result<&Namespace> {
        self.outside.as_ref().context("the testbed was planned without an outside client")
    }

    /// The underlay's switch. Its ports are called `to-` and the host's letter or `outside`.
    pub fn switch(&self) -> Result<&Namespace> {
        self.switch.as_ref().context("a testbed of one node without an outside client has no switch")
    }

    /// The host that backends are to be on so that traffic between it and node A takes the longest way.
    pub fn far_host(&self) -> Host {
        self.nodes.last().map_or(Host::A, |node| node.host)
    }

    /// Makes a pod, in the order of steps of the CNI plugins: the veth, the addresses and routes inside, then the node's side.
    pub fn pod(&self, host: Host, name: &str) -> Result<Pod> {
        let node = self.node(host)?;
        let number = node.next_pod.fetch_add(1, Ordering::Relaxed);
        if number == u8::MAX {
            bail!("host {host:?} has no pod address left");
        }
        let pod = Pod {
            _attachment: None,
            name: name.to_owned(),
            host,
            number,
            interface: format!("pod-{name}"),
            ns: Namespace::new(self.number, &format!("pod-{name}"))?,
        };
        if pod.interface.len() > 15 {
            bail!("`{}` is too long for the name of an interface", pod.interface);
        }
        match self.plan.layout {
            Layout::Bridge => self.wire_to_bridge(node, &pod)?,
            Layout::Ptp | Layout::Routed | Layout::Vxlan => self.wire_by_route(node, &pod)?,
        }
        Ok(pod)
    }

    /// Makes a pod that a CNI plugin wires. Its interface on the node, if it has one, is called as the plugin calls it.
    pub fn pod_by(&self, plugin: Plugin, host: Host, name: &str) -> Result<Pod> {
        let node = self.node(host)?;
        let number = node.next_pod.fetch_add(1, Ordering::Relaxed);
        let ns = Namespace::new(self.number, &format!("pod-{name}"))?;
        let address = |family, bits| (host.pod_address(family, number), bits, host.pod_address(family, 1));
        let addresses = [address(Family::V4, 24), address(Family::V6, 64)];
        let (attachment, interface) = Attachment::new(plugin, &node.ns, &ns, &addresses)?;
        settle(&ns, "eth0", addresses[1].0)?;
        let interface = interface.unwrap_or_default();
        Ok(Pod { _attachment: Some(attachment), name: name.to_owned(), host, number, interface, ns })
    }

    fn wire_by_route(&self, node: &Node, pod: &Pod) -> Result<()> {
        let [gateway4, gateway6] = Family::BOTH.map(|family| pod.host.pod_address(family, 1));
        let [pod4, pod6] = Family::BOTH.map(|family| pod.ip(family));
        let interface = &pod.interface;
        self.add_veth(node, pod)?;
        pod.ns.ip(&format!(
            "link set eth0 up\n\
             addr add {pod4}/32 dev eth0\n\
             addr add {pod6}/128 dev eth0 nodad\n\
             route add {gateway4} dev eth0 scope link\n\
             route add default via {gateway4} dev eth0\n\
             route add ::/0 via fe80::1 dev eth0\n"
        ))?;
        node.ns.ip(&format!(
            "addr add {gateway4}/32 dev {interface}\n\
             addr add {gateway6}/128 dev {interface} nodad\n\
             addr add fe80::1/64 dev {interface} nodad\n\
             route add {pod4}/32 dev {interface} scope link\n\
             route add {pod6}/128 dev {interface}\n"
        ))?;
        settle(&node.ns, interface, gateway6)?;
        settle(&pod.ns, "eth0", pod6)
    }

    fn wire_to_bridge(&self, node: &Node, pod: &Pod) -> Result<()> {
        let [gateway4, gateway6] = Family::BOTH.map(|family| pod.host.pod_address(family, 1));
        let [pod4, pod6] = Family::BOTH.map(|family| pod.ip(family));
        self.add_veth(node, pod)?;
        node.ns.ip(&format!("link set {} master br0\n", pod.interface))?;
        pod.ns.ip(&format!(
            "link set eth0 up\n\
             addr add {pod4}/24 dev eth0\n\
             addr add {pod6}/64 dev eth0 nodad\n\
             route add default via {gateway4} dev eth0\n\
             route add ::/0 via {gateway6} dev eth0\n"
        ))?;
        settle_port(&node.ns, &pod.interface)?;
        settle(&pod.ns, "eth0", pod6)
    }

    /// The veth is made in the pod's namespace, and its other end moved to the node and set up.
    fn add_veth(&self, node: &Node, pod: &Pod) -> Result<()> {
        let (mtu, interface) = (self.plan.pod_mtu, &pod.interface);
        pod.ns.ip(&format!(
            "link add eth0 mtu {mtu} type veth peer name {interface} mtu {mtu}\n\
             link set {interface} netns {}\n",
            node.ns.name()
        ))?;
        node.ns.ip(&format!("link set {interface} up\n"))
    }
}

/// A node of the cluster, without any process of its own.
#[derive(Debug)]
pub struct Node {
    pub ns: Namespace,
    host: Host,
    uplinks: Vec<String>,
    next_pod: AtomicU8,
}

impl Node {
    fn new(bed: u32, host: Host, plan: &Plan, switch: Option<&Namespace>) -> Result<Self> {
        let ns = Namespace::new(bed, host.role())?;
        let forwarding = u8::from(plan.forwarding).to_string();
        ns.sysctl("net/ipv4/ip_forward", &forwarding)?;
        ns.sysctl("net/ipv6/conf/all/forwarding", &forwarding)?;
        if let Some(mode) = plan.rp_filter {
            // The kernel takes the greater of an interface's and of `all`; interfaces made from here on copy `default`.
            ns.sysctl("net/ipv4/conf/all/rp_filter", &mode.to_string())?;
            ns.sysctl("net/ipv4/conf/default/rp_filter", &mode.to_string())?;
        }
        let mut node = Self { ns, host, uplinks: Vec::new(), next_pod: AtomicU8::new(2) };
        if let Some(switch) = switch {
            node.join_underlay(plan, switch)?;
        }
        match plan.layout {
            Layout::Ptp => {}
            Layout::Bridge => node.add_bridge(plan)?,
            Layout::Routed => node.route_to_other()?,
            Layout::Vxlan => node.tunnel_to_other(plan)?,
        }
        Ok(node)
    }

    /// The interfaces that lead to other hosts, as netlb's configuration wants them named.
    pub fn uplinks(&self) -> &[String] {
        &self.uplinks
    }

    fn join_underlay(&mut self, plan: &Plan, switch: &Namespace) -> Result<()> {
        plug(switch, &self.ns, "up0")?;
        add_underlay_address(&self.ns, plan, "up0", 10 + self.host.index())?;
        self.uplinks.push(plan.uplink());
        Ok(())
    }

    fn add_bridge(&self, plan: &Plan) -> Result<()> {
        // A fixed address: a bridge otherwise takes that of a port, and changes it as ports come and go.
        self.ns.ip(&format!(
            "link add br0 address 02:00:0a:f4:{:02x}:01 mtu {} type bridge mcast_snooping 0\n\
             addr add {}/24 dev br0\n\
             addr add {}/64 dev br0 nodad\n\
             link set br0 up\n",
            self.host.index(),
            plan.pod_mtu,
            self.host.pod_address(Family::V4, 1),
            self.host.pod_address(Family::V6, 1),
        ))?;
        settle(&self.ns, "br0", self.host.pod_address(Family::V6, 1))
    }

    fn route_to_other(&self) -> Result<()> {
        let other = self.host.other();
        self.ns.ip(&format!(
            "route add {}/24 via {}\nroute add {}/64 via {}\n",
            other.pod_address(Family::V4, 0),
            other.underlay_address(Family::V4),
            other.pod_address(Family::V6, 0),
            other.underlay_address(Family::V6),
        ))
    }

    fn tunnel_to_other(&mut self, plan: &Plan) -> Result<()> {
        let (host, other) = (self.host, self.host.other());
        let [own4, own6] = Family::BOTH.map(|family| host.pod_address(family, 0));
        let [other4, other6] = Family::BOTH.map(|family| other.pod_address(family, 0));
        let (mac, other_mac, uplink) = (host.vxlan_mac(), other.vxlan_mac(), plan.uplink());
        let local = host.underlay_address(Family::V4);
        self.ns.ip(&format!(
            "link add vx0 address {mac} mtu {VXLAN_MTU} type vxlan id 1 local {local} dev {uplink} dstport {VXLAN_PORT} nolearning\n\
             addr add {own4}/32 dev vx0\n\
             addr add {own6}/128 dev vx0 nodad\n\
             link set vx0 up\n\
             route add {other4}/24 via {other4} dev vx0 onlink\n\
             route add {other6}/64 via {other6} dev vx0 onlink\n\
             neigh add {other4} lladdr {other_mac} dev vx0 nud permanent\n\
             neigh add {other6} lladdr {other_mac} dev vx0 nud permanent\n"
        ))?;
        let remote = other.underlay_address(Family::V4).to_string();
        let fdb =
            Cmd::new("bridge").args(["-n", self.ns.name(), "fdb", "append", &other_mac, "dev", "vx0", "dst", &remote]);
        fdb.run()?.success()?;
        self.uplinks.push("vx0".to_owned());
        Ok(())
    }
}

/// A pod: a namespace with an address of each family.
#[derive(Debug)]
pub struct Pod {
    // Dropped before the namespace.
    _attachment: Option<Attachment>,
    pub ns: Namespace,
    name: String,
    host: Host,
    number: u8,
    interface: String,
}

impl Pod {
    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn ip(&self, family: Family) -> IpAddr {
        self.host.pod_address(family, self.number)
    }

    /// The node's side of the pod's veth.
    pub fn interface(&self) -> &str {
        &self.interface
    }

    /// Switches features of the pod's own interface, as `ethtool -K` calls them.
    pub fn offload(&self, features: &[&str], on: bool) -> Result<()> {
        let state = if on { "on" } else { "off" };
        let switches = features.iter().flat_map(|feature| [*feature, state]);
        self.ns.command("ethtool").args(["-K", "eth0"]).args(switches).run()?.success()?;
        Ok(())
    }
}

/// The underlay: a bridge that every node's uplink is plugged into.
fn switch(bed: u32) -> Result<Namespace> {
    let ns = Namespace::new(bed, "switch")?;
    ns.ip("link add br0 type bridge mcast_snooping 0\nlink set br0 up\n")?;
    Ok(ns)
}

/// Lays a cable from a namespace to the switch; the switch's ports are called after their namespaces.
fn plug(switch: &Namespace, ns: &Namespace, interface: &str) -> Result<()> {
    let port = format!("to-{}", ns.name().rsplit('-').next().unwrap_or_default());
    ns.ip(&format!(
        "link add {interface} mtu {UNDERLAY_MTU} type veth peer name {port} mtu {UNDERLAY_MTU}\n\
         link set {port} netns {}\n\
         link set {interface} up\n",
        switch.name()
    ))?;
    switch.ip(&format!("link set {port} master br0\nlink set {port} up\n"))?;
    settle_port(switch, &port)
}

/// Waits until a bridge forwards what comes by a port. The kernel notices some time after `ip` has returned that the cable is whole, up to
/// a second later on a busy machine, and what comes before is lost.
fn settle_port(ns: &Namespace, port: &str) -> Result<()> {
    wait_until(&format!("port {port} of {} to forward", ns.name()), SETTLED, || {
        let shown = ns.command("ip").args(["-details", "link", "show", "dev", port]).run()?.success()?;
        Ok(shown.stdout.contains("state forwarding").then_some(()))
    })
}

fn add_underlay_address(ns: &Namespace, plan: &Plan, cable: &str, number: u8) -> Result<()> {
    let mut interface = cable.to_owned();
    if let Some(id) = plan.vlan {
        interface = format!("{cable}.{id}");
        ns.ip(&format!("link add link {cable} name {interface} type vlan id {id}\nlink set {interface} up\n"))
            .context("the kernel makes no VLAN interface; it needs CONFIG_VLAN_8021Q")?;
    }
    ns.ip(&format!(
        "addr add {}/24 dev {interface}\naddr add {}/64 dev {interface} nodad\n",
        underlay_address(Family::V4, number),
        underlay_address(Family::V6, number),
    ))?;
    settle(ns, &interface, underlay_address(Family::V6, number))
}

/// Waits until neighbours can find an IPv6 address, as the CNI plugins do. The kernel joins the address's multicast group some time
/// after `ip` has returned, even without duplicate address detection; a solicitation that comes before is lost, which takes a second.
fn settle(ns: &Namespace, interface: &str, ip: IpAddr) -> Result<()> {
    let IpAddr::V6(ip) = ip else { bail!("{ip} has no solicited-node group") };
    let [.., x, y, z] = ip.octets();
    let group = format!("ff0200000000000000000001ff{x:02x}{y:02x}{z:02x}");
    wait_until(&format!("{ip} on {interface} of {} to be found by neighbours", ns.name()), SETTLED, || {
        let groups = ns.enter(|| fs::read_to_string("/proc/thread-self/net/igmp6"))??;
        let mut lines = groups.lines().map(|line| line.split_whitespace().skip(1));
        Ok(lines.any(|mut line| line.next() == Some(interface) && line.next() == Some(&group)).then_some(()))
    })
}

fn outside_client(bed: u32, plan: &Plan, switch: &Namespace) -> Result<Namespace> {
    let ns = Namespace::new(bed, "outside")?;
    plug(switch, &ns, "eth0")?;
    add_underlay_address(&ns, plan, "eth0", OUTSIDE)?;
    let [node4, node6] = Family::BOTH.map(|family| Host::A.underlay_address(family));
    ns.ip(&format!("route add 10.96.0.0/16 via {node4}\nroute add fd00:10:96::/112 via {node6}\n"))?;
    for &host in plan.layout.hosts() {
        ns.ip(&format!(
            "route add {}/24 via {}\nroute add {}/64 via {}\n",
            host.pod_address(Family::V4, 0),
            host.underlay_address(Family::V4),
            host.pod_address(Family::V6, 0),
            host.underlay_address(Family::V6),
        ))?;
    }
    Ok(ns)
}
