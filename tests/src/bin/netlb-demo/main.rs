//! A service whose backends are drained, added and removed while a load runs, on a testbed of network namespaces.

mod phases;
mod view;

use std::io::{self, Write};
use std::net::{IpAddr, SocketAddr};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Parser;
use netlb_integration::clients::url_host;
use netlb_integration::daemon::{Config, Forwarding, Netlb};
use netlb_integration::exec::sibling_program;
use netlb_integration::load::{Load, Tally};
use netlb_integration::run::Run;
use netlb_integration::servers::{self, Server};
use netlb_integration::topology::{Family, Host, Layout, Plan, Pod, Testbed, vip};
use netlb_integration::{guardian, sweep};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

use crate::phases::{Change, PHASES, Phase, Totals, end_of};
use crate::view::{Shown, View};

const SERVICE: &str = "web";
const SERVICE_PORT: u16 = 80;
const BACKEND_PORT: u16 = 8080;
const FIRST_BACKENDS: usize = 3;
const WORKERS: u32 = 4;
/// As shells report a program ended by SIGINT.
const INTERRUPTED_STATUS: u8 = 130;

/// Show netlb at work: a client, a service and its backends, while backends come and go
///
/// Builds a testbed of network namespaces with real nginx servers, adds a service through the CLI, and puts a load on it in which every
/// request opens a new connection. Needs root. Ends with status 1 if a request failed.
#[derive(Debug, Parser)]
struct Args {
    /// How long the load runs, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 20, value_parser = clap::value_parser!(u32).range(2..))]
    duration: u32,
    /// Requests a second; 0 is as many as there can be
    #[arg(long, default_value_t = 2000)]
    rate: u32,
    /// Use IPv6
    #[arg(long)]
    ipv6: bool,
    /// Leave the testbed up afterwards, and tell how to play with it
    #[arg(long)]
    keep: bool,
    /// Print the totals as one JSON object; all else goes to standard error
    #[arg(long)]
    json: bool,
}

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

fn main() -> Result<ExitCode> {
    if guardian::serve_if_asked()? {
        return Ok(ExitCode::SUCCESS);
    }
    let args = Args::parse();
    if !nix::unistd::geteuid().is_root() {
        bail!("the demo makes network namespaces and loads programs into the kernel: run it as root");
    }
    catch_signals()?;
    let run = Run::current()?;
    if args.keep {
        run.keep()?;
    }
    let outcome = Demo::set_up(&args).and_then(|demo| demo.run(&args));
    let kept = args.keep && outcome.is_ok() && !interrupted();
    if !kept {
        sweep::remove(run.id())?;
    }
    outcome
}

struct Demo {
    family: Family,
    // Dropped in this order: the daemon before its node, servers before their pods.
    netlb: Netlb,
    servers: Vec<Server>,
    pods: Vec<Pod>,
    client: Pod,
    bed: Testbed,
    shown: Vec<Shown>,
    view: View,
}

impl Demo {
    fn set_up(args: &Args) -> Result<Self> {
        let family = if args.ipv6 { Family::V6 } else { Family::V4 };
        let mut view = View::new(args.json);
        view.line("setting up a node, a client pod and three backend pods with nginx")?;
        let bed = Plan::new(Layout::Ptp).build()?;
        let client = bed.pod(Host::A, "client")?;
        // Every request takes a port of its own.
        client.ns.sysctl("net/ipv4/ip_local_port_range", "1024 65535")?;
        let netlb = Netlb::start(bed.node_a(), &Config::new(bed.node_a(), Forwarding::Fast))?;
        let mut demo =
            Self { family, netlb, servers: Vec::new(), pods: Vec::new(), client, bed, shown: Vec::new(), view };
        for _ in 0..FIRST_BACKENDS {
            demo.new_backend()?;
        }
        let mut command =
            vec!["svc".to_owned(), "add".to_owned(), demo.frontend(), "--name".to_owned(), SERVICE.to_owned()];
        for shown in &mut demo.shown {
            shown.state = "active";
            command.extend(["--backend".to_owned(), shown.addr.to_string()]);
        }
        demo.netlb.must(&command)?;
        demo.view.line(&format!("netlb {}", command.join(" ")))?;
        Ok(demo)
    }

