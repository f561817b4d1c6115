//! Sending a translated packet on.

use aya_ebpf::{
    bindings::{
        BPF_FIB_LKUP_RET_BLACKHOLE, BPF_FIB_LKUP_RET_FRAG_NEEDED, BPF_FIB_LKUP_RET_NO_NEIGH, BPF_FIB_LKUP_RET_PROHIBIT,
        BPF_FIB_LKUP_RET_SUCCESS, BPF_FIB_LKUP_RET_UNREACHABLE, bpf_fib_lookup as Lookup,
    },
    helpers::{bpf_fib_lookup, bpf_redirect, bpf_redirect_neigh, bpf_redirect_peer},
};
use netlb_common::{
    addr::{Address, Ipv4Be, Ipv6Be, PortBe},
    counters::Counter,
    flow::{NETWORK, Parsed},
    maps::Interface,
};

use crate::{
    DROP, NEXT,
    frame::{Frame, HardwareAddresses},
    maps,
};

/// `AF_INET`, `AF_INET6`.
const FAMILY_V4: u8 = 2;
const FAMILY_V6: u8 = 10;

/// Where a packet goes next. Every field always has a value: the verifier accepts no undefined ones, which the parts of an enum would be.
#[derive(Clone, Copy)]
pub(crate) struct Route {
    pub(crate) way: Way,
    /// The way out.
    pub(crate) interface: u32,
    /// What to write, where the next hop is resolved.
    pub(crate) addresses: HardwareAddresses,
    /// The length of datagrams the way takes, where the packet is longer.
    pub(crate) mtu: u32,
}

#[derive(Clone, Copy, Eq, PartialEq)]
pub(crate) enum Way {
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
        way: Way::Stack,
        interface: 0,
        addresses: HardwareAddresses { destination: [0; 6], source: [0; 6] },
        mtu: 0,
    };
}

/// Addresses as the FIB wants them.
pub(crate) trait Routable: Address {
    fn fill(lookup: &mut Lookup, source: Self, destination: Self);
}

impl Routable for Ipv4Be {
    #[inline(always)]
    fn fill(lookup: &mut Lookup, source: Self, destination: Self) {
        lookup.family = FAMILY_V4;
        lookup.__bindgen_anon_3.ipv4_src = source.0;
        lookup.__bindgen_anon_4.ipv4_dst = destination.0;
    }
}

impl Routable for Ipv6Be {
    #[inline(always)]
    fn fill(lookup: &mut Lookup, source: Self, destination: Self) {
        lookup.family = FAMILY_V6;
        lookup.__bindgen_anon_3.ipv6_src = words(source);
        lookup.__bindgen_anon_4.ipv6_dst = words(destination);
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

/// Asks the kernel's routing where a packet would go after its translation. `input` is the interface that it came in on, as routing sees
/// it: for the port of a bridge, the bridge.
#[inline(always)]
pub(crate) fn route<A: Routable>(
    frame: &Frame,
    packet: &Parsed<A>,
    (source, source_port): (A, PortBe),
    (destination, destination_port): (A, PortBe),
    input: u32,
) -> Route {
    // SAFETY: plain integers.
    let mut lookup: Lookup = unsafe { core::mem::zeroed() };
    A::fill(&mut lookup, source, destination);
    lookup.l4_protocol = packet.tuple.protocol;
    lookup.sport = source_port.0;
    lookup.dport = destination_port.0;
    lookup.ifindex = input;
    lookup.__bindgen_anon_1.tot_len = datagram_len(frame, packet);
    // SAFETY: the structure is the helper's.
    let result = unsafe { bpf_fib_lookup(frame.as_ptr(), &mut lookup, size_of::<Lookup>() as i32, 0) } as u32;
    Route {
        way: match result {
            BPF_FIB_LKUP_RET_SUCCESS => Way::Resolved,
            BPF_FIB_LKUP_RET_NO_NEIGH => Way::Unresolved,
            BPF_FIB_LKUP_RET_FRAG_NEEDED => Way::TooBig,
            BPF_FIB_LKUP_RET_BLACKHOLE | BPF_FIB_LKUP_RET_UNREACHABLE | BPF_FIB_LKUP_RET_PROHIBIT => Way::Nowhere,
            _ => Way::Stack,
        },
        interface: lookup.ifindex,
        addresses: HardwareAddresses { destination: lookup.dmac, source: lookup.smac },
        // SAFETY: a number in either reading.
        mtu: unsafe { lookup.__bindgen_anon_1.mtu_result } as u32,
    }
}

/// The longest datagram that this frame becomes on the wire.
#[inline(always)]
pub(crate) fn datagram_len<A>(frame: &Frame, packet: &Parsed<A>) -> u16 {
    let segment = frame.segment_size();
    let len = if segment == 0 {
        frame.len() as usize - NETWORK
    } else {
        packet.transport + packet.transport_len - NETWORK + segment as usize
    };
    if len > u16::MAX as usize { u16::MAX } else { len as u16 }
}

/// Sends a rewritten packet out. Returns the program's result.
#[inline(always)]
pub(crate) fn send(frame: &Frame, route: &Route) -> i32 {
    let is_peer = maps::interface(route.interface).is_some_and(|interface| interface.flags & Interface::PEER != 0);
    if is_peer {
        if frame.address_to_host().is_err() {
            return refused();
        }
        maps::count(Counter::ToPeer);
        // SAFETY: plain integers.
        return unsafe { bpf_redirect_peer(route.interface, 0) } as i32;
    }
    maps::count(Counter::ToInterface);
    if route.way == Way::Unresolved {
        // SAFETY: no parameters: the kernel finds the next hop by the packet's destination.
        return unsafe { bpf_redirect_neigh(route.interface, core::ptr::null_mut(), 0, 0) as i32 };
    }
    if frame.store(0, &route.addresses, 0).is_err() {
        return refused();
    }
    // SAFETY: plain integers.
    unsafe { bpf_redirect(route.interface, 0) as i32 }
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
