//! How big each map is, from the limits of the configuration, and how the programs are set.

use std::{net::IpAddr, time::Duration};

use ipnet::IpNet;
use netlb_common::{
    addr::Addr,
    conntrack::State,
    counters,
    directory::{self, Line},
    filter,
    fragment::{self, First, HeldFrame, Region},
    hop::{self, Hop, Lead},
    maps::{
        Affinity, AffinityKey, Backend, Config, Counterpart, Frontend, Interface, MemberLine, Meta, NodePortKey,
        RangeKey, RingLine, ServiceStats, Settings, SocketKey, Tally, forwarding, log_level,
    },
    network::{Network, Networks},
    snat::{self, Pool, Ports, Source},
    table::{self, Bucket, Overflow, Record},
    time::{Jiffies, ticks_from_seconds},
};

use super::load::Options;
use crate::{
    config::{Forwarding, Limits, LogLevel, Timeouts},
    datapath::Sizes,
};

/// Ids of frontends and backends have this many bits in a flow's data word.
const ID_BITS: u32 = 21;
/// Room in `SOURCE_RANGES` for each service, and in `ADDRESSES` for more than services have. Entries take memory when they are made.
const SOURCE_RANGES: u32 = 4;
const NODE_ADDRESSES: u32 = 1024;
/// Room in `AFFINITY`: entries take memory when they are made.
const AFFINITIES: u32 = 65_536;
/// A key of a trie begins with its length.
const PREFIX_LEN_SIZE: u32 = 4;
/// The kernel hands out the elements of a map that forgets in portions to each CPU: a smaller map would forget what is in use.
const LEAST_SOCKETS: u32 = 1024;

/// The kernel's kinds of maps that are used.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Kind {
    Hash,
    /// A hash that forgets what was not used for longest.
    LruHash,
    /// Prefixes, of which the longest that fits is found.
    Trie,
    Array,
    /// An array that user space maps into its memory.
    MappedArray,
    PerCpuArray,
}

impl Kind {
    /// `enum bpf_map_type`.
    pub(super) const fn number(self) -> u32 {
        match self {
            Self::Hash => 1,
            Self::Array | Self::MappedArray => 2,
            Self::PerCpuArray => 6,
            Self::LruHash => 9,
            Self::Trie => 11,
        }
    }

    pub(super) const fn flags(self) -> u32 {
        match self {
            // `BPF_F_NO_PREALLOC`.
            Self::Hash | Self::Trie => 1,
            // `BPF_F_MMAPABLE`.
            Self::MappedArray => 1 << 10,
            Self::LruHash | Self::Array | Self::PerCpuArray => 0,
        }
    }
}

/// What a map has to be.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Spec {
    pub(super) name: &'static str,
    pub(super) kind: Kind,
    pub(super) key_size: u32,
    pub(super) value_size: u32,
    pub(super) max_entries: u32,
}

impl Spec {
    const fn hash<K, V>(name: &'static str, kind: Kind, max_entries: u32) -> Self {
        let (key_size, value_size) = (size_of::<K>() as u32, size_of::<V>() as u32);
        Self { name, kind, key_size, value_size, max_entries }
    }

    const fn trie<K, V>(name: &'static str, max_entries: u32) -> Self {
        let (key_size, value_size) = (PREFIX_LEN_SIZE + size_of::<K>() as u32, size_of::<V>() as u32);
        Self { name, kind: Kind::Trie, key_size, value_size, max_entries }
    }

    const fn array<V>(name: &'static str, kind: Kind, max_entries: u32) -> Self {
        Self { name, kind, key_size: 4, value_size: size_of::<V>() as u32, max_entries }
    }
}

/// The size of everything.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Layout {
    pub(super) sizes: Sizes,
    pub(super) flow_buckets_log2: u32,
    /// Entries of `SOCKETS`.
    sockets: u32,
    pub(super) cpus: u32,
}

