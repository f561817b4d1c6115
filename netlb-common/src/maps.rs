//! The layout of every map.
//!
//! Records have no implicit padding: hash keys are compared byte by byte, and what one side writes the other reads. Arrays that both
//! sides map into memory have elements that divide a cache line.

use crate::{
    addr::{Addr, PortBe},
    atomic::Word,
    conntrack::State,
    directory,
    flow::HashKey,
    network::Networks,
    snat::{Pool, Ports},
    time::{Jiffies, Ticks},
};

/// What entries of `SERVICES` and `OWNERS` are for, which are found by [a hash](HashKey::endpoint) of it: an address, a port and a protocol.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
#[repr(C)]
pub struct EndpointKey {
    pub addr: Addr,
    pub port: PortBe,
    /// IANA protocol number.
    pub protocol: u8,
    /// In `SERVICES`, whose flows it is for: 0, or [`EndpointKey::OUTSIDE`].
    pub scope: u8,
    pub pad: u32,
}

impl EndpointKey {
    /// The flows that come in from outside, where they are treated unlike those of pods and of the node: see [`Config::OUTSIDE`].
    pub const OUTSIDE: u8 = 1;

    #[inline(always)]
    #[must_use]
    pub const fn new(addr: Addr, port: PortBe, protocol: u8) -> Self {
        Self { addr, port, protocol, scope: 0, pad: 0 }
    }
}

/// Value in `SERVICES`, which is a [directory](crate::directory): which record of `CONFIGS` is in force. One aligned 64-bit store switches a frontend over.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(transparent)]
pub struct ConfigRef(pub u64);

impl ConfigRef {
    #[must_use]
    pub const fn new(index: u32, generation: u32) -> Self {
        Self((generation as u64) << 32 | index as u64)
    }

    #[inline(always)]
    #[must_use]
    pub const fn index(self) -> u32 {
        self.0 as u32
    }

    #[inline(always)]
    #[must_use]
    pub const fn generation(self) -> u32 {
        (self.0 >> 32) as u32
    }
}

/// Element of `CONFIGS`: what a frontend does with a new flow. Written once, before a [`ConfigRef`] names it; carries its own key and
/// generation, so that a reader that was delayed notices a record that was reused.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(C, align(64))]
pub struct Config {
    pub key: EndpointKey,
    pub generation: u32,
    /// Index in `SERVICE_STATS` and `CURSORS`.
    pub service: u32,
    /// Index in `FRONTENDS`.
    pub frontend: u32,
    /// First slot in `RINGS`.
    pub ring: u32,
    /// Slots of the ring; none if no backend takes new flows.
    pub ring_len: u32,
    /// First entry in `MEMBERS`.
    pub members: u32,
    pub members_len: u32,
    pub algorithm: u32,
    /// See [`Config::SNAT_NEVER`] and those after it.
    pub flags: u32,
    /// Ticks for which a client keeps its backend; 0 if it does not.
    pub affinity: u32,
}

impl Config {
    /// No flow gets an address of the node as its source but one of a backend to itself: replies come back here without it.
    pub const SNAT_NEVER: u32 = 1;
    /// Every flow of a pod of this node does.
    pub const SNAT_PODS: u32 = 1 << 1;
    /// Every flow from outside does.
    pub const SNAT_OUTSIDE: u32 = 1 << 2;
    /// Flows from outside have a record of their own, with [`EndpointKey::OUTSIDE`] in its key.
    pub const OUTSIDE: u32 = 1 << 3;
    /// Clients must be in the service's `SOURCE_RANGES`.
    pub const RANGES: u32 = 1 << 4;
    /// The node itself is, whatever its address.
    pub const RANGES_HAVE_NODE: u32 = 1 << 5;
    /// With no member, packets are dropped: there are backends, but none that these clients may have. Otherwise they are rejected.
    pub const DROP: u32 = 1 << 6;
    /// All members are on this node: see [`Backend::LOCAL`].
    pub const LOCAL: u32 = 1 << 7;
    /// The address is the node's, with a node port or a published one: the node's processes leave the port alone.
    pub const NODE: u32 = 1 << 8;
    /// Packets from outside are wrapped for backends that are not behind this node, which answer clients themselves.
    pub const DSR: u32 = 1 << 9;
}

/// How a backend is chosen, as [`Config::algorithm`] says it.
pub mod algorithm {
    pub const MAGLEV: u32 = 0;
    pub const RANDOM: u32 = 1;
    pub const ROUND_ROBIN: u32 = 2;
    /// As Maglev, by the client's address alone.
    pub const SOURCE_HASH: u32 = 3;
    /// Of two backends drawn at random, the one with fewer flows for its weight.
    pub const LEAST_CONN: u32 = 4;
}

