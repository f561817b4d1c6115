//! Echo server for tests: answers every datagram or line with who answers, whom it sees, and what came.

use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::thread;

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Protocol {
    Tcp,
    Udp,
}

/// Echo datagrams or lines, with the server's name and both addresses before them
#[derive(Debug, Parser)]
struct Args {
    protocol: Protocol,
    port: u16,
    /// Address to listen on; may be given several times. A datagram's own destination is known only with a single address, not with ::
    #[arg(long, value_name = "ADDRESS", default_value = "::")]
    listen: Vec<IpAddr>,
    /// Name to answer with
    #[arg(long, default_value = "echo")]
    name: String,
}

fn main() -> Result<()> {
    let Args { protocol, port, listen, name } = Args::parse();
    let addresses = listen.into_iter().map(|ip| SocketAddr::new(ip, port));
    let servers = addresses.map(|address| Server::bind(protocol, address)).collect::<Result<Vec<_>>>()?;
    thread::scope(|scope| {
        for server in &servers {
            scope.spawn(|| server.serve(&name));
        }
    });
    Ok(())
}

#[derive(Debug)]
enum Server {
    Tcp(TcpListener),
    Udp(UdpSocket),
}

impl Server {
    fn bind(protocol: Protocol, address: SocketAddr) -> Result<Self> {
        let bound = match protocol {
            Protocol::Tcp => TcpListener::bind(address).map(Self::Tcp),
            Protocol::Udp => UdpSocket::bind(address).map(Self::Udp),
        };
        bound.with_context(|| format!("cannot listen on {address}"))
    }

    fn serve(&self, name: &str) -> Result<()> {
        match self {
            Self::Tcp(listener) => serve_tcp(listener, name),
            Self::Udp(socket) => serve_udp(socket, name),
        }
    }
}

fn serve_tcp(listener: &TcpListener, name: &str) -> Result<()> {
    for stream in listener.incoming() {
        let (stream, name) = (stream?, name.to_owned());
        // A connection that breaks concerns its client alone.
        thread::spawn(move || echo_lines(&stream, &name));
    }
    Ok(())
}

fn echo_lines(stream: &TcpStream, name: &str) -> Result<()> {
    stream.set_nodelay(true)?;
    let (local, peer) = (stream.local_addr()?, stream.peer_addr()?);
    for line in BufReader::new(stream).lines() {
        let mut stream = stream;
        stream.write_all(answer(name, local, peer, line?.as_bytes()).as_slice())?;
    }
    Ok(())
}

fn serve_udp(socket: &UdpSocket, name: &str) -> Result<()> {
    let mut datagram = vec![0; 1 << 16];
    loop {
        let (length, peer) = socket.recv_from(&mut datagram)?;
        // The peer may be gone, or the answer too long for a datagram; either is the client's to notice.
        let _ = socket.send_to(&answer(name, socket.local_addr()?, peer, &datagram[..length]), peer);
    }
}

fn answer(name: &str, local: SocketAddr, peer: SocketAddr, what: &[u8]) -> Vec<u8> {
    let (local_ip, peer_ip) = (local.ip().to_canonical(), peer.ip().to_canonical());
    let mut answer = format!("{name} {local_ip} {} {peer_ip} {} ", local.port(), peer.port()).into_bytes();
    answer.extend_from_slice(what);
    answer.push(b'\n');
    answer
}
