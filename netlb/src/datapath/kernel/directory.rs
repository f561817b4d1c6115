//! Directories of the programs, mapped: `SERVICES` and `INTERFACES`.

use std::{
    io,
    os::fd::AsFd as _,
    sync::atomic::{Ordering, fence},
};

use anyhow::Context as _;
use aya::maps::MapData;
use netlb_common::{
    directory::{self, Line, Lines},
    flow::HashKey,
    maps::{ConfigRef, EndpointKey, Interface},
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

    /// All that are there. The records they name say what for.
    pub(super) fn all(&self) -> impl Iterator<Item = ConfigRef> {
        directory::entries(&self.directory).map(|(_, value)| ConfigRef(value))
    }

    pub(super) fn set(&mut self, key: &EndpointKey, value: ConfigRef) -> io::Result<()> {
        self.directory.set(self.hash_key.endpoint(key), value.0)
    }

    pub(super) fn remove(&mut self, key: &EndpointKey) {
        directory::remove(&self.directory, self.hash_key.endpoint(key));
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
