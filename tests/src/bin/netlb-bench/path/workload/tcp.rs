//! TCP: connections, round trips, a stream.

use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd as _;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{Client, Turns, inside};

/// As long as a connection that works is never silent.
const PATIENCE: Duration = Duration::from_secs(5);
const CHUNK: usize = 128 << 10;
const CHUNKS: usize = 8;

pub(super) fn connections(targets: &[SocketAddr], servers: &[(String, SocketAddr)]) -> Result<Box<dyn Client>> {
    serve(servers, answer_bytes)?;
    Ok(Box::new(Connections(Turns::new(targets))))
}

pub(super) fn round_trips(targets: &[SocketAddr], servers: &[(String, SocketAddr)]) -> Result<Box<dyn Client>> {
    serve(servers, answer_bytes)?;
    Ok(Box::new(RoundTrips { target: Turns::new(targets).next(), stream: None }))
}

pub(super) fn stream(targets: &[SocketAddr], servers: &[(String, SocketAddr)]) -> Result<Box<dyn Client>> {
    serve(servers, swallow)?;
    Ok(Box::new(Stream { target: Turns::new(targets).next(), stream: None, chunk: vec![0x5a; CHUNK] }))
}

struct Connections(Turns);

impl Client for Connections {
    fn operate(&mut self) -> Result<()> {
        let mut stream = TcpStream::connect(self.0.next()).context("failed to connect")?;
        ask(&mut stream)
    }
}

struct RoundTrips {
    target: SocketAddr,
    stream: Option<TcpStream>,
}

impl Client for RoundTrips {
    fn operate(&mut self) -> Result<()> {
        ask(connected(&mut self.stream, self.target)?)
    }
}

struct Stream {
    target: SocketAddr,
    stream: Option<TcpStream>,
    chunk: Vec<u8>,
}

impl Client for Stream {
    fn operate(&mut self) -> Result<()> {
        let stream = connected(&mut self.stream, self.target)?;
        for _ in 0..CHUNKS {
            stream.write_all(&self.chunk).context("failed to send")?;
        }
        Ok(())
    }

    /// The server answers once it has read all.
    fn finish(&mut self) -> Result<u64> {
        let stream = connected(&mut self.stream, self.target)?;
        stream.shutdown(Shutdown::Write)?;
        stream.read_exact(&mut [0]).context("the server did not say that it has all")?;
        Ok(0)
    }
}

/// Connects at the first call, from the calling thread's namespace.
fn connected(stream: &mut Option<TcpStream>, target: SocketAddr) -> Result<&mut TcpStream> {
    if stream.is_none() {
        let connected = TcpStream::connect(target).context("failed to connect")?;
        connected.set_nodelay(true)?;
        connected.set_read_timeout(Some(PATIENCE))?;
        connected.set_write_timeout(Some(PATIENCE))?;
        *stream = Some(connected);
    }
    stream.as_mut().context("not connected")
}

fn ask(stream: &mut TcpStream) -> Result<()> {
    stream.write_all(b"?").context("failed to send")?;
    let mut answer = [0];
    stream.read_exact(&mut answer).context("no answer")?;
    ensure!(answer == *b"?", "answered {answer:?}");
    Ok(())
}

/// Listens everywhere, and serves one connection after another in one thread: there is one client, and it has one connection.
fn serve(servers: &[(String, SocketAddr)], serve: fn(&mut TcpStream) -> io::Result<()>) -> Result<()> {
    let mut listeners = Vec::new();
    for (namespace, address) in servers {
        let listener = inside(namespace, || TcpListener::bind(address))?;
        listener.set_nonblocking(true)?;
        listeners.push(listener);
    }
    thread::spawn(move || {
        let mut fds: Vec<_> = listeners.iter().map(|one| PollFd::new(one.as_fd(), PollFlags::POLLIN)).collect();
        while poll(&mut fds, PollTimeout::NONE).is_ok() {
            for listener in fds.iter().zip(&listeners).filter(|(fd, _)| fd.any() == Some(true)).map(|(_, one)| one) {
                if let Ok((mut stream, _)) = listener.accept() {
                    // A connection that breaks is the client's to notice.
                    let _ = serve(&mut stream);
                }
            }
        }
    });
    Ok(())
}

fn answer_bytes(stream: &mut TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut byte = [0];
    while stream.read(&mut byte)? > 0 {
        stream.write_all(&byte)?;
    }
    Ok(())
}

fn swallow(stream: &mut TcpStream) -> io::Result<()> {
    let mut buffer = vec![0; 2 * CHUNK];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return stream.write_all(b"."),
            Err(error) if error.kind() != ErrorKind::Interrupted => return Err(error),
            _ => {}
        }
    }
}
