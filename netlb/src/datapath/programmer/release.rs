//! What is no longer in force, until nobody can know of it.
//!
//! Records and regions rest until every packet that may have read them is done. Numbers of frontends and backends wait
//! until no record names them that is in force or rests, and no flow; then they rest as well.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use super::{flows::Sought, *};

/// Ticks between two scans of the flow table for numbers that wait.
const SCAN_TICKS: u32 = 5;
/// The same, where flows turn out to live on.
const MOST_SCAN_TICKS: u32 = 60;

/// What packets under way may still read.
#[derive(Debug, Default)]
pub(super) struct Retired {
    pub(super) configs: Vec<Served>,
    frontends: Vec<u32>,
    backends: Vec<u32>,
    services: Vec<u32>,
}

impl Retired {
    fn is_empty(&self) -> bool {
        let Self { configs, frontends, backends, services } = self;
        configs.is_empty() && frontends.is_empty() && backends.is_empty() && services.is_empty()
    }
}

/// What was retired before a grace period began.
#[derive(Debug)]
pub(super) struct Resting {
    retired: Retired,
    is_over: Arc<AtomicBool>,
}

/// Numbers that flows may still name.
#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) frontends: BTreeSet<u32>,
    pub(super) backends: BTreeSet<u32>,
    /// Of the frontends, those whose datagram flows were removed.
    pub(super) cut: BTreeSet<u32>,
    scanned: Ticks,
    /// Ticks from that scan to the next.
    pause: u32,
}

impl Waiting {
    pub(super) const fn new(now: Ticks) -> Self {
        let none = BTreeSet::new;
        Self { frontends: none(), backends: none(), cut: none(), scanned: now, pause: SCAN_TICKS }
    }

    fn is_empty(&self) -> bool {
        self.frontends.is_empty() && self.backends.is_empty()
    }

    /// Something may have come to wait that no flow names.
    pub(super) const fn hurry(&mut self) {
        self.pause = SCAN_TICKS;
    }
}

impl<M: Maps> Programmer<M> {
    /// Clears expired flows, a part of the table at a time, and reuses what is out of use. To be called about once a
    /// second; flows have their own clock.
    pub fn tick(&mut self) {
        self.sweep();
        self.sweep_affinity();
        self.count_loads();
        self.cut_datagrams();
        self.rest();
        if !self.waiting.is_empty() && (self.clock)().0.wrapping_sub(self.waiting.scanned.0) >= self.waiting.pause {
            self.scan();
        }
    }

    /// Makes room at once.
    pub(super) fn reclaim(&mut self) {
        self.settle();
        if !self.waiting.is_empty() {
            self.scan();
            self.settle();
        }
    }

    /// Frees what only packets could read that are done by now, and lets rest what was retired since.
    fn rest(&mut self) {
        if self.resting.is_none() && !self.retired.is_empty() {
            let retired = std::mem::take(&mut self.retired);
            self.resting = Some(Resting { retired, is_over: self.maps.begin_grace() });
        }
        if let Some(Resting { retired, .. }) = self.resting.take_if(|resting| resting.is_over.load(Ordering::Acquire)) {
            self.free(retired);
        }
    }

    /// Waits for packets under way, and frees what only they could read.
    fn settle(&mut self) {
        if self.resting.is_none() && self.retired.is_empty() {
            return;
        }
        self.maps.grace();
        let retired = std::mem::take(&mut self.retired);
        let resting = self.resting.take().map(|resting| resting.retired);
        resting.into_iter().chain([retired]).for_each(|retired| self.free(retired));
    }

    fn free(&mut self, Retired { configs, frontends, backends, services }: Retired) {
        self.freed += (configs.len() + frontends.len() + backends.len()) as u64;
        for Served { reference, config } in configs {
            self.configs.free(reference.index());
            self.release_regions(&config);
        }
        // Counters first: a daemon that finds the record clears them again.
        for index in services {
            self.maps.clear_service_stats(index);
            self.services.free(index);
        }
        for id in backends {
            self.maps.clear_backend_flows(id);
            self.maps.set_backend(id, &Default::default());
            self.backends.free(id);
        }
        for id in frontends {
            self.maps.set_frontend(id, &Default::default());
            self.frontends.free(id);
        }
    }

