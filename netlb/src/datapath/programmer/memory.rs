//! The maps in memory. They watch that nothing changes which a packet could be reading, and that nothing is in force
//! before it is whole.

use std::{
    collections::{HashMap, HashSet},
    io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
};

use netlb_common::{
    conntrack::{Direction, Segment, State},
    filter::Kind,
    flow::Fingerprint,
    maps::{Affinity, AffinityKey, Backend, Config, ConfigRef, EndpointKey, Frontend, NodePortKey, Owners, RangeKey},
    snat::Snat,
    table::{self, Bucket, Data, Flow, New, Operations, Overflow, Place, Record, SLOTS, Storage, is_live},
    time::Ticks,
};

use super::*;
use crate::{datapath::Portion, dataplane::ServiceCounters};

/// A write, for tests of the order.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Op {
    Frontend(u32),
    Backend(u32),
    Flags(u32, u8),
    Ring(u32),
    Members(u32),
    Config(u32),
    Owners(EndpointKey),
    RemoveOwners(EndpointKey),
    FilterBit(u32, bool),
    Service(EndpointKey),
    RemoveService(EndpointKey),
    Address(Addr, u32),
    RemoveAddress(Addr),
    Range(u32, RangeKey),
    RemoveRange(u32, RangeKey),
    Grace,
}

/// A clock that tests set.
#[derive(Clone, Debug)]
pub(super) struct TestClock(Arc<AtomicU32>);

impl TestClock {
    pub(super) fn new() -> Self {
        Self(Arc::new(AtomicU32::new(1000)))
    }

    pub(super) fn now(&self) -> Ticks {
        Ticks(self.0.load(Ordering::Relaxed))
    }

    pub(super) fn advance(&self, ticks: u32) {
        self.0.fetch_add(ticks, Ordering::Relaxed);
    }
}

pub(super) struct MemoryMaps {
    sizes: Sizes,
    pub(super) services: HashMap<EndpointKey, ConfigRef>,
    configs: Vec<Config>,
    backends: Vec<Backend>,
    frontends: Vec<Frontend>,
    pub(super) owners: HashMap<EndpointKey, Owners>,
    pub(super) addresses: HashMap<Addr, u32>,
    pub(super) node_ports: HashMap<NodePortKey, u32>,
    pub(super) ranges: HashSet<(u32, RangeKey)>,
    pub(super) affinities: Vec<(AffinityKey, Affinity)>,
    rings: Vec<u16>,
    members: Vec<u32>,
    filter: Vec<u64>,
    pub(super) service_stats: Vec<ServiceCounters>,
    pub(super) backend_flows: Vec<u64>,
    /// Those that flows were given, from index 1 on.
    pub(super) sources: Vec<Addr>,
    pub(super) flows: FlowTable,
    clock: TestClock,
    /// Records that packets under way may still read, though `SERVICES` names them no more.
    lingering: Mutex<HashSet<u32>>,
    log: Mutex<Vec<Op>>,
    /// Frontends that the kernel fails to switch.
    pub(super) broken: HashSet<EndpointKey>,
    /// Frontends that the kernel fails to remove.
    pub(super) stuck: HashSet<EndpointKey>,
    /// Whether a grace period that is not waited for goes on until [`MemoryMaps::end_grace`].
    pub(super) grace_takes_long: bool,
    grace_is_over: Arc<AtomicBool>,
    /// How long packets under way take, while which all flows are busy.
    pub(super) grace_ticks: u32,
    /// Whether every write is checked against all that is in force, which takes its time.
    pub(super) watches: bool,
}

pub(super) struct FlowTable {
    buckets: Box<[Bucket]>,
    records: Box<[Record]>,
    overflows: Box<[Overflow]>,
    clock: TestClock,
    /// How long it is until a scan that has begun sees its first bucket, while which all flows are busy.
    pub(super) scan_ticks: AtomicU32,
}

pub(super) const TIMEOUT: u32 = 100;
const BUCKETS: usize = 256;

impl Storage for FlowTable {
    fn mask(&self) -> u32 {
        BUCKETS as u32 - 1
    }

    fn bucket(&self, index: u32) -> Option<&Bucket> {
        let ticks = self.scan_ticks.load(Ordering::Relaxed);
        if index == 0 && ticks > 0 {
            self.clock.advance(ticks);
            self.refresh();
        }
        self.buckets.get(index as usize)
    }

