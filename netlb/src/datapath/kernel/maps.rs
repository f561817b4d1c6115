//! [`Maps`] on the kernel's maps.

use std::{
    fmt, io,
    mem::offset_of,
    os::fd::{AsFd as _, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering, fence},
    },
    thread,
};

use anyhow::Context as _;
use aya::{
    Pod,
    maps::{
        HashMap, Map, MapData, MapError,
        lpm_trie::{Key, LpmTrie},
    },
};
use netlb_common::{
    addr::Addr,
    conntrack::State,
    filter,
    maps::{
        Affinity, AffinityKey, Backend, Config, ConfigRef, EndpointKey, Frontend, NodePortKey, Owners, RangeKey,
        ServiceStats, Tally,
    },
    snat::{self, Source},
    table::{Bucket, Overflow, Place, Record, Storage},
};

use super::{
    directory::{OwnerPairs, Services},
    layout::Layout,
    load::Memory,
    mapping::Mapping,
    syscall::Grace,
};
use crate::{
    datapath::{Maps, Portion, Sizes},
    dataplane::ServiceCounters,
};

/// The maps of the loaded programs.
pub struct KernelMaps {
    sizes: Sizes,
    services: Services,
    owners: OwnerPairs,
    addresses: HashMap<MapData, Addr, u32>,
    node_ports: HashMap<MapData, NodePortKey, u32>,
    source_ranges: LpmTrie<MapData, RangeKey, u32>,
    affinities: HashMap<MapData, AffinityKey, Affinity>,
    /// The same map.
    affinities_fd: OwnedFd,
    configs: Mapping<Config>,
    backends: Mapping<Backend>,
    frontends: Mapping<Frontend>,
    rings: Mapping<AtomicU16>,
    members: Mapping<AtomicU32>,
    filter: Mapping<AtomicU64>,
    service_stats: Mapping<ServiceStats>,
    cpus: u32,
    backend_stats: Mapping<Tally>,
    sources: Mapping<Source>,
    flows: FlowTable,
    grace: Arc<Grace>,
}

impl fmt::Debug for KernelMaps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KernelMaps").field("sizes", &self.sizes).finish_non_exhaustive()
    }
}

/// The flow table, mapped.
#[derive(Debug)]
struct FlowTable {
    buckets: Mapping<Bucket>,
    records: Mapping<Record>,
    overflows: Mapping<Overflow>,
    mask: u32,
    timeouts: [u32; State::COUNT],
}

impl Storage for FlowTable {
    fn mask(&self) -> u32 {
        self.mask
    }

    fn bucket(&self, index: u32) -> Option<&Bucket> {
        self.buckets.get(index)
    }

    fn record(&self, place: Place) -> Option<&Record> {
        self.records.get(place.0)
    }

    fn overflow(&self, index: u32) -> Option<&Overflow> {
        self.overflows.get(index)
    }

    fn timeout(&self, state: State) -> u32 {
        self.timeouts[usize::from(state.0) % State::COUNT]
    }
}

/// An error of aya's as the kernel's, where it is one.
pub(super) fn io_error(error: MapError) -> io::Error {
    match error {
        MapError::SyscallError(error) => error.io_error,
        MapError::KeyNotFound => io::ErrorKind::NotFound.into(),
        error => io::Error::other(error),
    }
}

/// A hash, opened once more.
pub(super) fn hash<K: Pod, V: Pod>(memory: &Memory, name: &str) -> anyhow::Result<HashMap<MapData, K, V>> {
    Ok(Map::HashMap(memory.map(name)?).try_into()?)
}

/// Maps an array into memory. The mapping keeps the map.
pub(super) fn mapped<T>(memory: &Memory, name: &str, len: u32) -> anyhow::Result<Mapping<T>> {
    Mapping::new(memory.descriptor(name)?, len).with_context(|| format!("cannot map {name} into memory"))
}

impl KernelMaps {
    pub(super) fn new(memory: &Memory, layout: &Layout, timeouts: &[u32; State::COUNT]) -> anyhow::Result<Self> {
        let sizes = layout.sizes;
        Ok(Self {
            sizes,
            services: Services::new(memory)?,
            owners: OwnerPairs::new(memory)?,
            addresses: hash(memory, "ADDRESSES")?,
            node_ports: hash(memory, "NODE_PORTS")?,
            source_ranges: Map::LpmTrie(memory.map("SOURCE_RANGES")?).try_into()?,
            affinities: hash(memory, "AFFINITY")?,
            affinities_fd: memory.descriptor("AFFINITY")?.try_clone_to_owned()?,
            configs: mapped(memory, "CONFIGS", sizes.configs)?,
            backends: mapped(memory, "BACKENDS", sizes.backends)?,
            frontends: mapped(memory, "FRONTENDS", sizes.frontends)?,
            rings: mapped(memory, "RINGS", sizes.ring_slots)?,
            members: mapped(memory, "MEMBERS", sizes.members)?,
            filter: mapped(memory, "FILTER", layout.filter_words())?,
            service_stats: mapped(memory, "SERVICE_STATS", layout.service_stats())?,
            cpus: layout.cpus,
            backend_stats: mapped(memory, "BACKEND_STATS", sizes.backends)?,
            sources: mapped(memory, "SNAT_ADDRESSES", snat::ADDRESSES)?,
            flows: FlowTable {
                buckets: mapped(memory, "FLOWS", layout.flow_buckets())?,
                records: mapped(memory, "FLOW_RECORDS", layout.flow_records())?,
                overflows: mapped(memory, "FLOW_OVERFLOWS", layout.flow_overflows())?,
                mask: layout.flow_buckets() - 1,
                timeouts: *timeouts,
            },
            grace: Arc::new(Grace::new()?),
        })
    }

