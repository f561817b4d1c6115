//! A stub resolver that keeps one socket, as resolvers do that are asked often.
//!
//! Each question is asked once more when no answer came in time. What [`servers::dns`](crate::servers::dns) answers tells who it was.

use std::fmt;
use std::io::{self, ErrorKind};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::str::FromStr;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};

/// For an answer, before the question is asked again. As long as a busy machine may take to replace a server.
const PATIENCE: Duration = Duration::from_secs(3);
/// Between two questions.
const PAUSE: Duration = Duration::from_millis(5);
/// A header with one question: recursion is not asked for, as of an authoritative server.
const HEADER_LEN: usize = 12;
/// `who.svc.test`, TXT, IN.
const QUESTION: &[u8] = b"\x03who\x03svc\x04test\0\0\x10\0\x01";

/// Whether the socket is connected to its server, or names it with each datagram.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Socket {
    Connected,
    Unconnected,
}

impl Socket {
    pub const BOTH: [Self; 2] = [Self::Connected, Self::Unconnected];

    pub fn name(self) -> &'static str {
        match self {
            Self::Connected => "connected",
            Self::Unconnected => "unconnected",
        }
    }
}

/// What became of questions that were asked one after the other.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Tally {
    pub asked: u64,
    /// Those that had to be asked again.
    pub retried: u64,
    /// Those that were not answered then either.
    pub lost: u64,
    /// Who answered, in the order of the first answers, and how often.
    pub by_name: Vec<(String, u64)>,
}

impl Tally {
    fn answered(&mut self, name: String) {
        match self.by_name.iter_mut().find(|(known, _)| *known == name) {
            Some((_, count)) => *count += 1,
            None => self.by_name.push((name, 1)),
        }
    }
}

/// As `netlb-socket` says it to tests, in one line.
impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.asked, self.retried, self.lost)?;
        self.by_name.iter().try_for_each(|(name, count)| write!(f, " {name}={count}"))
    }
}

impl FromStr for Tally {
    type Err = anyhow::Error;

    fn from_str(line: &str) -> anyhow::Result<Self> {
        let mut words = line.split(' ');
        let mut number = || words.next().context("a number is missing")?.parse().context("not a number");
        let (asked, retried, lost) = (number()?, number()?, number()?);
        let count = |word: &str| {
            let (name, count) = word.split_once('=').with_context(|| format!("no count: {word:?}"))?;
            anyhow::Ok((name.to_owned(), count.parse()?))
        };
        Ok(Self { asked, retried, lost, by_name: words.map(count).collect::<anyhow::Result<_>>()? })
    }
}

/// Asks for a time, by one socket.
pub fn resolve_for(time: Duration, kind: Socket, server: SocketAddr) -> io::Result<Tally> {
    let end = Instant::now() + time;
    let mut tally = Tally::default();
    let mut socket = open(kind, server)?;
    while Instant::now() < end {
        let id = tally.asked as u16;
        tally.asked += 1;
        let answer = ask(&socket, kind, server, id).or_else(|_| {
            tally.retried += 1;
            if is_gone(&socket, kind) {
                socket = open(kind, server)?;
            }
            ask(&socket, kind, server, id)
        });
        match answer {
            Ok(name) => tally.answered(name),
            Err(_) => tally.lost += 1,
        }
        thread::sleep(PAUSE);
    }
    Ok(tally)
}

fn open(kind: Socket, server: SocketAddr) -> io::Result<UdpSocket> {
    let any = if server.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind(SocketAddr::new(any, 0))?;
    if kind == Socket::Connected {
        socket.connect(server)?;
    }
    Ok(socket)
}

/// Whether a connected socket was taken from its process, which has to open another one.
fn is_gone(socket: &UdpSocket, kind: Socket) -> bool {
    kind == Socket::Connected && socket.peer_addr().is_err()
}

/// An answer to one datagram. An error that comes at once is told when the time is over: a question asked again at once fails again.
fn ask(socket: &UdpSocket, kind: Socket, server: SocketAddr, id: u16) -> io::Result<String> {
    let end = Instant::now() + PATIENCE;
    let answer = ask_until(end, socket, kind, server, id);
    if answer.is_err() && !is_gone(socket, kind) {
        thread::sleep(end.saturating_duration_since(Instant::now()));
    }
    answer
}

fn ask_until(end: Instant, socket: &UdpSocket, kind: Socket, server: SocketAddr, id: u16) -> io::Result<String> {
    let question = question(id);
    match kind {
        Socket::Connected => socket.send(&question)?,
        Socket::Unconnected => socket.send_to(&question, server)?,
    };
    let mut datagram = [0; 512];
    loop {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        socket.set_read_timeout(Some(left))?;
        let (length, from) = socket.recv_from(&mut datagram)?;
        // One to an earlier question may come late, and one from another address is nobody's.
        if from == server
            && let Ok(name) = answer(&datagram[..length], id)
        {
            return Ok(name);
        }
    }
}

fn question(id: u16) -> Vec<u8> {
    let mut question = vec![0; HEADER_LEN];
    question[..2].copy_from_slice(&id.to_be_bytes());
    question[5] = 1;
    question.extend(QUESTION);
    question
}

/// The text of the first record of an answer.
fn answer(message: &[u8], id: u16) -> anyhow::Result<String> {
    // A name that points back, type, class, time to live and length; then the text with its own length.
    const RECORD: usize = HEADER_LEN + QUESTION.len();
    const TEXT: usize = RECORD + 12;
    if message.get(..2) != Some(&id.to_be_bytes()) || message.get(HEADER_LEN..RECORD) != Some(QUESTION) {
        bail!("an answer to another question");
    }
    let length = usize::from(*message.get(TEXT).context("no record")?);
    let text = message.get(TEXT + 1..TEXT + 1 + length).context("cut off")?;
    Ok(String::from_utf8_lossy(text).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_tells_who_gave_it() {
        let mut message = question(7);
        message[7] = 1;
        message.extend(b"\xc0\x0c\0\x10\0\x01\0\0\0\x3c\0\x0a\x09backend-1");
        assert_eq!(answer(&message, 7).unwrap(), "backend-1");
        assert!(answer(&message, 8).is_err(), "to another question");
        assert!(answer(&message[..40], 7).is_err(), "cut off");
        assert!(answer(&question(7), 7).is_err(), "nothing in it");
    }

    #[test]
    fn what_is_said_of_questions_is_understood() {
        let tally = Tally { asked: 9, retried: 2, lost: 1, by_name: vec![("b".to_owned(), 5), ("a".to_owned(), 3)] };
        assert_eq!(tally.to_string().parse::<Tally>().unwrap(), tally);
        assert_eq!("0 0 0".parse::<Tally>().unwrap(), Tally::default());
        assert!("1 2".parse::<Tally>().is_err());
    }
}
