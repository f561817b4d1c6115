//! What several numbers share, and how many do: bits of the address filter, entries of `OWNERS`.

use std::collections::{HashMap, hash_map::Entry};

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
pub(super) struct OwnerLists(HashMap<EndpointKey, Vec<u32>>);

impl OwnerLists {
    /// Adds a frontend. Says whether the entry changes by it.
    pub(super) fn add(&mut self, endpoint: EndpointKey, frontend: u32) -> bool {
        let list = self.0.entry(endpoint).or_default();
        list.push(frontend);
        list.len() <= Owners::MAX
    }

    /// Removes a frontend. Says whether the entry changes by it.
    pub(super) fn remove(&mut self, endpoint: EndpointKey, frontend: u32) -> bool {
        let Entry::Occupied(mut list) = self.0.entry(endpoint) else { return false };
        let Some(at) = list.get().iter().position(|id| *id == frontend) else { return false };
        list.get_mut().remove(at);
        if list.get().is_empty() {
            list.remove();
        }
        at < Owners::MAX
    }

    /// The entry as it is to be, if it is to be.
    pub(super) fn get(&self, endpoint: &EndpointKey) -> Option<Owners> {
        self.0.get(endpoint).map(|list| owners(list))
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&EndpointKey, Owners)> {
        self.0.iter().map(|(endpoint, list)| (endpoint, owners(list)))
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
