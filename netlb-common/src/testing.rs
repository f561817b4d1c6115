//! A flow table and maps in memory, for the tests of what runs on them.

use std::{
    boxed::Box,
    cell::{Cell, RefCell},
    collections::HashMap,
    vec,
    vec::Vec,
};

use crate::{
    addr::Addr,
    atomic::Word,
    balance::Tables,
    conntrack::State,
    counters::Counter,
    flow::{Fingerprint, HashKey},
    maps::{Affinity, AffinityKey, Backend, Config, ConfigRef, EndpointKey, Frontend},
    snat::Ports,
    table::{Bucket, Data, Operations, Overflow, Place, Record, SLOTS, Slot, Storage, is_live},
    time::Ticks,
};

/// Every state's timeout, in its units.
pub(crate) const TIMEOUT: u32 = 100;

/// A flow table in memory.
pub(crate) struct Memory {
    pub(crate) buckets: Box<[Bucket]>,
    records: Box<[Record]>,
    overflows: Box<[Overflow]>,
}

fn word() -> Word {
    Word::new(0)
}

impl Memory {
    pub(crate) fn new(buckets: usize) -> Self {
        assert!(buckets.is_power_of_two());
        let slot = || Slot { fingerprint: word(), data: word() };
        Self {
            buckets: (0..buckets).map(|_| Bucket { slots: [slot(), slot(), slot(), slot()] }).collect(),
            records: (0..buckets * SLOTS).map(|_| Record::empty()).collect(),
            overflows: (0..buckets.div_ceil(Overflow::BUCKETS as usize)).map(|_| Overflow::empty()).collect(),
        }
    }

    /// Loses a direction.
    pub(crate) fn lose(&self, fingerprint: Fingerprint) {
        for slot in self.buckets.iter().flat_map(|bucket| &bucket.slots) {
            if slot.fingerprint.load() == fingerprint.0 {
                slot.data.store(0);
            }
        }
    }

    /// Live slots.
    pub(crate) fn live(&self, now: Ticks) -> usize {
        let slots = self.buckets.iter().flat_map(|bucket| &bucket.slots);
        slots.filter(|slot| is_live(self, Data(slot.data.load()), now)).count()
    }
}

impl Operations for &Memory {}

impl Storage for Memory {
    fn mask(&self) -> u32 {
        self.buckets.len() as u32 - 1
    }

