//! Tables that the control loop writes and packets read: a cache line for a look-up, and no call of the kernel.
//!
//! Open addressing by lines of four entries: an entry stands in the line that its key begins at, or, where that has no room, in one of the
//! next. Whoever looks for a key goes on for as long as lines are full. So an entry that goes leaves a mark in a full line, until no entry
//! beyond depends on it.
//!
//! One writer. It writes a value before the key that stands for it, and an entry that is taken away may be another's a moment later: who
//! reads it meanwhile sees the value of either, and where that is not harmless the value must tell.

use core::mem;

use crate::{atomic::Word, opaque::rolled};

/// Entries of a line.
pub const ENTRIES: u32 = 4;
/// Lines in which a key is looked for. While no more than half of all entries are in use, none is ever near.
const REACH: u32 = 32;

/// No key: an entry that nobody had since its line was last seen not to be full.
const EMPTY: u64 = 0;
/// No key: somebody had it.
const GONE: u64 = 1;
/// Every key has one of these bits.
const KEY: u64 = 1 << 63;

/// No value.
pub const NOTHING: u64 = u64::MAX;

/// The key for a hash.
#[inline(always)]
#[must_use]
pub const fn key(hash: u64) -> u64 {
    hash | KEY
}

/// The key for a number: those that follow each other begin at lines that do.
#[inline(always)]
#[must_use]
pub const fn numbered(number: u32) -> u64 {
    KEY | number as u64
}

/// A cache line of entries.
#[derive(Debug)]
#[repr(C, align(64))]
pub struct Line {
    entries: [Entry; ENTRIES as usize],
}

#[derive(Debug)]
#[repr(C)]
struct Entry {
    key: Word,
    value: Word,
}

const _: () = assert!(size_of::<Line>() == 64);

impl Line {
    #[inline(always)]
    fn find(&self, key: u64) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.key.load() == key)
    }

    #[inline(always)]
    fn is_full(&self) -> bool {
        self.find(EMPTY).is_none()
    }

    fn keys(&self) -> impl Iterator<Item = u64> {
        self.entries.iter().map(|entry| entry.key.load()).filter(|key| key & KEY != 0)
    }
}

/// The lines of a directory: a map of the kernel, its mapping in user space, or memory of a test.
pub trait Lines {
    /// Lines, less one.
    fn mask(&self) -> u32;
    fn line(&self, index: u32) -> Option<&Line>;

    /// The value of a key that is not in its first line, or [`NOTHING`].
    #[inline(always)]
    fn beyond(&self, key: u64) -> u64 {
        beyond(self, key)
    }
}

/// Lines for so many entries.
#[must_use]
pub const fn lines(entries: u32) -> u32 {
    entries.div_ceil(ENTRIES / 2).next_power_of_two()
}

/// The value of a key.
#[inline(always)]
pub fn get<L: Lines + ?Sized>(lines: &L, key: u64) -> Option<u64> {
    let line = lines.line(key as u32 & lines.mask())?;
    let value = match line.find(key) {
        Some(entry) => entry.value.load(),
        None if line.is_full() => lines.beyond(key),
        None => NOTHING,
    };
    (value != NOTHING).then_some(value)
}

/// See [`Lines::beyond`].
#[inline(always)]
pub fn beyond<L: Lines + ?Sized>(lines: &L, key: u64) -> u64 {
    for step in 1..rolled(REACH as usize) as u32 {
        let Some(line) = lines.line((key as u32).wrapping_add(step) & lines.mask()) else { break };
        if let Some(entry) = line.find(key) {
            return entry.value.load();
        }
        if !line.is_full() {
            break;
        }
    }
    NOTHING
}

/// Gives a key a value, and says whether there was room.
pub fn set<L: Lines + ?Sized>(lines: &L, key: u64, value: u64) -> bool {
    if let Some(entry) = reach(lines, key).find_map(|line| line.find(key)) {
        entry.value.store(value);
        return true;
    }
    let Some(entry) = reach(lines, key).find_map(|line| line.find(GONE).or_else(|| line.find(EMPTY))) else {
        return false;
    };
    entry.value.store(value);
    entry.key.store(key);
    true
}

/// Takes a key away.
pub fn remove<L: Lines + ?Sized>(lines: &L, key: u64) {
    let found = reach(lines, key).position(|line| line.find(key).inspect(|entry| entry.key.store(GONE)).is_some());
    // Those that it was beyond may have been kept full by it alone.
    for index in way(lines, key, 0).take(found.map_or(0, |found| found + 1)) {
        if let Some(line) = lines.line(index)
            && (!line.is_full() || !is_crossed(lines, index))
        {
            line.entries.iter().filter(|entry| entry.key.load() == GONE).for_each(|entry| entry.key.store(EMPTY));
        }
    }
}

/// All keys with their values.
pub fn entries<L: Lines + ?Sized>(lines: &L) -> impl Iterator<Item = (u64, u64)> {
    let all = (0..=lines.mask()).filter_map(|index| lines.line(index)).flat_map(|line| &line.entries);
    all.map(|entry| (entry.key.load(), entry.value.load())).filter(|(key, _)| key & KEY != 0)
}

/// The lines in which a key may stand: up to the first that is not full.
fn reach<L: Lines + ?Sized>(lines: &L, key: u64) -> impl Iterator<Item = &Line> {
    let mut is_over = false;
    way(lines, key, 0)
        .map_while(|index| lines.line(index))
        .take_while(move |line| !mem::replace(&mut is_over, !line.is_full()))
}

