//! Path MTU discovery works through a virtual address: full-sized segments that do not fit the way are answered, not lost.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use netlb_integration::clients;
use netlb_integration::daemon::{Config, Forwarding, Netlb, Service};
use netlb_integration::netns::Namespace;
use netlb_integration::servers;
use netlb_integration::testing::TestResult;
use netlb_integration::topology::{Family, Host, Layout, Plan, Pod, Testbed, vip};

const UPLOAD: usize = 20 << 20;
/// Of an upload that takes a fraction of a second; a lost full-sized segment would be sent again for minutes.
const AT_ONCE: Duration = Duration::from_secs(5);
const VXLAN_MTU: u32 = 1450;

#[test]
fn a_large_upload_through_vxlan_is_told_the_path_mtu_by_netlb() -> TestResult {
    // Pods believe in 1500 bytes: that is what the tunnel does not carry.
    let bed = Plan::new(Layout::Vxlan).pod_mtu(1500).build()?;
    let (client, backend) = (bed.pod(Host::A, "client")?, bed.pod(Host::B, "backend")?);
    for family in Family::BOTH {
        let sent_before = too_big_sent(&bed.node_a().ns, family)?;
        let _netlb = upload_through_a_service(&bed, Forwarding::Fast, &client, &backend, family)?;
        assert_eq!(
            path_mtu(&client.ns, family)?,
            VXLAN_MTU,
            "{family}: what the client knows of the path to the virtual address"
        );
        let by_kernel = too_big_sent(&bed.node_a().ns, family)? - sent_before;
        assert_eq!(by_kernel, 0, "{family}: ICMP errors by the node's kernel, whose stack these packets do not pass");
    }
    Ok(())
}

#[test]
fn a_large_upload_through_vxlan_is_told_the_path_mtu_with_forwarding_by_the_stack() -> TestResult {
    let bed = Plan::new(Layout::Vxlan).pod_mtu(1500).build()?;
    let (client, backend) = (bed.pod(Host::A, "client")?, bed.pod(Host::B, "backend")?);
    for family in Family::BOTH {
        let _netlb = upload_through_a_service(&bed, Forwarding::Stack, &client, &backend, family)?;
        assert_eq!(
            path_mtu(&client.ns, family)?,
            VXLAN_MTU,
            "{family}: what the client knows of the path to the virtual address"
        );
    }
    Ok(())
}

#[test]
fn a_large_download_through_vxlan_arrives_as_it_was() -> TestResult {
    let bed = Plan::new(Layout::Vxlan).pod_mtu(1500).build()?;
    let (client, backend) = (bed.pod(Host::A, "client")?, bed.pod(Host::B, "backend")?);
    let nginx = servers::nginx(&backend, 8080)?;
    let original = servers::nginx_file(&nginx, "data", 20)?;
    let copy = original.with_extension("copy");
    for forwarding in Forwarding::BOTH {
        for family in Family::BOTH {
            let server = SocketAddr::new(vip(family, 10), 80);
            let service = Service::new("web", format!("{server}/tcp"), [nginx.addr(family)]);
            let _netlb = Netlb::start(bed.node_a(), &Config::new(bed.node_a(), forwarding).service(service))?;
            clients::download(&client.ns, server, "data", &copy)?;
            assert_eq!(clients::sha256(&copy)?, clients::sha256(&original)?, "{forwarding}, {family}");
        }
    }
    Ok(())
}

