//! What a user can bring that does not fit: each time an error that says what to do.

use std::process::Command;

use burn::module::{Module, Param, RunningState};
use burn::nn::{BatchNorm, BatchNormConfig};
use burn::prelude::*;
use burn_parallel::graph::{CustomOps, Executor, capture_step};
use burn_parallel::step::Loss;

use crate::common::models::*;
use crate::common::reference::{difference, values};

#[track_caller]
fn problem<R: Into<Loss>>(loss: impl FnOnce(&Mlp, Tensor<2>) -> R, words: &str) {
    let device = device();
    let model = Mlp::new(0.0, &device);
    let x = || Numbers(1).tensor([3, 6], &device);
    let before = values(&model);
    let problem = capture_step(&model, x(), loss).unwrap_err().to_string();
    assert!(problem.contains(words), "{problem}");
    // The model and the thread's capture device are as good as before.
    assert_eq!(difference(&before, &values(&model)), 0.0);
    let graph = capture_step(&model, x(), |m, x| m.forward(x).mean()).unwrap();
    Executor::new(graph, CustomOps::new()).unwrap().step(&model, x()).unwrap();
}

#[test]
fn a_host_read_of_an_activation() {
    problem(
        |m, x| {
            let y = m.forward(x).mean();
            if y.clone().into_scalar::<f32>() > 0.0 { y } else { -y }
        },
        "reads a tensor on the host",
    );
}

#[test]
fn a_host_read_of_an_input_or_a_parameter() {
    problem(|m, x| m.forward(x.clone()).mean() * x.mean().into_scalar::<f32>(), "reads a tensor on the host");
    problem(|m, x| m.forward(x.clone()).mean() * x.into_data().num_elements() as f32, "reads a tensor on the host");
    problem(|m, x| m.forward(x).mean() * m.first.weight.val().into_data().num_elements() as f32, "on the host");
}

#[test]
fn a_move_to_another_device() {
    problem(|m, x| m.forward(x.to_device(&Device::flex())).mean(), "`to_device` inside the step");
}

#[test]
fn a_loss_of_several_elements() {
    problem(|m, x| m.forward(x).reshape([12]), "must have one element, but it has 12");
}

#[test]
fn a_loss_without_parameters() {
    problem(|_, x| x.mean(), "does not depend on any trainable parameter");
    problem(|m, x| m.forward(x).mean().detach(), "does not depend on any trainable parameter");
    problem(|_, _| Tensor::<1>::zeros([1], &Device::flex()), "does not depend on any trainable parameter");
    let device = device();
    let model = Mlp::new(0.0, &device).freeze();
    let problem = capture_step(&model, Numbers(1).tensor([3, 6], &device), |m, x| m.forward(x).mean()).unwrap_err();
    assert!(problem.to_string().contains("does not depend on any trainable parameter"), "{problem}");
}

#[test]
fn a_tensor_from_outside() {
    let other = Numbers(3).tensor::<2>([3, 6], &device());
    problem(move |m, x| m.forward(x + other).mean(), "neither an input nor part of the module");
    let other = Numbers(3).tensor::<2>([3, 6], &Device::flex());
    problem(move |m, x| (m.forward(x).mean(), other), "output `` was not computed from");
}

#[test]
fn a_panic_of_the_model() {
    problem(|_, _| -> Tensor<1> { panic!("the model's own words") }, "the model's own words");
    problem(|m, x| m.forward(x.reshape([9, 2])).mean(), "does it run eagerly?");
}

#[test]
fn a_capture_inside_a_capture() {
    let inner = |m: &Mlp, x: Tensor<2>| {
        let problem = capture_step(m, x.clone(), |m, x| m.forward(x).mean()).unwrap_err().to_string();
        assert!(problem.contains("inside the closure of another"), "{problem}");
        m.forward(x).mean()
    };
    capture_step(&Mlp::new(0.0, &device()), Numbers(1).tensor([3, 6], &device()), inner).unwrap();
}