    fn bucket(&self, index: u32) -> Option<&Bucket> {
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

/// The maps of a node. Rings and lists of members are what is plain: slot n has member n, which is backend n + 1.
pub(crate) struct Maps {
    pub(crate) flows: Memory,
    /// What is in force of the records. It stays what it is when a record changes.
    pub(crate) services: HashMap<EndpointKey, ConfigRef>,
    pub(crate) configs: Vec<Config>,
    pub(crate) backends: Vec<Backend>,
    /// Flows that backends were given, by their number.
    pub(crate) given: Vec<u64>,
    pub(crate) affinity: RefCell<HashMap<AffinityKey, Affinity>>,
    /// Whether there is room for more of it.
    pub(crate) has_room: bool,
    /// Services and the clients that they let in.
    pub(crate) ranges: Vec<(u32, Addr)>,
    /// What is known of addresses, as [`crate::maps::address`] says it.
    pub(crate) addresses: HashMap<Addr, u32>,
    /// The first bytes of addresses that are services' or nobody's.
    pub(crate) owned: Vec<u8>,
    /// From where to where packets get another source.
    pub(crate) masqueraded: Option<(Addr, Addr)>,
    /// Addresses of the node, from index 1 on.
    pub(crate) sources: Vec<Addr>,
    pub(crate) counted: RefCell<Vec<Counter>>,
    pub(crate) turn: Cell<u64>,
    pub(crate) random: u32,
    /// Random numbers are the lowest and the highest in turns.
    pub(crate) alternates: bool,
    pub(crate) key: HashKey,
}

impl Maps {
    /// With these records in force, and these backends by number.
    pub(crate) fn of(configs: Vec<Config>, backends: Vec<Backend>) -> Self {
        let in_force =
            |(index, config): (usize, &Config)| (config.key, ConfigRef::new(index as u32, config.generation));
        Self {
            flows: Memory::new(64),
            services: configs.iter().enumerate().map(in_force).collect(),
            given: vec![0; backends.len()],
            configs,
            backends,
            affinity: RefCell::default(),
            has_room: true,
            ranges: Vec::new(),
            addresses: HashMap::new(),
            // Begins no address: the longest are of 16 bytes.
            owned: vec![0xff; 17],
            masqueraded: None,
            sources: Vec::new(),
            counted: RefCell::default(),
            turn: Cell::new(0),
            random: 0,
            alternates: false,
            key: HashKey::new([1, 2, 3, 4]),
        }
    }
}

impl Operations for &Maps {}

impl Storage for &Maps {
    fn mask(&self) -> u32 {
        self.flows.mask()
    }

    fn bucket(&self, index: u32) -> Option<&Bucket> {
        self.flows.bucket(index)
    }

    fn record(&self, place: Place) -> Option<&Record> {
        self.flows.record(place)
    }

    fn overflow(&self, index: u32) -> Option<&Overflow> {
        self.flows.overflow(index)
    }

    fn timeout(&self, state: State) -> u32 {
        self.flows.timeout(state)
    }
}

impl Tables for &Maps {
    fn hash_key(&self) -> HashKey {
        self.key
    }

    fn filter_bits_log2(&self) -> u32 {
        15
    }

    fn filter_has(&self, _: u32) -> bool {
        false
    }

    fn config_ref(&self, key: &EndpointKey) -> Option<ConfigRef> {
        self.services.get(key).copied()
    }

    fn config(&self, index: u32) -> Option<&Config> {
        self.configs.get(index as usize)
    }

    fn ring(&self, slot: u32) -> Option<u16> {
        Some(slot as u16)
    }

    fn member(&self, index: u32) -> Option<u32> {
        Some(index + 1)
    }

    fn backend(&self, id: u32) -> Option<&Backend> {
        self.backends.get(id as usize)
    }

    fn frontend(&self, _: u32) -> Option<&Frontend> {
        None
    }

    fn source(&self, index: u32) -> Option<Addr> {
        self.sources.get((index as usize).checked_sub(1)?).copied()
    }

    fn source_index(&self, _: Addr) -> u32 {
        0
    }

    fn snat_ports(&self) -> Ports {
        Ports { first: 61_000, more: 4535 }
    }

    fn owners(&self, _: u64) -> u64 {
        0
    }

    fn is_in_range(&self, service: u32, client: Addr) -> bool {
        self.ranges.contains(&(service, client))
    }

    fn affinity(&self, key: &AffinityKey) -> Option<Affinity> {
        self.affinity.borrow().get(key).copied()
    }

    fn set_affinity(&self, key: &AffinityKey, value: Affinity) -> bool {
        if self.has_room {
            self.affinity.borrow_mut().insert(*key, value);
        }
        self.has_room
    }

    fn forget_affinity(&self, key: &AffinityKey) {
        self.affinity.borrow_mut().remove(key);
    }

    fn address(&self, addr: Addr) -> u32 {
        self.addresses.get(&addr).copied().unwrap_or(0)
    }

    fn is_owned(&self, addr: Addr) -> bool {
        addr.to_bytes().starts_with(&self.owned)
    }

    fn is_masqueraded(&self, source: Addr, destination: Addr) -> bool {
        self.masqueraded == Some((source, destination))
    }

    fn flows_of(&self, backend: u32) -> u64 {
        self.given[backend as usize]
    }

    fn turn(&self, _: u32) -> u64 {
        self.turn.replace(self.turn.get() + 1)
    }

    fn is_stranger(&self, _: Fingerprint, _: Ticks) -> bool {
        false
    }

    fn note_stranger(&self, _: Fingerprint, _: Ticks) {}

    fn random(&self) -> u32 {
        if self.alternates { self.turn.replace(self.turn.get() + 1) as u32 % 2 * u32::MAX } else { self.random }
    }

    fn count(&self, counter: Counter) {
        self.counted.borrow_mut().push(counter);
    }

    fn count_flow(&self, _: u32, _: u32) {}
}

/// A 64-bit mixer (the finaliser of MurmurHash3), for fingerprints that look random and repeat.
pub(crate) fn mix(n: u64) -> u64 {
    let n = (n ^ n >> 33).wrapping_mul(0xff51_afd7_ed55_8ccd);
    let n = (n ^ n >> 33).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    (n ^ n >> 33).max(1)
}
