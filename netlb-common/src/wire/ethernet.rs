//! Ethernet II.

use core::mem::{offset_of, size_of};

use network_types::eth::EthHdr;

use super::{Fields, Ignore, PacketBytes};

pub const LEN: usize = size_of::<EthHdr>();
pub const DESTINATION: usize = offset_of!(EthHdr, dst_addr);
pub const SOURCE: usize = offset_of!(EthHdr, src_addr);
pub const ETHER_TYPE: usize = offset_of!(EthHdr, ether_type);
/// Both hardware addresses: destination, then source.
pub const ADDRESSES_LEN: usize = 12;

/// IEEE 802 numbers, as loaded.
pub const IPV4: u16 = 0x0800_u16.to_be();
pub const IPV6: u16 = 0x86dd_u16.to_be();

/// The type of the payload, as loaded.
#[inline(always)]
pub fn ether_type(packet: &(impl PacketBytes + ?Sized)) -> Result<u16, Ignore> {
    Ok(packet.window(0, LEN)?.half(ETHER_TYPE))
}
