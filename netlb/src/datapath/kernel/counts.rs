//! The counters of the packet path.

use aya::maps::{MapData, PerCpuArray};
use netlb_common::counters;

use super::{load::Memory, maps::per_cpu};
use crate::dataplane::Counter;

/// `COUNTERS`.
pub(super) struct Counts(PerCpuArray<MapData, u64>);

impl Counts {
    pub(super) fn new(memory: &Memory) -> anyhow::Result<Self> {
        per_cpu(memory, "COUNTERS").map(Self)
    }

    /// Over all CPUs.
    pub(super) fn get(&self, counter: counters::Counter) -> u64 {
        // The index exists, so that it cannot fail.
        self.0.get(&(counter as u32), 0).map_or(0, |values| values.iter().sum())
    }

    /// All of them, with their names.
    pub(super) fn all(&self) -> Vec<Counter> {
        let counter = |counter: &counters::Counter| Counter {
            name: counter.name().to_owned(),
            description: counter.description().to_owned(),
            value: self.get(*counter),
        };
        counters::Counter::ALL.iter().map(counter).collect()
    }
}
