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

/// Numbers that flows name, by number.
pub(super) struct Named {
    pub(super) frontends: Vec<bool>,
    pub(super) backends: Vec<bool>,
}

impl<M: Maps> Programmer<M> {
    /// The counters of the services with these names, in their order; unknown names give zeroes.
    pub fn stats(&self, services: &[&str]) -> Vec<ServiceStats> {
        let known: Vec<_> = services.iter().map(|name| self.names.get(*name).copied()).collect();
        let mut active = Vec::new();
        let entries = || known.iter().flatten().filter_map(|index| self.services.get(*index));
        // Who never had a flow has none now. That spares the answer to a change the way through the whole table.
        if entries().flat_map(|entry| entry.backends.values()).any(|id| self.maps.backend_flows(*id) > 0) {
            active.resize(self.sizes.backends as usize, 0_u64);
            self.each_flow((self.clock)(), |_, _, data| {
                if let Some(count) = active.get_mut(data.id() as usize) {
                    *count += 1;
                }
            });
        }
        let stats = |index: &Option<u32>| {
            let Some((index, entry)) = index.and_then(|index| Some((index, self.services.get(index)?))) else {
                return ServiceStats::default();
            };
            // One address may be a backend for two protocols.
            let mut backends: BTreeMap<SocketAddr, BackendCounters> = BTreeMap::new();
            for (key, id) in &entry.backends {
                let counters = backends.entry(socket_address(key.addr, key.port)).or_default();
                counters.flows += self.maps.backend_flows(*id);
                counters.active += active.get(*id as usize).copied().unwrap_or_default();
            }
            ServiceStats { service: self.maps.service_stats(index), backends: backends.into_iter().collect() }
        };
        known.iter().map(stats).collect()
    }

    pub fn flows(&self, filter: &FlowFilter, limit: usize) -> Vec<Flow> {
        let now = (self.clock)();
        let Some(service) = self.filtered_service(filter) else { return Vec::new() };
        let storage = self.maps.flows();
        let mut flows = Vec::new();
        for (place, slot, data) in forward(storage, now) {
            if flows.len() >= limit {
                break;
            }
            if self.is_of(data, service)
                && let Some(flow) = self.flow(storage, place, slot, data, now)
            {
                flows.push(flow);
            }
        }
        flows
    }

    pub fn count_flows(&self, filter: &FlowFilter) -> u64 {
        let Some(service) = self.filtered_service(filter) else { return 0 };
        let mut count = 0;
        self.each_flow((self.clock)(), |_, _, data| count += u64::from(self.is_of(data, service)));
        count
    }

    /// Removes flows and says how many they were.
    pub fn flush_flows(&mut self, filter: &FlowFilter) -> u64 {
        let now = (self.clock)();
        let Some(service) = self.filtered_service(filter) else { return 0 };
        let storage = self.maps.flows();
        let mut count = 0;
        for (place, slot) in slots(storage) {
            let data = Data(slot.data.load());
            if !is_live(storage, data, now) {
                continue;
            }
            let fingerprint = Fingerprint(slot.fingerprint.load());
            match data.direction() {
                Direction::Forward if self.is_of(data, service) => {
                    let twin = storage.record(place).and_then(|record| record.read(fingerprint)).map(|flow| flow.twin);
                    let removed = release(storage, slot, fingerprint, now);
                    count += u64::from(removed);
                    // Left alone, it would bring back the slot that was removed.
                    if let Some(found) = twin.and_then(|twin| storage.find(twin, now)) {
                        release(storage, found.slot, Fingerprint(found.slot.fingerprint.load()), now);
                    }
                }
                Direction::Reply if self.is_reply_of(data, service) => {
                    release(storage, slot, fingerprint, now);
                }
                _ => {}
            }
        }
        count
    }

    /// Slots of live flows, and slots there are.
    pub(super) fn flow_slots(&self) -> (u64, u64) {
        let (storage, now) = (self.maps.flows(), (self.clock)());
        let live = slots(storage).filter(|(_, slot)| is_live(storage, Data(slot.data.load()), now)).count();
        (live as u64, (u64::from(storage.mask()) + 1) * SLOTS as u64)
    }

