//! Socket addresses in the calls of processes.
//!
//! IPv4 addresses on IPv6 sockets (`::ffff:a.b.c.d`) have the form that maps hold, so that nothing here is said of them.

use core::ptr::{read_volatile, write_volatile};

use aya_ebpf::{
    EbpfContext as _,
    bindings::{bpf_sock, bpf_sock_addr},
    helpers::{bpf_get_netns_cookie, bpf_get_socket_cookie, generated::bpf_set_retval},
    programs::{SockAddrContext, SockContext},
};
use netlb_common::{
    addr::{Addr, Address as _, Ipv4Be, Ipv6Be, PortBe},
    counters::Counter,
    maps::{Counterpart, EndpointKey},
    socket::{self, Caller, Outcome},
    wire::{tcp, udp},
};

use crate::maps::{self, Kernel, Sockets};

/// What a program returns: the call goes on.
const ALLOW: i32 = 1;
/// The call fails, with EPERM if no other error was chosen. Calls that only ask cannot be refused.
const REFUSE: i32 = 0;
const EADDRINUSE: i32 = 98;
const ECONNREFUSED: i32 = 111;

/// The fields of a family's address. Volatile, and each as a whole: the verifier knows no parts and no copies of the context.
pub(crate) trait SocketAddress {
    fn get(ctx: *const bpf_sock_addr) -> Addr;
    fn set(ctx: *mut bpf_sock_addr, addr: Addr);
}

impl SocketAddress for Ipv4Be {
    #[inline(always)]
    fn get(ctx: *const bpf_sock_addr) -> Addr {
        // SAFETY: the context is valid for the program's run.
        Self(unsafe { read_volatile(&raw const (*ctx).user_ip4) }).to_map()
    }

    #[inline(always)]
    fn set(ctx: *mut bpf_sock_addr, addr: Addr) {
        // SAFETY: as above.
        unsafe { write_volatile(&raw mut (*ctx).user_ip4, Self::from_map(addr).0) };
    }
}

impl SocketAddress for Ipv6Be {
    #[inline(always)]
    fn get(ctx: *const bpf_sock_addr) -> Addr {
        // SAFETY: as above; the field is aligned to eight bytes, and may be read by eight.
        unsafe {
            let words = (&raw const (*ctx).user_ip6).cast::<u64>();
            Addr([read_volatile(words), read_volatile(words.add(1))])
        }
    }

    #[inline(always)]
    fn set(ctx: *mut bpf_sock_addr, addr: Addr) {
        // SAFETY: as above.
        unsafe {
            let words = (&raw mut (*ctx).user_ip6).cast::<u64>();
            write_volatile(words, addr.0[0]);
            write_volatile(words.add(1), addr.0[1]);
        }
    }
}

/// A program's result, of which the verifier sees that it is one of the two: of a number that the compiler keeps on the stack beside others
/// it may not know any more what it is.
#[inline(always)]
pub(crate) fn verdict(result: i32) -> i32 {
    let mut word = result as u64;
    // SAFETY: copies a register onto itself.
    unsafe { core::arch::asm!("{0} = {0}", inout(reg) word, options(nomem, nostack)) };
    (word & 1) as i32
}

/// The address that a socket of a family is bound to.
pub(crate) trait BoundAddress {
    fn bound(sock: *const bpf_sock) -> Addr;
}

impl BoundAddress for Ipv4Be {
    #[inline(always)]
    fn bound(sock: *const bpf_sock) -> Addr {
        // SAFETY: the context is valid for the program's run.
        Self(unsafe { read_volatile(&raw const (*sock).src_ip4) }).to_map()
    }
}

impl BoundAddress for Ipv6Be {
    #[inline(always)]
    fn bound(sock: *const bpf_sock) -> Addr {
        // SAFETY: as above. This field may be read by four bytes only.
        let word = |n: usize| unsafe { read_volatile((&raw const (*sock).src_ip6).cast::<u32>().add(n)) }.to_ne_bytes();
        let half = |[a, b, c, d]: [u8; 4], [e, f, g, h]: [u8; 4]| u64::from_ne_bytes([a, b, c, d, e, f, g, h]);
        Addr([half(word(0), word(1)), half(word(2), word(3))])
    }
}

