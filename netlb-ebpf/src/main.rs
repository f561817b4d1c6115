//! The programs netlb attaches.
//!
//! What they decide is `netlb_common`'s; here are the hooks, the maps, and the kernel's ways to change a packet and send it on.
#![no_std]
#![no_main]
// To keep a pointer from the optimiser's eyes; see `maps::forget`.
#![feature(asm_experimental_arch)]

mod answer;
mod forward;
mod fragment;
mod frame;
mod icmp;
mod maps;
mod ping;
mod pipeline;
mod relay;
mod rewrite;
mod socket;
mod subprograms;
mod tc;
mod tunnel;
mod xdp;

use aya_ebpf::{
    macros::{cgroup_sock, cgroup_sock_addr, classifier, xdp},
    programs::{SockAddrContext, SockContext, TcContext, XdpContext},
};
use frame::{Skb, Xdp};
use netlb_common::addr::{Ipv4Be, Ipv6Be};

/// `TCX_NEXT`, and `TC_ACT_UNSPEC` for clsact: the packet goes on to the next program of the interface, or up.
const NEXT: i32 = -1;
const DROP: i32 = aya_ebpf::bindings::TC_ACT_SHOT;

/// What comes in: requests of clients, and replies of backends where they are redirected.
#[classifier]
pub(crate) fn netlb_ingress(ctx: TcContext) -> i32 {
    tc::ingress(&Skb::new(ctx.skb.skb))
}

/// What the node sends: replies that the kernel routed.
#[classifier]
pub(crate) fn netlb_egress(ctx: TcContext) -> i32 {
    tc::egress(&Skb::new(ctx.skb.skb))
}

/// What a device receives: packets that leave by a device again.
#[xdp]
pub(crate) fn netlb_xdp(ctx: XdpContext) -> u32 {
    xdp::receive(&Xdp::new(ctx.ctx)) as u32
}

/// A process connects a socket.
#[cgroup_sock_addr(connect4)]
pub(crate) fn netlb_connect4(ctx: SockAddrContext) -> i32 {
    socket::verdict(socket::connect::<Ipv4Be>(&ctx))
}

#[cgroup_sock_addr(connect6)]
pub(crate) fn netlb_connect6(ctx: SockAddrContext) -> i32 {
    socket::verdict(socket::connect::<Ipv6Be>(&ctx))
}

/// A process sends a datagram to an address.
#[cgroup_sock_addr(sendmsg4)]
pub(crate) fn netlb_sendmsg4(ctx: SockAddrContext) -> i32 {
    socket::verdict(socket::send::<Ipv4Be>(&ctx))
}

#[cgroup_sock_addr(sendmsg6)]
pub(crate) fn netlb_sendmsg6(ctx: SockAddrContext) -> i32 {
    socket::verdict(socket::send::<Ipv6Be>(&ctx))
}

/// A process asks who sent a datagram.
#[cgroup_sock_addr(recvmsg4)]
pub(crate) fn netlb_recvmsg4(ctx: SockAddrContext) -> i32 {
    socket::verdict(socket::show_peer::<Ipv4Be>(&ctx))
}

#[cgroup_sock_addr(recvmsg6)]
pub(crate) fn netlb_recvmsg6(ctx: SockAddrContext) -> i32 {
    socket::verdict(socket::show_peer::<Ipv6Be>(&ctx))
}

/// A process asks whom a socket is connected to.
#[cgroup_sock_addr(getpeername4)]
pub(crate) fn netlb_getpeername4(ctx: SockAddrContext) -> i32 {
    socket::verdict(socket::show_peer::<Ipv4Be>(&ctx))
}

#[cgroup_sock_addr(getpeername6)]
pub(crate) fn netlb_getpeername6(ctx: SockAddrContext) -> i32 {
    socket::verdict(socket::show_peer::<Ipv6Be>(&ctx))
}

/// A process has bound a socket to an address.
#[cgroup_sock(post_bind4)]
pub(crate) fn netlb_post_bind4(ctx: SockContext) -> i32 {
    socket::verdict(socket::bind::<Ipv4Be>(&ctx))
}

#[cgroup_sock(post_bind6)]
pub(crate) fn netlb_post_bind6(ctx: SockContext) -> i32 {
    socket::verdict(socket::bind::<Ipv6Be>(&ctx))
}

/// Never reached: the build refuses an object that can panic.
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // SAFETY: see above.
    unsafe { core::hint::unreachable_unchecked() }
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
