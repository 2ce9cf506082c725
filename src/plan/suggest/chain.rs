//! Finds the cheapest way to split a chain of layers.

use std::collections::BTreeMap;

use super::layers::{Layer, LinearSplit};
use crate::plan::{PlanCost, like, must_split};

/// The rows of activations that collectives are weighed for.
const ROWS: f64 = 1024.0;
/// Bytes of an element.
const WIDTH: f64 = 4.0;

/// Layers side by side, which take the same activations.
struct ParallelLayers {
    layers: Vec<usize>,
    /// The features that each takes and gives.
    takes: usize,
    gives: usize,
    /// Elements of all weights.
    elements: usize,
    /// How they can be split.
    choices: Vec<LinearSplit>,
    /// Whether what they give is read element by element, wherever it lies.
    open: bool,
    /// Whether what they give is cut into heads, and what they take comes from heads.
    heads: bool,
    from_heads: bool,
}

/// How activations lie between two links.
#[derive(Clone, Copy, PartialEq)]
enum Features {
    Whole,
    Split,
}

/// How each layer that has rows and columns is split, by its number.
pub(super) fn chains(layers: &[Layer], degree: usize) -> Vec<(usize, LinearSplit)> {
    let mut chains: Vec<Vec<ParallelLayers>> = Vec::new();
    let mut norm = false;
    for (number, layer) in layers.iter().enumerate() {
        norm |= layer.is_norm();
        let Some(mut link) = ParallelLayers::of(number, layer) else { continue };
        let mut chain = chains.pop().unwrap_or_default();
        match chain.last_mut() {
            None => chain.push(link),
            Some(before) if before.last(layers).is_beside(layer) => before.layers.push(number),
            Some(before) if feeds(layers, before, layer, &link, norm) => {
                // Of one layer for query, key and value the attention gives a third.
                before.gives = link.takes;
                link.from_heads = before.heads;
                chain.push(link);
            }
            Some(_) => chains.push(std::mem::replace(&mut chain, vec![link])),
        }
        chains.push(chain);
        norm = false;
    }
    for link in chains.iter_mut().flatten() {
        link.settle(layers, degree);
    }
    allow_whole(&mut chains, layers);
    chains.iter().flat_map(|chain| cheapest(chain, degree as f64)).collect()
}

impl ParallelLayers {
    fn of(number: usize, layer: &Layer) -> Option<Self> {
        let ([takes, gives], weight) = (layer.ends()?, layer.weight()?);
        let (takes, gives) = (*weight.get(takes)?, *weight.get(gives)?);
        let (open, heads) = (layer.role().1 == "GateController", layer.gives_heads());
        let (elements, choices) = (weight.iter().product(), Vec::new());
        Some(Self { layers: vec![number], takes, gives, elements, choices, open, heads, from_heads: false })
    }

    /// Finds out how all of its layers can be split. Heads are not cut by padding.
    fn settle(&mut self, layers: &[Layer], degree: usize) {
        let can = |cut: &LinearSplit| {
            self.layers.iter().all(|number| {
                let layer = &layers[*number];
                let (Some([takes, gives]), Some(weight)) = (layer.ends(), layer.weight()) else { return false };
                match cut {
                    LinearSplit::Columns => layer.divides(weight[gives], degree, !self.heads && !self.open),
                    _ => layer.divides(weight[takes], degree, !self.from_heads && !self.open),
                }
            })
        };
        self.choices = [LinearSplit::Columns, LinearSplit::Rows].into_iter().filter(can).collect();
        let weights = self.layers.iter().filter_map(|number| layers[*number].weight());
        self.elements = weights.map(|weight| weight.iter().product::<usize>()).sum();
    }

    fn last<'a>(&self, layers: &'a [Layer]) -> &'a Layer {
        &layers[self.layers[self.layers.len() - 1]]
    }
}

/// Whether a link is taken to feed a layer: they are neighbours, in one struct or, with no norm between, in one block,
/// and the widths fit.
fn feeds(layers: &[Layer], before: &ParallelLayers, layer: &Layer, link: &ParallelLayers, norm: bool) -> bool {
    let other = before.last(layers);
    // What a `SwiGlu` gives is what the struct around it sees.
    let from = match other.role().1 {
        "SwiGlu" => other.parent().split_last().map_or(&[][..], |(_, around)| around),
        _ => other.parent(),
    };
    let near = from == layer.parent() || (!norm && in_one_block(other.parent(), layer.parent()));
    let fused = before.heads && before.takes == link.takes && before.gives == 3 * link.takes;
    near && (before.gives == link.takes || fused) && !before.open && !link.open
}

