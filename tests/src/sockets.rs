//! A process with a socket that does what it is told: for tests that look at the socket between two calls.

use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::cgroup::Cgroup;
use crate::dns;
use crate::exec::{Conversation, sibling_program};
use crate::netns::Namespace;
use crate::servers::{Answer, Protocol};
use crate::topology::Family;

/// A process in a namespace and a cgroup, with at most one socket.
#[derive(Debug)]
pub struct Client {
    process: Conversation,
}

/// Why a call of the process failed, such as `ECONNREFUSED`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Errno(pub String);

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Errno {}

impl Client {
    pub fn start(ns: &Namespace, cgroup: Option<&Cgroup>) -> Result<Self> {
        let command = ns.command(sibling_program("netlb-socket")?);
        let command = if let Some(cgroup) = cgroup { command.cgroup(cgroup) } else { command };
        Ok(Self { process: command.converse()? })
    }

    /// Opens a datagram socket, in the place of the one before it.
    pub fn open(&mut self, family: Family) -> Result<()> {
        let family = if family == Family::V4 { "4" } else { "6" };
        Ok(self.tell(&format!("open {family}"))?.map(drop)?)
    }

    /// The same, with a port of its own choice.
    pub fn open_at(&mut self, family: Family, port: u16) -> Result<()> {
        let family = if family == Family::V4 { "4" } else { "6" };
        Ok(self.tell(&format!("open {family} {port}"))?.map(drop)?)
    }

    /// How long it waits for a connection or an answer; a second at first.
    pub fn be_patient(&mut self, time: Duration) -> Result<()> {
        Ok(self.tell(&format!("patience {}", time.as_millis()))?.map(drop)?)
    }

    /// Connects the datagram socket, or a new socket for a stream.
    pub fn connect(&mut self, protocol: Protocol, to: SocketAddr) -> Result<Result<(), Errno>> {
        Ok(self.tell(&format!("connect {} {to}", protocol.name()))?.map(drop))
    }

    /// Binds a socket of its own, for a moment.
    pub fn bind(&mut self, protocol: Protocol, at: SocketAddr) -> Result<Result<(), Errno>> {
        Ok(self.tell(&format!("bind {} {at}", protocol.name()))?.map(drop))
    }

    /// Whom the socket is connected to.
    pub fn peer(&mut self) -> Result<SocketAddr> {
        Ok(self.tell("peer")??.parse()?)
    }

    pub fn send(&mut self, what: &str) -> Result<Result<(), Errno>> {
        Ok(self.tell(&format!("send {what}"))?.map(drop))
    }

    pub fn send_to(&mut self, to: SocketAddr, what: &str) -> Result<Result<(), Errno>> {
        Ok(self.tell(&format!("sendto {to} {what}"))?.map(drop))
    }

    /// The next datagram or line of an echo server: its sender and what it says.
    pub fn receive(&mut self) -> Result<Result<(SocketAddr, Answer), Errno>> {
        let answer = match self.tell("recv")? {
            Ok(answer) => answer,
            Err(error) => return Ok(Err(error)),
        };
        let (from, answer) = answer.split_once(' ').with_context(|| format!("no sender: {answer:?}"))?;
        Ok(Ok((from.parse()?, Answer::parse(answer)?)))
    }

    /// Sends a datagram to an address, and gives the sender and the answer of the next one that comes.
    pub fn ask(&mut self, to: SocketAddr, what: &str) -> Result<(SocketAddr, Answer)> {
        self.send_to(to, what)??;
        Ok(self.receive()??)
    }

    /// The same on a connected socket.
    pub fn ask_peer(&mut self, what: &str) -> Result<(SocketAddr, Answer)> {
        self.send(what)??;
        Ok(self.receive()??)
    }

    /// Connects a new socket to an echo server, and gives its answer.
    pub fn connect_and_ask(&mut self, protocol: Protocol, to: SocketAddr) -> Result<Result<Answer, Errno>> {
        if protocol == Protocol::Udp {
            self.open(if to.is_ipv4() { Family::V4 } else { Family::V6 })?;
        }
        if let Err(error) = self.connect(protocol, to)? {
            return Ok(Err(error));
        }
        if let Err(error) = self.send("who")? {
            return Ok(Err(error));
        }
        Ok(self.receive()?.map(|(_, answer)| answer))
    }

    /// Connects streams one after the other for a time, and gives how many there were and how many failed.
    pub fn connect_for(&mut self, time: Duration, to: SocketAddr) -> Result<(u64, u64)> {
        let told = self.tell(&format!("connect-for {} {to}", time.as_millis()))??;
        let (connects, failed) = told.split_once(' ').with_context(|| format!("no numbers: {told:?}"))?;
        Ok((connects.parse()?, failed.parse()?))
    }

    /// Asks a DNS server one question after the other for a time, by one socket.
    pub fn resolve_for(&mut self, time: Duration, kind: dns::Socket, server: SocketAddr) -> Result<dns::Tally> {
        self.tell(&format!("resolve-for {} {} {server}", time.as_millis(), kind.name()))??.parse()
    }

    fn tell(&mut self, what: &str) -> Result<Result<String, Errno>> {
        let answer = self.process.ask(what)?;
        match answer.split_once(' ').unwrap_or((&answer, "")) {
            ("ok", rest) => Ok(Ok(rest.to_owned())),
            ("error", rest) => Ok(Err(Errno(rest.to_owned()))),
            _ => bail!("`{what}` was answered with {answer:?}"),
        }
    }
}
