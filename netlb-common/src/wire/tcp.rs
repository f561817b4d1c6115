//! TCP (RFC 9293 §3.1).

use core::mem::{offset_of, size_of};

use network_types::tcp::TcpHdr;

pub const PROTOCOL: u8 = 6;
/// Without options.
pub const LEN: usize = size_of::<TcpHdr>();
pub const CHECK: usize = offset_of!(TcpHdr, check);
/// The byte whose upper half is the header's length in words.
pub const DATA_OFFSET: usize = 12;
/// The byte of the control bits.
pub const CONTROL: usize = 13;
/// Where sequence and acknowledgement number stand.
pub const SEQUENCE: usize = offset_of!(TcpHdr, seq);
pub const ACKNOWLEDGEMENT: usize = offset_of!(TcpHdr, ack_seq);
/// Control bits.
pub const FIN: u8 = 0x01;
pub const SYN: u8 = 0x02;
pub const RST: u8 = 0x04;
pub const ACK: u8 = 0x10;
