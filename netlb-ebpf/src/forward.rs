//! Sending a translated packet on.

use aya_ebpf::{
    bindings::{
        BPF_FIB_LKUP_RET_BLACKHOLE, BPF_FIB_LKUP_RET_FRAG_NEEDED, BPF_FIB_LKUP_RET_NO_NEIGH,
        BPF_FIB_LKUP_RET_NOT_FWDED, BPF_FIB_LKUP_RET_PROHIBIT, BPF_FIB_LKUP_RET_SUCCESS, BPF_FIB_LKUP_RET_UNREACHABLE,
        BPF_FIB_LOOKUP_OUTPUT, BPF_FIB_LOOKUP_SKIP_NEIGH, BPF_FIB_LOOKUP_SRC, bpf_fib_lookup as FibLookup,
        bpf_sock_tuple as SocketTuple, bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1,
        bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2,
    },
    helpers::{
        bpf_fib_lookup, bpf_redirect, bpf_redirect_neigh, bpf_redirect_peer, bpf_sk_lookup_udp, bpf_sk_release,
        bpf_skc_lookup_tcp,
    },
};
use netlb_common::{
    addr::{Address, Ipv4Be, Ipv6Be},
    balance::Lookup,
    counters::Counter,
    flow::{Parsed, Tuple},
    hop::Way,
    maps::role,
    table::Operations as _,
    time::Ticks,
    wire::{tcp, udp},
};

use crate::{
    DROP, NEXT,
    frame::{Frame, HardwareAddresses, Skb},
    maps::{self, Kernel},
};

/// `AF_INET`, `AF_INET6`.
const FAMILY_V4: u8 = 2;
const FAMILY_V6: u8 = 10;

/// The network namespace of the program's device.
const BPF_F_CURRENT_NETNS: i64 = -1;

/// A length that fits any way. With 0 the kernel would take the frame's.
const SHORTEST: u16 = 1;

/// What routing says of a packet. Every field always has a value: the verifier accepts no undefined ones, which the parts of an enum
/// would be.
#[derive(Clone, Copy)]
pub(crate) struct Route {
    pub(crate) outcome: Outcome,
    /// See [`Way`].
    pub(crate) interface: u32,
    pub(crate) flags: u8,
    pub(crate) mtu: u16,
    pub(crate) addresses: HardwareAddresses,
}

#[derive(Clone, Copy, Eq, PartialEq)]
pub(crate) enum Outcome {
    /// To a neighbour whose hardware address is known.
    Resolved,
    /// To one whose address is yet to be asked for.
    Unresolved,
    /// The kernel's business: to this node, or by a way only it can go.
    Stack,
    TooBig,
    Nowhere,
}

impl Route {
    pub(crate) const STACK: Self = Self {
        outcome: Outcome::Stack,
        interface: 0,
        flags: 0,
        mtu: 0,
        addresses: HardwareAddresses { destination: [0; 6], source: [0; 6] },
    };

    #[inline(always)]
    pub(crate) const fn way(&self) -> Way {
        let Self { interface, flags, mtu, addresses, .. } = *self;
        Way { interface, mtu, flags, addresses: addresses.words() }
    }
}

/// Addresses as the FIB wants them.
pub(crate) trait Routable: Address {
    fn fill(lookup: &mut FibLookup, source: Self, destination: Self);
    /// The source that the FIB says.
    fn source(lookup: &FibLookup) -> Self;
    /// Whether the next hop is the destination itself.
    fn is_on_link(lookup: &FibLookup, destination: Self) -> bool;
    fn fill_socket(tuple: &mut SocketTuple, of: &Tuple<Self>) -> u32;
}

impl Routable for Ipv4Be {
    #[inline(always)]
    fn fill(lookup: &mut FibLookup, source: Self, destination: Self) {
        lookup.family = FAMILY_V4;
        lookup.__bindgen_anon_3.ipv4_src = source.0;
        lookup.__bindgen_anon_4.ipv4_dst = destination.0;
    }

    #[inline(always)]
    fn source(lookup: &FibLookup) -> Self {
        // SAFETY: of this family.
        Self(unsafe { lookup.__bindgen_anon_3.ipv4_src })
    }

