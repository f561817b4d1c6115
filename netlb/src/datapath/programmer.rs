//! Turns the desired state into records.
//!
//! A change is written beside what is in force, and comes into force by one store per frontend: frontends and backends,
//! ring and members, the [`Config`] that names them, the ways back (`OWNERS`, address filter), and only then
//! `SERVICES`. What it replaces lies still until no packet can be reading it ([`Maps::grace`]). Changes do not wait for
//! that: [`Programmer::tick`] begins to wait and a later one sees the end. Only where room is short, a change waits.
//!
//! Numbers of frontends and backends stand in the slots of flows. So they outlive what they were made for: only when a
//! scan of the flow table has found none that names it does a number mean something else. Until then a backend that
//! comes back gets its old number, and finds its flows.
//!
//! The maps are all the memory there is: a new daemon reads back what the last one wrote, and goes on from there.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    fmt,
    hash::{BuildHasher as _, RandomState},
    io,
    net::SocketAddr,
    sync::{Arc, mpsc},
    thread,
    time::Instant,
};

use netlb_common::{
    addr::{Addr, Address as _, Ipv4Be, Ipv6Be, PortBe},
    filter,
    maps::{Config, ConfigRef, EndpointKey, MemberLine, RingLine},
    time::Ticks,
};

use self::{
    regions::Regions,
    release::{Resting, Retired, Waiting},
    shared::{BitCounts, OwnerLists},
    table::Table,
};
use super::{Maps, Sizes};
use crate::{
    dataplane::{ApplyError, ApplyReport, Desired, Touched},
    maglev::{self, Members},
    model::{Frontend, Protocol, Service},
};

mod adopt;
mod change;
mod clock;
mod flows;
#[cfg(test)]
mod memory;
mod regions;
mod release;
mod shared;
mod table;
#[cfg(test)]
mod tests;

/// Rings built at once: enough for every CPU, few enough to keep in memory.
const CHUNK: usize = 512;
/// Times that services which found no room are tried again, after old records were given up.
const RETRIES: u32 = 5;

/// Fills the maps. See the [module](self).
pub struct Programmer<M: Maps> {
    maps: M,
    clock: Box<dyn Fn() -> Ticks + Send>,
    sizes: Sizes,
    services: Table<Entry>,
    /// Numbers of services, those included that are removed and still have flows.
    names: HashMap<String, u32>,
    frontends: Table<Endpoint>,
    backends: Table<Endpoint>,
    /// What is in force: the entries of `SERVICES`.
    served: HashMap<EndpointKey, Served>,
    configs: Table<()>,
    rings: Regions,
    members: Regions,
    content: RandomState,
    owners: OwnerLists,
    filter: BitCounts,
    retired: Retired,
    resting: Option<Resting>,
    waiting: Waiting,
    /// During an [`apply`](Self::apply): frontends that go from one service to another.
    moving: HashSet<EndpointKey>,
    /// Of the last config that was written.
    generation: u32,
    /// Counts calls of [`apply`](Self::apply), which looks at all services.
    round: u64,
    /// Counts what became free.
    freed: u64,
    /// The bucket at which the sweep goes on.
    swept: u32,
}

/// A service with a number.
#[derive(Debug)]
struct Entry {
    /// None for what was found in the maps, until somebody wants its frontends.
    name: Option<String>,
    programmed: State,
    /// By endpoint, those included that are removed and may have flows.
    frontends: HashMap<EndpointKey, u32>,
    backends: HashMap<EndpointKey, u32>,
    /// The last [`Programmer::round`] in which it was wanted.
    wanted: u64,
}

/// What the maps have of a service.
#[derive(Debug)]
enum State {
    /// To be looked at, because a daemon before this one wrote it, or because something went wrong.
    Unknown,
    As(Arc<Service>),
    /// At most flows.
    Removed,
}

/// A frontend or a backend with a number.
#[derive(Clone, Copy, Debug)]
struct Endpoint {
    key: EndpointKey,
    service: u32,
    /// Of a backend.
    flags: u8,
}

/// An entry of `SERVICES` and the record it names.
#[derive(Clone, Copy, Debug)]
struct Served {
    reference: ConfigRef,
    config: Config,
}

impl Entry {
    fn new(name: Option<String>, programmed: State) -> Self {
        Self { name, programmed, frontends: HashMap::new(), backends: HashMap::new(), wanted: 0 }
    }

    /// Whether there is more of it than flows.
    const fn is_there(&self) -> bool {
        !matches!(self.programmed, State::Removed)
    }
}

impl<M: Maps> Programmer<M> {
    /// Goes on from what the maps hold.
    pub fn new(maps: M) -> io::Result<Self> {
        Self::with_clock(maps, clock::now)
    }

