//! How long a change of one service takes until new flows see it.
//!
//! A service has one of two backends, and each change puts the other in its place. Meanwhile a client asks the service without a pause,
//! each time from a new socket, and notes when the first answer comes from the new backend. Both backends answer at once, so what it
//! notes is late by one exchange at most.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, UdpSocket};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use netlb_integration::daemon::Netlb;
use netlb_integration::exec::wait_until;
use netlb_integration::topology::{Family, Host, Pod, Testbed, vip};

use crate::notes::note;

const SERVICE: &str = "changing";
const PORT: u16 = 5353;
const PATIENCE: Duration = Duration::from_millis(200);
/// A change that was not seen by then never will be.
const LIMIT: Duration = Duration::from_secs(5);

/// A client and two backends.
#[derive(Debug)]
pub(super) struct Bystander {
    client: Pod,
    backends: [Pod; 2],
}

/// Times of changes.
#[derive(Debug, Default)]
pub(super) struct Times {
    /// From the request to the API's answer.
    pub(super) calls: Sorted,
    /// From the request to the first new flow that went to the new backend.
    pub(super) seen: Sorted,
}

#[derive(Debug, Default)]
pub(super) struct Sorted(Vec<Duration>);

impl Sorted {
    pub(super) fn percentile(&self, share: usize) -> Duration {
        self.0.get(self.0.len() * share / 100).copied().unwrap_or_default()
    }
}

impl Bystander {
    pub(super) fn new(bed: &Testbed) -> Result<Self> {
        let backend = |name| bed.pod(Host::A, name);
        let client = bed.pod(Host::A, "client")?;
        client.ns.sysctl("net/ipv4/ip_local_port_range", "1024 65535")?;
        Ok(Self { client, backends: [backend("backend-1")?, backend("backend-2")?] })
    }

    /// Makes so many changes of a service that is there for them alone.
    pub(super) fn watch(&self, netlb: &Netlb, changes: u32) -> Result<Times> {
        let addresses = self.backends.each_ref().map(|pod| SocketAddr::new(pod.ip(Family::V4), PORT));
        let frontend = SocketAddr::new(vip(Family::V4, 10), PORT);
        netlb.add_service(SERVICE, &format!("{frontend}/udp"), [addresses[0]])?;
        let mut servers = Vec::new();
        for (pod, address) in self.backends.iter().zip(addresses) {
            servers.push(pod.ns.enter(|| UdpSocket::bind(address))??);
        }
        let probe = &Probe::default();
        let times = thread::scope(|scope| {
            for (server, name) in servers.iter().zip(0..) {
                scope.spawn(move || probe.serve(server, name));
            }
            let client = self.client.ns.handle();
            let asking =
                scope.spawn(move || client.enter_this_thread().map_err(Into::into).and_then(|()| probe.ask(frontend)));
            let times = probe.time(netlb, &addresses, changes);
            probe.stop.store(true, Ordering::Relaxed);
            let asked = asking.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            asked.and(times)
        })?;
        let [asked, lost] = [&probe.asked, &probe.lost].map(|count| count.load(Ordering::Relaxed));
        if lost > 0 {
            note(format_args!("control: {lost} of {asked} datagrams had no answer while backends were changed"));
            note(netlb.must(["status"])?);
        }
        netlb.must(["svc", "rm", SERVICE])?;
        Ok(times)
    }
}

/// What the threads of a watch share.
#[derive(Debug, Default)]
struct Probe {
    stop: AtomicBool,
    asked: AtomicU64,
    lost: AtomicU64,
    /// For each backend, when its first answer came since this was last taken away.
    first: [Mutex<Option<Instant>>; 2],
}

impl Probe {
    /// Answers every datagram with the backend's number.
    fn serve(&self, socket: &UdpSocket, number: u8) -> Result<()> {
        socket.set_read_timeout(Some(PATIENCE))?;
        while !self.stop.load(Ordering::Relaxed) {
            if let Ok((_, client)) = socket.recv_from(&mut [0; 16]) {
                // An answer that cannot be sent is the client's to miss.
                let _ = socket.send_to(&[number], client);
            }
        }
        Ok(())
    }

    /// Asks the service, and notes who answered first and when.
    fn ask(&self, service: SocketAddr) -> Result<()> {
        while !self.stop.load(Ordering::Relaxed) {
            let socket = UdpSocket::bind("0.0.0.0:0")?;
            socket.set_read_timeout(Some(PATIENCE))?;
            socket.connect(service)?;
            socket.send(b"?")?;
            let mut answer = [0];
            if socket.recv(&mut answer).is_ok() {
                let [number] = answer;
                self.first(usize::from(number))?.get_or_insert_with(Instant::now);
            } else {
                self.lost.fetch_add(1, Ordering::Relaxed);
            }
            self.asked.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    fn first(&self, backend: usize) -> Result<MutexGuard<'_, Option<Instant>>> {
        let first = self.first.get(backend).with_context(|| format!("an answer of backend {backend}"))?;
        Ok(first.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn time(&self, netlb: &Netlb, addresses: &[SocketAddr; 2], changes: u32) -> Result<Times> {
        let mut api = Api::connect(netlb)?;
        let (mut calls, mut seen) = (Vec::new(), Vec::new());
        for change in 0..changes {
            let new = if change % 2 == 0 { 1 } else { 0 };
            let request = Api::request(addresses[new]);
            // Nobody goes there any more, so it stays like this until the change.
            *self.first(new)? = None;
            let begin = Instant::now();
            api.call(&request)?;
            calls.push(begin.elapsed());
            seen.push(wait_until("new flows to see a change", LIMIT, || {
                Ok(self.first(new)?.map(|first| first.saturating_duration_since(begin)))
            })?);
        }
        calls.sort_unstable();
        seen.sort_unstable();
        Ok(Times { calls: Sorted(calls), seen: Sorted(seen) })
    }
}

/// A kept connection to the API, as a controller has it.
#[derive(Debug)]
struct Api {
    stream: BufReader<UnixStream>,
}

impl Api {
    fn connect(netlb: &Netlb) -> Result<Self> {
        Ok(Self { stream: BufReader::new(UnixStream::connect(netlb.socket())?) })
    }

    /// A request that leaves the service with this backend alone.
    fn request(backend: SocketAddr) -> String {
        let body = format!("{{\"backends\":[\"{backend}\"]}}");
        format!(
            "PATCH /v1/services/{SERVICE} HTTP/1.1\r\nHost: netlb\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\n\r\n{body}",
            body.len()
        )
    }

    fn call(&mut self, request: &str) -> Result<()> {
        self.stream.get_mut().write_all(request.as_bytes())?;
        let status = self.line()?;
        let mut length = 0;
        loop {
            let header = self.line()?;
            if header.is_empty() {
                break;
            }
            if let Some(value) = header.to_ascii_lowercase().strip_prefix("content-length:") {
                length = value.trim().parse()?;
            }
        }
        let mut body = vec![0; length];
        self.stream.read_exact(&mut body)?;
        ensure!(status.split(' ').nth(1) == Some("200"), "{status}: {}", String::from_utf8_lossy(&body));
        Ok(())
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        self.stream.read_line(&mut line).context("the API did not answer")?;
        Ok(line.trim_end().to_owned())
    }
}
