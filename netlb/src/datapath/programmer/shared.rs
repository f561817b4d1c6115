//! What several numbers share, and how many do: bits of the address filter, entries of `OWNERS`.

use std::collections::hash_map::Entry;

use foldhash::HashMap;
use netlb_common::maps::{EndpointKey, Owners};

/// How many addresses each set bit of the filter stands for.
#[derive(Debug, Default)]
pub(super) struct BitCounts(HashMap<u32, u32>);

impl BitCounts {
    /// Says whether the bit was clear.
    pub(super) fn add(&mut self, bit: u32) -> bool {
        let count = self.0.entry(bit).or_default();
        *count += 1;
        *count == 1
    }

    /// Says whether the bit is to be cleared.
    pub(super) fn remove(&mut self, bit: u32) -> bool {
        let Entry::Occupied(mut count) = self.0.entry(bit) else { return false };
        *count.get_mut() -= 1;
        let last = *count.get() == 0;
        if last {
            count.remove();
        }
        last
    }

    /// The whole bitmap.
    pub(super) fn words(&self, bits_log2: u32) -> Vec<u64> {
        let mut words = vec![0; (1_usize << bits_log2) / u64::BITS as usize];
        for bit in self.0.keys() {
            words[(bit / u64::BITS) as usize] |= 1 << (bit % u64::BITS);
        }
        words
    }
}

/// The frontends of each backend endpoint, all of them. `OWNERS` holds the first few.
#[derive(Debug, Default)]
pub(super) struct OwnerLists(HashMap<EndpointKey, List>);

/// There may be millions of these, nearly all of them of one frontend.
#[derive(Debug)]
enum List {
    One([u32; 1]),
    #[expect(clippy::box_collection, reason = "a third of the size, for what there is next to nothing of")]
    More(Box<Vec<u32>>),
}

impl List {
    fn as_slice(&self) -> &[u32] {
        match self {
            Self::One(list) => list,
            Self::More(list) => list,
        }
    }

    fn push(&mut self, frontend: u32) {
        match self {
            Self::One([first]) => *self = Self::More(Box::new(vec![*first, frontend])),
            Self::More(list) => list.push(frontend),
        }
    }

    /// The list without one of it; nothing if that was all.
    fn without(self, at: usize) -> Option<Self> {
        match self {
            Self::One(_) => None,
            Self::More(mut list) => {
                list.remove(at);
                match list[..] {
                    [] => None,
                    [one] => Some(Self::One([one])),
                    _ => Some(Self::More(list)),
                }
            }
        }
    }
}

impl OwnerLists {
    /// Adds a frontend. Says whether the entry changes by it.
    pub(super) fn add(&mut self, endpoint: EndpointKey, frontend: u32) -> bool {
        match self.0.entry(endpoint) {
            Entry::Vacant(entry) => {
                entry.insert(List::One([frontend]));
                true
            }
            Entry::Occupied(mut entry) => {
                entry.get_mut().push(frontend);
                entry.get().as_slice().len() <= Owners::MAX
            }
        }
    }

    /// Removes a frontend. Says whether the entry changes by it.
    pub(super) fn remove(&mut self, endpoint: EndpointKey, frontend: u32) -> bool {
        let Entry::Occupied(entry) = self.0.entry(endpoint) else { return false };
        let Some(at) = entry.get().as_slice().iter().position(|id| *id == frontend) else { return false };
        if let Some(rest) = entry.remove().without(at) {
            self.0.insert(endpoint, rest);
        }
        at < Owners::MAX
    }

    /// The entry as it is to be, if it is to be.
    pub(super) fn get(&self, endpoint: &EndpointKey) -> Option<Owners> {
        self.0.get(endpoint).map(|list| owners(list.as_slice()))
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&EndpointKey, Owners)> {
        self.0.iter().map(|(endpoint, list)| (endpoint, owners(list.as_slice())))
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }
}

fn owners(list: &[u32]) -> Owners {
    let mut owners = Owners::default();
    owners.0.iter_mut().zip(list).for_each(|(owner, frontend)| *owner = *frontend);
    owners
}

#[cfg(test)]
mod tests {
    use netlb_common::addr::{Addr, PortBe};

    use super::*;

    #[test]
    fn a_bit_is_set_by_the_first_and_cleared_by_the_last() {
        let mut bits = BitCounts::default();
        assert_eq!([bits.add(65), bits.add(65), bits.add(2)], [true, false, true]);
        assert_eq!(bits.words(7), [1 << 2, 1 << 1]);
        assert_eq!([bits.remove(65), bits.remove(65), bits.remove(65)], [false, true, false]);
    }

    #[test]
    fn the_entry_holds_the_first_frontends_and_others_move_up() {
        let endpoint = EndpointKey::new(Addr::from_v4([10, 0, 0, 1]), PortBe::new(80), 6);
        let mut lists = OwnerLists::default();
        assert!((1..=8).all(|frontend| lists.add(endpoint, frontend)));
        assert!(!lists.add(endpoint, 9));
        assert_eq!(lists.get(&endpoint), Some(Owners([1, 2, 3, 4, 5, 6, 7, 8])));
        assert!(lists.remove(endpoint, 2));
        assert_eq!(lists.get(&endpoint), Some(Owners([1, 3, 4, 5, 6, 7, 8, 9])));
        assert!((1..=9).filter(|frontend| lists.remove(endpoint, *frontend)).count() == 8);
        assert_eq!((lists.get(&endpoint), lists.len()), (None, 0));
    }
}
