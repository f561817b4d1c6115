//! Who has which part of `RINGS` and `MEMBERS`.
//!
//! A region begins on a line, so that no two share one. Regions with the same content are one region: each [`Config`]
//! that names it holds it once.
//!
//! [`Config`]: netlb_common::maps::Config

use std::collections::{BTreeMap, BTreeSet};

use foldhash::{HashMap, HashMapExt as _};

/// Parts of an array, in entries. The smallest hole that is large enough is taken.
#[derive(Debug)]
pub(super) struct Regions {
    /// Entries of a line.
    line: u32,
    /// Entries of the array.
    size: u32,
    used: u32,
    /// Holes by where they begin: their length.
    holes: BTreeMap<u32, u32>,
    /// The same by length.
    by_length: BTreeSet<(u32, u32)>,
    regions: HashMap<u32, Region>,
    /// Where content with this hash stands.
    by_content: HashMap<u64, u32>,
}

#[derive(Debug)]
struct Region {
    /// Entries, without the rest of the last line.
    entries: u32,
    holders: u32,
    content: u64,
}

impl Regions {
    pub(super) fn new(size: u32, line: u32) -> Self {
        let mut regions = Self {
            line,
            size: size / line * line,
            used: 0,
            holes: BTreeMap::new(),
            by_length: BTreeSet::new(),
            regions: HashMap::new(),
            by_content: HashMap::new(),
        };
        regions.add_hole(0, regions.size);
        regions
    }

    /// The region whose content has this hash and length. Whether it is the same content is for the caller to see.
    pub(super) fn find(&self, content: u64, entries: u32) -> Option<u32> {
        let at = *self.by_content.get(&content)?;
        (self.regions.get(&at)?.entries == entries).then_some(at)
    }

    /// A region for content with this hash, held once.
    pub(super) fn allocate(&mut self, entries: u32, content: u64) -> Option<u32> {
        let length = entries.checked_next_multiple_of(self.line)?;
        let (hole, at) = *self.by_length.range((length, 0)..).next()?;
        self.remove_hole(at, hole);
        self.add_hole(at + length, hole - length);
        self.insert(at, entries, content);
        Some(at)
    }

    /// Holds a region that is in use already, or was before these counts began. Says whether that is possible.
    pub(super) fn adopt(&mut self, at: u32, entries: u32, content: u64) -> bool {
        if let Some(region) = self.regions.get_mut(&at) {
            let same = region.entries == entries;
            region.holders += u32::from(same);
            return same;
        }
        let Some(length) = entries.checked_next_multiple_of(self.line) else { return false };
        let Some((&start, &hole)) = self.holes.range(..=at).next_back() else { return false };
        let before = at - start;
        if entries == 0 || !at.is_multiple_of(self.line) || hole - before.min(hole) < length {
            return false;
        }
        self.remove_hole(start, hole);
        self.add_hole(start, before);
        self.add_hole(at + length, hole - before - length);
        self.insert(at, entries, content);
        true
    }

    /// Holds a region once more.
    pub(super) fn hold(&mut self, at: u32) {
        if let Some(region) = self.regions.get_mut(&at) {
            region.holders += 1;
        }
    }

    /// Lets go of a region. Without a holder it is a hole again.
    pub(super) fn release(&mut self, at: u32) {
        let Some(region) = self.regions.get_mut(&at) else { return };
        region.holders -= 1;
        if region.holders > 0 {
            return;
        }
        let (content, mut length) = (region.content, region.entries.next_multiple_of(self.line));
        self.regions.remove(&at);
        if self.by_content.get(&content) == Some(&at) {
            self.by_content.remove(&content);
        }
        self.used -= length;
        let mut start = at;
        if let Some((&before, &hole)) = self.holes.range(..at).next_back()
            && before + hole == at
        {
            self.remove_hole(before, hole);
            start = before;
            length += hole;
        }
        if let Some(&hole) = self.holes.get(&(start + length)) {
            self.remove_hole(start + length, hole);
            length += hole;
        }
        self.add_hole(start, length);
    }

