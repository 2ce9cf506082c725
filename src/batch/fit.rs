//! The largest micro-batch that fits into memory.

use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};

use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::tensor::{DType, Tensor};

use crate::Error;
use crate::comm::{Communicator, ReduceOp, panic_message};
use crate::graph::{CustomOps, Executor, TensorTree, capture_step};
use crate::params::{ShardedIds, visit_params};
use crate::step::Loss;

/// What came of trying a number of rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trial {
    /// It went through.
    Fits,
    /// It did not, with what the system or the device said.
    TooLarge(String),
}

/// The largest micro-batch that fits, and what was tried to find it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fit {
    /// The rows.
    pub rows: usize,
    /// What was tried, in order, with what came of it on all ranks together.
    pub tried: Vec<(usize, bool)>,
}

/// The bytes that a training step of a whole model needs beside its parameters, gradients included: the most that are
/// alive at once in the captured step, operation by operation, in which each tensor is freed after its last use.
/// Nothing is run. An eager step needs as much or more, since it keeps tensors for the backward pass that the captured
/// step can free, and libraries need room to compute. A captured step that fuses operations on the host needs less,
/// above all of attention.
///
/// # Errors
/// [`Error::Graph`] if the step cannot be captured.
pub fn step_memory<M, I, F, R>(model: &M, inputs: I, loss: F) -> Result<usize, Error>
where
    M: Module,
    I: TensorTree,
    F: FnOnce(&M, I) -> R,
    R: Into<Loss>,
{
    let graph = capture_step(model, inputs, loss)?;
    Ok(Executor::new(graph, CustomOps::new().with_fusion(false))?.memory().peak)
}

/// The bytes of a model and of the moments of its optimizer, of which Adam has 2 for each parameter that is trained,
/// SGD with momentum 1.
pub fn model_memory<M: Module>(model: &M, moments: usize) -> usize {
    let [all, trained] = held(model);
    all + moments * trained
}

/// The bytes of all parameters and running statistics of a module, and of those that are trained. Lazy ones count as
/// trained: their settings show when they are made.
pub(super) fn held<M: Module>(model: &M) -> [usize; 2] {
    // What stands for a parameter that replicas divide holds one element; the rows come behind it.
    let mut seen: HashSet<_> = ShardedIds::of(model).stand_ins;
    let mut bytes = [0, 0];
    visit_params(model, &mut |param| {
        if seen.insert(param.id()) {
            let own = param.dims().iter().product::<usize>() * param.dtype().size();
            let trained = param.is_float() && (param.is_lazy() || param.is_trained());
            bytes = [bytes[0] + own, bytes[1] + if trained { own } else { 0 }];
        }
    });
    bytes
}

/// The largest number of rows, at most `most`, that is known to need no more than `budget` bytes; 0 if one row needs
/// more. `memory` says what so many rows need ([`step_memory`] and [`model_memory`] do), which grows with the rows: it
/// is asked about `log2(most)` times.
///
/// ```
/// use burn::{nn::LinearConfig, prelude::*};
/// use burn_parallel::batch::{model_memory, rows_within, step_memory};
///
/// let device = Device::flex().autodiff();
/// let model = LinearConfig::new(100, 10).init(&device);
/// let need = |rows: usize| {
///     let x = Tensor::<2>::zeros([rows, 100], &device);
///     let step = step_memory(&model, x, |model: &burn::nn::Linear, x| model.forward(x).powi_scalar(2).mean())?;
///     Ok(model_memory(&model, 2) + step)
/// };
/// let rows = rows_within(1 << 20, 1 << 16, need)?;
/// assert!(need(rows)? <= 1 << 20 && need(rows + 1)? > 1 << 20);
/// # Ok::<(), burn_parallel::Error>(())
/// ```
///
/// # Errors
/// Those of `memory`.
pub fn rows_within(
    budget: u64,
    most: usize,
    mut memory: impl FnMut(usize) -> Result<usize, Error>,
) -> Result<usize, Error> {
    bisect(most, |rows| Ok(memory(rows)? as u64 <= budget))
}

/// The largest number, at most `most`, of which `fits` holds, which holds of all smaller ones too; 0 if it holds of
/// none.
pub(super) fn bisect(most: usize, mut fits: impl FnMut(usize) -> Result<bool, Error>) -> Result<usize, Error> {
    let (mut known, mut beyond) = (0, most.saturating_add(1));
    // The most first: it may be all that is asked for.
    let mut next = most;
    while known + 1 < beyond {
        match fits(next)? {
            true => known = next,
            false => beyond = next,
        }
        next = known + (beyond - known) / 2;
    }
    Ok(known)
}

