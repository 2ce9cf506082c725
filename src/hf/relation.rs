//! A rule on tensors of known dims: which block of which tensor is which block of which parameter.

use std::ops::Range;

use super::rule::{Filled, Rule};

/// Tensors of a directory and parameters of a model that are made of each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Relation {
    pub(super) files: Vec<NamedDims>,
    pub(super) models: Vec<NamedDims>,
    pub(super) blocks: Vec<Block>,
    /// Whether the last two dims are swapped between the sides.
    pub(super) transposed: bool,
}

/// A tensor or a parameter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct NamedDims {
    pub(super) name: String,
    pub(super) dims: Vec<usize>,
}

/// A block of one tensor that is one of one parameter. Everything goes by the dims of the tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Block {
    /// Which tensor, and which parameter.
    pub(super) file: usize,
    pub(super) model: usize,
    pub(super) lens: Vec<usize>,
    pub(super) in_file: Vec<Line>,
    pub(super) in_model: Vec<Line>,
}

/// Where the elements along a dim are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Line {
    pub(super) start: usize,
    pub(super) step: usize,
}

impl Line {
    /// Which of `len` elements of the line are in a range of the tensor.
    fn within(self, len: usize, range: &Range<usize>) -> Range<usize> {
        let first = |place: usize| place.saturating_sub(self.start).div_ceil(self.step).min(len);
        first(range.start)..first(range.end)
    }

    fn at(self, index: usize) -> usize {
        self.start + index * self.step
    }
}

impl Block {
    /// What of the block is within a range of the tensor and one of the parameter, given by the dims of the tensor;
    /// `None` if nothing is.
    pub(super) fn within(&self, file: &[Range<usize>], model: &[Range<usize>]) -> Option<Self> {
        let mut block = self.clone();
        for dim in 0..self.lens.len() {
            let (of_file, of_model) = (self.in_file[dim], self.in_model[dim]);
            let a = of_file.within(self.lens[dim], &file[dim]);
            let b = of_model.within(self.lens[dim], &model[dim]);
            let both = a.start.max(b.start)..a.end.min(b.end);
            if both.is_empty() {
                return None;
            }
            block.lens[dim] = both.len();
            block.in_file[dim].start = of_file.at(both.start);
            block.in_model[dim].start = of_model.at(both.start);
        }
        Some(block)
    }

    /// How many elements it has.
    pub(super) fn elements(&self) -> usize {
        self.lens.iter().product()
    }
}

/// The last two of some dims swapped, if there are two.
pub(super) fn swapped<T: Clone>(dims: &[T], transposed: bool) -> Vec<T> {
    let mut dims = dims.to_vec();
    let rank = dims.len();
    if transposed && rank > 1 {
        dims.swap(rank - 2, rank - 1);
    }
    dims
}

impl Relation {
    /// A tensor that is a parameter of the same name, element by element.
    pub(super) fn whole(name: &str, dims: &[usize]) -> Self {
        let place = || vec![NamedDims { name: name.into(), dims: dims.to_vec() }];
        let blocks = vec![Block::whole(dims)];
        Self { files: place(), models: place(), blocks, transposed: false }
    }

    /// The relation of a rule whose tensors have these dims.
    ///
    /// # Errors
    /// What does not fit.
    pub(super) fn of_files(rule: &Rule, filled: &Filled, dims: &[Vec<usize>]) -> Result<Self, String> {
        let models = match filled.models.len() {
            1 if dims.len() == 1 => vec![swapped(&dims[0], rule.transposed)],
            // The model has one parameter of several tensors.
            1 => vec![joined(rule, &filled.files, dims, rule.transposed)?],
            _ => cut(rule, &filled.files[0], &dims[0])?.iter().map(|dims| swapped(dims, rule.transposed)).collect(),
        };
        Self::new(rule, filled, dims.to_vec(), models)
    }

