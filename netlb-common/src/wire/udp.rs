//! UDP (RFC 768).

use core::mem::{offset_of, size_of};

use network_types::udp::UdpHdr;

pub const PROTOCOL: u8 = 17;
pub const LEN: usize = size_of::<UdpHdr>();
pub const CHECK: usize = offset_of!(UdpHdr, check);