/// A process has bound a socket, which is taken back where it is in a service's way.
#[inline(always)]
pub(crate) fn bind<A: BoundAddress>(ctx: &SockContext) -> i32 {
    // SAFETY: the context is valid.
    let (protocol, port) =
        unsafe { (read_volatile(&raw const (*ctx.sock).protocol), read_volatile(&raw const (*ctx.sock).src_port)) };
    if protocol != tcp::PROTOCOL as u32 && protocol != udp::PROTOCOL as u32 {
        return ALLOW;
    }
    // Node ports are the node's, whichever processes reach services.
    // SAFETY: as above.
    let namespace = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    if namespace != maps::node_namespace() {
        return ALLOW;
    }
    let named = EndpointKey::new(A::bound(ctx.sock), PortBe::new(port as u16), protocol as u8);
    if socket::may_bind(Kernel, &named, maps::node_port_families) {
        return ALLOW;
    }
    maps::count_call(Counter::BindsRefused);
    if maps::chooses_errors() {
        // SAFETY: the helper takes a number.
        unsafe { bpf_set_retval(-EADDRINUSE) };
    }
    REFUSE
}

#[inline(always)]
pub(crate) fn connect<A: SocketAddress>(ctx: &SockAddrContext) -> i32 {
    // SAFETY: the context is valid.
    let protocol = unsafe { read_volatile(&raw const (*ctx.sock_addr).protocol) };
    if protocol != tcp::PROTOCOL as u32 && protocol != udp::PROTOCOL as u32 {
        return ALLOW;
    }
    let Some(caller) = served(ctx) else { return ALLOW };
    let named = named::<A>(ctx, protocol as u8);
    let mut backend = Counterpart::default();
    let outcome = socket::connect(Kernel, &Sockets, &caller, &named, &mut backend);
    conclude::<A>(ctx, outcome, &backend)
}

#[inline(always)]
pub(crate) fn send<A: SocketAddress>(ctx: &SockAddrContext) -> i32 {
    let Some(caller) = served(ctx) else { return ALLOW };
    let named = named::<A>(ctx, udp::PROTOCOL);
    let mut backend = Counterpart::default();
    let outcome = socket::send(Kernel, &Sockets, &caller, &named, &mut backend);
    conclude::<A>(ctx, outcome, &backend)
}

/// Shows a process the service that it named, in the backend's place.
///
/// Of whatever network namespace: where a socket is not served, there is nothing known of it.
#[inline(always)]
pub(crate) fn show_peer<A: SocketAddress>(ctx: &SockAddrContext) -> i32 {
    let peer = named::<A>(ctx, 0);
    if let Some(frontend) = socket::peer(&Sockets, cookie(ctx), peer.addr, peer.port) {
        exchange::<A>(ctx, &frontend);
    }
    ALLOW
}

/// Who calls; nobody where the socket is of a network namespace that is not served.
#[inline(always)]
fn served(ctx: &SockAddrContext) -> Option<Caller> {
    let (served, node) = (maps::served_namespace(), maps::node_namespace());
    // SAFETY: the context is valid.
    let namespace = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    if served != 0 && served != namespace {
        return None;
    }
    Some(Caller { cookie: cookie(ctx), is_node: node != 0 && node == namespace, now: maps::now() })
}

#[inline(always)]
fn cookie(ctx: &SockAddrContext) -> u64 {
    // SAFETY: the context is valid.
    unsafe { bpf_get_socket_cookie(ctx.as_ptr()) }
}

#[inline(always)]
fn named<A: SocketAddress>(ctx: &SockAddrContext, protocol: u8) -> EndpointKey {
    // SAFETY: the context is valid.
    let port = unsafe { read_volatile(&raw const (*ctx.sock_addr).user_port) };
    EndpointKey::new(A::get(ctx.sock_addr), PortBe(port as u16), protocol)
}

#[inline(always)]
fn exchange<A: SocketAddress>(ctx: &SockAddrContext, counterpart: &Counterpart) {
    A::set(ctx.sock_addr, counterpart.addr);
    // SAFETY: the context is valid.
    unsafe { write_volatile(&raw mut (*ctx.sock_addr).user_port, counterpart.port.0 as u32) };
}

#[inline(always)]
fn conclude<A: SocketAddress>(ctx: &SockAddrContext, outcome: Outcome, backend: &Counterpart) -> i32 {
    match outcome {
        Outcome::Untouched => {}
        Outcome::Exchanged => exchange::<A>(ctx, backend),
        Outcome::Nobody => {
            maps::count_call(Counter::SocketsRefused);
            if maps::chooses_errors() {
                // SAFETY: the helper takes a number.
                unsafe { bpf_set_retval(-ECONNREFUSED) };
            }
            return REFUSE;
        }
        Outcome::Forbidden => {
            maps::count_call(Counter::SocketsRefused);
            return REFUSE;
        }
    }
    ALLOW
}
