//! Gradients of every layout against the whole ones on one rank.

use burn::module::{Param, ParamId};
use burn::optim::GradientsParams;
use burn::prelude::*;
use burn::tensor::{DType, TensorData};
use proptest::prelude::*;

use super::{Clip, Clipped, NonFinite, Norm, clip};
use crate::Error;
use crate::comm::part;
use crate::graph::GradientLayout;
use crate::launch;
use crate::mesh::Mesh;
use crate::step::NotFinite;

/// How a vector lies over an axis.
#[derive(Debug, Clone, Copy)]
enum Lies {
    /// Each rank has a part, perhaps none.
    Split,
    /// Each rank has all of it.
    Copied,
    /// This rank, if there is one, has it alone; the others hold nothing.
    OnOne(usize),
    /// Ranks from this one on have it: tied between stages.
    From(usize),
}

#[derive(Debug, Clone)]
struct Vector {
    values: Vec<f64>,
    over: [Lies; 2],
}

fn vectors() -> impl Strategy<Value = Vec<Vector>> {
    let lies = prop_oneof![
        Just(Lies::Split),
        Just(Lies::Copied),
        (0..4usize).prop_map(Lies::OnOne),
        (0..4usize).prop_map(Lies::From)
    ];
    let inner = prop_oneof![Just(Lies::Split), Just(Lies::Copied)];
    let vector = (prop::collection::vec(-8.0..8.0f64, 0..30), lies, inner)
        .prop_map(|(values, outer, inner)| Vector { values, over: [outer, inner] });
    prop::collection::vec(vector, 1..10)
}

/// The range that this rank has of so many elements, and whether its copy counts. `None` if it has nothing.
fn own(lies: Lies, len: usize, ranks: usize, rank: usize) -> Option<(std::ops::Range<usize>, bool)> {
    match lies {
        Lies::Split => Some((part(len, ranks, rank), true)),
        Lies::Copied => Some((0..len, rank == 0)),
        Lies::OnOne(home) => (rank == home % ranks).then_some((0..len, true)),
        Lies::From(first) => (rank >= first % ranks).then_some((0..len, rank == first % ranks)),
    }
}

type Model = Vec<Param<Tensor<1>>>;

/// What `clip` gave on a rank, and the gradients that it left there.
type Outcome = (Result<Clipped, Error>, Vec<Vec<f64>>);

/// Runs `clip` on every rank of a mesh, with what each holds.
fn clipped(axes: [usize; 2], dtype: DType, vectors: &[Vector], how: Clip) -> Result<Vec<Outcome>, Error> {
    let device = Device::flex();
    let ids: Vec<ParamId> = vectors.iter().map(|_| ParamId::new()).collect();
    launch::threads(axes[0] * axes[1]).run(|world| {
        let mesh = Mesh::new(&world, [("pp", axes[0]), ("tp", axes[1])])?;
        let (outer, inner) = (mesh.axis("pp")?, mesh.axis("tp")?);
        let mut holding = GradientLayout { rank: world.rank(), ..GradientLayout::default() };
        let (mut model, mut grads) = (Model::new(), GradientsParams::new());
        for (vector, id) in vectors.iter().zip(&ids) {
            model.push(Param::initialized(*id, Tensor::zeros([1], &device)));
            let Some((range, first)) = own(vector.over[0], vector.values.len(), outer.size(), outer.rank()) else {
                continue;
            };
            let Some((within, second)) = own(vector.over[1], range.len(), inner.size(), inner.rank()) else { continue };
            if !(first && second) {
                holding.elsewhere.insert(*id);
            }
            let values = vector.values[range][within].to_vec();
            let len = values.len();
            grads.register(*id, Tensor::<1>::from_data(TensorData::new(values, [len]), (&device, dtype)));
        }
        holding.groups = vec![inner, outer];
        let result = clip(&model, grads, &holding, how);
        let left = |id: &ParamId| match &result {
            Ok(clipped) => clipped.grads.get::<1>(*id).map(|g| g.into_data().convert::<f64>().try_to_vec().unwrap()),
            Err(_) => None,
        };
        let left = ids.iter().map(|id| left(id).unwrap_or_default()).collect();
        Ok((result, left))
    })
}