/// Element of `RINGS`: slots of rings, each a member's index within its service.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(C, align(64))]
pub struct RingLine(pub [u16; RingLine::SLOTS as usize]);

impl RingLine {
    pub const SLOTS: u32 = 32;
}

/// Element of `MEMBERS`: backend ids of services.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(C, align(64))]
pub struct MemberLine(pub [u32; MemberLine::MEMBERS as usize]);

impl MemberLine {
    pub const MEMBERS: u32 = 16;
}

/// Element of `BACKENDS`: a backend of one service. Id 0 is none.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(C, align(64))]
pub struct Backend {
    pub addr: Addr,
    pub port: PortBe,
    pub protocol: u8,
    /// See [`Backend::SERVING`] and [`Backend::ACCEPTING`].
    pub flags: u8,
    /// Index in `SERVICE_STATS`.
    pub service: u32,
    /// What is added, wrapping, to the flows that it was ever given to have those that it has: for [`algorithm::LEAST_CONN`]. Counted
    /// every other second.
    pub base: u64,
    pub weight: u32,
    pub pad: u32,
    pub pad2: [u64; 3],
}

impl Backend {
    /// Keeps its flows. Without this, its datagrams go to another backend.
    pub const SERVING: u8 = 1;
    /// Takes new flows.
    pub const ACCEPTING: u8 = 2;
    /// Is on this node.
    pub const LOCAL: u8 = 4;
    /// Takes new flows by a policy of local backends alone: it is not in the set of the whole cluster.
    pub const ONLY_LOCAL: u8 = 8;
}

/// Element of `FRONTENDS`: what replies are translated back to. Id 0 is none.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(C)]
pub struct Frontend {
    pub addr: Addr,
    pub port: PortBe,
    pub protocol: u8,
    pub pad: u8,
    /// Index in `SERVICE_STATS`.
    pub service: u32,
    pub pad2: u64,
}

/// The frontends whose flows a backend's replies may belong to. Zero ends the list. Two of them at a time are a value in `OWNERS`, which is a
/// [directory](crate::directory).
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Owners(pub [u32; Owners::MAX]);

impl Owners {
    /// Frontends of one backend that a lost reply entry is looked for among.
    pub const MAX: usize = 8;
    /// Pairs of a list.
    pub const PAIRS: u32 = Self::MAX as u32 / 2;

    /// The key of a pair, for that of the first: all begin at the same line.
    #[inline(always)]
    #[must_use]
    pub const fn key(first: u64, pair: u32) -> u64 {
        first ^ (pair as u64) << 32
    }

    /// The pairs as they are written, up to the list's end.
    pub fn pairs(&self) -> impl Iterator<Item = u64> {
        self.0.chunks(2).map(|pair| pair[0] as u64 | (pair[1] as u64) << 32).take_while(|pair| *pair != 0)
    }

    /// The list of some pairs.
    pub fn of_pairs(pairs: impl IntoIterator<Item = u64>) -> Self {
        let mut owners = Self::default();
        for (pair, value) in owners.0.chunks_mut(2).zip(pairs) {
            pair.copy_from_slice(&[value as u32, (value >> 32) as u32]);
        }
        owners
    }
}

/// What a key of `SOURCE_RANGES` is a prefix of: a service, and the address of a client of it.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
#[repr(C)]
pub struct RangeKey {
    /// Index in `SERVICE_STATS`.
    pub service: u32,
    /// An [`Addr`], as it stands in memory.
    pub addr: [u32; 4],
}

impl RangeKey {
    /// Bits of a key before those of the address.
    pub const SERVICE_BITS: u32 = u32::BITS;

    #[inline(always)]
    #[must_use]
    pub const fn new(service: u32, Addr([a, b]): Addr) -> Self {
        const fn halves(word: u64) -> [u32; 2] {
            if cfg!(target_endian = "little") {
                [word as u32, (word >> 32) as u32]
            } else {
                [(word >> 32) as u32, word as u32]
            }
        }
        let ([a, b], [c, d]) = (halves(a), halves(b));
        Self { service, addr: [a, b, c, d] }
    }
}

/// Key of `AFFINITY`: a client of a service. What it has by one protocol says nothing of the other.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
#[repr(C)]
pub struct AffinityKey {
    /// As it was before SNAT; all zero for the node itself.
    pub client: Addr,
    /// Index in `SERVICE_STATS`.
    pub service: u32,
    pub protocol: u32,
}

impl AffinityKey {
    #[inline(always)]
    #[must_use]
    pub const fn new(client: Addr, service: u32, protocol: u8) -> Self {
        Self { client, service, protocol: protocol as u32 }
    }
}

/// Value of `AFFINITY`: the backend a client was given last, and when. One word, which is read and written as such.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(transparent)]
pub struct Affinity(pub u64);