    #[inline(always)]
    fn is_on_link(lookup: &FibLookup, destination: Self) -> bool {
        // SAFETY: of this family, or else of none that equals it.
        unsafe { lookup.__bindgen_anon_4.ipv4_dst == destination.0 }
    }

    #[inline(always)]
    fn fill_socket(tuple: &mut SocketTuple, of: &Tuple<Self>) -> u32 {
        tuple.__bindgen_anon_1.ipv4 = bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1 {
            saddr: of.source.0,
            daddr: of.destination.0,
            sport: of.source_port.0,
            dport: of.destination_port.0,
        };
        size_of::<bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1>() as u32
    }
}

impl Routable for Ipv6Be {
    #[inline(always)]
    fn fill(lookup: &mut FibLookup, source: Self, destination: Self) {
        lookup.family = FAMILY_V6;
        lookup.__bindgen_anon_3.ipv6_src = words(source);
        lookup.__bindgen_anon_4.ipv6_dst = words(destination);
    }

    #[inline(always)]
    fn source(lookup: &FibLookup) -> Self {
        // SAFETY: of this family.
        let [a, b, c, d] = unsafe { lookup.__bindgen_anon_3.ipv6_src }.map(u64::from);
        if cfg!(target_endian = "little") { Self([a | b << 32, c | d << 32]) } else { Self([a << 32 | b, c << 32 | d]) }
    }

    #[inline(always)]
    fn is_on_link(lookup: &FibLookup, destination: Self) -> bool {
        // SAFETY: of this family.
        unsafe { lookup.__bindgen_anon_4.ipv6_dst == words(destination) }
    }

    #[inline(always)]
    fn fill_socket(tuple: &mut SocketTuple, of: &Tuple<Self>) -> u32 {
        tuple.__bindgen_anon_1.ipv6 = bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2 {
            saddr: words(of.source),
            daddr: words(of.destination),
            sport: of.source_port.0,
            dport: of.destination_port.0,
        };
        size_of::<bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2>() as u32
    }
}

#[inline(always)]
fn words(address: Ipv6Be) -> [u32; 4] {
    let [a, b] = address.0;
    // As loaded: the halves in the order of memory.
    if cfg!(target_endian = "little") {
        [a as u32, (a >> 32) as u32, b as u32, (b >> 32) as u32]
    } else {
        [(a >> 32) as u32, a as u32, (b >> 32) as u32, b as u32]
    }
}

/// The bridge that an interface is a port of, or 0: routing knows the bridge, not its port.
#[inline(always)]
fn bridge_of(interface: u32) -> u32 {
    maps::interface(interface).map_or(0, |interface| interface.master)
}

/// What routing is asked of a packet that came in on an interface.
#[inline(always)]
fn question<A: Routable>(tuple: &Tuple<A>, input: u32) -> FibLookup {
    // SAFETY: plain integers.
    let mut lookup: FibLookup = unsafe { core::mem::zeroed() };
    A::fill(&mut lookup, tuple.source, tuple.destination);
    lookup.l4_protocol = tuple.protocol;
    lookup.sport = tuple.source_port.0;
    lookup.dport = tuple.destination_port.0;
    lookup.ifindex = input;
    lookup
}

/// Asks the kernel's routing where a packet that came in on `input` would go after its translation.
#[inline(always)]
pub(crate) fn route<A: Routable>(frame: &impl Frame, packet: &Parsed<A>, tuple: &Tuple<A>, input: u32) -> Route {
    route_datagram(frame, frame.datagram_len(packet), tuple, input)
}

