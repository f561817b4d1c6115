//! The real netlb daemon on a node of a testbed.

use std::env;
use std::fmt::{self, Write as _};
use std::fs;
use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::Mutex;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::mount::{MsFlags, mount};
use nix::sys::signal::Signal;

use crate::exec::{Cmd, Output, Process, wait_until};
use crate::netns::Handle;
use crate::run::Run;
use crate::topology::Node;

const BPFFS: &str = "/sys/fs/bpf";
/// Enough for a hundred thousand services.
const START: Duration = Duration::from_secs(60);
const END: Duration = Duration::from_secs(10);

/// How translated packets travel on.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Forwarding {
    /// Redirected to the pod or uplink, past the kernel's stack.
    #[default]
    Fast,
    /// Routed by the kernel.
    Stack,
}

impl Forwarding {
    pub const BOTH: [Self; 2] = [Self::Fast, Self::Stack];
}

impl fmt::Display for Forwarding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Fast => "fast",
            Self::Stack => "stack",
        })
    }
}

/// A backend of a [`Service`].
#[derive(Clone, Debug)]
pub struct Backend {
    address: String,
    /// Lines of its table, but for the address.
    keys: Vec<String>,
}

impl Backend {
    /// At `ADDRESS:PORT`, or for a service that publishes a port at `ADDRESS`.
    pub fn new(address: impl fmt::Display) -> Self {
        Self { address: address.to_string(), keys: Vec::new() }
    }

    fn key(mut self, name: &str, value: impl fmt::Debug) -> Self {
        self.keys.push(format!("{name} = {value:?}"));
        self
    }

    pub fn weight(self, weight: u32) -> Self {
        self.key("weight", weight)
    }

    /// Keeps its flows and gets no new ones.
    pub fn draining(self) -> Self {
        self.key("state", "draining")
    }

    pub fn ready(self, ready: bool) -> Self {
        self.key("ready", ready)
    }

    pub fn serving(self, serving: bool) -> Self {
        self.key("serving", serving)
    }

    pub fn terminating(self, terminating: bool) -> Self {
        self.key("terminating", terminating)
    }

    /// The name of the node it is on.
    pub fn node(self, node: &str) -> Self {
        self.key("node", node)
    }

    pub fn zone(self, zone: &str) -> Self {
        self.key("zone", zone)
    }

    /// The nodes whose clients it is meant for.
    pub fn hint_nodes(self, nodes: &[&str]) -> Self {
        self.key("hints.nodes", nodes)
    }

    /// The zones whose clients it is meant for.
    pub fn hint_zones(self, zones: &[&str]) -> Self {
        self.key("hints.zones", zones)
    }

    fn to_toml(&self) -> String {
        let Self { address, keys } = self;
        if keys.is_empty() {
            return format!("\"{address}\"");
        }
        format!("{{ address = \"{address}\", {} }}", keys.join(", "))
    }
}

/// A service of the configuration file.
#[derive(Clone, Debug)]
pub struct Service {
    name: String,
    frontends: Vec<String>,
    external_ips: Vec<String>,
    load_balancer_ips: Vec<String>,
    node_ports: Vec<String>,
    publish: Vec<String>,
    source_ranges: Vec<String>,
    backends: Vec<Backend>,
    /// Keys with one word as their value.
    words: Vec<(&'static str, String)>,
}

impl Service {
    /// A service with a frontend such as `10.96.0.10:80/tcp`.
    pub fn new(name: &str, frontend: impl fmt::Display, backends: impl IntoIterator<Item = SocketAddr>) -> Self {
        Self::without_frontend(name, backends).frontend(frontend)
    }

    /// A service that is to be reached in another way.
    pub fn without_frontend(name: &str, backends: impl IntoIterator<Item = SocketAddr>) -> Self {
        Self {
            name: name.to_owned(),
            frontends: Vec::new(),
            external_ips: Vec::new(),
            load_balancer_ips: Vec::new(),
            node_ports: Vec::new(),
            publish: Vec::new(),
            source_ranges: Vec::new(),
            backends: backends.into_iter().map(Backend::new).collect(),
            words: Vec::new(),
        }
    }

    pub fn frontend(mut self, frontend: impl fmt::Display) -> Self {
        self.frontends.push(frontend.to_string());
        self
    }

