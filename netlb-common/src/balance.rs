//! What becomes of a packet of a service: the pipeline behind every hook.
//!
//! Flow table first; a packet that has no slot there is the first of its flow, or its slot was lost. Nothing here knows how packets are
//! read, changed or sent on.

use crate::{
    addr::{Addr, PortBe},
    conntrack::{Direction, Segment, State},
    counters::Counter,
    filter::{self, Kind},
    flow::{Family, Fingerprint, HashKey, Parsed, Tuple},
    maps::{Affinity, AffinityKey, Backend, Config, ConfigRef, EndpointKey, Frontend, Owners, address, algorithm},
    opaque::{any, rolled},
    snat::{self, Ports, Snat},
    table::{self, Data, Flow, Found, Inserted, New, Operations, SAFE_TICKS},
    time::Ticks,
};

pub(crate) use self::selection::{first_member, in_force, member_id, remembered};
pub use self::{
    handed::{At, adopt, backend_at, belongs, member_at},
    selection::{Selection, remember, select},
};

mod handed;
mod selection;

/// Backends a new flow is offered to before it is refused.
pub(crate) const OFFERS: u32 = 4;
/// The maps, beside the flow table.
pub trait Tables: Operations {
    fn hash_key(&self) -> HashKey;
    fn filter_bits_log2(&self) -> u32;
    fn filter_has(&self, bit: u32) -> bool;
    fn config_ref(&self, key: &EndpointKey) -> Option<ConfigRef>;
    fn config(&self, index: u32) -> Option<&Config>;
    /// The member in a slot of all rings.
    fn ring(&self, slot: u32) -> Option<u16>;
    /// A backend id in the list of all members.
    fn member(&self, index: u32) -> Option<u32>;
    fn backend(&self, id: u32) -> Option<&Backend>;
    fn frontend(&self, id: u32) -> Option<&Frontend>;
    /// An address of the node that flows were given as their source.
    fn source(&self, index: u32) -> Option<Addr>;
    /// The index of an address that flows were given, or 0.
    fn source_index(&self, addr: Addr) -> u32;
    fn snat_ports(&self) -> Ports;
    /// An entry of `OWNERS`; 0 if there is none.
    fn owners(&self, key: u64) -> u64;
    /// Whether clients with an address are let in by a service that has ranges.
    fn is_in_range(&self, service: u32, client: Addr) -> bool;
    fn affinity(&self, key: &AffinityKey) -> Option<Affinity>;
    /// Says whether there was room.
    fn set_affinity(&self, key: &AffinityKey, value: Affinity) -> bool;
    fn forget_affinity(&self, key: &AffinityKey);
    /// What is known of an address whatever the port, as [`crate::maps::address`] says it; 0 if nothing is.
    fn address(&self, addr: Addr) -> u32;
    /// Whether an address is of the networks that are services' or nobody's.
    fn is_owned(&self, addr: Addr) -> bool;
    /// Whether what goes from one address to another gets an address of the node as its source where it leaves.
    fn is_masqueraded(&self, source: Addr, destination: Addr) -> bool;
    /// The flows that a backend was ever given.
    fn flows_of(&self, backend: u32) -> u64;
    /// How many times this was asked for the service before.
    fn turn(&self, service: u32) -> u64;
    fn random(&self) -> u32;
    /// Whether a packet from a backend was found to be no service's a moment ago.
    fn is_stranger(&self, fingerprint: Fingerprint, now: Ticks) -> bool;
    fn note_stranger(&self, fingerprint: Fingerprint, now: Ticks);
    /// See [`note`].
    #[inline(always)]
    fn note(self, fingerprint: Fingerprint, segment: Segment, now: Ticks) {
        note(self, fingerprint, segment, now);
    }

    /// See [`leave`].
    #[inline(always)]
    fn leave(self, fingerprint: Fingerprint, data: Data, now: Ticks) {
        leave(self, fingerprint, data, now);
    }

    fn count(&self, counter: Counter);
    fn count_flow(&self, service: u32, backend: u32);
}

/// What an address filter says of a packet.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Candidate {
    /// Perhaps to a frontend.
    pub to_frontend: bool,
    /// Leaves with an address of the node as its source, if it is of no service.
    pub is_masqueraded: bool,
}

