//! iptables, with rules as kube-proxy makes them for cluster IPs (Kubernetes, `pkg/proxy/iptables/proxier.go`).

use std::fmt::Write as _;
use std::time::Duration;

use anyhow::Result;
use netlb_integration::netns::Namespace;
use netlb_integration::topology::Family;

use super::services::Service;

/// Which of the kernel's two packet filters the rules go to.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Variant {
    Legacy,
    Nft,
}

impl Variant {
    fn restore(self, family: Family) -> &'static str {
        match (self, family) {
            (Self::Legacy, Family::V4) => "iptables-legacy-restore",
            (Self::Legacy, Family::V6) => "ip6tables-legacy-restore",
            (Self::Nft, Family::V4) => "iptables-nft-restore",
            (Self::Nft, Family::V6) => "ip6tables-nft-restore",
        }
    }
}

/// Loads rules of a family.
pub(crate) fn load(variant: Variant, node: &Namespace, family: Family, rules: &str, limit: Duration) -> Result<()> {
    node.command(variant.restore(family)).input(rules).timeout(limit).run()?.success().map(drop)
}

/// The rules of the services, which are of one family, as iptables-restore reads them.
pub(crate) fn rules<'a>(services: impl IntoIterator<Item = &'a Service>) -> String {
    let mut chains = String::new();
    let mut rules = String::new();
    for (number, service) in services.into_iter().enumerate() {
        // Writing to a String cannot fail.
        let _ = write_service(&mut chains, &mut rules, number, service);
    }
    format!(
        "*filter\n\
         :KUBE-FORWARD - [0:0]\n:KUBE-SERVICES - [0:0]\n:KUBE-EXTERNAL-SERVICES - [0:0]\n:KUBE-PROXY-FIREWALL - [0:0]\n\
         -A FORWARD -m conntrack --ctstate NEW -j KUBE-PROXY-FIREWALL\n\
         -A FORWARD -j KUBE-FORWARD\n\
         -A FORWARD -m conntrack --ctstate NEW -j KUBE-SERVICES\n\
         -A FORWARD -m conntrack --ctstate NEW -j KUBE-EXTERNAL-SERVICES\n\
         -A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP\n\
         -A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT\n\
         -A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n\
         COMMIT\n\
         *nat\n\
         :KUBE-SERVICES - [0:0]\n:KUBE-POSTROUTING - [0:0]\n:KUBE-MARK-MASQ - [0:0]\n:KUBE-NODEPORTS - [0:0]\n\
         {chains}\
         -A PREROUTING -j KUBE-SERVICES\n\
         -A OUTPUT -j KUBE-SERVICES\n\
         -A POSTROUTING -j KUBE-POSTROUTING\n\
         -A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN\n\
         -A KUBE-POSTROUTING -j MARK --xor-mark 0x4000\n\
         -A KUBE-POSTROUTING -j MASQUERADE --random-fully\n\
         -A KUBE-MARK-MASQ -j MARK --or-mark 0x4000\n\
         {rules}\
         -A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS\n\
         COMMIT\n"
    )
}

fn write_service(chains: &mut String, rules: &mut String, number: usize, service: &Service) -> std::fmt::Result {
    let Service { name, frontend, protocol, backends } = service;
    let (ip, port, protocol) = (frontend.ip(), frontend.port(), protocol.name());
    let (bits, pods) = match service.family() {
        Family::V4 => (32, "10.244.0.0/16"),
        Family::V6 => (128, "fd00:10:244::/48"),
    };
    // Names as long as those made of hashes.
    let chain = format!("KUBE-SVC-{number:016}");
    let to_service =
        format!("-d {ip}/{bits} -p {protocol} -m comment --comment \"{name} cluster IP\" -m {protocol} --dport {port}");
    writeln!(chains, ":{chain} - [0:0]")?;
    writeln!(rules, "-A KUBE-SERVICES {to_service} -j {chain}")?;
    writeln!(rules, "-A {chain} ! -s {pods} {to_service} -j KUBE-MARK-MASQ")?;
    for (index, backend) in backends.iter().enumerate() {
        let endpoint = format!("KUBE-SEP-{number:012}{index:04}");
        writeln!(chains, ":{endpoint} - [0:0]")?;
        let comment = format!("-m comment --comment \"{name} -> {backend}\"");
        match backends.len() - index {
            1 => writeln!(rules, "-A {chain} {comment} -j {endpoint}")?,
            left => {
                let share = 1.0 / left as f64;
                writeln!(
                    rules,
                    "-A {chain} {comment} -m statistic --mode random --probability {share:.10} -j {endpoint}"
                )?;
            }
        }
        writeln!(rules, "-A {endpoint} -s {}/{bits} -m comment --comment \"{name}\" -j KUBE-MARK-MASQ", backend.ip())?;
        writeln!(
            rules,
            "-A {endpoint} -p {protocol} -m comment --comment \"{name}\" -m {protocol} \
             -j DNAT --to-destination {backend}"
        )?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::path::services::{has_family, others, with_measured};

    #[test]
    fn each_endpoint_gets_its_share_of_what_those_before_it_left() {
        let rules = rules(&others(1, 4));
        let shares: Vec<_> = rules.split_whitespace().skip_while(|word| *word != "--probability").collect();
        let shares: Vec<_> = shares.windows(2).filter(|pair| pair[0] == "--probability").map(|pair| pair[1]).collect();
        assert_eq!(shares, ["0.2500000000", "0.3333333333", "0.5000000000"], "and the last takes the rest");
    }

    #[test]
    fn the_measured_service_has_as_many_rules_before_it_as_behind_it() {
        let backends = ["10.244.1.3:8080".parse().unwrap()];
        assert!(has_family(1000, Family::V6) && !has_family(1001, Family::V6), "all of these are of one family");
        let rules = rules(&with_measured(1001, |_| backends.to_vec()));
        let jumps: Vec<_> = rules.lines().filter(|line| line.starts_with("-A KUBE-SERVICES -d ")).collect();
        assert_eq!(jumps.len(), 1002);
        let measured: Vec<_> = (0..jumps.len()).filter(|&place| jumps[place].contains(" 10.96.0.10/32 ")).collect();
        assert_eq!(measured, [500, 501], "its port of TCP and its port of UDP");
    }
}
