//! The flow table, seen from user space.

use std::{collections::BTreeMap, net::IpAddr};

use netlb_common::{
    addr::PortBe,
    conntrack::{Direction, State as FlowState},
    flow::Fingerprint,
    snat,
    table::{self, Data, Place, SLOTS, Slot, Storage, is_live},
    time::seconds_from_ticks,
};

use super::*;
use crate::dataplane::{BackendCounters, Flow, FlowFilter, FlowService, ServiceStats};

/// Ticks in which the sweep passes the whole table once: far less than the time field takes to wrap.
const SWEEP_TICKS: u32 = 256;
/// Attempts at a slot that packets keep changing.
const ATTEMPTS: usize = 100;

/// Numbers that something may name: as long as nothing was found that does, they are sought.
pub(super) struct Sought {
    frontends: Vec<bool>,
    backends: Vec<bool>,
    left: usize,
}

impl Sought {
    pub(super) fn new(sizes: &Sizes, frontends: &BTreeSet<u32>, backends: &BTreeSet<u32>) -> Self {
        let by_number = |size: u32, numbers: &BTreeSet<u32>| {
            let mut sought = vec![false; size as usize];
            numbers.iter().for_each(|id| sought[*id as usize] = true);
            sought
        };
        Self {
            frontends: by_number(sizes.frontends, frontends),
            backends: by_number(sizes.backends, backends),
            left: frontends.len() + backends.len(),
        }
    }

    pub(super) fn find_frontend(&mut self, id: u32) {
        self.left -= usize::from(self.frontends.get_mut(id as usize).is_some_and(std::mem::take));
    }

    pub(super) fn find_backend(&mut self, id: u32) {
        self.left -= usize::from(self.backends.get_mut(id as usize).is_some_and(std::mem::take));
    }

    /// Whether nothing was found that names it.
    pub(super) fn has_frontend(&self, id: u32) -> bool {
        self.frontends[id as usize]
    }

    pub(super) fn has_backend(&self, id: u32) -> bool {
        self.backends[id as usize]
    }
}

/// How many live flows each backend had, by number.
#[derive(Debug)]
pub(super) struct Census {
    taken: Ticks,
    active: Vec<u32>,
}

impl<M: Maps> Programmer<M> {
    /// The counters of the services with these names, in their order; unknown names give zeroes.
    pub fn stats(&self, services: &[&str]) -> Vec<ServiceStats> {
        let active = if self.had_flows(services) { self.active_flows() } else { Vec::new() };
        self.stats_with(services, &active)
    }

    /// The same for the answer to a change: flows are counted once in a tick. So changes that come one after the other do not go through
    /// the whole flow table each.
    pub fn recent_stats(&mut self, services: &[&str]) -> Vec<ServiceStats> {
        if !self.had_flows(services) {
            return self.stats_with(services, &[]);
        }
        let taken = (self.clock)();
        let recent = self.census.take().filter(|census| census.taken == taken);
        let census = recent.unwrap_or_else(|| Census { active: self.active_flows(), taken });
        let stats = self.stats_with(services, &census.active);
        self.census = Some(census);
        stats
    }

    /// Who never had a flow has none now: they need not be counted.
    fn had_flows(&self, services: &[&str]) -> bool {
        let entries = services.iter().filter_map(|name| self.services.get(*self.names.get(*name)?));
        entries.flat_map(|entry| entry.backends.values()).any(|id| self.maps.backend_flows(*id) > 0)
    }

    /// Live flows by backend number.
    fn active_flows(&self) -> Vec<u32> {
        let mut active = vec![0; self.sizes.backends as usize];
        for (_, _, data) in self.live(is_forward) {
            if let Some(count) = active.get_mut(data.id() as usize) {
                *count += 1;
            }
        }
        active
    }

    fn stats_with(&self, services: &[&str], active: &[u32]) -> Vec<ServiceStats> {
        let stats = |index: Option<u32>| {
            let Some((index, entry)) = index.and_then(|index| Some((index, self.services.get(index)?))) else {
                return ServiceStats::default();
            };
            // One address may be a backend for two protocols.
            let mut backends: BTreeMap<SocketAddr, BackendCounters> = BTreeMap::new();
            for (key, id) in &entry.backends {
                let counters = backends.entry(socket_address(key.addr, key.port)).or_default();
                counters.flows += self.maps.backend_flows(*id);
                counters.active += u64::from(active.get(*id as usize).copied().unwrap_or_default());
            }
            ServiceStats { service: self.maps.service_stats(index), backends: backends.into_iter().collect() }
        };
        services.iter().map(|name| stats(self.names.get(*name).copied())).collect()
    }

    pub fn flows(&self, filter: &FlowFilter, limit: usize) -> Vec<Flow> {
        let Some(service) = self.filtered_service(filter) else { return Vec::new() };
        let of_service = self.live(is_forward).filter(|(_, _, data)| self.is_of(*data, service));
        of_service.filter_map(|(place, slot, data)| self.flow(place, slot, data)).take(limit).collect()
    }