/// Whether a packet may be of a service, or is to one of the networks where whatever is no service is nobody. Most that are not end here.
#[inline(always)]
pub fn candidate<A: Family>(tables: &impl Tables, scope: Scope, source: A, destination: A) -> Option<Candidate> {
    let bits = tables.filter_bits_log2();
    let candidate = Candidate {
        to_frontend: tables.filter_has(filter::bit(destination, Kind::Frontend, bits)),
        is_masqueraded: scope == Scope::Replies && tables.is_masqueraded(source.to_map(), destination.to_map()),
    };
    (candidate.to_frontend
        || is_from_backend(tables, source)
        || candidate.is_masqueraded
        || tables.is_owned(destination.to_map()))
    .then_some(candidate)
}

/// Whether a packet with a source may be from a backend.
#[inline(always)]
pub fn is_from_backend<A: Family>(tables: &impl Tables, source: A) -> bool {
    tables.filter_has(filter::bit(source, Kind::Backend, tables.filter_bits_log2()))
}

/// What becomes of a packet that no service has, where its destination is of the networks that are services' or nobody's.
#[inline(always)]
pub fn unclaimed(tables: &impl Tables, destination: Addr) -> Unclaimed {
    if !tables.is_owned(destination) {
        return Unclaimed::Elsewhere;
    }
    let known = tables.address(destination);
    if known & address::NODE != 0 {
        Unclaimed::Elsewhere
    } else if known & address::SERVICE != 0 {
        Unclaimed::Service
    } else {
        Unclaimed::Nobody
    }
}

/// Whose an address is that no frontend was found at.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Unclaimed {
    /// None of our business: another network's, or the node's own.
    Elsewhere,
    /// Services have it, at other ports.
    Service,
    Nobody,
}

/// Which directions of flows a hook translates.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Scope {
    Both,
    Forward,
    Replies,
}

impl Scope {
    #[inline(always)]
    pub(crate) const fn has(self, direction: Direction) -> bool {
        match direction {
            Direction::Forward => !matches!(self, Self::Replies),
            Direction::Reply => !matches!(self, Self::Forward),
        }
    }

    /// Whether packets of a slot are translated here.
    #[inline(always)]
    pub(crate) const fn translates(self, data: Data) -> bool {
        // The kernel would take a reply to an address of this node for its own: it is translated where it comes in.
        let comes_to_node = data.has_snat() && matches!(self, Self::Forward);
        if data.is_masqueraded() {
            // What the node sends, and what comes to it.
            return matches!(data.direction(), Direction::Forward) == matches!(self, Self::Replies);
        }
        self.has(data.direction()) || comes_to_node
    }
}

/// What becomes of a packet.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Verdict {
    /// None of ours: goes on untouched.
    Pass,
    /// Is rewritten as the translation says.
    Translate,
    /// Is wrapped for its backend: the translation's other end is the outer source.
    Wrap,
    Drop,
    /// Nobody serves it: its sender is told.
    Reject,
    /// The node has no port for its flow: its sender is told.
    Exhausted,
    /// Whoever could serve its flow has one with the client's port already, by another frontend.
    Conflict,
    /// An echo request to the address of a service, which is answered.
    Echo,
    /// A reply to an address of the node, at a port that flows are given: whose it is was lost, if no socket of the node waits for it.
    Lost,
}

/// A rewrite: of the destination on the way to the backend, of the source on the way back; and of the other end, where the flow has another
/// source at its backend.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Translation<A> {
    pub direction: Direction,
    pub address: A,
    pub port: PortBe,
    /// Whether the other end changes as well.
    pub has_snat: bool,
    pub other_port: PortBe,
    pub other: A,
    /// Whose counters the packet belongs in.
    pub service: u32,
    /// The index in `HOPS` of the way it leaves by; 0 where that is yet to be found out, or found out again.
    pub hop: u16,
    /// Whether it is the first packet of its flow.
    pub is_new: bool,
}

impl<A: Family> Translation<A> {
    /// None yet.
    #[inline(always)]
    #[must_use]
    pub fn none() -> Self {
        Self {
            direction: Direction::Forward,
            address: A::from_map(Addr::default()),
            port: PortBe(0),
            has_snat: false,
            other_port: PortBe(0),
            other: A::from_map(Addr::default()),
            service: 0,
            hop: 0,
            is_new: false,
        }
    }

    #[inline(always)]
    pub(crate) fn to_backend(backend: &Backend, is_new: bool) -> Self {
        let (address, port) = (A::from_map(backend.addr), backend.port);
        Self { address, port, service: backend.service, is_new, ..Self::none() }
    }

    #[inline(always)]
    pub(crate) fn to_frontend(frontend: &Frontend) -> Self {
        let (address, port) = (A::from_map(frontend.addr), frontend.port);
        Self { direction: Direction::Reply, address, port, service: frontend.service, ..Self::none() }
    }

