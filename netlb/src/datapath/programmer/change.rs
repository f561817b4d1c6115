//! One service's change: written beside what is in force, switched over, or taken back.

use netlb_common::{
    filter::Kind,
    maps::{Backend, Config, ConfigRef, EndpointKey, Frontend, algorithm},
};

use super::*;
use crate::model::{Algorithm, BackendState, SnatMode};

/// What a change has written so far.
#[derive(Debug)]
struct Change {
    service: u32,
    /// New numbers.
    frontends: Vec<u32>,
    backends: Vec<u32>,
    /// Flags before the change.
    raised: Vec<(u32, u8)>,
    /// Held while the change goes on.
    ring: Option<u32>,
    members: Vec<Part>,
    configs: Vec<Served>,
    owners: Vec<(EndpointKey, u32)>,
    /// What was in force for the first of `configs`, whose turn has come.
    replaced: Vec<Option<Served>>,
    /// Whether the service has lost something it had.
    is_halfway: bool,
}

/// The members of a service for one protocol.
#[derive(Clone, Copy, Debug)]
struct Part {
    protocol: u8,
    region: Option<u32>,
}

impl<M: Maps> Programmer<M> {
    /// Makes a service what it is wanted to be, and says whether it was not.
    pub(super) fn program(
        &mut self,
        service: &Arc<Service>,
        members: &Members,
        ring: &[u16],
    ) -> Result<bool, ApplyError> {
        let index = match self.names.get(service.name()) {
            Some(index) => *index,
            None => {
                let entry = Entry::new(Some(service.name().to_owned()), State::Removed);
                let full = full("SERVICE_STATS", self.services.size(), "limits.services");
                let index = self.services.insert(entry).ok_or(full)?;
                self.names.insert(service.name().to_owned(), index);
                index
            }
        };
        let mut change = Change {
            service: index,
            frontends: Vec::new(),
            backends: Vec::new(),
            raised: Vec::new(),
            ring: None,
            members: Vec::new(),
            configs: Vec::new(),
            owners: Vec::new(),
            replaced: Vec::new(),
            is_halfway: false,
        };
        let written = self.write(&mut change, service, members, ring);
        match written.and_then(|()| self.switch(&mut change, service)) {
            Ok(()) => self.finish(change, service),
            Err(error) => {
                self.take_back(change);
                Err(error)
            }
        }
    }

    /// Writes what no packet reads yet.
    fn write(
        &mut self,
        change: &mut Change,
        service: &Service,
        members: &Members,
        ring: &[u16],
    ) -> Result<(), ApplyError> {
        for frontend in service.frontends() {
            self.write_frontend(change, frontend_key(frontend))?;
        }
        if let Some(entry) = self.services.get_mut(change.service) {
            entry.backends.reserve(service.backends().len().saturating_sub(entry.backends.len()));
        }
        for protocol in protocols(service) {
            for backend in service.backends() {
                self.write_backend(change, endpoint_key(backend.address, protocol), flags(backend.state))?;
            }
        }
        if !ring.is_empty() {
            change.ring = Some(self.write_ring(ring)?);
        }
        for protocol in protocols(service) {
            let region = match ring {
                [] => None,
                _ => Some(self.write_members(change.service, members, protocol)?),
            };
            change.members.push(Part { protocol, region });
        }
        for frontend in service.frontends() {
            self.write_config(change, frontend_key(frontend), service, members, ring)?;
        }
        self.write_owners(change)
    }

    fn write_frontend(&mut self, change: &mut Change, key: EndpointKey) -> Result<(), ApplyError> {
        let Some(entry) = self.services.get_mut(change.service) else { return Ok(()) };
        if entry.frontends.contains_key(&key) {
            return Ok(());
        }
        let full = full("FRONTENDS", self.frontends.size(), "limits.services");
        let id = self.frontends.insert(Endpoint { key, service: change.service, flags: 0 }).ok_or(full)?;
        entry.frontends.insert(key, id);
        change.frontends.push(id);
        let same_protocol = entry.backends.keys().filter(|backend| backend.protocol == key.protocol);
        change.owners.extend(same_protocol.map(|backend| (*backend, id)));
        let EndpointKey { addr, port, protocol, .. } = key;
        self.maps.set_frontend(id, &Frontend { addr, port, protocol, service: change.service, ..Frontend::default() });
        self.add_filter_bit(&key, Kind::Frontend);
        Ok(())
    }

