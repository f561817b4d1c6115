//! The views as text.

use std::{fmt::Write as _, time::Duration};

use super::output::{Style, View, short, table};
use crate::{
    config::format_duration,
    model::{Mode, TrafficPolicy},
    spec::Hints,
    view::{ApplyResult, BackendView, FlowCount, FlowView, List, ServiceView, StatusView},
};

fn joined<T: ToString>(list: &[T]) -> String {
    list.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

fn or_dash(text: String) -> String {
    if text.is_empty() { "-".to_owned() } else { text }
}

/// Every way a service is reached by: a node port as `:PORT/PROTOCOL`, a published one as it was published.
fn ways(service: &ServiceView) -> String {
    let frontends = [&service.frontends, &service.external_ips, &service.load_balancer_ips];
    let node_ports = service.node_ports.iter().map(|port| format!(":{port}"));
    let ways = frontends.into_iter().flatten().map(ToString::to_string).chain(node_ports);
    ways.chain(service.publish.iter().map(ToString::to_string)).collect::<Vec<_>>().join(",")
}

/// What there is besides frontends and backends, each with its name.
fn particulars(service: &ServiceView) -> Vec<(&'static str, String)> {
    let unless_default = |policy: TrafficPolicy| {
        if policy == TrafficPolicy::default() { String::new() } else { policy.to_string() }
    };
    let all = [
        ("external IPs", joined(&service.external_ips)),
        ("load balancer IPs", joined(&service.load_balancer_ips)),
        ("source ranges", joined(&service.source_ranges)),
        ("node ports", joined(&service.node_ports)),
        ("published", joined(&service.publish)),
        ("family", service.family.map_or_else(String::new, |family| family.to_string())),
        ("mode", if service.mode == Mode::default() { String::new() } else { service.mode.to_string() }),
        ("external traffic", unless_default(service.external_traffic_policy)),
        ("internal traffic", unless_default(service.internal_traffic_policy)),
        ("affinity", service.affinity.seconds().map_or_else(String::new, |_| service.affinity.to_string())),
    ];
    all.into_iter().filter(|(_, value)| !value.is_empty()).collect()
}

/// `ready`, `not-ready,serving,terminating`, …: serving where it differs from ready.
fn conditions(backend: &BackendView) -> String {
    let BackendView { ready, serving, terminating, .. } = *backend;
    let mut words = vec![if ready { "ready" } else { "not-ready" }];
    if serving != ready {
        words.push(if serving { "serving" } else { "not-serving" });
    }
    if terminating {
        words.push("terminating");
    }
    words.join(",")
}

fn hints(backend: &BackendView) -> String {
    let Hints { nodes, zones } = backend.hints.clone().unwrap_or_default();
    let nodes = nodes.into_iter().map(|node| format!("node/{node}"));
    nodes.chain(zones.into_iter().map(|zone| format!("zone/{zone}"))).collect::<Vec<_>>().join(",")
}

/// A column that is there only if a backend has something in it: its name, what the others have, and what this one has.
type Column = (&'static str, &'static str, fn(&BackendView) -> String);

fn backend_table(backends: &[BackendView], style: Style) -> String {
    const OPTIONAL: [Column; 4] = [
        ("CONDITIONS", "ready", conditions),
        ("NODE", "", |backend| backend.node.clone().unwrap_or_default()),
        ("ZONE", "", |backend| backend.zone.clone().unwrap_or_default()),
        ("HINTS", "", hints),
    ];
    let configured = || backends.iter().filter(|backend| !backend.is_removed());
    let is_there = |(_, plain, value): &Column| configured().any(|backend| value(backend) != *plain);
    let optional: Vec<Column> = OPTIONAL.into_iter().filter(is_there).collect();
    let row = |backend: &BackendView| {
        let weight = if backend.weight == 0 { "-".to_owned() } else { backend.weight.to_string() };
        let mut row = vec![backend.address.to_string(), weight, backend.state.clone()];
        let value = |(_, _, value): &Column| if backend.is_removed() { String::new() } else { value(backend) };
        row.extend(optional.iter().map(|column| or_dash(value(column))));
        row.extend([backend.active_flows.to_string(), short(backend.flows)]);
        row
    };
    let mut headers = vec!["BACKEND", "WEIGHT", "STATE"];
    headers.extend(optional.iter().map(|(name, ..)| *name));
    headers.extend(["ACTIVE", "FLOWS"]);
    table(style, &headers, &["WEIGHT", "ACTIVE", "FLOWS"], backends.iter().map(row).collect())
}

impl View for List<ServiceView> {
    fn text(&self, style: Style) -> String {
        let mut headers = vec!["NAME", "FRONTENDS", "ALGORITHM", "BACKENDS", "FLOWS", "PACKETS", "BYTES", "OWNER"];
        if style.wide {
            headers.splice(5..7, ["TOTAL", "PACKETS-IN", "PACKETS-OUT", "BYTES-IN", "BYTES-OUT"]);
            headers.splice(3..3, ["SNAT", "MODE", "AFFINITY", "EXTERNAL", "INTERNAL"]);
            headers.push("PROBLEM");
        }
        let row = |service: &ServiceView| {
            let mut row = vec![
                service.name.clone(),
                ways(service),
                service.algorithm.to_string(),
                format!("{}/{}", service.active_backends(), service.configured_backends()),
                service.active_flows.to_string(),
            ];
            if style.wide {
                let counters =
                    [service.flows, service.packets_in, service.packets_out, service.bytes_in, service.bytes_out];
                row.extend(counters.map(short));
                let ServiceView { snat, mode, affinity, external_traffic_policy, internal_traffic_policy, .. } =
                    service;
                let words = [
                    snat.to_string(),
                    mode.to_string(),
                    affinity.to_string(),
                    external_traffic_policy.to_string(),
                    internal_traffic_policy.to_string(),
                ];
                row.splice(3..3, words);
            } else {
                row.push(short(service.packets_in + service.packets_out));
                row.push(short(service.bytes_in + service.bytes_out));
            }
            row.push(service.owner.to_string());
            if style.wide {
                row.push(service.problem.clone().unwrap_or_default());
            }
            row
        };
        let numbers =
            ["BACKENDS", "FLOWS", "PACKETS", "BYTES", "TOTAL", "PACKETS-IN", "PACKETS-OUT", "BYTES-IN", "BYTES-OUT"];
        table(style, &headers, &numbers, self.items.iter().map(row).collect())
    }

    fn names(&self) -> Vec<String> {
        self.items.iter().map(|service| service.name.clone()).collect()
    }
}

impl View for ServiceView {
    /// Two levels: the service, and below it what else it has, and its backends.
    fn text(&self, style: Style) -> String {
        let mut text = String::new();
        let Self { name, algorithm, snat, owner, active_flows, flows, .. } = self;
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "{name}  {}  {algorithm}  snat {snat}  owner {owner}  {active_flows} flows of {flows}  in {} packets {} bytes  out {} packets {} bytes",
            or_dash(joined(&self.frontends)),
            short(self.packets_in),
            short(self.bytes_in),
            short(self.packets_out),
            short(self.bytes_out),
        );
        for (name, value) in particulars(self) {
            let _ = writeln!(text, "  {name}: {value}");
        }
        if let Some(problem) = &self.problem {
            let _ = writeln!(text, "  out of sync: {problem}");
        }
        if self.backends.is_empty() {
            text.push_str("  no backends");
        }
        for line in backend_table(&self.backends, style).lines().filter(|_| !self.backends.is_empty()) {
            let _ = writeln!(text, "  {line}");
        }
        text
    }

    fn names(&self) -> Vec<String> {
        vec![self.name.clone()]
    }
}