    /// Entries in use, whole lines.
    pub(super) const fn used(&self) -> u32 {
        self.used
    }

    pub(super) const fn size(&self) -> u32 {
        self.size
    }

    fn insert(&mut self, at: u32, entries: u32, content: u64) {
        self.used += entries.next_multiple_of(self.line);
        self.regions.insert(at, Region { entries, holders: 1, content });
        self.by_content.entry(content).or_insert(at);
    }

    fn add_hole(&mut self, at: u32, length: u32) {
        if length > 0 {
            self.holes.insert(at, length);
            self.by_length.insert((length, at));
        }
    }

    fn remove_hole(&mut self, at: u32, length: u32) {
        self.holes.remove(&at);
        self.by_length.remove(&(length, at));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn regions_begin_on_lines_and_take_the_smallest_hole() {
        let mut regions = Regions::new(32 * 10, 32);
        assert_eq!(regions.allocate(251, 1), Some(0));
        assert_eq!(regions.allocate(3, 2), Some(256));
        assert_eq!(regions.allocate(33, 3), None);
        regions.release(0);
        assert_eq!(regions.allocate(1, 4), Some(288));
        assert_eq!(regions.allocate(256, 5), Some(0));
        assert_eq!((regions.used(), regions.allocate(1, 6)), (320, None));
    }

    #[test]
    fn a_region_lasts_as_long_as_somebody_holds_it() {
        let mut regions = Regions::new(64, 32);
        let at = regions.allocate(5, 99).unwrap();
        assert_eq!((regions.find(99, 5), regions.find(99, 6), regions.find(98, 5)), (Some(at), None, None));
        regions.hold(at);
        regions.release(at);
        assert_eq!(regions.find(99, 5), Some(at));
        regions.release(at);
        assert_eq!((regions.find(99, 5), regions.used()), (None, 0));
    }

    #[test]
    fn what_does_not_fit_is_not_adopted() {
        let mut regions = Regions::new(128, 32);
        assert!(regions.adopt(32, 40, 1));
        assert!(regions.adopt(32, 40, 1), "a second holder");
        assert!(!regions.adopt(32, 41, 2), "another length");
        assert!(!regions.adopt(64, 3, 2), "within the first");
        assert!(!regions.adopt(0, 33, 2), "into the first");
        assert!(!regions.adopt(100, 2, 2), "within a line");
        assert!(!regions.adopt(96, 33, 2), "over the end");
        assert!(!regions.adopt(0, u32::MAX, 2));
        assert!(!regions.adopt(0, 0, 2));
        assert!(regions.adopt(96, 32, 3));
        assert_eq!(regions.used(), 96);
    }

    proptest! {
        #[test]
        fn regions_never_overlap_and_nothing_is_lost(
            steps in prop::collection::vec((1_u32..200, any::<prop::sample::Index>()), 1..200),
        ) {
            let mut regions = Regions::new(2048, 32);
            let mut live: Vec<(u32, u32)> = Vec::new();
            for (number, (entries, pick)) in (0_u64..).zip(steps) {
                if entries % 2 == 0 && !live.is_empty() {
                    regions.release(live.swap_remove(pick.index(live.len())).0);
                } else if let Some(at) = regions.allocate(entries, number) {
                    let end = at + entries.next_multiple_of(32);
                    prop_assert!(end <= 2048);
                    prop_assert!(live.iter().all(|(from, to)| end <= *from || *to <= at));
                    live.push((at, end));
                }
                prop_assert_eq!(regions.used(), live.iter().map(|(from, to)| to - from).sum::<u32>());
                prop_assert_eq!(regions.holes.values().sum::<u32>(), 2048 - regions.used());
                prop_assert_eq!(regions.holes.len(), regions.by_length.len());
            }
            for (at, _) in live {
                regions.release(at);
            }
            prop_assert_eq!(regions.allocate(2048, 0), Some(0));
        }
    }
}
