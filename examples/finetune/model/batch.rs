//! What the model is trained on.

use burn::tensor::{Device, Int, Tensor};
use burn_parallel::Error;
use burn_parallel::graph::{TensorMapper, TensorTree};

/// Rows of tokens. A row may hold several documents, one behind the other, of which none sees another.
///
/// # Shapes
///
/// All are `[rows, length]`.
#[derive(Clone, Debug)]
pub struct Batch {
    /// What the model sees.
    pub tokens: Tensor<2, Int>,
    /// The token that follows each. Any token where `weights` is 0.
    pub targets: Tensor<2, Int>,
    /// 1 where a target is trained on, else 0.
    pub weights: Tensor<2>,
    /// The place of each token in its document.
    pub positions: Tensor<2, Int>,
    /// The number of the document of each token, within its row.
    pub documents: Tensor<2, Int>,
}

impl Batch {
    /// One document a row, each token of which is a target but the first.
    ///
    /// # Shapes
    ///
    /// - tokens: `[rows, length + 1]`
    pub fn of_documents(tokens: Tensor<2, Int>) -> Self {
        let [rows, length] = tokens.dims();
        let length = length - 1;
        let device = tokens.device();
        let (positions, documents) = whole_rows([rows, length], &device);
        Self {
            targets: tokens.clone().narrow(1, 1, length),
            tokens: tokens.narrow(1, 0, length),
            weights: Tensor::ones([rows, length], &device),
            positions,
            documents,
        }
    }
}

/// Positions and documents of rows that are one document each.
pub fn whole_rows(dims: [usize; 2], device: &Device) -> (Tensor<2, Int>, Tensor<2, Int>) {
    let positions = Tensor::arange(0..dims[1] as i64, device).unsqueeze_dim::<2>(0).expand(dims);
    (positions, Tensor::zeros(dims, device))
}

impl TensorTree for Batch {
    fn map_tensors(self, mapper: &mut dyn TensorMapper) -> Result<Self, Error> {
        let tensors = (self.tokens, self.targets, self.weights, self.positions, self.documents);
        let (tokens, targets, weights, positions, documents) = tensors.map_tensors(mapper)?;
        Ok(Self { tokens, targets, weights, positions, documents })
    }
}
