//! A store of whole parameters that counts what is asked of it.

use std::collections::BTreeMap;
use std::ops::Range;

use burn::tensor::TensorData;
use burn_parallel::Error;
use burn_parallel::params::SliceSource;

use crate::common::reference::{Whole, Wholes};

pub struct Store {
    pub whole: Wholes,
    /// Elements read, by path.
    pub read: BTreeMap<String, usize>,
}

impl Store {
    /// A store of these, of which nothing is read yet.
    pub fn of(whole: Wholes) -> Self {
        Self { whole, read: BTreeMap::new() }
    }

    /// Elements read, of all parameters.
    pub fn elements_read(&self) -> usize {
        self.read.values().sum()
    }
}

impl SliceSource for Store {
    fn dims(&mut self, path: &str) -> Result<Option<Vec<usize>>, Error> {
        Ok(self.whole.get(path).map(|whole| whole.dims.clone()))
    }

    fn read(&mut self, path: &str, ranges: &[Range<usize>]) -> Result<TensorData, Error> {
        let Whole { dims, values } = &self.whole[path];
        let places = ranges.iter().zip(dims).fold(vec![0], |places: Vec<usize>, (range, size)| {
            places.iter().flat_map(|place| range.clone().map(move |index| place * size + index)).collect()
        });
        *self.read.entry(path.into()).or_default() += places.len();
        let shape: Vec<usize> = ranges.iter().map(Range::len).collect();
        Ok(TensorData::new(places.into_iter().map(|place| values[place]).collect::<Vec<_>>(), shape))
    }
}
