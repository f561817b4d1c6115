//! Rounds in which programs take turns.

use anyhow::{Context as _, Result, ensure};

use super::bed::Bed;
use super::cases::{Case, Group, Packets, Scene, Traffic};
use super::harness::{Harness, Target};
use crate::report::{PacketRow, Spread};

/// How much is measured.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Effort {
    rounds: usize,
    /// Of each program in each round.
    packets: u32,
    /// New flows of a round: at most as many as leave room in the flow table. With those before them they are fewer than a case has.
    new_flows: u32,
    /// Cases with more are left out, and what would be compared with them.
    services: u32,
    flows: u32,
    /// Whether there is time for all cases.
    is_full: bool,
}

/// Many short rounds rather than few long ones: on a busy machine, programs that take turns often have the same share of bad times.
pub(crate) const QUICK: Effort =
    Effort { rounds: 7, packets: 1 << 15, new_flows: 1 << 16, services: u32::MAX, flows: u32::MAX, is_full: false };
pub(crate) const FULL: Effort = Effort { rounds: 31, packets: 1 << 17, is_full: true, ..QUICK };
/// Shows that everything runs. Its times say nothing.
pub(crate) const SMOKE: Effort =
    Effort { rounds: 1, packets: 1 << 8, new_flows: 1 << 8, services: 1024, flows: 1 << 10, ..QUICK };
/// Of the packets of a round, so many go before them, to have code and data where they will be.
const WARM_UP: u32 = 8;

/// Measures a group's cases.
///
/// `lru` is the object with the kernel's LRU hash for a flow table: measured where there is one service only.
pub(crate) fn group(
    harness: &mut Harness,
    lru: &[u8],
    group: &Group,
    is_wanted: impl Fn(&Case) -> bool,
    effort: Effort,
) -> Result<Vec<PacketRow>> {
    let mut beds: Vec<Bed> = Vec::new();
    let is_measured = |set: &&[Case]| set.iter().all(|case| effort.has(case)) && set.iter().any(&is_wanted);
    let sets = Vec::from_iter(group.sets.iter().copied().filter(is_measured));
    for case in sets.iter().copied().flatten() {
        if !beds.iter().any(|bed| bed.is_for(case)) {
            beds.push(Bed::new(case.scene, case.size)?);
            if case.scene == Scene::Pods && case.size.services == 1 {
                beds.push(Bed::with_lru(lru, case.size).context("the variant with an LRU hash")?);
            }
        }
    }
    let mut rows = Vec::new();
    for set in sets {
        rows.extend(measure(harness, &mut beds, set, effort)?);
    }
    Ok(rows)
}

impl Effort {
    fn has(&self, case: &Case) -> bool {
        let is_small =
            case.size.services <= self.services && (case.traffic == Traffic::New || 1 << case.flows_log2 <= self.flows);
        is_small && (case.quick || self.is_full)
    }
}

/// A program in a case.
struct Contender<'a> {
    case: &'a Case,
    target: Target,
    /// Where it is one of netlb's.
    bed: Option<usize>,
    /// What a packet took in each round.
    times: Vec<f64>,
}

fn measure(harness: &mut Harness, beds: &mut [Bed], cases: &[Case], effort: Effort) -> Result<Vec<PacketRow>> {
    let mut contenders = Vec::new();
    for case in cases {
        let mut add = |targets: Vec<Target>, bed| {
            contenders.extend(targets.into_iter().map(|target| Contender { case, target, bed, times: Vec::new() }));
        };
        add(harness.floors()?, None);
        if case.memory().is_some() {
            add(vec![harness.memory()?], None);
        }
        for (index, bed) in beds.iter_mut().enumerate().filter(|(_, bed)| bed.is_for(case)) {
            bed.open(case, harness)?;
            add(bed.targets(case)?, Some(index));
        }
    }
    let count = contenders.len();
    for round in 0..effort.rounds {
        for turn in 0..count {
            let contender = &mut contenders[(turn + round) % count];
            let bed = contender.bed.map(|index| &mut beds[index]);
            let time = contender.run(harness, bed, effort, (round * count + turn) as u64);
            let what = || format!("{}, {}", contender.case.name, contender.target.name);
            contender.times.push(time.with_context(what)?);
        }
    }
    rows(&contenders, effort)
}

impl Contender<'_> {
    fn packets(&self, effort: Effort) -> u32 {
        if self.case.traffic == Traffic::New { effort.new_flows } else { effort.packets }
    }

    /// Runs packets before those that are timed: code and data shall be where they will be. And each of many flows shall have been heard of a
    /// moment ago, as established ones are: what a flow's first packet in some seconds costs is another case.
    fn warm_up(&self, harness: &mut Harness, packets: &Packets, count: u32) -> Result<()> {
        let kind = self.target.kind();
        if self.case.traffic != Traffic::New {
            harness.plan(&packets.in_order())?;
            harness.run(kind, packets, 1 << self.case.flows_log2)?;
        }
        harness.plan(packets)?;
        harness.run(kind, packets, count / WARM_UP)?;
        Ok(())
    }

    /// One round; the time of a packet. With the seed comes another order of flows: the caches should hold what they would of all flows,
    /// not those of the turn before.
    fn run(&self, harness: &mut Harness, bed: Option<&mut Bed>, effort: Effort, seed: u64) -> Result<f64> {
        let Self { case, target, .. } = self;
        let count = self.packets(effort);
        let bed = bed.map(|bed| {
            if case.traffic == Traffic::New {
                bed.flush()?;
            }
            anyhow::Ok(&*bed)
        });
        let bed = bed.transpose()?;
        let packets = case.packets(seed);
        harness.aim(target)?;
        self.warm_up(harness, &packets, count)?;
        let run = match bed {
            None => harness.run(target.kind(), &packets, count)?,
            Some(bed) => {
                let before = bed.counters();
                let run = harness.run(target.kind(), &packets, count)?;
                if let Some(hook) = target.hook() {
                    bed.check(&before, case, hook, count)?;
                }
                run
            }
        };
        let verdict = target.verdict(case);
        ensure!(run.verdict == verdict, "the verdict is {}, not {verdict}", run.verdict);
        Ok(run.nanoseconds)
    }
}

fn rows(contenders: &[Contender<'_>], effort: Effort) -> Result<Vec<PacketRow>> {
    let spread = |contender: &Contender<'_>| Spread::of(contender.times.clone());
    let row = |contender: &Contender<'_>| {
        let Contender { case, target, .. } = contender;
        let floor =
            contenders.iter().find(|floor| floor.case.name == case.name && floor.target.name == target.kind().floor());
        let floor = spread(floor.context("there is no floor")?).median;
        let ns = spread(contender);
        let net_ns = ns.median - floor;
        Ok(PacketRow {
            case: case.name.to_owned(),
            target: target.name.to_owned(),
            ns,
            net_ns,
            ratio_to_floor: net_ns / floor,
            floor: target.kind().floor().to_owned(),
            packets: contender.packets(effort),
            instructions: Some(target.instructions),
        })
    };
    contenders.iter().map(row).collect()
}
