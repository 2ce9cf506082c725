//! The layers of `tensor_parallel` against burn's own on one device: outputs, gradients of inputs and of every parameter, and
//! the parameters themselves, over several steps of an optimizer.

#[path = "layout/dense.rs"]
#[allow(dead_code)]
mod dense;

use std::collections::BTreeMap;

use burn::module::{Module, ModuleVisitor, Param};
use burn::nn::activation::{ActivationConfig, SwiGlu};
use burn::nn::attention::{MhaInput, MultiHeadAttention, MultiHeadAttentionConfig};
use burn::nn::loss::CrossEntropyLossConfig;
use burn::nn::transformer::{PositionWiseFeedForward, PositionWiseFeedForwardConfig};
use burn::nn::{Embedding, EmbeddingConfig, Initializer, Linear, LinearConfig};
use burn::optim::{AdamWConfig, GradientsParams, ModuleOptimizer, SgdConfig};
use burn::tensor::{Bool, DType, Device, Int, Tensor, TensorData, activation};
use burn_parallel::comm::{Counters, part};
use burn_parallel::prelude::*;
use burn_parallel::tensor_parallel::*;
use dense::Dense;

const STEPS: u64 = 3;
const DEGREES: [usize; 4] = [1, 2, 3, 4];
/// Batch and sequence of the inputs; the sequence is not divided evenly by 2, 3 or 4.
const BATCH: usize = 2;
const SEQUENCE: usize = 7;

fn optimizer(name: &str) -> ModuleOptimizer {
    match name {
        "adamw" => AdamWConfig::new().init(),
        _ => SgdConfig::new().init(),
    }
}

/// Values and, if asked for, gradients of all parameters, by id.
struct Parameters<'a> {
    grads: Option<&'a GradientsParams>,
    found: BTreeMap<String, Dense>,
}

impl ModuleVisitor for Parameters<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let dense = match self.grads {
            None => Dense::of(&param.val()),
            Some(grads) => {
                let gradient = grads.get::<D>(param.id).expect("every parameter is used");
                Dense { dims: gradient.dims().to_vec(), values: gradient.into_data().iter::<f64>().collect() }
            }
        };
        assert!(self.found.insert(param.id.to_string(), dense).is_none());
    }
}

fn parameters<M: Module>(model: &M, grads: Option<&GradientsParams>) -> BTreeMap<String, Dense> {
    let mut visitor = Parameters { grads, found: BTreeMap::new() };
    model.visit(&mut visitor);
    visitor.found
}

/// Fills every parameter with numbers of a seed, in a dtype.
fn filled<M: Module>(model: M, seed: u64, device: &Device, dtype: DType) -> M {
    struct Fill<'a>(u64, &'a Device, DType);
    impl burn::module::ModuleMapper for Fill<'_> {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            self.0 += 1;
            let (id, value, _) = param.consume();
            Param::initialized(id, Dense::fractions(&value.dims(), self.0).tensor(self.1, self.2).require_grad())
        }
    }
    model.map(&mut Fill(seed * 100, device, dtype))
}

fn held(layout: Layout, whole: &Dense, comm: &Communicator) -> Dense {
    match layout {
        Layout::Sharded(dim) => whole.part(dim, comm.size(), comm.rank()),
        _ => whole.clone(),
    }
}

/// What a rank should hold of a parameter, given the dims that it does hold: all, its part, or a head that it shares.
fn slice(whole: &Dense, dims: &[usize], comm: &Communicator) -> Dense {
    let (size, rank) = (comm.size(), comm.rank());
    let Some(dim) = (0..dims.len()).find(|&dim| dims[dim] != whole.dims[dim]) else { return whole.clone() };
    let (local, total) = (dims[dim], whole.dims[dim]);
    if part(total, size, rank).len() == local {
        return whole.part(dim, size, rank);
    }
    let start = rank / (size * local / total) * local;
    whole.rows(dim, start..start + local)
}

/// One run of a layer beside the whole one.
struct Trial<'a> {
    rank: &'a Rank,
    device: Device,
    dtype: DType,
    optim: &'static str,
    /// Layouts and width of the input; `[BATCH, SEQUENCE, width]`.
    input: Layout,
    output: Layout,
    width: usize,
}

