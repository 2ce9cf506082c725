//! Sharded products against one plain product on one device: values and gradients.

#[path = "layout/dense.rs"]
#[allow(dead_code)]
mod dense;

use burn::tensor::{DType, Device, Tensor};
use burn_parallel::comm::part;
use burn_parallel::prelude::*;
use burn_parallel::tensor_parallel::matmul::*;
use dense::Dense;

/// A product, and how its factors and its value lie over the ranks.
struct Form {
    name: &'static str,
    run: fn(Tensor<3>, Tensor<2>, &Communicator, Overlap) -> Result<Tensor<3>, Error>,
    x: Layout,
    weight: Layout,
    y: Layout,
    /// What the gradient of the whole output is on a rank that has a part of it.
    dy: Layout,
}

use Layout::{Replicated, Sharded};

const FORMS: [Form; 4] = [
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

fn held(layout: Layout, whole: &Dense, comm: &Communicator) -> Dense {
    match layout {
        Sharded(dim) => whole.part(dim, comm.size(), comm.rank()),
        _ => whole.clone(),
    }
}

fn overlaps() -> Vec<Overlap> {
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
fn compare(
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

fn on_ranks(size: usize, body: impl Fn(&Rank) -> Result<(), Error> + Sync) {
    launch::threads(size).threads_per_rank(1).run(|rank| body(&rank)).unwrap();
}

#[test]
fn every_number_of_ranks_and_every_cut() {
    for size in [1, 2, 3, 4, 8] {
        on_ranks(size, |rank| {
            let device = rank.device().autodiff();
            for overlap in overlaps() {
                compare(rank, &device, DType::F64, [2, 7, 9, 11], overlap)?;
                compare(rank, &device, DType::F32, [1, 13, 8, 8], overlap)?;
            }
            Ok(())
        });
    }
}

#[test]
fn sixteen_bits() {
    for size in [2, 3] {
        on_ranks(size, |rank| {
            let device = rank.device().autodiff();
            for dtype in [DType::F16, DType::BF16] {
                for overlap in overlaps() {
                    compare(rank, &device, dtype, [2, 5, 6, 7], overlap)?;
                }
            }
            Ok(())
        });
    }
}

/// Ranks without a column, without a position, without a row; batches, sequences and features of nothing.
#[test]
fn empty_parts() {
    for size in [2, 5] {
        on_ranks(size, |rank| {
            let device = rank.device().autodiff();
            for overlap in overlaps() {
                for dims in [[1, 3, 2, 3], [2, 1, 4, 1], [1, 0, 3, 4], [0, 3, 3, 4], [2, 3, 0, 4], [2, 3, 4, 0]] {
                    compare(rank, &device, DType::F64, dims, overlap)?;
                }
            }
            Ok(())
        });
    }
}

/// Large enough to be cut without being told to, and for the kernels that split a product over threads.
#[test]
fn large() {
    for size in [2, 3] {
        on_ranks(size, |rank| {
            let device = rank.device().autodiff();
            for overlap in [Overlap::auto(), Overlap::auto().in_background(true)] {
                compare(rank, &device, DType::F32, [3, 517, 65, 515], overlap)?;
            }
            Ok(())
        });
    }
}

/// A view is multiplied as it lies.
#[test]
fn views() {
    on_ranks(2, |rank| {
        let device = &rank.device();
        let x = Dense::fractions(&[6, 10], 1).tensor::<2>(device, DType::F64);
        let weight = Dense::fractions(&[4, 6], 2).tensor::<2>(device, DType::F64);
        let own = part(10, 2, rank.rank());
        let check = |x: Tensor<2>, weight: Tensor<2>, what: &str| {
            let plain = rank.all_reduce(x.clone().matmul(weight.clone()), ReduceOp::Sum)?;
            for overlap in overlaps() {
                let y = row_parallel(x.clone(), weight.clone(), rank, overlap)?;
                Dense::of(&y).assert_near(&Dense::of(&plain), 1e-13, what);
            }
            Ok::<_, Error>(())
        };
        let half = x.clone().slice([0..6, own.clone()]);
        check(half.clone().slice([1..4, 1..5]), weight.clone(), "a window")?;
        check(x.clone().transpose().slice([own.start..own.end, 0..6]), weight.clone().transpose(), "transposed")?;
        check(half.clone().slice([0..6, 0..4]).flip([0, 1]), weight.clone().flip([0]), "flipped")?;
        check(half.slice([0..1, 0..4]).expand([6, 4]), weight, "expanded")?;
        Ok(())
    });
}

/// The order of summands does not depend on the chunks.
#[test]
fn cutting_changes_no_bit_of_a_sum() {
    on_ranks(3, |rank| {
        let x = Dense::fractions(&[40, 8], rank.rank() as u64).tensor::<2>(&rank.device(), DType::F32);
        let weight = Dense::fractions(&[8, 8], 9 + rank.rank() as u64).tensor::<2>(&rank.device(), DType::F32);
        let plain = row_parallel(x.clone(), weight.clone(), rank, Overlap::none())?.into_data();
        for overlap in [4, 8].map(|chunks| Overlap::auto().with_chunks(chunks)) {
            for overlap in [overlap, overlap.in_background(true)] {
                let cut = row_parallel(x.clone(), weight.clone(), rank, overlap)?.into_data();
                assert_eq!(cut, plain);
            }
        }
        Ok(())
    });
}

/// What is not asked for is not computed, nor reduced.
#[test]
fn constants_get_no_gradient() {
    on_ranks(2, |rank| {
        let device = rank.device().autodiff();
        for form in &FORMS {
            let x = held(form.x, &Dense::fractions(&[1, 6, 4], 1), rank).tensor::<3>(&device, DType::F32);
            let weight = held(form.weight, &Dense::fractions(&[4, 6], 2), rank).tensor::<2>(&device, DType::F32);
            let trained = weight.clone().require_grad();
            let y = (form.run)(x.clone(), trained.clone(), rank, Overlap::auto())?;
            let before = rank.counters();
            let grads = layout::backward(&y.sum(), rank)?;
            assert!(trained.grad(&grads).is_some());
            let spent = (rank.counters() - before).total().calls;
            assert_eq!(spent, u64::from(form.name == "matmul_reduce_scatter"), "{}", form.name);

            let x = x.require_grad();
            let y = (form.run)(x.clone(), weight, rank, Overlap::auto())?;
            let before = rank.counters();
            let grads = layout::backward(&y.sum(), rank)?;
            assert!(x.grad(&grads).is_some());
            assert_eq!((rank.counters() - before).total().calls, u64::from(form.name != "row_parallel"));
        }
        Ok(())
    });
}

#[test]
fn what_does_not_fit_is_an_error() {
    let device = Device::flex();
    on_ranks(2, |rank| {
        for form in &FORMS {
            let error =
                (form.run)(Tensor::ones([1, 4, 3], &device), Tensor::ones([4, 2], &device), rank, Overlap::auto());
            let said = error.unwrap_err().to_string();
            assert!(said.contains(form.name) && said.contains("[1, 4, 3]") && said.contains("[4, 2]"), "{said}");
            let weight = Tensor::<2>::ones([3, 2], &device).cast(DType::F64);
            let said =
                (form.run)(Tensor::ones([1, 4, 3], &device), weight, rank, Overlap::auto()).unwrap_err().to_string();
            assert!(said.contains("F32") && said.contains("F64"), "{said}");
        }
        let said =
            all_gather_matmul(Tensor::<1>::ones([3], &device), Tensor::ones([3, 2], &device), rank, Overlap::auto());
        assert!(said.unwrap_err().to_string().contains("sequence"));
        Ok(())
    });
}

/// Ranks that bring different shapes all get the same error, whatever runs where.
#[test]
fn ranks_that_differ_are_told() {
    for background in [false, true] {
        let overlap = Overlap::auto().in_background(background);
        let differ = |form: usize, rows: [usize; 2]| {
            launch::threads(2)
                .run(|rank| {
                    let x = Tensor::<3>::ones([1, rows[rank.rank()], 3], &rank.device());
                    (FORMS[form].run)(x, Tensor::ones([3, 4], &rank.device()), &rank, overlap)
                })
                .unwrap_err()
                .to_string()
        };
        let said = differ(1, [4, 6]);
        assert!(said.contains("all_reduce") && said.contains("[4, 4]") && said.contains("[6, 4]"), "{said}");
        let said = differ(2, [2, 5]);
        assert!(said.contains("brings") && said.contains("comm::part"), "{said}");
        let said = differ(3, [4, 6]);
        assert!(said.contains("reduce_scatter"), "{said}");
    }
}

/// A rank that fails while a chunk is on its way ends the product of all.
#[test]
fn nobody_waits_for_a_rank_that_failed() {
    let failed = launch::threads(3).run(|rank| {
        if rank.rank() == 1 {
            return Err(Error::user("no product today"));
        }
        let (x, weight) = (Tensor::<2>::ones([64, 3], &rank.device()), Tensor::ones([3, 4], &rank.device()));
        row_parallel(x, weight, &rank, Overlap::auto().with_chunks(4).in_background(true))
    });
    let said = failed.unwrap_err().to_string();
    assert!(said.contains("rank 1") && said.contains("no product today"), "{said}");
}