impl Layout {
    /// For all CPUs that there may be.
    pub(super) fn new(limits: &Limits, cpus: u32) -> Self {
        let Limits { services, backends, flows, ring_slots, sockets } = *limits;
        let addresses = u64::from(services) + u64::from(backends);
        let sizes = Sizes {
            services,
            // Where all are replaced at once, some wait for room until packets are done with the old ones.
            configs: services + services / 2 + 64,
            // Number 0 is none, and a removed frontend keeps its number until its flows are gone.
            frontends: (2 * services + 1).min(1 << ID_BITS),
            // A service has one entry at least. Each has counters for every CPU.
            numbers: services + services / 2 + 64,
            backends: backends + 1,
            owners: backends,
            ring_slots: ring_slots.next_multiple_of(RingLine::SLOTS),
            // A service's new members are written before the old ones are out of use, and regions may end on a line's end.
            members: (backends + backends / 2 + MemberLine::MEMBERS * services).next_multiple_of(MemberLine::MEMBERS),
            addresses: services + NODE_ADDRESSES,
            source_ranges: (SOURCE_RANGES * services).max(NODE_ADDRESSES),
            affinities: AFFINITIES,
            // One at most for each frontend.
            node_ports: services,
            filter_bits_log2: filter::bits_log2(addresses),
        };
        Self { sizes, flow_buckets_log2: flow_buckets_log2(flows), sockets: sockets.max(LEAST_SOCKETS), cpus }
    }

    /// The same for programs that serve no sockets.
    pub(super) const fn without_sockets(self) -> Self {
        Self { sockets: LEAST_SOCKETS, ..self }
    }

    pub(super) const fn flow_buckets(&self) -> u32 {
        1 << self.flow_buckets_log2
    }

    pub(super) const fn flow_records(&self) -> u32 {
        self.flow_buckets() * table::SLOTS as u32
    }

    pub(super) const fn flow_overflows(&self) -> u32 {
        self.flow_buckets() / Overflow::BUCKETS
    }

    pub(super) const fn service_stats(&self) -> u32 {
        self.cpus.saturating_mul(self.sizes.numbers)
    }

    pub(super) const fn filter_words(&self) -> u32 {
        (1 << self.sizes.filter_bits_log2) / filter::WORD_BITS
    }

    /// Every map that is pinned, `META` last.
    pub(super) fn maps(&self) -> Vec<Spec> {
        use Kind::{Array, Hash, LruHash, MappedArray, PerCpuArray};
        let Sizes { services, configs, frontends, numbers, backends, owners, ring_slots, members, .. } = self.sizes;
        let Sizes { addresses, source_ranges, affinities, node_ports, .. } = self.sizes;
        vec![
            Spec::array::<Line>("SERVICES", MappedArray, directory::lines(services)),
            Spec::array::<Config>("CONFIGS", MappedArray, configs),
            Spec::array::<RingLine>("RINGS", MappedArray, ring_slots / RingLine::SLOTS),
            Spec::array::<MemberLine>("MEMBERS", MappedArray, members / MemberLine::MEMBERS),
            Spec::array::<Backend>("BACKENDS", MappedArray, backends),
            Spec::array::<Frontend>("FRONTENDS", MappedArray, frontends),
            Spec::array::<Line>("OWNERS", MappedArray, directory::lines(owners)),
            Spec::array::<u64>("FILTER", MappedArray, self.filter_words()),
            Spec::array::<Bucket>("FLOWS", MappedArray, self.flow_buckets()),
            Spec::array::<Record>("FLOW_RECORDS", MappedArray, self.flow_records()),
            Spec::array::<Overflow>("FLOW_OVERFLOWS", MappedArray, self.flow_overflows()),
            Spec::array::<ServiceStats>("SERVICE_STATS", MappedArray, self.service_stats()),
            Spec::array::<Tally>("CURSORS", MappedArray, numbers),
            Spec::array::<Tally>("BACKEND_STATS", MappedArray, backends),
            Spec::array::<[u64; counters::ROOM]>("COUNTERS", PerCpuArray, 1),
            Spec::array::<Line>("INTERFACES", MappedArray, Interface::LINES),
            Spec::array::<Hop>("HOPS", MappedArray, hop::COUNT),
            Spec::array::<Lead>("LEADS", Array, hop::LEADS),
            Spec::array::<Source>("SNAT_ADDRESSES", MappedArray, snat::ADDRESSES),
            Spec::hash::<SocketKey, Counterpart>("SOCKETS", LruHash, self.sockets),
            Spec::hash::<Addr, u32>("ADDRESSES", Hash, addresses),
            Spec::trie::<RangeKey, u32>("SOURCE_RANGES", source_ranges),
            Spec::hash::<AffinityKey, Affinity>("AFFINITY", Hash, affinities),
            Spec::hash::<NodePortKey, u32>("NODE_PORTS", Hash, node_ports),
            Spec::hash::<u64, First>("FRAGMENTS", LruHash, fragment::DATAGRAMS),
            Spec::array::<Region>("HELD", Array, Region::COUNT),
            Spec::array::<HeldFrame>("HELD_FRAMES", Array, Region::COUNT * Region::PLACES),
            Spec::array::<Meta>("META", Array, 1),
        ]
    }
}

