//! Minimum cuts of networks, by Dinic's algorithm (1970).

use std::collections::VecDeque;

/// A capacity that no cut pays.
pub(super) const NEVER: u64 = u64::MAX / 4;

/// A directed network with a source and a sink.
pub(super) struct FlowNetwork {
    edges: Vec<FlowEdge>,
    /// The edges that leave each node; edge `e ^ 1` is `e` backwards.
    leaving: Vec<Vec<usize>>,
}

struct FlowEdge {
    to: usize,
    left: u64,
}

pub(super) const SOURCE: usize = 0;
pub(super) const SINK: usize = 1;

impl FlowNetwork {
    /// Only source and sink.
    pub(super) fn new() -> Self {
        Self { edges: Vec::new(), leaving: vec![Vec::new(), Vec::new()] }
    }

    pub(super) fn node(&mut self) -> usize {
        self.leaving.push(Vec::new());
        self.leaving.len() - 1
    }

    /// Cutting between `from` (on the side of the source) and `to` (on that of the sink) costs `capacity`.
    pub(super) fn edge(&mut self, from: usize, to: usize, capacity: u64) {
        for (at, to, left) in [(from, to, capacity), (to, from, 0)] {
            self.leaving[at].push(self.edges.len());
            self.edges.push(FlowEdge { to, left });
        }
    }

    /// The nodes on the side of the source in the cheapest cut; of several, the one that leaves fewest there.
    pub(super) fn source_side(&mut self) -> Vec<bool> {
        loop {
            let levels = self.levels();
            if levels[SINK] == usize::MAX {
                return levels.into_iter().map(|level| level != usize::MAX).collect();
            }
            self.block(&levels);
        }
    }

    /// Distance of every node from the source over edges with something left.
    fn levels(&self) -> Vec<usize> {
        let mut levels = vec![usize::MAX; self.leaving.len()];
        levels[SOURCE] = 0;
        let mut queue = VecDeque::from([SOURCE]);
        while let Some(node) = queue.pop_front() {
            for edge in self.leaving[node].iter().map(|edge| &self.edges[*edge]) {
                if edge.left > 0 && levels[edge.to] == usize::MAX {
                    levels[edge.to] = levels[node] + 1;
                    queue.push_back(edge.to);
                }
            }
        }
        levels
    }

    /// Fills shortest paths until each has a full edge. Without recursion: paths are as long as models are deep.
    fn block(&mut self, levels: &[usize]) {
        let mut next = vec![0; self.leaving.len()];
        let mut path: Vec<usize> = Vec::new();
        loop {
            let node = path.last().map_or(SOURCE, |edge| self.edges[*edge].to);
            if node == SINK {
                let room = path.iter().map(|edge| self.edges[*edge].left).min().unwrap_or(0);
                for edge in &path {
                    self.edges[*edge].left -= room;
                    self.edges[*edge ^ 1].left += room;
                }
                let full = path.iter().position(|edge| self.edges[*edge].left == 0).unwrap_or(0);
                path.truncate(full);
                continue;
            }
            match self.leaving[node].get(next[node]) {
                Some(&edge) if self.edges[edge].left > 0 && levels[self.edges[edge].to] == levels[node] + 1 => {
                    path.push(edge);
                }
                Some(_) => next[node] += 1,
                None => match path.pop() {
                    Some(edge) => next[self.edges[edge ^ 1].to] += 1,
                    None => return,
                },
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn no_cut_is_cheaper_and_none_as_cheap_is_smaller(
            edges in proptest::collection::vec((0usize..8, 0usize..8, 0u64..9), 0..24),
        ) {
            let mut network = FlowNetwork::new();
            for node in 2..8 {
                prop_assert_eq!(network.node(), node);
            }
            edges.iter().for_each(|(from, to, capacity)| network.edge(*from, *to, *capacity));
            let price = |side: &dyn Fn(usize) -> bool| -> u64 {
                edges.iter().filter(|(from, to, _)| side(*from) && !side(*to)).map(|edge| edge.2).sum()
            };
            let found = network.source_side();
            prop_assert!(found[SOURCE] && !found[SINK]);
            let least = price(&|node| found[node]);
            for others in 0usize..64 {
                let side = |node: usize| node == SOURCE || (node > SINK && others >> (node - 2) & 1 == 1);
                prop_assert!(price(&side) >= least);
                if price(&side) == least {
                    prop_assert!((0..8).all(|node| !found[node] || side(node)));
                }
            }
        }
    }
}
