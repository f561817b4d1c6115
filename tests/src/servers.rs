//! Real servers in pods, as guards; each is listening when its function returns.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::exec::{Process, sibling_program, wait_until};
use crate::run::Run;
use crate::topology::{Family, Pod};

const START: Duration = Duration::from_secs(20);

/// A server that answers on one port of all addresses of its pod.
#[derive(Debug)]
pub struct Server {
    process: Process,
    dir: PathBuf,
    ips: [IpAddr; 2],
    port: u16,
}

impl Server {
    pub fn addr(&self, family: Family) -> SocketAddr {
        let [v4, v6] = self.ips;
        SocketAddr::new(if family == Family::V4 { v4 } else { v6 }, self.port)
    }

    /// Ends the server without a word to its clients' connections, as a crash does.
    pub fn kill(&mut self) -> Result<()> {
        self.process.kill()
    }

    pub fn log(&self) -> String {
        self.process.log()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = fs::remove_dir_all(&self.dir);
    }
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Protocol {
    Tcp,
    Udp,
}

impl Protocol {
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }
}

/// An nginx that answers `/` with a line for [`Answer::parse`], and `/files/` from [`nginx_file`].
pub fn nginx(pod: &Pod, port: u16) -> Result<Server> {
    let name = pod.name();
    let answer = format!("return 200 \"{name} $server_addr $server_port $remote_addr $remote_port\\n\";");
    run_nginx(pod, port, "access_log off;", &answer)
}

/// An nginx that hands requests on to another server, and notes its clients in a log that [`clients_of`] reads.
pub fn ingress(pod: &Pod, port: u16, upstream: SocketAddr) -> Result<Server> {
    let log = "log_format clients '$remote_addr';\n  access_log clients.log clients;";
    run_nginx(pod, port, log, &format!("proxy_pass http://{upstream};"))
}

/// The clients that an [`ingress`] has served, in order.
pub fn clients_of(ingress: &Server) -> Result<Vec<IpAddr>> {
    let log = fs::read_to_string(ingress.dir.join("clients.log")).context("the ingress has no log")?;
    log.lines().map(|line| line.parse().with_context(|| format!("no address: {line:?}"))).collect()
}

/// An nginx with something of its own for logs, and for what it does with requests.
fn run_nginx(pod: &Pod, port: u16, log: &str, location: &str) -> Result<Server> {
    let dir = Run::current()?.new_dir("nginx")?;
    fs::create_dir(dir.join("files"))?;
    let root = dir.display();
    let mut config = format!(
        "daemon off;\nmaster_process off;\nworker_processes 1;\nuser root;\npid {root}/pid;\nerror_log stderr;\n\
         events {{ worker_connections 8192; }}\n\
         http {{\n  {log}\n  sendfile on;\n  tcp_nopush on;\n  keepalive_timeout 300s;\n  keepalive_requests 100000000;\n"
    );
    for what in ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"] {
        writeln!(config, "  {what}_temp_path {root}/{what};")?;
    }
    write!(
        config,
        "  server {{\n    listen 0.0.0.0:{port} backlog=4096;\n    listen [::]:{port} ipv6only=on backlog=4096;\n    \
         default_type text/plain;\n    \
         location / {{ {location} }}\n    \
         location /files/ {{ alias {root}/files/; }}\n  }}\n}}\n"
    )?;
    let file = dir.join("nginx.conf");
    fs::write(&file, config)?;
    let command = pod.ns.command("nginx").arg("-p").arg(&dir).args(["-e", "stderr", "-c"]).arg(file);
    started(pod, command.spawn()?, dir, port, Protocol::Tcp)
}

/// Makes a file of `megabytes` under `/files/` of an nginx, no two megabytes of which are alike, and gives its path on this machine.
pub fn nginx_file(server: &Server, name: &str, megabytes: u32) -> Result<PathBuf> {
    let path = server.dir.join("files").join(name);
    let mut file = BufWriter::new(File::create(&path).with_context(|| format!("failed to create {}", path.display()))?);
    let mut block: Vec<u8> = (0..1 << 20).map(|i: u32| (i.wrapping_mul(0x9e37_79b1) >> 24) as u8).collect();
    for number in 0..megabytes {
        for page in block.chunks_exact_mut(4096) {
            page[..4].copy_from_slice(&number.to_le_bytes());
        }
        file.write_all(&block)?;
    }
    file.flush()?;
    Ok(path)
}

/// What nginx and `netlb-echo` say: which backend answered, and whom it sees.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Answer {
    pub name: String,
    pub backend: SocketAddr,
    pub client: SocketAddr,
}

impl Answer {
    pub fn parse(line: &str) -> Result<Self> {
        let mut words = line.split_whitespace();
        let mut word = || words.next().with_context(|| format!("not an answer of a backend: {line:?}"));
        let name = word()?.to_owned();
        let backend = SocketAddr::new(word()?.parse()?, word()?.parse()?);
        let client = SocketAddr::new(word()?.parse()?, word()?.parse()?);
        Ok(Self { name, backend, client })
    }
}

