//! What a captured step leaves to burn's fusion stays whole: it launches no more kernels than burn's own step.
//!
//! CubeCL writes the name of every kernel that it launches to a file if its environment says so before the device is
//! first used, and in no other way. So the steps run in processes of their own, which this binary starts again for.

use std::process::Command;

use burn::module::Module;
use burn::optim::GradientsParams;
use burn::prelude::*;
use burn_parallel::prelude::*;

use super::strategies::{cnn_loss, images, lm, lm_loss, tokens};
use super::trials::{Trials, gpu};
use crate::common::models::{self, Cnn};
use crate::common::reference::{optimizer, own_on};

pub fn add_to(trials: &mut Trials) {
    trials
        .add("a_captured_step_launches_no_more_kernels_than_burn", a_captured_step_launches_no_more_kernels_than_burn);
}

/// What a process of its own is to run: `MODEL ENGINE STEPS`.
const WANTED: &str = "BURN_PARALLEL_TEST_STEPS";

/// Whether this process was started for its steps alone, which are made then.
pub fn ran_steps() -> bool {
    let Ok(wanted) = std::env::var(WANTED) else { return false };
    let words: Vec<&str> = wanted.split(' ').collect();
    let [model, engine, steps] = words[..] else { panic!("{WANTED}={wanted}") };
    let (captured, steps) = (engine == "captured", steps.parse().unwrap());
    match model {
        "lm" => train(&lm(), captured, steps, tokens, lm_loss),
        _ => train(&Cnn::new(&models::device()), captured, steps, images, cnn_loss),
    }
    true
}

fn train<M: Module + Sync, I: burn_parallel::graph::TensorTree + Clone>(
    model: &M,
    captured: bool,
    steps: usize,
    batch: fn(usize, &Device) -> I,
    loss: fn(&M, I) -> Tensor<1>,
) {
    let trained = launch::threads(1).run(|rank| {
        let (own, mut optim) = (own_on(model, gpu()), optimizer());
        let mut losses = Vec::new();
        if captured {
            let mut own = own.tensor_parallel(&rank, Plan::new())?;
            for step in 0..steps {
                let result = own.step(batch(step, &gpu()), loss)?;
                losses.push(result.loss.item());
                own = optim.step(0.05, own, result.grads);
            }
        } else {
            let mut own = own;
            for step in 0..steps {
                let of_step = loss(&own, batch(step, &gpu().autodiff()));
                let grads = GradientsParams::from_grads(of_step.backward(), &own);
                losses.push(of_step.into_scalar::<f64>());
                own = optim.step(0.05, own, grads);
            }
        }
        Ok(losses)
    });
    println!("losses {:?}", trained.unwrap());
}

/// Kernels that the steps of a process launch.
fn launches(model: &str, engine: &str, steps: usize) -> usize {
    let log =
        std::env::temp_dir().join(format!("burn_parallel_launches_{}_{model}_{engine}_{steps}", std::process::id()));
    let run = Command::new(std::env::current_exe().unwrap())
        .env(WANTED, format!("{model} {engine} {steps}"))
        .env("CUBECL_DEBUG_LOG", &log)
        .env("CUBECL_DEBUG_OPTION", "profile")
        .output()
        .unwrap();
    assert!(run.status.success(), "{model} {engine}: {}", String::from_utf8_lossy(&run.stderr));
    let text = std::fs::read_to_string(&log).unwrap();
    std::fs::remove_file(&log).unwrap();
    println!("{}", text.lines().take(5).collect::<Vec<_>>().join("\n"));
    text.lines().count()
}

fn a_captured_step_launches_no_more_kernels_than_burn() {
    for model in ["lm", "cnn"] {
        // The first two steps choose kernels and make parameters.
        let [burns, ours] = ["eager", "captured"].map(|engine| launches(model, engine, 4) - launches(model, engine, 2));
        eprintln!("{model}: {burns} {ours}");
        assert!(burns > 0 && ours <= burns, "{model}: two captured steps launch {ours} kernels, burn's {burns}");
    }
}
