//! Sockets below UDP and TCP: packets sent as they are, echo requests, and frames as an interface gets them.

use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::frames::ETHERNET;

/// Sends the packet of a frame as it is, headers included, by the routes of the calling thread's namespace.
pub fn send(socket: &UdpSocket, frame: &[u8], to: IpAddr) -> io::Result<()> {
    socket.send_to(&frame[ETHERNET..], SocketAddr::new(to, 0)).map(|_| ())
}

/// A socket for [`send`], of the family of an address.
pub fn sender(to: IpAddr) -> io::Result<UdpSocket> {
    let family = if to.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    // It is none of UDP, but sends to an address as such a socket does.
    open(family, libc::SOCK_RAW, libc::IPPROTO_RAW).map(UdpSocket::from)
}

/// Asks an address for three echoes from the calling thread's namespace, with so much patience for each.
pub fn ping(to: IpAddr, patience: Duration) -> Result<()> {
    const ID: [u8; 2] = [0x12, 0x34];
    let (family, protocol, request, reply) = if to.is_ipv4() {
        (libc::AF_INET, libc::IPPROTO_ICMP, 8, 0)
    } else {
        (libc::AF_INET6, libc::IPPROTO_ICMPV6, 128, 129)
    };
    let socket = UdpSocket::from(open(family, libc::SOCK_RAW, protocol)?);
    socket.set_read_timeout(Some(Duration::from_millis(200)))?;
    for number in 1..=3 {
        let mut message = vec![request, 0, 0, 0, ID[0], ID[1], 0, number];
        message.extend([0x42; 56]);
        if to.is_ipv4() {
            let sum = etherparse::checksum::Sum16BitWords::new().add_slice(&message).ones_complement();
            message[2..4].copy_from_slice(&sum.to_ne_bytes());
        }
        socket.send_to(&message, SocketAddr::new(to, 0))?;
        let begin = Instant::now();
        loop {
            ensure!(begin.elapsed() < patience, "no reply to echo request {number}");
            let mut heard = [0; 256];
            let (len, from) = match socket.recv_from(&mut heard) {
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => continue,
                heard => heard?,
            };
            let at = if to.is_ipv4() { 20 } else { 0 };
            let heard = &heard[at..len];
            if heard[0] == reply && heard[4..6] == ID && heard[7] == number {
                ensure!(from.ip() == to && heard[8..] == message[8..], "{from} answered otherwise: {heard:?}");
                break;
            }
        }
    }
    Ok(())
}

/// What an interface of the calling thread's namespace receives, from now on.
#[derive(Debug)]
pub struct Tap(OwnedFd);

impl Tap {
    pub fn on(interface: u32) -> io::Result<Self> {
        let all = (libc::ETH_P_ALL as u16).to_be();
        let socket = open(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_NONBLOCK, all.into())?;
        // SAFETY: plain integers.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = all;
        address.sll_ifindex = interface as i32;
        let len = size_of_val(&address) as u32;
        // SAFETY: the address is readable for its length.
        let result = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), len) };
        if result == 0 { Ok(Self(socket)) } else { Err(io::Error::last_os_error()) }
    }

    /// What came since this was last asked, without what the node itself sent.
    pub fn frames(&self) -> io::Result<Vec<Vec<u8>>> {
        let mut frames = Vec::new();
        loop {
            let mut frame = vec![0_u8; 1 << 16];
            // SAFETY: plain integers.
            let mut from: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
            let mut from_len = size_of_val(&from) as u32;
            // SAFETY: both buffers are writable for their lengths.
            let len = unsafe {
                let (data, from) = (frame.as_mut_ptr().cast(), (&raw mut from).cast());
                libc::recvfrom(self.0.as_raw_fd(), data, frame.len(), 0, from, &mut from_len)
            };
            if len < 0 {
                let error = io::Error::last_os_error();
                return if error.kind() == ErrorKind::WouldBlock { Ok(frames) } else { Err(error) };
            }
            frame.truncate(len as usize);
            if from.sll_pkttype != libc::PACKET_OUTGOING {
                frames.push(frame);
            }
        }
    }
}

fn open(family: i32, kind: i32, protocol: i32) -> io::Result<OwnedFd> {
    // SAFETY: plain integers; the descriptor is new.
    unsafe {
        match libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol) {
            -1 => Err(io::Error::last_os_error()),
            socket => Ok(OwnedFd::from_raw_fd(socket)),
        }
    }
}
