//! Directories of the programs, mapped: `SERVICES`, `OWNERS` and `INTERFACES`.

use std::{
    io,
    os::fd::AsFd as _,
    sync::atomic::{Ordering, fence},
};

use anyhow::Context as _;
use aya::maps::MapData;
use foldhash::HashSet;
use netlb_common::{
    directory::{self, Line, Lines},
    flow::HashKey,
    maps::{Config, ConfigRef, EndpointKey, Interface, Owners},
};

use super::{load::Memory, mapping::Mapping};

/// The lines of one of them.
#[derive(Debug)]
struct Directory {
    lines: Mapping<Line>,
    mask: u32,
}

impl Directory {
    fn new(map: &MapData) -> anyhow::Result<Self> {
        let lines = map.info().context("cannot ask for the size of a map")?.max_entries();
        let mapping = Mapping::new(map.fd().as_fd(), lines).context("cannot map a directory into memory")?;
        Ok(Self { lines: mapping, mask: lines - 1 })
    }

    /// Sets an entry. What it names is written before it is.
    fn set(&mut self, key: u64, value: u64) -> io::Result<()> {
        fence(Ordering::SeqCst);
        // As a hash of the kernel says it.
        if directory::set(self, key, value) { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::E2BIG)) }
    }

    /// Removes the keys that are not known, and says how many they were.
    fn retain(&mut self, is_known: impl Fn(u64) -> bool) -> usize {
        let keys = directory::entries(self).map(|(key, _)| key);
        let strays: Vec<_> = keys.filter(|key| !is_known(*key)).collect();
        strays.iter().for_each(|key| directory::remove(self, *key));
        strays.len()
    }
}

impl Lines for Directory {
    fn mask(&self) -> u32 {
        self.mask
    }

    fn line(&self, index: u32) -> Option<&Line> {
        self.lines.get(index)
    }
}

/// `SERVICES`.
#[derive(Debug)]
pub(super) struct Services {
    directory: Directory,
    hash_key: HashKey,
}

impl Services {
    pub(super) fn new(memory: &Memory) -> anyhow::Result<Self> {
        Ok(Self { directory: Directory::new(&memory.map("SERVICES")?)?, hash_key: memory.hash_key() })
    }

    pub(super) fn get(&self, key: &EndpointKey) -> Option<ConfigRef> {
        directory::get(&self.directory, self.hash_key.endpoint(key)).map(ConfigRef)
    }

    /// All that are there, if the record they name says that it is theirs.
    pub(super) fn all(&self, config: impl Fn(u32) -> Option<Config>) -> impl Iterator<Item = (EndpointKey, ConfigRef)> {
        directory::entries(&self.directory).filter_map(move |(key, value)| {
            let reference = ConfigRef(value);
            let config = config(reference.index())?;
            let is_its = config.generation == reference.generation() && self.hash_key.endpoint(&config.key) == key;
            is_its.then_some((config.key, reference))
        })
    }

    pub(super) fn set(&mut self, key: &EndpointKey, value: ConfigRef) -> io::Result<()> {
        self.directory.set(self.hash_key.endpoint(key), value.0)
    }

    pub(super) fn remove(&mut self, key: &EndpointKey) {
        directory::remove(&self.directory, self.hash_key.endpoint(key));
    }

    /// Removes what is not of these, and says how many entries that were.
    pub(super) fn retain(&mut self, frontends: &mut dyn Iterator<Item = EndpointKey>) -> usize {
        let known: HashSet<_> = frontends.map(|frontend| self.hash_key.endpoint(&frontend)).collect();
        self.directory.retain(|key| known.contains(&key))
    }
}

/// `OWNERS`.
#[derive(Debug)]
pub(super) struct OwnerPairs {
    directory: Directory,
    hash_key: HashKey,
}

impl OwnerPairs {
    pub(super) fn new(memory: &Memory) -> anyhow::Result<Self> {
        Ok(Self { directory: Directory::new(&memory.map("OWNERS")?)?, hash_key: memory.hash_key() })
    }

    fn keys(&self, backend: &EndpointKey) -> impl Iterator<Item = u64> + use<> {
        let first = self.hash_key.endpoint(backend);
        (0..Owners::PAIRS).map(move |pair| Owners::key(first, pair))
    }

    pub(super) fn get(&self, backend: &EndpointKey) -> Owners {
        Owners::of_pairs(self.keys(backend).map_while(|key| directory::get(&self.directory, key)))
    }

    /// Frontends that move up in the list are written where they will be before they go from where they were.
    pub(super) fn set(&mut self, backend: &EndpointKey, owners: Owners) -> io::Result<()> {
        let mut keys = self.keys(backend);
        for (pair, key) in owners.pairs().zip(&mut keys) {
            self.directory.set(key, pair)?;
        }
        keys.for_each(|key| directory::remove(&self.directory, key));
        Ok(())
    }

    pub(super) fn remove(&mut self, backend: &EndpointKey) {
        self.keys(backend).for_each(|key| directory::remove(&self.directory, key));
    }

