//! What a service is changes while connections live: they stay where they are, and new ones follow.

use std::net::SocketAddr;

use anyhow::{Context, Result, bail, ensure};
use netlb_integration::daemon::Forwarding;
use netlb_integration::places::{Asker, Expected, From, LOCAL, Outcome, Places, REMOTE, node_of, outside_address};
use netlb_integration::servers::Protocol;
use netlb_integration::testing::TestResult;
use netlb_integration::topology::{Family, Host, vip};

const PROTOCOLS: [Protocol; 2] = [Protocol::Tcp, Protocol::Udp];
const BOTH: &[&str] = &[LOCAL, REMOTE];
const NODE_PORT: u16 = 30_080;

fn cluster_ip(family: Family) -> SocketAddr {
    SocketAddr::new(vip(family, 10), 80)
}

fn lb_ip(family: Family) -> SocketAddr {
    SocketAddr::new(vip(family, 20), 80)
}

fn node_port(family: Family) -> SocketAddr {
    SocketAddr::new(Host::A.underlay_address(family), NODE_PORT)
}

fn name(family: Family) -> String {
    format!("web-{family}").to_lowercase()
}

fn add_services(places: &Places) -> Result<()> {
    let netlb = places.netlb()?;
    for family in Family::BOTH {
        let (name, frontend) = (name(family), cluster_ip(family));
        let (tcp, udp) = (format!("{frontend}/tcp"), format!("{frontend}/udp"));
        let (lb, port) = (lb_ip(family).ip().to_string(), NODE_PORT.to_string());
        netlb.must(["svc", "add", &tcp, "-f", &udp, "-n", &name, "--lb-ip", &lb, "--node-port", &port])?;
        for backend in BOTH {
            let address = places.address(family, backend)?.to_string();
            netlb.must(["backend", "add", &name, &address, "--node", node_of(backend)])?;
        }
    }
    Ok(())
}

/// The same change to the services of both families.
fn set(places: &Places, change: &str) -> Result<()> {
    for family in Family::BOTH {
        let name = name(family);
        places.netlb()?.must(["svc", "set", &name].into_iter().chain(change.split_whitespace()))?;
    }
    Ok(())
}

fn set_backend(places: &Places, backend: &str, command: &str, change: &str) -> Result<()> {
    for family in Family::BOTH {
        let (name, address) = (name(family), places.address(family, backend)?.to_string());
        let command = ["backend", command, &name, &address].into_iter().chain(change.split_whitespace());
        places.netlb()?.must(command)?;
    }
    Ok(())
}

/// A connection, or datagrams of one socket.
struct Held {
    asker: Asker,
    protocol: Protocol,
    family: Family,
    backend: &'static str,
}

impl Held {
    fn open(mut asker: Asker, protocol: Protocol, family: Family, backend: &'static str) -> Result<Self> {
        for _ in 0..60 {
            asker.begin(protocol, node_port(family))??;
            if matches!(asker.go_on()?, Outcome::By(name, _) if name == backend) {
                return Ok(Self { asker, protocol, family, backend });
            }
        }
        bail!("nothing got to {backend}")
    }

    fn is_at(&mut self, backend: &str) -> Result<()> {
        let outcome = self.asker.go_on()?;
        let is_there = matches!(&outcome, Outcome::By(name, _) if name == backend);
        let Self { asker, protocol, family, .. } = self;
        ensure!(is_there, "{}, {family}, from {:?}: {outcome:?} is not of {backend}", protocol.name(), asker.from);
        Ok(())
    }
}

fn hold(places: &Places) -> Result<Vec<Held>> {
    let mut held = Vec::new();
    for from in [From::Pod, From::Outside] {
        for family in Family::BOTH {
            for (protocol, backend) in
                PROTOCOLS.into_iter().flat_map(|protocol| [(protocol, LOCAL), (protocol, REMOTE)])
            {
                held.push(Held::open(places.another(from)?, protocol, family, backend)?);
            }
        }
    }
    Ok(held)
}

