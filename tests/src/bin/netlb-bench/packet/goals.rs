//! What the packet part should find.

use crate::report::{Goal, PacketRow};

/// netlb's programs, the one that the goals are of first. Without it they are of the next.
const MAIN: [&str; 2] = ["netlb_xdp", "netlb_tc"];
const LRU: &str = "lru_variant";

/// The goals, with what was measured.
pub(crate) fn goals(rows: &[PacketRow]) -> Vec<Goal> {
    let main = MAIN.into_iter().find(|main| rows.iter().any(|row| row.target == *main)).unwrap_or(MAIN[0]);
    let row = |case: &str, target: &str| rows.iter().find(|row| row.case == case && row.target == target);
    let net_of = |case: &str| Some(row(case, main)?.ratio_to_floor);
    let total_of = |case: &str| Some(1.0 + net_of(case)?);
    let beside_lru = |case: &str| Some(row(case, main)?.net_ns / row(case, LRU)?.net_ns);
    let beside = |case: &str, other: &str| Some(row(case, main)?.net_ns / row(other, main)?.net_ns);
    let goal = |what: &str, figure, at_most| Goal { what: format!("{main}: {what}"), figure, at_most };
    vec![
        goal("one flow, net / floor", net_of("established_1"), 2.0),
        goal("64k flows, net / floor", net_of("established_64k"), 4.0),
        goal("1M flows, net / floor", net_of("established_1m"), 5.0),
        goal("1M flows, net / LRU variant's", beside_lru("established_1m"), 0.4),
        goal("a new flow, net / floor", net_of("new_flow"), 12.0),
        goal("a new flow, net / LRU variant's", beside_lru("new_flow"), 0.4),
        goal("not ours, total / floor", total_of("not_ours"), 1.2),
        goal("100k services, net / with one", beside("services_100k", "services_1"), 1.15),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Spread;

    fn row(case: &str, target: &str, floor: f64, net_ns: f64) -> PacketRow {
        let total = floor + net_ns;
        PacketRow {
            case: case.to_owned(),
            target: target.to_owned(),
            ns: Spread { min: total, median: total, max: total },
            net_ns,
            ratio_to_floor: net_ns / floor,
            floor: "xdp_pass".to_owned(),
            packets: 1,
            instructions: None,
        }
    }

    #[test]
    fn ratios_are_of_what_a_program_takes_itself() {
        let rows = [
            row("established_1m", "netlb_xdp", 50.0, 100.0),
            row("established_1m", "netlb_tc", 50.0, 300.0),
            row("established_1m", LRU, 50.0, 400.0),
            row("not_ours", "netlb_xdp", 50.0, 5.0),
        ];
        let goals = goals(&rows);
        let figure = |what: &str| goals.iter().find(|goal| goal.what.ends_with(what)).and_then(|goal| goal.figure);
        assert_eq!(figure("1M flows, net / floor"), Some(2.0));
        assert_eq!(figure("1M flows, net / LRU variant's"), Some(0.25));
        assert_eq!(figure("not ours, total / floor"), Some(1.1));
        assert_eq!(figure("one flow, net / floor"), None);
    }
}
