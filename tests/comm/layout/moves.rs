//! Every pair against its formula, exactly: value, gradient, and no tape without need.

use burn::tensor::{DType, Device, Tensor};
use burn_parallel::Error;
use burn_parallel::comm::{Communicator, Counters};
use burn_parallel::layout::{self, Layout};
use burn_parallel::prelude::{Mesh, launch};

use crate::common::dense::Dense;

/// One rank's view of a move: what it brings, what it should get, the weights of its loss, and the gradient due.
struct Case {
    what: String,
    brings: Dense,
    gets: Dense,
    weights: Dense,
    gradient: Dense,
}

/// Where a case runs.
struct Bench<'a> {
    comm: &'a Communicator,
    device: Device,
    dtype: DType,
}

impl Bench<'_> {
    fn check<const D: usize>(
        &self,
        case: Case,
        go: impl Fn(Tensor<D>, &Communicator) -> Result<Tensor<D>, Error>,
    ) -> Result<(), Error> {
        let what = format!("{} {:?} on rank {} of {}", case.what, self.dtype, self.comm.rank(), self.comm.size());
        let leaf = case.brings.tensor::<D>(&self.device, self.dtype).require_grad();
        let moved = go(leaf.clone() * 1.0, self.comm)?;
        assert_eq!(Dense::of(&moved), case.gets, "{what}");
        assert_eq!(moved.dtype(), self.dtype, "{what}");
        assert_eq!(Dense::of(&leaf), case.brings, "{what}: the input has changed");
        let loss = (moved * case.weights.tensor(&self.device, self.dtype)).sum();
        let grads = layout::backward(&loss, self.comm)?;
        let gradient = leaf.grad(&grads).expect("a gradient");
        assert_eq!(Dense::of(&gradient), case.gradient, "{what}: gradient");

        let leaf_alone = case.brings.tensor::<D>(&self.device, self.dtype).require_grad();
        let moved = go(leaf_alone.clone(), self.comm)?;
        let grads = layout::backward(&(moved * case.weights.tensor(&self.device, self.dtype)).sum(), self.comm)?;
        let gradient = leaf_alone.grad(&grads).expect("a gradient");
        assert_eq!(Dense::of(&gradient), case.gradient, "{what}: gradient of a leaf");

        for device in [self.device.clone(), Device::flex()] {
            let constant = case.brings.tensor::<D>(&device, self.dtype);
            let moved = go(constant, self.comm)?;
            assert_eq!(Dense::of(&moved), case.gets, "{what} without a graph");
            assert_eq!(moved.device(), device, "{what} without a graph");
            assert!(!moved.is_tracked(), "{what} without a graph");
        }
        Ok(())
    }
}

/// All moves of a tensor of these dims.
fn all_moves<const D: usize>(bench: &Bench<'_>, dims: [usize; D]) -> Result<(), Error> {
    let (size, rank) = (bench.comm.size(), bench.comm.rank());
    let (x, w) = (Dense::integers(&dims, 1), Dense::integers(&dims, 2));
    let xs: Vec<Dense> = (0..size).map(|rank| Dense::integers(&dims, 10 + rank as u64)).collect();
    let ws: Vec<Dense> = (0..size).map(|rank| Dense::integers(&dims, 20 + rank as u64)).collect();
    let (x_sum, w_sum) = (Dense::sum(xs.clone()), Dense::sum(ws.clone()));
    let case = |what: String, brings: &Dense, gets: &Dense, weights: &Dense, gradient: &Dense| Case {
        what: format!("{what} of {dims:?}"),
        brings: brings.clone(),
        gets: gets.clone(),
        weights: weights.clone(),
        gradient: gradient.clone(),
    };
    bench.check::<D>(case("f".into(), &x, &x, &ws[rank], &w_sum), layout::copy_to_group)?;
    bench.check::<D>(case("g".into(), &xs[rank], &x_sum, &w, &w), layout::reduce_from_group)?;
    for dim in 0..D {
        let part = |whole: &Dense| whole.part(dim, size, rank);
        let (x_part, w_part) = (part(&x), part(&w));
        let name = |name: &str| format!("{name} along {dim}");
        bench
            .check::<D>(case(name("scatter"), &x, &x_part, &w_part, &w), |x, c| layout::scatter_to_group(x, dim, c))?;
        bench
            .check::<D>(case(name("gather"), &x_part, &x, &w, &w_part), |x, c| layout::gather_from_group(x, dim, c))?;
        bench.check::<D>(case(name("gather and copy"), &x_part, &x, &ws[rank], &part(&w_sum)), |x, c| {
            layout::gather_and_copy_to_group(x, dim, c)
        })?;
        bench.check::<D>(case(name("reduce-scatter"), &xs[rank], &part(&x_sum), &w_part, &w), |x, c| {
            layout::reduce_scatter_to_group(x, dim, c)
        })?;
        for other in 0..D {
            let (to, back) = (x.part(other, size, rank), w.part(other, size, rank));
            bench.check::<D>(case(format!("all-to-all {dim} to {other}"), &x_part, &to, &back, &w_part), |x, c| {
                layout::all_to_all(x, dim, other, c)
            })?;
        }
        for root in 0..size {
            let at_root = |whole: &Dense| if rank == root { whole.clone() } else { whole.rows(dim, 0..0) };
            let (x_root, w_root) = (at_root(&x), at_root(&w));
            bench.check::<D>(
                case(format!("gather along {dim} to {root}"), &x_part, &x_root, &w_root, &w_part),
                |x, c| layout::gather_to_root(x, dim, root, c),
            )?;
            let brings = if rank == root { x.clone() } else { Dense::zeros(&[2; D]) };
            let gradient = if rank == root { w.clone() } else { Dense::zeros(&[2; D]) };
            bench.check::<D>(
                case(format!("scatter along {dim} from {root}"), &brings, &x_part, &w_part, &gradient),
                |x, c| layout::scatter_from_root(x, dim, root, c),
            )?;
        }
    }
    redistributions(bench, dims)
}

