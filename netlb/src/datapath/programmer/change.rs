//! One service's change: written beside what is in force, switched over, or taken back.

use netlb_common::{
    filter::Kind,
    maps::{Backend, Config, ConfigRef, EndpointKey, Frontend, algorithm},
};

use super::*;
use crate::{
    model::Algorithm,
    resolve::{ResolvedFrontend, Rule},
};

/// What a change has written so far.
#[derive(Debug)]
struct Change {
    service: u32,
    /// New numbers.
    frontends: Vec<u32>,
    backends: Vec<u32>,
    /// Flags before the change.
    raised: Vec<(u32, u8)>,
    /// By pool; held while the change goes on.
    rings: Vec<Option<u32>>,
    members: Vec<Part>,
    configs: Vec<Served>,
    /// How many of them, from the first on, only take the place of others.
    in_place: usize,
    addresses: Vec<Addr>,
    ranges: Vec<Range>,
    owners: Vec<(EndpointKey, u32)>,
    /// What was in force for the first of `configs`, whose turn has come.
    replaced: Vec<Option<Served>>,
    /// Whether the service has lost something it had.
    is_halfway: bool,
}

/// The members of a pool for one protocol.
#[derive(Clone, Copy, Debug)]
struct Part {
    pool: usize,
    protocol: u8,
    region: Option<u32>,
}

impl<M: Maps> Programmer<M> {
    /// Makes a service what it is wanted to be, and says whether it was not.
    pub(super) fn program(&mut self, plan: &Plan<'_>, pools: &Pools) -> Result<bool, ApplyError> {
        let name = plan.service.name();
        let index = match self.names.get(name) {
            Some(index) => *index,
            None => {
                let entry = Entry::new(Some(name.to_owned()), State::Removed);
                let full = full("SERVICE_STATS", self.services.size(), "limits.services");
                let index = self.services.insert(entry).ok_or(full)?;
                self.names.insert(name.to_owned(), index);
                index
            }
        };
        let mut change = Change {
            service: index,
            frontends: Vec::new(),
            backends: Vec::new(),
            raised: Vec::new(),
            rings: Vec::new(),
            members: Vec::new(),
            configs: Vec::new(),
            in_place: 0,
            addresses: Vec::new(),
            ranges: Vec::new(),
            owners: Vec::new(),
            replaced: Vec::new(),
            is_halfway: false,
        };
        let flags = plan.backend_flags(&self.node);
        let written = self.write(&mut change, plan, pools, &flags);
        match written.and_then(|()| self.switch(&mut change, plan)) {
            Ok(()) => self.finish(change, plan, &flags),
            Err(error) => {
                self.take_back(change);
                Err(error)
            }
        }
    }

    /// Writes what no packet reads yet.
    fn write(&mut self, change: &mut Change, plan: &Plan<'_>, pools: &Pools, flags: &[u8]) -> Result<(), ApplyError> {
        let backends = plan.service.backends();
        for key in plan.keys() {
            self.write_frontend(change, key)?;
        }
        if let Some(entry) = self.services.get_mut(change.service) {
            entry.backends.reserve(backends.len().saturating_sub(entry.backends.len()));
        }
        for protocol in plan.protocols() {
            for (backend, flags) in backends.iter().zip(flags) {
                let weight = backend.weight.get();
                self.write_backend(change, endpoint_key(backend.address, protocol), *flags, weight)?;
            }
        }
        if plan.service.algorithm() == Algorithm::LeastConn {
            self.begin_load(change.service);
        }
        for pool in &pools.all {
            let ring = if pool.ring.is_empty() { None } else { Some(self.write_ring(&pool.ring)?) };
            change.rings.push(ring);
        }
        for (number, pool) in pools.all.iter().enumerate() {
            for protocol in plan.protocols() {
                let region = match &*pool.ring {
                    [] => None,
                    _ => Some(self.write_members(change.service, &pool.members, protocol)?),
                };
                change.members.push(Part { pool: number, protocol, region });
            }
        }
        // Those that need no more room than they have go first: what they no longer need is room for the others.
        let is_in_place = |programmer: &Self, frontend: &ResolvedFrontend| {
            let key = frontend_key(&frontend.frontend);
            let is_served = |key| programmer.served.contains_key(&key);
            is_served(key) && (frontend.outside.is_none() || is_served(outside(key)))
        };
        for in_place in [true, false] {
            for frontend in &plan.resolved.frontends {
                if is_in_place(self, frontend) == in_place {
                    let key = frontend_key(&frontend.frontend);
                    if let Some(rule) = frontend.outside {
                        self.write_config(change, plan, pools, frontend, outside(key), rule)?;
                    }
                    self.write_config(change, plan, pools, frontend, key, frontend.inside)?;
                }
            }
            if in_place {
                change.in_place = change.configs.len();
            }
        }
        change.addresses = self.add_addresses(change.service, &plan.addresses())?;
        change.ranges = self.add_ranges(change.service, &plan.ranges())?;
        self.write_owners(change)
    }

