//! Who is to serve a new flow: the record in force for it, and the backend that it is offered to first.

use core::num::NonZeroU32;

use super::{Lookup, Tables, Translation};
use crate::{
    addr::Addr,
    conntrack::Direction,
    counters::Counter,
    flow::{Family, Parsed},
    maps::{Affinity, AffinityKey, Backend, Config, EndpointKey, algorithm},
    select,
    table::Data,
    time::Ticks,
};

/// Backends that a segment in mid-connection is looked for at, beginning with the one the ring names: with a hash that is nearly always
/// the one, otherwise it may be any.
const SEARCHED_HASHED: u32 = 8;
const SEARCHED: u32 = 64;

/// The service of a packet the flow table says nothing of, and whom its flow is offered to first. One word: what a subprogram returns.
///
/// ```text
/// bit 0: a backend that is asked before all members, or 0; 21: member; 38: known; 39: affine; 40: index in `CONFIGS`; 62: another source;
/// 63: conflict
/// ```
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(transparent)]
pub struct Selection(pub u64);

impl Selection {
    /// Not to a service.
    pub const NONE: Self = Self(u64::MAX);
    /// To a service of which no backend takes flows: rejected.
    pub const NOBODY: Self = Self(u64::MAX - 1);
    /// The service does not want it. Counted already.
    pub const UNWANTED: Self = Self(u64::MAX - 2);

    const MEMBER: u32 = 21;
    const MEMBER_BITS: u32 = 17;
    /// The flow is this backend's already, as the other direction's slot says.
    const KNOWN: u64 = 1 << 38;
    /// The client is to keep its backend.
    const AFFINE: u64 = 1 << 39;
    const CONFIG: u32 = 40;
    const CONFIG_BITS: u32 = 22;
    /// The flow is to have an address of the node as its source.
    const ANOTHER_SOURCE: u64 = 1 << 62;
    /// Somebody who was asked would have taken the flow, if the client's port were not in use there.
    const CONFLICT: u64 = 1 << 63;

    #[inline(always)]
    pub(super) const fn new(config: u32, member: u32) -> Self {
        Self((config as u64) << Self::CONFIG | (member as u64 & ((1 << Self::MEMBER_BITS) - 1)) << Self::MEMBER)
    }

    /// Has a backend asked first.
    #[inline(always)]
    const fn with_backend(self, id: u32) -> Self {
        Self(self.0 | id as u64 & ((1 << Self::MEMBER) - 1))
    }

    #[inline(always)]
    const fn with_known(self) -> Self {
        Self(self.0 | Self::KNOWN)
    }

    #[inline(always)]
    const fn with_affinity(self) -> Self {
        Self(self.0 | Self::AFFINE)
    }

    #[inline(always)]
    pub(super) const fn config(self) -> u32 {
        (self.0 >> Self::CONFIG) as u32 & ((1 << Self::CONFIG_BITS) - 1)
    }

    /// The backend that is asked before the members; 0 if there is none.
    #[inline(always)]
    pub(super) const fn backend(self) -> u32 {
        (self.0 & ((1 << Self::MEMBER) - 1)) as u32
    }

    #[inline(always)]
    pub(super) const fn member(self) -> u32 {
        (self.0 >> Self::MEMBER) as u32 & ((1 << Self::MEMBER_BITS) - 1)
    }

    /// Whoever is asked after this one, and of whom nothing is known.
    #[inline(always)]
    pub(super) const fn next(self) -> Self {
        let unknown = self.0 & !Self::KNOWN;
        if self.backend() == 0 {
            Self(unknown + (1 << Self::MEMBER))
        } else {
            Self(unknown & !((1 << Self::MEMBER) - 1))
        }
    }

    #[inline(always)]
    pub(super) const fn is_known(self) -> bool {
        self.0 & Self::KNOWN != 0
    }

    #[inline(always)]
    pub(super) const fn with_conflict(self) -> Self {
        Self(self.0 | Self::CONFLICT)
    }

    /// After a conflict everywhere: with a source of the node's, the flow is told from the one that has the client's port.
    #[inline(always)]
    #[must_use]
    pub const fn with_another_source(self) -> Self {
        Self(self.0 | Self::ANOTHER_SOURCE | Self::CONFLICT)
    }

