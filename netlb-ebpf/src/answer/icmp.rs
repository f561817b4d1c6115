//! Errors: "port unreachable", "packet too big" (RFC 4443 §3) and "fragmentation needed" (RFC 1191).
//!
//! What is quoted is kept aside, and written behind the new headers.

use core::ptr;

use aya_ebpf::helpers::bpf_csum_diff;
use netlb_common::{
    checksum,
    flow::{NETWORK, Parsed, Tuple},
};

use super::{Answer, clear, datagram_len, write as write_answer};
use crate::{
    frame::{Refused, Skb},
    maps::{self, QUOTE},
};

/// What stands before the quote.
#[derive(Clone, Copy)]
#[repr(C)]
struct Message<H> {
    header: H,
    kind: [u8; 2],
    check: u16,
    /// In two halves: of four bytes, IPv4's header makes no more sure.
    rest: [u16; 2],
}

/// ICMP's part of it.
pub(crate) const ICMP: usize = 8;

/// What an error is about.
#[derive(Clone, Copy)]
pub(crate) struct Quoted<'a, A> {
    pub(crate) tuple: &'a Tuple<A>,
    /// Where the packet begins in the frame.
    pub(crate) at: usize,
    /// Where the frame's own transport header stands.
    pub(crate) transport: usize,
}

impl<'a, A> Quoted<'a, A> {
    /// The packet that the frame has.
    #[inline(always)]
    pub(super) const fn of(packet: &'a Parsed<A>) -> Self {
        Self { tuple: &packet.tuple, at: NETWORK, transport: packet.transport }
    }
}

/// Makes a frame an error about a packet in it, for who sent that.
#[inline(always)]
pub(crate) fn write<A: Answer>(frame: &Skb, about: Quoted<'_, A>, kind: [u8; 2], rest: u32) -> Result<(), Refused> {
    let len = datagram_len::<A>(frame, about.at)?;
    let quoted = if len > A::QUOTED { A::QUOTED } else { len };
    let quote = maps::quote().ok_or(Refused)?;
    // SAFETY: this CPU's.
    unsafe { quote.write([0; _]) };
    frame.load(about.at, quote.cast(), quoted, QUOTE)?;
    // SAFETY: the place is as long as the sum.
    let sum = unsafe { bpf_csum_diff(ptr::null_mut(), 0, quote.cast(), QUOTE as u32, 0) };
    let payload = (ICMP + quoted) as u16;
    let halves = [rest as u16, (rest >> 16) as u16];
    let rest = if cfg!(target_endian = "little") { halves } else { [halves[1], halves[0]] };
    let covered = A::beside_icmp(about.tuple, payload)
        + u16::from_ne_bytes(kind) as u64
        + rest[0] as u64
        + rest[1] as u64
        + sum as u32 as u64;
    let header = A::header(about.tuple, A::ICMP, payload);
    let message = Message { header, kind, check: checksum::finish(covered), rest };
    let headers = size_of::<Message<A::Header>>();
    clear(frame, about.transport, headers + quoted)?;
    write_answer(frame, &message)?;
    frame.store_bytes(NETWORK + headers, quote.cast(), quoted, QUOTE)
}