/// Whether two places are in the same one of repeated blocks, and not alone in the whole model.
fn in_one_block(a: &[(String, String)], b: &[(String, String)]) -> bool {
    let common = a.iter().zip(b).take_while(|(a, b)| a.0 == b.0).count();
    let numbered = |place: &(String, String)| place.0.parse::<usize>().is_ok();
    common > 0 && !a[common..].iter().chain(&b[common..]).any(numbered)
}

/// Lets links stay whole that need not be split, and those that cannot be. Like layers of repeated blocks do as one.
fn allow_whole(chains: &mut [Vec<ParallelLayers>], layers: &[Layer]) {
    let kind = |link: &ParallelLayers| like(&layers[link.layers[0]].path(""));
    let mut bytes: BTreeMap<String, usize> = BTreeMap::new();
    for link in chains.iter().flatten().filter(|link| !link.choices.is_empty()) {
        *bytes.entry(kind(link)).or_default() += link.elements;
    }
    let must = must_split(&bytes.values().copied().collect::<Vec<_>>());
    let must: BTreeMap<&String, bool> = bytes.keys().zip(must).collect();
    for link in chains.iter_mut().flatten() {
        if link.choices.is_empty() || !must.get(&kind(link)).is_some_and(|must| *must) {
            link.choices.push(LinearSplit::Whole);
        }
    }
}

/// The cheapest way for a chain, of which each link either gets whole activations or such as are split by features.
fn cheapest(chain: &[ParallelLayers], n: f64) -> Vec<(usize, LinearSplit)> {
    let mut ways: Vec<(Features, f64, Vec<LinearSplit>)> = vec![(Features::Whole, 0.0, Vec::new())];
    for link in chain {
        let mut next: Vec<(Features, f64, Vec<LinearSplit>)> = Vec::new();
        for (given, so_far, cuts) in &ways {
            for cut in &link.choices {
                let gives = if *cut == LinearSplit::Columns { Features::Split } else { Features::Whole };
                let total = so_far + cost(link, *given, *cut, n).total();
                let known = next.iter().position(|(features, ..)| *features == gives);
                if known.is_none_or(|place| total < next[place].1) {
                    known.map(|place| next.swap_remove(place));
                    next.push((gives, total, cuts.iter().chain([cut]).copied().collect()));
                }
            }
        }
        ways = next;
    }
    let end = |way: &(Features, f64, Vec<LinearSplit>)| match (way.0, chain.last()) {
        (Features::Split, Some(link)) if !link.open => way.1 + moved(1.0, link.gives, n).total(),
        _ => way.1,
    };
    let best = ways.into_iter().min_by(|a, b| end(a).total_cmp(&end(b)));
    let cuts = best.map_or_else(Vec::new, |(_, _, cuts)| cuts);
    chain.iter().zip(cuts).flat_map(|(link, cut)| link.layers.iter().map(move |layer| (*layer, cut))).collect()
}

/// What a link costs that gets its activations so and is split so: forward and backward.
fn cost(link: &ParallelLayers, given: Features, cut: LinearSplit, n: f64) -> PlanCost {
    const ALL_REDUCE: f64 = 2.0;
    const GATHER: f64 = 1.0;
    let side_by_side = link.layers.len() as f64;
    let moves: &[(f64, usize, f64)] = match (given, cut) {
        // The gradient of what is taken is a sum over the ranks.
        (Features::Whole, LinearSplit::Columns) => &[(ALL_REDUCE, link.takes, 1.0)],
        // Gathered forward, the gradient scattered as it is summed.
        (Features::Split, LinearSplit::Columns) => &[(GATHER, link.takes, 1.0), (GATHER, link.takes, 1.0)],
        (Features::Split, LinearSplit::Rows) => &[(ALL_REDUCE, link.gives, side_by_side)],
        // Each rank takes its part, whose gradient is gathered.
        (Features::Whole, LinearSplit::Rows) => &[(GATHER, link.takes, 1.0), (ALL_REDUCE, link.gives, side_by_side)],
        (Features::Split, LinearSplit::Whole) => &[(GATHER, link.takes, 1.0)],
        (Features::Whole, LinearSplit::Whole) => &[],
    };
    let held = if cut == LinearSplit::Whole { link.elements as f64 } else { link.elements as f64 / n };
    // A product forward and two backward.
    let mut cost = PlanCost { parameter_bytes: WIDTH * held, work: 6.0 * ROWS * held, ..PlanCost::default() };
    for (shares, features, times) in moves {
        let one = moved(*shares, *features, n);
        cost.collectives += *times as usize;
        cost.collective_bytes += times * one.collective_bytes;
    }
    cost
}

/// A collective in which each rank sends `shares` times what the others have of some features.
fn moved(shares: f64, features: usize, n: f64) -> PlanCost {
    let collective_bytes = shares * (n - 1.0) / n * ROWS * features as f64 * WIDTH;
    PlanCost { collectives: 1, collective_bytes, ..PlanCost::default() }
}
