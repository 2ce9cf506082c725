//! What a run would be.

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Device, Tensor};
use burn_parallel::prelude::*;
use burn_parallel::sharding::Sharding;

use crate::args::{Args, DryRun};
use crate::common::device;
use crate::common::figures::{row, table};
use crate::common::mesh::Axes;
use crate::common::program::unsuited;
use crate::data::row::batch;
use crate::input::Input;
use crate::model::Llama;
use crate::train::{adapted, spread};

/// Spreads the model without weights, and says what each rank would hold, and what the first batch is.
pub fn run(rank: Rank, args: &Args, input: &Input) -> Result<String, Error> {
    let world = device::world(&rank, args.start.launch, args.start.nccl)?;
    let device = args.autodiff(&args.start.device.of(&rank, args.start.launch)?);
    let mut model = spread(&world, args, &device)?;
    let rows = input.data.batch(0, input.end(args), args.size);
    let (replica, replicas) = model.replica();
    let share = input.data.share(rows.clone(), replica, replicas, args.rows).map_err(Error::user)?;
    model.prepare(batch(&share[0], &device), Llama::loss).map_err(unsuited)?;
    let held = Held::of(&model, args);
    let parts = match args.strategy.data.sharding {
        Sharding::None => 1,
        _ => args.strategy.data.sharding_ranks.unwrap_or(args.axes.dp),
    };
    // Parameters divided among the replicas are divided already.
    let divided = if args.strategy.data.sharding == Sharding::Parameters { 1 } else { parts };
    let trained = held.trained / divided;
    let all = world.all_gather(vec![held.all as i64, trained as i64, 2 * trained as i64])?;

    let mut said = vec![input.said(), format!("{} steps", input.steps(args))];
    said.extend(args.notes.iter().cloned());
    said.push(String::new());
    let described = adapted(args, &Device::flex())?;
    let mut strategy = args.strategy.clone();
    strategy.tensor.plan = strategy.tensor.plan.only_for(&described);
    said.push(format!("The strategy:\n\n{strategy}"));
    let Args { axes: Axes { tp, .. }, dry_run, .. } = *args;
    if tp > 1 || dry_run == Some(DryRun::Whole) {
        let table = strategy.tensor.plan.table(&described, tp)?;
        let table = if dry_run == Some(DryRun::Whole) { table.to_string() } else { table.in_short().to_string() };
        let title = if tp > 1 { format!("The plan over {tp} ranks:") } else { "The parameters:".into() };
        said.push(format!("{title}\n\n{table}"));
    }
    if let Some(cut) = model.report().cut {
        said.push(format!("The cut into {} stages:\n\n{cut}", cut.stages.len()));
    }
    let bytes = all.chunks(3).enumerate().map(|(rank, bytes)| {
        let (parameters, gradients, optimizer) = (bytes[0], bytes[1], bytes[2]);
        row(
            &format!("rank {rank}"),
            format!("parameters {parameters}, gradients {gradients}, optimizer {optimizer} bytes"),
        )
    });
    said.push(format!("Held between steps, without activations:\n{}\n", table(bytes)));
    said.push("The first batch, with what is trained on between ⟦ and ⟧:\n".into());
    for number in rows.clone() {
        let documents = input.data.shown(number).map_err(Error::user)?;
        said.push(format!("row {}: {}", number - rows.start + 1, documents.join("\n  | ")));
    }
    Ok(said.join("\n"))
}

/// The bytes of parameters, of which none is made.
#[derive(Default)]
pub struct Held {
    pub all: usize,
    /// Those that are trained.
    pub trained: usize,
    adapters: usize,
    within: usize,
}

impl Held {
    pub fn of<M: Module>(model: &M, args: &Args) -> Self {
        let mut held = Self::default();
        model.visit(&mut held);
        Self { trained: if args.lora.is_some() { held.adapters } else { held.all }, ..held }
    }
}

impl ModuleVisitor for Held {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.within += usize::from(name == "lora");
    }

    fn exit_module(&mut self, name: &str, _: &str) {
        self.within -= usize::from(name == "lora");
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let bytes = param.lazy_shape().num_elements() * size_of::<f32>();
        self.all += bytes;
        if self.within > 0 {
            self.adapters += bytes;
        }
    }
}
