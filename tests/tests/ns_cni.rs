//! Pods that the distribution's CNI plugins wire reach services like those that testbeds wire by hand.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use netlb_integration::cgroup::Cgroup;
use netlb_integration::clients;
use netlb_integration::cni::Plugin;
use netlb_integration::daemon::{Config, Forwarding, Netlb, Service};
use netlb_integration::servers::{self, Answer, Protocol};
use netlb_integration::sockets::Client;
use netlb_integration::testing::TestResult;
use netlb_integration::topology::{Family, Host, Layout, Plan, vip};

const REQUESTS: usize = 20;

#[test]
fn pods_of_the_bridge_plugin_reach_services() -> TestResult {
    pods_with_an_interface_on_the_node(Plugin::Bridge)
}

#[test]
fn pods_of_the_ptp_plugin_reach_services() -> TestResult {
    pods_with_an_interface_on_the_node(Plugin::Ptp)
}

fn pods_with_an_interface_on_the_node(plugin: Plugin) -> TestResult {
    for forwarding in Forwarding::BOTH {
        // Pods come before netlb and after it.
        let bed = Plan::new(Layout::Ptp).build()?;
        let backend = bed.pod_by(plugin, Host::A, "backend-1")?;
        let server = servers::nginx(&backend, 8080)?;
        let mut config = Config::new(bed.node_a(), forwarding).pods("veth*");
        if plugin == Plugin::Bridge {
            config = config.bridge(Plugin::BRIDGE);
        }
        for family in Family::BOTH {
            let frontend = format!("{}/tcp", at(family));
            config = config.service(Service::new(&format!("web-{family}"), frontend, [server.addr(family)]));
        }
        let netlb = Netlb::start(bed.node_a(), &config)?;
        let client = bed.pod_by(plugin, Host::A, "client")?;
        assert!(client.interface().starts_with("veth"), "{plugin}: the plugin names the interface on the node");
        for family in Family::BOTH {
            let case = format!("{plugin}, {forwarding}, {family}");
            for _ in 0..REQUESTS {
                let answer = clients::curl(&client.ns, at(family))?;
                assert_eq!((&*answer.name, answer.client.ip()), ("backend-1", client.ip(family)), "{case}");
            }
            let itself = clients::curl(&backend.ns, at(family))?;
            assert_eq!(itself.name, "backend-1", "{case}: a pod reaches itself");
            assert_ne!(itself.client.ip(), backend.ip(family), "{case}: and is not its own client");
        }
        drop(netlb);
    }
    Ok(())
}

/// Of these the node has no interface: their sockets are served.
#[test]
fn pods_of_the_macvlan_plugin_reach_services_by_their_sockets() -> TestResult {
    let bed = Plan::new(Layout::Ptp).with_outside_client().build()?;
    let [one, two, client] =
        ["backend-1", "backend-2", "client"].map(|name| bed.pod_by(Plugin::Macvlan, Host::A, name));
    let (pods, client) = ([one?, two?], client?);
    let cgroup = Cgroup::new("macvlan")?;
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        let serve = |pod| match protocol {
            Protocol::Tcp => servers::nginx(pod, 8080),
            Protocol::Udp => servers::echo(pod, protocol, 7001),
        };
        let servers: Vec<_> = pods.iter().map(serve).collect::<Result<_, _>>()?;
        let mut config = Config::new(bed.node_a(), Forwarding::Fast);
        for family in Family::BOTH {
            let frontend = format!("{}/{}", at(family), protocol.name());
            let backends = servers.iter().map(|server| server.addr(family));
            config = config.service(Service::new(&format!("both-{family}"), frontend, backends));
        }
        config = config.extra(&format!("\n[socket]\nscope = \"all\"\ncgroup = {:?}\n", cgroup.path()));
        let netlb = Netlb::start(bed.node_a(), &config)?;
        for family in Family::BOTH {
            let case = format!("{}, {family}", protocol.name());
            let mut seen = BTreeSet::new();
            for _ in 0..REQUESTS {
                let answer = match protocol {
                    Protocol::Tcp => {
                        let curl = client.ns.command("curl").args([
                            "-gsS",
                            "--max-time",
                            "5",
                            &format!("http://{}/", at(family)),
                        ]);
                        Answer::parse(&curl.cgroup(&cgroup).run()?.success()?.stdout)?
                    }
                    Protocol::Udp => {
                        let mut socket = Client::start(&client.ns, Some(&cgroup))?;
                        socket.open(family)?;
                        socket.ask(at(family), "who")?.1
                    }
                };
                assert_eq!(answer.client.ip(), client.ip(family), "{case}");
                seen.insert(answer.name);
            }
            assert_eq!(Vec::from_iter(seen), ["backend-1", "backend-2"], "{case}: both answer in {REQUESTS} requests");
        }
        drop(netlb);
    }
    Ok(())
}

fn at(family: Family) -> SocketAddr {
    SocketAddr::new(vip(family, 10), 80)
}
