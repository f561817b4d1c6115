//! Turns the desired state into records.
//!
//! A change is written beside what is in force, and comes into force by one store per frontend: frontends and backends,
//! ring and members, the [`Config`] that names them, the ways back (`OWNERS`, address filter), and only then
//! `SERVICES`. A frontend that treats flows from outside in its own way has a second entry there, which is written before
//! the first one that sends packets to it, and removed after it. What it replaces lies still until no packet can be reading it ([`Maps::grace`]). Changes do not wait for
//! that: [`Programmer::tick`] begins to wait and a later one sees the end. Only where room is short, a change waits.
//!
//! Numbers of frontends and backends stand in the slots of flows. So they outlive what they were made for: only when a
//! scan of the flow table has found none that names it does a number mean something else. Until then a backend that
//! comes back gets its old number, and finds its flows.
//!
//! The maps are all the memory there is: a new daemon reads back what the last one wrote, and goes on from there.

use std::{
    collections::BTreeSet,
    fmt,
    hash::BuildHasher as _,
    io,
    net::SocketAddr,
    sync::{Arc, mpsc},
    thread,
    time::Instant,
};

use foldhash::{HashMap, HashMapExt as _, HashSet, HashSetExt as _, fast::RandomState};
use netlb_common::{
    addr::{Addr, Address as _, Ipv4Be, Ipv6Be, PortBe},
    filter,
    maps::{Config, ConfigRef, EndpointKey, MemberLine, RingLine},
    snat,
    time::{Ticks, ticks_from_seconds},
};

use self::{
    addresses::{Addresses, Range},
    flows::Census,
    loads::Loads,
    node_ports::NodePorts,
    plan::{Held, Plan, Pool, Pools, base, outside},
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
    resolve::{self, Node, Resolved},
};

mod addresses;
mod adopt;
mod change;
mod clock;
mod flows;
mod loads;
#[cfg(test)]
mod memory;
mod node_ports;
mod plan;
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
    node: Arc<Node>,
    services: Table<Entry>,
    /// Numbers of services, those included that are removed and still have flows.
    names: HashMap<String, u32>,
    frontends: Table<Endpoint>,
    backends: Table<Endpoint>,
    /// What is in force: the entries of `SERVICES`.
    served: HashMap<EndpointKey, Served>,
    /// Services that do without frontends which others hold.
    contested: BTreeSet<u32>,
    addresses: Addresses,
    node_ports: NodePorts,
    /// Entries of `SOURCE_RANGES`.
    source_ranges: u32,
    /// Where the sweep of `AFFINITY` goes on; entries that it met, and all that it met the last time.
    swept_affinity: Option<u32>,
    affinities: (u64, u64),
    /// When a sweep last found it empty, if nobody asked for entries since.
    empty_affinity: Option<Ticks>,
    /// Entries of `SERVICES` whose clients keep their backends.
    affine: u32,
    configs: Table<()>,
    rings: Regions,
    members: Regions,
    content: RandomState,
    owners: OwnerLists,
    filter: BitCounts,
    retired: Retired,
    resting: Option<Resting>,
    waiting: Waiting,
    /// During an [`apply`](Self::apply): frontends that go from one service to another, each with both its entries.
    moving: HashSet<EndpointKey>,
    /// Of the last config that was written.
    generation: u32,
    /// Counts calls of [`apply`](Self::apply), which looks at all services.
    round: u64,
    /// Counts what became free.
    freed: u64,
    /// The bucket at which the sweep goes on.
    swept: u32,
    loads: Loads,
    /// Of the last answer to a change.
    census: Option<Census>,
}