    /// Every number in every live slot and its record. Expired slots are cleared on the way, so that no packet that saw
    /// one alive a moment ago revives it.
    pub(super) fn named_by_flows(&self) -> Named {
        let mut named = Named {
            frontends: vec![false; self.sizes.frontends as usize],
            backends: vec![false; self.sizes.backends as usize],
        };
        let mark = |numbers: &mut Vec<bool>, id: u32| {
            if let Some(named) = numbers.get_mut(id as usize) {
                *named = true;
            }
        };
        let storage = self.maps.flows();
        for (place, slot) in slots(storage) {
            let Some(data) = self.live_or_cleared(storage, slot) else { continue };
            match data.direction() {
                Direction::Forward => mark(&mut named.backends, data.id()),
                Direction::Reply => mark(&mut named.frontends, data.id()),
            }
            let record = storage.record(place).and_then(|record| record.read(Fingerprint(slot.fingerprint.load())));
            if let Some(flow) = record {
                mark(&mut named.frontends, flow.frontend);
                mark(&mut named.backends, flow.backend);
            }
        }
        named
    }

    /// Clears expired flows in the next part of the table, so that none revives when time has wrapped.
    pub(super) fn sweep(&mut self) {
        let storage = self.maps.flows();
        let buckets = u64::from(storage.mask()) + 1;
        let part = buckets.div_ceil(SWEEP_TICKS.into()) as u32;
        for index in (0..part).map(|n| self.swept.wrapping_add(n) & storage.mask()) {
            for slot in storage.bucket(index).iter().flat_map(|bucket| &bucket.slots) {
                self.live_or_cleared(storage, slot);
            }
        }
        self.swept = self.swept.wrapping_add(part) & storage.mask();
    }

    /// A slot's data, if its flow is alive. One that expired is freed, unless somebody is writing it.
    fn live_or_cleared(&self, storage: &dyn Storage, slot: &Slot) -> Option<Data> {
        let data = Data(slot.data.load());
        if matches!(data.state(), FlowState::FREE | FlowState::CLAIMING) {
            return None;
        }
        // Read after the slot: by a clock from before, a flow that packets refreshed since then would be far ahead of it, hence very old.
        if is_live(storage, data, (self.clock)()) {
            return Some(data);
        }
        // Whoever was faster has revived it.
        table::release(slot, data);
        None
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

    fn flow(&self, storage: &dyn Storage, place: Place, slot: &Slot, data: Data, now: Ticks) -> Option<Flow> {
        let record = storage.record(place)?.read(Fingerprint(slot.fingerprint.load()))?;
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
        let source = self.maps.source(record.snat.source());
        Some(Flow {
            service,
            client: socket_address(record.client, record.client_port),
            protocol: protocol_name(record.protocol).to_owned(),
            source: source.map(|address| socket_address(address, record.snat.port())),
            state: data.state().name().to_owned(),
            idle_seconds: seconds_from_ticks(data.idle(now).into()),
        })
    }

    /// The addresses of the node that flows were given as their source: those of IPv4 first.
    pub fn sources(&self) -> Vec<IpAddr> {
        let known = (1..snat::ADDRESSES).filter_map(|index| self.maps.source(index));
        let mut sources: Vec<_> = known.map(|address| socket_address(address, PortBe(0)).ip()).collect();
        sources.sort_unstable();
        sources
    }

    fn each_flow(&self, now: Ticks, mut each: impl FnMut(Place, &Slot, Data)) {
        forward(self.maps.flows(), now).for_each(|(place, slot, data)| each(place, slot, data));
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

pub(super) fn slots(storage: &dyn Storage) -> impl Iterator<Item = (Place, &Slot)> {
    let buckets = (0..=storage.mask()).filter_map(|index| Some((index, storage.bucket(index)?)));
    buckets.flat_map(|(index, bucket)| {
        bucket.slots.iter().enumerate().map(move |(number, slot)| (Place::new(index, number), slot))
    })
}

/// The live slots of the direction from the client, of which each flow has one.
fn forward(storage: &dyn Storage, now: Ticks) -> impl Iterator<Item = (Place, &Slot, Data)> {
    slots(storage).filter_map(move |(place, slot)| {
        let data = Data(slot.data.load());
        let is_flow = is_live(storage, data, now) && data.direction() == Direction::Forward;
        is_flow.then_some((place, slot, data))
    })
}

/// Frees a slot as long as it is this flow's, however often packets change it meanwhile. Says whether it did.
fn release(storage: &dyn Storage, slot: &Slot, fingerprint: Fingerprint, now: Ticks) -> bool {
    for _ in 0..ATTEMPTS {
        let data = Data(slot.data.load());
        if slot.fingerprint.load() != fingerprint.0 || !is_live(storage, data, now) {
            return false;
        }
        if table::release(slot, data) {
            return true;
        }
    }
    false
}