    /// An address, or `ADDRESS:PORT/PROTOCOL`.
    pub fn external_ip(mut self, address: impl fmt::Display) -> Self {
        self.external_ips.push(address.to_string());
        self
    }

    /// An address, or `ADDRESS:PORT/PROTOCOL`.
    pub fn lb_ip(mut self, address: impl fmt::Display) -> Self {
        self.load_balancer_ips.push(address.to_string());
        self
    }

    /// `PORT` or `PORT/PROTOCOL`.
    pub fn node_port(mut self, port: impl fmt::Display) -> Self {
        self.node_ports.push(port.to_string());
        self
    }

    /// `[ADDRESS:]PORT:TARGET[/PROTOCOL]`.
    pub fn publish(mut self, port: impl fmt::Display) -> Self {
        self.publish.push(port.to_string());
        self
    }

    /// A network, or an address.
    pub fn source_range(mut self, range: impl fmt::Display) -> Self {
        self.source_ranges.push(range.to_string());
        self
    }

    pub fn backend(mut self, backend: Backend) -> Self {
        self.backends.push(backend);
        self
    }

    pub fn weighted(self, backend: SocketAddr, weight: u32) -> Self {
        self.backend(Backend::new(backend).weight(weight))
    }

    /// A backend on the node with this name.
    pub fn backend_on(self, backend: SocketAddr, node: &str) -> Self {
        self.backend(Backend::new(backend).node(node))
    }

    fn word(mut self, key: &'static str, word: impl fmt::Display) -> Self {
        self.words.push((key, word.to_string()));
        self
    }

    pub fn algorithm(self, algorithm: &'static str) -> Self {
        self.word("algorithm", algorithm)
    }

    /// `auto`, `always` or `never`.
    pub fn snat(self, mode: &str) -> Self {
        self.word("snat", mode)
    }

    /// `nat` or `dsr`.
    pub fn mode(self, mode: &str) -> Self {
        self.word("mode", mode)
    }

    /// `none`, `client-ip` or `client-ip:SECONDS`.
    pub fn affinity(self, affinity: impl fmt::Display) -> Self {
        self.word("affinity", affinity)
    }

    /// `cluster` or `local`.
    pub fn external_traffic_policy(self, policy: &str) -> Self {
        self.word("external_traffic_policy", policy)
    }

    /// `cluster` or `local`.
    pub fn internal_traffic_policy(self, policy: &str) -> Self {
        self.word("internal_traffic_policy", policy)
    }

    fn to_toml(&self) -> String {
        let Self { name, backends, words, .. } = self;
        let backends: Vec<_> = backends.iter().map(Backend::to_toml).collect();
        let mut toml = format!("\n[[service]]\nname = \"{name}\"\nbackends = [{}]\n", backends.join(", "));
        let lists = [
            ("frontends", &self.frontends),
            ("external_ips", &self.external_ips),
            ("load_balancer_ips", &self.load_balancer_ips),
            ("node_ports", &self.node_ports),
            ("publish", &self.publish),
            ("source_ranges", &self.source_ranges),
        ];
        for (key, list) in lists.into_iter().filter(|(_, list)| !list.is_empty()) {
            // Writing to a String cannot fail.
            let _ = writeln!(toml, "{key} = {list:?}");
        }
        for (key, word) in words {
            let _ = writeln!(toml, "{key} = \"{word}\"");
        }
        toml
    }
}

/// A configuration file for a node.
#[derive(Clone, Debug)]
pub struct Config {
    uplinks: Vec<String>,
    pods: &'static str,
    bridges: Vec<&'static str>,
    forwarding: Forwarding,
    xdp: &'static str,
    services: Vec<Service>,
    node: String,
    extra: String,
}

impl Config {
    pub fn new(node: &Node, forwarding: Forwarding) -> Self {
        Self {
            uplinks: node.uplinks().to_vec(),
            pods: "pod-*",
            bridges: Vec::new(),
            forwarding,
            xdp: "off",
            services: Vec::new(),
            node: String::new(),
            extra: String::new(),
        }
    }

    pub fn service(mut self, service: Service) -> Self {
        self.services.push(service);
        self
    }

    /// What the node calls the interfaces of its pods, as a glob.
    pub fn pods(mut self, interfaces: &'static str) -> Self {
        self.pods = interfaces;
        self
    }