    fn run(mut self, args: &Args) -> Result<ExitCode> {
        let duration = Duration::from_secs(args.duration.into());
        self.view.line(&format!("load: {WORKERS} clients, a new connection for every request, {duration:?}\n"))?;
        let load = Load::start(&self.client.ns, self.vip(), WORKERS, args.rate);
        let begin = Instant::now();
        for (phase, Phase { changes, .. }) in PHASES.iter().enumerate() {
            if interrupted() {
                break;
            }
            if phase > 0 {
                // Requests begun while the changes are made count by themselves: they may go by the old set or the new one.
                load.next_phase();
                for &change in *changes {
                    self.make(change)?;
                }
                load.next_phase();
            }
            self.view.begin_phase(phase)?;
            // A pod takes a moment to make, which is not to shorten the phase that wants it.
            let next = PHASES.get(phase + 1).map_or(&[][..], |next| next.changes);
            if next.iter().any(|change| matches!(change, Change::Add(_))) {
                self.new_backend()?;
            }
            self.watch(&load, begin, phase, end_of(phase, duration))?;
        }
        let totals = Totals::of(&load.stop());
        self.view.summary(&self.shown, &totals)?;
        if args.keep && !interrupted() {
            self.view.line(&self.how_to_play()?)?;
        }
        if args.json {
            self.print_json(&totals.all)?;
        }
        if interrupted() {
            return Ok(ExitCode::from(INTERRUPTED_STATUS));
        }
        if args.keep {
            // Without the guards' work the testbed stays.
            std::mem::forget(self);
        }
        Ok(if totals.all.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }

    /// Shows the load until `end`, counted from `begin`.
    fn watch(&mut self, load: &Load, begin: Instant, phase: usize, end: Duration) -> Result<()> {
        while begin.elapsed() < end && !interrupted() {
            thread::sleep(self.view.interval().min(end.saturating_sub(begin.elapsed())));
            self.view.draw(begin.elapsed(), phase, &self.shown, &load.total())?;
        }
        Ok(())
    }

    fn make(&mut self, change: Change) -> Result<()> {
        let (Change::Add(index) | Change::Drain(index) | Change::Activate(index) | Change::Remove(index)) = change;
        let shown = self.shown.get_mut(index).with_context(|| format!("there is no backend {index} to {change:?}"))?;
        match change {
            Change::Add(_) => self.netlb.add_backend(SERVICE, shown.addr)?,
            Change::Drain(_) => self.netlb.drain_backend(SERVICE, shown.addr)?,
            Change::Activate(_) => self.netlb.activate_backend(SERVICE, shown.addr)?,
            Change::Remove(_) => self.netlb.remove_backend(SERVICE, shown.addr)?,
        }
        shown.state = match change {
            Change::Add(_) | Change::Activate(_) => "active",
            Change::Drain(_) => "draining",
            Change::Remove(_) => "removed",
        };
        Ok(())
    }

    /// Makes a pod with an nginx that no service has as a backend yet.
    fn new_backend(&mut self) -> Result<()> {
        let pod = self.bed.pod(Host::A, &format!("backend-{}", self.pods.len() + 1))?;
        let server = servers::nginx(&pod, BACKEND_PORT)?;
        self.shown.push(Shown { addr: server.addr(self.family), state: "new" });
        self.servers.push(server);
        self.pods.push(pod);
        Ok(())
    }

    fn vip(&self) -> SocketAddr {
        SocketAddr::new(vip(self.family, 10), SERVICE_PORT)
    }

    fn frontend(&self) -> String {
        format!("{}/tcp", self.vip())
    }

    fn print_json(&self, all: &Tally) -> Result<()> {
        let backends: Vec<_> = self
            .shown
            .iter()
            .map(|shown| serde_json::json!({ "backend": shown.addr.to_string(), "requests": all.of(shown.addr) }))
            .collect();
        let backends = serde_json::Value::from(backends);
        let Tally { requests, failed, .. } = all;
        writeln!(io::stdout().lock(), "{{\"requests\":{requests},\"failed\":{failed},\"backends\":{backends}}}")?;
        Ok(())
    }

    fn how_to_play(&self) -> Result<String> {
        let run = Run::current()?.id();
        let (client, node) = (self.client.ns.name(), self.bed.node_a().ns.name());
        let netlb = format!("{} --socket {}", self.netlb.program().display(), self.netlb.socket().display());
        let ip: IpAddr = self.vip().ip();
        let sweep = sibling_program("netlb-sweep").map(|program| program.display().to_string());
        let sweep = sweep.unwrap_or_else(|_| "cargo run -p netlb-integration --bin netlb-sweep --".to_owned());
        let drained = self.shown.iter().find(|shown| shown.state == "draining");
        Ok(format!(
            "\nThe testbed stays up.\n  \
             ask the service      nsenter --net=/run/netns/{client} curl http://{host}/\n  \
             put a load on it     nsenter --net=/run/netns/{client} wrk -c 16 -t 2 -d 5 -H 'Connection: close' http://{host}/\n  \
             look at the node     nsenter --net=/run/netns/{node} ip address\n  \
             ask the daemon       {netlb} svc show {SERVICE}\n  \
             take a backend back  {netlb} backend ready {SERVICE} {drained}\n  \
             see the flows        {netlb} flows list\n  \
             remove it all        {sweep} --kept {run}",
            host = url_host(ip),
            drained = drained.map_or_else(String::new, |shown| shown.addr.to_string()),
        ))
    }
}

fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

/// The first Ctrl-C ends the demo in order, the second at once: the guardian cleans up then.
fn catch_signals() -> Result<()> {
    extern "C" fn interrupt(_: libc::c_int) {
        INTERRUPTED.store(true, Ordering::Relaxed);
    }
    let action =
        SigAction::new(SigHandler::Handler(interrupt), SaFlags::SA_RESETHAND | SaFlags::SA_RESTART, SigSet::empty());
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        // SAFETY: the handler does nothing but store to an atomic.
        unsafe { sigaction(signal, &action) }?;
    }
    Ok(())
}
