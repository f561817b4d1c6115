//! Ports of the node's address run out towards a backend of another node, and come back.

use std::io::ErrorKind;
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result};
use netlb_integration::daemon::{Config, Forwarding, Netlb, Service};
use netlb_integration::exec::wait_until;
use netlb_integration::servers;
use netlb_integration::testing::TestResult;
use netlb_integration::topology::{Family, Host, Layout, Plan, vip};

const FIRST_PORT: u16 = 61_000;
const PORTS: usize = 200;
const WAIT: Duration = Duration::from_secs(10);

#[test]
fn connections_find_a_port_until_none_is_left_and_again_when_one_is_free() -> TestResult {
    let bed = Plan::new(Layout::Routed).with_outside_client().build()?;
    let far = bed.pod(Host::B, "far")?;
    let server = servers::nginx(&far, 8080)?;
    let last = FIRST_PORT + PORTS as u16 - 1;
    let mut config = Config::new(bed.node_a(), Forwarding::Fast)
        .extra(&format!("\n[snat]\nports = \"{FIRST_PORT}-{last}\"\n\n[timeouts]\ntcp_closing = \"1s\"\n"));
    for family in Family::BOTH {
        let frontend = format!("{}/tcp", SocketAddr::new(vip(family, 10), 80));
        config = config.service(Service::new(&format!("web-{family}"), frontend, [server.addr(family)]));
    }
    let netlb = Netlb::start(bed.node_a(), &config)?;
    for family in Family::BOTH {
        let to = SocketAddr::new(vip(family, 10), 80);
        let exhausted = netlb.counter("snat_exhausted")?;
        bed.outside()?.enter(|| -> Result<()> {
            let connect = || TcpStream::connect_timeout(&to, WAIT);
            let mut connections = (0..PORTS)
                .map(|n| connect().with_context(|| format!("{family}: connection {n} of {PORTS}")))
                .collect::<Result<Vec<_>>>()?;
            for _ in 0..10 {
                let error = connect().err().map(|error| error.kind());
                assert_eq!(error, Some(ErrorKind::ConnectionRefused), "{family}: with every port taken");
            }
            drop(connections.split_off(PORTS - 5));
            let again = wait_until("ports that are free again", WAIT, || Ok(connect().ok()))?;
            connections.push(again);
            Ok(())
        })??;
        assert!(netlb.counter("snat_exhausted")? >= exhausted + 10, "{family}");
    }
    Ok(())
}
