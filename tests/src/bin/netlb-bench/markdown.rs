//! The figures as tables for a document: between the marks that it has for each part, or as a document of their own.

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};

use crate::Part;
use crate::path::Scope;
use crate::report::{ControlRow, Goal, PacketRow, PathRow, Report};

/// What stands where there is no figure.
const NONE: &str = "–";
/// Columns of the packet part: targets, and what they are called.
const PROGRAMS: &[(&str, &str)] = &[
    ("xdp_memory", "memory"),
    ("netlb_xdp", "XDP"),
    ("netlb_tc", "TC ingress"),
    ("netlb_egress", "TC egress"),
    ("lru_variant", "LRU"),
];
/// What cases are called where there is room.
const CASES: &[(&str, &str)] = &[
    ("established_1", "established, 1 flow"),
    ("established_1k", "established, 1000 flows"),
    ("established_64k", "established, 64k flows"),
    ("established_1m", "established, 1M flows"),
    ("new_flow", "a new flow, both directions"),
    ("udp", "UDP, 1000 flows"),
    ("ipv6", "IPv6, 1000 flows"),
    ("reply", "replies, 1000 flows"),
    ("not_ours", "not ours, pod's interface"),
    ("not_ours_backend", "not ours, a backend's answer to whom it served without the service"),
    ("snat_1", "SNAT by one uplink, 1 flow"),
    ("snat_64k", "SNAT by one uplink, 64k flows"),
    ("snat_1m", "SNAT by one uplink, 1M flows"),
    ("snat_new", "SNAT by one uplink, a new flow, both directions"),
    ("snat_reply", "SNAT by one uplink, replies, 1000 flows"),
    ("dsr_1", "direct server return, 1 flow"),
    ("dsr_64k", "direct server return, 64k flows"),
    ("dsr_1m", "direct server return, 1M flows"),
    ("dsr_new", "direct server return, a new flow"),
    ("not_ours_uplink", "not ours, uplink"),
    ("masquerade_64k", "masquerade, 64k flows"),
    ("masquerade_new", "masquerade, a new flow, both directions"),
    ("masquerade_reply", "masquerade, replies, 1000 flows"),
    ("not_ours_masquerade", "not ours, uplink of a node that masquerades"),
    ("services_1", "1000 flows of one service, of 1"),
    ("services_10k", "1000 flows of one service, of 10 000"),
    ("services_100k", "1000 flows of one service, of 100 000"),
    ("services_1_spread", "64k flows, 1 service"),
    ("services_10k_spread", "64k flows over 10 000 services"),
    ("services_100k_spread", "64k flows over 100 000 services"),
    ("services_1_new", "a new flow, 1 service"),
    ("services_10k_new", "a new flow, of 10 000 services"),
    ("services_100k_new", "a new flow, of 100 000 services"),
];

/// A file to write tables into.
#[derive(Debug)]
pub(crate) struct Document {
    path: PathBuf,
    /// None where there is no file yet.
    text: Option<String>,
}

impl Document {
    /// Reads a file that is there, which must have marks for these parts.
    pub(crate) fn open(path: &Path, parts: impl IntoIterator<Item = Part>) -> Result<Self> {
        let text = match fs::read_to_string(path) {
            Ok(text) => Some(text),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error).with_context(|| format!("failed to read {}", path.display())),
        };
        for part in parts {
            let (begin, end) = marks(part);
            let has_marks = text.as_ref().is_none_or(|text| fill(text, part, "").is_some());
            ensure!(has_marks, "{} has no `{begin}` with `{end}` behind it", path.display());
        }
        Ok(Self { path: path.to_owned(), text })
    }

    /// Puts the parts' tables in.
    pub(crate) fn write(self, report: &Report, goals: &[(Part, Vec<Goal>)]) -> Result<()> {
        let Self { path, text } = self;
        let mut text = text.unwrap_or_else(|| goals.iter().map(|(part, _)| frame(*part)).collect());
        for (part, goals) in goals {
            let tables = match part {
                Part::Packet => packet(&report.packet),
                Part::Path => path_tables(&report.path),
                Part::Control => control(&report.control),
            };
            text = fill(&text, *part, &format!("{tables}{}", goals_table(goals))).unwrap_or(text);
        }
        fs::write(&path, text).with_context(|| format!("failed to write {}", path.display()))
    }
}

fn marks(part: Part) -> (String, String) {
    let name = part.name();
    (format!("<!-- bench:{name} -->\n"), format!("<!-- /bench:{name} -->"))
}