/// The same for a datagram of a length.
#[inline(always)]
pub(crate) fn route_datagram<A: Routable>(frame: &impl Frame, len: u16, tuple: &Tuple<A>, input: u32) -> Route {
    let bridge = bridge_of(input);
    let mut lookup = question(tuple, if bridge == 0 { input } else { bridge });
    lookup.__bindgen_anon_1.tot_len = len;
    // SAFETY: the structure is the helper's.
    let result = unsafe { bpf_fib_lookup(frame.as_ptr(), &mut lookup, size_of::<FibLookup>() as i32, 0) } as u32;
    let mut flags = out_flags(&lookup, tuple.destination);
    if bridge != 0 && bridge == lookup.ifindex {
        flags |= Way::BRIDGED;
    }
    Route {
        outcome: match result {
            BPF_FIB_LKUP_RET_SUCCESS => Outcome::Resolved,
            BPF_FIB_LKUP_RET_NO_NEIGH => Outcome::Unresolved,
            BPF_FIB_LKUP_RET_FRAG_NEEDED => Outcome::TooBig,
            BPF_FIB_LKUP_RET_BLACKHOLE | BPF_FIB_LKUP_RET_UNREACHABLE | BPF_FIB_LKUP_RET_PROHIBIT => Outcome::Nowhere,
            _ => Outcome::Stack,
        },
        interface: lookup.ifindex,
        flags,
        // SAFETY: a number in either reading.
        mtu: unsafe { lookup.__bindgen_anon_1.mtu_result },
        addresses: HardwareAddresses { destination: lookup.dmac, source: lookup.smac },
    }
}

/// What is known of the interface by which routing says that packets to a destination leave.
#[inline(always)]
fn out_flags<A: Routable>(lookup: &FibLookup, destination: A) -> u8 {
    let Some(out) = maps::interface(lookup.ifindex) else { return 0 };
    let flags = out.flags & (Way::PEER | Way::XDP | Way::DIRECT);
    // To what is behind a gateway there may be several ways, of which each flow has one. Of uplinks it is known that there are not.
    if out.role == role::UPLINK || A::is_on_link(lookup, destination) { flags } else { flags & !Way::DIRECT }
}

/// The interface by which a packet of any length that came in on `input` would leave with another tuple; 0 if that is the kernel's business.
#[inline(always)]
pub(crate) fn way_out<A: Routable>(frame: &impl Frame, tuple: &Tuple<A>, input: u32, now: Ticks) -> u32 {
    let way = maps::way(maps::lead(tuple.destination, input, now));
    if way.interface != 0 {
        return way.interface;
    }
    let route = route_datagram(frame, SHORTEST, tuple, input);
    if matches!(route.outcome, Outcome::Resolved | Outcome::Unresolved) { route.interface } else { 0 }
}

/// Why there is no address to send from.
#[derive(Clone, Copy, Eq, PartialEq)]
pub(crate) enum NoSource {
    /// The destination is this node, or none that anything is forwarded to.
    Local,
    /// No way leads there, or the kernel does not tell, as before Linux 6.7.
    Unknown,
}

/// The address that the node would use itself for what goes to a destination, by the frame's interface if that is where it is sent; and
/// whether that is so for whatever comes in where this did.
#[inline(always)]
pub(crate) fn preferred_source<A: Routable>(
    frame: &impl Frame,
    tuple: &Tuple<A>,
    is_sent: bool,
) -> Result<(A, bool), NoSource> {
    let (input, bridge) = (frame.interface(), bridge_of(frame.interface()));
    let mut lookup = question(tuple, if bridge == 0 || is_sent { input } else { bridge });
    lookup.__bindgen_anon_1.tot_len = SHORTEST;
    let len = size_of::<FibLookup>() as i32;
    let mut flags = BPF_FIB_LOOKUP_SRC | BPF_FIB_LOOKUP_SKIP_NEIGH;
    if is_sent {
        flags |= BPF_FIB_LOOKUP_OUTPUT;
    }
    // SAFETY: the structure is the helper's.
    let result = unsafe { bpf_fib_lookup(frame.as_ptr(), &mut lookup, len, flags) };
    const SUCCESS: i64 = BPF_FIB_LKUP_RET_SUCCESS as i64;
    const NOT_FORWARDED: i64 = BPF_FIB_LKUP_RET_NOT_FWDED as i64;
    match result {
        SUCCESS => Ok((A::source(&lookup), out_flags(&lookup, tuple.destination) & Way::DIRECT != 0)),
        NOT_FORWARDED => Err(NoSource::Local),
        _ => Err(NoSource::Unknown),
    }
}