    /// The same, with another clock than that of the programs.
    pub fn with_clock(maps: M, clock: impl Fn() -> Ticks + Send + 'static) -> io::Result<Self> {
        let sizes = maps.sizes();
        let mut programmer = Self {
            maps,
            sizes,
            services: Table::new(sizes.frontends),
            names: HashMap::new(),
            frontends: Table::new(sizes.frontends),
            backends: Table::new(sizes.backends),
            served: HashMap::new(),
            configs: Table::new(sizes.configs),
            rings: Regions::new(sizes.ring_slots, RingLine::SLOTS),
            members: Regions::new(sizes.members, MemberLine::MEMBERS),
            content: RandomState::new(),
            owners: OwnerLists::default(),
            filter: BitCounts::default(),
            retired: Retired::default(),
            resting: None,
            waiting: Waiting::new(clock()),
            clock: Box::new(clock),
            moving: HashSet::new(),
            generation: 0,
            round: 0,
            freed: 0,
            swept: 0,
        };
        programmer.adopt()?;
        Ok(programmer)
    }

    pub fn maps(&self) -> &M {
        &self.maps
    }

    /// For tests that write records themselves.
    pub(super) fn maps_mut(&mut self) -> &mut M {
        &mut self.maps
    }

    /// Makes the maps serve exactly these services. Idempotent; a failure stays with its service, which keeps what it
    /// had.
    pub fn apply(&mut self, desired: &[Desired]) -> ApplyReport {
        let start = Instant::now();
        self.round += 1;
        let pending = self.compare(desired.iter().map(|desired| &desired.service));
        self.recognise(&pending);
        let unwanted = self.unwanted();
        let report = self.carry_out(pending, unwanted);
        ApplyReport { took: start.elapsed(), ..report }
    }

    /// The same for some services. What it costs depends on them alone, however many others there are.
    pub fn apply_touched(&mut self, touched: &[Touched]) -> ApplyReport {
        let start = Instant::now();
        let pending = self.compare(touched.iter().filter_map(|touched| Some(&touched.wanted.as_ref()?.service)));
        let unwanted = touched.iter().filter(|touched| touched.wanted.is_none());
        let unwanted = unwanted.filter_map(|touched| {
            let index = *self.names.get(&touched.name)?;
            self.services.get(index).is_some_and(Entry::is_there).then_some(index)
        });
        let unwanted = unwanted.collect();
        let report = self.carry_out(pending, unwanted);
        ApplyReport { took: start.elapsed(), ..report }
    }

    /// Removes services and programs others.
    fn carry_out(&mut self, mut pending: Vec<&Arc<Service>>, unwanted: Vec<u32>) -> ApplyReport {
        let mut report = ApplyReport::default();
        self.moving = self.moving(&pending);
        self.remove_unwanted(unwanted, &mut report);
        let mut retries = RETRIES;
        loop {
            let freed = self.freed;
            let failed = self.program_all(&pending, &mut report);
            let no_room = failed.iter().any(|(_, error)| matches!(error, ApplyError::MapFull { .. }));
            if no_room && retries > 0 {
                self.reclaim();
            }
            if !no_room || retries == 0 || self.freed == freed {
                report.failed.extend(failed.into_iter().map(|(service, error)| (service.name().to_owned(), error)));
                break;
            }
            pending = failed.into_iter().map(|(service, _)| service).collect();
            retries -= 1;
        }
        self.end_moves(&mut report);
        if report.changed > 0 {
            self.waiting.hurry();
        }
        report
    }

    /// Entries in use and entries there are, by map.
    pub fn map_usage(&self) -> Vec<(&'static str, u64, u64)> {
        let Sizes { services, owners, .. } = self.sizes;
        let table = |len: u32, size: u32| (u64::from(len), u64::from(size));
        let usage = [
            ("SERVICES", (self.served.len() as u64, services.into())),
            ("CONFIGS", table(self.configs.len(), self.configs.size())),
            ("BACKENDS", table(self.backends.len(), self.backends.size())),
            ("FRONTENDS", table(self.frontends.len(), self.frontends.size())),
            ("OWNERS", (self.owners.len() as u64, owners.into())),
            ("RINGS", table(self.rings.used(), self.rings.size())),
            ("MEMBERS", table(self.members.used(), self.members.size())),
            ("flows", self.flow_slots()),
        ];
        usage.into_iter().map(|(name, (entries, size))| (name, entries, size)).collect()
    }

    /// Whether a frontend is served at an IPv6 address.
    pub fn serves_ipv6(&self) -> bool {
        self.served.keys().any(|key| !key.addr.is_v4())
    }