fn frame(part: Part) -> String {
    let (begin, end) = marks(part);
    format!("`cargo xtask bench --only {}`\n\n{begin}{end}\n\n", part.name())
}

/// The text with something else between a part's marks, or nothing where it has none.
fn fill(text: &str, part: Part, tables: &str) -> Option<String> {
    let (begin, end) = marks(part);
    let (before, rest) = text.split_once(&begin)?;
    let (_, after) = rest.split_once(&end)?;
    Some(format!("{before}{begin}\n{tables}{end}{after}"))
}

fn packet(rows: &[PacketRow]) -> String {
    let mut cases: Vec<&str> = Vec::new();
    for row in rows {
        if !cases.contains(&&*row.case) {
            cases.push(&row.case);
        }
    }
    cases.sort_by_key(|case| CASES.iter().position(|(name, _)| name == case));
    let programs = Vec::from_iter(PROGRAMS.iter().filter(|(target, _)| rows.iter().any(|row| row.target == *target)));
    let header = ["case"].into_iter().chain(programs.iter().flat_map(|(_, name)| [*name, "× floor"]));
    let mut text = String::from("Nanoseconds above the floor, and the same as a multiple of the floor:\n\n");
    table(
        &mut text,
        header,
        cases.iter().map(|case| {
            let title = CASES.iter().find(|(name, _)| name == case).map_or(*case, |(_, title)| title);
            let figures = programs.iter().flat_map(|(target, _)| {
                match rows.iter().find(|row| row.case == *case && row.target == *target) {
                    Some(row) => [format!("{:.0}", row.net_ns), format!("{:.1}", row.ratio_to_floor)],
                    None => [NONE, NONE].map(str::to_owned),
                }
            });
            [title.to_owned()].into_iter().chain(figures).collect()
        }),
    );

    text += "The programs. Of the floors the time is that of all of a packet, harness included, in the median of the cases:\n\n";
    let mut targets: Vec<&PacketRow> = Vec::new();
    for row in rows.iter().filter(|row| row.floor == row.target || row.target == "xdp_tx").chain(rows) {
        if !targets.iter().any(|known| known.target == row.target) {
            targets.push(row);
        }
    }
    table(
        &mut text,
        ["program", "ns", "instructions verified", "translated"],
        targets.iter().map(|target| {
            let of_target = rows.iter().filter(|row| row.target == target.target);
            let is_floor = target.floor == target.target || target.target == "xdp_tx";
            let time = crate::path::median(of_target.clone().map(|row| row.ns.median)).filter(|_| is_floor);
            let longest = of_target.filter_map(|row| row.instructions).max_by_key(|instructions| instructions.verified);
            let word = |number: Option<u32>| number.map_or(NONE.to_owned(), |number| number.to_string());
            vec![
                format!("`{}`", target.target),
                time.map_or(NONE.to_owned(), |time| format!("{time:.0}")),
                word(longest.map(|instructions| instructions.verified)),
                word(longest.map(|instructions| instructions.translated)),
            ]
        }),
    );
    text
}

fn path_tables(rows: &[PathRow]) -> String {
    type Figure = fn(&PathRow) -> Option<f64>;
    let figures: [(&str, Figure); 4] = [
        ("CPU time for an operation", |row| row.cpu_ratio),
        ("Median latency", |row| row.p50_ratio),
        ("99th percentile of the latency", |row| row.p99_ratio),
        ("Operations in a second", |row| row.rate_ratio),
    ];
    let mut text = String::new();
    for scope in Scope::all() {
        let rows = Vec::from_iter(rows.iter().filter(|row| scope.has(&row.measure)));
        let (mut sizes, mut peers) = (Vec::new(), Vec::<&str>::new());
        for row in &rows {
            sizes.push(row.services);
            if !peers.contains(&&*row.peer) {
                peers.push(&row.peer);
            }
        }
        sizes.sort_unstable();
        sizes.dedup();
        for (what, figure) in figures {
            let is_known = |measure: &&str| rows.iter().any(|row| row.measure == *measure && figure(row).is_some());
            let measures = Vec::from_iter(scope.measures().filter(is_known));
            if measures.is_empty() {
                continue;
            }
            let at = Vec::from_iter(sizes.iter().map(u32::to_string)).join(" / ");
            let _ = writeln!(text, "{what}, as a ratio to direct: {}. Number of services: {at}.\n", scope.what());
            table(
                &mut text,
                [""].into_iter().chain(measures.iter().copied()),
                peers.iter().map(|peer| {
                    let cells = measures.iter().map(|measure| {
                        let of = |services: &u32| {
                            let mut found = rows.iter().filter(|row| row.peer == *peer && row.measure == *measure);
                            found.find(|row| row.services == *services).and_then(|row| figure(row))
                        };
                        let figures = Vec::from_iter(sizes.iter().map(of));
                        if figures.iter().all(Option::is_none) {
                            return NONE.to_owned();
                        }
                        let word =
                            |figure: &Option<f64>| figure.map_or(NONE.to_owned(), |figure| format!("{figure:.2}"));
                        Vec::from_iter(figures.iter().map(word)).join(" / ")
                    });
                    let name = if peer.starts_with("netlb") { format!("**{peer}**") } else { (*peer).to_owned() };
                    [name].into_iter().chain(cells).collect()
                }),
            );
        }
    }
    text
}