/// A flow has two slots, a bucket four, and at 60 % occupancy next to no insert fails.
pub(super) fn flow_buckets_log2(flows: u32) -> u32 {
    let buckets = (u64::from(flows) * 2 * 10).div_ceil(6 * table::SLOTS as u64);
    buckets.next_power_of_two().ilog2().clamp(6, table::MAX_BUCKETS_LOG2)
}

/// Timeouts by state, each in the state's own units.
pub(super) fn timeouts(timeouts: &Timeouts) -> [u32; State::COUNT] {
    let Timeouts { tcp_syn, tcp_established, tcp_closing, tcp_half_closed, udp_one_way, udp_both_ways } = *timeouts;
    let mut units = [0; State::COUNT];
    for (state, timeout) in [
        (State::SYN_SENT, tcp_syn),
        (State::SYN_RECEIVED, tcp_syn),
        (State::ESTABLISHED, tcp_established),
        (State::FIN_FORWARD, tcp_half_closed),
        (State::FIN_REPLY, tcp_half_closed),
        (State::CLOSING, tcp_closing),
        (State::RESET_FORWARD, tcp_closing),
        (State::RESET_REPLY, tcp_closing),
        (State::UDP_ONE_WAY, udp_one_way),
        (State::UDP_BOTH_WAYS, udp_both_ways),
    ] {
        units[usize::from(state.0)] = in_units(state, timeout);
    }
    units
}

fn in_units(state: State, timeout: Duration) -> u32 {
    ticks_from_seconds(timeout.as_secs()).div_ceil(1 << state.unit_shift()) as u32
}

/// Networks as the programs know them.
pub(super) fn networks(all: &[IpNet]) -> Networks {
    let mut networks = Networks::NONE;
    for (slot, net) in networks.all.iter_mut().zip(all) {
        *slot = match net {
            IpNet::V4(net) => Network::new(Addr::from_v4(net.addr().octets()), 96 + u32::from(net.prefix_len())),
            IpNet::V6(net) => Network::new(Addr::from_bytes(net.addr().octets()), net.prefix_len().into()),
        };
        networks.len += 1;
    }
    networks
}

/// Addresses of one family as the programs know them.
fn pool<'a>(addresses: impl Iterator<Item = &'a IpAddr>) -> Pool {
    let mut pool = Pool::NONE;
    for (slot, address) in pool.all.iter_mut().zip(addresses) {
        *slot = match address {
            IpAddr::V4(ip) => Addr::from_v4(ip.octets()),
            IpAddr::V6(ip) => Addr::from_bytes(ip.octets()),
        };
        pool.len += 1;
    }
    pool
}