    /// The world's end of a masqueraded flow is what it is. The other one is yet to be read.
    #[inline(always)]
    pub fn masqueraded(direction: Direction, tuple: &Tuple<A>) -> Self {
        let (address, port) = match direction {
            Direction::Forward => (tuple.destination, tuple.destination_port),
            Direction::Reply => (tuple.source, tuple.source_port),
        };
        Self { direction, address, port, ..Self::none() }
    }

    /// Has the other end change as well.
    #[inline(always)]
    fn set_other(&mut self, other: A, port: PortBe) {
        (self.has_snat, self.other, self.other_port) = (true, other, port);
    }

    /// The same, as the flow's record has it. Says whether it is there.
    #[inline(always)]
    pub(crate) fn read_other<T: Tables>(&mut self, tables: T, fingerprint: Fingerprint, found: Found<'_>) -> bool {
        let Some(flow) = tables.record(found.place).and_then(|record| record.read(fingerprint)) else { return false };
        match self.direction {
            Direction::Forward => {
                let Some(source) = tables.source(flow.snat.source()) else { return false };
                self.set_other(A::from_map(source), flow.snat.port());
            }
            Direction::Reply => self.set_other(A::from_map(flow.client), flow.client_port),
        }
        true
    }

    /// The packet's tuple after the translation.
    #[inline(always)]
    #[must_use]
    pub const fn apply(&self, tuple: &Tuple<A>) -> Tuple<A> {
        let mut new = *tuple;
        match self.direction {
            Direction::Forward => {
                (new.destination, new.destination_port) = (self.address, self.port);
                if self.has_snat {
                    (new.source, new.source_port) = (self.other, self.other_port);
                }
            }
            Direction::Reply => {
                (new.source, new.source_port) = (self.address, self.port);
                if self.has_snat {
                    (new.destination, new.destination_port) = (self.other, self.other_port);
                }
            }
        }
        new
    }

    /// The other direction's tuple, as its packets have it when they come in.
    #[inline(always)]
    const fn twin(&self, tuple: &Tuple<A>) -> Tuple<A> {
        self.apply(tuple).reversed()
    }
}

/// What the flow table says of a packet.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Known {
    /// It is of this flow: rewritten as the translation says.
    Translate,
    /// The same, and it may change something: see [`tend`].
    Tend,
    /// It is of this flow, whose packets are wrapped.
    Wrap,
    /// Of a flow whose direction another hook translates.
    Elsewhere,
    /// Nothing: see [`select`], [`place`] and [`lost_reply`].
    No,
}

/// Looks a packet up in the flow table: all that most packets of services need.
///
/// `can_leave_by` is asked whether this hook can send by the way that the flow is known to take. `translation` is filled in for
/// [`Known::Translate`], [`Known::Tend`] and [`Known::Wrap`]. It is not part of the result, because the compiler would leave it undefined
/// in the others, and the verifier accepts no undefined value even where nobody looks at it.
#[inline(always)]
pub fn known<A: Family, T: Tables>(
    tables: T,
    packet: &Parsed<A>,
    lookup: &Lookup,
    can_leave_by: impl Fn(u16) -> bool,
    translation: &mut Translation<A>,
) -> Known {
    let Lookup { fingerprint, now, scope, .. } = *lookup;
    let Some(found) = tables.look_up(fingerprint, now) else { return Known::No };
    let direction = found.data.direction();
    if !scope.translates(found.data) {
        return Known::Elsewhere;
    }
    // Ways are found out again in every unit of time: they change.
    let is_due = found.data.is_due(now);
    let hop = if is_due { 0 } else { found.data.hop() };
    if hop != 0 && !can_leave_by(hop) {
        return Known::Elsewhere;
    }
    let id = found.data.id();
    match direction {
        _ if found.data.is_masqueraded() => {
            if (packet.segment.is_syn() || packet.segment.is_syn_ack()) && found.data.state().is_finished() {
                tables.leave(fingerprint, found.data, now);
                return Known::No;
            }
            *translation = Translation::masqueraded(direction, &packet.tuple);
        }
        Direction::Forward => {
            let Some(backend) = tables.backend(id) else { return Known::No };
            if !stays(backend, packet, found.data, now) {
                tables.leave(fingerprint, found.data, now);
                return Known::No;
            }
            *translation = Translation::to_backend(backend, false);
        }
        Direction::Reply => {
            // A finished flow answers no SYN: the client used its port again, for the backend's own address.
            if packet.segment.is_syn_ack() && found.data.state().is_finished() {
                tables.leave(fingerprint, found.data, now);
                return Known::No;
            }
            let Some(frontend) = tables.frontend(id) else { return Known::No };
            *translation = Translation::to_frontend(frontend);
        }
    }
    translation.hop = hop;
    if found.data.has_snat() && !translation.read_other(tables, fingerprint, found) {
        return Known::No;
    }
    // Most packets change nothing.
    let is_news = is_due || !found.data.is_kept_by(packet.segment);
    if found.data.is_wrapped() {
        if is_news {
            tables.note(fingerprint, packet.segment, now);
        }
        Known::Wrap
    } else if is_news {
        Known::Tend
    } else {
        Known::Translate
    }
}