    /// The services that are not as they are wanted.
    fn compare<'a>(&mut self, desired: impl Iterator<Item = &'a Arc<Service>>) -> Vec<&'a Arc<Service>> {
        let mut pending = Vec::new();
        for service in desired {
            let entry = self.names.get(service.name()).and_then(|index| self.services.get_mut(*index));
            if let Some(entry) = entry {
                entry.wanted = self.round;
                if let State::As(programmed) = &mut entry.programmed
                    && (Arc::ptr_eq(programmed, service) || programmed == service)
                {
                    // One in memory is enough.
                    *programmed = Arc::clone(service);
                    continue;
                }
            }
            pending.push(service);
        }
        pending
    }

    /// Gives services found in the maps the names of those that want their frontends.
    fn recognise(&mut self, pending: &[&Arc<Service>]) {
        if self.round > 1 {
            return;
        }
        for service in pending.iter().filter(|service| !self.names.contains_key(service.name())).collect::<Vec<_>>() {
            for frontend in service.frontends() {
                let Some(served) = self.served.get(&frontend_key(frontend)) else { continue };
                let index = served.config.service;
                if let Some(entry) = self.services.get_mut(index)
                    && entry.name.is_none()
                {
                    entry.name = Some(service.name().to_owned());
                    entry.wanted = self.round;
                    self.names.insert(service.name().to_owned(), index);
                    break;
                }
            }
        }
    }

    /// The frontends that another service has now.
    fn moving(&self, pending: &[&Arc<Service>]) -> HashSet<EndpointKey> {
        let mut moving = HashSet::new();
        for service in pending {
            let index = self.names.get(service.name()).copied();
            for key in service.frontends().iter().map(frontend_key) {
                if self.served.get(&key).is_some_and(|served| Some(served.config.service) != index) {
                    moving.insert(key);
                }
            }
        }
        moving
    }

    /// The services that are there and were not wanted in this round.
    fn unwanted(&self) -> Vec<u32> {
        let unwanted = |(_, entry): &(u32, &Entry)| entry.wanted != self.round && entry.is_there();
        self.services.iter().filter(unwanted).map(|(index, _)| index).collect()
    }

    fn remove_unwanted(&mut self, unwanted: Vec<u32>, report: &mut ApplyReport) {
        for index in unwanted {
            match self.remove(index) {
                Ok(()) => report.changed += 1,
                Err(error) => report.failed.push((self.name(index), error)),
            }
        }
    }

    /// Programs services one after the other, and returns those that failed.
    fn program_all<'a>(
        &mut self,
        pending: &[&'a Arc<Service>],
        report: &mut ApplyReport,
    ) -> Vec<(&'a Arc<Service>, ApplyError)> {
        let mut failed = Vec::new();
        let mut program = |services: &[&'a Arc<Service>], rings: Vec<(Members, Arc<[u16]>)>| {
            for (service, (members, ring)) in services.iter().zip(rings) {
                match self.program(service, &members, &ring) {
                    Ok(changed) => report.changed += usize::from(changed),
                    Err(error) => failed.push((*service, error)),
                }
            }
        };
        if pending.len() <= CHUNK {
            program(pending, rings(pending));
            return failed;
        }
        thread::scope(|scope| {
            // One chunk is programmed while the next one's rings are built.
            let (sender, built) = mpsc::sync_channel(1);
            scope.spawn(move || {
                // Whoever would receive it lives as long as there are chunks.
                pending.chunks(CHUNK).all(|services| sender.send((services, rings(services))).is_ok())
            });
            built.into_iter().for_each(|(services, rings)| program(services, rings));
        });
        failed
    }

    /// Takes frontends from services that let go of them for others which could not take them.
    fn end_moves(&mut self, report: &mut ApplyReport) {
        for key in std::mem::take(&mut self.moving) {
            let Some(index) = self.served.get(&key).map(|served| served.config.service) else { continue };
            let is_wanted = match self.services.get(index).map(|entry| &entry.programmed) {
                Some(State::As(service)) => service.frontends().iter().any(|frontend| frontend_key(frontend) == key),
                Some(State::Unknown) => true,
                Some(State::Removed) | None => false,
            };
            if !is_wanted && let Err(error) = self.withdraw(index, key) {
                report.failed.push((self.name(index), error));
                // The next round tries again.
                if let Some(entry) = self.services.get_mut(index) {
                    entry.programmed = State::Unknown;
                }
            }
        }
    }

    /// Ends the service of a frontend, unless the frontend is another service's by now or about to be.
    fn withdraw(&mut self, service: u32, key: EndpointKey) -> Result<(), ApplyError> {
        let Some(served) = self.served.get(&key).copied() else { return Ok(()) };
        if served.config.service != service || self.moving.contains(&key) {
            return Ok(());
        }
        match self.maps.remove_service(&key) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(kernel_error("SERVICES", &error)),
            _ => {}
        }
        self.served.remove(&key);
        self.freed += 1;
        self.retired.configs.push(served);
        Ok(())
    }

    /// Ends a service. Its flows live on.
    fn remove(&mut self, index: u32) -> Result<(), ApplyError> {
        let Some(entry) = self.services.get(index) else { return Ok(()) };
        let frontends: Vec<_> = entry.frontends.iter().map(|(key, id)| (*key, *id)).collect();
        let backends: Vec<_> = entry.backends.values().copied().collect();
        for (key, id) in frontends {
            if let Err(error) = self.withdraw(index, key) {
                if let Some(entry) = self.services.get_mut(index) {
                    entry.programmed = State::Unknown;
                }
                return Err(error);
            }
            self.waiting.frontends.insert(id);
        }
        for id in backends {
            self.set_flags(id, 0);
            self.waiting.backends.insert(id);
        }
        if let Some(entry) = self.services.get_mut(index) {
            entry.programmed = State::Removed;
        }
        self.dissolve(index);
        Ok(())
    }

    /// Says whether that changed anything.
    fn set_flags(&mut self, id: u32, flags: u8) -> bool {
        let Some(backend) = self.backends.get_mut(id).filter(|backend| backend.flags != flags) else { return false };
        backend.flags = flags;
        self.maps.set_backend_flags(id, flags);
        true
    }

    /// The name of a service, or for want of one a frontend.
    fn name(&self, index: u32) -> String {
        let Some(entry) = self.services.get(index) else { return String::new() };
        let frontend = || entry.frontends.keys().filter_map(frontend_of).min();
        let name = || frontend().map_or_else(|| format!("#{index}"), |frontend| frontend.to_string());
        entry.name.clone().unwrap_or_else(name)
    }

    fn add_filter_bit(&mut self, key: &EndpointKey, kind: filter::Kind) {
        let bit = self.filter_bit(key, kind);
        if self.filter.add(bit) {
            self.maps.set_filter_bit(bit, true);
        }
    }

    fn remove_filter_bit(&mut self, key: &EndpointKey, kind: filter::Kind) {
        let bit = self.filter_bit(key, kind);
        if self.filter.remove(bit) {
            self.maps.set_filter_bit(bit, false);
        }
    }

    fn filter_bit(&self, key: &EndpointKey, kind: filter::Kind) -> u32 {
        let bits = self.sizes.filter_bits_log2;
        if key.addr.is_v4() {
            filter::bit(Ipv4Be::from_map(key.addr), kind, bits)
        } else {
            filter::bit(Ipv6Be::from_map(key.addr), kind, bits)
        }
    }
}