    fn write_backend(&mut self, change: &mut Change, key: EndpointKey, flags: u8) -> Result<(), ApplyError> {
        let Some(entry) = self.services.get_mut(change.service) else { return Ok(()) };
        if let Some(id) = entry.backends.get(&key).copied() {
            let before = self.backends.get(id).map_or(0, |backend| backend.flags);
            if self.set_flags(id, before | flags) {
                change.raised.push((id, before));
            }
            return Ok(());
        }
        let full = full("BACKENDS", self.backends.size(), "limits.backends");
        let id = self.backends.insert(Endpoint { key, service: change.service, flags }).ok_or(full)?;
        entry.backends.insert(key, id);
        change.backends.push(id);
        let same_protocol = entry.frontends.iter().filter(|(frontend, _)| frontend.protocol == key.protocol);
        change.owners.extend(same_protocol.map(|(_, frontend)| (key, *frontend)));
        let EndpointKey { addr, port, protocol, .. } = key;
        let service = change.service;
        self.maps.set_backend(id, &Backend { addr, port, protocol, flags, service, ..Backend::default() });
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
        key: EndpointKey,
        service: &Service,
        members: &Members,
        ring: &[u16],
    ) -> Result<(), ApplyError> {
        let part = change.members.iter().find(|part| part.protocol == key.protocol);
        let region = part.and_then(|part| part.region);
        let frontend = self.services.get(change.service).and_then(|entry| entry.frontends.get(&key));
        let in_force = self.served.get(&key);
        let mut config = Config {
            key,
            generation: in_force.map_or(0, |served| served.config.generation),
            service: change.service,
            frontend: frontend.copied().unwrap_or_default(),
            ring: change.ring.unwrap_or_default(),
            ring_len: ring.len() as u32,
            members: region.unwrap_or_default(),
            members_len: region.map_or(0, |_| members.len() as u32),
            algorithm: match service.algorithm() {
                Algorithm::Maglev => algorithm::MAGLEV,
                Algorithm::Random => algorithm::RANDOM,
                Algorithm::RoundRobin => algorithm::ROUND_ROBIN,
            },
            flags: match service.snat() {
                SnatMode::Auto => 0,
                SnatMode::Always => Config::SNAT_PODS | Config::SNAT_OUTSIDE,
                SnatMode::Never => Config::SNAT_NEVER,
            },
            affinity: 0,
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
    fn switch(&mut self, change: &mut Change, service: &Service) -> Result<(), ApplyError> {
        let size = self.sizes.services;
        let full = || full("SERVICES", size, "limits.services");
        let new = change.configs.iter().filter(|new| !self.served.contains_key(&new.config.key)).count();
        let room = (size as usize).saturating_sub(self.served.len());
        if new > room {
            let mut dropped = self.dropped_frontends(change.service, service);
            dropped.retain(|(key, _)| {
                let served = self.served.get(key);
                served.is_some_and(|served| served.config.service == change.service) && !self.moving.contains(key)
            });
            if new > room + dropped.len() {
                return Err(full());
            }
            // Nothing but an error of the kernel is in the way of the others any more.
            for (key, _) in dropped {
                change.is_halfway = true;
                self.withdraw(change.service, key)?;
            }
        }
        for new in &change.configs {
            let key = new.config.key;
            self.maps.set_service(&key, new.reference).map_err(|error| match is_full(&error) {
                true => full(),
                false => kernel_error("SERVICES", &error),
            })?;
            let old = self.served.insert(key, *new);
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
        let Some(entry) = self.services.get_mut(loser) else { return };
        if let State::As(service) = &entry.programmed
            && service.frontends().iter().any(|frontend| frontend_key(frontend) == *key)
        {
            entry.programmed = State::Unknown;
        }
    }

    /// Gives up what the change replaced.
    fn finish(&mut self, change: Change, service: &Arc<Service>) -> Result<bool, ApplyError> {
        let Change { service: index, frontends, backends, raised, ring, members, configs, replaced, .. } = change;
        let mut changed = !(frontends.is_empty() && backends.is_empty() && raised.is_empty() && configs.is_empty());
        self.retired.configs.extend(replaced.into_iter().flatten());
        ring.into_iter().for_each(|ring| self.rings.release(ring));
        members.into_iter().filter_map(|part| part.region).for_each(|region| self.members.release(region));

        for frontend in service.frontends() {
            let id = self.services.get(index).and_then(|entry| entry.frontends.get(&frontend_key(frontend)));
            if let Some(id) = id {
                self.waiting.frontends.remove(id);
            }
        }
        for protocol in protocols(service) {
            for backend in service.backends() {
                let key = endpoint_key(backend.address, protocol);
                let id = self.services.get(index).and_then(|entry| entry.backends.get(&key)).copied();
                if let Some(id) = id {
                    changed |= self.set_flags(id, flags(backend.state));
                    self.waiting.backends.remove(&id);
                }
            }
        }
        for id in self.dropped_backends(index, service) {
            self.set_flags(id, 0);
            changed |= self.waiting.backends.insert(id);
        }
        let mut result = Ok(());
        for (key, id) in self.dropped_frontends(index, service) {
            match self.withdraw(index, key) {
                Ok(()) => changed |= self.waiting.frontends.insert(id),
                Err(error) => result = Err(error),
            }
        }
        if let Some(entry) = self.services.get_mut(index) {
            entry.wanted = self.round;
            entry.programmed = match result {
                Ok(()) => State::As(Arc::clone(service)),
                Err(_) => State::Unknown,
            };
        }
        result.map(|()| changed)
    }

    /// Frontends the service has and is not wanted to have.
    fn dropped_frontends(&self, index: u32, service: &Service) -> Vec<(EndpointKey, u32)> {
        let Some(entry) = self.services.get(index) else { return Vec::new() };
        if entry.frontends.len() == service.frontends().len() {
            return Vec::new();
        }
        let wanted: HashSet<_> = service.frontends().iter().map(frontend_key).collect();
        let dropped = entry.frontends.iter().filter(|(key, _)| !wanted.contains(key));
        dropped.map(|(key, id)| (*key, *id)).collect()
    }

    fn dropped_backends(&self, index: u32, service: &Service) -> Vec<u32> {
        let Some(entry) = self.services.get(index) else { return Vec::new() };
        if entry.backends.len() == service.backends().len() * protocols(service).count() {
            return Vec::new();
        }
        let keys = protocols(service)
            .flat_map(|protocol| service.backends().iter().map(move |backend| endpoint_key(backend.address, protocol)));
        let wanted: HashSet<_> = keys.collect();
        entry.backends.iter().filter(|(key, _)| !wanted.contains(key)).map(|(_, id)| *id).collect()
    }

    /// Restores what was in force. What was for a moment stays until no packet or flow can know of it.
    fn take_back(&mut self, change: Change) {
        let Change {
            service: index, frontends, backends, raised, ring, members, mut configs, owners, replaced, ..
        } = change;
        let mut is_halfway = change.is_halfway;
        let unseen = configs.split_off(replaced.len());
        let was_seen = !configs.is_empty();
        for (new, old) in configs.into_iter().zip(replaced) {
            is_halfway |= !self.restore(new, old);
        }
        for Served { reference, config } in unseen {
            self.configs.free(reference.index());
            self.release_regions(&config);
        }
        ring.into_iter().for_each(|ring| self.rings.release(ring));
        members.into_iter().filter_map(|part| part.region).for_each(|region| self.members.release(region));
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
        let restored = match &old {
            Some(old) => self.maps.set_service(&key, old.reference),
            None => self.maps.remove_service(&key),
        };
        if let Err(error) = restored {
            tracing::error!("map SERVICES: an entry could not be put back: {error}");
            self.retired.configs.extend(old);
            return false;
        }
        match old {
            Some(old) => self.served.insert(key, old),
            None => self.served.remove(&key),
        };
        self.retired.configs.push(new);
        true
    }
}

fn full(map: &'static str, size: u32, option: &'static str) -> ApplyError {
    ApplyError::MapFull { map, size: size.into(), option }
}

/// The protocols of a service's frontends.
fn protocols(service: &Service) -> impl Iterator<Item = u8> {
    let has = |protocol: &Protocol| service.frontends().iter().any(|frontend| frontend.protocol == *protocol);
    [Protocol::Tcp, Protocol::Udp].into_iter().filter(has).map(Protocol::number)
}

const fn flags(state: BackendState) -> u8 {
    match state {
        BackendState::Active => Backend::SERVING | Backend::ACCEPTING,
        BackendState::Draining => Backend::SERVING,
    }
}
