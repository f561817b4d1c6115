//! The programs that make the traffic: a client and the servers behind it, in one process of their own.
//!
//! Client and servers share one core. So nothing waits for a core to wake up, and the kernel's work for a packet, which is charged to
//! whoever runs at that moment, is charged to one of them. The process joins the peer's control group, where a proxy may be already;
//! a measurement is a fixed number of operations between two readings of the group's CPU time.

mod tcp;
mod udp;

use std::env;
use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use netlb_integration::cgroup;
use netlb_integration::exec::Cmd;
use netlb_integration::netns::Handle;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use super::cpu::Meter;

const ASKED: &str = "NETLB_BENCH_WORK";
const TIME_LIMIT: Duration = Duration::from_secs(20);
/// Other programs of the machine would otherwise run between a request and its answer.
pub(crate) const NICENESS: i32 = -10;
/// Failures after which the rest is not tried.
const TOO_MANY: u64 = 20;

/// A kind of traffic. What one operation is, is said with it.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub(crate) enum Traffic {
    /// Connect, one byte there, one byte back, close.
    Connections,
    /// One byte there and one back, on one connection.
    RoundTrips,
    /// A mebibyte on one connection.
    Stream,
    /// A socket with a port that was not used before, one datagram there, one back.
    UdpFlows,
    /// A batch of datagrams of one flow, to a server that counts them.
    UdpFlood,
}

impl Traffic {
    pub(crate) fn is_tcp(self) -> bool {
        matches!(self, Self::Connections | Self::RoundTrips | Self::Stream)
    }

    /// Whether the time of one operation is what a user waits for.
    pub(crate) fn has_latency(self) -> bool {
        matches!(self, Self::Connections | Self::RoundTrips | Self::UdpFlows)
    }
}

/// What a process is to do.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Work {
    pub(crate) traffic: Traffic,
    pub(crate) operations: u64,
    pub(crate) warm_up: u64,
    /// The client's namespace.
    pub(crate) client: String,
    /// Where it connects to, in turn.
    pub(crate) targets: Vec<SocketAddr>,
    /// Namespaces of servers, and what they listen on.
    pub(crate) servers: Vec<(String, SocketAddr)>,
    /// First port of the client's sockets, where each operation takes a port of its own.
    pub(crate) first_port: u16,
    pub(crate) cgroup: PathBuf,
    pub(crate) core: usize,
}

/// What it came to.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
pub(crate) struct Sample {
    pub(crate) operations: u64,
    pub(crate) failures: u64,
    pub(crate) seconds: f64,
    /// Seconds of all processes of the control group, and of the core's ksoftirqd.
    pub(crate) cpu: f64,
    /// Seconds of an operation.
    pub(crate) p50: f64,
    pub(crate) p99: f64,
}

impl Work {
    /// Has it done by a process of its own.
    pub(crate) fn run(&self) -> Result<Sample> {
        let program = env::current_exe()?;
        let command = Cmd::new(program).env(ASKED, serde_json::to_string(self)?).timeout(TIME_LIMIT);
        let output = command.run()?.success()?;
        serde_json::from_str(&output.stdout).with_context(|| output.to_string())
    }

    fn perform(&self) -> Result<Sample> {
        cgroup::enter(&self.cgroup)?;
        stay_on(self.core)?;
        // SAFETY: the call takes three integers; 0 is the calling process.
        if unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICENESS) } != 0 {
            return Err(io::Error::last_os_error()).context("failed to set the priority");
        }
        let meter = Meter::new(&self.cgroup, self.core)?;
        let mut client = self.client()?;
        let handle = Handle::open(&self.client)?;
        let (ready, is_ready) = mpsc::channel();
        let (go, may_go) = mpsc::channel();
        thread::scope(|scope| {
            let client = scope.spawn(move || {
                handle.enter_this_thread()?;
                let mut before = Tally::default();
                before.operate(client.as_mut(), self.warm_up)?;
                ready.send(())?;
                may_go.recv()?;
                let mut tally = Tally { failures: before.failures, ..Tally::default() };
                let begin = Instant::now();
                tally.operate(client.as_mut(), self.operations)?;
                tally.failures += client.finish()?;
                anyhow::Ok((tally, begin.elapsed()))
            });
            // An error here is that the client ended, and it has the reason.
            let before = if is_ready.recv().is_ok() {
                // Until the servers wait again: a thread's time is accounted when it stops running.
                thread::sleep(Duration::from_millis(2));
                Some(meter.read()?)
            } else {
                None
            };
            let _ = go.send(());
            let (tally, wall) = client.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            let used = meter.read()?.saturating_sub(before.context("the client was never ready")?);
            Ok(tally.sample(wall, used))
        })
    }

    fn client(&self) -> Result<Box<dyn Client>> {
        let Self { targets, servers, first_port, .. } = self;
        Ok(match self.traffic {
            Traffic::Connections => tcp::connections(targets, servers)?,
            Traffic::RoundTrips => tcp::round_trips(targets, servers)?,
            Traffic::Stream => tcp::stream(targets, servers)?,
            Traffic::UdpFlows => udp::flows(targets, servers, *first_port)?,
            Traffic::UdpFlood => udp::flood(targets, servers)?,
        })
    }
}