impl View for List<BackendView> {
    fn text(&self, style: Style) -> String {
        backend_table(&self.items, style)
    }

    fn names(&self) -> Vec<String> {
        self.items.iter().map(|backend| backend.address.to_string()).collect()
    }
}

impl View for BackendView {
    fn text(&self, style: Style) -> String {
        backend_table(std::slice::from_ref(self), style)
    }

    fn names(&self) -> Vec<String> {
        vec![self.address.to_string()]
    }
}

impl View for List<FlowView> {
    fn text(&self, style: Style) -> String {
        // A column that is there only if a flow has something in it.
        let has_sources = self.items.iter().any(|flow| flow.source.is_some());
        let row = |flow: &FlowView| {
            // In brackets, which no service's name has.
            let service = if flow.masqueraded { Some("(masqueraded)".to_owned()) } else { flow.service.clone() };
            let source = has_sources.then(|| flow.source.map(|source| format!("{source}/{}", flow.protocol)));
            let rest = [flow.frontend.map(|frontend| frontend.to_string()), flow.backend.map(|at| at.to_string())];
            let ends = [service, Some(flow.client.to_string())].into_iter().chain(source).chain(rest);
            let mut row: Vec<_> = ends.map(|end| or_dash(end.unwrap_or_default())).collect();
            row.extend([flow.state.clone(), format_duration(Duration::from_secs(flow.idle_seconds))]);
            row
        };
        let mut headers = vec!["SERVICE", "CLIENT", "FRONTEND", "BACKEND", "STATE", "IDLE"];
        if has_sources {
            headers.insert(2, "SOURCE");
        }
        table(style, &headers, &["IDLE"], self.items.iter().map(row).collect())
    }

