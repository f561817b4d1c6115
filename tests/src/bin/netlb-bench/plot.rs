//! The figures as pictures: bars in groups, a file for each kind of figure.

use std::path::Path;

use anyhow::{Context as _, Result};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::report::{ControlRow, PacketRow, PathRow, Report, Spread};

const WIDTH: u32 = 1000;
const BAR: u32 = 13;
const GAP: u32 = 10;
const LABELS: u32 = 240;
const HEAD: u32 = 70;
const FOOT: u32 = 45;
const FONT: (&str, u32) = ("sans-serif", 12);

/// Bars that are compared with each other.
struct Group {
    label: String,
    bars: Vec<Bar>,
}

struct Bar {
    /// Bars of one series have one colour.
    series: String,
    value: f64,
    /// Least and most.
    range: Option<(f64, f64)>,
}

#[derive(Clone, Copy, Eq, PartialEq)]
enum Scale {
    Linear,
    /// For figures that differ by orders of magnitude.
    Logarithmic,
}

/// Writes the plots of the parts that ran.
pub(crate) fn write(report: &Report, dir: &Path) -> Result<()> {
    let Report { packet, path, control } = report;
    let of_path = |figure: fn(&PathRow) -> Option<f64>| {
        let bars = path.iter().map(|row| (count(&row.measure, "services", row.services), &row.peer, figure(row)));
        grouped(bars)
    };
    let of_control = |figure: fn(&ControlRow) -> Option<f64>| {
        grouped(control.iter().map(|row| {
            let label = count(&row.measure, "services", row.services);
            (count(&label, "backends", row.backends), &row.peer, figure(row))
        }))
    };
    let plots = [
        ("packet.svg", "One packet, harness included", "ns", Scale::Linear, of_packet(packet)),
        ("path-cpu.svg", "CPU time beside direct traffic", "ratio", Scale::Linear, of_path(|row| row.cpu_ratio)),
        ("path-p50.svg", "Median latency beside direct traffic", "ratio", Scale::Linear, of_path(|row| row.p50_ratio)),
        ("path-p99.svg", "99th percentile beside direct traffic", "ratio", Scale::Linear, of_path(|row| row.p99_ratio)),
        ("path-rate.svg", "Rate beside direct traffic", "ratio", Scale::Linear, of_path(|row| row.rate_ratio)),
        ("control.svg", "Time of changes", "seconds", Scale::Logarithmic, of_control(|row| row.seconds)),
        ("memory.svg", "Kernel memory", "MB", Scale::Logarithmic, of_control(|row| row.kernel_mb)),
    ];
    for (file, title, unit, scale, groups) in plots {
        if !groups.is_empty() {
            let file = dir.join(file);
            draw(&file, title, unit, scale, &groups).with_context(|| format!("failed to write {}", file.display()))?;
        }
    }
    Ok(())
}

fn count(label: &str, what: &str, number: u32) -> String {
    if number == 0 { label.to_owned() } else { format!("{label}, {number} {what}") }
}

fn of_packet(rows: &[PacketRow]) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    for PacketRow { case, target, ns: Spread { min, median, max }, .. } in rows {
        let bar = Bar { series: target.clone(), value: *median, range: Some((*min, *max)) };
        push(&mut groups, case, bar);
    }
    groups
}

/// What has no figure is left out.
fn grouped<'a>(rows: impl Iterator<Item = (String, &'a String, Option<f64>)>) -> Vec<Group> {
    let mut groups = Vec::new();
    for (label, series, value) in rows {
        if let Some(value) = value {
            push(&mut groups, &label, Bar { series: series.clone(), value, range: None });
        }
    }
    groups
}

fn push(groups: &mut Vec<Group>, label: &str, bar: Bar) {
    match groups.iter_mut().find(|group| group.label == label) {
        Some(group) => group.bars.push(bar),
        None => groups.push(Group { label: label.to_owned(), bars: vec![bar] }),
    }
}

