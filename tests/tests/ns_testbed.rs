//! The testbed itself: its networks carry traffic without netlb, and nothing of it outlives its run.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use netlb_integration::clients;
use netlb_integration::exec::{sibling_program, wait_until};
use netlb_integration::load::Load;
use netlb_integration::netns::Namespace;
use netlb_integration::run::{RUNS, RunId};
use netlb_integration::servers::{self, Answer, Protocol};
use netlb_integration::testing::TestResult;
use netlb_integration::topology::{Family, Host, Layout, Plan, Testbed};

const SOON: Duration = Duration::from_secs(10);

/// Asks the echo server at `server`, first by TCP, then by UDP.
fn ask(ns: &Namespace, server: SocketAddr, protocol: Protocol) -> Result<Answer> {
    let mut answer = vec![0; 2048];
    let length = ns.enter(|| match protocol {
        Protocol::Tcp => {
            let mut stream = TcpStream::connect_timeout(&server, Duration::from_secs(2))?;
            stream.set_read_timeout(Some(Duration::from_secs(2)))?;
            stream.write_all(b"hello\n")?;
            let mut line = Vec::new();
            let length = BufReader::new(stream).read_until(b'\n', &mut line)?;
            answer[..length].copy_from_slice(&line);
            Ok::<_, anyhow::Error>(length)
        }
        Protocol::Udp => {
            let socket = UdpSocket::bind(if server.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })?;
            socket.set_read_timeout(Some(Duration::from_secs(2)))?;
            socket.send_to(b"hello", server)?;
            Ok(socket.recv(&mut answer)?)
        }
    })??;
    let answer = String::from_utf8_lossy(&answer[..length]).into_owned();
    ensure!(answer.ends_with(" hello\n"), "the echo lacks what was sent: {answer:?}");
    Answer::parse(&answer)
}

fn pods_reach_each_other(bed: &Testbed) -> Result<()> {
    let client = bed.pod(Host::A, "client")?;
    let backend = bed.pod(bed.far_host(), "backend")?;
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        let echo = servers::echo(&backend, protocol, 7000)?;
        for family in Family::BOTH {
            let answer = ask(&client.ns, echo.addr(family), protocol)
                .with_context(|| format!("{protocol:?} over {family} with layout {:?}", bed.layout()))?;
            assert_eq!((answer.name.as_str(), answer.backend), ("backend", echo.addr(family)));
            assert_eq!(answer.client.ip(), client.ip(family), "the backend sees the client's own address");
        }
    }
    Ok(())
}

#[test]
fn pods_on_routed_veths_reach_each_other() -> TestResult {
    Ok(pods_reach_each_other(&Plan::new(Layout::Ptp).build()?)?)
}

#[test]
fn pods_on_a_bridge_reach_each_other() -> TestResult {
    Ok(pods_reach_each_other(&Plan::new(Layout::Bridge).build()?)?)
}

#[test]
fn pods_on_two_routed_hosts_reach_each_other() -> TestResult {
    Ok(pods_reach_each_other(&Plan::new(Layout::Routed).build()?)?)
}

#[test]
fn pods_on_two_hosts_reach_each_other_through_vxlan() -> TestResult {
    Ok(pods_reach_each_other(&Plan::new(Layout::Vxlan).pod_mtu(1450).build()?)?)
}

#[test]
fn a_download_through_vxlan_fits_itself_to_the_path_where_the_kernel_routes() -> TestResult {
    let bed = Plan::new(Layout::Vxlan).build()?;
    let (client, backend) = (bed.pod(Host::A, "client")?, bed.pod(Host::B, "backend")?);
    let nginx = servers::nginx(&backend, 8080)?;
    let original = servers::nginx_file(&nginx, "data", 8)?;
    let copy = original.with_extension("copy");
    for family in Family::BOTH {
        clients::download(&client.ns, nginx.addr(family), "data", &copy)?;
        assert_eq!(clients::sha256(&copy)?, clients::sha256(&original)?, "{family}");
    }
    Ok(())
}

#[test]
fn the_outside_client_reaches_pods_and_sees_node_a_as_the_way_to_virtual_addresses() -> TestResult {
    let bed = Plan::new(Layout::Routed).with_outside_client().build()?;
    for host in [Host::A, Host::B] {
        let pod = bed.pod(host, "backend")?;
        let echo = servers::echo(&pod, Protocol::Tcp, 7000)?;
        for family in Family::BOTH {
            assert_eq!(ask(bed.outside()?, echo.addr(family), Protocol::Tcp)?.name, "backend", "{host:?}, {family}");
        }
    }
    let route = bed.outside()?.command("ip").args(["route", "get", "10.96.0.10"]).run()?.success()?;
    assert!(route.stdout.contains("via 192.168.50.11"), "{route}");
    Ok(())
}

