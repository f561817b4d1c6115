//! Many services at once, and many connections one after another.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use netlb_integration::clients::{self, Wrk};
use netlb_integration::cluster::Cluster;
use netlb_integration::daemon::{Config, Forwarding, Netlb};
use netlb_integration::servers::{self, Protocol};
use netlb_integration::testing::TestResult;
use netlb_integration::topology::{Family, Host, Layout, Plan};

const SERVICES: u32 = 10_000;
const BACKENDS: u32 = 10;

#[test]
#[expect(clippy::print_stdout, reason = "the figures are for people")]
fn ten_thousand_services_of_ten_backends_are_loaded_from_one_file_and_the_last_one_answers() -> TestResult {
    let bed = Plan::new(Layout::Ptp).build()?;
    let (client, backend) = (bed.pod(Host::A, "client")?, bed.pod(Host::A, "backend")?);
    let server = servers::nginx(&backend, 8080)?;
    let mut services = String::new();
    for number in 1..=SERVICES {
        let backends: Vec<_> = match number {
            SERVICES => vec![server.addr(Family::V4).to_string()],
            _ => {
                (0..BACKENDS).map(|backend| address([10, 112], number * BACKENDS + backend, 8080).to_string()).collect()
            }
        };
        let frontend = address([10, 100], number, 80);
        write!(
            services,
            "\n[[service]]\nname = \"s{number}\"\nfrontends = [\"{frontend}/tcp\"]\nbackends = {backends:?}\n"
        )?;
    }
    let netlb = Netlb::start(bed.node_a(), &Config::new(bed.node_a(), Forwarding::Fast).extra(&services))?;
    clients::curl(&client.ns, address([10, 100], SERVICES, 80))?;
    let status = netlb.must(["status"])?;
    assert!(status.contains(&SERVICES.to_string()), "{status}");
    println!("{status}");
    assert_eq!(netlb.must(["svc", "list", "-o", "name"])?.lines().count(), SERVICES as usize);
    Ok(())
}

fn address([a, b]: [u8; 2], number: u32, port: u16) -> SocketAddr {
    let [_, c, d, e] = number.to_be_bytes();
    SocketAddr::from(([a, b + c, d, e], port))
}

/// Nothing runs that collects: slots end with their timeouts.
#[test]
#[expect(clippy::print_stdout, reason = "the figures are for people")]
fn after_a_hundred_thousand_short_connections_the_flow_table_is_empty_again() -> TestResult {
    let cluster = Cluster::start(Plan::new(Layout::Ptp), Forwarding::Fast, (80, Protocol::Tcp), 3, |pod| {
        servers::nginx(pod, 8080)
    })?;
    let mut done = 0;
    while done < 100_000 {
        let wrk = Wrk { server: cluster.vip(Family::V4), connections: 16, seconds: 5, reconnect: true };
        let report = wrk.run(&cluster.client.ns)?;
        assert_eq!(report.failed(), 0, "{report:?}");
        assert!(report.requests > 0);
        done += report.requests;
    }
    let count = || -> anyhow::Result<u64> { Ok(cluster.netlb.must(["flows", "count"])?.trim().parse()?) };
    println!("{done} connections, {} flows right after them", count()?);
    let start = Instant::now();
    // Closing ones are kept for 10 s.
    while count()? > 20 {
        assert!(start.elapsed() < Duration::from_secs(60), "{}", cluster.netlb.must(["flows", "list"])?);
        thread::sleep(Duration::from_secs(1));
    }
    println!("{} flows after {:?}", count()?, start.elapsed());
    Ok(())
}