/// From every layout to every other. The gradient of what is replicated or partial is replicated.
fn redistributions<const D: usize>(bench: &Bench<'_>, dims: [usize; D]) -> Result<(), Error> {
    let (size, rank) = (bench.comm.size(), bench.comm.rank());
    let (x, w) = (Dense::integers(&dims, 3), Dense::integers(&dims, 4));
    let held = |layout: Layout, whole: &Dense, rank: usize| match layout {
        Layout::Replicated => whole.clone(),
        Layout::Sharded(dim) => whole.part(dim, size, rank),
        Layout::Partial if rank == 0 => whole.clone(),
        Layout::Partial => Dense::zeros(&dims),
    };
    let gradient = |layout: Layout| match layout {
        Layout::Sharded(dim) => w.part(dim, size, rank),
        _ => w.clone(),
    };
    let layouts = || [Layout::Replicated, Layout::Partial].into_iter().chain((0..D).map(Layout::Sharded));
    for (from, to) in layouts().flat_map(|from| layouts().map(move |to| (from, to))) {
        let brings = held(from, &x, rank);
        assert_eq!(from.local_dims(&dims, size, rank)?, brings.dims);
        let what = format!("{dims:?} from {from} to {to}");
        let case = Case { what, brings, gets: held(to, &x, rank), weights: gradient(to), gradient: gradient(from) };
        bench.check::<D>(case, |x, c| layout::redistribute(x, from, to, c))?;
    }
    Ok(())
}

/// The ways a device can record.
fn devices() -> [Device; 2] {
    [Device::flex().autodiff(), Device::flex().autodiff().gradient_checkpointing()]
}

/// The moves of one shape, on worlds of 1 to 4 ranks.
fn everywhere<const D: usize>(shapes: &[[usize; D]], dtypes: &[DType]) {
    for size in 1..=4 {
        let run = launch::threads(size).run(|world| {
            for device in devices() {
                for &dtype in dtypes {
                    let bench = Bench { comm: &world, device: device.clone(), dtype };
                    shapes.iter().try_for_each(|&dims| all_moves(&bench, dims))?;
                }
            }
            Ok(())
        });
        run.unwrap();
    }
}

const ALL: &[DType] = &[DType::F32, DType::F64, DType::F16, DType::BF16];

#[test]
fn rank_1() {
    everywhere(&[[12], [7], [2]], ALL);
}

#[test]
fn rank_2() {
    everywhere(&[[12, 24], [5, 7], [2, 3]], ALL);
}

#[test]
fn rank_3() {
    everywhere(&[[4, 6, 12], [3, 5, 2]], &[DType::F32, DType::BF16]);
}

#[test]
fn rank_4() {
    everywhere(&[[2, 5, 3, 4]], &[DType::F32]);
}

#[test]
fn nothing_at_all() {
    everywhere(&[[0, 3], [3, 0]], &[DType::F32]);
}

/// A strided input, and a gradient that is one number expanded.
#[test]
fn strided() {
    let run = launch::threads(3).run(|world| {
        let device = Device::flex().autodiff();
        let x = Dense::integers(&[5, 4], 1);
        let leaf = x.tensor::<2>(&device, DType::F32).require_grad();
        let turned = layout::scatter_to_group(leaf.clone().transpose(), 0, &world)?;
        let whole = layout::gather_and_copy_to_group(turned, 0, &world)?.transpose();
        assert_eq!(Dense::of(&whole), x);
        let grads = layout::backward(&layout::copy_to_group(whole, &world)?.sum(), &world)?;
        // Three ranks add up ones in `f`, and then threes in the gather.
        assert_eq!(Dense::of(&leaf.grad(&grads).unwrap()).values, [9.0; 20]);
        Ok(())
    });
    run.unwrap();
}