/// Uploads from the client to a service whose backend counts what comes; what takes longer than it should is an error.
fn upload_through_a_service(
    bed: &Testbed,
    forwarding: Forwarding,
    client: &Pod,
    backend: &Pod,
    family: Family,
) -> Result<Netlb> {
    let server = SocketAddr::new(vip(family, 10), 80);
    let sink = SocketAddr::new(backend.ip(family), 9000);
    let service = Service::new("sink", format!("{server}/tcp"), [sink]);
    let netlb = Netlb::start(bed.node_a(), &Config::new(bed.node_a(), forwarding).service(service))?;
    // The socket is the backend's, whichever thread serves it.
    let listener = backend.ns.enter(|| TcpListener::bind(sink))??;
    let outcome = thread::scope(|scope| -> Result<_> {
        let received = scope.spawn(|| count(&listener));
        let sent = client.ns.enter(|| upload(server))?;
        // A sink that nobody reached would wait on: this connection ends it.
        if sent.is_err() {
            let _ = backend.ns.enter(|| TcpStream::connect(sink));
        }
        let received = received.join().unwrap_or_else(|_| bail!("the sink panicked"));
        Ok((sent?, received?))
    });
    let (elapsed, received) =
        outcome.with_context(|| format!("upload of {UPLOAD} bytes, {forwarding}, {family}; {}", netlb.log()))?;
    ensure!(received == UPLOAD, "{forwarding}, {family}: the backend got {received} of {UPLOAD} bytes");
    ensure!(elapsed < AT_ONCE, "{forwarding}, {family}: the upload took {elapsed:?}");
    Ok(netlb)
}

fn upload(server: SocketAddr) -> Result<Duration> {
    let begin = Instant::now();
    let mut stream = TcpStream::connect_timeout(&server, AT_ONCE).context("failed to connect")?;
    stream.set_write_timeout(Some(AT_ONCE))?;
    stream.set_read_timeout(Some(AT_ONCE))?;
    stream.write_all(&vec![b'u'; UPLOAD]).context("the upload stalled")?;
    stream.shutdown(std::net::Shutdown::Write)?;
    // The sink closes when it has all.
    let mut end = Vec::new();
    stream.read_to_end(&mut end).context("the upload did not come to its end")?;
    Ok(begin.elapsed())
}

fn count(listener: &TcpListener) -> Result<usize> {
    let (mut stream, _) = listener.accept()?;
    stream.set_read_timeout(Some(2 * AT_ONCE))?;
    let mut buffer = vec![0; 1 << 16];
    let mut total = 0;
    loop {
        match stream.read(&mut buffer)? {
            0 => return Ok(total),
            length => total += length,
        }
    }
}

/// The MTU that the kernel of a namespace has learned for the virtual address.
fn path_mtu(ns: &Namespace, family: Family) -> Result<u32> {
    let output = ns.command("ip").args(["route", "get", &vip(family, 10).to_string()]).run()?.success()?;
    let mut words = output.stdout.split_whitespace().skip_while(|&word| word != "mtu").skip(1);
    let mtu = words.next().with_context(|| format!("no path MTU was learned: {}", output.stdout.trim()))?;
    Ok(mtu.parse()?)
}

/// How many "fragmentation needed" or "packet too big" messages the kernel of a namespace has sent itself.
fn too_big_sent(ns: &Namespace, family: Family) -> Result<u64> {
    let read = |file: &'static str| ns.enter(move || std::fs::read_to_string(file));
    match family {
        // "fragmentation needed" is a code of type 3, and of those the kernel counts the type alone. Absent while it is 0.
        Family::V4 => {
            let text = read("/proc/thread-self/net/snmp")??;
            let lines: Vec<_> = text.lines().filter_map(|line| line.strip_prefix("IcmpMsg: ")).collect();
            let [names, values] = lines[..] else { return Ok(0) };
            let column = names.split(' ').position(|name| name == "OutType3");
            column
                .map_or(Ok(0), |column| Ok(values.split(' ').nth(column).context("a value for each name")?.parse()?))
        }
        Family::V6 => {
            let text = read("/proc/thread-self/net/snmp6")??;
            let value =
                text.lines().find_map(|line| line.strip_prefix("Icmp6OutPktTooBigs")).context("a counter of snmp6")?;
            Ok(value.trim().parse()?)
        }
    }
}