fn draw(file: &Path, title: &str, unit: &str, scale: Scale, groups: &[Group]) -> Result<()> {
    let bars = || groups.iter().flat_map(|group| &group.bars);
    let mut series: Vec<&str> = Vec::new();
    for bar in bars() {
        if !series.contains(&&*bar.series) {
            series.push(&bar.series);
        }
    }
    let colour = |of: &str| Palette99::pick(series.iter().position(|series| *series == of).unwrap_or_default());

    let most = bars().map(|bar| bar.range.map_or(bar.value, |(_, most)| most)).fold(0.0, f64::max);
    let least = bars().map(|bar| bar.value).filter(|value| *value > 0.0).fold(most, f64::min);
    // Along the axis, a power of ten is a unit where the scale is logarithmic.
    let along = |value: f64| match scale {
        Scale::Linear => value,
        Scale::Logarithmic => value.max(least / 10.0).log10(),
    };
    let axis = match scale {
        Scale::Linear => 0.0..(most * 1.05).max(f64::MIN_POSITIVE),
        Scale::Logarithmic => (least.log10() - 1.0).floor()..most.log10().ceil(),
    };

    let length = u32::try_from(groups.iter().map(|group| group.bars.len()).sum::<usize>())? * BAR
        + u32::try_from(groups.len())? * GAP;
    let root = SVGBackend::new(file, (WIDTH, HEAD + length + FOOT)).into_drawing_area();
    root.fill(&WHITE)?;
    let text = FONT.into_text_style(&root);
    let left = text.pos(Pos::new(HPos::Left, VPos::Center));
    let right = text.pos(Pos::new(HPos::Right, VPos::Center));
    root.draw(&Text::new(title.to_owned(), (10, 20), FontDesc::from(("sans-serif", 18)).into_text_style(&root)))?;
    for (index, name) in series.iter().enumerate() {
        let x = 10 + 130 * i32::try_from(index)?;
        root.draw(&Rectangle::new([(x, 45), (x + 10, 55)], colour(name).filled()))?;
        root.draw(&Text::new((*name).to_owned(), (x + 15, 50), left.clone()))?;
    }

    let mut chart = ChartBuilder::on(&root)
        .margin_top(HEAD)
        .margin_right(20)
        .x_label_area_size(FOOT)
        .y_label_area_size(LABELS)
        .build_cartesian_2d(axis.clone(), f64::from(length)..0.0)?;
    chart
        .configure_mesh()
        .disable_y_mesh()
        .max_light_lines(1)
        .y_labels(0)
        .x_desc(unit)
        .x_label_formatter(&|x| match scale {
            Scale::Linear => short(*x),
            Scale::Logarithmic => short(10_f64.powf(*x)),
        })
        .draw()?;
    let area = chart.plotting_area();
    let mut y = f64::from(GAP) / 2.0;
    for Group { label, bars } in groups {
        let (x, middle) = area.map_coordinate(&(axis.start, y + f64::from(BAR) * bars.len() as f64 / 2.0));
        root.draw(&Text::new(label.clone(), (x - 8, middle), right.clone()))?;
        for Bar { series, value, range } in bars {
            let (top, bottom) = (y + 1.0, y + f64::from(BAR) - 1.0);
            area.draw(&Rectangle::new([(axis.start, top), (along(*value), bottom)], colour(series).filled()))?;
            let mut end = *value;
            if let Some((least, most)) = range {
                let line = [(along(*least), f64::midpoint(top, bottom)), (along(*most), f64::midpoint(top, bottom))];
                area.draw(&PathElement::new(line, BLACK))?;
                end = *most;
            }
            let (x, middle) = area.map_coordinate(&(along(end), f64::midpoint(top, bottom)));
            root.draw(&Text::new(short(*value), (x + 4, middle), left.clone()))?;
            y += f64::from(BAR);
        }
        y += f64::from(GAP);
    }
    root.present()?;
    Ok(())
}

/// Three digits that matter.
fn short(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_owned(),
        100.0.. => format!("{value:.0}"),
        10.0.. => format!("{value:.1}"),
        0.1.. => format!("{value:.2}"),
        _ => format!("{value:.4}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plots_of_the_parts_that_ran_have_a_bar_for_every_figure() {
        let packet = |case: &str, target: &str| PacketRow {
            case: case.to_owned(),
            target: target.to_owned(),
            ns: Spread { min: 100.0, median: 123.0, max: 200.0 },
            net_ns: 70.0,
            ratio_to_floor: 1.4,
            floor: "xdp_pass".to_owned(),
            packets: 1000,
            instructions: None,
        };
        let control = |services, seconds| ControlRow {
            measure: "add".to_owned(),
            services,
            backends: 1,
            peer: "netlb".to_owned(),
            seconds,
            kernel_mb: None,
        };
        let report = Report {
            packet: vec![packet("one", "netlb_tc"), packet("one", "xdp_pass"), packet("two", "netlb_tc")],
            path: Vec::new(),
            control: vec![control(1, Some(0.001)), control(1000, Some(0.3)), control(100_000, None)],
        };
        let dir = tempfile::tempdir().unwrap();
        write(&report, dir.path()).unwrap();
        let mut files = Vec::from_iter(dir.path().read_dir().unwrap().map(|file| file.unwrap().file_name()));
        files.sort();
        assert_eq!(files, ["control.svg", "packet.svg"]);
        let read = |file| std::fs::read_to_string(dir.path().join(file)).unwrap();
        assert_eq!(read("packet.svg").matches("\n123\n").count(), 3);
        let control = read("control.svg");
        assert!(control.contains("0.0010") && control.contains("0.30") && !control.contains("100000"), "{control}");
    }
}