    /// The relation of a rule whose parameters have these dims.
    ///
    /// # Errors
    /// What does not fit.
    pub(super) fn of_models(rule: &Rule, filled: &Filled, dims: &[Vec<usize>]) -> Result<Self, String> {
        let files = match filled.files.len() {
            1 if dims.len() == 1 => vec![swapped(&dims[0], rule.transposed)],
            1 => vec![joined(rule, &filled.models, dims, rule.transposed)?],
            _ => cut(rule, &filled.models[0], &dims[0])?.iter().map(|dims| swapped(dims, rule.transposed)).collect(),
        };
        Self::new(rule, filled, files, dims.to_vec())
    }

    fn new(rule: &Rule, filled: &Filled, files: Vec<Vec<usize>>, models: Vec<Vec<usize>>) -> Result<Self, String> {
        let blocks = match (files.len(), models.len()) {
            (1, 1) => whole(rule, &filled.files[0], &files[0])?,
            (1, _) => parts(rule, &filled.files[0], &files[0], rule.dim)?,
            _ => {
                // The dim of the parameter, seen from the tensors.
                let order: Vec<usize> = swapped(&(0..models[0].len()).collect::<Vec<_>>(), rule.transposed);
                let dim = order.get(rule.dim).copied().unwrap_or(rule.dim);
                let fused = swapped(&models[0], rule.transposed);
                let parts = parts(rule, &filled.models[0], &fused, dim)?;
                parts.into_iter().map(Block::turned).collect()
            }
        };
        let place = |(name, dims): (&String, Vec<usize>)| NamedDims { name: name.clone(), dims };
        Ok(Self {
            files: filled.files.iter().zip(files).map(place).collect(),
            models: filled.models.iter().zip(models).map(place).collect(),
            blocks,
            transposed: rule.transposed,
        })
    }
}

impl Block {
    /// All of a tensor and all of a parameter.
    fn whole(dims: &[usize]) -> Self {
        let lines = lines(dims.len());
        Self { file: 0, model: 0, lens: dims.to_vec(), in_file: lines.clone(), in_model: lines }
    }

    /// The same block with the sides exchanged.
    fn turned(self) -> Self {
        let Self { file, model, lens, in_file, in_model } = self;
        Self { file: model, model: file, lens, in_file: in_model, in_model: in_file }
    }
}

/// The dims of the parts of a tensor, or parameter, that has one name.
fn cut(rule: &Rule, name: &str, dims: &[usize]) -> Result<Vec<Vec<usize>>, String> {
    let unit = unit(rule, name, dims, rule.dim)?;
    let part = |share: usize| {
        let mut part = dims.to_vec();
        part[rule.dim] = unit * share * rule.groups;
        part
    };
    Ok(rule.share_of_parts().into_iter().map(part).collect())
}

/// The dims, on its own side, of what several parts make up.
fn joined(rule: &Rule, names: &[String], parts: &[Vec<usize>], transposed: bool) -> Result<Vec<usize>, String> {
    let parts: Vec<Vec<usize>> = parts.iter().map(|part| swapped(part, transposed)).collect();
    let dim = rule.dim;
    let mut all = parts[0].clone();
    for (name, part) in names.iter().zip(&parts) {
        let alike = part.len() == all.len() && (0..all.len()).all(|other| other == dim || part[other] == all[other]);
        if !alike || dim >= all.len() {
            return Err(format!(
                "`{name}` of dims {part:?} and `{}` of {:?} do not go together along dim {dim}",
                names[0], parts[0]
            ));
        }
    }
    let total = parts.iter().try_fold(0usize, |sum, part| sum.checked_add(part[dim]));
    all[dim] = total.ok_or_else(|| format!("`{}` and the others are too large together", names[0]))?;
    let unit = unit(rule, &names[0], &all, dim)?;
    for ((name, part), share) in names.iter().zip(&parts).zip(rule.share_of_parts()) {
        if part[dim] != unit * share * rule.groups {
            return Err(format!(
                "`{name}` has {} along dim {dim}, where the shares {:?} of {} in all give it {}: say their `shares`",
                part[dim],
                rule.share_of_parts(),
                all[dim],
                unit * share * rule.groups
            ));
        }
    }
    Ok(all)
}

