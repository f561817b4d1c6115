//! How packet bytes are looked at.
//!
//! Bytes come through [`PacketBytes`]: one bounds check gives a window ([`Fields`]), whose reads cannot fail. The windows of the BPF
//! programs are raw pointers that the verifier has seen checked; the windows of tests are slices. Header layouts come from
//! `network-types`.

pub mod ethernet;
pub mod icmp;
pub mod ipv4;
pub mod ipv6;
pub mod tcp;
pub mod udp;

/// Why a frame is none of the data path's business. Such a frame passes untouched.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Ignore {
    /// Neither IPv4 nor IPv6.
    NotIp,
    /// Neither TCP nor UDP.
    NotTcpOrUdp,
    /// The frame ends within a header.
    Truncated,
    /// A length that its header cannot have.
    Malformed,
}

/// What a packet is of its datagram.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
pub enum Part {
    /// All of it.
    Whole,
    /// The fragment that has the transport header.
    First,
    /// Any other fragment.
    Later,
}

/// The bytes of a packet, from its Ethernet header on.
pub trait PacketBytes {
    type Window: Fields;

    /// The `len` bytes at `offset`.
    fn window(&self, offset: usize, len: usize) -> Result<Self::Window, Ignore>;
}

/// A window of bytes known to be there. Offsets are below the window's length; values are in network order, as loaded.
pub trait Fields: Copy {
    fn byte(self, at: usize) -> u8;
    fn half(self, at: usize) -> u16;
    fn word(self, at: usize) -> u32;
    fn double(self, at: usize) -> u64;
}

impl PacketBytes for [u8] {
    type Window = Slice;

    fn window(&self, offset: usize, len: usize) -> Result<Slice, Ignore> {
        let bytes = self.get(offset..).and_then(|rest| rest.get(..len)).ok_or(Ignore::Truncated)?;
        let mut window = [0; Slice::MAX];
        window[..len].copy_from_slice(bytes);
        Ok(Slice(window))
    }
}

/// A window over bytes in memory: a copy, as long as the longest header.
#[derive(Clone, Copy, Debug)]
pub struct Slice([u8; Self::MAX]);

impl Slice {
    const MAX: usize = 40;

    fn array<const N: usize>(&self, at: usize) -> [u8; N] {
        let mut out = [0; N];
        out.copy_from_slice(&self.0[at..at + N]);
        out
    }
}

impl Fields for Slice {
    fn byte(self, at: usize) -> u8 {
        self.0[at]
    }

    fn half(self, at: usize) -> u16 {
        u16::from_ne_bytes(self.array(at))
    }

    fn word(self, at: usize) -> u32 {
        u32::from_ne_bytes(self.array(at))
    }

    fn double(self, at: usize) -> u64 {
        u64::from_ne_bytes(self.array(at))
    }
}