    fn record(&self, place: Place) -> Option<&Record> {
        self.records.get(place.0 as usize)
    }

    fn overflow(&self, index: u32) -> Option<&Overflow> {
        self.overflows.get(index as usize)
    }

    fn timeout(&self, _: State) -> u32 {
        TIMEOUT
    }
}

impl Operations for &FlowTable {}

impl FlowTable {
    /// Has a packet come for each direction of every flow.
    fn refresh(&self) {
        for slot in self.buckets.iter().flat_map(|bucket| &bucket.slots) {
            let data = Data(slot.data.load());
            if is_live(self, data, self.clock.now()) {
                table::change(slot, data, |data| data.after(Segment::DATAGRAM, self.clock.now()));
            }
        }
    }

    fn new(clock: TestClock) -> Self {
        // SAFETY: all are words, which may be zero.
        unsafe {
            Self {
                buckets: Box::new_zeroed_slice(BUCKETS).assume_init(),
                records: Box::new_zeroed_slice(BUCKETS * SLOTS).assume_init(),
                overflows: Box::new_zeroed_slice(BUCKETS / Overflow::BUCKETS as usize).assume_init(),
                clock,
                scan_ticks: AtomicU32::new(0),
            }
        }
    }
}

impl MemoryMaps {
    pub(super) fn new(sizes: Sizes, clock: TestClock) -> Self {
        let len = |size: u32| size as usize;
        Self {
            sizes,
            services: HashMap::new(),
            configs: vec![Config::default(); len(sizes.configs)],
            backends: vec![Backend::default(); len(sizes.backends)],
            frontends: vec![Frontend::default(); len(sizes.frontends)],
            owners: HashMap::new(),
            addresses: HashMap::new(),
            node_ports: HashMap::new(),
            ranges: HashSet::new(),
            affinities: Vec::new(),
            rings: vec![0; len(sizes.ring_slots)],
            members: vec![0; len(sizes.members)],
            filter: vec![0; 1 << (sizes.filter_bits_log2 - 6)],
            service_stats: vec![ServiceCounters::default(); len(sizes.numbers)],
            backend_flows: vec![0; len(sizes.backends)],
            sources: Vec::new(),
            flows: FlowTable::new(clock.clone()),
            clock,
            lingering: Mutex::default(),
            log: Mutex::default(),
            broken: HashSet::new(),
            stuck: HashSet::new(),
            grace_takes_long: false,
            grace_is_over: Arc::default(),
            grace_ticks: 0,
            watches: true,
        }
    }

    /// Ends the grace period that was begun.
    pub(super) fn end_grace(&mut self) {
        self.grace();
        std::mem::take(&mut self.grace_is_over).store(true, Ordering::Release);
    }

    /// What was written since this was called before.
    pub(super) fn take_log(&self) -> Vec<Op> {
        std::mem::take(&mut *self.log.lock().unwrap())
    }

    /// The record in force for a frontend.
    pub(super) fn in_force(&self, key: &EndpointKey) -> Option<Config> {
        self.services.get(key).map(|reference| self.configs[reference.index() as usize])
    }

    /// The backends in a record's ring, slot by slot.
    pub(super) fn slots(&self, config: &Config) -> Vec<Backend> {
        let members = self.members(config.members, config.members_len);
        let ring = self.ring(config.ring, config.ring_len);
        ring.into_iter().map(|slot| self.backends[members[usize::from(slot)] as usize]).collect()
    }

