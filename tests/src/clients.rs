//! Real clients in namespaces, and what they report.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;

use crate::exec::{Cmd, Output, Process};
use crate::netns::Namespace;
use crate::servers::Answer;

/// One request by curl on a connection of its own.
pub fn curl(ns: &Namespace, server: SocketAddr) -> Result<Answer> {
    let output = curl_command(ns).arg(format!("http://{server}/")).run()?.success()?;
    Answer::parse(&output.stdout)
}

/// Downloads `/files/<name>` to a file of this machine.
pub fn download(ns: &Namespace, server: SocketAddr, name: &str, to: &Path) -> Result<()> {
    let url = format!("http://{server}/files/{name}");
    let command =
        ns.command("curl").args(["--silent", "--show-error", "--fail", "--max-time", "60", "--connect-timeout", "5"]);
    command.arg("--output").arg(to).arg(url).timeout(Duration::from_secs(70)).run()?.success()?;
    Ok(())
}

fn curl_command(ns: &Namespace) -> Cmd {
    ns.command("curl").args(["--silent", "--show-error", "--fail", "--max-time", "5"])
}

/// Hexadecimal SHA-256 of a file.
pub fn sha256(file: &Path) -> Result<String> {
    let output = Cmd::new("sha256sum").arg(file).run()?.success()?;
    Ok(output.stdout.split_whitespace().next().context("sha256sum said nothing")?.to_owned())
}

/// What a run of wrk came to. Errors are those of sockets; `bad_statuses` are answers other than 2xx and 3xx.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct WrkReport {
    pub requests: u64,
    pub connect_errors: u64,
    pub read_errors: u64,
    pub write_errors: u64,
    pub timeouts: u64,
    pub bad_statuses: u64,
}

impl WrkReport {
    pub fn failed(&self) -> u64 {
        self.connect_errors + self.read_errors + self.write_errors + self.timeouts + self.bad_statuses
    }

    pub fn parse(report: &str) -> Result<Self> {
        let mut parsed = Self::default();
        let mut complete = false;
        for line in report.lines().map(str::trim) {
            if let Some((requests, _)) = line.split_once(" requests in ") {
                parsed.requests = requests.parse().with_context(|| format!("no number of requests: {line:?}"))?;
                complete = true;
            } else if let Some(errors) = line.strip_prefix("Socket errors: ") {
                for error in errors.split(", ") {
                    let (kind, count) = error.split_once(' ').with_context(|| format!("no socket error: {line:?}"))?;
                    let count = count.parse()?;
                    match kind {
                        "connect" => parsed.connect_errors = count,
                        "read" => parsed.read_errors = count,
                        "write" => parsed.write_errors = count,
                        "timeout" => parsed.timeouts = count,
                        _ => bail!("unknown socket error {kind:?}"),
                    }
                }
            } else if let Some(count) = line.strip_prefix("Non-2xx or 3xx responses: ") {
                parsed.bad_statuses = count.parse()?;
            }
        }
        if !complete {
            bail!("not a report of wrk: {report:?}");
        }
        Ok(parsed)
    }
}

/// A load of wrk; its threads and connections are for two cores.
#[derive(Clone, Copy, Debug)]
pub struct Wrk {
    pub server: SocketAddr,
    pub connections: u32,
    pub seconds: u32,
    /// A new connection for every request, instead of one for all requests of a client.
    pub reconnect: bool,
}

impl Wrk {
    pub fn run(self, ns: &Namespace) -> Result<WrkReport> {
        WrkReport::parse(&self.arguments(ns.command("wrk")).run()?.success()?.stdout)
    }

    /// Starts it in the background, where it leaves the processors to whatever else wants them.
    pub fn start(self, ns: &Namespace) -> Result<RunningWrk> {
        let nice = ns.command("nice").args(["-n", "10", "wrk"]);
        Ok(RunningWrk { process: self.arguments(nice).spawn()?, limit: self.limit() })
    }

    fn limit(self) -> Duration {
        Duration::from_secs(u64::from(self.seconds) + 15)
    }

    fn arguments(self, command: Cmd) -> Cmd {
        let Self { server, connections, seconds, reconnect } = self;
        let mut command = command.args(["--threads", "2", "--timeout", "5s"]);
        command = command.args(["--connections", &connections.to_string(), "--duration", &format!("{seconds}s")]);
        if reconnect {
            command = command.args(["--header", "Connection: close"]);
        }
        command.arg(format!("http://{server}/")).timeout(self.limit())
    }
}

