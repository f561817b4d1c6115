//! The counters of the packet path.

use aya::maps::{Map, MapData, PerCpuArray};
use netlb_common::counters;

use super::load::Memory;
use crate::dataplane::Counter;

/// `COUNTERS`.
pub(super) struct Counts(PerCpuArray<MapData, [u64; counters::ROOM]>);

impl Counts {
    pub(super) fn new(memory: &Memory) -> anyhow::Result<Self> {
        Ok(Self(Map::PerCpuArray(memory.map("COUNTERS")?).try_into()?))
    }

    /// Over all CPUs.
    pub(super) fn get(&self, counter: counters::Counter) -> u64 {
        self.sums()[counter as usize]
    }

    /// All of them, with their names.
    pub(super) fn all(&self) -> Vec<Counter> {
        let counter = |(counter, value): (&counters::Counter, u64)| Counter {
            name: counter.name().to_owned(),
            description: counter.description().to_owned(),
            value,
        };
        counters::Counter::ALL.iter().zip(self.sums()).map(counter).collect()
    }

    fn sums(&self) -> [u64; counters::ROOM] {
        let mut sums = [0_u64; counters::ROOM];
        // The element exists, so that it cannot fail.
        for values in self.0.get(&0, 0).iter().flat_map(|cpus| cpus.iter()) {
            sums.iter_mut().zip(values).for_each(|(sum, value)| *sum = sum.wrapping_add(*value));
        }
        sums
    }
}
