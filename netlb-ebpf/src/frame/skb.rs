//! A frame as TC programs see it: a socket buffer.
//!
//! It is changed by the kernel's helpers, which know whether a checksum is complete, partial or still to be made.

use core::ffi::c_void;

use aya_ebpf::{
    EbpfContext as _,
    bindings::{
        __sk_buff, BPF_CSUM_LEVEL_RESET, BPF_F_ADJ_ROOM_ENCAP_L3_IPV4, BPF_F_ADJ_ROOM_ENCAP_L3_IPV6,
        BPF_F_ADJ_ROOM_FIXED_GSO, BPF_F_INGRESS, BPF_F_RECOMPUTE_CSUM, bpf_adj_room_mode::BPF_ADJ_ROOM_MAC,
    },
    helpers::{bpf_clone_redirect, bpf_csum_level, bpf_skb_change_tail, bpf_skb_load_bytes, bpf_skb_store_bytes},
    programs::TcContext,
};
use netlb_common::{
    flow::{self, NETWORK, Parsed},
    fragment::{FRAME, HeldFrame},
    wire::{Fields as _, Ignore, PacketBytes, ethernet},
};

use super::{Frame, HardwareAddresses, Linear, Refused};

/// The longest chain of headers that is made linear where it is not.
const HEADERS: u32 = 256;
/// `PACKET_HOST` (linux/if_packet.h).
const PACKET_HOST: u32 = 0;

pub(crate) struct Skb(TcContext);

impl Skb {
    #[inline(always)]
    pub(crate) const fn new(skb: *mut __sk_buff) -> Self {
        Self(TcContext::new(skb))
    }

    #[inline(always)]
    pub(crate) const fn context(&self) -> &TcContext {
        &self.0
    }

    #[inline(always)]
    pub(crate) fn hardware_addresses(&self) -> Result<HardwareAddresses, Refused> {
        let header = self.window(0, ethernet::LEN).map_err(|_| Refused)?;
        let bytes = |at| [0, 1, 2, 3, 4, 5].map(|n| header.byte(at + n));
        Ok(HardwareAddresses { destination: bytes(ethernet::DESTINATION), source: bytes(ethernet::SOURCE) })
    }

    #[inline(always)]
    pub(crate) fn skb(&self) -> *mut __sk_buff {
        self.0.skb.skb
    }

    /// Whether a VLAN tag was taken off: then the frame belongs to an interface above this one.
    #[inline(always)]
    pub(crate) fn is_tagged(&self) -> bool {
        // SAFETY: the kernel's context outlives the program.
        unsafe { (*self.skb()).vlan_present != 0 }
    }

    /// Payload bytes of each segment this will be cut into, or 0 if it is one packet.
    #[inline(always)]
    pub(crate) fn segment_size(&self) -> u32 {
        // SAFETY: as above.
        unsafe { (*self.skb()).gso_size }
    }

    /// Makes the headers readable: a driver may leave them in fragments of the buffer. What TCP sends here has them where they can be read, and
    /// nothing else: pulled, that would get a new buffer for each packet.
    #[inline(always)]
    pub(crate) fn pull_headers(&self) {
        let linear = self.0.data_end().wrapping_sub(self.0.data()) as u32;
        if linear < HEADERS && linear < self.len() && !flow::has_plain_headers(self) {
            self.pull(if self.len() < HEADERS { self.len() } else { HEADERS });
        }
    }

    /// Makes this many bytes readable. Where that fails, the bytes are missing for whoever reads them.
    #[inline(always)]
    pub(crate) fn pull(&self, len: u32) {
        let _ = self.0.pull_data(len);
    }

    /// Makes the frame one that is meant for whoever gets it: a bridge's port sees frames for the bridge as another host's.
    #[inline(always)]
    pub(crate) fn address_to_host(&self) -> Result<(), Refused> {
        // SAFETY: as above.
        if unsafe { (*self.skb()).pkt_type } == PACKET_HOST {
            return Ok(());
        }
        self.0.change_type(PACKET_HOST).map_err(|_| Refused)
    }