fn control(rows: &[ControlRow]) -> String {
    let mut sizes = Vec::from_iter(rows.iter().map(|row| row.services));
    sizes.sort_unstable();
    sizes.dedup();
    let mut lines: Vec<(&str, &str)> = Vec::new();
    for row in rows.iter().filter(|row| row.peer == "netlb").chain(rows) {
        if !lines.contains(&(&row.measure, &row.peer)) {
            lines.push((&row.measure, &row.peer));
        }
    }
    let mut text = String::new();
    let header = ["".to_owned()].into_iter().chain(sizes.iter().map(|size| format!("{size} services")));
    table(
        &mut text,
        header,
        lines.iter().map(|(measure, peer)| {
            let figures = sizes.iter().map(|size| {
                let of_line = |row: &&ControlRow| (&*row.measure, &*row.peer, row.services) == (*measure, *peer, *size);
                let row = rows.iter().find(of_line);
                match row.map(|row| (row.seconds, row.kernel_mb)) {
                    Some((Some(seconds), _)) => time(seconds),
                    Some((None, Some(megabytes))) => memory(megabytes),
                    _ => NONE.to_owned(),
                }
            });
            let name = if *peer == "netlb" { (*measure).to_owned() } else { format!("{measure}, {peer}") };
            [name].into_iter().chain(figures).collect()
        }),
    );
    text
}

fn goals_table(goals: &[Goal]) -> String {
    let mut text = String::new();
    let rows = goals.iter().map(|goal| {
        let figure = goal.figure.map_or(NONE.to_owned(), short);
        vec![goal.what.clone(), short(goal.at_most), figure, goal.outcome().to_owned()]
    });
    table(&mut text, ["goal", "at most", "measured", "reached"], rows);
    text
}

fn short(figure: f64) -> String {
    if figure != 0.0 && figure.abs() < 0.1 { format!("{figure:.4}") } else { format!("{figure:.2}") }
}

fn time(seconds: f64) -> String {
    if seconds < 0.1 { format!("{:.2} ms", seconds * 1e3) } else { format!("{seconds:.2} s") }
}

fn memory(megabytes: f64) -> String {
    if megabytes < 0.1 { format!("{:.0} bytes", megabytes * 1e6) } else { format!("{megabytes:.1} MB") }
}

