//! Datagram sockets, listed and destroyed through netlink (`NETLINK_SOCK_DIAG`), in the network namespace of the thread.

use std::io;

use netlb_common::{
    addr::{Addr, PortBe},
    wire::udp,
};
use rtnetlink::sys::{Socket, SocketAddr};

/// From linux/netlink.h, linux/sock_diag.h and linux/inet_diag.h.
const NETLINK_SOCK_DIAG: isize = 4;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP: u16 = 0x300;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
/// `TCP_ESTABLISHED`, which is what a connected datagram socket is in as well.
const CONNECTED: u32 = 1 << 1;
const FAMILIES: [u8; 2] = [libc::AF_INET as u8, libc::AF_INET6 as u8];
/// `struct nlmsghdr`.
const HEADER: usize = 16;
/// `struct inet_diag_sockid`: ports, addresses, interface, cookie.
const ID: usize = 48;

/// A connected datagram socket.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Connected {
    pub(super) cookie: u64,
    pub(super) peer: Addr,
    pub(super) port: PortBe,
    family: u8,
    /// The kernel's name of it, sent back as it came.
    id: [u8; ID],
}

impl Connected {
    /// From a `struct inet_diag_msg`.
    fn parse(message: &[u8]) -> Option<Self> {
        let family = *message.first()?;
        let id: [u8; ID] = message.get(4..4 + ID)?.try_into().ok()?;
        let port = PortBe(u16::from_ne_bytes([id[2], id[3]]));
        let address: [u8; 16] = id[20..36].try_into().ok()?;
        let peer = if family == libc::AF_INET as u8 {
            let [a, b, c, d, ..] = address;
            Addr::from_v4([a, b, c, d])
        } else {
            Addr::from_bytes(address)
        };
        // Two 32-bit numbers, the lower half first whatever the byte order.
        let half = |at: usize| u32::from_ne_bytes([id[at], id[at + 1], id[at + 2], id[at + 3]]);
        let cookie = u64::from(half(44)) << 32 | u64::from(half(40));
        Some(Self { cookie, peer, port, family, id })
    }
}

pub(super) struct Diag {
    socket: Socket,
    sequence: u32,
}

impl Diag {
    pub(super) fn new() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_SOCK_DIAG)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self { socket, sequence: 0 })
    }

    /// The connected datagram sockets.
    pub(super) fn connected(&mut self) -> io::Result<Vec<Connected>> {
        let mut sockets = Vec::new();
        for family in FAMILIES {
            let answers = self.request(SOCK_DIAG_BY_FAMILY, NLM_F_DUMP, &request(family, CONNECTED, &[0; ID]))?;
            sockets.extend(answers.iter().filter_map(|answer| Connected::parse(answer)));
        }
        Ok(sockets)
    }

    /// Destroys a socket: it is not connected any more. Its process's next send fails with EDESTADDRREQ, a read, also one that waits, with
    /// ECONNABORTED.
    pub(super) fn destroy(&mut self, socket: &Connected) -> io::Result<()> {
        let request = request(socket.family, CONNECTED, &socket.id);
        match self.request(SOCK_DESTROY, NLM_F_ACK, &request) {
            // Closed in the meantime.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
            answered => answered.map(drop),
        }
    }

    /// Sends a request and collects the bodies of the answers.
    fn request(&mut self, kind: u16, flags: u16, body: &[u8]) -> io::Result<Vec<Vec<u8>>> {
        self.sequence += 1;
        let mut message = Vec::with_capacity(HEADER + body.len());
        message.extend(((HEADER + body.len()) as u32).to_ne_bytes());
        message.extend(kind.to_ne_bytes());
        message.extend((NLM_F_REQUEST | flags).to_ne_bytes());
        message.extend(self.sequence.to_ne_bytes());
        message.extend([0; 4]);
        message.extend(body);
        self.socket.send(&message, 0)?;
        let mut answers = Vec::new();
        loop {
            let (bytes, _) = self.socket.recv_from_full()?;
            for Answer { kind, sequence, body } in Answers(&bytes) {
                if sequence != self.sequence {
                    continue;
                }
                match kind {
                    NLMSG_DONE => return Ok(answers),
                    NLMSG_ERROR => return errno(body).map(|()| answers),
                    _ => answers.push(body.to_vec()),
                }
            }
        }
    }
}

/// A `struct inet_diag_req_v2`.
fn request(family: u8, states: u32, id: &[u8; ID]) -> Vec<u8> {
    let mut request = vec![family, udp::PROTOCOL, 0, 0];
    request.extend(states.to_ne_bytes());
    request.extend(id);
    request
}

/// What a `struct nlmsgerr` says; 0 is success.
fn errno(body: &[u8]) -> io::Result<()> {
    match body.first_chunk().map(|number| i32::from_ne_bytes(*number)) {
        Some(0) => Ok(()),
        Some(number) => Err(io::Error::from_raw_os_error(-number)),
        None => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

struct Answer<'a> {
    kind: u16,
    sequence: u32,
    body: &'a [u8],
}

/// The messages in what was received; what is cut off is not one.
struct Answers<'a>(&'a [u8]);

impl<'a> Iterator for Answers<'a> {
    type Item = Answer<'a>;

    fn next(&mut self) -> Option<Answer<'a>> {
        let header: &[u8; HEADER] = self.0.first_chunk()?;
        let [a, b, c, d, e, f, _, _, g, h, i, j, ..] = *header;
        let len = u32::from_ne_bytes([a, b, c, d]) as usize;
        let body = self.0.get(HEADER..len)?;
        // Messages begin at multiples of four.
        self.0 = self.0.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some(Answer { kind: u16::from_ne_bytes([e, f]), sequence: u32::from_ne_bytes([g, h, i, j]), body })
    }
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use super::*;

    #[test]
    fn a_connected_socket_is_listed_with_its_peer() {
        let server = UdpSocket::bind("127.0.0.1:0").unwrap();
        let client = UdpSocket::bind("127.0.0.1:0").unwrap();
        client.connect(server.local_addr().unwrap()).unwrap();
        let port = PortBe::new(server.local_addr().unwrap().port());
        let mut diag = Diag::new().unwrap();
        let is_ours = |socket: &Connected| socket.peer == Addr::from_v4([127, 0, 0, 1]) && socket.port == port;
        assert_eq!(diag.connected().unwrap().into_iter().filter(is_ours).count(), 1);
    }

    #[test]
    fn messages_that_are_cut_off_are_none() {
        let mut message = vec![0; 20];
        message[..4].copy_from_slice(&20_u32.to_ne_bytes());
        assert_eq!(Answers(&message).count(), 1);
        for len in 0..20 {
            assert_eq!(Answers(&message[..len]).count(), 0, "{len}");
        }
        // A length below the header's would never end.
        message[..4].copy_from_slice(&0_u32.to_ne_bytes());
        assert_eq!(Answers(&message).count(), 0);
    }
}
