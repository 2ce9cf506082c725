//! The four sharded products, and one that is not split beside them.

use burn::tensor::{DType, Device, Tensor};
use burn_parallel::prelude::*;
use burn_parallel::tensor_parallel::functional::*;

use crate::common::dense::Dense;

/// A product, and how its factors and its value lie over the ranks.
pub struct Form {
    pub name: &'static str,
    pub run: fn(Tensor<3>, Tensor<2>, &Communicator, Overlap) -> Result<Tensor<3>, Error>,
    pub x: Layout,
    pub weight: Layout,
    pub y: Layout,
    /// What the gradient of the whole output is on a rank that has a part of it.
    pub dy: Layout,
}

use Layout::{Replicated, Sharded};

pub const FORMS: [Form; 4] = [
    Form {
        name: "column_parallel",
        run: column_parallel::<3>,
        x: Replicated,
        weight: Sharded(1),
        y: Sharded(2),
        dy: Sharded(2),
    },
    Form {
        name: "row_parallel",
        run: row_parallel::<3>,
        x: Sharded(2),
        weight: Sharded(0),
        y: Replicated,
        dy: Replicated,
    },
    Form {
        name: "all_gather_matmul",
        run: all_gather_matmul::<3>,
        x: Sharded(1),
        weight: Sharded(1),
        y: Sharded(2),
        dy: Sharded(2),
    },
    Form {
        name: "matmul_reduce_scatter",
        run: matmul_reduce_scatter::<3>,
        x: Sharded(2),
        weight: Sharded(0),
        y: Sharded(1),
        dy: Sharded(1),
    },
];

pub fn held(layout: Layout, whole: &Dense, comm: &Communicator) -> Dense {
    match layout {
        Sharded(dim) => whole.part(dim, comm.size(), comm.rank()),
        _ => whole.clone(),
    }
}

pub fn overlaps() -> Vec<Overlap> {
    let cut = |chunks| Overlap::auto().with_chunks(chunks);
    vec![
        Overlap::auto(),
        Overlap::none(),
        cut(1).in_background(true),
        cut(3).in_background(false),
        cut(2).in_background(true),
        cut(4).in_background(true),
        // More than there are rows.
        cut(50).in_background(true),
        cut(50).in_background(false),
    ]
}

fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => 1e-12,
        DType::F32 => 1e-5,
        DType::F16 => 6e-3,
        _ => 5e-2,
    }
}

/// Values and both gradients of all forms, of an input `[batch, sequence, k]` and a weight `[k, n]`.
pub fn compare(
    rank: &Rank,
    device: &Device,
    dtype: DType,
    [batch, sequence, k, n]: [usize; 4],
    overlap: Overlap,
) -> Result<(), Error> {
    let (x, weight) = (Dense::fractions(&[batch, sequence, k], 3), Dense::fractions(&[k, n], 5));
    let dy = Dense::fractions(&[batch, sequence, n], 7);
    // In 64 bits, of the numbers as the dtype holds them. As matrices: Flex cannot multiply batches of nothing.
    let matrix = |dense: &Dense, width: usize| {
        let flat = Dense {
            dims: vec![dense.values.len().checked_div(width).unwrap_or(batch * sequence), width],
            ..dense.clone()
        };
        let rounded = Dense::of(&flat.tensor::<2>(&Device::flex(), dtype));
        rounded.tensor::<2>(&Device::flex().autodiff(), DType::F64).require_grad()
    };
    let (wide_x, wide_weight) = (matrix(&x, k), Dense::of(&weight.tensor::<2>(&Device::flex(), dtype)));
    let wide_weight = wide_weight.tensor::<2>(&Device::flex().autodiff(), DType::F64).require_grad();
    let product = wide_x.clone().matmul(wide_weight.clone());
    let grads = (product.clone() * matrix(&dy, n)).sum().backward();
    let like = |tensor: &Tensor<2>, dims: &[usize]| Dense { dims: dims.to_vec(), ..Dense::of(tensor) };
    let wide_y = like(&product, &dy.dims);
    let (dx, dw) = (like(&wide_x.grad(&grads).unwrap(), &x.dims), Dense::of(&wide_weight.grad(&grads).unwrap()));

    for form in &FORMS {
        let (size, at) = (rank.size(), rank.rank());
        let say = |what: &str| {
            format!("{what} of {} at {at} of {size}, {dtype:?}, {:?}, {overlap:?}", form.name, [batch, sequence, k, n])
        };
        let leaf_x = held(form.x, &x, rank).tensor::<3>(device, dtype).require_grad();
        let leaf_weight = held(form.weight, &weight, rank).tensor::<2>(device, dtype).require_grad();
        let y = (form.run)(leaf_x.clone(), leaf_weight.clone(), rank, overlap)?;
        assert_eq!(y.dtype(), dtype);
        // Errors of rounding add up as a walk at random does.
        let near =
            tolerance(dtype) * ([batch * sequence, k, n].into_iter().max().unwrap() as f64 / 16.0).sqrt().max(1.0);
        Dense::of(&y).assert_near(&held(form.y, &wide_y, rank), near, &say("value"));
        let loss = (y * held(form.dy, &dy, rank).tensor::<3>(device, dtype)).sum();
        let grads = layout::backward(&loss, rank)?;
        let found = Dense::of(&leaf_x.grad(&grads).unwrap());
        found.assert_near(&held(form.x, &dx, rank), near, &say("dx"));
        let found = Dense::of(&leaf_weight.grad(&grads).unwrap());
        found.assert_near(&held(form.weight, &dw, rank), near, &say("dw"));
    }
    Ok(())
}