/// What packets are looked up with.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Lookup {
    pub fingerprint: Fingerprint,
    pub now: Ticks,
    pub candidate: Candidate,
    pub scope: Scope,
}

/// Whether a packet belongs to the flow whose slot it found. It does not where a client begins anew on a finished flow; and datagrams leave
/// a backend that serves no more, as clients leave one that takes no new flows before it answered.
#[inline(always)]
fn stays<A: Family>(backend: &Backend, packet: &Parsed<A>, data: Data, now: Ticks) -> bool {
    let is_syn = packet.segment.is_syn();
    if !is_syn && backend.flags & Backend::SERVING != 0 {
        return true;
    }
    if !is_syn {
        return !packet.segment.is_datagram();
    }
    let state = data.state();
    if state.is_finished() {
        return false;
    }
    backend.flags & Backend::ACCEPTING != 0 || (state != State::SYN_SENT && data.idle(now) <= SAFE_TICKS)
}

/// Ends the flow that a packet was found to be of but does not belong to. `data` is what its slot said.
#[inline(always)]
pub fn leave<T: Tables>(tables: T, fingerprint: Fingerprint, data: Data, now: Ticks) {
    let Some(found) = tables.find(fingerprint, now) else { return };
    let flow = tables.record(found.place).and_then(|record| record.read(fingerprint));
    // Whatever came there meanwhile stays.
    if table::release(found.slot, data)
        && let Some(flow) = flow
    {
        tables.remove(flow.twin, now);
        if !data.state().is_finished() {
            tables.count(Counter::FlowsMoved);
        }
    }
}

/// Whether a client begins anew with a backend that takes no new flows. Nothing is noted of that: the time that lets it go runs on.
#[inline(always)]
fn is_last_try<T: Tables>(tables: T, data: Data, segment: Segment) -> bool {
    segment.is_syn()
        && data.direction() == Direction::Forward
        && !data.is_masqueraded()
        && tables.backend(data.id()).is_some_and(|backend| backend.flags & Backend::ACCEPTING == 0)
}

/// Notes one more packet of a flow that has one direction in its slot.
#[inline(always)]
pub fn note<T: Tables>(tables: T, fingerprint: Fingerprint, segment: Segment, now: Ticks) {
    if let Some(found) = tables.find(fingerprint, now)
        && !is_last_try(tables, found.data, segment)
    {
        table::change(found.slot, found.data, |data| data.after(segment, now));
    }
}

/// Notes a packet in its flow's slot, and what this changes also in the other direction's: state and time, or all of it where that slot was
/// lost. Both are written at most once for each unit of time and each state.
#[inline(always)]
pub fn tend<A: Family, T: Tables>(tables: T, packet: &Parsed<A>, lookup: &Lookup, translation: &Translation<A>) {
    let Lookup { fingerprint, now, .. } = *lookup;
    let Some(found) = tables.find(fingerprint, now) else { return };
    if is_last_try(tables, found.data, packet.segment) {
        return;
    }
    if !table::change(found.slot, found.data, |data| data.after(packet.segment, now)) {
        return;
    }
    let data = Data(found.slot.data.load());
    let twin = tables.hash_key().fingerprint(&translation.twin(&packet.tuple));
    if tables.follow(twin, data.state(), now) || data.state().is_finished() {
        return;
    }
    let Some(flow) = tables.record(found.place).and_then(|record| record.read(fingerprint)) else { return };
    let (direction, id) = match data.direction() {
        Direction::Forward => (Direction::Reply, flow.frontend),
        Direction::Reply => (Direction::Forward, flow.backend),
    };
    let flow = Flow { twin: fingerprint, ..flow };
    let data = Data::new(direction, data.state(), id).with_snat(data.has_snat());
    if tables.insert(New { fingerprint: twin, data, flow, now, defers: false }).is_new() {
        tables.count(Counter::FlowsRepaired);
    }
}

