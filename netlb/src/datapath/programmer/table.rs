//! Numbers and what they stand for.

use std::collections::VecDeque;

/// Hands out the numbers 1 to `size - 1`. Number 0 means none.
#[derive(Debug)]
pub(super) struct Table<T> {
    entries: Vec<Option<T>>,
    /// Numbers below the highest that nobody has, the longest unused first.
    free: VecDeque<u32>,
    size: u32,
}

impl<T> Table<T> {
    pub(super) fn new(size: u32) -> Self {
        Self { entries: vec![None], free: VecDeque::new(), size }
    }

    /// Gives a value a number, if there is one left.
    pub(super) fn insert(&mut self, value: T) -> Option<u32> {
        if let Some(id) = self.free.pop_front() {
            self.entries[id as usize] = Some(value);
            return Some(id);
        }
        let id = self.entries.len() as u32;
        (id < self.size).then(|| {
            self.entries.push(Some(value));
            id
        })
    }

    /// The value of a number that was handed out before, made now if it is not there. [`Table::adopted`] follows.
    pub(super) fn adopt(&mut self, id: u32, value: impl FnOnce() -> T) -> &mut T {
        let index = id as usize;
        if self.entries.len() <= index {
            self.entries.resize_with(index + 1, || None);
        }
        self.entries[index].get_or_insert_with(value)
    }

    /// Makes the numbers that were not adopted free.
    pub(super) fn adopted(&mut self) {
        self.free = (1..).zip(&self.entries[1..]).filter(|(_, entry)| entry.is_none()).map(|(id, _)| id).collect();
    }

    pub(super) fn get(&self, id: u32) -> Option<&T> {
        self.entries.get(id as usize)?.as_ref()
    }

    pub(super) fn get_mut(&mut self, id: u32) -> Option<&mut T> {
        self.entries.get_mut(id as usize)?.as_mut()
    }

    /// Takes the value from its number, which stays in use until [`Table::free`].
    pub(super) fn remove(&mut self, id: u32) -> Option<T> {
        self.entries.get_mut(id as usize)?.take()
    }

    pub(super) fn free(&mut self, id: u32) {
        self.entries[id as usize] = None;
        self.free.push_back(id);
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, &T)> {
        (0..).zip(&self.entries).filter_map(|(id, entry)| Some((id, entry.as_ref()?)))
    }

    /// Numbers in use.
    pub(super) fn len(&self) -> u32 {
        (self.entries.len() - 1 - self.free.len()) as u32
    }

    /// Numbers there are.
    pub(super) const fn size(&self) -> u32 {
        self.size - 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_begin_at_one_and_end_below_the_size() {
        let mut table = Table::new(3);
        assert_eq!([table.insert('a'), table.insert('b'), table.insert('c')], [Some(1), Some(2), None]);
        assert_eq!((table.len(), table.size()), (2, 2));
    }

    #[test]
    fn a_removed_number_is_in_use_until_it_is_freed() {
        let mut table = Table::new(3);
        table.insert('a');
        table.insert('b');
        assert_eq!(table.remove(1), Some('a'));
        assert_eq!(table.insert('c'), None);
        table.free(1);
        assert_eq!(table.insert('c'), Some(1));
    }

    #[test]
    fn the_number_that_rested_longest_comes_first() {
        let mut table = Table::new(10);
        assert!((0..4).all(|n| table.insert(n).is_some()));
        table.free(3);
        table.free(1);
        assert_eq!([table.insert(7), table.insert(8), table.insert(9)], [Some(3), Some(1), Some(5)]);
    }

    #[test]
    fn adopted_numbers_stay_and_the_gaps_are_free() {
        let mut table = Table::new(10);
        table.adopt(4, || 'd');
        table.adopt(2, || 'b');
        table.adopt(4, || 'x');
        table.adopted();
        assert_eq!(table.iter().collect::<Vec<_>>(), [(2, &'b'), (4, &'d')]);
        assert_eq!(table.len(), 2);
        assert_eq!((0..3).map(|_| table.insert('x')).collect::<Vec<_>>(), [Some(1), Some(3), Some(5)]);
    }
}
