//! What the bench finds: one JSON object, and the same as tables.

use std::io::{self, Write};

use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use serde::{Deserialize, Serialize};

/// The figures of all parts. A part that did not run is empty.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Report {
    pub packet: Vec<PacketRow>,
    pub path: Vec<PathRow>,
    pub control: Vec<ControlRow>,
}

/// The time a program takes for a packet.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct PacketRow {
    pub case: String,
    /// The program under test.
    pub target: String,
    /// Over the rounds, with the harness.
    pub ns: Spread,
    /// The median above that of the floor.
    pub net_ns: f64,
    /// `net_ns` as a multiple of the floor's median.
    pub ratio_to_floor: f64,
    /// The target of the same case that is the floor: a program of the same type that does nothing.
    pub floor: String,
    /// Packets of a round.
    pub packets: u32,
    /// Length of the program.
    pub instructions: Option<Instructions>,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Spread {
    pub min: f64,
    pub median: f64,
    pub max: f64,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub(crate) struct Instructions {
    /// Those that the verifier looked at, on all ways through the program.
    pub verified: u32,
    /// Those of the program as the kernel keeps it, its subprograms included.
    pub translated: u32,
}

/// Real traffic by netlb, as a multiple of the same by a peer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct PathRow {
    pub measure: String,
    pub services: u32,
    pub peer: String,
    pub cpu_ratio: Option<f64>,
    pub p50_ratio: Option<f64>,
    pub p99_ratio: Option<f64>,
    pub rate_ratio: Option<f64>,
}

/// What changes and restarts take.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct ControlRow {
    pub measure: String,
    pub services: u32,
    pub backends: u32,
    pub peer: String,
    pub seconds: Option<f64>,
    pub kernel_mb: Option<f64>,
}

/// Something that should be so on any machine.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Goal {
    pub what: String,
    /// None if it was not measured.
    pub figure: Option<f64>,
    pub at_most: f64,
}

impl Goal {
    pub(crate) fn outcome(&self) -> &'static str {
        match self.figure {
            None => "not measured",
            Some(figure) if figure <= self.at_most => "met",
            Some(_) => "missed",
        }
    }
}

impl Spread {
    /// Of some measurements, at least one.
    #[must_use]
    pub(crate) fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let middle = values.len() / 2;
        let median =
            if values.len() % 2 == 1 { values[middle] } else { f64::midpoint(values[middle - 1], values[middle]) };
        Self { min: values[0], median, max: values[values.len() - 1] }
    }
}

impl Report {
    /// Prints the tables of the parts that ran.
    pub(crate) fn print(&self, out: &mut impl Write) -> io::Result<()> {
        let Self { packet, path, control } = self;
        if !packet.is_empty() {
            let rows = packet.iter().map(|row| {
                let PacketRow { case, target, ns, net_ns, ratio_to_floor, floor: _, packets: _, instructions } = row;
                let (verified, translated) = match instructions {
                    Some(Instructions { verified, translated }) => (verified.to_string(), translated.to_string()),
                    None => Default::default(),
                };
                let ns = [ns.min, ns.median, ns.max, *net_ns].map(|ns| format!("{ns:.1}"));
                let words = [case.clone(), target.clone()].into_iter().chain(ns);
                words.chain([format!("{ratio_to_floor:.2}"), verified, translated]).collect()
            });
            let header =
                ["CASE", "TARGET", "MIN NS", "MEDIAN", "MAX", "NET", "NET/FLOOR", "INSNS VERIFIED", "TRANSLATED"];
            print_table(out, &header, 2, rows)?;
        }
        if !path.is_empty() {
            let rows = path.iter().map(|row| {
                let PathRow { measure, services, peer, cpu_ratio, p50_ratio, p99_ratio, rate_ratio } = row;
                let ratios = [cpu_ratio, p50_ratio, p99_ratio, rate_ratio].map(|ratio| figure(*ratio));
                [measure.clone(), peer.clone(), services.to_string()].into_iter().chain(ratios).collect()
            });
            print_table(out, &["MEASURE", "PEER", "SERVICES", "CPU", "P50", "P99", "RATE"], 2, rows)?;
        }
        if !control.is_empty() {
            let rows = control.iter().map(|row| {
                let ControlRow { measure, services, backends, peer, seconds, kernel_mb } = row;
                let numbers = [services.to_string(), backends.to_string(), figure(*seconds), figure(*kernel_mb)];
                [measure.clone(), peer.clone()].into_iter().chain(numbers).collect()
            });
            print_table(out, &["MEASURE", "PEER", "SERVICES", "BACKENDS", "SECONDS", "KERNEL MB"], 2, rows)?;
        }
        Ok(())
    }
}

