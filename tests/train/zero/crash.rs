//! A process that is killed while the others wait for its rows ends all of them.

use std::process::Command;
use std::time::{Duration, Instant};

use burn::nn::LinearConfig;
use burn::tensor::{Device, Tensor};
use burn_parallel::prelude::*;

use super::{config, optimizer, wrap};

/// Run by the test below: the processes come to this place again. The second dies between two layers of its second
/// step.
#[test]
#[ignore = "a helper of the other test"]
fn itself() {
    let outcome = launch::processes(3).run(
        |process| process.threads(1).timeout(Duration::from_secs(60)),
        |rank| {
            let device = Device::flex().autodiff();
            let layers: Vec<_> = (0..3).map(|_| LinearConfig::new(130, 130).init(&device)).collect();
            let mut model = wrap(&rank, &layers, config(Sharding::Parameters))?;
            let mut optim = optimizer("adamw");
            for step in 0..3 {
                let x = Tensor::<2>::ones([2, 130], &device);
                let done = model.step(x, |layers, x| {
                    let x = layers[0].forward(x);
                    if step == 1 && rank.rank() == 1 {
                        std::process::abort();
                    }
                    layers[2].forward(layers[1].forward(x)).mean()
                })?;
                model = model.optimize(&mut optim, 1e-2, done)?;
            }
            Ok(())
        },
    );
    if let Err(error) = outcome {
        eprintln!("<{error}>");
        std::process::exit(3);
    }
}

#[test]
fn a_process_that_dies_in_the_middle_of_a_step_ends_all() {
    let began = Instant::now();
    let mut parent = Command::new(std::env::current_exe().unwrap());
    parent.args(["--exact", "zero::crash::itself", "--ignored", "--nocapture"]);
    let output = parent.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr) + String::from_utf8_lossy(&output.stdout);
    assert!(!output.status.success() && said.contains("rank 1"), "{said}");
    assert!(began.elapsed() < Duration::from_secs(40), "nobody waits for the time-out: {said}");
}
