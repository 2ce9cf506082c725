//! The tensors of a directory as the parameters of a model.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use burn::tensor::{DType, TensorData};

use super::mapping::Mapping;
use super::read::read;
use super::relation::Relation;
use super::weights::Weights;
use crate::Error;
use crate::params::SliceSource;
use crate::tensor_file::file_error;

/// The tensors of a directory as the parameters of a model: a [`SliceSource`] that reads the slices that a rank asks
/// for, turned, cut and put together as the [`Mapping`] says. A clone shares the files, as of [`Weights`].
#[derive(Debug, Clone)]
pub struct Mapped {
    weights: Weights,
    mapping: Mapping,
    /// What was found for parameters so far.
    known: HashMap<String, Option<Found>>,
}

/// How a parameter is made of tensors.
#[derive(Debug, Clone)]
pub(super) struct Found {
    pub(super) relation: Arc<Relation>,
    /// Which of the relation's parameters it is.
    pub(super) place: usize,
}

impl Found {
    pub(super) fn dims(&self) -> &[usize] {
        &self.relation.models[self.place].dims
    }
}

impl Weights {
    /// These tensors as the parameters of a model.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if a rule of the mapping can fit no model.
    pub fn mapped(self, mapping: Mapping) -> Result<Mapped, Error> {
        mapping.check()?;
        Ok(Mapped { weights: self, mapping, known: HashMap::new() })
    }
}

impl Mapped {
    /// The directory.
    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    /// The mapping.
    pub fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    /// How many bytes were read so far, as [`Weights::bytes_read`] counts.
    pub fn bytes_read(&self) -> u64 {
        self.weights.bytes_read()
    }

    pub(super) fn found(&mut self, path: &str) -> Result<Option<Found>, Error> {
        if let Some(known) = self.known.get(path) {
            return Ok(known.clone());
        }
        let found = find(&self.weights, &self.mapping, path)?;
        self.known.insert(path.into(), found.clone());
        Ok(found)
    }

    /// Names the tensors that a parameter was looked for under.
    fn missing(&self, path: &str) -> Error {
        let names: Vec<String> = self.mapping.of_model(path).flat_map(|(_, filled, _)| filled.files).collect();
        let problem = match names.is_empty() {
            true => format!("no rule of the mapping fits parameter `{path}`"),
            false => format!("has none of the tensors `{}`, of which parameter `{path}` is made", names.join("`, `")),
        };
        let advice = "; `hf::compare` lists what there is, `Mapping::keep` leaves a parameter as it is";
        file_error(self.weights.dir(), format!("{problem}{advice}"))
    }
}

/// How a parameter is made of the tensors that there are; `None` if it cannot be.
///
/// # Errors
/// [`file_error`] if the tensors do not fit the rule.
pub(super) fn find(weights: &Weights, mapping: &Mapping, path: &str) -> Result<Option<Found>, Error> {
    for (rule, filled, place) in mapping.of_model(path) {
        let dims: Option<Vec<Vec<usize>>> =
            filled.files.iter().map(|name| weights.tensor_dims(name).map(<[usize]>::to_vec)).collect();
        let Some(dims) = dims else { continue };
        let relation = Relation::of_files(rule, &filled, &dims)
            .map_err(|problem| file_error(weights.dir(), format!("parameter `{path}`: {problem}")))?;
        return Ok(Some(Found { relation: Arc::new(relation), place }));
    }
    Ok(None)
}

impl SliceSource for Mapped {
    fn dims(&mut self, path: &str) -> Result<Option<Vec<usize>>, Error> {
        match self.found(path)? {
            Some(found) => Ok(Some(found.dims().to_vec())),
            None => Err(self.missing(path)),
        }
    }

    fn read(&mut self, path: &str, ranges: &[Range<usize>]) -> Result<TensorData, Error> {
        let found = self.found(path)?.ok_or_else(|| self.missing(path))?;
        read(&self.weights, &found.relation, (found.place, ranges), None)
    }

    fn read_as(&mut self, path: &str, ranges: &[Range<usize>], dtype: DType) -> Result<TensorData, Error> {
        let found = self.found(path)?.ok_or_else(|| self.missing(path))?;
        read(&self.weights, &found.relation, (found.place, ranges), Some(dtype))
    }

    fn keeps(&mut self, path: &str) -> bool {
        self.mapping.keeps(path)
    }

    fn for_later(&self) -> Option<Box<dyn SliceSource + Send>> {
        Some(Box::new(self.clone()))
    }
}
