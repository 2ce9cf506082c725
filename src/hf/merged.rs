//! Weights with the adapters of another directory added.

use std::collections::HashMap;
use std::ops::Range;

use burn::tensor::{DType, Device, Tensor, TensorData};

use super::adapter::{Adapter, module_of};
use super::mapped::Mapped;
use crate::Error;
use crate::params::SliceSource;
use crate::tensor_file::file_error;

/// Weights to which the adapters of another directory are added as they are read: a [`SliceSource`] for the model
/// without adapters. A rank computes the rows and columns that it holds, and nothing else is read. A clone shares the
/// files of both.
#[derive(Debug, Clone)]
pub struct Merged {
    base: Mapped,
    adapters: Mapped,
    scale: f64,
    /// What is known of parameters: the rank of the adapter, if there is one.
    known: HashMap<String, Option<usize>>,
}

impl Mapped {
    /// Adds adapters to the weights as they are read.
    ///
    /// # Errors
    /// As [`Adapter::mapped`].
    pub fn merged(self, adapter: Adapter) -> Result<Merged, Error> {
        let scale = adapter.config().alpha / adapter.config().rank as f64;
        for name in adapter.weights.names() {
            let weight = format!("{}.weight", module_of(name).unwrap_or_default());
            if !self.weights().has(&weight) {
                let problem = format!("has an adapter of `{weight}`, and the base no such tensor");
                return Err(file_error(adapter.weights.dir(), problem));
            }
        }
        let adapters = adapter.mapped(self.mapping())?;
        Ok(Merged { base: self, adapters, scale, known: HashMap::new() })
    }
}

impl Merged {
    /// How many bytes were read so far, of both directories.
    pub fn bytes_read(&self) -> u64 {
        self.base.bytes_read() + self.adapters.bytes_read()
    }

    /// The rank of a parameter's adapter, if it has one.
    fn rank(&mut self, path: &str) -> Result<Option<usize>, Error> {
        if let Some(rank) = self.known.get(path) {
            return Ok(*rank);
        }
        let a = self.adapters.found(&format!("{path}.lora.a"))?;
        let rank = a.and_then(|a| a.dims().get(1).copied());
        self.known.insert(path.into(), rank);
        Ok(rank)
    }

    fn added(&mut self, path: &str, ranges: &[Range<usize>], rank: usize) -> Result<TensorData, Error> {
        let [rows, columns] = ranges else {
            return Err(Error::invalid("Merged", format!("`{path}` has an adapter and is no matrix")));
        };
        let device = Device::flex();
        let read = |source: &mut Mapped, path: &str, ranges: [Range<usize>; 2]| {
            let data = source.read_as(path, &ranges, DType::F32)?;
            Ok::<_, Error>(Tensor::<2>::from_data(data, (&device, DType::F32)))
        };
        let base = read(&mut self.base, path, [rows.clone(), columns.clone()])?;
        let a = read(&mut self.adapters, &format!("{path}.lora.a"), [rows.clone(), 0..rank])?;
        let b = read(&mut self.adapters, &format!("{path}.lora.b"), [0..rank, columns.clone()])?;
        let merged = base + a.matmul(b).mul_scalar(self.scale);
        merged.try_into_data().map_err(|why| Error::invalid("Merged", format!("`{path}`: {why:?}")))
    }
}

impl SliceSource for Merged {
    fn dims(&mut self, path: &str) -> Result<Option<Vec<usize>>, Error> {
        self.base.dims(path)
    }

    fn read(&mut self, path: &str, ranges: &[Range<usize>]) -> Result<TensorData, Error> {
        match self.rank(path)? {
            Some(rank) => self.added(path, ranges, rank),
            None => self.base.read(path, ranges),
        }
    }

    fn read_as(&mut self, path: &str, ranges: &[Range<usize>], dtype: DType) -> Result<TensorData, Error> {
        match self.rank(path)? {
            Some(rank) => self.added(path, ranges, rank).map(|data| data.convert_dtype(dtype)),
            None => self.base.read_as(path, ranges, dtype),
        }
    }

    fn keeps(&mut self, path: &str) -> bool {
        self.base.keeps(path)
    }

    fn for_later(&self) -> Option<Box<dyn SliceSource + Send>> {
        Some(Box::new(self.clone()))
    }
}