/// The lines in which a key is looked for, from the `first` on.
fn way<L: Lines + ?Sized>(lines: &L, key: u64, first: u32) -> impl Iterator<Item = u32> {
    let mask = lines.mask();
    (first..REACH).map(move |step| (key as u32).wrapping_add(step) & mask)
}

/// Whether a key stands beyond a line that is on its way.
fn is_crossed<L: Lines + ?Sized>(lines: &L, index: u32) -> bool {
    for (step, next) in (1..).zip(way(lines, index.into(), 1)) {
        let Some(line) = lines.line(next) else { return false };
        if line.keys().any(|key| next.wrapping_sub(key as u32) & lines.mask() >= step) {
            return true;
        }
        if !line.is_full() {
            return false;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use std::{collections::HashMap, thread, vec::Vec};

    use super::*;

    struct Memory(Vec<Line>);

    impl Memory {
        fn new(lines: u32) -> Self {
            let entry = || Entry { key: Word::new(EMPTY), value: Word::new(0) };
            Self((0..lines).map(|_| Line { entries: [entry(), entry(), entry(), entry()] }).collect())
        }

        fn marks(&self) -> usize {
            self.0.iter().flat_map(|line| &line.entries).filter(|entry| entry.key.load() == GONE).count()
        }
    }

    impl Lines for Memory {
        fn mask(&self) -> u32 {
            self.0.len() as u32 - 1
        }

        fn line(&self, index: u32) -> Option<&Line> {
            self.0.get(index as usize)
        }
    }

    /// Numbers in no order.
    fn numbers() -> impl FnMut() -> u64 {
        let mut state = 1_u64;
        move || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state ^ state >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9)
        }
    }

    /// One of twice as many keys as there are to be entries.
    fn any_of(number: u64, entries: u32) -> u64 {
        let hash = (number % (2 * u64::from(entries))).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        key(hash ^ hash >> 32)
    }

    #[test]
    fn does_what_a_hash_does() {
        let mut next = numbers();
        for (size, steps) in [(1, 300), (2, 1000), (64, 20_000), (1024, if cfg!(miri) { 1000 } else { 100_000 })] {
            let directory = Memory::new(lines(size));
            let mut expected = HashMap::new();
            for _ in 0..steps {
                let key = any_of(next(), size);
                if next().is_multiple_of(3) {
                    remove(&directory, key);
                    expected.remove(&key);
                } else if expected.len() < size as usize || expected.contains_key(&key) {
                    let value = next() >> 1;
                    assert!(set(&directory, key, value), "{} of {size}", expected.len());
                    expected.insert(key, value);
                }
                let key = any_of(next(), size);
                assert_eq!(get(&directory, key), expected.get(&key).copied());
            }
            assert_eq!(entries(&directory).collect::<HashMap<_, _>>(), expected);
            for key in expected.into_keys() {
                remove(&directory, key);
            }
            assert_eq!((entries(&directory).count(), directory.marks()), (0, 0));
        }
    }

    #[test]
    fn numbers_that_follow_each_other_fill_it_evenly() {
        let directory = Memory::new(16);
        for number in 1000..1064 {
            assert!(set(&directory, numbered(number), number.into()));
        }
        assert!(directory.0.iter().all(Line::is_full));
        assert!((1000..1064).all(|number| get(&directory, numbered(number)) == Some(number.into())));
        assert_eq!(get(&directory, numbered(1064)), None);
        assert!(!set(&directory, numbered(1064), 1), "there is no room");
        assert!(set(&directory, numbered(1063), 2));
        assert_eq!(get(&directory, numbered(1063)), Some(2));
    }

    #[test]
    fn an_entry_beyond_a_full_line_is_found_when_the_line_is_full_no_more() {
        let directory = Memory::new(8);
        let same = |number: u64| key(number << 32 | 7);
        for number in 0..10 {
            assert!(set(&directory, same(number), number));
        }
        for gone in 0..4 {
            remove(&directory, same(gone));
        }
        assert!((4..10).all(|number| get(&directory, same(number)) == Some(number)));
        assert_eq!(directory.marks(), 4);
        assert!(set(&directory, same(10), 10));
        assert_eq!(directory.marks(), 3, "its place is used again");
        (4..10).for_each(|number| remove(&directory, same(number)));
        assert_eq!(directory.marks(), 0, "nothing is beyond any more");
        assert_eq!(get(&directory, same(10)), Some(10));
    }

    #[test]
    fn readers_find_what_stays() {
        let directory = Memory::new(16);
        let same = |number: u64| key(number << 32 | 3);
        (0..8).for_each(|number| assert!(set(&directory, same(number), number)));
        let turns = if cfg!(miri) { 20 } else { 20_000 };
        thread::scope(|scope| {
            let writer = scope.spawn(|| {
                for turn in 0..turns {
                    (0..6).for_each(|number| remove(&directory, same(number)));
                    (0..6).for_each(|number| assert!(set(&directory, same(number), number + turn * 8)));
                }
            });
            while !writer.is_finished() {
                for number in [6, 7] {
                    assert_eq!(get(&directory, same(number)), Some(number));
                }
                let seen = get(&directory, same(2));
                assert!(seen.is_none_or(|value| value < turns * 8), "{seen:?}");
            }
        });
    }
}
