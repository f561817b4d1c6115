//! Socket for tests: reads a command from each line, does it, and answers with `ok …` or `error ERRNO` on a line.

use std::io::{self, BufRead, BufReader, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use netlb_integration::dns;
use nix::errno::Errno;

/// For a connection, and for an answer, until something else is said.
const PATIENCE: Duration = Duration::from_secs(1);

fn main() -> Result<()> {
    let (mut socket, mut patience) = (None, PATIENCE);
    let mut out = io::stdout().lock();
    for line in io::stdin().lock().lines() {
        match obey(&mut socket, &mut patience, &line?) {
            Ok(said) => writeln!(out, "ok {said}")?,
            Err(error) => match error.downcast_ref::<io::Error>() {
                Some(error) => writeln!(out, "error {}", name(error))?,
                None => return Err(error),
            },
        }
        out.flush()?;
    }
    Ok(())
}

enum Socket {
    Stream(TcpStream),
    Datagrams(UdpSocket),
}

fn obey(socket: &mut Option<Socket>, patience: &mut Duration, line: &str) -> Result<String> {
    let words: Vec<_> = line.split(' ').collect();
    match (words.as_slice(), socket.as_ref()) {
        (["patience", millis], _) => *patience = Duration::from_millis(millis.parse()?),
        (["open", family, port @ ..], _) => {
            let port = port.first().map_or(Ok(0), |port| port.parse())?;
            let any = match *family {
                "4" => SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)),
                _ => SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)),
            };
            let opened = UdpSocket::bind(any)?;
            opened.set_read_timeout(Some(*patience))?;
            *socket = Some(Socket::Datagrams(opened));
        }
        (["connect", "tcp", to], _) => {
            let stream = TcpStream::connect_timeout(&to.parse()?, *patience)?;
            stream.set_read_timeout(Some(*patience))?;
            *socket = Some(Socket::Stream(stream));
        }
        (["connect", "udp", to], Some(Socket::Datagrams(socket))) => socket.connect(to.parse::<SocketAddr>()?)?,
        (["bind", "tcp", at], _) => drop(TcpListener::bind(at.parse::<SocketAddr>()?)?),
        (["bind", "udp", at], _) => drop(UdpSocket::bind(at.parse::<SocketAddr>()?)?),
        (["peer"], Some(Socket::Datagrams(socket))) => return Ok(socket.peer_addr()?.to_string()),
        (["peer"], Some(Socket::Stream(socket))) => return Ok(socket.peer_addr()?.to_string()),
        (["send", what], Some(Socket::Datagrams(socket))) => drop(socket.send(what.as_bytes())?),
        (["send", what], Some(Socket::Stream(stream))) => {
            let mut stream = stream;
            stream.write_all(format!("{what}\n").as_bytes())?;
        }
        (["sendto", to, what], Some(Socket::Datagrams(socket))) => {
            socket.send_to(what.as_bytes(), to.parse::<SocketAddr>()?)?;
        }
        (["recv"], Some(Socket::Datagrams(socket))) => {
            let mut datagram = vec![0; 1 << 16];
            let (length, from) = socket.recv_from(&mut datagram)?;
            return Ok(format!("{from} {}", String::from_utf8_lossy(&datagram[..length]).trim_end()));
        }
        (["recv"], Some(Socket::Stream(stream))) => {
            let mut line = String::new();
            BufReader::new(stream).read_line(&mut line)?;
            return Ok(format!("{} {}", stream.peer_addr()?, line.trim_end()));
        }
        (["connect-for", millis, to], _) => return connect_for(Duration::from_millis(millis.parse()?), to.parse()?),
        (["resolve-for", millis, kind, server], _) => {
            let kind =
                if *kind == dns::Socket::Connected.name() { dns::Socket::Connected } else { dns::Socket::Unconnected };
            return Ok(dns::resolve_for(Duration::from_millis(millis.parse()?), kind, server.parse()?)?.to_string());
        }
        _ => bail!("cannot do `{line}`"),
    }
    Ok(String::new())
}

fn connect_for(time: Duration, to: SocketAddr) -> Result<String> {
    let end = Instant::now() + time;
    let (mut connects, mut failed) = (0_u64, 0_u64);
    while Instant::now() < end {
        connects += 1;
        failed += u64::from(TcpStream::connect_timeout(&to, PATIENCE).is_err());
        // The ports of closed connections rest for a minute; there are some ten thousands of them.
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(format!("{connects} {failed}"))
}

/// `ETIMEDOUT` and so on; an error that is not the kernel's by its kind.
fn name(error: &io::Error) -> String {
    error.raw_os_error().map_or_else(|| format!("{:?}", error.kind()), |code| format!("{:?}", Errno::from_raw(code)))
}