/// Who has which way, and what becomes of it.
type Rule = (&'static [From], fn(Family) -> SocketAddr, Expected<'static>);

const HERE: &[From] = &[From::Pod, From::Node];
const ELSEWHERE: &[From] = &[From::OtherPod, From::Outside];
const BY_BOTH: Expected<'_> = Expected::By(BOTH);
const BY_LOCAL: Expected<'_> = Expected::By(&[LOCAL]);
const BY_REMOTE: Expected<'_> = Expected::By(&[REMOTE]);

/// Changes, and what new connections find after them.
const STEPS: [(&str, &[Rule]); 9] = [
    ("--affinity none", &[(&From::ALL, cluster_ip, BY_BOTH), (&From::ALL, node_port, BY_BOTH)]),
    (
        "--external-traffic-policy local",
        &[(&From::ALL, cluster_ip, BY_BOTH), (HERE, node_port, BY_BOTH), (ELSEWHERE, node_port, BY_LOCAL)],
    ),
    ("--internal-traffic-policy local", &[(&From::ALL, cluster_ip, BY_LOCAL), (HERE, lb_ip, BY_BOTH)]),
    (
        "--external-traffic-policy cluster --snat always",
        &[(&From::ALL, cluster_ip, BY_LOCAL), (&From::ALL, node_port, BY_BOTH)],
    ),
    ("--internal-traffic-policy cluster --algorithm random", &[(&From::ALL, cluster_ip, BY_BOTH)]),
    ("--snat auto --mode dsr", &[(HERE, node_port, BY_BOTH)]),
    ("--mode nat", &[(&From::ALL, node_port, BY_BOTH)]),
    ("--node-port none", &[(&From::ALL, lb_ip, BY_BOTH), (&From::ALL, node_port, Expected::Refused)]),
    ("--node-port 30080", &[(&From::ALL, node_port, BY_BOTH)]),
];