    /// Where the node has none to give.
    #[inline(always)]
    pub(super) const fn with_its_own_source(self) -> Self {
        Self(self.0 & !Self::ANOTHER_SOURCE)
    }

    #[inline(always)]
    pub(super) const fn has_another_source(self) -> bool {
        self.0 & Self::ANOTHER_SOURCE != 0
    }

    #[inline(always)]
    pub(super) const fn has_conflict(self) -> bool {
        self.0 & Self::CONFLICT != 0
    }

    /// Whether the client's backend is to be [remembered](remember) when the flow is made.
    #[inline(always)]
    #[must_use]
    pub const fn is_affine(self) -> bool {
        self.0 & Self::AFFINE != 0
    }
}

/// Finds the service of a packet that the flow table says nothing of, and who is to serve it. `is_outside` says whether the packet comes
/// from outside: neither from a pod of this node nor from the node itself.
#[inline(always)]
pub fn select<A: Family, T: Tables>(
    tables: T,
    packet: &Parsed<A>,
    lookup: &Lookup,
    is_outside: impl FnOnce() -> bool,
) -> Selection {
    let tuple = &packet.tuple;
    if !lookup.candidate.to_frontend || !lookup.scope.has(Direction::Forward) {
        return Selection::NONE;
    }
    // Frontends there are for processes of the node, which reach them by their sockets; on an interface it is somebody's mistake or trick.
    if tuple.source.is_loopback() || tuple.destination.is_loopback() {
        return Selection::NONE;
    }
    let mut key = EndpointKey::new(tuple.destination.to_map(), tuple.destination_port, tuple.protocol);
    let Some((mut index, mut config)) = in_force(&tables, &key) else { return Selection::NONE };
    if config.flags & Config::OUTSIDE != 0 && is_outside() {
        key.scope = EndpointKey::OUTSIDE;
        match in_force(&tables, &key) {
            Some(outside) => (index, config) = outside,
            // A change is under way. A retransmission finds the record; the other one would lend the flow, for as long as it lives, what
            // its policy forbids, and the kernel would send the packet on or refuse it.
            None => {
                tables.count(Counter::NoLocalBackend);
                return Selection::UNWANTED;
            }
        }
    }
    let client = tuple.source.to_map();
    if config.flags & Config::RANGES != 0 && !tables.is_in_range(config.service, client) {
        tables.count(Counter::SourceRange);
        return Selection::UNWANTED;
    }
    let is_mid_connection = !packet.segment.is_datagram() && !packet.segment.is_syn();
    if config.ring_len == 0 {
        if config.flags & Config::DROP != 0 {
            tables.count(Counter::NoLocalBackend);
            return Selection::UNWANTED;
        }
        // Members that drain have their flows still.
        if !is_mid_connection || config.members_len == 0 {
            return Selection::NOBODY;
        }
    }
    let mut selection = Selection::new(index, 0);
    let mut hash = 0;
    if config.affinity != 0 {
        selection = selection.with_affinity();
        hash = select::client_hash(tuple.source);
        if config.ring_len != 0 {
            selection = selection.with_backend(remembered(tables, config, client, lookup.now));
        }
    } else if config.algorithm == algorithm::MAGLEV {
        hash = select::hash(tuple);
    } else if config.algorithm == algorithm::SOURCE_HASH {
        hash = select::client_hash(tuple.source);
    }
    let first = if config.ring_len == 0 { Some(0) } else { first_member(tables, config, hash) };
    let Some(first) = first else { return Selection::NOBODY };
    // In mid-connection: the table lost this direction, but perhaps not the other.
    if is_mid_connection {
        let is_it = |id| {
            let Some(backend) = tables.backend(id) else { return false };
            let twin = Translation::<A>::to_backend(backend, false).twin(tuple);
            let data = tables.probe(tables.hash_key().fingerprint(&twin), lookup.now);
            data != Data::NONE && data.direction() == Direction::Reply && data.id() == config.frontend
        };
        let is_hashed = matches!(config.algorithm, algorithm::MAGLEV | algorithm::SOURCE_HASH);
        let is_near = is_hashed && config.affinity == 0 && config.ring_len != 0;
        let most = if is_near { SEARCHED_HASHED } else { SEARCHED };
        for n in 0..SEARCHED {
            if n >= most || n >= config.members_len {
                break;
            }
            let member = first + n;
            let Some(id) = member_id(tables, config, member) else { break };
            if is_it(id) {
                return Selection::new(index, member).with_known();
            }
        }
        if config.ring_len == 0 {
            return Selection::NOBODY;
        }
    }
    Selection(selection.0 | Selection::new(0, first).0)
}