    /// A backend's flags, which change while packets read the record.
    fn flags(&self, id: u32) -> &AtomicU8 {
        let field = self.backends.field(id, offset_of!(Backend, flags));
        // SAFETY: inside of the mapping, and all access is atomic.
        unsafe { AtomicU8::from_ptr(field) }
    }

    fn generation(&self, index: u32) -> &AtomicU32 {
        let field = self.configs.field(index, offset_of!(Config, generation));
        // SAFETY: as above.
        unsafe { AtomicU32::from_ptr(field) }
    }
}

impl Maps for KernelMaps {
    fn sizes(&self) -> Sizes {
        self.sizes
    }

    fn service(&self, key: &EndpointKey) -> Option<ConfigRef> {
        self.services.get(key)
    }

    fn services(&self) -> io::Result<Vec<(EndpointKey, ConfigRef)>> {
        let config = |index| (index < self.sizes.configs).then(|| self.configs.read(index));
        Ok(self.services.all(config).collect())
    }

    fn set_service(&mut self, key: &EndpointKey, value: ConfigRef) -> io::Result<()> {
        self.services.set(key, value)
    }

    fn remove_service(&mut self, key: &EndpointKey) -> io::Result<()> {
        self.services.remove(key);
        Ok(())
    }

    fn retain_services(&mut self, keys: &mut dyn Iterator<Item = EndpointKey>) -> usize {
        self.services.retain(keys)
    }

    fn config(&self, index: u32) -> Config {
        self.configs.read(index)
    }