impl Trial<'_> {
    fn run<F: Module, L: Module>(
        &self,
        mut full: F,
        mut local: L,
        whole: impl Fn(&F, Tensor<3>) -> Tensor<3>,
        split: impl Fn(&L, Tensor<3>) -> Result<Tensor<3>, Error>,
    ) -> Result<(), Error> {
        let tolerance = if self.dtype == DType::F64 { 1e-9 } else { 2e-4 };
        let comm = self.rank.world();
        let mut optims = [optimizer(self.optim), optimizer(self.optim)];
        for step in 0..STEPS {
            let say = |what: &str| {
                let (rank, size, dtype, optim) = (comm.rank(), comm.size(), self.dtype, self.optim);
                format!("{what}, step {step}, rank {rank} of {size}, {dtype:?}, {optim}")
            };
            let x = Dense::fractions(&[BATCH, SEQUENCE, self.width], 7 + step);
            let leaf = x.tensor::<3>(&self.device, self.dtype).require_grad();
            let y = whole(&full, leaf.clone());
            let expected = Dense::of(&y);
            let w = Dense::fractions(&expected.dims, 70 + step);
            let cost = |y: Tensor<3>, w: Dense| {
                (y.clone() * w.tensor(&self.device, self.dtype) + y.clone() * y * 0.1).sum()
            };
            let grads = cost(y, w.clone()).backward();
            let dx = leaf.grad(&grads).map(|dx| Dense::of(&dx));
            let grads = GradientsParams::from_grads(grads, &full);

            let leaf = held(self.input, &x, comm).tensor::<3>(&self.device, self.dtype).require_grad();
            let y = split(&local, leaf.clone())?;
            Dense::of(&y).assert_near(&held(self.output, &expected, comm), tolerance, &say("output"));
            let mut loss = cost(y, held(self.output, &w, comm));
            if self.output != Layout::Replicated {
                loss = layout::reduce_from_group(loss, comm)?;
            }
            let found = layout::backward(&loss, comm)?;
            match (leaf.grad(&found), dx) {
                (Some(found), Some(dx)) => {
                    Dense::of(&found).assert_near(&held(self.input, &dx, comm), tolerance, &say("dx"));
                }
                (found, dx) => assert_eq!(found.is_some(), dx.is_some(), "{}", say("dx")),
            }
            let found = GradientsParams::from_grads(found, &local);
            let compare = |what: &str, found: BTreeMap<String, Dense>, expected: BTreeMap<String, Dense>| {
                assert!(found.keys().eq(expected.keys()), "{}", say(what));
                for (id, found) in found {
                    found.assert_near(&slice(&expected[&id], &found.dims, comm), tolerance, &say(what));
                }
            };
            compare("gradients", parameters(&local, Some(&found)), parameters(&full, Some(&grads)));
            full = optims[0].step(1e-2, full, grads);
            local = optims[1].step(1e-2, local, found);
            compare("parameters", parameters(&local, None), parameters(&full, None));
        }
        Ok(())
    }
}

/// Runs trials on worlds of some degrees, in both dtypes, with both optimizers, with and without checkpointing.
fn trials(degrees: &[usize], body: impl Fn(Trial<'_>) -> Result<(), Error> + Sync) {
    for &degree in degrees {
        let run = launch::threads(degree).run(|rank| {
            let autodiff = rank.device().autodiff();
            let checkpointed = rank.device().autodiff().gradient_checkpointing();
            for (dtype, optim, device) in [
                (DType::F32, "adamw", &autodiff),
                (DType::F64, "adamw", &autodiff),
                (DType::F64, "sgd", &checkpointed),
            ] {
                let (input, output) = (Layout::Replicated, Layout::Replicated);
                body(Trial { rank: &rank, device: device.clone(), dtype, optim, input, output, width: 5 })?;
            }
            Ok(())
        });
        run.unwrap();
    }
}

const SEQUENCE_PARTS: Layout = Layout::Sharded(1);
const FEATURE_PARTS: Layout = Layout::Sharded(2);

fn sequence(parallel: bool) -> Layout {
    if parallel { SEQUENCE_PARTS } else { Layout::Replicated }
}

#[test]
fn column() {
    trials(&DEGREES, |mut trial| {
        for (bias, gather, parallel) in [(true, false, false), (false, true, false), (true, false, true), (true, true, true)] {
            let full =
                filled(LinearConfig::new(5, 9).with_bias(bias).init(&trial.device), 1, &trial.device, trial.dtype);
            let local = ColumnParallelLinearConfig::new(5, 9)
                .with_bias(bias)
                .with_gather_output(gather)
                .with_sequence_parallel(parallel)
                .init_from(&full, trial.rank)?;
            trial.input = sequence(parallel);
            trial.output = if gather { Layout::Replicated } else { FEATURE_PARTS };
            trial.run(full, local, |full, x| full.forward(x), |local, x| local.forward(x))?;
        }
        Ok(())
    });
}

#[test]
fn row() {
    trials(&DEGREES, |mut trial| {
        for (bias, cut, parallel) in [(true, true, false), (false, true, false), (true, false, false), (true, true, true)] {
            let full =
                filled(LinearConfig::new(5, 9).with_bias(bias).init(&trial.device), 2, &trial.device, trial.dtype);
            let local = RowParallelLinearConfig::new(5, 9)
                .with_bias(bias)
                .with_input_is_parallel(cut)
                .with_sequence_parallel(parallel)
                .init_from(&full, trial.rank)?;
            trial.input = if cut { FEATURE_PARTS } else { Layout::Replicated };
            trial.output = sequence(parallel);
            trial.run(full, local, |full, x| full.forward(x), |local, x| local.forward(x))?;
        }
        Ok(())
    });
}