/// The members and the ring of each service.
fn rings(services: &[&Arc<Service>]) -> Vec<(Members, Arc<[u16]>)> {
    let members: Vec<_> = services.iter().map(|service| Members::of(service.backends())).collect();
    let jobs: Vec<_> = members.iter().zip(services).map(|(all, service)| (all, service.algorithm())).collect();
    let rings = maglev::rings(&jobs);
    members.into_iter().zip(rings).collect()
}

impl<M: Maps> fmt::Debug for Programmer<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Programmer")
            .field("services", &self.services.len())
            .field("frontends", &self.frontends.len())
            .field("backends", &self.backends.len())
            .finish_non_exhaustive()
    }
}

fn endpoint_key(address: SocketAddr, protocol: u8) -> EndpointKey {
    let addr = match address {
        SocketAddr::V4(v4) => Addr::from_v4(v4.ip().octets()),
        SocketAddr::V6(v6) => Addr::from_bytes(v6.ip().octets()),
    };
    EndpointKey::new(addr, PortBe::new(address.port()), protocol)
}

fn frontend_key(frontend: &Frontend) -> EndpointKey {
    endpoint_key(frontend.address, frontend.protocol.number())
}

fn socket_address(addr: Addr, port: PortBe) -> SocketAddr {
    let ip = std::net::Ipv6Addr::from(addr.to_bytes());
    let v4 = || ip.to_ipv4_mapped();
    SocketAddr::new(v4().map_or_else(|| ip.into(), Into::into), port.get())
}

fn frontend_of(key: &EndpointKey) -> Option<Frontend> {
    let protocol = Protocol::from_number(key.protocol)?;
    Some(Frontend { address: socket_address(key.addr, key.port), protocol })
}

/// E2BIG is how a hash map in the kernel says that it is full.
fn is_full(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::E2BIG)
}

fn kernel_error(map: &str, error: &io::Error) -> ApplyError {
    ApplyError::Kernel(format!("map {map}: {error}"))
}