impl Affinity {
    #[inline(always)]
    #[must_use]
    pub const fn new(backend: u32, now: Ticks) -> Self {
        Self((backend as u64) << 32 | now.0 as u64)
    }

    #[inline(always)]
    #[must_use]
    pub const fn backend(self) -> u32 {
        (self.0 >> 32) as u32
    }

    /// Ticks since then.
    #[inline(always)]
    #[must_use]
    pub const fn age(self, now: Ticks) -> u32 {
        let age = now.0.wrapping_sub(self.0 as u32);
        // CPUs read a coarse clock one after the other.
        if age > u32::MAX / 2 { 0 } else { age }
    }

    /// Whether a client of a service that has them keep their backends for so many ticks need not get this one again.
    #[inline(always)]
    #[must_use]
    pub const fn is_expired(self, now: Ticks, most: u32) -> bool {
        self.age(now) > most
    }
}

/// Value of `ADDRESSES`: what is known of an address, whatever the port.
pub mod address {
    /// Services have it: a cluster, external or load-balancer address.
    pub const SERVICE: u32 = 1;
    /// The node itself has it.
    pub const NODE: u32 = 2;
}

/// Key of `NODE_PORTS`: a port that is served at addresses of the node, whichever.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
#[repr(C)]
pub struct NodePortKey {
    pub port: PortBe,
    /// IANA protocol number.
    pub protocol: u8,
    pub pad: u8,
}

impl NodePortKey {
    #[inline(always)]
    #[must_use]
    pub const fn new(port: PortBe, protocol: u8) -> Self {
        Self { port, protocol, pad: 0 }
    }
}

/// Value of `NODE_PORTS`: of which families the addresses are.
pub mod family {
    pub const V4: u32 = 1;
    pub const V6: u32 = 2;
}

/// Element of `SERVICE_STATS`: what a CPU counted for a service. Those of a CPU lie side by side, [so many](Settings::stats_stride) of them.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(C)]
pub struct ServiceStats {
    pub flows: u64,
    /// From clients.
    pub packets_in: u64,
    pub bytes_in: u64,
    /// To clients.
    pub packets_out: u64,
    pub bytes_out: u64,
}

/// Element of `BACKEND_STATS` and of `CURSORS`.
#[derive(Debug)]
#[repr(transparent)]
pub struct Tally(pub Word);

/// Value in `INTERFACES`, which is a [directory](crate::directory) by interface index. There it is one word.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(C)]
pub struct Interface {
    /// One of [`role`].
    pub role: u8,
    /// See [`Interface::PEER`].
    pub flags: u8,
    pub pad: u16,
    /// The bridge this is a port of, or 0.
    pub master: u32,
}

impl Interface {
    /// A pod's veth (or netkit) device, whose other end is in another network namespace: `bpf_redirect_peer` reaches the pod.
    pub const PEER: u8 = 1;
    /// The XDP program is attached in the driver, so that frames can be sent there from XDP.
    pub const XDP: u8 = 2;
    /// What is behind it routing finds by its destination alone.
    pub const DIRECT: u8 = 4;

    /// Lines of `INTERFACES`.
    pub const LINES: u32 = directory::lines(8192);

    #[inline(always)]
    #[must_use]
    pub const fn to_word(self) -> u64 {
        self.role as u64 | (self.flags as u64) << 8 | (self.master as u64) << 32
    }

    #[inline(always)]
    #[must_use]
    pub const fn from_word(word: u64) -> Self {
        Self { role: word as u8, flags: (word >> 8) as u8, pad: 0, master: (word >> 32) as u32 }
    }
}

/// What an interface is to netlb.
pub mod role {
    pub const POD: u8 = 1;
    pub const UPLINK: u8 = 2;
    pub const BRIDGE: u8 = 3;
}

/// Key of `SOCKETS`: a socket, and an end that it talks to.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
#[repr(C)]
pub struct SocketKey {
    /// The kernel's name for the socket, never used again.
    pub cookie: u64,
    pub addr: Addr,
    pub port: PortBe,
    /// One of [`SocketKey::FRONTEND`] and [`SocketKey::BACKEND`].
    pub end: u8,
    pub pad: [u8; 5],
}

impl SocketKey {
    /// The end is a frontend, as the process names it: the value is the backend in its place.
    pub const FRONTEND: u8 = 0;
    /// The end is a backend, as the kernel knows it: the value is the frontend that the process is shown.
    pub const BACKEND: u8 = 1;

    #[inline(always)]
    #[must_use]
    pub const fn new(cookie: u64, addr: Addr, port: PortBe, end: u8) -> Self {
        Self { cookie, addr, port, end, pad: [0; 5] }
    }
}