    /// A bridge whose ports are pods' interfaces.
    pub fn bridge(mut self, name: &'static str) -> Self {
        self.bridges.push(name);
        self
    }

    /// Where XDP runs on uplinks.
    pub fn xdp(mut self, mode: &'static str) -> Self {
        self.xdp = mode;
        self
    }

    /// A line of the table `[node]`.
    pub fn node(mut self, line: &str) -> Self {
        self.node.push_str(line);
        self.node.push('\n');
        self
    }

    /// Lines of TOML to be added as they are, such as a table of their own.
    pub fn extra(mut self, toml: &str) -> Self {
        self.extra.push_str(toml);
        self
    }

    pub fn to_toml(&self) -> String {
        let mut toml = format!(
            "[node]\npod_interfaces = [{:?}]\nbridges = {:?}\nuplinks = {:?}\nforwarding = \"{}\"\nxdp = \"{}\"\n{}",
            self.pods, self.bridges, self.uplinks, self.forwarding, self.xdp, self.node
        );
        toml.extend(self.services.iter().map(Service::to_toml));
        toml + &self.extra
    }
}

/// A running daemon. On drop it is asked to end, and `netlb cleanup` removes what it left on purpose; when that happens because a test
/// panics, its log is shown.
#[derive(Debug)]
pub struct Netlb {
    program: PathBuf,
    ns: Handle,
    process: Mutex<Process>,
    config: PathBuf,
    socket: PathBuf,
    state_dir: PathBuf,
    bpffs: PathBuf,
}

impl Netlb {
    /// Starts the daemon in the node's namespace and waits until it says that it is ready.
    pub fn start(node: &Node, config: &Config) -> Result<Self> {
        mount_bpffs()?;
        let run = Run::current()?;
        let dir = run.new_dir("netlb")?;
        let bpffs = Path::new(BPFFS).join(format!("{}-{}", run.id(), run.next_number()));
        let file = dir.join("netlb.toml");
        fs::write(&file, config.to_toml())?;
        let (socket, state_dir) = (dir.join("netlb.sock"), dir.join("state"));
        let program = program()?;
        let process = run_command(node, &program, &file, &socket, &state_dir, &bpffs).spawn()?;
        let netlb = Self {
            program,
            ns: node.ns.handle(),
            process: Mutex::new(process),
            config: file,
            socket,
            state_dir,
            bpffs,
        };
        netlb.wait_ready().with_context(|| format!("the daemon's log:\n{}", netlb.log()))?;
        Ok(netlb)
    }

    /// Runs `netlb --socket SOCKET ARGS…`. An exit status other than 0 is a result, not an error.
    pub fn cli<S: AsRef<std::ffi::OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Result<Output> {
        Cmd::new(&self.program).handle(&self.ns).arg("--socket").arg(&self.socket).args(args).run()
    }

    /// As [`cli`](Self::cli), for what must succeed.
    pub fn must<S: AsRef<std::ffi::OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Result<String> {
        Ok(self.cli(args)?.success()?.stdout)
    }

    /// The `items` of a command's JSON output.
    pub fn items<S: AsRef<std::ffi::OsStr>>(
        &self,
        args: impl IntoIterator<Item = S>,
    ) -> Result<Vec<serde_json::Value>> {
        let args: Vec<_> =
            args.into_iter().map(|arg| arg.as_ref().to_owned()).chain(["-o".into(), "json".into()]).collect();
        let output = self.must(args)?;
        let mut envelope: serde_json::Value =
            serde_json::from_str(&output).with_context(|| format!("no JSON: {output:?}"))?;
        match envelope["items"].take() {
            serde_json::Value::Array(items) => Ok(items),
            _ => bail!("no items in {output:?}"),
        }
    }

    pub fn add_service(
        &self,
        name: &str,
        frontend: &str,
        backends: impl IntoIterator<Item = SocketAddr>,
    ) -> Result<()> {
        let backends = backends.into_iter().flat_map(|backend| ["--backend".to_owned(), backend.to_string()]);
        let fixed = ["svc", "add", frontend, "--name", name].map(str::to_owned);
        self.must(fixed.into_iter().chain(backends)).map(drop)
    }

    pub fn add_backend(&self, service: &str, backend: SocketAddr) -> Result<()> {
        self.must(["backend", "add", service, &backend.to_string()]).map(drop)
    }

