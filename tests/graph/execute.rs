//! Running: randomness, memory, early gradients, custom operations.

use std::collections::HashMap;

use burn::prelude::*;
use burn_parallel::Error;
use burn_parallel::graph::{
    CustomOpIr, CustomOps, Executor, MemoryEstimate, OperationIr, TensorIr, capture_step, gradients_params,
};

use crate::common::models::*;
use crate::common::reference::{difference, gradient_values, values};

#[test]
fn dropout_draws_new_masks_at_each_execution() {
    let device = device();
    let model = Mlp::new(0.5, &device);
    let x = || Tensor::<2>::ones([4, 6], &device);
    let graph = capture_step(&model, x(), |m, x| (m.forward(x.clone()).mean(), m.dropout.forward(x))).unwrap();
    let mut executor = Executor::new(graph, CustomOps::new()).unwrap();
    let mut mask = || {
        let result = executor.step(&model, x()).unwrap();
        let [mask]: [_; 1] = result.outputs.try_into().unwrap();
        mask.float::<2>().unwrap().into_data().try_to_vec::<f32>().unwrap()
    };
    let (a, b) = (mask(), mask());
    assert!(a.iter().chain(&b).all(|x| *x == 0.0 || *x == 2.0), "{a:?}");
    assert!(a.contains(&0.0) && a.contains(&2.0));
    assert_ne!(a, b);
}

#[test]
fn dropout_on_an_input_is_in_training_mode_also_for_a_plain_input() {
    let model = Mlp::new(0.5, &device());
    let x = || Tensor::<2>::ones([8, 6], &Device::flex());
    let graph = capture_step(&model, x(), |m, x| (m.forward(x.clone()).mean(), m.dropout.forward(x))).unwrap();
    let result = Executor::new(graph, CustomOps::new()).unwrap().step(&model, x()).unwrap();
    let mask = result.outputs[0].clone().float::<2>().unwrap().into_data().try_to_vec::<f32>().unwrap();
    assert!(mask.contains(&0.0));
}

#[test]
fn memory_is_freed_at_the_last_use() {
    let device = device();
    let model = Lm::new(50, 32, 2, &device);
    let batch = || (Numbers(1).classes([4, 16], 50, &device), Numbers(2).classes([4, 16], 50, &device));
    let graph = capture_step(&model, batch(), |m, (x, t)| m.loss(x, t)).unwrap();
    let without = MemoryEstimate::of_operations(&graph.operations);
    let gradients: usize = graph.params.iter().filter_map(|p| p.gradient.as_ref()).map(bytes).sum();
    let loss = bytes(graph.loss.as_ref().unwrap());
    let with = Executor::new(graph, CustomOps::new()).unwrap().memory();
    assert!(with.peak * 2 < without.peak, "{with:?} {without:?}");
    assert_eq!(with.left_over, gradients + loss, "only the results are left");
}

fn bytes(tensor: &TensorIr) -> usize {
    tensor.shape.num_elements() * tensor.dtype.size()
}

#[test]
fn gradients_come_early_and_in_the_order_of_the_backward_pass() {
    let device = device();
    let model = Mlp::new(0.0, &device);
    let x = || Numbers(1).tensor([3, 6], &device);
    let graph = capture_step(&model, x(), |m, x| m.forward(x).powi_scalar(2).mean()).unwrap();
    let paths: HashMap<_, _> = graph.params.iter().map(|p| (p.id, p.path.clone())).collect();
    // One by one: the very operations of eager burn.
    let mut executor = Executor::new(graph, CustomOps::new().with_fusion(false)).unwrap();
    let mut order = Vec::new();
    let mut gradients = HashMap::new();
    executor
        .step_with(&model, x(), |id, gradient| {
            order.push(paths[&id].clone());
            gradients.insert(id, gradient);
            Ok(())
        })
        .unwrap();
    assert_eq!(order.len(), 4);
    assert!(order[..2].iter().all(|p| p.starts_with("second.")) && order[2..].iter().all(|p| p.starts_with("first.")));
    let gradients = gradients_params(&model, gradients);
    let (_, expected) = eager(&model, |m| m.forward(x()).powi_scalar(2).mean());
    assert_eq!(difference(&gradient_values(&model, &expected), &gradient_values(&model, &gradients)), 0.0);

    // An error of the callback is the step's error, and the executor can go on.
    let stop = Error::Graph { problem: "stop".into() };
    assert_eq!(executor.step_with(&model, x(), |_, _| Err(stop.clone())).unwrap_err(), stop);
    executor.step(&model, x()).unwrap();
}