#[test]
#[ignore = "needs a kernel with CONFIG_VLAN_8021Q"]
fn two_hosts_reach_each_other_over_a_vlan_underlay() -> TestResult {
    Ok(pods_reach_each_other(&Plan::new(Layout::Routed).vlan(50).build()?)?)
}

#[test]
fn the_kernels_settings_of_a_node_are_as_planned() -> TestResult {
    let bed = Plan::new(Layout::Ptp).rp_filter(1).forwarding(false).build()?;
    let pod = bed.pod(Host::A, "one")?;
    let node = bed.node_a();
    let filter = format!("/proc/sys/net/ipv4/conf/{}/rp_filter", pod.interface());
    let files = [filter.as_str(), "/proc/sys/net/ipv4/ip_forward", "/proc/sys/net/ipv6/conf/all/forwarding"];
    let settings = node.ns.enter(|| files.map(fs::read_to_string))?;
    let settings = settings.map(|text| text.map(|text| text.trim().to_owned()).unwrap_or_default());
    assert_eq!(settings, ["1", "0", "0"], "{files:?}");
    Ok(())
}

#[test]
fn every_server_of_the_testbed_answers_its_client() -> TestResult {
    let bed = Plan::new(Layout::Ptp).build()?;
    let (client, backend) = (bed.pod(Host::A, "client")?, bed.pod(Host::A, "backend")?);
    let nginx = servers::nginx(&backend, 8080)?;
    let redis = servers::redis(&backend, 6379)?;
    let dns = servers::dns(&backend, 53)?;
    let iperf3 = servers::iperf3(&backend, 5201)?;
    for family in Family::BOTH {
        let answer = clients::curl(&client.ns, nginx.addr(family))?;
        assert_eq!((answer.name.as_str(), answer.client.ip()), ("backend", client.ip(family)), "nginx, {family}");
        let key = format!("over {family}");
        assert_eq!(clients::redis(&client.ns, redis.addr(family), &["SET", &key, "value"])?, "OK");
        assert_eq!(clients::redis(&client.ns, redis.addr(family), &["GET", &key])?, "value");
        for tcp in [false, true] {
            assert_eq!(clients::dns_who(&client.ns, dns.addr(family), tcp)?, "backend", "knot, {family}, TCP: {tcp}");
        }
        for reverse in [false, true] {
            servers::await_iperf3(&iperf3)?;
            assert!(clients::iperf3(&client.ns, iperf3.addr(family), 1, reverse)?.bytes > 1 << 20, "iperf3, {family}");
        }
        let wrk = clients::Wrk { server: nginx.addr(family), connections: 8, seconds: 1, reconnect: false }
            .run(&client.ns)?;
        assert!(wrk.requests > 100 && wrk.failed() == 0, "{wrk:?}");
    }
    Ok(())
}

#[test]
fn a_load_counts_every_request_in_the_phase_it_began_in() -> TestResult {
    let bed = Plan::new(Layout::Ptp).build()?;
    let (client, backend) = (bed.pod(Host::A, "client")?, bed.pod(Host::A, "backend")?);
    let mut nginx = servers::nginx(&backend, 8080)?;
    let server = nginx.addr(Family::V4);
    let load = Load::start(&client.ns, server, 2, 500);
    wait_until("100 answers", SOON, || Ok((load.total().of(server) >= 100).then_some(())))?;
    load.next_phase();
    // Whatever began before this phase has its answer by then.
    let answers = load.total().of(server);
    wait_until("50 more answers", SOON, || Ok((load.total().of(server) >= answers + 50).then_some(())))?;
    nginx.kill()?;
    load.next_phase();
    wait_until("100 failures", SOON, || Ok((load.total().failed >= 100).then_some(())))?;
    let [before, during, after] = &load.stop()[..] else { panic!("three phases") };
    assert_eq!((before.failed, before.of(server)), (0, before.requests), "{:?}", before.failures);
    assert_eq!(during.failed + during.of(server), during.requests);
    assert_eq!((after.of(server), after.failed), (0, after.requests));
    Ok(())
}

/// A demo that holds a testbed of its own, in a process that a test can kill.
struct OtherRun {
    child: Child,
    id: RunId,
}

impl OtherRun {
    /// Starts this test binary again, for the one test that builds a testbed and waits.
    fn start() -> Result<Self> {
        let mut command = Command::new(fs::canonicalize("/proc/self/exe")?);
        command.args(["--exact", "hold_a_testbed", "--ignored", "--nocapture", "--test-threads=1"]);
        let child =
            command.env(HOLD, "1").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
        let id = RunId::of(child.id());
        let mut other = Self { child, id };
        let stdout = other.child.stdout.take().context("stdout is piped")?;
        let ready = BufReader::new(stdout).lines().map_while(Result::ok).any(|line| line.contains(READY));
        ensure!(ready, "the other run built no testbed");
        Ok(other)
    }

