//! Going on from what a daemon before this one left in the maps.

use netlb_common::maps::{Backend, Frontend};

use super::*;

impl<M: Maps> Programmer<M> {
    /// Reads everything back. Nothing changes for packets: only what cannot be read is taken away.
    pub(super) fn adopt(&mut self) -> io::Result<()> {
        let mut broken = Vec::new();
        for (key, reference) in self.maps.services()? {
            if !self.adopt_config(key, reference) {
                broken.push(key);
            }
        }
        // What sends packets to another entry goes before that one.
        broken.sort_by_key(|key| key.scope);
        self.configs.adopted();
        self.adopt_frontends();
        self.adopt_backends();
        self.services.adopted();
        for key in broken {
            tracing::warn!("map SERVICES: an entry does not fit its record and is removed: {:?}", frontend_of(&key));
            self.maps.remove_service(&key)?;
        }
        // Those that name no record are not even known by what they are for.
        match self.maps.retain_services(&mut self.served.keys().copied()) {
            0 => {}
            strays => tracing::warn!("map SERVICES: {strays} entries name no record of theirs and are removed"),
        }
        if self.services.len() > 0 {
            // For packets that read what the last daemon replaced in its last moments.
            self.maps.grace();
            self.reclaim();
        }
        self.adopt_owners()?;
        self.adopt_addresses()?;
        self.adopt_node_ports()?;
        self.maps.write_filter(&self.filter.words(self.sizes.filter_bits_log2));
        Ok(())
    }

    /// Says whether a frontend's record makes sense.
    fn adopt_config(&mut self, key: EndpointKey, reference: ConfigRef) -> bool {
        let index = reference.index();
        if index == 0 || index >= self.sizes.configs || self.configs.get(index).is_some() {
            return false;
        }
        let config = self.maps.config(index);
        let Config { service, frontend, ring, ring_len, members, members_len, .. } = config;
        let is_ours = config.key == key && config.generation == reference.generation();
        let is_service = (1..self.sizes.numbers).contains(&service);
        let is_frontend = (1..self.sizes.frontends).contains(&frontend) && {
            let record = self.maps.frontend(frontend);
            frontend_endpoint(&record) == base(key) && record.service == service
        };
        if !(is_ours && is_service && is_frontend && (ring_len == 0) == (members_len == 0)) {
            return false;
        }
        if ring_len > 0 {
            let end = |at: u32, len: u32| at.checked_add(len);
            let fits = end(ring, ring_len).is_some_and(|end| end <= self.sizes.ring_slots)
                && end(members, members_len).is_some_and(|end| end <= self.sizes.members);
            if !fits {
                return false;
            }
            let slots = self.maps.ring(ring, ring_len);
            let ids = self.maps.members(members, members_len);
            let is_member = |slot: &u16| u32::from(*slot) < members_len;
            let is_backend = |id: &u32| {
                (1..self.sizes.backends).contains(id) && {
                    let record = self.maps.backend(*id);
                    record.service == service && record.protocol == key.protocol
                }
            };
            if !(slots.iter().all(is_member) && ids.iter().all(is_backend)) {
                return false;
            }
            if !self.rings.adopt(ring, ring_len, self.content.hash_one(&*slots)) {
                return false;
            }
            if !self.members.adopt(members, members_len, self.content.hash_one(&*ids)) {
                self.rings.release(ring);
                return false;
            }
        }
        self.configs.adopt(index, || ());
        self.put_served(key, Some(Served { reference, config }));
        self.generation = self.generation.max(config.generation);
        let entry = self.adopted_service(service);
        entry.affinity = entry.affinity.max(config.affinity);
        true
    }

    fn adopted_service(&mut self, index: u32) -> &mut Entry {
        self.services.adopt(index, || Entry::new(None, State::Unknown))
    }

    /// Every frontend there is a record of: those in force, and those that flows may name.
    fn adopt_frontends(&mut self) {
        for id in 1..self.sizes.frontends {
            let record = self.maps.frontend(id);
            let key = frontend_endpoint(&record);
            if record.protocol == 0 || !(1..self.sizes.numbers).contains(&record.service) {
                continue;
            }
            let in_force = self.served.get(&key).is_some_and(|served| served.config.frontend == id);
            let entry = self.adopted_service(record.service);
            if in_force {
                entry.frontends.insert(key, id);
            } else {
                entry.frontends.entry(key).or_insert(id);
                self.waiting.frontends.insert(id);
            }
            self.frontends.adopt(id, || Endpoint { key, service: record.service, flags: 0, weight: 0 });
            self.add_counted_bit(&key, filter::Kind::Frontend);
        }
        self.frontends.adopted();
    }

    /// Every backend there is a record of.
    fn adopt_backends(&mut self) {
        let members = self.served.values().map(|Served { config, .. }| (config.members, config.members_len));
        let in_force: HashSet<_> = members.flat_map(|(at, len)| self.maps.members(at, len)).collect();
        let mut ids: Vec<_> = (1..self.sizes.backends).filter(|id| self.maps.backend(*id).protocol != 0).collect();
        // Where one backend has two numbers, one of them was about to be given up.
        ids.sort_by_key(|id| (!in_force.contains(id), self.maps.backend(*id).flags == 0));
        for id in ids {
            let Backend { addr, port, protocol, service, flags, weight, .. } = self.maps.backend(id);
            if !(1..self.sizes.numbers).contains(&service) {
                continue;
            }
            let key = EndpointKey::new(addr, port, protocol);
            let entry = self.adopted_service(service);
            if *entry.backends.entry(key).or_insert(id) != id || flags == 0 {
                self.waiting.backends.insert(id);
            }
            self.backends.adopt(id, || Endpoint { key, service, flags, weight: weight as u16 });
            self.add_counted_bit(&key, filter::Kind::Backend);
        }
        self.backends.adopted();
    }

    /// Counts the bit. The whole filter is written in the end.
    pub(super) fn add_counted_bit(&mut self, key: &EndpointKey, kind: filter::Kind) {
        let bit = self.filter_bit(key, kind);
        self.filter.add(bit);
    }

    /// Makes `OWNERS` what the records say.
    fn adopt_owners(&mut self) -> io::Result<()> {
        for (_, entry) in self.services.iter() {
            for backend in entry.backends.keys() {
                let same_protocol = entry.frontends.iter().filter(|(key, _)| key.protocol == backend.protocol);
                for (_, frontend) in same_protocol {
                    self.owners.add(*backend, *frontend);
                }
            }
        }
        self.maps.retain_owners(&mut self.owners.iter().map(|(backend, _)| *backend));
        for (backend, owners) in self.owners.iter() {
            // The order in which a long list was made is gone, so any few of it will do.
            let mut sorted = (self.maps.owners(backend).0, owners.0);
            sorted.0.sort_unstable();
            sorted.1.sort_unstable();
            if sorted.0 == sorted.1 {
                continue;
            }
            match self.maps.set_owners(&[(*backend, owners)]) {
                // A change that did not come to its end.
                Err(error) if is_full(&error) => tracing::warn!("map OWNERS is full: {:?}", frontend_of(backend)),
                written => written?,
            }
        }
        Ok(())
    }
}

fn frontend_endpoint(record: &Frontend) -> EndpointKey {
    EndpointKey::new(record.addr, record.port, record.protocol)
}