/// The constants of the programs.
pub(super) fn settings(
    layout: &Layout,
    meta: &Meta,
    timeouts: &[u32; State::COUNT],
    jiffies: Jiffies,
    options: &Options<'_>,
) -> Settings {
    let (first, last) = options.snat.ports;
    Settings {
        hash_key: meta.hash_key,
        jiffies,
        flow_mask: (1 << meta.flow_buckets_log2) - 1,
        filter_bits_log2: meta.filter_bits_log2,
        timeouts: *timeouts,
        forwarding: match options.forwarding {
            Forwarding::Fast => forwarding::FAST,
            Forwarding::Stack => forwarding::STACK,
        },
        log_level: match options.log {
            LogLevel::Off => log_level::OFF,
            LogLevel::Error => log_level::ERROR,
            LogLevel::Warn => log_level::WARN,
            LogLevel::Info => log_level::INFO,
            LogLevel::Debug => log_level::DEBUG,
        },
        snat_ports: Ports { first, more: last - first },
        echo: u32::from(options.echo),
        services_mask: directory::lines(layout.sizes.services) - 1,
        owners_mask: directory::lines(layout.sizes.owners) - 1,
        stats_stride: layout.sizes.numbers,
        pad: 0,
        owned: options.owned,
        pods: options.pods,
        masquerade: options.masquerade.0,
        masquerade_except: options.masquerade.1,
        dsr_from: options.dsr_from,
        snat_pools: [IpAddr::is_ipv4, IpAddr::is_ipv6]
            .map(|is| pool(options.snat.addresses.iter().filter(|ip| is(ip)))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_limits_give_these_sizes() {
        let layout = Layout::new(&Limits::default(), 2);
        assert_eq!(layout.flow_buckets_log2, 18);
        let sizes: Vec<_> = layout.maps().iter().map(|map| (map.name, map.max_entries)).collect();
        assert_eq!(
            sizes,
            [
                ("SERVICES", 8192),
                ("CONFIGS", 24_640),
                ("RINGS", 364_800),
                ("MEMBERS", 28_672),
                ("BACKENDS", 131_073),
                ("FRONTENDS", 32_769),
                ("OWNERS", 65_536),
                ("FILTER", 32_768),
                ("FLOWS", 262_144),
                ("FLOW_RECORDS", 1_048_576),
                ("FLOW_OVERFLOWS", 32_768),
                ("SERVICE_STATS", 49_280),
                ("CURSORS", 24_640),
                ("BACKEND_STATS", 131_073),
                ("COUNTERS", 1),
                ("INTERFACES", 4096),
                ("HOPS", 16_384),
                ("LEADS", 4096),
                ("SNAT_ADDRESSES", 256),
                ("SOCKETS", 65_536),
                ("ADDRESSES", 17_408),
                ("SOURCE_RANGES", 65_536),
                ("AFFINITY", 65_536),
                ("NODE_PORTS", 16_384),
                ("FRAGMENTS", 4096),
                ("HELD", 4),
                ("HELD_FRAMES", 192),
                ("META", 1),
            ]
        );
    }

    #[test]
    fn the_smallest_and_largest_limits_stay_within_what_the_programs_address() {
        let least = Layout::new(&Limits { services: 1, backends: 1, flows: 1, ring_slots: 1, sockets: 1 }, 1);
        assert_eq!(least.flow_buckets(), 64);
        assert_eq!(least.sizes.ring_slots, 32);
        assert!(least.maps().iter().all(|map| map.max_entries > 0));
        let most = Limits {
            services: 1 << 20,
            backends: (1 << 21) - 1,
            flows: 1 << 26,
            ring_slots: 1 << 30,
            sockets: 1 << 24,
        };
        let most = Layout::new(&most, 512);
        assert_eq!(most.flow_buckets_log2, table::MAX_BUCKETS_LOG2);
        assert_eq!(most.flow_records(), 1 << 28);
        assert_eq!((most.sizes.backends, most.sizes.frontends), (1 << ID_BITS, 1 << ID_BITS));
    }

    #[test]
    fn flows_fill_their_table_to_at_most_sixty_percent() {
        for flows in [1, 64, 1000, 52_429, 1_048_576, 20_000_000] {
            let slots = 4.0 * f64::from(1 << flow_buckets_log2(flows));
            let occupancy = 2.0 * f64::from(flows) / slots;
            assert!(occupancy <= 0.6 && (occupancy > 0.29 || slots == 256.0), "{flows} flows: {occupancy}");
        }
    }

    #[test]
    fn timeouts_are_in_the_units_of_their_state_and_within_a_quarter_of_the_wrap() {
        let units = timeouts(&Timeouts::default());
        let of = |state: State| units[usize::from(state.0)];
        assert_eq!(of(State::SYN_SENT), 56);
        // 2 h 13 min are 7432 ticks.
        assert_eq!(of(State::ESTABLISHED), 7432 / 4);
        assert_eq!(of(State::RESET_REPLY), of(State::CLOSING));
        assert_eq!((of(State::FREE), of(State::CLAIMING)), (0, 0));
        let hour = Duration::from_secs(3600);
        let most = timeouts(&Timeouts {
            tcp_syn: hour,
            tcp_established: Duration::from_secs(4 * 3600 + 30 * 60),
            tcp_closing: hour,
            tcp_half_closed: hour,
            udp_one_way: hour,
            udp_both_ways: hour,
        });
        assert!(most.iter().all(|units| *units <= (1 << 14) / 4), "{most:?}");
    }
}