/// The size of one share of one group along a dim.
fn unit(rule: &Rule, name: &str, dims: &[usize], dim: usize) -> Result<usize, String> {
    let Some(size) = dims.get(dim) else {
        return Err(format!("`{name}` of dims {dims:?} has no dim {dim} to be cut along"));
    };
    let shares: usize = rule.share_of_parts().iter().sum();
    let units = shares.checked_mul(rule.groups).ok_or_else(|| format!("`{name}` is cut into too many groups"))?;
    match size % units {
        0 => Ok(size / units),
        _ => Err(format!(
            "`{name}` has {size} along dim {dim}, which {} groups of the shares {:?} do not divide",
            rule.groups,
            rule.share_of_parts()
        )),
    }
}

fn lines(rank: usize) -> Vec<Line> {
    vec![Line { start: 0, step: 1 }; rank]
}

/// The blocks of a tensor that is one parameter.
fn whole(rule: &Rule, name: &str, dims: &[usize]) -> Result<Vec<Block>, String> {
    let block = Block::whole(dims);
    let Some(head) = rule.pairs else { return Ok(vec![block]) };
    let Some(rows) = dims.first().filter(|rows| **rows % head == 0) else {
        return Err(format!("`{name}` of dims {dims:?} does not have heads of {head} rows"));
    };
    let half = |(first, odd): (usize, usize)| {
        let mut block = block.clone();
        block.lens[0] = head / 2;
        block.in_file[0].start = first + odd * head / 2;
        block.in_model[0] = Line { start: first + odd, step: 2 };
        block
    };
    Ok((0..*rows).step_by(head).flat_map(|first| [(first, 0), (first, 1)]).map(half).collect())
}

/// The blocks of a tensor that several parameters are parts of, along a dim of it.
fn parts(rule: &Rule, name: &str, dims: &[usize], dim: usize) -> Result<Vec<Block>, String> {
    let unit = unit(rule, name, dims, dim)?;
    let shares = rule.share_of_parts();
    let mut blocks = Vec::new();
    let mut start = 0;
    for group in 0..rule.groups {
        for (model, share) in shares.iter().enumerate() {
            let len = unit * share;
            let mut block = Block { model, ..Block::whole(dims) };
            block.lens[dim] = len;
            block.in_file[dim].start = start;
            block.in_model[dim].start = group * len;
            start += len;
            blocks.push(block);
        }
    }
    Ok(blocks)
}

#[cfg(test)]
mod tests {
    use super::Relation;
    use crate::hf::rule::Rule;

    fn relation(rule: &Rule, dims: &[Vec<usize>]) -> Result<Relation, String> {
        let (filled, _) = rule.of_model(&rule.model.all()[0]).unwrap();
        Relation::of_files(rule, &filled, dims)
    }

    /// For each parameter, the element of which tensor (hundreds) and place each of its elements is.
    fn origins(relation: &Relation) -> Vec<Vec<usize>> {
        let mut found: Vec<Vec<usize>> =
            relation.models.iter().map(|model| vec![usize::MAX; model.dims.iter().product()]).collect();
        for block in &relation.blocks {
            let (file, model) = (&relation.files[block.file], &relation.models[block.model]);
            for element in 0..block.elements() {
                let (mut rest, mut read, mut wrote) = (element, vec![], vec![]);
                for dim in (0..block.lens.len()).rev() {
                    let index = rest % block.lens[dim];
                    rest /= block.lens[dim];
                    read.insert(0, block.in_file[dim].at(index));
                    wrote.insert(0, block.in_model[dim].at(index));
                }
                let flat =
                    |index: &[usize], dims: &[usize]| index.iter().zip(dims).fold(0, |sum, (i, size)| sum * size + i);
                let wrote = super::swapped(&wrote, relation.transposed);
                found[block.model][flat(&wrote, &model.dims)] = 100 * block.file + flat(&read, &file.dims);
            }
        }
        assert!(found.iter().flatten().all(|place| *place != usize::MAX), "an element is nobody's");
        found
    }