    /// Removes what is not of these.
    pub(super) fn retain(&mut self, backends: &mut dyn Iterator<Item = EndpointKey>) {
        let known: HashSet<_> = backends.map(|backend| self.hash_key.endpoint(&backend)).collect();
        let is_known = |key: u64| (0..Owners::PAIRS).any(|pair| known.contains(&Owners::key(key, pair)));
        self.directory.retain(is_known);
    }
}

/// `INTERFACES`.
#[derive(Debug)]
pub(super) struct Interfaces(Directory);

impl Interfaces {
    pub(super) fn new(memory: &Memory) -> anyhow::Result<Self> {
        Self::of(&memory.map("INTERFACES")?)
    }

    pub(super) fn of(map: &MapData) -> anyhow::Result<Self> {
        Directory::new(map).map(Self)
    }

    pub(super) fn get(&self, index: u32) -> Option<Interface> {
        directory::get(&self.0, directory::numbered(index)).map(Interface::from_word)
    }

    /// The indexes of all that are there.
    pub(super) fn indexes(&self) -> impl Iterator<Item = u32> {
        directory::entries(&self.0).map(|(key, _)| key as u32)
    }

    pub(super) fn set(&mut self, index: u32, interface: Interface) -> io::Result<()> {
        let set = self.0.set(directory::numbered(index), interface.to_word());
        set.map_err(|_| io::Error::other("there is no room for more interfaces in the map INTERFACES"))
    }

    pub(super) fn remove(&mut self, index: u32) {
        directory::remove(&self.0, directory::numbered(index));
    }
}

#[cfg(test)]
mod tests {
    use netlb_common::addr::{Addr, PortBe};

    use super::*;

    const HASH_KEY: HashKey = HashKey::new([1, 2, 3, 4]);

    fn directory() -> Directory {
        let file = tempfile::tempfile().unwrap();
        file.set_len(64 * 16).unwrap();
        Directory { lines: Mapping::new(file.as_fd(), 16).unwrap(), mask: 15 }
    }

    fn pairs() -> OwnerPairs {
        OwnerPairs { directory: directory(), hash_key: HASH_KEY }
    }

    fn backend(host: u8) -> EndpointKey {
        EndpointKey::new(Addr::from_v4([10, 0, 0, host]), PortBe::new(80), 6)
    }

    #[test]
    fn lists_of_owners_grow_and_shrink() {
        let mut owners = pairs();
        for list in
            [[1, 0, 0, 0, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6, 7, 8], [2, 3, 4, 5, 6, 0, 0, 0], [9, 8, 0, 0, 0, 0, 0, 0]]
        {
            owners.set(&backend(1), Owners(list)).unwrap();
            assert_eq!(owners.get(&backend(1)), Owners(list));
            let words = list.iter().filter(|id| **id != 0).count().div_ceil(2);
            assert_eq!(directory::entries(&owners.directory).count(), words, "{list:?}");
        }
        assert_eq!(owners.get(&backend(2)), Owners::default());
        owners.remove(&backend(1));
        assert_eq!(directory::entries(&owners.directory).count(), 0);
    }

    #[test]
    fn lists_of_unknown_backends_go() {
        let mut owners = pairs();
        for host in 1..=6 {
            owners.set(&backend(host), Owners([1, 2, 3, 4, 5, u32::from(host), 0, 0])).unwrap();
        }
        owners.retain(&mut [2, 5].into_iter().map(backend));
        for host in 1..=6 {
            let is_known = [2, 5].contains(&host);
            assert_eq!(owners.get(&backend(host)).0[5], if is_known { host.into() } else { 0 }, "{host}");
        }
        assert_eq!(directory::entries(&owners.directory).count(), 6);
    }

    #[test]
    fn services_that_name_no_record_of_theirs_are_not_there_and_go() {
        let mut services = Services { directory: directory(), hash_key: HASH_KEY };
        let configs: Vec<_> =
            (0..4).map(|n| Config { key: backend(n as u8), generation: n, ..Config::default() }).collect();
        let config = |index: u32| configs.get(index as usize).copied();
        let whole = [1, 2, 3].map(|n| (backend(n as u8), ConfigRef::new(n, n)));
        for (key, reference) in whole {
            services.set(&key, reference).unwrap();
        }
        // None there is, one that was reused, one of another, and none at all.
        let damaged = [ConfigRef::new(4, 4), ConfigRef::new(3, 2), ConfigRef::new(1, 1), ConfigRef(0), ConfigRef(!1)];
        for (host, reference) in (10..).zip(damaged) {
            services.set(&backend(host), reference).unwrap();
        }
        let mut found: Vec<_> = services.all(config).collect();
        found.sort_by_key(|(_, reference)| reference.index());
        assert_eq!(found, whole);
        assert_eq!(services.retain(&mut [1, 3].into_iter().map(backend)), 6);
        assert_eq!([1, 2, 3].map(|host| services.get(&backend(host)).is_some()), [true, false, true]);
        assert_eq!(directory::entries(&services.directory).count(), 2);
    }

    #[test]
    fn a_directory_that_is_full_says_so_as_a_hash_does() {
        let mut owners = pairs();
        let full = (1..=200).find_map(|host| owners.set(&backend(host), Owners([1; 8])).err());
        assert_eq!(full.and_then(|error| error.raw_os_error()), Some(libc::E2BIG));
    }
}