    fn write_frontend(&mut self, change: &mut Change, key: EndpointKey) -> Result<(), ApplyError> {
        let Some(entry) = self.services.get_mut(change.service) else { return Ok(()) };
        if entry.frontends.contains_key(&key) {
            return Ok(());
        }
        let full = full("FRONTENDS", self.frontends.size(), "limits.services");
        let id = self.frontends.insert(Endpoint { key, service: change.service, flags: 0, weight: 0 }).ok_or(full)?;
        entry.frontends.insert(key, id);
        change.frontends.push(id);
        let same_protocol = entry.backends.keys().filter(|backend| backend.protocol == key.protocol);
        change.owners.extend(same_protocol.map(|backend| (*backend, id)));
        let EndpointKey { addr, port, protocol, .. } = key;
        self.maps.set_frontend(id, &Frontend { addr, port, protocol, service: change.service, ..Frontend::default() });
        self.add_filter_bit(&key, Kind::Frontend);
        Ok(())
    }

    fn write_backend(
        &mut self,
        change: &mut Change,
        key: EndpointKey,
        flags: u8,
        weight: u16,
    ) -> Result<(), ApplyError> {
        let Some(entry) = self.services.get_mut(change.service) else { return Ok(()) };
        if let Some(id) = entry.backends.get(&key).copied() {
            let before = self.backends.get(id).map_or(0, |backend| backend.flags);
            // What forbids comes with the last step, and goes with the first.
            let forbids = Backend::ONLY_LOCAL & !(before & flags);
            if self.set_flags(id, (before | flags) & !forbids) {
                change.raised.push((id, before));
            }
            return Ok(());
        }
        let full = full("BACKENDS", self.backends.size(), "limits.backends");
        let id = self.backends.insert(Endpoint { key, service: change.service, flags, weight }).ok_or(full)?;
        entry.backends.insert(key, id);
        change.backends.push(id);
        let same_protocol = entry.frontends.iter().filter(|(frontend, _)| frontend.protocol == key.protocol);
        change.owners.extend(same_protocol.map(|(_, frontend)| (key, *frontend)));
        let EndpointKey { addr, port, protocol, .. } = key;
        let service = change.service;
        let weight = weight.into();
        self.maps.set_backend(id, &Backend { addr, port, protocol, flags, service, weight, ..Backend::default() });
        self.add_filter_bit(&key, Kind::Backend);
        Ok(())
    }

    /// A region with this ring, held once: one that is there already, or a new one.
    fn write_ring(&mut self, ring: &[u16]) -> Result<u32, ApplyError> {
        let (content, len) = (self.content.hash_one(ring), ring.len() as u32);
        if let Some(at) = self.rings.find(content, len)
            && self.maps.ring(at, len) == ring
        {
            self.rings.hold(at);
            return Ok(at);
        }
        let full = full("RINGS", self.rings.size(), "limits.ring_slots");
        let at = self.rings.allocate(len, content).ok_or(full)?;
        self.maps.write_ring(at, ring);
        Ok(at)
    }

    /// The same for members.
    fn write_members(&mut self, service: u32, members: &Members, protocol: u8) -> Result<u32, ApplyError> {
        let entry = self.services.get(service);
        let id = |address| entry?.backends.get(&endpoint_key(address, protocol)).copied();
        // Each was written before this.
        let ids: Vec<_> = members.addresses().map(|address| id(address).unwrap_or_default()).collect();
        let (content, len) = (self.content.hash_one(&*ids), ids.len() as u32);
        if let Some(at) = self.members.find(content, len)
            && self.maps.members(at, len) == ids
        {
            self.members.hold(at);
            return Ok(at);
        }
        let full = full("MEMBERS", self.members.size(), "limits.backends");
        let at = self.members.allocate(len, content).ok_or(full)?;
        self.maps.write_members(at, &ids);
        Ok(at)
    }