    /// Lets a backend keep its flows and get no new ones.
    pub fn drain_backend(&self, service: &str, backend: SocketAddr) -> Result<()> {
        self.must(["backend", "drain", service, &backend.to_string()]).map(drop)
    }

    /// Takes a drain back.
    pub fn activate_backend(&self, service: &str, backend: SocketAddr) -> Result<()> {
        self.must(["backend", "ready", service, &backend.to_string()]).map(drop)
    }

    pub fn remove_backend(&self, service: &str, backend: SocketAddr) -> Result<()> {
        self.must(["backend", "rm", service, &backend.to_string()]).map(drop)
    }

    /// What `netlb status` says of a counter.
    pub fn counter(&self, name: &str) -> Result<u64> {
        let status: serde_json::Value = serde_json::from_str(&self.must(["status", "-o", "json"])?)?;
        let counters = find(&status, "counters").context("no counters in the status")?;
        let value = counters.as_array().into_iter().flatten().find(|counter| counter["name"] == name);
        Ok(value.and_then(|counter| counter["value"].as_u64()).unwrap_or(0))
    }

    pub fn socket(&self) -> &Path {
        &self.socket
    }

    pub fn config(&self) -> &Path {
        &self.config
    }

    /// The daemon's process.
    pub fn pid(&self) -> u32 {
        self.process.lock().unwrap_or_else(std::sync::PoisonError::into_inner).id()
    }

    pub fn bpffs(&self) -> &Path {
        &self.bpffs
    }

    pub fn program(&self) -> &Path {
        &self.program
    }

    /// What the daemon wrote to its standard outputs.
    pub fn log(&self) -> String {
        self.process.lock().map_or_else(|_| String::new(), |process| process.log())
    }

    /// Ends the daemon with SIGTERM; the data plane stays, as it does between two versions of the daemon.
    pub fn stop(&self) -> Result<ExitStatus> {
        self.process.lock().unwrap_or_else(std::sync::PoisonError::into_inner).terminate(END)
    }

    /// Ends the daemon as a crash does.
    pub fn kill(&self) -> Result<()> {
        self.process.lock().unwrap_or_else(std::sync::PoisonError::into_inner).kill()
    }

    /// Writes another configuration file in place of the one there is.
    pub fn configure(&self, config: &Config) -> Result<()> {
        Ok(fs::write(&self.config, config.to_toml())?)
    }

    /// Starts the daemon again, after [`stop`](Self::stop) or [`kill`](Self::kill), on the same paths.
    pub fn restart(&self, node: &Node) -> Result<()> {
        self.begin_restart(node)?;
        self.wait_ready()
    }

    /// The same, with a signal to the daemon while its programs are verified.
    pub fn restart_with(&self, node: &Node, signal: Signal) -> Result<()> {
        self.begin_restart(node)?;
        wait_until("programs to be verified", START, || {
            let threads = fs::read_dir(format!("/proc/{}/task", self.pid()))?.filter_map(Result::ok);
            let mut names = threads.filter_map(|thread| fs::read_to_string(thread.path().join("comm")).ok());
            Ok(names.any(|name| name.trim() == "verification").then_some(()))
        })?;
        self.process.lock().unwrap_or_else(std::sync::PoisonError::into_inner).signal(signal)?;
        self.wait_ready()
    }

    fn begin_restart(&self, node: &Node) -> Result<()> {
        let process =
            run_command(node, &self.program, &self.config, &self.socket, &self.state_dir, &self.bpffs).spawn()?;
        *self.process.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = process;
        Ok(())
    }

    /// Removes what the daemon leaves behind for its successor.
    pub fn cleanup(&self) -> Result<Output> {
        let command = Cmd::new(&self.program).handle(&self.ns).arg("cleanup").arg("--socket").arg(&self.socket);
        command.arg("--bpffs").arg(&self.bpffs).arg("--state-dir").arg(&self.state_dir).arg("--yes").run()
    }