    /// Has a client begin a flow, as the programs would. Says which backend it got, if any.
    pub(super) fn begin_flow(&mut self, frontend: &EndpointKey, client: u16) -> Option<u32> {
        let config = self.in_force(frontend)?;
        if config.ring_len == 0 {
            return None;
        }
        let slot = u32::from(client) * 7 % config.ring_len;
        let member = self.rings[(config.ring + slot) as usize];
        let backend = self.members[(config.members + u32::from(member)) as usize];
        let number = u64::from(client) << 32 | u64::from(config.frontend) << 16 | u64::from(backend);
        let fingerprint = |salt: u64| Fingerprint((number ^ salt).wrapping_mul(0xff51_afd7_ed55_8ccd) ^ number >> 7);
        let (forward, reply) = (fingerprint(0), fingerprint(0x5bd1_e995 << 20));
        let mut flow = Flow {
            twin: forward,
            client: Addr::from_v4([10, 244, 9, 9]),
            client_port: PortBe::new(client),
            protocol: frontend.protocol,
            snat: Snat::NONE,
            frontend: config.frontend,
            backend,
        };
        let now = self.clock.now();
        let state = if frontend.protocol == 6 { State::ESTABLISHED } else { State::UDP_BOTH_WAYS };
        let insert = |fingerprint, direction, id, flow| {
            let data = Data::new(direction, state, id);
            table::insert(&self.flows, &New { fingerprint, data, flow, now, defers: false }).is_new()
        };
        insert(reply, Direction::Reply, config.frontend, flow);
        flow.twin = reply;
        if insert(forward, Direction::Forward, backend, flow) {
            self.backend_flows[backend as usize] += 1;
            self.service_stats[config.service as usize].flows += 1;
        }
        Some(backend)
    }

    /// What masquerading leaves behind: the directions of a flow that is no service's.
    pub(super) fn begin_masqueraded(&mut self, client: u16, source: Addr, port: PortBe) {
        self.sources.push(source);
        let fingerprint = |salt: u64| Fingerprint((u64::from(client) ^ salt).wrapping_mul(0xff51_afd7_ed55_8ccd));
        let (forward, reply) = (fingerprint(1 << 40), fingerprint(1 << 50));
        let (snat, now) = (Snat::new(self.sources.len() as u32, port), self.clock.now());
        for (fingerprint, twin, direction) in [(reply, forward, Direction::Reply), (forward, reply, Direction::Forward)]
        {
            let (client, client_port) = (Addr::from_v4([10, 244, 9, 9]), PortBe::new(client));
            let flow = Flow { twin, client, client_port, protocol: 6, snat, frontend: 0, backend: 0 };
            let data = Data::new(direction, State::ESTABLISHED, 0).with_snat(true);
            table::insert(&self.flows, &New { fingerprint, data, flow, now, defers: false });
        }
    }

    /// Live slots.
    pub(super) fn live(&self) -> usize {
        self.live_slots().count()
    }

    fn live_slots(&self) -> impl Iterator<Item = Data> {
        let slots = self.flows.buckets.iter().flat_map(|bucket| &bucket.slots);
        slots.map(|slot| Data(slot.data.load())).filter(|data| is_live(&self.flows, *data, self.clock.now()))
    }

    fn note(&self, op: Op) {
        if self.watches {
            self.log.lock().unwrap().push(op);
        }
    }

    /// Records that packets may be reading.
    fn readable(&self) -> Vec<Config> {
        let lingering = self.lingering.lock().unwrap();
        let indexes = self.services.values().map(|reference| reference.index()).chain(lingering.iter().copied());
        indexes.map(|index| self.configs[index as usize]).collect()
    }

    fn has_bit(&self, addr: Addr, kind: Kind) -> bool {
        let bits = self.sizes.filter_bits_log2;
        let bit = if addr.is_v4() {
            filter::bit(Ipv4Be::from_map(addr), kind, bits)
        } else {
            filter::bit(Ipv6Be::from_map(addr), kind, bits)
        };
        self.filter[(bit / 64) as usize] & 1 << (bit % 64) != 0
    }

