//! What Python's `transformers` makes of the directories that come with the tests.

use burn::prelude::*;
use burn_parallel::prelude::*;

use crate::common::llama::{self, Llama, LlamaConfig};
use crate::hf::folder;

/// What PyTorch has made of a directory in steps of AdamW.
#[derive(serde::Deserialize)]
pub struct Golden {
    pub tokens: Vec<Vec<Vec<i64>>>,
    pub losses: Vec<f64>,
    /// Of the first token of the first row.
    pub logits_first: Vec<f64>,
}

/// The models of the directories.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Name {
    Llama,
    Qwen2,
}

impl Name {
    pub const BOTH: [Self; 2] = [Self::Llama, Self::Qwen2];

    pub fn folder(self) -> std::path::PathBuf {
        folder(match self {
            Self::Llama => "llama_gqa",
            Self::Qwen2 => "qwen2_tied",
        })
    }

    pub fn tied(self) -> bool {
        self == Self::Qwen2
    }

    pub fn config(self) -> LlamaConfig {
        LlamaConfig::read(self.folder()).unwrap()
    }

    /// A model of other values.
    pub fn fresh(self, device: &Device) -> Llama {
        self.config().init(device)
    }

    pub fn golden(self) -> Golden {
        serde_json::from_slice(&std::fs::read(self.folder().join("golden.json")).unwrap()).unwrap()
    }

    /// Splits what a mesh splits, evenly over 2 and padded over others.
    pub fn plan(self) -> Plan {
        let plan = Plan::new()
            .shard_padded("*.q_proj.*", 1)
            .shard_padded("*.k_proj.weight", 1)
            .shard_padded("*.v_proj.weight", 1)
            .shard_padded("*.o_proj.weight", 0)
            .shard_padded("*.gate_proj.weight", 1)
            .shard_padded("*.up_proj.weight", 1)
            .shard_padded("*.down_proj.weight", 0)
            .shard_padded("model.embed_tokens.weight", 0);
        let plan = if self.tied() { biases().then(plan) } else { plan };
        if self.tied() { plan } else { plan.then(Plan::new().shard_padded("lm_head.weight", 1)) }
    }

    /// The mesh `[dp, pp, tp]`.
    pub fn strategy(self, [dp, pp, tp]: [usize; 3]) -> Strategy {
        let mut strategy = Strategy::new().with_dp(dp);
        if tp > 1 {
            strategy = strategy.with_tp(tp, self.plan());
        }
        if pp > 1 {
            let cut =
                Cut::before((1..pp).map(|stage| format!("model.layers.{}.*", stage * 4 / pp)).collect::<Vec<_>>());
            strategy = strategy.with_pp(pp, PipelineConfig::new(2).with_cut(cut));
        }
        strategy
    }
}

fn biases() -> Plan {
    Plan::new().shard_padded("*.q_proj.bias", 0).shard_padded("*.k_proj.bias", 0).shard_padded("*.v_proj.bias", 0)
}

impl Golden {
    /// The loss of a first step of one replica.
    pub fn loss<P: ParallelModule<Model = Llama>>(&self, model: &mut P, share: (usize, usize)) -> Result<f64, Error> {
        self.loss_by(model, share, llama::loss)
    }

    /// As [`loss`](Self::loss), of another model.
    pub fn loss_by<P: ParallelModule>(
        &self,
        model: &mut P,
        share: (usize, usize),
        loss: fn(&P::Model, Tensor<2, Int>) -> Tensor<1>,
    ) -> Result<f64, Error> {
        let (replica, replicas) = share;
        let rows = &self.tokens[0];
        let dims = [rows.len(), rows[0].len()];
        let device = Device::flex().autodiff();
        let batch = Tensor::<2, Int>::from_data(TensorData::new(rows.concat(), dims), &device);
        let share = burn_parallel::comm::part(dims[0], replicas, replica);
        let step = model.step(batch.slice([share]), |model, tokens| {
            let [rows, length] = tokens.dims();
            Loss::mean(loss(model, tokens), (rows * (length - 1)) as f64)
        })?;
        Ok(step.loss.item())
    }

    /// Demands that a first step has the loss that PyTorch has.
    pub fn check<P: ParallelModule<Model = Llama>>(
        &self,
        model: &mut P,
        share: (usize, usize),
        tolerance: f64,
    ) -> Result<(), Error> {
        self.demand(self.loss(model, share)?, tolerance);
        Ok(())
    }

    /// Demands that a loss is that of PyTorch's first step.
    pub fn demand(&self, found: f64, tolerance: f64) {
        let expected = self.losses[0];
        assert!((found - expected).abs() <= tolerance * expected, "{found}, not {expected}");
    }
}