const MESHES: [[usize; 2]; 8] = [[1, 1], [1, 2], [3, 1], [2, 2], [4, 1], [2, 3], [4, 2], [2, 4]];

/// The norm of the whole vectors.
fn whole(vectors: &[Vector], norm: Norm) -> f64 {
    let values = vectors.iter().flat_map(|vector| &vector.values);
    match norm {
        Norm::L2 => values.map(|x| x * x).sum::<f64>().sqrt(),
        Norm::Infinity => values.fold(0.0, |most, x| x.abs().max(most)),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn any_layout_has_the_norm_of_one_device(vectors in vectors(), mesh in 0..MESHES.len(), l2: bool, max in 0.5..40.0f64) {
        let norm = if l2 { Norm::L2 } else { Norm::Infinity };
        let expected = whole(&vectors, norm);
        let all = clipped(MESHES[mesh], DType::F64, &vectors, Clip::at(max).with_norm(norm)).unwrap();
        let first = all[0].0.as_ref().unwrap();
        for (result, _) in &all {
            let result = result.as_ref().unwrap();
            prop_assert_eq!(result.norm.to_bits(), first.norm.to_bits());
            prop_assert!((result.norm - expected).abs() <= 1e-12 * expected.max(1.0), "{} {}", result.norm, expected);
            prop_assert!(result.skipped.is_none());
            let factor = (max / (result.norm + 1e-6)).min(1.0);
            prop_assert_eq!(result.factor, factor);
        }
        // The largest that is left on any rank is that of the scaled whole.
        let left = all.iter().flat_map(|(_, left)| left.iter().flatten());
        let left = left.fold(0.0f64, |most, x| x.abs().max(most));
        let scaled = whole(&vectors, Norm::Infinity) * first.factor;
        prop_assert!((left - scaled).abs() <= 1e-12 * scaled.max(1.0), "{left} {scaled}");
    }

    #[test]
    fn what_is_not_finite_anywhere_is_known_everywhere(
        vectors in vectors(),
        mesh in 0..MESHES.len(),
        which: prop::sample::Index,
        place: prop::sample::Index,
        kind in 0..3usize,
        l2: bool,
    ) {
        let mut vectors = vectors;
        let which = which.index(vectors.len());
        prop_assume!(!vectors[which].values.is_empty());
        let place = place.index(vectors[which].values.len());
        vectors[which].values[place] = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY][kind];
        let [outer, inner] = MESHES[mesh];
        let ranks = (0..outer * inner).filter(|rank| {
            let over = vectors[which].over;
            let Some((range, _)) = own(over[0], vectors[which].values.len(), outer, rank / inner) else { return false };
            let within = own(over[1], range.len(), inner, rank % inner).map(|(within, _)| within);
            within.is_some_and(|within| (range.start + within.start..range.start + within.end).contains(&place))
        });
        let rank = ranks.min().unwrap();
        let norm = if l2 { Norm::L2 } else { Norm::Infinity };
        let how = Clip::at(1.0).with_norm(norm);
        for (result, _) in clipped([outer, inner], DType::F32, &vectors, how).unwrap() {
            prop_assert_eq!(result.unwrap_err(), Error::NonFinite { path: which.to_string(), rank });
        }
        for (result, left) in clipped([outer, inner], DType::F32, &vectors, how.with_non_finite(NonFinite::Skip)).unwrap() {
            let result = result.unwrap();
            prop_assert_eq!(result.skipped, Some(NotFinite { path: which.to_string(), rank }));
            prop_assert!(!result.norm.is_finite() && result.factor == 0.0);
            prop_assert!(result.grads.is_empty() && left.iter().all(Vec::is_empty));
        }
    }
}

#[test]
fn a_gradient_within_the_norm_keeps_every_bit() {
    let vector = Vector { values: vec![0.1, -0.2, 0.3], over: [Lies::Copied, Lies::Split] };
    for dtype in [DType::F64, DType::F32, DType::BF16, DType::F16] {
        let before: Vec<f64> =
            TensorData::new(vector.values.clone(), [3]).convert_dtype(dtype).convert::<f64>().try_to_vec().unwrap();
        for how in [Clip::at(1.0), Clip::never()] {
            let all = clipped([1, 1], dtype, std::slice::from_ref(&vector), how).unwrap();
            assert_eq!(all[0].1[0], before, "{dtype:?}");
            assert_eq!(all[0].0.as_ref().unwrap().factor, 1.0);
        }
    }
}

