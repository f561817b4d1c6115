//! nftables, with a table as kube-proxy makes it for cluster IPs (Kubernetes, `pkg/proxy/nftables/proxier.go`), and with connection
//! tracking alone.

use std::fmt::Write as _;
use std::time::Duration;

use anyhow::Result;
use netlb_integration::netns::Namespace;
use netlb_integration::topology::Family;

use super::services::Service;

pub(crate) fn load(node: &Namespace, rules: &str, limit: Duration) -> Result<()> {
    node.command("nft").args(["-f", "-"]).input(rules).timeout(limit).run()?.success().map(drop)
}

/// What a node has without a load balancer, but with a stateful firewall.
pub(crate) const CONNECTION_TRACKING: &str = "\
table inet firewall {
  chain forward {
    type filter hook forward priority filter; policy accept;
    ct state established,related accept
    ct state invalid drop
  }
}
";

/// The tables of the services, one for each family: a map from their addresses to chains, and a map of numbers to chains of endpoints in
/// each.
pub(crate) fn rules(services: &[Service]) -> String {
    let of_family = |family| Vec::from_iter(services.iter().filter(|service| service.family() == family));
    let tables = Family::BOTH.map(of_family).into_iter().filter(|services| !services.is_empty());
    tables.map(|services| table(&services)).collect()
}

/// The words of a family: its own, and that of its addresses.
fn words(family: Family) -> (&'static str, &'static str) {
    match family {
        Family::V4 => ("ip", "ipv4_addr"),
        Family::V6 => ("ip6", "ipv6_addr"),
    }
}

/// The table of services of one family.
fn table(services: &[&Service]) -> String {
    let (ip, addr) = words(services[0].family());
    let mut chains = String::new();
    let mut map = String::new();
    for (number, service) in services.iter().enumerate() {
        // Writing to a String cannot fail.
        let _ = write_service(&mut chains, &mut map, number, service);
    }
    format!(
        "table {ip} kube-proxy {{\n\
         map no-endpoint-services {{ type {addr} . inet_proto . inet_service : verdict; }}\n\
         map no-endpoint-nodeports {{ type inet_proto . inet_service : verdict; }}\n\
         map firewall-ips {{ type {addr} . inet_proto . inet_service : verdict; }}\n\
         map service-nodeports {{ type inet_proto . inet_service : verdict; }}\n\
         set nodeport-ips {{ type {addr}; }}\n\
         chain mark-for-masquerade {{ meta mark set meta mark or 0x4000; }}\n\
         chain masquerading {{\n\
           meta mark and 0x4000 == 0 return\n\
           meta mark set meta mark xor 0x4000\n\
           masquerade fully-random\n\
         }}\n\
         chain firewall-check {{ {ip} daddr . meta l4proto . th dport vmap @firewall-ips; }}\n\
         chain service-endpoints-check {{ {ip} daddr . meta l4proto . th dport vmap @no-endpoint-services; }}\n\
         chain nodeport-endpoints-check {{ {ip} daddr @nodeport-ips meta l4proto . th dport vmap @no-endpoint-nodeports; }}\n\
         chain filter-prerouting-pre-dnat {{\n\
           type filter hook prerouting priority dstnat - 10;\n\
           ct state new jump firewall-check\n\
         }}\n\
         chain filter-output-pre-dnat {{ type filter hook output priority -110; ct state new jump firewall-check; }}\n\
         chain filter-input {{\n\
           type filter hook input priority filter;\n\
           ct state new jump nodeport-endpoints-check\n\
           ct state new jump service-endpoints-check\n\
         }}\n\
         chain filter-forward {{\n\
           type filter hook forward priority filter;\n\
           ct state new jump service-endpoints-check\n\
         }}\n\
         chain filter-output {{\n\
           type filter hook output priority filter;\n\
           ct state new jump service-endpoints-check\n\
         }}\n\
         {chains}\
         map service-ips {{\n\
           type {addr} . inet_proto . inet_service : verdict;\n\
           elements = {{\n{map}}}\n\
         }}\n\
         chain services {{\n\
           {ip} daddr . meta l4proto . th dport vmap @service-ips\n\
           {ip} daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports\n\
         }}\n\
         chain nat-prerouting {{ type nat hook prerouting priority dstnat; jump services; }}\n\
         chain nat-output {{ type nat hook output priority -100; jump services; }}\n\
         chain nat-postrouting {{ type nat hook postrouting priority srcnat; jump masquerading; }}\n\
         }}\n"
    )
}

fn write_service(chains: &mut String, map: &mut String, number: usize, service: &Service) -> std::fmt::Result {
    let Service { name, frontend, protocol, backends } = service;
    let (address, port, protocol) = (frontend.ip(), frontend.port(), protocol.name());
    let (ip, _) = words(service.family());
    let pods = if service.family() == Family::V4 { "10.244.0.0/16" } else { "fd00:10:244::/48" };
    let chain = format!("service-{number:08}-{name}");
    let mut choices = String::new();
    for (index, backend) in backends.iter().enumerate() {
        let endpoint = format!("endpoint-{number:08}-{name}-{index}");
        writeln!(
            chains,
            "chain {endpoint} {{\n  {ip} saddr {} jump mark-for-masquerade\n  \
             meta l4proto {protocol} dnat to {backend}\n}}",
            backend.ip()
        )?;
        write!(choices, "{}{index} : goto {endpoint}", if index == 0 { "" } else { ", " })?;
    }
    writeln!(
        chains,
        "chain {chain} {{\n  \
         {ip} daddr {address} {protocol} dport {port} {ip} saddr != {pods} jump mark-for-masquerade\n  \
         numgen random mod {} vmap {{ {choices} }}\n}}",
        backends.len()
    )?;
    writeln!(map, "{address} . {protocol} . {port} : goto {chain},")
}
