//! Balances the cost of the stages.
//!
//! Parameters are lined up in the order of their first use. Every operation belongs to the last parameter before it (in
//! the backward pass, to the parameter whose gradient it helps to make, or to the first one after it), so that each
//! parameter has a cost, and each gap between two of them a number of elements that would cross there. Of all ways to
//! divide the line into stages one is taken whose costliest stage costs least, or next to least if less crosses then,
//! by dynamic programming.

use std::collections::{HashMap, HashSet};

use burn_ir::TensorId;

use super::analysis::{Analysis, ValueSource};
use super::cost::transfer_cost;
use super::placement::Bounds;
use crate::Error;
use crate::graph::StepGraph;
use crate::graph::operation::{product, sum};

/// The stage of each parameter; `cost` is that of an operation.
pub(super) fn balanced(
    graph: &StepGraph,
    stages: usize,
    cost: impl Fn(usize) -> f64,
    transfers: bool,
) -> Result<Vec<usize>, Error> {
    let results: HashSet<TensorId> = graph.results().map(|tensor| tensor.id).collect();
    let analysis = Analysis::new(&graph.operations, graph.forward_len, &graph.params, &results);
    let line = line(&analysis, graph.params.len());
    let used = line.iter().flatten().max().map_or(0, |last| last + 1);
    if used == 0 {
        return Ok(vec![0; graph.params.len()]);
    }
    let places: Vec<usize> = line.iter().map(|place| place.unwrap_or(0)).collect();
    let bounds = Bounds::new(&analysis, &graph.params, &places, used)?;

    let of_gradient = gradients(graph, &analysis);
    let mut costs = vec![0.0; used];
    for op in analysis.placed() {
        let place = of_gradient[op].map_or(bounds.bound[op], |param| places[param].min(bounds.bound[op]));
        costs[place] += cost(op);
    }
    let gaps = if transfers { gaps(&analysis, &bounds, used) } else { vec![0.0; used + 1] };
    let starts = divide(&costs, &gaps, stages);
    let stage = |place: usize| starts.iter().filter(|start| **start <= place).count() - 1;
    // A parameter that no operation reads goes with the one before it.
    let mut last = 0;
    let homes = line.iter().map(|place| {
        last = place.map_or(last, stage);
        last
    });
    Ok(homes.collect())
}

/// The place of each parameter that the forward pass reads, in the order of first use. Those that one operation reads
/// first have one place. So have the two of a scale and a shift, as of a normalisation: a forward pass without autodiff
/// has one operation for it, which could not run on two stages.
fn line(analysis: &Analysis<'_>, params: usize) -> Vec<Option<usize>> {
    let mut line = vec![None; params];
    let mut next = 0;
    // The places of parameters that scale, by the operation.
    let mut scales = HashMap::new();
    for op in analysis.placed().filter(|op| analysis.is_forward(*op)) {
        let origins = || analysis.origins(op).map(|(origin, _)| origin);
        let first = |line: &[Option<usize>], origin| match origin {
            ValueSource::Param(param) if line[param].is_none() => Some(param),
            _ => None,
        };
        if !origins().any(|origin| first(&line, origin).is_some()) {
            continue;
        }
        let shifted = origins().find_map(|origin| match (sum(&analysis.operations[op]), origin) {
            (Some(_), ValueSource::Op(scale)) => scales.get(&scale).copied(),
            _ => None,
        });
        let place = shifted.unwrap_or(next);
        next = next.max(place + 1);
        if product(&analysis.operations[op]).is_some() {
            scales.insert(op, place);
        }
        for origin in origins() {
            if let Some(param) = first(&line, origin) {
                line[param] = Some(place);
            }
        }
    }
    line
}

/// Of each operation of the backward pass that only one parameter's gradient needs: the parameter.
fn gradients(graph: &StepGraph, analysis: &Analysis<'_>) -> Vec<Option<usize>> {
    enum For {
        Param(usize),
        Several,
    }
    let mut wanted: HashMap<TensorId, For> = HashMap::new();
    let want = |wanted: &mut HashMap<TensorId, For>, tensor: TensorId, param: Option<usize>| {
        let reason = match (wanted.get(&tensor), param) {
            (None, Some(param)) => For::Param(param),
            (Some(For::Param(before)), Some(param)) if *before == param => For::Param(param),
            _ => For::Several,
        };
        wanted.insert(tensor, reason);
    };
    for (index, param) in graph.params.iter().enumerate() {
        param.gradient.iter().for_each(|gradient| want(&mut wanted, gradient.id, Some(index)));
    }
    let mut params = vec![None; graph.operations.len()];
    for op in analysis.placed().rev().filter(|op| !analysis.is_forward(*op)) {
        let mut outputs = graph.operations[op].outputs().filter_map(|out| wanted.get(&out.id));
        params[op] = match (outputs.next(), outputs.next()) {
            (Some(For::Param(param)), None) => Some(*param),
            _ => None,
        };
        graph.operations[op].inputs().for_each(|input| want(&mut wanted, input.id, params[op]));
    }
    params
}