    #[inline(always)]
    pub(crate) fn store<T>(&self, offset: usize, value: &T, flags: u64) -> Result<(), Refused> {
        self.store_part(offset, value, 0..size_of::<T>(), flags)
    }

    /// Writes some of a value's bytes.
    #[inline(always)]
    pub(crate) fn store_part<T>(
        &self,
        offset: usize,
        value: &T,
        part: core::ops::Range<usize>,
        flags: u64,
    ) -> Result<(), Refused> {
        if part.start > part.end || part.end > size_of::<T>() {
            return Err(Refused);
        }
        // SAFETY: the value is readable for its size.
        let result = unsafe {
            let from = core::ptr::from_ref(value).cast::<u8>().add(part.start).cast();
            bpf_skb_store_bytes(self.skb().cast(), offset as u32, from, (part.end - part.start) as u32, flags)
        };
        if result == 0 { Ok(()) } else { Err(Refused) }
    }

    /// Copies bytes to a place that has room for `room` of them.
    #[inline(always)]
    pub(crate) fn load(&self, offset: usize, to: *mut c_void, len: usize, room: usize) -> Result<(), Refused> {
        if len == 0 || len > room {
            return Err(Refused);
        }
        // SAFETY: there is room.
        let result = unsafe { bpf_skb_load_bytes(self.skb().cast(), offset as u32, to, len as u32) };
        if result == 0 { Ok(()) } else { Err(Refused) }
    }

    /// Writes bytes from such a place. A device's sum of the packet stays right.
    #[inline(always)]
    pub(crate) fn store_bytes(
        &self,
        offset: usize,
        from: *const c_void,
        len: usize,
        room: usize,
    ) -> Result<(), Refused> {
        if len == 0 || len > room {
            return Err(Refused);
        }
        let flags = BPF_F_RECOMPUTE_CSUM as u64;
        // SAFETY: there are as many.
        let result = unsafe { bpf_skb_store_bytes(self.skb().cast(), offset as u32, from, len as u32, flags) };
        if result == 0 { Ok(()) } else { Err(Refused) }
    }

    #[inline(always)]
    pub(crate) fn replace_checksum(&self, offset: usize, from: u64, to: u64, flags: u64) -> Result<(), Refused> {
        self.0.l4_csum_replace(offset, from, to, flags).map_err(|_| Refused)
    }

    /// Gives the frame a length.
    #[inline(always)]
    pub(crate) fn truncate(&self, len: u32) -> Result<(), Refused> {
        // SAFETY: the helper checks the length.
        if unsafe { bpf_skb_change_tail(self.skb(), len, 0) } == 0 { Ok(()) } else { Err(Refused) }
    }

    /// Copies the whole frame, if it can be held and stands for one packet.
    #[inline(always)]
    pub(crate) fn copy_to(&self, held: *mut HeldFrame) -> Result<(), Refused> {
        let len = self.len();
        if self.segment_size() != 0 || len <= NETWORK as u32 || len > FRAME as u32 {
            return Err(Refused);
        }
        // SAFETY: the length was compared with the room; nobody else has the frame.
        unsafe {
            (*held).len = len;
            let to = (&raw mut (*held).bytes).cast();
            if bpf_skb_load_bytes(self.as_ptr(), 0, to, len) == 0 { Ok(()) } else { Err(Refused) }
        }
    }