/// A service with a number.
#[derive(Debug)]
struct Entry {
    /// None for what was found in the maps, until somebody wants its frontends.
    name: Option<String>,
    programmed: State,
    /// Whether it failed since it was programmed: what it has may be no more what that asks for on this node.
    stale: bool,
    /// By endpoint, those included that are removed and may have flows.
    frontends: HashMap<EndpointKey, u32>,
    backends: HashMap<EndpointKey, u32>,
    /// That are services', because of this one.
    addresses: Vec<Addr>,
    ranges: Vec<Range>,
    /// Ticks for which its clients keep their backends.
    affinity: u32,
    /// What it does without, because others hold it.
    held: Vec<Held>,
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
    weight: u16,
}

/// An entry of `SERVICES` and the record it names.
#[derive(Clone, Copy, Debug)]
struct Served {
    reference: ConfigRef,
    config: Config,
}

impl Entry {
    fn new(name: Option<String>, programmed: State) -> Self {
        Self {
            name,
            programmed,
            stale: false,
            frontends: HashMap::new(),
            backends: HashMap::new(),
            addresses: Vec::new(),
            ranges: Vec::new(),
            affinity: 0,
            held: Vec::new(),
            wanted: 0,
        }
    }

    /// Whether there is more of it than flows.
    const fn is_there(&self) -> bool {
        !matches!(self.programmed, State::Removed)
    }
}

impl<M: Maps> Programmer<M> {
    /// Goes on from what the maps hold. `masquerades` says that pods' packets may come back to any address of the node.
    pub fn new(maps: M, masquerades: bool) -> io::Result<Self> {
        Self::with_clock(maps, masquerades, clock::now)
    }