    /// A record for a frontend, unless the one in force says the same.
    fn write_config(
        &mut self,
        change: &mut Change,
        plan: &Plan<'_>,
        pools: &Pools,
        frontend: &ResolvedFrontend,
        key: EndpointKey,
        rule: Rule,
    ) -> Result<(), ApplyError> {
        let number = pools.number(rule.set);
        let part = change.members.iter().find(|part| part.pool == number && part.protocol == key.protocol);
        let region = part.and_then(|part| part.region);
        let Pool { members, ring } = &pools.all[number];
        let id = self.services.get(change.service).and_then(|entry| entry.frontends.get(&base(key)));
        let in_force = self.served.get(&key);
        let mut config = Config {
            key,
            generation: in_force.map_or(0, |served| served.config.generation),
            service: change.service,
            frontend: id.copied().unwrap_or_default(),
            ring: change.rings[number].unwrap_or_default(),
            ring_len: ring.len() as u32,
            members: region.unwrap_or_default(),
            members_len: region.map_or(0, |_| members.len() as u32),
            algorithm: match plan.service.algorithm() {
                Algorithm::Maglev => algorithm::MAGLEV,
                Algorithm::Random => algorithm::RANDOM,
                Algorithm::RoundRobin => algorithm::ROUND_ROBIN,
                Algorithm::SourceHash => algorithm::SOURCE_HASH,
                Algorithm::LeastConn => algorithm::LEAST_CONN,
            },
            flags: plan.config_flags(frontend, rule, &key),
            affinity: plan.affinity(),
        };
        if in_force.is_some_and(|served| served.config == config) {
            return Ok(());
        }
        let full = full("CONFIGS", self.configs.size(), "limits.services");
        let index = self.configs.insert(()).ok_or(full)?;
        self.generation = self.generation.wrapping_add(1).max(1);
        config.generation = self.generation;
        self.maps.set_config(index, &config);
        if config.ring_len > 0 {
            self.rings.hold(config.ring);
            self.members.hold(config.members);
        }
        change.configs.push(Served { reference: ConfigRef::new(index, config.generation), config });
        Ok(())
    }

    /// Lets replies of new backends, and of backends to new frontends, find their way without a flow's slot.
    fn write_owners(&mut self, change: &Change) -> Result<(), ApplyError> {
        let before = self.owners.len();
        let mut changed = Vec::new();
        for (backend, frontend) in &change.owners {
            if self.owners.add(*backend, *frontend) && changed.last() != Some(backend) {
                changed.push(*backend);
            }
        }
        if self.owners.len() > before.max(self.sizes.owners as usize) {
            return Err(full("OWNERS", self.sizes.owners, "limits.backends"));
        }
        let mut written = HashSet::with_capacity(changed.len());
        changed.retain(|backend| written.insert(*backend));
        let entries = changed.into_iter().filter_map(|backend| Some((backend, self.owners.get(&backend)?)));
        let entries: Vec<_> = entries.collect();
        self.maps.set_owners(&entries).map_err(|error| match is_full(&error) {
            true => full("OWNERS", self.sizes.owners, "limits.backends"),
            false => kernel_error("OWNERS", &error),
        })
    }

    /// Puts the new records in force.
    fn switch(&mut self, change: &mut Change, plan: &Plan<'_>) -> Result<(), ApplyError> {
        let size = self.sizes.services;
        let new = change.configs.iter().filter(|new| !self.served.contains_key(&new.config.key)).count();
        let room = (size as usize).saturating_sub(self.served.len());
        let mut dropped = Vec::new();
        if new > room {
            dropped = self.dropped_entries(change.service, plan);
            dropped.retain(|key| {
                let served = self.served.get(key);
                served.is_some_and(|served| served.config.service == change.service)
                    && !self.moving.contains(&base(*key))
            });
            if new > room + dropped.len() {
                return Err(full("SERVICES", size, "limits.services"));
            }
        }
        self.put_in_force(change, change.in_place)?;
        // Nothing but an error of the kernel is in the way of the others any more.
        for key in dropped {
            change.is_halfway = true;
            self.withdraw_entry(change.service, key)?;
        }
        self.put_in_force(change, change.configs.len())
    }

