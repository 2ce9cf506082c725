//! A least-recently-used cache.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::Hash;

/// How many graphs are kept unless said otherwise.
pub(crate) const GRAPHS: usize = 16;

/// A map that holds so many entries at most: what was not used for the longest time goes first. Ranks that make the
/// same calls hold the same keys.
#[derive(Debug)]
pub(crate) struct Recent<K, V> {
    most: usize,
    entries: HashMap<K, V>,
    /// The keys, those used last at the end.
    order: Vec<K>,
}

impl<K: Clone + Eq + Hash, V> Recent<K, V> {
    /// An empty one for `most` entries, and at least one.
    pub fn new(most: usize) -> Self {
        Self { most: most.max(1), entries: HashMap::new(), order: Vec::new() }
    }

    pub fn most(&self) -> usize {
        self.most
    }

    pub fn len(&self) -> usize {
        self.entries.len()
    }

    pub fn contains_key(&self, key: &K) -> bool {
        self.entries.contains_key(key)
    }

    pub fn values(&self) -> impl Iterator<Item = &V> {
        self.entries.values()
    }

    pub fn get_mut(&mut self, key: &K) -> Option<&mut V> {
        if self.entries.contains_key(key) {
            self.used(key);
        }
        self.entries.get_mut(key)
    }

    /// Makes room for the entry, if it is not there.
    pub fn entry(&mut self, key: K) -> Entry<'_, K, V> {
        let missing = !self.entries.contains_key(&key);
        while missing && self.entries.len() >= self.most {
            let oldest = self.order.remove(0);
            self.entries.remove(&oldest);
        }
        self.used(&key);
        self.entries.entry(key)
    }

    pub fn insert(&mut self, key: K, value: V) {
        self.entry(key).insert_entry(value);
    }

    pub fn clear(&mut self) {
        self.entries.clear();
        self.order.clear();
    }

    fn used(&mut self, key: &K) {
        if self.order.last() != Some(key) {
            // Those whose entry was never made are forgotten as well.
            self.order.retain(|other| other != key && self.entries.contains_key(other));
            self.order.push(key.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Recent;

    #[test]
    fn what_was_not_used_for_long_goes_first() {
        let mut recent = Recent::new(2);
        recent.insert('a', 1);
        recent.insert('b', 2);
        assert_eq!(recent.get_mut(&'a'), Some(&mut 1));
        recent.insert('c', 3);
        assert!(recent.contains_key(&'a') && !recent.contains_key(&'b') && recent.contains_key(&'c'));
        recent.insert('a', 4);
        recent.insert('d', 5);
        assert_eq!((recent.len(), recent.contains_key(&'c')), (2, false));
        assert_eq!(recent.get_mut(&'a'), Some(&mut 4));
        // Entries that are asked for and never made must not take a place for ever.
        for key in ['e', 'f', 'g'] {
            let _ = recent.entry(key);
        }
        assert_eq!((recent.len(), recent.order.len()), (1, 2));
        recent.clear();
        assert_eq!((recent.len(), recent.order.len()), (0, 0));
        let mut one = Recent::new(0);
        one.insert('a', 1);
        one.insert('b', 2);
        assert_eq!((one.most(), one.len(), one.contains_key(&'b')), (1, 1, true));
    }
}