#[test]
fn inputs_or_a_model_that_do_not_fit_the_graph() {
    let device = device();
    let model = Mlp::new(0.0, &device);
    let x = |rows| Numbers(1).tensor::<2>([rows, 6], &device);
    let graph = capture_step(&model, x(3), |m, x| m.forward(x).mean()).unwrap();
    let mut executor = Executor::new(graph, CustomOps::new()).unwrap();
    let problem = executor.step(&model, x(4)).unwrap_err().to_string();
    assert!(problem.contains("input `` is F32 [4, 6], but the graph was captured with F32 [3, 6]"), "{problem}");
    let problem = executor.step(&model, (x(3), x(3))).unwrap_err().to_string();
    assert!(problem.contains(r#"captured with inputs [""] but is given ["0", "1"]"#), "{problem}");
    let problem = executor.step(&Mlp::new(0.0, &device), x(3)).unwrap_err().to_string();
    assert!(problem.contains("no parameter `first.weight`"), "{problem}");
    executor.step(&model, x(3)).unwrap();
}

#[derive(Module, Debug)]
struct TwoCalls {
    norm: BatchNorm,
}

#[test]
fn one_batch_norm_called_twice() {
    let model = TwoCalls { norm: BatchNormConfig::new(6).init(&device()) };
    let loss = |m: &TwoCalls, x: Tensor<2>| m.norm.forward(m.norm.forward(x).powi_scalar(3)).mean();
    let problem = capture_step(&model, Numbers(1).tensor([4, 6], &device()), loss).unwrap_err().to_string();
    assert!(problem.contains("give each call its own `BatchNorm`"), "{problem}");
}

#[derive(Module, Debug)]
struct OwnState {
    weight: Param<Tensor<1>>,
    state: RunningState<Tensor<1>>,
}

#[test]
fn a_running_state_that_is_not_a_batch_norms() {
    let device = device();
    let model = OwnState {
        weight: Param::from_tensor(Numbers(1).tensor([6], &device)),
        state: RunningState::new(Tensor::zeros([6], &device)),
    };
    let loss = |m: &OwnState, x: Tensor<1>| {
        m.state.update(x.clone());
        (x * m.weight.val()).sum()
    };
    let problem = capture_step(&model, Numbers(1).tensor([6], &device), loss).unwrap_err().to_string();
    assert!(problem.contains("`state` is a `RunningState`"), "{problem}");
}

const SPEAKS: &str = "BURN_PARALLEL_TEST_SPEAKS";

/// What the test below runs in a process of its own, to see what that prints.
#[test]
#[ignore = "is run by another test"]
fn panics_during_a_capture() {
    match std::env::var(SPEAKS).unwrap().as_str() {
        "host" => a_host_read_of_an_activation(),
        "device" => a_move_to_another_device(),
        "outside" => a_tensor_from_outside(),
        "model" => a_panic_of_the_model(),
        // While another thread captures, and reads on the host, panics of this one are its own.
        "thread" => std::thread::scope(|scope| {
            scope.spawn(a_host_read_of_an_activation).join().unwrap();
            let other = scope.spawn(|| {
                problem(
                    |m, x| {
                        let panicked = std::thread::spawn(|| panic!("no concrete value, says another thread"));
                        assert!(panicked.join().is_err());
                        m.forward(x.clone()).mean() * x.mean().into_scalar::<f32>()
                    },
                    "reads a tensor on the host",
                );
            });
            other.join().unwrap();
        }),
        other => panic!("{other}"),
    }
}

/// burn tells of what cannot be recorded by panics: the error of it is all that is printed. What else panics, in the
/// model or on another thread, is printed as ever, and everything where places are asked for.
#[test]
fn a_panic_that_becomes_an_error_says_nothing_else() {
    let said = |what: &str, backtrace: &str| {
        let mut itself = Command::new(std::env::current_exe().unwrap());
        itself.args(["--exact", "errors::panics_during_a_capture", "--ignored", "--nocapture"]);
        let output = itself.env(SPEAKS, what).env("RUST_BACKTRACE", backtrace).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{said}");
        said
    };
    for what in ["host", "device", "outside"] {
        let said = said(what, "0");
        assert!(!said.contains("panicked at"), "{what}: {said}");
    }
    assert!(said("model", "0").contains("the model's own words"));
    let thread = said("thread", "0");
    assert!(thread.matches("panicked at").count() == 1 && thread.contains("says another thread"), "{thread}");
    assert!(said("host", "1").contains("panicked at"));
}