    /// Puts the new records in force, up to one of them.
    fn put_in_force(&mut self, change: &mut Change, end: usize) -> Result<(), ApplyError> {
        for new in &change.configs[change.replaced.len()..end] {
            let key = new.config.key;
            self.maps.set_service(&key, new.reference).map_err(|error| match is_full(&error) {
                true => full("SERVICES", self.sizes.services, "limits.services"),
                false => kernel_error("SERVICES", &error),
            })?;
            let old = self.put_served(key, Some(*new));
            change.replaced.push(old);
            if let Some(old) = old.filter(|old| old.config.service != change.service) {
                self.note_loss(old.config.service, &key);
            }
        }
        Ok(())
    }

    /// A service that still has a frontend another one took, because it failed to let go of it, is no longer what it
    /// was.
    fn note_loss(&mut self, loser: u32, key: &EndpointKey) {
        if self.is_wanted(loser, key)
            && let Some(entry) = self.services.get_mut(loser)
        {
            entry.programmed = State::Unknown;
        }
    }

    /// Gives up what the change replaced.
    fn finish(&mut self, change: Change, plan: &Plan<'_>, flags: &[u8]) -> Result<bool, ApplyError> {
        let Change { service: index, frontends, backends, raised, rings, members, configs, ranges, replaced, .. } =
            change;
        let mut changed = !(frontends.is_empty()
            && backends.is_empty()
            && raised.is_empty()
            && configs.is_empty()
            && ranges.is_empty());
        self.retired.configs.extend(replaced.into_iter().flatten());
        rings.into_iter().flatten().for_each(|ring| self.rings.release(ring));
        members.into_iter().filter_map(|part| part.region).for_each(|region| self.members.release(region));

        for key in plan.keys() {
            let id = self.services.get(index).and_then(|entry| entry.frontends.get(&key));
            if let Some(id) = id {
                self.waiting.frontends.remove(id);
            }
        }
        // Where nobody serves, datagrams have nowhere better to go: they stay where they are, with whoever stopped first as well.
        let kept = if flags.iter().any(|flags| flags & Backend::SERVING != 0) { 0 } else { Backend::SERVING };
        let service = plan.service;
        for protocol in plan.protocols() {
            for (backend, flags) in service.backends().iter().zip(flags) {
                let key = endpoint_key(backend.address, protocol);
                let id = self.services.get(index).and_then(|entry| entry.backends.get(&key)).copied();
                if let Some(id) = id {
                    changed |= self.set_flags(id, flags | kept);
                    self.set_weight(id, backend.weight.get());
                    self.waiting.backends.remove(&id);
                }
            }
        }
        for id in self.dropped_backends(index, plan) {
            self.set_flags(id, self.flags(id) & kept);
            changed |= self.waiting.backends.insert(id);
        }
        let mut result = Ok(());
        for key in self.dropped_entries(index, plan) {
            let id = self.services.get(index).and_then(|entry| entry.frontends.get(&key)).copied();
            match self.withdraw_entry(index, key) {
                Ok(()) => changed |= id.is_some_and(|id| self.waiting.frontends.insert(id)),
                Err(error) => {
                    result = Err(error);
                    // Its other entry may be asked for by this one.
                    break;
                }
            }
        }
        let (addresses, ranges) = (plan.addresses(), plan.ranges());
        let is_held = !plan.held.is_empty();
        if let Some(entry) = self.services.get_mut(index) {
            entry.wanted = self.round;
            entry.affinity = plan.affinity();
            entry.held.clone_from(&plan.held);
            entry.stale = false;
            entry.programmed = match result {
                Ok(()) => State::As(Arc::clone(service)),
                Err(_) => State::Unknown,
            };
            let addresses: Vec<_> = entry.addresses.iter().filter(|addr| !addresses.contains(addr)).copied().collect();
            let ranges: Vec<_> =
                entry.ranges.iter().filter(|range| ranges.binary_search(range).is_err()).copied().collect();
            changed |= !ranges.is_empty();
            if result.is_ok() {
                self.drop_addresses(index, &addresses);
                self.drop_ranges(index, &ranges);
            }
        }
        if is_held {
            self.contested.insert(index);
        } else {
            self.contested.remove(&index);
        }
        result.map(|()| changed)
    }

    fn flags(&self, id: u32) -> u8 {
        self.backends.get(id).map_or(0, |backend| backend.flags)
    }

