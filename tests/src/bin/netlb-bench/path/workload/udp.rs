//! UDP: new flows, and a flood.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{Client, Turns, inside};

const PATIENCE: Duration = Duration::from_millis(500);
/// Ports below are not for clients.
pub(super) const FIRST_PORT: u16 = 1024;
/// Datagrams that one system call sends or receives.
pub(super) const BATCH: usize = 32;
const PAYLOAD: usize = 18; // an Ethernet frame of 60 bytes
/// Datagrams under way at most, all of which the receiver's buffer can hold: none is lost but by the network.
const WINDOW: u64 = 256;
const BUFFER_SIZE: libc::c_int = 4 << 20;

pub(super) fn flows(
    targets: &[SocketAddr],
    servers: &[(String, SocketAddr)],
    first_port: u16,
) -> Result<Box<dyn Client>> {
    let sockets = bind(servers)?;
    thread::spawn(move || {
        let mut datagram = [0; 64];
        each_readable(&sockets, |socket| {
            if let Ok((length, client)) = socket.recv_from(&mut datagram) {
                // An answer that cannot be sent is the client's to miss.
                let _ = socket.send_to(&datagram[..length], client);
            }
        });
    });
    Ok(Box::new(Flows { targets: Turns::new(targets), port: first_port.max(FIRST_PORT) }))
}

pub(super) fn flood(targets: &[SocketAddr], servers: &[(String, SocketAddr)]) -> Result<Box<dyn Client>> {
    let sockets = bind(servers)?;
    let received = Arc::new(AtomicU64::new(0));
    let flood = Flood { target: Turns::new(targets).next(), socket: None, sent: 0, received: Arc::clone(&received) };
    thread::spawn(move || {
        let mut batch = Batch::new();
        each_readable(&sockets, |socket| {
            let count = batch.receive(socket).unwrap_or(0);
            received.fetch_add(count, Ordering::Release);
        });
    });
    Ok(Box::new(flood))
}

struct Flows {
    targets: Turns,
    port: u16,
}

impl Flows {
    fn socket(&mut self) -> Result<UdpSocket> {
        loop {
            let port = self.port;
            self.port = port.checked_add(1).unwrap_or(FIRST_PORT);
            match UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)) {
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
                bound => return bound.context("failed to bind"),
            }
        }
    }
}

impl Client for Flows {
    fn operate(&mut self) -> Result<()> {
        let socket = self.socket()?;
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.connect(self.targets.next())?;
        socket.send(b"?").context("failed to send")?;
        socket.recv(&mut [0]).context("no answer")?;
        Ok(())
    }
}

struct Flood {
    target: SocketAddr,
    socket: Option<UdpSocket>,
    sent: u64,
    received: Arc<AtomicU64>,
}

impl Flood {
    /// Waits until at most so many are under way; gives those that did not come within the time there is.
    fn wait(&mut self, under_way: u64) -> u64 {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let missing = self.sent.saturating_sub(self.received.load(Ordering::Acquire));
            if missing <= under_way {
                return 0;
            }
            if Instant::now() >= deadline {
                // They will not come any more.
                self.sent -= missing;
                return missing;
            }
            thread::yield_now();
        }
    }
}

impl Client for Flood {
    fn operate(&mut self) -> Result<()> {
        if self.socket.is_none() {
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
            socket.connect(self.target)?;
            self.socket = Some(socket);
        }
        let socket = self.socket.as_ref().context("no socket")?;
        self.sent += Batch::new().send(socket)?;
        match self.wait(WINDOW) {
            0 => Ok(()),
            lost => bail!("{lost} datagrams did not arrive"),
        }
    }

    fn finish(&mut self) -> Result<u64> {
        Ok(self.wait(0))
    }
}

/// Messages of one system call.
struct Batch {
    buffers: Box<[[u8; PAYLOAD]; BATCH]>,
}

impl Batch {
    fn new() -> Self {
        Self { buffers: Box::new([[0x5a; PAYLOAD]; BATCH]) }
    }

    fn send(&mut self, socket: &UdpSocket) -> io::Result<u64> {
        // SAFETY: the headers point to the buffers, which outlive the call.
        self.with_headers(|headers| unsafe { libc::sendmmsg(socket.as_raw_fd(), headers, BATCH as libc::c_uint, 0) })
    }

    fn receive(&mut self, socket: &UdpSocket) -> io::Result<u64> {
        let (flags, no_timeout) = (libc::MSG_DONTWAIT, std::ptr::null_mut());
        // SAFETY: as for sending; what comes in has room in the buffers, as the headers say.
        self.with_headers(|headers| unsafe {
            libc::recvmmsg(socket.as_raw_fd(), headers, BATCH as libc::c_uint, flags, no_timeout)
        })
    }

    fn with_headers(&mut self, call: impl FnOnce(*mut libc::mmsghdr) -> libc::c_int) -> io::Result<u64> {
        let mut vectors = self
            .buffers
            .each_mut()
            .map(|buffer| libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() });
        let mut headers = vectors.each_mut().map(|vector| {
            // SAFETY: all of it are integers and pointers, for which zero means none.
            let mut header: libc::mmsghdr = unsafe { std::mem::zeroed() };
            header.msg_hdr.msg_iov = vector;
            header.msg_hdr.msg_iovlen = 1;
            header
        });
        u64::try_from(call(headers.as_mut_ptr())).map_err(|_| io::Error::last_os_error())
    }
}

fn bind(servers: &[(String, SocketAddr)]) -> Result<Vec<UdpSocket>> {
    let mut sockets = Vec::new();
    for (namespace, address) in servers {
        let socket = inside(namespace, || UdpSocket::bind(address))?;
        let size = &BUFFER_SIZE;
        // SAFETY: the option is an int, and its size is given.
        let set = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_RCVBUFFORCE,
                (&raw const *size).cast(),
                size_of_val(size) as libc::socklen_t,
            )
        };
        if set != 0 {
            return Err(io::Error::last_os_error()).context("failed to enlarge a receive buffer");
        }
        sockets.push(socket);
    }
    Ok(sockets)
}

/// Calls `serve` for each socket that something came to, for as long as the process lives.
fn each_readable(sockets: &[UdpSocket], mut serve: impl FnMut(&UdpSocket)) {
    let mut fds: Vec<_> = sockets.iter().map(|socket| PollFd::new(socket.as_fd(), PollFlags::POLLIN)).collect();
    while poll(&mut fds, PollTimeout::NONE).is_ok() {
        for (fd, socket) in fds.iter().zip(sockets) {
            if fd.any() == Some(true) {
                serve(socket);
            }
        }
    }
}
