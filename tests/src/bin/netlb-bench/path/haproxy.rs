//! HAProxy on the node, which ends the client's connections and makes others to the backends.

use std::fmt::Write as _;
use std::fs;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result};
use netlb_integration::exec::{Process, wait_until};
use netlb_integration::netns::Namespace;
use netlb_integration::run::Run;
use netlb_integration::servers::Protocol;

use super::services::Service;
use super::workload::NICENESS;

/// Starts it with one thread on a core, and waits until it listens: all its sockets are there before the first is served.
pub(crate) fn start(node: &Namespace, services: &[Service], core: usize, limit: Duration) -> Result<Process> {
    // It needs the services' addresses to be the node's own.
    node.ip("route add local 10.96.0.0/12 dev lo\nroute add local fd00:10:96::/47 dev lo\n")?;
    node.sysctl("net/ipv6/ip_nonlocal_bind", "1")?;
    let dir = Run::current()?.new_dir("haproxy")?;
    let file = dir.join("haproxy.cfg");
    fs::write(&file, config(services, core))?;
    let last = services
        .iter()
        .rfind(|service| service.protocol == Protocol::Tcp && service.frontend.is_ipv4())
        .context("no service of TCP")?
        .frontend;
    let nice = node.command("nice").args(["-n", &NICENESS.to_string(), "haproxy", "-db", "-f"]);
    let mut process = nice.arg(&file).spawn()?;
    let listening = wait_until("haproxy to listen", limit, || {
        process.check()?;
        Ok(node.enter(|| is_listening(last))??.then_some(()))
    });
    listening.with_context(|| process.log())?;
    Ok(process)
}

/// Looked up rather than tried: a connection would go on to a backend.
fn is_listening(address: SocketAddr) -> Result<bool> {
    let SocketAddr::V4(address) = address else { return Ok(false) };
    // Columns are in hexadecimal, addresses as the machine would print them in its own order; 0A is LISTEN.
    let wanted = format!("{:08X}:{:04X} 00000000:0000 0A", u32::from_ne_bytes(address.ip().octets()), address.port());
    Ok(fs::read_to_string("/proc/thread-self/net/tcp")?.contains(&wanted))
}

fn config(services: &[Service], core: usize) -> String {
    let mut config = format!(
        "global\n  nbthread 1\n  cpu-map 1 {core}\n  maxconn 4096\n\
         defaults\n  mode tcp\n  timeout connect 5s\n  timeout client 60s\n  timeout server 60s\n"
    );
    // Writing to a String cannot fail.
    for Service { name, frontend, backends, .. } in services.iter().filter(|one| one.protocol == Protocol::Tcp) {
        let _ = write!(config, "listen {name}\n  bind {frontend}\n");
        for (index, backend) in backends.iter().enumerate() {
            let _ = writeln!(config, "  server s{index} {backend}");
        }
    }
    config
}