#[test]
fn what_cannot_be_meant_is_said_at_once() {
    let vector = Vector { values: vec![1.0], over: [Lies::Copied; 2] };
    for max in [0.0, -1.0, f64::NAN] {
        let all = clipped([1, 2], DType::F32, std::slice::from_ref(&vector), Clip::at(max)).unwrap();
        for (result, _) in all {
            let problem = result.unwrap_err().to_string();
            assert!(problem.contains("must be greater than 0"), "{problem}");
        }
    }
    // Gradients of another model would be left out of the norm.
    let device = Device::flex();
    let model: Model = vec![Param::initialized(ParamId::new(), Tensor::zeros([1], &device))];
    let mut grads = GradientsParams::new();
    grads.register(ParamId::new(), Tensor::<1>::ones([1], &device));
    let problem = clip(&model, grads, &GradientLayout::default(), Clip::at(1.0)).unwrap_err().to_string();
    assert!(problem.contains("1 of 1 gradients belong to no parameter"), "{problem}");
}

#[test]
fn no_gradient_at_all_is_of_norm_0() {
    let model = Model::new();
    let clipped = clip(&model, GradientsParams::new(), &GradientLayout::default(), Clip::at(1.0)).unwrap();
    assert_eq!((clipped.norm, clipped.factor), (0.0, 1.0));
}

#[test]
fn one_collective_puts_together_what_a_strategy_spreads() {
    use crate::prelude::*;
    use burn::nn::{Linear, LinearConfig};
    launch::threads(8)
        .run(|world| {
            let device = world.device().autodiff();
            let layer = || LinearConfig::new(4, 4).init(&device);
            let model: Vec<Linear> = vec![layer(), layer()];
            let pipeline = PipelineConfig::new(2).with_cut(Cut::before(["1.*"]));
            let strategy = Strategy::new().with_tp(2, Plan::new().shard("*.weight", 1)).with_pp(2, pipeline);
            let mut model = model.parallelize(&world, &strategy)?;
            let x = Tensor::<2>::ones([4, 4], &device);
            let step =
                model.step(x, |model, x| model.iter().fold(x, |x, layer| layer.forward(x)).powi_scalar(2).mean())?;
            let holding = model.gradient_layout();
            let [group] = &holding.groups[..] else { panic!("{:?}", holding.groups) };
            let before = group.counters().total().calls;
            let norm = step.clip_grad_norm(&model, Clip::never())?.grad_norm;
            assert_eq!((group.size(), group.counters().total().calls - before), (4, 1));
            Ok(norm)
        })
        .unwrap();
}

#[test]
fn who_brought_it_into_an_average_is_named() {
    // All ranks hold the same average; rank 2 brought the NaN, rank 1 one of a later parameter.
    let device = Device::flex();
    let ids = [ParamId::new(), ParamId::new(), ParamId::new()];
    let errors = |known: bool| {
        launch::threads(3)
            .run(|world| {
                let model: Model = ids.iter().map(|id| Param::initialized(*id, Tensor::zeros([1], &device))).collect();
                let mut grads = GradientsParams::new();
                for (place, id) in ids.iter().enumerate() {
                    let value = if place == 0 { 1.0 } else { f32::NAN };
                    grads.register(*id, Tensor::<1>::full([1], value, &device));
                }
                let brought =
                    if known { [None, Some("2".into()), Some("1".into())][world.rank()].clone() } else { None };
                let averaged = Some(((*world).clone(), brought));
                let holding = GradientLayout { rank: world.rank(), averaged, ..GradientLayout::default() };
                Ok(clip(&model, grads, &holding, Clip::at(1.0)).unwrap_err())
            })
            .unwrap()
    };
    assert_eq!(errors(true), vec![Error::NonFinite { path: "1".into(), rank: 2 }; 3]);
    // Nobody brought one, as where only the sum overflows: the first that has it.
    assert_eq!(errors(false), vec![Error::NonFinite { path: "1".into(), rank: 0 }; 3]);
}