#[test]
fn running_statistics_are_shared_by_clones_and_forks_until_train() {
    let device = device();
    let model = Cnn::new(&device);
    let (fork, own) = (model.clone().fork(&device), model.clone().fork(&device).train());
    let batch = || images(4, 1, &device);
    let graph = capture_step(&model, batch(), |m, (x, t)| m.loss(x, t)).unwrap();
    let mut executor = Executor::new(graph, CustomOps::new()).unwrap();
    let start = values(&model);
    executor.step(&own, batch()).unwrap();
    assert_eq!(difference(&start, &values(&model)), 0.0);
    assert!(difference(&start, &values(&own)) > 0.1);
    executor.step(&fork, batch()).unwrap();
    assert_eq!(difference(&values(&model), &values(&own)), 0.0);
}

#[test]
fn custom_operations_run_and_fail() {
    let device = device();
    let model = Mlp::new(0.0, &device);
    let x = || Numbers(1).tensor([3, 6], &device);
    let mut graph = capture_step(&model, x(), |m, x| m.forward(x).mean()).unwrap();
    // Doubles the loss.
    let out = graph.loss.clone().unwrap();
    let doubled = TensorIr { id: graph.fresh_id(), ..out.clone() };
    graph.operations.push(OperationIr::Custom(CustomOpIr::new("double", &[out], std::slice::from_ref(&doubled))));
    graph.loss = Some(doubled);
    let problem = Executor::new(graph.clone(), CustomOps::new()).unwrap_err().to_string();
    assert!(problem.contains("no custom operation `double`"), "{problem}");

    let run =
        |f: fn(Vec<burn_parallel::tensor::PlainTensor>) -> Result<Vec<burn_parallel::tensor::PlainTensor>, Error>| {
            let mut ops = CustomOps::new();
            ops.register("double", move |_, inputs| f(inputs));
            Executor::new(graph.clone(), ops).unwrap().step(&model, x()).map(|result| scalar(result.loss))
        };
    let doubled = run(|inputs| {
        // In place: nobody else holds the input.
        let mut input = inputs[0].clone().float::<1>()?.try_into_primitive::<burn::backend::Flex>().unwrap();
        drop(inputs);
        input.try_storage_mut::<f32>().unwrap().iter_mut().for_each(|x| *x *= 2.0);
        Ok(vec![Tensor::<1>::from_primitive::<burn::backend::Flex>(input).into()])
    });
    let single = run(Ok).unwrap();
    assert_eq!(doubled.unwrap(), 2.0 * single);
    let eager = eager(&model, |m| m.forward(x()).mean()).0;
    assert!((single - eager).abs() <= 1e-6 * eager.abs(), "{single} for {eager}");
    let error = Error::Graph { problem: "a peer left".into() };
    assert_eq!(run(|_| Err(Error::Graph { problem: "a peer left".into() })).unwrap_err(), error);
    let problem = run(|_| Ok(vec![])).unwrap_err().to_string();
    assert!(problem.contains("`double` must give"), "{problem}");
    let problem = run(|_| panic!("a bug")).unwrap_err().to_string();
    assert!(problem.contains("custom operation `double` at `second` panicked: a bug"), "{problem}");
}