fn new_ones_follow(places: &mut Places, rules: &[Rule]) -> Result<()> {
    for (from, at, expected) in rules {
        places.everywhere(from, |asker| {
            for family in Family::BOTH {
                for protocol in PROTOCOLS {
                    asker.expect(protocol, at(family), *expected)?;
                }
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// Has each client ask some times, and says who of the backends answered it.
fn clients_keep_their_backends(places: &mut Places) -> Result<()> {
    places.everywhere(&From::ALL, |asker| {
        for (family, protocol) in
            Family::BOTH.into_iter().flat_map(|family| PROTOCOLS.map(|protocol| (family, protocol)))
        {
            let mut answers = asker.ask_all(protocol, node_port(family), &[])?;
            answers.extend(asker.ask_all(protocol, cluster_ip(family), &[])?);
            let first = answers[0].0.clone();
            ensure!(answers.iter().all(|(name, _)| *name == first), "from {:?}: {answers:?}", asker.from);
        }
        Ok(())
    })
}

#[test]
fn new_connections_follow_a_change_and_others_stay() -> TestResult {
    let mut places = Places::new()?;
    places.serve(&places.config(Forwarding::Fast, "node"))?;
    add_services(&places)?;
    let mut held = hold(&places)?;
    let stay = |held: &mut Vec<Held>| held.iter_mut().try_for_each(|held| held.is_at(held.backend));
    for (change, rules) in STEPS {
        set(&places, change).context(change)?;
        new_ones_follow(&mut places, rules).with_context(|| format!("after {change}"))?;
        stay(&mut held).with_context(|| format!("after {change}"))?;
    }
    for (command, change) in [
        ("set", "--weight 7"),
        ("set", "--weight 1"),
        ("set", "--node b"),
        ("set", "--node a --hint-zone far"),
        ("set", "--hint-zone none"),
        ("drain", ""),
        ("ready", ""),
    ] {
        set_backend(&places, LOCAL, command, change)?;
        stay(&mut held).with_context(|| format!("after {command} {change}"))?;
    }
    for family in Family::BOTH {
        let (old, new) = (name(family), format!("{}-renamed", name(family)));
        places.netlb()?.must(["svc", "set", &old, "--name", &new])?;
        stay(&mut held).context("a name is nothing to a flow")?;
        places.netlb()?.must(["svc", "set", &new, "--name", &old])?;
        stay(&mut held).context("nor its old one")?;
    }
    for affinity in ["client-ip", "none", "client-ip:60"] {
        set(&places, &format!("--affinity {affinity}"))?;
        match affinity {
            "none" => new_ones_follow(&mut places, &[(&From::ALL, cluster_ip, BY_BOTH)]),
            _ => clients_keep_their_backends(&mut places),
        }
        .with_context(|| format!("affinity {affinity}"))?;
        stay(&mut held).with_context(|| format!("affinity {affinity}"))?;
    }
    for (range, others) in [(true, Expected::Nothing), (false, BY_BOTH)] {
        for family in Family::BOTH {
            let range = if range { outside_address(family).to_string() } else { "none".to_owned() };
            places.netlb()?.must(["svc", "set", &name(family), "--affinity", "none", "--source-range", &range])?;
        }
        let of_places = [(&[From::Outside] as &[From], BY_BOTH), (&[From::OtherPod, From::Pod, From::Node], others)];
        let rules = of_places.map(|(from, expected)| (from, lb_ip as fn(Family) -> SocketAddr, expected));
        new_ones_follow(&mut places, &rules).with_context(|| format!("source ranges: {range}"))?;
        stay(&mut held).context("source ranges are for new connections")?;
    }
    set(&places, "--affinity client-ip")?;
    clients_keep_their_backends(&mut places)?;
    // Who was remembered and takes no more is forgotten, and whoever is taken for it kept when it is back.
    set_backend(&places, LOCAL, "set", "--ready=false --serving=true")?;
    new_ones_follow(&mut places, &[(&From::ALL, cluster_ip, BY_REMOTE), (&From::ALL, node_port, BY_REMOTE)])?;
    stay(&mut held).context("one that is not ready keeps what it has")?;
    set_backend(&places, LOCAL, "set", "--ready=true")?;
    new_ones_follow(&mut places, &[(&From::ALL, cluster_ip, BY_REMOTE)]).context("remembered")?;
    places.netlb()?.kill()?;
    stay(&mut held).context("without a daemon")?;
    places.netlb()?.restart(places.bed().node_a())?;
    new_ones_follow(&mut places, &[(&From::ALL, cluster_ip, BY_REMOTE)]).context("remembered by the next daemon")?;
    stay(&mut held).context("with the next daemon")?;
    set(&places, "--affinity none")?;

    for backend in BOTH {
        set_backend(&places, backend, "set", "--ready=false --serving=false")?;
    }
    new_ones_follow(&mut places, &[(&From::ALL, cluster_ip, Expected::Refused)]).context("nobody serves")?;
    stay(&mut held).context("where nobody serves")?;
    set_backend(&places, REMOTE, "set", "--ready=true --serving=true")?;
    new_ones_follow(&mut places, &[(&From::ALL, cluster_ip, BY_REMOTE)])?;
    for held in held.iter_mut().filter(|held| held.protocol == Protocol::Udp) {
        held.backend = REMOTE;
    }
    stay(&mut held).context("datagrams alone leave one that serves no more")?;
    set_backend(&places, LOCAL, "rm", "")?;
    stay(&mut held).context("connections outlive their backend")?;
    for family in Family::BOTH {
        places.netlb()?.must(["svc", "rm", &name(family)])?;
    }
    held.retain(|held| held.protocol == Protocol::Tcp);
    stay(&mut held).context("and their service")?;
    Ok(())
}
