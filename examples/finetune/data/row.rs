//! Rows as tensors.

use burn::tensor::{Device, Int, Tensor, TensorData};

use super::document::Document;
use super::packing::Part;
use crate::model::Batch;

/// Rows of one length as tensors on a device.
pub fn batch(rows: &[Row], device: &Device) -> Batch {
    let shape = [rows.len(), rows.first().map_or(0, |row| row.tokens.len())];
    let ints = |column: fn(&Row) -> &Vec<i64>| {
        let values: Vec<i64> = rows.iter().flat_map(column).copied().collect();
        Tensor::<2, Int>::from_data(TensorData::new(values, shape), device)
    };
    let weights: Vec<f32> = rows.iter().flat_map(|row| &row.weights).copied().collect();
    Batch {
        tokens: ints(|row| &row.tokens),
        targets: ints(|row| &row.targets),
        weights: Tensor::from_data(TensorData::new(weights, shape), device),
        positions: ints(|row| &row.positions),
        documents: ints(|row| &row.documents),
    }
}

/// A row on the host. Behind its last document it is padded with a document that nothing is trained on.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    pub tokens: Vec<i64>,
    pub targets: Vec<i64>,
    pub weights: Vec<f32>,
    pub positions: Vec<i64>,
    pub documents: Vec<i64>,
    /// How many tokens are no padding.
    pub filled: usize,
}

impl Row {
    /// A row of `length` tokens without a document.
    pub fn empty(length: usize) -> Self {
        Self {
            tokens: vec![0; length],
            targets: vec![0; length],
            weights: vec![0.0; length],
            positions: (0..length as i64).collect(),
            documents: vec![0; length],
            filled: 0,
        }
    }

    /// Adds a part of a document, the row's next, which has number `number` in it.
    pub fn add(&mut self, number: usize, part: Part, document: &Document) {
        let (start, length, at) = (part.start as usize, part.length as usize, self.filled);
        for place in 0..length {
            self.tokens[at + place] = document.tokens[start + place].into();
            self.targets[at + place] = document.tokens[start + place + 1].into();
            self.weights[at + place] = f32::from(u8::from(document.trained[start + place + 1]));
            self.positions[at + place] = place as i64;
            self.documents[at + place] = number as i64;
        }
        self.filled = at + length;
        for (place, at) in (self.filled..self.tokens.len()).enumerate() {
            self.positions[at] = place as i64;
            self.documents[at] = number as i64 + 1;
        }
    }
}