    pub fn count_flows(&self, filter: &FlowFilter) -> u64 {
        let Some(service) = self.filtered_service(filter) else { return 0 };
        self.live(is_forward).filter(|(_, _, data)| self.is_of(*data, service)).count() as u64
    }

    /// Removes flows and says how many they were.
    pub fn flush_flows(&mut self, filter: &FlowFilter) -> u64 {
        let Some(service) = self.filtered_service(filter) else { return 0 };
        let storage = self.maps.flows();
        let mut count = 0;
        for (place, slot, data) in self.live(|_| true) {
            let fingerprint = Fingerprint(slot.fingerprint.load());
            match data.direction() {
                Direction::Forward if self.is_of(data, service) => {
                    let twin = storage.record(place).and_then(|record| record.read(fingerprint)).map(|flow| flow.twin);
                    count += u64::from(self.release(slot, fingerprint));
                    // Left alone, it would bring back the slot that was removed.
                    if let Some(found) = twin.and_then(|twin| storage.find(twin, (self.clock)())) {
                        self.release(found.slot, Fingerprint(found.slot.fingerprint.load()));
                    }
                }
                Direction::Reply if self.is_reply_of(data, service) => {
                    self.release(slot, fingerprint);
                }
                _ => {}
            }
        }
        count
    }

    /// Slots of live flows, and slots there are.
    pub(super) fn flow_slots(&self) -> (u64, u64) {
        (self.live(|_| true).count() as u64, (u64::from(self.maps.flows().mask()) + 1) * SLOTS as u64)
    }

    /// Looks for live flows that name what is sought, in their slots and records, until all of it is found. Expired slots are cleared on
    /// the way, so that no packet that saw one alive a moment ago revives it: what is still sought in the end is named nowhere.
    pub(super) fn seek_in_flows(&self, sought: &mut Sought) {
        let storage = self.maps.flows();
        for (place, slot) in slots(storage) {
            if sought.left == 0 {
                return;
            }
            let Some(data) = self.live_or_cleared(slot) else { continue };
            match data.direction() {
                Direction::Forward => sought.find_backend(data.id()),
                Direction::Reply => sought.find_frontend(data.id()),
            }
            let record = storage.record(place).and_then(|record| record.read(Fingerprint(slot.fingerprint.load())));
            if let Some(flow) = record {
                sought.find_frontend(flow.frontend);
                sought.find_backend(flow.backend);
            }
        }
    }

    /// Removes the datagram flows of frontends that went since. Connections end some time, and live on with their backends until then;
    /// datagrams may go on for ever, and be another service's by now.
    pub(super) fn cut_datagrams(&mut self) {
        const UDP: u8 = 17;
        self.waiting.cut.retain(|id| self.waiting.frontends.contains(id));
        let is_in_force =
            |key: &EndpointKey, id| self.served.get(key).is_some_and(|served| served.config.frontend == id);
        let is_gone = |id: &u32| {
            let key = self.frontends.get(*id).map(|frontend| frontend.key);
            !self.waiting.cut.contains(id)
                && key.is_some_and(|key| {
                    key.protocol == UDP && !is_in_force(&key, *id) && !is_in_force(&outside(key), *id)
                })
        };
        let gone: HashSet<_> = self.waiting.frontends.iter().copied().filter(is_gone).collect();
        if gone.is_empty() {
            return;
        }
        let storage = self.maps.flows();
        let is_datagrams =
            |data: Data| data.state() == FlowState::UDP_ONE_WAY || data.state() == FlowState::UDP_BOTH_WAYS;
        for (place, slot, data) in self.live(|data| is_datagrams(data) && !data.is_masqueraded()) {
            let fingerprint = Fingerprint(slot.fingerprint.load());
            let frontend = match data.direction() {
                Direction::Forward => {
                    storage.record(place).and_then(|record| record.read(fingerprint)).map(|flow| flow.frontend)
                }
                Direction::Reply => Some(data.id()),
            };
            if frontend.is_some_and(|id| gone.contains(&id)) {
                self.release(slot, fingerprint);
            }
        }
        self.waiting.cut.extend(gone);
    }

    /// Clears expired flows in the next part of the table, so that none revives when time has wrapped.
    pub(super) fn sweep(&mut self) {
        let storage = self.maps.flows();
        let buckets = u64::from(storage.mask()) + 1;
        let part = buckets.div_ceil(SWEEP_TICKS.into()) as u32;
        for index in (0..part).map(|n| self.swept.wrapping_add(n) & storage.mask()) {
            for slot in storage.bucket(index).iter().flat_map(|bucket| &bucket.slots) {
                self.live_or_cleared(slot);
            }
        }
        self.swept = self.swept.wrapping_add(part) & storage.mask();
    }