/// To be called first in `main`: when this process was started to make traffic, it does so and returns true.
pub(crate) fn serve_if_asked() -> Result<bool> {
    let Ok(work) = env::var(ASKED) else { return Ok(false) };
    let work: Work = serde_json::from_str(&work).with_context(|| format!("{ASKED} is {work:?}"))?;
    let sample = work.perform()?;
    writeln!(io::stdout().lock(), "{}", serde_json::to_string(&sample)?)?;
    Ok(true)
}

/// The core that measurements run on: the last one, which has the fewest interrupts of the machine.
pub(crate) fn core() -> Result<usize> {
    let mine = sched_getaffinity(Pid::from_raw(0))?;
    (0..CpuSet::count()).rev().find(|&core| mine.is_set(core) == Ok(true)).context("this process may run on no core")
}

fn stay_on(core: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(core)?;
    sched_setaffinity(Pid::from_raw(0), &set).with_context(|| format!("failed to stay on core {core}"))
}

/// The client's side of some traffic; its servers run in threads that end with the process.
trait Client: Send {
    fn operate(&mut self) -> Result<()>;

    /// Waits for what is under way, and gives the number of operations that came to nothing.
    fn finish(&mut self) -> Result<u64> {
        Ok(0)
    }
}

#[derive(Debug, Default)]
struct Tally {
    failures: u64,
    times: Vec<Duration>,
}

impl Tally {
    fn operate(&mut self, client: &mut dyn Client, operations: u64) -> Result<()> {
        self.times.reserve(usize::try_from(operations)?);
        for _ in 0..operations {
            let begin = Instant::now();
            match client.operate() {
                Ok(()) => self.times.push(begin.elapsed()),
                Err(error) => {
                    self.failures += 1;
                    if self.failures > TOO_MANY {
                        bail!("{} operations failed; the last one: {error:#}", self.failures);
                    }
                }
            }
        }
        Ok(())
    }

    fn sample(mut self, wall: Duration, cpu: Duration) -> Sample {
        self.times.sort_unstable();
        let percentile = |share: usize| {
            let time = self.times.get(self.times.len() * share / 100).copied();
            time.unwrap_or_default().as_secs_f64()
        };
        Sample {
            operations: self.times.len() as u64,
            failures: self.failures,
            seconds: wall.as_secs_f64(),
            cpu: cpu.as_secs_f64(),
            p50: percentile(50),
            p99: percentile(99),
        }
    }
}

/// Makes a socket in a namespace.
fn inside<T: Send>(namespace: &str, make: impl FnOnce() -> io::Result<T> + Send) -> Result<T> {
    let made = Handle::open(namespace)?.enter(make).and_then(|made| made);
    made.with_context(|| format!("no socket in namespace {namespace}"))
}

/// Whoever is next of those to connect to.
#[derive(Debug)]
struct Turns {
    targets: Vec<SocketAddr>,
    next: usize,
}

impl Turns {
    fn new(targets: &[SocketAddr]) -> Self {
        Self { targets: targets.to_vec(), next: 0 }
    }

    fn next(&mut self) -> SocketAddr {
        self.next = (self.next + 1) % self.targets.len();
        self.targets[self.next]
    }
}