/// What would cross before each place of the line, there and back. Operations without parameters are taken as early or
/// as late as possible, whichever is less: the real cut does not cost more.
fn gaps(analysis: &Analysis<'_>, bounds: &Bounds, used: usize) -> Vec<f64> {
    let forward: Vec<usize> = analysis.placed().filter(|op| analysis.is_forward(*op)).collect();
    let mut readers: HashMap<TensorId, Vec<usize>> = HashMap::new();
    for op in &forward {
        for (origin, input) in analysis.origins(*op) {
            if let ValueSource::Op(_) = origin {
                readers.entry(input.id).or_default().push(*op);
            }
        }
    }
    let early = bounds.bound.clone();
    let mut late = bounds.bound.clone();
    for op in forward.iter().rev().filter(|op| bounds.pinned[**op].is_none()) {
        let outputs = analysis.operations[*op].outputs();
        let first = outputs.filter_map(|out| readers.get(&out.id)).flatten().map(|reader| late[*reader]).min();
        late[*op] = first.unwrap_or(used - 1);
    }
    let crossing = |places: &[usize]| {
        // Rises where a tensor is made and falls after its last reader.
        let mut change = vec![0.0; used + 2];
        for op in &forward {
            for out in analysis.operations[*op].outputs() {
                let last = readers.get(&out.id).into_iter().flatten().map(|reader| places[*reader]).max();
                if let Some(last) = last.filter(|last| *last > places[*op]) {
                    let cost = 2.0 * transfer_cost(out) as f64;
                    change[places[*op] + 1] += cost;
                    change[last + 1] -= cost;
                }
            }
        }
        let mut sum = 0.0;
        change
            .into_iter()
            .map(|change| {
                sum += change;
                sum
            })
            .collect::<Vec<f64>>()
    };
    let (early, late) = (crossing(&early), crossing(&late));
    (0..=used).map(|gap| if gap == 0 || gap == used { 0.0 } else { early[gap].min(late[gap]) }).collect()
}

/// How much more than necessary the costliest stage may cost, if less crosses for it.
const SLACK: f64 = 1.02;

/// Where each stage starts, so that the costliest costs least and, within [`SLACK`] of that, least crosses.
fn divide(costs: &[f64], gaps: &[f64], stages: usize) -> Vec<usize> {
    let mut before = vec![0.0];
    for cost in costs {
        before.push(before[before.len() - 1] + cost);
    }
    let stage = |from: usize, to: usize| before[to] - before[from] + gaps[from] + gaps[to];
    let costliest = |most: f64, from: usize, to: usize| most.max(stage(from, to));
    let (most, _) = best(costs.len(), stages, costliest);
    let crossing = |sum: f64, from: usize, to: usize| match stage(from, to) <= SLACK * most {
        true => sum + gaps[from],
        false => f64::INFINITY,
    };
    best(costs.len(), stages, crossing).1
}

/// The best of all divisions of `places` into stages, by what `price` makes of the price of the stages before and one
/// more stage; and where its stages start.
fn best(places: usize, stages: usize, price: impl Fn(f64, usize, usize) -> f64) -> (f64, Vec<usize>) {
    let stages = stages.clamp(1, places);
    // The price of the best division of the places up to each one, and where its last stage starts.
    let mut found: Vec<Vec<(f64, usize)>> = vec![vec![(f64::INFINITY, 0); places + 1]; stages + 1];
    found[0][0] = (0.0, 0);
    for count in 1..=stages {
        for to in count..=places {
            for from in count - 1..to {
                let price = price(found[count - 1][from].0, from, to);
                if price < found[count][to].0 {
                    found[count][to] = (price, from);
                }
            }
        }
    }
    let mut starts = Vec::with_capacity(stages);
    let mut to = places;
    for count in (1..=stages).rev() {
        to = found[count][to].1;
        starts.push(to);
    }
    starts.reverse();
    (found[stages][places].0, starts)
}

#[cfg(test)]
mod tests {
    use super::divide;

    #[test]
    fn the_costliest_stage_costs_as_little_as_possible() {
        let none = |n: usize| vec![0.0; n + 1];
        assert_eq!(divide(&[1.0, 1.0, 1.0, 1.0], &none(4), 2), [0, 2]);
        assert_eq!(divide(&[1.0, 1.0, 1.0, 9.0], &none(4), 3)[2], 3);
        assert_eq!(divide(&[3.0, 1.0, 1.0, 1.0, 3.0], &none(5), 3), [0, 1, 4]);
        // More stages than places: one each.
        assert_eq!(divide(&[1.0, 2.0], &none(2), 5), [0, 1]);
        // What crosses counts for both of its stages.
        assert_eq!(divide(&[2.0, 2.0, 2.0, 2.0], &[0.0, 0.0, 9.0, 0.0, 0.0], 2), [0, 1]);
    }

    #[test]
    fn no_division_is_better() {
        let costs: Vec<f64> = (0..9).map(|i| f64::from((i * 7919) % 13 + 1)).collect();
        let gaps: Vec<f64> = (0..10).map(|i| f64::from((i * 104_729) % 5)).collect();
        let gaps = [&[0.0], &gaps[1..9], &[0.0]].concat();
        let most = |starts: &[usize]| {
            let ends = starts.iter().skip(1).copied().chain([9]);
            let stages = starts.iter().zip(ends);
            stages.map(|(from, to)| costs[*from..to].iter().sum::<f64>() + gaps[*from] + gaps[to]).fold(0.0, f64::max)
        };
        let found = most(&divide(&costs, &gaps, 3));
        for a in 1..8 {
            for b in a + 1..9 {
                assert!(found <= super::SLACK * most(&[0, a, b]));
            }
        }
    }
}
