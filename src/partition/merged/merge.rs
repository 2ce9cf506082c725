//! A dim that a reshape made of several.

use burn_ir::{ShapeOpIr, TensorIr};

/// A dim that is several.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct MergedDim {
    /// Where it is.
    pub(super) at: usize,
    /// The sizes of those that it was made of, each more than 1, the outer first.
    pub(super) factors: Vec<usize>,
}

impl MergedDim {
    pub(super) fn size(&self) -> usize {
        self.factors.iter().product()
    }

    /// How many dims more there are without it.
    pub(super) fn more(&self) -> usize {
        self.factors.len() - 1
    }

    pub(super) fn moved_to(&self, at: usize) -> Self {
        Self { at, ..self.clone() }
    }

    /// The number of another dim once this one is taken apart.
    pub(super) fn shift(&self, dim: usize) -> usize {
        if dim > self.at { dim + self.more() } else { dim }
    }

    /// A tensor without the merge.
    pub(super) fn apart(&self, tensor: &TensorIr) -> TensorIr {
        let mut dims = tensor.shape.to_vec();
        dims.splice(self.at..=self.at, self.factors.iter().copied());
        TensorIr { shape: dims.into(), ..tensor.clone() }
    }

    /// Merges that a reshape makes.
    pub(super) fn made_by(ShapeOpIr { input, out }: &ShapeOpIr) -> Vec<Self> {
        let (from, to) = (input.shape.as_slice(), out.shape.as_slice());
        let (mut place, mut before_from, mut before_to) = (0, 1, 1);
        let mut found = Vec::new();
        for (at, size) in to.iter().enumerate() {
            while place < from.len() && before_from < before_to {
                before_from *= from[place];
                place += 1;
            }
            if before_from == before_to {
                let (mut product, mut factors) = (1, Vec::new());
                for other in &from[place..] {
                    if product >= *size {
                        break;
                    }
                    product *= other;
                    factors.extend((*other > 1).then_some(*other));
                }
                if product == *size && factors.len() > 1 {
                    found.push(Self { at, factors });
                }
            }
            before_to *= size;
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{DType, Shape};
    use burn_ir::TensorId;

    use super::*;

    fn made(from: &[usize], to: &[usize]) -> Vec<MergedDim> {
        let tensor = |id, dims: &[usize]| TensorIr::uninit(TensorId::new(id), Shape::from(dims.to_vec()), DType::F32);
        MergedDim::made_by(&ShapeOpIr { input: tensor(0, from), out: tensor(1, to) })
    }

    #[test]
    fn merges_of_reshapes() {
        let merge = |at, factors: &[usize]| MergedDim { at, factors: factors.to_vec() };
        assert_eq!(made(&[2, 3, 4, 6], &[6, 4, 3, 2]), [merge(0, &[2, 3])]);
        assert_eq!(made(&[2, 3, 4, 6], &[2, 12, 6]), [merge(1, &[3, 4])]);
        assert_eq!(made(&[2, 3, 4, 6], &[6, 24]), [merge(0, &[2, 3]), merge(1, &[4, 6])]);
        assert_eq!(made(&[2, 1, 3, 5], &[1, 6, 5]), [merge(1, &[2, 3])]);
        assert_eq!(made(&[2, 3, 4], &[24]), [merge(0, &[2, 3, 4])]);
        assert_eq!(made(&[6, 4], &[2, 3, 4]), []);
        assert_eq!(made(&[4, 6], &[6, 4]), []);
        assert_eq!(made(&[1, 6, 4], &[6, 4]), []);
        assert_eq!(made(&[0, 3], &[0, 3]), []);
    }
}
