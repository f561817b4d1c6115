//! DNS servers are replaced while clients that keep their sockets ask them: no question is lost for longer than one retry.

use std::fs;
use std::net::SocketAddr;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result};
use netlb_integration::cgroup::Cgroup;
use netlb_integration::cluster::service;
use netlb_integration::daemon::{Config, Forwarding, Netlb};
use netlb_integration::dns::{Socket, Tally};
use netlb_integration::exec::wait_until;
use netlb_integration::run::Run;
use netlb_integration::servers::{self, Server};
use netlb_integration::sockets::Client;
use netlb_integration::testing::TestResult;
use netlb_integration::topology::{Family, Host, Layout, Plan, Pod, Testbed, vip};

const DNS: u16 = 53;
/// Between two changes. After the last one there is time for a retry and for some questions after it.
const PHASE: Duration = Duration::from_secs(3);
const SOON: Duration = Duration::from_secs(10);

/// A node with DNS servers, netlb, and clients of both kinds in a pod, whose packets are translated, and on the node, by its sockets.
struct Bed {
    // Dropped in this order: the daemon before the cgroup and its node, servers and clients before their pods.
    netlb: Netlb,
    servers: Vec<Server>,
    cgroup: Cgroup,
    client: Pod,
    pods: Vec<Pod>,
    bed: Testbed,
}

impl Bed {
    /// The services have the first server alone.
    fn start(layout: Layout, forwarding: Forwarding, servers: usize) -> Result<Self> {
        let bed = Plan::new(layout).build()?;
        let mut pods = Vec::new();
        for number in 1..=servers {
            pods.push(bed.pod(bed.far_host(), &format!("dns-{number}"))?);
        }
        let servers: Vec<_> = pods.iter().map(|pod| servers::dns(pod, DNS)).collect::<Result<_>>()?;
        let (cgroup, client) = (Cgroup::new("dns")?, bed.pod(Host::A, "client")?);
        let config = Config::new(bed.node_a(), forwarding)
            .extra(&format!("\n[socket]\nscope = \"node\"\ncgroup = {:?}\n", cgroup.path()));
        let netlb = Netlb::start(bed.node_a(), &config)?;
        for family in Family::BOTH {
            netlb.add_service(service(family), &format!("{}/udp", at(family)), [servers[0].addr(family)])?;
        }
        Ok(Self { netlb, servers, cgroup, client, pods, bed })
    }

    /// Clients that ask for a time, each in a thread, with what they are called.
    fn ask_for(&self, time: Duration) -> Result<Vec<(String, JoinHandle<Result<Tally>>)>> {
        let mut lanes = Vec::new();
        for family in Family::BOTH {
            for kind in Socket::BOTH {
                let from_pod = Client::start(&self.client.ns, None)?;
                let from_node = Client::start(&self.bed.node_a().ns, Some(&self.cgroup))?;
                for (from, mut client) in [("a pod", from_pod), ("the node", from_node)] {
                    let asking = thread::spawn(move || client.resolve_for(time, kind, at(family)));
                    lanes.push((format!("{family}, from {from}, {} socket", kind.name()), asking));
                }
            }
        }
        Ok(lanes)
    }

    /// One server's place is another's, in the order of a rolling update.
    fn replace(&self, old: usize, new: usize) -> Result<()> {
        for family in Family::BOTH {
            self.netlb.add_backend(service(family), self.servers[new].addr(family))?;
            self.netlb.remove_backend(service(family), self.servers[old].addr(family))?;
        }
        Ok(())
    }

    fn name(&self, server: usize) -> &str {
        self.pods[server].name()
    }
}

fn at(family: Family) -> SocketAddr {
    SocketAddr::new(vip(family, 10), DNS)
}

#[test]
fn no_question_is_lost_for_longer_than_one_retry_when_servers_are_replaced() -> TestResult {
    for (layout, forwarding) in
        [(Layout::Ptp, Forwarding::Fast), (Layout::Bridge, Forwarding::Stack), (Layout::Vxlan, Forwarding::Fast)]
    {
        let mut bed = Bed::start(layout, forwarding, 3)?;
        let lanes = bed.ask_for(5 * PHASE)?;
        thread::sleep(PHASE);
        // In order: the new one comes, the old one goes, and ends when nobody asks it any more.
        bed.replace(0, 1)?;
        thread::sleep(PHASE / 2);
        bed.servers[0].kill()?;
        thread::sleep(PHASE / 2);
        // After a crash.
        bed.servers[1].kill()?;
        bed.replace(1, 2)?;
        for (lane, asking) in lanes {
            let tally = asking.join().map_err(|_| "a client panicked")??;
            let what = format!("{layout:?}, {forwarding}, {lane}: {tally:?}");
            let names: Vec<_> = tally.by_name.iter().map(|(name, _)| name.as_str()).collect();
            assert_eq!(names, [bed.name(0), bed.name(1), bed.name(2)], "who answers, one after the other; {what}");
            assert_eq!(tally.lost, 0, "{what}");
            assert!(tally.retried <= 2, "a client that asks one thing at a time retries once a change; {what}");
            assert!(tally.asked > 100, "{what}");
        }
    }
    Ok(())
}

/// A pod's kept socket has a flow to the server that was removed, and many questions under way.
#[test]
fn dnsperf_loses_nothing_when_its_server_is_replaced_in_order() -> TestResult {
    for family in Family::BOTH {
        let bed = Bed::start(Layout::Ptp, Forwarding::Fast, 2)?;
        let questions = Run::current()?.new_dir("dnsperf")?.join("questions");
        fs::write(&questions, "who.svc.test TXT\n")?;
        let (server, seconds) = (at(family).ip().to_string(), "15");
        let command = bed.client.ns.command("dnsperf").args(["-s", &server, "-d"]).arg(&questions);
        let mut dnsperf = command.args(["-c", "1", "-q", "20", "-Q", "500", "-t", "2", "-l", seconds]).spawn()?;
        let has_moved = |times: u64| {
            wait_until("the flow to go on to the next server", SOON, || {
                Ok((bed.netlb.counter("flows_moved")? >= times).then_some(()))
            })
        };
        thread::sleep(Duration::from_secs(1));
        for (times, (old, new)) in (1..).zip([(0, 1), (1, 0)].repeat(2)) {
            bed.replace(old, new)?;
            has_moved(times).with_context(|| format!("{family}, {times} times"))?;
        }
        let status = dnsperf.wait(Duration::from_secs(30))?;
        let log = dnsperf.log();
        assert!(status.success(), "{family}: {log}");
        let number = |what: &str| -> Result<u64> {
            let line = log.lines().find_map(|line| line.trim().strip_prefix(what)).context(log.clone())?;
            Ok(line.split_whitespace().next().context(log.clone())?.parse()?)
        };
        assert!(number("Queries completed:")? > 1000, "{family}: {log}");
        assert_eq!(number("Queries lost:")?, 0, "{family}: {log}");
    }
    Ok(())
}