    fn wait_ready(&self) -> Result<()> {
        wait_until("netlb to be ready", START, || {
            self.process.lock().unwrap_or_else(std::sync::PoisonError::into_inner).check()?;
            // Cheaper to ask than by a program, whose turns would take from the daemon's time.
            if UnixStream::connect(&self.socket).is_err() {
                return Ok(None);
            }
            let status = self.cli(["status", "-o", "json"])?;
            Ok(status.status.success().then_some(()))
        })
    }
}

impl Drop for Netlb {
    fn drop(&mut self) {
        let ended = self.stop();
        let cleaned = self.cleanup().and_then(Output::success);
        if thread::panicking() {
            let mut stderr = io::stderr().lock();
            let _ = writeln!(stderr, "--- netlb's log\n{}--- ended: {ended:?}", self.log());
        }
        if let Err(error) = cleaned {
            let _ = writeln!(io::stderr().lock(), "netlb cleanup failed: {error:#}");
        }
    }
}

fn run_command(node: &Node, program: &Path, config: &Path, socket: &Path, state_dir: &Path, bpffs: &Path) -> Cmd {
    let command = node.ns.command(program).arg("run").arg("--config").arg(config).arg("--socket").arg(socket);
    command.arg("--state-dir").arg(state_dir).arg("--bpffs").arg(bpffs)
}

/// The value of a key, wherever it stands.
fn find<'a>(value: &'a serde_json::Value, key: &str) -> Option<&'a serde_json::Value> {
    match value {
        serde_json::Value::Object(map) => map.get(key).or_else(|| map.values().find_map(|value| find(value, key))),
        serde_json::Value::Array(values) => values.iter().find_map(|value| find(value, key)),
        _ => None,
    }
}

/// `NETLB_BIN`, else the release build in the target directory that the running program is in, else the debug build there.
fn program() -> Result<PathBuf> {
    if let Some(program) = env::var_os("NETLB_BIN") {
        return fs::canonicalize(&program).with_context(|| format!("NETLB_BIN is {}", program.display()));
    }
    let this = env::current_exe()?;
    let profiles = ["release", "debug"];
    let target =
        this.ancestors().find(|dir| profiles.iter().any(|profile| dir.ends_with(profile))).and_then(Path::parent);
    let target = target.with_context(|| format!("{} is in no target directory; set NETLB_BIN", this.display()))?;
    profiles.iter().map(|profile| target.join(profile).join("netlb")).find(|program| program.is_file()).with_context(
        || {
            format!(
                "no netlb in {}: build it with `cargo build --release -p netlb`, or set NETLB_BIN",
                target.display()
            )
        },
    )
}

fn mount_bpffs() -> Result<()> {
    static MOUNTING: Mutex<()> = Mutex::new(());
    let _one_at_a_time = MOUNTING.lock();
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    if mounts.lines().any(|line| line.split(' ').nth(1) == Some(BPFFS) && line.split(' ').nth(2) == Some("bpf")) {
        return Ok(());
    }
    mount(Some("bpf"), BPFFS, Some("bpf"), MsFlags::empty(), None::<&str>).context("failed to mount bpffs")
}

#[cfg(test)]
mod tests {
    use netlb::config;

    use super::{Backend, Service};

    #[test]
    fn what_a_service_is_given_is_what_the_daemon_reads() {
        let service = Service::new("web", "10.96.0.10:80/tcp", ["10.244.0.1:80".parse().unwrap()])
            .external_ip("192.0.2.1")
            .lb_ip("203.0.113.1:80/tcp")
            .source_range("198.51.100.0/24")
            .node_port(30080)
            .publish("8080:80")
            .weighted("10.244.0.2:80".parse().unwrap(), 3)
            .backend_on("10.244.0.3:80".parse().unwrap(), "here")
            .backend(Backend::new("10.244.0.4").ready(false).serving(true).terminating(true).draining())
            .backend(Backend::new("10.244.0.5").zone("z").hint_nodes(&["here"]).hint_zones(&["z"]))
            .algorithm("random")
            .snat("always")
            .affinity("client-ip:60")
            .external_traffic_policy("local")
            .internal_traffic_policy("local");
        let services = config::parse_services("test", &service.to_toml()).unwrap();
        let definition = services[0].definition();
        assert_eq!(services[0].claims().count(), 5);
        assert_eq!(definition.source_ranges.len(), 1);
        assert_eq!(definition.affinity.to_string(), "client-ip:60");
        let backends = &definition.backends;
        assert_eq!((backends[1].weight.get(), backends[2].is_on("here")), (3, true));
        assert!(!backends[3].conditions.ready && backends[3].conditions.serving);
        assert_eq!(backends[4].placement.as_ref().unwrap().hint_zones, ["z"]);
    }
}