/// One dim cut along two axes, and two dims along one each.
#[test]
fn two_axes() {
    let run = launch::threads(4).run(|world| {
        let mesh = Mesh::new(&world, [("outer", 2), ("inner", 2)])?;
        let (outer, inner) = (mesh.axis("outer")?, mesh.axis("inner")?);
        let device = Device::flex().autodiff();
        let x = Dense::integers(&[7, 5], 1);
        let ws: Vec<Dense> = (0..4).map(|rank| Dense::integers(&[7, 5], 20 + rank)).collect();
        for (first, second) in [(0, 0), (0, 1), (1, 0)] {
            let part =
                |whole: &Dense| whole.part(first, outer.size(), outer.rank()).part(second, inner.size(), inner.rank());
            let leaf = x.tensor::<2>(&device, DType::F32).require_grad();
            let cut = layout::scatter_to_group(leaf.clone(), first, &outer)?;
            let cut = layout::scatter_to_group(cut, second, &inner)?;
            assert_eq!(Dense::of(&cut), part(&x));
            let grads = layout::backward(&(cut * part(&ws[0]).tensor(&device, DType::F32)).sum(), &world)?;
            assert_eq!(Dense::of(&leaf.grad(&grads).unwrap()), ws[0]);

            let leaf = part(&x).tensor::<2>(&device, DType::F32).require_grad();
            let whole = layout::gather_and_copy_to_group(leaf.clone(), second, &inner)?;
            let whole = layout::gather_and_copy_to_group(whole, first, &outer)?;
            assert_eq!(Dense::of(&whole), x);
            let loss = (whole * ws[world.rank()].tensor(&device, DType::F32)).sum();
            let grads = layout::backward(&loss, &world)?;
            assert_eq!(Dense::of(&leaf.grad(&grads).unwrap()), part(&Dense::sum(ws.clone())));
        }
        Ok(())
    });
    run.unwrap();
}

/// What each move costs, forward and backward, to the byte: 4 ranks, 8 x 4 floats of 4 bytes, 128 bytes in all.
#[test]
fn traffic() {
    type Move = fn(Tensor<2>, &Communicator) -> Result<Tensor<2>, Error>;
    type Cost = Option<(&'static str, u64)>;
    const WHOLE: [usize; 2] = [8, 4];
    const PART: [usize; 2] = [2, 4];
    let moves: [(Move, [usize; 2], Cost, Cost); 7] = [
        (layout::copy_to_group, WHOLE, None, Some(("all_reduce", 192))),
        (layout::reduce_from_group, WHOLE, Some(("all_reduce", 192)), None),
        (|x, c| layout::scatter_to_group(x, 0, c), WHOLE, None, Some(("all_gather", 96))),
        (|x, c| layout::gather_from_group(x, 0, c), PART, Some(("all_gather", 96)), None),
        (
            |x, c| layout::gather_and_copy_to_group(x, 0, c),
            PART,
            Some(("all_gather", 96)),
            Some(("reduce_scatter", 96)),
        ),
        (
            |x, c| layout::reduce_scatter_to_group(x, 0, c),
            WHOLE,
            Some(("reduce_scatter", 96)),
            Some(("all_gather", 96)),
        ),
        (|x, c| layout::all_to_all(x, 0, 1, c), PART, Some(("all_to_all", 24)), Some(("all_to_all", 24))),
    ];
    let run = launch::threads(4).run(|world| {
        let spent = |before: &Counters| {
            (world.counters() - before.clone())
                .iter()
                .map(|(name, tally)| (name, tally.calls, tally.bytes))
                .filter(|(_, calls, _)| *calls > 0)
                .collect::<Vec<_>>()
        };
        let due = |cost: Cost| cost.map(|(name, bytes)| (name, 1, bytes)).into_iter().collect::<Vec<_>>();
        for (index, (go, dims, forward, backward)) in moves.into_iter().enumerate() {
            let leaf = Tensor::<2>::ones(dims, &Device::flex().autodiff()).require_grad();
            let before = world.counters();
            let moved = go(leaf, &world)?;
            assert_eq!(spent(&before), due(forward), "forward of {index}");
            let before = world.counters();
            layout::backward(&moved.sum(), &world)?;
            assert_eq!(spent(&before), due(backward), "backward of {index}");
        }
        Ok(())
    });
    run.unwrap();
}