    /// A slot's data, if its flow is alive. One that expired is freed, unless somebody is writing it.
    fn live_or_cleared(&self, slot: &Slot) -> Option<Data> {
        let data = Data(slot.data.load());
        if is_empty(data) {
            return None;
        }
        if self.is_live(data) {
            return Some(data);
        }
        // Whoever was faster has revived it.
        table::release(slot, data);
        None
    }

    /// The slots of live flows, as far as what they hold is wanted.
    pub(super) fn live(&self, wanted: impl Fn(Data) -> bool) -> impl Iterator<Item = (Place, &Slot, Data)> {
        slots(self.maps.flows()).filter_map(move |(place, slot)| {
            let data = Data(slot.data.load());
            (!is_empty(data) && wanted(data) && self.is_live(data)).then_some((place, slot, data))
        })
    }

    /// Whether data that a slot has, or had just now, is that of a live flow.
    fn is_live(&self, data: Data) -> bool {
        // The clock is read after the slot: by one from before, a flow that packets refreshed since then would be ahead of it, hence very old.
        is_live(self.maps.flows(), data, (self.clock)())
    }

    /// Frees a slot as long as it is this flow's, however often packets change it meanwhile. Says whether it did.
    fn release(&self, slot: &Slot, fingerprint: Fingerprint) -> bool {
        for _ in 0..ATTEMPTS {
            let data = Data(slot.data.load());
            if slot.fingerprint.load() != fingerprint.0 || !self.is_live(data) {
                return false;
            }
            if table::release(slot, data) {
                return true;
            }
        }
        false
    }

    /// The number of the service a filter means, or every service. None if there is no such service.
    fn filtered_service(&self, filter: &FlowFilter) -> Option<Option<u32>> {
        match &filter.service {
            None => Some(None),
            Some(name) => {
                let by_name = self.names.get(name).copied();
                // Services that were found in the maps and are not wanted have no name of their own.
                let unnamed = || self.services.iter().map(|(index, _)| index).find(|index| self.name(*index) == *name);
                by_name.or_else(unnamed).map(Some)
            }
        }
    }

    fn is_of(&self, data: Data, service: Option<u32>) -> bool {
        let of = |service| self.backends.get(data.id()).is_some_and(|backend| backend.service == service);
        service.is_none_or(of)
    }

    fn is_reply_of(&self, data: Data, service: Option<u32>) -> bool {
        let of = |service| self.frontends.get(data.id()).is_some_and(|frontend| frontend.service == service);
        service.is_none_or(of)
    }

    fn flow(&self, place: Place, slot: &Slot, data: Data) -> Option<Flow> {
        let record = self.maps.flows().record(place)?.read(Fingerprint(slot.fingerprint.load()))?;
        let service = if data.is_masqueraded() {
            None
        } else {
            let backend = self.backends.get(data.id())?;
            Some(FlowService {
                name: self.name(backend.service),
                frontend: frontend_of(&self.frontends.get(record.frontend)?.key)?,
                backend: socket_address(backend.key.addr, backend.key.port),
            })
        };
        // The address that packets are wrapped with is no source: the backend sees the client.
        let snat = Some(record.snat).filter(|snat| !snat.is_outer());
        Some(Flow {
            service,
            client: socket_address(record.client, record.client_port),
            protocol: protocol_name(record.protocol).to_owned(),
            source: snat.and_then(|snat| Some(socket_address(self.maps.source(snat.source())?, snat.port()))),
            state: data.state().name().to_owned(),
            idle_seconds: seconds_from_ticks(data.idle((self.clock)()).into()),
        })
    }

    /// The addresses of the node that flows were given as their source: those of IPv4 first.
    pub fn sources(&self) -> Vec<IpAddr> {
        let known = (1..snat::ADDRESSES).filter_map(|index| self.maps.source(index));
        let mut sources: Vec<_> = known.map(|address| socket_address(address, PortBe(0)).ip()).collect();
        sources.sort_unstable();
        sources
    }
}

/// Echo requests are flows only where they are masqueraded.
fn protocol_name(number: u8) -> &'static str {
    match number {
        6 => "tcp",
        17 => "udp",
        _ => "icmp",
    }
}

/// Whether a slot is nobody's, or about to be somebody's.
fn is_empty(data: Data) -> bool {
    matches!(data.state(), FlowState::FREE | FlowState::CLAIMING)
}

/// Whether a slot is of the direction from the client, of which each flow has one.
pub(super) fn is_forward(data: Data) -> bool {
    data.direction() == Direction::Forward
}

fn slots(storage: &dyn Storage) -> impl Iterator<Item = (Place, &Slot)> {
    let buckets = (0..=storage.mask()).filter_map(|index| Some((index, storage.bucket(index)?)));
    buckets.flat_map(|(index, bucket)| {
        bucket.slots.iter().enumerate().map(move |(number, slot)| (Place::new(index, number), slot))
    })
}