    fn names(&self) -> Vec<String> {
        let to = |flow: &FlowView| match (flow.frontend, flow.source) {
            (Some(frontend), _) => frontend.to_string(),
            (None, Some(source)) => format!("{source}/{}", flow.protocol),
            (None, None) => "-".to_owned(),
        };
        self.items.iter().map(|flow| format!("{} {}", flow.client, to(flow))).collect()
    }
}

impl View for FlowCount {
    fn text(&self, _: Style) -> String {
        self.count.to_string()
    }

    fn names(&self) -> Vec<String> {
        vec![self.count.to_string()]
    }
}

impl View for ApplyResult {
    fn text(&self, _: Style) -> String {
        let mut text = String::new();
        let dry = if self.dry_run { " (dry run)" } else { "" };
        for (what, names) in [("created", &self.created), ("updated", &self.updated), ("removed", &self.removed)] {
            for name in names {
                let _ = writeln!(text, "service {name} {what}{dry}");
            }
        }
        let _ = writeln!(
            text,
            "{} created, {} updated, {} unchanged, {} removed{dry}",
            self.created.len(),
            self.updated.len(),
            self.unchanged.len(),
            self.removed.len()
        );
        text
    }

    fn names(&self) -> Vec<String> {
        self.created.iter().chain(&self.updated).chain(&self.removed).cloned().collect()
    }
}

