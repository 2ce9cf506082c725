//! What goes wrong is said with its numbers, on every rank, and soon.

use std::fmt::Debug;
use std::time::{Duration, Instant};

use burn::tensor::{Device, Gradients, Tensor};
use burn_parallel::Error;
use burn_parallel::launch::Rank;
use burn_parallel::layout::{self, Layout};
use burn_parallel::prelude::launch;

const TIMEOUT: Duration = Duration::from_secs(60);
/// Far below that: nobody may need it.
const SOON: Duration = Duration::from_secs(20);

fn leaf<const D: usize>(dims: [usize; D]) -> Tensor<D> {
    Tensor::ones(dims, &Device::flex().autodiff()).require_grad()
}

/// What every rank ends with, soon, on worlds of 2 to 4.
fn endings<T: Debug + Send>(
    body: impl Fn(&Rank) -> Result<T, Error> + Sync,
    check: impl Fn(usize, &[Result<T, Error>]),
) {
    for size in 2..=4 {
        let began = Instant::now();
        let endings = launch::threads(size).timeout(TIMEOUT).run(|rank| Ok(body(&rank))).unwrap();
        assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
        check(size, &endings);
    }
}

fn all_alike<T: Debug>(endings: &[Result<T, Error>]) -> &Error {
    let first = endings[0].as_ref().expect_err("rank 0 should have failed");
    assert!(endings.iter().all(|ending| ending.as_ref().err() == Some(first)), "{endings:?}");
    first
}

/// `Gradients` cannot be printed.
fn done(grads: Result<Gradients, Error>) -> Result<(), Error> {
    grads.map(|_| ())
}

#[test]
fn a_dim_that_is_not_there() {
    endings(
        |rank| {
            let x = || leaf([4, 4]);
            let said = [
                layout::scatter_to_group(x(), 2, rank),
                layout::gather_from_group(x(), 2, rank),
                layout::gather_and_copy_to_group(x(), 2, rank),
                layout::reduce_scatter_to_group(x(), 2, rank),
                layout::all_to_all(x(), 0, 2, rank),
                layout::all_to_all(x(), 2, 0, rank),
                layout::redistribute(x(), Layout::Partial, Layout::Sharded(2), rank),
                layout::gather_to_root(x(), 2, 0, rank),
                layout::scatter_from_root(x(), 2, 0, rank),
            ];
            for said in said {
                let said = said.expect_err("there is no dim 2").to_string();
                assert!(said.contains("dim 2 does not exist in a tensor of rank 2"), "{said}");
            }
            let gone = layout::gather_to_root(x(), 0, 4, rank).expect_err("there is no rank 4");
            assert!(matches!(gone, Error::NoSuchRank { rank: 4, operation: "gather_to_root", .. }), "{gone}");
            assert!(Layout::Sharded(1).local_dims(&[3], 2, 0).is_err());
            assert!(Layout::Sharded(0).local_dims(&[3], 2, 2).is_err());
            rank.barrier()
        },
        |_, endings| assert!(endings.iter().all(Result::is_ok), "{endings:?}"),
    );
}

#[test]
fn not_its_part() {
    endings(
        |rank| {
            let rows = if rank.rank() == 0 { 5 } else { 1 };
            let whole = layout::gather_from_group(leaf([2, rows]), 1, rank)?;
            // Those who could not tell are told by the next thing they do together.
            rank.barrier().map(|()| whole.dims())
        },
        |size, endings| {
            let said = all_alike(endings).to_string();
            let total = 5 + size - 1;
            for part in ["gather_from_group", &format!("of the {total} rows"), &format!("{size} ranks"), "dim 1"] {
                assert!(said.contains(part), "{part}: {said}");
            }
        },
    );
    endings(
        |rank| {
            let rows = if rank.rank() == 0 { 5 } else { 1 };
            layout::all_to_all(leaf([rows, 8]), 0, 1, rank)?;
            rank.barrier()
        },
        |_, endings| assert!(all_alike(endings).to_string().contains("along dim 0, but its part is")),
    );
}

#[test]
fn other_shapes() {
    endings(
        |rank| layout::reduce_from_group(leaf([2, 3 + rank.rank() % 2]), rank).map(|_| ()),
        |_, endings| assert!(matches!(all_alike(endings), Error::Mismatch { .. })),
    );
    // Widths that the padded blocks of an all-to-all do not tell apart.
    endings(
        |rank| layout::all_to_all(leaf([2, 2 * rank.size() - rank.rank() % 2]), 0, 1, rank).map(|_| ()),
        |size, endings| {
            let (error, widths) = (all_alike(endings), [2 * size, 2 * size - 1]);
            assert!(matches!(error, Error::Mismatch { .. }));
            assert!(
                widths.iter().all(|width| error.to_string().contains(&format!("(agreed number {width})"))),
                "{error}"
            );
        },
    );
}

