//! The data path: the BPF programs and maps, and what fills them.
//!
//! [`Programmer`] turns the desired state into records, in an order that never shows a packet half a change; [`Maps`] is all it knows of
//! the kernel. [`kernel`] is the one module that touches aya.

use std::{
    io,
    sync::{Arc, atomic::AtomicBool},
};

use netlb_common::{
    addr::Addr,
    maps::{Affinity, AffinityKey, Backend, Config, ConfigRef, EndpointKey, Frontend, NodePortKey, Owners, RangeKey},
    table,
};

use crate::dataplane::ServiceCounters;

pub use self::programmer::Programmer;

pub mod kernel;
mod programmer;
pub(crate) mod reserved;

/// How many records each map has room for. Index 0 of backends, frontends and services is never used: it means none.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Sizes {
    /// Entries of `SERVICES`: frontends, twice where flows from outside are treated in their own way.
    pub services: u32,
    /// Elements of `CONFIGS`: more than frontends, since an old record stays until no packet reads it.
    pub configs: u32,
    pub frontends: u32,
    /// Numbers of services: more than there can be, since one that is removed keeps its number until its flows are gone.
    pub numbers: u32,
    pub backends: u32,
    /// Entries of `OWNERS`.
    pub owners: u32,
    /// Slots of `RINGS`, 16-bit each.
    pub ring_slots: u32,
    /// Entries of `MEMBERS`.
    pub members: u32,
    pub addresses: u32,
    pub source_ranges: u32,
    pub affinities: u32,
    pub node_ports: u32,
    pub filter_bits_log2: u32,
}

/// Some entries of a map, and where the next ones begin if these are not the last.
pub type Portion<K, V> = (Vec<(K, V)>, Option<u32>);

/// The maps as the control loop writes them: the kernel's, or their twin in memory.
///
/// Records of arrays are plain memory that the programs read at any moment. Indexes are below the [`Sizes`].
pub trait Maps: Send {
    fn sizes(&self) -> Sizes;

    fn service(&self, key: &EndpointKey) -> Option<ConfigRef>;
    /// Everything in `SERVICES` that names a record of its own.
    fn services(&self) -> io::Result<Vec<(EndpointKey, ConfigRef)>>;
    /// Switches a frontend over: the moment new flows see a change.
    fn set_service(&mut self, key: &EndpointKey, value: ConfigRef) -> io::Result<()>;
    fn remove_service(&mut self, key: &EndpointKey) -> io::Result<()>;
    /// Removes everything but these, and says how many entries that were.
    fn retain_services(&mut self, keys: &mut dyn Iterator<Item = EndpointKey>) -> usize;

    fn config(&self, index: u32) -> Config;
    /// Writes a record no packet reads yet: generation last.
    fn set_config(&mut self, index: u32, config: &Config);

    fn backend(&self, id: u32) -> Backend;
    fn set_backend(&mut self, id: u32, backend: &Backend);
    /// Changes the flags of a record in use.
    fn set_backend_flags(&mut self, id: u32, flags: u8);
    /// The same for its weight.
    fn set_backend_weight(&mut self, id: u32, weight: u32);
    /// The same for [`Backend::base`].
    fn set_backend_base(&mut self, id: u32, base: u64);

    fn frontend(&self, id: u32) -> Frontend;
    fn set_frontend(&mut self, id: u32, frontend: &Frontend);

    /// What `OWNERS` has of a backend.
    fn owners(&self, key: &EndpointKey) -> Owners;
    /// Sets some lists, which are not empty. After an error some of them may be set.
    fn set_owners(&mut self, lists: &[(EndpointKey, Owners)]) -> io::Result<()>;
    fn remove_owners(&mut self, key: &EndpointKey);
    /// Removes the lists of all backends but these.
    fn retain_owners(&mut self, keys: &mut dyn Iterator<Item = EndpointKey>);

    /// Everything in `ADDRESSES`.
    fn addresses(&self) -> io::Result<Vec<(Addr, u32)>>;
    fn set_address(&mut self, addr: &Addr, flags: u32) -> io::Result<()>;
    fn remove_address(&mut self, addr: &Addr) -> io::Result<()>;

    /// Everything in `NODE_PORTS`.
    fn node_ports(&self) -> io::Result<Vec<(NodePortKey, u32)>>;
    fn set_node_port(&mut self, key: &NodePortKey, families: u32) -> io::Result<()>;
    fn remove_node_port(&mut self, key: &NodePortKey) -> io::Result<()>;

    /// Everything in `SOURCE_RANGES`, with the bits of each key that count.
    fn source_ranges(&self) -> io::Result<Vec<(u32, RangeKey)>>;
    fn set_source_range(&mut self, bits: u32, key: &RangeKey) -> io::Result<()>;
    fn remove_source_range(&mut self, bits: u32, key: &RangeKey) -> io::Result<()>;

    /// At most this many entries of `AFFINITY`.
    fn affinities(&self, from: Option<u32>, most: usize) -> io::Result<Portion<AffinityKey, Affinity>>;
    /// Removes an entry, unless a packet has changed it.
    fn remove_affinity(&mut self, key: &AffinityKey, seen: Affinity) -> io::Result<()>;

    fn ring(&self, offset: u32, len: u32) -> Vec<u16>;
    fn write_ring(&mut self, offset: u32, slots: &[u16]);
    fn members(&self, offset: u32, len: u32) -> Vec<u32>;
    fn write_members(&mut self, offset: u32, ids: &[u32]);

    /// Sets or clears one bit of the address filter.
    fn set_filter_bit(&mut self, bit: u32, set: bool);
    /// Clears the whole filter of bits that are not in this bitmap, and sets those that are.
    fn write_filter(&mut self, words: &[u64]);

    /// Sums over all CPUs.
    fn service_stats(&self, service: u32) -> ServiceCounters;
    fn clear_service_stats(&mut self, service: u32);
    /// New flows a backend got.
    fn backend_flows(&self, id: u32) -> u64;
    fn clear_backend_flows(&mut self, id: u32);

    /// An address of the node that flows were given as their source.
    fn source(&self, index: u32) -> Option<Addr>;

    /// The flow table, in place.
    fn flows(&self) -> &dyn table::Storage;

    /// Returns when no packet is under way that could have read what was replaced before the call.
    fn grace(&self);
    /// The same without the wait: what it returns becomes true then.
    fn begin_grace(&self) -> Arc<AtomicBool>;
}
