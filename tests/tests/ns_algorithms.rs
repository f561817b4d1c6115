//! Which backend a new connection gets, by algorithms that look at more than the packet, or at less of it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use netlb_integration::daemon::{Config, Forwarding, Netlb, Service};
use netlb_integration::load::{self, KeptConnection};
use netlb_integration::servers::{self, Server};
use netlb_integration::testing::TestResult;
use netlb_integration::topology::{Family, Host, Layout, Plan, Pod, Testbed, vip};

/// The daemon counts flows every other second.
const COUNTED: Duration = Duration::from_secs(6);

fn at(family: Family) -> SocketAddr {
    SocketAddr::new(vip(family, 10), 80)
}

fn pods(bed: &Testbed, what: &str, count: usize) -> Result<Vec<Pod>> {
    (1..=count).map(|number| bed.pod(Host::A, &format!("{what}-{number}"))).collect()
}

fn web(pods: &[Pod]) -> Result<Vec<Server>> {
    pods.iter().map(|pod| servers::nginx(pod, 8080)).collect()
}

/// Of two backends drawn at random the less busy one is taken: a backend gets three of four connections, as long as the other has more.
#[test]
fn least_conn_gives_new_connections_to_whoever_has_fewer() -> TestResult {
    const FIRST: usize = 200;
    const THEN: usize = 150;
    let bed = Plan::new(Layout::Ptp).build()?;
    let (client, backends) = (bed.pod(Host::A, "client")?, pods(&bed, "backend", 2)?);
    let servers = web(&backends)?;
    // A small flow table: counting takes no more than a small part of the time, which is long where it takes long.
    let config = Config::new(bed.node_a(), Forwarding::Fast).extra("\n[limits]\nflows = 8192\n");
    let netlb = Netlb::start(bed.node_a(), &config)?;
    for family in Family::BOTH {
        let [busy, idle] = [&servers[0], &servers[1]].map(|server| server.addr(family));
        let frontend = format!("{}/tcp", at(family));
        let add =
            ["svc", "add", &frontend, "--name", "web", "--algorithm", "least-conn", "--backend", &busy.to_string()];
        netlb.must(add)?;
        let connect = |count: usize| -> Result<Vec<(SocketAddr, KeptConnection)>> {
            let connect = || {
                let mut connection = client.ns.enter(|| KeptConnection::open(at(family)))??;
                Ok((connection.get()?.backend, connection))
            };
            (0..count).map(|_| connect()).collect()
        };
        let share = |of: &[(SocketAddr, KeptConnection)], backend| of.iter().filter(|(got, _)| *got == backend).count();
        let first = connect(FIRST).with_context(|| format!("{family}: the first connections"))?;
        netlb.add_backend("web", idle)?;
        let second = connect(THEN)?;
        let got = share(&second, idle);
        assert!(got > 95 && got < THEN, "{family}: {got} of {THEN} to the idle one; 75 would be half");
        // They end, and the roles are exchanged: only user space sees that.
        drop(first);
        thread::sleep(COUNTED);
        let third = connect(100)?;
        let got = share(&third, busy);
        assert!(
            got > 62,
            "{family}: {got} of 100 to the one whose connections ended; it has {}",
            THEN - share(&second, idle)
        );
        // Those that are there stay where they are.
        for (backend, mut connection) in second.into_iter().chain(third) {
            assert_eq!(connection.get()?.backend, backend, "{family}");
        }
        netlb.must(["svc", "rm", "web"])?;
    }
    Ok(())
}

#[test]
fn source_hash_gives_a_client_one_backend_whatever_becomes_of_the_daemon() -> TestResult {
    let bed = Plan::new(Layout::Ptp).build()?;
    let (clients, backends) = (pods(&bed, "client", 10)?, pods(&bed, "backend", 3)?);
    let servers = web(&backends)?;
    let mut config = Config::new(bed.node_a(), Forwarding::Fast);
    for family in Family::BOTH {
        let addresses = servers.iter().map(|server| server.addr(family));
        let service = Service::new(&format!("web-{family}"), format!("{}/tcp", at(family)), addresses);
        config = config.service(service.algorithm("source-hash"));
    }
    let netlb = Netlb::start(bed.node_a(), &config)?;
    // Who has whom, over connections from ports that differ.
    let ask = || -> Result<BTreeMap<(String, &str), String>> {
        let mut had = BTreeMap::new();
        for (family, client) in Family::BOTH.into_iter().flat_map(|family| clients.iter().map(move |pod| (family, pod)))
        {
            let get = || (0..8).map(|_| load::get(at(family))).collect::<Result<Vec<_>>>();
            let names: BTreeSet<_> = client.ns.enter(get)??.into_iter().map(|answer| answer.name).collect();
            assert_eq!(names.len(), 1, "{family}: {} has more than one: {names:?}", client.name());
            had.extend(names.into_iter().map(|name| ((family.to_string(), client.name()), name)));
        }
        Ok(had)
    };
    let before = ask()?;
    for family in Family::BOTH {
        let of_family = before.iter().filter(|((of, _), _)| *of == family.to_string());
        let names: BTreeSet<_> = of_family.map(|(_, name)| name).collect();
        assert!(names.len() > 1, "{family}: ten clients do not all have the same: {before:?}");
    }
    netlb.stop()?;
    assert_eq!(ask()?, before, "without a daemon");
    netlb.restart(bed.node_a())?;
    assert_eq!(ask()?, before, "after a restart");
    netlb.kill()?;
    netlb.restart(bed.node_a())?;
    assert_eq!(ask()?, before, "after a crash");
    netlb.stop()?;
    netlb.cleanup()?.success()?;
    netlb.restart(bed.node_a())?;
    assert_eq!(ask()?, before, "with new maps, as on another node");
    Ok(())
}