    /// Becomes a copy of another frame, of the same kind.
    #[inline(always)]
    pub(crate) fn copy_from(&self, held: *const HeldFrame) -> Result<(), Refused> {
        // SAFETY: readable, as the caller has it.
        let len = unsafe { (*held).len };
        if len <= NETWORK as u32 || len > FRAME as u32 {
            return Err(Refused);
        }
        self.truncate(len)?;
        // SAFETY: the length was compared with the room. What a device said of this frame's checksum it did not say of the other's; a sum over
        // all bytes, which begins past the Ethernet header, is carried on.
        unsafe {
            let from = (&raw const (*held).bytes).cast::<u8>();
            bpf_csum_level(self.skb(), BPF_CSUM_LEVEL_RESET as u64);
            let (skb, at, recompute) = (self.skb(), NETWORK as u32, BPF_F_RECOMPUTE_CSUM as u64);
            let stored = bpf_skb_store_bytes(skb, 0, from.cast(), at, 0) == 0
                && bpf_skb_store_bytes(skb, at, from.add(NETWORK).cast(), len - at, recompute) == 0;
            if stored { Ok(()) } else { Err(Refused) }
        }
    }

    /// Has a copy of the frame come in once more.
    #[inline(always)]
    pub(crate) fn receive_copy(&self) -> Result<(), Refused> {
        // SAFETY: plain integers.
        let result = unsafe { bpf_clone_redirect(self.skb(), self.interface(), BPF_F_INGRESS as u64) };
        if result == 0 { Ok(()) } else { Err(Refused) }
    }

    /// Makes room after the Ethernet header for a header of a packet around this one, of the same family; segments stay as long as they are.
    #[inline(always)]
    pub(crate) fn add_header(&self, len: usize, is_v6: bool) -> Result<(), Refused> {
        let encapsulation = if is_v6 { BPF_F_ADJ_ROOM_ENCAP_L3_IPV6 } else { BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 };
        let flags = (BPF_F_ADJ_ROOM_FIXED_GSO | encapsulation) as u64;
        self.0.adjust_room(len as i32, BPF_ADJ_ROOM_MAC, flags).map_err(|_| Refused)
    }

    /// Takes such a header away.
    #[inline(always)]
    pub(crate) fn remove_header(&self, len: usize) -> Result<(), Refused> {
        let flags = BPF_F_ADJ_ROOM_FIXED_GSO as u64;
        self.0.adjust_room(-(len as i32), BPF_ADJ_ROOM_MAC, flags).map_err(|_| Refused)
    }

    /// Makes room after the Ethernet header, or takes bytes away.
    #[inline(always)]
    pub(crate) fn make_room(&self, len: i32) -> Result<(), Refused> {
        self.0.adjust_room(len, BPF_ADJ_ROOM_MAC, 0).map_err(|_| Refused)
    }
}

impl Frame for Skb {
    const PASS: i32 = crate::NEXT;
    const DROP: i32 = crate::DROP;
    const ANSWERS: bool = true;

    #[inline(always)]
    fn len(&self) -> u32 {
        self.0.len()
    }

    #[inline(always)]
    fn interface(&self) -> u32 {
        // SAFETY: as above.
        unsafe { (*self.skb()).ifindex }
    }

    #[inline(always)]
    fn packets(&self) -> u64 {
        // SAFETY: as above.
        let segments = unsafe { (*self.skb()).gso_segs };
        if segments == 0 { 1 } else { segments as u64 }
    }

    #[inline(always)]
    fn datagram_len<A>(&self, packet: &Parsed<A>) -> u16 {
        let segment = self.segment_size();
        let len = if segment == 0 {
            self.len() as usize - NETWORK
        } else {
            packet.transport + packet.transport_len - NETWORK + segment as usize
        };
        if len > u16::MAX as usize { u16::MAX } else { len as u16 }
    }

    #[inline(always)]
    fn as_ptr(&self) -> *mut c_void {
        self.0.as_ptr()
    }
}

impl PacketBytes for Skb {
    type Window = Linear;

    #[inline(always)]
    fn window(&self, offset: usize, len: usize) -> Result<Linear, Ignore> {
        Linear::between(self.0.data() + offset, len, self.0.data_end())
    }
}
