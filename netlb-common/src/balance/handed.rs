//! Packets for which another node has chosen the backend: it wrapped them, and the outer destination says whom for.

use super::{Known, Lookup, Offer, Tables, Translation, Verdict, first_member, in_force, insert, member_id};
use crate::{
    addr::Addr,
    conntrack::Direction,
    counters::Counter,
    flow::{Family, Parsed},
    maps::{EndpointKey, algorithm},
    select,
    snat::Snat,
};

/// Members among which an address is looked for. With Maglev, the first one is nearly always it.
const SEARCHED: u32 = 1024;

/// A backend at an address, as one word: what a subprogram returns. Its id, and from bit 32 the index in `CONFIGS`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(transparent)]
pub struct At(pub u64);

impl At {
    /// The packet is to no service.
    pub const NO_SERVICE: Self = Self(0);
    /// Its service has no backend there.
    pub const NOBODY: Self = Self(u64::MAX);

    #[inline(always)]
    const fn id(self) -> u32 {
        self.0 as u32
    }

    #[inline(always)]
    const fn config(self) -> u32 {
        (self.0 >> 32) as u32
    }
}

/// The backend at an address of the service that a packet is to. Of several with different ports it is the one that the hash comes to
/// first.
///
/// Policies were asked where it was chosen. `at` is [`member_at`] for that address.
#[inline(always)]
pub fn backend_at<A: Family, T: Tables>(tables: T, packet: &Parsed<A>, at: impl Fn(u32, u32) -> u32) -> At {
    let tuple = &packet.tuple;
    // Of those each node has its own.
    if tuple.source.to_map().is_loopback() || tuple.destination.to_map().is_loopback() {
        return At::NO_SERVICE;
    }
    let key = EndpointKey::new(tuple.destination.to_map(), tuple.destination_port, tuple.protocol);
    let Some((index, config)) = in_force(&tables, &key) else { return At::NO_SERVICE };
    let is_hashed = config.algorithm == algorithm::MAGLEV && config.affinity == 0;
    let first = if is_hashed { first_member(tables, config, select::hash(tuple)).unwrap_or(0) } else { 0 };
    let members = config.members_len;
    for n in 0..SEARCHED {
        if n >= members {
            break;
        }
        let id = at(index, first.wrapping_add(n));
        if id != 0 {
            return At((index as u64) << 32 | id as u64);
        }
    }
    At::NOBODY
}

/// The id of a service's member, if it is at an address; else 0.
#[inline(always)]
pub fn member_at(tables: impl Tables, config: u32, member: u32, address: Addr) -> u32 {
    let Some(config) = tables.config(config) else { return 0 };
    let Some(id) = member_id(tables, config, member) else { return 0 };
    if tables.backend(id).is_some_and(|backend| backend.addr == address) { id } else { 0 }
}

/// Whether a packet is of a flow to the address that it was sent to. `known` is what [`known`] said.
///
/// [`known`]: super::known
#[inline(always)]
pub fn belongs<A: Family>(known: Known, translation: &Translation<A>, address: Addr) -> bool {
    matches!(known, Known::Translate | Known::Tend)
        && translation.direction == Direction::Forward
        && !translation.has_snat
        && translation.address.to_map() == address
}

/// Makes the flow of a packet to a backend that another node has chosen. What it was before is over: that node knows. It keeps its source:
/// its replies come back through this node.
#[inline(always)]
pub fn adopt<A: Family, T: Tables>(
    tables: T,
    packet: &Parsed<A>,
    lookup: &Lookup,
    at: At,
    translation: &mut Translation<A>,
) -> Verdict {
    let (Some(config), Some(backend)) = (tables.config(at.config()), tables.backend(at.id())) else {
        return Verdict::Drop;
    };
    if let Some(found) = tables.find(lookup.fingerprint, lookup.now) {
        tables.leave(lookup.fingerprint, found.data, lookup.now);
    }
    *translation = Translation::to_backend(backend, true);
    match insert(tables, packet, Some(config), at.id(), lookup, Snat::NONE, translation) {
        Offer::Taken => Verdict::Translate,
        Offer::Conflict => {
            tables.count(Counter::FlowConflict);
            Verdict::Drop
        }
        _ => Verdict::Drop,
    }
}