    #[test]
    fn one_of_one() {
        let of = relation(&Rule::new("a", "b").transposed(), &[vec![2, 3]]).unwrap();
        assert_eq!(of.models[0].dims, [3, 2]);
        assert_eq!(origins(&of), [[0, 3, 1, 4, 2, 5]]);
        let of = relation(&Rule::new("a", "b").transposed(), &[vec![3]]).unwrap();
        assert_eq!(origins(&of), [[0, 1, 2]]);
    }

    #[test]
    fn several_of_one() {
        let rule = Rule::new("qkv", ["q", "k", "v"]);
        let of = relation(&rule, &[vec![3, 2]]).unwrap();
        assert_eq!(origins(&of), [[0, 1], [2, 3], [4, 5]]);
        let of = relation(&rule.clone().along(1).transposed(), &[vec![2, 3]]).unwrap();
        assert_eq!(of.models[0].dims, [1, 2]);
        assert_eq!(origins(&of), [[0, 3], [1, 4], [2, 5]]);
        let of = relation(&rule.clone().shares([2, 1, 1]).groups(2), &[vec![8]]).unwrap();
        assert_eq!(origins(&of), [vec![0, 1, 4, 5], vec![2, 6], vec![3, 7]]);
        let said = relation(&rule, &[vec![4, 2]]).unwrap_err();
        assert!(
            said.contains("`qkv` has 4 along dim 0, which 1 groups of the shares [1, 1, 1] do not divide"),
            "{said}"
        );
        let said = relation(&rule.along(2), &[vec![3, 3]]).unwrap_err();
        assert!(said.contains("has no dim 2"), "{said}");
    }

    #[test]
    fn one_of_several() {
        let rule = Rule::new(["gate", "up"], "both").along(1).transposed();
        let of = relation(&rule, &[vec![1, 2], vec![1, 2]]).unwrap();
        assert_eq!(of.models[0].dims, [2, 2]);
        assert_eq!(origins(&of), [[0, 100, 1, 101]]);
        let said = relation(&rule, &[vec![1, 2], vec![2, 2]]).unwrap_err();
        assert!(said.contains("say their `shares`") || said.contains("do not divide"), "{said}");
        let of = relation(&rule.shares([1, 2]), &[vec![1, 2], vec![2, 2]]).unwrap();
        assert_eq!(origins(&of), [[0, 100, 102, 1, 101, 103]]);
    }

    #[test]
    fn halves_become_neighbours() {
        let of = relation(&Rule::new("q", "q").rotary_pairs(4), &[vec![8]]).unwrap();
        assert_eq!(origins(&of), [[0, 2, 1, 3, 4, 6, 5, 7]]);
        assert!(relation(&Rule::new("q", "q").rotary_pairs(4), &[vec![6]]).is_err());
        let block = &of.blocks[1];
        // What of the odd ones is in the parameter's elements 2 to 4: element 3, which is the tensor's 3.
        let within = block.within(std::slice::from_ref(&(0..8)), std::slice::from_ref(&(2..4))).unwrap();
        assert_eq!((within.lens[0], within.in_file[0].start, within.in_model[0].start), (1, 3, 3));
        assert_eq!(block.within(std::slice::from_ref(&(0..2)), std::slice::from_ref(&(0..8))), None);
    }

    #[test]
    fn both_ways_are_one() {
        for (rule, dims) in [
            (Rule::new("a", "b").transposed(), vec![vec![4, 6]]),
            (Rule::new("a", ["b", "c"]).along(1).transposed().groups(3), vec![vec![4, 6]]),
            (Rule::new(["a", "b"], "c").along(1).transposed().shares([2, 1]), vec![vec![4, 6], vec![2, 6]]),
            (Rule::new("a", "b").transposed().rotary_pairs(4), vec![vec![8, 3]]),
        ] {
            let of = relation(&rule, &dims).unwrap();
            let models: Vec<Vec<usize>> = of.models.iter().map(|model| model.dims.clone()).collect();
            let (filled, _) = rule.of_model(&rule.model.all()[0]).unwrap();
            assert_eq!(Relation::of_models(&rule, &filled, &models).unwrap(), of);
        }
    }
}
