//! A flow table and maps in memory, for the tests of what runs on them.

use std::boxed::Box;

use crate::{
    atomic::Word,
    conntrack::State,
    flow::Fingerprint,
    table::{Bucket, Data, Operations, Overflow, Place, Record, SLOTS, Slot, Storage, is_live},
    time::Ticks,
};

/// Every state's timeout, in its units.
pub(crate) const TIMEOUT: u32 = 100;

/// A flow table in memory.
pub(crate) struct Memory {
    pub(crate) buckets: Box<[Bucket]>,
    records: Box<[Record]>,
    overflows: Box<[Overflow]>,
}

fn word() -> Word {
    Word::new(0)
}

impl Memory {
    pub(crate) fn new(buckets: usize) -> Self {
        assert!(buckets.is_power_of_two());
        let slot = || Slot { fingerprint: word(), data: word() };
        Self {
            buckets: (0..buckets).map(|_| Bucket { slots: [slot(), slot(), slot(), slot()] }).collect(),
            records: (0..buckets * SLOTS).map(|_| Record::empty()).collect(),
            overflows: (0..buckets.div_ceil(Overflow::BUCKETS as usize)).map(|_| Overflow::empty()).collect(),
        }
    }

    /// Loses a direction.
    pub(crate) fn lose(&self, fingerprint: Fingerprint) {
        for slot in self.buckets.iter().flat_map(|bucket| &bucket.slots) {
            if slot.fingerprint.load() == fingerprint.0 {
                slot.data.store(0);
            }
        }
    }

    /// Live slots.
    pub(crate) fn live(&self, now: Ticks) -> usize {
        let slots = self.buckets.iter().flat_map(|bucket| &bucket.slots);
        slots.filter(|slot| is_live(self, Data(slot.data.load()), now)).count()
    }
}

impl Operations for &Memory {}

impl Storage for Memory {
    fn mask(&self) -> u32 {
        self.buckets.len() as u32 - 1
    }

    fn bucket(&self, index: u32) -> Option<&Bucket> {
        self.buckets.get(index as usize)
    }

    fn record(&self, place: Place) -> Option<&Record> {
        self.records.get(place.0 as usize)
    }

    fn overflow(&self, index: u32) -> Option<&Overflow> {
        self.overflows.get(index as usize)
    }

    fn timeout(&self, _: State) -> u32 {
        TIMEOUT
    }
}

/// A 64-bit mixer (the finaliser of MurmurHash3), for fingerprints that look random and repeat.
pub(crate) fn mix(n: u64) -> u64 {
    let n = (n ^ n >> 33).wrapping_mul(0xff51_afd7_ed55_8ccd);
    let n = (n ^ n >> 33).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    (n ^ n >> 33).max(1)
}