    /// Everything a packet would find behind an entry of `SERVICES`.
    fn assert_whole(&self, key: &EndpointKey, value: ConfigRef, accepts: Option<u8>) {
        let config = self.configs[value.index() as usize];
        assert_eq!((config.key, config.generation), (*key, value.generation()), "the record is not the frontend's");
        let sends_outside = config.flags & Config::OUTSIDE != 0;
        assert!(!sends_outside || key.scope == 0 && self.services.contains_key(&outside(*key)), "{key:?}");
        let has_ranges = self.ranges.iter().any(|(_, range)| range.service == config.service);
        assert!(config.flags & Config::RANGES == 0 || has_ranges);
        let frontend = self.frontends[config.frontend as usize];
        assert_eq!((frontend.addr, frontend.port, frontend.protocol), (key.addr, key.port, key.protocol));
        assert_eq!(frontend.service, config.service);
        assert!(self.has_bit(key.addr, Kind::Frontend));
        let members = self.members(config.members, config.members_len);
        let ring = self.ring(config.ring, config.ring_len);
        assert!(ring.iter().all(|slot| u32::from(*slot) < config.members_len));
        for (number, id) in members.into_iter().enumerate() {
            let backend = self.backends[id as usize];
            assert_eq!((backend.service, backend.protocol), (config.service, key.protocol));
            // Those that drain are members, but in no ring.
            let is_in_ring = ring.contains(&(number as u16));
            assert!(accepts.is_none_or(|flags| !is_in_ring || backend.flags & flags == flags));
            assert!(accepts.is_none() || config.flags & Config::LOCAL == 0 || backend.flags & Backend::LOCAL != 0);
            assert!(self.has_bit(backend.addr, Kind::Backend));
            let owners = self.owners[&EndpointKey::new(backend.addr, backend.port, backend.protocol)];
            assert!(owners.0.contains(&config.frontend) || !owners.0.contains(&0));
        }
    }
}

fn overlap(at: u32, len: u32, other: u32, other_len: u32) -> bool {
    len > 0 && other_len > 0 && at < other + other_len && other < at + len
}

impl Maps for MemoryMaps {
    fn sizes(&self) -> Sizes {
        self.sizes
    }

    fn service(&self, key: &EndpointKey) -> Option<ConfigRef> {
        self.services.get(key).copied()
    }

    fn services(&self) -> io::Result<Vec<(EndpointKey, ConfigRef)>> {
        let is_its = |(key, value): &(&EndpointKey, &ConfigRef)| {
            let config = self.configs.get(value.index() as usize);
            config.is_some_and(|config| (config.key, config.generation) == (**key, value.generation()))
        };
        Ok(self.services.iter().filter(is_its).map(|(key, value)| (*key, *value)).collect())
    }

    fn set_service(&mut self, key: &EndpointKey, value: ConfigRef) -> io::Result<()> {
        if self.broken.contains(key) {
            return Err(io::Error::from_raw_os_error(libc::ENOMEM));
        }
        if !self.services.contains_key(key) && self.services.len() == self.sizes.services as usize {
            return Err(io::Error::from_raw_os_error(libc::E2BIG));
        }
        if self.watches {
            // What is put back after a failure may have lost backends.
            let is_new = !self.lingering.lock().unwrap().contains(&value.index());
            self.assert_whole(key, value, is_new.then_some(Backend::SERVING | Backend::ACCEPTING));
        }
        self.note(Op::Service(*key));
        self.lingering.lock().unwrap().extend(self.services.insert(*key, value).map(ConfigRef::index));
        Ok(())
    }

    fn remove_service(&mut self, key: &EndpointKey) -> io::Result<()> {
        if self.stuck.contains(key) {
            return Err(io::Error::from_raw_os_error(libc::EPERM));
        }
        self.note(Op::RemoveService(*key));
        if key.scope != 0
            && self.watches
            && let Some(config) = self.in_force(&base(*key))
        {
            assert_eq!(config.flags & Config::OUTSIDE, 0, "packets are sent to {key:?}");
        }
        let old = self.services.remove(key).ok_or(io::ErrorKind::NotFound)?;
        self.lingering.lock().unwrap().insert(old.index());
        Ok(())
    }

    fn retain_services(&mut self, keys: &mut dyn Iterator<Item = EndpointKey>) -> usize {
        let (known, before) = (keys.collect::<HashSet<_>>(), self.services.len());
        self.services.retain(|key, _| known.contains(key));
        before - self.services.len()
    }

    fn config(&self, index: u32) -> Config {
        self.configs[index as usize]
    }

    fn set_config(&mut self, index: u32, config: &Config) {
        self.note(Op::Config(index));
        if self.watches {
            assert!(!self.lingering.lock().unwrap().contains(&index), "record {index} is being read");
            assert!(self.services.values().all(|value| value.index() != index), "record {index} is in force");
        }
        self.configs[index as usize] = *config;
    }

    fn backend(&self, id: u32) -> Backend {
        self.backends[id as usize]
    }

