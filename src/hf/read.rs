//! Reads the parts of tensors that make up a part of a parameter.

use std::ops::Range;

use burn::tensor::{DType, TensorData};

use super::relation::{Relation, swapped};
use super::weights::Weights;
use crate::Error;
use crate::params::SliceSource;
use crate::tensor_file::{Elements, Loop, Side, copy_strided, file_error, row_major};

impl SliceSource for Weights {
    fn dims(&mut self, path: &str) -> Result<Option<Vec<usize>>, Error> {
        Ok(self.tensor_dims(path).map(<[usize]>::to_vec))
    }

    fn read(&mut self, path: &str, ranges: &[Range<usize>]) -> Result<TensorData, Error> {
        let whole = whole(self, path)?;
        read(self, &whole, (0, ranges), None)
    }

    fn read_as(&mut self, path: &str, ranges: &[Range<usize>], dtype: DType) -> Result<TensorData, Error> {
        let whole = whole(self, path)?;
        read(self, &whole, (0, ranges), Some(dtype))
    }

    fn for_later(&self) -> Option<Box<dyn SliceSource + Send>> {
        Some(Box::new(self.clone()))
    }
}

/// A tensor that is a parameter as it is.
fn whole(weights: &Weights, name: &str) -> Result<Relation, Error> {
    let dims = weights.tensor_dims(name);
    let dims = dims.ok_or_else(|| file_error(weights.dir(), format!("there is no tensor `{name}`")))?;
    Ok(Relation::whole(name, dims))
}

/// The part of a relation's parameter that is in these ranges, in this dtype if both are floats, or else that of its
/// tensors; the widest, if they have several.
///
/// # Errors
/// [`file_error`] if a tensor is missing or is of a dtype that burn lacks, or the ranges do not fit.
pub(super) fn read(
    weights: &Weights,
    relation: &Relation,
    (place, ranges): (usize, &[Range<usize>]),
    dtype: Option<DType>,
) -> Result<TensorData, Error> {
    let model = &relation.models[place];
    let fits = |(range, size): (&Range<usize>, &usize)| range.start <= range.end && range.end <= *size;
    if ranges.len() != model.dims.len() || !ranges.iter().zip(&model.dims).all(fits) {
        let problem = format!("parameter `{}` of dims {:?} has nothing at {ranges:?}", model.name, model.dims);
        return Err(file_error(weights.dir(), problem));
    }
    let stored = widest(weights, relation)?;
    // Floats are cast as they are copied, and nothing else is.
    let dtype = dtype.filter(|dtype| is_plain(*dtype) && is_plain(stored)).unwrap_or(stored);
    let lens: Vec<usize> = ranges.iter().map(ExactSizeIterator::len).collect();
    let elements = if lens.contains(&0) { 0 } else { lens.iter().product() };
    let mut values = Elements::zeros(elements, dtype);
    let to_strides = swapped(&row_major(&lens), relation.transposed);
    let wanted = swapped(ranges, relation.transposed);
    let mut bytes_read = 0;
    for block in relation.blocks.iter().filter(|block| block.model == place) {
        let file = &relation.files[block.file];
        let all: Vec<Range<usize>> = file.dims.iter().map(|size| 0..*size).collect();
        let Some(block) = block.within(&all, &wanted) else { continue };
        let Some((of, entry)) = weights.entry(&file.name) else { continue };
        let from_strides = row_major(&file.dims);
        let (mut from, mut to, mut loops) = (0, 0, Vec::new());
        for (dim, len) in block.lens.iter().enumerate() {
            let (read, write) = (block.in_file[dim], block.in_model[dim]);
            from += read.start * from_strides[dim] as usize;
            to += (write.start - wanted[dim].start) * to_strides[dim] as usize;
            loops.push(Loop {
                len: *len,
                from: read.step as isize * from_strides[dim],
                to: write.step as isize * to_strides[dim],
            });
        }
        let of_file = entry.dtype.unwrap_or(dtype);
        let (from, to) = (Side { start: from, dtype: of_file }, Side { start: to, dtype });
        copy_strided((of.bytes(entry), from), (values.bytes_mut(), to), &loops)
            .map_err(|error| file_error(of.path(), format!("tensor `{}`: {error}", file.name)))?;
        bytes_read += (block.elements() * of_file.size()) as u64;
    }
    for file in &relation.files {
        weights.entry(&file.name).into_iter().for_each(|(of, entry)| of.release(entry));
    }
    weights.count(bytes_read);
    Ok(values.into_data(lens, dtype))
}

fn is_plain(dtype: DType) -> bool {
    matches!(dtype, DType::F64 | DType::F32 | DType::F16 | DType::BF16)
}

/// The widest dtype of a relation's tensors.
fn widest(weights: &Weights, relation: &Relation) -> Result<DType, Error> {
    let mut widest: Option<DType> = None;
    for file in &relation.files {
        let Some((of, entry)) = weights.entry(&file.name) else {
            return Err(file_error(weights.dir(), format!("there is no tensor `{}`", file.name)));
        };
        let dtype = entry.dtype.ok_or_else(|| {
            file_error(of.path(), format!("tensor `{}` is {}, which burn has no dtype for", file.name, entry.named))
        })?;
        widest = Some(match widest {
            // Neither of bf16 and f16 holds all of the other.
            Some(other) if other != dtype && other.size() == dtype.size() => DType::F32,
            Some(other) if other.size() > dtype.size() => other,
            _ => dtype,
        });
    }
    widest.ok_or_else(|| file_error(weights.dir(), "a rule without tensors"))
}