    /// The same, with another clock than that of the programs.
    pub fn with_clock(maps: M, masquerades: bool, clock: impl Fn() -> Ticks + Send + 'static) -> io::Result<Self> {
        let sizes = maps.sizes();
        let mut programmer = Self {
            maps,
            sizes,
            node: Arc::default(),
            services: Table::new(sizes.numbers),
            names: HashMap::new(),
            frontends: Table::new(sizes.frontends),
            backends: Table::new(sizes.backends),
            served: HashMap::new(),
            contested: BTreeSet::new(),
            addresses: Addresses::new(masquerades),
            node_ports: NodePorts::default(),
            source_ranges: 0,
            swept_affinity: None,
            affinities: (0, 0),
            empty_affinity: None,
            affine: 0,
            configs: Table::new(sizes.configs),
            rings: Regions::new(sizes.ring_slots, RingLine::SLOTS),
            members: Regions::new(sizes.members, MemberLine::MEMBERS),
            content: RandomState::default(),
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
            loads: Loads::default(),
            census: None,
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

    /// Says what is known of this node, and programs the services that this makes others.
    pub fn set_node(&mut self, node: Node) -> ApplyReport {
        let start = Instant::now();
        if *self.node == node {
            return ApplyReport::default();
        }
        let before = std::mem::replace(&mut self.node, Arc::new(node));
        self.set_node_addresses();
        let Node { name, zone, serves_sockets, .. } = &*before;
        let only_addresses =
            (name, zone, serves_sockets) == (&self.node.name, &self.node.zone, &self.node.serves_sockets);
        let may_differ = |service: &Service| {
            !only_addresses || plan::is_on_node(service) || !service.definition().source_ranges.is_empty()
        };
        let differs = |service: &Arc<Service>| {
            may_differ(service) && Resolved::new(service, &before) != Resolved::new(service, &self.node)
        };
        let entries = self.services.iter().filter_map(|(_, entry)| match &entry.programmed {
            State::As(service) => Some(service),
            State::Unknown | State::Removed => None,
        });
        let pending: Vec<_> = entries.filter(|service| differs(service)).cloned().collect();
        let report = if pending.is_empty() { ApplyReport::default() } else { self.carry_out(pending, Vec::new()) };
        ApplyReport { took: start.elapsed(), ..report }
    }

    pub fn node(&self) -> &Node {
        &self.node
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
        self.know_addresses();
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
    fn carry_out(&mut self, mut pending: Vec<Arc<Service>>, mut unwanted: Vec<u32>) -> ApplyReport {
        self.rename(&pending, &mut unwanted);
        let mut report = ApplyReport::default();
        let node = Arc::clone(&self.node);
        self.add_concerned(&mut pending, &unwanted);
        let mut plans: Vec<_> = pending.iter().map(|service| Plan::new(service, &node)).collect();
        self.settle_claims(&mut plans, &unwanted);
        self.moving = self.moving(&plans);
        self.remove_unwanted(unwanted, &mut report);
        let mut retries = RETRIES;
        let mut left: Vec<_> = plans.iter().collect();
        loop {
            let freed = self.freed;
            let failed = self.program_all(&left, &mut report);
            let no_room = failed.iter().any(|(_, error)| matches!(error, ApplyError::MapFull { .. }));
            if no_room && retries > 0 {
                self.reclaim();
            }
            if !no_room || retries == 0 || self.freed == freed {
                for (plan, error) in failed {
                    let name = plan.service.name();
                    self.note_failure(name);
                    report.failed.push((name.to_owned(), error));
                }
                break;
            }
            left = failed.into_iter().map(|(plan, _)| plan).collect();
            retries -= 1;
        }
        self.end_moves(&mut report);
        self.forget_addresses();
        self.write_node_ports();
        for plan in &plans {
            let name = plan.service.name();
            if let Some(Held { frontend, by }) = plan.held.first()
                && !report.failed.iter().any(|(failed, _)| failed == name)
            {
                let error = ApplyError::Held { frontend: *frontend, holder: by.clone() };
                report.failed.push((name.to_owned(), error));
            }
        }
        if report.changed > 0 {
            self.waiting.hurry();
        }
        report
    }

    /// Adds the services that gain or lose addresses of the node by what is pending: others name them, or do so no more.
    fn add_concerned(&self, pending: &mut Vec<Arc<Service>>, unwanted: &[u32]) {
        let index = |service: &Service| self.names.get(service.name()).copied();
        let mut known: HashSet<_> = pending.iter().filter_map(|service| index(service)).collect();
        known.extend(unwanted);
        let mut concerned: BTreeSet<_> = self.contested.iter().copied().collect();
        for service in &*pending {
            let index = index(service);
            for claim in service.claims() {
                let holder = self.served.get(&frontend_key(&claim)).map(|served| served.config.service);
                concerned.extend(holder.filter(|holder| Some(*holder) != index));
            }
        }
        for index in concerned.difference(&known.iter().copied().collect()) {
            if let Some(State::As(service)) = self.services.get(*index).map(|entry| &entry.programmed)
                && plan::is_on_node(service)
            {
                pending.push(Arc::clone(service));
            }
        }
    }

    /// Who names an address of the node has it, whoever has its port on all of them.
    fn settle_claims(&self, plans: &mut [Plan<'_>], unwanted: &[u32]) {
        let on_node: Vec<_> = (0..plans.len()).filter(|number| plan::is_on_node(plans[*number].service)).collect();
        if on_node.is_empty() {
            return;
        }
        let wanted: HashSet<_> = on_node.iter().flat_map(|number| plans[*number].keys()).collect();
        let mut holders = HashMap::new();
        for plan in &*plans {
            for key in plan.service.claims().map(|claim| frontend_key(&claim)).filter(|key| wanted.contains(key)) {
                holders.insert(key, plan.service.name().to_owned());
            }
        }
        let planned: HashSet<_> = plans.iter().map(|plan| plan.service.name()).collect();
        for key in wanted {
            let Some(served) = self.served.get(&key) else { continue };
            let index = served.config.service;
            if let Some(State::As(service)) = self.services.get(index).map(|entry| &entry.programmed)
                && !planned.contains(service.name())
                && !unwanted.contains(&index)
                && frontend_of(&key).is_some_and(|frontend| plan::names(service, &frontend))
            {
                holders.entry(key).or_insert_with(|| service.name().to_owned());
            }
        }
        for number in on_node {
            plans[number].yield_to(|key| holders.get(key).cloned());
        }
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
            ("ADDRESSES", table(self.addresses.written.len() as u32, self.sizes.addresses)),
            ("NODE_PORTS", table(self.node_ports.len(), self.sizes.node_ports)),
            ("SOURCE_RANGES", table(self.source_ranges, self.sizes.source_ranges)),
            ("AFFINITY", (self.affinities.1, self.sizes.affinities.into())),
            ("SNAT_ADDRESSES", (self.sources().len() as u64, u64::from(snat::ADDRESSES) - 1)),
            ("flows", self.flow_slots()),
        ];
        usage.into_iter().map(|(name, (entries, size))| (name, entries, size)).collect()
    }

    /// Whether a frontend is served at an IPv6 address.
    pub fn serves_ipv6(&self) -> bool {
        self.served.keys().any(|key| !key.addr.is_v4())
    }

    /// The services that are not as they are wanted.
    fn compare<'a>(&mut self, desired: impl Iterator<Item = &'a Arc<Service>>) -> Vec<Arc<Service>> {
        let mut pending = Vec::new();
        for service in desired {
            let entry = self.names.get(service.name()).and_then(|index| self.services.get_mut(*index));
            if let Some(entry) = entry {
                entry.wanted = self.round;
                if entry.held.is_empty()
                    && !entry.stale
                    && let State::As(programmed) = &mut entry.programmed
                    && (Arc::ptr_eq(programmed, service) || programmed == service)
                {
                    // One in memory is enough.
                    *programmed = Arc::clone(service);
                    continue;
                }
            }
            pending.push(Arc::clone(service));
        }
        pending
    }

    /// Gives services found in the maps the names of those that want their frontends.
    fn recognise(&mut self, pending: &[Arc<Service>]) {
        if self.round > 1 || self.services.len() == 0 {
            return;
        }
        for service in pending.iter().filter(|service| !self.names.contains_key(service.name())).collect::<Vec<_>>() {
            for frontend in resolve::frontends(service, &self.node) {
                let Some(served) = self.served.get(&frontend_key(&frontend.frontend)) else { continue };
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

    /// A service that comes with all the ways to one that goes is that one with another name: what it has, it keeps.
    fn rename(&mut self, pending: &[Arc<Service>], unwanted: &mut Vec<u32>) {
        let is_new = |service: &&Arc<Service>| !self.names.contains_key(service.name());
        let new: Vec<_> = pending.iter().filter(is_new).collect();
        if new.is_empty() || unwanted.is_empty() {
            return;
        }
        let mut leaving = HashMap::with_capacity(unwanted.len());
        for index in &*unwanted {
            if let Some(State::As(service)) = self.services.get(*index).map(|entry| &entry.programmed) {
                leaving.insert(service.claims().collect::<Vec<_>>(), *index);
            }
        }
        for service in new {
            let Some(index) = leaving.remove(&service.claims().collect::<Vec<_>>()) else { continue };
            let Some(entry) = self.services.get_mut(index) else { continue };
            entry.wanted = self.round;
            if let Some(old) = entry.name.replace(service.name().to_owned()) {
                self.names.remove(&old);
            }
            self.names.insert(service.name().to_owned(), index);
            unwanted.retain(|other| *other != index);
        }
    }

    /// The frontends that another service has now.
    fn moving(&self, plans: &[Plan<'_>]) -> HashSet<EndpointKey> {
        let mut moving = HashSet::new();
        for plan in plans {
            let index = self.names.get(plan.service.name()).copied();
            for key in plan.keys() {
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
    fn program_all<'a, 'b>(
        &mut self,
        plans: &[&'a Plan<'b>],
        report: &mut ApplyReport,
    ) -> Vec<(&'a Plan<'b>, ApplyError)> {
        let mut failed = Vec::new();
        let node = Arc::clone(&self.node);
        let mut program = |plans: &[&'a Plan<'b>], pools: Vec<Pools>| {
            for (plan, pools) in plans.iter().zip(pools) {
                match self.program(plan, &pools) {
                    Ok(changed) => report.changed += usize::from(changed),
                    Err(error) => failed.push((*plan, error)),
                }
            }
        };
        if plans.len() <= CHUNK {
            program(plans, plan::pools(plans, &node));
            return failed;
        }
        thread::scope(|scope| {
            // One chunk is programmed while the next one's rings are built.
            let (sender, built) = mpsc::sync_channel(1);
            let node = &node;
            scope.spawn(move || {
                // Whoever would receive it lives as long as there are chunks.
                plans.chunks(CHUNK).all(|plans| sender.send((plans, plan::pools(plans, node))).is_ok())
            });
            built.into_iter().for_each(|(plans, pools)| program(plans, pools));
        });
        failed
    }

    /// A service that failed is tried again, also where nothing else is wanted than what it was programmed for: the node
    /// or another service may be what has changed.
    fn note_failure(&mut self, name: &str) {
        if let Some(entry) = self.names.get(name).and_then(|index| self.services.get_mut(*index)) {
            entry.stale = true;
        }
    }

    /// Takes frontends from services that let go of them for others which could not take them.
    fn end_moves(&mut self, report: &mut ApplyReport) {
        for key in std::mem::take(&mut self.moving) {
            for key in [key, outside(key)] {
                let Some(index) = self.served.get(&key).map(|served| served.config.service) else { continue };
                if !self.is_wanted(index, &key)
                    && let Err(error) = self.withdraw_entry(index, key)
                {
                    report.failed.push((self.name(index), error));
                    // The next round tries again.
                    if let Some(entry) = self.services.get_mut(index) {
                        entry.programmed = State::Unknown;
                    }
                    break;
                }
            }
        }
    }

    /// Whether a service, as it was programmed last, has an entry of `SERVICES`.
    fn is_wanted(&self, index: u32, key: &EndpointKey) -> bool {
        let Some(entry) = self.services.get(index) else { return false };
        match &entry.programmed {
            State::As(service) => {
                let is_it = |frontend: &resolve::ResolvedFrontend| {
                    frontend_key(&frontend.frontend) == base(*key) && (key.scope == 0 || frontend.outside.is_some())
                };
                let is_held = || entry.held.iter().any(|held| frontend_key(&held.frontend) == base(*key));
                resolve::frontends(service, &self.node).iter().any(is_it) && !is_held()
            }
            State::Unknown => true,
            State::Removed => false,
        }
    }

    /// Ends the service of a frontend, unless the frontend is another service's by now or about to be.
    fn withdraw(&mut self, service: u32, key: EndpointKey) -> Result<(), ApplyError> {
        self.withdraw_entry(service, key)?;
        self.withdraw_entry(service, outside(key))
    }

    fn withdraw_entry(&mut self, service: u32, key: EndpointKey) -> Result<(), ApplyError> {
        let Some(served) = self.served.get(&key).copied() else { return Ok(()) };
        if served.config.service != service || self.moving.contains(&base(key)) {
            return Ok(());
        }
        match self.maps.remove_service(&key) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(kernel_error("SERVICES", &error)),
            _ => {}
        }
        self.put_served(key, None);
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
            entry.held.clear();
            let (addresses, ranges) = (entry.addresses.clone(), entry.ranges.clone());
            self.drop_addresses(index, &addresses);
            self.drop_ranges(index, &ranges);
        }
        self.contested.remove(&index);
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

    fn set_weight(&mut self, id: u32, weight: u16) {
        let Some(backend) = self.backends.get_mut(id).filter(|backend| backend.weight != weight) else { return };
        backend.weight = weight;
        self.maps.set_backend_weight(id, weight.into());
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