/// The largest number of rows, at most `most`, that goes through on all ranks of a group: `most` first, then by
/// bisection. `try_rows` is called with the same number on all ranks, and each number fits if it does on every one.
///
/// What may be tried depends on who refuses: a device does, and [`try_step`] asks it; a system that overcommits kills,
/// and [`try_in_child`](super::try_in_child) has a child killed. Take [`rows_within`] of what is known for `most`, so
/// that nothing is tried that cannot fit, and of what the data has, so that nothing is that would never be run.
///
/// # Errors
/// [`Error::InvalidArgument`], the same on all ranks, if not even one row fits; the errors of `try_rows`, those of the
/// world.
pub fn largest_that_fits(
    most: usize,
    group: &Communicator,
    mut try_rows: impl FnMut(usize) -> Result<Trial, Error>,
) -> Result<Fit, Error> {
    let mut tried = Vec::new();
    let mut reason = String::new();
    let fits = bisect(most, |rows| {
        let mine = match try_rows(rows)? {
            Trial::Fits => 1u64,
            Trial::TooLarge(said) => {
                reason = said;
                0
            }
        };
        let all = group.all_reduce(vec![mine], ReduceOp::Min)?[0] == 1;
        tried.push((rows, all));
        Ok(all)
    })?;
    if fits > 0 {
        return Ok(Fit { rows: fits, tried });
    }
    // Every rank returns the reason of the first that has one.
    let mut words = reason.into_bytes();
    let lens = group.all_gather(vec![words.len() as u64])?;
    if let Some(root) = lens.iter().position(|len| *len > 0) {
        words.resize(lens[root] as usize, 0);
        words = group.broadcast(words, root)?;
    }
    let said = String::from_utf8_lossy(&words);
    let problem = format!(
        "not even one row fits ({said}): split the model over more ranks, divide its parameters and the state of its optimizer among replicas \
         (`sharding`), or take a smaller one"
    );
    Err(Error::invalid("largest_that_fits", problem))
}

/// Tries a step, forward and backward, on this rank's whole model, where the device refuses what does not fit. Nothing
/// is communicated and nothing stays: gradients are dropped, running statistics are those of a copy, and no optimizer
/// is there. (Dropout draws from the generator of the device.) A device that cannot allocate a tensor says so when it
/// is read, or what was computed from it, not when its queue is waited for: so the loss is read, and of each gradient
/// one element. A panic, by which burn tells of some of it, is caught; its message still goes through the panic hook.
///
/// On a CPU use [`try_in_child`](super::try_in_child): the system would kill this process.
pub fn try_step<M, I, F, R>(model: &M, inputs: I, loss: F) -> Trial
where
    M: Module,
    F: FnOnce(&M, I) -> R,
    R: Into<Loss>,
{
    let step = || {
        let copy = model.clone().train();
        let parts = loss(&copy, inputs).into().into_parts()?;
        let (value, device) = (parts.value.clone().inner(), parts.value.device());
        let gradients = GradientsParams::from_grads(parts.value.backward(), &copy);
        let mut firsts = Firsts { gradients: &gradients, found: vec![value.cast(DType::F32)] };
        copy.visit(&mut firsts);
        Tensor::cat(firsts.found, 0).try_into_data().map_err(Error::user)?;
        // Until here, as before the update of a real step.
        drop(gradients);
        device.sync().map_err(Error::user)
    };
    match catch_unwind(AssertUnwindSafe(step)) {
        Ok(Ok(())) => Trial::Fits,
        Ok(Err(error)) => Trial::TooLarge(error.to_string()),
        Err(panic) => Trial::TooLarge(panic_message(&*panic)),
    }
}

/// One element of each gradient, which all of it had to be computed for.
struct Firsts<'a> {
    gradients: &'a GradientsParams,
    found: Vec<Tensor<1>>,
}

impl ModuleVisitor for Firsts<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let Some(gradient) = self.gradients.get::<D>(param.id) else { return };
        if gradient.dims().iter().all(|dim| *dim > 0) {
            let first = gradient.slice([const { 0..1 }; D]).reshape([1]);
            self.found.push(first.cast(DType::F32));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::launch;

    #[test]
    fn every_rank_finds_what_fits_on_all() {
        for (limits, most, expected, trials) in
            [([9, 7, 30], 64, 7, 7), ([64, 80, 64], 64, 64, 1), ([1, 5, 5], 6, 1, 4), ([5, 5, 5], 5, 5, 1)]
        {
            let found = launch::threads(3)
                .run(|rank| {
                    largest_that_fits(most, &rank, |rows| {
                        let fits = rows <= limits[rank.rank()];
                        Ok(if fits { Trial::Fits } else { Trial::TooLarge("no room".into()) })
                    })
                })
                .unwrap();
            assert!(found.iter().all(|fit| *fit == found[0]));
            assert_eq!(found[0].rows, expected);
            assert!(found[0].tried.len() <= trials, "{:?}", found[0]);
        }
    }

    #[test]
    fn nothing_that_fits_is_the_same_error_everywhere() {
        let errors = launch::threads(2)
            .run(|rank| {
                let said = if rank.rank() == 1 { Trial::TooLarge("out of memory".into()) } else { Trial::Fits };
                Ok(largest_that_fits(4, &rank, |_| Ok(said.clone())).unwrap_err())
            })
            .unwrap();
        assert_eq!(errors[0], errors[1]);
        assert!(errors[0].to_string().contains("(out of memory)") && errors[0].to_string().contains("sharding"));
    }

    #[test]
    fn rows_are_bounded_by_what_is_known() {
        let within = |budget, most| rows_within(budget, most, |rows| Ok(100 + 10 * rows)).unwrap();
        assert_eq!(within(155, 1000), 5);
        assert_eq!(within(109, 1000), 0);
        assert_eq!(within(u64::MAX, 1000), 1000);
        assert_eq!(within(110, 1), 1);
    }
}