    fn traces(&self) -> Result<Vec<PathBuf>> {
        let mut traces = Vec::new();
        for dir in ["/run/netns", RUNS, "/sys/fs/bpf"] {
            if Path::new(dir).exists() {
                for entry in fs::read_dir(dir)? {
                    let entry = entry?;
                    if entry.file_name().to_str().and_then(RunId::from_name) == Some(self.id) {
                        traces.push(entry.path());
                    }
                }
            }
        }
        for entry in fs::read_dir("/proc")? {
            let path = entry?.path();
            let command = fs::read(path.join("cmdline")).unwrap_or_default();
            let environment = fs::read(path.join("environ")).unwrap_or_default();
            let marked =
                environment.split(|&byte| byte == 0).any(|variable| variable == format!("{HOLD}=1").as_bytes());
            if marked && !command.is_empty() {
                traces.push(path);
            }
        }
        Ok(traces)
    }
}

impl Drop for OtherRun {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const HOLD: &str = "NETLB_TEST_HOLD";
const READY: &str = "the testbed stands";

/// Not a test: what [`OtherRun`] runs.
#[test]
#[ignore = "a helper process of other tests"]
fn hold_a_testbed() -> TestResult {
    if std::env::var_os(HOLD).is_none() {
        return Ok(());
    }
    let bed = Plan::new(Layout::Routed).build()?;
    let pod = bed.pod(Host::B, "backend")?;
    let _server = servers::redis(&pod, 6379)?;
    writeln!(std::io::stdout().lock(), "{READY}")?;
    // Until the test that started it kills it or drops the pipe.
    std::io::stdin().lines().for_each(drop);
    Ok(())
}

/// One at a time: each looks for marked processes of its own run alone.
static ONE_OTHER_RUN: std::sync::Mutex<()> = std::sync::Mutex::new(());

#[test]
fn the_guardian_cleans_up_after_a_run_killed_with_sigkill() -> TestResult {
    let _alone = ONE_OTHER_RUN.lock();
    let mut other = OtherRun::start()?;
    assert!(other.traces()?.len() > 4, "it has namespaces, a directory and processes: {:?}", other.traces());
    other.child.kill()?;
    other.child.wait()?;
    wait_until("the guardian", SOON, || Ok(other.traces()?.is_empty().then_some(())))
        .with_context(|| format!("left: {:?}", other.traces()))?;
    Ok(())
}

#[test]
fn the_sweep_removes_what_a_killed_run_and_its_killed_guardian_left() -> TestResult {
    let _alone = ONE_OTHER_RUN.lock();
    let mut other = OtherRun::start()?;
    kill_guardian_of(&other)?;
    other.child.kill()?;
    other.child.wait()?;
    assert!(!other.traces()?.is_empty(), "with the guardian dead the namespaces stay");
    let output = Command::new(sibling_program("netlb-sweep")?).output()?;
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{output:?}");
    assert!(printed.contains(&format!("removed namespace {}-", other.id)), "{printed}");
    assert_eq!(other.traces()?, Vec::<PathBuf>::new());
    Ok(())
}

#[test]
fn the_sweep_lets_live_runs_be() -> TestResult {
    let _alone = ONE_OTHER_RUN.lock();
    let other = OtherRun::start()?;
    let before = other.traces()?;
    let output = Command::new(sibling_program("netlb-sweep")?).output()?;
    assert!(output.status.success(), "{output:?}");
    assert_eq!(other.traces()?, before);
    Ok(())
}

#[test]
fn a_pid_given_to_another_process_does_not_make_a_dead_run_alive() -> TestResult {
    // The pid of this test's parent lives, but it did not start at tick 1.
    let id = RunId::of(std::os::unix::process::parent_id());
    let dir = id.dir();
    assert!(!dir.exists(), "the test runner is no run itself");
    fs::create_dir_all(&dir)?;
    fs::write(dir.join("start-time"), "1")?;
    let alive = id.is_alive();
    let _ = fs::remove_dir_all(&dir);
    assert!(!alive);
    Ok(())
}

fn kill_guardian_of(other: &OtherRun) -> Result<()> {
    for entry in fs::read_dir("/proc")? {
        let path = entry?.path();
        let is_guardian = fs::read_to_string(path.join("comm")).is_ok_and(|name| name.trim() == "netlb-sweep");
        let status = fs::read_to_string(path.join("status")).unwrap_or_default();
        if is_guardian && status.lines().any(|line| line == format!("PPid:\t{}", other.id.pid())) {
            let pid = path.file_name().and_then(|name| name.to_str()).context("a pid")?;
            let killed = Command::new("kill").args(["-KILL", pid]).status()?;
            ensure!(killed.success(), "kill {pid}: {killed}");
            return Ok(());
        }
    }
    anyhow::bail!("{} has no guardian", other.id)
}