    fn set_backend(&mut self, id: u32, backend: &Backend) {
        self.note(Op::Backend(id));
        if self.watches && self.backends[id as usize].protocol != 0 {
            let named = |data: Data| data.direction() == Direction::Forward && data.id() == id;
            assert!(!self.live_slots().any(named), "backend {id} has flows");
            let is_member = |config: Config| self.members(config.members, config.members_len).contains(&id);
            assert!(!self.readable().into_iter().any(is_member), "backend {id} is in force");
        }
        self.backends[id as usize] = *backend;
    }

    fn set_backend_flags(&mut self, id: u32, flags: u8) {
        self.note(Op::Flags(id, flags));
        assert_ne!(self.backends[id as usize].protocol, 0);
        self.backends[id as usize].flags = flags;
    }

    fn set_backend_weight(&mut self, id: u32, weight: u32) {
        assert_ne!(self.backends[id as usize].protocol, 0);
        self.backends[id as usize].weight = weight;
    }

    fn set_backend_base(&mut self, id: u32, base: u64) {
        assert_ne!(self.backends[id as usize].protocol, 0);
        self.backends[id as usize].base = base;
    }

    fn frontend(&self, id: u32) -> Frontend {
        self.frontends[id as usize]
    }

    fn set_frontend(&mut self, id: u32, frontend: &Frontend) {
        self.note(Op::Frontend(id));
        if self.watches && self.frontends[id as usize].protocol != 0 {
            let named = |data: Data| data.direction() == Direction::Reply && data.id() == id;
            assert!(!self.live_slots().any(named), "frontend {id} has flows");
            let is_used = |config: Config| config.frontend == id;
            assert!(!self.readable().into_iter().any(is_used), "frontend {id} is in force");
        }
        self.frontends[id as usize] = *frontend;
    }

    fn owners(&self, key: &EndpointKey) -> Owners {
        self.owners.get(key).copied().unwrap_or_default()
    }

    fn set_owners(&mut self, lists: &[(EndpointKey, Owners)]) -> io::Result<()> {
        for (key, owners) in lists {
            if !self.owners.contains_key(key) && self.owners.len() == self.sizes.owners as usize {
                return Err(io::Error::from_raw_os_error(libc::E2BIG));
            }
            self.note(Op::Owners(*key));
            self.owners.insert(*key, *owners);
        }
        Ok(())
    }

    fn remove_owners(&mut self, key: &EndpointKey) {
        self.note(Op::RemoveOwners(*key));
        self.owners.remove(key);
    }

    fn retain_owners(&mut self, keys: &mut dyn Iterator<Item = EndpointKey>) {
        let known: HashSet<_> = keys.collect();
        self.owners.retain(|key, _| known.contains(key));
    }

    fn addresses(&self) -> io::Result<Vec<(Addr, u32)>> {
        Ok(self.addresses.iter().map(|(addr, flags)| (*addr, *flags)).collect())
    }

    fn set_address(&mut self, addr: &Addr, flags: u32) -> io::Result<()> {
        if !self.addresses.contains_key(addr) && self.addresses.len() == self.sizes.addresses as usize {
            return Err(io::Error::from_raw_os_error(libc::E2BIG));
        }
        self.note(Op::Address(*addr, flags));
        self.addresses.insert(*addr, flags);
        Ok(())
    }

    fn remove_address(&mut self, addr: &Addr) -> io::Result<()> {
        self.note(Op::RemoveAddress(*addr));
        self.addresses.remove(addr).map(drop).ok_or(io::ErrorKind::NotFound.into())
    }

    fn node_ports(&self) -> io::Result<Vec<(NodePortKey, u32)>> {
        Ok(self.node_ports.iter().map(|(key, families)| (*key, *families)).collect())
    }

    fn set_node_port(&mut self, key: &NodePortKey, families: u32) -> io::Result<()> {
        if !self.node_ports.contains_key(key) && self.node_ports.len() == self.sizes.node_ports as usize {
            return Err(io::Error::from_raw_os_error(libc::E2BIG));
        }
        self.node_ports.insert(*key, families);
        Ok(())
    }

    fn remove_node_port(&mut self, key: &NodePortKey) -> io::Result<()> {
        self.node_ports.remove(key).map(drop).ok_or(io::ErrorKind::NotFound.into())
    }

