//! Operations that burn computes as one, as the single operations that they consist of: those that loops and tiles are
//! made of.
//!
//! burn takes most of them apart itself where it differentiates, so they are found in forward passes without backward.
//! Their numbers are those of burn's own for the host but for the order in which sums are added: what it computes in
//! `f32` of 16 bits, and rounds at the end, is so here.

use burn::tensor::{BoolStore, DType};
use burn_ir::{
    ActivationOperationIr as Activation, AttentionOpIr, BaseOperationIr as Base, CreationOpIr, DimOpIr, LayerNormOpIr,
    ModuleOperationIr as Module, NumericOperationIr as Numeric, OperationIr, ReduceDimWithIndicesOpIr, ScalarIr,
    TensorIr,
};

use super::build;

/// The operations that give what `op` gives; none if it is a single one, or has no elements, or if burn's own takes
/// less. `new` makes a tensor of dims and a dtype; `is_tiled` tells whether attention of a query and a key would run
/// in tiles: if not, its scores would be in memory.
pub(crate) fn taken_apart(
    op: &OperationIr,
    new: &mut dyn FnMut(&[usize], DType) -> TensorIr,
    is_tiled: impl Fn(&TensorIr, &TensorIr) -> bool,
) -> Option<Vec<OperationIr>> {
    let float = |dtype| matches!(dtype, DType::F64 | DType::F32 | DType::F16 | DType::BF16);
    if !op.inputs().chain(op.outputs()).all(|tensor| tensor.shape.num_elements() > 0) {
        return None;
    }
    if !op.inputs().next().is_some_and(|input| float(input.dtype)) {
        return None;
    }
    let mut apart = Apart { new, operations: Vec::new() };
    match op {
        OperationIr::Activation(Activation::Softmax(op)) if is_last(op) => apart.softmax(&op.input, &op.out),
        OperationIr::Activation(Activation::Softmin(op)) if is_last(op) => {
            let negative = apart.like(&op.input);
            apart.operations.push(build::negative(op.input.clone(), negative.clone()));
            apart.softmax(&negative, &op.out);
        }
        OperationIr::Activation(Activation::LogSoftmax(op)) if is_last(op) => apart.log_softmax(op),
        OperationIr::Module(Module::LayerNorm(op)) => apart.layer_norm(op),
        OperationIr::Module(Module::Attention(op)) if is_plain(op) && is_tiled(&op.query, &op.key) => {
            apart.attention(op);
        }
        OperationIr::NumericFloat(_, Numeric::MaxDimWithIndices(op)) if op.dim + 1 == op.tensor.shape.num_dims() => {
            apart.max(op);
        }
        _ => return None,
    }
    Some(apart.operations)
}

/// Whether an operation is along the last dim.
fn is_last(op: &DimOpIr) -> bool {
    op.axis + 1 == op.input.shape.num_dims()
}

/// Whether each head of the queries has keys and values of its own.
fn is_plain(op: &AttentionOpIr) -> bool {
    let of = |tensor: &TensorIr| tensor.shape.iter().take(2).copied().collect::<Vec<_>>();
    of(&op.query) == of(&op.key) && of(&op.query) == of(&op.value)
}

struct Apart<'a> {
    new: &'a mut dyn FnMut(&[usize], DType) -> TensorIr,
    operations: Vec<OperationIr>,
}

