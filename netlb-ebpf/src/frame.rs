//! Frames as the hooks see them.

use core::ffi::c_void;

use netlb_common::{
    flow::Parsed,
    wire::{Fields, Ignore, PacketBytes, ethernet},
};

pub(crate) use self::{
    skb::Skb,
    xdp::{Writable, Xdp},
};

mod skb;
mod xdp;

/// A frame under way, and what a hook's program returns for it.
pub(crate) trait Frame: PacketBytes<Window = Linear> {
    /// Leaves it to whoever is next.
    const PASS: i32;
    const DROP: i32;
    /// Whether it can be made into an answer.
    const ANSWERS: bool;

    /// Bytes from the Ethernet header on.
    fn len(&self) -> u32;
    /// The interface whose hook this is.
    fn interface(&self) -> u32;
    /// Packets on the wire.
    fn packets(&self) -> u64;
    /// The longest datagram that this becomes on the wire.
    fn datagram_len<A>(&self, packet: &Parsed<A>) -> u16;
    /// The context, for helpers.
    fn as_ptr(&self) -> *mut c_void;
}

/// The kernel refused a change.
#[derive(Clone, Copy)]
pub(crate) struct Refused;

/// Hardware addresses, as they stand in a frame.
#[derive(Clone, Copy)]
#[repr(C, align(4))]
pub(crate) struct HardwareAddresses {
    pub(crate) destination: [u8; 6],
    pub(crate) source: [u8; 6],
}

const _: () = assert!(size_of::<HardwareAddresses>() == ethernet::ADDRESSES_LEN);

impl HardwareAddresses {
    /// Whether both are of one host: neither is a group's.
    #[inline(always)]
    pub(crate) const fn are_hosts(&self) -> bool {
        (self.destination[0] | self.source[0]) & 1 == 0
    }

    #[inline(always)]
    pub(crate) const fn words(self) -> [u32; 3] {
        // SAFETY: plain bytes, of the same size and alignment.
        unsafe { core::mem::transmute(self) }
    }
}

/// Bytes of a frame that the verifier saw checked. Valid until a helper changes the frame.
#[derive(Clone, Copy)]
pub(crate) struct Linear(*const u8);

impl Linear {
    #[inline(always)]
    fn between(start: usize, len: usize, end: usize) -> Result<Self, Ignore> {
        if start + len > end { Err(Ignore::Truncated) } else { Ok(Self(start as *const u8)) }
    }
}

/// Packet headers stand at even addresses at best, and BPF loads them whole at any: a load by bytes would cost each packet dearly.
impl Fields for Linear {
    #[inline(always)]
    fn byte(self, at: usize) -> u8 {
        // SAFETY: within the window.
        unsafe { *self.0.add(at) }
    }

    #[inline(always)]
    fn half(self, at: usize) -> u16 {
        // SAFETY: within the window.
        unsafe { self.0.add(at).cast::<u16>().read() }
    }

    #[inline(always)]
    fn word(self, at: usize) -> u32 {
        // SAFETY: within the window.
        unsafe { self.0.add(at).cast::<u32>().read() }
    }

    #[inline(always)]
    fn double(self, at: usize) -> u64 {
        // SAFETY: within the window.
        unsafe { self.0.add(at).cast::<u64>().read() }
    }
}