    fn set_config(&mut self, index: u32, config: &Config) {
        // A program that was delayed since the record's last use sees that it is another's, before any of it changes.
        self.generation(index).store(0, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        self.configs.write(index, &Config { generation: 0, ..*config });
        fence(Ordering::SeqCst);
        self.generation(index).store(config.generation, Ordering::SeqCst);
    }

    fn backend(&self, id: u32) -> Backend {
        self.backends.read(id)
    }

    fn set_backend(&mut self, id: u32, backend: &Backend) {
        self.flags(id).store(0, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        self.backends.write(id, &Backend { flags: 0, ..*backend });
        fence(Ordering::SeqCst);
        self.flags(id).store(backend.flags, Ordering::SeqCst);
    }

    fn set_backend_flags(&mut self, id: u32, flags: u8) {
        self.flags(id).store(flags, Ordering::SeqCst);
    }

    fn set_backend_weight(&mut self, id: u32, weight: u32) {
        let field = self.backends.field(id, offset_of!(Backend, weight));
        // SAFETY: inside of the mapping, and all access is atomic.
        unsafe { AtomicU32::from_ptr(field) }.store(weight, Ordering::Relaxed);
    }

    fn set_backend_base(&mut self, id: u32, base: u64) {
        let field = self.backends.field(id, offset_of!(Backend, base));
        // SAFETY: as above.
        unsafe { AtomicU64::from_ptr(field) }.store(base, Ordering::Relaxed);
    }

    fn frontend(&self, id: u32) -> Frontend {
        self.frontends.read(id)
    }

    fn set_frontend(&mut self, id: u32, frontend: &Frontend) {
        self.frontends.write(id, frontend);
        fence(Ordering::SeqCst);
    }

    fn owners(&self, key: &EndpointKey) -> Owners {
        self.owners.get(key)
    }

    fn set_owners(&mut self, lists: &[(EndpointKey, Owners)]) -> io::Result<()> {
        lists.iter().try_for_each(|(key, owners)| self.owners.set(key, *owners))
    }

    fn remove_owners(&mut self, key: &EndpointKey) {
        self.owners.remove(key);
    }

    fn retain_owners(&mut self, keys: &mut dyn Iterator<Item = EndpointKey>) {
        self.owners.retain(keys);
    }

    fn addresses(&self) -> io::Result<Vec<(Addr, u32)>> {
        self.addresses.iter().collect::<Result<_, _>>().map_err(io_error)
    }

    fn set_address(&mut self, addr: &Addr, flags: u32) -> io::Result<()> {
        self.addresses.insert(addr, flags, 0).map_err(io_error)
    }

    fn remove_address(&mut self, addr: &Addr) -> io::Result<()> {
        super::pins::ignore_missing(self.addresses.remove(addr).map_err(io_error))
    }

    fn node_ports(&self) -> io::Result<Vec<(NodePortKey, u32)>> {
        self.node_ports.iter().collect::<Result<_, _>>().map_err(io_error)
    }

    fn set_node_port(&mut self, key: &NodePortKey, families: u32) -> io::Result<()> {
        self.node_ports.insert(key, families, 0).map_err(io_error)
    }

    fn remove_node_port(&mut self, key: &NodePortKey) -> io::Result<()> {
        super::pins::ignore_missing(self.node_ports.remove(key).map_err(io_error))
    }

    fn source_ranges(&self) -> io::Result<Vec<(u32, RangeKey)>> {
        let keys = self.source_ranges.keys().map(|key| key.map(|key| (key.prefix_len(), key.data())));
        keys.collect::<Result<_, _>>().map_err(io_error)
    }

    fn set_source_range(&mut self, bits: u32, key: &RangeKey) -> io::Result<()> {
        self.source_ranges.insert(&Key::new(bits, *key), 1, 0).map_err(io_error)
    }

    fn remove_source_range(&mut self, bits: u32, key: &RangeKey) -> io::Result<()> {
        super::pins::ignore_missing(self.source_ranges.remove(&Key::new(bits, *key)).map_err(io_error))
    }

    fn affinities(&self, from: Option<u32>, most: usize) -> io::Result<Portion<AffinityKey, Affinity>> {
        super::syscall::lookup_batch(self.affinities_fd.as_fd(), from, most)
    }

    fn remove_affinity(&mut self, key: &AffinityKey, seen: Affinity) -> io::Result<()> {
        match self.affinities.get(key, 0).map_err(io_error) {
            Ok(now) if now == seen => super::pins::ignore_missing(self.affinities.remove(key).map_err(io_error)),
            Ok(_) => Ok(()),
            Err(error) => super::pins::ignore_missing(Err(error)),
        }
    }

    fn ring(&self, offset: u32, len: u32) -> Vec<u16> {
        (offset..offset + len).map(|slot| self.rings.at(slot).load(Ordering::Relaxed)).collect()
    }

    fn write_ring(&mut self, offset: u32, slots: &[u16]) {
        for (slot, member) in (offset..).zip(slots) {
            self.rings.at(slot).store(*member, Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
    }

    fn members(&self, offset: u32, len: u32) -> Vec<u32> {
        (offset..offset + len).map(|member| self.members.at(member).load(Ordering::Relaxed)).collect()
    }

    fn write_members(&mut self, offset: u32, ids: &[u32]) {
        for (member, id) in (offset..).zip(ids) {
            self.members.at(member).store(*id, Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
    }

    fn set_filter_bit(&mut self, bit: u32, set: bool) {
        let mask = 1 << (bit % filter::WORD_BITS);
        let word = self.filter.at(bit / filter::WORD_BITS);
        if set {
            word.fetch_or(mask, Ordering::SeqCst);
        } else {
            word.fetch_and(!mask, Ordering::SeqCst);
        }
    }

    fn write_filter(&mut self, words: &[u64]) {
        for (number, word) in (0..).zip(words) {
            self.filter.at(number).store(*word, Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
    }

    fn service_stats(&self, service: u32) -> ServiceCounters {
        let mut sum = ServiceCounters::default();
        for cpu in 0..self.cpus {
            let stats = self.service_stats.read(cpu * self.sizes.numbers + service);
            sum.flows += stats.flows;
            sum.packets_in += stats.packets_in;
            sum.bytes_in += stats.bytes_in;
            sum.packets_out += stats.packets_out;
            sum.bytes_out += stats.bytes_out;
        }
        sum
    }

    fn clear_service_stats(&mut self, service: u32) {
        for cpu in 0..self.cpus {
            self.service_stats.write(cpu * self.sizes.numbers + service, &ServiceStats::default());
        }
    }

    fn backend_flows(&self, id: u32) -> u64 {
        self.backend_stats.at(id).0.load()
    }

    fn clear_backend_flows(&mut self, id: u32) {
        self.backend_stats.at(id).0.store(0);
    }

    fn source(&self, index: u32) -> Option<Addr> {
        self.sources.get(index)?.addr()
    }

    fn flows(&self) -> &dyn Storage {
        &self.flows
    }

    fn grace(&self) {
        fence(Ordering::SeqCst);
        self.grace.wait();
    }

    fn begin_grace(&self) -> Arc<AtomicBool> {
        fence(Ordering::SeqCst);
        let (grace, is_over) = (Arc::clone(&self.grace), Arc::new(AtomicBool::new(false)));
        let tell = Arc::clone(&is_over);
        let wait = move || {
            grace.wait();
            tell.store(true, Ordering::Release);
        };
        if let Err(error) = thread::Builder::new().name("grace".to_owned()).spawn(wait) {
            tracing::debug!("cannot start a thread: {error}");
            self.grace();
            is_over.store(true, Ordering::Release);
        }
        is_over
    }
}
