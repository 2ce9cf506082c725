//! What a captured step leaves to burn's fusion stays whole: it launches no more kernels than burn's own step.
//!
//! CubeCL writes the name of every kernel that it launches to a file if its settings say so before a device is first
//! used. So the steps run in processes of their own, for which this binary is started again.

use std::process::Command;

use burn::optim::GradientsParams;
use burn_parallel::prelude::*;

use super::strategies::{lm, lm_loss, tokens};
use super::trials::{Trials, gpu};
use crate::common::reference::{optimizer, own_on};

pub fn add_to(trials: &mut Trials) {
    trials
        .add("a_captured_step_launches_no_more_kernels_than_burn", a_captured_step_launches_no_more_kernels_than_burn);
}

/// What a process of its own is to run: `ENGINE STEPS`.
const WANTED: &str = "BURN_PARALLEL_TEST_STEPS";

/// Whether this process was started for its steps alone, which are made then.
pub fn ran_steps() -> bool {
    let Ok(wanted) = std::env::var(WANTED) else { return false };
    let (engine, steps) = wanted.split_once(' ').unwrap();
    let captured = engine == "captured";
    let steps: usize = steps.parse().unwrap();
    let trained = launch::threads(1).run(|rank| {
        let mut optim = optimizer();
        let mut whole = own_on(&lm(), gpu());
        if captured {
            let mut model = whole.tensor_parallel(&rank, Plan::new())?;
            for step in 0..steps {
                let result = model.step(tokens(step, &gpu()), lm_loss)?;
                assert!(result.loss.item().is_finite());
                model = optim.step(0.05, model, result.grads);
            }
            return Ok(());
        }
        for step in 0..steps {
            let loss = lm_loss(&whole, tokens(step, &gpu().autodiff()));
            let grads = GradientsParams::from_grads(loss.backward(), &whole);
            assert!(loss.into_scalar::<f64>().is_finite());
            whole = optim.step(0.05, whole, grads);
        }
        Ok(())
    });
    trained.unwrap();
    true
}

/// Kernels that so many steps launch in a process of their own.
fn launches(engine: &str, steps: usize) -> usize {
    let directory =
        std::env::temp_dir().join(format!("burn_parallel_launches_{}_{engine}_{steps}", std::process::id()));
    std::fs::create_dir(&directory).unwrap();
    let log = directory.join("launches");
    let config = format!("[profiling.logger]\nlevel = \"minimal\"\nfile = {log:?}\n");
    std::fs::write(directory.join("cubecl.toml"), config).unwrap();
    let run = Command::new(std::env::current_exe().unwrap())
        .env(WANTED, format!("{engine} {steps}"))
        .current_dir(&directory)
        .output()
        .unwrap();
    assert!(run.status.success(), "{engine}: {}", String::from_utf8_lossy(&run.stderr));
    let text = std::fs::read_to_string(&log).unwrap();
    std::fs::remove_dir_all(&directory).unwrap();
    text.lines().filter(|line| line.starts_with("Executing ")).count()
}

fn a_captured_step_launches_no_more_kernels_than_burn() {
    let all = std::thread::scope(|scope| {
        let runs = [("eager", 2), ("eager", 3), ("captured", 2), ("captured", 3)];
        let runs = runs.map(|(engine, steps)| scope.spawn(move || launches(engine, steps)));
        runs.map(|run| run.join().unwrap())
    });
    // The steps before the last one choose kernels and make parameters.
    let [burns, captured] = [all[1] - all[0], all[3] - all[2]];
    println!("kernels of a step: burn's {burns}, captured {captured}");
    assert!(burns > 0 && captured <= burns, "a captured step launches {captured} kernels, burn's {burns}");
}
