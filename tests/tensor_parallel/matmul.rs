//! Sharded products against one plain product on one device: values and gradients.

use burn::tensor::{DType, Device, Tensor};
use burn_parallel::comm::part;
use burn_parallel::prelude::*;
use burn_parallel::tensor_parallel::functional::*;

use crate::common::dense::Dense;
use crate::common::products::{FORMS, compare, held, overlaps};

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

/// Large enough to be cut without being told to, and for the kernels that split a product over threads; without
/// features the value is zeros.
#[test]
fn large() {
    for size in [2, 3] {
        on_ranks(size, |rank| {
            let device = rank.device().autodiff();
            for overlap in [Overlap::auto(), Overlap::auto().in_background(true)] {
                compare(rank, &device, DType::F32, [3, 517, 65, 515], overlap)?;
            }
            compare(rank, &device, DType::F32, [1, 517, 0, 515], Overlap::auto().with_chunks(2).in_background(true))?;
            Ok(())
        });
    }
}

/// Parts differ by one, and what they cost: 381 features are a little less than two chunks are worth, 382 a little
/// more.
#[test]
fn ranks_of_uneven_parts_cut_alike() {
    on_ranks(2, |rank| {
        let device = rank.device().autodiff();
        for dims in [[1, 512, 763, 512], [1, 512, 512, 763]] {
            compare(rank, &device, DType::F32, dims, Overlap::auto().in_background(true))?;
        }
        Ok(())
    });
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

/// Values and gradients of several products of one input, made together, and one by one.
#[test]
fn several_weights_on_one_input() {
    for size in [1, 2, 3, 4] {
        on_ranks(size, |rank| {
            for overlap in overlaps() {
                for gathered in [false, true] {
                    several(rank, [3, 7, 5, 6], overlap, gathered, [true; 4])?;
                    several(rank, [1, 9, 4, 3], overlap, gathered, [true; 4])?;
                }
            }
            // Some are constants.
            for wants in [[true, false, true, false], [false, true, false, true], [true, false, false, false]] {
                several(rank, [2, 6, 4, 3], Overlap::auto(), size % 2 == 0, wants)?;
            }
            Ok(())
        });
    }
}

fn several(
    rank: &Rank,
    [batch, sequence, k, n]: [usize; 4],
    overlap: Overlap,
    gathered: bool,
    wants: [bool; 4],
) -> Result<(), Error> {
    let device = rank.device().autodiff();
    let whole = Dense::fractions(&[batch, sequence, k], 3);
    let lies = if gathered { Layout::Sharded(1) } else { Layout::Replicated };
    let leaves = || {
        let x = held(lies, &whole, rank).tensor::<3>(&device, DType::F64).set_require_grad(wants[0]);
        let weights: [Tensor<2>; 3] = std::array::from_fn(|place| {
            let weight = Dense::fractions(&[k, n + place], 5 + (10 * rank.rank() + place) as u64);
            weight.tensor::<2>(&device, DType::F64).set_require_grad(wants[place + 1])
        });
        (x, weights)
    };
    let dy = |place: usize| {
        Dense::fractions(&[batch, sequence, n + place], 20 + (10 * rank.rank() + place) as u64)
            .tensor::<3>(&device, DType::F64)
    };
    let loss = |ys: &[Tensor<3>; 3]| {
        let each = ys.iter().enumerate().map(|(place, y)| (y.clone() * dy(place)).sum());
        each.reduce(|a, b| a + b).expect("there are three")
    };
    let (x, weights) = leaves();
    let together = match gathered {
        true => all_gather_matmul_each(x.clone(), weights.clone(), rank, overlap)?,
        false => column_parallel_each(x.clone(), weights.clone(), rank, overlap)?,
    };
    let before = rank.counters();
    let grads = layout::backward(&loss(&together), rank)?;
    let calls = (rank.counters() - before).of(if gathered { "reduce_scatter" } else { "all_reduce" }).calls;
    if overlap == Overlap::auto() {
        assert_eq!(calls, u64::from(wants[0] && rank.size() > 1), "one collective for all weights");
    }

    let (alone_x, alone_weights) = leaves();
    let alone = alone_weights.clone().map(|weight| match gathered {
        true => all_gather_matmul(alone_x.clone(), weight, rank, Overlap::none()).unwrap(),
        false => column_parallel(alone_x.clone(), weight, rank, Overlap::none()).unwrap(),
    });
    let alone_grads = layout::backward(&loss(&alone), rank)?;

    let what = format!("rank {} of {}, {overlap:?}, gathered: {gathered}", rank.rank(), rank.size());
    for (found, due) in together.iter().zip(&alone) {
        Dense::of(found).assert_near(&Dense::of(due), 1e-12, &what);
    }
    let gradients = |x: &Tensor<3>, weights: &[Tensor<2>; 3], grads: &_| {
        let of_x = x.grad(grads).map(|dx| Dense::of(&dx));
        let of_weights = weights.iter().map(|weight| weight.grad(grads).map(|dw| Dense::of(&dw)));
        [of_x].into_iter().chain(of_weights).collect::<Vec<_>>()
    };
    let found = gradients(&x, &weights, &grads);
    let due = gradients(&alone_x, &alone_weights, &alone_grads);
    for (place, (found, due)) in found.iter().zip(&due).enumerate() {
        assert_eq!((found.is_some(), due.is_some()), (wants[place], wants[place]), "gradient {place}, {what}");
        if let (Some(found), Some(due)) = (found, due) {
            found.assert_near(due, 1e-12, &format!("gradient {place}, {what}"));
        }
    }
    Ok(())
}

/// A product that the loss does not need leaves its weight a gradient of zeros, also where that is no leaf.
#[test]
fn a_product_that_nobody_uses() {
    on_ranks(2, |rank| {
        let device = rank.device().autodiff();
        let x = Tensor::<2>::ones([3, 4], &device).require_grad();
        let weights = [1.0, 2.0].map(|value| Tensor::<2>::full([4, 2], value, &device).require_grad());
        let [used, _] = column_parallel_each(
            x.clone(),
            weights.clone().map(|weight| weight.mul_scalar(3.0)),
            rank,
            Overlap::auto(),
        )?;
        let grads = layout::backward(&used.sum(), rank)?;
        let sum = |tensor: Option<Tensor<2>>| tensor.map(|tensor| tensor.sum().into_scalar::<f64>());
        assert_eq!(sum(x.grad(&grads)), Some(2.0 * 3.0 * 4.0 * 2.0 * 3.0));
        assert_eq!(sum(weights[0].grad(&grads)), Some(3.0 * 3.0 * 8.0));
        assert_eq!(sum(weights[1].grad(&grads)), Some(0.0));
        Ok(())
    });
}

#[test]
fn too_many_weights() {
    on_ranks(2, |rank| {
        let weights = [(); 4].map(|()| Tensor::<2>::ones([3, 2], &Device::flex()));
        let error = column_parallel_each(Tensor::<2>::ones([5, 3], &Device::flex()), weights, rank, Overlap::auto());
        assert!(error.unwrap_err().to_string().contains("1 to 3 weights"));
        Ok(())
    });
}