    fn source_ranges(&self) -> io::Result<Vec<(u32, RangeKey)>> {
        Ok(self.ranges.iter().copied().collect())
    }

    fn set_source_range(&mut self, bits: u32, key: &RangeKey) -> io::Result<()> {
        if self.ranges.len() == self.sizes.source_ranges as usize {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        self.note(Op::Range(bits, *key));
        self.ranges.insert((bits, *key));
        Ok(())
    }

    fn remove_source_range(&mut self, bits: u32, key: &RangeKey) -> io::Result<()> {
        self.note(Op::RemoveRange(bits, *key));
        self.ranges.remove(&(bits, *key)).then_some(()).ok_or(io::ErrorKind::NotFound.into())
    }

    fn affinities(&self, from: Option<u32>, most: usize) -> io::Result<Portion<AffinityKey, Affinity>> {
        let from = from.unwrap_or(0) as usize;
        let part: Vec<_> = self.affinities.iter().skip(from).take(most).copied().collect();
        let next = from + part.len();
        Ok((part, (next < self.affinities.len()).then_some(next as u32)))
    }

    fn remove_affinity(&mut self, key: &AffinityKey, seen: Affinity) -> io::Result<()> {
        self.affinities.retain(|entry| *entry != (*key, seen));
        Ok(())
    }

    fn ring(&self, offset: u32, len: u32) -> Vec<u16> {
        self.rings[offset as usize..(offset + len) as usize].to_vec()
    }

    fn write_ring(&mut self, offset: u32, slots: &[u16]) {
        self.note(Op::Ring(offset));
        if self.watches {
            let is_read = |config: Config| overlap(offset, slots.len() as u32, config.ring, config.ring_len);
            assert!(!self.readable().into_iter().any(is_read), "the ring at {offset} is in force");
        }
        self.rings[offset as usize..][..slots.len()].copy_from_slice(slots);
    }

    fn members(&self, offset: u32, len: u32) -> Vec<u32> {
        self.members[offset as usize..(offset + len) as usize].to_vec()
    }

    fn write_members(&mut self, offset: u32, ids: &[u32]) {
        self.note(Op::Members(offset));
        if self.watches {
            let is_read = |config: Config| overlap(offset, ids.len() as u32, config.members, config.members_len);
            assert!(!self.readable().into_iter().any(is_read), "the members at {offset} are in force");
        }
        self.members[offset as usize..][..ids.len()].copy_from_slice(ids);
    }

    fn set_filter_bit(&mut self, bit: u32, set: bool) {
        self.note(Op::FilterBit(bit, set));
        let word = &mut self.filter[(bit / 64) as usize];
        *word = *word & !(1 << (bit % 64)) | u64::from(set) << (bit % 64);
    }

    fn write_filter(&mut self, words: &[u64]) {
        assert_eq!(words.len(), self.filter.len());
        for (key, value) in &self.services {
            self.assert_whole(key, *value, None);
        }
        self.filter.copy_from_slice(words);
        for (key, value) in &self.services {
            self.assert_whole(key, *value, None);
        }
    }

    fn service_stats(&self, service: u32) -> ServiceCounters {
        self.service_stats[service as usize]
    }

    fn clear_service_stats(&mut self, service: u32) {
        self.service_stats[service as usize] = ServiceCounters::default();
    }

    fn backend_flows(&self, id: u32) -> u64 {
        self.backend_flows[id as usize]
    }

    fn clear_backend_flows(&mut self, id: u32) {
        self.backend_flows[id as usize] = 0;
    }

    fn source(&self, index: u32) -> Option<Addr> {
        self.sources.get((index as usize).checked_sub(1)?).copied()
    }

    fn flows(&self) -> &dyn Storage {
        &self.flows
    }

    fn grace(&self) {
        self.note(Op::Grace);
        self.clock.advance(self.grace_ticks);
        if self.grace_ticks > 0 {
            self.flows.refresh();
        }
        self.lingering.lock().unwrap().clear();
    }

    fn begin_grace(&self) -> Arc<AtomicBool> {
        if self.grace_takes_long {
            return Arc::clone(&self.grace_is_over);
        }
        self.grace();
        Arc::new(AtomicBool::new(true))
    }
}
