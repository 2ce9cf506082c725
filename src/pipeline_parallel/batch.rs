//! Divides a batch into micro-batches.

use std::ops::Range;

use burn::backend::DispatchTensor;

use super::stage_error;
use crate::Error;
use crate::comm::part;
use crate::graph::{TensorMapper, TensorTree, named_tensors};
use crate::tensor::PlainTensor;

/// The inputs of a step, and how its micro-batches share their rows.
#[derive(Debug)]
pub(super) struct Batch {
    tensors: Vec<PlainTensor>,
    /// Whether each input is divided.
    divided: Vec<bool>,
    /// The inputs that are not.
    whole: Vec<String>,
    rows: usize,
    micro_batches: usize,
}

impl Batch {
    /// Divides `inputs` along the first dim into parts that differ by a row at most.
    ///
    /// # Errors
    /// [`Error::Pipeline`] if a path of `whole` is no input, nothing is left to divide, the inputs have different
    /// numbers of rows, or there are fewer rows than micro-batches.
    pub(super) fn new<I: TensorTree>(inputs: I, whole: &[String], micro_batches: usize) -> Result<Self, Error> {
        let named = named_tensors(inputs)?;
        let paths: Vec<&str> = named.iter().map(|(path, _)| path.as_str()).collect();
        if let Some(path) = whole.iter().find(|path| !paths.contains(&path.as_str())) {
            return Err(stage_error(format!("the step has no input `{path}` to give whole, but {paths:?}")));
        }
        let divided: Vec<bool> = paths.iter().map(|path| !whole.iter().any(|whole| whole == path)).collect();
        let rows = |tensor: &PlainTensor| tensor.shape().iter().next().copied();
        let mut first: Option<(&str, usize)> = None;
        for ((path, tensor), _) in named.iter().zip(&divided).filter(|(_, divided)| **divided) {
            let advice = "give it whole with `with_whole_input`, if it is not rows of the batch";
            let found = rows(tensor).ok_or_else(|| stage_error(format!("input `{path}` has no rows: {advice}")))?;
            match first {
                Some((other, rows)) if rows != found => {
                    return Err(stage_error(format!(
                        "input `{path}` has {found} rows, but input `{other}` has {rows}: {advice}"
                    )));
                }
                Some(_) => {}
                None => first = Some((path, found)),
            }
        }
        let Some((_, rows)) = first else {
            return Err(stage_error("the step has no input whose rows could be divided into micro-batches"));
        };
        if rows < micro_batches {
            return Err(stage_error(format!(
                "a batch of {rows} rows cannot be divided into {micro_batches} micro-batches: ask for {rows} at most"
            )));
        }
        let tensors = named.into_iter().map(|(_, tensor)| tensor).collect();
        Ok(Self { tensors, divided, whole: whole.to_vec(), rows, micro_batches })
    }

    /// Its rows of the batch.
    pub(super) fn rows(&self, micro_batch: usize) -> Range<usize> {
        part(self.rows, self.micro_batches, micro_batch)
    }

    /// A micro-batch of each size, and the size of each micro-batch as an index of those.
    pub(super) fn sizes(&self) -> (Vec<usize>, Vec<usize>) {
        let mut firsts: Vec<usize> = Vec::new();
        let size = |micro_batch: usize| self.rows(micro_batch).len();
        let sizes = (0..self.micro_batches).map(|micro_batch| {
            firsts.iter().position(|first| size(*first) == size(micro_batch)).unwrap_or_else(|| {
                firsts.push(micro_batch);
                firsts.len() - 1
            })
        });
        let sizes = sizes.collect();
        (firsts, sizes)
    }

    /// What went wrong when a micro-batch was captured, with what it was: it may be for another batch than this that
    /// the closure was written.
    pub(super) fn told_of(&self, error: Error, micro_batch: usize) -> Error {
        let Error::Graph { problem } = error else { return error };
        if self.micro_batches == 1 && self.whole.is_empty() {
            return Error::Graph { problem };
        }
        let (rows, all) = (self.rows(micro_batch).len(), self.rows);
        let whole = match self.whole.as_slice() {
            [] => "none whole".into(),
            whole => format!("whole {whole:?}"),
        };
        Error::Graph {
            problem: format!(
                "{problem}; this was a micro-batch of {rows} of {all} rows, given {whole} of its inputs: what has a row for each row of \
                 the batch must be divided, and what has none given whole, with `with_whole_input`"
            ),
        }
    }

    /// The inputs of a micro-batch.
    pub(super) fn micro_batch(&self, micro_batch: usize) -> Vec<PlainTensor> {
        let rows = self.rows(micro_batch);
        let tensors = self.tensors.iter().zip(&self.divided);
        tensors
            .map(|(tensor, divided)| if *divided { tensor.clone().narrow(0, rows.clone()) } else { tensor.clone() })
            .collect()
    }

    /// The inputs of a micro-batch in the structure of those of the step.
    ///
    /// # Errors
    /// Those of [`TensorTree::map_tensors`].
    pub(super) fn structured<I: TensorTree>(&self, inputs: I, micro_batch: usize) -> Result<I, Error> {
        inputs.map_tensors(&mut Replace(self.micro_batch(micro_batch).into_iter()))
    }
}

struct Replace(std::vec::IntoIter<PlainTensor>);

impl TensorMapper for Replace {
    fn map(&mut self, tensor: DispatchTensor) -> Result<DispatchTensor, Error> {
        Ok(self.0.next().map_or(tensor, PlainTensor::into_dispatch))
    }

    fn enter(&mut self, _: usize) {}

    fn exit(&mut self) {}
}
