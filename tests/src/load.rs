//! A load of HTTP requests, each on a connection of its own and each accounted for.
//!
//! wrk tells only how many requests failed in all; this tells which backend answered each, and in which phase of a test it was begun.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::netns::Namespace;
use crate::servers::Answer;

/// A connection or an answer that takes longer counts as failed.
const PATIENCE: Duration = Duration::from_secs(5);
/// How many failures are told in full.
const TOLD: usize = 5;

/// One request on a connection of its own, from the calling thread's namespace.
pub fn get(server: SocketAddr) -> Result<Answer> {
    let mut stream = TcpStream::connect_timeout(&server, PATIENCE).context("failed to connect")?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_nodelay(true)?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n").context("failed to send the request")?;
    let mut answer = String::with_capacity(512);
    stream.read_to_string(&mut answer).context("failed to read the answer")?;
    let Some((head, body)) = answer.split_once("\r\n\r\n") else { bail!("no whole answer: {answer:?}") };
    ensure!(head.split(' ').nth(1) == Some("200"), "not a good answer: {head:?}");
    Answer::parse(body)
}

/// A connection that carries one request after another.
#[derive(Debug)]
pub struct KeptConnection {
    reader: BufReader<TcpStream>,
}

impl KeptConnection {
    /// Connects from the calling thread's namespace.
    pub fn open(server: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect_timeout(&server, PATIENCE).context("failed to connect")?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_nodelay(true)?;
        Ok(Self { reader: BufReader::new(stream) })
    }

    pub fn get(&mut self) -> Result<Answer> {
        self.reader
            .get_mut()
            .write_all(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
            .context("failed to send the request")?;
        let status = self.line()?;
        ensure!(status.split(' ').nth(1) == Some("200"), "not a good answer: {status:?}");
        // The body is one line; nginx tells its length, and there is nothing in it to be surprised by.
        while !self.line()?.trim_end().is_empty() {}
        Answer::parse(&self.line()?)
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        let length = self.reader.read_line(&mut line).context("failed to read the answer")?;
        ensure!(length > 0, "the connection was closed");
        Ok(line)
    }
}

/// What came of the requests begun in one phase.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    pub requests: u64,
    pub failed: u64,
    pub by_backend: BTreeMap<SocketAddr, u64>,
    /// The first few failures, in words.
    pub failures: Vec<String>,
}

impl Tally {
    pub fn of(&self, backend: SocketAddr) -> u64 {
        self.by_backend.get(&backend).copied().unwrap_or(0)
    }

    pub fn add(&mut self, other: &Self) {
        self.requests += other.requests;
        self.failed += other.failed;
        for (&backend, &requests) in &other.by_backend {
            *self.by_backend.entry(backend).or_default() += requests;
        }
        self.failures.extend(other.failures.iter().take(TOLD.saturating_sub(self.failures.len())).cloned());
    }

    fn count(&mut self, result: Result<Answer>) {
        self.requests += 1;
        match result {
            Ok(answer) => *self.by_backend.entry(answer.backend).or_default() += 1,
            Err(error) => {
                self.failed += 1;
                if self.failures.len() < TOLD {
                    self.failures.push(format!("{error:#}"));
                }
            }
        }
    }
}

/// A load that runs until it is stopped or dropped.
#[derive(Debug)]
pub struct Load {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    phase: AtomicUsize,
    tallies: Mutex<Vec<Tally>>,
}

impl Load {
    /// Sends requests from a namespace with `workers` threads, `rate` of them a second in all; 0 is as many as there can be.
    pub fn start(ns: &Namespace, server: SocketAddr, workers: u32, rate: u32) -> Self {
        let shared = Arc::new(Shared::default());
        let gap = if rate == 0 { Duration::ZERO } else { Duration::from_secs(1) * workers / rate };
        let workers = (0..workers)
            .map(|worker| {
                let (shared, ns) = (Arc::clone(&shared), ns.handle());
                thread::spawn(move || match ns.enter_this_thread() {
                    Ok(()) => shared.work(server, gap, gap / workers * worker),
                    Err(error) => shared.tallies()[0].count(Err(error.into())),
                })
            })
            .collect();
        Self { shared, workers }
    }

    /// From now on requests count for the next phase; those under way count for the one they began in.
    pub fn next_phase(&self) {
        let mut tallies = self.shared.tallies();
        tallies.push(Tally::default());
        self.shared.phase.store(tallies.len() - 1, Ordering::Release);
    }

    /// The tallies so far, one for each phase.
    pub fn tallies(&self) -> Vec<Tally> {
        self.shared.tallies().clone()
    }

    /// All phases in one.
    pub fn total(&self) -> Tally {
        self.shared.tallies().iter().fold(Tally::default(), |mut total, tally| {
            total.add(tally);
            total
        })
    }

    /// Waits for the requests under way, and gives the tallies of all phases.
    pub fn stop(mut self) -> Vec<Tally> {
        self.join();
        self.tallies()
    }

    fn join(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        for worker in self.workers.drain(..) {
            let _ = worker.join();
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.join();
    }
}

impl Shared {
    fn tallies(&self) -> MutexGuard<'_, Vec<Tally>> {
        let mut tallies = self.tallies.lock().unwrap_or_else(PoisonError::into_inner);
        if tallies.is_empty() {
            tallies.push(Tally::default());
        }
        tallies
    }

    fn work(&self, server: SocketAddr, gap: Duration, offset: Duration) {
        let mut next = Instant::now() + offset;
        while !self.stop.load(Ordering::Relaxed) {
            let now = Instant::now();
            if next > now {
                thread::sleep(next - now);
            } else if now - next > Duration::from_millis(100) {
                // Behind by too much to catch up: a burst would be another load than the one asked for.
                next = now;
            }
            next += gap;
            let phase = self.phase.load(Ordering::Acquire);
            let result = get(server);
            self.tallies()[phase].count(result);
        }
    }
}
