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
    ping_with(to, 56, patience)
}

/// The same with a length of what is sent, which may be more than fits a packet.
pub fn ping_with(to: IpAddr, len: usize, patience: Duration) -> Result<()> {
    let echoes = Echoes::of(to)?;
    for number in 1..=3 {
        let sent = echoes.send(to, number, len)?;
        let (from, heard) = echoes.hear(patience, |heard| heard[0] == echoes.reply && heard[4..] == sent[4..])?;
        ensure!(from == to, "{from} answered request {number}, {} bytes", heard.len());
    }
    Ok(())
}

/// A socket that sends echo requests, from the calling thread's namespace, and hears all of ICMP.
#[derive(Debug)]
pub struct Echoes {
    socket: UdpSocket,
    request: u8,
    reply: u8,
}

impl Echoes {
    const ID: [u8; 2] = [0x12, 0x34];

    /// For an address's family.
    pub fn of(to: IpAddr) -> Result<Self> {
        let (family, protocol, request, reply) = if to.is_ipv4() {
            (libc::AF_INET, libc::IPPROTO_ICMP, 8, 0)
        } else {
            (libc::AF_INET6, libc::IPPROTO_ICMPV6, 128, 129)
        };
        let socket = UdpSocket::from(open(family, libc::SOCK_RAW, protocol)?);
        socket.set_read_timeout(Some(Duration::from_millis(200)))?;
        Ok(Self { socket, request, reply })
    }

    /// Gives requests so many hops, and forbids routers to fragment them.
    pub fn limit(&self, hops: u32, is_v6: bool) -> io::Result<()> {
        let (level, ttl, discover, probe) = if is_v6 {
            (libc::IPPROTO_IPV6, libc::IPV6_UNICAST_HOPS, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_DO)
        } else {
            (libc::IPPROTO_IP, libc::IP_TTL, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_DO)
        };
        for (option, value) in [(ttl, hops as i32), (discover, probe)] {
            // SAFETY: the value is readable for its length.
            let result = unsafe {
                libc::setsockopt(
                    self.socket.as_raw_fd(),
                    level,
                    option,
                    (&raw const value).cast(),
                    size_of_val(&value) as u32,
                )
            };
            if result != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    }

    /// Sends a request with a number, and returns it.
    pub fn send(&self, to: IpAddr, number: u8, len: usize) -> io::Result<Vec<u8>> {
        let mut message = vec![self.request, 0, 0, 0, Self::ID[0], Self::ID[1], 0, number];
        message.resize(8 + len, 0x42);
        if to.is_ipv4() {
            let sum = etherparse::checksum::Sum16BitWords::new().add_slice(&message).ones_complement();
            message[2..4].copy_from_slice(&sum.to_ne_bytes());
        }
        self.socket.send_to(&message, SocketAddr::new(to, 0))?;
        Ok(message)
    }

    /// The first message that is the one waited for, and whose it is.
    pub fn hear(&self, patience: Duration, is_it: impl Fn(&[u8]) -> bool) -> Result<(IpAddr, Vec<u8>)> {
        let begin = Instant::now();
        let mut heard = vec![0; 1 << 16];
        loop {
            ensure!(begin.elapsed() < patience, "nothing was heard that was waited for");
            let (len, from) = match self.socket.recv_from(&mut heard) {
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => continue,
                heard => heard?,
            };
            let at = if from.is_ipv4() { 20 } else { 0 };
            if len >= at + 8 && is_it(&heard[at..len]) {
                return Ok((from.ip(), heard[at..len].to_vec()));
            }
        }
    }
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
