//! Sockets of processes: a service's address is exchanged for a backend's when a process names it, so that no packet is ever translated.
//!
//! The choice is made once, by the same rings as for packets. What was chosen is remembered by the socket's cookie, from both ends: the
//! backend for a frontend, so that the datagrams of an unconnected socket stay together; and the frontend for a backend, so that the
//! process is shown the address it named. Entries may be forgotten: then the choice is made again, or a process sees the backend.

use crate::{
    addr::{Addr, PortBe},
    balance::{self, OFFERS, Tables},
    maps::{Backend, Config, Counterpart, EndpointKey, SocketKey},
    wire::udp,
};

/// What is known of sockets.
pub trait Sockets {
    fn get(&self, key: &SocketKey) -> Option<Counterpart>;
    fn set(&self, key: &SocketKey, value: &Counterpart);
    fn forget(&self, key: &SocketKey);
    /// Counts a choice.
    fn count(&self, service: u32, backend: u32);
}

/// What becomes of an address that a process named.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Outcome {
    /// None of ours.
    Untouched,
    /// A backend's is put in its place.
    Exchanged,
    /// It is a service's of which no backend takes any.
    Nobody,
}

/// A process connects a socket. `backend` is filled in for [`Outcome::Exchanged`].
#[inline(always)]
pub fn connect<T: Tables>(
    tables: T,
    sockets: &impl Sockets,
    cookie: u64,
    named: &EndpointKey,
    backend: &mut Counterpart,
) -> Outcome {
    match balance::in_force(&tables, named) {
        Some((_, config)) => choose(tables, sockets, cookie, named, config, backend),
        None => {
            // If the socket had this backend from a service before, it is the backend itself that is meant now.
            sockets.forget(&SocketKey::new(cookie, named.addr, named.port, SocketKey::BACKEND));
            Outcome::Untouched
        }
    }
}

/// A process sends a datagram to an address. `backend` is filled in for [`Outcome::Exchanged`].
#[inline(always)]
pub fn send<T: Tables>(
    tables: T,
    sockets: &impl Sockets,
    cookie: u64,
    named: &EndpointKey,
    backend: &mut Counterpart,
) -> Outcome {
    let Some((_, config)) = balance::in_force(&tables, named) else { return Outcome::Untouched };
    let frontend_end = SocketKey::new(cookie, named.addr, named.port, SocketKey::FRONTEND);
    if let Some(known) = sockets.get(&frontend_end)
        && tables.backend(known.backend).is_some_and(|backend| still_serves(backend, &known, config, named))
    {
        *backend = known;
        let backend_end = SocketKey::new(cookie, known.addr, known.port, SocketKey::BACKEND);
        // The two may have been used unlike, and one forgotten.
        if sockets.get(&backend_end).is_none() {
            sockets.set(&backend_end, &shown(named, known.backend));
        }
        return Outcome::Exchanged;
    }
    choose(tables, sockets, cookie, named, config, backend)
}

/// Whether a backend is the one that was chosen, and has its flows still. A socket holds no id of a backend, so that it may be another's.
#[inline(always)]
fn still_serves(backend: &Backend, known: &Counterpart, config: &Config, named: &EndpointKey) -> bool {
    backend.flags & Backend::SERVING != 0
        && backend.service == config.service
        && backend.addr == known.addr
        && backend.port == known.port
        && backend.protocol == named.protocol
}

/// What a process is shown in a backend's place.
#[inline(always)]
const fn shown(named: &EndpointKey, backend: u32) -> Counterpart {
    Counterpart { addr: named.addr, port: named.port, pad: 0, backend }
}

/// Chooses a backend. With Maglev it is any of the ring: the source port of a socket is not known yet, often not even its address, and
/// what Maglev's hash is for, that all nodes send a flow to the same backend, does not matter to a socket, which stays on its node.
#[inline(always)]
fn choose<T: Tables>(
    tables: T,
    sockets: &impl Sockets,
    cookie: u64,
    named: &EndpointKey,
    config: &Config,
    backend: &mut Counterpart,
) -> Outcome {
    let Some(first) = balance::first_member(tables, config, || tables.random()) else { return Outcome::Nobody };
    // 0 is no backend.
    let mut chosen = 0;
    for n in 0..OFFERS {
        let Some(id) = balance::member_id(tables, config, first + n) else { break };
        if tables.backend(id).is_some_and(|backend| backend.flags & Backend::ACCEPTING != 0) {
            chosen = id;
            break;
        }
    }
    if chosen == 0 {
        return Outcome::Nobody;
    }
    let Some(record) = tables.backend(chosen) else { return Outcome::Nobody };
    *backend = Counterpart { addr: record.addr, port: record.port, pad: 0, backend: chosen };
    // A stream is connected once and for all.
    if named.protocol == udp::PROTOCOL {
        sockets.set(&SocketKey::new(cookie, named.addr, named.port, SocketKey::FRONTEND), backend);
    }
    sockets.set(&SocketKey::new(cookie, backend.addr, backend.port, SocketKey::BACKEND), &shown(named, chosen));
    sockets.count(config.service, chosen);
    Outcome::Exchanged
}

/// Whom a process is shown in the place of this peer of its socket; nobody where the peer is what the process named itself.
#[inline(always)]
pub fn peer(sockets: &impl Sockets, cookie: u64, addr: Addr, port: PortBe) -> Option<Counterpart> {
    sockets.get(&SocketKey::new(cookie, addr, port, SocketKey::BACKEND))
}
