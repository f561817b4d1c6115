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

/// A service of the configuration file.
#[derive(Clone, Debug)]
pub struct Service {
    name: String,
    frontends: Vec<String>,
    backends: Vec<(SocketAddr, u32)>,
    algorithm: Option<&'static str>,
}

impl Service {
    /// A service with a frontend such as `10.96.0.10:80/tcp`.
    pub fn new(name: &str, frontend: impl fmt::Display, backends: impl IntoIterator<Item = SocketAddr>) -> Self {
        Self {
            name: name.to_owned(),
            frontends: vec![frontend.to_string()],
            backends: backends.into_iter().map(|backend| (backend, 1)).collect(),
            algorithm: None,
        }
    }

    pub fn frontend(mut self, frontend: impl fmt::Display) -> Self {
        self.frontends.push(frontend.to_string());
        self
    }

    pub fn weighted(mut self, backend: SocketAddr, weight: u32) -> Self {
        self.backends.push((backend, weight));
        self
    }

    pub fn algorithm(mut self, algorithm: &'static str) -> Self {
        self.algorithm = Some(algorithm);
        self
    }
}

/// A configuration file for a node.
#[derive(Clone, Debug)]
pub struct Config {
    uplinks: Vec<String>,
    forwarding: Forwarding,
    xdp: &'static str,
    services: Vec<Service>,
    extra: String,
}

impl Config {
    pub fn new(node: &Node, forwarding: Forwarding) -> Self {
        Self { uplinks: node.uplinks().to_vec(), forwarding, xdp: "off", services: Vec::new(), extra: String::new() }
    }

    pub fn service(mut self, service: Service) -> Self {
        self.services.push(service);
        self
    }

    /// Where XDP runs on uplinks.
    pub fn xdp(mut self, mode: &'static str) -> Self {
        self.xdp = mode;
        self
    }

    /// Lines of TOML to be added as they are, such as a table of their own.
    pub fn extra(mut self, toml: &str) -> Self {
        self.extra.push_str(toml);
        self
    }

    pub fn to_toml(&self) -> String {
        let mut toml = format!(
            "[node]\npod_interfaces = [\"pod-*\"]\nuplinks = {:?}\nforwarding = \"{}\"\nxdp = \"{}\"\n",
            self.uplinks, self.forwarding, self.xdp
        );
        for Service { name, frontends, backends, algorithm } in &self.services {
            let backends: Vec<_> = backends
                .iter()
                .map(|(address, weight)| match weight {
                    1 => format!("\"{address}\""),
                    _ => format!("{{ address = \"{address}\", weight = {weight} }}"),
                })
                .collect();
            // Writing to a String cannot fail.
            let _ = write!(
                toml,
                "\n[[service]]\nname = \"{name}\"\nfrontends = {frontends:?}\nbackends = [{}]\n",
                backends.join(", ")
            );
            if let Some(algorithm) = algorithm {
                let _ = writeln!(toml, "algorithm = \"{algorithm}\"");
            }
        }
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

    /// Starts the daemon again, after [`stop`](Self::stop) or [`kill`](Self::kill), on the same paths.
    pub fn restart(&self, node: &Node) -> Result<()> {
        let process =
            run_command(node, &self.program, &self.config, &self.socket, &self.state_dir, &self.bpffs).spawn()?;
        *self.process.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = process;
        self.wait_ready()
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
