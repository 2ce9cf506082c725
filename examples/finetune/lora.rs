//! Low-rank adapters (LoRA, arXiv:2106.09685) on chosen projections.

use std::collections::BTreeSet;
use std::path::Path;

use burn::module::{LoraAdapter, Module, Param, Reparameterizer};
use burn::tensor::{Tensor, TensorData};
use burn_parallel::hf::{self, Adapter, AdapterConfig, Mapping, SaveConfig, SavedDirectory};
use burn_parallel::prelude::*;
use burn_parallel::train::Parallel;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::model::Llama;

/// The projections that can have adapters.
pub const TARGETS: [&str; 7] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

/// Which adapters a model is given.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraConfig {
    /// The columns of `a` and rows of `b` in `weight + alpha / rank * a @ b`.
    pub rank: usize,
    /// Times `rank`: what their product is scaled by.
    pub alpha: f64,
    /// Which of [`TARGETS`] have some.
    pub targets: Vec<String>,
    /// What `a` is drawn from; `b` is zero, so that the model is at first what it was.
    pub seed: u64,
}

impl LoraConfig {
    /// # Errors
    /// One line, if there are no such adapters.
    pub fn check(&self) -> Result<(), String> {
        let Self { rank, alpha, targets, .. } = self;
        if *rank == 0 || !alpha.is_finite() || *alpha <= 0.0 {
            return Err(format!("LoRA has a rank from 1 and an alpha above 0, not {rank} and {alpha}"));
        }
        if targets.is_empty() {
            return Err(format!("LoRA needs a projection: one or more of {}", TARGETS.join(", ")));
        }
        match targets.iter().find(|target| !TARGETS.contains(&target.as_str())) {
            Some(target) => {
                Err(format!("`{target}` is no projection that LoRA can adapt: they are {}", TARGETS.join(", ")))
            }
            None => Ok(()),
        }
    }

    fn sizes(&self) -> AdapterConfig {
        AdapterConfig { rank: self.rank, alpha: self.alpha }
    }
}

/// Gives a model adapters, which are all of it that is trained from now on. Before it is spread over ranks; no weight
/// is made that was not made yet. `a` is drawn as by `peft`: evenly up to the inverse root of the inputs, the same on
/// every rank.
///
/// # Errors
/// As [`LoraConfig::check`].
pub fn adapt(model: Llama, config: &LoraConfig) -> Result<Llama, String> {
    config.check()?;
    let targets = config.targets.iter().map(String::as_str).collect();
    Ok(model.apply_reparameterization(Fresh { config, targets, made: 0 }))
}

/// Gives the adapters of a model the values of those in a directory of `peft`. Collective, after the weights are
/// loaded.
///
/// # Errors
/// As of [`Adapter::open`] and [`load`](ParallelModule::load).
pub fn resume(model: Parallel<Llama>, dir: &Path) -> Result<Parallel<Llama>, Error> {
    model.load(&mut Adapter::open(dir)?.mapped(&Mapping::llama())?)
}

/// Writes the adapters of a model as a directory that `peft` loads, onto the weights of `base`, in the place of one
/// that is there. Collective.
///
/// # Errors
/// As of [`hf::save_adapter`].
pub fn save(
    model: &Parallel<Llama>,
    world: &Communicator,
    (base, to): (&Path, &Path),
    config: &LoraConfig,
) -> Result<SavedDirectory, Error> {
    let base = base.to_string_lossy();
    hf::save_adapter(model, world, to, (&base, config.sizes()), &SaveConfig::new(Mapping::llama()).with_overwrite(true))
}

/// Makes adapters, as burn's `Lora` does, which would make every weight as well.
struct Fresh<'a> {
    config: &'a LoraConfig,
    targets: BTreeSet<&'a str>,
    made: u64,
}

impl Reparameterizer for Fresh<'_> {
    type Reparam = LoraAdapter;

    fn reparameterize<const D: usize>(
        &mut self,
        path: &str,
        param: Param<Tensor<D>>,
    ) -> (Param<Tensor<D>>, Option<LoraAdapter>) {
        let (dims, device) = (param.lazy_shape(), param.lazy_device());
        let frozen = param.set_require_grad(false);
        let layer = path.strip_suffix(".weight").and_then(|path| path.rsplit('.').next());
        if !layer.is_some_and(|layer| self.targets.contains(layer)) {
            return (frozen, None);
        }
        let (inputs, outputs, rank) = (dims[0], dims[1], self.config.rank);
        let mut random = ChaCha8Rng::seed_from_u64(self.config.seed);
        random.set_stream(self.made);
        self.made += 1;
        let bound = (inputs as f32).sqrt().recip();
        let drawn: Vec<f32> = (0..inputs * rank).map(|_| random.random_range(-bound..bound)).collect();
        let adapter = LoraAdapter {
            a: Param::from_tensor(Tensor::from_data(TensorData::new(drawn, [inputs, rank]), &device)),
            b: Param::from_tensor(Tensor::zeros([rank, outputs], &device)),
            scale: self.config.alpha / rank as f64,
        };
        (frozen, Some(adapter))
    }
}