/// A wrk in the background.
#[derive(Debug)]
pub struct RunningWrk {
    process: Process,
    limit: Duration,
}

impl RunningWrk {
    /// Waits for the end of its time and gives its report.
    pub fn finish(mut self) -> Result<WrkReport> {
        let status = self.process.wait(self.limit)?;
        if !status.success() {
            bail!("wrk ended with {status}\n{}", self.process.log());
        }
        WrkReport::parse(&self.process.log())
    }

    /// Ends it before its time and gives its report.
    pub fn stop(mut self) -> Result<WrkReport> {
        self.process.signal(Signal::SIGINT).context("wrk was to run longer")?;
        self.finish()
    }
}

/// Asks for the TXT record `who.svc.test`, and gives the name of the server's pod.
pub fn dns_who(ns: &Namespace, server: SocketAddr, tcp: bool) -> Result<String> {
    let mut command = ns.command("kdig").arg(format!("@{}", server.ip())).args(["-p", &server.port().to_string()]);
    if tcp {
        command = command.arg("+tcp");
    }
    let output = command.args(["+short", "+timeout=3", "+retry=0", "TXT", "who.svc.test"]).run()?.success()?;
    let name = output.stdout.trim().trim_matches('"');
    if name.is_empty() {
        bail!("no answer from {server}: {output}");
    }
    Ok(name.to_owned())
}

/// One command to a redis, and its reply.
pub fn redis(ns: &Namespace, server: SocketAddr, command: &[&str]) -> Result<String> {
    let (host, port) = (server.ip().to_string(), server.port().to_string());
    let output = ns.command("redis-cli").args(["-h", &host, "-p", &port]).args(command).run()?.success()?;
    Ok(output.stdout.trim().to_owned())
}

/// What an iperf3 client reports of one stream.
#[derive(Clone, Copy, Debug)]
pub struct IperfReport {
    pub bytes: u64,
    pub bits_per_second: f64,
    pub retransmits: u64,
}

/// Sends for `seconds`, or receives with `reverse`.
pub fn iperf3(ns: &Namespace, server: SocketAddr, seconds: u32, reverse: bool) -> Result<IperfReport> {
    let (host, port, time) = (server.ip().to_string(), server.port().to_string(), seconds.to_string());
    let mut command = ns.command("iperf3").args(["--client", &host, "--port", &port, "--time", &time, "--json"]);
    command = command.args(["--connect-timeout", "3000"]).timeout(Duration::from_secs(u64::from(seconds) + 15));
    if reverse {
        command = command.arg("--reverse");
    }
    parse_iperf3(&command.run()?)
}

fn parse_iperf3(output: &Output) -> Result<IperfReport> {
    let report: serde_json::Value = serde_json::from_str(&output.stdout).with_context(|| output.to_string())?;
    if let Some(error) = report["error"].as_str() {
        bail!("iperf3: {error}");
    }
    let (sent, received) = (&report["end"]["sum_sent"], &report["end"]["sum_received"]);
    Ok(IperfReport {
        bytes: received["bytes"].as_u64().context("iperf3 reports no bytes")?,
        bits_per_second: received["bits_per_second"].as_f64().context("iperf3 reports no rate")?,
        retransmits: sent["retransmits"].as_u64().unwrap_or(0),
    })
}

/// An address as a host part of a URL.
pub fn url_host(ip: IpAddr) -> String {
    match ip {
        IpAddr::V4(ip) => ip.to_string(),
        IpAddr::V6(ip) => format!("[{ip}]"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_of_wrk_is_read_with_its_errors() {
        let report = "Running 2s test @ http://10.96.0.10/\n  2 threads and 8 connections\n  \
                      12345 requests in 2.10s, 3.40MB read\n  Socket errors: connect 1, read 2, write 3, timeout 4\n  \
                      Non-2xx or 3xx responses: 5\nRequests/sec:   5878.57\n";
        let parsed = WrkReport::parse(report).unwrap();
        let expected = WrkReport {
            requests: 12345,
            connect_errors: 1,
            read_errors: 2,
            write_errors: 3,
            timeouts: 4,
            bad_statuses: 5,
        };
        assert_eq!(parsed, expected);
        assert_eq!(parsed.failed(), 15);
    }

    #[test]
    fn what_is_no_report_of_wrk_is_refused() {
        assert!(WrkReport::parse("unable to connect to 10.96.0.10:80 Connection refused\n").is_err());
    }
}
