//! What the bench tells its harness programs. User space includes this file.
//!
//! A flow has a number. Its client and its service follow from that number, so that packets of any flow, in either direction, can be made
//! without a table of them.

/// Bytes of a frame that are made anew for each packet: all headers, of IPv6 and TCP with options at the longest.
pub(crate) const HEADER_LEN: usize = 88;

/// Bytes of a frame.
pub(crate) const FRAME_LEN: usize = 128;

/// The packets of a run. Value of the `PLAN` map.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct Plan {
    /// The first bytes of a packet of flow 0.
    pub(crate) header: [u64; HEADER_LEN / 8],
    /// What the next flow follows from.
    pub(crate) state: u64,
    /// The number of flows, as a power of two.
    pub(crate) flows_log2: u32,
    /// Whether flows come in no order, or else one after the other.
    pub(crate) is_random: u32,
    /// Flows are spread over this many services.
    pub(crate) services: u32,
    pub(crate) client: Endpoint,
    /// The service, or its backend in packets of the other direction.
    pub(crate) service: Endpoint,
    /// The flow of the last packet.
    pub(crate) flow: u32,
    /// What `xdp_memory` reads and writes for a packet.
    pub(crate) memory: Memory,
}

/// How much memory a flow's packet needs at least.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct Memory {
    /// Buckets of the flow table, less one.
    pub(crate) mask: u32,
    /// Directions whose buckets are read.
    pub(crate) buckets: u32,
    /// Directions whose records are written.
    pub(crate) records: u32,
    pub(crate) _reserved: u32,
}

/// Where the packets' endpoints of one side are, and which they are: of each host so many ports, then the next host.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct Endpoint {
    /// Offset of the bytes of the address that are written.
    pub(crate) address_at: u32,
    pub(crate) port_at: u32,
    pub(crate) first_host: u32,
    pub(crate) first_port: u32,
    pub(crate) ports_log2: u32,
    /// How many hosts there are besides the first: a power of two less one. After the last comes the first again.
    pub(crate) more_hosts: u32,
    /// Bytes of the address that are written at once, eight or four, the last of which are the host's. A program that reads all of them would
    /// wait if they came from more than one write, as those of a packet from a device never do.
    pub(crate) word_len: u32,
    pub(crate) _reserved: u32,
    /// What stands before the host's in them.
    pub(crate) network: [u8; 8],
}

const _: () = assert!(size_of::<Plan>() == HEADER_LEN + 8 + 3 * 4 + 2 * 40 + 4 + 16);

impl Plan {
    /// The flow that the next packet belongs to.
    #[inline(always)]
    pub(crate) fn next_flow(&mut self) -> u32 {
        let flow = if self.is_random == 0 {
            self.state += 1;
            (self.state - 1) as u32
        } else {
            // Knuth's MMIX generator, whose upper bits are the good ones.
            self.state = self.state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (self.state >> 32) as u32
        };
        self.flow = flow & ((1 << (self.flows_log2 & 31)) - 1);
        self.flow
    }

    /// The service of a flow.
    #[inline(always)]
    pub(crate) fn service_of(&self, flow: u32) -> u32 {
        ((flow as u64 * self.services as u64) >> (self.flows_log2 & 31)) as u32
    }
}

impl Endpoint {
    #[inline(always)]
    pub(crate) fn host(&self, number: u32) -> u16 {
        (self.first_host + ((number >> (self.ports_log2 & 31)) & self.more_hosts)) as u16
    }

    /// The end of an address, as it stands in a packet: its last [`word_len`](Self::word_len) bytes.
    #[inline(always)]
    pub(crate) fn address_end(&self, number: u32) -> u64 {
        let shift = (8 * (self.word_len - 2)) & 63;
        u64::from_le_bytes(self.network) | (self.host(number).to_be() as u64) << shift
    }

    #[inline(always)]
    pub(crate) fn port(&self, number: u32) -> u16 {
        (self.first_port + (number & ((1 << (self.ports_log2 & 31)) - 1))) as u16
    }
}
