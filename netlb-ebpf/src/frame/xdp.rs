//! A frame as XDP programs see it: bytes as the device received them.

use aya_ebpf::{
    EbpfContext as _,
    bindings::{xdp_action, xdp_md},
    helpers::bpf_xdp_adjust_head,
    programs::XdpContext,
};
use netlb_common::{
    flow::{NETWORK, Parsed},
    wire::{Ignore, PacketBytes},
};

use super::{Frame, Linear, Refused};

pub(crate) struct Xdp(XdpContext);

impl Xdp {
    #[inline(always)]
    pub(crate) const fn new(md: *mut xdp_md) -> Self {
        Self(XdpContext { ctx: md })
    }

    #[inline(always)]
    pub(crate) fn md(&self) -> *mut xdp_md {
        self.0.ctx
    }

    /// Makes room at the front.
    #[inline(always)]
    pub(crate) fn make_room(&self, len: usize) -> Result<(), Refused> {
        // SAFETY: the kernel's context.
        if unsafe { bpf_xdp_adjust_head(self.md(), -(len as i32)) } == 0 { Ok(()) } else { Err(Refused) }
    }

    /// Bytes to write to.
    #[inline(always)]
    pub(crate) fn window_mut(&self, offset: usize, len: usize) -> Result<Writable, Refused> {
        let start = self.0.data() + offset;
        if start + len > self.0.data_end() { Err(Refused) } else { Ok(Writable(start as *mut u8)) }
    }
}

/// Bytes of a frame that may be written: packets are changed in place.
#[derive(Clone, Copy)]
pub(crate) struct Writable(*mut u8);

impl Writable {
    #[inline(always)]
    pub(crate) fn half(self, at: usize) -> u16 {
        // SAFETY: within the window.
        unsafe { self.0.add(at).cast::<u16>().read() }
    }

    #[inline(always)]
    pub(crate) fn set<T: Copy>(self, at: usize, value: T) {
        // SAFETY: within the window; BPF stores whole values at any address.
        unsafe { self.0.add(at).cast::<T>().write(value) }
    }
}

impl Frame for Xdp {
    const PASS: i32 = xdp_action::XDP_PASS as i32;
    const DROP: i32 = xdp_action::XDP_DROP as i32;
    const ANSWERS: bool = false;

    #[inline(always)]
    fn len(&self) -> u32 {
        (self.0.data_end() - self.0.data()) as u32
    }

    #[inline(always)]
    fn interface(&self) -> u32 {
        // SAFETY: the kernel's context outlives the program.
        unsafe { (*self.md()).ingress_ifindex }
    }

    #[inline(always)]
    fn packets(&self) -> u64 {
        1
    }

    #[inline(always)]
    fn datagram_len<A>(&self, _: &Parsed<A>) -> u16 {
        (self.len() as usize - NETWORK) as u16
    }

    #[inline(always)]
    fn as_ptr(&self) -> *mut core::ffi::c_void {
        self.0.as_ptr()
    }
}

impl PacketBytes for Xdp {
    type Window = Linear;

    #[inline(always)]
    fn window(&self, offset: usize, len: usize) -> Result<Linear, Ignore> {
        Linear::between(self.0.data() + offset, len, self.0.data_end())
    }
}