pub fn redis(pod: &Pod, port: u16) -> Result<Server> {
    let dir = Run::current()?.new_dir("redis")?;
    let port_arg = port.to_string();
    let args =
        ["--bind", "0.0.0.0", "::", "--port", &port_arg, "--protected-mode", "no", "--save", "", "--appendonly", "no"];
    let process = pod.ns.command("redis-server").args(args).arg("--dir").arg(&dir).spawn()?;
    started(pod, process, dir, port, Protocol::Tcp)
}

pub fn iperf3(pod: &Pod, port: u16) -> Result<Server> {
    let dir = Run::current()?.new_dir("iperf3")?;
    let process = pod.ns.command("iperf3").args(["--server", "--forceflush", "--port", &port.to_string()]).spawn()?;
    started(pod, process, dir, port, Protocol::Tcp)
}

/// Waits until an iperf3 listens. It closes its listening socket with each test's end, and opens one anew: who comes in between is refused.
pub fn await_iperf3(server: &Server) -> Result<()> {
    wait_until("iperf3 to listen for the next test", START, || {
        let log = server.log();
        let said = |what| log.matches(what).count();
        Ok((said("Server listening on") > said("Accepted connection from")).then_some(()))
    })
    .with_context(|| server.log())
}

/// A knot that answers the TXT record `who.svc.test` with the pod's name, and A and AAAA of it with the pod's addresses.
pub fn dns(pod: &Pod, port: u16) -> Result<Server> {
    let dir = Run::current()?.new_dir("knot")?;
    let root = dir.display();
    let zone = format!(
        "$ORIGIN svc.test.\n$TTL 60\n@ SOA ns hostmaster 1 3600 600 86400 60\n@ NS ns\nns A {v4}\n\
         who TXT \"{}\"\nwho A {v4}\nwho AAAA {}\n",
        pod.name(),
        pod.ip(Family::V6),
        v4 = pod.ip(Family::V4),
    );
    fs::write(dir.join("svc.test.zone"), zone)?;
    let config = format!(
        "server:\n  rundir: \"{root}\"\n  listen: [ 0.0.0.0@{port}, ::@{port} ]\n  udp-workers: 1\n  tcp-workers: 1\n\
         log:\n- target: stderr\n  any: info\n\
         database:\n  storage: \"{root}\"\n\
         template:\n- id: default\n  storage: \"{root}\"\n  file: \"%s.zone\"\n\
         zone:\n- domain: svc.test\n"
    );
    let file = dir.join("knot.conf");
    fs::write(&file, config)?;
    let process = pod.ns.command("knotd").arg("-c").arg(&file).spawn()?;
    let mut server = started(pod, process, dir, port, Protocol::Udp)?;
    // It listens before the zone is loaded.
    wait_until("knot to load its zone", START, || {
        server.process.check()?;
        Ok(server.log().contains("loaded, serial").then_some(()))
    })
    .with_context(|| server.log())?;
    Ok(server)
}

/// The echo server of this package: answers each datagram (UDP) or line (TCP) with an [`Answer`] followed by what came.
pub fn echo(pod: &Pod, protocol: Protocol, port: u16) -> Result<Server> {
    let dir = Run::current()?.new_dir("echo")?;
    let command = pod.ns.command(sibling_program("netlb-echo")?);
    let mut command = command.args([protocol.name(), &port.to_string(), "--name", pod.name()]);
    for family in Family::BOTH {
        command = command.arg("--listen").arg(pod.ip(family).to_string());
    }
    let process = command.spawn()?;
    started(pod, process, dir, port, protocol)
}

fn started(pod: &Pod, process: Process, dir: PathBuf, port: u16, protocol: Protocol) -> Result<Server> {
    let mut server = Server { process, dir, ips: Family::BOTH.map(|family| pod.ip(family)), port };
    wait_until(&format!("a server on port {port} of pod {}", pod.name()), START, || {
        server.process.check()?;
        Ok(pod.ns.enter(|| listens(protocol, port))??.then_some(()))
    })
    .with_context(|| server.log())?;
    Ok(server)
}

/// Whether the calling thread's namespace has a listener on the port for IPv6, which every server here opens after, or for, IPv4 too.
///
/// Looked up rather than tried: a connection that is closed at once is an event to some servers.
fn listens(protocol: Protocol, port: u16) -> Result<bool> {
    // Of the thread, not of the process, as /proc/net would be.
    let table = format!("/proc/thread-self/net/{}6", protocol.name());
    let text = fs::read_to_string(&table).with_context(|| format!("failed to read {table}"))?;
    // Columns: slot, local address:port in hexadecimal, remote, state. 0A is LISTEN; an unconnected UDP socket is in 07.
    let (port, state) = (format!(":{port:04X}"), if protocol == Protocol::Tcp { "0A" } else { "07" });
    for line in text.lines().skip(1) {
        let columns: Vec<_> = line.split_whitespace().take(4).collect();
        let [_, local, _, its_state] = columns[..] else { bail!("{table}: unexpected line {line:?}") };
        if local.ends_with(&port) && its_state == state {
            return Ok(true);
        }
    }
    Ok(false)
}