/// Makes the flow of a packet to a service: offers it to a backend, and to the next ones if that cannot be.
///
/// `translation` is filled in for [`Verdict::Translate`] and [`Verdict::Wrap`]. After [`Verdict::Conflict`] it may be tried
/// [with another source](Selection::with_another_source).
#[inline(always)]
pub fn place<A: Family, T: Tables>(
    tables: T,
    packet: &Parsed<A>,
    lookup: &Lookup,
    selection: Selection,
    reach: &impl Reach<A>,
    translation: &mut Translation<A>,
) -> Verdict {
    let Some(config) = tables.config(selection.config()) else { return Verdict::Drop };
    let mut selection = selection;
    for _ in 0..OFFERS {
        // Else the verifier would go on with each set of flags by itself.
        selection = Selection(any(selection.0, lookup.fingerprint.0));
        let id = match selection.backend() {
            0 => member_id(tables, config, selection.member()),
            id => Some(id),
        };
        let Some(id) = id else { break };
        let Some(backend) = tables.backend(id) else { break };
        // Those that drain are members still.
        let is_strangers = backend.flags & Backend::ONLY_LOCAL != 0 && config.flags & Config::LOCAL == 0;
        let may_have_it = (backend.flags & Backend::ACCEPTING != 0 && !is_strangers) || selection.is_known();
        selection = selection.next();
        if !may_have_it {
            continue;
        }
        let snat = if selection.has_another_source() { Config::SNAT_PODS | Config::SNAT_OUTSIDE } else { 0 };
        match offer(tables, packet, config, id, backend, snat, lookup, reach, translation) {
            Offer::Taken => return Verdict::Translate,
            Offer::Wrapped => return Verdict::Wrap,
            // The node has no other source to give.
            Offer::NotHere if selection.has_another_source() && goes_by_client(config) => {
                selection = selection.with_its_own_source();
            }
            Offer::NotHere if selection.has_another_source() => break,
            Offer::NotHere => {
                tables.count(Counter::NeedsSnat);
                return Verdict::Pass;
            }
            Offer::Full => return Verdict::Drop,
            Offer::NoPort => return Verdict::Exhausted,
            // Its clients keep their backend: another source is better than another backend.
            Offer::Conflict if goes_by_client(config) && !selection.has_conflict() => return Verdict::Conflict,
            Offer::Conflict => selection = selection.with_conflict(),
        }
    }
    // Or all of them drain.
    if selection.has_conflict() { Verdict::Conflict } else { Verdict::Reject }
}

/// Whether the backend is chosen by who the client is.
#[inline(always)]
pub(crate) const fn goes_by_client(config: &Config) -> bool {
    config.affinity != 0 || config.algorithm == algorithm::SOURCE_HASH
}

/// What a hook knows of the ways to backends and back.
pub trait Reach<A> {
    /// The source that a packet's flow is to have at a backend, by [`needs_snat`] and [`reserve`].
    fn source(&self, packet: &Parsed<A>, lookup: &Lookup, backend: u32, flags: u32) -> Snat;

    /// The index in `HOPS` of the way to an address, where that is known already; else 0.
    fn hop(&self, _: A, _: Ticks) -> u16 {
        0
    }
}

/// Whether a flow must have an address of the node as its source, for its replies to come back here or because its service wants it so.
/// `flags` are the service's, and `is_outside` says that the packet comes from
/// outside.
#[inline(always)]
pub fn needs_snat<A: Family>(
    packet: &Parsed<A>,
    backend: &Backend,
    flags: u32,
    is_outside: bool,
    returns_here: impl FnOnce(A) -> bool,
) -> bool {
    let backend = A::from_map(backend.addr);
    let wanted = if is_outside { Config::SNAT_OUTSIDE } else { Config::SNAT_PODS };
    backend == packet.tuple.source || flags & wanted != 0 || (flags & Config::SNAT_NEVER == 0 && !returns_here(backend))
}

/// The first of a flow's [attempts](attempt) at a source that is one, of as many as there may be at one of some addresses.
#[inline(always)]
pub fn reserve(addresses: u32, attempt: impl Fn(u32) -> Snat) -> Snat {
    for n in 0..snat::TRIES {
        if n * addresses >= snat::TRIES {
            break;
        }
        let snat = attempt(n);
        if snat != Snat::NONE {
            return snat;
        }
    }
    Snat::NO_PORT
}