/// The record in force for an address, port and protocol, and its index.
#[inline(always)]
pub(crate) fn in_force<'a>(tables: &'a impl Tables, key: &EndpointKey) -> Option<(u32, &'a Config)> {
    let reference = tables.config_ref(key)?;
    let config = tables.config(reference.index())?;
    // A hash element is reused at once, so what it said may be another service's by now.
    if config.generation != reference.generation() || config.key != *key {
        return None;
    }
    Some((reference.index(), config))
}

/// The member that a new flow is offered to first; none where no backend takes any. `hash` is what Maglev goes by, and
/// `source-hash`, and every service whose clients keep their backends.
#[inline(always)]
pub(crate) fn first_member(tables: impl Tables, config: &Config, hash: u32) -> Option<u32> {
    if config.ring_len == 0 {
        return None;
    }
    let slot = match config.algorithm {
        algorithm::RANDOM if config.affinity == 0 => select::slot(tables.random(), config.ring_len),
        algorithm::LEAST_CONN if config.affinity == 0 => return less_busy(tables, config),
        algorithm::ROUND_ROBIN if config.affinity == 0 => select::turn(tables.turn(config.service), config.ring_len),
        _ => select::slot(hash, config.ring_len),
    };
    tables.ring(config.ring.wrapping_add(slot)).map(u32::from)
}

/// Of two members drawn at random, by the shares of the ring, the one with fewer flows for its weight: that is nearly as even as asking
/// all of them, and clients that begin at the same moment do not all go to the same one.
#[inline(always)]
fn less_busy(tables: impl Tables, config: &Config) -> Option<u32> {
    let draw = || {
        let slot = select::slot(tables.random(), config.ring_len);
        tables.ring(config.ring.wrapping_add(slot)).map(u32::from)
    };
    let load = |member| {
        let id = member_id(tables, config, member)?;
        let Backend { base, weight, .. } = tables.backend(id)?;
        Some(select::Load::new(tables.flows_of(id), *base, *weight))
    };
    let (first, second) = (draw()?, draw()?);
    if first != second && load(first)?.is_more_than(load(second)?) { Some(second) } else { Some(first) }
}

/// The id of a service's member; they are counted round and round.
#[inline(always)]
pub(crate) fn member_id(tables: impl Tables, config: &Config, member: u32) -> Option<u32> {
    let members = NonZeroU32::new(config.members_len)?;
    tables.member(config.members.wrapping_add(member % members))
}

/// The backend that a client had last, or 0. One that is of no use any more is forgotten.
#[inline(always)]
pub(crate) fn remembered(tables: impl Tables, config: &Config, client: Addr, now: Ticks) -> u32 {
    let key = AffinityKey::new(client, config.service, config.key.protocol);
    let Some(affinity) = tables.affinity(&key) else { return 0 };
    let id = affinity.backend();
    let is_usable = !affinity.is_expired(now, config.affinity)
        && tables.backend(id).is_some_and(|backend| {
            // Of the set that the record chooses from: another one may have it for another way to the service.
            let is_local = config.flags & Config::LOCAL != 0;
            let asked = Backend::ACCEPTING | if is_local { Backend::LOCAL } else { Backend::ONLY_LOCAL };
            let wanted = Backend::ACCEPTING | if is_local { Backend::LOCAL } else { 0 };
            backend.service == config.service && backend.flags & asked == wanted
        });
    if is_usable {
        return id;
    }
    tables.forget_affinity(&key);
    0
}

/// Has the client of a packet keep the backend that its new flow was given.
#[inline(always)]
pub fn remember<A: Family, T: Tables>(tables: T, packet: &Parsed<A>, lookup: &Lookup, service: u32) {
    let data = tables.probe(lookup.fingerprint, lookup.now);
    if data == Data::NONE || data.direction() != Direction::Forward {
        return;
    }
    let key = AffinityKey::new(packet.tuple.source.to_map(), service, packet.tuple.protocol);
    if !tables.set_affinity(&key, Affinity::new(data.id(), lookup.now)) {
        tables.count(Counter::AffinityFull);
    }
}