/// Value of `SOCKETS`: what stands for the key's end on the other side of the hooks.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(C)]
pub struct Counterpart {
    pub addr: Addr,
    pub port: PortBe,
    pub pad: u16,
    /// The backend's index in `BACKENDS`, for both ends. It may have become another's since.
    pub backend: u32,
}

/// The only element of `META`: what a daemon must know of pinned maps before it adopts them.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(C)]
pub struct Meta {
    pub abi_version: u32,
    /// Buckets of the flow table, as a power of two.
    pub flow_buckets_log2: u32,
    /// Bits of the address filter, as a power of two.
    pub filter_bits_log2: u32,
    pub pad: u32,
    pub hash_key: HashKey,
}

/// Constants of the programs, set when they are loaded; the verifier prunes what they rule out.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(C)]
pub struct Settings {
    pub hash_key: HashKey,
    pub jiffies: Jiffies,
    /// Buckets of the flow table, less one.
    pub flow_mask: u32,
    pub filter_bits_log2: u32,
    /// Timeouts by state, in its time units.
    pub timeouts: [u32; State::COUNT],
    /// One of [`forwarding`].
    pub forwarding: u32,
    /// One of [`log_level`].
    pub log_level: u32,
    /// The ports that clients get with an address of the node.
    pub snat_ports: Ports,
    /// Whether the addresses of services that are [`owned`](Self::owned) answer echo requests.
    pub echo: u32,
    /// Lines of `SERVICES`, less one.
    pub services_mask: u32,
    /// Lines of `OWNERS`, less one.
    pub owners_mask: u32,
    /// Elements of `SERVICE_STATS` for each CPU.
    pub stats_stride: u32,
    pub pad: u32,
    /// Addresses that are services' or nobody's.
    pub owned: Networks,
    /// Addresses of the node's pods, whatever interface their packets come in on.
    pub pods: Networks,
    /// Addresses that leave with one of the node in their place, but among themselves.
    pub masquerade: Networks,
    /// Destinations where that is not so.
    pub masquerade_except: Networks,
    /// Nodes whose wrapped packets are unwrapped.
    pub dsr_from: Networks,
    /// The addresses that they get, of IPv4 and of IPv6.
    pub snat_pools: [Pool; 2],
}

/// Constants of the socket hooks, set when they are loaded.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(C)]
pub struct SocketSettings {
    /// The cookie of the network namespace whose sockets are served; 0 for all.
    pub namespace: u64,
    /// The cookie of the node's own; 0 where the kernel does not tell it.
    pub node: u64,
    /// Whether the kernel lets a program choose the error of a call (since 5.18).
    pub chooses_errors: u32,
    pub pad: u32,
}

/// How translated packets leave.
pub mod forwarding {
    /// Redirected to the interface of their next hop.
    pub const FAST: u32 = 0;
    /// By the kernel's routing.
    pub const STACK: u32 = 1;
}

/// What the programs log.
pub mod log_level {
    pub const OFF: u32 = 0;
    pub const ERROR: u32 = 1;
    pub const WARN: u32 = 2;
    pub const INFO: u32 = 3;
    pub const DEBUG: u32 = 4;
}

const _: () = {
    assert!(size_of::<EndpointKey>() == 24);
    assert!(size_of::<Config>() == 64);
    assert!(size_of::<RingLine>() == 64);
    assert!(size_of::<MemberLine>() == 64);
    assert!(size_of::<Backend>() == 64);
    assert!(size_of::<Frontend>() == 32);
    assert!(size_of::<ServiceStats>() == 40);
    assert!(size_of::<Interface>() == 8);
    assert!(size_of::<SocketKey>() == 32);
    assert!(size_of::<Counterpart>() == 24);
    assert!(size_of::<SocketSettings>() == 24);
    assert!(size_of::<Meta>() == 48);
    assert!(size_of::<Settings>() == 152 + 5 * size_of::<Networks>() + 2 * size_of::<Pool>());
    assert!(size_of::<RangeKey>() == 20);
    assert!(size_of::<AffinityKey>() == 24);
    assert!(size_of::<NodePortKey>() == 4);
};

/// What user space puts into maps and constants as plain bytes.
#[cfg(feature = "user")]
mod pod {
    use super::*;

    macro_rules! pod {
        ($($type:ty),+) => {
            // SAFETY: `repr(C)` without implicit padding, and every bit pattern is a value.
            $(unsafe impl aya::Pod for $type {})+
        };
    }
    pod!(
        Addr,
        EndpointKey,
        ConfigRef,
        Config,
        Backend,
        RangeKey,
        AffinityKey,
        Affinity,
        NodePortKey,
        ServiceStats,
        Interface,
        SocketKey,
        Counterpart,
        Meta,
        Settings,
        SocketSettings
    );
}