impl Apart<'_> {
    fn like(&mut self, tensor: &TensorIr) -> TensorIr {
        (self.new)(&tensor.shape, tensor.dtype)
    }

    /// One number for each row of a tensor.
    fn of_rows(&mut self, tensor: &TensorIr) -> TensorIr {
        let mut dims = tensor.shape.to_vec();
        dims.last_mut().into_iter().for_each(|last| *last = 1);
        (self.new)(&dims, tensor.dtype)
    }

    /// A tensor as burn computes with it: of 16 bits in `f32`.
    fn widened(&mut self, tensor: &TensorIr) -> TensorIr {
        if matches!(tensor.dtype, DType::F32 | DType::F64) {
            return tensor.clone();
        }
        let wide = (self.new)(&tensor.shape, DType::F32);
        self.operations.push(build::cast(tensor.clone(), wide.clone()));
        wide
    }

    /// What `make` makes, as burn computes it, rounded to the dtype of `out`.
    fn rounded(&mut self, out: &TensorIr, make: impl FnOnce(&mut Self, TensorIr)) {
        if matches!(out.dtype, DType::F32 | DType::F64) {
            return make(self, out.clone());
        }
        let wide = (self.new)(&out.shape, DType::F32);
        make(self, wide.clone());
        self.operations.push(build::cast(wide, out.clone()));
    }

    /// A tensor less the maximum of each row, and the exponentials of that.
    fn exponentials(&mut self, x: &TensorIr, max: TensorIr) -> [TensorIr; 2] {
        let [shifted, exponentials] = [0; 2].map(|_| self.like(x));
        self.operations.extend([
            build::difference(x.clone(), max, shifted.clone()),
            build::exponential(shifted.clone(), exponentials.clone()),
        ]);
        [shifted, exponentials]
    }

    /// What `make` makes of a tensor, of the same dims and dtype.
    fn then(&mut self, tensor: TensorIr, make: impl FnOnce(TensorIr, TensorIr) -> OperationIr) -> TensorIr {
        let out = self.like(&tensor);
        self.operations.push(make(tensor, out.clone()));
        out
    }

    fn max_of_rows(&mut self, x: &TensorIr) -> TensorIr {
        let max = self.of_rows(x);
        self.operations.push(build::max_dim(x.clone(), x.shape.num_dims() - 1, max.clone()));
        max
    }

    fn sum_of_rows(&mut self, x: &TensorIr) -> TensorIr {
        let sum = self.of_rows(x);
        self.operations.push(build::sum_dim(x.clone(), x.shape.num_dims() - 1, sum.clone()));
        sum
    }

    fn mean_of_rows(&mut self, x: &TensorIr) -> TensorIr {
        let mean = self.of_rows(x);
        self.operations.push(build::mean_dim(x.clone(), x.shape.num_dims() - 1, mean.clone()));
        mean
    }

    fn softmax(&mut self, input: &TensorIr, out: &TensorIr) {
        let x = self.widened(input);
        let max = self.max_of_rows(&x);
        let [_, exponentials] = self.exponentials(&x, max);
        let sum = self.sum_of_rows(&exponentials);
        self.rounded(out, |apart, out| apart.operations.push(build::quotient(exponentials, sum, out)));
    }

    /// Of 16 bits burn computes it operation by operation.
    fn log_softmax(&mut self, op: &DimOpIr) {
        let max = self.max_of_rows(&op.input);
        let [shifted, exponentials] = self.exponentials(&op.input, max);
        let sum = self.sum_of_rows(&exponentials);
        let logarithm = self.like(&sum);
        self.operations
            .extend([build::logarithm(sum, logarithm.clone()), build::difference(shifted, logarithm, op.out.clone())]);
    }

    fn layer_norm(&mut self, op: &LayerNormOpIr) {
        let x = self.widened(&op.input);
        let mean = self.mean_of_rows(&x);
        let [centered, square] = [0; 2].map(|_| self.like(&x));
        self.operations.extend([
            build::difference(x.clone(), mean, centered.clone()),
            build::product(centered.clone(), centered.clone(), square.clone()),
        ]);
        let variance = self.mean_of_rows(&square);
        let [shifted, root, scale] = [0; 3].map(|_| self.like(&variance));
        let epsilon: f64 = op.epsilon.elem();
        self.operations.extend([
            build::plus_number(variance, epsilon, shifted.clone()),
            build::root(shifted, root.clone()),
            build::reciprocal_of(root, scale.clone()),
        ]);
        let gamma = self.of_columns(&op.gamma, x.shape.num_dims());
        let scales = self.like(&x);
        self.operations.push(build::product(scale, gamma, scales.clone()));
        let beta = op.beta.as_ref().map(|beta| self.of_columns(beta, x.shape.num_dims()));
        self.rounded(&op.out, |apart, out| {
            let Some(beta) = beta else { return apart.operations.push(build::product(centered, scales, out)) };
            let scaled = apart.like(&out);
            apart.operations.extend([build::product(centered, scales, scaled.clone()), build::add(scaled, beta, out)]);
        });
    }

    /// A number for each column, as burn computes with it, with as many dims as what it is broadcast to.
    fn of_columns(&mut self, tensor: &TensorIr, dims: usize) -> TensorIr {
        let wide = self.widened(tensor);
        let missing = dims - wide.shape.num_dims();
        if missing == 0 {
            return wide;
        }
        let dims: Vec<usize> = std::iter::repeat_n(1, missing).chain(wide.shape.iter().copied()).collect();
        let out = (self.new)(&dims, wide.dtype);
        self.operations.push(build::reshape(wide, out.clone()));
        out
    }

    fn max(&mut self, op: &ReduceDimWithIndicesOpIr) {
        self.operations.extend([
            build::max_dim(op.tensor.clone(), op.dim, op.out.clone()),
            build::place_of_max(op.tensor.clone(), op.dim, op.out_indices.clone()),
        ]);
    }

    fn attention(&mut self, op: &AttentionOpIr) {
        let [query, key, value] = [&op.query, &op.key, &op.value].map(|tensor| self.widened(tensor));
        let [batch, heads, rows, of_head] = dims(&query);
        let [_, _, columns, _] = dims(&key);
        let dtype = query.dtype;
        let turned = (self.new)(&[batch, heads, of_head, columns], dtype);
        self.operations.push(build::swap_dims(key, 2, 3, turned.clone()));
        let mut scores = (self.new)(&[batch, heads, rows, columns], dtype);
        self.operations.push(build::matmul(query, turned, scores.clone()));
        let scale = op.options.scale.map_or_else(|| 1.0 / (of_head as f64).sqrt(), ScalarIr::elem);
        scores = self.then(scores, |scores, out| build::scale(scores, scale, out));
        if let Some(cap) = op.options.softcap {
            let cap: f64 = cap.elem();
            scores = self.then(scores, |scores, out| build::divide(scores, cap, out));
            scores = self.then(scores, build::tangent);
            scores = self.then(scores, |scores, out| build::scale(scores, cap, out));
        }
        let causal = op.options.is_causal.then(|| self.later([rows, columns]));
        for mask in op.mask.iter().chain(&causal) {
            let least = ScalarIr::Float(f64::NEG_INFINITY);
            scores = self.then(scores, |scores, out| build::mask_fill(scores, mask.clone(), least, out));
        }
        if let Some(bias) = &op.attn_bias {
            let bias = self.widened(bias);
            scores = self.then(scores, |scores, out| build::add(scores, bias, out));
        }
        // A row that sees nothing gives zeros.
        let (least, smallest) = match dtype {
            DType::F64 => (f64::MIN, f64::MIN_POSITIVE),
            _ => (f32::MIN.into(), f32::MIN_POSITIVE.into()),
        };
        let max = self.max_of_rows(&scores);
        let above = self.like(&max);
        self.operations.push(build::at_least(max, least, above.clone()));
        let [_, exponentials] = self.exponentials(&scores, above);
        let sum = self.sum_of_rows(&exponentials);
        let [positive, weights] = [self.like(&sum), self.like(&scores)];
        self.operations.extend([
            build::at_least(sum, smallest, positive.clone()),
            build::quotient(exponentials, positive, weights.clone()),
        ]);
        self.rounded(&op.out, |apart, out| apart.operations.push(build::matmul(weights, value, out)));
    }

    /// True where a column comes later than a row, of which the last sees all columns: `[1, 1, rows, columns]`.
    fn later(&mut self, [rows, columns]: [usize; 2]) -> TensorIr {
        let counted = |apart: &mut Self, of: [usize; 2], along| {
            let [ones, count] = [0; 2].map(|_| (apart.new)(&of, DType::I64));
            apart.operations.push(OperationIr::BaseInt(Base::Ones(CreationOpIr { out: ones.clone() })));
            apart.operations.push(build::sums_so_far(ones, along, count.clone()));
            count
        };
        let (row, column) = (counted(self, [rows, 1], 0), counted(self, [1, columns], 1));
        let last = (self.new)(&[rows, 1], DType::I64);
        let bools = DType::Bool(BoolStore::Native);
        let [flat, mask] = [&[rows, columns][..], &[1, 1, rows, columns]].map(|dims| (self.new)(dims, bools));
        self.operations.extend([
            build::minus(row, rows as i64 - columns as i64, last.clone()),
            build::are_below(last, column, flat.clone()),
            build::reshape(flat, mask.clone()),
        ]);
        mask
    }
}

/// The dims of a factor of attention.
fn dims(tensor: &TensorIr) -> [usize; 4] {
    std::array::from_fn(|dim| tensor.shape[dim])
}