/// Prints the goals with what came of them.
pub(crate) fn print_goals<'a>(goals: impl IntoIterator<Item = &'a Goal>, out: &mut impl Write) -> io::Result<()> {
    let rows = goals.into_iter().map(|goal| {
        vec![goal.what.clone(), figure(Some(goal.at_most)), figure(goal.figure), goal.outcome().to_owned()]
    });
    print_table(out, &["GOAL", "AT MOST", "MEASURED", "REACHED"], 1, rows)
}

fn figure(value: Option<f64>) -> String {
    match value {
        None => "-".to_owned(),
        Some(value) if value.abs() < 0.1 => format!("{value:.4}"),
        Some(value) => format!("{value:.2}"),
    }
}

/// The first `words` columns are words, the others are numbers.
fn print_table(
    out: &mut impl Write,
    header: &[&str],
    words: usize,
    rows: impl Iterator<Item = Vec<String>>,
) -> io::Result<()> {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(header);
    table.add_rows(rows);
    for (index, column) in table.column_iter_mut().enumerate() {
        column.set_padding((0, 2));
        if index >= words {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    for line in table.lines() {
        writeln!(out, "{}", line.trim_end())?;
    }
    writeln!(out)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_report_is_the_json_it_is_documented_as() {
        let json = json!({
            "packet": [{
                "case": "established_1",
                "target": "netlb_tc",
                "ns": {"min": 190.5, "median": 200.0, "max": 230.0},
                "net_ns": 120.0,
                "ratio_to_floor": 1.5,
                "floor": "tc_next",
                "packets": 100_000,
                "instructions": {"verified": 12_345, "translated": 2_345},
            }],
            "path": [{
                "measure": "connections",
                "services": 1,
                "peer": "direct",
                "cpu_ratio": 1.1,
                "p50_ratio": null,
                "p99_ratio": 1.2,
                "rate_ratio": 0.9,
            }],
            "control": [{
                "measure": "add",
                "services": 1000,
                "backends": 10,
                "peer": "netlb",
                "seconds": 0.01,
                "kernel_mb": null,
            }],
        });
        let report: Report = serde_json::from_value(json.clone()).unwrap();
        assert_eq!(serde_json::to_value(&report).unwrap(), json);
    }

    #[test]
    fn parts_that_did_not_run_are_there_and_empty() {
        let json = serde_json::to_value(Report::default()).unwrap();
        assert_eq!(json, json!({"packet": [], "path": [], "control": []}));
        let mut out = Vec::new();
        Report::default().print(&mut out).unwrap();
        assert!(out.is_empty());
    }

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(Spread::of(vec![3.0, 1.0, 7.0]), Spread { min: 1.0, median: 3.0, max: 7.0 });
        assert_eq!(Spread::of(vec![4.0, 1.0, 2.0, 9.0]), Spread { min: 1.0, median: 3.0, max: 9.0 });
    }

    #[test]
    fn goals_are_met_missed_or_unknown() {
        let goals = [Some(1.9), Some(2.0), Some(2.1), None];
        let goals = goals.map(|figure| Goal { what: "a ratio".to_owned(), figure, at_most: 2.0 });
        let mut out = Vec::new();
        print_goals(&goals, &mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        let outcomes = text.lines().skip(1).filter_map(|line| line.split("  ").last()).map(str::trim);
        assert_eq!(Vec::from_iter(outcomes.filter(|word| !word.is_empty())), ["met", "met", "missed", "not measured"]);
    }
}