    /// What the service has of `SERVICES`, or had, and is not wanted to have: a frontend's first entry before its second.
    fn dropped_entries(&self, index: u32, plan: &Plan<'_>) -> Vec<EndpointKey> {
        let Some(entry) = self.services.get(index) else { return Vec::new() };
        let is_ours = |key: &EndpointKey| self.served.get(key).is_some_and(|served| served.config.service == index);
        let mut dropped = Vec::new();
        for frontend in plan.resolved.frontends.iter().filter(|frontend| frontend.outside.is_none()) {
            let key = outside(frontend_key(&frontend.frontend));
            if is_ours(&key) {
                dropped.push(key);
            }
        }
        if entry.frontends.len() > plan.resolved.frontends.len() {
            let wanted: HashSet<_> = plan.keys().collect();
            for key in entry.frontends.keys().filter(|key| !wanted.contains(key)) {
                dropped.push(*key);
                if is_ours(&outside(*key)) {
                    dropped.push(outside(*key));
                }
            }
        }
        dropped
    }

    fn dropped_backends(&self, index: u32, plan: &Plan<'_>) -> Vec<u32> {
        let Some(entry) = self.services.get(index) else { return Vec::new() };
        let backends = plan.service.backends();
        if entry.backends.len() == backends.len() * plan.protocols().count() {
            return Vec::new();
        }
        let keys = plan
            .protocols()
            .flat_map(|protocol| backends.iter().map(move |backend| endpoint_key(backend.address, protocol)));
        let wanted: HashSet<_> = keys.collect();
        entry.backends.iter().filter(|(key, _)| !wanted.contains(key)).map(|(_, id)| *id).collect()
    }

    /// Restores what was in force. What was for a moment stays until no packet or flow can know of it.
    fn take_back(&mut self, change: Change) {
        let Change {
            service: index,
            frontends,
            backends,
            raised,
            rings,
            members,
            mut configs,
            addresses,
            ranges,
            owners,
            replaced,
            ..
        } = change;
        let mut is_halfway = change.is_halfway;
        let unseen = configs.split_off(replaced.len());
        let was_seen = !configs.is_empty();
        // What sends packets to another entry goes before that one.
        for (new, old) in configs.into_iter().zip(replaced).rev() {
            is_halfway |= !self.restore(new, old);
        }
        for Served { reference, config } in unseen {
            self.configs.free(reference.index());
            self.release_regions(&config);
        }
        rings.into_iter().flatten().for_each(|ring| self.rings.release(ring));
        members.into_iter().filter_map(|part| part.region).for_each(|region| self.members.release(region));
        if !is_halfway {
            self.drop_addresses(index, &addresses);
            self.drop_ranges(index, &ranges);
        }
        for (id, flags) in raised {
            self.set_flags(id, flags);
        }
        if is_halfway {
            // The next round completes it, or takes it away.
            if let Some(entry) = self.services.get_mut(index) {
                entry.programmed = State::Unknown;
            }
        } else if was_seen {
            self.waiting.frontends.extend(frontends);
            for id in backends {
                self.set_flags(id, 0);
                self.waiting.backends.insert(id);
            }
        } else {
            self.disown(owners);
            frontends.into_iter().for_each(|id| self.forget_frontend(id));
            backends.into_iter().for_each(|id| self.forget_backend(id));
        }
        self.dissolve(index);
    }

    /// Puts the old entry of `SERVICES` in the place of the new one. Says whether that worked.
    fn restore(&mut self, new: Served, old: Option<Served>) -> bool {
        let key = new.config.key;
        let sends_outside = |served: &Served| served.config.flags & Config::OUTSIDE != 0;
        let outside = self.served.contains_key(&outside(key));
        let is_asked_for = || self.served.get(&base(key)).is_some_and(sends_outside);
        if key.scope == 0 && old.as_ref().is_some_and(sends_outside) && !outside
            || key.scope != 0 && old.is_none() && is_asked_for()
        {
            self.retired.configs.extend(old);
            return false;
        }
        let restored = match &old {
            Some(old) => self.maps.set_service(&key, old.reference),
            None => self.maps.remove_service(&key),
        };
        if let Err(error) = restored {
            tracing::error!("map SERVICES: an entry could not be put back: {error}");
            self.retired.configs.extend(old);
            return false;
        }
        self.put_served(key, old);
        self.retired.configs.push(new);
        true
    }
}

fn full(map: &'static str, size: u32, option: &'static str) -> ApplyError {
    ApplyError::MapFull { map, size: size.into(), option }
}