/// Adds a table and an empty line.
fn table<S: AsRef<str>>(
    text: &mut String,
    header: impl IntoIterator<Item = S>,
    rows: impl IntoIterator<Item = Vec<String>>,
) {
    let header = Vec::from_iter(header);
    let line = |cells: &mut dyn Iterator<Item = &str>| format!("| {} |\n", Vec::from_iter(cells).join(" | "));
    *text += &line(&mut header.iter().map(AsRef::as_ref));
    *text += &line(&mut header.iter().map(|_| "---"));
    for row in rows {
        *text += &line(&mut row.iter().map(String::as_str));
    }
    *text += "\n";
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::case_names;
    use crate::report::{Instructions, Spread};

    fn packet_row(case: &str, target: &str, floor: &str, net_ns: f64) -> PacketRow {
        PacketRow {
            case: case.to_owned(),
            target: target.to_owned(),
            ns: Spread { min: 40.0, median: 40.0 + net_ns, max: 400.0 },
            net_ns,
            ratio_to_floor: net_ns / 40.0,
            floor: floor.to_owned(),
            packets: 1,
            instructions: Some(Instructions { verified: 7, translated: 3 }),
        }
    }

    fn path_row(measure: &str, services: u32, peer: &str, cpu_ratio: Option<f64>) -> PathRow {
        let (measure, peer) = (measure.to_owned(), peer.to_owned());
        PathRow { measure, services, peer, cpu_ratio, p50_ratio: None, p99_ratio: None, rate_ratio: None }
    }

    #[test]
    fn every_case_has_a_title() {
        let untitled = case_names().find(|case| !CASES.iter().any(|(name, _)| name == case));
        assert_eq!(untitled, None);
        assert_eq!(case_names().count(), CASES.len(), "and no title is for nothing");
    }

    #[test]
    fn a_case_is_a_line_and_a_program_two_columns() {
        let text = packet(&[
            packet_row("snat_new", "netlb_xdp", "xdp_pass", 800.0),
            packet_row("established_1", "xdp_pass", "xdp_pass", 0.0),
            packet_row("established_1", "netlb_xdp", "xdp_pass", 100.0),
            packet_row("established_1", "netlb_tc", "tc_next", 200.0),
        ]);
        let lines = Vec::from_iter(text.lines().filter(|line| line.starts_with('|')));
        assert_eq!(
            lines[..4],
            [
                "| case | XDP | × floor | TC ingress | × floor |",
                "| --- | --- | --- | --- | --- |",
                "| established, 1 flow | 100 | 2.5 | 200 | 5.0 |",
                "| SNAT by one uplink, a new flow, both directions | 800 | 20.0 | – | – |",
            ]
        );
        assert_eq!(lines[6..8], ["| `xdp_pass` | 40 | 7 | 3 |", "| `netlb_xdp` | – | 7 | 3 |"]);
    }

    #[test]
    fn numbers_of_services_stand_beside_each_other() {
        let text = path_tables(&[
            path_row("TCP_RR", 1000, "nftables", Some(1.25)),
            path_row("TCP_RR", 1, "nftables", Some(1.2)),
            path_row("TCP_RR", 1, "netlb fast", Some(0.9)),
            path_row("TCP stream", 1, "nftables", None),
        ]);
        let lines = Vec::from_iter(text.lines().filter(|line| line.starts_with('|')));
        assert_eq!(
            lines,
            ["|  | TCP_RR |", "| --- | --- |", "| nftables | 1.20 / 1.25 |", "| **netlb fast** | 0.90 / – |"]
        );
    }

    #[test]
    fn netlb_comes_first_and_units_are_those_of_the_figures() {
        let row = |peer: &str, measure: &str, services, seconds, kernel_mb| ControlRow {
            measure: measure.to_owned(),
            services,
            backends: 10,
            peer: peer.to_owned(),
            seconds,
            kernel_mb,
        };
        let text = control(&[
            row("haproxy", "load", 1000, Some(3.1), None),
            row("netlb", "load", 10_000, Some(0.93), None),
            row("netlb", "seen", 1000, Some(0.0006), None),
            row("netlb", "memory", 1000, None, Some(59.0)),
            row("netlb", "flow", 1000, None, Some(0.000_256)),
        ]);
        assert_eq!(
            Vec::from_iter(text.lines().skip(2).filter(|line| !line.is_empty())),
            [
                "| load | – | 0.93 s |",
                "| seen | 0.60 ms | – |",
                "| memory | 59.0 MB | – |",
                "| flow | 256 bytes | – |",
                "| load, haproxy | 3.10 s | – |",
            ]
        );
    }

    #[test]
    fn only_what_is_between_the_marks_of_a_part_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("performance.md");
        let goals = || vec![(Part::Control, vec![Goal { what: "load".to_owned(), figure: Some(0.5), at_most: 1.0 }])];
        fs::write(&file, "before\n<!-- bench:control -->\nold\n<!-- /bench:control -->\nafter\n").unwrap();
        assert!(Document::open(&file, [Part::Path]).is_err(), "there is no place for it");
        for _ in 0..2 {
            Document::open(&file, [Part::Control]).unwrap().write(&Report::default(), &goals()).unwrap();
            let text = fs::read_to_string(&file).unwrap();
            assert!(text.starts_with("before\n<!-- bench:control -->\n\n") && text.ends_with("\nafter\n"), "{text}");
            assert!(!text.contains("old"), "{text}");
            assert_eq!(text.matches("| load | 1.00 | 0.50 | met |\n").count(), 1, "{text}");
        }
        let new = dir.path().join("new.md");
        Document::open(&new, [Part::Control]).unwrap().write(&Report::default(), &goals()).unwrap();
        assert!(fs::read_to_string(&new).unwrap().contains("| load | 1.00 | 0.50 | met |\n"));
    }
}