    /// Looks which of the numbers that wait are named by no flow any more.
    fn scan(&mut self) {
        let Waiting { frontends, backends, .. } = &self.waiting;
        let mut sought = Sought::new(&self.sizes, frontends, backends);
        // A record names numbers of its own service alone.
        let mut is_concerned = vec![false; self.sizes.numbers as usize];
        let endpoints = frontends.iter().filter_map(|id| self.frontends.get(*id));
        for endpoint in endpoints.chain(backends.iter().filter_map(|id| self.backends.get(*id))) {
            is_concerned[endpoint.service as usize] = true;
        }
        // What goes to another service in these moments, or could not be removed, is still in force. And a packet that is under way may
        // make a flow of what is not.
        let resting = self.resting.iter().flat_map(|resting| &resting.retired.configs);
        for Served { config, .. } in self.served.values().chain(&self.retired.configs).chain(resting) {
            if is_concerned[config.service as usize] {
                sought.find_frontend(config.frontend);
                self.maps
                    .members(config.members, config.members_len)
                    .into_iter()
                    .for_each(|id| sought.find_backend(id));
            }
        }
        self.seek_in_flows(&mut sought);
        let waiting = std::mem::take(&mut self.waiting.backends);
        let (free_backends, backends): (BTreeSet<_>, _) = waiting.into_iter().partition(|id| sought.has_backend(*id));
        let waiting = std::mem::take(&mut self.waiting.frontends);
        let (free_frontends, frontends): (BTreeSet<_>, _) =
            waiting.into_iter().partition(|id| sought.has_frontend(*id));
        (self.waiting.backends, self.waiting.frontends) = (backends, frontends);

        let found = !(free_backends.is_empty() && free_frontends.is_empty());
        let is_early = self.resting.is_some() || !self.retired.configs.is_empty();
        self.waiting.scanned = (self.clock)();
        self.waiting.pause = if found || is_early { SCAN_TICKS } else { (self.waiting.pause * 2).min(MOST_SCAN_TICKS) };
        free_backends.into_iter().for_each(|id| self.release_backend(id));
        free_frontends.into_iter().for_each(|id| self.release_frontend(id));
    }

    fn release_frontend(&mut self, id: u32) {
        let Some(Endpoint { key, service, .. }) = self.frontends.get(id).copied() else { return };
        if let Some(entry) = self.services.get(service).filter(|entry| entry.frontends.get(&key) == Some(&id)) {
            let same_protocol = entry.backends.keys().filter(|backend| backend.protocol == key.protocol);
            let pairs = same_protocol.map(|backend| (*backend, id)).collect();
            self.disown(pairs);
        }
        self.detach_frontend(id);
        self.retired.frontends.push(id);
        self.dissolve(service);
    }

    fn release_backend(&mut self, id: u32) {
        let Some(Endpoint { key, service, .. }) = self.backends.get(id).copied() else { return };
        if let Some(entry) = self.services.get(service).filter(|entry| entry.backends.get(&key) == Some(&id)) {
            let same_protocol = entry.frontends.iter().filter(|(frontend, _)| frontend.protocol == key.protocol);
            let pairs = same_protocol.map(|(_, frontend)| (key, *frontend)).collect();
            self.disown(pairs);
        }
        self.detach_backend(id);
        self.retired.backends.push(id);
        self.dissolve(service);
    }

    /// Frees a number that was never in force.
    pub(super) fn forget_frontend(&mut self, id: u32) {
        self.detach_frontend(id);
        self.maps.set_frontend(id, &Default::default());
        self.frontends.free(id);
    }

    /// The same for a backend.
    pub(super) fn forget_backend(&mut self, id: u32) {
        self.detach_backend(id);
        self.maps.set_backend(id, &Default::default());
        self.backends.free(id);
    }

    fn detach_frontend(&mut self, id: u32) {
        let Some(Endpoint { key, service, .. }) = self.frontends.remove(id) else { return };
        if let Some(entry) = self.services.get_mut(service)
            && entry.frontends.get(&key) == Some(&id)
        {
            entry.frontends.remove(&key);
        }
        self.remove_filter_bit(&key, filter::Kind::Frontend);
    }

    fn detach_backend(&mut self, id: u32) {
        let Some(Endpoint { key, service, .. }) = self.backends.remove(id) else { return };
        if let Some(entry) = self.services.get_mut(service)
            && entry.backends.get(&key) == Some(&id)
        {
            entry.backends.remove(&key);
        }
        self.remove_filter_bit(&key, filter::Kind::Backend);
    }

    /// Takes frontends from the entries of backends.
    pub(super) fn disown(&mut self, pairs: Vec<(EndpointKey, u32)>) {
        let changed: HashSet<_> = pairs
            .into_iter()
            .filter(|(backend, frontend)| self.owners.remove(*backend, *frontend))
            .map(|(backend, _)| backend)
            .collect();
        for backend in changed {
            let Some(owners) = self.owners.get(&backend) else {
                self.maps.remove_owners(&backend);
                continue;
            };
            if let Err(error) = self.maps.set_owners(&[(backend, owners)]) {
                tracing::warn!("map OWNERS: an entry that is out of use could not be changed: {error}");
            }
        }
    }

    pub(super) fn release_regions(&mut self, config: &Config) {
        if config.ring_len > 0 {
            self.rings.release(config.ring);
            self.members.release(config.members);
        }
    }

    /// Gives up the number of a service of which nothing is left.
    pub(super) fn dissolve(&mut self, index: u32) {
        let is_over = |entry: &&Entry| {
            matches!(entry.programmed, State::Removed) && entry.frontends.is_empty() && entry.backends.is_empty()
        };
        if self.services.get(index).filter(is_over).is_none() {
            return;
        }
        if let Some(name) = self.services.remove(index).and_then(|entry| entry.name) {
            self.names.remove(&name);
        }
        self.retired.services.push(index);
    }
}