/// Whether a socket of the node would take a packet with this tuple for one of its connection.
#[inline(always)]
pub(crate) fn has_socket<A: Routable>(frame: &impl Frame, tuple: &Tuple<A>) -> bool {
    // Who asks for echoes cannot be looked up.
    if tuple.protocol != tcp::PROTOCOL && tuple.protocol != udp::PROTOCOL {
        return false;
    }
    // SAFETY: plain integers.
    let mut wanted: SocketTuple = unsafe { core::mem::zeroed() };
    let len = A::fill_socket(&mut wanted, tuple);
    // SAFETY: the structure is the helper's, and a socket that it returns is released.
    unsafe {
        let socket = if tuple.protocol == tcp::PROTOCOL {
            bpf_skc_lookup_tcp(frame.as_ptr(), &mut wanted, len, BPF_F_CURRENT_NETNS as u64, 0)
        } else {
            bpf_sk_lookup_udp(frame.as_ptr(), &mut wanted, len, BPF_F_CURRENT_NETNS as u64, 0)
        };
        if socket.is_null() {
            return false;
        }
        bpf_sk_release(socket.cast());
        true
    }
}

/// The way of a flow that does not know it, if others to the same address do.
#[inline(always)]
pub(crate) fn follow<A: Address>(address: A, input: u32, lookup: &Lookup) -> Way {
    let hop = maps::lead(address, input, lookup.now);
    let way = maps::way(hop);
    if way.interface != 0 {
        Kernel.leave_by(lookup.fingerprint, hop, lookup.now);
    }
    way
}

/// Has the flow of a packet remember its way, and others to the same address follow it.
#[inline(always)]
pub(crate) fn keep<A: Address>(route: &Route, address: A, input: u32, lookup: &Lookup) {
    if route.outcome != Outcome::Resolved {
        return;
    }
    let way = route.way();
    let hop = maps::keep_way(&way, lookup.now);
    if hop != 0 {
        Kernel.leave_by(lookup.fingerprint, hop, lookup.now);
        if way.has(Way::DIRECT) {
            maps::set_lead(address, input, hop, lookup.now);
        }
    }
}

/// Whether a packet that leaves by a way has to have the way's hardware addresses: a pod's peer takes whatever is meant for it, and a
/// neighbour that is yet unknown the kernel finds.
#[inline(always)]
pub(crate) fn is_addressed(way: &Way, outcome: Outcome) -> bool {
    !way.has(Way::PEER) && outcome != Outcome::Unresolved
}

/// Sends a rewritten packet out. Returns the program's result.
#[inline(always)]
pub(crate) fn send(frame: &Skb, way: &Way, outcome: Outcome) -> i32 {
    if is_addressed(way, outcome) && frame.store(0, &way.addresses, 0).is_err() {
        return refused();
    }
    redirect(frame, way, outcome)
}

/// Sends a rewritten packet out that has its [hardware addresses](is_addressed).
#[inline(always)]
pub(crate) fn redirect(frame: &Skb, way: &Way, outcome: Outcome) -> i32 {
    if way.has(Way::PEER) {
        if frame.address_to_host().is_err() {
            return refused();
        }
        maps::count(Counter::ToPeer);
        // SAFETY: plain integers.
        return unsafe { bpf_redirect_peer(way.interface, 0) } as i32;
    }
    maps::count(Counter::ToInterface);
    // SAFETY: plain integers, and no parameters: the kernel finds the next hop by the packet's destination.
    unsafe {
        if outcome == Outcome::Unresolved {
            bpf_redirect_neigh(way.interface, core::ptr::null_mut(), 0, 0) as i32
        } else {
            bpf_redirect(way.interface, 0) as i32
        }
    }
}

/// Leaves a packet to the kernel, or to the next program.
#[inline(always)]
pub(crate) fn to_stack() -> i32 {
    maps::count(Counter::ToStack);
    NEXT
}

#[inline(always)]
pub(crate) fn refused() -> i32 {
    maps::count(Counter::RewriteFailed);
    DROP
}