/// One attempt at a source: a port of an address of the node that nobody has at the other end, or that the flow has already. The reply's
/// slot is the claim on it, and whoever makes it looks again.
///
/// `backend` is 0 for a flow that is masqueraded.
#[inline(always)]
pub fn attempt<A: Family, T: Tables>(
    tables: T,
    packet: &Parsed<A>,
    lookup: &Lookup,
    backend: u32,
    (index, n): (u32, u32),
    is_taken: impl Fn(&Tuple<A>) -> bool,
) -> Snat {
    let tuple = &packet.tuple;
    let mut translation = Translation::<A>::masqueraded(Direction::Forward, tuple);
    if backend != 0 {
        let Some(backend) = tables.backend(backend) else { return Snat::NONE };
        (translation.address, translation.port) = (A::from_map(backend.addr), backend.port);
    }
    let hash = snat::hash(tuple.source, tuple.source_port);
    let Some(port) = tables.snat_ports().candidate(tuple.source_port, hash, n) else { return Snat::NONE };
    let Some(source) = tables.source(index) else { return Snat::NONE };
    translation.set_other(A::from_map(source), port);
    let reply = translation.twin(tuple);
    let is_free = match tables.claimant(tables.hash_key().fingerprint(&reply), lookup.now) {
        Some(claimant) => claimant == lookup.fingerprint,
        None => !is_taken(&reply),
    };
    if is_free { Snat::new(index, port) } else { Snat::NONE }
}

/// What came of offering a flow to a backend.
enum Offer {
    Taken,
    /// The same, with packets wrapped.
    Wrapped,
    /// Its replies would not come back through this node.
    NotHere,
    /// There is no room for the flow.
    Full,
    /// Every port of the node's address is taken.
    NoPort,
    /// The backend's replies to this client port belong to another frontend's flow.
    Conflict,
}

#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "inlined: a part of `place`")]
fn offer<A: Family, T: Tables>(
    tables: T,
    packet: &Parsed<A>,
    config: &Config,
    id: u32,
    backend: &Backend,
    flags: u32,
    lookup: &Lookup,
    reach: &impl Reach<A>,
    translation: &mut Translation<A>,
) -> Offer {
    *translation = Translation::to_backend(backend, true);
    translation.hop = reach.hop(translation.address, lookup.now);
    let snat = reach.source(packet, lookup, id, config.flags | flags);
    if snat == Snat::NO_ADDRESS {
        return Offer::NotHere;
    }
    if snat == Snat::NO_PORT {
        return Offer::NoPort;
    }
    if snat != Snat::NONE {
        let Some(source) = tables.source(snat.source()) else { return Offer::NotHere };
        translation.set_other(A::from_map(source), snat.port());
    }
    if snat.is_outer() {
        return insert_wrapped(tables, packet, config, id, lookup, snat, translation);
    }

    insert(tables, packet, Some(config), id, lookup, snat, translation)
}