#[test]
fn other_shapes_in_the_backward() {
    endings(
        |rank| {
            let x = leaf([2, 3 + rank.rank() % 2]);
            let loss = layout::copy_to_group(x, rank)?.sum();
            done(layout::backward(&loss, rank))
        },
        |_, endings| assert!(matches!(all_alike(endings), Error::Mismatch { .. })),
    );
    // Everybody's gradients arrive, but they are not those of what was taken apart.
    endings(
        |rank| {
            let x = leaf([4 + rank.rank() % 2, 3]);
            let loss = layout::scatter_to_group(x, 0, rank)?.sum();
            done(layout::backward(&loss, rank))?;
            rank.barrier()
        },
        |_, endings| {
            let said = all_alike(endings).to_string();
            assert!(said.contains("scatter_to_group"), "{said}");
        },
    );
}

#[test]
fn a_rank_that_does_not_come_to_the_backward() {
    for size in 2..=4 {
        let began = Instant::now();
        let world = launch::threads(size).timeout(TIMEOUT).run(|rank| {
            let x = leaf([2, 3]);
            let twice = layout::copy_to_group(layout::copy_to_group(x.clone(), &rank)? * 2.0, &rank)?;
            if rank.rank() == 1 {
                return Err(Error::user("no more data"));
            }
            // burn's own backward ends, too; the gradient has its shape, and the world its error.
            let grads = twice.sum().backward();
            assert_eq!(x.grad(&grads).map(|dx| dx.dims()), Some([2, 3]));
            Err::<(), _>(rank.failure().expect("the world has failed"))
        });
        let error = world.unwrap_err();
        assert!(matches!(&error, Error::RankFailed { rank: 1, .. }), "{error}");
        assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
    }
}

#[test]
fn a_rank_that_panics_before_the_backward() {
    let began = Instant::now();
    let world = launch::threads(3).timeout(TIMEOUT).run(|rank| {
        let loss = layout::gather_and_copy_to_group(leaf([2]), 0, &rank)?.sum();
        assert_ne!(rank.rank(), 2, "on purpose");
        done(layout::backward(&loss, &rank))
    });
    assert!(matches!(world.unwrap_err(), Error::RankPanicked { rank: 2, .. }));
    assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
}

#[test]
fn a_rank_that_aborts_and_one_that_does_something_else() {
    endings(
        |rank| {
            let loss = layout::copy_to_group(leaf([2]), rank)?.sum();
            if rank.rank() == 1 {
                rank.abort("loss is NaN");
            }
            done(layout::backward(&loss, rank))
        },
        |_, endings| assert!(all_alike(endings).to_string().contains("loss is NaN")),
    );
    endings(
        |rank| {
            // A constant on rank 1 has no backward: it goes on to the barrier.
            let x = if rank.rank() == 1 { leaf([2]).inner() } else { leaf([2]) };
            let loss = layout::copy_to_group(x, rank)?.sum();
            if loss.is_tracked() {
                done(layout::backward(&loss, rank))?;
            }
            rank.barrier()
        },
        |_, endings| assert!(matches!(all_alike(endings), Error::Mismatch { .. })),
    );
}

#[test]
fn a_loss_without_a_gradient() {
    endings(
        |rank| done(layout::backward(&leaf([2]).inner().sum(), rank)),
        |_, endings| assert!(all_alike(endings).to_string().contains("requires a gradient")),
    );
}

/// burn keeps the tape of a forward without a backward until somebody's next backward, and with it the communicators in
/// it; that the rank has ended is known all the same.
#[test]
fn a_rank_that_ends_with_a_tape_in_hand() {
    let began = Instant::now();
    let world = launch::threads(2).timeout(Duration::from_secs(60)).run(|rank| {
        let loss = layout::copy_to_group(leaf([2]), &rank)?.sum();
        if rank.rank() == 1 {
            drop(loss);
            return Ok(());
        }
        rank.barrier()
    });
    let error = world.unwrap_err();
    assert!(matches!(error, Error::RankLost { rank: 1, .. }), "{error}");
    assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
}