impl View for StatusView {
    fn text(&self, style: Style) -> String {
        let mut text = String::new();
        let mut fact = |name: &str, value: String| {
            let _ = writeln!(text, "{name:<13} {value}");
        };
        let uptime = format_duration(Duration::from_secs(self.uptime_seconds));
        fact("version", format!("{} (pid {})", self.version, self.pid));
        fact("uptime", format!("{uptime} (since {})", self.started));
        let node = &self.node;
        fact(
            "node",
            node.name.clone() + &node.zone.as_ref().map_or_else(String::new, |zone| format!(" (zone {zone})")),
        );
        fact("node ports", or_dash(joined(&node.node_port_addresses)));
        if !node.snat_addresses.is_empty() {
            fact("SNAT", joined(&node.snat_addresses));
        }
        fact("services", self.services.to_string());
        fact("backends", self.backends.to_string());
        fact("forwarding", self.forwarding.clone());
        if let Some(sockets) = &self.sockets {
            fact("sockets", format!("{}, {} ({})", sockets.scope, sockets.cgroup, sockets.hooks.join(" ")));
        }
        fact("loaded in", format!("{:.3} s", self.load_seconds));
        fact("kernel memory", format!("{}B", short(self.kernel_bytes)));
        if let Some(map) = &self.flow_table {
            #[expect(clippy::cast_precision_loss, reason = "one digit after the point is shown")]
            let percent = 100.0 * map.entries as f64 / map.max_entries.max(1) as f64;
            fact("flow table", format!("{} of {} entries ({percent:.1} %)", map.entries, map.max_entries));
        }
        let reload = &self.reload;
        fact(
            "config",
            match &reload.message {
                Some(message) if !reload.ok => {
                    format!("{}: FAILED at {}, the services before it stay: {message}", reload.file, reload.time)
                }
                _ => format!("{}: read at {}", reload.file, reload.time),
            },
        );
        section(&mut text, "INTERFACES", &interface_rows(self, style));
        section(&mut text, "COUNTERS", &counter_rows(self, style));
        if style.wide {
            section(&mut text, "MAPS", &map_rows(self));
        }
        section(&mut text, "WARNINGS", &self.warnings.join("\n"));
        let out_of_sync = self.out_of_sync.iter().map(|service| format!("{}: {}", service.service, service.problem));
        section(&mut text, "OUT OF SYNC", &out_of_sync.collect::<Vec<_>>().join("\n"));
        let conflicts = self.conflicts.iter().map(|conflict| {
            let what = conflict.frontend.map_or_else(|| "the name".to_owned(), |frontend| frontend.to_string());
            let (service, owner, held_by, held_by_owner) =
                (&conflict.service, conflict.owner, &conflict.held_by, conflict.held_by_owner);
            format!("{service} ({owner}) claims {what}, held by {held_by} ({held_by_owner})")
        });
        section(&mut text, "CONFLICTS", &conflicts.collect::<Vec<_>>().join("\n"));
        text
    }

    fn names(&self) -> Vec<String> {
        vec![self.version.clone()]
    }
}

/// A title with lines below it; nothing where there are none.
fn section(text: &mut String, title: &str, lines: &str) {
    if !lines.is_empty() {
        let _ = writeln!(text, "\n{title}");
        for line in lines.lines() {
            let _ = writeln!(text, "  {line}");
        }
    }
}

fn interface_rows(status: &StatusView, style: Style) -> String {
    let row = |interface: &crate::view::InterfaceView| {
        let hook = if interface.hook.is_empty() { "-" } else { &interface.hook };
        vec![
            interface.name.clone(),
            interface.index.to_string(),
            interface.role.clone(),
            hook.to_owned(),
            interface.problem.clone().unwrap_or_default(),
        ]
    };
    let rows: Vec<_> = status.interfaces.iter().map(row).collect();
    if rows.is_empty() {
        String::new()
    } else {
        table(style, &["NAME", "INDEX", "ROLE", "HOOK", "PROBLEM"], &["INDEX"], rows)
    }
}

fn counter_rows(status: &StatusView, style: Style) -> String {
    let shown = status.counters.iter().filter(|counter| style.wide || counter.value > 0);
    let rows: Vec<_> = shown
        .map(|counter| vec![counter.name.clone(), counter.value.to_string(), counter.description.clone()])
        .collect();
    let style = Style { headers: false, ..style };
    if rows.is_empty() { String::new() } else { table(style, &["NAME", "VALUE", "DESCRIPTION"], &["VALUE"], rows) }
}

fn map_rows(status: &StatusView) -> String {
    let rows: Vec<_> = status
        .maps
        .iter()
        .map(|map| vec![map.name.clone(), map.entries.to_string(), map.max_entries.to_string(), short(map.bytes)])
        .collect();
    let style = Style { wide: true, headers: true };
    if rows.is_empty() {
        String::new()
    } else {
        table(style, &["MAP", "ENTRIES", "SIZE", "BYTES"], &["ENTRIES", "SIZE", "BYTES"], rows)
    }
}