/// Gives both directions of a new flow their slots. `translation` is what becomes of its packets if no other CPU is faster. What is
/// masqueraded has no `config`.
#[inline(always)]
fn insert<A: Family, T: Tables>(
    tables: T,
    packet: &Parsed<A>,
    config: Option<&Config>,
    id: u32,
    lookup: &Lookup,
    snat: Snat,
    translation: &mut Translation<A>,
) -> Offer {
    let now = lookup.now;
    // Read anew for each use, as below.
    let frontend = || config.map_or(0, |config| config.frontend);
    let twin = tables.hash_key().fingerprint(&translation.twin(&packet.tuple));
    // Built anew for each use: the stack of a BPF program has no room to keep it.
    let flow = |twin| Flow {
        twin,
        client: packet.tuple.source.to_map(),
        client_port: packet.tuple.source_port,
        protocol: packet.tuple.protocol,
        snat,
        frontend: frontend(),
        backend: id,
    };
    // What is given an address of the node has it in the record.
    let defers = snat == Snat::NONE;
    let mut state = State::first(packet.segment);
    let reply = Data::new(Direction::Reply, state, frontend()).with_snat(translation.has_snat);
    // The reply's slot first: it is also the claim on the client's port at this backend.
    let new = || New { fingerprint: twin, data: reply, flow: flow(lookup.fingerprint), now, defers };
    let mut inserted = tables.insert(new());
    if inserted.is_existing() && inserted.data().state().is_finished() && packet.segment.is_syn() {
        // Whatever this was, it is over, and the client begins anew.
        tables.remove(twin, now);
        inserted = tables.insert(new());
    }
    let (is_mine, mine) = (inserted.is_new(), inserted.place());
    if inserted == Inserted::FULL {
        tables.count(Counter::FlowTableFull);
        return Offer::Full;
    } else if inserted.is_evicting() {
        tables.count(Counter::FlowsEvicted);
    } else if inserted.is_existing() {
        let data = inserted.data();
        if data.direction() != Direction::Reply || data.id() != frontend() {
            return Offer::Conflict;
        }
        // Two flows that were given one port at the same moment.
        if translation.has_snat && tables.claimant(twin, now) != Some(lookup.fingerprint) {
            return Offer::Conflict;
        }
        // This very flow: only its forward slot is missing, or another CPU is making it.
        state = data.state().next(Direction::Forward, packet.segment);
        tables.follow(twin, state, now);
    }
    let forward = Data::new(Direction::Forward, state, id).with_snat(translation.has_snat).with_hop(translation.hop);
    let new = New { fingerprint: lookup.fingerprint, data: forward, flow: flow(twin), now, defers };
    let inserted = tables.insert(new);
    if inserted == Inserted::FULL {
        if is_mine {
            tables.remove(twin, now);
        }
        tables.count(Counter::FlowTableFull);
        return Offer::Full;
    }
    if inserted.is_evicting() {
        tables.count(Counter::FlowsEvicted);
    }
    if !inserted.is_new() {
        translation.is_new = false;
        // Another CPU was faster. It may have chosen another backend.
        let theirs = inserted.data().id();
        if theirs != id {
            if is_mine {
                tables.remove(twin, now);
            }
            let Some(backend) = tables.backend(theirs).filter(|_| theirs != 0) else { return Offer::Full };
            *translation = Translation::to_backend(backend, false);
            if inserted.data().has_snat() {
                let snat = tables.snat(lookup.fingerprint, now);
                let Some(source) = tables.source(snat.source()) else { return Offer::Full };
                translation.set_other(A::from_map(source), snat.port());
            }
        } else if is_mine && defers {
            tables.record_at(mine, twin, &flow(lookup.fingerprint));
        }
    } else if is_mine {
        match config {
            Some(config) => {
                tables.count(Counter::FlowsCreated);
                tables.count_flow(config.service, id);
            }
            None => tables.count(Counter::FlowsMasqueraded),
        }
        if defers {
            tables.record_at(mine, twin, &flow(lookup.fingerprint));
            tables.record_at(inserted.place(), lookup.fingerprint, &flow(twin));
        }
    } else {
        tables.count(Counter::FlowsRepaired);
        if defers {
            tables.record_at(inserted.place(), lookup.fingerprint, &flow(twin));
        }
    }
    Offer::Taken
}

/// Gives a flow whose packets are wrapped its slot: replies do not pass by here.
#[inline(always)]
fn insert_wrapped<A: Family, T: Tables>(
    tables: T,
    packet: &Parsed<A>,
    config: &Config,
    id: u32,
    lookup: &Lookup,
    snat: Snat,
    translation: &mut Translation<A>,
) -> Offer {
    let flow = Flow {
        twin: Fingerprint(0),
        client: packet.tuple.source.to_map(),
        client_port: packet.tuple.source_port,
        protocol: packet.tuple.protocol,
        snat,
        frontend: config.frontend,
        backend: id,
    };
    let data = Data::new(Direction::Forward, State::first(packet.segment), id).wrapped().with_hop(translation.hop);
    let new = New { fingerprint: lookup.fingerprint, data, flow, now: lookup.now, defers: false };
    let inserted = tables.insert(new);
    if inserted == Inserted::FULL {
        tables.count(Counter::FlowTableFull);
        return Offer::Full;
    }
    if inserted.is_evicting() {
        tables.count(Counter::FlowsEvicted);
    }
    if inserted.is_new() {
        tables.count(Counter::FlowsCreated);
        tables.count_flow(config.service, id);
        return Offer::Wrapped;
    }
    // Another CPU was faster. It may have chosen another backend.
    let theirs = inserted.data();
    let Some(backend) = tables.backend(theirs.id()).filter(|_| theirs.id() != 0) else { return Offer::Full };
    *translation = Translation::to_backend(backend, false);
    if theirs.has_snat() {
        let snat = tables.snat(lookup.fingerprint, lookup.now);
        let Some(source) = tables.source(snat.source()) else { return Offer::Full };
        translation.set_other(A::from_map(source), snat.port());
    }
    if theirs.is_wrapped() { Offer::Wrapped } else { Offer::Taken }
}

/// A packet of no flow that the node sends, which is [`masqueraded`](Candidate): makes its flow.
///
/// Of TCP only what begins a connection: the rest may answer one that came from outside. Datagrams do not tell.
///
/// `translation` is filled in for [`Verdict::Translate`].
#[inline(always)]
pub fn masquerade<A: Family, T: Tables>(
    tables: T,
    packet: &Parsed<A>,
    lookup: &Lookup,
    reach: &impl Reach<A>,
    translation: &mut Translation<A>,
) -> Verdict {
    if !packet.segment.is_syn() && !packet.segment.is_datagram() {
        return Verdict::Pass;
    }
    // A service's packet to a backend outside that was translated where it came in, and was to keep its source.
    let reply = tables.hash_key().fingerprint(&packet.tuple.reversed());
    let known = tables.probe(reply, lookup.now);
    if known != Data::NONE && known.direction() == Direction::Reply {
        return Verdict::Pass;
    }
    let snat = reach.source(packet, lookup, 0, 0);
    if snat == Snat::NONE {
        return Verdict::Pass;
    }
    if snat == Snat::NO_ADDRESS {
        tables.count(Counter::NeedsSnat);
        return Verdict::Pass;
    }
    if snat == Snat::NO_PORT {
        tables.count(Counter::SnatExhausted);
        return Verdict::Drop;
    }
    let Some(source) = tables.source(snat.source()) else { return Verdict::Drop };
    *translation = Translation::masqueraded(Direction::Forward, &packet.tuple);
    translation.is_new = true;
    translation.set_other(A::from_map(source), snat.port());
    match insert(tables, packet, None, 0, lookup, snat, translation) {
        Offer::Taken => Verdict::Translate,
        Offer::Conflict => {
            tables.count(Counter::FlowConflict);
            Verdict::Drop
        }
        _ => Verdict::Drop,
    }
}

/// A packet that may be a backend's reply whose slot was lost: looks for the other direction at every frontend the backend serves.
#[inline(always)]
pub fn lost_reply<A: Family, T: Tables>(
    tables: T,
    packet: &Parsed<A>,
    lookup: &Lookup,
    translation: &mut Translation<A>,
) -> Verdict {
    if !is_from_backend(&tables, packet.tuple.source) || !lookup.scope.has(Direction::Reply) {
        return Verdict::Pass;
    }
    let now = lookup.now;
    if tables.is_stranger(lookup.fingerprint, now) {
        return Verdict::Pass;
    }
    let tuple = &packet.tuple;
    let key = EndpointKey::new(tuple.source.to_map(), tuple.source_port, tuple.protocol);
    let first = tables.hash_key().endpoint(&key);
    let mut owners = tables.owners(first);
    if owners == 0 {
        tables.note_stranger(lookup.fingerprint, now);
        return Verdict::Pass;
    }
    // Whose it is cannot be told from the reply; the node would refuse it, and the backend give up. The next packet of the client brings
    // the slot back.
    if tables.snat_ports().has(tuple.destination_port) && tables.source_index(tuple.destination.to_map()) != 0 {
        return Verdict::Lost;
    }
    for n in 0..rolled(Owners::MAX) as u32 {
        if n > 0 {
            owners = if n % 2 == 0 { tables.owners(Owners::key(first, n / 2)) } else { owners >> 32 };
        }
        let id = owners as u32;
        if id == 0 {
            break;
        }
        let Some(frontend) = tables.frontend(id) else { break };
        *translation = Translation::to_frontend(frontend);
        let twin = tables.hash_key().fingerprint(&translation.twin(tuple));
        let data = tables.probe(twin, now);
        if data == Data::NONE || data.direction() != Direction::Forward {
            continue;
        }
        if packet.segment.is_syn_ack() && data.state().is_finished() {
            continue;
        }
        let Some(backend) = tables.backend(data.id()) else { break };
        if A::from_map(backend.addr) != tuple.source || backend.port != tuple.source_port {
            continue;
        }
        let state = data.state().next(Direction::Reply, packet.segment);
        let flow = Flow {
            twin,
            client: tuple.destination.to_map(),
            client_port: tuple.destination_port,
            protocol: tuple.protocol,
            snat: Snat::NONE,
            frontend: id,
            backend: data.id(),
        };
        let reply = Data::new(Direction::Reply, state, id);
        if tables.insert(New { fingerprint: lookup.fingerprint, data: reply, flow, now, defers: false }).is_new() {
            tables.count(Counter::FlowsRepaired);
        }
        tables.follow(twin, state, now);
        return Verdict::Translate;
    }
    tables.note_stranger(lookup.fingerprint, now);
    Verdict::Pass
}

#[cfg(test)]
mod tests;
